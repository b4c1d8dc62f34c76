"""Interpolant transport as an objective."""

import paddle
from tqdm.auto import tqdm

from objectives.base import Rows, _draw, _label_dropout
from transport import Sampler, create_transport


class TransportObjective:
    """Interpolant transport (Ma et al. 2024, SiT): noise at t = 0 to data at t = 1.

    Args:
        config: a resolved config: the `objective` section and, of `model`, `class_dropout_prob`.
        ranks_per_batch: of no consequence here.
    """

    def __init__(self, config, ranks_per_batch=1):
        settings = dict(config["objective"])
        settings.pop("type")
        self._class_dropout_prob = config["model"]["class_dropout_prob"]
        self.transport = create_transport(**settings)

    def draw(self, x, rows=None):
        """As `DiffusionObjective.draw`, without `weights`."""
        rows = rows or Rows(0, x.shape[0], x.shape[0])
        x0 = _draw(lambda total: paddle.randn([total, *x.shape[1:]], dtype=x.dtype), rows)
        t = _draw(self.transport.sample_timesteps, rows)
        return {"t": t, "noise": x0, **_label_dropout(self._class_dropout_prob, rows)}

    def training_losses(self, model, x, y, rows=None, drawn=None):
        """Losses at random times; arguments and result as `DiffusionObjective.training_losses`, with part `pred`."""
        drawn = self.draw(x, rows) if drawn is None else dict(drawn)
        t, x0 = drawn.pop("t"), drawn.pop("noise")
        return self.transport.training_losses(model, x, {"y": y, **drawn}, x0=x0, t=t)

    def validation_losses(self, model, x, y, place, noise):
        """Losses at given times and noise; as `DiffusionObjective.validation_losses`, `place` from noise to data."""
        t0, t1 = self.transport.check_interval(self.transport.train_eps, self.transport.sample_eps)
        return self.transport.training_losses(model, x, {"y": y}, x0=noise, t=place * (t1 - t0) + t0)["loss"]

    def end_step(self):
        """Nothing here learns."""

    def sample(self, denoiser, noise, *, num_steps=250, method=None, sampler="ode", **options):
        """Turns noise into latents, by the path and prediction that are trained; as `sample_transport`."""
        return sample_transport(
            self.transport, denoiser, noise, num_steps=num_steps, method=method, sampler=sampler, **options
        )

    def check_num_steps(self, num_steps):
        """Raises `ValueError` if `sample` can't take this number of points, or these settings can't be sampled."""
        Sampler(self.transport).make("ode", num_steps=num_steps)

    def state_dict(self):
        """Empty: nothing here learns."""
        return {}

    def set_state_dict(self, state):
        """Nothing to restore."""


def sample_transport(
    transport, denoiser, noise, *, num_steps=250, method=None, sampler="ode", progress=False, callback=None, **options
):
    """Turns noise into latents.

    Args:
        transport: made by `create_transport`.
        denoiser: `denoiser(x, t) -> (N, C, H, W)`, guidance included.
        noise: `(N, C, H, W)`, standard normal.
        num_steps: grid points of the time interval, as in the official code: one more than the steps of an ODE.
        method: of the ODE `euler` (default), `midpoint`, `heun2`, `heun3`, `rk4` or `dopri5`; of the SDE `Euler`
            (default) or `Heun`.
        sampler: `ode` or `sde`.
        progress: show a bar.
        callback: called as `callback(step, steps, latents)` after each step, from 1 on.
        options: of `transport.Sampler.sample_ode` or `sample_sde`.

    Returns:
        latents `(N, C, H, W)`.

    Raises:
        ValueError: a setting that is not accepted; the message names those that are.
    """
    steps = num_steps if sampler == "sde" else num_steps - 1

    def watch(states):
        states = iter(tqdm(states, total=num_steps) if progress else states)
        yield next(states)  # the noise
        for step, state in enumerate(states, 1):
            callback(step, steps, state[0] if sampler == "ode" else state)
            yield state

    options.update(num_steps=num_steps, trajectory=False, progress=watch if callback else progress)
    latents = Sampler(transport).make(sampler, method, **options)(noise, denoiser)[-1]
    if callback is not None and sampler == "sde":
        callback(steps, steps, latents)  # the last step, which ends the others
    return latents
