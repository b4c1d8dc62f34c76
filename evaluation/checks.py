"""What the metrics accept, and products at the speed of scipy's BLAS, which is imported at the first: it takes long."""

import numpy as np

BLOCK = 2048  # rows of a set that are worked on at once


def checked(array, name, shape, least=1):
    """Returns a floating-point array of finite numbers; half precision and integers are widened.

    Args:
        array: what the user gave. name: of the argument, for messages. shape: its axes in words, such as `(N, D)`.
        least: how many rows it must have.

    Raises:
        ValueError: Naming the argument, if it is something else.
    """
    array = np.asarray(array)
    if array.ndim != shape.count(",") + (not shape.endswith(",)")) or 0 in array.shape[1:]:
        raise ValueError(f"{name}: an array of shape {array.shape}; expected {shape}")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: numbers of type {array.dtype}; expected floating-point numbers")
    if len(array) < least:
        raise ValueError(f"{name}: {len(array)} row{'s' * (len(array) != 1)}; expected {least} or more")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif array.dtype.itemsize < 4 or not array.dtype.isnative:
        array = array.astype(np.float32 if array.dtype.itemsize <= 4 else np.float64)
    for rows in blocks(len(array)):
        with np.errstate(all="ignore"):
            doubtful = not np.isfinite(array[rows].sum())  # in a fifth of the time of a look at each number
        if doubtful and not np.isfinite(array[rows]).all():
            kind = "NaN" if np.isnan(array[rows]).any() else "infinity"
            raise ValueError(f"{name}: has {kind}; expected finite numbers")
    return array


def check_covariance(sigma, name):
    """Raises `ValueError` naming the argument or file unless a square matrix may be a covariance."""
    if np.abs(sigma - sigma.T).max() > 1e-3 * np.abs(sigma).max() or sigma.diagonal().min() < 0:
        raise ValueError(f"{name}: not symmetric, or negative on its diagonal; expected a covariance")


def check_count(value, name):
    """Raises `ValueError` unless `value` is an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} {value}: expected an integer of 1 or more")


def blocks(count, start=0, size=None):
    """Returns slices that cover `range(start, count)`, of `size` [`BLOCK`] each, the last of what is left."""
    size = size or BLOCK
    return [slice(first, min(first + size, count)) for first in range(start, count, size)]


def product(a, b):
    """Returns `a @ b.T` of two C-ordered arrays of rows of the same type.

    numpy's own BLAS may know nothing of the processor, as in the releases before 2.0, and takes five times as long.
    """
    from scipy.linalg import blas

    gemm = blas.sgemm if a.dtype == np.float32 else blas.dgemm
    return gemm(1.0, b.T, a.T, trans_a=True).T


def gram(a, factor=1.0, out=None):
    """Returns the lower triangle of `factor * a @ a.T` of a C-ordered array of rows.

    Above it are zeros, or what is there in `out`, the C-ordered array to write to.
    """
    from scipy.linalg import blas

    syrk = blas.ssyrk if a.dtype == np.float32 else blas.dsyrk
    out = np.zeros((len(a), len(a)), a.dtype) if out is None else out
    return syrk(factor, a.T, trans=True, c=out.T, overwrite_c=True).T
