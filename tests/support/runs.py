"""Tiny features and configs, and both loops, in this process or launched on several ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent


TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 10,
}


# Every model that both loops train: the tests of the loops run for each.
TINY_MODELS = {
    "DiT": {"type": "DiT", **TINY},
    "SiT": {"type": "SiT", **TINY},
    "LargeDiT": {"type": "LargeDiT", **TINY, "qk_norm": True, "multiple_of": 32},
    "LargeSiT": {"type": "LargeSiT", **TINY, "multiple_of": 32},
}


def write_features(folder, count=40, shape=(4, 8, 8), num_classes=10, name="imagenet64"):
    """Writes a feature folder in PaddleMIX's layout, one `.npy` pair a sample, with random latents."""
    rng = np.random.default_rng(0)
    for kind in ("features", "labels"):
        os.makedirs(folder / f"{name}_{kind}", exist_ok=True)
    for index in range(count):
        np.save(folder / f"{name}_features" / f"{index}.npy", rng.standard_normal((1, *shape)).astype("float32"))
        np.save(folder / f"{name}_labels" / f"{index}.npy", np.array([index % num_classes]))
    return folder


def write_config(path, kind="DiT", objective=None, **training):
    """A config of a tiny model; returns its path as text."""
    config = {"model": TINY_MODELS[kind], "training": {"ema_decay": 0.9, "learning_rate": 1e-3, **training}}
    if objective:
        config["objective"] = objective
    path.write_text(json.dumps(config))
    return str(path)


def read_metrics(folder, key):
    """`{step: value}` of a run's metrics.jsonl; `folder` is an output_dir or the only experiment in a results_dir."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        (path,) = Path(folder).glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["step"]: row[key] for row in rows}


def read_losses(folder):
    return read_metrics(folder, "loss")


def loop_arguments(loop, *, config, features, output, steps, batch=8, accumulation=1, ranks=1, save_every=None):
    """The same run in either loop's flags."""
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
        device="cpu",
        disable_tqdm=True,
    )
    return [f"--{name}={value}" for name, value in flags.items()]


def run_in_process(loop, arguments, monkeypatch):
    """Runs a loop's `main` in this process; a user's mistake comes out as its `ValueError`."""
    import importlib

    script = importlib.import_module(f"train_image_generation_{loop}")
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    script.main()


def checkpoint_path(loop, output, step, launched=True):
    """Returns the checkpoint of a step in a loop's output; before the launch, of the first experiment, "000-..."."""
    if loop == "trainer":
        return Path(output) / f"checkpoint-{step}"
    if not launched:
        return Path(output) / f"000-{Path(output).name}/checkpoints/{step:07d}"
    (path,) = Path(output).glob(f"*/checkpoints/{step:07d}")
    return path


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def command_environment(threads=1):
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def launch_command(ranks, script, arguments, log_dir):
    """The command line of a script under `paddle.distributed.launch` on `ranks` processes."""
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(ranks)]
    command += ["--master", f"127.0.0.1:{free_port()}", "--log_dir", str(log_dir), str(ROOT / script)]
    return command + [str(argument) for argument in arguments]


def launch(ranks, script, arguments, log_dir, timeout=900):
    """Runs a script under `paddle.distributed.launch` on `ranks` processes; returns the finished process."""
    command = launch_command(ranks, script, arguments, log_dir)
    return subprocess.run(
        command, cwd=ROOT, env=command_environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def launch_loops(ranks, runs, folder):
    """Does several trainings `[loop, flags]`, one after the other, in one launch; fails with the ranks' logs."""
    folder.mkdir(parents=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    finished = launch(ranks, "tests/support/run_loops.py", [folder / "runs.json"], folder / "log")
    logs = [path.read_text()[-2000:] for path in sorted((folder / "log").glob("workerlog.*"))]
    assert finished.returncode == 0, "\n".join(logs)


def run_script(script, arguments, timeout=120):
    """Runs a script as a user does; returns the finished process."""
    command = [sys.executable, str(ROOT / script), *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=command_environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
