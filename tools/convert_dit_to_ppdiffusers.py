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

from training.arguments import str2bool  # noqa: E402
from training.runtime import configure_runtime, run_cli  # noqa: E402

# num_layers, num_attention_heads, attention_head_dim
SIZES = {"XL": (28, 16, 72), "L": (24, 16, 64), "B": (12, 12, 64), "S": (12, 6, 64)}
MODEL_NAMES = [f"DiT_{size}_{patch_size}" for size in SIZES for patch_size in (2, 4, 8)]
IMAGENET_LABELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ImageNet_id2label.json")
SCHEDULERS = ("ddim", "dpm")


def named_config(model_name, image_size):
    """The config of one of the paper's models for the 8x smaller latents of a Stable Diffusion VAE."""
    if model_name not in MODEL_NAMES:
        raise ValueError(f"--model_name {model_name}: unknown; known: {', '.join(MODEL_NAMES)}")
    _, size, patch_size = model_name.split("_")
    if image_size < 1 or image_size % (8 * int(patch_size)):
        raise ValueError(f"--image_size {image_size}: expected a multiple of {8 * int(patch_size)} for {model_name}")
    num_layers, heads, head_dim = SIZES[size]
    from training.config import resolve_config

    return resolve_config(
        {
            "type": "DiT",
            "sample_size": image_size // 8,
            "patch_size": int(patch_size),
            "num_layers": num_layers,
            "num_attention_heads": heads,
            "attention_head_dim": head_dim,
        }
    )


def find_config(args):
    """The resolved config of the network: --config_file, the checkpoint's own, or the one that --model_name names."""
    from training.config import load_config

    if args.config_file:
        return load_config(args.config_file)
    beside = os.path.join(args.model_weights, "config.json")
    if os.path.isfile(beside):
        return load_config(beside)
    return named_config(args.model_name, args.image_size)


def find_labels(path, num_classes):
    """`{id: label}` from --id2label, ImageNet's for 1000 classes, else None; and a sentence for the user, or None."""
    from training.config import read_json

    if path is None and num_classes != 1000:
        return None, f"No --id2label: the classes are named '0' to '{num_classes - 1}'."
    labels = read_json(path or IMAGENET_LABELS)
    if isinstance(labels, dict) and isinstance(labels.get("id2label"), dict):
        labels = labels["id2label"]
    if not isinstance(labels, dict):
        raise ValueError(f'{path}: expected {{"id2label": {{"0": "name", ...}}}}')
    return labels, None


def convert(args):
    """Reads, checks and writes the pipeline, as the flags say; ValueError for whatever can't be."""
    if args.scheduler not in SCHEDULERS:
        raise ValueError(f"--scheduler {args.scheduler}: unknown; known: {', '.join(SCHEDULERS)}")
    if not os.path.exists(args.model_weights):
        raise ValueError(f"--model_weights {args.model_weights}: there is no such file or folder")
    config = find_config(args)
    labels, note = find_labels(args.id2label, config["model"]["num_classes"])

    configure_runtime()
    from sampling.checkpoint import read_weights
    from sampling.decoder import load_vae
    from sampling.export import check_id2label, check_output, export_dit_pipeline, transformer_config

    # What can be refused is refused before anything is loaded or downloaded.
    transformer_config(config["model"])
    check_id2label(labels, config["model"]["num_classes"])
    if args.save:
        check_output(args.checkpoint_path, args.overwrite)
    print(f"reading {args.model_weights}", flush=True)
    state, source = read_weights(args.model_weights, key=args.key, layout=args.weights_layout)
    if not args.save:
        from models.weights import check_state, expected_shapes

        check_state(state, expected_shapes(config["model"]), source=source)
        print(f"{source} fits; --save False: nothing was written")
        return
    vae = load_vae(args.vae_model)
    notes = export_dit_pipeline(
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
    for text in [note, *notes]:
        if text:
            print(f"note: {text}")
    print(f"{source} -> {args.checkpoint_path} (ppdiffusers.DiTPipeline.from_pretrained)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=256, help="pixels, with --model_name [256]")
    parser.add_argument("--model_name", default="DiT_XL_2", help="DiT_{S,B,L,XL}_{2,4,8} [DiT_XL_2]")
    parser.add_argument(
        "--vae_model", default="stabilityai/sd-vae-ft-mse", help="folder or hub name [stabilityai/sd-vae-ft-mse]"
    )
    parser.add_argument("--scheduler", default="ddim", help="ddim or dpm (DPM-Solver++) [ddim]")
    parser.add_argument("--model_weights", default="DiT-XL-2-256x256.pdparams", help="[DiT-XL-2-256x256.pdparams]")
    parser.add_argument(
        "--save", type=str2bool, default=True, metavar="True|False", help="False only checks the weights [True]"
    )
    parser.add_argument("--checkpoint_path", default="DiT_XL_2_256/", help="folder to write [DiT_XL_2_256/]")
    parser.add_argument("--config_file", help="JSON of the network, instead of --model_name")
    parser.add_argument("--key", choices=("model", "ema"), help="which weights of a training checkpoint [ema]")
    parser.add_argument("--id2label", help='JSON {"id2label": {"0": "name", ...}} [ImageNet\'s for 1000 classes]')
    parser.add_argument(
        "--weights_layout",
        default="auto",
        choices=("auto", "paddle", "torch"),
        help="how the file stores Linear weights; auto goes by its ending [auto]",
    )
    parser.add_argument(
        "--timestep_embedding",
        default="fit",
        choices=("fit", "keep"),
        help="the stock transformer's timestep frequencies are not DiT's: fit the embedding to them, or keep DiT's "
        "weights although the output is then another one [fit]",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing pipeline folder")
    convert(parser.parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
