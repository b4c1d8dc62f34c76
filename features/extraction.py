"""Extraction of features, part by part, which goes on after a kill.

The images are cut into parts, whose samples are the same whoever makes them and however often: a batch for pairs of
files, a shard for packed ones. NAME_extraction/ holds, until all is there, the settings, the list of the images and
a journal per process, which gets a line when a part is on the disk. Parts without a line are made again.
The ranks share nothing but this folder: no process group, whose waiting has time limits.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import sys
import time

import numpy as np

from config.schema import SCALING_KEYS
from features import packed
from features.autoencoder import LatentScaling, downsampling, weights_digest
from features.image_source import ImageSource, open_source, source_root
from features.images import UnreadableImage, encodable
from features.read_ahead import map_ahead
from features.statistics import channel_sums, statistics_entries
from features.writers import WRITERS, batches_a_part, write_checksums
from runtime.files import write_json
from runtime.process import say
from runtime.progress import tqdm
from runtime.run_lock import try_lock
from runtime.untrusted import read_json

# Settings that decide what is written: what a message calls them, and their place in the manifest.
DECISIVE = {
    **{f"--{key}": (key,) for key in ("format", "image_size", "seed", "moments", "flip", "background")},
    "sha256 of the VAE's weights": ("vae", "weights_sha256"),
    "shape of the VAE's latents": ("sample_shape",),
    **{f"{key} of the VAE": (key,) for key in SCALING_KEYS},
    "--device": ("encoding", "device"),
    "--dtype in effect": ("encoding", "dtype"),
    "--batch_size": ("encoding", "batch_size"),
    "sha256 of the images' names and labels": ("source", "sha256"),
}
OF_THE_VAE = ("sample_shape", *SCALING_KEYS)
GOES_ON = "what is done is kept, the same command goes on from there"


def make_settings(vae, vae_name, name, encoding, options):
    """Returns the manifest of the set `name`, as far as it does not depend on the images.

    `encoding` has `device`, `dtype` and `batch_size` of the arithmetic; `options` the flags `format`, `moments`,
    `flip`, `image_size`, `background` and `seed`. ValueError for images of a size that is not for this VAE.
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


def check_earlier(layout, settings):
    """Returns the file with the settings of an earlier start or a complete extraction; None without one.

    ValueError if the folder holds another extraction. `settings` may be a part of them: the others are not compared.
    """
    saved = next(filter(os.path.exists, (layout.manifest, layout.settings)), None)
    if saved is None:
        for path in layout.existing():
            raise ValueError(f"{path} belongs to another extraction; choose another --feature_path or --name")
        return None
    check_settings(saved, settings)
    return saved


def check_settings(saved, settings):
    """Raises ValueError if settings, or a part of them, are not those of the file `saved`."""
    earlier = read_json(saved)
    for what, place in DECISIVE.items():
        old, new = _at(earlier, place), _at(settings, place, _UNKNOWN)
        if new is _UNKNOWN or old == new:
            continue
        names = [_at(each, ("vae", "name")) for each in (earlier, settings)]
        differ, of = all(names) and names[0] != names[1], ""
        if differ and place[0] == "vae":  # names say more than two sha256
            what, old, new = "--vae", *names
        elif differ and place[0] in OF_THE_VAE:
            of = f" (of {names[0]} and {names[1]})"
        raise ValueError(
            f"{saved}: belongs to another extraction: {what} was {json.dumps(old)}, now it is "
            f"{json.dumps(new)}{of}; repeat its command to go on, or begin anew in another --feature_path"
        )


_UNKNOWN = object()


def _at(settings, place, default=None):
    """Returns the value at a place of `DECISIVE`."""
    for key in place:
        settings = settings.get(key, default) if isinstance(settings, dict) else default
    return settings


