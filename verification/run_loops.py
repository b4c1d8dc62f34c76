"""Runs several trainings in one process: the arguments are a JSON file with [[loop, [flags...]], ...].

Under `paddle.distributed.launch` each of its ranks is such a process: importing the stack once per rank, not once per
training, is fast; so is making a group of the same ranks once a process.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.paddle_private import forget_degrees, keep_groups  # noqa: E402
from runtime.process import configure_runtime, leave_distributed  # noqa: E402
from verification.tiny_runs import run_in_process  # noqa: E402

if __name__ == "__main__":
    configure_runtime()
    # Seconds of import, which differ between the ranks, come before the first collective, which waits 30 s for others.
    for module in ("training.session", "training.trainer", "training.trainer_arguments"):
        importlib.import_module(module)
    keep_groups()
    for number, (loop, flags) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        print(f"-- training {number}: {loop} {' '.join(flags)}", flush=True)
        forget_degrees()
        run_in_process(loop, flags)
    leave_distributed()
