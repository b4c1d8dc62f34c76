"""Work that threads have begun before its result is asked for."""

from collections import deque
from itertools import islice


def read_ahead(pool, tasks, count):
    """Yields the items of a generator in order; `count` of them have been taken from it before.

    Args:
        pool: the `ThreadPoolExecutor` to which `tasks` submits work; it is shut down at the end, or when the caller
            stops, and what has not begun is dropped.
        tasks: yields futures, or something that holds them.
    """
    waiting = deque(islice(tasks, count))
    try:
        while waiting:
            item = waiting.popleft()
            waiting.extend(islice(tasks, 1))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
