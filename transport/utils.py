"""Precision, shapes and checks shared by paths, losses and samplers."""

import functools
import numbers
import threading

import paddle

_shield = threading.local()


def full_precision(function):
    """Decorates a function whose own operations are not to be autocast. It must not call the network."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if getattr(_shield, "up", False):  # called by another such function: a region costs as much as ten operations
            return function(*args, **kwargs)
        _shield.up = True
        try:
            with paddle.amp.auto_cast(enable=False):
                return function(*args, **kwargs)
        finally:
            _shield.up = False

    return wrapper


def at_least_float32(x):
    """Returns `x`, as float32 if it is float16 or bfloat16: coefficients span more than half precision can hold."""
    return x.astype("float32") if x.dtype in (paddle.float16, paddle.bfloat16) else x


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


def check_choice(name, value, accepted):
    """Raises ValueError unless `value` is among `accepted`."""
    if not any(type(value) is type(choice) and value == choice for choice in accepted):
        known = ", ".join(repr(choice) for choice in accepted)
        raise ValueError(f"unknown {name} {value!r}; accepted: {known}")


def check_number(name, value, expected, accept):
    """Raises ValueError unless `value` is a number for which `accept(value)` holds; `expected` says it in words."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not accept(value):
        raise ValueError(f"{name}={value!r}: expected {expected}")
