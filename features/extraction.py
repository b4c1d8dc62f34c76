"""Extraction of features, part by part, which goes on after a kill.

The images are cut into parts, whose samples are the same whoever makes them and however often: a batch for pairs of
files, a shard for packed ones. NAME_extraction/ holds, until all is there, the settings, the list of the images and
a journal per process, which gets a line when a part is on the disk. Parts without a line are made again.
The ranks share nothing but this folder: no process group, whose waiting has time limits.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time

import numpy as np

from features.autoencoder import LatentScaling, downsampling, weights_digest
from features.image_source import ImageSource, open_source, source_root
from features.images import UnreadableImage, encodable
from features.read_ahead import map_ahead
from runtime.files import whole_file, write_json
from runtime.progress import tqdm
from runtime.run_lock import try_lock
from runtime.untrusted import read_json

# Settings that decide what is written, by their place in the manifest: what a message calls them.
DECISIVE = {
    ("format",): "--format",
    ("image_size",): "--image_size",
    ("seed",): "--seed",
    ("moments",): "--moments",
    ("flip",): "--flip",
    ("vae", "weights_sha256"): "sha256 of the VAE's weights",
    ("sample_shape",): "shape of the VAE's latents",
    ("scaling_factor",): "scaling_factor of the VAE",
    ("shift_factor",): "shift_factor of the VAE",
    ("latents_mean",): "latents_mean of the VAE",
    ("latents_std",): "latents_std of the VAE",
    ("encoding", "device"): "--device",
    ("encoding", "dtype"): "--dtype in effect",
    ("encoding", "batch_size"): "--batch_size",
    ("source", "sha256"): "sha256 of the images' names and labels",
}


def remove_state(layout):
    """Ends the work state, at once for a rank that comes late."""
    done = layout.state + ".done"
    shutil.rmtree(done, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(layout.state, done)
    shutil.rmtree(done, ignore_errors=True)


def check_unused(layout):
    """Raises ValueError if something that this extraction would write is there already."""
    paths = (layout.features, layout.flipped, layout.labels, layout.packed, layout.partial)
    for path in (*paths, layout.classes, layout.checksums):
        if os.path.isfile(path) or os.path.isdir(path) and os.listdir(path):
            raise ValueError(f"{path} belongs to another extraction; choose another --features_path or --name")


def check_settings(path, settings):
    """Raises ValueError unless the settings in `path`, a manifest or an unfinished extraction's, are the same."""
    saved = read_json(path)
    for place, what in DECISIVE.items():
        old, new = saved, settings
        for key in place:
            old, new = old.get(key) if isinstance(old, dict) else None, new[key]
        if old != new:
            raise ValueError(
                f"{path}: belongs to another extraction: {what} was {json.dumps(old)}, now it is {json.dumps(new)}; "
                "repeat its command to go on with it, or choose another --features_path or --name"
            )


def open_extraction(layout, data_path, list_file, settings, rank):
    """Begins an extraction, or goes on with one.

    Args:
        layout: a `Layout`.
        data_path, list_file: the images, see `open_source`.
        settings: the manifest as far as it does not depend on the images, see `make_settings`.
        rank: the others wait until rank 0 has listed the images.

    Returns:
        (`ImageSource`, settings); settings is None if all is done already.

    Raises:
        ValueError: the folder holds another extraction.
    """
    root = source_root(data_path, list_file)
    if rank > 0:
        return _join(layout, root, settings)
    saved = next(filter(os.path.exists, (layout.manifest, layout.settings)), None)
    if saved is None:
        check_unused(layout)
    source = ImageSource.load(layout.images, root) if saved == layout.settings else None
    if source is None or source.kind != "tar":  # whose headers take long to read
        source = open_source(data_path, list_file, source.classes if source else _finished_classes(layout))
    settings = _with_source(settings, source)
    if saved is not None:
        check_settings(saved, settings)
    if saved == layout.manifest:
        folder = layout.packed if read_json(layout.manifest)["format"] == "packed" else layout.features
        if not os.path.isdir(folder):
            raise ValueError(f"{layout.manifest}: speaks of {folder}, which is not there; delete it to start anew")
        remove_state(layout)
        return source, None
    if saved is None:
        os.makedirs(layout.state, exist_ok=True)
        source.save(layout.images)
        write_json(layout.settings, settings)
    return source, read_json(layout.settings)


