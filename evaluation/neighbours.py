"""Which points of one set lie in the balls around another's: decisions of exact arithmetic at the speed of float32.

A product of two blocks of points in float32 gives half their negative squared distances, -d^2 / 2. Its rounding error
is bounded. What a bound leaves open (is d^2 <= r^2?) is told by the differences of the two points, in float64: equal
points have the distance 0, and a point on the edge of a ball is inside. Where too much is left open, as among equal
distances of points on a lattice, a product in float64 comes between; for numbers that are few multiples of a power of
two (integers, eighths, zeros and ones) that one makes no error. Equal points are counted, and computed once.

The bound: the error of -d^2 / 2 is at most e (|a|^2 + |b|^2), with e = (D + 16) u, u the unit roundoff: the product of
D + 2 columns has (D + 2) u at most in any order of its sum, the rest is for rounding the columns and radii. As
|b|^2 <= 2 |a|^2 + 2 d^2, the error of a d^2 near r^2 is at most e (6 |a|^2 + 4 r^2), which only a ball's own centre and
radius enter.
"""

import hashlib

import numpy as np

from evaluation.checks import BLOCK, blocks, product

EXTRA = 5  # neighbours kept beyond the k-th, so that all those near it in float32 are known
PAIRS = 1 << 22  # numbers of the differences of pairs, at once


class _Points:
    """The different points of a set, how often each is there, and what makes distances of them.

    Args:
        features: `(N, D)`. scale: a power of two that brings all numbers into [-1, 1]. centre: `(D,)` after `scale`.
        exact: products of the centred points are exact in float64.
    """

    def __init__(self, features, scale, centre, exact):
        first, place = {}, np.empty(len(features), np.int64)
        for row, point in enumerate(features):
            key = hashlib.blake2b((point + 0).data, digest_size=16).digest()  # -0 + 0 is 0
            place[row] = first.setdefault(key, row)
        found, self.counts = np.unique(place, return_counts=True)
        self.features = features if len(found) == len(features) else features[found]
        self.scale, self.centre, self.exact, self.dim = scale, centre, exact, features.shape[1]
        self.norms = np.empty(len(found))  # squared, after centring
        self.columns = np.empty((len(found), self.dim + 2), np.float32)  # [b, 1, -|b|^2 / 2]
        for rows in blocks(len(found)):
            columns = self.sides(rows, np.float64)[1]
            self.norms[rows], self.columns[rows] = -2 * columns[:, -1], columns

    def __len__(self):
        return len(self.counts)

    def sides(self, rows, dtype):
        """Returns `(left, right)`, whose product, of one block's left and another's right, is -d^2 / 2."""
        if dtype == np.float32:
            right = self.columns[rows]
        else:
            points = _scaled(self.features[rows], self.scale) - self.centre  # (n, D)
            half = np.einsum("nd,nd->n", points, points)[:, None] / -2
            right = np.concatenate([points, np.ones_like(half), half], axis=1)
        left = right.copy()  # [a, -|a|^2 / 2, 1]
        left[:, -2:] = right[:, :-3:-1]
        return left, right

    def rounding(self, dtype):
        """Returns e of the module's docstring."""
        if dtype == np.float64 and self.exact:
            return 0.0
        return (self.dim + 16) * np.finfo(dtype).eps / 2


def _scaled(features, scale):
    return np.multiply(features, scale, dtype=np.float64)


