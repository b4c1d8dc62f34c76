"""Image grids, plain or labelled."""

import numpy as np
from PIL import Image

from sampling.fonts import Line, readable

GAP = 4  # pixels between the images of a labelled grid
BACKGROUND = (255, 255, 255)


def make_grid(images, columns, *, gap=0, row_labels=None, column_labels=None):
    """Returns a PIL image of images side by side, row by row.

    Without gap and labels the images touch one another, and what is left of the last row is black. Else all around is
    white. A label that is too long is cut, a character without a glyph is "?".

    Args:
        images: uint8 `(N, H, W, 3)`, or a list of PIL images of one size; of a list None is an empty place.
        columns: images a row.
        gap: white pixels between images, and around the picture.
        row_labels: texts at the left of the rows.
        column_labels: texts above the columns; as many as there are images: above each image.
    """
    shown = np.stack([np.asarray(image) for image in images if image is not None])  # (n, H, W, 3)
    if shown.ndim != 4 or shown.dtype != np.uint8 or columns < 1:
        raise ValueError(f"expected uint8 (N, H, W, C) and columns >= 1, got {shown.dtype} {shown.shape}, {columns}")
    _, height, width, channels = shown.shape
    count, rows = len(images), -(-len(images) // columns)
    places = np.array([place for place, image in enumerate(images) if image is not None])
    if gap or row_labels is not None or column_labels is not None:
        given = shown.repeat(3, axis=3) if channels == 1 else shown
        cells = dict(zip(places.tolist(), map(Image.fromarray, given), strict=True))
        return _labelled(cells, count, columns, (width, height), gap, row_labels, column_labels)
    grid = np.zeros([rows * columns, height, width, channels], "uint8")
    grid[places] = shown
    grid = grid.reshape([rows, columns, height, width, channels])
    grid = grid.transpose([0, 2, 1, 3, 4])  # (rows, H, columns, W, C)
    return Image.fromarray(grid.reshape([rows * height, columns * width, channels]).squeeze())


def _labelled(cells, count, columns, size, gap, row_labels, column_labels):
    """Returns the grid of `{place: image}`, the images of a `size` `(W, H)`."""
    (width, height), rows = size, -(-count // columns)
    font_size = min(max(13, height // 10), 28)
    left_lines = [Line(text, font_size, 12 * font_size) for text in row_labels or ()]
    top_lines = [Line(text, font_size, max(width, 5 * font_size)) for text in column_labels or ()]
    expected = {"row_labels": (left_lines, {0, rows}), "column_labels": (top_lines, {0, columns, count})}
    for name, (lines, lengths) in expected.items():
        if len(lines) not in lengths:
            raise ValueError(f"{len(lines)} {name}: expected {' or '.join(map(str, sorted(lengths - {0})))}")
    line_height = left_lines[0].height if left_lines else top_lines[0].height if top_lines else 0
    pad = max(gap, line_height // 3) if line_height else gap  # around the text
    each = len(top_lines) == count and count > columns  # a label for each image, not for each column
    pitch_x = max([width, *(line.width + 2 for line in top_lines)]) + gap
    pitch_y = max(height, line_height if left_lines else 0) + (line_height if each else 0) + gap
    x0 = gap + (max(line.width for line in left_lines) + 2 * pad if left_lines else 0)
    y0 = gap + (line_height if top_lines else 0)
    picture = Image.new("RGB", (x0 + columns * pitch_x, y0 + rows * pitch_y - (line_height if each else 0)), BACKGROUND)
    for row, line in enumerate(left_lines):
        line.draw(picture, x0 - pad - line.width, y0 + row * pitch_y + max(height, line_height) // 2)
    for place, line in enumerate(top_lines):
        row, column = divmod(place, columns)
        left = x0 + column * pitch_x + (pitch_x - gap - line.width) // 2
        line.draw(picture, left, y0 + row * pitch_y - line_height // 2)
    for place, image in cells.items():
        row, column = divmod(place, columns)
        x = x0 + column * pitch_x + (pitch_x - gap - width) // 2
        y = y0 + row * pitch_y + (max(0, line_height - height) // 2 if left_lines else 0)
        picture.paste(image, (x, y))
    return picture


def class_labels(ids, labels):
    """Lists the texts to show for class ids: their names of `{id: name}`, up to the first comma.

    A class without a name, or with one that no font of this machine can draw, is "class 7". A name of which some
    characters can be drawn has the id beside it.
    """
    texts = []
    for i in map(int, ids):
        name = labels.get(i, "").split(",")[0].strip()
        shown = readable(name)
        if not shown.strip("? ."):
            shown = f"class {i}"
        elif shown.count("?") > name.count("?"):
            shown = f"{i}: {shown}"
        texts.append(shown)
    return texts


def class_grid(images, ids, labels, per_class):
    """Returns a grid with one row a class, its name at the left; with one image a class its names are above them.

    Args:
        images: as of `make_grid`, those of a class one after the other.
        ids: of the classes. labels: `{id: name}`, perhaps without some. per_class: images of each class.
    """
    names = class_labels(ids, labels)
    if per_class == 1:
        return make_grid(images, min(len(names), 8), gap=GAP, column_labels=names)
    return make_grid(images, per_class, gap=GAP, row_labels=names)
