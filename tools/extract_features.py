"""Encode images with a VAE into the features that both training loops read.

FEATURE_PATH/NAME_features/<i>.npy       float32 [1, C, H/f, W/f], a posterior sample, scaled as the VAE's config says
FEATURE_PATH/NAME_features_flip/<i>.npy  with --flip: the same of the mirrored image
FEATURE_PATH/NAME_labels/<i>.npy         int64 [1]
FEATURE_PATH/NAME_encoder/<i>.npy        with --encoder: float16 [tokens, width], an encoder's features for REPA
FEATURE_PATH/NAME_encoder_flip/<i>.npy   with --encoder and --flip: the same of the mirrored image
FEATURE_PATH/NAME_packed/                with --format packed: all of it in a few large files
FEATURE_PATH/NAME_classes.json           {"id2label": {"0": <class>, ...}}
FEATURE_PATH/NAME_checksums.txt          for `sha256sum -c`, in FEATURE_PATH
FEATURE_PATH/NAME_manifest.json          what it was made of, counts, and which images could not be read

Images are centre-cropped as ADM and DiT do for ImageNet, and otherwise read as there: an alpha channel is dropped
(unless --background names a colour to lay the image over), an EXIF orientation is not applied. Of 16 bits the high byte
is kept. Notes tell of images that come out dark by it, and of transparent ones.
Class folders named 0..N-1 keep their numbers as labels, other numbers are sorted as numbers, other names as text.
Image i is the i-th by label, then by name (in a list: its i-th line); an image that can't be read leaves a gap. The
noise of image i depends on (seed, i) alone.

Many GPUs: python -m paddle.distributed.launch tools/extract_features.py ...; the ranks share the images and the folder.
After an interruption the same command goes on where it was, and ends with the same files, to the bit (on the same
kind of device). An extraction is complete when its manifest is there. To a complete set --encoder adds an encoder's
features; what the set was made with is known then, and need not be given.
"""

import argparse
import os
import tarfile
import warnings

import _root  # noqa: F401 (the project's root, on sys.path)

from config.checks import FLAG_SEED, VAE
from config.flags import CommandParser, add_device_flag, check_paths, check_vae
from config.options import DEFAULT_VAE, INT_FROM_0, POSITIVE_INT
from config.schema import SCALING_KEYS
from features.autoencoder import LatentEncoder, load_vae
from features.encoders import find_encoder
from features.extraction import GOES_ON, Extraction, check_earlier, check_settings, make_settings, set_classes
from features.image_source import find_archives, open_source
from features.images import (
    BACKGROUND,
    ON_ERROR,
    dim_note,
    encodable,
    image_formats,
    parse_background,
    see_through_note,
    unreadable_list,
    walk_files,
)
from features.layout import Layout
from runtime.console import say_next
from runtime.process import configure_runtime, counted, launched_rank, resolve_device, run_cli
from runtime.untrusted import read_json_object
from sampling.flags import note_unused
from sampling.pipelines.converter import latent_shape

configure_runtime()  # before Paddle is imported

PIXELS_A_TOKEN = 16  # of a side: latents 8 times smaller in patches of 2, or 16 times smaller in patches of 1
OF_THE_ENCODER = ("encoder_size", "encoder_batch", "token_grid", "replace_encoder")


def holds_images(folder):
    """Returns whether a file with the ending of an image lies anywhere below a folder."""
    _, endings = image_formats()
    return any(os.path.splitext(path)[1].lower() in endings for path in walk_files(folder, []))


