"""Precision; Gaussian likelihoods and KL terms of the bound (Ho et al. 2020, Nichol and Dhariwal 2021)."""

import functools
import math
import weakref

import paddle


def at_least_float32(x):
    """Returns `x`, a tensor of half precision as float32: schedules span more than half precision can hold."""
    return x.astype("float32") if isinstance(x, paddle.Tensor) and x.dtype in (paddle.float16, paddle.bfloat16) else x


def full_precision(function):
    """Decorates arithmetic: its tensors are given to it `at_least_float32`, and not autocast. It calls no network."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        args = map(at_least_float32, args)
        kwargs = {name: at_least_float32(value) for name, value in kwargs.items()}
        with paddle.amp.auto_cast(enable=False):
            return function(*args, **kwargs)

    return wrapper


_host_values = {}  # by the id of a tensor of timesteps that is alive; Paddle 2.6 gives tensors no attributes


def with_host_value(timesteps, value):
    """Returns timesteps `(N,)`, all of them `value`, for which `host_value` knows it."""
    _host_values[id(timesteps)] = value
    weakref.finalize(timesteps, _host_values.pop, id(timesteps), None)
    return timesteps


def host_value(timesteps):
    """Returns the one timestep that a tensor `(N,)` holds which a sampler has given to a model; None of another tensor.

    For a model that decides by the timestep and must not wait for the device.
    """
    return _host_values.get(id(timesteps))


def normal_like(x):
    """Returns standard normal noise of a tensor's shape and type."""
    return paddle.randn(x.shape, dtype=x.dtype)


def mean_flat(tensor):
    """Returns the mean over all dimensions but the first: `(N, ...)` -> `(N,)`."""
    return tensor.mean(axis=list(range(1, tensor.ndim))) if tensor.ndim > 1 else tensor


def normal_kl(mean1, logvar1, mean2, logvar2):
    """Returns KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise, in nats.

    The arguments are tensors or numbers that broadcast together; at least one is a tensor.
    """
    arguments = (mean1, logvar1, mean2, logvar2)
    tensor = next((v for v in arguments if isinstance(v, paddle.Tensor)), None)
    if tensor is None:
        raise ValueError("normal_kl needs at least one tensor among its arguments, got numbers only")
    mean1, logvar1, mean2, logvar2 = (
        v if isinstance(v, paddle.Tensor) else paddle.full([1] * tensor.ndim, v, dtype=tensor.dtype) for v in arguments
    )
    distance = paddle.square(mean1 - mean2) * paddle.exp(-logvar2)
    return 0.5 * (logvar2 - 1.0 - logvar1 + paddle.exp(-(logvar2 - logvar1)) + distance)


def approx_standard_normal_cdf(x):
    """Returns the cumulative distribution of N(0, 1) at x, by the tanh approximation of Page (1977)."""
    return 0.5 * (1.0 + paddle.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def discretized_gaussian_log_likelihood(x, *, means, log_scales):
    """Returns the log likelihood, in nats, of 8-bit images under a Gaussian integrated over each grey level's bin.

    Args:
        x: targets, uint8 levels rescaled to [-1, 1]. The first and the last bin reach to -inf and +inf.
        means, log_scales: of the Gaussian, logarithms of the standard deviations; shape of `x`, as the result.
    """
    centered = x - means
    inv_std = paddle.exp(-log_scales)
    half_bin = paddle.full_like(x, 1.0 / 255.0)  # a bare number is rounded to float32 by Paddle 2.6
    cdf_upper = approx_standard_normal_cdf(inv_std * (centered + half_bin))
    cdf_lower = approx_standard_normal_cdf(inv_std * (centered - half_bin))

    inside = cdf_upper - cdf_lower
    probability = paddle.where(x < -0.999, cdf_upper, paddle.where(x > 0.999, 1.0 - cdf_lower, inside))
    return paddle.log(paddle.clip(probability, min=1e-12))
