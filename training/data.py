"""Latent features to train on: the dataset, the order of its samples, and the loader.

A feature folder holds a set NAME as pairs of small files (`training.pairs`: the seed's layout) or packed into a few
large ones (`training.packed`), and perhaps NAME_manifest.json, which tools/extract_features.py writes.
"""

import copy
import itertools
import os
import re
import shlex
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from runtime.process import local_processes
from training.config import read_json
from training.packed import PackedStore, available_memory, packed_folder, partial_folder
from training.pairs import PairStore, features_folder
from training.runtime import counted, say
from training.stopping import start_worker

# What the loader's thread reads at a time: many micro-batches in one go cost less than one by one.
READ_BYTES = 1 << 22
_FLIP, _NOISE, _FIXED_NOISE, _HELD_OUT = range(4)  # draws that must not repeat one another


def find_features(feature_path, resolution):
    """What a feature folder holds: `(kind, name)`, kind "packed" or "pairs".

    The set `imagenet{resolution}` (None: `imagenet256`) if it is there, else the only one. A set that is there in both
    forms is read packed.

    Raises:
        ValueError: nothing fits, more than one set does, or the set is not finished.
    """
    if not os.path.isdir(feature_path):
        raise ValueError(
            f"feature_path {feature_path}: no such folder; expected NAME_features/ and NAME_labels/ in it"
            f"{_unpacking(feature_path)}"
        )
    endings = {"_packed": "packed", "_features": "pairs", "_packed.partial": "partial"}
    found = {}  # {name: kinds}
    for entry in os.scandir(feature_path):
        for ending, kind in endings.items():
            if entry.name.endswith(ending) and entry.is_dir():
                found.setdefault(entry.name[: -len(ending)], []).append(kind)
    preferred = f"imagenet{resolution or 256}"
    whole = sorted(name for name, kinds in found.items() if kinds != ["partial"])
    if preferred in whole:
        whole = [preferred]
    if not whole and found:
        raise ValueError(
            f"{partial_folder(feature_path, min(found))}: is not finished; run again the command that writes it"
        )
    if not whole:
        raise ValueError(
            f"feature_path {feature_path}: no {preferred}_features/ nor any other NAME_features/ or NAME_packed/ "
            f"folder in it{_unpacking(feature_path)}"
        )
    if len(whole) > 1:
        names = ", ".join(f"{name}_{'packed' if 'packed' in found[name] else 'features'}" for name in whole)
        raise ValueError(
            f"feature_path {feature_path}: no {preferred}_features/ and several others ({names}); leave one"
        )
    (name,) = whole
    unfinished = os.path.join(feature_path, f"{name}_extraction")
    if os.path.isdir(unfinished):
        raise ValueError(f"{unfinished}: the extraction of {name} is not finished; run the same command again")
    return ("packed" if "packed" in found[name] else "pairs"), name


def _unpacking(feature_path):
    """Returns the end of a message on missing features: how to unpack them, if they lie there in a tar file."""
    path = os.fspath(feature_path).rstrip("/")
    if os.path.isdir(path):
        folder, files = path, sorted(os.path.join(path, name) for name in os.listdir(path))
    else:
        folder, files = os.path.dirname(path) or ".", [path, *(path + ending for ending in (".tar", ".tar.gz", ".tgz"))]
    tars = [file for file in files if re.search(r"\.(tar(\.\w+)?|tgz)$", file) and os.path.isfile(file)]
    if not tars:
        return ""
    return (
        f"; unpack {os.path.basename(tars[0])} first: tar -xf {shlex.quote(tars[0])} -C {shlex.quote(folder)}, and "
        "give the folder that then holds NAME_features/ and NAME_labels/"
    )


def open_store(feature_path, kind, name):
    """The `PackedStore` or `PairStore` of a set."""
    return PackedStore(packed_folder(feature_path, name)) if kind == "packed" else PairStore(feature_path, name)


def read_manifest(feature_path, name):
    """The set's NAME_manifest.json as a dict, empty where there is none; ValueError if it is broken."""
    path = os.path.join(feature_path, f"{name}_manifest.json")
    if not os.path.exists(path):
        return {}
    manifest = read_json(path, large=True)  # extractions took seeds of any size
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return manifest


