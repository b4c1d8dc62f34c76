"""The packed feature format: a few large `.npy` files, memory-mapped.

    FEATURE_PATH/NAME_packed/shard-00000/
        latents.npy    float32 or float16 (n, C, h, w); with moments (n, 2C, h, w): mean, then standard deviation
        flipped.npy    only with mirrored twins: the same shape, of the mirrored images
        encoder.npy    only with encoder features: float16 (n, tokens, width), tokens row by row of their grid
        encoder_flipped.npy    with both
        labels.npy     int64 (n,)
        names.npy      bytes (n,): what the sample's files are called as pairs, without ".npy"

The samples are the shards in the order of their numbers, row by row; a shard may have any number of rows. A shard
appears by one rename when its files are whole, and so does the folder: whatever stands there is complete.
`numpy.load(file, mmap_mode="r")` reads all of it.
"""

import contextlib
import io
import itertools
import mmap
import os
import re
import resource

import numpy as np

from features.layout import Layout
from features.npy import load_npy
from runtime.files import whole_folder
from runtime.machine import available_memory
from runtime.process import counted

SHARD_SAMPLES = 8192
# Resident memory includes mapped pages. They are dropped after so many bytes, so that no one kills the job for memory
# that is only cache.
MAX_MAPPED_BYTES = 1 << 32
MAX_CACHED_SHARE = 0.5  # of the free memory: a larger set is read without the system's read-around
ENCODER_FILES = ("encoder.npy", "encoder_flipped.npy")


def shard_name(number):
    return f"shard-{number:05d}"


def shard_files(flip):
    """Returns the names of a shard's files, with or without mirrored twins."""
    return ("latents.npy", *(["flipped.npy"] if flip else []), "labels.npy", "names.npy")


