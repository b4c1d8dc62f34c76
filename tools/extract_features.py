"""Encode images with a VAE into the features that both training loops read.

FEATURES_PATH/NAME_features/<i>.npy       float32 [1, C, H/f, W/f], a posterior sample, scaled as the VAE's config says
FEATURES_PATH/NAME_features_flip/<i>.npy  with --flip: the same of the mirrored image
FEATURES_PATH/NAME_labels/<i>.npy         int64 [1]
FEATURES_PATH/NAME_packed/                with --format packed: all of it in a few large files
FEATURES_PATH/NAME_classes.json           {"id2label": {"0": <class>, ...}}
FEATURES_PATH/NAME_checksums.txt          for `sha256sum -c`, in FEATURES_PATH
FEATURES_PATH/NAME_manifest.json          what it was made of, counts, and which images could not be read

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
import warnings

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import check_seed
from config.options import DEFAULT_VAE
from features.autoencoder import LatentEncoder, load_vae
from features.extraction import GOES_ON, Extraction, make_settings
from features.image_source import find_archives
from features.images import BACKGROUND, ON_ERROR, dim_note, parse_background, see_through_note, unreadable_list
from features.layout import Layout
from runtime.process import configure_runtime, counted, resolve_device, run_cli

configure_runtime()  # before Paddle is imported


def extract(args) -> None:
    for key, least in (("image_size", 1), ("batch_size", 1), ("num_workers", 0)):
        if getattr(args, key) < least:
            raise ValueError(f"--{key} {getattr(args, key)}: expected at least {least}")
    check_seed("seed", args.seed)
    background = parse_background(args.background)
    if args.data_path:  # what can be said before the slow imports
        find_archives(args.data_path)
        inside, outside = os.path.realpath(args.features_path), os.path.realpath(args.data_path)
        if not args.list and os.path.isdir(outside) and os.path.commonpath([inside, outside]) == outside:
            raise ValueError(f"--features_path {args.features_path}: lies in {args.data_path}, where the images are")
    name = args.name or f"imagenet{args.image_size}"

    import paddle

    from runtime.precision import resolve_precision

    # Pillow warns of odd EXIF blocks and palettes, which change nothing here.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    device = resolve_device(args.device)
    paddle.set_device(device)
    if device != "cpu":
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})  # after a restart too
    rank, world = int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1))
    precision = resolve_precision(args.dtype, "O1", device=device)
    vae = load_vae(args.vae)
    encoding = {"device": device.split(":")[0], "dtype": precision.dtype, "batch_size": args.batch_size}
    options = {key: getattr(args, key) for key in ("format", "moments", "flip", "image_size", "seed")}
    options["background"] = background

    layout = Layout(args.features_path, name)
    extraction = Extraction(layout, make_settings(vae, args.vae, name, encoding, options), rank, world)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_path",
        "--data",
        help="image folder, one subfolder per class; or ImageNet's train tar; or a folder of one tar file per class",
    )
    parser.add_argument(
        "--list",
        metavar="FILE",
        help="text with a line path,label an image instead of classes by folder; labels are all numbers or all names; "
        "paths are relative to --data_path (default: the list's folder), or names in a tar file",
    )
    parser.add_argument("--features_path", "--output", required=True, help="folder that gets the features")
    parser.add_argument("--name", help="prefix of what is written (default imagenet<image_size>)")
    parser.add_argument("--format", choices=("npy", "packed"), default="npy", help="a file pair an image (default npy)")
    parser.add_argument("--image_size", type=int, default=256, help="side of the crops in pixels (default 256)")
    parser.add_argument("--vae", default=DEFAULT_VAE, help="folder or hub name of an AutoencoderKL")
    parser.add_argument("--flip", action="store_true", help="also store the latents of the mirrored images")
    parser.add_argument(
        "--moments",
        action="store_true",
        help="store the posterior's mean and std, 2C channels, so that training draws a fresh sample at each visit, "
        "instead of one sample",
    )
    parser.add_argument("--background", **BACKGROUND)
    parser.add_argument("--on_error", **ON_ERROR)
    parser.add_argument("--batch_size", type=int, default=32, help="images encoded at once (default 32)")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that read images (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the posterior samples (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, gpu, gpu:N or auto (default): a GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the VAE's arithmetic on a GPU (default float32); latents are stored as float32",
    )
    parser.add_argument("--bf16", dest="dtype", action="store_const", const="bfloat16", help="--dtype bfloat16")
    parser.add_argument("--fp16", dest="dtype", action="store_const", const="float16", help="--dtype float16")
    args = parser.parse_args(argv)
    if not args.data_path and not args.list:
        parser.error("give --data_path, --list, or both")
    try:
        extract(args)
    except KeyboardInterrupt:
        raise ValueError("interrupted; the same command goes on where it was") from None


if __name__ == "__main__":
    run_cli(main)