class MemoryStore:
    """Samples of another store, held in this process's memory.

    Args:
        store: where they are.
        indices: `(n,)` which of them.
        flip: with their mirrored twins.

    Raises:
        ValueError: they don't fit into the free memory, or what the store raises.
    """

    def __init__(self, store, indices, *, flip):
        from training.progress import tqdm

        self._store, self._indices = store, indices
        self.path, self.row_shape, self.has_flip = store.path, store.row_shape, flip
        # Pairs of files may be of several dtypes.
        self.dtype = store.dtype if isinstance(store, PackedStore) else np.dtype("float32")
        shape = (1 + self.has_flip, len(indices), *self.row_shape)
        self.num_bytes = int(np.prod(shape)) * self.dtype.itemsize
        memory = available_memory()
        processes = local_processes()  # each of them holds the samples for itself
        if memory is not None and self.num_bytes * processes > 0.9 * memory:
            raise ValueError(
                f"{self.path}: {len(indices):,} samples take {self.num_bytes / 2**30:.1f} GiB of memory in each of "
                f"{processes} process(es), {memory / 2**30:.1f} GiB are free; leave them on the disk, which the system "
                "caches for all of them"
            )
        self._rows = np.empty(shape, self.dtype)
        self.labels = np.empty(len(indices), "int64")
        step = max(1, READ_BYTES // (self._rows[0, :1].nbytes or 1))
        with tqdm(total=len(indices), desc="to memory", unit="sample", disable=len(indices) < 10_000) as bar:
            for start in range(0, len(indices), step):
                part = indices[start : start + step]
                place = slice(start, start + len(part))
                for twin in range(1 + self.has_flip):
                    mirrored = np.full(len(part), bool(twin))
                    self.labels[place] = store.read(part, self._rows[twin, place], mirrored)
                bar.update(len(part))

    def __len__(self):
        return len(self.labels)

    def read(self, indices, out, mirrored=None):
        """Puts rows into `out` and returns their labels; see `PackedStore.read`."""
        if mirrored is not None and mirrored.any():
            out[...] = self._rows[mirrored.astype("int64"), indices]
        elif out.dtype == self.dtype:
            np.take(self._rows[0], indices, axis=0, out=out, mode="clip")
        else:
            out[...] = self._rows[0, indices]
        return self.labels[indices]

    def feature_source(self, index):
        return self._store.feature_source(self._indices[index])

    def label_source(self, index):
        return self._store.label_source(self._indices[index])


def _key(seed, purpose, words=1):
    return np.random.SeedSequence([seed, purpose]).generate_state(words, "uint64")


def _coins(seed, positions):
    """`(n,)` bool, each a fair coin that depends on the seed and its position alone (SplitMix64's finalizer)."""
    x = positions.astype("uint64") * np.uint64(0x9E3779B97F4A7C15) + _key(seed, _FLIP)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(63)).astype(bool)


def _normals(key, positions, out):
    """Fills `out[i]` with standard normal numbers that depend on the key and `positions[i]` alone."""
    bits = np.random.Philox(key=key)
    generator, state = np.random.Generator(bits), bits.state
    for place, position in enumerate(positions.tolist()):
        state["state"]["counter"][:] = (0, position, 0, 0)  # 2**64 blocks of numbers for each position
        bits.state = state
        generator.standard_normal(out=out[place], dtype="float32")


