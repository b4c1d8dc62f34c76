"""Convert a feature set between one pair of .npy files a sample and the packed format, either way.

OUTPUT gets NAME_packed/, or NAME_features/, NAME_labels/ (and NAME_features_flip/), and NAME_classes.json,
NAME_checksums.txt and NAME_manifest.json. Every sample is read back and compared bit for bit before the result appears
under its name. The source's samples are only read. After a kill the same command goes on where it was.

Packed as packed: --to packed on a packed set changes its dtype or the size of its shards.
"""

import argparse
import os
import shutil

import _root  # noqa: F401 (the project's root, on sys.path)

from features.convert import (
    SHARD_BYTES,
    Rows,
    begin,
    check_names,
    check_space,
    make_plan,
    to_packed,
    to_pairs,
    write_manifest,
)
from runtime.process import counted, run_cli


def convert(args):
    from features.extraction import Layout
    from features.packed import PackedStore
    from features.store import find_features, open_store, read_manifest

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
    from features.image_source import MAX_LABEL

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
