"""Mean and covariance of features that come in batches, on one rank or several."""

import numpy as np

from evaluation.checks import blocks, checked


class Statistics:
    """Sums from which the mean and the covariance of all rows so far are told, in float64.

    The sums are of differences from the first batch's mean: features whose mean is large beside their spread lose no
    digits. The memory is that of one matrix (D, D), however many rows there are.

    Args:
        dim: D, numbers in a row.
    """

    def __init__(self, dim):
        self.dim = dim
        self.count = 0
        self._shift = np.zeros(dim)
        self._sum = np.zeros(dim)
        self._products = np.zeros((dim, dim), order="F")  # of the differences; the lower triangle is in use

    def add(self, features):
        """Adds rows `(n, D)`; `ValueError` if they have another length, or NaN or infinity in them."""
        from scipy.linalg import blas

        features = checked(features, "features", "(N, D)", least=0)
        if features.shape[1] != self.dim:
            raise ValueError(f"features: rows of {features.shape[1]} numbers; expected {self.dim}")
        if not self.count and len(features):
            self._shift = features.mean(axis=0, dtype=np.float64)
        for rows in blocks(len(features)):
            differences = features[rows] - self._shift  # (n, D)
            self._sum += differences.sum(axis=0)
            self._products = blas.dsyrk(
                1.0, differences.T, beta=1.0, c=self._products, lower=True, overwrite_c=True
            )  # (D, D), in half the time of a full product
        self.count += len(features)

    def merge(self, other):
        """Adds the rows that another `Statistics` has seen; that one stays as it is."""
        if other.dim != self.dim:
            raise ValueError(f"statistics: of rows of {other.dim} numbers; expected {self.dim}")
        if not other.count:
            return
        if not self.count:
            self._shift = other._shift.copy()
        # The other's differences from this one's shift d: (x - s) + (s - d).
        moved = other._shift - self._shift
        cross = np.outer(other._sum, moved)
        self._products += other._products + (cross + cross.T + other.count * np.outer(moved, moved))
        self._sum += other._sum + other.count * moved
        self.count += other.count

    @property
    def mean(self):
        """The mean of the rows, `(D,)`; `ValueError` if there are none."""
        if not self.count:
            raise ValueError("statistics: 0 images; a mean takes 1 or more")
        return self._shift + self._sum / self.count

    @property
    def covariance(self):
        """The covariance of the rows, `(D, D)`, N - 1 in the denominator; `ValueError` if there are fewer than 2."""
        if self.count < 2:
            raise ValueError(f"statistics: {self.count} image{'s' * (self.count != 1)}; a covariance takes 2 or more")
        lower = np.tril(self._products - np.outer(self._sum, self._sum / self.count)) / (self.count - 1)
        return lower + np.tril(lower, -1).T
