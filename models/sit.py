"""SiT: the scalable interpolant transformer (Ma et al., arXiv:2401.08740), DiT's network for a `transport`.

Time runs from noise (`t = 0`) to data (`t = 1`).
"""

from .dit import DiT


class WithoutVariance:
    """Put before a network's class: the same network for a `transport`, which has no use for variance channels.

    With `learn_sigma` the last layer has 2C channels (`out_channels`) and the second half is dropped, as in the
    official SiT: published weights have that shape.
    """

    def forward(self, x, t, y, force_drop_ids=None):
        """Predicts velocity (or noise, or score) of interpolated latents.

        Args:
            x: `(N, C, H, W)`.
            t: times `(N,)` in [0, 1]; they go to the timestep embedding unscaled.
            y: class labels `(N,)`, int64, 0..num_classes (the null class).
            force_drop_ids: `(N,)`, 1 where the label is to be replaced by the null class, instead of a random draw.

        Returns:
            `(N, C, H, W)`.
        """
        out = super().forward(x, t, y, force_drop_ids)  # (N, out_channels, H, W)
        return out[:, : self.in_channels]


class SiT(WithoutVariance, DiT):
    """DiT with continuous time. Arguments, parameters and initialisation are those of `DiT`."""
