"""Work that threads do before its result is asked for."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice


def map_ahead(function, items, num_threads, count):
    """Yields `function(item)` of each item in order, while threads work on up to `count` items behind it.

    When the caller stops, what has not begun is dropped.
    """
    with ThreadPoolExecutor(max(1, num_threads), "features") as pool:
        futures = (pool.submit(function, item) for item in items)
        waiting = deque(islice(futures, count))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(islice(futures, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
