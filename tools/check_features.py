"""Check a whole feature set, pairs of .npy files or packed, in parallel.

Checked: that every latent has its label (and its mirrored twin), shapes, dtypes, that all numbers are finite, labels
against the number of classes, mean and standard deviation of the latents (about 1 once the autoencoder's scaling factor
is in them), duplicates, and, where NAME_manifest.json is, its counts and the checksum of every file. With --vae, or
if the manifest's autoencoder is a folder that is here, some samples are decoded into a picture, one row a class: the
original image, where it can be reached, what the autoencoder makes of it, and the mirrored twin if there is one.

Each problem is one line. The report, and the picture beside it, go to FEATURE_PATH/NAME_check.json (numbered if it is
there) unless --output names another file. Exit code: 0 all is well, 1 there are problems, 2 the check can't be done.
"""

import collections
import itertools
import os
import shlex
import sys

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np

from config.checks import VAE
from config.flags import CommandParser, add_device_flag, add_set_flags, check_paths, check_vae
from config.options import POSITIVE_INT
from config.schema import load_config
from evaluation.reconstruction import psnr
from features.autoencoder import LatentDecoder, choose_vae, open_vae
from features.check import check_set, read_rows
from features.lightning import STATISTICS
from features.originals import find_originals
from features.store import find_features, read_description, size_note
from runtime.files import write_json
from runtime.process import configure_runtime, counted, resolve_device, run_cli
from runtime.untrusted import read_json_object
from sampling.flags import note_unused
from sampling.grid import GAP, class_labels, make_grid
from sampling.labels import read_labels

SHOWN = 10  # problems of a kind on the console; the report has all
MAX_ROWS = 10  # classes in the picture
BLURRED = 25  # dB, of a PSNR


def print_report(report):
    """Prints what was found, and the first problems of each kind."""
    facts, shown = report.facts, collections.Counter()
    if "samples" in facts:
        what = "moments" if facts["moments"] else "latents"
        print(
            f"{counted(facts['samples'], 'sample')} in {report.store.path}: "
            f"{what if report.samples['usable'].any() else f'expected {what}'} {facts['row_shape']} "
            f"{facts['dtype']}{', mirrored twins' if facts['flip'] else ''}"
        )
        if counts := [count for count in facts["class_counts"] if count]:
            least, most = f"{min(counts):,}", counted(max(counts), "sample")
            print(f"{counted(len(counts), 'class', 'classes')} with {least} to {most}")
        if "latents" in facts:
            numbers = "mean {mean:.4f}, standard deviation {std:.4f}".format(**facts["latents"])
            print(f"latents: {numbers}; {counted(facts['duplicates'], 'duplicate')}")
        if "encoder" in facts:
            print("encoder features: {tokens} tokens of width {width}, {dtype}".format(**facts["encoder"]))
        if facts["files_with_checksum"] is not None:
            print(f"{counted(facts['files_with_checksum'], 'file')} compared with the checksums")
        for note in report.notes:
            print(f"note: {note}")
    for problem in report.problems:
        shown[problem["kind"]] += 1
        if shown[problem["kind"]] <= SHOWN:
            print(f"problem: {problem['text']}")
    for kind, count in shown.items():
        if count > SHOWN:
            print(f"problem: {count - SHOWN} more of the kind {kind!r}, in the report")


