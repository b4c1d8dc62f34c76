"""Large-DiT: DiT with LLaMA's block (Alpha-VLLM, Large-DiT-ImageNet), and `LargeSiT`, the same for a `transport`.

Parameter names, shapes and initialisation are those of the official `DiT_Llama`; Linear weights are stored `[in, out]`
as Paddle does. Against DiT: rotary positions (RoPE) of the flattened token index instead of a table, RMSNorm, SwiGLU,
Linear layers without bias, grouped-query attention, and a conditioning width of at most 1024.

Shapes: N batch, T tokens, D hidden width, E conditioning width, C latent channels, H and W latent height and width,
p patch size.
"""

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from . import cpu_ops
from .attention import scaled_dot_product
from .base import LatentTransformer
from .dit import Block, FinalLayer, modulate, modulations
from .embeddings import LabelEmbedder, TimestepEmbedder
from .parallel import SharedInput, column_linear, layer_norm, linear, row_linear
from .sit import WithoutVariance
from .sizes import MAX_CONDITION_SIZE, swiglu_width


def rotary_table(head_dim, num_tokens, theta=10000.0):
    """Cosine and sine of RoPE's angles, float32 `(num_tokens, head_dim / 2)` each (Su et al. 2021).

    The angle of pair i at token m is `m * theta ** (-2 i / head_dim)`; the official `precompute_freqs_cis`.
    """
    exponents = np.arange(0, head_dim, 2, dtype="float32") / np.float32(head_dim)
    angles = np.outer(np.arange(num_tokens, dtype="float32"), 1 / np.float32(theta) ** exponents)
    return np.cos(angles), np.sin(angles)


def rotate(x, cos, sin, fast=False):
    """Turns the pairs (0, 1), (2, 3), ... of the last axis by RoPE's angles, in float32 whatever AMP says.

    Args:
        x: `(N, T, heads, head_dim)`.
        cos, sin: float32 `(T, 1, head_dim / 2)`.
        fast: compute with `cpu_ops`.

    Returns:
        as x, of its type.
    """
    if fast:
        return cpu_ops.rotate(x, cos, sin)
    with paddle.amp.auto_cast(enable=False):
        first, second = x.astype("float32").reshape([*x.shape[:-1], -1, 2]).unbind(-1)  # (N, T, heads, head_dim / 2)
        turned = paddle.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
        return turned.reshape(x.shape).astype(x.dtype)


def swiglu(gate, x):
    """`silu(gate) * x`, by Paddle's fused kernel where this version of Paddle has it (all devices)."""
    return F.swiglu(gate, x) if hasattr(F, "swiglu") else F.silu(gate) * x