def finished_shards(folder):
    """Returns `{number: rows}` of the whole shards in a folder, ascending; leftovers of a kill are not counted."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    numbers = sorted(int(name[6:]) for name in names if re.fullmatch(r"shard-\d{5,}", name))
    return {number: len(_labels(os.path.join(folder, shard_name(number)))) for number in numbers}


def finish(feature_path, name):
    """Puts the packed set in its place, all shards written."""
    layout = Layout(feature_path, name)
    os.rename(layout.partial, layout.packed)


def npy_header(shape, dtype):
    """Returns the bytes in front of a C-ordered `.npy` array; as numpy pads them, all `shape[0]` give as many."""
    file = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def cast(array, dtype, where):
    """Returns the array as `dtype`; ValueError, which names `where`, for values beyond float16."""
    if array.dtype.itemsize <= np.dtype(dtype).itemsize:
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if np.isinf(narrow).sum() != np.isinf(array).sum():
        largest = np.abs(array[np.isfinite(array)]).max()
        raise ValueError(f"{where}: latents up to {largest:g} do not fit into {np.dtype(dtype).name}")
    return narrow


class ShardWriter(contextlib.ExitStack):
    """Writes shard `number`, as a context: whole and in its place when left normally, not there at all otherwise.

    `folder` is the set's `Layout.partial`, `row_shape` the stored `(C, h, w)`, or `(2C, h, w)` with moments, `dtype`
    "float32" or "float16"; with `flip` mirrored twins are stored.
    """

    def __init__(self, folder, number, *, row_shape, dtype="float32", flip=False):
        super().__init__()
        self.path = os.path.join(folder, shard_name(number))
        self.row_shape, self.flip, self.dtype = tuple(row_shape), flip, np.dtype(dtype)
        self._files, self._names = {}, []

    def __enter__(self):
        if os.path.exists(self.path):
            raise ValueError(f"{self.path}: is there already; nothing was overwritten")
        folder = self.enter_context(whole_folder(self.path))
        for name in shard_files(self.flip):
            self._files[name] = self.enter_context(open(os.path.join(folder, name), "wb"))
        self._write_headers()
        self.push(self._finish)
        return self

    def _write_headers(self):
        """Writes what stands in front of the rows, of which there are so many as samples by now."""
        for name in shard_files(self.flip)[:-1]:
            shape, dtype = ((), "int64") if name == "labels.npy" else (self.row_shape, self.dtype)
            self._files[name].seek(0)
            self._files[name].write(npy_header((len(self._names), *shape), dtype))

    def append(self, latents, labels, names, flipped=None):
        """Adds m samples: latents `(m, *row_shape)`, integer labels `(m,)`, m file names without `.npy`.

        With `flip`, and only then, `flipped` are the mirrored latents. ValueError for values beyond float16.
        """
        if (flipped is not None) != self.flip:
            raise ValueError(f"{self.path}: mirrored latents {'expected' if self.flip else 'not expected'}")
        labels = np.asarray(labels)
        for name, array in zip(shard_files(self.flip)[:-2], (latents, flipped), strict=False):
            array = np.asarray(array)
            if array.shape != (len(names), *self.row_shape) or labels.shape != (len(names),):
                raise ValueError(
                    f"{self.path}: {name} got {array.shape} with labels {labels.shape} and {len(names)} names; "
                    f"expected (m, {', '.join(map(str, self.row_shape))}), (m,) and m"
                )
            self._files[name].write(np.ascontiguousarray(cast(array, self.dtype, self.path)).data)
        self._files["labels.npy"].write(labels.astype("int64").data)
        self._names += [os.fsencode(name) for name in names]

    def _finish(self, kind, *_):
        if kind is None:
            np.save(self._files["names.npy"], np.array(self._names, dtype=bytes))
            self._write_headers()


class MappedStore:
    """Rows in memory-mapped files, read one by one in any order. Nothing is kept in memory but the labels.

    `parts` yields `(labels (n,), {path: map (n, *row_shape)})` of each shard in order: its latents, and with `has_flip`
    the mirrored twins. Threads and forked processes may share a store.
    """

    reads_in_processes = False
    axes = "(n, C, h, w)"  # of a file's rows, for messages

    def __init__(self, path, parts, *, has_flip):
        self.path, self.has_flip = path, has_flip
        labels, self._maps = [], []  # the latents of each shard, and behind them their mirrored twins
        for numbers, maps in parts:
            if not numbers.size or -(2**31) <= numbers.min() <= numbers.max() < 2**31:
                numbers = numbers.astype("int32")  # a wrong label stays what it is
            labels.append(numbers)
            for file, array in maps.items():
                self._add(file, array, len(numbers))
        if not any(map(len, labels)):
            raise ValueError(f"{path}: no sample in it")
        self._rows = [np.asarray(array) for array in self._maps]  # plain views, for speed
        # Where the rows begin in the maps, which begin with a page of their files.
        self._offsets = np.array([array.offset % mmap.ALLOCATIONGRANULARITY for array in self._maps])
        self.dtype, self.row_shape = self._rows[0].dtype, self._rows[0].shape[1:]
        self.num_bytes = sum(rows.nbytes for rows in self._rows)
        self.labels = np.concatenate(labels)
        self._starts = np.cumsum([0, *map(len, labels[:-1])])
        self._row_bytes = int(np.prod(self.row_shape)) * self.dtype.itemsize
        self._touched = 0
        # The system reads far more around each row than was asked for, which soon has a whole set in the file cache.
        # A set that does not fit there would be read many times over: then exactly the rows, all at once.
        self.exact_reads = False
        if self.num_bytes > MAX_CACHED_SHARE * (available_memory() or np.inf):
            self.read_exactly()

    def _add(self, path, array, count):
        """Takes a map of `count` rows."""
        first = self._maps[0] if self._maps else array
        if array.dtype.name not in ("float32", "float16") or array.ndim < 2:
            raise ValueError(f"{path}: holds {_describe(array)}, expected float32 or float16 {self.axes}")
        if not array.flags.c_contiguous:
            raise ValueError(f"{path}: is stored in Fortran order, expected rows one after another")
        if (array.dtype, array.shape[1:]) != (first.dtype, first.shape[1:]):
            raise ValueError(f"{path}: holds {_describe(array)}, the first shard {_describe(first)}")
        if len(array) != count:
            raise ValueError(f"{path}: holds {counted(len(array), 'row')}, its {self.labels_name} {count}")
        self._maps.append(array)

    def __len__(self):
        return len(self.labels)

    def read_exactly(self):
        """From now on asks the disk for the rows alone, many at a time, and for nothing around them."""
        self.exact_reads = True
        for array in self._maps:
            array._mmap.madvise(mmap.MADV_RANDOM)

    def read(self, indices, out, mirrored=None):
        """Puts rows `(n,)` int64 into `out`, float `(n, *row_shape)`, and returns their labels, `(n,)` int64.

        `mirrored`, `(n,)` bool, says which rows to take from the mirrored twins; None: no row.
        """
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows, files = indices - self._starts[shards], shards * (1 + self.has_flip)
        if mirrored is not None:
            files += mirrored
        if self.exact_reads:
            # All are asked for at once: a disk, above all a network one, is fast with many requests.
            starts = self._offsets[files] + rows * self._row_bytes
            pages = starts // mmap.PAGESIZE * mmap.PAGESIZE
            lengths = starts - pages + self._row_bytes
            for file, page, length in zip(files.tolist(), pages.tolist(), lengths.tolist(), strict=True):
                self._maps[file]._mmap.madvise(mmap.MADV_WILLNEED, page, length)
        if (files == files[0]).all():
            take_rows(self._rows[files[0]], rows, out)
        else:
            for place, (file, row) in enumerate(zip(files.tolist(), rows.tolist(), strict=True)):
                out[place] = self._rows[file][row]
        self._touched += len(indices) * self._row_bytes
        if self._touched > MAX_MAPPED_BYTES:
            self._touched = 0
            for array in self._maps:
                array._mmap.madvise(mmap.MADV_DONTNEED)
        return self.labels[indices].astype("int64")

    def place(self, index):
        """Returns `(shard, row)` of a sample, both counted from 0."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])


