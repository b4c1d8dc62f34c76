"""Cut photographs that installed packages bring into small colour pictures, to train an autoencoder on.

OUTPUT/train/photographs/<index>.png are squares of scikit-learn's china.jpg and flower.jpg: at random places, of random
sizes, half of them mirrored or with their colour channels in another order. OUTPUT/heldout/photographs/<index>.png are
such squares of matplotlib's grace_hopper.jpg, in their own colours. The same flags give the same pictures.
"""

import os
from importlib.util import find_spec

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np

from config.checks import FLAG_SEED, POSITIVE_INT
from config.flags import CommandParser
from features.images import center_crop
from runtime.files import whole_folder
from runtime.process import counted, run_cli

HELDOUT = 100  # pictures
LARGEST = 0.8  # of the photograph's shorter side: a square's side is between image_size and this


def square(photograph, size: int, rng):
    """Returns a square of a PIL image, at a random place and scale, scaled to size x size."""
    longest = max(size, round(LARGEST * min(photograph.size)))
    side = int(round(np.exp(rng.uniform(np.log(size), np.log(longest)))))
    left, top = (int(rng.integers(extent - side + 1)) for extent in photograph.size)
    return center_crop(photograph.crop((left, top, left + side, top + side)), size)


def varied(picture, rng):
    """Returns a picture mirrored at random, and with its red, green and blue exchanged at random."""
    from PIL import Image, ImageOps

    if rng.uniform() < 0.5:
        picture = ImageOps.mirror(picture)
    order = rng.permutation(3) if rng.uniform() < 0.5 else np.arange(3)
    return Image.fromarray(np.ascontiguousarray(np.asarray(picture)[..., order]))


def main(argv: list | None = None) -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="new or empty folder that gets train/ and heldout/"
    )
    parser.add_argument("--image_size", check=POSITIVE_INT, default=64, help="side of the PNGs in pixels")
    parser.add_argument("--num_images", check=POSITIVE_INT, default=1000, help="pictures to train on")
    parser.add_argument("--seed", check=FLAG_SEED, default=0, help="of all that is random")
    args = parser.parse_args(argv)
    if not 8 <= args.image_size <= 256:
        raise ValueError(f"--image_size {args.image_size}: expected 8 to 256")
    if os.path.exists(args.output) and (not os.path.isdir(args.output) or os.listdir(args.output)):
        raise ValueError(f"--output {args.output}: expected a new or empty folder")

    from matplotlib import get_data_path
    from PIL import Image

    shipped = os.path.join(*find_spec("sklearn").submodule_search_locations, "datasets", "images")  # its import is slow
    photographs = [Image.open(os.path.join(shipped, name)).convert("RGB") for name in ("china.jpg", "flower.jpg")]
    unseen = Image.open(os.path.join(get_data_path(), "sample_data", "grace_hopper.jpg")).convert("RGB")
    rng = np.random.default_rng(args.seed)
    with whole_folder(args.output) as folder:
        for part, count in (("train", args.num_images), ("heldout", HELDOUT)):
            os.makedirs(os.path.join(folder, part, "photographs"))
            for index in range(count):
                picture = square(photographs[index % 2] if part == "train" else unseen, args.image_size, rng)
                picture = varied(picture, rng) if part == "train" else picture
                picture.save(os.path.join(folder, part, "photographs", f"{index:05d}.png"))
    print(f"{args.output}: train/ has {counted(args.num_images, 'picture')}, heldout/ has {HELDOUT}")


if __name__ == "__main__":
    run_cli(main)