def _finished_classes(layout):
    """Reads the classes of a complete extraction in the order of their labels; None if there are none to be read."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OSError):
        names = read_json(layout.classes)["id2label"]
        return [str(names[str(label)]) for label in range(len(names))]
    return None


def _with_source(settings, source):
    """Returns the settings with what a manifest says of the images."""
    return {
        **settings,
        "num_images": len(source),
        "num_classes": len(source.classes),
        "source": {"kind": source.kind, "path": encodable(source.root), "sha256": source.digest()},
    }


def _join(layout, root, settings):
    """Waits until rank 0 has begun; returns what `open_extraction` does, (None, None) if all is done."""
    began = time.monotonic()
    while True:
        # In this order: the manifest is there before the state goes.
        with contextlib.suppress(FileNotFoundError):
            if os.path.exists(layout.settings):
                source = ImageSource.load(layout.images, root)
                settings = _with_source(settings, source)
                check_settings(layout.settings, settings)
                return source, settings
        if os.path.exists(layout.manifest):
            return None, None
        if time.monotonic() - began > 60:
            print(f"waiting for rank 0 to list the images in {layout.state}, which all ranks must see", file=sys.stderr)
            began = math.inf  # said once
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Journals
# ---------------------------------------------------------------------------------------------------------------------


class Journal:
    """The list of the parts that are on the disk, which all ranks write.

    Attributes:
        parts: `{part: (unreadable, digests)}`: [[index, reason], ...] and the sha256 sums of the part's files, joined.
    """

    def __init__(self, folder, rank):
        self.folder, self.rank = folder, rank
        self.parts = {}
        self._read = {}  # bytes read of each journal
        self._file = None

    def update(self):
        """Reads what was added since; returns the new parts."""
        new = []
        for name in sorted(os.listdir(self.folder)):
            if not name.startswith("rank-"):
                continue
            with open(os.path.join(self.folder, name), "rb") as file:
                file.seek(self._read.get(name, 0))
                lines, newline, _ = file.read().rpartition(b"\n")
                self._read[name] = self._read.get(name, 0) + len(lines) + len(newline)
            for line in lines.splitlines():
                try:
                    part, unreadable, digests = json.loads(line)
                except ValueError:  # a power cut may leave anything
                    continue
                if part not in self.parts:
                    self.parts[part] = unreadable, bytes.fromhex(digests)
                    new.append(part)
        return new

    def open(self):
        """Makes this rank's journal ready for `add`; ValueError if a process of an earlier start still holds it."""
        path = os.path.join(self.folder, f"rank-{self.rank:04d}.jsonl")
        self._file = open(path, "a+b")
        if not try_lock(self._file):
            raise ValueError(f"{self.folder}: another process is at work on this extraction; wait or end it")
        # A line that a kill cut short would spoil the next one.
        self._file.seek(0)
        whole = self._file.read().rpartition(b"\n")
        self._file.truncate(len(whole[0]) + len(whole[1]))

    def close(self):
        """Lets go of this rank's journal."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer, again
                self._file.close()

    def add(self, part, unreadable, digests):
        """Notes that a part's files are on the disk; digests: their sha256 sums, bytes."""
        self._file.write(json.dumps([part, unreadable, b"".join(digests).hex()]).encode() + b"\n")
        self._file.flush()
        self.parts[part] = unreadable, b"".join(digests)


# ---------------------------------------------------------------------------------------------------------------------
# The end
# ---------------------------------------------------------------------------------------------------------------------


def finish(layout, settings, source, writer, journal):
    """Writes checksums, class names and, last, the manifest, which it returns; removes the work state. Rank 0 only.

    A kill in between does no harm: the next start does it again, with the same result.

    Raises:
        ValueError: not one image could be read.
    """
    unreadable = sorted(entry for lost, _ in journal.parts.values() for entry in lost)
    if len(unreadable) == len(source):
        raise ValueError(f"{source.root}: not one of its {len(source)} images can be read: {unreadable[0][1]}")
    writer.finish()

    digest = hashlib.sha256()
    with whole_file(layout.checksums) as partial, open(partial, "wb") as file:
        for part in sorted(journal.parts):
            lost, digests = journal.parts[part]
            lost = {index for index, _ in lost}
            first = part * writer.part_size
            indices = [i for i in range(first, min(first + writer.part_size, len(source))) if i not in lost]
            labels = source.labels[indices].tolist()
            digests = [digests[i : i + 32] for i in range(0, len(digests), 32)]
            for name, of_file in writer.files(part, indices, labels, digests):
                line = f"{of_file.hex()}  {name}\n".encode()
                digest.update(line)
                file.write(line)
    classes = {"id2label": {str(i): encodable(label) for i, label in enumerate(source.classes)}}
    write_json(layout.classes, classes)
    counts = source.class_counts()
    np.subtract.at(counts, source.labels[[index for index, _ in unreadable]], 1)
    manifest = {
        **settings,
        "num_samples": len(source) - len(unreadable),
        "class_counts": counts.tolist(),
        "unreadable": [
            {"index": index, "image": encodable(source.name(index)), "reason": reason} for index, reason in unreadable
        ],
        "checksums": {"file": os.path.basename(layout.checksums), "sha256": digest.hexdigest()},
    }
    write_json(layout.manifest, manifest)
    remove_state(layout)
    return manifest


