"""Runs groups of checks, each in a process of its own: an error of CUDA, or a crash, ends no more than its group.

Standard library only: the process that reports never imports Paddle.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading

from verification.verdicts import SKIPPED, WRONG, Verdict

# Module of `verification`, in the order of the report, and whether --quick leaves it out.
GROUPS = {
    "environment": False,
    "parity": False,
    "half_precision": False,
    "attention": False,
    "training_steps": False,
    "loops": False,
    "parallel": True,
    "speed": False,
    "pipelines": False,
}
TIMEOUT = 1800  # seconds for a group; six launches of many processes, each with a limit of its own, take the longest
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_groups(device, *, quick=False, groups=None):
    """Yields the verdicts of all groups as they come.

    Args:
        device: `auto`, `cpu`, `gpu` or `gpu:N`.
        quick: leave out the groups, and the checks of the others, that take longer.
        groups: names of `GROUPS`; None: all of them. Without a device those after `environment` are skipped.
    """
    without_device = False
    for group, is_long in GROUPS.items():
        if groups is not None and group not in groups:
            continue
        if quick and is_long:
            yield Verdict(group, "all", SKIPPED, "--quick")
        elif without_device:
            yield Verdict(group, "all", SKIPPED, "there is no device to ask")
        else:
            for verdict in run_group(group, device, quick=quick):
                without_device |= (verdict.group, verdict.check, verdict.status) == ("environment", "device", WRONG)
                yield verdict


def run_group(group, device, *, quick=False, timeout=TIMEOUT):
    """Yields the verdicts of a group as they come. A process that ends before its time is a verdict too."""
    with tempfile.TemporaryDirectory(prefix="self_check_") as folder, tempfile.TemporaryFile() as errors:
        words = [sys.executable, "-m", "verification.worker", group, device, str(int(quick)), folder]
        path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True
        )
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), _kill(process)))
        timer.start()
        running = "start"
        try:
            for line in process.stdout:
                told = json.loads(without_paths(line.decode()))
                if "verdict" in told:
                    yield Verdict(**told["verdict"])
                running = told.get("running", "after the check before")
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)  # what it has started, and itself if nobody reads on
            process.wait()
        if code:
            text = f"took more than {timeout} s" if late.is_set() else without_paths(_ending(code, errors))
            yield Verdict(group, running, WRONG, text)


def without_paths(text):
    """Returns a text in which the folders of this project and of the user have short names."""
    for folder, name in ((ROOT, "."), (sys.prefix, ".venv"), (os.path.expanduser("~"), "~")):
        text = text.replace(folder, name) if len(folder) > 1 else text
    return text


def _kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _ending(code, errors):
    """Returns how a process ended: the signal or the exit code, and the last line that it wrote to stderr."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"its process {how}{': ' + lines[-1][:300] if lines else ''}"
