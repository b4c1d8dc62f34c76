"""The samples of a set that is checked: either format, looked into by worker processes."""

import functools
import hashlib
import os
from dataclasses import dataclass

import numpy as np

from features.image_source import MAX_LABEL
from features.layout import Layout
from features.npy import load_npy
from features.packed import PackedStore
from features.pairs import NpyReader, match_pairs, read_label, without_batch_axis
from runtime.process import counted, one_line


@dataclass(frozen=True)
class Expected:
    """The shape and values that every sample must have.

    Attributes:
        row_shape: of a stored latent. dtype: its name. moments: a row is mean and standard deviation.
        num_classes: None if nobody knows.
    """

    row_shape: tuple
    dtype: str
    moments: bool
    num_classes: int | None

    @property
    def channels(self):
        """Latent channels that a model sees."""
        return self.row_shape[0] // (2 if self.moments else 1)


class PackedSamples:
    def __init__(self, report):
        self.folder = Layout(report.feature_path, report.name).packed
        self.store = PackedStore(self.folder)
        self.size, self.has_flip = len(self.store), self.store.has_flip
        self.first = self.store.row_shape, self.store.dtype.name
        self.source = self.store.source

    def tasks(self, spans, expected, hashing):
        return check_packed, [(self.folder, start, stop, expected) for start, stop in spans]

    def read_row(self, index, twin):
        row = np.empty((1, *self.store.row_shape), "float32")
        self.store.read(np.array([index]), row, np.array([twin]))
        return row[0]


class PairSamples:
    """The pairs of files whose counterparts are there; the others are problems of the report."""

    def __init__(self, report):
        layout = Layout(report.feature_path, report.name)
        self.folder, self.has_flip = layout.features, os.path.isdir(layout.flipped)
        self.folders = [layout.features, layout.labels, *([layout.flipped] if self.has_flip else [])]
        if not os.path.isdir(layout.labels):
            raise ValueError(f"{layout.labels}: is missing")
        names, lonely = match_pairs(self.folders)
        for path, other in lonely:
            report.add("pairs", path, f"has no counterpart in {other}")
        self.names = [os.fsdecode(name) for name in names]
        self.size = len(self.names)
        self.first = self._first()

    def _first(self):
        for index in range(min(1000, self.size)):
            try:
                array = without_batch_axis(load_npy(self.source(index)))
            except ValueError:
                continue
            if array.dtype.kind == "f" and array.ndim == 3 and array.size:
                return array.shape, array.dtype.name
        return None

    def source(self, index):
        return os.path.join(self.folder, self.names[index])

    def tasks(self, spans, expected, hashing):
        return check_pairs, [(self.folders, self.names[start:stop], hashing, expected) for start, stop in spans]

    def read_row(self, index, twin):
        path = os.path.join(self.folder + ("_flip" if twin else ""), self.names[index])
        return without_batch_axis(load_npy(path)).astype("float32")


