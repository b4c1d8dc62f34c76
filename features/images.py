"""Images in one folder per class: finding them, and the centre crop with which ADM and DiT prepare ImageNet."""

import contextlib
import functools
import io
import itertools
import os
import re
import warnings

import numpy as np

from runtime.process import counted

MAX_LISTED = 20  # unreadable images named at the end of a command
ON_ERROR = {  # the flag --on_error of commands that read images
    "choices": ("stop", "skip"),
    "default": "stop",
    "help": "at an image that can't be read: stop there, or skip it and list it at the end",
}
BACKGROUND = {  # the flag --background of commands that read images
    "metavar": "COLOUR",
    "help": "lay transparent images over this colour: white, black, or three numbers from 0 to 255 as 255,240,0 "
    "[drop the alpha channel, as the official code does, so that hidden colours show]",
}


def parse_background(text: str | None) -> list | None:
    """Returns the colour that --background names, `[red, green, blue]` in 0..255, or None as it is."""
    if text is None:
        return None
    named = {"white": [255, 255, 255], "black": [0, 0, 0]}.get(text)
    if named is None and not re.fullmatch("[0-9]{1,3}(,[0-9]{1,3}){2}", text):
        raise ValueError(f"--background {text}: expected white, black, or three numbers from 0 to 255 as 255,240,0")
    colour = named or [int(number) for number in text.split(",")]
    if max(colour) > 255:
        raise ValueError(f"--background {text}: expected numbers from 0 to 255")
    return colour


@functools.cache
def image_formats() -> tuple:
    """Returns formats and endings of files that Pillow reads by itself: not EPS, a program for Ghostscript."""
    from PIL import Image

    Image.init()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice as many are an error
    formats = [kind for kind in Image.ID if kind != "EPS"]
    return formats, tuple(ending for ending, kind in Image.registered_extensions().items() if kind in formats)


