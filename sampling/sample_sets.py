"""A set of drawn images as ADM's npz, made shard by shard by one process or by all ranks, which goes on after a kill.

Beside NAME.npz, until all is there, `.NAME.npz.parts/` holds settings.json and the shards, the raw bytes of consecutive
images, each written whole. Shards depend on the number of images and the tile alone, so that any number of ranks can go
on. At the end the shards are joined, NAME.npz and NAME.json get their names, and the folder goes. A kill at any moment
does no harm: the same command then does what is missing, and the files are the same to the bit. Imports no Paddle.
"""

import contextlib
import json
import os
import shutil
import time
import zipfile

import numpy as np

from runtime.files import check_output, delete_folder, whole_file, write_json
from runtime.progress import tqdm
from runtime.run_lock import RunLock, check_idle
from runtime.untrusted import read_json_object, shortened

MAX_SHARDS = 512
# Keys of the settings that say where things are and what made them, and do not decide what the images are.
NOT_DECISIVE = ("model", "guide", "vae", "versions", "environment", "bytes", "rounding_formula")
# What messages call those that are no flag.
_WORDS = {
    "version": "the format",
    "image_size": "the image size",
    "num_classes": "the number of classes",
    "weights_sha256": "the sha256 of the network's weights",
    "guide_sha256": "the sha256 of the guide's weights",
    "internal_scale": "--internal_guidance_scale",
    "internal_interval": "--internal_guidance_interval",
    "vae_sha256": "the sha256 of the VAE's weights",
    "vae_scaling": "the VAE's",
    "objective": "the model's",
}


