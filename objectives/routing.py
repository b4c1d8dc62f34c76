"""Token routing in training, the config's `training.routing`: which tokens of a sample go through the middle blocks.

TREAD (Krause et al., arXiv:2501.04765): half of a sample's tokens, drawn anew in each step, skip the middle blocks, of
the twelve of a B/2 the third to the ninth. SPRINT (Park et al., arXiv:2510.21986): three quarters do, the same number
in each small group of the grid. That the groups are as small as the share allows is this project's choice.
"""

import functools

import numpy as np
import paddle

from models.hooks import Routing
from objectives.base import draw_rows

PATH_DROP_PROB = 0.05  # of networks with `sprint_blocks`


class TokenRouting:
    """Draws which tokens are kept, and makes the hook that routes them.

    Args:
        share: of a sample's T tokens, those that skip the blocks: `int(T * share)` do.
        blocks: `(first, last)` of them, counted from 1, both inclusive.
        side: tokens along a side of the grid.
        grouped: the same number of each group of the grid: squares of the smallest side, from 2 on, that divides the
            grid and of which the share is a whole number. The grid itself is the group where there is none.
        path_drop_prob: probability that a sample goes without its deep path, for networks with `sprint_blocks`.
    """

    def __init__(self, share, blocks, side, *, grouped=False, path_drop_prob=0.0):
        self.first, self.last = (block - 1 for block in blocks)
        self.tokens, self.path_drop_prob = side * side, path_drop_prob
        self.group = next(filter(lambda group: _is_whole(share * group**2), _divisors(side)), side) if grouped else side
        size = self.group**2
        self.kept = size - int(size * share if self.group == side else round(size * share))
        squares = np.arange(self.tokens).reshape([side // self.group, self.group] * 2).swapaxes(1, 2)
        self._order = squares.reshape([-1, size])  # (groups, size): the tokens of each group

    @functools.cached_property
    def _places(self):
        return paddle.to_tensor(self._order.flatten())  # once, because it is a copy from the host

    def draw(self, rows):
        """Returns random numbers by name: `routing` `(N, T)`, and `path_drop` `(N,)`, 1 or 0, if that is on."""
        drawn = {"routing": draw_rows(lambda total: paddle.rand([total, self.tokens]), rows)}
        if self.path_drop_prob > 0:
            dropped = draw_rows(lambda total: paddle.rand([total]), rows) < self.path_drop_prob
            drawn["path_drop"] = dropped.astype("int64")
        return drawn

    def hook(self, drawn):
        """Returns the `Routing` by what `draw` returned, and takes it out of `drawn`."""
        groups, size = self._order.shape
        order = paddle.argsort(drawn.pop("routing").reshape([-1, groups, size]), axis=-1)  # a permutation of each
        kept = order[:, :, : self.kept] + paddle.arange(0, self.tokens, size, dtype="int64").unsqueeze(1)
        kept = paddle.gather(self._places, kept.flatten()).reshape([-1, groups * self.kept])  # (N, K)
        return Routing(self.first, self.last, kept, drawn.pop("path_drop", None))


def _divisors(side):
    return (size for size in range(2, side) if side % size == 0)


def _is_whole(number):
    return abs(number - round(number)) < 1e-9


def build_routing(config):
    """Returns the `TokenRouting` of a resolved config, None where it has none."""
    routing, model = config["training"]["routing"], config["model"]
    if routing is None:
        return None
    sprint, path_drop_prob = model["sprint_blocks"], routing["path_drop_prob"]
    if path_drop_prob is None:
        path_drop_prob = PATH_DROP_PROB if sprint else 0.0
    return TokenRouting(
        routing["share"],
        routing["blocks"] or sprint,
        model["sample_size"] // model["patch_size"],
        grouped=sprint is not None,
        path_drop_prob=path_drop_prob,
    )
