"""Converts an autoencoder of LDM or taming-transformers, such as VA-VAE, to an AutoencoderKL folder, without PyTorch.

    python tools/convert_ldm_vae.py --model_path vavae-imagenet256-f16d32-dinov2.pt --output vavae

--model_path is a plain state dict or a training checkpoint, whose loss, foundation_model and linear_proj are left out;
.pt, .ckpt or .safetensors. Nothing in the file is executed. All sizes follow from the weights; --config_file, LDM's
YAML or the same as JSON, is compared with them if it is given. The folder has config.json and model_state.pdparams in
float32: extract_features.py, the training, demos and exports take it with --vae, and so does stock ppdiffusers.
"""

import os

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import CommandParser, check_paths
from config.options import ABOVE_0
from runtime.console import say_next
from runtime.files import named_errors, whole_folder, write_json
from runtime.process import run_cli
from runtime.untrusted import listed
from sampling.pipelines.folder import check_free


def main(argv=None):
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--model_path",
        aliases=("--weights",),
        required=True,
        metavar="FILE",
        help="official weights or training checkpoint: .pt, .ckpt, .safetensors",
    )
    parser.add_argument(
        "--config_file", aliases=("--config",), metavar="FILE", help="its config, .yaml or .json, to be compared"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new or empty folder for the autoencoder")
    parser.add_argument("--key", help="which weights of a checkpoint that holds several [model or state_dict]")
    parser.add_argument(
        "--scaling_factor",
        check=ABOVE_0,
        default=1.0,
        help="networks see latents times this; 1 for VA-VAE, whose latents are normalised by channel instead, 0.18215 "
        "for Stable Diffusion's",
    )
    args = parser.parse_args(argv)
    check_free(args.output)
    check_paths(args, "model_path", "config_file")

    from models.state import check_finite
    from weights.files import load_weights, save_pdparams
    from weights.ldm_vae import check_config, convert, is_part, own_weights, read_config, sizes_of

    source = args.model_path
    state, left_out = own_weights(load_weights(source, args.key or "auto", wanted=is_part), source)
    sizes = sizes_of(state, source)
    config = None if args.config_file is None else read_config(args.config_file)
    resolution = None if config is None else check_config(config, sizes, args.config_file)
    check_finite(state, source=source)
    settings, weights = convert(state, sizes, source)
    settings |= {"sample_size": resolution or 256, "scaling_factor": args.scaling_factor}
    with named_errors(args.output), whole_folder(args.output) as folder:
        write_json(os.path.join(folder, "config.json"), settings)
        save_pdparams(weights, os.path.join(folder, "model_state.pdparams"))
    factor, channels = 2 ** (len(sizes.widths) - 1), sizes.embed_dim
    beside = f"; left out: {listed([f'{name} ({count})' for name, count in left_out.items()], 6)}" * bool(left_out)
    print(
        f"{len(weights)} tensors, latents of {channels} channels, one for {factor} x {factor} pixels: "
        f"{source} -> {args.output}{beside}"
    )
    if settings["layers_per_block"] > sizes.num_res_blocks:
        print(
            f"note: embed_dim {channels} is below z_channels {sizes.z_channels}: every level got two residual blocks "
            "more, without which the borders of images would differ"
        )
    size = resolution or 256
    words = ["--data_path", "IMAGES", "--image_size", size, "--feature_path", "features", "--vae", args.output]
    say_next(["tools/extract_features.py", *words])


if __name__ == "__main__":
    run_cli(main)
