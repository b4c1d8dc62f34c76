"""Draw images with a LightningDiT.

    python infer_demo_lightningdit.py                           # the public LightningDiT-XL/1: a golden retriever
    python infer_demo_lightningdit.py --model_path LightningDiT_pipeline --classes 207 "Siberian husky"
    python infer_demo_lightningdit.py --model_path outputs/trainer/checkpoint-5000 --vae vavae --classes 3 7

--model_path is a SiTPipeline folder (tools/convert_sit_to_ppdiffusers.py), a training checkpoint folder, whose averages
are sampled, a run's folder, whose newest checkpoint is taken, or a file of weights (.pdparams, or an official .pt),
whose network is recognised by the shapes.
Without it: ./LightningDiT_XL_1_256 if that folder is there, else lightningdit-xl-imagenet256-800ep.pdparams or .pt,
with ./vavae (tools/convert_ldm_vae.py) and latents_stats.pt. One class gives one image, several a grid.

Defaults are the official settings of the weights of 800 epochs (FID 1.35): 250 points of the ODE by Euler, shifted by
0.3, guidance 6.7 of 3 channels from t = 0.125 on. Those of 64 epochs (FID 2.11): --guidance_scale 10
--guidance_interval 0.1. Latents are normalised by channel: a checkpoint or a pipeline folder knows how, a file of
weights does not, and needs the --latents_stats of the set that it was trained on.

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
from sampling.flags import LIGHTNING

LOCAL_FOLDER, WEIGHTS = "./LightningDiT_XL_1_256", "lightningdit-xl-imagenet256-800ep"
PUBLIC_WEIGHTS = (f"{WEIGHTS}.pdparams", f"{WEIGHTS}.pt")
PUBLIC_VAE, PUBLIC_STATISTICS = "./vavae", "latents_stats.pt"
_HUB, _VAE = "huggingface.co/hustvl", "vavae-imagenet256-f16d32-dinov2"
# Where that comes from which is not there.
SOURCES = {
    PUBLIC_WEIGHTS[1]: f"Download it from {_HUB}/{WEIGHTS} and put it here as it is, or converted: python "
    f"tools/convert_official_weights.py --model_path {PUBLIC_WEIGHTS[1]} --output {PUBLIC_WEIGHTS[0]}. "
    "Or give --model_path",
    PUBLIC_VAE: f"Download {_VAE}.pt from {_HUB}/{_VAE} and convert it: python tools/convert_ldm_vae.py --model_path "
    f"{_VAE}.pt --output {PUBLIC_VAE}. Or give --vae",
    PUBLIC_STATISTICS: f"Download it from {_HUB}/{_VAE}. Or give --latents_stats",
}


def find_model(args):
    """Gives --model_path what stands in for it, and public weights their autoencoder and statistics."""
    if args.model_path is None and os.path.isdir(LOCAL_FOLDER):
        args.model_path = LOCAL_FOLDER
    if args.model_path is not None:
        return
    args.model_path = next(filter(os.path.exists, PUBLIC_WEIGHTS), PUBLIC_WEIGHTS[1])
    args.vae, args.latents_stats = args.vae or PUBLIC_VAE, args.latents_stats or PUBLIC_STATISTICS
    for path, source in SOURCES.items():
        if path in (args.model_path, args.vae, args.latents_stats) and not os.path.exists(path):
            raise ValueError(f"{path}: there is nothing of that name here. {source}")


def main(argv=None):
    draw_transport(
        argv,
        TransportDemo(
            __doc__,
            kind="LightningDiT",
            defaults=LIGHTNING,
            like="the official LightningDiT of 800 epochs",
            guidance_channels="3, as the official LightningDiT does",
            vae=f"{SIT_VAE} for 4 channels, {PUBLIC_VAE} for the public weights",
            config=None,
            find=find_model,
        ),
    )


if __name__ == "__main__":
    run_cli(main)
