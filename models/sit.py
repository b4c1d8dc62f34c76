"""SiT: the scalable interpolant transformer (Ma et al., arXiv:2401.08740), DiT's network for a `transport`.

Time runs from noise (`t = 0`) to data (`t = 1`).
"""

from .dit import DiT


class DropsVariance:
    """Mixin, named before a network's class. Keeps the first half of the output channels only, if there are 2C of them.

    A `transport` has no use for a variance. With `learn_sigma` the last layer has 2C channels all the same
    (`out_channels`), as in the official SiT: published weights have that shape. So `forward` predicts velocity (or
    noise, score, data) `(N, C, H, W)`, at times t `(N,)` in [0, 1], which go to the timestep embedding unscaled.
    """

    drops_variance = True


class SiT(DropsVariance, DiT):
    """DiT with continuous time. Arguments, parameters and initialisation are those of `DiT`."""