class RMSNorm(cpu_ops.Layer):
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis, in float32 whatever AMP says; x keeps its type.

    With shift and scale `(N, 1, D)` x `(N, T, D)` is modulated after it.
    """

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.eps = eps
        self.weight = self.create_parameter([hidden_size], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x, shift=None, scale=None):
        if shift is not None and self.fast(x, shift, scale, self.weight):
            factor = (1 + scale) * self.weight
            return cpu_ops.adaptive_norm(x, shift, factor, epsilon=self.eps, center=False)
        with paddle.amp.auto_cast(enable=False):
            h = x.astype("float32")
            h = h * paddle.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
            normal = (h * self.weight.astype("float32")).astype(x.dtype)
        return normal if shift is None else modulate(normal, shift, scale)


class GroupedQueryAttention(cpu_ops.Layer):
    """Self-attention over tokens `(N, T, D)` with RoPE; `num_heads / num_kv_heads` query heads share a key and a value.

    Args:
        qk_norm: layer norm of queries and keys over their full width, before they are split into heads.
    """

    def __init__(self, num_heads, num_kv_heads, head_dim, qk_norm=False, fused=False):
        super().__init__()
        hidden_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.head_dim = head_dim
        self.fused = fused
        self.shared_input = SharedInput()
        self.wq = column_linear(hidden_size, hidden_size, bias=False, shared_input=True)
        self.wk = column_linear(hidden_size, kv_size, bias=False, shared_input=True)
        self.wv = column_linear(hidden_size, kv_size, bias=False, shared_input=True)
        self.wo = row_linear(hidden_size, hidden_size, bias=False)
        self.q_norm = layer_norm(hidden_size, epsilon=1e-5) if qk_norm else nn.Identity()
        self.k_norm = layer_norm(kv_size, epsilon=1e-5) if qk_norm else nn.Identity()

    def forward(self, x, cos, sin):
        batch, tokens, _ = x.shape
        x = self.shared_input(x)
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (z.reshape([batch, tokens, -1, self.head_dim]) for z in (q, k, v))  # (N, T, heads, head_dim)
        # The layer norms of AMP give float32: attention is to run in the type of the projections.
        q, k = (rotate(z, cos, sin, self.fast(z)).astype(v.dtype) for z in (q, k))
        k, v = (self._repeat(z, q.shape[2] // z.shape[2]) for z in (k, v))
        out = scaled_dot_product(q, k, v, fused=self.fused)
        return self.wo(out.flatten(2))

    @staticmethod
    def _repeat(x, times):
        """`(N, T, kv_heads, head_dim)` to `(N, T, kv_heads * times, head_dim)`, each head `times` times in a row."""
        if times == 1:
            return x
        batch, tokens, heads, head_dim = x.shape
        return x.unsqueeze(3).expand([batch, tokens, heads, times, head_dim]).flatten(2, 3)


class FeedForward(nn.Layer):
    """SwiGLU (Shazeer 2020) on `(N, T, D)`: `w2(silu(w1 x) * w3 x)`.

    The inner width is 8/3 of the hidden width, times `ffn_dim_multiplier`, rounded up to a multiple of `multiple_of`.
    """

    def __init__(self, hidden_size, multiple_of=256, ffn_dim_multiplier=None):
        super().__init__()
        width = swiglu_width(hidden_size, multiple_of, ffn_dim_multiplier)
        self.shared_input = SharedInput()
        self.w1 = column_linear(hidden_size, width, bias=False, shared_input=True)
        self.w2 = row_linear(width, hidden_size, bias=False)
        self.w3 = column_linear(hidden_size, width, bias=False, shared_input=True)

    def forward(self, x):
        x = self.shared_input(x)
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class LargeDiTBlock(Block):
    """LLaMA's block with adaptive norms: tokens `(N, T, D)`, conditioning `(N, E)`, RoPE's cos and sin -> tokens."""

    def __init__(self, attention, feed_forward, hidden_size, condition_size, norm_eps):
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = RMSNorm(hidden_size, norm_eps)
        self.ffn_norm = RMSNorm(hidden_size, norm_eps)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), column_linear(condition_size, 6 * hidden_size, gather=True))

    def forward(self, x, c, cos, sin):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulations(self.adaLN_modulation, c, 6)
        x = self.add_gated(x, gate_msa, self.attention(self.attention_norm(x, shift_msa, scale_msa), cos, sin))
        return self.add_gated(x, gate_mlp, self.feed_forward(self.ffn_norm(x, shift_mlp, scale_mlp)))


class LargeDiT(LatentTransformer):
    """Class-conditional diffusion transformer of LLaMA blocks.

    Args:
        sample_size: latent height and width (32 for 256 px images with the SD autoencoder).
        patch_size: latent pixels per token along a side; divides `sample_size`.
        in_channels: latent channels.
        num_layers: transformer blocks.
        num_attention_heads, attention_head_dim: the hidden width is their product; the head width is even.
        num_classes: classes; the null class of guidance is the label `num_classes`.
        class_dropout_prob: share of labels replaced by the null class in training. 0 builds no null class: such a
            model can't be guided.
        learn_sigma: twice the output channels; the second half parametrises the variance (Nichol and Dhariwal 2021).
        qk_norm: layer norm of queries and keys, which keeps training in half precision stable.
        num_kv_heads: heads of keys and values, a divisor of `num_attention_heads`; None for as many as those.
        multiple_of, ffn_dim_multiplier: inner width of the feed-forward layers, see `FeedForward`.
        norm_eps: of the RMS norms.
        fused_attention: use Paddle's fused attention where device and dtype allow; same numbers.
        enable_recompute: recompute each block in the backward pass instead of keeping its activations; same gradients.
        single_backward: the promise that each forward pass is followed by one first-order backward pass at most, to
            all parameters and inputs that want a gradient, as in a training step. Layers on a CPU, and recompute, then
            cost less; anything else of their graph (`paddle.grad` to some of these, a second pass, `create_graph`) is
            an error of Paddle's, or a crash.

    Raises:
        ValueError: a size that can't be: the message names it.
    """

    def __init__(
        self,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=32,
        num_attention_heads=32,
        attention_head_dim=128,
        num_classes=1000,
        class_dropout_prob=0.1,
        learn_sigma=True,
        qk_norm=False,
        num_kv_heads=None,
        multiple_of=256,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        fused_attention=False,
        enable_recompute=False,
        single_backward=False,
    ):
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            num_classes=num_classes,
            class_dropout_prob=class_dropout_prob,
            learn_sigma=learn_sigma,
            enable_recompute=enable_recompute,
        )
        kv_heads = num_attention_heads if num_kv_heads is None else num_kv_heads
        if num_attention_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_attention_heads {num_attention_heads}, got {num_kv_heads}")
        if attention_head_dim % 2:
            raise ValueError(f"attention_head_dim must be even for rotary positions, got {attention_head_dim}")
        hidden_size = self.hidden_size
        condition_size = min(hidden_size, MAX_CONDITION_SIZE)

        self.x_embedder = linear(patch_size * patch_size * in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(condition_size)
        self.y_embedder = LabelEmbedder(num_classes, condition_size, class_dropout_prob)
        self.layers = nn.LayerList(
            [
                LargeDiTBlock(
                    GroupedQueryAttention(num_attention_heads, kv_heads, attention_head_dim, qk_norm, fused_attention),
                    FeedForward(hidden_size, multiple_of, ffn_dim_multiplier),
                    hidden_size,
                    condition_size,
                    norm_eps,
                )
                for _ in range(num_layers)
            ]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, condition_size)
        # In a tuple, so that it is no buffer: it stays float32 when the weights are cast, and out of the checkpoint.
        table = rotary_table(attention_head_dim, self.grid_size**2)
        self._rotary = tuple(paddle.to_tensor(part).unsqueeze(1) for part in table)  # 2 x (T, 1, head_dim / 2)
        self.initialize_weights()
        if single_backward:
            cpu_ops.promise_single_backward(self)

    @paddle.no_grad()
    def initialize_weights(self):
        """The official initialisation; norms start as 1 and 0. Tested tensor by tensor."""
        self._initialize_linears()
        self._initialize_conditioning(self.layers)

    def patchify(self, x):
        """Images `(N, C, H, W)` to patches `(N, T, C * p * p)`; `unpatchify` takes channels last."""
        batch, channels, side, p = x.shape[0], self.in_channels, self.grid_size, self.patch_size
        if list(x.shape[1:]) != [channels, self.sample_size, self.sample_size]:
            raise ValueError(
                f"expected latents (N, {channels}, {self.sample_size}, {self.sample_size}), got {tuple(x.shape)}"
            )
        x = x.reshape([batch, channels, side, p, side, p])
        x = x.transpose([0, 2, 4, 1, 3, 5])  # (N, side, side, C, p, p)
        return x.reshape([batch, side * side, channels * p * p])

    def forward(self, x, t, y, force_drop_ids=None):
        """Predicts noise (and variance) of noisy latents.

        Args:
            x: noisy latents `(N, C, H, W)`.
            t: timesteps `(N,)`, in units of the original process (0..999).
            y: class labels `(N,)`, int64, 0..num_classes (the null class).
            force_drop_ids: `(N,)`, 1 where the label is to be replaced by the null class, instead of a random draw.

        Returns:
            `(N, out_channels, H, W)`.
        """
        x = self.x_embedder(self.patchify(x).astype(self.x_embedder.weight.dtype))  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y, self.training, force_drop_ids)  # (N, E)
        for layer in self.layers:
            x = self._run_block(layer, x, c, *self._rotary)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p * p * out_channels)
        return self.unpatchify(x)


class LargeSiT(WithoutVariance, LargeDiT):
    """Large-DiT with continuous time. Arguments, parameters and initialisation are those of `LargeDiT`."""
