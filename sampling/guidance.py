"""Guidance of a network while it samples, as a denoiser for any sampler.

- Classifier-free guidance (Ho and Salimans 2022): away from the network without the class.
- Autoguidance (Karras et al. 2024, arXiv:2406.02507): away from a worse network, the guide.
- Internal guidance (Zhou et al. 2025, arXiv:2512.24176): away from what the network's second final
  layer says of its tokens halfway, in the same pass.
- CFG-Zero* (Fan et al. 2025, arXiv:2503.18886), guidance rescale (Lin et al. 2023, arXiv:2305.08891), a guidance
  interval (Kynkaanniemi et al. 2024, arXiv:2404.07724) and schedules of the scale (Wang et al. 2024, arXiv:2404.13040).

Which channels are guided differs between the codes that DiT users know. The official `forward_with_cfg` guides the
first three latent channels and leaves the others (and the learned variance) as the class gave them; `DiTPipeline` of
ppdiffusers guides all latent channels. The published DiT figures belong to the first, those of LightningDiT too: it
guides 3 of its 32 channels, by a large scale.
"""

from functools import partial

import numpy as np
import paddle

import diffusion
import transport
from models.regularizers import InternalGuidanceHook
from sampling.guidance_settings import SCHEDULES
from transport import shift_time

__all__ = [
    "autoguidance",
    "cfg_zero_star",
    "default_channels",
    "guided",
    "internally_guided",
    "rescaled",
    "shift_time",
]


def default_channels(in_channels):
    """Returns `channels` of `guided`: 3 of 4 as in the official code, else all; 3 of 16 would hardly guide anything.

    Networks whose published figures are others have their own in `config.schema.MODEL_TYPES`.
    """
    return 3 if in_channels == 4 else None


def autoguidance(main, guide, scale):
    """Returns `guide + scale (main - guide)` of two networks' outputs `(N, ...)`; for the scale 1 `main` itself."""
    return main if scale == 1 else guide + scale * (main - guide)


def cfg_zero_star(cond, uncond, scale):
    """Returns `a uncond + scale (cond - a uncond)`, `(N, ...)`, with each sample's best a (CFG-Zero*).

    a = <cond, uncond> / (|uncond|^2 + 1e-8) projects the output with the class on the one without: a sample `(N, ...)`
    has one a, over everything but the batch.
    """
    axes = list(range(1, cond.ndim))
    given, without = cond.astype("float32"), uncond.astype("float32")
    best = (given * without).sum(axis=axes, keepdim=True) / (paddle.square(without).sum(axis=axes, keepdim=True) + 1e-8)
    uncond = uncond * best.astype(uncond.dtype)
    return uncond + scale * (cond - uncond)


def internally_guided(model, x, t, y, scale):
    """Returns `model(x, t, y)`, `(N, C or 2C, H, W)`, as `second + scale (output - second)`, by a single pass.

    `second` is the output of the second final layer; a learned variance stays as it is. Arguments as of `guided`.
    """
    output, second = model(x, t, y, hooks=(InternalGuidanceHook(),))
    count = x.shape[1]
    latents = autoguidance(output[:, :count], second[:, :count].astype(output.dtype), scale)
    return paddle.concat([latents, output[:, count:]], axis=1)


def rescaled(guided, cond, amount):
    """Returns `guided` with its standard deviation moved to that of `cond` by `amount`, from 0 to 1; `(N, ...)` each.

    The deviation of a sample is over everything but the batch.
    """
    # A new network's output is 0 everywhere.
    ratio = _deviation(cond) / _deviation(guided).clip(min=1e-12)
    return guided * (ratio * amount + (1 - amount)).astype(guided.dtype)


def _deviation(x):
    x, axes = x.astype("float32"), list(range(1, x.ndim))
    return paddle.square(x - x.mean(axis=axes, keepdim=True)).mean(axis=axes, keepdim=True).sqrt()


