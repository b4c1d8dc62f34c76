"""Multi-head self-attention, and the one place that chooses between the plain and the fused computation."""

import contextlib

import paddle
from paddle import nn
from paddle.nn import functional as F

from runtime.paddle_private import fused_attention_fits

from . import ops
from .norms import head_norm
from .parallel import column_linear, linear, row_linear


def scaled_dot_product(q, k, v, softmax, *, fused):
    """Returns the attention softmax(q k^T / sqrt(d)) v of q, k, v `(N, T, heads, head_dim)`; no mask, no dropout.

    `fused` calls Paddle's `scaled_dot_product_attention`, which takes FlashAttention-2 (half precision on Ampere or
    newer), the memory-efficient kernel (any GPU type) or the plain formula, as device, dtype and head_dim allow; with
    Paddle 2.6 it is FlashAttention or the plain formula. `softmax(x)` over the last axis is the plain formula's.
    Same numbers up to rounding.
    """
    if fused and fused_attention_fits(q):
        return F.scaled_dot_product_attention(q, k, v)
    return _by_heads(*(z.transpose([0, 2, 1, 3]) for z in (q, k, v)), softmax)


def _by_heads(q, k, v, softmax):
    """Returns the attention `(N, T, heads, head_dim)` of q, k, v `(N, heads, T, head_dim)`, by the plain formula."""
    weights = softmax(paddle.matmul(q * q.shape[-1] ** -0.5, k, transpose_y=True))  # (N, heads, T, T)
    return paddle.matmul(weights, v).transpose([0, 2, 1, 3])


class _HeadsLayer(ops.Layer):
    """What both forms of attention share; with `qk_norm` a subclass has the norms `q_norm` and `k_norm`."""

    def prepared(self, q, k, *rotary):
        """Returns queries and keys `(N, T, heads, head_dim)`, normed and turned by RoPE's tables, where that is on."""
        kind = q.dtype
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary:
            q, k = self.ops.rotate(q, *rotary), self.ops.rotate(k, *rotary)
        if self.qk_norm:  # the layer norms of AMP give float32
            q, k = q.astype(kind), k.astype(kind)
        return q, k


class Attention(_HeadsLayer):
    """Self-attention over tokens `(N, T, D)` with one projection for q, k and v, biases throughout (timm's)."""

    def __init__(self, hidden_size, num_heads, *, qk_norm=False, rms_norm=False, fused=False, group=None):
        super().__init__()
        if hidden_size % num_heads != 0:
            raise ValueError(f"the hidden width {hidden_size} is not divisible by {num_heads} attention heads")
        self.head_dim = hidden_size // num_heads
        self.fused = fused
        self.qkv = column_linear(hidden_size, 3 * hidden_size, segments=3, group=group)
        if qk_norm:  # every rank has the weights, for its own heads
            self.q_norm, self.k_norm = (head_norm(self.head_dim, rms_norm, group) for _ in range(2))
        self.qk_norm = qk_norm
        self.proj = row_linear(hidden_size, hidden_size, group=group)

    def forward(self, x, *rotary):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x)  # (N, T, 3 D), with tensor parallelism of this rank's heads
        heads = qkv.reshape([batch, tokens, qkv.shape[-1] // self.head_dim, self.head_dim])  # (N, T, 3 heads, head_dim)
        if self.fused or self.qk_norm or rotary:
            q, k, v = heads.split(3, axis=2)
            q, k = self.prepared(q, k, *rotary)
            out = scaled_dot_product(q, k, v, self.ops.softmax, fused=self.fused)
        else:  # q, k and v change their order of axes together
            out = _by_heads(*heads.transpose([0, 2, 1, 3]).split(3, axis=1), self.ops.softmax)
        return self.proj(out.flatten(2))


class SeparateAttention(_HeadsLayer):
    """A whole `Attention` with a projection each for q, k and v: the same numbers up to rounding, for programs.

    oneDNN then reads the heads in place. The parts of a joint projection it copies, and transposes.
    """

    def __init__(self, attention):
        super().__init__()
        self.head_dim, self.fused, self.proj = attention.head_dim, attention.fused, attention.proj
        self.qk_norm = attention.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        joint = attention.qkv
        width = joint.weight.shape[0]
        self.projections = nn.LayerList(linear(width, width) for _ in range(3))
        parts = zip(joint.weight.split(3, axis=1), joint.bias.split(3), strict=True)
        for layer, (weight, bias) in zip(self.projections, parts, strict=True):
            layer.weight.set_value(weight)
            layer.bias.set_value(bias)

    def forward(self, x, *rotary):
        _, tokens, width = x.shape
        heads = [0, tokens, width // self.head_dim, self.head_dim]  # 0: as it is; else an operator asks for the size
        q, k, v = (layer(x).reshape(heads) for layer in self.projections)
        q, k = self.prepared(q, k, *rotary)
        return self.proj(scaled_dot_product(q, k, v, F.softmax, fused=self.fused).reshape([0, tokens, width]))


@contextlib.contextmanager
def separate_projections(network):
    """Lets the blocks of a whole network compute by `SeparateAttention` within the block."""
    blocks = [block for block in getattr(network, "blocks", ()) if isinstance(getattr(block, "attn", None), Attention)]
    kept = [(block, block.attn) for block in blocks]
    try:
        for block, attention in kept:
            block.attn = SeparateAttention(attention)
        yield
    finally:
        for block, attention in kept:
            block.attn = attention
