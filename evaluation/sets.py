"""Sets of images to compare: ADM's `.npz` or a folder, and the statistics that a reference may hold beside them.

Images come in batches, in a fixed order, so that a set may be larger than the memory.
"""

import contextlib
import json
import math
import os
from itertools import islice

import numpy as np
from PIL import Image

from evaluation.checks import check_covariance
from features.images import center_crop, encodable, load_pixels, opened, some_of, walk_files
from features.npy import NpzArray, npz_names
from features.read_ahead import map_ahead
from runtime.files import whole_file
from runtime.process import counted
from runtime.untrusted import parse_json, shortened

ENDINGS = (".png", ".jpg", ".jpeg")
MAX_SIDE = 8192  # pixels
MAX_BATCH = 1 << 28  # bytes of a batch
MAX_WIDTH = 8192  # features of stored statistics; their covariance takes 0.5 GB
MAX_SETTINGS = 1 << 16  # bytes
DECODERS = 4  # threads that read a folder
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names of mean and covariance


class ImageSet:
    """Images of one size in a fixed order. `len()` counts them.

    Attributes:
        path: the file or folder. kind: "npz" or "folder".
        image_size: (height, width) in pixels, as `batches` gives them.
        notes: sentences for the user.
    """

    path, kind, image_size, notes = "", "", (0, 0), ()

    def batches(self, batch_size, start=0, stop=None):
        """Yields images `start` to `stop` (None: all), uint8 (n, H, W, 3), at most `batch_size` at once.

        ValueError, one line, for an image that can't be read.
        """
        raise NotImplementedError

    def __str__(self):
        return f"{encodable(self.path)} ({counted(len(self), 'image')} of {size_in_words(self.image_size)})"


def size_in_words(image_size):
    """Returns (height, width) as `WxH`."""
    return "{1}x{0}".format(*image_size)


