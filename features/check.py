"""What tools/check_features.py finds out about single samples: the part that runs in its worker processes."""

import hashlib
import os
from dataclasses import dataclass

import numpy as np

from features.image_source import MAX_LABEL
from features.packed import PackedStore
from features.pairs import NpyReader
from runtime.files import sha256_of_file
from runtime.process import counted, one_line


@dataclass(frozen=True)
class Expected:
    """What every sample is measured by.

    Attributes:
        row_shape: of a stored latent.
        dtype: its name.
        moments: whether a row is mean and standard deviation.
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

    def label_problem(self, label):
        """Says what is wrong with a label; None if nothing is."""
        most = MAX_LABEL if self.num_classes is None else self.num_classes - 1
        if not 0 <= label <= most:
            return f"label {label}, expected 0..{most}"
        return None


class Chunk:
    """What is found out about n neighbouring samples; small, for it travels between processes.

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
            right &= self._check(array, [lambda p=place, t=twin: source(p, t) for place in places.tolist()])
        self.usable[places] = right
        for place, row in zip(places.tolist(), rows[0], strict=True):
            content = hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=16).digest()
            self.digests[place] = np.frombuffer(content, "uint64")
        for array in rows[1:]:
            self.twins += int((array == rows[0]).all(axis=(1, 2, 3)).sum())

    def _check(self, rows, sources):
        rows = rows.astype("float32", copy=False)
        right = np.isfinite(rows).all(axis=(1, 2, 3))
        for place in np.flatnonzero(~right).tolist():
            wrong = counted((~np.isfinite(rows[place])).sum(), "number")
            self.problems.append(("finite", f"{sources[place]()}: {wrong} not finite"))
        if self.expected.moments:
            negative = right & ~(rows[:, self.expected.channels :] > 0).all(axis=(1, 2, 3))
            for place in np.flatnonzero(negative).tolist():
                self.problems.append(("moments", f"{sources[place]()}: a standard deviation is not above 0"))
            right &= ~negative
        rows = rows[right].astype("float64")
        mean, std = rows[:, : self.expected.channels], rows[:, self.expected.channels :]  # no std without moments
        self.sums[0] += mean.sum(axis=(0, 2, 3))
        self.sums[1] += np.square(mean).sum(axis=(0, 2, 3))
        if self.expected.moments:
            self.sums[2] += np.square(std).sum(axis=(0, 2, 3))
        self.count += mean.size // self.expected.channels
        return right

    def add_label(self, place, label):
        """Counts a label; ValueError if it is not one of the classes."""
        if 0 <= label <= MAX_LABEL:
            self.labels[place] = label
        problem = self.expected.label_problem(label)
        if problem:
            raise ValueError(problem)

    def problem(self, kind, path, error):
        text = one_line(error)
        self.problems.append((kind, text if path in text else f"{path}: {text}"))


def check_pairs(task):
    """A `Chunk` of pairs; task: (folders [features, labels, mirrored], file names, whether to hash, `Expected`)."""
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

    def load_label(path):
        label = load(path)
        if label.size != 1 or label.dtype.kind not in "iu":
            raise ValueError(f"expected one integer label, found {label.dtype} of shape {label.shape}")
        return int(label.reshape(-1)[0])

    def load_latent(path):
        latent = load(path)
        if latent.ndim == 4 and latent.shape[0] == 1:
            latent = latent[0]
        if latent.shape != expected.row_shape or latent.dtype.name != expected.dtype:
            raise ValueError(
                f"holds {latent.dtype} of shape {latent.shape}, expected {expected.dtype} of shape {expected.row_shape}"
            )
        return latent

    for place, name in enumerate(names):
        path = os.path.join(folders[1], name)
        try:
            chunk.add_label(place, load_label(path))
        except (ValueError, OSError) as error:
            chunk.problem("labels", path, error)
        for out, folder in zip(rows, latent_folders, strict=True):
            path = os.path.join(folder, name)
            try:
                out[place] = load_latent(path)
            except (ValueError, OSError) as error:
                chunk.problem("latents", path, error)
                whole[place] = False
    places = np.flatnonzero(whole)
    chunk.add(
        [out[places] for out in rows], places, lambda place, twin: os.path.join(latent_folders[twin], names[place])
    )
    return chunk


_stores = {}


def check_packed(task):
    """A `Chunk` of rows of a packed set; task: (folder, start, stop, `Expected`)."""
    folder, start, stop, expected = task
    if folder not in _stores:
        _stores[folder] = PackedStore(folder)
    store, indices = _stores[folder], np.arange(start, stop)
    chunk = Chunk(len(indices), expected)
    rows = [np.empty((len(indices), *store.row_shape), store.dtype) for _ in range(1 + store.has_flip)]
    for twin, out in enumerate(rows):
        labels = store.read(indices, out, np.full(len(indices), bool(twin)))
    for place, label in enumerate(labels.tolist()):
        try:
            chunk.add_label(place, label)
        except ValueError as error:
            chunk.problem("labels", store.label_source(start + place), error)
    files = ("latents.npy", "flipped.npy")
    chunk.add(rows, np.arange(len(indices)), lambda place, twin: store.source(start + place, files[twin]))
    return chunk


def hash_file(path):
    """sha256 of a file; None if it can't be read."""
    try:
        return sha256_of_file(path)
    except OSError:
        return None
