"""Hooks: what may look at, drop or replace the tokens between the blocks of a network.

A hook is called outside of what is recomputed, so that the tokens it keeps are part of the graph in any case. With
tensor parallelism every rank of a group has all tokens, and has to do the same with them.
"""


class Hook:
    """Does nothing, at every block (from 0 on); a subclass overrides what it needs. It serves one pass at a time."""

    def begin(self, network):
        """Is called before the first block of a pass through the network, a `LatentTransformer` without wrappers."""

    def before(self, index, tokens, conditions):
        """Returns what block `index` is to be given instead of tokens `(N, T, D)` and conditions.

        These are a tuple of the conditioning `(N, E)`, and RoPE's cosines and sines `(T, 1, head_dim / 2)` where the
        block has them. Who drops tokens has to drop their rows there.
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
