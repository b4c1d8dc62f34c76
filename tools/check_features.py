"""Check a whole feature set, pairs of .npy files or packed, in parallel.

Checked: that every latent has its label (and its mirrored twin), shapes, dtypes, that all numbers are finite, labels
against the number of classes, mean and standard deviation of the latents (about 1 once the autoencoder's scaling factor
is in them), duplicates, and, where NAME_manifest.json is, its counts and the checksum of every file. With --vae some
samples are decoded into a picture, mirrored twins beside their originals.

Each problem is one line. The report, and the picture beside it, go to FEATURE_PATH/NAME_check.json (numbered if it is
there) unless --output names another file. Exit code: 0 all is well, 1 there are problems, 2 the check can't be done.
"""

import argparse
import os
import sys

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np

from config.schema import load_config, manifest_features
from features.check import check_set
from features.layout import Layout
from features.store import find_features
from runtime.files import write_json
from runtime.process import configure_runtime, counted, resolve_device, run_cli

SHOWN = 10  # problems of a kind on the console; the report has all
COLUMNS = 8


def print_summary(report):
    """Prints what was found, without the problems."""
    if not report.expected:
        return
    what = "moments" if report.expected.moments else "latents"
    if not report.usable.any():  # none has this shape
        what = f"expected {what}"
    print(
        f"{counted(report.samples.size, 'sample')} in {report.samples.folder}: {what} {report.expected.row_shape} "
        f"{report.expected.dtype}{', mirrored twins' if report.samples.has_flip else ''}"
    )
    counts = report.class_counts[report.class_counts > 0]
    if len(counts):
        to = counted(counts.max(), "sample")
        print(f"{counted(len(counts), 'class', 'classes')} with {counts.min():,} to {to}")
    if report.mean is not None:
        again = counted(report.duplicates, "duplicate")
        print(f"latents: mean {report.mean:.4f}, standard deviation {report.std:.4f}; {again}")
    if report.num_files is not None:
        print(f"{counted(report.num_files, 'file')} compared with the checksums")
    for note in report.notes:
        print(f"note: {note}")


def print_problems(problems):
    """Prints the first problems of each kind."""
    shown = {}
    for kind, text in problems:
        shown[kind] = shown.get(kind, 0) + 1
        if shown[kind] <= SHOWN:
            print(f"problem: {text}")
    for kind, count in shown.items():
        if count > SHOWN:
            print(f"problem: {count - SHOWN} more of the kind {kind!r}, in the report")


def save_picture(report, path, *, vae, num_images, device):
    """Decodes some samples, sorted by class, into a PNG; mirrored twins beside their originals."""
    configure_runtime()
    import paddle

    from features.autoencoder import LatentDecoder, open_vae
    from sampling.grid import make_grid

    paddle.set_device(resolve_device(device))
    channels = report.expected.channels
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(report.usable))[:num_images]
    chosen = chosen[np.argsort(report.labels[chosen], kind="stable")]
    twins = range(1 + report.samples.has_flip)
    rows = [report.samples.read_row(index, bool(twin))[:channels] for index in chosen.tolist() for twin in twins]
    made_with = manifest_features(report.manifest, Layout(report.feature_path, report.name).manifest)["vae"]
    vae, notes = open_vae(vae, made_with, default=None, flag="--vae", channels=channels)
    for note in notes:
        print(f"note: {note}")
    images = LatentDecoder(vae)(paddle.to_tensor(np.stack(rows)))
    make_grid(images, columns=min(COLUMNS, len(images))).save(path)


def report_file(path, folder, name, overwrite):
    """Returns the report's file: the one asked for, else a free `NAME_check.json` in the folder of the features.

    It lands in the working folder where that of the features can't be written.

    Raises:
        ValueError: one line: `path` is taken, or can't be a report's.
    """
    if path is not None:
        if not path.endswith(".json"):
            raise ValueError(f"--output {path}: expected a name that ends in .json")
        for taken in (path, picture_file(path)):
            if os.path.exists(taken) and not overwrite:
                raise ValueError(f"--output {path}: {taken} exists already; give another name, or --overwrite")
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise ValueError(f"--output {path}: there is no such folder")
        return path
    folder = folder if os.access(folder, os.W_OK) else "."
    path, number = os.path.join(folder, f"{name}_check.json"), 1
    while os.path.exists(path) or os.path.exists(picture_file(path)):
        number += 1
        path = os.path.join(folder, f"{name}_check-{number}.json")
    return path


def picture_file(report):
    """Returns the file of the picture beside a report."""
    return report[: -len(".json")] + ".png"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--feature_path", required=True, help="folder that holds NAME_features/ or NAME_packed/")
    parser.add_argument(
        "--resolution", type=int, default=256, help="picks the set imagenet{N}, if there are several [256]"
    )
    parser.add_argument("--config_file", help="config of the model to train: shape and classes [the manifest's]")
    parser.add_argument("--vae", help="AutoencoderKL folder or hub name, to decode some samples")
    parser.add_argument("--num_images", type=int, default=32, metavar="N", help="samples in the picture [32]")
    parser.add_argument("--output", help="report to write, JSON; the picture beside it [FEATURE_PATH/NAME_check.json]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--no_checksums", action="store_true", help="don't compare the files with their checksums")
    parser.add_argument("--allow_duplicates", action="store_true", help="equal latents of one class are no problem")
    parser.add_argument(
        "--num_workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes [all cores: %(default)s]"
    )
    parser.add_argument("--device", default="auto", help="of --vae: auto, cpu, gpu or gpu:N [auto]")
    args = parser.parse_args(argv)
    for key in ("num_workers", "num_images"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key} {getattr(args, key)}: expected 1 or more")
    kind, name = find_features(args.feature_path, args.resolution)
    model = load_config(args.config_file)["model"] if args.config_file else None
    output = report_file(args.output, args.feature_path, name, args.overwrite)
    report = check_set(
        *(args.feature_path, kind, name),
        model=model,
        num_workers=args.num_workers,
        compare_checksums=not args.no_checksums,
        allow_duplicates=args.allow_duplicates,
    )
    write_json(output, report.as_json())
    print_summary(report)
    print_problems(report.problems)
    print(f"report: {output}", flush=True)
    if args.vae and report.usable.any():
        save_picture(report, picture_file(output), vae=args.vae, num_images=args.num_images, device=args.device)
        print(f"picture: {picture_file(output)}")
    if report.problems:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
