"""Noise schedules: the betas of a diffusion (Ho et al. 2020; Nichol and Dhariwal 2021)."""

import math

import numpy as np


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """Returns betas whose cumulative product of (1 - beta) follows `alpha_bar(u)`, u in [0, 1].

    `max_beta`, below 1, bounds them, so that the last steps stay invertible. float64 `(num_diffusion_timesteps,)`.
    """
    level = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - level[i + 1] / level[i], max_beta) for i in range(num_diffusion_timesteps)])


def _linear_betas(steps):
    # Ho et al.'s 1e-4..0.02 at 1000 steps; for other counts the same total amount of noise.
    scale = 1000 / steps
    if scale * 0.02 >= 1:
        raise ValueError(f"{steps} diffusion steps: the linear schedule needs more than 20 (or its last beta is >= 1)")
    return np.linspace(scale * 0.0001, scale * 0.02, steps, dtype=np.float64)


def _squared_cosine_betas(steps):
    # Eq. 17 of Improved DDPM, offset s = 0.008.
    return betas_for_alpha_bar(steps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


_SCHEDULES = {"linear": _linear_betas, "squaredcos_cap_v2": _squared_cosine_betas}


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """Returns the betas of the schedule "linear" or "squaredcos_cap_v2": float64 array `(num_diffusion_timesteps,)`.

    Another name, or a count that the schedule can't have, is a `ValueError`.
    """
    if schedule_name not in _SCHEDULES:
        raise ValueError(f"unknown noise schedule {schedule_name!r}; accepted: {', '.join(_SCHEDULES)}")
    if type(num_diffusion_timesteps) is not int or num_diffusion_timesteps < 1:
        raise ValueError(f"the number of diffusion steps must be a positive integer, got {num_diffusion_timesteps!r}")
    return _SCHEDULES[schedule_name](num_diffusion_timesteps)
