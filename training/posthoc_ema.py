"""Post-hoc EMA: averages of any width, computed after the training from snapshots of a few (float64, numpy alone).

A power-function average of exponent g weighs the parameters of the past time tau in proportion to tau^g, up to the
present step. Its width is the standard deviation of that profile relative to the step. The snapshots of two widths span
others, before the last step too: reconstruct a profile as the sum of snapshots by `reconstruction_coefficients`.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
section 3 and appendix C. Steps may be optimizer steps or images, as long as they are the same everywhere.
"""

import numpy as np

from config.checks import MAX_STD


def profile_name(std):
    """Returns the name of a profile in a run's files, such as `std_0.05`."""
    return f"std_{std:g}"


def std_from_exponent(gamma):
    """Returns the relative standard deviations of power-function profiles of the exponents `gamma`, in float64."""
    gamma = _numbers("gamma", gamma, lambda values: values > -1, "above -1")
    return np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def exponent_from_std(std):
    """Returns the exponents of power-function profiles of the relative standard deviations `std`, in float64.

    An exponent is the largest real root of g^3 + 7 g^2 + (16 - std^-2) g + 12 - std^-2.
    """
    std = _numbers("std", std, lambda values: (values > 0) & (values <= MAX_STD), f"above 0 and at most {MAX_STD}")
    c, root = std**-2.0, 1 / std  # where the polynomial is positive, and convex from the root on
    for _ in range(100):  # Newton's method comes down to the root
        value = ((root + 7) * root + 16 - c) * root + 12 - c
        lower = root - value / ((3 * root + 14) * root + 16 - c)
        if np.all(lower >= root):
            break
        root = np.minimum(root, lower)
    return root


def power_function_decay(step, std, delta=1):
    """Returns the decay of the update that ends at `step`, `delta` steps after the last one, of a profile of `std`.

    The average becomes decay * average + (1 - decay) * parameters. It is 0 at step = delta: the first parameters are
    taken over. Arguments broadcast; the result is float64.
    """
    step, delta = _steps("step", step), np.asarray(delta, "float64")
    if not np.all((delta > 0) & (delta <= step)):
        raise ValueError(
            f"delta must be above 0 and at most step, got {_first(delta, ~((delta > 0) & (delta <= step)))}"
        )
    with np.errstate(divide="ignore"):  # log 0
        return np.exp((exponent_from_std(std) + 1) * np.log1p(-delta / step))


def reconstruction_coefficients(in_steps, in_stds, out_steps, out_stds):
    """Returns coefficients (n_in, n_out), float64: column j times the snapshots comes nearest to the wanted profile j.

    They are those of the least squared distance between profiles, divided by their sum.

    Args:
        in_steps, in_stds: (n_in,), step and width of each snapshot; they broadcast.
        out_steps, out_stds: (n_out,), the same of the wanted averages, at any step.

    Raises:
        ValueError: in one line, what is no step or width, and two snapshots of one step and width.
    """
    in_steps, in_stds = _pairs("in_steps", in_steps, "in_stds", in_stds)
    out_steps, out_stds = _pairs("out_steps", out_steps, "out_stds", out_stds)
    if len({*zip(in_steps, in_stds, strict=True)}) < len(in_steps):
        raise ValueError("two snapshots have the same step and std; give each once")
    in_profiles, out_profiles = (
        (_steps(name, steps), exponent_from_std(stds))
        for name, steps, stds in (("in_steps", in_steps, in_stds), ("out_steps", out_steps, out_stds))
    )
    among = inner_products(in_profiles, in_profiles)  # (n_in, n_in)
    wanted = inner_products(in_profiles, out_profiles)  # (n_in, n_out)
    try:
        coefficients = np.linalg.solve(among, wanted)
    except np.linalg.LinAlgError:
        raise ValueError("the snapshots are too much alike to be told apart; leave some out") from None
    return coefficients / coefficients.sum(axis=0)


def inner_products(a, b):
    """Returns the integrals of products of profiles, `(steps (n,), exponents (n,))` each, as (n_a, n_b)."""
    (step_a, gamma_a), (step_b, gamma_b) = ([part[:, None] for part in a], [part[None, :] for part in b])
    earlier, later = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    overlap = (earlier / later) ** np.where(step_a < step_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * overlap / ((gamma_a + gamma_b + 1) * later)


def _pairs(steps_name, steps, stds_name, stds):
    steps, stds = np.atleast_1d(np.asarray(steps)), np.atleast_1d(np.asarray(stds))
    if steps.ndim > 1 or stds.ndim > 1 or steps.size == 0 or len({1, steps.size, stds.size}) > 2:
        shapes = f"{steps.shape} and {stds.shape}"
        raise ValueError(f"{steps_name} and {stds_name} must be lists of one length, got shapes {shapes}")
    return np.broadcast_arrays(steps, stds)


def _steps(name, steps):
    return _numbers(name, steps, lambda values: values >= 1, "1 or more")


def _numbers(name, values, accepts, expected):
    """Returns values as float64; ValueError unless `accepts` is True of each, and they are finite."""
    values = np.asarray(values, "float64")
    if not np.all(right := np.isfinite(values) & accepts(values)):
        raise ValueError(f"{name} must be {expected}, got {_first(values, ~right)}")
    return values


def _first(values, wrong):
    values, wrong = np.broadcast_arrays(values, wrong)
    return f"{values[wrong].ravel()[0]:g}"
