"""The images that a feature set was made of, where they can still be reached."""

import os
import re

import numpy as np

from features.image_source import open_source
from runtime.untrusted import shortened

MAX_LISTED = 200_000  # images of a folder that are listed without being asked for


def find_originals(report, indices, names, data_path=None):
    """Returns `(images, note)`: the originals of samples, uint8 `(N, S, S, 3)`, or None and a sentence that says why.

    Args:
        report: a `features.check.Report`. indices: of samples, as `read_rows` takes them.
        names: of the classes, `{label: name}`.
        data_path: the images, if they are no longer where the manifest says.

    Raises:
        ValueError: `data_path` holds other images than those that were encoded, or the manifest does not tell which.
    """
    manifest, asked = report.manifest, data_path is not None
    source = manifest.get("source")
    source = source if isinstance(source, dict) else {}
    size, sha256, path = manifest.get("image_size"), source.get("sha256"), data_path or source.get("path")
    try:
        if not isinstance(size, int) or not isinstance(sha256, str):
            raise ValueError("no manifest that tells which images were encoded")
        if not asked:
            count = manifest.get("num_images")
            if source.get("kind") != "folder" or not isinstance(count, int) or count >= MAX_LISTED:
                raise ValueError("the images are many, or in no folder")
            if not isinstance(path, str) or not os.path.isdir(path):
                raise ValueError(f"the images are not in {shortened(path, 300)} any more")
        found = open_source(path, earlier=[names[label] for label in sorted(names)] or None)
        if found.digest() != sha256:
            raise ValueError(f"{shortened(path, 300)} holds other images than those that were encoded, or other names")
        found.background = manifest.get("background")
        return np.stack([found.pixels(number, size) for number in image_numbers(report.store, indices)]), None
    except (ValueError, OSError) as error:
        if asked:
            raise ValueError(f"--data_path {data_path}: {error}") from None
        return None, f"the picture has no originals: {error}; give the folder of the images by --data_path"


def image_numbers(store, indices):
    """Lists the places of samples among the images that were encoded: the extraction names samples by them."""
    names = [name.decode(errors="replace") for name in store.names()[indices].tolist()]
    for name in names:
        if not re.fullmatch("[0-9]{1,12}", name):
            raise ValueError(f"a sample is called {shortened(name)}, which is no number of an image")
    return [int(name) for name in names]
