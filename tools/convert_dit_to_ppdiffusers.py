"""Export a DiT as a folder for `ppdiffusers.DiTPipeline`.

    python tools/convert_dit_to_ppdiffusers.py --model_weights output/checkpoint-5000 --checkpoint_path DiT_pipeline

--model_weights is a training checkpoint folder (its averages and its own config.json), a `.pdparams`, or an official
`.pt` / `.safetensors`. The network is described by --config_file, else by the checkpoint's config.json, else by
--model_name and --image_size (1000 classes, 4 latent channels, learned variance).

The folder holds model_index.json (with id2label), scheduler/, transformer/ and vae/. What the stock pipeline does
differently from this project is printed at the end.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools.pipeline_converter import add_flags, convert  # noqa: E402
from training.runtime import run_cli  # noqa: E402

SCHEDULERS = ("ddim", "dpm")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(
        parser,
        "DiT",
        model_weights="DiT-XL-2-256x256.pdparams",
        checkpoint_path="DiT_XL_2_256/",
        vae_model="stabilityai/sd-vae-ft-mse",
    )
    parser.add_argument("--scheduler", default="ddim", help="ddim or dpm (DPM-Solver++) [ddim]")
    parser.add_argument(
        "--timestep_embedding",
        default="fit",
        choices=("fit", "keep"),
        help="the stock transformer's timestep frequencies are not DiT's: fit the embedding to them, or keep DiT's "
        "weights although the output is then another one [fit]",
    )
    args = parser.parse_args(argv)
    if args.scheduler not in SCHEDULERS:
        raise ValueError(f"--scheduler {args.scheduler}: unknown; known: {', '.join(SCHEDULERS)}")

    def check(config):
        from sampling.export import make_scheduler, transformer_config

        transformer_config(config["model"])
        make_scheduler(config["objective"], args.scheduler)

    def export(config, state, vae, labels, source):
        from sampling.export import export_dit_pipeline

        return export_dit_pipeline(
            config,
            state,
            vae,
            args.checkpoint_path,
            scheduler=args.scheduler,
            id2label=labels,
            overwrite=args.overwrite,
            timestep_embedding=args.timestep_embedding,
            source=source,
        )

    source = convert("DiT", args, check, export)
    if source is not None:
        print(f"{source} -> {args.checkpoint_path} (ppdiffusers.DiTPipeline.from_pretrained)")


if __name__ == "__main__":
    run_cli(main)
