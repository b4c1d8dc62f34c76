"""Gaussian diffusion as an objective."""

import paddle

from diffusion import create_diffusion, create_named_schedule_sampler
from objectives.base import Rows, _draw, _label_dropout


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

    def sample(
        self,
        denoiser,
        noise,
        *,
        num_steps=250,
        method="ddpm",
        spacing="even",
        eta=0.0,
        clip_denoised=False,
        progress=False,
        callback=None,
    ):
        """Turns noise into latents, by the schedule that is trained.

        Args:
            denoiser: `denoiser(x, t) -> (N, C or 2C, H, W)`, guidance included.
            noise: `(N, C, H, W)`, standard normal.
            num_steps: network evaluations.
            method: `ddpm` (ancestral) or `ddim`.
            spacing: of the timesteps: `even`, or `leading`, an integer stride from 0 as in the official "ddimN", which
                not every number of steps has.
            eta: DDIM's noise, 0 for none.
            clip_denoised: clip the predicted x_start to [-1, 1]; latents are not in that range.
            progress: show a bar.
            callback: called as `callback(step, num_steps, latents)` after each step, from 1 on.

        Returns:
            latents `(N, C, H, W)`.
        """
        if method not in ("ddpm", "ddim"):
            raise ValueError(f"unknown sampling method {method!r}; known: ddpm, ddim")
        self.check_num_steps(num_steps)
        respacing = {"even": "", "leading": "ddim"}[spacing] + str(num_steps)
        spaced = create_diffusion(respacing, **self._settings)
        options = {"noise": noise, "clip_denoised": clip_denoised, "progress": progress}
        if method == "ddim":
            steps = spaced.ddim_sample_loop_progressive(denoiser, noise.shape, eta=eta, **options)
        else:
            steps = spaced.p_sample_loop_progressive(denoiser, noise.shape, **options)
        for step, out in enumerate(steps, 1):
            latents = out["sample"]
            if callback is not None:
                callback(step, num_steps, latents)
        return latents

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
