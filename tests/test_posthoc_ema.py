"""Post-hoc EMA: profiles and reconstruction against the official numbers and the formulas."""

import numpy as np
import pytest
from support.golden import load_golden

from training.posthoc_ema import (
    exponent_from_std,
    power_function_decay,
    reconstruction_coefficients,
    std_from_exponent,
)

SETS = ("two_profiles", "earlier", "one_profile", "stored", "images", "mixed_stds")


def coefficients_of(case, prefix=""):
    names = ("in_steps", "in_stds", "out_steps", "out_stds")
    return reconstruction_coefficients(*(case[prefix + name] for name in names))


# The mathematics.


def test_widths_exponents_and_decays_are_the_official_ones():
    case = load_golden("posthoc_ema_profiles")
    close = {"rtol": 1e-9, "atol": 0}
    np.testing.assert_allclose(exponent_from_std(case["stds"]), case["exponents_of_stds"], **close)
    np.testing.assert_allclose(std_from_exponent(case["exponents"]), case["stds_of_exponents"], **close)
    decays = power_function_decay(case["decay_steps"], case["decay_stds"], case["decay_deltas"])
    np.testing.assert_allclose(decays, case["decays"], **close)
    assert (decays == 0).any()
    # One by one, as numbers.
    assert exponent_from_std(float(case["stds"][2])) == exponent_from_std(case["stds"])[2]
    assert power_function_decay(1, 0.1) == 0 and isinstance(power_function_decay(3, 0.1), float)
    assert power_function_decay(np.arange(1, 4)[:, None], [0.05, 0.1]).shape == (3, 2)


@pytest.mark.parametrize("std", [1e-4, 0.003, 0.05, 0.2887])
def test_a_width_comes_back_from_its_exponent(std):
    assert std_from_exponent(exponent_from_std(std)) == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_coefficients_are_the_official_ones(name):
    case = load_golden("posthoc_ema_coefficients")
    found, expected = coefficients_of(case, f"{name}_"), case[f"{name}_coefficients"]
    assert found.shape == expected.shape and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.sum(axis=0), 1)


def test_averages_of_a_walk_and_what_is_reconstructed_of_them():
    walk = load_golden("posthoc_ema_walk")
    delta, theta = int(walk["delta"]), walk["theta"]
    averages, tracked = {}, {}
    for stds, steps, kept in (
        (walk["in_stds"], walk["in_steps"], averages),
        (walk["out_stds"], walk["out_steps"], tracked),
    ):
        for std in {*stds}:
            average = np.zeros_like(theta[0])
            for step, value in zip(delta * np.arange(1, len(theta) + 1), theta, strict=True):
                decay = power_function_decay(step, std, delta)
                average = decay * average + (1 - decay) * value
                kept[step, std] = average
        kept["rows"] = np.stack([kept[key] for key in zip(steps, stds, strict=True)])
    np.testing.assert_allclose(averages["rows"], walk["snapshots"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(tracked["rows"], walk["tracked"], rtol=0, atol=1e-9)
    coefficients = coefficients_of(walk)
    np.testing.assert_allclose(coefficients, walk["coefficients"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(coefficients.T @ averages["rows"], walk["reconstructed"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: exponent_from_std(0), "std must be above 0 and at most 0.2887, got 0"),
        (lambda: exponent_from_std([0.1, 0.3]), "got 0.3"),
        (lambda: exponent_from_std(float("nan")), "got nan"),
        (lambda: std_from_exponent(-1), "gamma must be above -1, got -1"),
        (lambda: power_function_decay(0, 0.1), "step must be 1 or more, got 0"),
        (lambda: power_function_decay(4, 0.1, 5), "delta must be above 0 and at most step, got 5"),
        (lambda: power_function_decay(4, 0.5), "std must be above 0"),
        (lambda: reconstruction_coefficients([5, 0], [0.1, 0.1], [5], [0.1]), "in_steps must be 1 or more, got 0"),
        (
            lambda: reconstruction_coefficients([5], [0.1], [5], [0.4]),
            "std must be above 0 and at most 0.2887, got 0.4",
        ),
        (lambda: reconstruction_coefficients([5, 5], [0.1, 0.1], [5], [0.1]), "same step and std"),
        (lambda: reconstruction_coefficients([1, 2, 3], [0.1, 0.2], [5], [0.1]), "lists of one length"),
        (lambda: reconstruction_coefficients([], [], [5], [0.1]), "lists of one length"),
    ],
)
def test_what_can_not_be_is_refused(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
