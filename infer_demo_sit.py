"""Draw images with a SiT or a Large-SiT.

    python infer_demo_sit.py                                    # the public SiT-XL/2: a golden retriever, by the SDE
    python infer_demo_sit.py --model_path SiT_pipeline --sampler ode --method heun2 --classes 207 "Siberian husky"
    python infer_demo_sit.py --model_path output/checkpoint-5000 --vae assets/digits_vae --classes 3 7

--model_path is a SiTPipeline folder (tools/convert_sit_to_ppdiffusers.py), a training checkpoint folder, whose averages
are sampled, or a file of weights (.pdparams, or an official .pt) with --config_file. Without it: ./SiT_XL_2_256 if that
folder is there, else SiT-XL-2-256x256.pdparams or .pt. One class gives one image, several a grid.

--num_inference_steps counts grid points, as the official num_steps: an ODE method makes one step less, the SDE its last
step besides.
"""

import argparse
import os

from config.schema import load_config, weights_config, weights_features
from runtime.process import run_cli
from sampling.demo import (
    add_flags,
    check_flags,
    check_guidance,
    check_model,
    checkpoint_vae,
    describe_model,
    describe_weights,
    draw,
    find_classes,
    make_generator,
    note_unused,
)
from weights.source import is_training_checkpoint

LOCAL_FOLDER, PUBLIC_WEIGHTS = "./SiT_XL_2_256", ("SiT-XL-2-256x256.pdparams", "SiT-XL-2-256x256.pt")
PUBLIC_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", "SiT_XL_patch2.json")
PUBLIC_VAE = "stabilityai/sd-vae-ft-ema"
# Of the SDE only; these were always the demo's defaults.
SDE_DEFAULTS = {"diffusion_form": "linear", "diffusion_norm": 1.0, "last_step": "Mean", "last_step_size": 0.4}


def find_model(path):
    """--model_path, or what stands in for it."""
    if path is not None:
        return path
    for name in (LOCAL_FOLDER, *PUBLIC_WEIGHTS):
        if os.path.exists(name):
            return name
    paddle_file, official = PUBLIC_WEIGHTS
    raise ValueError(
        f"{paddle_file}: there is no such file here. Download the official {official} (github.com/willisma/SiT) and "
        "put it here as it is, or converted: python tools/convert_official_weights.py --config_file "
        f"config/SiT_XL_patch2.json --weights {official} --output {paddle_file}. Or give --model_path"
    )


def describe(args, path):
    """The `sampling.demo.Model` of a pipeline folder, a training checkpoint or a file of weights."""
    if not os.path.exists(path):
        raise ValueError(f"--model_path {path}: there is no such file or folder")
    if not os.path.isdir(path):
        config, config_file = weights_config(path, args.config_file), args.config_file
        if config is None:
            config, config_file = load_config(PUBLIC_CONFIG), PUBLIC_CONFIG
        elif config_file is None:
            config_file = os.path.join(os.path.dirname(path), "config.json")  # the checkpoint's own
        config = {**config, "features": weights_features(path, config)}
        return describe_weights("file", path, config, config_file, "SiTPipeline", args.id2label)
    if not is_training_checkpoint(path):
        model = describe_model(path, "SiTPipeline", args.id2label)
        for name in ("config_file", "vae", "key"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name} is for a training checkpoint or a file of weights; {path} is a SiTPipeline folder, "
                    "which holds all it needs"
                )
        return model
    if args.config_file is not None:
        raise ValueError(f"--config_file is for a file of weights; {path} is a training checkpoint with its own")
    return describe_model(path, "SiTPipeline", args.id2label)


def load_pipeline(args, model):
    """A SiTPipeline, from a pipeline folder, a training checkpoint or a file of weights."""
    from sampling import SiTPipeline
    from weights.source import read_weights

    if model.kind == "pipeline":
        return SiTPipeline.from_pretrained(model.path)
    state, source = read_weights(model.path, key=args.key)
    vae = checkpoint_vae(args.vae, model.config, PUBLIC_VAE)
    return SiTPipeline.from_weights(model.config, state, vae, source=source)


