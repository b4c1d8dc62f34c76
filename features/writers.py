"""Writers of the two formats of a feature set, part by part, and the sha256 of every file."""

import hashlib
import os
import shutil

import numpy as np

from features.packed import SHARD_SAMPLES, ShardWriter, cast, npy_header, shard_files, shard_name
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


WRITERS = {"npy": PairWriter, "packed": PackedWriter}


def batches_a_part(kind, num_images, batch_size):
    """Returns how many batches of a set's images are a part: one of pairs, or those of a shard."""
    wanted = min(max(num_images // 64, MIN_SHARD_SAMPLES), SHARD_SAMPLES) if kind == "packed" else batch_size
    return -(-wanted // batch_size)


def write_checksums(layout, files):
    """Writes the sums of files `(path under FEATURES_PATH, sha256)`; returns what a manifest says of them."""
    with whole_file(layout.checksums) as partial, open(partial, "wb") as file:
        for name, digest in files:
            file.write(os.fsencode(f"{digest.hex()}  {name}\n"))
    return {"file": os.path.basename(layout.checksums), "sha256": sha256_of_file(layout.checksums).hex()}