def set_classes(layout):
    """Returns the classes of a complete set in the order of their labels; None where they can't be read."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OSError):
        return [*map(str, read_json(layout.classes)["id2label"].values())]


def remove_state(folder):
    """Ends the work state in a folder, at once for a rank that comes late."""
    done = folder + ".done"
    shutil.rmtree(done, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, done)
    shutil.rmtree(done, ignore_errors=True)


def wait_for_rank_0(has_begun, doing):
    """Returns once `has_begun()`; says after a minute what it waits for rank 0 to do, `doing`."""
    began = time.monotonic()
    while not has_begun():
        if time.monotonic() - began > 60:
            say(f"waiting for rank 0 to {doing}, which all ranks must see", sys.stderr)
            began = math.inf  # said once
        time.sleep(0.1)


class Journal:
    """The list of the parts that are on the disk, which all ranks write, each into a file of its own.

    `parts` is `{part: (unreadable, digests, sums)}`: [[index, reason], ...], the sha256 sums of the part's files,
    joined, and its `channel_sums` as a list, None where an earlier version wrote the line.
    ValueError if a process of an earlier start still holds this rank's file.
    """

    def __init__(self, folder, rank):
        self.folder, self.parts = folder, {}
        self._read = {}  # bytes read of each file
        self._file = open(os.path.join(folder, f"rank-{rank:04d}.jsonl"), "a+b")
        if not try_lock(self._file):
            raise ValueError(f"{folder}: another process is at work on this extraction; wait or end it")
        # A line that a kill cut short would spoil the next one.
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def update(self):
        """Reads what was added since; returns the new parts."""
        new = []
        for name in sorted(name for name in os.listdir(self.folder) if name.startswith("rank-")):
            with open(os.path.join(self.folder, name), "rb") as file:
                file.seek(self._read.get(name, 0))
                added = file.read()
            added = added[: added.rfind(b"\n") + 1]
            self._read[name] = self._read.get(name, 0) + len(added)
            for line in added.splitlines():
                try:
                    part, unreadable, digests, *sums = json.loads(line)
                    digests = b"".join(map(bytes.fromhex, digests))
                except ValueError:  # a power cut may leave anything
                    continue
                if part not in self.parts:
                    self.parts[part] = unreadable, digests, next(iter(sums), None)
                    new.append(part)
        return new

    def add(self, part, unreadable, digests, sums=None):
        """Notes that a part's files are on the disk; digests: their sha256 sums, bytes; sums: of `channel_sums`."""
        line = [part, unreadable, [digest.hex() for digest in digests], None if sums is None else sums.tolist()]
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self.parts[part] = unreadable, b"".join(digests), line[-1]

    def close(self):
        with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer, again
            self._file.close()


def encode_ahead(source, batches, encoder, settings, *, num_workers, overflow):
    """Yields (indices, labels, [rows, rows of mirrored images], {index: error} of what can't be read) of each batch.

    The other rows come out the same to the bit whatever fails, because a batch keeps its shape: an unreadable image's
    pixels are zeros. Threads read ahead, not processes, because Pillow decodes and scales without Python's lock.
    The batches come one behind: while the device computes on one, the caller writes the one before.

    Args:
        source: an `ImageSource`. batches: lists of its images' numbers.
        encoder: called as a `LatentEncoder` is.
        settings: a manifest's `image_size`, `flip` and `encoding.batch_size`.
        overflow: what the `ValueError` for numbers that are not finite says.
    """
    size, flip, batch_size = settings["image_size"], settings["flip"], settings["encoding"]["batch_size"]
    empty = np.zeros((size, size, 3), "uint8")

    def read(index):
        try:
            return source.pixels(index, size), None
        except UnreadableImage as error:
            return empty, error

    def start(indices):
        pixels, errors = zip(*itertools.islice(images, len(indices)), strict=True)
        lost = {index: error for index, error in zip(indices, errors, strict=True) if error}
        pixels = np.stack(pixels)
        return indices, lost, [encoder(pixels, indices, mirrored=bool(twin)) for twin in range(1 + flip)]

    def fetch(indices, lost, tensors):
        kept = [index for index in indices if index not in lost]
        arrays = [tensor.numpy()[np.isin(indices, kept)] for tensor in tensors]
        for index, *rows in zip(kept, *arrays, strict=True):
            if not np.isfinite(rows).all():
                raise ValueError(f"{source.name(index)}: {overflow}")
        return kept, source.labels[kept].tolist(), arrays, lost

    count = max(2 * batch_size, 4 * num_workers)
    with contextlib.closing(map_ahead(read, itertools.chain.from_iterable(batches), num_workers, count)) as images:
        for started, _ in itertools.pairwise(itertools.chain(map(start, batches), [None])):
            yield fetch(*started)


