"""Flags of the commands that draw images, what is checked of them at once, and the way from them to a `Generator`.

Nothing here imports Paddle before `open_generator` does: what a user gets wrong is said at once.
"""

from dataclasses import dataclass

from config.checks import FLAG_SEED, VAE, Check, no_effect
from config.flags import add_device_flag, check_vae
from config.options import ABOVE_0, BELOW_1, DEFAULT_VAE, FROM_0, GUIDANCE_SCALE, INT_FROM_0, POSITIVE_INT, SIT_VAE
from runtime.process import resolve_device
from sampling.model_path import check_dtype, check_holds_no, check_normalization, describe_model
from sampling.step_counts import SCHEDULERS

DEFAULT_CHANNELS = "all of a DiT; of a SiT 3 of 4, all of any other number; 3 of a LightningDiT"

# Flags of what a pipeline's folder brings along.
WEIGHTS_FLAGS = ("vae", "key", "latents_stats", "latent_multiplier")

# What SiT's samplers are called; those of `transport`, which is not imported for --help.
METHODS = {
    "ode": ("euler", "midpoint", "heun2", "heun3", "rk4", "heun2_euler", "ab2", "dopri5"),
    "sde": ("Euler", "Heun"),
}
DIFFUSION_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
ODE_FLAGS = ("timestep_shift", "zero_init_steps")
LAST_STEPS = ("Mean", "Tweedie", "Euler", "None")


@dataclass(frozen=True)
class TransportDefaults:
    """What a transport is sampled by where flags don't say it."""

    num_steps: int
    guidance_scale: float
    sde: dict  # settings of the SDE
    like: str = "the official SiT"  # whose SDE it is
    sampler: str = "sde"
    guidance_interval: tuple | None = None
    timestep_shift: float = 0.0  # of the ODE


_SDE = {"diffusion_form": "sigma", "diffusion_norm": 1.0, "last_step": "Mean", "last_step_size": 0.04}
OFFICIAL = TransportDefaults(250, 1.5, _SDE)  # of SiT
DEMO = TransportDefaults(
    25, GUIDANCE_SCALE, {**_SDE, "diffusion_form": "linear", "last_step_size": 0.4}, "PaddleMIX's demo"
)
# Of the weights of 800 epochs.
LIGHTNING = TransportDefaults(250, 6.7, _SDE, sampler="ode", guidance_interval=(0.125, 1.0), timestep_shift=0.3)


def add_sampling_flags(parser, *, seed=0, num_steps=25, like="PaddleMIX's demos"):
    """Adds the flags of steps and seed; the arguments are the defaults that --help names, and whose steps they are."""
    parser.add_argument(
        "--num_inference_steps", check=POSITIVE_INT, default=num_steps, help=f"sampling steps [{num_steps}, as {like}]"
    )
    parser.add_argument("--seed", check=FLAG_SEED, default=seed, help="of the noise, 0 to 4294967295")


def add_loading_flags(parser, gpu_dtype="float32"):
    """Adds the flags of the device, the dtype, the backend and the labels."""
    add_device_flag(parser)
    default = "float32" if gpu_dtype == "float32" else f"{gpu_dtype} on a GPU, float32 on a CPU"
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help=f"of the network [{default}]")
    parser.set_defaults(gpu_dtype=gpu_dtype)
    parser.add_argument(
        "--backend",
        choices=("eager", "inference"),
        default="eager",
        help="inference: Paddle Inference, see tools/export_inference.py",
    )
    parser.add_argument("--id2label", metavar="FILE", help='JSON {"id2label": {"0": "name", ...}}: labels of --classes')


def add_diffusion_flags(parser, title=None, ddpm="checkpoints"):
    """Adds the flags for a DiT or a Large-DiT, under a title; `ddpm` says what --scheduler ddpm is for."""
    group = parser if title is None else parser.add_argument_group(title)
    group.add_argument(
        "--scheduler",
        choices=(*SCHEDULERS, "ddpm"),
        help=f"dpm, dpm3: DPM-Solver++ of order 2, 3; ddpm for {ddpm} only [ddim]",
    )


def add_vae_flag(parser, default):
    """Adds --vae, with the default that --help names where a model's features name none."""
    parser.add_argument(
        "--vae", check=VAE, help=f"folder or hub name of its VAE, ema or mse [the features' own, else {default}]"
    )


