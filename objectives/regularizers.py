"""Losses on a network's tokens that are added to an objective's: the config's `objective.auxiliary`."""


class Regularizer:
    """Base of the regularizers.

    Args:
        layers: indices of the blocks whose tokens it looks at, from 0.
        weight: factor of its loss in the sum.
    """

    name = None  # under which its loss is logged; no other loss has it

    def __init__(self, layers, weight):
        self.layers = tuple(layers)
        self.weight = weight

    def loss(self, tokens, batch):
        """Returns the loss of each sample, `(N,)`, without the weight.

        Args:
            tokens: {index: `(N, T, D)`} after the blocks `layers`, part of the graph, in the network's dtype. They are
                those of this rank's micro-batch: a loss that compares samples depends on its size.
            batch: the `objectives.Batch` that the network was given.
        """
        raise NotImplementedError


REGULARIZERS = {}  # class by `type`: its constructor takes the entry's other keys


def build_regularizers(auxiliary):
    """Returns the regularizers of a config's `objective.auxiliary`, a list of `{"type": ..., keyword: value}`.

    Raises ValueError for an unknown type, and for two entries of the same name.
    """
    built = []
    for entry in auxiliary:
        keywords = dict(entry)
        kind = keywords.pop("type")
        if kind not in REGULARIZERS:
            known = ", ".join(REGULARIZERS) or "none"
            raise ValueError(f"objective.auxiliary: unknown type {kind!r}; known: {known}")
        built.append(REGULARIZERS[kind](**keywords))
        if sum(other.name == built[-1].name for other in built) > 1:
            raise ValueError(f"objective.auxiliary: {built[-1].name!r} stands there twice")
    return built
