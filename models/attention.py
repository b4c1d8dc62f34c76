"""Multi-head self-attention, and the one place that chooses between the plain and the fused computation."""

import paddle
from paddle import nn
from paddle.nn import functional as F


def attention_backend(*, fused, device, dtype, compute_capability=None):
    """Chooses how softmax(q k^T / sqrt(d)) v is computed.

    Args:
        fused: the config's `fused_attention`.
        device: `cpu`, `gpu`, ... as the beginning of `paddle.get_device()`.
        dtype: `float32`, `float16` or `bfloat16`, the type of q, k and v.
        compute_capability: `(major, minor)` of the GPU, None elsewhere.

    Returns:
        `flash` (`scaled_dot_product_attention`, on a GPU FlashAttention-2: half precision, Ampere or newer),
        `memory_efficient` (CUTLASS, any GPU dtype) or `plain`. All give the same numbers up to rounding.
    """
    if not fused:
        return "plain"
    if device.startswith("cpu"):
        return "flash"  # the same entry point; Paddle computes it by its mathematical definition
    if device.startswith("gpu"):
        if dtype in ("float16", "bfloat16") and compute_capability is not None and compute_capability >= (8, 0):
            return "flash"
        return "memory_efficient"
    return "flash" if dtype in ("float16", "bfloat16") else "plain"


_capability_cache = {}


def _compute_capability(device):
    if not device.startswith("gpu"):
        return None
    if device not in _capability_cache:
        _capability_cache[device] = tuple(paddle.device.cuda.get_device_capability())
    return _capability_cache[device]


def scaled_dot_product(q, k, v, *, fused):
    """Attention of q, k, v `(N, T, heads, head_dim)`; returns the same shape. No mask, no dropout."""
    device = paddle.get_device()
    dtype = str(q.dtype).rsplit(".", 1)[-1]
    backend = attention_backend(fused=fused, device=device, dtype=dtype, compute_capability=_compute_capability(device))
    if backend == "flash":
        return F.scaled_dot_product_attention(q, k, v)
    if backend == "memory_efficient":
        from paddle.incubate.nn.memory_efficient_attention import memory_efficient_attention

        return memory_efficient_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    q, k, v = (z.transpose([0, 2, 1, 3]) for z in (q, k, v))  # (N, heads, T, head_dim)
    weights = F.softmax(paddle.matmul(q * q.shape[-1] ** -0.5, k, transpose_y=True), axis=-1)  # (N, heads, T, T)
    return paddle.matmul(weights, v).transpose([0, 2, 1, 3])


class Attention(nn.Layer):
    """Self-attention over tokens `(N, T, D)` with one projection for q, k and v, biases throughout (timm's)."""

    def __init__(self, hidden_size, num_heads, fused=False):
        super().__init__()
        if hidden_size % num_heads != 0:
            raise ValueError(f"the hidden width {hidden_size} is not divisible by {num_heads} attention heads")
        self.num_heads = num_heads
        self.fused = fused
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        batch, tokens, width = x.shape
        # Split along the width, so that nothing has to transpose a 5-D tensor.
        heads = [batch, tokens, self.num_heads, width // self.num_heads]
        q, k, v = (z.reshape(heads) for z in self.qkv(x).split(3, axis=-1))  # 3 x (N, T, heads, head_dim)
        out = scaled_dot_product(q, k, v, fused=self.fused)
        return self.proj(out.reshape([batch, tokens, width]))
