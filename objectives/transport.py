"""Interpolant transport as an objective."""

import paddle

from objectives.base import Objective, draw_rows
from transport import Sampler, create_transport


class TransportObjective(Objective):
    """Interpolant transport (Ma et al. 2024, SiT): noise at t = 0 to data at t = 1.

    Args:
        settings: of a resolved config's `objective`: arguments of `create_transport`.
        learn_sigma, ranks_per_batch: of no consequence here.
    """

    def __init__(self, settings, *, class_dropout_prob, regularizers=(), learn_sigma=False, ranks_per_batch=1):
        super().__init__(class_dropout_prob, regularizers)
        self.transport = create_transport(**settings)

    def draw_noise(self, x, rows):
        """Draws `noise` as x, then `t` `(N,)`."""
        x0 = draw_rows(lambda total: paddle.randn([total, *x.shape[1:]], dtype=x.dtype), rows)
        return {"t": draw_rows(self.transport.sample_timesteps, rows), "noise": x0}

    def losses(self, model, x, drawn, model_kwargs):
        """Returns `loss` and, where it is a part, `cos_loss`, `(N,)` each."""
        losses = self.transport.training_losses(model, x, model_kwargs, x0=drawn["noise"], t=drawn["t"])
        losses.pop("pred")  # the network's output, no loss
        return losses

    def compare(self, output, x, drawn):
        """Returns `(prediction, target)` as `Objective` says; of a network that predicts data, the velocities."""
        return self.transport.compare(output, x, drawn["noise"], drawn["t"])

    def validation_losses(self, model, batch, place, noise):
        """Returns the losses at given times and noise; as `DiffusionObjective`'s, `place` from noise to data."""
        t0, t1 = self.transport.check_interval(self.transport.train_eps, self.transport.sample_eps)
        t = place * (t1 - t0) + t0
        return self.transport.training_losses(model, batch.x, {"y": batch.y}, x0=noise, t=t)["loss"]

    def sample(self, denoiser, noise, **options):
        """Turns noise into latents, by the path and prediction that are trained; as `sample_transport`."""
        return sample_transport(self.transport, denoiser, noise, **options)

    def check_num_steps(self, num_steps):
        """Raises `ValueError` if `sample` can't take this number of points, or these settings can't be sampled."""
        Sampler(self.transport).make("ode", num_steps=num_steps)


def sample_transport(
    transport, denoiser, noise, *, num_steps=250, method=None, sampler="ode", progress=False, callback=None,
    draw_noise=None, **options
):  # fmt: skip
    """Turns noise into latents `(N, C, H, W)`; ValueError for a setting that is not accepted names those that are.

    Args:
        transport: made by `create_transport`.
        denoiser: `denoiser(x, t) -> (N, C, H, W)`, guidance included.
        noise: `(N, C, H, W)`, standard normal.
        num_steps: grid points of the time interval, as in the official code: one more than the steps of an ODE.
        method: of the ODE `euler` (default), `midpoint`, `heun2`, `heun3`, `rk4`, `heun2_euler`, `ab2` or `dopri5`; of
            the SDE `Euler` (default) or `Heun`.
        sampler: `ode` or `sde`.
        progress: show a bar, where there is no callback.
        callback: called as `callback(step, steps, latents)` after each step, from 1 on.
        draw_noise: of the SDE's steps, `draw_noise(x)` returns standard normal noise as x; None for Paddle's.
        options: of `transport.Sampler.sample_ode` or `sample_sde`.
    """

    def watch(states):
        first, steps = (0, num_steps - 1) if sampler == "ode" else (1, num_steps)  # an ODE begins with the noise
        for step, latents in enumerate(states, first):
            if step > 0:
                callback(step, steps, latents)
            yield latents

    if sampler == "sde":
        options.update(draw_noise=draw_noise)
    options.update(num_steps=num_steps, trajectory=False, progress=watch if callback else progress)
    return Sampler(transport).make(sampler, method, **options)(noise, denoiser)[-1]
