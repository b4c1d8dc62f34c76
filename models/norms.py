"""Norms that a conditioning modulates (adaLN), and the conditioning's parts. The letters of shapes: see `base`."""

from paddle import nn

from . import ops
from .parallel import LayerNorm, share_input

NORM_EPS = 1e-6  # of DiT's norms


class AdaptiveLayerNorm(ops.Layer):
    """Layer norm without weights of its own, modulated: x `(N, T, D)`, shift and scale `(N, 1, D)` -> `(N, T, D)`.

    A shift of None is none.
    """

    def forward(self, x, shift, scale):
        return self.ops.adaptive_norm(x, shift, scale, epsilon=NORM_EPS)


class RMSNorm(ops.Layer):
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis, in float32 whatever AMP says; x keeps its type.

    With a scale, and perhaps a shift, `(N, 1, D)`, x `(N, T, D)` is modulated after it. `group`: ranks of which each
    norms other rows, so that the weight's gradient is summed over them.
    """

    def __init__(self, width, eps, group=None):
        super().__init__()
        self.eps, self.group = eps, group
        self.weight = self.create_parameter([width], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x, shift=None, scale=None):
        weight = share_input(self.weight, self.group)
        if scale is None:
            return self.ops.rms_norm(x, weight, epsilon=self.eps)
        return self.ops.adaptive_rms_norm(x, weight, shift, scale, epsilon=self.eps)


def adaptive_norm(hidden_size, rms_norm):
    """Returns DiT's norm: a layer norm without weights, or an RMS norm with them."""
    return RMSNorm(hidden_size, NORM_EPS) if rms_norm else AdaptiveLayerNorm()


def head_norm(head_dim, rms_norm, group):
    """Returns the norm of queries or keys within a head; the ranks of `group` have heads of their own each."""
    return RMSNorm(head_dim, NORM_EPS, group) if rms_norm else LayerNorm(head_dim, 1e-5, group)


def modulations(layer, c, count):
    """Returns `layer`'s output of the conditioning `(N, E)`, in `count` tensors `(N, 1, D)`."""
    return layer(c).unsqueeze(1).split(count, axis=-1)