class FeatureDataset:
    """Latents and their labels, from pairs of files or packed: by what the folder holds, in the same order.

    Args:
        feature_path: the folder that holds `NAME_features/` and `NAME_labels/`, or `NAME_packed/`.
        resolution: image size in pixels, picks the set `imagenet{resolution}`; another that is the
            only one is taken with a note, with None without.
        sample_shape: `(C, h, w)` that the model takes.
        num_classes: labels must be in 0..num_classes-1.
        flip: take the stored mirrored latent with probability 1/2.
        posterior: for a set that holds moments: "sample" draws `mean + std * noise` anew at every visit, as a loop with
            the autoencoder in it does; "mean" takes the mean.
        seed: of flips and posterior samples.

    Items are `(latent float32 (C, h, w), label int64)`; `read` gets many at once. What is drawn at a visit is a
    function of the seed and the sample's position in the stream alone: resuming, ranks, workers and accumulation
    change nothing. Without a position nothing is mirrored, and posterior samples take the noise of their place in the
    set.

    `store` reads the rows; `notes` are sentences for the user.

    Raises:
        ValueError: one line naming the folder or file: missing, empty, a feature without a label, unreadable, of
            another shape, a label outside the classes, no mirrored latents to flip with. Of pairs, names and the first
            pair are checked at once, the others when read; of a packed set everything but the rows' values at once.
    """

    def __init__(
        self, feature_path, *, resolution=None, sample_shape, num_classes, flip=False, posterior="sample", seed=0
    ):
        if posterior not in ("sample", "mean"):
            raise ValueError(f"posterior must be sample or mean, got {posterior!r}")
        kind, name = find_features(feature_path, resolution)
        self.store = open_store(feature_path, kind, name)
        self.sample_shape = tuple(sample_shape)
        self.num_classes = num_classes
        self.flip, self.posterior, self.seed = flip, posterior, seed
        self.notes = []
        self._indices = self._classes = self._stored = None
        if not len(self.store):
            raise ValueError(f"{self.features_dir}: no sample in it")
        self._check_shape(read_manifest(feature_path, name).get("moments"))
        if resolution and name != f"imagenet{resolution}":
            self.notes.append(
                f"image size {resolution}: no imagenet{resolution} in {feature_path}; its only set, {name}, is taken"
            )
        if flip and not self.store.has_flip:
            raise ValueError(
                f"{self.features_dir}: flips were asked for, but no mirrored latents are there; extract with --flip"
            )
        if kind == "packed":
            self._check_labels(self.store.labels, np.arange(len(self.store)))
            if os.path.isdir(features_folder(feature_path, name)):
                self.notes.append(f"{self.features_dir} is read, not {features_folder(feature_path, name)} beside it")
        elif self.store.index_note:
            self.notes.append(self.store.index_note)
        self[0]

    def _check_shape(self, moments):
        """Finds out whether rows are moments; ValueError if they don't fit the model."""
        channels, *size = self.sample_shape
        shape = self.store.row_shape
        # Without a manifest: twice the channels, and the second half can be standard deviations.
        if moments is None and shape == (2 * channels, *size):
            row = np.empty((1, *shape), "float32")
            self.store.read(np.zeros(1, "int64"), row)
            moments = bool((row[:, channels:] > 0).all())
        self.moments = bool(moments)
        expected = (2 * channels if self.moments else channels, *size)
        takes = "the config's model takes float latents of shape "
        takes += f"{self.sample_shape} (in_channels, sample_size, sample_size)"
        if self.moments:
            takes += f" and therefore moments of shape {expected}"
        if shape != expected or self.store.dtype.kind != "f":
            raise ValueError(f"{self.store.feature_source(0)}: holds {self.store.dtype} of shape {shape}, {takes}")
        self.store.expected = takes

    def _check_labels(self, labels, indices):
        wrong = (labels < 0) | (labels >= self.num_classes)
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"{self.store.label_source(indices[first])}: label {labels[first]} is outside the config's "
                f"num_classes: 0..{self.num_classes - 1}"
            )
        if self._classes is not None and not np.isin(labels, self._classes).all():
            again = getattr(self.store, "index_path", None)  # a file that is rewritten leaves its folder as it was
            again = f"delete {again} and start again" if again else "start again"
            raise ValueError(f"{self.features_dir}: labels have changed since they were listed; {again}")

    @property
    def features_dir(self):
        """The folder that the samples are read from."""
        return self.store.path

    def source(self, index):
        """Where the latent of a sample stands, for messages."""
        return self.store.feature_source(index if self._indices is None else self._indices[index])

    def __len__(self):
        return len(self.store) if self._indices is None else len(self._indices)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        latents, labels = self.read([index % len(self)])
        return latents[0], labels[0]

    def read(self, indices, positions=None):
        """Reads samples.

        Args:
            indices: `(n,)`, in 0..len-1.
            positions: `(n,)`, where they stand in the sample stream; None for items as they are.

        Returns:
            `(latents float32 (n, C, h, w), labels int64 (n,))`.
        """
        stored = np.asarray(indices, dtype="int64")
        if self._indices is not None:
            stored = self._indices[stored]
        positions = None if positions is None else np.asarray(positions, dtype="int64")
        mirrored = _coins(self.seed, positions) if self.flip and positions is not None else None
        rows = np.empty((len(stored), *self.store.row_shape), "float32")
        labels = self.store.read(stored, rows, mirrored)
        self._check_labels(labels, stored)
        if not self.moments:
            return rows, labels
        mean, std = np.split(rows, 2, axis=1)
        if self.posterior == "mean":
            return np.ascontiguousarray(mean), labels
        noise = np.empty(mean.shape, "float32")
        if positions is None:
            places = stored if self._stored is None else self._stored[stored]
            _normals(_key(0, _FIXED_NOISE, 2), places, noise)  # not the run's seed: held-out samples stay the same
        else:
            _normals(_key(self.seed, _NOISE, 2), positions, noise)
        noise *= std
        noise += mean
        return noise, labels

    # Parts of the set. Each returns another dataset and leaves this one as it is.

    def _part(self, indices):
        part = copy.copy(self)
        part._indices = indices if self._indices is None else self._indices[indices]
        return part

    def _labels(self):
        labels = self.store.labels
        return labels if self._indices is None else labels[self._indices]

    def subset(self, classes):
        """The samples of some classes; labels stay what they are. Of pairs it reads every label once.

        Raises:
            ValueError: a class that is none of the config's, or of which there is no sample.
        """
        classes = sorted(set(classes))
        labels = self._labels()
        counts = np.bincount(labels[(labels >= 0) & (labels < self.num_classes)], minlength=self.num_classes)
        for label in classes:
            if not 0 <= label < self.num_classes:
                raise ValueError(f"label {label} is outside the config's num_classes: 0..{self.num_classes - 1}")
            if not counts[label]:
                raise ValueError(f"{self.features_dir}: no sample of class {label}")
        if not classes:
            raise ValueError("a label subset needs at least one class")
        part = self._part(np.flatnonzero(np.isin(labels, classes)))
        part._classes = classes
        return part

    def split(self, held_out, *, seed=0):
        """`(the rest, held_out samples)`: drawn by index from the seed, the same on every rank and in every run.

        The seed is not the run's: another run's training samples must not become this one's held-out ones. More
        held-out samples are those of before and others. A label subset holds out its own samples: those that the whole
        set would hold out first.

        Raises:
            ValueError: nothing would be left to train on.
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
        """The same samples read into this process's memory, for a disk that is slow even when read ahead."""
        part = copy.copy(self)
        indices = np.arange(len(self.store)) if self._indices is None else self._indices
        part.store, part._indices = MemoryStore(self.store, indices, flip=self.flip), None
        part._stored = indices
        return part