def read_batches(source, batches, *, image_size, batch_size, num_workers):
    """Yields (indices, pixels uint8 [N, S, S, 3], {index: error} of what can't be read) of each batch.

    Threads read ahead, not processes, because Pillow decodes and scales without Python's lock. An unreadable image's
    pixels are zeros: a batch has one shape whatever fails, so that the others come out the same to the bit.
    """

    def read(index):
        try:
            return source.pixels(index, image_size)
        except UnreadableImage as error:
            return error

    empty = np.zeros((image_size, image_size, 3), "uint8")
    count = max(2 * batch_size, 4 * num_workers)
    with contextlib.closing(map_ahead(read, itertools.chain.from_iterable(batches), num_workers, count)) as read_images:
        for indices in batches:
            images = dict(zip(indices, read_images, strict=False))
            unreadable = {index: image for index, image in images.items() if isinstance(image, UnreadableImage)}
            yield indices, np.stack([empty if i in unreadable else image for i, image in images.items()]), unreadable


def encode_batches(source, read, encoders):
    """Yields (indices, labels, arrays, unreadable) of each batch that was read, without the unreadable images.

    One batch behind: while the device computes on one, the caller writes the one before.

    Args:
        read: batches of `read_batches`.
        encoders: functions of pixels and indices; `arrays` holds a float32 [N, ...] of each.
    """

    def fetch(indices, tensors, unreadable):
        good = [place for place, index in enumerate(indices) if index not in unreadable]
        arrays = [tensor.numpy()[good] for tensor in tensors]
        indices = [indices[place] for place in good]
        for index, *latents in zip(indices, *arrays, strict=True):
            if not all(np.isfinite(latent).all() for latent in latents):
                raise ValueError(f"{source.name(index)}: its latent is not finite: the VAE overflows in this --dtype")
        return indices, source.labels[indices].tolist(), arrays, unreadable

    running = None
    for indices, pixels, unreadable in itertools.chain(read, [(None, None, None)]):
        started = indices and (indices, [encode(pixels, indices) for encode in encoders], unreadable)
        if running:
            yield fetch(*running)
        running = started


def make_settings(vae, vae_name, name, encoding, options):
    """Returns the manifest of a set, as far as it does not depend on the images.

    Args:
        vae, vae_name: the autoencoder, and the folder or hub name that it has.
        name: of the set.
        encoding: `device`, `dtype` and `batch_size` of the arithmetic.
        options: `format`, `moments`, `flip`, `image_size` and `seed`, as the flags of tools/extract_features.py.

    Raises:
        ValueError: images of this size are not for this VAE.
    """
    factor, size, channels = downsampling(vae), options["image_size"], vae.config.latent_channels
    if size % factor:
        raise ValueError(f"--image_size {size}: expected a multiple of {factor}, the factor of {vae_name}")
    if vae.config.in_channels != 3:
        raise ValueError(f"VAE {vae_name}: takes images of {vae.config.in_channels} channels, expected 3")
    return {
        "version": 1,
        "name": name,
        "sample_shape": [channels, size // factor, size // factor],
        "dtype": "float32",
        **options,
        **LatentScaling.of(vae.config).as_dict(),
        "vae": {
            "name": encodable(vae_name),
            "path": encodable(os.path.abspath(vae_name)) if os.path.isdir(vae_name) else None,
            "weights_sha256": weights_digest(vae),
            "latent_channels": channels,
            "downsampling": factor,
        },
        "encoding": encoding,
    }


def write_parts(source, writer, journal, encode, *, batch_size, rank, world, skip):
    """Encodes and writes this rank's parts; rank 0 then waits for the others'.

    Args:
        encode: a list of batches of indices to what `encode_batches` yields.
        skip: leave out unreadable images; else the first is an `UnreadableImage`.
    """

    def images(part):
        return range(len(source))[part * writer.part_size : (part + 1) * writer.part_size]

    def batches(part):
        return [images(part)[first:][:batch_size] for first in range(0, len(images(part)), batch_size)]

    journal.update()
    left_out = [index for entries, _ in journal.parts.values() for index, _ in entries]
    if left_out and not skip:
        raise ValueError(
            f"{source.name(min(left_out))}: could not be read, and an earlier start with --on_error skip left it out; "
            "give that again, or choose another --features_path or --name to start anew"
        )
    parts = range(-(-len(source) // writer.part_size))
    mine = [part for part in parts if part % world == rank and part not in journal.parts]
    if mine:
        journal.open()
    encoded = encode([batch for part in mine for batch in batches(part)])
    done = sum(len(images(part)) for part in journal.parts)
    with (
        contextlib.closing(encoded),
        tqdm(total=len(source), initial=done, desc="features", unit="image", disable=rank != 0) as progress,
    ):

        def readable(part, unreadable):
            for indices, labels, arrays, errors in itertools.islice(encoded, len(batches(part))):
                if errors and not skip:
                    raise errors[min(errors)]
                unreadable += [[index, encodable(errors[index].reason)] for index in sorted(errors)]
                yield indices, labels, arrays
                progress.update(len(indices) + len(errors))

        def count_others():
            progress.update(sum(len(images(part)) for part in journal.update()))

        for part in mine:
            unreadable = []
            digests = writer.write(part, readable(part, unreadable))
            journal.add(part, unreadable, digests)
            if rank == 0 and world > 1:
                count_others()
        while rank == 0 and len(journal.parts) < len(parts):
            time.sleep(0.2)
            count_others()
