"""Averages of any width of a run that was trained with --ema_profiles, from its snapshots: post-hoc EMA.

    python tools/reconstruct_ema.py --run outputs/trainer --std 0.03 0.07 0.12 --output outputs/averages

--std is the width of an average relative to the training so far: 0.05 averages the last steps, 0.2 most of them.
Each becomes a folder OUTPUT/std_0.07 with config.json and model_state.pdparams (float32), which every command takes
that takes weights: the demos, tools/sample_npz.py, the converters, --pretrained_model_path; it can't be resumed.
reconstruction.json in it says of what it was made. A width and step that were saved are given back as they are; of
others it is printed by how much the profile of the average is missed. Snapshots after --step are used too.

    python tools/reconstruct_ema.py --run outputs/trainer --std 0.02 0.05 0.1 0.15 0.2 --output outputs/averages \\
        --evaluate REFERENCE --num_samples 10000

also draws samples of each width, of the same noise and classes, compares them with REFERENCE as tools/evaluate.py does,
and writes OUTPUT/widths.json and OUTPUT/widths.png.
"""

import os
from dataclasses import replace

import _root  # noqa: F401 (the project's root, on sys.path)

from config.checks import INT_FROM_4, MAX_STD, Check
from config.flags import CommandParser, add_device_flag, check_paths, check_vae
from config.options import METRICS, POSITIVE_INT
from config.schema import MODEL_TYPES
from runtime.files import write_json
from runtime.process import configure_runtime, counted, resolve_device, run_cli, say
from sampling.flags import (
    DEFAULT_CHANNELS,
    OFFICIAL,
    add_diffusion_flags,
    add_sampling_flags,
    add_transport_flags,
    add_vae_flag,
    open_generator,
    sampler_options,
)
from sampling.guidance_flags import add_guidance_flags, choose_scale, guidance_options, guidance_settings
from sampling.many import LABELS, choose_labels
from sampling.model_path import Model, describe_model

STDS = Check(lambda stds: all(0 < std <= MAX_STD for std in stds), f"above 0 and at most {MAX_STD}", float, "X")
OWN = ("run", "std", "step", "output", "overwrite", "evaluate", "device")  # flags that need no --evaluate
SAMPLING = replace(OFFICIAL, num_steps=50, guidance_scale=1.0, sampler="ode")  # as of evaluations in training


