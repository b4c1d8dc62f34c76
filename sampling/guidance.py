"""Classifier-free guidance (Ho and Salimans 2022) as a denoiser for any sampler.

Which channels are guided differs between the codes that DiT users know. The official `forward_with_cfg` guides the
first three latent channels and leaves the others (and the learned variance) as the class gave them; `DiTPipeline` of
ppdiffusers guides all latent channels. The published DiT figures belong to the first, those of LightningDiT too: it
guides 3 of its 32 channels, by a large scale.
"""

import numpy as np
import paddle

from transport.sampler import host_value


def default_channels(in_channels):
    """Returns `channels` of `guided`: 3 of 4 as in the official code, else all; 3 of 16 would hardly guide anything.

    Networks whose published figures are others have their own in `config.schema.MODEL_TYPES`.
    """
    return 3 if in_channels == 4 else None


def guided(model, y, cfg_scale, *, channels=3, null_class, interval=None):
    """Returns a `denoiser(x, t)` that asks a network with and without the class, in one batch of 2N.

    Args:
        model: called as `model(x, t, y)`: latents `(N, C, H, W)`, times `(N,)`, to `(N, C or 2C, H, W)`.
        y: labels `(N,)`, int64.
        cfg_scale: guidance scale; 1 for none, which calls the network once with the labels alone.
        channels: how many leading latent channels are guided: 3 as in the official code, None for all. The others,
            and the variance's where the network learns it, keep the output with the class.
        null_class: the label that stands for "no class", `num_classes`.
        interval: `(lowest, highest)` timesteps, both included, between which guidance is on; None for all
            (Kynkaanniemi et al., arXiv:2404.07724).
    """
    null = paddle.full_like(y, null_class)
    labels = paddle.concat([y, null])  # (2N,)

    def denoiser(x, t):
        if cfg_scale == 1 or not _inside(interval, t):
            return model(x, t, y)
        cond, uncond = model(paddle.concat([x, x]), paddle.concat([t, t]), labels).split(2, axis=0)
        count = min(channels or x.shape[1], x.shape[1])
        combined = uncond[:, :count] + cfg_scale * (cond[:, :count] - uncond[:, :count])
        return paddle.concat([combined, cond[:, count:]], axis=1)

    return denoiser


def _inside(interval, t):
    """Returns whether guidance is on at t `(N,)`, one time for the whole batch: both ends count, in t's precision.

    A time of `transport.Sampler` is not read back from the device.
    """
    if interval is None:
        return True
    value = host_value(t)
    value = float(t[0]) if value is None else value
    return np.float32(interval[0]) <= np.float32(value) <= np.float32(interval[1])
