"""Runs several trainings in one process: the arguments are a JSON file with [[loop, [flags...]], ...].

Under `paddle.distributed.launch` each of its ranks is such a process: importing the stack once per rank, not once per
training, keeps the tests on several processes fast; so does making a group of the same ranks once a process.
"""

import functools
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.process import configure_runtime, leave_distributed  # noqa: E402


def keep_groups():
    """Makes the process group, and a group of the same ranks, once a process; later trainings get the first ones."""
    import paddle.distributed as dist
    from paddle.distributed import parallel_helper

    groups, new_group = {}, dist.new_group
    init_parallel_env = functools.lru_cache(dist.init_parallel_env)

    def kept(ranks=None, *args, **options):
        key = tuple(sorted(ranks)) if ranks else None
        if key not in groups:
            groups[key] = new_group(ranks, *args, **options)
        return groups[key]

    dist.new_group, dist.init_parallel_env = kept, lambda *_: init_parallel_env()
    parallel_helper._is_parallel_ctx_initialized = lambda: False  # else PaddleNLP keeps the degrees of the first


def forget_degrees():
    """Lets fleet take other parallel degrees than those of the training before."""
    from paddle.distributed import fleet
    from paddle.distributed.fleet.base import topology

    topology._HYBRID_PARALLEL_GROUP = None
    fleet.fleet.__dict__.pop("_hcg", None)


if __name__ == "__main__":
    configure_runtime()
    # Seconds of import, which differ between the ranks, come before the first collective, which waits 30 s for others.
    for module in ("training.session", "training.trainer", "training.trainer_arguments"):
        importlib.import_module(module)
    keep_groups()
    for number, (loop, flags) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        print(f"-- training {number}: {loop} {' '.join(flags)}", flush=True)
        forget_degrees()
        script = importlib.import_module(f"train_image_generation_{loop}")
        sys.argv = [script.__file__, *flags]
        script.main()
    leave_distributed()
