"""Runs several trainings in one process: the arguments are a JSON file with [[loop, [flags...]], ...].

Under `paddle.distributed.launch` each of its ranks is such a process: importing the stack once per rank, not once per
training, keeps the two-process tests fast; so does making a group of the same ranks once a process.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.process import configure_runtime, leave_distributed  # noqa: E402


def keep_groups():
    """`paddle.distributed.new_group` answers with the group that these ranks had in an earlier training."""
    import paddle.distributed as dist

    groups, new_group = {}, dist.new_group

    def kept(ranks=None, *args, **options):
        key = tuple(sorted(ranks)) if ranks else None
        if key not in groups:
            groups[key] = new_group(ranks, *args, **options)
        return groups[key]

    dist.new_group = kept


if __name__ == "__main__":
    configure_runtime()
    keep_groups()
    for loop, flags in json.loads(Path(sys.argv[1]).read_text()):
        script = importlib.import_module(f"train_image_generation_{loop}")
        sys.argv = [script.__file__, *flags]
        script.main()
    leave_distributed()
