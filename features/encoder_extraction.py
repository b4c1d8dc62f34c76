"""Extraction of encoder features for a set whose latents are there, part by part, which goes on after a kill.

It works as `features.extraction` does: parts are batches for pairs of files, shards for packed ones, and NAME_encoding/
holds the journals until all is there. A set that was complete before stays one all the time. At the end its manifest
gets the entry `encoder`.
"""

import contextlib
import json
import math
import os
import shutil
import time

from features.encoders import PatchEncoder
from features.extraction import Journal, encode_ahead, remove_state, wait_for_rank_0
from features.image_source import ImageSource, source_root
from features.layout import Layout
from features.originals import image_numbers
from features.packed import ENCODER_FILES
from features.store import open_store
from features.writers import ENCODER_WRITERS, write_checksums
from runtime.files import write_json
from runtime.process import counted
from runtime.progress import tqdm
from runtime.untrusted import read_json, read_json_object

# Settings that decide what is written, and what a message calls them.
DECISIVE = {
    "program_sha256": "sha256 of the encoder's program",
    "weights_sha256": "sha256 of the encoder's weights",
    "encoder_size": "--encoder_size",
    "image_mean": "image_mean of the encoder's preprocessor_config.json",
    "image_std": "image_std of the encoder's preprocessor_config.json",
    "token_grid": "--token_grid",
    "width": "the encoder's width",
    "encoding": "--encoder_batch, device or --dtype",
}


def size_sentence(num_images, settings, flip, folder, *, check):
    """Returns a sentence on how much encoder features take; ValueError if that is not free, where it is to `check`."""
    tokens, width = settings["token_grid"] ** 2, settings["width"]
    needed = num_images * (1 + flip) * tokens * width * 2
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    free = shutil.disk_usage(folder).free
    what = f"{counted(num_images, 'image')}{' and their mirror images' if flip else ''} x {tokens} tokens x {width}"
    sentence = f"encoder features: {what} x 2 bytes = {_shown(needed)}; {_shown(free)} are free in {folder}"
    if check and needed > free:
        raise ValueError(f"{sentence}; nothing was written")
    return sentence


