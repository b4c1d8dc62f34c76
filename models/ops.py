"""The operators between the matrix products, behind one door: here alone is chosen how they are computed.

Networks call them through `self.ops` and read as their papers. There are two forms, equal up to rounding: Paddle's own
operators, which give any gradient, and those of `cpu_ops` in float32 on a CPU, where they are faster. The latter are
for a graph that serves one backward pass; so where a graph is recorded they need the promise `single_backward` of
whoever built the network. Shapes: N batch, T tokens, D hidden width.
"""

from dataclasses import dataclass

import paddle
from paddle import nn
from paddle.nn import functional as F

from runtime import paddle_private

from . import cpu_ops


def modulate(x, shift, scale):
    """Returns `x * (1 + scale) + shift`: x `(N, T, D)`, shift and scale `(N, D)` or `(N, 1, D)`; shift None: none."""
    if shift is None:
        return x * (1 + (scale.unsqueeze(1) if scale.ndim == 2 else scale))
    if shift.ndim == 2:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    return x * (1 + scale) + shift


def normalize_rms(x, weight, epsilon):
    """Returns `x / sqrt(mean(x ** 2) + epsilon) * weight` over the last axis, of x's type; in float32 in any case."""
    with paddle.amp.auto_cast(enable=False):
        h = x.astype("float32")
        h = h * paddle.rsqrt(h.square().mean(-1, keepdim=True) + epsilon)
        return (h * weight.astype("float32")).astype(x.dtype)


@dataclass(frozen=True)
class Operators:
    """The operators of a network."""

    single_backward: bool = False  # the promise of whoever built it, see `LatentTransformer`
    keep_gelu: bool = False  # for the backward pass, instead of computing it again there: blocks are recomputed anyway

    def fast(self, *tensors):
        """Returns whether to compute with `cpu_ops`; tensors: all operands, None for one that is not there."""
        tensors = [tensor for tensor in tensors if tensor is not None]
        return (
            (self.single_backward or not paddle.is_grad_enabled())
            and paddle.in_dynamic_mode()
            and paddle.get_device() == "cpu"  # where Paddle calls oneDNN
            and all(tensor.dtype == paddle.float32 and tensor.place.is_cpu_place() for tensor in tensors)
            and cpu_ops.faster()
        )

    def adaptive_norm(self, x, shift, scale, *, epsilon=1e-6):
        """Returns the modulated layer norm, without weights, of x `(N, T, D)`; shift (or None), scale: `(N, 1, D)`."""
        if self.fast(x, shift, scale):
            return cpu_ops.adaptive_norm(x, shift, 1 + scale, epsilon=epsilon, center=True)
        return modulate(F.layer_norm(x, x.shape[-1:], epsilon=epsilon), shift, scale)

    def adaptive_rms_norm(self, x, weight, shift, scale, *, epsilon):
        """Returns the modulated RMS norm of x `(N, T, D)`; weight: `(D,)`; shift (or None), scale: `(N, 1, D)`."""
        if self.fast(x, shift, scale, weight):
            return cpu_ops.adaptive_norm(x, shift, (1 + scale) * weight, epsilon=epsilon, center=False)
        return modulate(normalize_rms(x, weight, epsilon), shift, scale)

    def rms_norm(self, x, weight, *, epsilon):
        """Returns the RMS norm of x over its last axis; weight: of that width."""
        if not self.fast(x, weight):
            return normalize_rms(x, weight, epsilon)
        rows, factor = x.reshape([1, -1, x.shape[-1]]), weight.reshape([1, 1, -1])
        return cpu_ops.adaptive_norm(rows, None, factor, epsilon=epsilon, center=False).reshape(x.shape)

    def add_table(self, x, table):
        """Returns `x + table`: x `(N, T, D)`, table `(1, T, D)`."""
        if table.stop_gradient and self.fast(x, table):
            table = cpu_ops.repeat_table(table, x.shape[0])
        return x + table

    def softmax(self, x):
        """Returns the softmax of x over its last axis."""
        return cpu_ops.softmax(x) if self.fast(x) else F.softmax(x, axis=-1)

    def swiglu(self, gate, x):
        """Returns `silu(gate) * x`, of one shape."""
        return cpu_ops.swiglu(gate, x) if self.fast(gate, x) else paddle_private.swiglu(gate, x)

    def gated_add(self, x, gate, h):
        """Returns `x + gate * h`: x and h `(N, T, D)`, gate `(N, 1, D)`."""
        return cpu_ops.gated_add(x, gate, h) if self.fast(x, gate, h) else x + gate * h

    def linear(self, x, weight, bias, *, gelu=False):
        """Returns `x @ weight + bias`, of `gelu(x)` with `gelu`: x `(..., K)`, weight `(K, M)`, bias None or `(M,)`."""
        fast = bias is not None and self.fast(x, weight)
        # `gelu` stays as it is: `paddle.jit.to_static` gets a flag that a branch changes wrong.
        if gelu and fast and not self.keep_gelu:
            return cpu_ops.linear(x, weight, bias, gelu=True)
        if gelu:
            x = F.gelu(x, approximate=True)
        return cpu_ops.linear(x, weight, bias) if fast else F.linear(x, weight, bias)

    def layer_norm(self, x, weight, bias, *, epsilon):
        """Returns the layer norm of x over its last axis; weight and bias: of that width."""
        # Where nobody asks for the weight's gradient, Paddle's CPU kernel leaves the weight out of the input's. Whether
        # somebody will is known for a promised backward pass alone.
        promised = self.single_backward and not weight.stop_gradient
        eager = paddle.in_dynamic_mode()  # while a program is traced, x has no place, and nobody asks for gradients
        if eager and paddle.is_grad_enabled() and x.place.is_cpu_place() and not promised:
            return F.layer_norm(x, x.shape[-1:], epsilon=epsilon) * weight + bias
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    def rotate(self, x, cos, sin):
        """Turns the pairs (0, 1), (2, 3), ... of x `(N, T, heads, head_dim)` by RoPE's angles, in float32 in any case.

        The result is of x's type; cos, sin: float32 `(T, 1, head_dim / 2)`.
        """
        if self.fast(x):
            return cpu_ops.rotate(x, cos, sin)
        with paddle.amp.auto_cast(enable=False):
            first, second = x.astype("float32").reshape([*x.shape[:-1], -1, 2]).unbind(-1)
            turned = paddle.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
            return turned.reshape(x.shape).astype(x.dtype)


class Layer(nn.Layer):
    """A layer that computes with `self.ops`: plain ones, until `use` gives it its network's."""

    ops = Operators()


def use(network, operators):
    """Gives a network and all its layers the same `Operators`."""
    for layer in network.sublayers(include_self=True):
        if isinstance(layer, Layer):
            layer.ops = operators