class Extraction:
    """The share of process `rank` of `world` in an extraction, which rank 0 begins and ends.

    To the settings of `make_settings`, `open` adds what concerns the images; from then on `source` is an `ImageSource`.
    """

    def __init__(self, layout, settings, rank, world):
        self.layout, self.settings, self.rank, self.world = layout, settings, rank, world

    # The beginning.

    def open(self, data_path, list_file, announce=None):
        """Begins, or goes on, with the images of `open_source`; returns False if all is done already.

        The other ranks wait until rank 0 has listed the images and called `announce`, if it is given, with their
        number: nothing is written before. ValueError if the folder holds another extraction.
        """
        layout, root = self.layout, source_root(data_path, list_file)
        if self.rank > 0:
            return self._join(root)
        saved = check_earlier(layout, self.settings)
        source = ImageSource.load(layout.images, root) if saved == layout.settings else None
        if source is None or source.kind != "tar":  # whose headers take long to read
            source = open_source(data_path, list_file, source.classes if source else set_classes(layout))
        self._take(source, saved)
        if announce is not None:
            announce(len(source))
        if saved == layout.manifest:
            folder = layout.packed if self.settings["format"] == "packed" else layout.features
            if not os.path.isdir(folder):
                raise ValueError(f"{saved}: speaks of {folder}, which is not there; delete it to start anew")
            remove_state(self.layout.state)
            return False
        if saved is None:
            os.makedirs(layout.state, exist_ok=True)
            source.save(layout.images)
            write_json(layout.settings, self.settings)
        self.settings = read_json(layout.settings)  # the folders' names are those of the first start
        return True

    def _join(self, root):
        """Waits until rank 0 has begun; returns what `open` does."""
        layout = self.layout
        signs = (layout.settings, layout.manifest)
        wait_for_rank_0(lambda: any(map(os.path.exists, signs)), f"list the images in {layout.state}")
        try:
            self._take(ImageSource.load(layout.images, root), layout.settings)
        except FileNotFoundError:  # the state goes when the manifest is there
            if not os.path.exists(layout.manifest):
                raise
            return False
        return True

    def _take(self, source, saved):
        """Sets images and settings; ValueError if those in `saved`, a manifest or an earlier start's, are others."""
        self.source = source
        source.background = self.settings["background"]
        self.settings |= {
            "num_images": len(source),
            "num_classes": len(source.classes),
            "source": {"kind": source.kind, "path": encodable(source.root), "sha256": source.digest()},
        }
        if saved is not None:
            check_settings(saved, self.settings)

    # The work.

    def run(self, encoder, *, num_workers, skip):
        """Encodes and writes this rank's parts; rank 0 then waits for the others' and returns the manifest.

        `num_workers` threads read the images. ValueError for an image that can't be read, which `skip` leaves out, if
        not one can be read, and for a latent that is not finite.
        """
        settings, source = self.settings, self.source
        (channels, *shape), batch_size = settings["sample_shape"], settings["encoding"]["batch_size"]
        shape = (channels * (1 + settings["moments"]), *shape)
        writer = WRITERS[settings["format"]](self.layout, row_shape=shape, flip=settings["flip"])
        batches = [range(len(source))[first:][:batch_size] for first in range(0, len(source), batch_size)]
        size = batches_a_part(settings["format"], len(source), batch_size)
        parts = [batches[first : first + size] for first in range(0, len(batches), size)]
        counts = [sum(map(len, part)) for part in parts]
        with contextlib.closing(Journal(self.layout.state, self.rank)) as journal:
            journal.update()
            left_out = [index for entries, *_ in journal.parts.values() for index, _ in entries]
            if left_out and not skip:
                raise ValueError(
                    f"{source.name(min(left_out))}: could not be read, and an earlier start with --on_error skip left "
                    "it out; give that again, or choose another --feature_path or --name to start anew"
                )
            mine = [part for part in range(self.rank, len(parts), self.world) if part not in journal.parts]
            encoded = encode_ahead(
                source,
                [batch for part in mine for batch in parts[part]],
                encoder,
                settings,
                num_workers=num_workers,
                overflow="its latent is not finite, the VAE overflows in --dtype",
            )
            done = sum(counts[part] for part in journal.parts)
            progress = tqdm(total=len(source), initial=done, desc="features", unit="image", disable=self.rank != 0)

            def readable(part, unreadable, sums):
                for indices, labels, arrays, errors in itertools.islice(encoded, len(parts[part])):
                    if errors and not skip:
                        raise ValueError(
                            f"{errors[min(errors)]}; repair or remove it, or give --on_error skip: {GOES_ON}"
                        )
                    unreadable += [[index, encodable(errors[index].reason)] for index in sorted(errors)]
                    for latents in arrays:
                        sums += channel_sums(latents, channels)
                    yield indices, labels, arrays
                    progress.update(len(indices) + len(errors))

            def count_others():
                progress.update(sum(counts[part] for part in journal.update()))

            with contextlib.closing(encoded), progress:
                for part in mine:
                    unreadable, sums = [], np.zeros((3, channels))
                    digests = writer.write(part, readable(part, unreadable, sums))
                    journal.add(part, unreadable, digests, sums)
                    if self.rank == 0:
                        count_others()
                while self.rank == 0 and len(journal.parts) < len(parts):
                    time.sleep(0.2)
                    count_others()
            return self._finish(writer, parts, journal.parts) if self.rank == 0 else None

    # The end.

    def _finish(self, writer, parts, written):
        """Writes class names, checksums and, last, the manifest, which it returns; removes the work state.

        A kill in between does no harm: the next start does it again, with the same result.
        """
        layout, source = self.layout, self.source
        unreadable = sorted(entry for lost, *_ in written.values() for entry in lost)
        lost = [index for index, _ in unreadable]
        if len(lost) == len(source):
            raise ValueError(f"{source.root}: not one of its {len(source)} images can be read: {unreadable[0][1]}")
        if os.path.exists(layout.partial):
            packed.finish(layout.features_path, layout.name)

        def files():
            for part, batches in enumerate(parts):
                lost, digests, _ = written[part]
                indices = sorted(set().union(*batches) - {index for index, _ in lost})
                digests = [digests[i : i + 32] for i in range(0, len(digests), 32)]
                yield from writer.files(part, indices, digests)

        write_json(layout.classes, {"id2label": dict(enumerate(map(encodable, source.classes)))})
        counts = source.class_counts()
        np.subtract.at(counts, source.labels[lost], 1)
        sums = [written[part][-1] for part in range(len(parts))]
        manifest = {
            **self.settings,
            **({} if None in sums else statistics_entries(np.sum(sums, axis=0))),
            "num_samples": len(source) - len(lost),
            "class_counts": counts.tolist(),
            "unreadable": [
                {"index": index, "image": encodable(source.name(index)), "reason": reason}
                for index, reason in unreadable
            ],
            "checksums": write_checksums(layout.checksums, files()),
        }
        write_json(layout.manifest, manifest)
        remove_state(self.layout.state)
        return manifest
