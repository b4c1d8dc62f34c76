"""The check of a whole feature set: every sample in worker processes, then counts, statistics and checksums."""

import contextlib
import hashlib
import math
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from features.autoencoder import LatentScaling
from features.check_samples import Expected, PackedSamples, PairSamples
from features.layout import Layout
from features.store import read_manifest
from runtime.files import sha256_of_file
from runtime.process import counted
from runtime.progress import tqdm

CHUNK_BYTES = 1 << 24  # of rows, a task of a worker process
STD_RANGE = (0.5, 2.0)


class Report:
    """The result of `check_set`.

    Attributes:
        problems: [(kind, one line), ...]. notes: sentences.
        samples: what was opened: `folder`, `size`, `has_flip`, `read_row(index, twin)`; None if nothing could be.
        expected: an `Expected`; None if there was nothing to look into. What follows is then empty, too.
        labels: `(N,)` int64, -1 where there is no valid one. usable: `(N,)` bool, the samples whose latents are right.
        class_counts: samples by label. duplicates: how many latents are there again.
        num_files: how many were compared with their checksums; None without.
        channel_mean, channel_std: of the latents (of moments, of their samples); mean and std over all channels.
    """

    def __init__(self, feature_path, name, format, manifest):
        self.feature_path, self.name, self.format, self.manifest = feature_path, name, format, manifest
        self.problems, self.notes = [], []
        self.samples = self.expected = self.class_counts = self.num_files = None
        self.labels, self.usable, self.duplicates = np.zeros(0, "int64"), np.zeros(0, bool), 0
        self.channel_mean = self.channel_std = self.mean = self.std = None

    def add(self, kind, path, text):
        """Adds a problem with the file or folder `path`."""
        self.problems.append((kind, f"{path}: {text}"))

    def as_json(self):
        """Returns the report as JSON values."""
        result = {"feature_path": self.feature_path, "name": self.name, "format": self.format}
        if self.expected:
            result.update(
                samples=self.samples.size,
                row_shape=list(self.expected.row_shape),
                dtype=self.expected.dtype,
                moments=self.expected.moments,
                flip=self.samples.has_flip,
                num_classes=self.expected.num_classes,
                labels={"min": int(self.labels.min()), "max": int(self.labels.max())},
                class_counts=self.class_counts.tolist(),
                duplicates=self.duplicates,
                files_with_checksum=self.num_files,
            )
            if self.mean is not None:
                channels = {key: getattr(self, key).tolist() for key in ("channel_mean", "channel_std")}
                result["latents"] = {"mean": self.mean, "std": self.std, **channels}
        problems = [{"kind": kind, "text": text} for kind, text in self.problems]
        return {**result, "notes": self.notes, "problems": problems}