def guided(
    model,
    y,
    cfg_scale,
    *,
    channels=3,
    null_class,
    interval=None,
    sigma_interval=None,
    schedule="constant",
    rescale=0.0,
    zero_star=False,
    guide=None,
    guide_scale=1.0,
    internal_scale=1.0,
    internal_interval=None,
    times=None,
):
    """Returns a `denoiser(x, t)` that guides a network; where no guidance is active it is the network itself.

    The network is then called once, on N samples. With classifier-free guidance it is called on 2N in one batch; the
    guide adds its own call. Internal guidance adds none, and comes first: what it makes of the network's output, with
    and without the class, is the network's output for all that follows.

    Args:
        model: called as `model(x, t, y)`: latents `(N, C, H, W)`, times `(N,)`, to `(N, C or 2C, H, W)`; for internal
            guidance with `hooks` too, see `models.base.LatentTransformer`.
        y: labels `(N,)`, int64.
        cfg_scale: scale of classifier-free guidance; 1 for none.
        channels: how many leading latent channels it guides: 3 as in the official code, None for all. The others, and
            the variance's where the network learns it, keep the output with the class. A guide guides all of them.
        null_class: the label that stands for "no class", `num_classes`.
        interval: `(lowest, highest)` times of the model, both included, between which guidance is on; None for all.
        sigma_interval: the same in noise levels, noise over signal (sigma of EDM); guidance is on where both are.
        schedule: of `SCHEDULES`: how both scales go from noise to data; their means are the given ones.
        rescale: of `rescaled`; 0 for none.
        zero_star: guide by `cfg_zero_star`.
        guide: another network, called as `model`; None for no autoguidance.
        guide_scale: scale of autoguidance; 1 for none. Beside a `cfg_scale` the two differences are added:
            `uncond + cfg_scale (cond - uncond) + (guide_scale - 1) (cond - guide)`.
        internal_scale: scale of internal guidance, of all latent channels; 1 for none.
        internal_interval: times of the model between which internal guidance is on, as `interval`; None for all.
        times: of `sampling.times.times_of`; needed for a `sigma_interval` and for a schedule.
    """
    null = paddle.full_like(y, null_class)
    labels = paddle.concat([y, null])  # (2N,)
    scales = (cfg_scale, 1.0 if guide is None else guide_scale)
    force, internal = _Force(interval, sigma_interval, schedule, times), _Force(internal_interval, times=times)

    def denoiser(x, t):
        network = model
        if internal_scale != 1 and internal.at(t):
            network = partial(internally_guided, model, scale=internal_scale)
        in_force = 1.0 if scales == (1, 1) else force.at(t)  # then no time is asked for
        scale, beside = (one if in_force == 1 else 1.0 + (one - 1.0) * in_force for one in scales)
        if scale == 1:
            cond = out = network(x, t, y)
            if beside == 1:
                return out
        else:
            cond, uncond = network(paddle.concat([x, x]), paddle.concat([t, t]), labels).split(2, axis=0)
            count = min(channels or x.shape[1], x.shape[1])
            with_class, without = cond[:, :count], uncond[:, :count]
            combine = cfg_zero_star if zero_star else autoguidance  # which is guidance's formula of any two outputs
            out = combine(with_class, without, scale)
        if beside != 1:
            count = x.shape[1]
            with_class, worse = cond[:, :count], guide(x, t, y)[:, :count].astype(cond.dtype)
            if scale == 1:
                out = autoguidance(with_class, worse, beside)
            else:
                out = paddle.concat([out, cond[:, out.shape[1] : count]], axis=1) + (beside - 1) * (with_class - worse)
        if rescale > 0:
            out = rescaled(out, with_class, rescale)
        return paddle.concat([out, cond[:, out.shape[1] :]], axis=1)

    return denoiser


class _Force:
    """What part of `scale - 1` is in force over time: none outside the intervals.

    A time of this project's samplers is not read from the device.
    """

    def __init__(self, interval, sigma_interval=None, schedule="constant", times=None):
        self.interval, self.sigma_interval, self.times = interval, sigma_interval, times
        self.share, self.is_constant = SCHEDULES[schedule], schedule == "constant"
        if times is None and (sigma_interval is not None or not self.is_constant):
            raise ValueError("times: a sigma_interval and a schedule need them; expected what times_of returns")

    def at(self, t):
        """Returns the part at t `(N,)`, one time for the whole batch."""
        if self.is_constant and self.interval is None and self.sigma_interval is None:
            return 1.0
        value = transport.host_value(t)
        value = diffusion.host_value(t) if value is None else value
        value = float(t[0]) if value is None else value
        slack = 0.0
        if self.times is not None:
            value, slack = self.times.of_model(value), self.times.slack
        if not _inside(self.interval, value, slack):
            return 0.0
        if self.sigma_interval is not None and not _inside(self.sigma_interval, self.times.noise_level(value)):
            return 0.0
        return 1.0 if self.is_constant else self.share(self.times.share(value))


def _inside(interval, value, slack=0.0):
    """Returns whether a number lies in an interval, None for all: both ends count, in the precision of times."""
    if interval is None:
        return True
    return np.float32(interval[0] - slack) <= np.float32(value) <= np.float32(interval[1] + slack)
