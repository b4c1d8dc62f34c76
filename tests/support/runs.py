"""Tiny features and configs, and both loops, in this process or launched on several ranks."""

import json
import subprocess
import sys

from support import device
from verification import tiny_runs
from verification.tiny_runs import (  # noqa: F401 (for the tests)
    LOOPS,
    ROOT,
    TINY,
    TINY_MODELS,
    checkpoint_path,
    command_environment,
    free_port,
    launch_command,
    read_losses,
    read_metrics,
    resume_flag,
    run_in_process,
    write_config,
    write_features,
)


def loop_arguments(loop, **run):
    """As `verification.tiny_runs.loop_arguments`, on the device of --device."""
    return tiny_runs.loop_arguments(loop, **{"device": device.DEVICE, **run})


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
    finished = launch(ranks, "verification/run_loops.py", [folder / "runs.json"], folder / "log")
    logs = [path.read_text()[-2000:] for path in sorted((folder / "log").glob("workerlog.*"))]
    assert finished.returncode == 0, "\n".join(logs)


def run_script(script, arguments, timeout=120):
    """Runs a script as a user does; returns the finished process."""
    command = [sys.executable, str(ROOT / script), *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=command_environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