def choose_samples(labels, usable, num_images):
    """Returns `(classes, samples)`: ids of up to `MAX_ROWS` classes, and rows of their samples, -1 for an empty place.

    `labels` and `usable` are `(N,)`, of all samples; about `num_images` are chosen.
    """
    shuffled = np.random.default_rng(0).permutation(np.flatnonzero(usable))
    present = np.unique(labels[shuffled])
    rows = min(MAX_ROWS, len(present), num_images)
    classes = present[np.linspace(0, len(present) - 1, rows).round().astype("int64")]
    of_class = [shuffled[labels[shuffled] == label] for label in classes]
    per_class = min(num_images // rows, max(map(len, of_class)))
    padded = [np.concatenate([found, np.full(per_class, -1)])[:per_class] for found in of_class]
    return classes.tolist(), np.stack(padded)


def save_picture(report, path, *, vae, num_images, device, data_path=None):
    """Decodes some samples into a PNG, one row a class: original, decoded and mirrored of each."""
    configure_runtime()
    import paddle

    paddle.set_device(resolve_device(device))
    facts, layout = report.facts, report.layout
    channels = facts["row_shape"][0] // (1 + facts["moments"])
    classes, samples = choose_samples(report.samples["label"], report.samples["usable"], num_images)
    chosen = samples[samples >= 0]  # row by row
    names = read_labels(layout.classes) if os.path.isfile(layout.classes) else {}
    originals, note = find_originals(report, chosen, names, data_path)

    rows = read_rows(report.store, chosen, facts)[0]
    made_with = read_description(layout.features_path, layout.name)["vae"]
    vae, notes = open_vae(vae, made_with, default=None, flag="--vae", channels=channels)
    decoder = LatentDecoder(vae)
    shown = {"decoded": decoder(paddle.to_tensor(rows[0][:, :channels]))}
    for mirrored in rows[1:]:
        shown["mirrored"] = decoder(paddle.to_tensor(mirrored[:, :channels]))
    if originals is not None:
        shown = {"original": originals, **shown}
        if originals.shape == shown["decoded"].shape:
            quality = psnr(originals, shown["decoded"])
            print(
                f"decoded against originals: PSNR {quality.mean():.1f} dB on average, {quality.min():.1f} dB at worst"
            )
            if quality.mean() < BLURRED:
                print("note: below 25 dB pictures are blurred; tools/train_vae.py can fit an autoencoder to them")
    for each in filter(None, [note, *notes]):
        print(f"note: {each}")
    place = np.cumsum(samples.reshape(-1) >= 0) - 1
    cells = [
        images[place[index]] if samples.flat[index] >= 0 else None
        for index in range(samples.size)
        for images in shown.values()
    ]
    columns = [*shown] * samples.shape[1]
    rows = class_labels(classes, names)
    make_grid(cells, len(columns), gap=GAP, row_labels=rows, column_labels=columns).save(path)


def own_vae(report):
    """Returns the features' own autoencoder if its folder is here; else says how a picture is to be had, if it is."""
    own = read_description(report.layout.features_path, report.layout.name)["vae"]
    try:
        name, _ = choose_vae(None, own, None, "--vae")
    except ValueError as error:
        print(f"note: no picture: {error}")
        return None
    if name is None or os.path.isdir(name):
        return name
    print(f"note: no picture, which may need a download: --vae {shlex.quote(name)}, the features' own autoencoder")
    return None


def write_statistics(report):
    """Adds mean and standard deviation by channel to the set's manifest, which is made if there is none."""
    wrong = {"latents", "finite", "moments", "pairs"} & {problem["kind"] for problem in report.problems}
    if wrong or "latents" not in report.facts:
        print("note: the statistics are not written, because not all latents are right")
        return
    path = report.layout.manifest
    if os.path.exists(table := os.path.join(report.layout.features_path, STATISTICS)):
        print(f"note: the statistics are not written, because the set has them in {table}")
        return
    manifest = read_json_object(path) if os.path.exists(path) else {"version": 1}
    write_json(path, {**manifest, **{key: report.facts["latents"][key] for key in ("channel_mean", "channel_std")}})
    print(f"statistics: {path}")


def output_files(path, folder, name, overwrite):
    """Returns `(report, picture)`: the files asked for, else free ones `NAME_check` in the folder of the features.

    They land in the working folder where that can't be written. A name that is taken, or no report's, is a ValueError.
    """
    if path is None:
        folder = folder if os.access(folder, os.W_OK) else "."
        stems = (os.path.join(folder, f"{name}_check{f'-{n}' if n > 1 else ''}") for n in itertools.count(1))
        both = ((f"{stem}.json", f"{stem}.png") for stem in stems)
        return next(files for files in both if not any(map(os.path.exists, files)))
    if not path.endswith(".json"):
        raise ValueError(f"--output {path}: expected a name that ends in .json")
    files = path, path.removesuffix(".json") + ".png"
    for taken in filter(os.path.exists, () if overwrite else files):
        raise ValueError(f"--output {path}: {taken} exists already; give another name, or --overwrite")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"--output {path}: there is no such folder")
    return files


def main(argv=None):
    parser = CommandParser(description=__doc__)
    add_set_flags(parser)
    parser.add_argument(
        "--config_file", metavar="FILE", help="config of the model to train: shape and classes [the manifest's]"
    )
    parser.add_argument(
        "--vae", check=VAE, help="AutoencoderKL folder or hub name, or ema or mse, of the picture [the manifest's]"
    )
    parser.add_argument(
        "--data_path",
        metavar="PATH",
        help="the images that were encoded, for the picture [where the extraction found them]",
    )
    parser.add_argument("--num_images", check=POSITIVE_INT, default=32, help="samples in the picture")
    parser.add_argument(
        "--output", metavar="FILE", help="report to write, JSON; the picture beside it [FEATURE_PATH/NAME_check.json]"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument(
        "--write_statistics",
        action="store_true",
        help="write mean and standard deviation by channel into NAME_manifest.json, for data.latent_normalization",
    )
    parser.add_argument("--no_checksums", action="store_true", help="don't compare the files with their checksums")
    parser.add_argument("--allow_duplicates", action="store_true", help="equal latents of one class are no problem")
    parser.add_argument(
        "--num_workers", check=POSITIVE_INT, default=os.cpu_count() or 1, help="processes [all cores: %(default)s]"
    )
    add_device_flag(parser)
    args = parser.parse_args(argv)
    check_vae(args.vae)
    check_paths(args, "config_file", "data_path")
    kind, name = find_features(args.feature_path, args.image_size or 256)
    if note := size_note(args.feature_path, name, args.image_size):
        print(f"note: {note}", flush=True)
    model = load_config(args.config_file)["model"] if args.config_file else None
    output, picture = output_files(args.output, args.feature_path, name, args.overwrite)
    options = {key: getattr(args, key) for key in ("num_workers", "no_checksums", "allow_duplicates")}
    report = check_set(args.feature_path, kind, name, model=model, **options)
    write_json(output, {**report.facts, "notes": report.notes, "problems": report.problems})
    print_report(report)
    print(f"report: {output}", flush=True)
    if args.write_statistics:
        write_statistics(report)
    if report.samples["usable"].any() and (args.vae or own_vae(report)):
        options = {"vae": args.vae, "data_path": args.data_path, "num_images": args.num_images}
        save_picture(report, picture, **options, device=args.device)
        print(f"picture: {picture}")
    else:
        note_unused(["data_path"] if args.data_path else [], "without a picture")
    if report.problems:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
