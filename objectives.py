"""What a training loop optimises and a sampler inverts, behind one interface.

`build_objective(config)` returns an object with

- `draw(x, rows=None) -> dict` of the random numbers of a training step, per sample,
- `training_losses(model, x, y, rows=None, drawn=None) -> dict` of per-sample tensors with the key `loss`,
- `validation_losses(model, x, y, place, noise) -> (N,)`, with nothing left to chance,
- `end_step()`, called once after each optimizer step,
- `sample(denoiser, noise, *, num_steps, ...) -> latents`, and `check_num_steps(num_steps)` to ask before,
- `state_dict()` / `set_state_dict(state)`, empty unless the objective learns something (a timestep sampler).

The loops know nothing else, so neither of them asks which model it trains.
"""

from collections import namedtuple

import paddle

from diffusion import create_diffusion, create_named_schedule_sampler
from transport import Sampler, create_transport

# Where a rank's micro-batch stands in the global batch of an optimizer step: rows [start, stop) of `total`.
Rows = namedtuple("Rows", "start stop total")


def _draw(sampler, rows):
    """Rows [start, stop) of a draw for the whole global batch.

    Every rank draws the same numbers and keeps its own, so that the noise of a sample depends on its place in the
    global batch only, not on the number of ranks or of accumulation steps.
    """
    numbers = sampler(rows.total)
    return numbers if rows.stop - rows.start == rows.total else numbers[rows.start : rows.stop]


def _label_dropout(probability, rows):
    """The network's `force_drop_ids`, drawn for the whole global batch; nothing where there is no null class."""
    if probability == 0:
        return {}
    return {"force_drop_ids": (_draw(lambda total: paddle.rand([total]), rows) < probability).astype("int64")}


class DiffusionObjective:
    """Gaussian diffusion (Ho et al. 2020; Nichol and Dhariwal 2021) as DiT uses it.

    Args:
        config: a resolved config: the `objective` section and, of `model`, `learn_sigma` and `class_dropout_prob`.
        ranks_per_batch: ranks that follow one another and have the same batch (tensor parallelism).
    """

    def __init__(self, config, ranks_per_batch=1):
        settings = dict(config["objective"])
        settings.pop("type")
        timestep_sampler = settings.pop("timestep_sampler")
        self._settings = {**settings, "learn_sigma": config["model"]["learn_sigma"]}
        self._class_dropout_prob = config["model"]["class_dropout_prob"]
        self.diffusion = create_diffusion("", **self._settings)
        self.timestep_sampler = create_named_schedule_sampler(
            timestep_sampler, self.diffusion, ranks_per_batch=ranks_per_batch
        )
        self._learns = bool(self.timestep_sampler.state_dict())
        self._seen = []

    def draw(self, x, rows=None):
        """The random numbers for `training_losses`, of shape `(N,)` but for the noise.

        Returns:
            dict of `t`, `weights` (of the losses), `noise` as x, and `force_drop_ids` if labels are dropped.
        """
        rows = rows or Rows(0, x.shape[0], x.shape[0])
        t, weights = self.timestep_sampler.sample(rows.total)
        t, weights = t[rows.start : rows.stop], weights[rows.start : rows.stop]
        noise = _draw(lambda total: paddle.randn([total, *x.shape[1:]], dtype=x.dtype), rows)
        return {"t": t, "weights": weights, "noise": noise, **_label_dropout(self._class_dropout_prob, rows)}

    def training_losses(self, model, x, y, rows=None, drawn=None):
        """Losses at random timesteps.

        Args:
            model: called as `model(x_t, t, y, force_drop_ids=...)`.
            x: clean latents `(N, C, H, W)`, scaled to about unit variance.
            y: labels `(N,)`, int64.
            rows: where these N samples stand in the global batch; None if they are all of it.
            drawn: what `draw` returned earlier; None to draw now.

        Returns:
            dict of `(N,)` tensors: `loss`, and its parts (`mse`, `vb`) where there are any.
        """
        drawn = self.draw(x, rows) if drawn is None else dict(drawn)
        t, weights, noise = drawn.pop("t"), drawn.pop("weights"), drawn.pop("noise")
        model_kwargs = {"y": y, **drawn}
        losses = self.diffusion.training_losses(model, x, t, model_kwargs, noise=noise)
        if self._learns:
            self._seen.append((t, losses["loss"].detach()))
            # Importance weights keep the mean loss what it is under uniform timesteps.
            losses["loss"] = losses["loss"].astype("float32") * weights
        return losses

    def validation_losses(self, model, x, y, place, noise):
        """Losses at given timesteps and noise; nothing is drawn, and nothing learns from them.

        Args:
            model: in evaluation mode, called as `model(x_t, t, y)`.
            x, y: as in `training_losses`.
            place: `(N,)` in [0, 1): where in the process, 0 its first timestep.
            noise: `(N, C, H, W)`, standard normal.

        Returns:
            `(N,)`.
        """
        t = (place * self.diffusion.num_timesteps).astype("int64")
        return self.diffusion.training_losses(model, x, t, {"y": y}, noise=noise)["loss"]

    def end_step(self):
        """Lets the timestep sampler learn from the step's losses: all micro-batches drew from the same distribution."""
        if self._seen:
            t, losses = (paddle.concat(parts) for parts in zip(*self._seen, strict=True))
            self._seen = []
            self.timestep_sampler.update_with_losses(t, losses)

    def sample(self, denoiser, noise, *, num_steps=250, method="ddpm", eta=0.0, clip_denoised=False, progress=False):
        """Noise to latents, by the schedule that is trained.

        Args:
            denoiser: `denoiser(x, t) -> (N, C or 2C, H, W)`, guidance included.
            noise: `(N, C, H, W)`, standard normal.
            num_steps: network evaluations.
            method: `ddpm` (ancestral) or `ddim`.
            eta: DDIM's noise, 0 for none.
            clip_denoised: clip the predicted x_start to [-1, 1]; latents are not in that range.
            progress: show a bar.
        """
        if method not in ("ddpm", "ddim"):
            raise ValueError(f"unknown sampling method {method!r}; known: ddpm, ddim")
        self.check_num_steps(num_steps)
        # Evenly spaced: "ddimN" needs an integer stride, which not every N has.
        spaced = create_diffusion(str(num_steps), **self._settings)
        options = {"noise": noise, "clip_denoised": clip_denoised, "progress": progress}
        if method == "ddim":
            return spaced.ddim_sample_loop(denoiser, noise.shape, eta=eta, **options)
        return spaced.p_sample_loop(denoiser, noise.shape, **options)

    def check_num_steps(self, num_steps):
        """Raises `ValueError` for a number of sampling steps that `sample` can't take."""
        if not 1 <= num_steps <= self.diffusion.num_timesteps:
            raise ValueError(f"the number of sampling steps must be 1..{self.diffusion.num_timesteps}, got {num_steps}")

    def state_dict(self):
        """The state of the timestep sampler; empty for the uniform one."""
        return self.timestep_sampler.state_dict()

    def set_state_dict(self, state):
        """Restores what `state_dict` returned."""
        self.timestep_sampler.set_state_dict(state)


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


OBJECTIVES = {"diffusion": DiffusionObjective, "transport": TransportObjective}


def build_objective(config, ranks_per_batch=1):
    """The objective that a resolved config (`training.config.load_config`) names.

    Args:
        ranks_per_batch: the tensor-parallel degree: so many ranks, one after another, have the same batch.
    """
    return OBJECTIVES[config["objective"]["type"]](config, ranks_per_batch)
