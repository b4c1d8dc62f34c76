"""Encode images with a VAE into the features that both training loops read.

FEATURE_PATH/NAME_features/<i>.npy       float32 [1, C, H/f, W/f], a posterior sample, scaled as the VAE's config says
FEATURE_PATH/NAME_features_flip/<i>.npy  with --flip: the same of the mirrored image
FEATURE_PATH/NAME_labels/<i>.npy         int64 [1]
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
kind of device). An extraction is complete when its manifest is there.
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
from features.extraction import GOES_ON, Extraction, check_earlier, make_settings
from features.image_source import find_archives
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
from sampling.pipelines.converter import latent_shape

configure_runtime()  # before Paddle is imported


def holds_images(folder):
    """Returns whether a file with the ending of an image lies anywhere below a folder."""
    _, endings = image_formats()
    return any(os.path.splitext(path)[1].lower() in endings for path in walk_files(folder, []))


def extract(args) -> None:
    # What can be said before the slow imports.
    background = parse_background(args.background)
    check_vae(args.vae)
    check_paths(args, "data_path", "list")
    if os.path.exists(args.feature_path) and not os.path.isdir(args.feature_path):
        raise ValueError(f"--feature_path {args.feature_path}: is a file; expected a folder")
    if args.name is not None and (os.sep in args.name or not args.name):
        raise ValueError(f"--name {args.name}: expected the beginning of files' names, without {os.sep}")
    if args.image_size % (factor := latent_shape(args.vae)["downsampling"]) and os.path.isdir(args.vae):
        raise ValueError(f"--image_size {args.image_size}: expected a multiple of {factor}, the factor of {args.vae}")
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
    layout = Layout(args.feature_path, args.name or f"imagenet{args.image_size}")
    rank, world = launched_rank()
    options = {key: getattr(args, key) for key in ("format", "moments", "flip", "image_size", "seed")}
    options["background"] = background
    if rank == 0:
        known = {"vae": {"name": encodable(args.vae)}, "encoding": {"batch_size": args.batch_size}}
        if os.path.isdir(args.vae):
            vae = read_json_object(os.path.join(args.vae, "config.json"))
            known |= {key: vae[key] for key in SCALING_KEYS if key in vae}
        check_earlier(layout, {**options, **known})

    import paddle

    from runtime.precision import resolve_precision

    # Pillow warns of odd EXIF blocks and palettes, which change nothing here.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    device = resolve_device(args.device)
    paddle.set_device(device)
    if device != "cpu":
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})  # after a restart too
    precision = resolve_precision(args.dtype, "O1", device=device)
    vae = load_vae(args.vae)
    encoding = {"device": device.split(":")[0], "dtype": precision.dtype, "batch_size": args.batch_size}
    extraction = Extraction(layout, make_settings(vae, args.vae, layout.name, encoding, options), rank, world)
    is_new = extraction.open(args.data_path, args.list)
    if rank == 0:
        complete = None if is_new else f"{layout.manifest}: complete since an earlier start, nothing to do"
        for sentence in filter(None, [precision.note, *extraction.source.notes, complete]):
            print(sentence, flush=True)
    if not is_new:
        return
    encoder = LatentEncoder(vae, precision, seed=args.seed, moments=args.moments)
    try:
        manifest = extraction.run(encoder, num_workers=args.num_workers, skip=args.on_error == "skip")
        if rank == 0:
            if lost := manifest["unreadable"]:
                print(unreadable_list([(entry["image"], entry["reason"]) for entry in lost], layout.manifest))
            places = [layout.packed] if args.format == "packed" else [layout.features, layout.labels]
            classes = counted(manifest["num_classes"], "class", "classes")
            print(f"{counted(manifest['num_samples'], 'image')} of {classes}: ", end="")
            print(*places, layout.classes, layout.manifest, sep=", ")
            place = ["--feature_path", args.feature_path]
            config = os.path.join(args.feature_path, "config.json")
            say_next(
                ["tools/check_features.py", *place, "--image_size", args.image_size, "--vae", args.vae],
                ["tools/make_config.py", *place, "--image_size", args.image_size, "--output", config],
            )
    except FileNotFoundError:
        # A rank that came when all was done, and its state gone.
        if rank == 0 or not os.path.exists(layout.manifest):
            raise
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {GOES_ON}", error.filename or layout.features_path) from None
    finally:
        if extraction.source.dim:
            print(dim_note(extraction.source.dim), flush=True)
        if extraction.source.see_through:
            print(see_through_note(extraction.source.see_through), flush=True)


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
    if not args.data_path and not args.list:
        parser.error("give --data_path, --list, or both")
    try:
        extract(args)
    except KeyboardInterrupt:
        raise ValueError("interrupted; the same command goes on where it was") from None


if __name__ == "__main__":
    run_cli(main)
