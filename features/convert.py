"""Converts a feature set between one pair of `.npy` files a sample and the packed format, either way."""

import itertools
import json
import os
import shutil

import numpy as np

from features.image_source import MAX_LABEL
from features.layout import Layout
from features.packed import PackedEncoder, PackedStore, ShardWriter, finish, finished_shards, shard_files, shard_name
from features.pairs import PairEncoder, PairStore, natural_order
from features.read_ahead import map_ahead
from features.statistics import channel_sums, statistics_entries
from features.store import find_features, open_encoder, open_store, read_manifest
from features.writers import ENCODER_WRITERS, PairWriter, described_checksums, write_checksums
from runtime.files import sha256_of_file, whole_file, write_json
from runtime.process import counted, say
from runtime.progress import tqdm
from runtime.untrusted import read_json

CHUNK_BYTES = 1 << 24  # read and compared at a time
SHARD_BYTES = 1 << 32


def convert_set(*, feature_path, output, resolution, to, dtype, shard_samples, num_workers):
    """Writes a set in the other format, reads it back and compares every bit, and only then gives it its name.

    After a kill the same call goes on where it was. Arguments are the flags of tools/pack_features.py. ValueError if
    the source can't be converted, or something is in the way. Returns `(number of samples, their paths, largest
    rounding error)`, 0 also where an earlier start has compared them.
    """
    source_kind, name = find_features(feature_path, resolution)
    kind = to or ("npy" if source_kind == "packed" else "packed")
    if kind == "npy" and source_kind == "pairs":
        raise ValueError(f"{feature_path}: {name} is in pairs of .npy files already")
    output = output or f"{os.path.abspath(feature_path)}_{kind}"
    if os.path.realpath(output) == os.path.realpath(feature_path):
        raise ValueError(f"--output {output}: is the source's folder; choose another")
    store = open_store(feature_path, source_kind, name)
    encoder = open_encoder(feature_path, source_kind, name, store)
    if kind == "npy" and shard_samples:
        say("note: --shard_samples has no effect on pairs of .npy files")
    _check_samples(store, kind)
    rounded_to = dtype or "float32"  # compared with what the user asked for: an unrequested rounding is an error
    dtype = dtype or ("float16" if store.dtype == "float16" else "float32")
    row_bytes = int(np.prod(store.row_shape)) * store.dtype.itemsize * (1 + store.has_flip)
    shard_samples = shard_samples or max(1, SHARD_BYTES // row_bytes)

    layout, manifest = Layout(output, name), read_manifest(feature_path, name)
    work = layout.unpacking if kind == "npy" else layout.partial
    plan = {"source": os.path.abspath(store.path), "samples": len(store), "row_shape": list(store.row_shape)}
    plan |= {"flip": store.has_flip, "to": kind, "dtype": dtype, "shard_samples": shard_samples}
    plan["encoder_shape"] = None if encoder is None else list(encoder.row_shape)
    plan_file = layout.path(f"to_{kind}.json")
    _begin(layout, plan_file, plan, work)

    channels = store.row_shape[0] // (1 + bool(manifest.get("moments")))
    source, labels = _Rows(store, num_workers, channels), store.labels
    if kind == "packed":
        error, sums = _to_packed(source, encoder, layout, dtype, rounded_to, shard_samples)
    else:
        error, sums = _to_pairs(source, encoder, layout, dtype, rounded_to)
    old_classes = Layout(feature_path, name).classes
    if os.path.exists(old_classes):
        with whole_file(layout.classes) as path:
            shutil.copyfile(old_classes, path)
    num_classes = manifest.get("num_classes", int(labels.max()) + 1)
    # Those that latents are normalised by stay what they are.
    keeps = manifest.get("latent_normalization") == "channel" and "channel_mean" in manifest
    new = {
        "format": kind,
        "name": name,
        "num_samples": len(store),
        "num_classes": num_classes,
        "class_counts": np.bincount(labels, minlength=num_classes).tolist(),
        "dtype": dtype,
        "flip": store.has_flip,
        "checksums": described_checksums(layout.checksums),
        **({} if sums is None or keeps else statistics_entries(sums)),
    }
    if "encoder" in manifest and encoder is not None:
        new["encoder"] = {**manifest["encoder"], "checksums": described_checksums(layout.encoder_checksums)}
    elif "encoder" in manifest:
        del manifest["encoder"]  # of arrays that are gone
    write_json(layout.manifest, {"version": 1, **manifest, **new})
    os.remove(plan_file)  # first: what is left of the work is no plan to go on with
    shutil.rmtree(work, ignore_errors=True)
    places = (layout.packed,) if kind == "packed" else (layout.features, layout.labels)
    return len(store), (*places, layout.manifest), error


def _check_samples(store, kind):
    """Raises ValueError for samples that can't be written, or that pairs of their names would hold in another order."""
    if store.dtype.kind != "f":
        raise ValueError(f"{store.source(0)}: holds {store.dtype}, expected float latents")
    for first in np.flatnonzero((store.labels < 0) | (store.labels > MAX_LABEL)).tolist():
        raise ValueError(f"{store.source(first, 'labels')}: label {store.labels[first]}, expected 0..{MAX_LABEL}")
    if kind == "packed":
        return
    files = [name + b".npy" for name in store.names().tolist()]
    if len(set(files)) != len(files):
        raise ValueError(f"{store.path}: names.npy has a name twice; pairs of files need different ones")
    for name in files:
        if b"/" in name or name == b".npy":
            raise ValueError(f"{store.path}: names.npy holds {os.fsdecode(name)!r}, which is no file's name")
    if not np.array_equal(natural_order(files), np.array(files)):
        raise ValueError(f"{store.path}: names.npy is not in the order in which pairs of files are read")


def _begin(layout, plan_file, plan, work):
    """Writes the plan, or compares it with that of an unfinished conversion, on which this one then goes on.

    ValueError if the output holds the set already or another unfinished conversion, or the disk is too small.
    """
    if os.path.exists(plan_file):
        for key, value in read_json(plan_file).items():
            if plan.get(key) != value:
                raise ValueError(
                    f"{plan_file}: another conversion is not finished: its {key} was {json.dumps(value)}, now it is "
                    f"{json.dumps(plan.get(key))}; repeat its command, or delete this file and {work}"
                )
        return
    for path in layout.existing():
        raise ValueError(f"{path}: is there already; nothing was overwritten, choose another --output")
    os.makedirs(layout.features_path, exist_ok=True)
    row_bytes = int(np.prod(plan["row_shape"])) * np.dtype(plan["dtype"]).itemsize
    files, free = 1 + plan["flip"], shutil.disk_usage(layout.features_path).free
    # A small file takes whole blocks of 4 KiB.
    packed = plan["to"] == "packed"
    sample = row_bytes * files + 20 if packed else (-(-(row_bytes + 128) // 4096) * files + 1) * 4096
    if plan["encoder_shape"]:
        row_bytes = 4 * int(np.prod(plan["encoder_shape"]))  # no more than that
        sample += (row_bytes if packed else -(-(row_bytes + 128) // 4096) * 4096) * files
    if sample * plan["samples"] > free:
        needed = sample * plan["samples"] / 2**30
        raise ValueError(f"{layout.features_path}: needs {needed:.1f} GiB, {free / 2**30:.1f} GiB are free")
    write_json(plan_file, plan)


class _Rows:
    """All rows of a store as training sees them, float32, in chunks that threads read ahead."""

    def __init__(self, store, num_workers, channels):
        self.store, self.names, self.num_workers, self.channels = store, store.names(), num_workers, channels

    def of(self, store):
        """Returns those of another store of the same samples."""
        return _Rows(store, self.num_workers, self.channels)

    def read(self, span):
        """Returns `(names, labels, [latents, mirrored latents])` of the samples in a `range`."""
        rows = [np.empty((len(span), *self.store.row_shape), "float32") for _ in range(1 + self.store.has_flip)]
        for twin, out in enumerate(rows):
            labels = self.store.read(np.array(span), out, np.full(len(span), bool(twin)))
        return [os.fsdecode(name) for name in self.names[span.start : span.stop]], labels.tolist(), rows

    def map(self, function, samples, bar):
        """Yields `function(span)` of each chunk of a `range`, computed by the threads, and moves a progress bar."""
        size = max(1, CHUNK_BYTES // (4 * int(np.prod(self.store.row_shape)) * (1 + self.store.has_flip)))
        spans = [samples[first:][:size] for first in range(0, len(samples), size)]
        results = map_ahead(function, spans, self.num_workers, 2 * self.num_workers)
        for span, result in zip(spans, results, strict=True):
            yield result
            bar.update(len(span))


def _compare(source, target, rounded_to):
    """Compares a whole set with its source, both `_Rows`; returns the largest rounding error and the `channel_sums`.

    Names, labels and bits must be the same, of latents after a rounding to the dtype `rounded_to`; ValueError names
    the first sample of which they are not.
    """
    old_store, new_store = source.store, target.store
    if len(old_store) != len(new_store) or old_store.has_flip != new_store.has_flip:
        raise ValueError(f"{new_store.path}: holds {counted(len(new_store), 'sample')}, the source {len(old_store)}")

    def check(span):
        (*old_keys, rows), (*new_keys, new_rows) = source.read(span), target.read(span)
        bad = np.any([np.array(old) != new for old, new in zip(old_keys, new_keys, strict=True)], axis=0)
        worst = 0.0
        for old, new in zip(rows, new_rows, strict=True):
            expected = old.astype(rounded_to).astype("float32")
            bad |= (expected.view("uint32") != new.view("uint32")).reshape(len(old), -1).any(axis=1)
            if rounded_to == "float16":
                worst = max(worst, float(np.abs(old - new).max(initial=0)))
        if bad.any():
            index = span[np.argmax(bad)]
            hint = "; were its dtypes mixed? then give --dtype" if new_store.dtype == "float16" else ""
            raise ValueError(f"{new_store.source(index)}: is not the same as {old_store.source(index)}{hint}")
        return worst, sum(channel_sums(each, source.channels) for each in new_rows)

    with tqdm(total=len(old_store), desc="comparing", unit="sample") as bar:
        errors, sums = zip(*source.map(check, range(len(old_store)), bar), strict=True)
    return max(errors), sum(sums)


def _copy_encoder(source, encoder, layout, made, kind):
    """Puts encoder features beside latents that are written: in the packed folder `made`, or under the layout `made`.

    They are read back and compared; returns the `(path under the feature folder, sha256)` of their files.
    """
    options = {"row_shape": encoder.row_shape, "flip": encoder.has_flip, "dtype": encoder.dtype}
    if kind == "packed":
        writer = ENCODER_WRITERS[kind](layout, **options, folder=made)
        spans = PackedStore(made).spans()
    else:
        writer, spans = ENCODER_WRITERS[kind](made, **options), [range(len(source.names))]
    step = max(1, CHUNK_BYTES // (encoder.dtype.itemsize * int(np.prod(encoder.row_shape)) * (1 + encoder.has_flip)))

    def rows(store, span):
        read = [np.empty((len(span), *store.row_shape), store.dtype) for _ in range(1 + store.has_flip)]
        for twin, out in enumerate(read):
            store.read(np.array(span), out, np.full(len(span), bool(twin)))
        return read

    def batches(span):
        for start in range(0, len(span), step):
            part = span[start : start + step]
            yield [os.fsdecode(name) for name in source.names[part.start : part.stop]], [], rows(encoder, part)
            bar.update(len(part))

    files = []
    with tqdm(total=2 * len(source.names), desc="encoder", unit="sample") as bar:
        for part, span in enumerate(spans):
            names = [os.fsdecode(name) for name in source.names[span.start : span.stop]]
            files += writer.files(part, names, writer.write(part, batches(span)))
        copy = PackedEncoder(made) if kind == "packed" else PairEncoder(made, PairStore(made.features_path, made.name))
        for start in range(0, len(source.names), step):
            span = range(len(source.names))[start : start + step]
            for old, new in zip(rows(encoder, span), rows(copy, span), strict=True):
                bad = (old.view("uint8") != new.view("uint8")).reshape(len(span), -1).any(axis=1)
                if bad.any():
                    index = span[int(bad.argmax())]
                    raise ValueError(f"{copy.source(index)}: is not the same as {encoder.source(index)}")
            bar.update(len(span))
    return files


def _to_packed(source, encoder, layout, dtype, rounded_to, shard_samples):
    """Puts compared shards and their checksums in place; returns what `_compare` does, `(0, None)` if it was before."""
    store, error, sums = source.store, 0.0, None
    if not finished_shards(layout.packed):  # else: a kill after the comparison
        done, work = finished_shards(layout.partial), layout.partial
        with tqdm(total=len(store), initial=sum(done.values()), desc="packing", unit="sample") as bar:
            for number, start in enumerate(range(0, len(store), shard_samples)):
                if number in done:
                    continue
                with ShardWriter(work, number, row_shape=store.row_shape, dtype=dtype, flip=store.has_flip) as shard:
                    samples = range(len(store))[start:][:shard_samples]
                    for names, labels, rows in source.map(source.read, samples, bar):
                        shard.append(rows[0], labels, names, *rows[1:])
        error, sums = _compare(source, source.of(PackedStore(work)), rounded_to)
        if encoder is not None:
            write_checksums(layout.encoder_checksums, _copy_encoder(source, encoder, layout, work, "packed"))
        finish(layout.features_path, layout.name)
    shards = [f"{os.path.basename(layout.packed)}/{shard_name(number)}" for number in finished_shards(layout.packed)]
    paths = [f"{shard}/{name}" for shard in shards for name in shard_files(store.has_flip)]
    write_checksums(
        layout.checksums, ((path, sha256_of_file(os.path.join(layout.features_path, path))) for path in paths)
    )
    return error, sums


def _to_pairs(source, encoder, layout, dtype, rounded_to):
    """Puts compared pairs and their checksums in place; returns what `_to_packed` does."""
    store, work, error, sums = source.store, layout.unpacking, 0.0, None
    made, compared = Layout(work, layout.name), os.path.join(work, "compared")
    writer = PairWriter(made, row_shape=store.row_shape, flip=store.has_flip, dtype=dtype)

    def write(span):
        batch = source.read(span)
        return [*writer.files(span, batch[0], writer.write(span, [batch]))]

    if not os.path.exists(compared):  # else: a kill while the folders moved
        os.makedirs(work, exist_ok=True)
        with tqdm(total=len(store), desc="unpacking", unit="sample") as bar:
            write_checksums(made.checksums, itertools.chain.from_iterable(source.map(write, range(len(store)), bar)))
        error, sums = _compare(source, source.of(PairStore(work, layout.name)), rounded_to)
        if encoder is not None:
            write_checksums(made.encoder_checksums, _copy_encoder(source, encoder, layout, made, "npy"))
        open(compared, "wb").close()
    # The features last, because a set is found by them.
    for name in ("encoder_checksums", "encoder", "encoder_flipped", "checksums", "labels", "flipped", "features"):
        if os.path.exists(getattr(made, name)):
            os.rename(getattr(made, name), getattr(layout, name))
    return error, sums
