"""Latent features on disk, and the order in which they are trained on.

The seed's layout: `FEATURE_PATH/NAME_features/*.npy` with latents `(1, C, h, w)` or `(C, h, w)`, already multiplied by
the autoencoder's scaling factor, and `FEATURE_PATH/NAME_labels/*.npy` with one class id under the same file name.
"""

import os
import re

import numpy as np


def find_feature_folders(feature_path, resolution):
    """The pair of folders `(features, labels)` under `feature_path`.

    `imagenet{resolution}_features` if it is there, else the only `NAME_features` folder.

    Raises:
        ValueError: nothing fits, or more than one does.
    """
    if not os.path.isdir(feature_path):
        raise ValueError(f"feature_path {feature_path}: no such folder; expected NAME_features/ and NAME_labels/ in it")
    preferred = f"imagenet{resolution}_features"
    names = sorted(
        entry.name for entry in os.scandir(feature_path) if entry.is_dir() and entry.name.endswith("_features")
    )
    if preferred in names:
        names = [preferred]
    if not names:
        raise ValueError(f"feature_path {feature_path}: no {preferred}/ nor any other NAME_features/ folder in it")
    if len(names) > 1:
        raise ValueError(
            f"feature_path {feature_path}: no {preferred}/ and several others ({', '.join(names)}); leave one"
        )
    features = os.path.join(feature_path, names[0])
    labels = features[: -len("_features")] + "_labels"
    if not os.path.isdir(labels):
        raise ValueError(f"{features}: its labels folder {labels} is missing")
    return features, labels


