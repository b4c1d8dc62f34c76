"""Numbers of fewer bits, emulated in float32: what TF32, bfloat16 or float16 do to a result, on any device.

Paddle's CPU has no half-precision kernels for these networks. So their operators are replaced by such as round:

- `tf32`: the factors of matrix products and convolutions, forward and backward, as the tensor cores of a GPU do;
- `bfloat16`, `float16`: these, the results, and the results of the operators between them. It is a little worse than
  AMP, which leaves some of those in float32.

Rounded are the bits of the mantissa. The range stays that of float32: overflows of float16 are not seen.
"""

import contextlib

import paddle
from paddle.autograd import PyLayer
from paddle.nn import functional as F

from models import cpu_ops, ops
from models.embeddings import PatchEmbed
from runtime import paddle_private
from runtime.patching import replaced

BITS = {"tf32": 10, "float16": 10, "bfloat16": 7}  # of the mantissa, besides the leading one


def round_mantissa(x, bits):
    """Returns a float32 tensor rounded to the nearest numbers with so many bits of mantissa (Dekker's splitting)."""
    shifted = x * (2.0 ** (23 - bits) + 1.0)
    return shifted - (shifted - x)


class _Rounded(PyLayer):
    """Rounds x to `bits` of mantissa, and its gradient to `gradient_bits`; None leaves it as it is."""

    @staticmethod
    def forward(ctx, x, bits, gradient_bits):
        ctx.bits = gradient_bits
        return x.clone() if bits is None else round_mantissa(x, bits)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone() if ctx.bits is None else round_mantissa(gradient, ctx.bits)


def _rounded(x, bits, gradient_bits):
    """Rounds a floating tensor; anything else is returned as it is."""
    floating = isinstance(x, paddle.Tensor) and x.dtype == paddle.float32
    return _Rounded.apply(x, bits, gradient_bits) if floating else x


@contextlib.contextmanager
def emulated(kind):
    """Lets the networks compute in `tf32`, `bfloat16` or `float16` (`BITS`) as long as the block runs."""
    bits, is_half = BITS[kind], kind != "tf32"
    outer = bits if is_half else None

    def product(function):
        """Factors and result of a product; the gradient of its result is a factor of the backward pass."""

        def call(*args, **options):
            args = [_rounded(arg, bits, outer) for arg in args]
            return _rounded(function(*args, **options), outer, bits)

        return call

    def between(function):
        def call(*args, **options):
            return _rounded(function(*args, **options), bits, bits)

        return call if is_half else function

    def embed(self, x):
        x = convolve(x, self.proj.weight, self.proj.bias, stride=self.patch_size)
        return x.flatten(2).transpose([0, 2, 1])

    convolve, operators = product(F.conv2d), ops.Operators
    methods = ("adaptive_norm", "adaptive_rms_norm", "gated_add", "layer_norm", "rms_norm", "rotate")
    with contextlib.ExitStack() as stack:
        for module, functions in (
            (F, {"linear": product(F.linear)}),
            (paddle, {"matmul": product(paddle.matmul)}),
            (PatchEmbed, {"forward": embed}),
            (cpu_ops, {"faster": lambda: False}),
            (F, {name: between(getattr(F, name)) for name in ("gelu", "silu", "softmax")}),
            (paddle_private, {"swiglu": between(paddle_private.swiglu)}),
            (operators, {name: between(getattr(operators, name)) for name in methods}),
        ):
            stack.enter_context(replaced(module, **functions))
        yield
