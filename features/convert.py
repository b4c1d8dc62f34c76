"""Converts a feature set between one pair of `.npy` files a sample and the packed format, either way."""

import hashlib
import itertools
import json
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from runtime.process import counted  # noqa: E402

CHUNK_BYTES = 1 << 24  # read and compared at a time
SHARD_BYTES = 1 << 32


def in_order(pool, function, tasks, ahead):
    """`function(task)` of each task in turn; the pool's threads are at most `ahead` tasks before the caller."""
    tasks = iter(tasks)
    waiting = deque(pool.submit(function, task) for task in itertools.islice(tasks, ahead))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, task) for task in itertools.islice(tasks, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


class Rows:
    """All rows of a store as training sees them, float32, in chunks.

    Args:
        store: a `PackedStore` or `PairStore`.
        num_workers: threads that read ahead.
    """

    def __init__(self, store, num_workers):
        import numpy as np

        self.store, self.num_workers = store, num_workers
        row_bytes = 4 * int(np.prod(store.row_shape)) * (1 + store.has_flip)
        self.chunk = max(1, CHUNK_BYTES // row_bytes)
        self.names = store.names()

    def read(self, span):
        """`(start, names, labels, [latents, mirrored latents])` of the samples `[start, stop)`."""
        import numpy as np

        start, stop = span
        rows = [np.empty((stop - start, *self.store.row_shape), "float32") for _ in range(1 + self.store.has_flip)]
        for twin, out in enumerate(rows):
            mirrored = np.full(stop - start, bool(twin))
            labels = self.store.read(np.arange(start, stop), out, mirrored)
        return start, [os.fsdecode(name) for name in self.names[start:stop]], labels, rows

    def spans(self, start, stop):
        return [(first, min(first + self.chunk, stop)) for first in range(start, stop, self.chunk)]

    def chunks(self, function=None, start=0, stop=None):
        """`read` of all chunks in order, or `function` of what it returns, computed by the threads."""
        spans = self.spans(start, len(self.store) if stop is None else stop)
        with ThreadPoolExecutor(self.num_workers) as pool:
            yield from in_order(
                pool,
                lambda span: function(self.read(span)) if function else self.read(span),
                spans,
                2 * self.num_workers,
            )


def compare(source, target, rounded_to):
    """Reads both sets and compares names, labels and every bit; returns the largest rounding error.

    Args:
        source, target: `Rows`.
        rounded_to: the dtype that the source's latents may have been rounded to.

    Raises:
        ValueError: the first sample that is not the same.
    """
    import numpy as np

    from runtime.progress import tqdm

    if len(source.store) != len(target.store) or source.store.has_flip != target.store.has_flip:
        found = counted(len(target.store), "sample")
        raise ValueError(f"{target.store.path}: holds {found}, the source {len(source.store)}")
    worst = 0.0

    def check(chunk):
        start, names, labels, rows = chunk
        _, new_names, new_labels, new_rows = target.read((start, start + len(names)))
        bad = (labels != new_labels) | [name != new for name, new in zip(names, new_names, strict=True)]
        worst = 0.0
        for old, new in zip(rows, new_rows, strict=True):
            expected = old.astype(rounded_to).astype("float32")
            bad |= (expected.view("uint32") != new.view("uint32")).reshape(len(old), -1).any(axis=1)
            if rounded_to == "float16":
                worst = max(worst, float(np.abs(old - new).max(initial=0)))
        if bad.any():
            index = start + int(np.argmax(bad))
            hint = "; were its dtypes mixed? then give --dtype" if target.store.dtype == "float16" else ""
            raise ValueError(
                f"{target.store.feature_source(index)}: is not the same as {source.store.feature_source(index)}{hint}"
            )
        return len(names), worst

    with tqdm(total=len(source.store), desc="comparing", unit="sample") as bar:
        for count, error in source.chunks(check):
            worst = max(worst, error)
            bar.update(count)
    return worst


def write_shards(source, folder, *, dtype, shard_samples):
    """Writes the shards that are not there yet."""
    from features.packed import ShardWriter, finished_shards
    from runtime.progress import tqdm

    store, done = source.store, finished_shards(folder)
    with tqdm(total=len(store), desc="packing", unit="sample") as bar:
        for number, start in enumerate(range(0, len(store), shard_samples)):
            stop = min(start + shard_samples, len(store))
            if done.get(number) == stop - start:
                bar.update(stop - start)
                continue
            with ShardWriter(folder, number, row_shape=store.row_shape, dtype=dtype, flip=store.has_flip) as shard:
                for _, names, labels, rows in source.chunks(start=start, stop=stop):
                    shard.append(rows[0], labels, names, *rows[1:])
                    bar.update(len(names))


def write_pairs(source, layout, checksums, *, dtype):
    """Writes the pairs that are not there yet, and the sha256 of every file; layout is that of the work folder."""
    import numpy as np

    from features.packed import cast, npy_header
    from runtime.progress import tqdm

    folders = [layout.features, *([layout.flipped] if source.store.has_flip else []), layout.labels]
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    head = npy_header((1, *source.store.row_shape), dtype)
    label_head = npy_header((1,), "int64")

    def write(chunk):
        _, names, labels, rows = chunk
        lines = []
        rows = [cast(array, dtype, layout.features) for array in rows]
        for place, name in enumerate(names):
            files = [head + array[place].tobytes() for array in rows]
            files.append(label_head + np.int64(labels[place]).tobytes())
            for folder, data in zip(folders, files, strict=True):
                path = os.path.join(folder, f"{name}.npy")
                if not _holds(path, data):
                    with open(path, "wb") as file:
                        file.write(data)
                lines.append(f"{hashlib.sha256(data).hexdigest()}  {os.path.basename(folder)}/{name}.npy\n")
        return lines, len(names)

    with tqdm(total=len(source.store), desc="unpacking", unit="sample") as bar, open(checksums, "wb") as file:
        for lines, count in source.chunks(write):
            file.write(os.fsencode("".join(lines)))
            bar.update(count)


def _holds(path, data):
    try:
        with open(path, "rb") as file:
            return file.read() == data
    except FileNotFoundError:
        return False


def check_names(source):
    """ValueError unless pairs named as the samples are would be read in the samples' order."""
    import numpy as np

    from features.pairs import natural_order

    files = [name + b".npy" for name in source.names.tolist()]
    if len(set(files)) != len(files):
        raise ValueError(f"{source.store.path}: names.npy has a name twice; pairs of files need different ones")
    odd = [name for name in files if b"/" in name or name == b".npy"]
    if odd:
        raise ValueError(f"{source.store.path}: names.npy holds {os.fsdecode(odd[0])!r}, which is no file's name")
    if not np.array_equal(natural_order(files), np.array(files)):
        raise ValueError(f"{source.store.path}: names.npy is not in the order in which pairs of files are read")


def make_plan(args, source, kind):
    """What must be the same for a conversion to go on after a kill."""
    store = source.store
    return {
        "source": os.path.abspath(store.path),
        "samples": len(store),
        "row_shape": list(store.row_shape),
        "flip": store.has_flip,
        "to": kind,
        "dtype": args.dtype,
        "shard_samples": args.shard_samples,
    }


def begin(layout, plan_file, plan, work):
    """Begins a conversion, or goes on with it.

    Raises:
        ValueError: OUTPUT holds the set already, or another unfinished conversion.
    """
    from config.schema import read_json
    from runtime.files import write_json

    if os.path.exists(plan_file):
        for key, value in read_json(plan_file).items():
            if plan.get(key) != value:
                raise ValueError(
                    f"{plan_file}: another conversion is not finished: its {key} was {json.dumps(value)}, now it is "
                    f"{json.dumps(plan.get(key))}; repeat its command, or delete this file and {work}"
                )
        return
    taken = [layout.features, layout.flipped, layout.labels, layout.packed, work, layout.classes]
    for path in (*taken, layout.manifest, layout.checksums):
        if os.path.exists(path):
            raise ValueError(f"{path}: is there already; nothing was overwritten, choose another --output")
    os.makedirs(layout.features_path, exist_ok=True)
    write_json(plan_file, plan)


def check_space(layout, source, kind, dtype):
    """ValueError if the result can't fit on the disk."""
    import numpy as np

    store, folder = source.store, os.path.abspath(layout.features_path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    row_bytes = int(np.prod(store.row_shape)) * np.dtype(dtype).itemsize
    files = 1 + store.has_flip
    # A small file takes whole blocks of 4 KiB.
    sample = row_bytes * files + 20 if kind == "packed" else (-(-(row_bytes + 128) // 4096) * files + 1) * 4096
    free = shutil.disk_usage(folder).free
    if sample * len(store) > free:
        raise ValueError(
            f"{layout.features_path}: needs {sample * len(store) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )


def write_manifest(layout, old, old_manifest, source, labels, *, kind, dtype):
    """Class names and, last, the manifest; the checksums are there."""
    import numpy as np

    from runtime.files import sha256_of_file, whole_file, write_json

    if os.path.exists(old.classes):
        with whole_file(layout.classes) as path:
            shutil.copyfile(old.classes, path)
    num_classes = old_manifest.get("num_classes", int(labels.max(initial=-1)) + 1)
    manifest = {
        "version": 1,
        **old_manifest,
        "format": kind,
        "name": layout.name,
        "num_samples": len(source.store),
        "num_classes": num_classes,
        "class_counts": np.bincount(labels, minlength=num_classes).tolist(),
        "dtype": dtype,
        "flip": source.store.has_flip,
        "checksums": {
            "file": os.path.basename(layout.checksums),
            "sha256": sha256_of_file(layout.checksums).hex(),
        },
    }
    write_json(layout.manifest, manifest)


def to_packed(source, layout, args):
    """Shards, compared, in their place; and their checksums."""
    from features.packed import PackedStore, finish, finished_shards, partial_folder, shard_files, shard_name
    from runtime.files import sha256_of_file, whole_file

    partial = partial_folder(layout.features_path, layout.name)
    worst = None
    if not os.path.exists(layout.packed):  # else: a kill after the comparison
        write_shards(source, partial, dtype=args.dtype, shard_samples=args.shard_samples)
        worst = compare(source, Rows(PackedStore(partial), args.num_workers), args.rounded_to)
        finish(layout.features_path, layout.name)
    with whole_file(layout.checksums) as path, open(path, "w", encoding="utf-8") as file:
        for number in finished_shards(layout.packed):
            for name in shard_files(source.store.has_flip):
                name = f"{os.path.basename(layout.packed)}/{shard_name(number)}/{name}"
                digest = sha256_of_file(os.path.join(layout.features_path, name))
                file.write(f"{digest.hex()}  {name}\n")
    return worst


def to_pairs(source, layout, args, work):
    """Pairs, compared, in their place; and their checksums."""
    from features.extraction import Layout
    from features.pairs import PairStore

    made, compared, worst = Layout(work, layout.name), os.path.join(work, "compared"), None
    if not os.path.exists(compared):  # else: a kill while the folders moved
        write_pairs(source, made, made.checksums, dtype=args.dtype)
        worst = compare(source, Rows(PairStore(work, layout.name), args.num_workers), args.rounded_to)
        open(compared, "wb").close()
    # The features last: a set is found by them.
    for name in ("checksums", "labels", "flipped", "features"):
        if os.path.exists(getattr(made, name)):
            os.rename(getattr(made, name), getattr(layout, name))
    return worst
