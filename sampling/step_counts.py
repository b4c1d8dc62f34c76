"""What schedulers take: objectives, and which numbers of steps; and in which of these an export is exact.

Paddle is not imported, so that a number can be refused before anything is loaded.
"""

# Of an exported transformer's config.json, if its timestep embedding is not exact at every timestep. ppdiffusers reads
# no key that begins with an underscore.
FIT_KEY = "_timestep_fit"
# What samples a diffusion, each with the one whose timesteps it visits: "dpm" is DPM-Solver++ of order 2, "dpm3" of 3.
VISITS = {"ddim": "ddim", "dpm": "dpm", "dpm3": "dpm", "unipc": "dpm"}
SCHEDULERS = tuple(VISITS)
EXPORTED = ("ddim", "dpm", "dpm3")  # of these there is a scheduler of ppdiffusers that works
MIN_COVER = 0.94  # of the diffusion, by steps of one whole length
FLOW_SCHEDULER = "EDMEulerScheduler"  # of a SiT's DiTPipeline folder, see `sampling.pipelines.export_sit`


def check_objective(objective, expected):
    """Raises `ValueError` for an `objective` section that is not of the expected type, "diffusion" or "transport"."""
    if objective["type"] != expected:
        what, hint = "none of a SiT's", ""
        if expected == "diffusion":
            what, hint = (
                f"not sampled by {' or '.join(EXPORTED[:2])}",
                ". For a SiT or LightningDiT: tools/convert_sit_to_ppdiffusers.py",
            )
        raise ValueError(f"the objective {objective['type']!r} is {what}; expected {expected!r}{hint}")


def check_num_steps(num_steps, total, spacing=None):
    """Raises `ValueError`, with the nearest numbers that do, for a number of steps that can't sample the diffusion.

    Args:
        num_steps: network evaluations. total: timesteps of the diffusion.
        spacing: "leading" for steps of the whole length `total // num_steps` that start from 0, DDIM's in ppdiffusers.
            Where that is rounded down far, they would begin in the middle of the diffusion. "stride" for what
            `create_diffusion("ddimN")` takes; None for any steps.
    """

    def takes(n):
        if spacing == "leading":
            return n * (total // n) >= MIN_COVER * total
        stride = -(-total // n)
        return spacing is None or (stride < max(2, total) and len(range(0, total, stride)) == n)

    if not 1 <= num_steps <= total:
        raise ValueError(f"--num_inference_steps {num_steps}: expected 1 to {total}, the timesteps of the diffusion")
    if not takes(num_steps):
        below = next((n for n in range(num_steps, 0, -1) if takes(n)), None)
        above = next(n for n in range(num_steps, total + 1) if takes(n))
        reason = f"no integer stride takes exactly {num_steps} of {total} timesteps, as DDIM needs it"
        if spacing == "leading":
            start = (num_steps - 1) * (total // num_steps)
            reason = f"DDIM would start at timestep {start} of {total}, in the middle of the diffusion"
        near = above if below is None else f"{below} or {above}"
        raise ValueError(f"--num_inference_steps {num_steps}: {reason}; use {near}")


def own_scheduler(settings):
    """Returns which of `EXPORTED` a pipeline's settings are, None for another class; as of `check_scheduler`."""
    if settings.get("_class_name") == "DPMSolverMultistepScheduler":
        return "dpm3" if settings.get("solver_order") == 3 else "dpm"
    return "ddim" if settings.get("_class_name") == "DDIMScheduler" else None


def check_scheduler(settings, method, num_steps):
    """Raises `ValueError` for a method (of `SCHEDULERS` or None) or a number of steps that a pipeline lacks.

    Args:
        settings: of its scheduler_config.json, with the scheduler's class in `_class_name`; {} for unknown.
    """
    kind = settings.get("_class_name")
    if kind == FLOW_SCHEDULER:
        if method is not None:
            raise ValueError(f"--scheduler {method}: the model is a SiT, which has its own scheduler")
        return
    total = settings.get("num_train_timesteps", 1000)
    if kind is not None and type(total) is int:
        spacing = settings.get("timestep_spacing", "leading" if kind == "DDIMScheduler" else None)
        check_num_steps(num_steps, total, spacing if method in (None, "ddim") and spacing == "leading" else None)


def is_timestep_fit(value):
    """Returns whether a value of a JSON file is `{"ddim": numbers of steps, "dpm": numbers of steps}`, or None."""
    return value is None or (
        isinstance(value, dict)
        and set(value) == {"ddim", "dpm"}
        and all(isinstance(counts, list) and len(counts) <= 100 for counts in value.values())
        and all(type(count) is int and 0 < count <= 1000 for counts in value.values() for count in counts)
    )


def describe_fit(fit):
    """Returns a sentence on the numbers of steps, `{"ddim": [...], "dpm": [...]}`, in which an export is exact."""
    counts = "; ".join(f"{', '.join(map(str, counts)) or 'none'} ({name})" for name, counts in fit.items())
    return f"the timestep embedding of this pipeline is exact in these numbers of steps: {counts}"