def check_arguments(args, layout, adds) -> None:
    """Says what can be said before the slow imports; `adds`: the set is complete, and gets encoder features."""
    check_paths(args, "data_path", "list")
    if args.encoder:
        find_encoder(args.encoder)
    if adds:
        check_settings(layout.manifest, args.given)
    else:
        check_vae(args.vae)
        factor = latent_shape(args.vae)["downsampling"]
        if args.image_size % factor and os.path.isdir(args.vae):
            raise ValueError(
                f"--image_size {args.image_size}: expected a multiple of {factor}, the factor of {args.vae}"
            )
    if args.data_path:
        archives, _ = find_archives(args.data_path)
        for path in archives:
            if not tarfile.is_tarfile(path):
                raise ValueError(f"{path}: not a tar file, or a damaged one")
        if not archives and not args.list and not holds_images(args.data_path):
            raise ValueError(
                f"{args.data_path}: no images found; expected {args.data_path}/<class>/<image>, in a format that "
                "Pillow reads"
            )
        inside, outside = os.path.realpath(args.feature_path), os.path.realpath(args.data_path)
        if not args.list and os.path.isdir(outside) and os.path.commonpath([inside, outside]) == outside:
            raise ValueError(f"--feature_path {args.feature_path}: lies in {args.data_path}, where the images are")
    if launched_rank()[0] == 0 and not adds:
        known = {"vae": {"name": encodable(args.vae)}, "encoding": {"batch_size": args.batch_size}}
        if os.path.isdir(args.vae):
            vae = read_json_object(os.path.join(args.vae, "config.json"))
            known |= {key: vae[key] for key in SCALING_KEYS if key in vae}
        check_earlier(layout, {**args.options, **known})


def extract(args) -> None:
    if os.path.exists(args.feature_path) and not os.path.isdir(args.feature_path):
        raise ValueError(f"--feature_path {args.feature_path}: is a file; expected a folder")
    if args.name is not None and (os.sep in args.name or not args.name):
        raise ValueError(f"--name {args.name}: expected the beginning of files' names, without {os.sep}")
    layout = Layout(args.feature_path, args.name or f"imagenet{args.image_size}")
    adds = args.encoder is not None and os.path.exists(layout.manifest)
    if adds:
        take_from_manifest(args, layout)
    elif not args.data_path and not args.list:
        raise ValueError(
            f"{layout.manifest}: is not there, so there is no set to add encoder features to; name one by --image_size "
            "or --name, or give --data_path, --list, or both, of which one is made"
        )
    check_arguments(args, layout, adds)

    import paddle

    from runtime.precision import resolve_precision

    # Pillow warns of odd EXIF blocks and palettes, which change nothing here.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    device = resolve_device(args.device)
    paddle.set_device(device)
    if device != "cpu":
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})  # after a restart too
    precision = resolve_precision(args.dtype, "O1", device=device)
    if launched_rank()[0] == 0 and precision.note:
        print(precision.note, flush=True)
    encoder = open_encoder_extraction(args, layout, precision) if args.encoder else None
    try:
        source = None if adds else extract_latents(args, layout, precision, encoder)
        if encoder is not None:
            extract_encoder(args, layout, encoder, source)
    except FileNotFoundError:
        # A rank that came when all was done, and its state gone.
        if launched_rank()[0] == 0 or not os.path.exists(layout.manifest):
            raise
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {GOES_ON}", error.filename or layout.features_path) from None


def take_from_manifest(args, layout) -> None:
    """Takes over what a complete set's manifest tells: the size of its images, and where they are."""
    manifest = read_json_object(layout.manifest)
    source = manifest.get("source") if isinstance(manifest.get("source"), dict) else {}
    args.image_size, args.flip = manifest.get("image_size"), bool(manifest.get("flip"))
    args.num_images = manifest.get("num_samples")
    if not isinstance(args.image_size, int) or not isinstance(args.num_images, int):
        raise ValueError(f"{layout.manifest}: does not tell which images the set was made of")
    if not args.data_path and not args.list:
        if source.get("kind") == "list" or not os.path.exists(source.get("path") or ""):
            raise ValueError(f"{layout.manifest}: its images are not where it says; give --data_path, --list, or both")
        args.data_path = source["path"]


