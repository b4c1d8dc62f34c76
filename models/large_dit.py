"""Large-DiT: DiT with LLaMA's block (Alpha-VLLM, Large-DiT-ImageNet), and `LargeSiT`, the same for a `transport`.

Parameter names, shapes and initialisation are those of the official `DiT_Llama`; Linear weights are stored `[in, out]`
as Paddle does. Against DiT: rotary positions (RoPE) of the flattened token index instead of a table, RMSNorm, SwiGLU,
Linear layers without bias, grouped-query attention, and a conditioning width of at most 1024. The letters of shapes:
see `base`.
"""

import paddle
from paddle import nn

from . import ops
from .attention import scaled_dot_product
from .base import LatentTransformer
from .dit import FinalLayer
from .embeddings import LabelEmbedder, TimestepEmbedder, rotary_table, rotary_tensors
from .norms import RMSNorm, modulations
from .parallel import column_linear, layer_norm, linear, prepare_group, row_linear, share_input
from .sit import DropsVariance
from .sizes import MAX_CONDITION_SIZE, swiglu_width


class GroupedQueryAttention(ops.Layer):
    """Self-attention over tokens `(N, T, D)` with RoPE; `num_heads / num_kv_heads` query heads share a key and a value.

    `qk_norm`: layer norm of queries and keys over their full width, before they are split into heads.
    """

    def __init__(self, num_heads, num_kv_heads, head_dim, *, qk_norm=False, fused=False, group=None):
        super().__init__()
        hidden_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.head_dim, self.fused, self.group = head_dim, fused, group
        self.wq = column_linear(hidden_size, hidden_size, bias=False, shared_input=True, group=group)
        self.wk = column_linear(hidden_size, kv_size, bias=False, shared_input=True, group=group)
        self.wv = column_linear(hidden_size, kv_size, bias=False, shared_input=True, group=group)
        self.wo = row_linear(hidden_size, hidden_size, bias=False, group=group)
        self.q_norm = layer_norm(hidden_size, 1e-5, group=group) if qk_norm else nn.Identity()
        self.k_norm = layer_norm(kv_size, 1e-5, group=group) if qk_norm else nn.Identity()

    def forward(self, x, cos, sin):
        batch, tokens, _ = x.shape
        x = share_input(x, self.group)
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (z.reshape([batch, tokens, -1, self.head_dim]) for z in (q, k, v))  # (N, T, heads, head_dim)
        # The layer norms of AMP give float32: attention is to run in the type of the projections.
        q, k = (self.ops.rotate(z, cos, sin).astype(v.dtype) for z in (q, k))
        k, v = (self._repeat(z, q.shape[2] // z.shape[2]) for z in (k, v))
        out = scaled_dot_product(q, k, v, self.ops.softmax, fused=self.fused)
        return self.wo(out.flatten(2))

    @staticmethod
    def _repeat(x, times):
        """Returns `(N, T, kv_heads, head_dim)` with each head `times` times in a row."""
        if times == 1:
            return x
        batch, tokens, heads, head_dim = x.shape
        return x.unsqueeze(3).expand([batch, tokens, heads, times, head_dim]).flatten(2, 3)


class FeedForward(ops.Layer):
    """SwiGLU (Shazeer 2020) on `(N, T, D)`: `w2(silu(w1 x) * w3 x)`.

    The inner width is 8/3 of the hidden width, times `ffn_dim_multiplier`, rounded up to a multiple of `multiple_of`.
    """

    def __init__(self, hidden_size, multiple_of=256, ffn_dim_multiplier=None, group=None):
        super().__init__()
        width = swiglu_width(hidden_size, multiple_of, ffn_dim_multiplier)
        self.group = group
        self.w1 = column_linear(hidden_size, width, bias=False, shared_input=True, group=group)
        self.w2 = row_linear(width, hidden_size, bias=False, group=group)
        self.w3 = column_linear(hidden_size, width, bias=False, shared_input=True, group=group)

    def forward(self, x):
        x = share_input(x, self.group)
        return self.w2(self.ops.swiglu(self.w1(x), self.w3(x)))


class LargeDiTBlock(ops.Layer):
    """LLaMA's block with adaptive norms: tokens `(N, T, D)`, conditioning `(N, E)`, RoPE's cos and sin -> tokens."""

    def __init__(self, attention, feed_forward, hidden_size, condition_size, norm_eps, group=None):
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = RMSNorm(hidden_size, norm_eps)
        self.ffn_norm = RMSNorm(hidden_size, norm_eps)
        modulation = column_linear(condition_size, 6 * hidden_size, gather=True, group=group)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), modulation)

    def forward(self, x, c, cos, sin):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulations(self.adaLN_modulation, c, 6)
        h = self.attention(self.attention_norm(x, shift_msa, scale_msa), cos, sin)
        x = self.ops.gated_add(x, gate_msa, h)
        return self.ops.gated_add(x, gate_mlp, self.feed_forward(self.ffn_norm(x, shift_mlp, scale_mlp)))


