"""PaddleMIX's layout: one pair of `.npy` files a sample, and an index that spares listing millions of them.

    FEATURE_PATH/NAME_features/*.npy         latents (1, C, h, w) or (C, h, w), times the autoencoder's scaling factor;
                                             with moments (1, 2C, h, w): mean, then standard deviation
    FEATURE_PATH/NAME_features_flip/*.npy    only with mirrored twins: the same names
    FEATURE_PATH/NAME_labels/*.npy           the same names: one class id
    FEATURE_PATH/NAME_encoder/*.npy          only with encoder features, float16 (tokens, width): the same names
    FEATURE_PATH/NAME_encoder_flip/*.npy     with both
    FEATURE_PATH/NAME_index.npz              the sorted names; written here, if there are MIN_SAMPLES_FOR_INDEX

The index is made anew when a folder has changed since (its times and inode), and may be deleted at any time.
"""

import contextlib
import itertools
import os
import re
import stat
import time

import numpy as np

from features.layout import Layout
from features.npy import load_npy, load_npz
from runtime.files import whole_file
from runtime.progress import tqdm

MIN_SAMPLES_FOR_INDEX = 20_000
_MAX_BYTES = 1 << 30  # of a file that is read at once
# mtime is coarse: a folder that was modified in the last two seconds may change again with the same mtime.
_CLOCK_NS = 2_000_000_000


def without_batch_axis(latent):
    """Returns a stored latent as `(C, h, w)`, which may be `(1, C, h, w)` in its file."""
    return latent[0] if latent.ndim == 4 and latent.shape[0] == 1 else latent


def read_label(array, path):
    """Returns the one integer of a label's file; ValueError if it holds something else."""
    if array.size != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected one integer label, found {array.dtype} of shape {array.shape}")
    return int(array.reshape(-1)[0])


class NpyReader:
    """Reads `.npy` files that are mostly alike: a header seen before is not parsed again, which is most of the time."""

    def __init__(self):
        self._known = None  # (header, where the array ends, dtype, shape), replaced as a whole: threads share it

    def __call__(self, path):
        """Returns the array of a file, perhaps read-only; raises as `load_npy`."""
        data = b""
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                state = os.fstat(descriptor)
                if stat.S_ISREG(state.st_mode) and state.st_size <= _MAX_BYTES:  # no pipe, which may never end
                    data = os.read(descriptor, state.st_size)
            finally:
                os.close(descriptor)
        return self.parse(data, path)

    def parse(self, data, path):
        """Returns the array in the bytes of a file, whatever stands behind it; raises as `load_npy`."""
        known = self._known
        if known is not None and len(data) >= known[1] and data.startswith(known[0]):
            header, end, dtype, shape = known
            return np.frombuffer(data[:end], dtype, offset=len(header)).reshape(shape)
        if not data:
            return load_npy(path)  # says what is wrong
        array = load_npy(path, mapped=True)
        if array.size and array.flags.c_contiguous:
            self._known = data[: array.offset], array.offset + array.nbytes, array.dtype, array.shape
        return np.array(array)


def natural_order(names):
    """Returns the names of `.npy` files, bytes `(N,)`, sorted as people count: `2.npy` before `10.npy`."""
    stems = [name[: -len(b".npy")] for name in names]
    if names and all(map(bytes.isdigit, stems)) and max(map(len, stems)) < 19:
        names = np.array(names)
        return names[np.lexsort((names, np.array(stems).astype("int64")))]

    def key(name):
        parts = re.split(r"(\d+)", os.fsdecode(name))  # text, digits, text, ...
        return [int(part) if place % 2 else part for place, part in enumerate(parts)], name

    return np.array(sorted(names, key=key), dtype=bytes)


def match_pairs(folders):
    """Returns `(names of the .npy files that are in every folder, [(other file, folder that lacks it), ...])`.

    The names are bytes `(N,)`, in `natural_order`, as the other files are. ValueError if the first folder has none.
    """
    found = [{name for name in os.listdir(os.fsencode(folder)) if name.endswith(b".npy")} for folder in folders]
    if not found[0]:
        raise ValueError(f"{folders[0]}: no .npy file in it")
    lonely = [
        (os.path.join(folder, os.fsdecode(name)), other)
        for (folder, names), (other, theirs) in itertools.permutations(zip(folders, found, strict=True), 2)
        for name in natural_order(list(names - theirs)).tolist()
    ]
    return natural_order(list(set.intersection(*found))), lonely


