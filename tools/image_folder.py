"""Images in one folder per class: finding them, and the centre crop with which ADM and DiT prepare ImageNet."""

import os


def find_images(root: str) -> tuple[list, list]:
    """List the images of an image folder.

    Subfolders of `root` are the classes, labelled 0, 1, ... in the order of their sorted names; images may lie at any
    depth below them, in any format that Pillow reads. Hidden files and folders are skipped.

    Returns:
        (samples, classes): samples is a list of (path, label) sorted by class, then path; classes the folder names.

    Raises:
        ValueError: `root` is not a folder, has no subfolder, or there is no image in it.
    """
    from PIL import Image

    if not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder; expected an image folder with one subfolder per class")
    suffixes = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    samples = []
    for label, name in enumerate(classes):
        paths = []
        for folder, subfolders, files in os.walk(os.path.join(root, name)):
            subfolders[:] = [sub for sub in subfolders if not sub.startswith(".")]
            paths += [
                os.path.join(folder, file)
                for file in files
                if not file.startswith(".") and file.lower().endswith(suffixes)
            ]
        samples += [(path, label) for path in sorted(paths)]
    if not samples:
        raise ValueError(f"{root}: no images found; expected {root}/<class>/<image>, in a format that Pillow reads")
    return samples, classes


def center_crop(image, size: int):
    """Scale a PIL image until its shorter side is `size` and cut out the centre, as ADM and DiT do for training.

    Halves with a box filter while the shorter side is at least 2 * size, then one bicubic step to the exact size:
    large photographs keep no aliasing. Returns a PIL image of size x size.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_image(path: str, size: int):
    """Read one image as float32 [3, size, size] in [-1, 1], centre-cropped; ValueError if Pillow can't read it."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = center_crop(file.convert("RGB"), size)
    except Exception as error:  # Pillow's plugins raise a dozen unrelated types for a broken file
        raise ValueError(f"{path}: cannot be read as an image ({error})") from None
    return np.asarray(image, dtype="float32").transpose(2, 0, 1) / 127.5 - 1.0