class LargeDiT(LatentTransformer):
    """Class-conditional diffusion transformer of LLaMA blocks; arguments not named here: see `LatentTransformer`.

    Args:
        attention_head_dim: even.
        qk_norm: layer norm of queries and keys, which keeps training in half precision stable.
        num_kv_heads: heads of keys and values, a divisor of `num_attention_heads`; None for as many as those.
        multiple_of, ffn_dim_multiplier: inner width of the feed-forward layers, see `FeedForward`.
        norm_eps: of the RMS norms.
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
        sprint_blocks=None,
        fused_attention=False,
        enable_recompute=False,
        single_backward=False,
        tensor_parallel_group=None,
    ):
        super().__init__(locals())
        kv_heads = num_attention_heads if num_kv_heads is None else num_kv_heads
        if num_attention_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_attention_heads {num_attention_heads}, got {num_kv_heads}")
        if attention_head_dim % 2:
            raise ValueError(f"attention_head_dim must be even for rotary positions, got {attention_head_dim}")
        hidden_size, group = self.hidden_size, prepare_group(tensor_parallel_group)
        self.condition_size = condition_size = min(hidden_size, MAX_CONDITION_SIZE)

        self.x_embedder = linear(patch_size * patch_size * in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(condition_size)
        self.y_embedder = LabelEmbedder(num_classes, condition_size, class_dropout_prob)
        attention = {"qk_norm": qk_norm, "fused": fused_attention, "group": group}
        self.layers = nn.LayerList(
            LargeDiTBlock(
                GroupedQueryAttention(num_attention_heads, kv_heads, attention_head_dim, **attention),
                FeedForward(hidden_size, multiple_of, ffn_dim_multiplier, group),
                hidden_size,
                condition_size,
                norm_eps,
                group,
            )
            for _ in range(num_layers)
        )
        self.final_layer = self.new_final_layer()
        self.rotary = rotary_tensors(rotary_table(attention_head_dim, self.grid_size**2))
        self.finish()

    def new_final_layer(self):
        """Returns a new `FinalLayer` for this network."""
        return FinalLayer(self.hidden_size, self.patch_size, self.out_channels, self.condition_size)

    @paddle.no_grad()
    def initialize_weights(self):
        """Initialises the weights as the official code does; norms start as 1 and 0. Tested tensor by tensor."""
        self._initialize_linears()
        self._initialize_conditioning(self.layers)

    def patchify(self, x):
        """Returns the patches `(N, T, C * p * p)` of images `(N, C, H, W)`; `unpatchify` takes channels last."""
        batch, channels, side, p = x.shape[0], self.in_channels, self.grid_size, self.patch_size
        if list(x.shape[1:]) != [channels, self.sample_size, self.sample_size]:
            raise ValueError(
                f"expected latents (N, {channels}, {self.sample_size}, {self.sample_size}), got {tuple(x.shape)}"
            )
        x = x.reshape([batch, channels, side, p, side, p])
        x = x.transpose([0, 2, 4, 1, 3, 5])  # (N, side, side, C, p, p)
        return x.reshape([batch, side * side, channels * p * p])

    def forward(self, x, t, y, force_drop_ids=None, hooks=()):
        """Predicts noise (and variance) at timesteps t `(N,)` of the whole process, 0..999; see `LatentTransformer`."""
        x = self.x_embedder(self.patchify(x).astype(self.x_embedder.weight.dtype))  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y, self.training, force_drop_ids)  # (N, E)
        x = self._run_blocks(self.layers, x, (c, *self.rotary), hooks)  # (N, T, D)
        return self._result(self.read_out(self.final_layer, x, c), hooks)


class LargeSiT(DropsVariance, LargeDiT):
    """Large-DiT with continuous time. Arguments, parameters and initialisation are those of `LargeDiT`."""
