"""Text in pictures, in whatever script class names are written. Pillow alone."""

import functools
import glob
import os
import re

from PIL import Image, ImageDraw, ImageFont

from runtime.untrusted import shortened

FOLDERS = (
    *("~/.fonts", "~/.local/share/fonts", "/usr/share/fonts", "/usr/local/share/fonts"),
    *("~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts"),
)
MAX_FONTS = 500  # files that are opened for one script
# Fonts of many scripts come first, Chinese ones before all: an upright face for text.
PREFERRED = r"cjk.*regular|wqy|simhei|msyh|pingfang|droidsansfallback|sourcehan|cjk", r"noto|unifont|unicode|dejavu"
MISSING = "\U0010ffff"  # no font has a glyph for it: its picture is that of every character that a font lacks


@functools.cache
def _files():
    """Lists the font files of this machine, the preferred ones first."""
    found = []
    for folder in map(os.path.expanduser, FOLDERS):
        found += glob.glob(f"{glob.escape(folder)}/**/*.[to]t[fc]", recursive=True)

    def rank(path):
        name = os.path.basename(path).lower()
        is_odd = re.search("bold|italic|oblique|mono|serif|light|black|thin|emoji", name) is not None
        return [re.search(words, name) is None for words in PREFERRED], is_odd, path

    return sorted(found, key=rank)[:MAX_FONTS]


@functools.cache
def _open(path, size):
    """Returns a font of `size` pixels: a file's, of a collection the simplified Chinese face; None for Pillow's own."""
    if path is None:
        return ImageFont.load_default(size)
    faces = []
    for index in range(10 if path.lower().endswith("c") else 1):
        try:
            faces.append(ImageFont.truetype(path, size, index=index))
        except OSError:
            break
    chinese = [face for face in faces if (face.getname()[0] or "").endswith(" SC")]
    return next(iter(chinese or faces), None)


@functools.cache
def _has(path, character):
    """Returns whether a font file has a glyph for a character."""
    font = _open(path, 20)
    try:
        one, none = (font.getmask(text) for text in (character, MISSING))
    except (AttributeError, OSError, ValueError):  # no font, or a character that it chokes on
        return False
    return character.isspace() or (one.size, bytes(one)) != (none.size, bytes(none))


@functools.cache
def _font_of(text):
    """Returns `(file, drawable)`: of the first font that has a glyph for all, else for most characters of a text."""
    best = None, []
    for path in (None, *_files()):
        drawable = [character for character in text if _has(path, character)]
        if len(drawable) == len(text):
            return path, drawable
        best = max(best, (path, drawable), key=lambda found: len(found[1]))
    return best


def readable(text):
    """Returns a text as it can be drawn on this machine: one line, "?" for characters that no font has a glyph for."""
    text = shortened(text, 200)
    _, drawable = _font_of(text)
    return "".join(character if character in drawable else "?" for character in text)


class Line:
    """One line of text in a picture: cut to `max_width` pixels, "?" where no font has a character.

    Attributes:
        width, height: of the line, in pixels; lines of one size have one height.
    """

    def __init__(self, text, size, max_width):
        text = whole = readable(text)
        self.font, self.height = _open(_font_of(text)[0], size), round(size * 1.4)
        keep = len(text)
        while keep > 1 and self.font.getlength(text) > max_width:
            keep -= 1
            text = whole[:keep].rstrip() + "..."
        self.text, self.width = text, -int(-self.font.getlength(text) // 1)

    def draw(self, picture: Image.Image, left, middle):
        """Writes the line in black, its left end at `left`, its height around `middle`."""
        # The middle is that of "Hg", whatever letters a line has, so that lines of a row are level.
        _, top, _, bottom = self.font.getbbox("Hg")
        ImageDraw.Draw(picture).text((left, middle - (top + bottom) / 2), self.text, fill=(0, 0, 0), font=self.font)