class SampleStream:
    """The endless order of training samples: one seeded permutation of the dataset after another.

    Position k of the stream is sample `permutation(seed, k // n)[k % n]`: each sample once per epoch, another order
    every epoch, the same for the same seed, whatever the number of ranks. The optimizer step s takes positions
    `[s * G, (s + 1) * G)`, G the global batch, so that a batch may hold the end of one epoch and the start of the next,
    and the data position of a checkpoint is one number.
    """

    def __init__(self, num_samples, seed):
        if num_samples < 1:
            raise ValueError("the dataset is empty")
        self.num_samples = num_samples
        self.seed = seed
        self._epoch, self._order = -1, None

    def _permutation(self, epoch):
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
            self._epoch = epoch
        return self._order

    def take(self, start, stop):
        """Dataset indices at stream positions `[start, stop)`: `(stop - start,)` int64."""
        parts = [np.empty(0, "int64")]
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            parts.append(self._permutation(epoch)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def indices(self, start, stop):
        """As `take`, as a list of int."""
        return self.take(start, stop).tolist()


class MicroBatchSampler:
    """Dataset indices of one rank's micro-batches, from optimizer step `first_step` up to `last_step`.

    The global batch is laid out as accumulation step, then rank: row `m * world * b + rank * b + i` is sample i of
    micro-batch m. `rows(m)` tells where a micro-batch stands, for the objective's random numbers.
    """

    def __init__(self, num_samples, *, global_batch_size, accumulation_steps, rank, world_size, seed, last_step):
        if global_batch_size % (world_size * accumulation_steps):
            raise ValueError(
                f"global batch size {global_batch_size} is not divisible by {world_size} data-parallel ranks x "
                f"{accumulation_steps} gradient accumulation steps"
            )
        self.stream = SampleStream(num_samples, seed)
        self.global_batch_size = global_batch_size
        self.accumulation_steps = accumulation_steps
        self.batch_size = global_batch_size // (world_size * accumulation_steps)
        self.rank, self.world_size = rank, world_size
        self.first_step, self.last_step = 0, last_step
        self.first_sample = 0

    def rows(self, micro_step):
        """`(start, stop, total)`: the rows of the global batch that micro-batch `micro_step` of this rank holds."""
        start = (micro_step * self.world_size + self.rank) * self.batch_size
        return start, start + self.batch_size, self.global_batch_size

    def resume(self, step, samples_seen, last_step=None):
        """Goes on after `step` optimizer steps that took the first `samples_seen` samples of the stream.

        Args:
            last_step: where the run ends now; None: where it ended before.
        """
        self.first_step, self.first_sample = step, samples_seen
        self.last_step = self.last_step if last_step is None else last_step

    def samples_seen(self, step):
        """Samples of the stream taken after `step` optimizer steps, over all ranks."""
        return self.first_sample + (step - self.first_step) * self.global_batch_size

    def epoch(self, step):
        """Epochs seen after `step` optimizer steps, a fraction."""
        return self.samples_seen(step) / self.stream.num_samples

    def __len__(self):
        return max(0, self.last_step - self.first_step) * self.accumulation_steps

    def batch(self, step, micro_step):
        """`(indices, positions)` of a micro-batch of optimizer step `step` (1-based), `(n,)` int64 each: what to read,
        and where it stands in the stream, for whatever is drawn anew at every visit."""
        start, stop, _ = self.rows(micro_step)
        position = self.samples_seen(step - 1)
        return self.stream.take(position + start, position + stop), np.arange(position + start, position + stop)

    def batches(self):
        """`batch` of all micro-batches that are still to come when training starts."""
        for step in range(self.first_step, self.last_step):
            for micro_step in range(self.accumulation_steps):
                yield self.batch(step + 1, micro_step)

    def __iter__(self):
        for indices, _ in self.batches():
            yield indices.tolist()


def total_steps(num_samples, *, global_batch_size, max_steps, epochs, first_step=0, samples_seen=0):
    """The last optimizer step of a run: `max_steps`, or where `epochs` epochs are over if it is -1.

    Args:
        first_step, samples_seen: steps that a resumed run has done, and the samples that they took. They may have been
            of another global batch, of a set of another size.
    """
    if max_steps > 0:
        return max_steps
    steps = max(0, int(epochs * num_samples) - samples_seen) // global_batch_size  # a last, smaller batch is left out
    return max(1, first_step + steps)


class _Batches:
    """The micro-batches as a batch sampler whose batches are one item each: workers then read a batch in one call."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        for batch in self.sampler.batches():
            yield [batch]


class _Guarded:
    """A dataset of micro-batches; what can't be read comes out as `(message as bytes,)`.

    An exception inside Paddle's DataLoader is lost: the loop waits for ever without workers, and gets a traceback of
    another process with them.
    """

    def __init__(self, dataset, length):
        self.dataset, self.length = dataset, length

    def __len__(self):
        return self.length

    def __getitem__(self, batch):
        try:
            return self.dataset.read(*batch)
        except Exception as error:  # even a bug must not hang the loop
            message = str(error) if isinstance(error, ValueError) else f"samples {batch[0].tolist()}: {error!r}"
            return (np.frombuffer(message.encode(), dtype="uint8"),)


def _only(items):
    return items[0]


LOADER_DIED = (
    "a loader process died. Was the memory full, or /dev/shm, through which batches come? Give --num_workers 0 "
    "(--dataloader_num_workers 0 to the Trainer) or a larger /dev/shm (docker run --shm-size), or pack the features "
    "with tools/pack_features.py: packed ones are read without processes"
)


def free_shared_memory():
    """Returns the free bytes of `/dev/shm`; None where there is none."""
    try:
        state = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return None
    return state.f_bavail * state.f_frsize


def _name_dead_loaders():
    """Makes the death of a loader process one line, whatever this process does then.

    Paddle's handler of SIGCHLD raises a SystemError of many lines there.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        return
    if getattr(handler, "names_dead_loaders", False):  # Paddle sets its own only once
        return

    def handle(signum, frame):
        try:
            handler(signum, frame)
        except SystemError:
            raise ValueError(LOADER_DIED) from None

    handle.names_dead_loaders = True
    signal.signal(signal.SIGCHLD, handle)


class FeatureLoader:
    """Iterates over `[latents (n, C, h, w), labels (n,)]` tensors, micro-batch by micro-batch.

    Args:
        dataset: a `FeatureDataset`.
        sampler: a `MicroBatchSampler`.
        num_workers: 0 reads in the calling thread, between steps. More read ahead while a step runs: pairs of files by
            so many processes; a packed set by one thread, which is as fast as the memory is. The samples are the same.
        phase: called with "reading data" and "training" in turn, see `Stopping.phase`; or None.

    Raises, while iterating:
        ValueError: what the dataset raised for a sample, or that a loader process died.
    """

    def __init__(self, dataset, sampler, *, num_workers, phase=None):
        self.sampler = sampler
        self._phase = phase or (lambda name: None)
        self._dataset = dataset
        self._num_workers = num_workers

    def __len__(self):
        return len(self.sampler)

    def _use_shared_memory(self):
        """Returns whether the batches of all loader processes on this machine fit into the free shared memory."""
        free = free_shared_memory()
        # Paddle asks for two batches ahead a process; the loop and the device's copies hold some more.
        batches = (2 * self._num_workers + 4) * local_processes()
        batch_bytes = self.sampler.batch_size * (4 * int(np.prod(self._dataset.sample_shape)) + 8) + 2 * 4096
        if free is None or batches * batch_bytes <= free:
            return True
        if os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
            say(
                f"note: /dev/shm has {free / 2**20:.1f} MiB free, {batches * batch_bytes / 2**20:.1f} MiB were needed: "
                "loader processes send batches through pipes, which takes longer; a larger /dev/shm (docker run "
                "--shm-size) or tools/pack_features.py avoids it"
            )
        return False

    def _by_processes(self):
        from paddle.io import DataLoader

        loader = DataLoader(
            _Guarded(self._dataset, len(self.sampler)),
            batch_sampler=_Batches(self.sampler),
            collate_fn=_only,  # arrays: workers must not make tensors
            num_workers=self._num_workers,
            worker_init_fn=start_worker,
            use_shared_memory=self._use_shared_memory(),
        )
        state = np.random.get_state()
        try:
            batches = iter(loader)
        except OSError as error:  # queues between processes take a few pages of /dev/shm too
            raise ValueError(
                f"loader processes can't be started: {error.strerror}. Is /dev/shm full? Give --num_workers 0 "
                "(--dataloader_num_workers 0 to the Trainer)"
            ) from None
        np.random.set_state(state)  # it has drawn a seed for the workers: a resumed run must not draw once more
        _name_dead_loaders()
        while True:
            try:
                batch = next(batches, None)
            except SystemError:
                raise ValueError(LOADER_DIED) from None
            if batch is None:
                return
            if len(batch) == 1:
                raise ValueError(batch[0].numpy().tobytes().decode())
            yield batch

    def _by_thread(self):
        """Arrays of the micro-batches, several of them read by one call, while those before are used."""
        batches, size = self.sampler.batches(), self.sampler.batch_size
        row_bytes = 4 * int(np.prod(self._dataset.store.row_shape))
        most = max(1, READ_BYTES // (row_bytes * size))

        def read(count):
            part = list(itertools.islice(batches, count))
            if not part:
                return None
            return self._dataset.read(*(np.concatenate(arrays) for arrays in zip(*part, strict=True)))

        with ThreadPoolExecutor(1, "features") as pool:
            count = 1  # the first step waits for one batch only
            upcoming = pool.submit(read, count)
            while (arrays := upcoming.result()) is not None:
                count = min(2 * count, most)
                upcoming = pool.submit(read, count)
                for start in range(0, len(arrays[0]), size):
                    yield [array[start : start + size] for array in arrays]

    def __iter__(self):
        batches = self._batches()
        while True:
            self._phase("reading data")
            batch = next(batches, None)
            if batch is None:
                return
            self._phase("training")
            yield batch

    def _batches(self):
        if self._num_workers > 0 and isinstance(self._dataset.store, PairStore):
            yield from self._by_processes()
            return
        import paddle

        read_ahead = self._num_workers > 0
        batches = self._by_thread() if read_ahead else itertools.starmap(self._dataset.read, self.sampler.batches())
        # On a CPU the tensors are the arrays, without another copy.
        convert = paddle.from_dlpack if paddle.get_device() == "cpu" else paddle.to_tensor
        for batch in batches:
            yield [convert(array) for array in batch]
