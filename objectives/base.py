"""A micro-batch, its place in the global batch, and draws that depend on that place alone."""

from collections import namedtuple

import paddle

# Where a rank's micro-batch stands in the global batch of an optimizer step: rows [start, stop) of `total`.
Rows = namedtuple("Rows", "start stop total")

# A micro-batch: latents `x` (N, C, H, W), labels `y` (N,) int64, and a dict of what else a recipe needs, by name.
Batch = namedtuple("Batch", "x y extras", defaults=({},))


def _draw(sampler, rows):
    """Rows [start, stop) of a draw for the whole global batch.

    Every rank draws the same numbers and keeps its own, so that the noise of a sample depends on its place in the
    global batch only, not on the number of ranks or of accumulation steps.
    """
    numbers = sampler(rows.total)
    return numbers if rows.stop - rows.start == rows.total else numbers[rows.start : rows.stop]


def _label_dropout(probability, rows):
    """The network's `force_drop_ids`, drawn for the whole global batch; nothing where there is no null class."""
    if probability == 0:
        return {}
    return {"force_drop_ids": (_draw(lambda total: paddle.rand([total]), rows) < probability).astype("int64")}
