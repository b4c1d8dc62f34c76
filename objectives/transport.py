"""Interpolant transport as an objective."""

import paddle

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
        settings.pop("auxiliary")
        self._class_dropout_prob = config["model"]["class_dropout_prob"]
        self.transport = create_transport(**settings)

    def draw(self, batch, rows=None):
        """As `DiffusionObjective.draw`, without `weights`."""
        x = batch.x
        rows = rows or Rows(0, x.shape[0], x.shape[0])
        x0 = _draw(lambda total: paddle.randn([total, *x.shape[1:]], dtype=x.dtype), rows)
        t = _draw(self.transport.sample_timesteps, rows)
        return {"t": t, "noise": x0, **_label_dropout(self._class_dropout_prob, rows)}

    def training_losses(self, model, batch, rows=None, drawn=None):
        """Losses at random times; arguments and result as `DiffusionObjective.training_losses`, with part `pred`."""
        drawn = self.draw(batch, rows) if drawn is None else dict(drawn)
        t, x0 = drawn.pop("t"), drawn.pop("noise")
        return self.transport.training_losses(model, batch.x, {"y": batch.y, **drawn}, x0=x0, t=t)

    def validation_losses(self, model, batch, place, noise):
        """Losses at given times and noise; as `DiffusionObjective.validation_losses`, `place` from noise to data."""
        t0, t1 = self.transport.check_interval(self.transport.train_eps, self.transport.sample_eps)
        t = place * (t1 - t0) + t0
        return self.transport.training_losses(model, batch.x, {"y": batch.y}, x0=noise, t=t)["loss"]

    def end_step(self):
        """Nothing here learns."""

    def sample(self, denoiser, noise, *, num_steps=250, method=None, sampler="ode", progress=False, **options):
        """Noise to latents by the path and prediction that are trained.

        Args:
            denoiser: `denoiser(x, t) -> (N, C, H, W)`, guidance included.
            noise: `(N, C, H, W)`, standard normal.
            num_steps: grid points of the time interval, as in the official code: one more than the steps.
            method: of the ODE `euler` (default), `midpoint`, `heun2`, `heun3`, `rk4` or `dopri5`; of the SDE `Euler`
                (default) or `Heun`.
            sampler: `ode` or `sde`.
            options: of `transport.Sampler.sample_ode` or `sample_sde`.
        """
        make = Sampler(self.transport).make
        return make(sampler, method, num_steps=num_steps, progress=progress, trajectory=False, **options)(
            noise, denoiser
        )[-1]

    def check_num_steps(self, num_steps):
        """Raises `ValueError` if `sample` can't take this number of points, or these settings can't be sampled."""
        Sampler(self.transport).make("ode", num_steps=num_steps)

    def state_dict(self):
        """Empty: nothing here learns."""
        return {}

    def set_state_dict(self, state):
        """Nothing to restore."""