def _natural_key(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _load_npy(path):
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # whatever a broken file makes numpy say
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable .npy file (truncated?): {reason}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: not a readable .npy file: it holds an archive of arrays")
    return array


class FeatureDataset:
    """Pairs of a latent and its label, read one `.npy` pair at a time.

    Args:
        feature_path: the folder that holds `NAME_features/` and `NAME_labels/`.
        resolution: image size in pixels, picks `imagenet{resolution}_features`.
        sample_shape: `(C, h, w)` that the model takes.
        num_classes: labels must be in 0..num_classes-1.

    Items are `(latent float32 (C, h, w), label int64)`.

    Raises:
        ValueError: one line naming the folder or file: missing, empty, a feature without a label, unreadable, of
            another shape, a label outside the classes. Names and the first pair are checked at once, the others when
            read.
    """

    def __init__(self, feature_path, *, resolution=256, sample_shape, num_classes):
        self.features_dir, self.labels_dir = find_feature_folders(feature_path, resolution)
        self.sample_shape = tuple(sample_shape)
        self.num_classes = num_classes
        features = {entry.name for entry in os.scandir(self.features_dir) if entry.name.endswith(".npy")}
        labels = {entry.name for entry in os.scandir(self.labels_dir) if entry.name.endswith(".npy")}
        if not features:
            raise ValueError(f"{self.features_dir}: no .npy file in it")
        for name in sorted(features - labels, key=_natural_key):
            raise ValueError(f"{os.path.join(self.features_dir, name)}: has no label file {self.labels_dir}/{name}")
        for name in sorted(labels - features, key=_natural_key):
            raise ValueError(f"{os.path.join(self.labels_dir, name)}: has no feature file {self.features_dir}/{name}")
        self.names = sorted(features, key=_natural_key)
        self[0]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        name = self.names[index]
        path = os.path.join(self.features_dir, name)
        latent = _load_npy(path)
        if latent.ndim == len(self.sample_shape) + 1 and latent.shape[0] == 1:
            latent = latent[0]
        if latent.shape != self.sample_shape or latent.dtype.kind != "f":
            raise ValueError(
                f"{path}: holds {latent.dtype} of shape {latent.shape}, the config's model takes float latents of "
                f"shape {self.sample_shape} (in_channels, sample_size, sample_size)"
            )
        path = os.path.join(self.labels_dir, name)
        label = _load_npy(path)
        if label.size != 1 or label.dtype.kind not in "iu":
            raise ValueError(f"{path}: expected one integer label, found {label.dtype} of shape {label.shape}")
        label = int(label.reshape(-1)[0])
        if not 0 <= label < self.num_classes:
            raise ValueError(f"{path}: label {label} is outside the config's num_classes: 0..{self.num_classes - 1}")
        return latent.astype("float32", copy=False), np.int64(label)


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

    def indices(self, start, stop):
        """Dataset indices at stream positions `[start, stop)`, as a list of int."""
        found = []
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            part = self._permutation(epoch)[offset : offset + stop - start]
            found.extend(part.tolist())
            start += len(part)
        return found


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

    def resume(self, step, samples_seen):
        """Goes on after `step` optimizer steps that took the first `samples_seen` samples of the stream."""
        self.first_step, self.first_sample = step, samples_seen

    def samples_seen(self, step):
        """Samples of the stream taken after `step` optimizer steps, over all ranks."""
        return self.first_sample + (step - self.first_step) * self.global_batch_size

    def epoch(self, step):
        """Epochs seen after `step` optimizer steps, a fraction."""
        return self.samples_seen(step) / self.stream.num_samples

    def __len__(self):
        return max(0, self.last_step - self.first_step) * self.accumulation_steps

    def __iter__(self):
        for step in range(self.first_step, self.last_step):
            position = self.samples_seen(step)
            for micro_step in range(self.accumulation_steps):
                start, stop, _ = self.rows(micro_step)
                yield self.stream.indices(position + start, position + stop)


def total_steps(num_samples, *, global_batch_size, max_steps, epochs):
    """Optimizer steps of a run: `max_steps`, or the whole global batches in `epochs` epochs if it is -1."""
    return max_steps if max_steps > 0 else max(1, int(epochs * num_samples) // global_batch_size)


def collate(samples):
    """`(latents float32 (N, C, h, w), labels int64 (N,))` as arrays: DataLoader workers must not make tensors.

    A sample that could not be read (an exception) makes the batch `(message as bytes,)`; `FeatureLoader` raises it.
    """
    for sample in samples:
        if isinstance(sample, Exception):
            return (np.frombuffer(str(sample).encode(), dtype="uint8"),)
    latents, labels = zip(*samples, strict=True)
    return np.stack(latents), np.asarray(labels, dtype="int64")


class _Guarded:
    """A dataset whose unreadable samples come out as their exceptions.

    An exception inside Paddle's DataLoader is lost: the loop waits for ever without workers, and gets a traceback of
    another process with them.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except Exception as error:  # even a bug must not hang the loop
            return error if isinstance(error, ValueError) else ValueError(f"sample {index}: {error!r}")


class FeatureLoader:
    """Iterates over `(latents (n, C, h, w), labels (n,))` tensors, micro-batch by micro-batch.

    Args:
        dataset: a `FeatureDataset`.
        sampler: a `MicroBatchSampler`.
        num_workers: processes that read ahead; 0 reads in the training process, between steps.

    Raises, while iterating:
        ValueError: what the dataset raised for a sample.
    """

    def __init__(self, dataset, sampler, *, num_workers):
        self.sampler = sampler
        self._dataset = _Guarded(dataset)
        self._num_workers = num_workers

    def __len__(self):
        return len(self.sampler)

    def _batches(self):
        if self._num_workers > 0:
            from paddle.io import DataLoader

            yield from DataLoader(
                self._dataset, batch_sampler=self.sampler, collate_fn=collate, num_workers=self._num_workers
            )
            return
        import paddle

        for indices in self.sampler:
            yield [paddle.to_tensor(array) for array in collate([self._dataset[index] for index in indices])]

    def __iter__(self):
        for batch in self._batches():
            if len(batch) == 1:
                raise ValueError(batch[0].numpy().tobytes().decode())
            yield batch