def open_encoder_extraction(args, layout, precision):
    """Loads the encoder of `--encoder`; returns its `EncoderExtraction`."""
    import paddle

    from features.encoder_extraction import EncoderExtraction
    from features.encoders import PatchEncoder

    rank, world = launched_rank()
    grid = args.token_grid or max(1, args.image_size // PIXELS_A_TOKEN)
    sizes = {"size": args.encoder_size, "image_size": args.image_size, "token_grid": grid}
    encoder = PatchEncoder(args.encoder, precision=precision, **sizes)
    if rank == 0:
        for note in encoder.notes:
            print(f"note: {note}", flush=True)
    encoding = {"device": paddle.get_device().split(":")[0], "dtype": precision.dtype, "batch_size": args.encoder_batch}
    return EncoderExtraction(layout, encoder, encoding, rank=rank, world=world, replace=args.replace_encoder)


def announce_size(args, encoder, num_images) -> None:
    """Prints how large the features of an `EncoderExtraction` are to be."""
    from features.encoder_extraction import size_sentence

    is_begun = encoder.is_begun()
    print(size_sentence(num_images, encoder.settings, args.flip, args.feature_path, check=not is_begun), flush=True)


def extract_latents(args, layout, precision, encoder):
    """Extracts latents and labels; returns their `ImageSource`, on rank 0 and while there is work."""
    import paddle

    rank, world = launched_rank()
    vae = load_vae(args.vae)
    device = paddle.get_device().split(":")[0]
    encoding = {"device": device, "dtype": precision.dtype, "batch_size": args.batch_size}
    extraction = Extraction(layout, make_settings(vae, args.vae, layout.name, encoding, args.options), rank, world)
    announce = encoder and (lambda num_images: announce_size(args, encoder, num_images))
    is_new = extraction.open(args.data_path, args.list, announce)
    if rank == 0:
        complete = None if is_new else f"{layout.manifest}: complete since an earlier start, nothing to do"
        for sentence in filter(None, [*extraction.source.notes, complete]):
            print(sentence, flush=True)
    if not is_new:
        return getattr(extraction, "source", None)
    latents = LatentEncoder(vae, precision, seed=args.seed, moments=args.moments)
    try:
        manifest = extraction.run(latents, num_workers=args.num_workers, skip=args.on_error == "skip")
        if rank == 0:
            say_finished(args, layout, manifest)
            if encoder is None:
                say_next_commands(args, ["--vae", args.vae])
    finally:
        if extraction.source.dim:
            print(dim_note(extraction.source.dim), flush=True)
        if extraction.source.see_through:
            print(see_through_note(extraction.source.see_through), flush=True)
    return extraction.source


def say_finished(args, layout, manifest) -> None:
    """Prints what was written."""
    if lost := manifest["unreadable"]:
        print(unreadable_list([(entry["image"], entry["reason"]) for entry in lost], layout.manifest))
    places = [layout.packed] if args.format == "packed" else [layout.features, layout.labels]
    classes = counted(manifest["num_classes"], "class", "classes")
    print(f"{counted(manifest['num_samples'], 'image')} of {classes}: ", end="")
    print(*places, layout.classes, layout.manifest, sep=", ", flush=True)


def say_next_commands(args, vae=()) -> None:
    """Prints the commands that come next; `vae`: the flag that names the autoencoder, where it is known."""
    place = ["--feature_path", args.feature_path, "--image_size", args.image_size]
    config = os.path.join(args.feature_path, "config.json")
    say_next(["tools/check_features.py", *place, *vae], ["tools/make_config.py", *place, "--output", config])


def extract_encoder(args, layout, extraction, source) -> None:
    """Adds encoder features to a set that is complete, or soon will be by another rank's work."""
    if extraction.rank == 0 and source is None:
        source = open_source(args.data_path, args.list, set_classes(layout))
        announce_size(args, extraction, args.num_images)
    if not extraction.open(source, args.data_path, args.list):
        if extraction.rank == 0:
            print(f"{layout.manifest}: its encoder features are complete since an earlier start, nothing to do")
        return
    extraction.run(num_workers=args.num_workers)
    if extraction.rank == 0:
        tokens, width = extraction.settings["token_grid"] ** 2, extraction.settings["width"]
        place = layout.packed if os.path.isdir(layout.packed) else layout.encoder
        print(f"encoder features, {tokens} tokens of width {width} an image: {place}, {layout.manifest}")
        say_next_commands(args)


def main(argv: list | None = None) -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--data_path",
        metavar="PATH",
        help="image folder, one subfolder per class; or ImageNet's train tar; or a folder of one tar file per class",
    )
    parser.add_argument(
        "--list",
        metavar="FILE",
        help="text with a line path,label an image instead of classes by folder; labels are all numbers or all names; "
        "paths are relative to --data_path [the list's folder], or names in a tar file",
    )
    parser.add_argument(
        "--feature_path", aliases=("--output",), required=True, metavar="FOLDER", help="folder that gets the features"
    )
    parser.add_argument("--name", help="prefix of what is written [imagenet<image_size>]")
    parser.add_argument("--format", choices=("npy", "packed"), default="npy", help="npy: a file pair an image")
    parser.add_argument("--image_size", check=POSITIVE_INT, default=256, help="side of the crops in pixels")
    parser.add_argument(
        "--vae",
        check=VAE,
        default=DEFAULT_VAE,
        help="folder or hub name of an AutoencoderKL, or ema or mse, which encode alike",
    )
    parser.add_argument("--flip", action="store_true", help="also store the latents of the mirrored images")
    parser.add_argument(
        "--moments",
        action="store_true",
        help="store the posterior's mean and std, 2C channels, so that training draws a fresh sample at each visit, "
        "instead of one sample",
    )
    parser.add_argument(
        "--encoder",
        metavar="PATH",
        help="also store an encoder's features: a program of Paddle Inference, or a folder of a CLIPVisionModel",
    )
    parser.add_argument(
        "--encoder_size",
        check=POSITIVE_INT,
        metavar="PIXELS",
        help="side of the images that it gets [its preprocessor_config.json's or config's, else --image_size]",
    )
    parser.add_argument("--encoder_batch", check=POSITIVE_INT, default=32, help="images that it gets at once")
    parser.add_argument(
        "--token_grid",
        check=POSITIVE_INT,
        metavar="N",
        help=f"tokens a side, the model's sample_size / patch_size [a token each {PIXELS_A_TOKEN} pixels]",
    )
    parser.add_argument("--replace_encoder", action="store_true", help="delete those of another encoder that are there")
    parser.add_argument("--background", **BACKGROUND)
    parser.add_argument("--on_error", **ON_ERROR)
    parser.add_argument("--batch_size", check=POSITIVE_INT, default=32, help="images encoded at once")
    parser.add_argument("--num_workers", check=INT_FROM_0, default=4, help="threads that read images")
    parser.add_argument("--seed", check=FLAG_SEED, default=0, help="of the posterior samples")
    add_device_flag(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the VAE's arithmetic on a GPU; latents are stored as float32 [float32]",
    )
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fp16", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    asked = {*filter(None, (args.dtype, args.bf16 and "bfloat16", args.fp16 and "float16"))}
    if len(asked) > 1:
        parser.error("--dtype, --bf16 and --fp16 are one setting: give one")
    args.dtype = asked.pop() if asked else "float32"
    if not args.data_path and not args.list and not args.encoder:
        parser.error("give --data_path, --list, or both")
    if not args.encoder:
        note_unused([name for name in OF_THE_ENCODER if getattr(args, name) != parser.get_default(name)], "--encoder")
    args.options = {key: getattr(args, key) for key in ("format", "moments", "flip", "image_size", "seed")}
    args.given = {key: value for key, value in args.options.items() if value != parser.get_default(key)}
    args.options["background"] = parse_background(args.background)
    args.given |= {"background": args.options["background"]} if args.background else {}
    try:
        extract(args)
    except KeyboardInterrupt:
        raise ValueError("interrupted; the same command goes on where it was") from None


if __name__ == "__main__":
    run_cli(main)
