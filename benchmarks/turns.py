"""Processes that the benchmarks start and let take turns."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(command):
    """Runs a command in the repository's root; returns `(seconds, finished process)`."""
    environment = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    return time.perf_counter() - start, done


def ask(script, *words):
    """Runs `script --worker WORDS` in a process of its own; returns the value that it gives to `answer`."""
    _, done = timed([sys.executable, os.path.abspath(script), "--worker", *map(str, words)])
    for line in done.stdout.splitlines():
        if line.startswith('{"answer": '):
            return json.loads(line)["answer"]
    raise ValueError(f"{' '.join(map(str, words[:2]))}: exit code {done.returncode}: {done.stderr.strip()[-1000:]}")


def answer(value):
    """Prints a JSON value for the process that has asked."""
    print(json.dumps({"answer": value}), flush=True)


def memory(key):
    """Returns this process's resident bytes: `VmRSS`, now; `VmHWM`, the most since `reset_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def reset_peak():
    """Lets `VmHWM` start anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Worker:
    """A process that stays, so that several can take turns: `script --worker PART CASE`, which calls `serve`.

    Args:
        python: of the process. script: the benchmark's file. part: what it is to do. case: JSON value, with `threads`.
    """

    def __init__(self, python, script, part, case):
        threads = str(case["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        if "torch" in part.lower():
            environment.pop("MKL_DEBUG_CPU_TYPE", None)  # meant for Paddle's MKL
        self.part = part
        self.process = subprocess.Popen(
            [python, os.path.abspath(script), "--worker", part, json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("TRACEBACK") else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._read()  # it is ready

    def _read(self):
        for line in self.process.stdout:
            if line.startswith('{"answer": '):
                return json.loads(line)["answer"]
        raise ValueError(f"the {self.part} process ended before it answered; TRACEBACK=1 shows its messages")

    def ask(self, request):
        """Returns the worker's answer to a JSON value."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(turn):
    """Answers each line on standard input with `turn(its JSON value)`, until there are no more."""
    answer("ready")
    for line in sys.stdin:
        answer(turn(json.loads(line)))
