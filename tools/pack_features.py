"""Convert a feature set between one pair of .npy files a sample and the packed format, either way.

OUTPUT gets NAME_packed/, or NAME_features/, NAME_labels/ (and NAME_features_flip/), and NAME_classes.json,
NAME_checksums.txt and NAME_manifest.json. Every sample is read back and compared bit for bit before the result appears
under its name. The source's samples are only read. After a kill the same command goes on where it was.

Packed as packed: --to packed on a packed set changes its dtype or the size of its shards.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from training.runtime import counted, run_cli  # noqa: E402

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

    from training.progress import tqdm

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
    from training.packed import ShardWriter, finished_shards
    from training.progress import tqdm

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

    from training.packed import cast, npy_header
    from training.progress import tqdm

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

    from training.pairs import natural_order

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
    from tools.extraction import write_whole
    from training.config import read_json, write_json

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
    write_whole(plan_file, lambda path: write_json(path, plan))


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

    from tools.extraction import sha256_of_file, write_whole
    from training.config import write_json

    if os.path.exists(old.classes):
        write_whole(layout.classes, lambda path: shutil.copyfile(old.classes, path))
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
    write_whole(layout.manifest, lambda path: write_json(path, manifest))


def to_packed(source, layout, args):
    """Shards, compared, in their place; and their checksums."""
    from tools.extraction import sha256_of_file, write_whole
    from training import packed

    partial = packed.partial_folder(layout.features_path, layout.name)
    worst = None
    if not os.path.exists(layout.packed):  # else: a kill after the comparison
        write_shards(source, partial, dtype=args.dtype, shard_samples=args.shard_samples)
        worst = compare(source, Rows(packed.PackedStore(partial), args.num_workers), args.rounded_to)
        packed.finish(layout.features_path, layout.name)

    def write_checksums(path):
        with open(path, "w", encoding="utf-8") as file:
            for number in packed.finished_shards(layout.packed):
                for name in packed.shard_files(source.store.has_flip):
                    name = f"{os.path.basename(layout.packed)}/{packed.shard_name(number)}/{name}"
                    digest = sha256_of_file(os.path.join(layout.features_path, name))
                    file.write(f"{digest.hex()}  {name}\n")

    write_whole(layout.checksums, write_checksums)
    return worst


def to_pairs(source, layout, args, work):
    """Pairs, compared, in their place; and their checksums."""
    from tools.extraction import Layout
    from training.pairs import PairStore

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


def convert(args):
    from tools.extraction import Layout
    from training.data import find_features, open_store, read_manifest
    from training.packed import PackedStore

    for key in ("num_workers", "shard_samples"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key} {getattr(args, key)}: expected 1 or more")
    source_kind, name = find_features(args.feature_path, args.resolution)
    kind = args.to or ("npy" if source_kind == "packed" else "packed")
    if kind == "npy" and source_kind == "pairs":
        raise ValueError(f"{args.feature_path}: {name} is in pairs of .npy files already")
    output = args.output or f"{os.path.abspath(args.feature_path)}_{kind}"
    if os.path.realpath(output) == os.path.realpath(args.feature_path):
        raise ValueError(f"--output {output}: is the source's folder; choose another")
    store = open_store(args.feature_path, source_kind, name)
    if not len(store):
        raise ValueError(f"{store.path}: no sample in it")
    if store.dtype.kind != "f":
        raise ValueError(f"{store.feature_source(0)}: holds {store.dtype}, expected float latents")
    args.rounded_to = args.dtype or "float32"  # what was not asked for must not happen
    args.dtype = args.dtype or ("float16" if store.dtype == "float16" else "float32")
    from tools.image_source import MAX_LABEL

    wrong = (store.labels < 0) | (store.labels > MAX_LABEL)
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(f"{store.label_source(first)}: label {store.labels[first]}, expected 0..{MAX_LABEL}")
    source = Rows(store, args.num_workers)
    args.shard_samples = args.shard_samples or max(1, SHARD_BYTES // (store.num_bytes // len(store)))

    # Where it goes, and whether it may.
    layout, old = Layout(output, name), Layout(args.feature_path, name)
    manifest = read_manifest(args.feature_path, name)
    if kind == "npy":
        check_names(source)
    work = layout.path("unpacking") if kind == "npy" else layout.packed + ".partial"
    plan_file = layout.path(f"to_{kind}.json")
    if not os.path.exists(plan_file):
        check_space(layout, source, kind, args.dtype)
    begin(layout, plan_file, make_plan(args, source, kind), work)

    # Convert, compare, put in place.
    if kind == "packed":
        worst = to_packed(source, layout, args)
        labels = PackedStore(layout.packed).labels
    else:
        worst = to_pairs(source, layout, args, work)
        labels = store.labels
    write_manifest(layout, old, manifest, source, labels, kind=kind, dtype=args.dtype)
    os.remove(plan_file)  # first: what is left of the work is no plan to go on with
    shutil.rmtree(work, ignore_errors=True)
    place = layout.packed if kind == "packed" else f"{layout.features}, {layout.labels}"
    print(f"{counted(len(store), 'sample')}, compared bit for bit: {place}, {layout.manifest}")
    if worst and store.dtype != "float16":
        print(f"note: stored as float16, the largest rounding error is {worst:.2g}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--feature_path", required=True, help="folder that holds NAME_features/ or NAME_packed/")
    parser.add_argument(
        "--resolution", type=int, default=256, help="picks the set imagenet{N}, if there are several [256]"
    )
    parser.add_argument("--to", choices=("packed", "npy"), help="[the other one than the source's]")
    parser.add_argument("--output", help="folder for the result [FEATURE_PATH_packed or FEATURE_PATH_npy]")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="of the stored latents [the source's]")
    parser.add_argument(
        "--shard_samples",
        type=int,
        metavar="N",
        help="samples a packed file, lost if it is killed in it [4 GiB of them]",
    )
    parser.add_argument("--num_workers", type=int, default=4, metavar="N", help="threads that read ahead [4]")
    convert(parser.parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