def check_set(
    feature_path, kind, name, *, model=None, num_workers=1, compare_checksums=True, allow_duplicates=False
) -> Report:
    """Checks every sample of a set, in parallel.

    Args:
        feature_path, kind, name: the set, as `features.store.find_features` gives them.
        model: the `model` section of a config, for shape and classes; None: what the manifest says.
        num_workers: processes.
        compare_checksums: compare every file with its checksum, if the manifest names a file of them.
        allow_duplicates: equal latents of one class are no problem.

    Raises:
        ValueError: a broken manifest, or a worker process died.
    """
    report = Report(feature_path, name, kind, read_manifest(feature_path, name))
    try:
        samples = (PackedSamples if kind == "packed" else PairSamples)(report)
    except ValueError as error:
        report.problems.append(("format", str(error)))
        return report
    report.samples = samples
    if not samples.size or samples.first is None:
        report.add("format", samples.folder, "no readable sample in it")
        return report
    shape, dtype = samples.first
    if len(shape) != 3:
        report.add("format", samples.folder, f"holds rows of shape {shape}, expected (C, h, w)")
        return report
    report.expected = expected = _expect(report, shape, dtype, model)
    wanted = _read_checksums(report) if compare_checksums else None

    row_bytes = 4 * int(np.prod(expected.row_shape)) * (1 + samples.has_flip)
    size = max(1, min(CHUNK_BYTES // row_bytes, -(-samples.size // num_workers)))
    spans = [(start, min(start + size, samples.size)) for start in range(0, samples.size, size)]
    work, tasks = samples.tasks(spans, expected, wanted is not None)
    report.labels, report.usable = np.full(samples.size, -1), np.zeros(samples.size, bool)
    digests, files, chunks = np.zeros((samples.size, 2), "uint64"), {}, []
    try:
        with ProcessPoolExecutor(num_workers) as pool, tqdm(total=samples.size, desc="checking", unit="sample") as bar:
            if wanted is not None and kind == "packed":
                hashes = pool.map(_hash_file, [os.path.join(feature_path, name) for name in wanted])
            for (start, stop), chunk in zip(spans, pool.map(work, tasks), strict=True):
                report.problems += chunk.problems
                report.labels[start:stop], report.usable[start:stop] = chunk.labels, chunk.usable
                digests[start:stop] = chunk.digests
                files.update(chunk.files)
                chunks.append((chunk.sums, chunk.count, chunk.twins))
                bar.update(stop - start)
            if wanted is not None and kind == "packed":
                bar.set_description("checksums")
                files = dict(zip(wanted, hashes, strict=True))
    except BrokenProcessPool:
        raise ValueError("a process of the check died; was the memory full? Give a smaller --num_workers") from None
    sums, count, twins = (sum(values) for values in zip(*chunks, strict=True))
    _check_counts(report)
    _check_statistics(report, sums, count)
    _check_duplicates(report, digests, allow_duplicates)
    if twins and twins == report.usable.sum():
        report.add("mirrored", samples.folder, "every mirrored latent is the same as its original")
    if wanted is not None:
        report.num_files = len(wanted)
        _compare_checksums(report, wanted, files)
    return report


def _expect(report, row_shape, dtype, model):
    """Returns the `Expected` of a set: what the config says, else the manifest, else the first sample."""
    manifest, samples = report.manifest, report.samples
    sample_shape = manifest.get("sample_shape")
    if model:
        sample_shape = (model["in_channels"], model["sample_size"], model["sample_size"])
    moments = manifest.get("moments")
    if moments is None:
        moments = sample_shape is not None and row_shape[0] == 2 * sample_shape[0]
    expected_shape = tuple(row_shape)
    if sample_shape is not None:
        expected_shape = (sample_shape[0] * (1 + moments), *sample_shape[1:])
    num_classes = model["num_classes"] if model else manifest.get("num_classes")
    if num_classes is None:
        report.notes.append("the number of classes is not known: no --config_file, no manifest")
    if report.format == "packed" and expected_shape != row_shape:
        report.add("latents", samples.folder, f"holds latents of shape {row_shape}, expected {expected_shape}")
        expected_shape = row_shape
    return Expected(expected_shape, manifest.get("dtype", dtype), bool(moments), num_classes)


def _hash_file(path):
    with contextlib.suppress(OSError):
        return sha256_of_file(path)


def _check_counts(report):
    classes, manifest, has_flip = report.expected.num_classes, report.manifest, report.samples.has_flip
    report.class_counts = np.bincount(report.labels[report.labels >= 0], minlength=classes or 0)
    counts = report.class_counts[:classes]  # without labels that are none of the classes
    empty = int((counts == 0).sum())
    if empty:
        report.notes.append(f"{empty} of {counted(len(counts), 'class', 'classes')} have no sample")
    path, size = Layout(report.feature_path, report.name).manifest, report.samples.size
    if manifest.get("num_samples", size) != size:
        report.add("manifest", path, f"num_samples {manifest['num_samples']}, found {size}")
    # The config may have more classes than the set.
    used = np.trim_zeros(report.class_counts, "b").tolist()
    if np.trim_zeros(np.asarray(manifest.get("class_counts", used)), "b").tolist() != used:
        report.add("manifest", path, "class_counts are not those of the labels")
    if manifest.get("flip", has_flip) != has_flip:
        there = "there are" if has_flip else "there are no"
        report.add("manifest", path, f"flip {manifest['flip']}, {there} mirrored latents")


def _check_statistics(report, sums, count):
    """Fills in mean and standard deviation, which is about 1 if the latents are scaled."""
    if not count:
        return
    mean = sums[0] / count
    square = (sums[1] + sums[2]) / count  # of a posterior sample: mean**2 + std**2
    report.channel_mean, report.channel_std = mean, np.sqrt(np.maximum(square - mean**2, 0))
    report.mean = float(mean.mean())
    report.std = float(np.sqrt(max(square.mean() - report.mean**2, 0)))
    if STD_RANGE[0] <= report.std <= STD_RANGE[1]:
        return
    text = f"the latents' standard deviation is {report.std:.4g}, expected about 1"
    manifest = report.manifest if report.manifest.get("scaling_factor") else {"scaling_factor": 0.18215}  # SD's
    scaling = LatentScaling.of(manifest, channels=len(mean), source=Layout(report.feature_path, report.name).manifest)
    name = f"scaling factor {scaling.scaling_factor:g}" + ("" if scaling.is_plain else ", with shift or statistics,")
    # Mean and standard deviation of each channel, had they been scaled once more or less.
    ends = [np.reshape(value, (-1, 1, 1)) for value in (mean - report.channel_std, mean + report.channel_std)]
    for change, what in ((scaling.normalize, "is not in them"), (scaling.denormalize, "is in them twice")):
        low, high = map(change, ends)
        middle, half = (low + high) / 2, (high - low) / 2
        if STD_RANGE[0] <= math.sqrt(np.mean(half**2) + np.var(middle)) <= STD_RANGE[1]:
            text += f"; it looks as if the autoencoder's {name} {what}"
    report.add("scale", report.samples.folder, text)


def _check_duplicates(report, digests, allowed):
    usable, labels, source = np.flatnonzero(report.usable), report.labels, report.samples.source
    order = usable[np.lexsort((usable, digests[usable, 1], digests[usable, 0]))]
    again = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    report.duplicates = int(again.sum())
    first = None
    for place in np.flatnonzero(again).tolist():
        if first is None or not (digests[first] == digests[order[place]]).all():
            first = int(order[place])
        index = int(order[place + 1])
        text = f"is the same latent as {source(first)}"
        if labels[index] != labels[first]:
            text += f", but label {labels[index]}, there {labels[first]}"
        elif allowed:
            continue
        report.add("duplicates", source(index), text)


def _read_checksums(report):
    """Returns `{path under the folder: sha256}` of the manifest's checksum file; None if there is none to compare."""
    checksums = report.manifest.get("checksums")
    if checksums is None:
        report.notes.append("no checksums to compare: no manifest, or none in it")
        return None
    path = os.path.join(report.feature_path, checksums["file"])
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        report.add("checksums", path, error.strerror)
        return None
    if hashlib.sha256(data).hexdigest() != checksums["sha256"]:
        report.add("checksums", path, "is not the file that the manifest was written with")
    wanted = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        value, _, name = line.partition(b"  ")
        try:
            if line:
                wanted[os.fsdecode(name)] = bytes.fromhex(value.decode())
        except ValueError:
            report.add("checksums", path, f"line {number} is no checksum")
    return wanted


def _compare_checksums(report, wanted, files):
    for name in {**wanted, **files}:
        path = os.path.join(report.feature_path, name)
        if files.get(name) is None:
            report.add("checksums", path, "has a checksum, but is not there")
        elif name not in wanted:
            report.add("checksums", path, "has no checksum")
        elif files[name] != wanted[name]:
            report.add("checksums", path, "its checksum is another")
