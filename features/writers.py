"""Writers of the two formats of a feature set, part by part, and the sha256 of every file."""

import contextlib
import hashlib
import os
import shutil

import numpy as np

from features.packed import (
    ENCODER_FILES,
    SHARD_SAMPLES,
    ShardWriter,
    cast,
    finished_shards,
    npy_header,
    shard_files,
    shard_name,
)
from runtime.files import named_errors, sha256_of_file, whole_file

# A small set is cut into up to 64 shards of at least so many images: work for every rank, and a kill costs little.
MIN_SHARD_SAMPLES = 256


class PairWriter:
    """Writes PaddleMIX's layout: a latent `(1, *row_shape)` and a label `(1,)` a sample, `.npy` files of one name.

    With `flip` mirrored twins are stored beside them.
    """

    def __init__(self, layout, *, row_shape, flip, dtype="float32"):
        self.folders, self.dtype = [layout.features, *([layout.flipped] if flip else []), layout.labels], dtype
        self._headers = [npy_header((1, *row_shape), dtype)] * (1 + flip) + [npy_header((1,), "int64")]

    def write(self, part, batches):
        """Writes batches `(names, labels, [latents, flipped])`; returns the sha256 sums of the files, by sample."""
        for folder in self.folders:
            os.makedirs(folder, exist_ok=True)
        digests = []
        for names, labels, rows in batches:
            columns = [*(cast(latents, self.dtype, self.folders[0]) for latents in rows), np.asarray(labels, "int64")]
            columns = columns[: len(self.folders)]  # encoder features have no labels of their own
            for place, name in enumerate(names):
                for folder, header, column in zip(self.folders, self._headers, columns, strict=True):
                    data = header + column[place].tobytes()
                    digests.append(hashlib.sha256(data).digest())
                    path = os.path.join(folder, f"{name}.npy")
                    with named_errors(path), open(path, "wb") as file:
                        file.write(data)
        return digests

    def files(self, part, names, digests):
        """Returns the `(path under FEATURES_PATH, sha256)` of a part's files."""
        paths = (f"{os.path.basename(folder)}/{name}.npy" for name in names for folder in self.folders)
        return zip(paths, digests, strict=True)


class PackedWriter:
    """Writes the packed format, see `features.packed`; a part is a shard. Arguments and methods as of `PairWriter`."""

    def __init__(self, layout, *, row_shape, flip, dtype="float32"):
        self.layout, self.shard = layout, {"row_shape": row_shape, "flip": flip, "dtype": dtype}

    def write(self, part, batches):
        """Writes a shard; a whole one of its number, which a kill kept out of a journal, is made again."""
        folder = os.path.join(self.layout.partial, shard_name(part))
        shutil.rmtree(folder, ignore_errors=True)
        with ShardWriter(self.layout.partial, part, **self.shard) as shard:
            for names, labels, rows in batches:
                shard.append(rows[0], labels, [*map(str, names)], *rows[1:])
        return [sha256_of_file(os.path.join(folder, name)) for name in shard_files(self.shard["flip"])]

    def files(self, part, names, digests):
        folder = f"{os.path.basename(self.layout.packed)}/{shard_name(part)}"
        return zip((f"{folder}/{name}" for name in shard_files(self.shard["flip"])), digests, strict=True)


class EncoderPairWriter(PairWriter):
    """Writes encoder features `row_shape`, `(tokens, width)`, as pairs are, a file a sample."""

    def __init__(self, layout, *, row_shape, flip, dtype="float16"):
        self.folders, self.dtype = [layout.encoder, *([layout.encoder_flipped] if flip else [])], dtype
        self._headers = [npy_header(row_shape, dtype)] * (1 + flip)


class EncoderPackedWriter:
    """Writes encoder features into the shards of a packed set; a part is a shard. Methods as of `PairWriter`.

    `folder` holds the shards, by default the set's.
    """

    def __init__(self, layout, *, row_shape, flip, dtype="float16", folder=None):
        self.layout, self.row_shape, self.dtype = layout, row_shape, dtype
        self._folder, self._names = folder or layout.packed, ENCODER_FILES[: 1 + flip]
        self._shards = [shard_name(number) for number in finished_shards(self._folder)]

    def write(self, part, batches):
        paths = [os.path.join(self._folder, self._shards[part], name) for name in self._names]
        count = 0
        with contextlib.ExitStack() as stack:
            partials = [stack.enter_context(whole_file(path)) for path in paths]
            files = [stack.enter_context(open(partial, "wb")) for partial in partials]
            for file in files:
                file.write(npy_header((0, *self.row_shape), self.dtype))
            for names, _, rows in batches:
                count += len(names)
                for file, array in zip(files, rows, strict=True):
                    file.write(np.ascontiguousarray(cast(array, self.dtype, paths[0])).data)
            for file in files:  # numpy pads a header, so that all counts give as many bytes
                file.seek(0)
                file.write(npy_header((count, *self.row_shape), self.dtype))
        return [sha256_of_file(path) for path in paths]

    def files(self, part, names, digests):
        folder = f"{os.path.basename(self.layout.packed)}/{self._shards[part]}"
        return zip((f"{folder}/{name}" for name in self._names), digests, strict=True)


WRITERS = {"npy": PairWriter, "packed": PackedWriter}
ENCODER_WRITERS = {"npy": EncoderPairWriter, "packed": EncoderPackedWriter}


def batches_a_part(kind, num_images, batch_size):
    """Returns how many batches of a set's images are a part: one of pairs, or those of a shard."""
    wanted = min(max(num_images // 64, MIN_SHARD_SAMPLES), SHARD_SAMPLES) if kind == "packed" else batch_size
    return -(-wanted // batch_size)


def write_checksums(path, files):
    """Writes the sums of files `(path under FEATURES_PATH, sha256)`; returns what a manifest says of them."""
    with whole_file(path) as partial, open(partial, "wb") as file:
        for name, digest in files:
            file.write(os.fsencode(f"{digest.hex()}  {name}\n"))
    return described_checksums(path)


def described_checksums(path):
    """Returns what a manifest says of a file of sums."""
    return {"file": os.path.basename(path), "sha256": sha256_of_file(path).hex()}
