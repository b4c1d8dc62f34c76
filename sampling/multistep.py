"""Multistep solvers of the diffusion ODE: ppdiffusers' DPM-Solver++, mended, and UniPC in its frame.

Noise levels (`sigmas`) are sigma / alpha, as in ppdiffusers; lambda, -log of one, is half the log of the
signal-to-noise ratio. A step goes from one timestep's level to the next one's.
"""

import numpy as np
import paddle
from ppdiffusers import DPMSolverMultistepScheduler
from ppdiffusers.schedulers.scheduling_utils import SchedulerOutput


class DPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ of ppdiffusers, but it makes no more steps than it is asked for.

    Where floating point has `1000 / (1000 / n) > n`, such as n = 61, ppdiffusers makes one step more, at timestep -1;
    after a step at timestep 0, such as with n = 769, the result of that is NaN.
    """

    def set_timesteps(self, num_inference_steps):
        super().set_timesteps(num_inference_steps)
        count = int((self.timesteps.numpy() >= 0).sum())
        self.timesteps, self.num_inference_steps = self.timesteps[:count], count
        self.sigmas = paddle.concat([self.sigmas[:count], self.sigmas[-1:]])


class DataSolver(DPMSolver):
    """The same, but it ends at the data, as DDIM does: ppdiffusers leaves the noise of timestep 0 in the latents."""

    def set_timesteps(self, num_inference_steps):
        super().set_timesteps(num_inference_steps)
        self.sigmas = paddle.concat([self.sigmas[:-1], paddle.zeros([1], self.sigmas.dtype)])


class UniPC(DataSolver):
    """UniPC (Zhao et al. 2023, arXiv:2302.04867) of the variant `bh2` on predicted data, predictor and corrector.

    Timesteps and order are those of `DataSolver`. The corrector, which costs no evaluation, makes a step again when the
    output at its end is known. ppdiffusers' own UniPC fails on Paddle 3, where it stacks tensors and numbers, has no
    cut of the noise levels, which squaredcos_cap_v2 needs, and solves for its weights in float32.
    """

    def set_timesteps(self, num_inference_steps):
        super().set_timesteps(num_inference_steps)
        self._levels = self.sigmas.numpy().astype("float64")
        self._data, self._start = [], None  # predictions, newest first; the state before the last step

    def step(self, model_output, timestep, sample):
        """Returns the state after a step, as `prev_sample`: interface of ppdiffusers' schedulers."""
        if self.step_index is None:
            self._init_step_index(timestep)
        i = self.step_index
        data = self.convert_model_output(model_output, sample=sample)
        if self._data:
            sample = self._advance(self._start, i - 1, self._order, [*self._data], end=data)
        self._data = [data, *self._data][: self.config.solver_order]
        self._start, self._order = sample, min(len(self._data), len(self.timesteps) - i)
        self._step_index += 1
        return SchedulerOutput(prev_sample=self._advance(sample, i, self._order, self._data))

    def _advance(self, x, i, order, data, end=None):
        """Returns the state after step i from the one before it, x.

        data: predictions at the start of the step and of those before it, the newest first. end: the one at its end,
        which makes this the corrector.
        """
        level, end_level = self._levels[i : i + 2]
        h = np.log(level / end_level) if end_level > 0 else np.inf
        # Times are lambda's, from the start of the step on and in units of its length h.
        times = [np.log(level / self._levels[i - k]) / h for k in range(1, order)]
        others = data[1:order]
        if end is not None:
            times, others = [*times, 1.0], [*others, end]
        mean = data[0]
        for weight, other, time in zip(_weights(times, h), others, times, strict=True):
            mean = mean + (other - data[0]) * float(weight / time)
        alpha, end_alpha = 1 / np.hypot(1, level), 1 / np.hypot(1, end_level)
        ratio = end_level * end_alpha / (level * alpha)
        return x * float(ratio) + mean * float(end_alpha * -np.expm1(-h))


def _weights(times, h):
    """Returns the weights of the slopes to these times in the mean of the data over a step, weighted by e^lambda.

    With them the means of all polynomials through the slopes' points are right; `bh2` takes 1/2 where there is one.
    """
    if len(times) < 2:
        return [0.5] * len(times)
    means = [1.0]  # of time ** j
    for j in range(1, len(times) + 1):
        means.append(-1 / np.expm1(-h) - j / h * means[-1])
    return np.linalg.solve(np.vander(times, increasing=True).T, means[1:])


SOLVERS = {"dpm": DPMSolver, "dpm3": DataSolver, "unipc": UniPC}