def _at_once(batch_size, image_size):
    """Returns how many images of a size are read at once, however large a file says that they are."""
    return max(1, min(batch_size, MAX_BATCH // (3 * math.prod(image_size))))


def open_images(path, *, image_size=None, default_size=None):
    """Returns the `ImageSet` of a `.npz` with `arr_0`, uint8 (N, H, W, 3), or of a folder of `.png`, `.jpg`, `.jpeg`.

    A folder's images, at any depth, are sorted by their path in it. With `image_size` images of another size are
    centre-cropped to a square, as for training (`features.images.center_crop`); so are a folder's of different sizes,
    or of a larger one, with a `default_size`. ValueError, one line, for anything else: no such path, no images, fewer
    than two, another type or shape, images of different sizes.
    """
    if os.path.isdir(path):
        images = _Folder(path, image_size, default_size)
    elif not os.path.exists(path):
        raise ValueError(f"{shortened(path, 500)}: no such file or folder; expected a .npz or a folder of images")
    else:
        images = _Npz(path, image_size)
    if len(images) < 2:
        raise ValueError(f"{path}: holds one image; a distribution takes at least two")
    return images


class _Npz(ImageSet):
    kind = "npz"

    def __init__(self, path, image_size):
        self.path = path
        if "arr_0" not in (names := npz_names(path)):
            found = ", ".join(map(shortened, names[:8])) or "nothing"
            raise ValueError(f"{path}: holds no images: expected arr_0, uint8 (N, H, W, 3), found {found}")
        self._array = NpzArray(path, "arr_0")
        shape, dtype = self._array.shape, self._array.dtype
        self._array.check_order()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            hint = ", which looks like labels" if len(shape) == 1 and dtype.kind in "iu" else ""
            hint = ", not scaled to 0..255" if dtype.kind == "f" else hint
            raise ValueError(f"{path}: arr_0 is {dtype} {shape}{hint}; expected images, uint8 (N, H, W, 3)")
        if 0 in shape or max(shape[1:]) > MAX_SIDE:
            raise ValueError(f"{path}: arr_0 is {shape}; expected images of 1 to {MAX_SIDE} pixels a side")
        self._crop = image_size if image_size and shape[1:3] != (image_size, image_size) else None
        self.image_size = (image_size, image_size) if image_size else shape[1:3]
        if self._crop:
            self.notes = (f"{path}: images of {size_in_words(shape[1:3])} are centre-cropped to {image_size}",)

    def __len__(self):
        return self._array.shape[0]

    def batches(self, batch_size, start=0, stop=None):
        for block in self._array.blocks(_at_once(batch_size, self._array.shape[1:3]), start, stop):
            yield np.stack([_cropped(image, self._crop) for image in block]) if self._crop else block


def _cropped(pixels, size):
    return np.asarray(center_crop(Image.fromarray(pixels), size))


class _Folder(ImageSet):
    kind = "folder"

    def __init__(self, path, image_size, default_size):
        self.path, self._crop = path, image_size
        lost, prefix = [], os.path.join(path, "")
        names = sorted(file[len(prefix) :] for file in walk_files(path, lost))
        self.names = [name for name in names if name.lower().endswith(ENDINGS)]
        if not self.names:
            raise ValueError(f"{path}: no images in this folder; expected {', '.join(ENDINGS)}")
        others = [name for name in names if not name.lower().endswith(ENDINGS) and name != "samples.json"]
        if others:
            self.notes = (f"{path}: left out, no {', '.join(ENDINGS)}: {len(others)} ({some_of(others)})",)
        if lost:
            lost = sorted(file[len(prefix) :] for file in lost)
            self.notes += (f"{path}: left out, links that lead nowhere or in a circle: {len(lost)} ({some_of(lost)})",)
        self.image_size = (image_size, image_size) if image_size else self._common_size(default_size)

    def __len__(self):
        return len(self.names)

    def _common_size(self, default_size):
        """Returns the size of all images, of which only the headers are read; with a default that which they get."""
        common, deep = None, []
        for name in self.names:
            with opened(path := os.path.join(self.path, name)) as image:
                size = image.height, image.width
                if image.mode[0] in "IF":
                    deep.append(name)
            common = common or size
            if size != common and default_size:
                return self._cropped_to(default_size, "several sizes")
            if size != common:
                raise ValueError(
                    f"{path}: is of {size_in_words(size)}, {self.names[0]} of {size_in_words(common)}; expected images "
                    "of one size: --image_size N crops them as training does"
                )
        if deep:
            what = f"{counted(len(deep), 'image')} of more than 8 bits ({some_of(deep)}), cut off at 255 by Pillow"
            self.notes += (f"{self.path}: {what}; save images with 8 bits",)
        if default_size and common != (default_size, default_size) and min(common) >= default_size:
            return self._cropped_to(default_size, size_in_words(common))
        return common

    def _cropped_to(self, size, of):
        self._crop = size
        self.notes += (f"{self.path}: images of {of} are centre-cropped to {size}, as the samples; see --image_size",)
        return size, size

    def _pixels(self, name):
        path = os.path.join(self.path, name)
        if self._crop:
            return load_pixels(path, self._crop)
        with opened(path) as image:
            return np.asarray(image.convert("RGB"))

    def batches(self, batch_size, start=0, stop=None):
        batch_size = _at_once(batch_size, self.image_size)
        pixels = map_ahead(self._pixels, self.names[start:stop], DECODERS, 2 * batch_size)
        while batch := list(islice(pixels, batch_size)):
            yield np.stack(batch)


# -- Statistics of a reference ----------------------------------------------------------------------------------------


def read_statistics(path):
    """Returns mean and covariance in a `.npz`, by ADM's names: `mu`, `sigma` and `mu_s`, `sigma_s`, float64, if there.

    And what `write_statistics` adds: `num_images`, an int, and `settings`, a dict on the features. ValueError for a
    mean without its covariance, shapes that don't fit, another type, NaN, no covariance.
    """
    names, found = npz_names(path), {}
    for mean, covariance in MOMENTS.values():
        if (mean in names) != (covariance in names):
            there, missing = (mean, covariance) if mean in names else (covariance, mean)
            raise ValueError(f"{path}: holds {there} but no {missing}; expected both or none")
        if mean not in names:
            continue
        arrays = [NpzArray(path, name) for name in (mean, covariance)]
        shapes = [array.shape for array in arrays]
        width = shapes[0][0] if len(shapes[0]) == 1 else 0
        if not 0 < width <= MAX_WIDTH or shapes[1] != (width, width) or any(a.dtype.kind != "f" for a in arrays):
            shown = ", ".join(f"{array.name} {array.dtype} {array.shape}" for array in arrays)
            raise ValueError(f"{path}: expected {mean} (D,) and {covariance} (D, D), floats, found {shown}")
        for array in arrays:
            found[array.name] = array.read().astype("float64")
            if not np.isfinite(found[array.name]).all():
                raise ValueError(f"{path}: {array.name} holds NaN or infinity")
        check_covariance(found[covariance], f"{path}: {covariance}")
    if found and "num_images" in names:
        array = NpzArray(path, "num_images")
        if array.shape == () and array.dtype.kind in "iu":
            found["num_images"] = int(array.read())
    if found and "settings" in names:
        array = NpzArray(path, "settings")
        if array.shape == () and array.dtype.kind == "U" and array.dtype.itemsize < MAX_SETTINGS:
            with contextlib.suppress(ValueError):  # somebody else's
                settings = parse_json(str(array.read()))
                found["settings"] = settings if isinstance(settings, dict) else {}
    return found


def write_statistics(path, moments, num_images, settings):
    """Writes `{output: (mean, covariance)}` by ADM's names, the number of images, the `settings` of the features."""
    arrays = {"num_images": np.int64(num_images), "settings": np.array(json.dumps(settings))}
    for output, pair in moments.items():
        arrays |= dict(zip(MOMENTS[output], pair, strict=True))
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)
