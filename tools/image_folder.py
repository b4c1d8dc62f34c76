"""Images in one folder per class: finding them, and the centre crop with which ADM and DiT prepare ImageNet."""

import functools
import io
import os
import warnings


@functools.cache
def image_formats() -> list:
    """The formats that Pillow reads by itself: EPS is a program, which it hands to Ghostscript."""
    from PIL import Image

    Image.init()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice as many are an error
    return [kind for kind in Image.ID if kind != "EPS"]


def image_suffixes() -> tuple:
    """The file name endings, lower case, of `image_formats`."""
    from PIL import Image

    return tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in image_formats())


def find_images(root: str, others: list | None = None) -> tuple[list, list]:
    """List the images of an image folder.

    Subfolders of `root` are the classes, labelled 0, 1, ... in the order of their sorted names; images may lie at any
    depth below them, in any format that Pillow reads. Hidden files and folders are skipped.

    Args:
        others: gets the paths of the files in class folders whose names are not those of images.

    Returns:
        (samples, classes): samples is a list of (path, label) sorted by class, then path; classes the folder names.

    Raises:
        ValueError: `root` is not a folder, has no subfolder, or there is no image in it.
    """
    if not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder; expected an image folder with one subfolder per class")
    suffixes = image_suffixes()
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    samples = []
    for label, name in enumerate(classes):
        paths = []
        for folder, subfolders, files in os.walk(os.path.join(root, name)):
            subfolders[:] = [sub for sub in subfolders if not sub.startswith(".")]
            for file in files:
                if file.startswith("."):
                    continue
                if file.lower().endswith(suffixes):
                    paths.append(os.path.join(folder, file))
                elif others is not None:
                    others.append(os.path.join(folder, file))
        samples += [(path, label) for path in sorted(paths)]
    if not samples:
        raise ValueError(f"{root}: no images found; expected {root}/<class>/<image>, in a format that Pillow reads")
    return samples, classes


class UnreadableImage(ValueError):
    """What Pillow can't read; `reason` says why."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: cannot be read as an image ({reason})")
        self.reason = reason


def to_rgb(image):
    """An image of any mode as 8-bit RGB, as the official loaders do it: `convert("RGB")`.

    So an alpha channel is dropped, CMYK goes through Pillow's plain formula, EXIF orientation is not applied and of an
    animation the first frame counts. Where Pillow would clip at 255 this differs: 16-bit grey keeps its high byte, as
    Pillow does for 16-bit colour, and what has no known range is refused.

    Raises:
        ValueError: floats, or integers beyond 16 bits.
    """
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise ValueError("32-bit floats, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16, I;16B, ..., and I, as Pillow opens 16-bit PGM
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("integers outside 0..65535, whose range is not known; save it with 8 or 16 bits")
        image = Image.fromarray((grey >> 8).astype("uint8"))
    return image.convert("RGB")


def center_crop(image, size: int):
    """Scale a PIL image until its shorter side is `size` and cut out the centre, as ADM and DiT do for training.

    Halves with a box filter while the shorter side is at least 2 * size, then one bicubic step to the exact size:
    large photographs keep no aliasing. Returns a PIL image of size x size, the pixels of the official
    `center_crop_arr` (guided-diffusion's image_datasets.py, DiT's train.py).

    Raises:
        ValueError: an image so narrow that scaling it to `size` takes more pixels than Pillow lets an image have.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too narrow to be scaled to a side of {size}")
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_pixels(path: str, size: int, data: bytes | None = None):
    """Read one image as uint8 [size, size, 3], centre-cropped.

    Args:
        path: the file, or where `data`, its bytes, comes from.

    Raises:
        UnreadableImage: Pillow can't read it, or it has more than 2 * `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path if data is None else io.BytesIO(data), formats=image_formats()) as file:
            return np.asarray(center_crop(to_rgb(file), size))
    except UnidentifiedImageError:
        reason = "no image format that Pillow knows"
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise a dozen unrelated types for a broken file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise UnreadableImage(path, reason)


def load_image(path: str, size: int):
    """Read one image as float32 [3, size, size] in [-1, 1], centre-cropped; `UnreadableImage` if need be."""
    return load_pixels(path, size).astype("float32").transpose(2, 0, 1) / 127.5 - 1.0
