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

from tools.image_demo import (
    add_flags,
    check_model_type,
    check_pipeline,
    checkpoint_labels,
    checkpoint_vae,
    draw,
    find_classes,
    make_generator,
    read_labels,
)
from training.runtime import run_cli

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


def load_pipeline(args, path):
    """A SiTPipeline and its labels `{id: label}`, from a pipeline folder, a training checkpoint or a file."""
    from sampling import SiTPipeline
    from sampling.checkpoint import is_training_checkpoint, read_weights
    from training.config import load_config, weights_config, weights_features

    if not os.path.exists(path):
        raise ValueError(f"--model_path {path}: there is no such file or folder")
    if os.path.isdir(path) and not is_training_checkpoint(path):
        check_pipeline(path, "SiTPipeline")
        for name in ("config_file", "vae", "key"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name} is for a training checkpoint or a file of weights; {path} is a SiTPipeline folder, "
                    "which holds all it needs"
                )
        pipe = SiTPipeline.from_pretrained(path)
        labels = pipe.id2label if args.id2label is None else read_labels(args.id2label)
        return pipe, {int(key): label for key, label in labels.items()}
    if os.path.isdir(path):
        if args.config_file is not None:
            raise ValueError(f"--config_file is for a file of weights; {path} is a training checkpoint with its own")
        config_file = os.path.join(path, "config.json")
        config = load_config(config_file)
    else:
        config_file = args.config_file or PUBLIC_CONFIG
        config = weights_config(path, args.config_file) or load_config(config_file)
    check_model_type(config["model"]["type"], "infer_demo_sit.py", f"{config_file}: describes")
    config["features"] = weights_features(path, config)
    labels = checkpoint_labels(args.id2label, config)
    state, source = read_weights(path, key=args.key)
    vae = checkpoint_vae(args.vae, config, PUBLIC_VAE)
    return SiTPipeline.from_weights(config, state, vae, source=source), labels


def sample(args):
    """PIL images and the classes' labels."""
    pipe, labels = load_pipeline(args, find_model(args.model_path))
    pipe.set_progress_bar_config(disable=None)  # on a terminal only
    network = pipe.transformer
    classes = find_classes(args.classes, labels, network.num_classes)
    guidance_scale = args.guidance_scale
    if guidance_scale is None:
        guidance_scale = 4.0 if network.class_dropout_prob > 0 else 1.0
    if args.dtype != "float32":
        pipe.to(dtype=args.dtype)
    options = {}
    if args.sampler == "sde":
        options = {name: getattr(args, name) for name in SDE_DEFAULTS}
        options = {name: SDE_DEFAULTS[name] if value is None else value for name, value in options.items()}
        options["last_step"] = None if options["last_step"] == "None" else options["last_step"]
    images = pipe(
        classes,
        guidance_scale=guidance_scale,
        guidance_interval=args.guidance_interval,
        guidance_channels=None if args.guidance_channels == "all" else 3,
        sampler=args.sampler,
        method=args.method,
        num_inference_steps=args.num_inference_steps,
        generator=make_generator(args.seed),
        **options,
    ).images
    return images, [labels.get(i, str(i)) for i in classes]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="pipeline folder, training checkpoint folder, or file of weights")
    add_flags(parser, "SiT", guidance_channels="3")
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
    draw("SiT", args, sample, least_steps=2)


if __name__ == "__main__":
    run_cli(main)
