"""Flags of guidance, which every command that draws images has, and what they mean for a `Model`.

Paddle is not imported: what a user gets wrong is said at once.
"""

import math

from config.checks import FROM_0_TO_1, holds_timestep
from config.options import GUIDANCE_SCALE, GUIDANCE_SCHEDULES
from sampling.flags import note_unused
from sampling.guidance_settings import GUIDE_SCALE, INTERNAL, check_guidance, check_scale, no_second_layer
from sampling.model_path import describe_guide
from sampling.step_counts import FLOW_SCHEDULER

# --guidance_channels: that of `Generator.sample`.
GUIDANCE_CHANNELS = {None: "default", "3": 3, "all": None}
# Flags that change how a model is guided, with their values for "not so".
_HOW = {
    "guidance_channels": None,
    "guidance_interval": None,
    "guidance_sigma_interval": None,
    "guidance_schedule": "constant",
    "guidance_rescale": 0.0,
    "cfg_zero_star": False,
}
_OF_GUIDE = ("guide_scale", "guide_key", "guide_config")


def add_guidance_flags(parser, *, channels, like="PaddleMIX's demos", scale=GUIDANCE_SCALE, interval=None):
    """Adds the group of guidance; the arguments are the defaults that --help names, and whose scale it is.

    Without a `scale` the command has its own flag of scales.
    """
    group = parser.add_argument_group("guidance")
    if scale is not None:
        group.add_argument(
            "--guidance_scale",
            type=float,
            metavar="X",
            help="1 for none, 0 for images without a class, negative: away from it "
            f"[{scale:g}, as {like}; 1 without a null class, and beside --guide_path]",
        )
    group.add_argument(
        "--guidance_channels",
        choices=("3", "all"),
        help=f"latent channels that are guided: 3 as in the official code, all as DiTPipeline does [{channels}]",
    )
    group.add_argument(
        "--guidance_interval",
        aliases=("--cfg_interval_start",),
        nargs="+",
        type=float,
        metavar=("LOWEST", "HIGHEST"),
        help="times between which guidance is on, those of the model: of a DiT timesteps, from 0 (data) to "
        "diffusion_steps - 1 (noise); of others from 0 (noise) to 1 (data), LOWEST alone: from then on "
        f"[{'all' if interval is None else f'{interval[0]:g}; all of a DiT, and beside --guide_path'}]",
    )
    group.add_argument(
        "--guidance_sigma_interval",
        nargs=2,
        type=float,
        metavar=("LOWEST", "HIGHEST"),
        help="the same in noise levels, noise over signal, from 0 to inf; guidance is on where both are [all]",
    )
    group.add_argument(
        "--guidance_schedule",
        choices=GUIDANCE_SCHEDULES,
        default="constant",
        help="the scales over time: linear and cosine rise from 1 at the noise, with the same mean [constant]",
    )
    group.add_argument(
        "--guidance_rescale",
        check=FROM_0_TO_1,
        default=0.0,
        help="0 to 1: how far outputs get the standard deviation back that they have without guidance [0]",
    )
    group.add_argument("--cfg_zero_star", action="store_true", help="CFG-Zero*: fit the output without a class first")
    group.add_argument(
        "--guide_path",
        metavar="PATH",
        help="autoguidance: a worse model to be guided away from, any that --model_path takes: an earlier checkpoint, "
        "a smaller network",
    )
    group.add_argument(
        "--guide_scale", type=float, metavar="X", help=f"scale of autoguidance, 1 for none [{GUIDE_SCALE:g}]"
    )
    group.add_argument(
        "--internal_guidance_scale",
        type=float,
        default=1.0,
        metavar="X",
        help="internal guidance: away from the second final layer that the regularizer internal_guidance trains, in "
        "the same pass; 1 for none [1]",
    )
    group.add_argument(
        "--internal_guidance_interval",
        nargs=2,
        type=float,
        metavar=("LOWEST", "HIGHEST"),
        help="times between which that is on, as --guidance_interval's [all]",
    )
    group.add_argument("--guide_key", choices=("model", "ema"), help="which weights of --guide_path [ema]")
    group.add_argument(
        "--guide_config",
        metavar="FILE",
        help="JSON of the network of a file of weights that has none [recognised, else the model's]",
    )


def check_guidance_values(args):
    """Raises `ValueError` for values of `add_guidance_flags` that no model takes."""
    for name in _OF_GUIDE if args.guide_path is None else ():
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is for autoguidance; give --guide_path too")
    for name in ("guide_scale", "internal_guidance_scale"):
        scale = getattr(args, name)
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"--{name} {scale}: expected a finite number, 1 for none")
    sigmas = args.guidance_sigma_interval
    if sigmas is not None:
        try:
            check_guidance(sigma_interval=sigmas)
        except ValueError:
            words = " ".join(f"{sigma:g}" for sigma in sigmas)
            expected = "two noise levels, at least 0, the lower first"
            raise ValueError(f"--guidance_sigma_interval {words}: expected {expected}") from None


def check_interval(args, largest=1.0):
    """Raises `ValueError` for an interval of times that are not a model's: timesteps, if they go beyond 1."""
    for name in ("guidance_interval", "internal_guidance_interval"):
        if getattr(args, name) is not None:
            _check_times(f"--{name}", getattr(args, name), largest)