def encodable(name):
    """Returns a file's name as text that any encoding can write: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def some_of(names) -> str:
    """Returns the first five of many names, for a sentence."""
    return ", ".join(encodable(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")


def left_out(what: str, count, names) -> list:
    """Returns a sentence, as a list, on files that are no images of a class; none if there is no name."""
    return [f"left out, {what}: {count} ({some_of(sorted(names))})"] if names else []


def order_classes(names, notes: list, root: str, earlier: list | None = None) -> list:
    """Returns the class names in the order of their labels; ValueError if two names are the same number.

    Names that are all whole numbers, written in the digits 0 to 9, are sorted as numbers: 0..N-1 are their own labels.
    Other names are sorted as text. For the same names the order of a set that was begun `earlier` is kept. `notes` gets
    a sentence where a label may surprise: it is not the number, text gave another, class10 is before class2.
    """

    def compare(order, other, how, who):
        for name in [name for name, theirs in zip(order, other, strict=True) if name != theirs][:1]:
            of_other = f"{who} gives it label {other.index(name)}"
            notes.append(f"labels follow {how}: folder {name} is label {order.index(name)}; {of_other}")

    text = sorted(names)
    if not all(re.fullmatch("[0-9]+", name) for name in text):
        parts = [re.split("([0-9]+)", name) for name in text]  # texts and numbers in turn
        for label, (one, other) in enumerate(itertools.pairwise(parts)):
            if one[::2] == other[::2] and [*map(int, one[1::2])] > [*map(int, other[1::2])]:
                notes.append(
                    "labels follow the names of the class folders as text, not the numbers in them: folder "
                    f"{encodable(text[label])} is label {label}, before {encodable(text[label + 1])}"
                )
                break
        return text
    order = sorted(text, key=int)
    if earlier is not None and sorted(earlier) == text:
        as_text = "the names of the class folders as text, as when this set was begun"
        compare(earlier, order, as_text, "a new extraction")
        return earlier
    for one, other in itertools.pairwise(order):
        if int(one) == int(other):
            raise ValueError(f"{root}: the class folders {one} and {other} are the same number; rename one of them")
    compare(order, text, "the numbers of the class folders", "torchvision's ImageFolder, which sorts names as text,")
    if other := [label for label, name in enumerate(order) if int(name) != label]:
        notes.append(
            f"the class folders' numbers are not 0..{len(order) - 1}: labels are their places in the order of the "
            f"numbers, folder {order[other[0]]} is label {other[0]}"
        )
    return order


def walk_files(folder, lost, above=()):
    """Yields the paths of the files below a folder that are not hidden, following links.

    `lost` gets the paths of links that lead nowhere, or back to one of the real paths `above`, and of other things.
    """
    here = os.path.realpath(folder)
    if here in above:
        lost.append(folder)
        return
    with os.scandir(folder) as entries:
        entries = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path):  # the first asks no file system
            yield entry.path
        elif os.path.isdir(entry.path):
            yield from walk_files(entry.path, lost, {*above, here})
        else:
            lost.append(entry.path)


def find_images(root: str, notes: list | None = None, earlier: list | None = None) -> tuple[list, list]:
    """Returns (samples, classes) of an image folder: [(path, label), ...] by label, then path, and the folder names.

    Subfolders of `root` are the classes, see `order_classes`; images may lie at any depth below them, in any format
    that Pillow reads. Links are followed, hidden files and folders skipped. `notes` gets sentences for the user, also
    on what was left out. ValueError if `root` is not a folder, or there is no image in it.
    """
    if not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder; expected an image folder with one subfolder per class")
    notes = [] if notes is None else notes
    (_, endings), prefix = image_formats(), os.path.join(root, "")
    lost, loose, kinds, images = [], [], [], []
    for path in walk_files(root, lost):
        name = path[len(prefix) :]
        if path.lower().endswith(endings):
            (images if os.sep in name else loose).append(name)
        elif os.sep in name:
            kinds.append(os.path.splitext(path)[1] or os.path.basename(path))
    classes = [name for name in os.listdir(root) if name[0] != "." and os.path.isdir(prefix + name)]
    classes = order_classes([name for name in classes if prefix + name not in lost], notes, root, earlier)
    label = {name: number for number, name in enumerate(classes)}
    samples = sorted((label[name.split(os.sep, 1)[0]], prefix + name) for name in images)
    if not samples:
        raise ValueError(f"{root}: no images found; expected {root}/<class>/<image>, in a format that Pillow reads")
    notes += left_out("no images by their names", counted(len(kinds), "file"), {*kinds})
    notes += left_out("in no class folder", counted(len(loose), "image"), loose)
    astray = "links that lead nowhere or back to a folder above them, and what is no file"
    notes += left_out(astray, len(lost), [path[len(prefix) :] for path in lost])
    return [(path, label) for label, path in samples], classes


class UnreadableImage(ValueError):
    """An image that Pillow can't read; `reason` says why."""

    def __init__(self, path, reason):
        super().__init__(path, reason)  # so that it can be sent to other ranks
        self.reason = reason

    def __str__(self):
        return "{}: cannot be read as an image ({})".format(*self.args)


