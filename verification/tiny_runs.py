"""Tiny features and configs, and the two training commands on them: in this process, or on several ranks."""

import importlib
import json
import os
import socket
import sys
from pathlib import Path

import numpy as np

from runtime.patching import replaced

ROOT = Path(__file__).resolve().parent.parent
LOOPS = ("trainer", "notrainer")

TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 10,
}
# Every model that both loops train.
TINY_MODELS = {
    "DiT": {"type": "DiT", **TINY},
    "SiT": {"type": "SiT", **TINY},
    "LargeDiT": {"type": "LargeDiT", **TINY, "qk_norm": True, "multiple_of": 32},
    "LargeSiT": {"type": "LargeSiT", **TINY, "multiple_of": 32},
    # The inner width of SwiGLU, 2/3 of 3 x 32, can be split over two ranks.
    "LightningDiT": {"type": "LightningDiT", **TINY, "in_channels": 4, "mlp_ratio": 3.0, "qk_norm": True},
}


def write_features(folder, count=40, shape=(4, 8, 8), num_classes=10, name="imagenet64", encoder_shape=None):
    """Writes a feature folder in PaddleMIX's layout, one `.npy` pair a sample, with random latents.

    With `encoder_shape`, `(tokens, width)`, there are random encoder features too.
    """
    rng = np.random.default_rng(0)
    for kind in ("features", "labels"):
        os.makedirs(folder / f"{name}_{kind}", exist_ok=True)
    for index in range(count):
        np.save(folder / f"{name}_features" / f"{index}.npy", rng.standard_normal((1, *shape)).astype("float32"))
        np.save(folder / f"{name}_labels" / f"{index}.npy", np.array([index % num_classes]))
    if encoder_shape is not None:
        os.makedirs(folder / f"{name}_encoder", exist_ok=True)
        for index in range(count):
            features = rng.standard_normal(encoder_shape).astype("float16")
            np.save(folder / f"{name}_encoder" / f"{index}.npy", features)
    return folder


def write_config(path, kind="DiT", objective=None, sizes=None, **training):
    """Writes a config of a tiny model, with other `sizes` of it; returns its path as text."""
    config = {
        "model": {**TINY_MODELS[kind], **(sizes or {})},
        "training": {"ema_decay": 0.9, "learning_rate": 1e-3, **training},
    }
    if objective:
        config["objective"] = objective
    path.write_text(json.dumps(config))
    return str(path)


def loop_arguments(
    loop, *, config, features, output, steps, batch=8, accumulation=1, ranks=1, save_every=None, device="cpu"
):
    """Returns the same run in either loop's flags; `batch` is that of all `ranks` that read different samples."""
    save_every = save_every or steps
    if loop == "trainer":
        flags = {
            "feature_path": features,
            "resolution": 64,
            "output_dir": output,
            "per_device_train_batch_size": batch // ranks // accumulation,
            "logging_steps": 1,
            "save_steps": save_every,
            "dataloader_num_workers": 0,
        }
    else:
        flags = {
            "feature_path": features,
            "image_size": 64,
            "results_dir": output,
            "global_batch_size": batch,
            "log_every": 1,
            "ckpt_every": save_every,
            "num_workers": 0,
        }
    flags.update(
        config_file=config,
        max_steps=steps,
        gradient_accumulation_steps=accumulation,
        device=device,
        disable_tqdm=True,
    )
    return [f"--{name}={value}" for name, value in flags.items()]


def resume_flag(loop, path):
    """Returns the flag that lets a loop go on from a checkpoint."""
    return f"--{'resume' if loop == 'notrainer' else 'resume_from_checkpoint'}={path}"


def run_in_process(loop, arguments):
    """Runs a loop's `main` in this process; a user's mistake comes out as its `ValueError`."""
    script = importlib.import_module(f"train_image_generation_{loop}")
    with replaced(sys, argv=[script.__file__, *map(str, arguments)]):
        script.main()


def checkpoint_path(loop, output, step, launched=True):
    """Returns the checkpoint of a step in a loop's output; before the launch, of the first experiment, "000-..."."""
    if loop == "trainer":
        return Path(output) / f"checkpoint-{step}"
    if not launched:
        return Path(output) / f"000-{Path(output).name}/checkpoints/{step:07d}"
    (path,) = Path(output).glob(f"*/checkpoints/{step:07d}")
    return path


def read_metrics(folder, key):
    """Returns `{step: value}` of a run's metrics.jsonl.

    `folder` is an output_dir, or a results_dir with one experiment.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        (path,) = Path(folder).glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["step"]: row[key] for row in rows}


def read_losses(folder):
    """Returns `{step: loss}` of a run."""
    return read_metrics(folder, "loss")


# Several processes.


def free_port():
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def command_environment(threads=1):
    """Returns the environment of a command of this project."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def launch_command(ranks, script, arguments, log_dir):
    """Returns the command line of a script under `paddle.distributed.launch` on `ranks` processes."""
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(ranks)]
    command += ["--master", f"127.0.0.1:{free_port()}", "--log_dir", str(log_dir), str(ROOT / script)]
    return command + [str(argument) for argument in arguments]
