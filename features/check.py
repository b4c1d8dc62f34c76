"""The check of a whole feature set: every sample in worker processes, then counts, statistics and checksums."""

import contextlib
import hashlib
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from features.autoencoder import LatentScaling
from features.image_source import MAX_LABEL
from features.layout import Layout
from features.npy import load_npy
from features.packed import PackedStore
from features.pairs import NpyReader, match_pairs, read_label, without_batch_axis
from features.store import read_manifest
from runtime.files import sha256_of_file
from runtime.process import counted, one_line
from runtime.progress import tqdm

CHUNK_BYTES = 1 << 24  # of rows, a task of a worker process
STD_RANGE = (0.5, 2.0)
ROW_KINDS = ("latents", "flipped")
_shared = []  # what a worker process was started with: the store, a report's facts, whether pairs are hashed


@dataclass
class Report:
    """The result of `check_set`.

    Attributes:
        facts: JSON values that were found out; `samples` is among them if there was a sample to look into.
        store: what was opened, with `path`, `has_flip`, `row_shape`, `read` and `source` as of a `PackedStore`.
        labels: `(N,)` int64, -1 where there is no valid one. usable: `(N,)` bool, the samples whose latents are right.
        problems: [(kind, one line), ...]. notes: sentences.
    """

    manifest: dict
    layout: Layout
    facts: dict
    store: Any = None
    labels: Any = None
    usable: Any = None
    notes: list = field(default_factory=list)
    problems: list = field(default_factory=list)

    def add(self, kind, path, text):
        """Adds a problem with the file or folder `path`."""
        self.problems.append((kind, f"{path}: {text}"))

    def as_json(self):
        problems = [{"kind": kind, "text": text} for kind, text in self.problems]
        return {**self.facts, "notes": self.notes, "problems": problems}


