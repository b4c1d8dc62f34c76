"""Draw images with a DiT or a Large-DiT.

    python infer_demo_dit.py                                        # the public DiT-XL/2: a golden retriever
    python infer_demo_dit.py --model_path DiT_pipeline --classes 207 "Siberian husky" --num_inference_steps 50
    python infer_demo_dit.py --model_path output/checkpoint-5000 --vae assets/digits_vae --classes 3 7

--model_path is a DiTPipeline folder (tools/convert_dit_to_ppdiffusers.py), its name on the hub, or a training
checkpoint folder, whose averages are sampled. Without it: ./DiT_XL_2_256 if that folder is there, else
the public facebook/DiT-XL-2-256. One class gives one image, several a grid.

--backend inference samples by Paddle Inference, of which --dtype bfloat16 also runs on a CPU that has it. --model_path
may then also be a folder of tools/export_inference.py; any other is exported for this run, which takes a few seconds.
Such a folder is a program: it runs as code of whoever made it.
"""

import argparse
import os
from dataclasses import dataclass

from config.schema import DEFAULT_VAE
from runtime.process import run_cli
from sampling.demo import add_flags, check_flags, check_model, draw
from sampling.model_path import check_no_file, describe_model


@dataclass(frozen=True)
class Demo:
    """What differs between the demos of DiTs of several sizes: their defaults.

    Attributes:
        kind: of the PNG's name. local_folder, public_name: what is sampled without --model_path, the first if it is
            there. seed: of the noise. gpu_dtype: on a GPU. description: of --help.
    """

    description: str
    kind: str = "DiT"
    local_folder: str = "./DiT_XL_2_256"
    public_name: str = "facebook/DiT-XL-2-256"
    seed: int = 0
    gpu_dtype: str = "float32"


DEMO = Demo(description=__doc__)


def main(argv=None, demo=DEMO):
    parser = argparse.ArgumentParser(description=demo.description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_path", help="pipeline folder, its hub name, training checkpoint folder, or (inference) exported folder"
    )
    add_flags(parser, demo.kind, guidance_channels="all", seed=demo.seed, gpu_dtype=demo.gpu_dtype)
    parser.add_argument("--scheduler", choices=("ddim", "dpm", "ddpm"), help="ddpm for checkpoints only [ddim]")
    parser.add_argument(
        "--backend",
        choices=("eager", "inference"),
        default="eager",
        help="inference: Paddle Inference, see tools/export_inference.py [eager]",
    )
    checkpoint = parser.add_argument_group("for a training checkpoint")
    checkpoint.add_argument("--vae", help=f"folder or hub name of its VAE [the features' own, else {DEFAULT_VAE}]")
    checkpoint.add_argument("--key", choices=("model", "ema"), help="which weights [ema]")
    args = parser.parse_args(argv)
    check_flags(args)

    path = args.model_path
    if path is None:
        path = demo.local_folder if os.path.isdir(demo.local_folder) else demo.public_name
    check_no_file(path)
    expected = "DiTPipeline" if args.backend == "eager" else None  # a SiT is told how it can be exported
    model = describe_model(path, expected, id2label=args.id2label)
    model.check_backend(args.backend)
    model.check_diffusion(args.scheduler, args.num_inference_steps, args.backend)
    check_model(args, model)
    draw(demo.kind, args, model, method=args.scheduler)


if __name__ == "__main__":
    run_cli(main)