class PairStore:
    """The pairs of the set `name` in the folder `feature_path`, read file by file in any order.

    `index_note` says where the index lies, or why there is none (None: a set too small to need one). ValueError names
    a folder without pairs, or a file without its counterpart.
    """

    reads_in_processes = True

    def __init__(self, feature_path, name):
        layout = Layout(feature_path, name)
        self.path, self.has_flip = layout.features, os.path.isdir(layout.flipped)
        if not os.path.isdir(layout.labels):
            raise ValueError(f"{self.path}: its labels folder {layout.labels} is missing")
        flipped = {"flipped": layout.flipped} if self.has_flip else {}
        self._kinds = {"latents": layout.features, "labels": layout.labels, **flipped}
        self.index_path, self.index_note = layout.index, None
        self._read_feature, self._read_label = NpyReader(), NpyReader()
        # They change with the names in a folder.
        self._signatures = [[s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in map(os.stat, self._kinds.values())]
        self._labels = None
        self._open()

    def _open(self):
        """Finds the names, and shape and dtype of a row."""
        if not self._load_index():
            self._names, lonely = match_pairs([*self._kinds.values()])
            if lonely:
                raise ValueError("{}: has no counterpart in {}".format(*lonely[0]))
            self._save_index()
        first = without_batch_axis(self._read_feature(self.source(0)))
        self.row_shape, self.dtype = first.shape, first.dtype
        self.expected = f"the first sample is of shape {self.row_shape}"  # completes the error on another shape

    def _load_index(self):
        """Takes the names from the index; returns False if it is not there, or not of these very folders."""
        with contextlib.suppress(OSError, ValueError, KeyError):  # no index, or a broken one
            index = load_npz(self.index_path, ["signature", "names", "labels"])
            if index["signature"].tolist() == self._signatures and len(index["names"]):
                self._names, self._labels = index["names"], index.get("labels")
                self.index_note = f"names of the samples from {self.index_path}, made anew when the folders change"
                return True
        return False

    def _save_index(self):
        """Keeps names, and labels if they are known, for the next start."""
        if len(self) < MIN_SAMPLES_FOR_INDEX:
            return
        newest = max(max(signature[:2]) for signature in self._signatures)
        if time.time_ns() - newest < _CLOCK_NS:
            self.index_note = f"no index {self.index_path}: the folders have just changed"
            return
        labels = {} if self._labels is None else {"labels": self._labels}
        try:
            # `shared`, because every rank may write it at once.
            with whole_file(self.index_path, shared=True) as partial, open(partial, "wb") as file:
                np.savez(file, signature=np.array(self._signatures), names=self._names, **labels)
        except OSError as error:
            self.index_note = f"no index {self.index_path} ({error.strerror}): the folders are listed at every start"
            return
        self.index_note = f"names of the samples are kept in {self.index_path}, for the next start"

    def __len__(self):
        return len(self._names)

    def read(self, indices, out, mirrored=None):
        """Puts rows into `out` and returns their labels; see `PackedStore.read`."""
        labels = np.empty(len(indices), "int64")
        for place, index in enumerate(indices.tolist()):
            path = self.source(index, "flipped" if mirrored is not None and mirrored[place] else "latents")
            latent = without_batch_axis(self._read_feature(path))
            if latent.shape != self.row_shape or latent.dtype.kind != "f":
                raise ValueError(f"{path}: holds {latent.dtype} of shape {latent.shape}, {self.expected}")
            out[place] = latent
            labels[place] = self._label(index)
        return labels

    def _label(self, index):
        path = self.source(index, "labels")
        return read_label(self._read_label(path), path)

    @property
    def labels(self):
        """All labels, `(N,)`; every label file is read unless the index has them."""
        if self._labels is None:
            indices = tqdm(range(len(self)), desc="labels", unit="file", disable=len(self) < MIN_SAMPLES_FOR_INDEX)
            self._labels = np.fromiter(map(self._label, indices), "int64", len(self))
            self._save_index()
        return self._labels

    def names(self):
        """Returns all names, `(N,)` bytes."""
        return np.array([name[: -len(b".npy")] for name in self._names.tolist()], dtype=bytes)

    def source(self, index, kind="latents"):
        """Returns the file of a sample's latent, of its mirrored twin ("flipped"), or of its label ("labels")."""
        return os.path.join(self._kinds[kind], os.fsdecode(self._names[index]))


class PairEncoder(PairStore):
    """The encoder features `(tokens, width)` beside the pairs of `store`, a `PairStore`, and in its order.

    `read` returns no labels, which `store` has.
    """

    def __init__(self, layout, store):
        self.path, self.has_flip = layout.encoder, os.path.isdir(layout.encoder_flipped)
        self._kinds = {"latents": layout.encoder, "flipped": layout.encoder_flipped}
        self._names, self._read_feature = store._names, NpyReader()
        first = self._read_feature(self.source(0))
        self.row_shape, self.dtype = first.shape, first.dtype
        self.expected = f"the first sample's encoder features are of shape {self.row_shape}"

    def _label(self, index):
        return 0
