"""Draw images with a SiT or a Large-SiT.

    python infer_demo_sit.py                                    # the public SiT-XL/2: a golden retriever, by the SDE
    python infer_demo_sit.py --model_path SiT_pipeline --sampler ode --method heun2 --classes 207 "Siberian husky"
    python infer_demo_sit.py --model_path outputs/trainer/checkpoint-5000 --vae assets/digits_vae --classes 3 7

--model_path is a SiTPipeline folder (tools/convert_sit_to_ppdiffusers.py), a training checkpoint folder, whose averages
are sampled, a run's folder, whose newest checkpoint is taken, or a file of weights (.pdparams, or an official .pt) with
--config_file. Without it: ./SiT_XL_2_256 if that folder is there, else SiT-XL-2-256x256.pdparams or .pt. One class
gives one image, several a grid.

--num_inference_steps counts grid points, as the official num_steps: an ODE method makes one step less, the SDE its last
step besides.
"""

import os

from config.flags import CommandParser
from config.options import SIT_VAE
from runtime.process import run_cli
from sampling.demo import add_flags, check_flags, draw
from sampling.flags import DEMO_SDE, add_transport_flags, add_vae_flag, check_transport_flags, transport_options
from sampling.model_path import check_holds_no, describe_model

LOCAL_FOLDER, PUBLIC_WEIGHTS = "./SiT_XL_2_256", ("SiT-XL-2-256x256.pdparams", "SiT-XL-2-256x256.pt")
PUBLIC_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", "SiT_XL_patch2.json")


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
        f"config/SiT_XL_patch2.json --model_path {official} --output {paddle_file}. Or give --model_path"
    )


def main(argv=None):
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--model_path", metavar="PATH", help="pipeline folder, training checkpoint, run folder, or file of weights"
    )
    add_flags(parser, "SiT", guidance_channels="3 of 4, as the official SiT does; all of any other number")
    add_transport_flags(parser, DEMO_SDE)
    weights = parser.add_argument_group("for a training checkpoint or a file of weights")
    weights.add_argument(
        "--config_file", metavar="FILE", help="JSON of a file's network [its checkpoint's; config/SiT_XL_patch2.json]"
    )
    add_vae_flag(weights, f"{SIT_VAE}, as in the official SiT")
    weights.add_argument("--key", help="which weights of a checkpoint: model, ema or another of its keys [ema]")
    args = parser.parse_args(argv)
    check_transport_flags(args, DEMO_SDE)
    check_flags(args, min_steps=2)

    path = find_model(args.model_path)
    model = describe_model(
        path, "SiTPipeline", id2label=args.id2label, config=args.config_file, default_config=PUBLIC_CONFIG
    )
    if model.kind == "pipeline":
        check_holds_no(path, model.pipeline, vae=args.vae, key=args.key)
    draw("SiT", args, model, **transport_options(args, DEMO_SDE))


if __name__ == "__main__":
    run_cli(main)
