"""Gaussian diffusion as an objective."""

import paddle

from diffusion import create_diffusion, create_named_schedule_sampler
from objectives.base import Objective, draw_rows
from transport.utils import at_least_float32


class DiffusionObjective(Objective):
    """Gaussian diffusion (Ho et al. 2020; Nichol and Dhariwal 2021) as DiT uses it.

    Args:
        settings: of a resolved config's `objective`: arguments of `create_diffusion`, and `timestep_sampler`.
        learn_sigma: the network's: it learns the variance.
        ranks_per_batch: ranks that follow one another and have the same batch (tensor parallelism).
    """

    def __init__(self, settings, *, class_dropout_prob, learn_sigma, regularizers=(), ranks_per_batch=1):
        super().__init__(class_dropout_prob, regularizers)
        self._settings = {**settings, "learn_sigma": learn_sigma}
        name = self._settings.pop("timestep_sampler")
        self.diffusion = create_diffusion("", **self._settings)
        # Runs with other weights, or none, can be compared by their held-out loss.
        is_weighted = self._settings.get("min_snr_gamma") is not None
        unweighted = {**self._settings, "min_snr_gamma": None}
        self._unweighted = create_diffusion("", **unweighted) if is_weighted else self.diffusion
        self.timestep_sampler = create_named_schedule_sampler(name, self.diffusion, ranks_per_batch=ranks_per_batch)
        self._learns = bool(self.timestep_sampler.state_dict())
        self._seen = []

    def draw_noise(self, x, rows):
        """Draws `t` and `weights` `(N,)`, then `noise` as x."""
        t, weights = (drawn[rows.start : rows.stop] for drawn in self.timestep_sampler.sample(rows.total))
        noise = draw_rows(lambda total: paddle.randn([total, *x.shape[1:]], dtype=x.dtype), rows)
        return {"t": t, "weights": weights, "noise": noise}

    def losses(self, model, x, drawn, model_kwargs):
        """Returns `loss` and its parts (`mse`, `vb`) where there are any, `(N,)` each."""
        losses = self.diffusion.training_losses(model, x, drawn["t"], model_kwargs, noise=drawn["noise"])
        if self._learns:
            self._seen.append((drawn["t"], losses["loss"].detach()))
            # Importance weights keep the mean loss what it is under uniform timesteps.
            losses["loss"] = losses["loss"].astype("float32") * drawn["weights"]
        return losses

    def compare(self, output, x, drawn):
        """Returns `(prediction, target)` as `Objective` says: of the noise or the clean latents, without a variance."""
        target = x if self._settings["predict_xstart"] else drawn["noise"]
        return at_least_float32(output[:, : x.shape[1]]), at_least_float32(target)

    def validation_losses(self, model, batch, place, noise):
        """Returns the losses `(N,)` at given timesteps and noise; nothing is drawn, and nothing learns from them.

        No `min_snr_gamma` weights them.

        Args:
            model: in evaluation mode, called as `model(x_t, t, y=...)`.
            batch: a `Batch`.
            place: `(N,)` in [0, 1): where in the process, 0 its first timestep.
            noise: `(N, C, H, W)`, standard normal.
        """
        t = (place * self.diffusion.num_timesteps).astype("int64")
        return self._unweighted.training_losses(model, batch.x, t, {"y": batch.y}, noise=noise)["loss"]

    def end_step(self):
        """Lets the timestep sampler learn from the step's losses: all micro-batches drew from the same distribution."""
        if self._seen:
            t, losses = (paddle.concat(parts) for parts in zip(*self._seen, strict=True))
            self._seen = []
            self.timestep_sampler.update_with_losses(t, losses)

    def sample(
        self, denoiser, noise, *, num_steps=250, method="ddpm", spacing="even", eta=0.0, callback=None, **options
    ):
        """Turns noise into latents `(N, C, H, W)`, by the schedule that is trained.

        Args:
            denoiser: `denoiser(x, t) -> (N, C or 2C, H, W)`, guidance included.
            noise: `(N, C, H, W)`, standard normal.
            num_steps: network evaluations.
            method: `ddpm` (ancestral) or `ddim`.
            spacing: of the timesteps: `even`, or `leading`, an integer stride from 0 as in the official "ddimN", which
                not every number of steps has.
            eta: DDIM's noise, 0 for none.
            callback: called as `callback(step, num_steps, latents)` after each step, from 1 on.
            options: `progress`, show a bar; `clip_denoised`, clip the predicted x_start to [-1, 1]: latents exceed it;
                `draw_noise`, called as `draw_noise(x)` for the noise of a step that has some, standard normal as x.
        """
        if method not in ("ddpm", "ddim"):
            raise ValueError(f"unknown sampling method {method!r}; known: ddpm, ddim")
        self.check_num_steps(num_steps)
        respacing = {"even": "", "leading": "ddim"}[spacing] + str(num_steps)
        spaced = create_diffusion(respacing, **self._settings)
        options = {"noise": noise, "clip_denoised": False, **options}
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
        """Returns the state of the timestep sampler; empty for the uniform one."""
        return self.timestep_sampler.state_dict()

    def set_state_dict(self, state):
        """Restores what `state_dict` returned."""
        self.timestep_sampler.set_state_dict(state)
