"""Distances between two sets of features, and the Inception Score, in float64 where digits would be lost.

Products run on scipy's BLAS, on as many threads as `OMP_NUM_THREADS` says. Features are arrays `(N, D)`, a row an
image. Whatever is drawn depends on `seed` alone. A `ValueError` of one line names the argument that cannot be used.
"""

import numpy as np

from evaluation.checks import blocks, check_count, check_covariance, checked, gram, product
from evaluation.neighbours import Balls

LOGIT_ROWS = 512  # rows of probabilities at once: the work stays in the cache


def _pair(x, y, names, least=1):
    """Returns two sets of features, checked, of the same number of dimensions."""
    x, y = checked(x, names[0], "(N, D)", least), checked(y, names[1], "(N, D)", least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{names[1]}: rows of {y.shape[1]} numbers; expected {x.shape[1]}, as {names[0]} has")
    return x, y


def _factor(sigma):
    """Returns B `(rank, D)` with `B.T @ B` = sigma, without the directions in which sigma is 0 but for rounding."""
    from scipy.linalg import eigh, lapack

    # A Cholesky factor with pivots takes 0.24 s at D = 2048 on one core, `eigh` 1.9 s by its fastest driver ("evd").
    upper, pivots, rank, _ = lapack.dpstrf(sigma)
    factor = np.zeros((rank, len(sigma)))
    factor[:, pivots - 1] = np.triu(upper)[:rank]
    columns = np.ascontiguousarray(factor.T)
    if not rank or np.abs(product(columns, columns) - sigma).max() < 1e-11 * sigma.max():
        return factor
    # Rounding, as of statistics in float32, has made an eigenvalue negative: the nearest covariance counts.
    values, vectors = eigh(sigma, driver="evd", check_finite=False)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return np.ascontiguousarray((vectors[:, kept] * np.sqrt(values[kept])).T)


def _nuclear_norm(a, tolerance):
    """Returns the sum of a matrix's singular values, to `tolerance`."""
    from scipy.linalg import eigh, svdvals

    if 0 in a.shape:
        return 0.0
    gram_matrix = gram(a if len(a) <= a.shape[1] else np.ascontiguousarray(a.T))
    squares = eigh(gram_matrix, eigvals_only=True, driver="evr", check_finite=False)
    rounding = np.finfo(np.float64).eps * squares[-1]
    roots = np.sqrt(np.maximum(squares, rounding))
    if (rounding / roots).sum() > tolerance:  # small ones have drowned in the squares of the large
        return svdvals(a, check_finite=False).sum()
    return roots.sum()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Returns the squared Fréchet distance of two Gaussians: FID of pooled features, sFID of spatial ones.

    It is |mu1 - mu2|^2 + trace(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al., arXiv 1706.08500). With
    sigma1 = A A^T and sigma2 = B B^T, the last trace is the sum of the singular values of A^T B: roots of the
    eigenvalues of A^T sigma2 A. No root of a matrix is taken; singular covariances, as of few images, lose no digits.

    Args:
        mu1: mean `(D,)`. sigma1: covariance `(D, D)`. mu2, sigma2: of the other Gaussian.
    """
    mu1, mu2 = checked(mu1, "mu1", "(D,)"), checked(mu2, "mu2", "(D,)")
    sigmas = [checked(sigma1, "sigma1", "(D, D)"), checked(sigma2, "sigma2", "(D, D)")]
    if mu1.shape != mu2.shape:
        raise ValueError(f"mu2: {len(mu2)} numbers; expected {len(mu1)}, as mu1 has")
    for place, name in enumerate(("sigma1", "sigma2")):
        sigma = sigmas[place].astype(np.float64)
        if sigma.shape != (len(mu1), len(mu1)):
            raise ValueError(f"{name}: an array of shape {sigma.shape}; expected {(len(mu1), len(mu1))}, as of mu1")
        check_covariance(sigma, name)
        sigmas[place] = (sigma + sigma.T) / 2
    a, b = map(_factor, sigmas)
    traces = np.trace(sigmas[0]) + np.trace(sigmas[1])
    mean = mu1.astype(np.float64) - mu2
    return float((mean**2).sum() + traces - 2 * _nuclear_norm(product(a, b), 1e-9 * traces))


def softmax(logits):
    """Returns the probabilities `(N, K)`, in float64, of logits `(N, K)`."""
    logits = checked(logits, "logits", "(N, K)", least=0)
    probabilities = np.empty(logits.shape)
    for rows in blocks(len(logits), size=LOGIT_ROWS):
        shifted = np.subtract(logits[rows], logits[rows].max(axis=1, keepdims=True), out=probabilities[rows])
        np.exp(shifted, out=shifted)
        shifted /= shifted.sum(axis=1, keepdims=True)
    return probabilities


def inception_score(probabilities, split_size=5000):
    """Returns the Inception Score: the mean over splits of exp(mean KL(p(y|x) || p(y))) (arXiv 1606.03498).

    Args:
        probabilities: `(N, K)`, each row's sum 1; a 0 adds nothing. split_size: rows of a split. The splits are
            consecutive, in the order given, and a last one with fewer rows counts like the others.
    """
    probabilities = checked(probabilities, "probabilities", "(N, K)")
    check_count(split_size, "split_size")
    tiny, scores = np.finfo(np.float64).tiny, []
    for split in blocks(len(probabilities), size=split_size):
        entropy, total = 0.0, np.zeros(probabilities.shape[1])
        for rows in blocks(split.stop, split.start, LOGIT_ROWS):
            p = probabilities[rows].astype(np.float64)
            sums = p.sum(axis=1)
            if p.min() < 0 or np.abs(sums - 1).max() > 1e-3:
                raise ValueError("probabilities: a row is not one; expected numbers of 0 or more whose sum is 1")
            total += p.sum(axis=0)
            entropy += np.vdot(p, np.log(np.maximum(p, tiny)))
        count = split.stop - split.start
        marginal = total / count  # (K,)
        # The mean of sum p (log p - log q) over the rows, where only p differs from row to row.
        scores.append(np.exp(entropy / count - np.vdot(marginal, np.log(np.maximum(marginal, tiny)))))
    return float(np.mean(scores))


def precision_recall(reference_features, sample_features, k=3):
    """Returns `(precision, recall)`: shares of samples within the reference's manifold, and the reverse.

    A set's manifold is the union of balls around its points, whose radius is the distance to the k-th neighbour in the
    set, the point itself not counted, equal ones counted (Kynkäänniemi et al., arXiv 1904.06991). On the edge is
    inside. The decisions are those of exact arithmetic, whatever BLAS computes: see `evaluation.neighbours`.

    Args:
        reference_features: `(N, D)`. sample_features: `(M, D)`. k: less than N and M.
    """
    check_count(k, "k")
    names = ("reference_features", "sample_features")
    sets = _pair(reference_features, sample_features, names)
    for features, name in zip(sets, names, strict=True):
        if k >= len(features):
            raise ValueError(f"{name}: {len(features)} rows; expected more than k = {k}")
    recall, precision = Balls(*sets, k).shares()
    return precision, recall


@np.errstate(over="ignore", invalid="ignore")  # seen at the end
def kernel_distances(x, y, num_subsets=100, subset_size=1000, seed=0):
    """Returns the kernel distance of each pair of random subsets, `(num_subsets,)`; arguments as `kernel_distance`."""
    for value, name in ((num_subsets, "num_subsets"), (subset_size, "subset_size")):
        check_count(value, name)
    x, y = _pair(x, y, ("x", "y"), least=2)
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise ValueError(f"subset_size {subset_size}: expected 2 or more")
    rng, dim = np.random.default_rng(seed), x.shape[1]
    # Products in float32 are right to 1e-7 each; in their mean that is far less.
    dtype = np.result_type(x, y)
    x, y, both = x.astype(dtype, copy=False), y.astype(dtype, copy=False), np.empty((2 * size, dim), dtype)
    products = np.zeros((2 * size, 2 * size), dtype)

    def kernel_sum(products):
        total = 0.0
        for rows in blocks(size, size=64):  # what stays in the cache
            kernel = products[rows] + 1
            total += (kernel * kernel * kernel).sum(dtype=np.float64)
        return total

    found = []
    for _ in range(1 if len(x) == len(y) == size else num_subsets):
        for features, part in ((x, both[:size]), (y, both[size:])):
            features.take(rng.choice(len(features), size, replace=False), axis=0, out=part, mode="clip")
        gram(both, 1 / dim, products)
        estimate = -2 * kernel_sum(products[size:, :size]) / size**2
        diagonal = (products.diagonal().astype(np.float64) + 1) ** 3
        for rows in (slice(size), slice(size, None)):
            total = kernel_sum(products[rows, rows]) - diagonal[rows].sum()
            # Above the diagonal there are zeros, whose kernel is 1.
            estimate += 2 * (total - size * (size - 1) / 2) / (size * (size - 1))
        found.append(estimate)
    if dtype == np.float32 and not np.isfinite(found).all():  # cubes beyond 1e38
        return kernel_distances(x.astype(np.float64), y.astype(np.float64), num_subsets, subset_size, seed)
    return np.resize(found, num_subsets)  # where a subset is all, they are all the same


def kernel_distance(x, y, num_subsets=100, subset_size=1000, seed=0):
    """Returns the Kernel Inception Distance: the mean, over random subsets, of the unbiased squared MMD of two sets.

    The kernel is (a.b / D + 1)^3 (Bińkowski et al., arXiv 1801.01401); of equal distributions the distance is 0 in the
    mean, and may be negative. `mean_and_error(kernel_distances(...))` gives its standard error too.

    Args:
        x: features `(N, D)`. y: features `(M, D)`. num_subsets: pairs of subsets. subset_size: rows drawn from each
            set, without replacement; fewer where a set has fewer. seed: of the draws.
    """
    return mean_and_error(kernel_distances(x, y, num_subsets, subset_size, seed))[0]


def mean_and_error(estimates):
    """Returns the mean of `kernel_distances`, and the standard error that drawing the subsets leaves in it.

    The error is 0 of a single estimate, and where a subset is the whole set. It does not tell how the number would
    change with other images.
    """
    spread = np.std(estimates, ddof=1) if len(estimates) > 1 else 0.0
    return float(np.mean(estimates)), float(spread / np.sqrt(len(estimates)))


def mind(x, y, num_projections=1000, seed=0, projections=None):
    """Returns the Monge Inception Distance: 3 D times the mean squared Wasserstein-2 distance along random directions.

    Source: Berthet et al., arXiv 2605.06797.

    Args:
        x: features `(N, D)`. y: features `(M, D)`; of the larger set a random part is taken, as large as the other.
        num_projections: random unit vectors. seed: of what is drawn. projections: directions to take instead, as they
            are, `(P, D)`.
    """
    check_count(num_projections, "num_projections")
    x, y = _pair(x, y, ("x", "y"))
    rng, size, dim = np.random.default_rng(seed), min(len(x), len(y)), x.shape[1]
    x, y = (part if len(part) == size else part[rng.choice(len(part), size, replace=False)] for part in (x, y))
    if projections is None:
        projections = rng.standard_normal((num_projections, dim))
        projections /= np.linalg.norm(projections, axis=1, keepdims=True)
    projections = checked(projections, "projections", "(P, D)").astype(np.float64)
    if projections.shape[1] != dim:
        raise ValueError(f"projections: rows of {projections.shape[1]} numbers; expected {dim}, as x has")
    total = 0.0
    for chosen in blocks(len(projections), size=max(1, (1 << 24) // size)):  # 128 MiB of each set's projections
        ordered = []
        for features in (x, y):
            along = np.empty((chosen.stop - chosen.start, size))  # (P, N)
            for rows in blocks(size):
                along[:, rows] = product(projections[chosen], features[rows].astype(np.float64))
            along.sort(axis=1)
            ordered.append(along)
        ordered[0] -= ordered[1]
        total += np.vdot(ordered[0], ordered[0])
    return float(3 * dim * total / (size * len(projections)))
