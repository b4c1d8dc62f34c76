"""Precision, shapes and checks shared by paths, losses and samplers."""

import functools
import numbers
import threading

import paddle

_shield = threading.local()


def at_least_float32(x):
    """Returns `x`, a tensor of half precision as float32: coefficients span more than half precision can hold."""
    return x.astype("float32") if isinstance(x, paddle.Tensor) and x.dtype in (paddle.float16, paddle.bfloat16) else x


def full_precision(function):
    """Decorates arithmetic: its tensors are given to it `at_least_float32`, and not autocast. It calls no network."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        args = map(at_least_float32, args)
        kwargs = {name: at_least_float32(value) for name, value in kwargs.items()}
        if getattr(_shield, "up", False):  # called by another such function: a region costs as much as ten operations
            return function(*args, **kwargs)
        _shield.up = True
        try:
            with paddle.amp.auto_cast(enable=False):
                return function(*args, **kwargs)
        finally:
            _shield.up = False

    return wrapper


def mean_flat(x):
    """Returns the mean over all dimensions but the first: `(N, ...)` -> `(N,)`."""
    return x.mean(axis=list(range(1, x.ndim))) if x.ndim > 1 else x


def sum_flat(x):
    """Returns the sum over all dimensions but the first: `(N, ...)` -> `(N,)`."""
    return x.sum(axis=list(range(1, x.ndim))) if x.ndim > 1 else x


def expand_t_like_x(t, x):
    """Returns times `(N,)` as `(N, 1, ..., 1)` in `x`'s precision, to broadcast against `x` `(N, ...)`.

    Coefficients made of it are used as right-hand operands: the other way round, Paddle takes ten times as long on CPU.
    """
    return t.astype(x.dtype).reshape([-1] + [1] * (x.ndim - 1))


def shift_time(t, shift):
    """Returns `shift t / (1 + (shift - 1) t)`: times in [0, 1], nearer to 0 (noise) where `shift` is below 1.

    0 and 1 stay; a `shift` of 1 returns t itself. It is the shift of the noise level of Stable Diffusion 3 and FLUX by
    1 / `shift`: theirs is 1 - t.
    """
    if shift == 1:
        return t
    moved = shift * t
    return moved / (moved + (1 - t))  # so 1 stays exactly 1


def check_choice(name, value, accepted):
    """Raises ValueError unless `value` is among `accepted`."""
    if not any(type(value) is type(choice) and value == choice for choice in accepted):
        known = ", ".join(repr(choice) for choice in accepted)
        raise ValueError(f"unknown {name} {value!r}; accepted: {known}")


def check_number(name, value, expected, accept):
    """Raises ValueError unless `value` is a number for which `accept(value)` holds; `expected` says it in words."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not accept(value):
        raise ValueError(f"{name}={value!r}: expected {expected}")
