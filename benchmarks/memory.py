"""Planned against measured memory: real training runs on this machine's CPU, each in a process of its own.

Every case trains a small network for three steps with one of the project's own loops, and reads how many bytes Paddle's
allocator had given out at most (`host_memory_stat_peak_value("Allocated")`, a CPU's `max_memory_allocated`). The same
config goes through `training.parallel.memory_plan`. Prints the table of docs/memory.md.

The networks run with a GPU's operators here, not with those of `models.cpu_ops`, which keep less.

There are no half-precision kernels for a CPU. Cases marked "O1" stand in for them: float64 plays float32 and float32
plays bfloat16, with the casts that Paddle's lists ask for, and all bytes are halved.
"""

import argparse
import glob
import os
import socket
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from config.schema import resolve_config, write_json  # noqa: E402
from runtime.process import configure_runtime, run_cli  # noqa: E402
from training.parallel import memory_plan  # noqa: E402

NARROW = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32}
WIDE = {"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 64}
SMALL = {"sample_size": 16, "patch_size": 2, "num_classes": 10}  # 64 tokens
LONG = {"sample_size": 32, "patch_size": 2, "num_classes": 10}  # 256 tokens
GQA = {"qk_norm": True, "num_kv_heads": 2, "multiple_of": 32}


def _case(name, kind, batch, *sizes, ranks=1, **settings):
    model = {"type": kind}
    for part in sizes:
        model.update(part)
    return {"name": name, "model": model, "batch": batch, "ranks": ranks, "settings": settings}


CASES = [
    _case("narrow", "DiT", 8, SMALL, NARROW),
    _case("narrow, batch 32", "DiT", 32, SMALL, NARROW),
    _case("narrow, recompute", "DiT", 32, SMALL, NARROW, recompute=True),
    _case("wide", "DiT", 8, SMALL, WIDE),
    _case("wide, recompute, accumulation 2", "DiT", 32, SMALL, WIDE, recompute=True, gradient_accumulation_steps=2),
    _case("256 tokens", "DiT", 4, LONG, NARROW),
    _case("256 tokens, fused attention", "DiT", 4, LONG, NARROW, fused_attention=True),
    _case("256 tokens, recompute", "DiT", 8, LONG, NARROW, recompute=True),
    _case("no EMA, clipping", "DiT", 16, SMALL, WIDE, use_ema=False, max_grad_norm=1.0),
    _case("patch 4", "DiT", 8, LONG, NARROW, {"patch_size": 4}),
    _case("narrow", "SiT", 16, SMALL, NARROW),
    _case("256 tokens, recompute", "SiT", 12, LONG, WIDE, recompute=True),
    _case("narrow", "LargeDiT", 8, SMALL, NARROW, {"multiple_of": 32}),
    _case("qk_norm, GQA", "LargeDiT", 16, SMALL, NARROW, GQA),
    _case("qk_norm, GQA, recompute", "LargeDiT", 16, SMALL, NARROW, GQA, recompute=True),
    _case("qk_norm, GQA, 256 tokens", "LargeDiT", 4, LONG, WIDE, GQA, fused_attention=True),
    _case("wide, recompute", "LargeSiT", 32, SMALL, WIDE, {"multiple_of": 32}, recompute=True),
    _case("O1, wide", "DiT", 16, SMALL, WIDE, amp_dtype="bfloat16"),
    _case("O1, 256 tokens, recompute", "DiT", 8, LONG, NARROW, amp_dtype="bfloat16", recompute=True),
    _case("O1, qk_norm, GQA", "LargeDiT", 16, SMALL, NARROW, GQA, amp_dtype="bfloat16"),
    _case("O1, qk_norm, GQA, recompute", "LargeDiT", 32, SMALL, WIDE, GQA, amp_dtype="bfloat16", recompute=True),
    _case("2 processes, DataParallel", "DiT", 4, SMALL, WIDE, ranks=2),
    _case("2 processes, DataParallel, recompute", "DiT", 4, SMALL, WIDE, ranks=2, recompute=True),
    _case("2 processes, DataParallel, Trainer", "DiT", 4, SMALL, WIDE, ranks=2, trainer=True),
    _case(
        "2 processes, DataParallel, Trainer, recompute", "DiT", 4, SMALL, WIDE, ranks=2, trainer=True, recompute=True
    ),
    _case("2 processes, sharding stage1", "DiT", 4, SMALL, WIDE, ranks=2, sharding="stage1"),
    _case("2 processes, sharding stage2", "DiT", 4, SMALL, WIDE, ranks=2, sharding="stage2"),
    _case("2 processes, sharding stage3", "DiT", 4, SMALL, WIDE, ranks=2, sharding="stage3"),
    _case("2 processes, tensor parallel", "DiT", 4, SMALL, WIDE, ranks=2, tensor_parallel=2),
    _case(
        "2 processes, tensor parallel, recompute",
        "LargeDiT",
        4,
        SMALL,
        WIDE,
        GQA,
        ranks=2,
        tensor_parallel=2,
        recompute=True,
    ),
]


def resolved(case):
    """The case's config, and its `Setting`."""
    training = {k: v for k, v in case["settings"].items() if k not in ("sharding", "tensor_parallel", "trainer")}
    config = resolve_config({"model": case["model"], "training": training})
    training = config["training"]
    sharding, tensor = case["settings"].get("sharding", ""), case["settings"].get("tensor_parallel", 1)
    half = training["amp_dtype"] != "float32"
    setting = memory_plan.Setting(
        world_size=case["ranks"],
        tensor_parallel=tensor,
        sharding=sharding,
        sharding_degree=case["ranks"] if sharding else 1,
        batch=case["batch"],
        accumulation=training["gradient_accumulation_steps"],
        precision=training["amp_dtype"],
        level=training["amp_level"],
        recompute=training["recompute"],
        ema=training["use_ema"],
        # Attention is plain on a CPU, half precision stands for a GPU's.
        fused_attention=False,
        device="gpu" if half else "cpu",
    )
    return config, setting


def planned_for(case):
    """The `Plan` of a case."""
    config, setting = resolved(case)
    sliced_from = memory_plan.SLICED_FROM
    try:
        if setting.sharding == "stage3":
            memory_plan.SLICED_FROM = 0  # on a CPU every parameter is sliced, see training.parallel.cpu
        return memory_plan.plan(config, setting)
    finally:
        memory_plan.SLICED_FROM = sliced_from


def measure(case):
    """Bytes that Paddle's allocator had given out at most in one process of a training run (the fullest)."""
    config, setting = resolved(case)
    with tempfile.TemporaryDirectory() as folder:
        _write_features(folder, config["model"], setting.global_batch)
        training = {**config["training"], "amp_dtype": "float32", "max_steps": 3}
        training["global_batch_size"] = setting.global_batch
        write_json(os.path.join(folder, "config.json"), {**config, "training": training})
        environment = {**os.environ, "PYTHONPATH": ROOT}
        environment.setdefault("OMP_NUM_THREADS", "1")
        done = subprocess.run(
            _command(case, setting, folder), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        peaks = [_read(path) for path in glob.glob(os.path.join(folder, "peak-*"))]
        if len(peaks) < setting.world_size:
            logs = "".join(_read(path) for path in glob.glob(os.path.join(folder, "log", "workerlog.*")))
            raise ValueError(f"case {case['name']!r} failed: {(logs + done.stdout + done.stderr).strip()[-2000:]}")
    return max(map(int, peaks)) // (2 if setting.half else 1)


def _command(case, setting, folder):
    """The command line of a case's run: this file as `worker`, under the launcher if there are several processes."""
    trainer = case["settings"].get("trainer") or setting.sharding or setting.tensor_parallel > 1
    flags = {"config_file": f"{folder}/config.json", "feature_path": folder, "device": "cpu", "disable_tqdm": True}
    if trainer:
        flags.update(output_dir=f"{folder}/run", resolution=1, per_device_train_batch_size=setting.batch)
        flags.update(dataloader_num_workers=0, tensor_parallel_degree=setting.tensor_parallel)
        flags.update(sharding=setting.sharding, sharding_parallel_degree=setting.sharding_degree)
    else:
        flags.update(results_dir=f"{folder}/run", image_size=1, num_workers=0)
    command = [sys.executable]
    if setting.world_size > 1:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        command += ["-m", "paddle.distributed.launch", "--nproc_per_node", str(setting.world_size)]
        command += ["--master", f"127.0.0.1:{port}", "--log_dir", f"{folder}/log"]
    command += [os.path.abspath(__file__), "--worker", f"{folder}/peak", *(["--emulate"] if setting.half else [])]
    return [*command, "trainer" if trainer else "notrainer", *(f"--{name}={value}" for name, value in flags.items())]


def _read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _write_features(folder, model, count):
    import numpy as np

    shape = (1, model["in_channels"], model["sample_size"], model["sample_size"])
    for kind in ("features", "labels"):
        os.makedirs(os.path.join(folder, f"imagenet1_{kind}"))
    for index in range(count):
        np.save(os.path.join(folder, "imagenet1_features", f"{index}.npy"), np.ones(shape, dtype="float32"))
        np.save(os.path.join(folder, "imagenet1_labels", f"{index}.npy"), np.array([0]))


def worker(path, loop, flags, emulate):
    """Runs a training loop in this process, and writes the allocator's peak to `path` and this process's rank."""
    import importlib

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
    from paddle import _C_ops

    def cast_inputs(name, dtype):
        function = getattr(_C_ops, name)

        def cast(value):
            floats = isinstance(value, paddle.Tensor) and value.dtype in (paddle.float32, paddle.float64)
            return value.cast(dtype) if floats and value.dtype != dtype else value

        setattr(_C_ops, name, lambda *args, **options: function(*map(cast, args), **options))

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
    from tqdm import tqdm

    rows = []
    cases = [case for case in CASES if args.only in f"{case['model']['type']} {case['name']}"]
    if not cases:
        raise ValueError(f"--only {args.only!r}: no case has these words")
    print("| model | case | batch | parameters | measured MiB | planned MiB | of it states | planned / measured |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for case in tqdm(cases, unit="run"):
        planned, measured = planned_for(case), measure(case)
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
