"""The layers between the matrix products as a CPU computes them fast; on a GPU nothing here is used.

Paddle's CPU kernels use all cores, and the vector units well, where both operands have the same shape. A broadcast
operand `(N, 1, D)`, the sum that is its gradient, a bias's gradient and that of a layer norm cost ten times as much
each: together more than the matrix products of a training step. Here the same formulas are written with operands of
one shape, repeated and summed by products with ones; and as `PyLayer`s, so that the backward pass keeps less. Softmax
and SwiGLU, which Paddle computes on one core, are oneDNN's.

Their backward pass is for a training step: one pass, first order, to all inputs that want a gradient. Paddle's
`PyLayer` ends a second pass through a kept graph in a crash, and a `paddle.grad` to some of the inputs in an error.
`ops` decides where they are used.

Shapes: N batch, T tokens, D hidden width.
"""

import functools
from timeit import timeit

import numpy as np
import paddle
from paddle.autograd import PyLayer
from paddle.nn import functional as F

from runtime.paddle_private import by_onednn


@functools.cache
def faster():
    """Returns whether products with ones beat broadcasts and sums on this machine.

    It is measured once in a process, in 20 ms. Where the products win, they win by a factor of 5 or more, which no
    noise hides. Where the matrix product is slow, they lose.
    """
    x, row = _filled((8, 64, 384), 0.5), _filled((8, 1, 384), 0.5)

    def products():
        _to_tokens(row, x.shape[1]).multiply_(x)
        _over_tokens(x)

    def broadcasts():
        paddle.multiply(x, row)
        x.sum(axis=1, keepdim=True)

    with paddle.no_grad():
        turns = [(timeit(products, number=3), timeit(broadcasts, number=3)) for _ in range(4)]
    return min(ours for ours, _ in turns) < min(others for _, others in turns)


def _on_cpu(array):
    return paddle.to_tensor(array, place=paddle.CPUPlace())  # whatever the current device is


@functools.lru_cache(maxsize=64)
def _filled(shape, value):
    return _on_cpu(np.full(shape, value, "float32"))


def _over_tokens(x):
    """Sums `(N, T, D)` over the tokens: `(N, 1, D)`."""
    return paddle.matmul(_filled((x.shape[0], 1, x.shape[1]), 1.0), x)


def _over_width(x, factor=1.0):
    """Sums `(..., D)` over the last axis, times a factor: `(..., 1)`."""
    return paddle.matmul(x, _filled((x.shape[-1], 1), factor))


def _row_means(x):
    """Returns the means of `(N, T, D)` over the last axis, `(N, T, 1)`."""
    return _over_width(x, 1.0 / x.shape[-1])


def _remember(ctx, *inputs):
    ctx.wanted = [x is not None and not x.stop_gradient for x in inputs]
    ctx.given = [x is not None for x in inputs]


def _wanted(ctx, *gradients):
    """Returns gradients of the inputs that `_remember` was given, None where none is wanted, as a `PyLayer` has to.

    An input of None has no place among them.
    """
    found = zip(gradients, ctx.wanted, ctx.given, strict=True)
    return tuple(gradient if wanted else None for gradient, wanted, given in found if given)


def _to_tokens(row, tokens):
    """Repeats `(N, 1, D)` for every token: `(N, T, D)`."""
    return paddle.matmul(_filled((row.shape[0], tokens, 1), 1.0), row)


def repeat_table(table, batch):
    """Repeats `(1, T, D)`, which wants no gradient, for every sample: `(N, T, D)`."""
    return _to_tokens(table.reshape([1, 1, -1]), batch).reshape([batch, *table.shape[1:]])


def _to_width(column, width):
    """Repeats `(..., 1)` over the width: `(..., D)`."""
    return paddle.matmul(column, _filled((1, width), 1.0))


def _modulated(x, shift, factor):
    tokens = x.shape[1]
    scaled = _to_tokens(factor, tokens).multiply_(x)
    return scaled if shift is None else scaled.add_(_to_tokens(shift, tokens))


class _AdaptiveNorm(PyLayer):
    @staticmethod
    def forward(ctx, x, shift, factor, epsilon, center):
        width = x.shape[-1]
        centered = x - _to_width(_row_means(x), width) if center else x
        inverse = paddle.rsqrt(_row_means(centered * centered) + epsilon)  # (N, T, 1)
        normal = _to_width(inverse, width).multiply_(centered)
        _remember(ctx, x, shift, factor)
        ctx.center = center
        ctx.save_for_backward(normal, inverse, factor)
        return _modulated(normal, shift, factor)

    @staticmethod
    def backward(ctx, gradient):
        normal, inverse, factor = ctx.saved_tensor()
        _, tokens, width = gradient.shape
        for_shift = _over_tokens(gradient) if ctx.wanted[1] else None
        for_factor = _over_tokens(gradient * normal)
        for_x = _to_tokens(factor, tokens).multiply_(gradient)
        along = _to_width(_row_means(for_x * normal), width).multiply_(normal)
        if ctx.center:
            along.add_(_to_width(_row_means(for_x), width))
        for_x.subtract_(along).multiply_(_to_width(inverse, width))
        return _wanted(ctx, for_x, for_shift, for_factor)