def shard_bounds(num_images, tile):
    """Lists `(start, stop)` of the shards: whole tiles, but for the last one, in `MAX_SHARDS` shards at most."""
    size = tile * max(1, -(-num_images // (tile * MAX_SHARDS)))
    return [(start, min(start + size, num_images)) for start in range(0, num_images, size)]


def differences(old, new):
    """Lists sentences on how the decisive settings of two runs differ."""
    old, new = (dict(_flat(settings)) for settings in (old, new))
    # A version that did not know a setting of the objective had its default.
    unknown = {name for name in old.keys() ^ new.keys() if name.startswith(_WORDS["objective"])}
    pairs = [(name, old.get(name), new.get(name)) for name in {**new, **old} if name not in unknown]
    return [
        f"{name} was {shortened(json.dumps(theirs))}, now it is {shortened(json.dumps(ours))}"
        for name, theirs, ours in pairs
        if theirs != ours
    ]


def _flat(settings):
    """Yields `(name, value)` of all decisive settings, of those in a dict by name too."""
    for key, value in settings.items():
        if key not in NOT_DECISIVE:
            name = _WORDS.get(key, f"--{key}")
            inner = value if isinstance(value, dict) else {"": value}
            yield from ((f"{name} {part}".rstrip(), one) for part, one in inner.items())


def report_path(output):
    """Returns the path of the JSON beside an npz."""
    return os.path.splitext(output)[0] + ".json"


class SampleSet:
    """The images of one run on their way to `output`, an npz.

    Args:
        output: path of the npz.
        settings: of `num_images`, `image_size` (H, W), `tile`, and whatever else decides what the images are, flat, as
            JSON has it; `NOT_DECISIVE` keys may say more.
        partial: the settings are some of all, with which the set can only be checked.
    """

    def __init__(self, output, settings, *, partial=False):
        self.path = os.path.realpath(output)
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.shown, self.report = output, report_path(self.path)
        folder, name = os.path.split(self.path)
        self.parts = os.path.join(folder, f".{name}.parts")
        self._saved, self._joined, self._ready = (self._part(name) for name in ("settings.json", "npz", "json"))
        self.partial = partial
        self.shards = [] if partial else shard_bounds(settings["num_images"], settings["tile"])
        self._lock = RunLock()

    def open(self, overwrite=False):
        """Begins or goes on, as one process of all; returns False if the set is complete already; see `check`."""
        if self.check(overwrite):
            self._lock.take(self.parts)
            return False
        self._lock.take(self.parts)
        if not self._is_unfinished():
            self._clear()
            write_json(self._saved, self.settings)
        return True

    def check(self, overwrite=False):
        """Returns whether the set is complete already; writes nothing.

        ValueError if another run is at work on it; if there is a set, or an unfinished one, with other settings, and no
        `overwrite`; or a file that is none of this project's.
        """
        check_idle(self.parts)
        is_ours = self._is_unfinished()
        if not is_ours and os.path.exists(self._saved) and not overwrite:
            changed = self._changed(read_json_object(self._saved))
            raise ValueError(
                f"{self.shown}: an unfinished run has other settings: {changed[0]}; repeat its command to go on, or "
                "give --overwrite to start anew"
            )
        if os.path.exists(self.path) and not overwrite and not (is_ours and self._is_moved()):
            self._check_finished()
            return True
        check_output(self.report, overwrite or os.path.exists(self.path), f"--output {self.shown} comes with ")
        return False

    def _changed(self, saved):
        """Lists how saved settings differ from these, as far as these are known."""
        known = {key: value for key, value in saved.items() if key in self.settings} if self.partial else saved
        return differences(known, self.settings)

    def _is_unfinished(self):
        """Returns whether there is an unfinished run with these settings."""
        with contextlib.suppress(ValueError):  # of a file that is damaged
            return os.path.exists(self._saved) and not self._changed(read_json_object(self._saved))
        return False

    def _is_moved(self):
        """Returns whether the npz of the unfinished run has its name, and only the rest of `finish` is missing."""
        return os.path.exists(self._ready) and not os.path.exists(self._joined)

    def _check_finished(self):
        """Raises `ValueError` unless the npz that is there is one of these settings."""
        hint = "give another --output, or --overwrite"
        if not os.path.isfile(self.report):
            raise ValueError(f"{self.shown}: exists already, without the {self.report} of a finished run; {hint}")
        finished = read_json_object(self.report)
        if changed := self._changed(finished):
            raise ValueError(f"{self.shown}: is complete, with other settings: {changed[0]}; {hint}")
        if (size := os.path.getsize(self.path)) != finished.get("bytes"):
            wanted = shortened(finished.get("bytes"))
            raise ValueError(f"{self.shown}: has {size} bytes, {self.report} says {wanted}; {hint}")

    def _clear(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._saved)  # first: without it the rest counts for nothing
        for entry in os.scandir(self.parts):
            if entry.name.startswith(("shard-", ".shard-")) or entry.path in (self._joined, self._ready):
                os.unlink(entry.path)

    def check_visible(self):
        """Raises `ValueError` on a rank that does not see what rank 0 has begun."""
        if not os.path.exists(self.parts):
            raise ValueError(f"{self.parts}: is not there on {os.uname().nodename}; all ranks must see this folder")

    def missing(self):
        """Lists the numbers of the shards that are not on the disk."""
        height, width = self.settings["image_size"]
        sizes = [(stop - start) * height * width * 3 for start, stop in self.shards]
        return [i for i, size in enumerate(sizes) if not _has_size(self._shard(i), size)]

    def num_images(self, missing):
        """Returns how many images the shards hold that are not `missing`."""
        return self.settings["num_images"] - sum(self.shards[i][1] - self.shards[i][0] for i in missing)

    def write(self, number, images):
        """Writes a shard, images uint8 `(n, H, W, 3)`: whole, or not at all."""
        with whole_file(self._shard(number)) as partial, open(partial, "wb") as file:
            file.write(np.ascontiguousarray(images).data)

    def finish(self, labels):
        """Joins all shards and the labels `(N,)` into the npz, and writes the JSON beside it."""
        if not os.path.exists(self._ready) or not (os.path.exists(self._joined) or os.path.exists(self.path)):
            with whole_file(self._joined) as partial:
                self._join(partial, labels)
            write_json(self._ready, {**self.settings, "bytes": os.path.getsize(self._joined)})
        if os.path.exists(self._joined):
            os.replace(self._joined, self.path)
        os.replace(self._ready, self.report)

    def _join(self, path, labels):
        """Writes what `numpy.savez` would, an array at a time: `arr_0` images, `arr_1` labels."""
        shape = (self.settings["num_images"], *self.settings["image_size"], 3)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for number in range(len(self.shards)):
                    with open(self._shard(number), "rb") as shard:
                        shutil.copyfileobj(shard, member, 1 << 20)
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, labels)

    def fill(self, draw, missing, rank=0, world=1):
        """Draws this rank's share of the missing shards; rank 0 also shows progress, and waits for the others' shares.

        `draw(start, stop, callback)` yields the images of these numbers in order, as uint8 blocks `(n, H, W, 3)`, and
        calls `callback(step, num_steps, latents)` after each step.
        """
        progress = tqdm(
            total=self.settings["num_images"],
            initial=self.num_images(missing),
            desc="images",
            unit="image",
            disable=rank != 0,
        )

        def show(drawn):
            if rank == 0:
                progress.update(self.num_images(self.missing()) + drawn - progress.n)

        def show_step(step, num_steps, latents):
            progress.set_postfix_str(f"step {step} of {num_steps}", refresh=False)
            if not progress.disable and time.monotonic() > progress.last_print_t + 1:
                progress.refresh()

        with progress:
            for number in missing[rank::world]:
                blocks = []
                for block in draw(*self.shards[number], show_step):
                    blocks.append(block)
                    show(sum(map(len, blocks)))
                self.write(number, np.concatenate(blocks))
            while rank == 0 and self.missing():
                time.sleep(0.2)
                show(0)

    def wait(self):
        """Waits on another rank until rank 0 has closed the set, without a process group, whose waiting has limits."""
        while os.path.exists(self.parts):
            time.sleep(0.2)

    def close(self):
        """Removes the work folder and frees the lock."""
        delete_folder(self.parts)
        self._lock = RunLock()

    def _part(self, name):
        return os.path.join(self.parts, name)

    def _shard(self, number):
        return self._part(f"shard-{number:05d}")


def _has_size(path, size):
    with contextlib.suppress(OSError):
        return os.path.getsize(path) == size
    return False
