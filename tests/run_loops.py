"""Runs several trainings in one process: the arguments are a JSON file with [[loop, [flags...]], ...].

Under `paddle.distributed.launch` each of its ranks is such a process: importing the stack once per rank, not once per
training, keeps the two-process tests fast.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.runtime import leave_distributed  # noqa: E402

if __name__ == "__main__":
    for loop, flags in json.loads(Path(sys.argv[1]).read_text()):
        script = importlib.import_module(f"train_image_generation_{loop}")
        sys.argv = [script.__file__, *flags]
        script.main()
    leave_distributed()
