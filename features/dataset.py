"""Latent features as a dataset: a sample by its number, with the flips, noise and classes that a config asks for."""

import copy
import math
import os
import shlex

import numpy as np

from features.layout import Layout
from features.normalization import choose_normalization, normalize
from features.statistics import can_be_moments
from features.store import MemoryStore, find_features, open_encoder, open_store, read_manifest, size_note
from runtime.process import counted

_FLIP, _NOISE, _FIXED_NOISE, _HELD_OUT = range(4)  # draws that must not repeat one another


def _key(seed, purpose, words=1):
    return np.random.SeedSequence([seed, purpose]).generate_state(words, "uint64")


def _coins(seed, positions):
    """Returns `(n,)` bool, each a fair coin that depends on the seed and its position alone.

    SplitMix64's finalizer (Steele, Lea and Flood, 2014), not the Philox of the noise, because a run that is resumed
    must see the flips that it would have seen.
    """
    x = positions.astype("uint64") * np.uint64(0x9E3779B97F4A7C15) + _key(seed, _FLIP)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(63)).astype(bool)


def _normals(key, positions, out):
    """Fills `out[i]` with standard normal numbers that depend on the key and `positions[i]` alone (Philox)."""
    bits = np.random.Philox(key=key)
    generator, state = np.random.Generator(bits), bits.state
    for place, position in enumerate(positions.tolist()):
        state["state"]["counter"][:] = (0, position, 0, 0)  # 2**64 blocks of numbers for each position
        bits.state = state
        generator.standard_normal(out=out[place], dtype="float32")