def adaptive_norm(x, shift, factor, *, epsilon, center):
    """Returns `normal(x) * factor + shift`: x `(N, T, D)`, shift (None: none) and factor `(N, 1, D)`.

    `normal` is the layer norm (`center`) or RMS norm without weights of its own.
    """
    if center and not paddle.is_grad_enabled():  # Paddle's kernel is fast, but does not tell the variance
        return _modulated(F.layer_norm(x, x.shape[-1:], epsilon=epsilon), shift, factor)
    return _AdaptiveNorm.apply(x, shift, factor, epsilon, center)


class _GatedAdd(PyLayer):
    @staticmethod
    def forward(ctx, x, gate, h):
        _remember(ctx, x, gate, h)
        ctx.save_for_backward(gate, h)
        return _to_tokens(gate, h.shape[1]).multiply_(h).add_(x)

    @staticmethod
    def backward(ctx, gradient):
        gate, h = ctx.saved_tensor()
        for_h = _to_tokens(gate, h.shape[1]).multiply_(gradient)
        # A copy: Paddle adds other gradients of x in place, and a hook may have kept this one.
        return _wanted(ctx, gradient.clone(), _over_tokens(gradient * h), for_h)


class _Softmax(PyLayer):
    @staticmethod
    def forward(ctx, x):
        y = by_onednn("softmax", x, axis=-1)
        ctx.save_for_backward(y.detach())  # y itself would hold its graph, and the graph y: no one would free them
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensor()
        for_x = gradient * y
        return for_x.subtract_(_to_width(_over_width(for_x), y.shape[-1]).multiply_(y))


class _Swiglu(PyLayer):
    @staticmethod
    def forward(ctx, gate, x):
        _remember(ctx, gate, x)
        ctx.save_for_backward(gate, x)
        return by_onednn("swish", gate, beta=1.0).multiply_(x)

    @staticmethod
    def backward(ctx, gradient):
        gate, x = ctx.saved_tensor()
        sigmoid = by_onednn("sigmoid", gate)
        silu = gate * sigmoid
        for_x = gradient * silu
        slope = silu.subtract_(silu * sigmoid).add_(sigmoid)  # of silu
        return _wanted(ctx, slope.multiply_(x).multiply_(gradient), for_x)


softmax = _Softmax.apply  # over the last axis
swiglu = _Swiglu.apply  # (gate, x) to silu(gate) * x
gated_add = _GatedAdd.apply  # (x, gate, h) to x + gate * h: x and h (N, T, D), gate (N, 1, D)


class _Linear(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias, gelu):
        _remember(ctx, x, weight, bias)
        ctx.gelu = gelu
        ctx.save_for_backward(x, weight)
        rows = F.gelu(x, approximate=True) if gelu else x
        out = paddle.addmm(bias, rows.reshape([-1, x.shape[-1]]), weight)
        return out.reshape([*x.shape[:-1], out.shape[-1]])

    @staticmethod
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensor()
        x = inputs
        if ctx.gelu:
            inputs = inputs.detach()
            inputs.stop_gradient = False
            with paddle.enable_grad():
                activated = F.gelu(inputs, approximate=True)
            x = activated.detach()
        rows = gradient.reshape([-1, gradient.shape[-1]])
        for_weight = paddle.matmul(x.reshape([-1, x.shape[-1]]), rows, transpose_x=True)
        for_bias = paddle.matmul(_filled((rows.shape[0],), 1.0), rows)
        for_x = paddle.matmul(gradient, weight, transpose_y=True) if ctx.wanted[0] else None
        if ctx.gelu:
            paddle.autograd.backward([activated], [for_x])
            for_x = inputs.grad
        return _wanted(ctx, for_x, for_weight, for_bias)


def linear(x, weight, bias, *, gelu=False):
    """Returns `ops.Operators.linear`; the backward pass computes the GELU again instead of keeping it."""
    return _Linear.apply(x, weight, bias, gelu)


@functools.lru_cache(maxsize=8)
def _quarter_turn(width):
    """Returns the matrix that takes every pair (a, b) of a row to (-b, a)."""
    return _on_cpu(np.kron(np.eye(width // 2, dtype="float32"), np.float32([[0, 1], [-1, 0]])))


class _Rotate(PyLayer):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        turned = paddle.matmul(x, _quarter_turn(x.shape[-1])).multiply_(sin.expand(x.shape))
        return turned.add_(x * cos.expand(x.shape))

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensor()
        shape = gradient.shape
        turned = paddle.matmul(gradient * sin.expand(shape), _quarter_turn(shape[-1]), transpose_y=True)
        return turned.add_(gradient * cos.expand(shape)), None, None


def rotate(x, cos, sin):
    """Returns `ops.Operators.rotate`."""
    shape = [*cos.shape[:-1], x.shape[-1]]
    return _Rotate.apply(x, *(paddle.stack([part, part], axis=-1).reshape(shape) for part in (cos, sin)))
