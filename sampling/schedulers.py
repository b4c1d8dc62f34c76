"""Samplers of a diffusion: the schedulers of ppdiffusers, of a pipeline folder or for a training checkpoint.

A sampler has the interface of `objectives`: `sample(denoiser, noise, *, num_steps, callback, ...)`.
"""

import paddle

from objectives import DiffusionObjective
from sampling.step_counts import (
    FLOW_SCHEDULER,
    SCHEDULERS,
    check_diffusion,
    check_scheduler,
    describe_fit,
    visited_timesteps,
)


def make_scheduler(objective, name="ddim"):
    """Returns the ppdiffusers scheduler for the diffusion that an `objective` section describes.

    "ddim" through the pipeline in N steps is `ddim_sample_loop` of `create_diffusion("ddimN")` where N divides the
    number of diffusion steps. "dpm" is DPM-Solver++ of second order, starting at the last timestep.

    Raises:
        ValueError: unknown name, or an objective that is no diffusion.
    """
    from ppdiffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; known: {', '.join(SCHEDULERS)}")
    check_diffusion(objective)
    steps = objective["diffusion_steps"]
    settings = {
        "num_train_timesteps": steps,
        "beta_start": 1e-4 * 1000 / steps,
        "beta_end": 0.02 * 1000 / steps,
        "beta_schedule": objective["noise_schedule"],  # the same two names
        "prediction_type": "sample" if objective["predict_xstart"] else "epsilon",
        "steps_offset": 0,
    }
    if name == "ddim":
        return DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading", **settings)
    scheduler = DPMSolverMultistepScheduler(**settings, **_dpm_settings(objective["noise_schedule"]))
    # Not its own: for whoever makes a DDIMScheduler from this config, which clips latents by default.
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def pipeline_scheduler(scheduler, name):
    """Returns the scheduler "ddim" or "dpm" for the diffusion that a pipeline's own scheduler describes.

    A DDIM scheduler's "leading" spacing would let DPM-Solver++ start in the middle of the diffusion: it gets that of
    `make_scheduler`.
    """
    from ppdiffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if name == "ddim":
        return DDIMScheduler.from_config(scheduler.config)
    settings = _dpm_settings(scheduler.config.get("beta_schedule"))
    return DPMSolverMultistepScheduler.from_config(scheduler.config, **settings)


def _dpm_settings(noise_schedule):
    if noise_schedule == "squaredcos_cap_v2":  # its last steps are noise alone: the solver needs them cut
        return {"timestep_spacing": "trailing", "lambda_min_clipped": -5.1}
    return {"timestep_spacing": "trailing"}


@paddle.no_grad()
def run_scheduler(scheduler, denoiser, latents, num_steps, *, callback=None):
    """Returns latents `(N, C, H, W)` by a ppdiffusers scheduler and a `denoiser(x, t)`; a learned variance is cut off.

    Args:
        callback: called as `callback(step, num_steps, latents)` after each step, from 1 on.
    """
    scheduler.set_timesteps(num_steps)
    for step, t in enumerate(scheduler.timesteps, 1):
        latents = scheduler.scale_model_input(latents, t)
        output = denoiser(latents, t.reshape([1]).expand([latents.shape[0]]))
        latents = scheduler.step(output[:, : latents.shape[1]], t, latents).prev_sample
        if callback is not None:
            callback(step, num_steps, latents)
    return latents


class PipelineSampler:
    """Samples by the diffusion that a pipeline folder's scheduler describes, or by that scheduler, if it is a SiT's.

    Args:
        scheduler: of ppdiffusers.
        timestep_fit: `{"ddim": numbers of steps, "dpm": numbers of steps}` in which the network's timestep embedding
            is exact; None if it is at every timestep.
    """

    def __init__(self, scheduler, timestep_fit=None):
        self.scheduler, self.timestep_fit = scheduler, timestep_fit

    def sample(self, denoiser, noise, *, num_steps, method=None, callback=None):
        """Turns noise into latents; as `run_scheduler`.

        Args:
            method: "ddim" (default) or "dpm"; None for a SiT.

        Raises:
            ValueError: one line: a method, or a number of steps, that the scheduler does not take.
        """
        scheduler = self.scheduler
        if type(scheduler).__name__ != FLOW_SCHEDULER:
            scheduler = pipeline_scheduler(scheduler, method or "ddim")
        settings = {**scheduler.config, "_class_name": type(scheduler).__name__}
        check_scheduler(settings, method, num_steps)
        return run_scheduler(scheduler, denoiser, noise, num_steps, callback=callback)

    def note(self, num_steps, method=None):
        """Returns a sentence if the timestep embedding is not exact in that many steps, else None."""
        if self.timestep_fit is None:
            return None
        schedulers = {name: pipeline_scheduler(self.scheduler, name) for name in self.timestep_fit}
        exact = {
            t
            for name, counts in self.timestep_fit.items()
            for count in counts
            for t in visited_timesteps(schedulers[name], count)
        }
        method = method or "ddim"
        if exact.issuperset(visited_timesteps(schedulers[method], num_steps)):
            return None
        steps = f"in {num_steps} steps ({method})"
        return f"{describe_fit(self.timestep_fit)}; {steps} its images differ from the checkpoint's"


class CheckpointSampler(DiffusionObjective):
    """Samples by the diffusion of a training checkpoint, as `PipelineSampler` does for the folder exported from it.

    Args:
        config: resolved.
    """

    def __init__(self, config):
        self._section = config["objective"]
        settings = {key: value for key, value in self._section.items() if key not in ("type", "auxiliary")}
        super().__init__(settings, class_dropout_prob=0, learn_sigma=config["model"]["learn_sigma"])

    def sample(self, denoiser, noise, *, num_steps, method=None, **options):
        """Turns noise into latents; as `DiffusionObjective.sample`, of which DDIM is the default, and by "dpm" too."""
        if method == "dpm":
            return run_scheduler(make_scheduler(self._section, "dpm"), denoiser, noise, num_steps, **options)
        spacing = {"ddpm": "even"}.get(method, "leading")
        options.update(method=method or "ddim", spacing=spacing)
        return super().sample(denoiser, noise, num_steps=num_steps, **options)
