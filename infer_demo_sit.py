"""Draw images with a SiT or a Large-SiT.

    python infer_demo_sit.py                                    # the public SiT-XL/2: a golden retriever, by the SDE
    python infer_demo_sit.py --model_path SiT_pipeline --sampler ode --method heun2 --classes 207 "Siberian husky"
    python infer_demo_sit.py --model_path outputs/trainer/checkpoint-5000 --vae assets/digits_vae --classes 3 7

--model_path is a SiTPipeline folder (tools/convert_sit_to_ppdiffusers.py), a training checkpoint folder, whose averages
are sampled, a run's folder, whose newest checkpoint is taken, or a file of weights (.pdparams, or an official .pt) with
--config_file. Without it: ./SiT_XL_2_256 if that folder is there, else SiT-XL-2-256x256.pdparams or .pt. One class
gives one image, several a grid. infer_demo_lightningdit.py is the same with the defaults of LightningDiT.

--backend inference samples by Paddle Inference, of which --dtype bfloat16 also runs on a CPU that has it. --model_path
may then also be a folder of tools/export_inference.py; any other is exported for this run, which takes a few seconds.
Such a folder is a program: it runs as code of whoever made it.

--num_inference_steps counts grid points, as the official num_steps: an ODE method makes one step less, the SDE its last
step besides.
"""

import os

from config.options import SIT_VAE
from runtime.process import run_cli
from sampling.demo import TransportDemo, draw_transport
from sampling.flags import DEMO

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
    def find(args):
        args.model_path = find_model(args.model_path)

    draw_transport(
        argv,
        TransportDemo(
            __doc__,
            kind="SiT",
            defaults=DEMO,
            like="PaddleMIX's demos",
            guidance_channels="3 of 4, as the official SiT does; all of any other number",
            vae=f"{SIT_VAE}, as in the official SiT",
            config=PUBLIC_CONFIG,
            find=find,
        ),
    )


if __name__ == "__main__":
    run_cli(main)