def add_statistics_flags(parser):
    """Adds the flags that say how the latents of a network were normalised whose file does not."""
    parser.add_argument(
        "--latents_stats",
        metavar="FILE",
        help="latents_stats.pt of the latents that weights of LightningDiT were trained on, or none [the checkpoint's]",
    )
    parser.add_argument("--latent_multiplier", check=ABOVE_0, help="factor of those latents [1, as published]")


def add_transport_flags(parser, defaults, title=None):
    """Adds the flags for the networks of a transport, under a title; defaults: `TransportDefaults`."""
    group = parser if title is None else parser.add_argument_group(title)
    sampler, shift = defaults.sampler, defaults.timestep_shift
    group.add_argument("--sampler", choices=("ode", "sde"), default=sampler, help="the kind of sampler")
    group.add_argument(
        "--method",
        aliases=("--sampling_method",),
        help="; ".join(f"{kind}: {', '.join(names)} [{names[0]}]" for kind, names in METHODS.items()),
    )
    group.add_argument(
        "--timestep_shift",
        check=FROM_0,
        help=f"of --sampler ode: below 1 more of its points are near the noise; 0 for none [{shift:g}]",
    )
    group.add_argument(
        "--zero_init_steps",
        check=INT_FROM_0,
        help="of --sampler ode: its first N steps make no move, as CFG-Zero* has it [0]",
    )
    sde, forms = (
        parser.add_argument_group(f"for --sampler sde; defaults as in {defaults.like}"),
        "one of " + ", ".join(DIFFUSION_FORMS),
    )
    shown = {name: f"[{value:g}]" if isinstance(value, float) else f"[{value}]" for name, value in defaults.sde.items()}
    form = Check((*DIFFUSION_FORMS, "inccreasing-decreasing").__contains__, forms, metavar="FORM")  # an official name
    sde.add_argument("--diffusion_form", check=form, help=f"noise over time, {forms} {shown['diffusion_form']}")
    sde.add_argument("--diffusion_norm", check=FROM_0, help=f"its magnitude {shown['diffusion_norm']}")
    sde.add_argument("--last_step", choices=LAST_STEPS, help=f"the one without noise {shown['last_step']}")
    sde.add_argument("--last_step_size", check=BELOW_1, help=f"its length in time {shown['last_step_size']}")


def add_model_flags(parser, defaults):
    """Adds the flags of a command that samples every kind of model; `sampler_options` reads those of its sampler."""
    add_loading_flags(parser)
    add_diffusion_flags(parser, "for a DiT or a Large-DiT", ddpm="checkpoints and files of weights")
    add_transport_flags(parser, defaults, "for a SiT, a Large-SiT or a LightningDiT")
    weights = parser.add_argument_group("for a training checkpoint or a file of weights")
    weights.add_argument("--config_file", metavar="FILE", help="JSON of a file's network [its checkpoint's]")
    add_vae_flag(weights, f"{DEFAULT_VAE}, of a SiT {SIT_VAE}: each as officially")
    add_statistics_flags(weights)
    weights.add_argument("--key", help="which weights: model, ema or another key of a file [ema]")
    parser.set_defaults(sampler=None)


def check_sampling_flags(args, min_steps=1):
    """Raises `ValueError` for values of `add_sampling_flags` that no model takes."""
    if args.num_inference_steps < min_steps:
        raise ValueError(f"--num_inference_steps {args.num_inference_steps}: expected {min_steps} or more")
    if args.backend == "eager":
        check_dtype(args.device, args.dtype)  # as far as the device is said


def check_transport_flags(args, defaults):
    """Raises `ValueError` for values of `add_transport_flags` that no network of a transport takes."""
    other = {"ode": defaults.sde, "sde": ODE_FLAGS}[args.sampler]
    for name in other:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is for --sampler {'sde' if args.sampler == 'ode' else 'ode'}")
    if args.method is not None and args.method not in METHODS[args.sampler]:
        accepted = ", ".join(METHODS[args.sampler])
        raise ValueError(f"--method {args.method}: unknown for --sampler {args.sampler}; accepted: {accepted}")