class PackedStore(MappedStore):
    """The packed set in `folder`; ValueError names a file that is missing, truncated, or unlike the others."""

    labels_name = "labels.npy"
    files = ("latents.npy", "flipped.npy")  # of the rows and of their mirrored twins

    def __init__(self, folder):
        self.shards = [os.path.join(folder, shard_name(number)) for number in finished_shards(folder)]
        if not self.shards:
            raise ValueError(f"{folder}: no shard-NNNNN/ folder in it")
        has_flip = os.path.exists(os.path.join(self.shards[0], self.files[1]))
        allow_open_files(6 * len(self.shards))  # with those of encoder features
        super().__init__(folder, (self._open(shard, has_flip) for shard in self.shards), has_flip=has_flip)

    def _open(self, shard, has_flip):
        labels = _labels(shard)
        if os.path.exists(os.path.join(shard, self.files[1])) != has_flip:
            raise ValueError(f"{shard}: {self.files[1]} must be in every shard, or in none")
        paths = [os.path.join(shard, name) for name in self.files[: 1 + has_flip]]
        return labels, {path: load_npy(path, mapped=True) for path in paths}

    def spans(self):
        """Lists the samples of each shard, as a `range`."""
        ends = np.append(self._starts, len(self)).tolist()
        return [range(start, end) for start, end in itertools.pairwise(ends)]

    def names(self):
        """Returns the samples' names, those of their files as pairs without `.npy`: `(N,)` bytes."""
        paths = [os.path.join(shard, "names.npy") for shard in self.shards]
        parts = [load_npy(path) for path in paths]
        for path, names, count in zip(paths, parts, np.diff(self._starts, append=len(self)), strict=True):
            if names.dtype.kind != "S" or names.shape != (count,):
                expected = f"expected the names, bytes, of {counted(count, 'sample')}"
                raise ValueError(f"{path}: holds {_describe(names)}, {expected}")
        return np.concatenate(parts)

    def source(self, index, kind="latents"):
        """Returns where a sample's latent, its mirrored twin ("flipped") or its label ("labels") stands."""
        shard, row = self.place(index)
        file = dict(zip(("latents", "flipped"), self.files, strict=True)).get(kind, f"{kind}.npy")
        return f"{self.shards[shard]}/{file} row {row}"


class PackedEncoder(PackedStore):
    """The encoder features in the shards of a packed set, `(tokens, width)` each; read and refused as its latents."""

    files, axes = ENCODER_FILES, "(n, tokens, width)"


def _labels(shard):
    path = os.path.join(shard, "labels.npy")
    labels = load_npy(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected integers (n,), found {_describe(labels)}")
    return labels


def _describe(array):
    return f"{array.dtype} of shape {array.shape}"


def take_rows(rows, indices, out):
    """Puts `rows[indices]` into `out`, where it can without a copy between."""
    if out.dtype == rows.dtype and out.flags.c_contiguous and rows.flags.aligned:  # else all rows would be copied
        np.take(rows, indices, axis=0, out=out, mode="clip")  # any mode but clip goes by way of a copy
    else:
        out[...] = rows[indices]


def allow_open_files(count):
    """Raises this process's limit if so many more files need it, because a memory map holds its file open."""
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + 256
        if 0 <= soft < wanted:  # below 0: without a limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(hard, wanted), hard))
