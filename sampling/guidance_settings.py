"""Settings of guidance: what they may be, and their defaults. Imports no Paddle, so that mistakes are said at once."""

import math
from numbers import Real

from config.checks import holds_timestep
from config.options import GUIDANCE_KEYS, GUIDANCE_SCALE

GUIDE_SCALE = 2.0  # of autoguidance, about what its paper found best

INTERNAL = ("internal_scale", "internal_interval")  # settings of internal guidance, which needs no null class

# The part of `scale - 1` that is in force, by the share of the way from noise (0) to data (1). Each has the mean 1.
SCHEDULES = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 2.0 * share,
    "cosine": lambda share: 1.0 - math.cos(math.pi * share),
}


def check_scale(scale, has_null_class, path, default=GUIDANCE_SCALE):
    """Returns a guidance scale, for None the default or 1 without a null class; `ValueError` for another one there."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"--guidance_scale {scale}: expected a finite number, 1 for no guidance")
    if scale is None:
        return default if has_null_class else 1.0
    if scale != 1 and not has_null_class:
        raise ValueError(
            f"{path}: trained without a null class, can't be guided; use guidance_scale=1 (--guidance_scale 1)"
        )
    return scale


def no_second_layer(path):
    """Returns a sentence on a model that has not what internal guidance needs."""
    return (
        f"{path}: has no second final layer for internal guidance; expected the scale 1. "
        'The entry {"type": "internal_guidance", "block": N} of objective.regularizers trains one (of a file of '
        "weights: --config_file has to name it), --keep_internal_guidance exports it"
    )


def configured_guidance(config):
    """Returns the options of `Generator.sample` that a resolved config's section `guidance` stands for.

    Only those that are no defaults, so that runs from before there were some stay comparable.
    """
    section, own = config["guidance"], ("cfg_zero_star", "timestep_shift", *INTERNAL)
    changed = {name: section[name] for name, option in GUIDANCE_KEYS.items() if section[name] != option.default}
    return {name if name in own else f"guidance_{name}": value for name, value in changed.items()}


def check_guidance(
    *,
    channels=None,
    interval=None,
    sigma_interval=None,
    schedule="constant",
    rescale=0.0,
    zero_star=False,
    guide_scale=1.0,
    internal_scale=1.0,
    internal_interval=None,
    largest_time=1.0,
):
    """Raises `ValueError` for a setting of `guided` that is not accepted; times are in `[0, largest_time]`."""
    if channels not in (None, "auto", "default") and (type(channels) is not int or channels < 1):
        raise ValueError(
            f"guidance_channels {channels!r}: expected 3, another positive integer, None for all, or 'auto'"
        )
    for name, times in {"guidance_interval": interval, "internal_interval": internal_interval}.items():
        if times is not None and not _is_pair(times, largest_time):
            raise ValueError(
                f"{name} {times!r}: expected (lowest, highest) times in [0, {largest_time:g}], those of the model"
            )
        if times is not None and largest_time != 1 and not holds_timestep(times):
            raise ValueError(f"{name} {times!r}: holds no timestep, from 0 to {largest_time:g}")
    if sigma_interval is not None and not _is_pair(sigma_interval, math.inf):
        raise ValueError(
            f"guidance_sigma_interval {sigma_interval!r}: expected (lowest, highest) noise levels, at least 0"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"guidance_schedule {schedule!r}: expected {', '.join(SCHEDULES)}")
    if isinstance(rescale, bool) or not isinstance(rescale, Real) or not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale {rescale!r}: expected a number from 0 (none) to 1")
    if not isinstance(zero_star, bool):
        raise ValueError(f"cfg_zero_star {zero_star!r}: expected True or False")
    for name, scale in {"guide_scale": guide_scale, "internal_scale": internal_scale}.items():
        if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"{name} {scale!r}: expected a number, 1 for none")


def _is_pair(interval, largest):
    is_pair = isinstance(interval, (list, tuple)) and len(interval) == 2
    return is_pair and all(isinstance(t, Real) for t in interval) and 0 <= interval[0] <= interval[1] <= largest