def transport_options(args, defaults):
    """Returns the options of `Generator.sample` that the flags of `add_transport_flags` stand for."""
    options = {"sampler": args.sampler, "method": args.method}
    sde, shift = {name: getattr(args, name) for name in defaults.sde}, args.timestep_shift
    if args.sampler == "sde":
        options |= {name: defaults.sde[name] if value is None else value for name, value in sde.items()}
    elif shift := defaults.timestep_shift if shift is None else shift:
        options["timestep_shift"] = shift
    if args.zero_init_steps:
        options["zero_init_steps"] = args.zero_init_steps
    if args.last_step == "None":
        options["last_step"] = None
        note_unused(["last_step_size"] if args.last_step_size is not None else [], "with --last_step None")
    return options


def describe_flags(args, pipeline=None, **options):
    """Returns the `Model` of --model_path, by the flags of its weights; arguments as of `describe_model`."""
    flags = {"id2label": args.id2label, "config": args.config_file, "key": args.key}
    stated = {"latents_stats": args.latents_stats, "latent_multiplier": args.latent_multiplier}
    model = describe_model(args.model_path, pipeline, **flags, **stated, **options)
    if model.config is not None:
        check_normalization(model.config, model.path, *stated.values())
    return model


def sampler_options(args, model, defaults):
    """Returns the options of `Generator.sample` that the flags of a command for every kind of `Model` stand for.

    Raises `ValueError` for a flag of another kind, and for a number of steps that the model does not take.
    """
    is_transport = model.pipeline == "SiTPipeline"
    others = ("sampler", "method", *ODE_FLAGS, *defaults.sde)
    for name in ["scheduler"] if is_transport else others:
        if getattr(args, name) is not None:
            kind = model.type or model.pipeline
            raise ValueError(f"--{name} is for a {'DiT' if is_transport else 'SiT'}; {model.path} is a {kind}")
    if not is_transport:
        model.check_diffusion(args.scheduler, args.num_inference_steps, args.backend)
        return {"method": args.scheduler}
    args.sampler = args.sampler or defaults.sampler
    check_transport_flags(args, defaults)
    check_sampling_flags(args, min_steps=2)
    check_weights_flags(args, model)
    return transport_options(args, defaults)


def check_weights_flags(args, model):
    """Raises `ValueError` for a flag for weights that is given on the folder of a transport's `Model`."""
    if model.holds_all:
        what = "Paddle Inference" if model.kind == "exported" else model.pipeline
        check_holds_no(model.path, what, **{name: getattr(args, name) for name in WEIGHTS_FLAGS})


def note_weights_flags(args, model):
    """Says that the flags for weights have no effect on a model that brings its own; for others checks --vae, --key."""
    if not model.holds_all:
        check_vae(args.vae)
        if args.key is not None:
            from weights.source import locate_weights

            locate_weights(model.path, key=args.key)
    else:
        given = [name for name in WEIGHTS_FLAGS if getattr(args, name, None) is not None]
        note_unused(given, f"on {model.path}, which is no training checkpoint and brings its VAE and weights along")


def note_unused(names, why):
    """Says in one line which flags, if any, have no effect."""
    for sentence in no_effect([f"--{name}" for name in names], why):
        print(f"note: {sentence}", flush=True)


def open_generator(args, model, **options):
    """Loads the `Generator` of a `Model` as the flags say, when its transport's `options` are checked.

    With --guide_path it has its guide, the `Model` `args.guide` of `sampling.guidance_flags`.
    """
    device = resolve_device(args.device)  # imports Paddle, before NumPy and others that take a moment
    from sampling.generator import check_settings, load_generator, load_guide

    dtype = args.dtype or ("float32" if device == "cpu" else args.gpu_dtype)
    check_settings(model, args.num_inference_steps, **options)
    how = {"dtype": dtype, "backend": args.backend}
    generator = load_generator(model, device=device, vae=args.vae, key=args.key, **how)
    if args.guide is None:
        return generator
    try:
        return load_guide(generator, args.guide, key=args.guide_key, **how)
    except ValueError as error:
        hint = "" if args.guide.kind != "file" or args.guide_config else "; --guide_config is for another network's"
        raise ValueError(f"--guide_path {error}{hint}") from None
