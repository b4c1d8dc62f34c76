"""Converts a feature set between one pair of `.npy` files a sample and the packed format, either way."""

import json
import os
import shutil

import numpy as np

from features.image_source import MAX_LABEL
from features.layout import Layout
from features.packed import PackedStore, ShardWriter, finish, finished_shards, shard_files, shard_name
from features.pairs import PairStore, natural_order
from features.read_ahead import map_ahead
from features.store import find_features, open_store, read_manifest
from features.writers import PairWriter
from runtime.files import sha256_of_file, whole_file, write_json
from runtime.process import counted
from runtime.progress import tqdm
from runtime.untrusted import read_json

CHUNK_BYTES = 1 << 24  # read and compared at a time
SHARD_BYTES = 1 << 32


def convert_set(feature_path, output, *, resolution=None, to=None, dtype=None, shard_samples=None, num_workers=4):
    """Writes a set in the other format, reads it back and compares every bit, and only then gives it its name.

    After a kill the same call goes on where it was.

    Args:
        output: folder for the result; None: FEATURE_PATH_packed or FEATURE_PATH_npy.
        resolution: see `find_features`.
        to: "packed" or "npy"; None: the other one than the source's.
        dtype: of the stored latents, "float32" or "float16"; None: the source's.
        shard_samples: samples a packed file; None: 4 GiB of them.
        num_workers: threads that read ahead.

    Returns:
        `(number of samples, their paths, largest rounding error)`; the error is None if nothing was rounded.

    Raises:
        ValueError: one line: the source can't be converted, or something is in the way.
    """
    source_kind, name = find_features(feature_path, resolution)
    kind = to or ("npy" if source_kind == "packed" else "packed")
    if kind == "npy" and source_kind == "pairs":
        raise ValueError(f"{feature_path}: {name} is in pairs of .npy files already")
    output = output or f"{os.path.abspath(feature_path)}_{kind}"
    if os.path.realpath(output) == os.path.realpath(feature_path):
        raise ValueError(f"--output {output}: is the source's folder; choose another")
    store = open_store(feature_path, source_kind, name)
    if kind == "npy":
        _check_names(store)
    _check_samples(store)
    rounded_to = dtype or "float32"  # compared with what the user asked for: an unrequested rounding is an error
    dtype = dtype or ("float16" if store.dtype == "float16" else "float32")
    shard_samples = shard_samples or max(1, SHARD_BYTES // (store.num_bytes // len(store)))

    layout, manifest = Layout(output, name), read_manifest(feature_path, name)
    work = layout.path("unpacking") if kind == "npy" else layout.partial
    plan = {
        "source": os.path.abspath(store.path),
        "samples": len(store),
        "row_shape": list(store.row_shape),
        "flip": store.has_flip,
        "to": kind,
        "dtype": dtype,
        "shard_samples": shard_samples,
    }
    plan_file = layout.path(f"to_{kind}.json")
    _begin(layout, plan_file, plan, work)

    source, labels = _Rows(store, num_workers), store.labels
    if kind == "packed":
        error = _to_packed(source, layout, dtype, rounded_to, shard_samples)
    else:
        error = _to_pairs(source, layout, work, dtype, rounded_to)
    old_classes = Layout(feature_path, name).classes
    if os.path.exists(old_classes):
        with whole_file(layout.classes) as path:
            shutil.copyfile(old_classes, path)
    num_classes = manifest.get("num_classes", int(labels.max()) + 1)
    new = {
        "format": kind,
        "name": name,
        "num_samples": len(store),
        "num_classes": num_classes,
        "class_counts": np.bincount(labels, minlength=num_classes).tolist(),
        "dtype": dtype,
        "flip": store.has_flip,
        "checksums": {"file": os.path.basename(layout.checksums), "sha256": sha256_of_file(layout.checksums).hex()},
    }
    write_json(layout.manifest, {"version": 1, **manifest, **new})
    os.remove(plan_file)  # first: what is left of the work is no plan to go on with
    shutil.rmtree(work, ignore_errors=True)
    places = (layout.packed,) if kind == "packed" else (layout.features, layout.labels)
    return len(store), (*places, layout.manifest), error if store.dtype != "float16" else None


def _check_names(store):
    """Raises ValueError unless pairs named as the samples are would be read in the samples' order."""
    files = [name + b".npy" for name in store.names().tolist()]
    if len(set(files)) != len(files):
        raise ValueError(f"{store.path}: names.npy has a name twice; pairs of files need different ones")
    odd = [name for name in files if b"/" in name or name == b".npy"]
    if odd:
        raise ValueError(f"{store.path}: names.npy holds {os.fsdecode(odd[0])!r}, which is no file's name")
    if not np.array_equal(natural_order(files), np.array(files)):
        raise ValueError(f"{store.path}: names.npy is not in the order in which pairs of files are read")


def _check_samples(store):
    if not len(store):
        raise ValueError(f"{store.path}: no sample in it")
    if store.dtype.kind != "f":
        raise ValueError(f"{store.source(0)}: holds {store.dtype}, expected float latents")
    for first in np.flatnonzero((store.labels < 0) | (store.labels > MAX_LABEL)).tolist():
        raise ValueError(f"{store.source(first, 'labels')}: label {store.labels[first]}, expected 0..{MAX_LABEL}")


def _begin(layout, plan_file, plan, work):
    """Writes the plan, or compares it with that of an unfinished conversion, on which this one then goes on.

    Raises:
        ValueError: the output holds the set already or another unfinished conversion, or the disk is too small.
    """
    if os.path.exists(plan_file):
        for key, value in read_json(plan_file).items():
            if plan.get(key) != value:
                raise ValueError(
                    f"{plan_file}: another conversion is not finished: its {key} was {json.dumps(value)}, now it is "
                    f"{json.dumps(plan.get(key))}; repeat its command, or delete this file and {work}"
                )
        return
    there = os.path.abspath(layout.features_path)
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    row_bytes = int(np.prod(plan["row_shape"])) * np.dtype(plan["dtype"]).itemsize
    files, free = 1 + plan["flip"], shutil.disk_usage(there).free
    # A small file takes whole blocks of 4 KiB.
    packed = plan["to"] == "packed"
    sample = row_bytes * files + 20 if packed else (-(-(row_bytes + 128) // 4096) * files + 1) * 4096
    if sample * plan["samples"] > free:
        needed = sample * plan["samples"] / 2**30
        raise ValueError(f"{layout.features_path}: needs {needed:.1f} GiB, {free / 2**30:.1f} GiB are free")
    taken = [layout.features, layout.flipped, layout.labels, layout.packed, work]
    for path in (*taken, layout.classes, layout.manifest, layout.checksums):
        if os.path.exists(path):
            raise ValueError(f"{path}: is there already; nothing was overwritten, choose another --output")
    os.makedirs(layout.features_path, exist_ok=True)
    write_json(plan_file, plan)


class _Rows:
    """All rows of a store as training sees them, float32, in chunks, with threads that read ahead."""

    def __init__(self, store, num_workers):
        self.store, self.num_workers = store, num_workers
        row_bytes = 4 * int(np.prod(store.row_shape)) * (1 + store.has_flip)
        self.chunk = max(1, CHUNK_BYTES // row_bytes)
        self.names = store.names()

    def read(self, start, stop):
        """Returns `(start, names, labels, [latents, mirrored latents])` of the samples `[start, stop)`."""
        rows = [np.empty((stop - start, *self.store.row_shape), "float32") for _ in range(1 + self.store.has_flip)]
        for twin, out in enumerate(rows):
            labels = self.store.read(np.arange(start, stop), out, np.full(stop - start, bool(twin)))
        return start, [os.fsdecode(name) for name in self.names[start:stop]], labels, rows

    def chunks(self, function, start=0, stop=None):
        """Returns an iterator over `function(*read(...))`, computed by the threads, of all chunks in order."""
        stop = len(self.store) if stop is None else stop

        def work(first):
            return function(*self.read(first, min(first + self.chunk, stop)))

        return map_ahead(work, range(start, stop, self.chunk), self.num_workers, 2 * self.num_workers)


def _compare(source, target, rounded_to):
    """Returns the largest rounding error of a whole set, whose names, labels and bits are compared with its source.

    Args:
        source, target: `_Rows`. rounded_to: the dtype that the source's latents may have been rounded to.

    Raises:
        ValueError: the first sample that is not the same.
    """
    old_store, new_store = source.store, target.store
    if len(old_store) != len(new_store) or old_store.has_flip != new_store.has_flip:
        raise ValueError(f"{new_store.path}: holds {counted(len(new_store), 'sample')}, the source {len(old_store)}")

    def check(start, names, labels, rows):
        _, new_names, new_labels, new_rows = target.read(start, start + len(names))
        bad = (labels != new_labels) | [name != new for name, new in zip(names, new_names, strict=True)]
        worst = 0.0
        for old, new in zip(rows, new_rows, strict=True):
            expected = old.astype(rounded_to).astype("float32")
            bad |= (expected.view("uint32") != new.view("uint32")).reshape(len(old), -1).any(axis=1)
            if rounded_to == "float16":
                worst = max(worst, float(np.abs(old - new).max(initial=0)))
        if bad.any():
            index = start + int(np.argmax(bad))
            hint = "; were its dtypes mixed? then give --dtype" if new_store.dtype == "float16" else ""
            is_not = f"is not the same as {old_store.source(index)}"
            raise ValueError(f"{new_store.source(index)}: {is_not}{hint}")
        return len(names), worst

    largest = 0.0
    with tqdm(total=len(old_store), desc="comparing", unit="sample") as bar:
        for count, error in source.chunks(check):
            largest = max(largest, error)
            bar.update(count)
    return largest


def _to_packed(source, layout, dtype, rounded_to, shard_samples):
    """Puts compared shards and their checksums in place; returns the rounding error, or None."""
    store, work, error = source.store, layout.partial, None
    if not os.path.exists(layout.packed):  # else: a kill after the comparison
        done = finished_shards(work)
        with tqdm(total=len(store), desc="packing", unit="sample") as bar:
            for number, start in enumerate(range(0, len(store), shard_samples)):
                stop = min(start + shard_samples, len(store))
                if done.get(number) == stop - start:
                    bar.update(stop - start)
                    continue
                with ShardWriter(work, number, row_shape=store.row_shape, dtype=dtype, flip=store.has_flip) as shard:
                    for _, names, labels, rows in source.chunks(lambda *chunk: chunk, start, stop):
                        shard.append(rows[0], labels, names, *rows[1:])
                        bar.update(len(names))
        error = _compare(source, _Rows(PackedStore(work), source.num_workers), rounded_to)
        finish(layout.features_path, layout.name)
    with whole_file(layout.checksums) as path, open(path, "w", encoding="utf-8") as file:
        for number in finished_shards(layout.packed):
            for name in shard_files(store.has_flip):
                name = f"{os.path.basename(layout.packed)}/{shard_name(number)}/{name}"
                digest = sha256_of_file(os.path.join(layout.features_path, name))
                file.write(f"{digest.hex()}  {name}\n")
    return error


def _to_pairs(source, layout, work, dtype, rounded_to):
    """Puts compared pairs and their checksums in place; returns the rounding error, or None."""
    made, compared, error = Layout(work, layout.name), os.path.join(work, "compared"), None
    if not os.path.exists(compared):  # else: a kill while the folders moved
        _write_pairs(source, made, dtype)
        error = _compare(source, _Rows(PairStore(work, layout.name), source.num_workers), rounded_to)
        open(compared, "wb").close()
    # The features last, because a set is found by them.
    for name in ("checksums", "labels", "flipped", "features"):
        if os.path.exists(getattr(made, name)):
            os.rename(getattr(made, name), getattr(layout, name))
    return error


def _write_pairs(source, made, dtype):
    """Writes all pairs, and the sha256 of every file."""
    store = source.store
    writer = PairWriter(made, row_shape=store.row_shape, flip=store.has_flip, dtype=dtype)

    def write(start, names, labels, rows):
        digests = writer.write(start, [(names, labels, rows)])
        files = writer.files(start, names, labels.tolist(), digests)
        return len(names), "".join(f"{digest.hex()}  {path}\n" for path, digest in files)

    os.makedirs(made.features_path, exist_ok=True)
    bar = tqdm(total=len(store), desc="unpacking", unit="sample")
    with bar, open(made.checksums, "wb") as file:
        for count, lines in source.chunks(write):
            file.write(os.fsencode(lines))
            bar.update(count)