def parse(argv):
    parser = CommandParser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="FOLDER", help="output folder of a run, where ema/ is")
    parser.add_argument("--std", required=True, nargs="+", check=STDS, help="widths that are wanted")
    parser.add_argument("--step", check=POSITIVE_INT, help="at which they are wanted [the newest snapshot's]")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where folders std_X are written")
    parser.add_argument("--overwrite", action="store_true", help="replace such folders that exist")
    parser.add_argument("--evaluate", metavar="REFERENCE", help="as --reference of tools/evaluate.py: sweep the widths")
    add_device_flag(parser)
    group = parser.add_argument_group("with --evaluate")
    group.add_argument("--num_samples", check=INT_FROM_4, default=10000, help="of each width")
    group.add_argument("--labels", choices=LABELS, default="random", help="classes of the samples")
    group.add_argument("--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=f"of {' '.join(METRICS)} [all]")
    group.add_argument("--features", default="inception", help="inception, digits, or the path of a program")
    group.add_argument("--inception", metavar="FILE", help="Inception's weights [looked for]")
    group.add_argument("--batch_size", check=POSITIVE_INT, default=32, help="images that a GPU draws at once")
    add_vae_flag(group, "the official one")
    like = "the evaluations of a training"
    add_sampling_flags(group, num_steps=SAMPLING.num_steps, like=like)
    add_guidance_flags(parser, channels=DEFAULT_CHANNELS, scale=SAMPLING.guidance_scale, like=like)
    add_diffusion_flags(parser, "with --evaluate, for a DiT or a Large-DiT")
    add_transport_flags(parser, SAMPLING, "with --evaluate, for a SiT, a Large-SiT or a LightningDiT")
    parser.set_defaults(sampler=None, backend="eager", dtype=None, gpu_dtype="float32", key=None)
    args = parser.parse_args(argv)
    given = [name for name, value in vars(args).items() if name not in OWN and value != parser.get_default(name)]
    if given and args.evaluate is None:
        raise ValueError(f"--{given[0]} is for the samples of --evaluate; give that too")
    return args


def sampling_settings(args, plan):
    """Returns `(of the sampler, all)` keywords of `Generator.sample`; ValueError for one that the network lacks."""
    from sampling.generator import check_settings

    section = plan.config["model"]
    sizes = {"num_classes": section["num_classes"], "has_null_class": section["class_dropout_prob"] > 0}
    kind = section["type"], plan.config
    model = Model("checkpoint", args.output, MODEL_TYPES[kind[0]].pipeline, *kind, **sizes)
    options = sampler_options(args, model, SAMPLING)
    guidance = guidance_options(args, model, SAMPLING)
    scale = choose_scale(args, model.has_null_class, args.output, SAMPLING.guidance_scale)
    check_settings(model, args.num_inference_steps, **options)
    return options, {"num_inference_steps": args.num_inference_steps, "guidance_scale": scale, **guidance, **options}


def generators(args, plan, folders, options):
    """Yields `({"std": width}, generator)` of each folder, the narrowest first; the autoencoder is loaded once."""
    for std, folder in sorted(zip(plan.stds, folders, strict=True)):
        generator = open_generator(args, describe_model(folder), **options)
        args.vae = generator.vae
        yield {"std": std}, generator


def evaluate(args, plan, folders, options, sampling):
    """Draws and judges samples of each width, and writes the table and the figure."""
    from evaluation.networks import load_features
    from evaluation.sweep import Judge, best, plot, sweep, table, width_panels

    network = load_features(args.features, weights=args.inception)
    classes = plan.config["data"]["classes"] or plan.config["model"]["num_classes"]
    labels = choose_labels(args.labels, args.num_samples, classes, args.seed)
    judging = {"metrics": args.metrics, "seed": args.seed, "batch_size": args.batch_size}
    judge = Judge(args.evaluate, network, labels, **judging)
    rows = sweep(judge, generators(args, plan, folders, options), **sampling)
    names = ("num_samples", "labels", "seed", "features")
    settings = {"run": os.path.abspath(plan.run), "reference": args.evaluate, "guide": args.guide_path, **sampling}
    settings |= guidance_settings(sampling, True, args.guide is not None)  # as JSON has it
    settings |= {name: getattr(args, name) for name in names}
    paths = [os.path.join(args.output, f"widths.{ending}") for ending in ("json", "png")]
    write_json(paths[0], {"step": plan.step, "widths": rows, "settings": settings})
    plot(paths[1], width_panels(rows))
    for note in judge.cautions:
        say(f"note: {note}")
    print(*table("std", rows), sep="\n")
    metric = judge.metrics[0]
    chosen = best(rows, metric)
    print(f"best {metric}: {chosen[metric]:.5g}, at std {chosen['std']:g}; {' and '.join(paths)}")


def main(argv=None):
    args = parse(argv)
    check_paths(args, "run", "evaluate", "inception")
    check_vae(args.vae)
    configure_runtime()
    import paddle

    from training.reconstruction import check_folders, plan_averages, write_averages

    paddle.set_device(resolve_device(args.device))
    check_folders(args.output, args.std, args.overwrite)
    plan = plan_averages(args.run, args.std, args.step)
    if args.evaluate:
        from evaluation.networks import check_features

        check_features(args.features, args.inception)
        settings = sampling_settings(args, plan)
    files = counted(len(plan.stored), "average")
    say(f"step {plan.step}, from {files} of {counted(len(plan.snapshots), 'snapshot')}: each is read twice, once to "
        "compare checksums")  # fmt: skip
    for std, error, is_stored in zip(plan.stds, plan.errors, plan.are_stored, strict=True):
        say(f"std {std:g}: " + ("as it was saved" if is_stored else f"its profile is missed by {error:.2%}"))
    for note in plan.notes():
        say(f"note: {note}")
    folders = write_averages(plan, args.output, overwrite=args.overwrite)
    if args.evaluate:
        evaluate(args, plan, folders, *settings)
    print(f"averages of step {plan.step}: {', '.join(folders)}")


if __name__ == "__main__":
    run_cli(main)