def _frame(first, second):
    """Returns the scale, the centre and whether products are exact, of two sets, as `_Points` takes them."""
    parts = [(features[rows], len(features)) for features in (first, second) for rows in blocks(len(features))]
    scale = np.ldexp(1.0, min(1000, -np.frexp(max(np.abs(part).max() for part, _ in parts))[1]))
    # After `scale`, products of multiples of 1 / steps that were centred at one of them are exact in float64.
    steps = 2.0 ** ((49 - int(first.shape[1]).bit_length()) // 2)
    centre = sum(_scaled(part, scale).sum(axis=0) / count for part, count in parts) / 2
    whole = (_scaled(part, scale * steps) for part, _ in parts)
    return scale, np.rint(centre * steps) / steps, all((numbers == np.rint(numbers)).all() for numbers in whole)


def _squared(a, i, b, j):
    """Returns the squared distances of the points `a[i]` and `b[j]`, pair by pair, in float64."""
    found = np.empty(len(i))
    for some in blocks(len(i), size=max(1, PAIRS // a.dim)):
        difference = np.subtract(a.features[i[some]], b.features[j[some]], dtype=np.float64)
        difference *= a.scale
        np.einsum("nd,nd->n", difference, difference, out=found[some])
    return found


def _keep_largest(z, axis, offset, best, where):
    """Merges a block of products into the largest so far of each point.

    Args:
        z: `(n, m)`. axis: the one along which it holds a point's neighbours. offset: number of the first neighbour.
        best: `(points, keep)`, in descending order. where: numbers of these neighbours.
    """
    keep = best.shape[1]
    along = z if axis == 1 else z.T
    mask = z > (best[:, -1:] if axis == 1 else best[:, -1])
    if np.count_nonzero(mask) > 4 * best.size and along.shape[1] > keep:  # above all at the first block
        places = np.argpartition(along, -keep, axis=1)[:, -keep:].ravel()
        points = np.repeat(np.arange(len(along)), keep)
    else:
        points, places = np.nonzero(mask)[:: 1 if axis == 1 else -1]
    touched = np.unique(points)
    values = np.concatenate([along[points, places], best[touched].ravel()])
    numbers = np.concatenate([places + offset, where[touched].ravel()])
    points = np.concatenate([points, np.repeat(touched, keep)])
    order = np.lexsort((-values, points))
    points = points[order]
    starts = np.searchsorted(points, touched)  # each has `keep` entries or more
    order = order[starts[:, None] + np.arange(keep)]
    best[touched], where[touched] = values[order], numbers[order]


def _nearest(points, keep):
    """Returns -d^2 / 2 of each point's `keep` nearest others, as float32 has it, nearest first, and their numbers."""
    best = np.full((len(points), keep), -np.inf, np.float32)
    where = np.zeros((len(points), keep), np.int64)
    for rows in blocks(len(points), size=BLOCK):
        left, right = points.sides(rows, np.float32)
        for columns in blocks(len(points), rows.start, BLOCK):
            z = product(left, points.columns[columns])
            if columns == rows:
                np.fill_diagonal(z, -np.inf)
            else:  # the distances are those of the columns' points too
                _keep_largest(z, 0, rows.start, best[columns], where[columns])
            _keep_largest(z, 1, columns.start, best[rows], where[rows])
    return best, where


def _kth(squared, copies, own, k):
    """Returns the first of the ascending squared distances `(n, m)` with `k` neighbours or more up to it.

    It is infinite where there are fewer. Each entry stands for `copies` of a point; `own` `(n,)` are those of the
    points themselves, at the distance 0.
    """
    enough = own[:, None] + np.cumsum(copies, axis=1) > k
    found = np.take_along_axis(squared, enough.argmax(axis=1)[:, None], axis=1)[:, 0]
    found = np.where(enough.any(axis=1), found, np.inf)
    return np.where(own > k, 0.0, found)


def _reach(points, numbers, radii, dtype):
    """Returns the squared distance up to which a product may say of a neighbour what truly is within `radii`."""
    e = points.rounding(dtype)
    return radii + e * (6 * points.norms[numbers] + 4 * radii)


def _radii(points, k):
    """Returns the squared distance of each point to its k-th neighbour, itself not counted, `(N,)`."""
    n = len(points)
    keep = min(k + EXTRA, n - 1)
    if not keep:
        return np.zeros(n)
    best, where = _nearest(points, keep)
    everyone = np.arange(n)
    e = points.rounding(np.float32)
    approximate = _kth(-2.0 * best, points.counts[where], points.counts, k)
    # The true radius is at most this; whoever is within it is a candidate, and all of them have to be known.
    upper = _reach(points, everyone, (approximate + e * 6 * points.norms) / (1 - 4 * e), np.float32)
    known = (points.counts > k) | (keep == n - 1) | (-2.0 * best[:, -1] > upper)
    squared = np.full((n, keep), np.inf)
    i, j = np.nonzero((-2.0 * best <= upper[:, None]) & known[:, None])
    squared[i, j] = _squared(points, i, points, where[i, j])
    order = np.argsort(squared, axis=1)
    radii = _kth(
        np.take_along_axis(squared, order, 1), points.counts[np.take_along_axis(where, order, 1)], points.counts, k
    )
    unknown = np.flatnonzero(~known)
    for some in blocks(len(unknown), size=BLOCK // 4):
        radii[unknown[some]] = _radii_in_float64(points, unknown[some], k)
    return radii


def _radii_in_float64(points, numbers, k):
    """Returns what `_radii` does, of the points `numbers`, from all their distances."""
    squared = np.empty((len(numbers), len(points)))
    left = points.sides(numbers, np.float64)[0]
    for columns in blocks(len(points)):
        squared[:, columns] = -2 * product(left, points.sides(columns, np.float64)[1])
    squared[np.arange(len(numbers)), numbers] = np.inf
    radii, e = np.empty(len(numbers)), points.rounding(np.float64)
    for row, number in enumerate(numbers):
        own = points.counts[[number]]
        near = np.argpartition(squared[row], k - 1)[:k] if k < len(points) else np.arange(len(points))
        near = near[np.argsort(squared[row, near])]
        approximate = _kth(squared[row, near][None], points.counts[near][None], own, k)
        upper = _reach(points, [number], (approximate + e * 6 * points.norms[number]) / (1 - 4 * e), np.float64)
        near = np.flatnonzero(squared[row] <= upper)
        exact = squared[row, near] if points.exact else _squared(points, np.full(len(near), number), points, near)
        order = np.argsort(exact)
        radii[row] = _kth(exact[order][None], points.counts[near[order]][None], own, k)[0]
    return radii


class Balls:
    """The balls of two sets around their points, each reaching to the centre's k-th neighbour in its own set.

    Args:
        first: features `(N, D)`. second: features `(M, D)`. k: less than N and M.
    """

    def __init__(self, first, second, k):
        frame = _frame(first, second)
        self._sets = [_Points(features, *frame) for features in (first, second)]
        self._radii = [_radii(points, k) for points in self._sets]

    def shares(self):
        """Returns the share of the first set's points in balls of the second, and of the second's in the first's."""
        inside = [np.zeros(len(points), bool) for points in self._sets]
        first, second = self._sets
        for rows in blocks(len(first), size=BLOCK):
            left = first.sides(rows, np.float32)[0]
            for columns in blocks(len(second), size=BLOCK):
                z = product(left, second.columns[columns])  # (n, m)
                self._look(0, rows, columns, z, inside[1])
                self._look(1, columns, rows, z.T, inside[0])
        return tuple(
            float(points.counts[found].sum() / points.counts.sum())
            for points, found in zip(self._sets, inside, strict=True)
        )

    def _look(self, which, centres, others, z, inside, dtype=np.float32):
        """Marks those points of a block of the other set that are in a ball of a block of set `which`.

        Args:
            centres, others: slices; or `others` numbers. z: `(centres, others)`, -d^2 / 2. inside: marks of the others.
        """
        points, other = self._sets[which], self._sets[1 - which]
        radii = self._radii[which][centres]
        margin = (_reach(points, centres, radii, dtype) - radii).astype(dtype) / 2
        edge = (radii / -2).astype(dtype)
        nearest = (z - (edge + margin)[:, None]).max(axis=0)  # 0 or more: surely in a ball
        inside[others] |= nearest >= 0
        open_ = np.flatnonzero((nearest >= -2.01 * margin.max()) & ~inside[others])
        if not len(open_):
            return
        i, j = np.nonzero(z[:, open_] >= (edge - margin)[:, None])
        numbers = np.arange(len(other))[others][open_]
        if dtype == np.float32 and len(i) > 16 * len(open_) + 1000:
            z = product(points.sides(centres, np.float64)[0], other.sides(numbers, np.float64)[1])
            self._look(which, centres, numbers, z, inside, np.float64)
        else:
            within = _squared(points, i + centres.start, other, numbers[j]) <= radii[i]
            inside[numbers[j[within]]] = True
