"""Planned against measured memory: real training runs on this machine's CPU, each in a process of its own.

Every case trains a small network for three steps with one of the project's own loops, and reads how many bytes Paddle's
allocator had given out at most (`host_memory_stat_peak_value("Allocated")`, a CPU's `max_memory_allocated`). The same
config goes through `training.parallel.memory_plan`. Prints the table of docs/memory.md.

The networks run with a GPU's operators here, not with those of `models.cpu_ops`, which keep less.

A CPU has no half-precision kernels. Cases marked "O1" stand in for them: float64 plays float32 and float32 plays
bfloat16, with the casts that Paddle's lists ask for, and all bytes are halved.
"""

import argparse
import glob
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import _root  # noqa: F401 (the project's root, on sys.path)
from support.memory_runs import CASES, resolved
from support.runs import ROOT, command_environment, launch_command, write_features
from tqdm import tqdm

from runtime.files import write_json
from runtime.process import configure_runtime, run_cli
from training.parallel.memory_plan import Plan


def measure(case):
    """Returns the bytes that Paddle's allocator had given out at most in the fullest process of a training run."""
    config, setting = resolved(case)
    with tempfile.TemporaryDirectory() as folder:
        model = config["model"]
        shape = (model["in_channels"], model["sample_size"], model["sample_size"])
        write_features(Path(folder), setting.global_batch, shape, name="imagenet1")
        training = {**config["training"], "amp_dtype": "float32", "max_steps": 3}
        training["global_batch_size"] = setting.global_batch
        write_json(os.path.join(folder, "config.json"), {**config, "training": training})
        command, environment = _command(case, setting, folder), command_environment()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        peaks = [Path(path).read_text() for path in glob.glob(f"{folder}/peak-*")]
        if len(peaks) < setting.world_size:
            logs = "".join(Path(path).read_text(errors="replace") for path in glob.glob(f"{folder}/log/workerlog.*"))
            raise ValueError(f"case {case['name']!r} failed: {(logs + done.stdout + done.stderr).strip()[-2000:]}")
    return max(map(int, peaks)) // (2 if setting.mode else 1)


def _command(case, setting, folder):
    """Returns the command of a case's run: this file as `worker`, under the launcher if there are several processes."""
    trainer = case["settings"].get("trainer") or setting.sharding or setting.tensor_parallel > 1
    flags = {"config_file": f"{folder}/config.json", "feature_path": folder, "device": "cpu", "disable_tqdm": True}
    if trainer:
        flags.update(output_dir=f"{folder}/run", resolution=1, per_device_train_batch_size=setting.batch)
        flags.update(dataloader_num_workers=0, tensor_parallel_degree=setting.tensor_parallel)
        flags.update(sharding=setting.sharding, sharding_parallel_degree=setting.sharding_degree)
    else:
        flags.update(results_dir=f"{folder}/run", image_size=1, num_workers=0)
    words = ["--worker", f"{folder}/peak", *(["--emulate"] if setting.mode else [])]
    words += ["trainer" if trainer else "notrainer", *(f"--{name}={value}" for name, value in flags.items())]
    if setting.world_size > 1:
        return launch_command(setting.world_size, "benchmarks/memory.py", words, f"{folder}/log")
    return [sys.executable, __file__, *words]


def worker(path, loop, flags, emulate):
    """Runs a training loop in this process, and writes the allocator's peak to `path` and this process's rank."""
    configure_runtime()
    import paddle
    from paddle.base import core

    from models import cpu_ops
    from training.checkpoints.saver import CheckpointSaver

    cpu_ops.faster = lambda: False

    def read_peak(*args, **options):
        # Instead of saving: the host's copies of a checkpoint are the allocator's too on a CPU, not on a GPU.
        with open(f"{path}-{paddle.distributed.get_rank()}", "w", encoding="utf-8") as file:
            file.write(str(core.host_memory_stat_peak_value("Allocated", 0)))

    CheckpointSaver.save = read_peak
    if emulate:
        _emulate_half()
    sys.argv = [loop, *flags]
    importlib.import_module(f"train_image_generation_{loop}").main()


def _emulate_half():
    """float64 for float32 and float32 for bfloat16, by the O1 lists: products in half, softmax and norms in single."""
    import paddle

    from runtime.paddle_private import operators

    ops = operators()

    def cast_inputs(name, dtype):
        function = getattr(ops, name)

        def cast(value):
            floats = isinstance(value, paddle.Tensor) and value.dtype in (paddle.float32, paddle.float64)
            return value.cast(dtype) if floats and value.dtype != dtype else value

        setattr(ops, name, lambda *args, **options: function(*map(cast, args), **options))

    paddle.set_default_dtype("float64")
    for name in ("linear", "matmul", "conv2d"):
        cast_inputs(name, paddle.float32)
    for name in ("softmax", "layer_norm"):
        cast_inputs(name, paddle.float64)
    astype = paddle.Tensor.astype
    paddle.Tensor.astype = lambda x, dtype: astype(x, "float64" if dtype == "float32" else dtype)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose model and name contain these words")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--emulate", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(argv)
    if args.worker:
        worker(args.worker, rest[0], rest[1:], args.emulate)
        return
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    rows = []
    cases = [case for case in CASES if args.only in f"{case['model']['type']} {case['name']}"]
    if not cases:
        raise ValueError(f"--only {args.only!r}: no case has these words")
    print("| model | case | batch | parameters | measured MiB | planned MiB | of it states | planned / measured |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for case in tqdm(cases, unit="run"):
        planned, measured = Plan(*resolved(case)), measure(case)
        row = {"model": case["model"]["type"], "case": case["name"], "batch": case["batch"]}
        row.update(parameters=planned.parameters, measured=measured, planned=planned.peak)
        row.update(states=sum(planned.states.values()), ratio=planned.peak / measured)
        rows.append(row)
        sizes = " | ".join(f"{row[name] / 2**20:.1f}" for name in ("measured", "planned", "states"))
        tqdm.write(
            f"| {row['model']} | {row['case']} | {row['batch']} | {row['parameters'] / 1e6:.1f} M | {sizes} | "
            f"{row['ratio']:.3f} |"
        )
    if args.output:
        write_json(args.output, rows)
        print(f"figures: {args.output}")


if __name__ == "__main__":
    run_cli(main)
