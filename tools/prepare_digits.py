"""Write scikit-learn's handwritten digits as an image folder by class.

1,797 real 8x8 scans of ten digits become `OUTPUT/train/<class>/<index>.png` and `OUTPUT/heldout/<class>/<index>.png`,
RGB, upscaled with Pillow's bicubic filter; <index> is the image's place in scikit-learn's data set. The split is
stratified, and the same in every run, so that no held-out image is ever trained on.
"""

import contextlib
import os

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np

from config.flags import CommandParser
from config.options import POSITIVE_INT
from features.images import walk_files
from runtime.process import counted, run_cli
from runtime.progress import tqdm

NUM_HELDOUT = 297
SPLIT_SEED = 0
PARTIAL = ".partial"  # ends the name of a file that is being written


def expected_images(image_size: int) -> dict:
    """Returns all 1,797 digits as `{relative path: RGB PIL image of this size}`."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    _, heldout = train_test_split(
        np.arange(len(digits.target)), test_size=NUM_HELDOUT, stratify=digits.target, random_state=SPLIT_SEED
    )
    images = {}
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        grey = Image.fromarray(np.round(pixels * (255 / 16)).astype("uint8"))  # the data set's values are 0..16
        part = "heldout" if index in heldout else "train"
        scaled = grey.resize((image_size, image_size), Image.BICUBIC).convert("RGB")
        images[os.path.join(part, str(label), f"{index:04d}.png")] = scaled
    return images


def holds_image(path: str, image) -> bool:
    """Returns whether the file at `path` is this very image, pixel by pixel."""
    from PIL import Image

    with contextlib.suppress(OSError), Image.open(path, formats=["PNG"]) as found:
        return np.array_equal(found, image)
    return False


def prepare_digits(output: str, image_size: int = 32) -> int:
    """Writes the missing images below `output`; returns how many were written.

    A file there that is not one of these images is a `ValueError` before anything is written.
    """
    if image_size < 8:
        raise ValueError(f"--image_size {image_size}: expected at least 8, the size of the scans")
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"--output {output} is a file; expected a folder")
    missing, lost = expected_images(image_size), []  # lost: links that lead nowhere, and the like
    for path in [*(walk_files(output, lost) if os.path.isdir(output) else ()), *lost]:
        relative = os.path.relpath(path, output)
        if relative.endswith(PARTIAL) and relative.removesuffix(PARTIAL) in missing:  # of a run that was killed
            os.remove(path)
        elif path in lost or not (relative in missing and holds_image(path, missing.pop(relative))):
            raise ValueError(
                f"--output {output} holds {relative}, which is not one of the digits at {image_size}x{image_size}; "
                "nothing was written, give a new or empty folder"
            )
    for relative, image in tqdm(missing.items(), desc="digits", unit="image", disable=not missing):
        path = os.path.join(output, relative)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        image.save(path + PARTIAL, format="PNG")
        os.replace(path + PARTIAL, path)
    return len(missing)


def main(argv: list | None = None) -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder that gets train/ and heldout/")
    parser.add_argument("--image_size", check=POSITIVE_INT, default=32, help="side of the PNGs in pixels")
    args = parser.parse_args(argv)
    written = prepare_digits(args.output, args.image_size)
    print(f"{args.output}: train/ and heldout/ are complete ({counted(written, 'image')} written)")


if __name__ == "__main__":
    run_cli(main)
