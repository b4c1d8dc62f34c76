"""Hooks: what may look at, drop or replace the tokens between the blocks of a network.

A hook is called outside of what is recomputed, so that the tokens it keeps are part of the graph in any case. With
tensor parallelism every rank of a group has all tokens, and has to do the same with them.
"""

import paddle


class Hook:
    """Does nothing, at every block (from 0 on); a subclass overrides what it needs. It serves one pass at a time.

    `output` is a tensor that it makes of the pass by parameters of the network's that nothing else uses, or None.
    """

    output = None

    def begin(self, network):
        """Is called before the first block of a pass through the network, a `LatentTransformer` without wrappers."""

    def before(self, index, tokens, conditions):
        """Returns what block `index` is to be given instead of tokens `(N, T, D)` and conditions.

        These are a tuple of the conditioning `(N, E)`, and RoPE's cosines and sines where the block has them:
        `(T, 1, head_dim / 2)`, or `(N, T, 1, head_dim / 2)` where samples differ. Who drops tokens has to drop their
        rows there; later blocks are given the same, until a hook returns others.
        """
        return tokens, conditions

    def after(self, index, tokens):
        """Returns the tokens `(N, T', D)` to go on with after block `index`; the last block's go to the final layer."""
        return tokens


class Tap(Hook):
    """Keeps the tokens after the blocks of some indices, `layers`.

    `tokens` are those of the last forward pass, {index: `(N, T, D)`}, with gradients if that recorded a graph.
    """

    def __init__(self, layers):
        self.layers = frozenset(layers)
        self.tokens = {}

    def after(self, index, tokens):
        if index in self.layers:
            self.tokens[index] = tokens
        return tokens


class Routing(Hook):
    """Lets only some tokens of each sample through the blocks `first` to `last`, counted from 0, both inclusive.

    The others come back after `last` as they were before `first`. That is TREAD (Krause et al., arXiv:2501.04765): the
    network is the same with and without it, and it is left out in sampling. A network with `sprint_blocks` puts the
    tokens back itself, see `sprint`. It stands before hooks that look at tokens, which then see all of them after
    `last`.

    Args:
        kept: `(N, K)`, int64, the tokens that go through, in any order; no token twice in a row.
        path_dropped: `(N,)`, 1 where a network with `sprint_blocks` is to go without its deep path; None: nowhere.
    """

    def __init__(self, first, last, kept, path_dropped=None):
        self.first, self.last, self.kept, self.path_dropped = first, last, kept, path_dropped

    def before(self, index, tokens, conditions):
        if index == self.first:
            self._all, self._conditions = tokens, conditions
            samples, total, width = tokens.shape
            kept = self.kept.shape[1]
            first_rows = paddle.arange(0, samples * total, total, dtype="int64").unsqueeze(1)  # (N, 1)
            self._rows = (self.kept + first_rows).flatten()  # of all samples' tokens, one below the other
            tokens = paddle.gather(tokens.reshape([-1, width]), self._rows).reshape([samples, kept, width])
            c, *rotary = conditions
            rotary = (paddle.gather(table, self.kept.flatten()) for table in rotary)
            conditions = (c, *(table.reshape([samples, kept, *table.shape[1:]]) for table in rotary))
        elif index == self.last + 1:
            conditions = self._conditions
        return tokens, conditions

    def after(self, index, tokens):
        if index == self.last and tokens.shape[1] == self.kept.shape[1]:
            return self.put_back(tokens, self._all.astype(tokens.dtype))
        return tokens

    def put_back(self, tokens, others):
        """Returns `others` `(N, T, D)` with the kept tokens `(N, K, D)` in their places; both of one type."""
        rows = others.reshape([-1, others.shape[-1]])
        return paddle.scatter(rows, self._rows, tokens.reshape([-1, tokens.shape[-1]])).reshape(others.shape)