class Pairs:
    """The pairs of files whose counterparts are there, as a store; `lonely` are the other files, of `match_pairs`."""

    def __init__(self, layout):
        self.path, self.has_flip = layout.features, os.path.isdir(layout.flipped)
        self._folders = {"latents": layout.features, "labels": layout.labels}
        if self.has_flip:
            self._folders["flipped"] = layout.flipped
        self._names, self.lonely = match_pairs([*self._folders.values()])
        self.row_shape = self.dtype = None
        for index in range(min(1000, len(self))):
            with contextlib.suppress(ValueError):
                latent = without_batch_axis(load_npy(self.source(index)))
                if latent.dtype.kind == "f" and latent.ndim == 3 and latent.size:
                    self.row_shape, self.dtype = latent.shape, latent.dtype
                    break

    def __len__(self):
        return len(self._names)

    def source(self, index, kind="latents"):
        return os.path.join(self._folders[kind], os.fsdecode(self._names[index]))

    def read(self, indices, out, mirrored):
        for place, index in enumerate(indices):
            path = self.source(index, "flipped" if mirrored[place] else "latents")
            out[place] = without_batch_axis(load_npy(path))


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
    layout = Layout(feature_path, name)
    facts = {"feature_path": feature_path, "name": name, "format": kind}
    report = Report(read_manifest(feature_path, name), layout, facts)
    try:
        report.store = store = PackedStore(layout.packed) if kind == "packed" else Pairs(layout)
        for path, other in getattr(store, "lonely", ()):
            report.add("pairs", path, f"has no counterpart in {other}")
        if not len(store) or store.row_shape is None:
            raise ValueError(f"{store.path}: no readable sample in it")
        if len(store.row_shape) != 3:
            raise ValueError(f"{store.path}: holds rows of shape {store.row_shape}, expected (C, h, w)")
    except (ValueError, OSError) as error:
        report.problems.append(("format", one_line(error)))
        return report
    _expect(report, model)
    wanted = _read_checksums(report) if compare_checksums else None

    size = len(store)
    row_bytes = 4 * math.prod(facts["row_shape"]) * (1 + store.has_flip)
    step = max(1, min(CHUNK_BYTES // row_bytes, -(-size // num_workers)))
    shared = store, facts, wanted is not None
    fork = multiprocessing.get_context("fork")  # because a store is shared, not sent
    chunks, files = [], {}
    try:
        with (
            ProcessPoolExecutor(num_workers, fork, _shared.extend, [shared]) as pool,
            tqdm(total=size, desc="checking", unit="sample") as bar,
        ):
            for chunk in pool.map(check_span, [range(size)[start:][:step] for start in range(0, size, step)]):
                report.problems += chunk.problems
                files.update(chunk.files)
                chunk.problems = chunk.files = None  # they take the most memory, and stand in the report
                chunks.append(chunk)
                bar.update(len(chunk.labels))
            if wanted is not None and kind == "packed":
                bar.set_description("checksums")
                paths = [os.path.join(feature_path, name) for name in wanted]
                files = dict(zip(wanted, pool.map(_hash_file, paths), strict=True))
    except BrokenProcessPool:
        raise ValueError("a process of the check died; was the memory full? Give a smaller --num_workers") from None
    report.labels, report.usable, digests = (
        np.concatenate([getattr(chunk, key) for chunk in chunks]) for key in ("labels", "usable", "digests")
    )
    _check_counts(report)
    _check_duplicates(report, digests, allow_duplicates)
    facts["files_with_checksum"] = None if wanted is None else len(wanted)
    sums, count, twins = (sum(getattr(chunk, key) for chunk in chunks) for key in ("sums", "count", "twins"))
    _check_statistics(report, sums, count)
    if twins and twins == report.usable.sum():
        report.add("mirrored", store.path, "every mirrored latent is the same as its original")
    if wanted is not None:
        _compare_checksums(report, wanted, files)
    return report


def _expect(report, model):
    """Notes shape and classes of every sample: what the config says, else the manifest, else the first sample."""
    manifest, store = report.manifest, report.store
    shape, num_classes = manifest.get("sample_shape"), manifest.get("num_classes")
    if model:
        shape = (model["in_channels"], model["sample_size"], model["sample_size"])
        num_classes = model["num_classes"]
    moments = manifest.get("moments")
    if moments is None:
        moments = shape is not None and store.row_shape[0] == 2 * shape[0]
    row_shape = store.row_shape if shape is None else (shape[0] * (1 + moments), *shape[1:])
    if num_classes is None:
        report.notes.append("the number of classes is not known: no --config_file, no manifest")
    if report.facts["format"] == "packed" and row_shape != store.row_shape:
        report.add("latents", store.path, f"holds latents of shape {store.row_shape}, expected {row_shape}")
        row_shape = store.row_shape
    report.facts.update(
        samples=len(store),
        row_shape=row_shape,
        dtype=manifest.get("dtype", store.dtype.name),
        moments=bool(moments),
        flip=store.has_flip,
        num_classes=num_classes,
    )


# ---------------------------------------------------------------------------------------------------------------------
# In a worker process
# ---------------------------------------------------------------------------------------------------------------------


class Chunk:
    """The findings on n neighbouring samples; small, because it travels between processes.

    Attributes:
        problems, labels, usable: as of a `Report`.
        digests: `(n, 2)` uint64 of the latents; twins: how many mirrored latents are their originals.
        sums: `(2, C)` float64: of x and of x**2, with moments of mean**2 + std**2; count: numbers a channel in them.
        files: `{path under the feature folder: sha256}` of the pairs' files.
    """

    def __init__(self, size, channels):
        self.problems, self.files = [], {}
        self.labels, self.usable = np.full(size, -1), np.ones(size, bool)
        self.digests, self.twins = np.zeros((size, 2), "uint64"), 0
        self.sums, self.count = np.zeros((2, channels)), 0

    def add(self, kind, path, text):
        self.problems.append((kind, text if path in text else f"{path}: {text}"))


def check_span(span):
    """Returns the `Chunk` of a range of samples."""
    indices, (store, facts, hashing) = np.array(span), _shared
    channels = facts["row_shape"][0] // (1 + facts["moments"])  # that a model sees
    chunk, kinds = Chunk(len(indices), channels), ROW_KINDS[: 1 + store.has_flip]
    rows = [np.empty((len(indices), *facts["row_shape"]), "float32") for _ in kinds]
    if isinstance(store, Pairs):
        labels = _read_pairs(store, indices, rows, facts, chunk, hashing)
    else:
        for twin, out in enumerate(rows):
            labels = store.read(indices, out, np.full(len(indices), bool(twin))).tolist()
    last = MAX_LABEL if facts["num_classes"] is None else facts["num_classes"] - 1
    for place, label in enumerate(labels):
        if label is not None and not 0 <= label <= last:
            chunk.add("labels", store.source(indices[place], "labels"), f"label {label}, expected 0..{last}")
        if label is not None and 0 <= label <= MAX_LABEL:
            chunk.labels[place] = label

    places = np.flatnonzero(chunk.usable)
    rows = [array[places] for array in rows]
    for place, row in zip(places, rows[0], strict=True):
        chunk.digests[place] = np.frombuffer(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), "uint64")
    for kind, array in zip(kinds, rows, strict=True):
        bad = (~np.isfinite(array)).sum(axis=(1, 2, 3))
        for row in np.flatnonzero(bad):
            chunk.add("finite", store.source(indices[places[row]], kind), f"{counted(bad[row], 'number')} not finite")
        positive = (array[:, channels:] > 0).all(axis=(1, 2, 3))  # of no number without moments
        for row in np.flatnonzero((bad == 0) & ~positive):
            chunk.add("moments", store.source(indices[places[row]], kind), "a standard deviation is not above 0")
        good = (bad == 0) & positive
        chunk.usable[places] &= good
        values = array[good].astype("float64")
        chunk.sums[0] += values[:, :channels].sum(axis=(0, 2, 3))
        chunk.sums[1] += np.square(values).sum(axis=(0, 2, 3)).reshape(-1, channels).sum(axis=0)
        chunk.count += values[:, 0].size
        if kind == "flipped":
            chunk.twins = int((array == rows[0]).all(axis=(1, 2, 3)).sum())
    return chunk


def _read_pairs(store, indices, rows, facts, chunk, hashing):
    """Puts latents into `rows` and returns labels, None for an unreadable one; what is wrong goes to the chunk."""
    reader, labels = NpyReader(), [None] * len(indices)
    for place, index in enumerate(indices):
        for kind, out in zip(("labels", *ROW_KINDS), (labels, *rows), strict=False):
            path = store.source(index, kind)
            try:
                data = Path(path).read_bytes()
                if hashing:
                    folder, name = os.path.split(path)
                    chunk.files[f"{os.path.basename(folder)}/{name}"] = hashlib.sha256(data).digest()
                array = reader.parse(data, path)
                if kind == "labels":
                    labels[place] = read_label(array)
                    continue
                latent = without_batch_axis(array)
                if latent.shape != facts["row_shape"] or latent.dtype.name != facts["dtype"]:
                    holds = f"holds {latent.dtype} of shape {latent.shape}"
                    raise ValueError(f"{holds}, expected {facts['dtype']} of shape {facts['row_shape']}")
                out[place] = latent
            except (ValueError, OSError) as error:
                chunk.add("labels" if kind == "labels" else "latents", path, one_line(error))
                chunk.usable[place] &= kind == "labels"
    return labels


def _hash_file(path):
    with contextlib.suppress(OSError):
        return sha256_of_file(path)


# ---------------------------------------------------------------------------------------------------------------------
# Over all samples
# ---------------------------------------------------------------------------------------------------------------------


def _check_counts(report):
    facts, manifest, valid = report.facts, report.manifest, report.labels[report.labels >= 0]
    all_counts = np.bincount(valid, minlength=facts["num_classes"] or 0)
    facts["labels"] = {"min": int(report.labels.min()), "max": int(report.labels.max())}
    facts["class_counts"] = all_counts.tolist()
    counts = all_counts[: facts["num_classes"]]  # without labels that are none of the classes
    empty = int((counts == 0).sum())
    if empty:
        report.notes.append(f"{empty} of {counted(len(counts), 'class', 'classes')} have no sample")
    path, size, has_flip = report.layout.manifest, facts["samples"], facts["flip"]
    if manifest.get("num_samples", size) != size:
        report.add("manifest", path, f"num_samples {manifest['num_samples']}, found {size}")
    # The config may have more classes than the set.
    used = np.trim_zeros(all_counts, "b").tolist()
    if np.trim_zeros(np.asarray(manifest.get("class_counts", used)), "b").tolist() != used:
        report.add("manifest", path, "class_counts are not those of the labels")
    if manifest.get("flip", has_flip) != has_flip:
        there = "there are" if has_flip else "there are no"
        report.add("manifest", path, f"flip {manifest['flip']}, {there} mirrored latents")


def _check_statistics(report, sums, count):
    """Notes mean and standard deviation, which is about 1 if the latents are scaled."""
    if not count:
        return
    mean, square = sums / count  # with moments the square of a posterior sample
    channel_std = np.sqrt(np.maximum(square - mean**2, 0))
    std = float(np.sqrt(max(square.mean() - mean.mean() ** 2, 0)))
    report.facts["latents"] = {
        **{"mean": float(mean.mean()), "std": std},
        **{"channel_mean": mean.tolist(), "channel_std": channel_std.tolist()},
    }
    if STD_RANGE[0] <= std <= STD_RANGE[1]:
        return
    text = f"the latents' standard deviation is {std:.4g}, expected about 1"
    manifest = report.manifest if report.manifest.get("scaling_factor") else {"scaling_factor": 0.18215}  # SD's
    scaling = LatentScaling.of(manifest, channels=len(mean), source=report.layout.manifest)
    name = f"scaling factor {scaling.scaling_factor:g}" + ("" if scaling.is_plain else ", with shift or statistics,")
    # Mean and standard deviation of each channel, had they been scaled once more or less.
    ends = [np.reshape(value, (-1, 1, 1)) for value in (mean - channel_std, mean + channel_std)]
    for change, what in ((scaling.normalize, "is not in them"), (scaling.denormalize, "is in them twice")):
        low, high = map(change, ends)
        if STD_RANGE[0] <= math.sqrt(np.mean(((high - low) / 2) ** 2) + np.var((low + high) / 2)) <= STD_RANGE[1]:
            text += f"; it looks as if the autoencoder's {name} {what}"
    report.add("scale", report.store.path, text)


def _check_duplicates(report, digests, allowed):
    usable, labels, source = np.flatnonzero(report.usable), report.labels, report.store.source
    _, first, group = np.unique(digests[usable], axis=0, return_index=True, return_inverse=True)
    first = usable[first[group.reshape(-1)]]  # the first sample with this one's latent
    report.facts["duplicates"] = int((first != usable).sum())
    for index, other in zip(usable[first != usable], first[first != usable], strict=True):
        text = f"is the same latent as {source(other)}"
        if labels[index] != labels[other]:
            report.add("duplicates", source(index), f"{text}, but label {labels[index]}, there {labels[other]}")
        elif not allowed:
            report.add("duplicates", source(index), text)


def _read_checksums(report):
    """Returns `{path under the folder: sha256}` of the manifest's checksum file; None if there is none to compare."""
    checksums = report.manifest.get("checksums")
    if checksums is None:
        report.notes.append("no checksums to compare: no manifest, or none in it")
        return None
    path = os.path.join(report.layout.features_path, checksums["file"])
    try:
        data = Path(path).read_bytes()
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
        path = os.path.join(report.layout.features_path, name)
        if files.get(name) is None:
            report.add("checksums", path, "has a checksum, but is not there")
        elif name not in wanted:
            report.add("checksums", path, "has no checksum")
        elif files[name] != wanted[name]:
            report.add("checksums", path, "its checksum is another")
