"""The metrics: the shared vectors, decisions that rounding must not change, statistics that come in parts, messages."""

import tracemalloc

import numpy as np
import pytest
from support.golden import load_golden

from evaluation import checks, metrics, neighbours
from evaluation.statistics import Statistics

RNG = np.random.default_rng(20151205)


def normal(*shape):
    return RNG.standard_normal(shape).astype("float32")


def statistics_of(*batches):
    found = Statistics(batches[0].shape[1])
    for batch in batches:
        found.add(batch)
    return found


def moments(features):
    found = statistics_of(features)
    return found.mean, found.covariance


def plain_precision_recall(reference, samples, k):
    """Precision and recall from differences in float64, all at once."""

    def squared(a, b):
        differences = (point - b for point in a.astype("float64"))
        return np.stack([np.einsum("nd,nd->n", found, found) for found in differences])

    radii = [np.sort(squared(a, a), axis=1)[:, k] for a in (reference, samples)]
    between = squared(reference, samples)
    return (between <= radii[0][:, None]).any(axis=0).mean(), (between <= radii[1]).any(axis=1).mean()


@pytest.mark.parametrize(
    "case", ["diagonal", "commuting", "scaled", "same", "point", "general", "rank_deficient", "few"]
)
def test_frechet_distance_golden(case):
    golden = load_golden("evaluation_fid")
    names = ("mu_x", "sigma_x", "mu_y", "sigma_y") if case == "few" else ("mu1", "sigma1", "mu2", "sigma2")
    arguments = [golden[f"{case}_{name}"] for name in names]
    error = metrics.frechet_distance(*arguments) - golden[f"{case}_fid"]
    assert abs(error) < 1e-9 * (np.trace(arguments[1]) + np.trace(arguments[3]))


