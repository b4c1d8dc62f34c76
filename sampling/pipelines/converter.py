"""What the converters to pipeline folders share: the network's config, flags, and the order of things."""

import contextlib
import os

from config.flags import CommandParser, check_paths, check_vae
from config.options import DEFAULT_VAE, DEFAULT_VAE_SHAPE, INT_FROM_0, POSITIVE_INT, SIT_VAE, first_images_flags
from config.schema import MODEL_TYPES, differences, internal_guidance_block, load_config, weights_config
from features.autoencoder import choose_vae, open_vae
from runtime.console import say_next
from runtime.process import configure_runtime
from runtime.untrusted import read_json_object
from sampling.flags import add_statistics_flags, add_vae_flag
from sampling.guidance_settings import no_second_layer
from sampling.labels import ROOT, find_labels
from sampling.model_path import check_normalization, stated_features
from sampling.pipelines.folder import check_id2label, check_output, complete_features
from weights.runs import resolve_run

IMAGE_SIZE = 256  # pixels, of --model_name


def named_config(kind, model_name, image_size, latents=DEFAULT_VAE_SHAPE):
    """Returns the config of one of the paper's models for images of a size; `latents` as of `latent_shape`."""
    known = [f"{kind}_{size}_{patch_size}" for size in ("XL", "L", "B", "S") for patch_size in (2, 4, 8)]
    if model_name not in known:
        raise ValueError(f"--model_name {model_name}: unknown; known: {', '.join(known)}")
    _, size, patch_size = model_name.split("_")
    factor = latents["downsampling"]
    if image_size < 1 or image_size % (factor * int(patch_size)):
        expected = f"expected a multiple of {factor * int(patch_size)} for {model_name}"
        raise ValueError(f"--image_size {image_size}: {expected}")
    config = load_config(os.path.join(ROOT, "config", f"{kind}_{size}_patch{patch_size}.json"))
    shape = {"sample_size": image_size // factor, "in_channels": latents["latent_channels"]}
    return {**config, "model": {**config["model"], **shape}}


def find_config(args):
    """Returns the resolved config of the network: the checkpoint's own, --config_file's, or --model_name's.

    Without any of these a file of a LightningDiT is recognised by its shapes.

    What describes another network than the checkpoint's own config is a `ValueError`.
    """
    config = weights_config(args.model_path, args.config_file)
    beside = os.path.join(args.model_path, "config.json")
    if config is None and os.path.isfile(beside):
        config = load_config(beside)
    if config is None and args.kind == "SiT" and args.model_name is None and os.path.isfile(args.model_path):
        from weights.recognised import recognised_config, recognised_note

        with contextlib.suppress(ValueError):  # of another network
            config = recognised_config(args.model_path, args.key)
            print(f"note: {recognised_note(config['model'])}", flush=True)
    if config is None:
        size = IMAGE_SIZE if args.image_size is None else args.image_size
        return named_config(args.kind, args.model_name or f"{args.kind}_XL_2", size, latent_shape(args.vae))
    given = {}
    if args.model_name is not None:
        named = named_config(args.kind, args.model_name, IMAGE_SIZE)["model"]
        keys = ("type", "patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
        given[f"--model_name {args.model_name}"] = {key: named[key] for key in keys}
    if args.image_size is not None:
        size = args.image_size / latent_shape(args.vae, config["features"]["vae"])["downsampling"]
        given[f"--image_size {args.image_size}"] = {"sample_size": int(size) if size % 1 == 0 else size}
    for flag, named in given.items():
        if listed := differences({key: config["model"][key] for key in named}, named):
            raise ValueError(f"{args.model_path}: its config describes another model than {flag}: {listed}")
    return config


def latent_shape(vae, features=None):
    """Returns `latent_channels` and `downsampling`, the pixels along a latent's side, of --vae or of the features' VAE.

    Nothing is downloaded for it: what they do not tell is that of the default autoencoders.
    """
    known = features or {}
    if vae is not None:
        path = os.path.join(vae, "config.json")
        settings = read_json_object(path) if os.path.isfile(path) else {}
        blocks, channels = settings.get("block_out_channels"), settings.get("latent_channels")
        known = {"latent_channels": channels if type(channels) is int else None}
        known["downsampling"] = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else None
    return {key: known.get(key) or default for key, default in DEFAULT_VAE_SHAPE.items()}


def make_parser(kind, description):
    """Returns a parser with the flags of both converters; kind is DiT or SiT."""
    weights, output = f"{kind}-XL-2-256x256.pdparams", f"{kind}_XL_2_256/"
    vae = {"DiT": DEFAULT_VAE, "SiT": SIT_VAE}[kind]
    parser = CommandParser(description=description)
    parser.add_argument("--model_path", default=weights, metavar="PATH", help="the weights, see above")
    parser.add_argument(
        "--output", aliases=("--checkpoint_path",), default=output, metavar="FOLDER", help="folder to write"
    )
    parser.add_argument("--image_size", check=POSITIVE_INT, help=f"pixels, with --model_name [{IMAGE_SIZE}]")
    parser.add_argument("--model_name", metavar="NAME", help=f"{kind}_{{S,B,L,XL}}_{{2,4,8}} [{kind}_XL_2]")
    add_vae_flag(parser, f"{vae}, as in the official {kind}")
    parser.set_defaults(kind=kind, default_vae=vae)
    add_statistics_flags(parser)
    parser.add_argument("--save", action="store_true", default=True, help="False only checks the weights")
    parser.add_argument(
        "--config_file", metavar="FILE", help="JSON of the network, instead of --model_name [the checkpoint's own]"
    )
    parser.add_argument("--key", help="which weights of a checkpoint: model, ema or another of its keys [ema]")
    parser.add_argument(
        "--id2label",
        metavar="FILE",
        help='JSON {"id2label": {"0": "name", ...}} [the names of the features\' set; ImageNet\'s for 1000 without]',
    )
    parser.add_argument(
        "--weights_layout",
        default="auto",
        choices=("auto", "paddle", "torch"),
        help="how the file stores Linear weights; auto goes by its ending, or what a .safetensors says",
    )
    parser.add_argument(
        "--keep_internal_guidance",
        action="store_true",
        help="keep the second final layer of internal guidance [what regularizers learned is left out]",
    )
    parser.add_argument(
        "--safe_serialization", action="store_true", help="write the weights as .safetensors, not .pdparams"
    )
    parser.add_argument(
        "--card_samples",
        check=INT_FROM_0,
        default=0,
        help="draw N images of up to ten classes into the model card, README.md of the folder [0: no picture]",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing pipeline folder")
    return parser


def convert(args, check, export, loader):
    """Reads, checks and writes a pipeline folder, as the flags say.

    Args:
        check: `check(config)` raises ValueError for a config that can't be exported.
        export: writes the folder and returns sentences for the user; called as `export_pipeline`.
        loader: the class that loads the folder.
    """
    check_paths(args, "model_path", "config_file")
    check_vae(args.vae)
    args.model_path = resolve_run(args.model_path)
    if args.config_file:  # one that no export takes is told so before it is compared with the weights' own
        check(load_config(args.config_file))
    config = find_config(args)
    labels, note = find_labels(args.id2label, config)
    # What can be refused is refused before anything is loaded or downloaded, and Paddle is imported after it.
    check(config)
    if args.keep_internal_guidance and loader.endswith("DiTPipeline"):
        raise ValueError("--keep_internal_guidance: a DiTPipeline has no place for it; a SiTPipeline folder has")
    if args.keep_internal_guidance and internal_guidance_block(config) is None:
        raise ValueError(f"--keep_internal_guidance: {no_second_layer(args.model_path)}")
    stated = (config, args.model_path, args.latents_stats, args.latent_multiplier)
    if args.save:
        check_normalization(*stated)
    config["features"] = features = stated_features(*stated)
    chosen, channels = (args.vae, features["vae"]), config["model"]["in_channels"]
    vae_name = choose_vae(*chosen, args.default_vae, "--vae", channels)[0] if args.save else None
    check_id2label(labels, config["model"]["num_classes"])
    if args.save:
        check_output(args.output, args.overwrite)

    configure_runtime()
    from models.state import REGULARIZERS, check_finite, check_state, expected_shapes, for_sampling
    from sampling.pipelines.model_card import write_model_card
    from weights.source import leave_out, read_weights

    print(f"reading {args.model_path}", flush=True)
    how = {"key": args.key, "layout": args.weights_layout, "model": config["model"], "kept": [REGULARIZERS]}
    state, source = read_weights(args.model_path, **how)
    keeps = None if loader.endswith("DiTPipeline") else args.keep_internal_guidance
    state, left_out = leave_out(state, source, keeps)
    check_finite(state, source=source)
    if not args.save:
        fitting, _ = for_sampling(config["model"], state, internal_guidance_block(config))
        check_state(state, expected_shapes(fitting), source=source)
        print(f"{source} fits; --save False: nothing was written")
        return
    wanted = {"default": args.default_vae, "flag": "--vae", "channels": channels}
    vae, vae_notes = open_vae(*chosen, **wanted, normalization=features["latent_normalization"])
    config["features"] = complete_features(features, vae, vae_name, config["model"]["sample_size"])
    options = {"id2label": labels, "source": source}
    options.update(overwrite=args.overwrite, safe_serialization=args.safe_serialization)
    notes = export(config, state, vae, args.output, **options)
    card = {"weights": args.model_path, "vae": vae, "vae_name": vae_name, "notes": notes}
    no_picture = write_model_card(args.output, config, **card, samples=args.card_samples)
    for text in filter(None, [note, left_out, *vae_notes, *notes, no_picture]):
        print(f"note: {text}")
    print(f"{source} -> {args.output} ({loader}.from_pretrained)")
    demo = MODEL_TYPES[config["model"]["type"]].demo if loader.endswith("SiTPipeline") else "infer_demo_dit.py"
    place = ["--model_path", args.output]
    say_next([demo, *place, *first_images_flags(config["model"])], ["web_demo.py", *place])