class FeatureDataset:
    """Latents and their labels, from pairs of files or packed: by what the folder holds, in the same order.

    Args:
        resolution: image size in pixels, picks a set as `find_features` does; None takes any without a note.
        sample_shape: `(C, h, w)` that the model takes.
        num_classes: labels must be in 0..num_classes-1.
        flip: take the stored mirrored latent with probability 1/2.
        posterior: of a set with moments: "sample" draws `mean + std * noise` anew at every visit, "mean" is the mean.
        seed: of flips and posterior samples.
        latent_normalization, latent_multiplier: as in a config's section `data`; None normalises LightningDiT's latents
            alone. `normalization` then holds what is done, as numbers, see `features.normalization`.
        encoder_features: also read what an encoder says of each image, an item's third part: True, or the shape
            `(tokens, width)` that a config takes, any width if that is None. `encoder` is their store, None if they are
            not asked for: then they are not opened.

    Items are `(latent float32 (C, h, w), label int64)`; `read` gets many at once. What is drawn at a visit is a
    function of the seed and the sample's position in the stream alone: resuming, ranks, workers and accumulation
    change nothing. `store` reads the rows; `notes` are sentences for the user.

    ValueError names the file that is missing, unreadable, of another shape or labelled outside the classes. Of pairs,
    names and the first pair are checked at once, the others when read; of a packed set all but the rows' values.
    """

    def __init__(
        self,
        feature_path,
        *,
        resolution=None,
        sample_shape,
        num_classes,
        flip=False,
        posterior="sample",
        seed=0,
        latent_normalization=None,
        latent_multiplier=1.0,
        encoder_features=None,
    ):
        kind, name = find_features(feature_path, resolution)
        self.store = open_store(feature_path, kind, name)
        path = self.features_dir = self.store.path
        self.sample_shape, self.num_classes = tuple(sample_shape), num_classes
        self.flip, self.posterior, self.seed = flip, posterior, seed
        self.notes = []
        self._indices = self._classes = self._stored = None
        manifest = read_manifest(feature_path, name)
        self._check_shape(manifest.get("moments"))
        self.normalization, note = choose_normalization(
            latent_normalization, latent_multiplier, manifest, self.store, self.sample_shape[0]
        )
        self.notes += [note] if note else []
        if note := size_note(feature_path, name, resolution):
            self.notes.append(note)
        if flip and not self.store.has_flip:
            raise ValueError(
                f"{path}: flips were asked for, but no mirrored latents are there; extract with --flip, "
                "or train without: --no_flip"
            )
        self.encoder = None
        if encoder_features:
            self.encoder = open_encoder(feature_path, kind, name, self.store)
            self._check_encoder(encoder_features, feature_path, name, manifest.get("image_size"))
        if kind != "pairs":
            self._check_labels(self.store.labels, np.arange(len(self.store)))
        if kind == "packed":
            pairs = Layout(feature_path, name).features
            if os.path.isdir(pairs):
                self.notes.append(f"{path} is read, not {pairs} beside it")
        elif getattr(self.store, "index_note", None):
            self.notes.append(self.store.index_note)
        self[0]

    def _check_shape(self, moments):
        """Finds out if rows are moments; ValueError if they don't fit the model."""
        channels, *size = self.sample_shape
        shape = self.store.row_shape
        # Without a manifest: twice the channels, and the second half can be standard deviations.
        if moments is None and shape == (2 * channels, *size):
            row = np.empty((1, *shape), "float32")
            self.store.read(np.zeros(1, "int64"), row)
            moments = can_be_moments(row)
        self.moments = bool(moments)
        expected = (2 * channels if self.moments else channels, *size)
        moments = f" and therefore moments of shape {expected}" if self.moments else ""
        takes = f"the config's model takes float latents of shape {self.sample_shape} (in_channels, sample_size, "
        takes += f"sample_size){moments}"
        if shape != expected or self.store.dtype.kind != "f":
            holds = f"holds {self.store.dtype} of shape {shape}"
            raise ValueError(f"{self.store.source(0)}: {holds}, {takes}{self._fitting_config(shape)}")
        self.store.expected = takes

    def _check_encoder(self, expected, feature_path, name, image_size):
        """Raises ValueError unless there are encoder features of the expected shape, of mirrored images too."""
        tokens, width = (None, None) if expected is True else expected
        command = ["python tools/extract_features.py --data_path IMAGES --encoder ENCODER --feature_path"]
        command += [shlex.quote(os.fspath(feature_path)), f"--image_size {image_size}" if image_size else ""]
        command += ["" if name == f"imagenet{image_size or 256}" else f"--name {shlex.quote(name)}"]
        command = " ".join([*filter(None, command), *([f"--token_grid {math.isqrt(tokens)}"] if tokens else [])])
        takes = f" of width {width}" if width else ""
        takes = "" if expected is True else f", the config takes {tokens} tokens{takes}"
        if self.encoder is None:
            raise ValueError(f"{self.features_dir}: has no encoder features{takes}; make them: {command}")
        found = self.encoder.row_shape
        if tokens not in (None, found[0]) or width not in (None, found[1]):
            holds = "{} tokens of width {}".format(*found)
            mend = f'write "width": {found[1]} in its objective.regularizers, or null'
            if found[0] != tokens:
                mend = f"make others: {command} --replace_encoder"
            raise ValueError(f"{self.encoder.source(0)}: holds encoder features of {holds}{takes}; {mend}")
        if self.flip and not self.encoder.has_flip:
            raise ValueError(f"{self.encoder.path}: has none of the mirrored images; train without: --no_flip")

    def _fitting_config(self, shape):
        """Returns what to write in the config for latents of this shape, as the end of a message; perhaps empty."""
        if len(shape) != 3 or shape[1] != shape[2] or shape[0] % (1 + self.moments):
            return ""
        fitting = {"in_channels": shape[0] // (1 + self.moments), "sample_size": shape[1]}
        ours = dict(zip(fitting, self.sample_shape, strict=False))
        changes = [f'"{key}": {value}' for key, value in fitting.items() if value != ours[key]]
        made = "or have a config made by tools/make_config.py"
        return f"; for this set write {', '.join(changes)} in its section model, {made}" if changes else ""

    def _check_labels(self, labels, indices):
        wrong = (labels < 0) | (labels >= self.num_classes)
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"{self.store.source(indices[first], 'labels')}: label {labels[first]} is outside the config's "
                f"num_classes: 0..{self.num_classes - 1}"
            )
        if self._classes is not None and not np.isin(labels, self._classes).all():
            # A file that is rewritten leaves its folder as it was.
            delete = f"delete {self.store.index_path} and " if hasattr(self.store, "index_path") else ""
            raise ValueError(f"{self.features_dir}: labels have changed since they were listed; {delete}start again")

    def source(self, index):
        """Returns where the latent of a sample stands, for messages."""
        return self.store.source(index if self._indices is None else self._indices[index])

    def __len__(self):
        return len(self.store) if self._indices is None else len(self._indices)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return tuple(array[0] for array in self.read([index % len(self)]))

    def read(self, indices, positions=None):
        """Returns `(latents float32 (n, C, h, w), labels int64 (n,))` of the samples `(n,)`, each in 0..len-1.

        With encoder features there is a third array, `(n, tokens, width)` as stored: float16, or float32.
        `positions`, `(n,)`, are where they stand in the sample stream. None: nothing is mirrored, and posterior samples
        take the noise of their place in the set.
        """
        stored = np.asarray(indices, dtype="int64")
        if self._indices is not None:
            stored = self._indices[stored]
        positions = None if positions is None else np.asarray(positions, dtype="int64")
        mirrored = _coins(self.seed, positions) if self.flip and positions is not None else None
        rows = np.empty((len(stored), *self.store.row_shape), "float32")
        labels = self.store.read(stored, rows, mirrored)
        self._check_labels(labels, stored)
        latents = self._draw(rows, stored, positions) if self.moments else rows
        latents = latents if self.normalization is None else normalize(latents, self.normalization)
        if self.encoder is None:
            return latents, labels
        features = np.empty((len(stored), *self.encoder.row_shape), self.encoder.dtype)
        self.encoder.read(stored, features, mirrored)
        return latents, labels, features

    @property
    def sample_bytes(self):
        """The bytes of a sample as `read` returns it."""
        encoder = 0 if self.encoder is None else np.prod(self.encoder.row_shape) * self.encoder.dtype.itemsize
        return int(4 * np.prod(self.sample_shape) + 8 + encoder)

    def _draw(self, rows, stored, positions):
        """Returns latents `(n, C, h, w)` of rows of moments: their means, or samples."""
        mean, std = np.split(rows, 2, axis=1)
        if self.posterior == "mean":
            return np.ascontiguousarray(mean)
        noise = np.empty(mean.shape, "float32")
        if positions is None:
            places = stored if self._stored is None else self._stored[stored]
            _normals(_key(0, _FIXED_NOISE, 2), places, noise)  # not the run's seed: held-out samples stay the same
        else:
            _normals(_key(self.seed, _NOISE, 2), positions, noise)
        noise *= std
        noise += mean
        return noise

    # Parts of the set. Each returns another dataset and leaves this one as it is.

    def _part(self, indices):
        part = copy.copy(self)
        part._indices = indices if self._indices is None else self._indices[indices]
        return part

    def subset(self, classes):
        """Returns the samples of some classes; labels stay what they are. ValueError for a class without samples."""
        classes = sorted(set(classes))
        labels = self.store.labels if self._indices is None else self.store.labels[self._indices]
        known = set(np.unique(labels).tolist())
        for label in classes:
            if not 0 <= label < self.num_classes:
                raise ValueError(f"label {label} is outside the config's num_classes: 0..{self.num_classes - 1}")
            if label not in known:
                raise ValueError(f"{self.features_dir}: no sample of class {label}")
        if not classes:
            raise ValueError("a label subset needs at least one class")
        part = self._part(np.flatnonzero(np.isin(labels, classes)))
        part._classes = classes
        return part

    def split(self, held_out, *, seed=0):
        """Returns `(the rest, held_out samples)`, drawn by index from the seed: the same on all ranks and in all runs.

        The seed is not the run's: another run's training samples must not become this one's held-out ones. A label
        subset holds out what the whole set would first. ValueError if nothing would be left to train on.
        """
        if not 0 <= held_out < len(self):
            raise ValueError(
                f"{counted(held_out, 'held-out sample')}: expected 0..{len(self) - 1}, the set has {len(self)}"
            )
        if not held_out:
            return self, self._part(np.empty(0, "int64"))
        # In the order of a draw over the whole set: of a label subset as many of the same samples as can be.
        rank = np.argsort(np.random.default_rng([seed, _HELD_OUT]).permutation(len(self.store)))
        order = np.argsort(rank if self._indices is None else rank[self._indices])
        return self._part(np.sort(order[held_out:])), self._part(np.sort(order[:held_out]))

    def in_memory(self):
        """Returns the same samples read into this process's memory, for a disk that is slow even when read ahead."""
        part = copy.copy(self)
        indices = np.arange(len(self.store)) if self._indices is None else self._indices
        part.store, part._indices = MemoryStore(self.store, indices, flip=self.flip), None
        if self.encoder is not None:
            part.encoder = MemoryStore(self.encoder, indices, flip=self.flip)
        part._stored = indices
        return part
