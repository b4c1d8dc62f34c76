"""Losses that are added to an objective's: the config's `objective.regularizers`.

The functions take tokens `(N, T, D)` or maps `(N, C, H, W)` of a micro-batch, and return a loss a sample, `(N,)`, in
float32. The classes know which tokens of a network they want, and belong to the entries of the config. Weights and
places in the docstrings are those of the official codes; docs/recipes.md describes them all.
"""

from typing import Any, NamedTuple

import paddle
from paddle.nn import functional as F

from models.hooks import Tap
from models.regularizers import INTERNAL_GUIDANCE, InternalGuidanceHook, RegularizerHook, block_index
from transport.utils import full_precision, mean_flat

SMOOTH_L1_BETA = 0.05  # where the latent alignment's square becomes a line
MIN_NORM = 1e-12  # of vectors whose cosine is taken


# The losses.


@full_precision
def dispersive_loss(tokens, temperature=1.0):
    """Returns how close the samples of a batch are to one another, a scalar (Wang and He 2025, arXiv:2506.09027).

    It is the logarithm of the mean of exp(-|z_i - z_j|^2 / (K temperature)) over all pairs of samples, each with itself
    too; z are the K = T D numbers of a sample's tokens.

    Args:
        tokens: `(N, T, D)`, or `(groups, N, T, D)`: the result is `(groups,)` then.
        temperature: distances are divided by it.
    """
    flat = tokens.flatten(-2)  # (..., N, K)
    # Distances do not change, and lose fewer digits, if the mean is taken off first.
    flat = flat - flat.mean(-2, keepdim=True)
    products = paddle.matmul(flat, flat, transpose_y=True)  # (..., N, N)
    squares = paddle.diagonal(products, axis1=-2, axis2=-1)  # (..., N)
    distances = squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * products
    # log of a mean, and not of a sum: log(N^2) less
    similar = (distances * (-1.0 / (flat.shape[-1] * temperature))).exp()
    return similar.mean([-2, -1]).log()


@full_precision
def contrastive_loss(prediction, target, partner_target):
    """Returns the mean squares, `(N,)`, of predictions against other samples' targets (arXiv:2506.05350, eq. 5).

    It is to be taken off the loss. The samples' own `target` takes no part. All are `(N, C, H, W)`.
    """
    return mean_flat(paddle.square(prediction - partner_target))


@full_precision
def layer_sync_loss(tokens, target_tokens):
    """Returns minus the mean cosine, `(N,)`, of tokens and those of a later block, both `(N, T, D)` (LayerSync).

    No gradient goes to the target (arXiv:2510.12581).
    """
    return -_cosine(tokens, target_tokens.detach()).mean(-1)


@full_precision
def latent_alignment_loss(projected, latents_as_tokens):
    """Returns the mean smooth L1 distance, `(N,)`, of projected tokens to the clean latents (arXiv:2601.17830).

    Both are `(N, T, p * p * C)`. The square turns into a line at `SMOOTH_L1_BETA`.
    """
    distance = (projected - latents_as_tokens).abs()
    square, line = distance * distance * (0.5 / SMOOTH_L1_BETA), distance - 0.5 * SMOOTH_L1_BETA
    return mean_flat(paddle.where(distance < SMOOTH_L1_BETA, square, line))


@full_precision
def representation_alignment_loss(projected, features):
    """Returns minus the mean cosine, `(N,)`, of projected tokens and an encoder's (REPA, Yu et al., arXiv:2410.06940).

    Both are `(N, T, E)`.
    """
    return -_cosine(projected, features).mean(-1)


@full_precision
def auxiliary_loss(prediction, target):
    """Returns the mean squares, `(N,)`, of a second output against the target, both `(N, C, H, W)`.

    It is Internal Guidance's (Zhou et al. 2025, arXiv:2512.24176).
    """
    return mean_flat(paddle.square(prediction - target))


def _cosine(x, y):
    return (F.normalize(x, axis=-1, epsilon=MIN_NORM) * F.normalize(y, axis=-1, epsilon=MIN_NORM)).sum(-1)


# Where they stand in a training.


class Pass(NamedTuple):
    """What a forward pass of a micro-batch has to show to a regularizer.

    `compare(output)` returns `(prediction, target)` `(N, C, H, W)`: what the objective compares, of any `output` of the
    network, such as the one of this pass.
    """

    batch: Any  # the `objectives.Batch`
    hook: Any  # its own, which has seen the pass; None without
    output: Any  # the network's, (N, C or 2C, H, W)
    compare: Any


class Regularizer:
    """Base of the regularizers.

    Args:
        layers: blocks of the network.
        weight: factor of its loss in the sum.
        block: behind which it looks at the tokens, as configs count it; None for one that does not.

    Attributes:
        name: under which its loss is logged; no other loss has it.
        sign: -1 for a loss that is to grow.
        index: of the block, from 0.
    """

    name, sign = None, 1

    def __init__(self, layers, *, weight, block=None):
        self.weight, self.index = weight, None if block is None else block_index(block, layers)

    def hook(self):
        """Returns a hook for one forward pass, or None."""

    def loss(self, seen):
        """Returns the loss of each sample, `(N,)`, without the weight, of what a `Pass` shows."""
        raise NotImplementedError


