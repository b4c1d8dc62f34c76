"""Respacing: a diffusion process on a subset of another one's timesteps (Sec. 4 of Improved DDPM)."""

import re
from itertools import accumulate

import numpy as np
import paddle

from .diffusion_utils import host_value, with_host_value
from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps, section_counts):
    """Returns the timesteps kept from a process of `num_timesteps` steps: a set of integers in [0, num_timesteps).

    Args:
        section_counts: the process is cut into as many equal sections as there are counts, and each keeps that many
            evenly spaced steps. A list of integers, a string of them ("10,20,30"), one integer (25 or "25"); or "ddimN"
            for N steps at a constant integer stride, as in the DDIM paper.

    A string of another form, or more steps than there are, is a `ValueError`.
    """
    counts = [section_counts] if type(section_counts) is int else section_counts
    if isinstance(counts, str):
        if re.fullmatch("ddim[0-9]+", counts):
            for stride in range(1, num_timesteps):
                steps = range(0, num_timesteps, stride)
                if len(steps) == int(counts[4:]):
                    return set(steps)
            raise ValueError(
                f"timestep respacing {counts!r}: no integer stride takes exactly {counts[4:]} of {num_timesteps} steps"
            )
        counts = [int(part) if part.strip().isdecimal() else None for part in counts.split(",")]
    is_list = isinstance(counts, (list, tuple))
    if not is_list or not all(type(count) is int and count >= 0 for count in counts) or sum(counts) == 0:
        raise ValueError(
            f"timestep respacing {section_counts!r} is not understood; accepted: '' for all steps, a number of steps"
            " such as '250', numbers per section such as '10,15,20' (or a list of them), 'ddimN' such as 'ddim25'"
        )

    size, extra = divmod(num_timesteps, len(counts))
    kept, start = set(), 0
    for i, count in enumerate(counts):
        section = size + (1 if i < extra else 0)
        if count > section:
            raise ValueError(
                f"timestep respacing {section_counts!r}: section {i + 1} has {section} of the {num_timesteps} steps,"
                f" {count} can't be taken from it"
            )
        # A running sum rounded half to even, as in the official code: a product would pick other steps.
        stride = (section - 1) / (count - 1) if count > 1 else 1
        kept.update(start + round(position) for position in accumulate([0.0, *[stride] * (count - 1)][:count]))
        start += section
    return kept


class SpacedDiffusion(GaussianDiffusion):
    """A process over the timesteps `use_timesteps` of the one that `betas` describe.

    The betas are chosen so that the noise levels at the kept steps stay the same; the model (and a `cond_fn`) is called
    with the original timesteps.

    Args:
        use_timesteps: original timesteps to keep.
        betas, model_mean_type, model_var_type, loss_type: of the original process, see `GaussianDiffusion`.

    Attributes:
        timestep_map: list, the original timestep of each step.
        original_num_steps: number of steps of the original process.
    """

    def __init__(self, use_timesteps, *, betas, **kwargs):
        original = GaussianDiffusion(betas=betas, **kwargs)
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = original.num_timesteps
        self.timestep_map = sorted(self.use_timesteps)
        if not self.timestep_map or not 0 <= self.timestep_map[0] <= self.timestep_map[-1] < self.original_num_steps:
            raise ValueError(f"use_timesteps must hold timesteps of 0 to {self.original_num_steps - 1}, at least one")

        kept = original.alphas_cumprod[self.timestep_map]
        self._is_whole = len(kept) == self.original_num_steps
        super().__init__(betas=1 - kept / np.append(1.0, kept[:-1]), **kwargs)

    def _model_timesteps(self, t):
        if self._is_whole:
            return t
        original, step = paddle.gather(self._table("timestep_map", t.place, "int64"), t), host_value(t)
        return original if step is None else with_host_value(original, self.timestep_map[step])