def _check_times(flag, given, largest):
    is_alone = largest == 1 and len(given) == 1
    interval = [*given, 1.0] if is_alone else given
    is_right = len(interval) == 2 and 0 <= interval[0] <= interval[1] <= largest
    if not is_right or (largest != 1 and not holds_timestep(interval)):
        words = " ".join(f"{time:g}" for time in given)
        expected = "two times in [0, 1], the lower first"
        expected += ", or the lower alone" if flag == "--guidance_interval" else ""
        if largest != 1:
            expected = f"two timesteps in [0, {largest:g}], the lower first" if largest < math.inf else "two timesteps"
        raise ValueError(f"{flag} {words}: expected {expected}")


def largest_time(model):
    """Returns the largest time of a `Model`: 1, or the last timestep of a diffusion; infinity if it is not known."""
    if model.pipeline == "SiTPipeline" or model.scheduler.get("_class_name") == FLOW_SCHEDULER:
        return 1.0
    steps = model.config["objective"]["diffusion_steps"] if model.config else None
    steps = model.scheduler.get("num_train_timesteps") if steps is None else steps
    return steps - 1.0 if type(steps) is int else math.inf


def guidance_options(args, model, defaults=None, scales=None):
    """Returns the options of `Generator.sample` that checked flags of guidance stand for, but the scale.

    Flags of no effect are named. Finds what --guide_path is, as `args.guide`, a `Model`.

    Args:
        defaults: `TransportDefaults` of the command; None for a DiT's.
        scales: of the command, where it has no --guidance_scale.

    Raises:
        ValueError: a guidance that the `Model` can't have.
    """
    check_guidance_values(args)
    check_interval(args, largest_time(model))
    if args.guidance_sigma_interval is not None and model.scheduler.get("_class_name") == FLOW_SCHEDULER:
        raise ValueError(
            f"--guidance_sigma_interval: {model.path} does not tell its noise levels; use --guidance_interval"
        )
    for scale in [args.guidance_scale] if scales is None else scales:
        check_scale(scale, model.has_null_class is not False, model.path)
    if args.internal_guidance_scale != 1 and args.backend == "inference":
        raise ValueError("--internal_guidance_scale: programs of Paddle Inference have one output; use --backend eager")
    if args.internal_guidance_scale != 1 and not model.has_second:
        raise ValueError(f"--internal_guidance_scale: {no_second_layer(model.path)}")
    args.guide = None
    if args.guide_path is not None:
        args.guide = describe_guide(
            model, args.guide_path, key=args.guide_key, config=args.guide_config, backend=args.backend
        )
    _note_ineffective(args, model, scales)
    given = args.guidance_interval
    if given is not None:
        interval = (given[0], given[1] if len(given) > 1 else 1.0)
    else:
        is_default = defaults is not None and args.guide is None and model.pipeline == "SiTPipeline"
        interval = defaults.guidance_interval if is_default else None
    options = {"guidance_channels": GUIDANCE_CHANNELS[args.guidance_channels], "guidance_interval": interval}
    if args.guidance_sigma_interval is not None:
        options["guidance_sigma_interval"] = tuple(args.guidance_sigma_interval)
    for name in ("guidance_schedule", "guidance_rescale", "cfg_zero_star"):
        if getattr(args, name) != _HOW[name]:
            options[name] = getattr(args, name)
    if args.internal_guidance_scale != 1:
        options["internal_scale"] = args.internal_guidance_scale
        if args.internal_guidance_interval is not None:
            options["internal_interval"] = tuple(args.internal_guidance_interval)
    if args.guide is not None:
        options["guide_scale"] = GUIDE_SCALE if args.guide_scale is None else args.guide_scale
    return options


def choose_scale(args, has_null_class, path, default=GUIDANCE_SCALE):
    """Returns the guidance scale by checked flags; raises as `check_scale`."""
    return check_scale(args.guidance_scale, has_null_class, path, 1.0 if args.guide_path else default)


def _note_ineffective(args, model, scales):
    by_default = 1.0 if args.guide or model.has_null_class is False else None
    scales = [by_default if args.guidance_scale is None else args.guidance_scale] if scales is None else scales
    if args.internal_guidance_scale == 1 and args.internal_guidance_interval is not None:
        note_unused(["internal_guidance_interval"], "without an --internal_guidance_scale")
    given = [name for name, value in _HOW.items() if getattr(args, name) != value]
    if set(scales) == {1}:
        is_guided = args.guide is not None and args.guide_scale != 1
        names = ("guidance_channels", "cfg_zero_star") if is_guided else given
        note_unused(
            [name for name in given if name in names],
            "without a --guidance_scale" if is_guided else "without guidance",
        )


def guidance_settings(options, has_scale, has_guide):
    """Returns what decides the images of the options of `guidance_options`, but the channels, as JSON has it."""
    internal = {name: options[name] for name in INTERNAL if name in options}
    if not (has_scale or has_guide):
        return {"guidance_interval": None, **internal}
    left_out = {"guidance_scale", "guidance_channels"}
    left_out |= set() if has_scale else {"cfg_zero_star"}
    left_out |= set() if has_guide else {"guide_scale"}
    settings = {name: value for name, value in options.items() if name not in left_out}
    if sigmas := settings.get("guidance_sigma_interval"):
        settings["guidance_sigma_interval"] = [sigma if math.isfinite(sigma) else "inf" for sigma in sigmas]
    return settings