def test_covariance_is_that_of_the_golden_samples():
    golden = load_golden("evaluation_fid")
    for name in "xy":
        mean, covariance = moments(golden[f"few_{name}"])
        np.testing.assert_allclose(mean, golden[f"few_mu_{name}"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(covariance, golden[f"few_sigma_{name}"], rtol=0, atol=1e-12)


def test_inception_score_golden():
    golden = load_golden("evaluation_is")
    for name in (name for name in golden if "_is_" in name):
        case, split_size = name.split("_is_")
        score = metrics.inception_score(golden[case], split_size=int(split_size))
        assert score == pytest.approx(golden[name], rel=1e-9), name


def test_precision_recall_golden():
    golden = load_golden("evaluation_pr")
    for name in (name for name in golden if "_pr_" in name):
        case, k = name.split("_pr_")
        found = metrics.precision_recall(golden[f"{case}_reference"], golden[f"{case}_sample"], k=int(k))
        np.testing.assert_array_equal(found, golden[name], err_msg=name)


def test_kernel_distance_golden():
    golden = load_golden("evaluation_kid")
    for case in ("shifted", "equal", "same"):
        x, y = golden[f"{case}_x"], golden[f"{case}_y"]
        found = metrics.kernel_distance(x, y, subset_size=len(x))
        assert abs(found - golden[f"{case}_kid"]) < 5e-8 * golden[f"{case}_size"], case
        assert metrics.kernel_distance(x, y) == pytest.approx(found, rel=1e-3)  # the subsets are as large as the sets
    sizes = {"num_subsets": 100, "subset_size": 50}
    estimates = metrics.kernel_distances(golden["subsets_x"], golden["subsets_y"], **sizes)
    mean, error = metrics.mean_and_error(estimates)
    assert abs(mean - golden["subsets_kid"]) < 6 * golden["subsets_kid_sd"]
    assert 0.5 < error / golden["subsets_kid_sd"] < 2


def test_mind_golden():
    golden = load_golden("evaluation_mind")
    for case in ("shifted", "permuted", "one"):
        found = metrics.mind(golden[f"{case}_x"], golden[f"{case}_y"], projections=golden[f"{case}_projections"])
        assert abs(found - golden[f"{case}_mind"]) < 1e-9 * golden[f"{case}_size"], case
    for case in ("drawn", "unequal"):
        found = metrics.mind(golden[f"{case}_x"], golden[f"{case}_y"])
        assert abs(found - golden[f"{case}_mind_mean"]) < 6 * golden[f"{case}_mind_sd"], case


def test_frechet_distance_of_equal_sets_is_0():
    """Also with fewer rows than dimensions, spectra over 12 decades, and statistics that float32 has rounded."""
    spread = np.exp(-np.arange(256) / 10).astype("float32")
    for features in (normal(600, 256), normal(100, 256), np.maximum(normal(300, 256), 0), normal(600, 256) * spread):
        mean, sigma = moments(features)
        assert abs(metrics.frechet_distance(mean, sigma, mean, sigma)) < 1e-9
        rounded = sigma.astype("float32")
        assert abs(metrics.frechet_distance(mean, rounded, mean, rounded)) < 1e-5


def test_frechet_distance_of_few_rows_loses_no_digits():
    """Singular covariances, of which the distance is known from the singular values of the features' product."""
    spread = np.exp(-np.arange(300) / 20)
    x, y = RNG.standard_normal((120, 300)) * spread, RNG.standard_normal((200, 300)) * spread + 0.1
    a, b = ((features - features.mean(axis=0)) / np.sqrt(len(features) - 1) for features in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross
    assert metrics.frechet_distance(*moments(x), *moments(y)) == pytest.approx(expected, rel=1e-8)


HARD = {
    "ties on a lattice": lambda n: RNG.integers(-1, 2, (n, 4)).astype("float32"),
    "ties but for rounding": lambda n: (RNG.integers(-1, 2, (n, 5)) + 31) / 3,
    "clusters narrower than float32": lambda n: np.eye(6)[RNG.integers(0, 6, n)] * 30 + RNG.normal(0, 1e-4, (n, 6)),
    "clusters narrower than float64": lambda n: np.eye(6)[RNG.integers(0, 6, n)] * 30 + RNG.normal(0, 1e-8, (n, 6)),
    "copies": lambda n: np.eye(5, dtype="float32")[RNG.integers(0, 5, n)],
    "all alike": lambda n: np.zeros((n, 3), "float32"),
    "an outlier": lambda n: np.concatenate([normal(n - 1, 8), np.full((1, 8), 1e6, "float32")]),
    "large numbers": lambda n: RNG.standard_normal((n, 8)) * 1e150,
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("block", [7, 2048])
def test_precision_recall_decides_as_exact_arithmetic(kind, block, monkeypatch):
    monkeypatch.setattr(checks, "BLOCK", block)
    monkeypatch.setattr(neighbours, "BLOCK", block)
    reference, samples = HARD[kind](90), HARD[kind](70)
    small = 1e-140 if kind == "large numbers" else 1.0  # the plain way overflows
    expected = plain_precision_recall(reference * small, samples * small, 3)
    assert metrics.precision_recall(reference, samples) == pytest.approx(expected, abs=1e-12)


def test_precision_recall_takes_no_memory_for_all_distances():
    reference, samples = normal(7000, 16), np.tile(normal(500, 16), (6, 1))
    tracemalloc.start()
    precision, _ = metrics.precision_recall(reference, samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 110e6 < 4 * 7000**2
    assert 0.5 < precision < 1


def test_statistics_of_ranks_and_batches_are_those_of_all_rows():
    """Float32 features with a mean 10,000 times their spread; a rank without images; the others unequal."""
    features = normal(500, 20) @ normal(20, 20) + 30000
    ranks = [statistics_of(*np.split(part, [1, 70])) for part in np.split(features, [80, 81])] + [Statistics(20)]
    merged = Statistics(20)
    for rank in ranks:
        merged.merge(rank)
    assert merged.count == 500
    np.testing.assert_allclose(merged.mean, features.mean(axis=0, dtype="float64"), rtol=1e-13)
    expected = np.cov(features.astype("float64"), rowvar=False)
    np.testing.assert_allclose(merged.covariance, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    np.testing.assert_array_equal(merged.covariance, merged.covariance.T)


def test_what_is_drawn_follows_from_the_seed():
    x, y = normal(60, 6), normal(50, 6)
    for draw in (lambda seed: metrics.kernel_distance(x, y, 5, 20, seed), lambda seed: metrics.mind(x, y, 9, seed)):
        assert draw(1) == draw(1) != draw(2)


def test_softmax_of_large_logits():
    logits = np.array([[1000.0, 1000.0, -1000.0], [0.0, np.log(2), np.log(5)]], "float32")
    np.testing.assert_allclose(metrics.softmax(logits), [[0.5, 0.5, 0], [1 / 8, 2 / 8, 5 / 8]], rtol=1e-7)


X = np.zeros((5, 2))
BROKEN = [
    (lambda: metrics.precision_recall(X, X[:3]), "sample_features: 3 rows; expected more than k = 3"),
    (lambda: metrics.precision_recall(X, X, k=0), "k 0: expected an integer of 1 or more"),
    (lambda: metrics.precision_recall(X + np.nan, X), "reference_features: has NaN"),
    (lambda: metrics.precision_recall(X, X[0]), r"sample_features: an array of shape \(2,\); expected \(N, D\)"),
    (lambda: metrics.kernel_distance(X, np.zeros((5, 3))), "y: rows of 3 numbers; expected 2, as x has"),
    (lambda: metrics.kernel_distance(X[:1], X), "x: 1 row; expected 2 or more"),
    (lambda: metrics.kernel_distance(X, X, subset_size=1), "subset_size 1: expected 2 or more"),
    (lambda: metrics.mind(X, X, projections=np.ones((4, 3))), "projections: rows of 3 numbers; expected 2"),
    (lambda: metrics.mind(X, X.astype("str")), "y: numbers of type"),
    (lambda: metrics.inception_score(X + 1), "probabilities: a row is not one"),
    (lambda: metrics.softmax(X + np.inf), "logits: has infinity"),
    (lambda: metrics.frechet_distance(X[0], X, X[0], X), r"sigma1: an array of shape \(5, 2\); expected \(2, 2\)"),
    (lambda: metrics.frechet_distance(X[0], np.eye(2), X[:, 0], np.eye(5)), "mu2: 5 numbers; expected 2"),
    (lambda: metrics.frechet_distance(X[0], np.eye(2), X[0], -np.eye(2)), "sigma2: not symmetric, or negative"),
    (lambda: statistics_of(X[:1]).covariance, "1 image; a covariance takes 2 or more"),
    (lambda: Statistics(3).add(X), "features: rows of 2 numbers; expected 3"),
]


@pytest.mark.parametrize("call, message", BROKEN)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
