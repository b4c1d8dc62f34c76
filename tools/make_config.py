"""Write a config that fits a set of features and this machine.

    python tools/make_config.py --feature_path data/mine_features
    python tools/make_config.py --feature_path data/mine_features --model SiT --size S --hours 8

Latent size, channels, classes and the number of samples come from the set, memory and speed from this machine's GPUs,
or its CPU. It prints each choice with its reason, the memory and the time that training is expected to take, and the
command that trains. With --gpu_memory it plans for another machine's GPUs.

Whatever it chose may be changed in the file, or by a flag of the training scripts; docs/configs.md has all keys.
"""

import os
import shlex

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import CommandParser
from config.schema import MODEL_TYPES
from runtime.commands import python_command, shell_path
from runtime.console import says_next
from runtime.files import check_output, write_json
from runtime.process import configure_runtime, run_cli, say

OUTPUT = "outputs/mine.json"


def build_parser():
    parser = CommandParser(description=__doc__)
    parser.add_argument("--feature_path", required=True, metavar="FOLDER", help="folder with the set of features")
    parser.add_argument(
        "--image_size", type=int, metavar="N", help="picks imagenet{N} of several sets [256, else the only set]"
    )
    parser.add_argument("--output", default=OUTPUT, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    group = parser.add_argument_group("the network")
    group.add_argument("--model", default="DiT", choices=MODEL_TYPES, help="its type")
    group.add_argument(
        "--size", metavar="NAME", help="XS, S, B, L or XL; of a LargeDiT XS, S, B, 600M, 3B or 7B [by set and device]"
    )
    group.add_argument("--patch", type=int, metavar="N", help="side of a patch [2; 1 or 4 where that fits better]")
    group = parser.add_argument_group("batch and length; at most one of the last three")
    group.add_argument("--batch_size", type=int, metavar="N", help="samples of a step, over all GPUs [by the set]")
    group.add_argument("--max_steps", type=int, metavar="N", help="steps of the run [by the set]")
    group.add_argument("--epochs", type=float, metavar="X", help="so many passes over the set instead")
    group.add_argument("--hours", type=float, metavar="X", help="as many steps as this time allows instead")
    group = parser.add_argument_group("the device")
    group.add_argument("--world_size", type=int, metavar="N", help="GPUs [those here; one for a small set]")
    group.add_argument("--gpu_memory", type=float, metavar="GIB", help="plan for GPUs of this memory")
    group.add_argument("--reserve", type=float, default=2.0, metavar="GIB", help="of it to leave free [2]")
    return parser


def check_args(args):
    """Raises `ValueError` for what can be refused without a look at the set."""
    from config.flags import check_positive

    names = ("image_size", "patch", "batch_size", "max_steps", "epochs", "hours", "world_size", "gpu_memory", "reserve")
    check_positive(args, *names)
    lengths = [f"--{name}" for name in ("max_steps", "epochs", "hours") if getattr(args, name) is not None]
    if len(lengths) > 1:
        raise ValueError(f"command line: {' and '.join(lengths)} say the same; give one")
    if args.gpu_memory is not None and args.gpu_memory <= args.reserve:
        raise ValueError(f"--gpu_memory {args.gpu_memory:g}: nothing is left beside --reserve {args.reserve:g}")
    if args.output == OUTPUT:
        os.makedirs(os.path.dirname(OUTPUT), exist_ok=True)
    check_output(args.output, args.overwrite, flag="--output ")


def training_commands(args, features, suggestion):
    """Returns the command lines that train with the config, the recommended one first."""
    setting, steps = suggestion.planned.setting, suggestion.steps
    output = f"outputs/{os.path.splitext(os.path.basename(args.output))[0]}"
    log_every, save_every, draw_every = max(1, min(50, steps // 40)), max(1, min(5000, steps // 4)), steps // 8
    workers, size = 0 if suggestion.config["data"]["in_memory"] else 4, args.image_size
    launcher = ("-m", "paddle.distributed.launch", "--nproc_per_node", str(setting.world_size))
    launcher = launcher if setting.world_size > 1 else ()
    common = f"--config_file {shell_path(args.output)} --feature_path {shell_path(args.feature_path)}"
    preview = f"--image_logging_steps {max(1, min(5000, draw_every))}" if features.vae else ""  # the autoencoder's
    flags = (
        common,
        f"--logging_steps {log_every} --save_steps {save_every} --num_workers {workers}",
        preview,
        size and f"--image_size {size}",
    )
    trainer = python_command(
        "train_image_generation_trainer.py",
        *flags,
        f"--output {shlex.quote(output)}",
        setting.sharding and f"--sharding {setting.sharding} --sharding_parallel_degree {setting.sharding_degree}",
        f"--tensor_parallel_degree {setting.tensor_parallel}" if setting.tensor_parallel > 1 else "",
        launcher=launcher,
    )
    if setting.sharding or setting.tensor_parallel > 1:  # which the hand-written loop has not
        return [trainer]
    runs = f"--output {shlex.quote(f'{output}-notrainer')}"  # a folder of runs, so not the Trainer's
    return [trainer, python_command("train_image_generation_notrainer.py", *flags, runs, launcher=launcher)]


def duration(seconds):
    """Returns a time in words: `40 s`, `12 min`, `3.5 hours`, `2.1 days`."""
    for unit, name, below in ((1, "s", 100), (60, "min", 100), (3600, "hours", 72)):
        if seconds / unit < below:
            return f"{seconds / unit:.{1 if unit == 3600 else 0}f} {name}"
    return f"{seconds / 86400:.1f} days"


def print_suggestion(features, device, suggestion):
    kind = f"{features.samples:,} samples of {features.num_classes:,} classes"
    say(f"{features.name}: {kind}, latents {features.channels} x {features.side} x {features.side}; for {device.title}")
    widths = [max(len(row[column]) for row in suggestion.reasons) for column in (0, 1)]
    for what, value, why in suggestion.reasons:
        say(f"  {what:{widths[0]}}  {value:{widths[1]}}  {why}")
    peak, memory = suggestion.planned.peak / 2**30, device.memory / 2**30
    say(f"memory: {peak:.2f} GiB{' a GPU' if device.kind == 'gpu' else ' beside Paddle'}, of {memory:.1f} to use")
    seconds = suggestion.seconds
    total = duration(seconds * suggestion.steps)
    say(f"time: {seconds:.3g} s a step, {total} for {suggestion.steps:,} steps ({suggestion.source})")


def main(argv=None):
    args = build_parser().parse_args(argv)
    check_args(args)
    configure_runtime()

    from config.schema import load_config
    from features.store import size_note
    from training.suggestion import Wishes, describe_set, find_device, suggest

    features = describe_set(args.feature_path, args.image_size)
    if note := size_note(args.feature_path, features.name, args.image_size):
        say(f"note: {note}")
        args.image_size = None  # not to be carried on
    device = find_device(features.samples, world_size=args.world_size, gpu_memory=args.gpu_memory, reserve=args.reserve)
    names = ("model", "size", "patch", "batch_size", "max_steps", "epochs", "hours")
    suggestion = suggest(features, device, Wishes(**{name: getattr(args, name) for name in names}))
    write_json(args.output, suggestion.config)
    load_config(args.output)
    print_suggestion(features, device, suggestion)
    say(f"config: {args.output}")
    words = ("next", "or, by the hand-written loop")
    for word, command in zip(words, training_commands(args, features, suggestion) if says_next() else (), strict=False):
        say(f"{word}: {command}")


if __name__ == "__main__":
    run_cli(main)