class Chunk:
    """The findings on n neighbouring samples; small, because it travels between processes.

    Attributes:
        problems: [(kind, line), ...].
        labels: `(n,)` int64, -1 where there is none, or none from 0 on.
        usable: `(n,)` bool, the samples with whole and finite latents.
        digests: `(n, 2)` uint64 of the latents; twins: how many mirrored latents are their originals.
        sums: `(3, C)` float64: of x, of x**2, and with moments of std**2; count: numbers a channel in them.
        files: `{path under the feature folder: sha256}` of the files read.
    """

    def __init__(self, size, expected):
        self.expected = expected
        self.problems, self.files = [], {}
        self.labels, self.usable = np.full(size, -1), np.zeros(size, bool)
        self.digests, self.twins = np.zeros((size, 2), "uint64"), 0
        self.sums, self.count = np.zeros((3, expected.channels)), 0

    def add(self, rows, places, source):
        """Looks into rows.

        Args:
            rows: `[latents (m, R, h, w), mirrored latents]`, the latter if there are any.
            places: `(m,)`, which of the chunk's samples they are.
            source: `source(place, twin)` says where a latent stands.
        """
        right = np.ones(len(places), bool)
        for twin, array in enumerate(rows):
            right &= self._check(array, lambda row, twin=twin: source(places[row], twin))
        self.usable[places] = right
        for place, row in zip(places.tolist(), rows[0], strict=True):
            self.digests[place] = np.frombuffer(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), "uint64")
        for array in rows[1:]:
            self.twins += int((array == rows[0]).all(axis=(1, 2, 3)).sum())

    def _check(self, rows, source):
        rows, channels = rows.astype("float32", copy=False), self.expected.channels
        right = np.isfinite(rows).all(axis=(1, 2, 3))
        for row in np.flatnonzero(~right):
            wrong = counted((~np.isfinite(rows[row])).sum(), "number")
            self.problems.append(("finite", f"{source(row)}: {wrong} not finite"))
        if self.expected.moments:
            negative = right & ~(rows[:, channels:] > 0).all(axis=(1, 2, 3))
            for row in np.flatnonzero(negative):
                self.problems.append(("moments", f"{source(row)}: a standard deviation is not above 0"))
            right &= ~negative
        rows = rows[right].astype("float64")
        mean, std = rows[:, :channels], rows[:, channels:]  # no std without moments
        self.sums[0] += mean.sum(axis=(0, 2, 3))
        self.sums[1] += np.square(mean).sum(axis=(0, 2, 3))
        if self.expected.moments:
            self.sums[2] += np.square(std).sum(axis=(0, 2, 3))
        self.count += mean.size // channels
        return right

    def add_label(self, place, label):
        """Counts a label; ValueError if it is not one of the classes."""
        if 0 <= label <= MAX_LABEL:
            self.labels[place] = label
        last = MAX_LABEL if self.expected.num_classes is None else self.expected.num_classes - 1
        if not 0 <= label <= last:
            raise ValueError(f"label {label}, expected 0..{last}")

    def problem(self, kind, path, error):
        """Adds an error as a problem with the file `path`."""
        text = one_line(error)
        self.problems.append((kind, text if path in text else f"{path}: {text}"))


def check_pairs(task):
    """Returns the `Chunk` of some pairs.

    Args:
        task: (folders [features, labels, mirrored], file names, whether to hash the files, `Expected`).
    """
    folders, names, hashing, expected = task
    chunk, reader = Chunk(len(names), expected), NpyReader()
    latent_folders = [folders[0], *folders[2:]]
    rows = [np.empty((len(names), *expected.row_shape), "float32") for _ in latent_folders]
    whole = np.ones(len(names), bool)

    def load(path):
        with open(path, "rb", buffering=0) as file:
            data = file.read()
        if hashing:
            folder, name = os.path.split(path)
            chunk.files[f"{os.path.basename(folder)}/{name}"] = hashlib.sha256(data).digest()
        return reader.parse(data, path)

    for place, name in enumerate(names):
        path = os.path.join(folders[1], name)
        try:
            chunk.add_label(place, read_label(load(path), path))
        except (ValueError, OSError) as error:
            chunk.problem("labels", path, error)
        for out, folder in zip(rows, latent_folders, strict=True):
            path = os.path.join(folder, name)
            try:
                latent = without_batch_axis(load(path))
                if latent.shape != expected.row_shape or latent.dtype.name != expected.dtype:
                    holds = f"holds {latent.dtype} of shape {latent.shape}"
                    raise ValueError(f"{holds}, expected {expected.dtype} of shape {expected.row_shape}")
                out[place] = latent
            except (ValueError, OSError) as error:
                chunk.problem("latents", path, error)
                whole[place] = False
    places = np.flatnonzero(whole)
    chunk.add(
        [out[places] for out in rows], places, lambda place, twin: os.path.join(latent_folders[twin], names[place])
    )
    return chunk


_open_packed = functools.lru_cache(1)(PackedStore)  # once in each worker process


def check_packed(task):
    """Returns the `Chunk` of some rows of a packed set; task: (folder, start, stop, `Expected`)."""
    folder, start, stop, expected = task
    store, indices = _open_packed(folder), np.arange(start, stop)
    chunk = Chunk(len(indices), expected)
    rows = [np.empty((len(indices), *store.row_shape), store.dtype) for _ in range(1 + store.has_flip)]
    for twin, out in enumerate(rows):
        labels = store.read(indices, out, np.full(len(indices), bool(twin)))
    for place, label in enumerate(labels.tolist()):
        try:
            chunk.add_label(place, label)
        except ValueError as error:
            chunk.problem("labels", store.source(start + place, "labels"), error)
    kinds = ("latents", "flipped")
    chunk.add(rows, np.arange(len(indices)), lambda place, twin: store.source(start + place, kinds[twin]))
    return chunk
