"""Draw an image folder of colour pictures by class: ten symbols of the font DejaVu Sans, which matplotlib ships.

OUTPUT/<class>/<index>.png shows one symbol: a cat, a cloud, a clover, ... Colours, place, size and a slight turn are
random, the background is a gradient, and what a symbol's line encloses is tinted. The same flags draw the same
pictures; another seed draws others, for example to test on.
"""

import colorsys
import math
import os

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np

from config.checks import FLAG_SEED, POSITIVE_INT
from config.flags import CommandParser
from runtime.files import whole_folder
from runtime.process import counted, run_cli
from runtime.progress import tqdm

SYMBOLS = {
    "cat": "\N{CAT FACE}",
    "cloud": "\N{CLOUD}",
    "clover": "\N{SHAMROCK}",
    "flower": "\N{BLACK FLORETTE}",
    "heart": "\N{BLACK HEART SUIT}",
    "music": "\N{BEAMED EIGHTH NOTES}",
    "smiley": "\N{WHITE SMILING FACE}",
    "star": "\N{BLACK STAR}",
    "sun": "\N{BLACK SUN WITH RAYS}",
    "umbrella": "\N{UMBRELLA}",
}
SMALLEST = 16  # side in pixels at which the symbols can still be told apart
FINER = 4  # symbols are drawn this many times larger, then scaled down: smooth edges
LENGTH, TURN, MOVE = (0.7, 0.8), 6, 0.02  # range of the longer side, degrees, largest shift; 1 is the picture's side
HUES = 8  # of the backgrounds, evenly around the circle


def load_glyphs(side: int) -> dict:
    """Returns `{class: (ink, inside)}`: greyscale PIL images `(side, side)` of a symbol in the middle, white on black.

    `inside` is what the symbol's line encloses.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import binary_fill_holes

    path = os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    glyphs = {}
    for name, character in SYMBOLS.items():
        left, top, right, bottom = ImageFont.truetype(path, 1000).getbbox(character)
        font = ImageFont.truetype(path, 1000 * side / max(right - left, bottom - top))
        left, top, right, bottom = font.getbbox(character)
        ink = Image.new("L", (side, side))
        ImageDraw.Draw(ink).text(((side - left - right) / 2, (side - top - bottom) / 2), character, font=font, fill=255)
        solid = np.asarray(ink) > 127
        glyphs[name] = ink, Image.fromarray(np.uint8(255) * (binary_fill_holes(solid) & ~solid))
    return glyphs


def hsv(hue: float, saturation: float, value: float):
    """Returns a colour as float RGB in 0..255; the hue may be any number, whole turns apart is the same."""
    return np.float32(colorsys.hsv_to_rgb(hue % 1, saturation, value)) * 255


def draw(ink, inside, size: int, rng):
    """Returns one picture of a glyph, a PIL image of size x size, in colours and a position drawn from `rng`."""
    from PIL import Image

    # A gradient between two neighbouring light hues.
    hue, angle = rng.integers(HUES) / HUES + rng.uniform(-0.02, 0.02), rng.uniform(0, 2 * math.pi)
    ends = [hsv(hue + step, rng.uniform(0.3, 0.4), rng.uniform(0.94, 1.0)) for step in (0, 0.12)]
    rows, columns = np.mgrid[:size, :size] / (size - 1) - 0.5
    place = (0.5 + (columns * math.cos(angle) + rows * math.sin(angle)) / math.sqrt(2)).astype("float32")[..., None]
    picture = ends[0] * (1 - place) + ends[1] * place  # (size, size, 3)

    # The symbol: a strong colour from the other side of the circle, its inside a light tint.
    other = hue + rng.uniform(0.47, 0.53)
    line, tint = hsv(other, rng.uniform(0.85, 0.95), rng.uniform(0.5, 0.65)), hsv(other + 0.12, 0.3, 1.0)
    side = rng.uniform(*LENGTH) * size * FINER
    scale, turn = ink.width / side, math.radians(rng.uniform(-TURN, TURN))
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    x, y = size * FINER * (0.5 + rng.uniform(-MOVE, MOVE, 2))
    affine = (cos, sin, ink.width / 2 - cos * x - sin * y, -sin, cos, ink.height / 2 + sin * x - cos * y)
    for glyph, colour in ((inside, tint), (ink, line)):
        turned = glyph.transform((size * FINER,) * 2, Image.AFFINE, affine, Image.BILINEAR)
        mask = np.asarray(turned.resize((size, size), Image.BOX), "float32")[..., None] / 255
        picture = picture * (1 - mask) + colour * mask
    return Image.fromarray(np.round(picture).astype("uint8"))


def main(argv: list | None = None) -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder that gets the class folders")
    parser.add_argument("--image_size", check=POSITIVE_INT, default=64, help="side of the PNGs in pixels")
    parser.add_argument("--images_per_class", check=POSITIVE_INT, default=200, help="pictures of each symbol")
    parser.add_argument("--seed", check=FLAG_SEED, default=0, help="of all that is random")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is there and not empty")
    args = parser.parse_args(argv)
    if args.image_size < SMALLEST:
        raise ValueError(f"--image_size {args.image_size}: expected at least {SMALLEST}")
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise ValueError(f"--output {args.output} is a file; expected a folder")
    if os.path.isdir(args.output) and os.listdir(args.output) and not args.overwrite:
        raise ValueError(f"--output {args.output} is not empty; give another name, or --overwrite")

    glyphs = load_glyphs(args.image_size * FINER)
    total = args.images_per_class * len(glyphs)
    digits = len(str(args.images_per_class - 1))
    with whole_folder(args.output) as folder, tqdm(total=total, desc="symbols", unit="image") as progress:
        for label, (name, glyph) in enumerate(glyphs.items()):
            os.mkdir(os.path.join(folder, name))
            for index in range(args.images_per_class):
                image = draw(*glyph, args.image_size, np.random.default_rng([args.seed, label, index]))
                image.save(os.path.join(folder, name, f"{index:0{digits}d}.png"))
                progress.update()
    print(f"{args.output}: {counted(total, 'picture')} of {len(glyphs)} classes, {args.image_size} pixels a side")


if __name__ == "__main__":
    run_cli(main)
