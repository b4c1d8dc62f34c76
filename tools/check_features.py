"""Check a whole feature set, pairs of .npy files or packed, in parallel.

Checked: that every latent has its label (and its mirrored twin), shapes, dtypes, that all numbers are finite, labels
against the number of classes, mean and standard deviation of the latents (about 1 once the autoencoder's scaling factor
is in them), duplicates, and, where NAME_manifest.json is, its counts and the checksum of every file. With --vae some
samples are decoded into a picture, mirrored twins beside their originals.

Each problem is one line. The report, and the picture beside it, go to FEATURE_PATH/NAME_check.json (numbered if it is
there) unless --output names another file. Exit code: 0 all is well, 1 there are problems, 2 the check can't be done.
"""

import argparse
import hashlib
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import _root  # noqa: F401 (the project's root, on sys.path)

from runtime.process import counted, run_cli

CHUNK_BYTES = 1 << 24  # of rows, a task of a worker process
SHOWN = 10  # problems of a kind on the console; the report has all
STD_RANGE = (0.5, 2.0)
COLUMNS = 8


class Check:
    """The check of a set, and its report.

    Args:
        args: the command line's.
    """

    def __init__(self, args):
        import numpy as np

        from features.store import find_features, read_manifest

        self.args = args
        self.kind, self.name = find_features(args.feature_path, args.resolution)
        self.manifest = read_manifest(args.feature_path, self.name)
        self.problems, self.notes = [], []
        self.usable = np.zeros(0, bool)
        self.config = None
        if args.config_file:
            from config.schema import load_config

            self.config = load_config(args.config_file)["model"]

    def problem(self, kind, text):
        self.problems.append((kind, text))

    # What is there, and what is expected of it.

    def open(self):
        """Lists the samples; returns False if there is nothing to look into."""
        from features.packed import PackedStore, packed_folder
        from features.pairs import features_folder, labels_folder

        path = self.args.feature_path
        if self.kind == "packed":
            self.folder = packed_folder(path, self.name)
            try:
                self.store = PackedStore(self.folder)
            except ValueError as error:
                self.problem("format", str(error))
                return False
            self.size, self.has_flip = len(self.store), self.store.has_flip
            first = (self.store.row_shape, self.store.dtype.name)
        else:
            self.folder = features_folder(path, self.name)
            self.folders = [self.folder, labels_folder(path, self.name)]
            self.has_flip = os.path.isdir(self.folder + "_flip")
            if self.has_flip:
                self.folders.append(self.folder + "_flip")
            self.names = self._list_pairs()
            self.size = len(self.names)
            first = self._first_shape()
        if not self.size or first is None:
            self.problem("format", f"{self.folder}: no readable sample in it")
            return False
        if len(first[0]) != 3:
            self.problem("format", f"{self.folder}: holds rows of shape {first[0]}, expected (C, h, w)")
            return False
        self.expected = self._expect(*first)
        return True

    def _list_pairs(self):
        from features.pairs import natural_order

        found = []
        for folder in self.folders:
            if not os.path.isdir(folder):
                self.problem("pairs", f"{folder}: is missing")
                found.append(set())
                continue
            found.append({name for name in os.listdir(os.fsencode(folder)) if name.endswith(b".npy")})
        both = set.intersection(*found)
        for folder, names in zip(self.folders, found, strict=True):
            for name in natural_order(list(names - both)).tolist():
                for other, theirs in zip(self.folders, found, strict=True):
                    if name not in theirs:
                        path = os.path.join(folder, os.fsdecode(name))
                        self.problem("pairs", f"{path}: has no counterpart in {other}")
        return [os.fsdecode(name) for name in natural_order(list(both))]

    def _first_shape(self):
        from features.npy import load_npy

        for name in self.names[:1000]:
            try:
                array = load_npy(os.path.join(self.folder, name))
            except ValueError:
                continue
            if array.dtype.kind == "f" and array.ndim in (3, 4) and array.size:
                return (array.shape[1:] if array.ndim == 4 else array.shape), array.dtype.name
        return None

    def _expect(self, row_shape, dtype):
        from features.check import Expected

        model, manifest = self.config, self.manifest
        sample_shape = manifest.get("sample_shape")
        if model:
            sample_shape = (model["in_channels"], model["sample_size"], model["sample_size"])
        moments = manifest.get("moments")
        if moments is None:
            moments = sample_shape is not None and row_shape[0] == 2 * sample_shape[0]
        if sample_shape is not None:
            row_shape = (sample_shape[0] * (1 + moments), *sample_shape[1:])
        num_classes = model["num_classes"] if model else manifest.get("num_classes")
        if num_classes is None:
            self.notes.append("the number of classes is not known: no --config_file, no manifest")
        if self.kind == "packed" and (tuple(row_shape) != self.store.row_shape):
            self.problem(
                "latents", f"{self.folder}: holds latents of shape {self.store.row_shape}, expected {tuple(row_shape)}"
            )
            row_shape = self.store.row_shape
        return Expected(tuple(row_shape), manifest.get("dtype", dtype), bool(moments), num_classes)

    # The work.

    def run(self):
        """Checks everything; the results are in the attributes."""
        import numpy as np

        from features.check import check_packed, check_pairs, hash_file
        from runtime.progress import tqdm

        wanted = self._read_checksums()
        row_bytes = 4 * int(np.prod(self.expected.row_shape)) * (1 + self.has_flip)
        size = max(1, min(CHUNK_BYTES // row_bytes, -(-self.size // self.args.num_workers)))
        spans = [(start, min(start + size, self.size)) for start in range(0, self.size, size)]
        if self.kind == "packed":
            work = check_packed
            tasks = [(self.folder, start, stop, self.expected) for start, stop in spans]
        else:
            work, hashing = check_pairs, wanted is not None
            tasks = [(self.folders, self.names[start:stop], hashing, self.expected) for start, stop in spans]
        self.labels, self.usable = np.full(self.size, -1), np.zeros(self.size, bool)
        digests, sums, count, twins, files = (
            np.zeros((self.size, 2), "uint64"),
            np.zeros((3, self.expected.channels)),
            0,
            0,
            {},
        )
        with (
            ProcessPoolExecutor(self.args.num_workers) as pool,
            tqdm(total=self.size, desc="checking", unit="sample") as bar,
        ):
            if wanted is not None and self.kind == "packed":
                paths = [os.path.join(self.args.feature_path, name) for name in wanted]
                hashes = pool.map(hash_file, paths)
            for (start, stop), chunk in zip(spans, pool.map(work, tasks), strict=True):
                self.problems += chunk.problems
                self.labels[start:stop], self.usable[start:stop] = chunk.labels, chunk.usable
                digests[start:stop] = chunk.digests
                sums, count, twins = sums + chunk.sums, count + chunk.count, twins + chunk.twins
                files.update(chunk.files)
                bar.update(stop - start)
            if wanted is not None and self.kind == "packed":
                bar.set_description("checksums")
                files = dict(zip(wanted, hashes, strict=True))
        self._check_counts()
        self._check_statistics(sums, count)
        self._check_duplicates(digests, twins)
        self._check_files(wanted, files)

    def source(self, index):
        """Where the latent of a sample stands."""
        if self.kind == "packed":
            return self.store.feature_source(index)
        return os.path.join(self.folder, self.names[index])

    def _check_counts(self):
        import numpy as np

        classes = self.expected.num_classes
        self.histogram = np.bincount(self.labels[self.labels >= 0], minlength=classes or 0)
        counts = self.histogram[:classes]  # without labels that are none of the classes
        empty = int((counts == 0).sum())
        if empty:
            self.notes.append(f"{empty} of {counted(len(counts), 'class', 'classes')} have no sample")
        used = np.trim_zeros(self.histogram, "b").tolist()  # the config may have more classes than the set
        for key, found in (("num_samples", self.size), ("class_counts", used)):
            there = self.manifest.get(key, found)
            if key == "class_counts":
                there = np.trim_zeros(np.asarray(there), "b").tolist()
            if there != found:
                shown = (
                    f"{self.manifest[key]}, found {found}" if key == "num_samples" else "are not those of the labels"
                )
                self.problem("manifest", f"{self._manifest_path()}: {key} {shown}")
        if "flip" in self.manifest and self.manifest["flip"] != self.has_flip:
            there = "there are" if self.has_flip else "there are no"
            self.problem("manifest", f"{self._manifest_path()}: flip {self.manifest['flip']}, {there} mirrored latents")

    def _manifest_path(self):
        return os.path.join(self.args.feature_path, f"{self.name}_manifest.json")

    def _check_statistics(self, sums, count):
        import numpy as np

        from features.autoencoder import LatentScaling

        if not count:
            self.mean = self.std = None
            return
        mean = sums[0] / count
        square = (sums[1] + sums[2]) / count  # of a posterior sample: mean**2 + std**2
        self.channel_mean, self.channel_std = mean, np.sqrt(np.maximum(square - mean**2, 0))
        self.mean = float(mean.mean())
        self.std = float(np.sqrt(max(square.mean() - self.mean**2, 0)))
        if STD_RANGE[0] <= self.std <= STD_RANGE[1]:
            return
        text = f"{self.folder}: the latents' standard deviation is {self.std:.4g}, expected about 1"
        known = self.manifest if self.manifest.get("scaling_factor") else {"scaling_factor": 0.18215}  # SD's
        scaling = LatentScaling.of(known, channels=len(mean), source=self._manifest_path())
        name = f"scaling factor {scaling.scaling_factor:g}" + (
            "" if scaling.is_plain else ", with shift or statistics,"
        )
        # Mean and standard deviation of each channel, had they been scaled once more or less.
        ends = [np.reshape(value, (-1, 1, 1)) for value in (mean - self.channel_std, mean + self.channel_std)]
        for change, what in ((scaling.normalize, "is not in them"), (scaling.denormalize, "is in them twice")):
            low, high = map(change, ends)
            middle, half = (low + high) / 2, (high - low) / 2
            if STD_RANGE[0] <= math.sqrt(np.mean(half**2) + np.var(middle)) <= STD_RANGE[1]:
                text += f"; it looks as if the autoencoder's {name} {what}"
        self.problem("scale", text)

    def _check_duplicates(self, digests, twins):
        import numpy as np

        usable = np.flatnonzero(self.usable)
        order = usable[np.lexsort((usable, digests[usable, 1], digests[usable, 0]))]
        again = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
        self.duplicates = int(again.sum())
        first = None
        for place in np.flatnonzero(again).tolist():
            if first is None or not (digests[first] == digests[order[place]]).all():
                first = int(order[place])
            index = int(order[place + 1])
            text = f"{self.source(index)}: is the same latent as {self.source(first)}"
            if self.labels[index] != self.labels[first]:
                text += f", but label {self.labels[index]}, there {self.labels[first]}"
            elif self.args.allow_duplicates:
                continue
            self.problem("duplicates", text)
        if twins and twins == len(usable):
            self.problem("mirrored", f"{self.folder}: every mirrored latent is the same as its original")

    # Checksums.

    def _read_checksums(self):
        """`{path under the folder: sha256}` of the manifest's checksum file; None if there is none to check."""
        checksums = self.manifest.get("checksums")
        if checksums is None or self.args.no_checksums:
            if checksums is None:
                self.notes.append("no checksums to compare: no manifest, or none in it")
            return None
        path = os.path.join(self.args.feature_path, checksums["file"])
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            self.problem("checksums", f"{path}: {error.strerror}")
            return None
        if hashlib.sha256(data).hexdigest() != checksums["sha256"]:
            self.problem("checksums", f"{path}: is not the file that the manifest was written with")
        wanted = {}
        for number, line in enumerate(data.split(b"\n"), 1):
            value, _, name = line.partition(b"  ")
            try:
                if line:
                    wanted[os.fsdecode(name)] = bytes.fromhex(value.decode())
            except ValueError:
                self.problem("checksums", f"{path}: line {number} is no checksum")
        return wanted

    def _check_files(self, wanted, files):
        self.num_files = None if wanted is None else len(wanted)
        if wanted is None:
            return
        for name, value in wanted.items():
            found = files.pop(name, None)
            if found is None:
                self.problem(
                    "checksums", f"{os.path.join(self.args.feature_path, name)}: has a checksum, but is not there"
                )
            elif found != value:
                self.problem("checksums", f"{os.path.join(self.args.feature_path, name)}: its checksum is another")
        for name in files:
            self.problem("checksums", f"{os.path.join(self.args.feature_path, name)}: has no checksum")

    # Results.

    def report(self):
        """The report as JSON values."""
        result = {"feature_path": self.args.feature_path, "name": self.name, "format": self.kind}
        if hasattr(self, "histogram"):
            result.update(
                samples=self.size,
                row_shape=list(self.expected.row_shape),
                dtype=self.expected.dtype,
                moments=self.expected.moments,
                flip=self.has_flip,
                num_classes=self.expected.num_classes,
                labels={"min": int(self.labels.min()), "max": int(self.labels.max())},
                class_counts=self.histogram.tolist(),
                duplicates=self.duplicates,
                files_with_checksum=self.num_files,
            )
            if self.mean is not None:
                result["latents"] = {
                    "mean": self.mean,
                    "std": self.std,
                    "channel_mean": self.channel_mean.tolist(),
                    "channel_std": self.channel_std.tolist(),
                }
        result["notes"] = self.notes
        result["problems"] = [{"kind": kind, "text": text} for kind, text in self.problems]
        return result

    def summary(self):
        """Lines for the console, without the problems."""
        if not hasattr(self, "histogram"):
            return
        what = "moments" if self.expected.moments else "latents"
        if not self.usable.any():  # none has this shape
            what = f"expected {what}"
        print(
            f"{counted(self.size, 'sample')} in {self.folder}: {what} {self.expected.row_shape} {self.expected.dtype}"
            f"{', mirrored twins' if self.has_flip else ''}"
        )
        counts = self.histogram[self.histogram > 0]
        if len(counts):
            to = counted(counts.max(), "sample")
            print(f"{counted(len(counts), 'class', 'classes')} with {counts.min():,} to {to}")
        if self.mean is not None:
            again = counted(self.duplicates, "duplicate")
            print(f"latents: mean {self.mean:.4f}, standard deviation {self.std:.4f}; {again}")
        if self.num_files is not None:
            print(f"{counted(self.num_files, 'file')} compared with the checksums")
        for note in self.notes:
            print(f"note: {note}")

    def picture(self, path):
        """Decodes some samples, sorted by class, into a PNG; mirrored twins beside their originals."""
        import numpy as np

        usable = np.flatnonzero(self.usable)
        chosen = np.random.default_rng(0).permutation(usable)[: self.args.num_images]
        chosen = chosen[np.argsort(self.labels[chosen], kind="stable")]
        channels = self.expected.channels
        rows = [
            self._row(index, bool(twin))[:channels] for index in chosen.tolist() for twin in range(1 + self.has_flip)
        ]

        from runtime.process import configure_runtime, resolve_device

        configure_runtime()
        import paddle

        paddle.set_device(resolve_device(self.args.device))
        from config.schema import manifest_features
        from features.autoencoder import LatentDecoder, open_vae
        from sampling.grid import make_grid

        made_with = manifest_features(self.manifest, self._manifest_path())["vae"]
        vae, notes = open_vae(self.args.vae, made_with, default=None, flag="--vae", channels=channels)
        for note in notes:
            print(f"note: {note}")
        images = LatentDecoder(vae)(paddle.to_tensor(np.stack(rows)))
        make_grid(images, columns=min(COLUMNS, len(images))).save(path)

    def _row(self, index, twin):
        import numpy as np

        if self.kind == "packed":
            row = np.empty((1, *self.store.row_shape), "float32")
            self.store.read(np.array([index]), row, np.array([twin]))
            return row[0]
        from features.npy import load_npy

        array = load_npy(os.path.join(self.folder + ("_flip" if twin else ""), self.names[index]))
        return array.reshape(array.shape[-3:]).astype("float32")


def find_output(path, folder, name, overwrite):
    """The report's file: the one asked for, else a free `NAME_check.json` in the folder of the features.

    It lands in the working folder where that of the features can't be written.
    """
    if path is not None:
        if not path.endswith(".json"):
            raise ValueError(f"--output {path}: expected a name that ends in .json")
        for taken in (path, picture_path(path)):
            if os.path.exists(taken) and not overwrite:
                raise ValueError(f"--output {path}: {taken} exists already; give another name, or --overwrite")
        return path
    folder = folder if os.access(folder, os.W_OK) else "."
    path, number = os.path.join(folder, f"{name}_check.json"), 1
    while os.path.exists(path) or os.path.exists(picture_path(path)):
        number += 1
        path = os.path.join(folder, f"{name}_check-{number}.json")
    return path


def picture_path(report):
    return report[: -len(".json")] + ".png"


def check(args):
    from runtime.files import write_json

    for key in ("num_workers", "num_images"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key} {getattr(args, key)}: expected 1 or more")
    whole = Check(args)
    output = find_output(args.output, args.feature_path, whole.name, args.overwrite)
    if not os.path.isdir(os.path.dirname(os.path.abspath(output))):
        raise ValueError(f"--output {output}: there is no such folder")
    if whole.open():
        try:
            whole.run()
        except BrokenProcessPool:
            raise ValueError("a process of the check died; was the memory full? Give a smaller --num_workers") from None
    write_json(output, whole.report())
    whole.summary()
    shown = {}
    for kind, text in whole.problems:
        shown[kind] = shown.get(kind, 0) + 1
        if shown[kind] <= SHOWN:
            print(f"problem: {text}")
    for kind, count in shown.items():
        if count > SHOWN:
            print(f"problem: {count - SHOWN} more of the kind {kind!r}, in the report")
    print(f"report: {output}", flush=True)
    if args.vae and whole.usable.any():
        whole.picture(picture_path(output))
        print(f"picture: {picture_path(output)}")
    if whole.problems:
        sys.exit(1)


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
    check(parser.parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