def check_sampler(args, model, options):
    """Raises `ValueError`, before weights are read, for settings that the sampler does not take."""
    from sampling.sit_pipeline import TransportScheduler

    if model.kind == "pipeline":
        scheduler = TransportScheduler.from_folder(model.path)
    else:
        scheduler = TransportScheduler.from_objective(model.config["objective"])
    scheduler.make_sampler(args.sampler, args.method, {"num_steps": args.num_inference_steps, **options})


def sample(args, model):
    """PIL images and the classes' labels."""
    options = {}
    if args.sampler == "sde":
        options = {name: getattr(args, name) for name in SDE_DEFAULTS}
        options = {name: SDE_DEFAULTS[name] if value is None else value for name, value in options.items()}
        options["last_step"] = None if options["last_step"] == "None" else options["last_step"]
    check_sampler(args, model, options)
    pipe = load_pipeline(args, model)
    pipe.set_progress_bar_config(disable=None)  # on a terminal only
    network = pipe.transformer
    classes = find_classes(args.classes, model.labels, network.num_classes)
    guidance_scale = check_guidance(args.guidance_scale, network.class_dropout_prob > 0, args.model_path)
    if args.dtype != "float32":
        pipe.to(dtype=args.dtype)
    images = pipe(
        classes,
        guidance_scale=guidance_scale,
        guidance_interval=args.guidance_interval,
        guidance_channels={None: "auto", "3": 3, "all": None}[args.guidance_channels],
        sampler=args.sampler,
        method=args.method,
        num_inference_steps=args.num_inference_steps,
        generator=make_generator(args.seed),
        **options,
    ).images
    return images, [model.labels.get(i, str(i)) for i in classes]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="pipeline folder, training checkpoint folder, or file of weights")
    add_flags(parser, "SiT", guidance_channels="3 of 4 channels, all of any other number")
    parser.add_argument(
        "--guidance_interval", nargs=2, type=float, metavar=("LOWEST", "HIGHEST"), help="times, in [0, 1] [all]"
    )
    parser.add_argument("--sampler", choices=("ode", "sde"), default="sde", help="[sde]")
    parser.add_argument(
        "--method", help="ode: euler, midpoint, heun2, heun3, rk4, dopri5 [euler]; sde: Euler, Heun [Euler]"
    )
    sde = parser.add_argument_group("for --sampler sde")
    sde.add_argument(
        "--diffusion_form", help="constant, SBDM, sigma, linear, decreasing or increasing-decreasing [linear]"
    )
    sde.add_argument("--diffusion_norm", type=float, help="[1]")
    sde.add_argument("--last_step", help="Mean, Tweedie, Euler or None [Mean]")
    sde.add_argument("--last_step_size", type=float, help="[0.4]")
    weights = parser.add_argument_group("for a training checkpoint or a file of weights")
    weights.add_argument("--config_file", help="JSON of a file's network [its checkpoint's; config/SiT_XL_patch2.json]")
    weights.add_argument("--vae", help=f"folder or hub name of its VAE [the features' own, else {PUBLIC_VAE}]")
    weights.add_argument("--key", help="which weights of a checkpoint: model, ema or another of its keys [ema]")
    args = parser.parse_args(argv)
    if args.sampler == "ode":
        for name in SDE_DEFAULTS:
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is for --sampler sde")
    check_flags(args, min_steps=2)
    args.model_path = find_model(args.model_path)
    model = describe(args, args.model_path)
    check_model(args, model)
    interval = args.guidance_interval
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            f"--guidance_interval {interval[0]} {interval[1]}: expected two times in [0, 1], the lower first"
        )
    if args.last_step == "None" and args.last_step_size is not None:
        note_unused(["last_step_size"], "with --last_step None")
    draw("SiT", args, lambda: sample(args, model))


if __name__ == "__main__":
    run_cli(main)
