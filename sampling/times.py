"""Times of a network while it samples, in the terms in which guidance is limited and scheduled.

`times_of(objective)` returns an object with

- `largest`: the largest time of the model; the smallest is 0;
- `slack`: how far `of_model` may be off, by rounding;
- `process`: what a guide must have in common with the network, `{name: value}`, of fractions about;
- `of_model(t)`: the model's time of a value that its sampler calls it with;
- `share(t)`: how far on the way from noise (0) to data (1) a time of the model is;
- `noise_level(t)`: noise over signal there, the sigma of EDM (Karras et al. 2022): from infinity to 0.

All are numbers on the host.
"""

import math

import paddle

from diffusion import ModelMeanType
from sampling.pipelines.export_sit import SIGMA_SCALE
from sampling.step_counts import FLOW_SCHEDULER


class TransportTimes:
    """Times of a transport: 0 is noise, 1 data."""

    largest, slack = 1.0, 0.0

    def __init__(self, transport):
        self.path = transport.path_sampler
        self.process = {"path_type": transport.path_type.value, "prediction": transport.model_type.value}

    def of_model(self, t):
        return t

    def share(self, t):
        return t

    def noise_level(self, t):
        t = paddle.to_tensor([t], dtype="float64", place=paddle.CPUPlace())  # so no device is waited for
        alpha, sigma = (float(of(t)[0]) for of in (self.path.compute_alpha_t, self.path.compute_sigma_t))
        return sigma / alpha if alpha > 0 else math.inf


class FlowTimes(TransportTimes):
    """Times of a SiT in a stock DiTPipeline folder, see `sampling.pipelines.export_sit`.

    Its timesteps are logarithms in float32, which give the time to some 1e-6.
    """

    slack = 1e-5

    def __init__(self, sigma_max):
        self.process = {"scheduler": FLOW_SCHEDULER}
        self.last = sigma_max / SIGMA_SCALE  # time of the last step: 1, of a path that ends there

    def of_model(self, t):
        return min(max(self.last - math.exp(4.0 * t) / SIGMA_SCALE, 0.0), 1.0)

    def noise_level(self, t):
        raise ValueError("guidance_sigma_interval: this folder does not tell its noise levels; expected None")


class DiffusionTimes:
    """Timesteps of a diffusion: 0 is next to the data, the largest noise."""

    slack = 0.0

    def __init__(self, alphas_cumprod, prediction):
        self.alphas_cumprod = alphas_cumprod  # (T,), numpy
        self.largest = float(len(alphas_cumprod) - 1)
        # Schedules that share their middle are the same here.
        middle = float(alphas_cumprod[len(alphas_cumprod) // 2])
        self.process = {"diffusion_steps": len(alphas_cumprod), "alphas_cumprod in the middle": middle}
        self.process["prediction"] = prediction

    def of_model(self, t):
        return t

    def share(self, t):
        return 1.0 - t / max(self.largest, 1.0)

    def noise_level(self, t):
        signal = float(self.alphas_cumprod[round(t)])
        return math.sqrt((1.0 - signal) / signal) if signal > 0 else math.inf


def times_of(objective):
    """Returns the times of what a `Generator` samples by, its objective."""
    if hasattr(objective, "transport"):
        return TransportTimes(objective.transport)
    if hasattr(objective, "diffusion"):
        predicts_data = objective.diffusion.model_mean_type == ModelMeanType.START_X
        return DiffusionTimes(objective.diffusion.alphas_cumprod, "sample" if predicts_data else "epsilon")
    if type(objective.scheduler).__name__ == FLOW_SCHEDULER:
        return FlowTimes(objective.scheduler.config.sigma_max)
    return DiffusionTimes(objective.scheduler.alphas_cumprod.numpy(), objective.scheduler.config.prediction_type)
