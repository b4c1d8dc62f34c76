"""Image grids."""

import numpy as np
from PIL import Image


def make_grid(images, columns):
    """Returns a PIL image of images side by side, row by row, without gaps; the last row is filled with black.

    The images are uint8 `(N, H, W, 3)`, or a list of PIL images of one size.
    """
    images = np.stack([np.asarray(image) for image in images])  # (N, H, W, 3)
    if images.ndim != 4 or images.dtype != np.uint8 or columns < 1:
        raise ValueError(f"expected uint8 (N, H, W, C) and columns >= 1, got {images.dtype} {images.shape}, {columns}")
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    grid = np.zeros([rows * columns, height, width, channels], "uint8")
    grid[:count] = images
    grid = grid.reshape([rows, columns, height, width, channels])
    grid = grid.transpose([0, 2, 1, 3, 4])  # (rows, H, columns, W, C)
    return Image.fromarray(grid.reshape([rows * height, columns * width, channels]).squeeze())
