"""The place of a micro-batch in the global batch, and draws that depend on that place alone."""

from collections import namedtuple

import paddle

# Where a rank's micro-batch stands in the global batch of an optimizer step: rows [start, stop) of `total`.
Rows = namedtuple("Rows", "start stop total")


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
