"""The images of an npz as a folder of PNG files. Imports no Paddle."""

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from features.npy import NpzArray
from runtime.files import delete_folder, whole_file, write_json
from runtime.untrusted import read_json_object, shortened
from sampling.sample_sets import differences

_PNG = re.compile(r"\d{6,}\.png")


class PngFolder:
    """The images of an npz as `000000.png` ... in a folder, with the settings beside them in samples.json.

    The files gather in `.FOLDER.parts/`, which gets the folder's name when all are there. What a kill leaves is kept.
    """

    def __init__(self, folder, settings):
        self.path, self.settings = os.path.realpath(folder), settings
        parent, name = os.path.split(self.path)
        self.shown, self.parts = folder, os.path.join(parent, f".{name}.parts")

    def open(self, overwrite=False):
        """Returns False if all is there already; ValueError for a folder of other files, or a set of other settings."""
        parent = os.path.dirname(self.path)
        if not os.path.isdir(parent):
            raise ValueError(f"--png {self.shown}: there is no such folder as {parent}")
        if not os.access(parent, os.W_OK):
            raise ValueError(f"--png {self.shown}: {parent} can't be written to")
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise ValueError(f"--png {self.shown}: is a file; expected the name of a new folder")
        names = os.listdir(self.path) if os.path.lexists(self.path) else []
        strange = [name for name in names if name != "samples.json" and not _PNG.fullmatch(name)]
        if strange or (names and "samples.json" not in names):
            what = strange[0] if strange else names[0]
            raise ValueError(f"--png {self.shown}: holds other files, such as {shortened(what)}; give a new folder")
        if not names:
            return True
        changed = differences(read_json_object(os.path.join(self.path, "samples.json")), self.settings)
        if changed and not overwrite:
            raise ValueError(
                f"--png {self.shown}: holds images of other settings: {changed[0]}; give a new folder, or --overwrite"
            )
        return bool(changed) or len(names) <= self.settings["num_images"]  # with samples.json there is one more

    def write(self, npz, progress):
        """Writes the files of the npz's images; `progress.update(n)` is called as they are there."""
        saved, count = os.path.join(self.parts, "samples.json"), self.settings["num_images"]
        digits = max(6, len(str(count - 1)))
        if os.path.exists(self.parts) and (
            not os.path.exists(saved) or differences(read_json_object(saved), self.settings)
        ):
            delete_folder(self.parts)
        os.makedirs(self.parts, exist_ok=True)
        write_json(saved, self.settings)

        def write(number, pixels):
            path = os.path.join(self.parts, f"{number:0{digits}d}.png")
            if not os.path.exists(path):
                with whole_file(path) as partial:
                    Image.fromarray(pixels).save(partial, format="PNG")

        numbers = itertools.count()
        with ThreadPoolExecutor() as threads:
            for block in NpzArray(npz, "arr_0").blocks(64):
                list(threads.map(write, itertools.islice(numbers, len(block)), block))  # which raises what a thread did
                progress.update(len(block))
        if os.path.isdir(self.path) and os.listdir(self.path):
            delete_folder(self.path)
        os.rename(self.parts, self.path)
