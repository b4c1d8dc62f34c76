"""The check of a whole feature set: every sample in worker processes, then counts, statistics and checksums."""

import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from features.autoencoder import LatentScaling
from features.image_source import MAX_LABEL
from features.layout import Layout
from features.normalization import choose_normalization
from features.npy import load_npy
from features.packed import MappedStore
from features.pairs import NpyReader, PairStore, match_pairs, read_label, without_batch_axis
from features.statistics import can_be_moments, channel_statistics, channel_sums, statistics_entries, total_std
from features.store import open_encoder, open_store, read_manifest
from runtime.files import sha256_of_file
from runtime.process import counted, one_line
from runtime.progress import tqdm

CHUNK_BYTES = 1 << 24  # of rows, a task of a worker process
STD_RANGE = (0.5, 2.0)
ROW_KINDS = ("latents", "flipped")
# Of a sample: its label, -1 where there is no valid one; whether its latents are right; the hash of the first.
SAMPLE = np.dtype([("label", "int64"), ("usable", "bool"), ("digest", "uint64", 2)])
_shared = []  # what a worker process was started with: both stores, a report's facts, whether pairs are hashed


@dataclass
class Report:
    """The result of `check_set`: `facts`, JSON values, `notes`, sentences, and `problems`, {"kind", "text"} each.

    `store` is a `MappedStore` or `Pairs`, `samples` `(N,)` of `SAMPLE`: `(0,)`, with few facts, if there were none.
    `encoder` is the store of encoder features, or None.
    """

    manifest: dict
    layout: Layout
    facts: dict
    store: Any = None
    encoder: Any = None
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, SAMPLE))
    notes: list = field(default_factory=list)
    problems: list = field(default_factory=list)

    def add(self, kind, path, text):
        """Adds a problem with the file or folder `path`."""
        self.problems.append({"kind": kind, "text": f"{path}: {text}"})


class Pairs(PairStore):
    """The pairs of files whose counterparts are there; `lonely` are the other files, of `match_pairs`."""

    def _open(self):
        self._names, self.lonely = match_pairs([*self._kinds.values()])
        self.row_shape = self.dtype = None
        for index in range(min(1000, len(self))):
            with contextlib.suppress(ValueError):
                latent = without_batch_axis(load_npy(self.source(index)))
                if latent.dtype.kind == "f" and latent.ndim == 3 and latent.size:
                    self.row_shape, self.dtype = latent.shape, latent.dtype
                    break