def to_rgb(image, background: list | None = None):
    """Returns an image of any mode as 8-bit RGB, as the official loaders do it with `convert("RGB")`.

    An alpha channel is dropped, or the image is laid over `background`, `[red, green, blue]`. CMYK goes through
    Pillow's plain formula, EXIF orientation is not applied and of an animation the first frame counts. Where Pillow
    would clip at 255 this differs: 16-bit grey keeps its high byte, as Pillow does for 16-bit colour; floats and
    integers beyond 16 bits, whose range is not known, are a `ValueError`.
    """
    from PIL import Image

    if image.mode == "F":
        raise ValueError("32-bit floats, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16, I;16B, ..., and I, as Pillow opens 16-bit PGM
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("integers outside 0..65535, whose range is not known; save it with 8 or 16 bits")
        image = Image.fromarray((grey >> 8).astype("uint8"))
    if background is not None and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB")


def is_see_through(image) -> bool:
    """Returns whether a PIL image has a pixel that is not opaque: by an alpha channel, a palette or a key colour."""
    if image.mode.startswith(("I", "F")):  # 16 bits and more: numbers without an alpha channel
        return False
    return image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255


def center_crop(image, size: int):
    """Scales a PIL image until its shorter side is `size` and cuts out the centre, as ADM and DiT do for training.

    Halves with a box filter while the shorter side is at least 2 * size, then one bicubic step to the exact size:
    large photographs keep no aliasing. Returns a PIL image of size x size, the pixels of the official
    `center_crop_arr` (guided-diffusion's image_datasets.py, DiT's train.py). ValueError for an image so narrow that
    scaling it takes more pixels than Pillow lets an image have.
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


def unreadable_list(lost: list, everything: str = "") -> str:
    """Returns lines on images left out, `(name, reason)` of each; `everything`, if any, is a file that names them."""
    lines = [f"{counted(len(lost), 'image')} could not be read and {'is' if len(lost) == 1 else 'are'} left out:"]
    lines += [f"  {encodable(name)}: {reason}" for name, reason in lost[:MAX_LISTED]]
    if len(lost) > MAX_LISTED:
        lines.append(f"  ... and {len(lost) - MAX_LISTED:,} more" + (f", all in {everything}" if everything else ""))
    return "\n".join(lines)


def dim_note(dim: list) -> str:
    """Returns a sentence on the images that `load_pixels` found to use little of their range."""
    return (
        f"{counted(len(dim), 'image')} with 16 or 32 bits a number, all of them below 4096, came out almost black: "
        f"{some_of(sorted(dim))}. The high byte of 0..65535 is kept; save images of another range with 8 bits, or "
        "scaled to 0..65535"
    )


def see_through_note(see_through: list) -> str:
    """Returns a sentence on the transparent images that `load_pixels` read without a background."""
    return (
        f"{counted(len(see_through), 'image')} with transparent parts, whose hidden colours show: "
        f"{some_of(sorted(see_through))}. --background white lays them over white, in a new --feature_path"
    )


def load_pixels(
    path: str,
    size: int,
    data: bytes | None = None,
    dim: list | None = None,
    background: list | None = None,
    see_through: list | None = None,
):
    """Reads one image, of a file or of `data`, the bytes of one, as uint8 [size, size, 3], centre-cropped.

    `background`: see `to_rgb`; without it `see_through` gets the path of an image with transparent parts. `dim` gets
    the path if the image has 16 or 32 bits a number and uses none of the upper 4 of 16. UnreadableImage if Pillow can't
    read it, or it has more than 2 * `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    with opened(path, data) as file:
        # The mode tells of grey; colour is cut to its high bytes while the file is read.
        deep = file.mode.startswith("I") or any(";16" in str(tile[-1]) for tile in file.tile)
        image = to_rgb(file, background)
        if see_through is not None and background is None and is_see_through(file):
            see_through.append(path)
        if dim is not None and deep and max(high for _, high in image.getextrema()) < 16:
            dim.append(path)
        return np.asarray(center_crop(image, size))


@contextlib.contextmanager
def opened(path: str, data: bytes | None = None):
    """Yields a PIL image of a file, or of `data`; whatever is raised while it is used is an UnreadableImage."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path if data is None else io.BytesIO(data), formats=image_formats()[0]) as file:
            yield file
        return
    except UnidentifiedImageError:
        reason = "no image format that Pillow knows"
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise a dozen unrelated types for a broken file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise UnreadableImage(path, reason)


def load_image(path: str, size: int, **options):
    """Reads one image as float32 [3, size, size] in [-1, 1], centre-cropped; options and errors of `load_pixels`."""
    return load_pixels(path, size, **options).astype("float32").transpose(2, 0, 1) / 127.5 - 1.0
