"""Encode images with a VAE into the features that both training loops read.

FEATURES_PATH/NAME_features/<i>.npy       float32 [1, C, H/f, W/f], a posterior sample, scaled as the VAE's config says
FEATURES_PATH/NAME_features_flip/<i>.npy  with --flip: the same of the mirrored image
FEATURES_PATH/NAME_labels/<i>.npy         int64 [1]
FEATURES_PATH/NAME_packed/                with --format packed: all of it in a few large files
FEATURES_PATH/NAME_classes.json           {"id2label": {"0": <class>, ...}}
FEATURES_PATH/NAME_checksums.txt          for `sha256sum -c`, in FEATURES_PATH
FEATURES_PATH/NAME_manifest.json          what it was made of, counts, and which images could not be read

Images are centre-cropped as ADM and DiT do for ImageNet, and otherwise read as there: an alpha channel is dropped, an
EXIF orientation is not applied. Of 16 bits the high byte is kept; a note tells of images that come out dark by it.
Class folders named 0..N-1 keep their numbers as labels, other numbers are sorted as numbers, other names as text.
Image i is the i-th by label, then by name (in a list: its i-th line); an image that can't be read leaves a gap. The
noise of image i depends on (seed, i) alone.

Many GPUs: python -m paddle.distributed.launch tools/extract_features.py ...; the ranks share the images and the folder.
After an interruption the same command goes on where it was, and ends with the same files, to the bit (on the same
kind of device). An extraction is complete when its manifest is there.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from sampling.autoencoder import DEFAULT_VAE, LatentScaling, downsampling, weights_digest  # noqa: E402
from tools.image_folder import UnreadableImage, dim_note, unreadable_list  # noqa: E402
from tools.image_source import find_archives, open_source, printable, source_root  # noqa: E402
from training.arguments import check_seed  # noqa: E402
from training.runtime import compute_capability, configure_runtime, counted, resolve_device, run_cli  # noqa: E402

configure_runtime()  # before Paddle is imported


class LatentEncoder:
    """Pixels to what is stored of their latents.

    Args:
        vae: an `AutoencoderKL`.
        precision: a `training.precision.Precision`.
        seed: of the posterior samples.
        moments: keep mean and standard deviation instead of a sample of them.
    """

    def __init__(self, vae, precision, *, seed, moments):
        self.vae, self.precision, self.seed, self.moments = vae, precision, seed, moments
        self.scaling = LatentScaling.of(vae.config)

    def __call__(self, pixels, indices, mirrored=False):
        """Starts the work and returns a tensor float32 (N, C, h, w), with moments (N, 2C, h, w): mean, then std.

        Both are scaled as the VAE's config says, as a sample mean + std * noise is.

        Args:
            pixels: uint8 (N, S, S, 3).
            indices: of the images, for the noise.
            mirrored: encode the mirror images, with noise of their own.
        """
        import numpy as np
        import paddle

        images = paddle.to_tensor(np.ascontiguousarray(pixels[:, :, ::-1]) if mirrored else pixels).astype("float32")
        images = images.transpose([0, 3, 1, 2]) / 127.5 - 1.0  # (N, 3, S, S) in [-1, 1]
        try:
            with paddle.no_grad(), self.precision.autocast():
                posterior = self.vae.encode(images).latent_dist
        except MemoryError:
            raise ValueError(f"--batch_size {len(pixels)}: too large for the device's memory; give a smaller") from None
        mean = posterior.mean.astype("float32")  # (N, C, h, w)
        std = paddle.exp(0.5 * posterior.logvar.astype("float32"))
        if self.moments:
            return paddle.concat([self.scaling.normalize(mean), self.scaling.normalize_std(std)], axis=1)
        rngs = [np.random.default_rng((self.seed, index, 1) if mirrored else (self.seed, index)) for index in indices]
        noise = np.stack([rng.standard_normal(mean.shape[1:], "float32") for rng in rngs])
        return self.scaling.normalize(mean + std * paddle.to_tensor(noise))


def read_batches(source, batches, image_size, num_workers, dim=None):
    """Yields (indices, pixels uint8 [N, S, S, 3], unreadable) of each batch; threads read ahead.

    Threads, not processes: Pillow decodes and scales without Python's lock. An unreadable image's pixels are zeros:
    a batch has one shape whatever fails, so that the others come out the same to the bit. unreadable: `{index: error}`.
    dim: see `load_pixels`.
    """
    import numpy as np

    def read(index):
        try:
            return source.pixels(index, image_size, dim)
        except UnreadableImage as error:
            return error

    batches = iter(batches)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        started = collections.deque()
        images_ahead = 0
        try:
            while True:
                while images_ahead < 4 * num_workers or len(started) < 2:
                    indices = next(batches, None)
                    if indices is None:
                        break
                    started.append((indices, [pool.submit(read, index) for index in indices]))
                    images_ahead += len(indices)
                if not started:
                    return
                indices, futures = started.popleft()
                images_ahead -= len(indices)
                images = [future.result() for future in futures]
                unreadable = {
                    i: image for i, image in zip(indices, images, strict=True) if isinstance(image, ValueError)
                }
                empty = np.zeros((image_size, image_size, 3), "uint8")
                yield indices, np.stack([empty if isinstance(x, ValueError) else x for x in images]), unreadable
        finally:
            pool.shutdown(cancel_futures=True)


def encode_batches(source, read, encoders):
    """Yields (indices, labels, arrays, unreadable) of each batch that was read, without the unreadable images.

    arrays: a float32 [N, ...] of each encoder. One batch behind: while the device computes on one, the caller writes
    the one before.
    """
    import numpy as np

    def fetch(indices, tensors, unreadable):
        good = [place for place, index in enumerate(indices) if index not in unreadable]
        arrays = [tensor.numpy()[good] for tensor in tensors]
        indices = [indices[place] for place in good]
        for index, *latents in zip(indices, *arrays, strict=True):
            if not all(np.isfinite(latent).all() for latent in latents):
                raise ValueError(f"{source.name(index)}: its latent is not finite: the VAE overflows in this --dtype")
        return indices, source.labels[indices].tolist(), arrays, unreadable

    running = None
    for indices, pixels, unreadable in read:
        started = indices, [encode(pixels, indices) for encode in encoders], unreadable
        if running:
            yield fetch(*running)
        running = started
    if running:
        yield fetch(*running)


def make_settings(args, name, vae, *, device, dtype):
    """The manifest of a set, as far as it does not depend on the images.

    Raises:
        ValueError: images of this size are not for this VAE.
    """
    factor = downsampling(vae)
    if args.image_size % factor:
        raise ValueError(f"--image_size {args.image_size}: expected a multiple of {factor}, the factor of {args.vae}")
    if vae.config.in_channels != 3:
        raise ValueError(f"VAE {args.vae}: takes images of {vae.config.in_channels} channels, expected 3")
    return {
        "version": 1,
        "format": args.format,
        "name": name,
        "sample_shape": [vae.config.latent_channels, args.image_size // factor, args.image_size // factor],
        "dtype": "float32",
        "moments": args.moments,
        "flip": args.flip,
        "image_size": args.image_size,
        "seed": args.seed,
        **LatentScaling.of(vae.config).as_dict(),
        "vae": {
            "name": printable(args.vae),
            "path": printable(os.path.abspath(args.vae)) if os.path.isdir(args.vae) else None,
            "weights_sha256": weights_digest(vae),
            "latent_channels": vae.config.latent_channels,
            "downsampling": factor,
        },
        "encoding": {"device": device, "dtype": dtype, "batch_size": args.batch_size},
    }


def source_settings(source):
    """What a manifest says of the images."""
    return {
        "num_images": len(source),
        "num_classes": len(source.classes),
        "source": {"kind": source.kind, "path": printable(source.root), "sha256": source.digest()},
    }


def write_parts(source, writer, journal, encode, *, batch_size, rank, world, skip):
    """Encodes and writes this rank's parts; rank 0 then waits for the others'.

    Args:
        encode: an iterable of batches of indices to what `encode_batches` yields.
        skip: leave out unreadable images; else the first is an `UnreadableImage`.
    """
    from training.progress import tqdm

    def images(part):
        return range(len(source))[part * writer.part_size : (part + 1) * writer.part_size]

    def batches(part):
        return [images(part)[first:][:batch_size] for first in range(0, len(images(part)), batch_size)]

    journal.update()
    left_out = [index for entries, _ in journal.parts.values() for index, _ in entries]
    if left_out and not skip:
        raise ValueError(
            f"{source.name(min(left_out))}: could not be read, and an earlier start with --on_error skip left it out; "
            "give that again, or choose another --features_path or --name to start anew"
        )
    parts = range(-(-len(source) // writer.part_size))
    mine = [part for part in parts if part % world == rank and part not in journal.parts]
    if mine:
        journal.open()
    encoded = encode(batch for part in mine for batch in batches(part))
    done = sum(len(images(part)) for part in journal.parts)
    with (
        contextlib.closing(encoded),
        tqdm(total=len(source), initial=done, desc="features", unit="image", disable=rank != 0) as progress,
    ):

        def readable(part, unreadable):
            for indices, labels, arrays, errors in itertools.islice(encoded, len(batches(part))):
                if errors and not skip:
                    raise errors[min(errors)]
                unreadable += [[index, printable(errors[index].reason)] for index in sorted(errors)]
                yield indices, labels, arrays
                progress.update(len(indices) + len(errors))

        def count_others():
            progress.update(sum(len(images(part)) for part in journal.update()))

        for part in mine:
            unreadable = []
            digests = writer.write(part, readable(part, unreadable))
            journal.add(part, unreadable, digests)
            if rank == 0 and world > 1:
                count_others()
        while rank == 0 and len(journal.parts) < len(parts):
            time.sleep(0.2)
            count_others()


def extract(args) -> None:
    for key, least in (("image_size", 1), ("batch_size", 1), ("num_workers", 0)):
        if getattr(args, key) < least:
            raise ValueError(f"--{key} {getattr(args, key)}: expected at least {least}")
    check_seed("seed", args.seed)
    if args.data_path:  # what can be said before the slow imports
        find_archives(args.data_path)
        inside, outside = os.path.realpath(args.features_path), os.path.realpath(args.data_path)
        if not args.list and os.path.isdir(outside) and os.path.commonpath([inside, outside]) == outside:
            raise ValueError(f"--features_path {args.features_path}: lies in {args.data_path}, where the images are")
    name = args.name or f"imagenet{args.image_size}"

    import paddle

    from sampling.decoder import load_vae
    from tools.extraction import WRITERS, Journal, Layout, finish, open_extraction
    from training.precision import resolve_precision

    # Pillow warns of odd EXIF blocks and palettes, which change nothing here.
    warnings.filterwarnings("ignore", module=r"PIL\.")

    # Device, and this process's share of the images.
    device = resolve_device(args.device)
    paddle.set_device(device)
    if device != "cpu":
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})  # after a restart too
    rank, world = int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1))
    precision, note = resolve_precision(args.dtype, "O1", device=device, compute_capability=compute_capability(device))
    vae = load_vae(args.vae)
    settings = make_settings(args, name, vae, device=device.split(":")[0], dtype=precision.dtype)

    # Begin, or go on.
    layout = Layout(args.features_path, name)
    source, settings = open_extraction(
        layout,
        source_root(args.data_path, args.list),
        lambda earlier: open_source(args.data_path, args.list, earlier),
        lambda source: {**settings, **source_settings(source)},
        rank,
    )
    if rank == 0:
        for sentence in filter(None, [note, *source.notes]):
            print(sentence, flush=True)
        if settings is None:
            print(f"{layout.manifest}: complete since an earlier start, nothing to do")
    if settings is None:
        return

    # Read, encode, write.
    writer = WRITERS[args.format](
        layout,
        row_shape=(settings["sample_shape"][0] * (1 + args.moments), *settings["sample_shape"][1:]),
        flip=args.flip,
        batch_size=args.batch_size,
        num_images=len(source),
    )
    encoder = LatentEncoder(vae, precision, seed=args.seed, moments=args.moments)
    dim = []
    encoders = [encoder, *([functools.partial(encoder, mirrored=True)] if args.flip else [])]

    def encode(batches):
        read = read_batches(source, batches, args.image_size, args.num_workers, dim)
        return encode_batches(source, read, encoders)

    goes_on = "what is done is kept, the same command goes on from there"
    try:
        with contextlib.closing(Journal(layout.state, rank)) as journal:
            skip = args.on_error == "skip"
            write_parts(
                *(source, writer, journal, encode), batch_size=args.batch_size, rank=rank, world=world, skip=skip
            )
            if rank == 0:
                report(layout, finish(layout, settings, source, writer, journal))
    except UnreadableImage as error:
        raise ValueError(f"{error}; repair or remove it, or give --on_error skip: {goes_on}") from None
    except FileNotFoundError:
        # A rank that came when all was done, and its state gone.
        if rank == 0 or not os.path.exists(layout.manifest):
            raise
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {goes_on}", error.filename or layout.features_path) from None
    finally:
        if dim:
            print(dim_note(dim), flush=True)


def report(layout, manifest):
    """Says what was written, and what was not."""
    lost = manifest["unreadable"]
    if lost:
        print(unreadable_list([(entry["image"], entry["reason"]) for entry in lost], layout.manifest))
    places = [layout.packed] if manifest["format"] == "packed" else [layout.features, layout.labels]
    print(
        f"{counted(manifest['num_samples'], 'image')} of {counted(manifest['num_classes'], 'class', 'classes')}: "
        f"{', '.join([*places, layout.classes, layout.manifest])}"
    )


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
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="at an image that can't be read: stop there (default), or skip it and list it at the end",
    )
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
