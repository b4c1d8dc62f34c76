"""Integrators of ordinary and stochastic differential equations, on times given in advance.

Each is a generator of the states at the times of `grid`, so that the caller keeps all of them or the last. Times are
numbers on the host: only the adaptive solver waits for the device, once a step, to choose the next. An ODE's state is a
tuple of tensors; `drift(t, state)` returns such a tuple. An SDE's state is one tensor.
"""

import functools
import math
from collections import namedtuple

import paddle

from .utils import full_precision

# Explicit Runge-Kutta: stage i is drift(t + c[i] h, x + h sum_j a[i][j] k_j), the step x + h sum_i b[i] k_i.
Tableau = namedtuple("Tableau", "c a b")

FIXED_STEP = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun2": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    # Kutta's 3/8 rule, which torchdiffeq calls rk4.
    "rk4": Tableau(
        (0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
    ),
}  # fmt: skip

# Dormand and Prince 1980: c[i] and a[i] of the stages after the first. The step is x of the last stage, at its end: its
# slope is the first one of the next step.
_DOPRI5 = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1, (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
# Step minus a fourth-order step: Shampine's 1986, as in torchdiffeq; 2/3 of Dormand and Prince's own.
_DOPRI5_ERROR = (
    35 / 384 - 1951 / 21600, 0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720, -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300, -1 / 60,
)  # fmt: skip
# Fourth-order solution at half the step (Shampine 1986).
_DOPRI5_MIDDLE = (
    6025192743 / 30085553152 / 2, 0, 51252292925 / 65400821598 / 2, -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2, -1776094331 / 19743644256 / 2, 11237099 / 235043384 / 2,
)  # fmt: skip
_ORDER, _SAFETY, _MAX_GROWTH, _MAX_SHRINK = 5, 0.9, 10.0, 0.2
_SMALLEST_STEP = 1e-10


@full_precision
def _advance(state, slopes, weights, h):
    """Returns `state + h sum_i weights[i] slopes[i]`, tensor by tensor."""
    out = []
    for i, x in enumerate(state):
        for slope, weight in zip(slopes, weights, strict=False):  # a tableau's row may end in stages not yet there
            if weight != 0:
                x = x + slope[i] * (weight * h)
        out.append(x)
    return tuple(out)


def fixed_step_ode(drift, state, grid, method, last_method=None):
    """Makes one step of a method of `FIXED_STEP` between consecutive times of `grid`; `last_method` makes the last."""
    steps = [method] * (len(grid) - 2) + [last_method or method]
    yield state
    for t, t_next, name in zip(grid[:-1], grid[1:], steps, strict=True):
        c, a, b = FIXED_STEP[name]
        h = t_next - t
        slopes = []
        for node, row in zip(c, a, strict=True):
            slopes.append(drift(t + node * h, _advance(state, slopes, row, h)))
        state = _advance(state, slopes, b, h)
        yield state


def adams_bashforth_ode(drift, state, grid):
    """Makes one step of order 2 between consecutive times of `grid`, by one evaluation: that before is used again.

    The slope over a step is the line through its start's and the last step's, whatever their lengths (Adams and
    Bashforth 1883); over the first step it is Euler's.
    """
    yield state
    slopes, h_last = [], math.inf
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        h = t_next - t
        slopes = [drift(t, state), *slopes[:1]]
        weight = h / h_last / 2
        state, h_last = _advance(state, slopes, (1 + weight, -weight), h), h
        yield state


@full_precision
def _norm(tensors, scales):
    """Returns the largest, over a state's tensors, root mean square of tensor / scale, a number; NaN if one is NaN."""
    means = [paddle.square(x / scale).mean() for x, scale in zip(tensors, scales, strict=True)]
    roots = paddle.stack(means).sqrt().tolist()
    return max(roots, key=lambda root: (math.isnan(root), root))  # a tensor's `max` passes over NaN in Paddle 2.6


@full_precision
def _scales(atol, rtol, *states):
    """Returns `atol + rtol max |x|` over the states, tensor by tensor."""
    largest = (functools.reduce(paddle.maximum, [x.abs() for x in tensors]) for tensors in zip(*states, strict=True))
    return [x * rtol + atol for x in largest]


def _first_step(drift, t, state, slope, direction, atol, rtol):
    """Returns a size of the first step that suits the tolerances: Hairer, Norsett and Wanner, Section II.4."""
    scales = _scales(atol, rtol, state)
    size, speed = _norm(state, scales), _norm(slope, scales)
    if not math.isfinite(speed):
        return 0.0  # which the caller refuses
    trial = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    ahead = drift(t + direction * trial, _advance(state, [slope], [direction], trial))
    curvature = _norm(_advance(ahead, [slope], [-1.0], 1.0), scales) / trial
    steepest = max(speed, curvature)
    step = (0.01 / steepest) ** (1 / _ORDER) if steepest > 1e-15 else max(1e-6, trial * 1e-3)
    return min(100 * trial, step)


@full_precision
def _interpolate(start, end, middle, slope_start, slope_end, h, s):
    """Returns the quartic through both ends (values and slopes) and the middle of a step of length h, at fraction s."""
    # In powers of s, of which each datum's polynomial is 1 (or slope 1) at its own place and 0 at the others.
    weights = (
        ((-8 * s + 18) * s - 11) * s**2 + 1,
        ((-8 * s + 14) * s - 5) * s**2,
        16 * s**2 * (1 - s) ** 2,
        (((-2 * s + 5) * s - 4) * s + 1) * s * h,
        ((2 * s - 3) * s + 1) * s**2 * h,
    )
    data = (start, end, middle, slope_start, slope_end)
    return tuple(
        sum(part * weight for part, weight in zip(parts, weights, strict=True)) for parts in zip(*data, strict=True)
    )


def dopri5(drift, state, grid, atol, rtol):
    """Integrates by Dormand and Prince's adaptive method of order 5, with torchdiffeq's error norm and step control.

    The error of a step is the root mean square, over the whole batch, of error / (atol + rtol max(|x|, |x_next|)); of a
    state of several tensors, the largest of theirs. A step is accepted if that is at most 1; if none is small
    enough, that is a `ValueError`. Times of `grid` inside a step are interpolated. Unlike torchdiffeq's, the last step
    ends at the end of the grid: no network is asked about times beyond it.
    """
    t, end = grid[0], grid[-1]
    direction = 1.0 if end > t else -1.0
    slope = drift(t, state)
    step = _first_step(drift, t, state, slope, direction, atol, rtol)
    yield state
    rest = list(grid[1:])
    while rest:
        if not step > _SMALLEST_STEP:
            raise ValueError(
                f"dopri5: the step shrank to {step:.1g} at t={t:.6g}: the model's output is not finite there, or"
                f" atol={atol:g} and rtol={rtol:g} are too small for float32"
            )
        last = step >= abs(end - t)
        t_next = end if last else t + direction * step
        h = t_next - t
        slopes, new = [slope], state
        for node, row in _DOPRI5:
            new = _advance(state, slopes, row, h)
            slopes.append(drift(t_next if node == 1 else t + node * h, new))
        zero = tuple(paddle.zeros_like(x) for x in state)
        error = _norm(_advance(zero, slopes, _DOPRI5_ERROR, h), _scales(atol, rtol, state, new))
        if error <= 1:
            middle = None
            while rest and (last or direction * (rest[0] - t_next) <= 0):
                asked = rest.pop(0)
                if asked == t_next:
                    yield new
                else:
                    middle = middle or _advance(state, slopes, _DOPRI5_MIDDLE, h)
                    yield _interpolate(state, new, middle, slopes[0], slopes[-1], h, (asked - t) / h)
            t, state, slope = t_next, new, slopes[-1]
        step = abs(h) * _step_factor(error)


def _step_factor(error):
    """Returns by how much the next step is longer, from the error of this one (1 is the largest accepted)."""
    if error == 0:
        return _MAX_GROWTH
    factor = _SAFETY * error ** (-1 / _ORDER) if not math.isnan(error) else 0.0
    return min(_MAX_GROWTH, max(factor, 1.0 if error < 1 else _MAX_SHRINK))


@full_precision
def _add_noise(x, diffusion, noise, dt):
    return x + noise * (paddle.sqrt(2 * diffusion) * dt**0.5)


def _draw_noise(x):
    return paddle.randn(x.shape).astype(x.dtype)


def euler_maruyama(drift, diffusion, x, grid, draw_noise=None):
    """Integrates by Euler-Maruyama `dx = drift dt + sqrt(2 diffusion) dW`, one draw of noise a step.

    `drift(t, x)` has x's shape, `diffusion(t, x)` broadcasts against it; the steps are equally long. `draw_noise(x)`
    returns standard normal noise as x; None draws it by `paddle.randn`.
    """
    draw_noise = draw_noise or _draw_noise
    dt = grid[1] - grid[0]
    yield x
    for t in grid[:-1]:
        noise = draw_noise(x)
        (mean,) = _advance((x,), [(drift(t, x),)], [1], dt)
        x = _add_noise(mean, diffusion(t, x), noise, dt)
        yield x


def heun_sde(drift, diffusion, x, grid, correct_last=True, draw_noise=None):
    """Integrates by Heun's method with the noise added first (Karras et al. 2022); arguments as of `euler_maruyama`.

    `correct_last`: whether the last step is corrected by the drift at the end of the grid, which may be infinite.
    """
    draw_noise = draw_noise or _draw_noise
    dt = grid[1] - grid[0]
    yield x
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        x = _add_noise(x, diffusion(t, x), draw_noise(x), dt)
        slopes = [(drift(t, x),)]
        (ahead,) = _advance((x,), slopes, [1], dt)
        if i < len(grid) - 2 or correct_last:
            slopes.append((drift(t_next, ahead),))
            (ahead,) = _advance((x,), slopes, [0.5, 0.5], dt)
        x = ahead
        yield x
