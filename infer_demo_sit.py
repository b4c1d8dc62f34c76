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

from config.options import SIT_VAE
from runtime.process import run_cli
from sampling.demo import add_flags, check_flags, draw, note_unused
from sampling.model_path import check_holds_no, describe_model

LOCAL_FOLDER, PUBLIC_WEIGHTS = "./SiT_XL_2_256", ("SiT-XL-2-256x256.pdparams", "SiT-XL-2-256x256.pt")
PUBLIC_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", "SiT_XL_patch2.json")
# Defaults of PaddleMIX's SiT demo, for the SDE only.
SDE_DEFAULTS = {"diffusion_form": "linear", "diffusion_norm": 1.0, "last_step": "Mean", "last_step_size": 0.4}


def find_model(path):
    """Returns --model_path, or what stands in for it."""
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
    weights.add_argument("--vae", help=f"folder or hub name of its VAE [the features' own, else {SIT_VAE}]")
    weights.add_argument("--key", help="which weights of a checkpoint: model, ema or another of its keys [ema]")
    args = parser.parse_args(argv)
    given = {name: value for name in SDE_DEFAULTS if (value := getattr(args, name)) is not None}
    if args.sampler == "ode" and given:
        raise ValueError(f"--{next(iter(given))} is for --sampler sde")
    interval = args.guidance_interval
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            f"--guidance_interval {interval[0]} {interval[1]}: expected two times in [0, 1], the lower first"
        )
    check_flags(args, min_steps=2)

    path = find_model(args.model_path)
    model = describe_model(
        path, "SiTPipeline", id2label=args.id2label, config=args.config_file, default_config=PUBLIC_CONFIG
    )
    if model.kind == "pipeline":
        check_holds_no(path, model.pipeline, vae=args.vae, key=args.key)
    options = {**SDE_DEFAULTS, **given} if args.sampler == "sde" else {}
    if args.last_step == "None":
        options["last_step"] = None
        note_unused(["last_step_size"] if args.last_step_size is not None else [], "with --last_step None")
    draw("SiT", args, model, guidance_interval=interval, sampler=args.sampler, method=args.method, **options)


if __name__ == "__main__":
    run_cli(main)
