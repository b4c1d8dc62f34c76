"""Samplers of a diffusion: the schedulers of ppdiffusers, of a pipeline folder or for a training checkpoint.

A sampler has the interface of `objectives`: `sample(denoiser, noise, *, num_steps, callback, ...)`.
"""

import paddle

from diffusion import with_host_value
from objectives import DiffusionObjective
from sampling.step_counts import (
    EXPORTED,
    FLOW_SCHEDULER,
    SCHEDULERS,
    check_num_steps,
    check_objective,
    check_scheduler,
    describe_fit,
)

DDIM_SETTINGS = {"timestep_spacing": "leading", "set_alpha_to_one": True}  # of the official "ddimN"


def make_scheduler(objective, name="ddim"):
    """Returns the ppdiffusers scheduler for an `objective` section of type diffusion; `ValueError` for another name.

    "ddim" through the pipeline in N steps is `ddim_sample_loop` of `create_diffusion("ddimN")` where N divides the
    number of diffusion steps. "dpm" and "dpm3" are DPM-Solver++ of order 2 and 3, starting at the last timestep.
    """
    from ppdiffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if name not in EXPORTED:
        raise ValueError(f"unknown scheduler {name!r}; known: {', '.join(EXPORTED)}")
    check_objective(objective, "diffusion")
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
        return DDIMScheduler(clip_sample=False, **settings, **DDIM_SETTINGS)
    scheduler = DPMSolverMultistepScheduler(**settings, **_solver_settings(name, objective["noise_schedule"]))
    # Not its own: for whoever makes a DDIMScheduler from this config, which clips latents by default.
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def pipeline_scheduler(scheduler, name):
    """Returns the scheduler of a name of `SCHEDULERS` for the diffusion that a pipeline's own scheduler describes.

    Another class's spacing of the timesteps does not suit it: DDIM's would let DPM-Solver++ start in the middle of the
    diffusion, and DPM-Solver++'s would let DDIM start where squaredcos_cap_v2 leaves no signal. It gets that of
    `make_scheduler`.
    """
    from ppdiffusers import DDIMScheduler

    from sampling.multistep import SOLVERS

    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; known: {', '.join(SCHEDULERS)}")
    if name == "ddim":
        own = isinstance(scheduler, DDIMScheduler)
        return DDIMScheduler.from_config(scheduler.config, **({} if own else DDIM_SETTINGS))
    settings = _solver_settings(name, scheduler.config.get("beta_schedule"))
    if name != "dpm":  # which may be another algorithm in a folder of its own
        settings |= {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
    return SOLVERS[name].from_config(scheduler.config, **settings)


def _solver_settings(name, noise_schedule):
    # The last steps of squaredcos_cap_v2 are noise alone: the solver needs them cut.
    cut = {"lambda_min_clipped": -5.1} if noise_schedule == "squaredcos_cap_v2" else {}
    # The last step is as long, in the logarithm of the signal-to-noise ratio, as several before it, over which order 3
    # extrapolates far; ppdiffusers by itself takes order 1 there in fewer than 15 steps only.
    order = {"solver_order": 3 if name == "dpm3" else 2, "euler_at_final": name == "dpm3"}
    return {"timestep_spacing": "trailing", **order, **cut}


def visited_timesteps(scheduler, num_steps):
    """Lists the timesteps that a ppdiffusers scheduler visits."""
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps.numpy().tolist()


@paddle.no_grad()
def run_scheduler(scheduler, denoiser, latents, num_steps, *, callback=None, draw_noise=None):
    """Returns latents `(N, C, H, W)` by a ppdiffusers scheduler and a `denoiser(x, t)`; a learned variance is cut off.

    After each step `callback(step, num_steps, latents)` is called, from 1 on. `draw_noise` is there for samplers whose
    steps are random; a scheduler that draws noise of its own is then a `ValueError`.
    """
    kind = str(scheduler.config.get("algorithm_type"))
    if draw_noise is not None and kind.startswith("sde"):
        raise ValueError(f"the pipeline's scheduler, {kind}, draws noise of its own: images would depend on the batch")
    known = visited_timesteps(scheduler, num_steps)
    num_steps = len(known)  # fewer, if nearly all are asked for and the first ones are cut
    for step, t in enumerate(scheduler.timesteps, 1):
        latents = scheduler.scale_model_input(latents, t)
        times = t.reshape([1]).expand([latents.shape[0]])
        output = denoiser(latents, with_host_value(times, known[step - 1]))
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

    def sample(self, denoiser, noise, *, num_steps, method=None, **options):
        """Turns noise into latents, by a name of `SCHEDULERS` or "ddim", None for a SiT; raises as `check_scheduler`.

        Options are those of `run_scheduler`.
        """
        scheduler = self.scheduler
        if type(scheduler).__name__ != FLOW_SCHEDULER:
            scheduler = pipeline_scheduler(scheduler, method or "ddim")
        settings = {**scheduler.config, "_class_name": type(scheduler).__name__}
        check_scheduler(settings, method, num_steps)
        return run_scheduler(scheduler, denoiser, noise, num_steps, **options)

    def note(self, num_steps, method=None):
        """Returns a sentence if the timestep embedding is not exact in that many steps, else None."""
        if self.timestep_fit is None:
            return None

        def visited(name, count):
            return visited_timesteps(pipeline_scheduler(self.scheduler, name), count)

        exact = {t for name, counts in self.timestep_fit.items() for count in counts for t in visited(name, count)}
        method = method or "ddim"
        if exact.issuperset(visited(method, num_steps)):
            return None
        steps = f"in {num_steps} steps ({method})"
        return f"{describe_fit(self.timestep_fit)}; {steps} its images differ from the checkpoint's"


class CheckpointSampler(DiffusionObjective):
    """Samples by the diffusion of a checkpoint's resolved config, as `PipelineSampler` does for the exported folder."""

    def __init__(self, config):
        self._section = config["objective"]
        settings = {key: value for key, value in self._section.items() if key not in ("type", "regularizers")}
        super().__init__(settings, class_dropout_prob=0, learn_sigma=config["model"]["learn_sigma"])

    def sample(self, denoiser, noise, *, num_steps, method=None, **options):
        """Turns noise into latents; as `DiffusionObjective.sample`, DDIM by default, and by those of `SCHEDULERS`."""
        if method in SCHEDULERS and method != "ddim":
            scheduler = pipeline_scheduler(make_scheduler(self._section, "dpm"), method)
            return run_scheduler(scheduler, denoiser, noise, num_steps, **options)
        options.update(method=method or "ddim", spacing="even" if method == "ddpm" else "leading")
        return super().sample(denoiser, noise, num_steps=num_steps, **options)

    def note(self, num_steps, method=None):
        """Returns a sentence if the first steps of "ddpm" or "ddim" would magnify the network's errors, else None.

        At the last timesteps of squaredcos_cap_v2 an image has next to no weight beside the noise, so that a small
        error in the noise is a large one in the image that is predicted from it.
        """
        section, total = self._section, self._section["diffusion_steps"]
        if section["noise_schedule"] != "squaredcos_cap_v2" or section["predict_xstart"]:
            return None
        if method in (None, "ddim") and (num_steps - 1) * -(-total // num_steps) == total - 1:
            return (
                f"ddim: {num_steps} steps begin at the last timestep of squaredcos_cap_v2, the model's noise schedule, "
                "which magnifies the network's errors; images are burnt; take another number of steps"
            )
        if method != "ddpm":
            return None
        return (
            "ddpm: the first steps of squaredcos_cap_v2, the model's noise schedule, magnify the network's errors; "
            f"images are burnt in fewer than all {total} steps; take ddim or dpm"
        )


def sampler_in_training(objective, config, num_steps):
    """Returns what samples a network that is trained: the same as samples its checkpoints, DDIM for a diffusion.

    Args:
        objective: the run's. config: the run's, resolved.

    Raises:
        ValueError: a number of steps that it does not take.
    """
    if config["objective"]["type"] != "diffusion":
        objective.check_num_steps(num_steps)
        return objective
    check_num_steps(num_steps, config["objective"]["diffusion_steps"], "stride")
    return CheckpointSampler(config)