def check_set(feature_path, kind, name, *, model, num_workers, no_checksums, allow_duplicates) -> Report:
    """Checks every sample of a set, in parallel; a broken manifest, or a process that dies, is a `ValueError`.

    `kind` and `name` are what `find_features` returns, the last three flags of tools/check_features.py. `model` is that
    section of a config, for shape and classes; None: what the manifest says.
    """
    layout = Layout(feature_path, name)
    facts = {"feature_path": feature_path, "name": name, "format": kind}
    report = Report(read_manifest(feature_path, name), layout, facts)
    try:
        report.store = store = Pairs(feature_path, name) if kind == "pairs" else open_store(feature_path, kind, name)
        for path, other in getattr(store, "lonely", ()):
            report.add("pairs", path, f"has no counterpart in {other}")
        if not len(store) or store.row_shape is None:
            raise ValueError(f"{store.path}: no readable sample in it")
        if len(store.row_shape) != 3:
            raise ValueError(f"{store.path}: holds rows of shape {store.row_shape}, expected (C, h, w)")
    except (ValueError, OSError) as error:
        report.problems.append({"kind": "format", "text": one_line(error)})
        return report
    _expect(report, model)
    _open_encoder(report, kind)
    wanted = None if no_checksums else _read_checksums(report)

    size = len(store)
    row_bytes = 4 * math.prod(facts["row_shape"]) * (1 + store.has_flip)
    step = max(1, min(CHUNK_BYTES // row_bytes, -(-size // num_workers)))
    fork = multiprocessing.get_context("fork")  # because a store is shared, not sent
    parts, sums, files = [], 0, {}
    try:
        with (
            ProcessPoolExecutor(
                num_workers, fork, _shared.extend, [(store, report.encoder, facts, wanted is not None)]
            ) as pool,
            tqdm(total=size, desc="checking", unit="sample") as bar,
        ):
            spans = [range(size)[start:][:step] for start in range(0, size, step)]
            for samples, numbers, problems, read in pool.map(check_span, spans):
                parts.append(samples)
                sums += numbers
                report.problems += problems
                files.update(read)
                bar.update(len(samples))
            if wanted and kind == "packed":
                bar.set_description("checksums")
                paths = {name: os.path.join(feature_path, name) for name in wanted}
                paths = {name: path for name, path in paths.items() if os.path.isfile(path)}
                files = dict(zip(paths, pool.map(sha256_of_file, paths.values()), strict=True))
    except BrokenProcessPool:
        raise ValueError("a process of the check died; was the memory full? Give a smaller --num_workers") from None
    report.samples = np.concatenate(parts)
    _check_counts(report)
    _check_duplicates(report, allow_duplicates)
    _check_statistics(report, sums)
    _compare_checksums(report, wanted, files)
    return report


def read_rows(store, indices, facts, hashing=False):
    """Reads samples, and of pairs those that can be read.

    Returns `(rows, labels, whole, problems, files)`: [latents, mirrored latents if there are any], float32; labels,
    None for one that can't be read; `(n,)` bool, samples whose latents could be; problems as of a `Report`; and of
    pairs that are to be hashed `{path under the feature folder: sha256}`.
    """
    labels, whole, problems, files = [None] * len(indices), np.ones(len(indices), bool), [], {}
    shape, dtype, reader = facts["row_shape"], facts["dtype"], NpyReader()
    rows = [np.empty((len(indices), *shape), "float32") for _ in range(1 + store.has_flip)]
    if isinstance(store, MappedStore):
        for twin, out in enumerate(rows):
            labels = store.read(indices, out, np.full(len(indices), bool(twin))).tolist()
        return rows, labels, whole, problems, files
    for place, index in enumerate(indices):
        for kind, out in zip(("labels", *ROW_KINDS), (labels, *rows), strict=False):
            path = store.source(index, kind)
            try:
                data = Path(path).read_bytes()
                if hashing:
                    folder, name = os.path.split(path)
                    files[f"{os.path.basename(folder)}/{name}"] = hashlib.sha256(data).digest()
                array = reader.parse(data, path)
                array = read_label(array, path) if kind == "labels" else without_batch_axis(array)
                if kind != "labels" and (array.shape != shape or array.dtype.name != dtype):
                    holds = f"holds {array.dtype} of shape {array.shape}"
                    raise ValueError(f"{holds}, expected {dtype} of shape {shape}")
                out[place] = array
            except (ValueError, OSError) as error:
                text = one_line(error)
                kind = "labels" if kind == "labels" else "latents"
                problems.append({"kind": kind, "text": text if path in text else f"{path}: {text}"})
                whole[place] &= kind == "labels"
    return rows, labels, whole, problems, files


def check_span(span):
    """Looks into a range of samples, in a worker process.

    Returns `(samples, sums, problems, files)`: `(n,)` of `SAMPLE`; `(4, C)` float64, the `channel_sums`, and how many
    mirrored latents are their originals; the last two as of `read_rows`.
    """
    indices, (store, encoder, facts, hashing) = np.array(span), _shared
    channels = facts["row_shape"][0] // (1 + facts["moments"])  # that a model sees
    samples, sums = np.zeros(len(indices), SAMPLE), np.zeros((4, channels))
    rows, labels, whole, problems, files = read_rows(store, indices, facts, hashing)

    def add(kind, index, what, text):
        problems.append({"kind": kind, "text": f"{store.source(index, what)}: {text}"})

    last = MAX_LABEL if facts["num_classes"] is None else facts["num_classes"] - 1
    for place, label in enumerate(labels):
        samples["label"][place] = label if label is not None and 0 <= label <= MAX_LABEL else -1
        if label is not None and not 0 <= label <= last:
            add("labels", indices[place], "labels", f"label {label}, expected 0..{last}")
    places = np.flatnonzero(whole)
    rows = [array[places] for array in rows]
    for place, row in zip(places, rows[0], strict=True):
        samples["digest"][place] = np.frombuffer(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), "uint64")
    for kind, array in zip(ROW_KINDS, rows, strict=False):
        bad = (~np.isfinite(array)).sum(axis=(1, 2, 3))
        positive = (array[:, channels:] > 0).all(axis=(1, 2, 3))  # of no number without moments
        for row in np.flatnonzero(bad):
            add("finite", indices[places[row]], kind, f"{counted(bad[row], 'number')} not finite")
        for row in np.flatnonzero((bad == 0) & ~positive):
            add("moments", indices[places[row]], kind, "a standard deviation is not above 0")
        good = (bad == 0) & positive
        whole[places] &= good
        sums[:3] += channel_sums(array[good], channels)
        if kind == "flipped":
            sums[3] = (array == rows[0]).all(axis=(1, 2, 3)).sum()
    samples["usable"] = whole
    if encoder is not None:
        found, read = check_encoder(encoder, indices.tolist(), hashing)
        problems, files = problems + found, {**files, **read}
    return samples, sums, problems, files


def check_encoder(encoder, indices, hashing):
    """Returns the problems of samples' encoder features, and of pairs that are to be hashed their sums by path."""
    problems, files, reader, mapped = [], {}, NpyReader(), isinstance(encoder, MappedStore)
    array = np.empty((1, *encoder.row_shape), encoder.dtype)
    for kind, index in itertools.product(ROW_KINDS[: 1 + encoder.has_flip], indices):
        path, text = encoder.source(index, kind), None
        try:
            if mapped:
                encoder.read(np.array([index]), array, np.array([kind == "flipped"]))
            else:
                data = Path(path).read_bytes()
                if hashing:
                    files["/".join(path.split(os.sep)[-2:])] = hashlib.sha256(data).digest()
                row = reader.parse(data, path)
                if row.shape != encoder.row_shape or row.dtype != encoder.dtype:
                    holds = f"holds {row.dtype} of shape {row.shape}"
                    raise ValueError(f"{path}: {holds}, expected {encoder.dtype} of shape {encoder.row_shape}")
                array[0] = row
            if bad := int((~np.isfinite(array)).sum()):
                text = f"{path}: {counted(bad, 'number')} not finite"
        except (ValueError, OSError) as error:
            text = one_line(error) if path in one_line(error) else f"{path}: {one_line(error)}"
        problems += [{"kind": "encoder", "text": text}] if text else []
    return problems, files


def _open_encoder(report, kind):
    """Opens the set's encoder features, if there are any, and compares them with what the manifest tells."""
    layout, told = report.layout, report.manifest.get("encoder")
    try:
        report.encoder = encoder = open_encoder(layout.features_path, kind, layout.name, report.store)
    except (ValueError, OSError) as error:
        report.problems.append({"kind": "encoder", "text": one_line(error)})
        return
    if encoder is None:
        if told is not None:
            report.add("encoder", layout.manifest, "tells of encoder features, which are not there")
        return
    tokens, width = encoder.row_shape
    report.facts["encoder"] = {"tokens": tokens, "width": width, "dtype": encoder.dtype.name}
    if told is not None and (told["token_grid"] ** 2, told["width"]) != encoder.row_shape:
        holds = f"holds {tokens} tokens of width {width}"
        report.add("encoder", encoder.path, f"{holds}, the manifest tells {told['token_grid']}^2 of {told['width']}")
    if encoder.has_flip != report.store.has_flip or len(encoder) != len(report.store):
        report.add("encoder", encoder.path, "has other samples, or other mirrored ones, than the latents")
        report.encoder = None


def _expect(report, model):
    """Notes shape and classes of every sample: what the config says, else the manifest, else the first sample."""
    manifest, store = report.manifest, report.store
    shape, num_classes = manifest.get("sample_shape"), manifest.get("num_classes")
    if model:
        shape = (model["in_channels"], model["sample_size"], model["sample_size"])
        num_classes = model["num_classes"]
    moments, dtype = manifest.get("moments"), manifest.get("dtype", store.dtype.name)
    if moments is None and shape is None:  # as `features.dataset` finds it out, of more rows
        facts = {"row_shape": store.row_shape, "dtype": dtype}
        rows, _, whole, *_ = read_rows(store, np.arange(min(len(store), 16)), facts)
        if moments := whole.any() and can_be_moments(rows[0][whole]):
            half = store.row_shape[0] // 2
            report.notes.append(f"taken for moments, mean and standard deviation of {half} channels: no manifest tells")
    elif moments is None:
        moments = store.row_shape[0] == 2 * shape[0]
    row_shape = store.row_shape if shape is None else (shape[0] * (1 + moments), *shape[1:])
    if num_classes is None:
        report.notes.append("the number of classes is not known: no --config_file, no manifest")
    if report.facts["format"] != "pairs" and row_shape != store.row_shape:
        report.add("latents", store.path, f"holds latents of shape {store.row_shape}, expected {row_shape}")
        row_shape = store.row_shape
    report.facts.update(samples=len(store), row_shape=row_shape, dtype=dtype, moments=bool(moments))
    report.facts.update(flip=store.has_flip, num_classes=num_classes)


def _check_counts(report):
    facts, manifest, labels = report.facts, report.manifest, report.samples["label"]
    all_counts = np.bincount(labels[labels >= 0], minlength=facts["num_classes"] or 0)
    facts["labels"] = {"min": int(labels.min()), "max": int(labels.max())}
    facts["class_counts"] = all_counts.tolist()
    counts = all_counts[: facts["num_classes"]]  # without labels that are none of the classes
    empty = int((counts == 0).sum())
    if empty:
        report.notes.append(f"{empty} of {counted(len(counts), 'class', 'classes')} have no sample")
    path = report.layout.manifest
    for key, found in (("num_samples", facts["samples"]), ("flip", facts["flip"])):
        if manifest.get(key, found) != found:
            report.add("manifest", path, f"{key} {manifest[key]}, found {found}")
    # The config may have more classes than the set.
    used = np.trim_zeros(all_counts, "b").tolist()
    if np.trim_zeros(np.asarray(manifest.get("class_counts", used)), "b").tolist() != used:
        report.add("manifest", path, "class_counts are not those of the labels")


def _check_statistics(report, sums):
    """Notes mean and standard deviation, which is about 1 if the latents are scaled; `sums` as of `check_span`."""
    count, twins = sums[2:, 0]
    if twins and twins == report.samples["usable"].sum():
        report.add("mirrored", report.store.path, "every mirrored latent is the same as its original")
    if not count:
        return
    mean, channel_std = channel_statistics(sums[:3])
    std = total_std(mean, channel_std)
    report.facts["latents"] = {"mean": float(mean.mean()), "std": std, **statistics_entries(sums[:3])}
    if report.manifest.get("latent_normalization") == "channel":  # of latents that are not scaled
        try:
            normalization, note = choose_normalization(None, 1.0, report.manifest, report.store, len(mean))
        except ValueError as error:  # of numbers that are not finite, say
            report.problems.append({"kind": "scale", "text": one_line(error)})
            return
        report.notes += [note] if note else []
        mean, divisor = mean - normalization["mean"], np.array(normalization["std"])
        if not STD_RANGE[0] <= (std := total_std(mean / divisor, channel_std / divisor)) <= STD_RANGE[1]:
            text = f"normalised by its statistics, the latents' standard deviation is {std:.4g}, expected about 1"
            report.add("scale", report.store.path, text)
        return
    if STD_RANGE[0] <= std <= STD_RANGE[1]:
        return
    text = f"the latents' standard deviation is {std:.4g}, expected about 1"
    manifest = report.manifest if report.manifest.get("scaling_factor") else {"scaling_factor": 0.18215}  # SD's
    scaling = LatentScaling.of(manifest, channels=len(mean), source=report.layout.manifest)
    name = f"scaling factor {scaling.scaling_factor:g}" + ("" if scaling.is_plain else ", with shift or statistics,")
    # Mean and standard deviation of each channel, had they been scaled once more or less.
    ends = [np.reshape(value, (-1, 1, 1)) for value in (mean - channel_std, mean + channel_std)]
    for change, what in ((scaling.normalize, "is not in them"), (scaling.denormalize, "is in them twice")):
        low, high = map(change, ends)
        if STD_RANGE[0] <= math.sqrt(np.mean(((high - low) / 2) ** 2) + np.var((low + high) / 2)) <= STD_RANGE[1]:
            text += f"; it looks as if the autoencoder's {name} {what}"
    report.add("scale", report.store.path, text)


def _check_duplicates(report, allowed):
    usable, labels = np.flatnonzero(report.samples["usable"]), report.samples["label"]
    digests, source = report.samples["digest"][usable], report.store.source
    _, first, group = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    first = usable[first[group.reshape(-1)]]  # the first sample with this one's latent
    report.facts["duplicates"] = int((first != usable).sum())
    for index, other in zip(usable[first != usable], first[first != usable], strict=True):
        text = f"is the same latent as {source(other)}"
        if labels[index] != labels[other]:
            report.add("duplicates", source(index), f"{text}, but label {labels[index]}, there {labels[other]}")
        elif not allowed:
            report.add("duplicates", source(index), text)


def _read_checksums(report):
    """Returns `{path under the folder: sha256}` of the manifest's checksum file; None if there is none to compare."""
    if report.manifest.get("checksums") is None:
        report.notes.append("no checksums to compare: no manifest, or none in it")
        return None
    entries = [report.manifest, *([report.manifest.get("encoder", {})] if report.encoder is not None else [])]
    found = [_read_sums(report, entry["checksums"]) for entry in entries if "checksums" in entry]
    return None if None in found else {name: value for sums in found for name, value in sums.items()}


def _read_sums(report, checksums):
    path = os.path.join(report.layout.features_path, checksums["file"])
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        report.add("checksums", path, error.strerror)
        return None
    if hashlib.sha256(data).hexdigest() != checksums["sha256"]:
        report.add("checksums", path, "is not the file that the manifest was written with")
    wanted = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        value, _, name = line.partition(b"  ")
        try:
            if line:
                wanted[os.fsdecode(name)] = bytes.fromhex(value.decode())
        except ValueError:
            report.add("checksums", path, f"line {number} is no checksum")
    return wanted


def _compare_checksums(report, wanted, files):
    report.facts["files_with_checksum"] = None if wanted is None else len(wanted)
    for name in {**(wanted or {}), **files}:
        path = os.path.join(report.layout.features_path, name)
        if name not in files:
            report.add("checksums", path, "has a checksum, but is not there")
        elif name not in wanted:
            report.add("checksums", path, "has no checksum")
        elif files[name] != wanted[name]:
            report.add("checksums", path, "its checksum is another")
