"""Writers of the two formats of a feature set, part by part, and the sha256 of every file."""

import hashlib
import os
import shutil

import numpy as np

from features import packed
from features.packed import SHARD_SAMPLES, ShardWriter, npy_header, shard_files, shard_name
from runtime.files import named_errors, sha256_of_file

# A small set is cut into up to 64 shards of at least so many images: work for every rank, and a kill costs little.
MIN_SHARD_SAMPLES = 256


class PairWriter:
    """Writes PaddleMIX's layout: a latent `(1, rows...)` and a label `(1,)` an image, `.npy` files of the same name.

    Args:
        layout: a `Layout`. row_shape, dtype: of a stored latent. flip: mirrored twins are stored.
        batch_size: images encoded at once, here a part. num_images: of the whole set, for the size of shards.
    """

    def __init__(self, layout, *, row_shape, flip, batch_size, num_images=None, dtype="float32"):
        self.part_size = batch_size
        self.folders = [layout.features, *([layout.flipped] if flip else [])]
        self.labels = layout.labels
        self._header, self._label_header = npy_header((1, *row_shape), dtype), npy_header((1,), "int64")

    def write(self, part, batches):
        """Writes batches `(names, labels, [latents, flipped])`; returns the sha256 sums of the latents' files."""
        for folder in (*self.folders, self.labels):
            os.makedirs(folder, exist_ok=True)
        digests = []
        for names, labels, rows in batches:
            for place, (name, label) in enumerate(zip(names, labels, strict=True)):
                for folder, latents in zip(self.folders, rows, strict=True):
                    data = self._header + latents[place].tobytes()
                    digests.append(hashlib.sha256(data).digest())
                    self._write(folder, name, data)
                self._write(self.labels, name, self._label(label))
        return digests

    def _label(self, label):
        return self._label_header + np.int64(label).tobytes()

    @staticmethod
    def _write(folder, name, data):
        path = os.path.join(folder, f"{name}.npy")
        with named_errors(path), open(path, "wb") as file:
            file.write(data)

    def files(self, part, names, labels, digests):
        """Yields `(path under FEATURES_PATH, sha256)` of a part's files, by image."""
        of_label = {label: hashlib.sha256(self._label(label)).digest() for label in set(labels)}
        digest = iter(digests)
        for name, label in zip(names, labels, strict=True):
            for folder in self.folders:
                yield f"{os.path.basename(folder)}/{name}.npy", next(digest)
            yield f"{os.path.basename(self.labels)}/{name}.npy", of_label[label]

    def finish(self):
        """Puts the set in its place, where it is already."""


class PackedWriter:
    """Writes the packed format, see `features.packed`; a part is a shard. Arguments as of `PairWriter`."""

    def __init__(self, layout, *, row_shape, flip, batch_size, num_images):
        self.layout, self.row_shape, self.flip = layout, row_shape, flip
        wanted = min(max(num_images // 64, MIN_SHARD_SAMPLES), SHARD_SAMPLES)
        self.part_size = -(-wanted // batch_size) * batch_size  # whole batches

    def _paths(self, folder, part):
        return [os.path.join(folder, shard_name(part), name) for name in shard_files(self.flip)]

    def write(self, part, batches):
        """Writes a shard; see `PairWriter.write`."""
        # A whole shard that a kill kept out of the journal is made again.
        shutil.rmtree(os.path.join(self.layout.partial, shard_name(part)), ignore_errors=True)
        with ShardWriter(self.layout.partial, part, row_shape=self.row_shape, flip=self.flip) as shard:
            for indices, labels, rows in batches:
                shard.append(rows[0], labels, [str(index) for index in indices], *rows[1:])
        return [sha256_of_file(path) for path in self._paths(self.layout.partial, part)]

    def files(self, part, indices, labels, digests):
        """Returns a shard's files; see `PairWriter.files`."""
        return zip(self._paths(os.path.basename(self.layout.packed), part), digests, strict=True)

    def finish(self):
        """Puts the set in its place."""
        if os.path.exists(self.layout.partial):
            packed.finish(self.layout.features_path, self.layout.name)


WRITERS = {"npy": PairWriter, "packed": PackedWriter}
