"""Tiny feature sets in either format, and all that a run reads of them."""

import os

import numpy as np
from safetensors.numpy import save_file

from features.dataset import FeatureDataset
from features.loader import FeatureLoader
from features.order import MicroBatchSampler
from tools.pack_features import main as pack
from weights.files import save_torch

SHAPE = (4, 8, 8)


def write_set(folder, count=40, *, flip=False, moments=False, dtype="float32", names=None, name="imagenet64"):
    """Writes pairs of files with what is asked for; returns `(latents, mirrored)` in the order of `names`."""
    rng = np.random.default_rng(1)
    names = names or [str(index) for index in range(count)]
    kinds = ["features", "labels", *(["features_flip"] if flip else [])]
    for kind in kinds:
        os.makedirs(folder / f"{name}_{kind}", exist_ok=True)
    rows = rng.standard_normal((2, len(names), 1, SHAPE[0] * (1 + moments), *SHAPE[1:])).astype("float32")
    if moments:
        rows[:, :, :, SHAPE[0] :] = np.abs(rows[:, :, :, SHAPE[0] :]) + 0.5
    rows = rows.astype(dtype)
    for index, stem in enumerate(names):
        np.save(folder / f"{name}_features" / f"{stem}.npy", rows[0, index])
        np.save(folder / f"{name}_labels" / f"{stem}.npy", np.array([index % 10]))
        if flip:
            np.save(folder / f"{name}_features_flip" / f"{stem}.npy", rows[1, index])
    return rows[0, :, 0], rows[1, :, 0]


def add_encoder(folder, *, shape=(4, 6), flip=False, name="imagenet64"):
    """Writes encoder features beside the pairs of `write_set`; returns `(features, of the mirrored images)`."""
    files = sorted(os.listdir(folder / f"{name}_features"), key=lambda file: int(file[:-4]))
    rows = np.random.default_rng(3).standard_normal((2, len(files), *shape)).astype("float16")
    for kind, arrays in zip(("encoder", "encoder_flip")[: 1 + flip], rows, strict=False):
        os.makedirs(folder / f"{name}_{kind}", exist_ok=True)
        for file, row in zip(files, arrays, strict=True):
            np.save(folder / f"{name}_{kind}" / file, row)
    return rows[0], rows[1]


def dataset(folder, **options):
    return FeatureDataset(folder, resolution=64, sample_shape=SHAPE, num_classes=10, **options)


def pack_set(folder, output, *flags):
    pack(["--feature_path", str(folder), "--output", str(output), "--resolution", "64", *map(str, flags)])
    return output


def everything(data, positions=None):
    return data.read(np.arange(len(data)), positions)


def sampler(data, *, batch=8, steps=9, accumulation=1, rank=0, world=1, seed=0):
    return MicroBatchSampler(
        len(data),
        global_batch_size=batch,
        accumulation_steps=accumulation,
        rank=rank,
        world_size=world,
        seed=seed,
        last_step=steps,
    )


def load(data, num_workers=0, **run):
    """Returns all micro-batches of a run, as arrays."""
    loader = FeatureLoader(data, sampler(data, **run), num_workers=num_workers)
    return [tuple(tensor.numpy() for tensor in batch) for batch in loader]


def write_lightning(folder, counts=(5, 3), *, shape=(4, 4, 4), flip=True, dtype="float32", statistics=True, scale=3.0):
    """Writes a folder as LightningDiT's extraction does, a file for each count; returns `(latents, mirrored)`."""
    rng, total = np.random.default_rng(2), sum(counts)
    rows = (scale * rng.standard_normal((2, total, *shape)) + 1).astype(dtype)
    labels, start = np.arange(total) % 3, 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, count in enumerate(counts):
        part = slice(start, start + count)
        tensors = {"latents": rows[0, part], "latents_flip": rows[1, part], "labels": labels[part]}
        if not flip:
            del tensors["latents_flip"]
        save_file(tensors, folder / f"latents_rank{number:02d}_shard000.safetensors")
        start += count
    if statistics:
        values = {"mean": np.arange(shape[0]) / 4, "std": scale * (1 + np.arange(shape[0]) / 4)}
        named = {key: value.reshape(1, -1, 1, 1).astype("float32") for key, value in values.items()}
        save_torch(named, folder / "latents_stats.pt")
    return rows[0], rows[1]