def _shown(count):
    power = min(4, int(math.log10(max(1, count))) // 3)
    value = count / 1000**power
    return f"{value:.{0 if value >= 100 or not power else 2}f} {('bytes', 'KB', 'MB', 'GB', 'TB')[power]}"


def discard_encoder(layout):
    """Deletes a set's encoder features, and what its manifest tells of them."""
    manifest = read_json_object(layout.manifest)
    if manifest.pop("encoder", None) is not None:
        write_json(layout.manifest, manifest)
    for folder in (layout.encoder_state, layout.encoder, layout.encoder_flipped):
        shutil.rmtree(folder, ignore_errors=True)
    shards = [entry.path for entry in os.scandir(layout.packed)] if os.path.isdir(layout.packed) else []
    for path in (layout.encoder_checksums, *(os.path.join(shard, name) for shard in shards for name in ENCODER_FILES)):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


class EncoderExtraction:
    """The share of process `rank` of `world` in the extraction of encoder features; rank 0 begins and ends it.

    Args:
        layout: a `Layout` of a complete set.
        encoder: a `PatchEncoder`. encoding: `device`, `dtype` and `batch_size` of the arithmetic.
        replace: features of another encoder are deleted, and not a mistake.
    """

    def __init__(self, layout: Layout, encoder: PatchEncoder, encoding, *, rank, world, replace=False):
        self.layout, self.encoder, self.rank, self.world = layout, encoder, rank, world
        self.settings, self.replace = {**encoder.settings, "encoding": encoding}, replace
        self._settings_file = os.path.join(layout.encoder_state, "settings.json")
        self._images_file = os.path.join(layout.encoder_state, "images.npz")

    def is_begun(self):
        """Returns whether these very features are there already, or a part of them."""
        entry = read_json_object(self.layout.manifest).get("encoder") if os.path.exists(self.layout.manifest) else None
        state = read_json(self._settings_file) if os.path.exists(self._settings_file) else None
        return any(found is not None and not self._difference(found) for found in (entry, state))

    def _difference(self, earlier):
        """Returns in words how settings differ from these; None if they don't in what decides."""
        for key, what in DECISIVE.items():
            if earlier.get(key) != self.settings[key]:
                return f"{what} was {json.dumps(earlier.get(key))}, now it is {json.dumps(self.settings[key])}"
        return None

    def open(self, source, data_path, list_file):
        """Begins, or goes on, with the images of a source, an `ImageSource`; returns False if all is done already.

        ValueError if there are features of another encoder, or the source is not that of the set. The other ranks wait
        until rank 0 has begun; their source may be None.
        """
        layout = self.layout
        if self.rank > 0:
            return self._join(source_root(data_path, list_file))
        manifest = read_json_object(layout.manifest)
        sha256 = manifest.get("source", {}).get("sha256")
        if sha256 is None:
            raise ValueError(f"{layout.manifest}: does not tell which images the set was made of")
        if source.digest() != sha256:
            raise ValueError(
                f"{source.root}: holds other images, or other names, than those that {layout.manifest} was made of"
            )
        self.source = source
        if self.replace and not self.is_begun():
            discard_encoder(layout)
        entry = read_json_object(layout.manifest).get("encoder")
        saved = read_json(self._settings_file) if os.path.exists(self._settings_file) else entry
        if saved is not None and (difference := self._difference(saved)):
            raise ValueError(
                f"{layout.manifest if saved is entry else self._settings_file}: belongs to other encoder features: "
                f"{difference}; repeat its command to go on, or give --replace_encoder, which deletes them"
            )
        if entry is not None:
            remove_state(self.layout.encoder_state)
            return False
        if not os.path.exists(self._settings_file):
            files = [layout.encoder, *(os.path.join(layout.packed, "shard-00000", name) for name in ENCODER_FILES)]
            for path in filter(os.path.exists, files):
                raise ValueError(
                    f"{path}: is there, but {layout.manifest} does not tell of it; --replace_encoder deletes it"
                )
            os.makedirs(layout.encoder_state, exist_ok=True)
            source.save(self._images_file)
            write_json(self._settings_file, self.settings)
        return True

    def _join(self, root):
        """Waits until rank 0 has begun these very features; returns what `open` does."""
        wait_for_rank_0(self.is_begun, f"begin in {self.layout.encoder_state}")
        try:
            self.source = ImageSource.load(self._images_file, root)
        except FileNotFoundError:  # the state goes when the manifest tells of the features
            return False
        return True

    def run(self, *, num_workers):
        """Encodes and writes this rank's parts; rank 0 then waits for the others' and adds the entry to the manifest.

        ValueError for an image that can't be read any more, and for features beyond float16.
        """
        layout, manifest, encoding = self.layout, read_json_object(self.layout.manifest), self.settings["encoding"]
        kind, size = "packed" if os.path.isdir(layout.packed) else "npy", encoding["batch_size"]
        store = open_store(layout.features_path, "packed" if kind == "packed" else "pairs", layout.name)
        names, numbers = [*map(os.fsdecode, store.names().tolist())], image_numbers(store, slice(None))
        self.source.background = manifest.get("background")
        shape, flip = (self.settings["token_grid"] ** 2, self.settings["width"]), store.has_flip
        writer, count = ENCODER_WRITERS[kind](layout, row_shape=shape, flip=flip), len(store)
        spans = store.spans() if kind == "packed" else [range(count)[i:][:size] for i in range(0, count, size)]
        parts = [[span[i:][:size] for i in range(0, len(span), size)] for span in spans]  # of batches of samples
        options = {"image_size": manifest["image_size"], "flip": flip, "encoding": encoding}
        with contextlib.closing(Journal(layout.encoder_state, self.rank)) as journal:
            journal.update()
            mine = [part for part in range(self.rank, len(parts), self.world) if part not in journal.parts]
            encoded = encode_ahead(
                self.source,
                [numbers[batch.start : batch.stop] for part in mine for batch in parts[part]],
                self.encoder,
                options,
                num_workers=num_workers,
                overflow="its encoder features are not finite in float16",
            )
            done = sum(len(spans[part]) for part in journal.parts)
            progress = tqdm(total=count, initial=done, desc="encoder", unit="image", disable=self.rank != 0)

            def rows(part):
                for batch in parts[part]:
                    _, labels, arrays, errors = next(encoded)
                    for error in errors.values():
                        raise ValueError(f"{error}; the set has its latent: restore the image")
                    yield names[batch.start : batch.stop], labels, arrays
                    progress.update(len(batch))

            with contextlib.closing(encoded), progress:
                for part in mine:
                    journal.add(part, [], writer.write(part, rows(part)))
                while len(journal.parts) < len(parts) and self.rank == 0:
                    progress.update(sum(len(spans[part]) for part in journal.update()))
                    time.sleep(0.2)
        if self.rank == 0:
            self._finish(writer, [names[span.start : span.stop] for span in spans], journal.parts)

    def _finish(self, writer, names, written):
        """Writes checksums and, last, the manifest's entry; a kill in between does no harm."""
        layout = self.layout

        def files():
            for part, of_part in enumerate(names):
                digests = written[part][1]
                yield from writer.files(part, of_part, [digests[i : i + 32] for i in range(0, len(digests), 32)])

        checksums = write_checksums(layout.encoder_checksums, files())
        manifest = read_json_object(layout.manifest)
        write_json(layout.manifest, {**manifest, "encoder": {**self.settings, "checksums": checksums}})
        remove_state(self.layout.encoder_state)