class LayerSync(Regularizer):
    """Pulls the tokens behind a block towards those behind another one, `target_block`, which is usually deeper."""

    name = "layer_sync"

    def __init__(self, layers, *, weight, block, target_block):
        super().__init__(layers, weight=weight, block=block)
        self.target = block_index(target_block, layers)

    def hook(self):
        return Tap([self.index, self.target])

    def loss(self, seen):
        return layer_sync_loss(seen.hook.tokens[self.index], seen.hook.tokens[self.target])


class LatentAlignment(Regularizer):
    """Has an MLP tell the clean latents by the tokens behind a block."""

    name = "latent_alignment"

    def hook(self):
        return RegularizerHook(self.name)

    def loss(self, seen):
        projected = seen.hook.output
        return latent_alignment_loss(projected, latents_as_tokens(seen.batch.x, projected.shape[1]))


class RepresentationAlignment(Regularizer):
    """Has an MLP tell an encoder's features by the tokens behind a block: `batch.extras["features"]`, `(N, T, E)`."""

    name = "representation_alignment"

    def __init__(self, layers, *, weight, block, width, inner_width):  # the widths are those of the network's layer
        super().__init__(layers, weight=weight, block=block)

    def hook(self):
        return RegularizerHook(self.name)

    def loss(self, seen):
        return representation_alignment_loss(seen.hook.output, seen.batch.extras["features"])


class InternalGuidance(Regularizer):
    """Trains a second final layer, behind a block in the middle, to tell what the last one is to tell.

    Where they differ, samplers see the direction from a worse network to a better one (Internal Guidance).
    """

    name = INTERNAL_GUIDANCE

    def hook(self):
        return InternalGuidanceHook()

    def loss(self, seen):
        return auxiliary_loss(*seen.compare(seen.hook.output))


class _OfGroups(Regularizer):
    """Base of those that compare samples: within groups of `group` consecutive rows of the global batch.

    Micro-batches begin at multiples of their size, so that ranks and accumulation change nothing.
    """

    def __init__(self, layers, *, group, **keywords):
        super().__init__(layers, **keywords)
        self.group = group

    def grouped(self, x):
        """Returns `(N, ...)` as `(N / group, group, ...)`; ValueError if that is not possible."""
        if x.shape[0] % self.group:
            raise ValueError(
                f"the regularizer {self.name} compares the samples of a group of {self.group}; expected a micro-batch "
                f"that is a multiple of it, got {x.shape[0]} samples"
            )
        return x.reshape([-1, self.group, *x.shape[1:]])


class Dispersive(_OfGroups):
    """Pushes the samples of a group away from one another, by the tokens behind a block."""

    name = "dispersive"

    def __init__(self, layers, *, temperature, **keywords):
        super().__init__(layers, **keywords)
        self.temperature = temperature

    def hook(self):
        return Tap([self.index])

    def loss(self, seen):
        tokens = seen.hook.tokens[self.index]
        values = dispersive_loss(self.grouped(tokens), self.temperature)  # (groups,)
        return values.unsqueeze(-1).expand([values.shape[0], self.group]).flatten()


class Contrastive(_OfGroups):
    """Pushes the prediction of a sample away from the target of another one (Contrastive Flow Matching).

    The partner is the next row of the group, the first one for the last. Samples come in a random order, so it is one
    at random.
    """

    name, sign = "contrastive", -1

    def loss(self, seen):
        prediction, target = seen.compare(seen.output)
        partner = self.grouped(target).roll(-1, axis=1).reshape(target.shape)
        return contrastive_loss(prediction, target, partner)


def latents_as_tokens(x, tokens):
    """Returns latents `(N, C, H, W)` cut into so many square patches, `(N, T, p * p * C)`, channels last."""
    side = round(tokens**0.5)
    batch, channels, p = x.shape[0], x.shape[1], x.shape[2] // side
    x = x.reshape([batch, channels, side, p, side, p]).transpose([0, 2, 4, 3, 5, 1])
    return x.reshape([batch, tokens, p * p * channels])


REGULARIZERS = {
    kind.name: kind
    for kind in (LayerSync, LatentAlignment, InternalGuidance, Dispersive, Contrastive, RepresentationAlignment)
}


def build_regularizers(entries, layers):
    """Returns the regularizers of a config's `objective.regularizers`, `{"type": ..., every key}`.

    `layers` is the network's `num_layers`.
    """
    return [
        REGULARIZERS[entry["type"]](layers, **{key: value for key, value in entry.items() if key != "type"})
        for entry in entries
    ]
