"""DiT: diffusion transformer with adaLN-Zero conditioning (Peebles and Xie, arXiv:2212.09748).

Switches turn its block into LightningDiT's, part by part; see `lightning_dit`.
Parameter names, shapes and initialisation are those of the official PyTorch code; Linear weights are stored `[in, out]`
as Paddle does. The letters of shapes: see `base`.
"""

import paddle
from paddle import nn

from runtime.paddle_private import keep_own_parameters_float32

from . import ops
from .attention import Attention
from .base import LatentTransformer
from .embeddings import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    get_2d_sincos_pos_embed,
    rotary_table_2d,
    rotary_tensors,
)
from .norms import adaptive_norm, modulations
from .parallel import column_linear, linear, linear_of_gelu, prepare_group, row_linear
from .sizes import mlp_width


class Mlp(nn.Layer):
    """Linear, GELU (tanh approximation), Linear on `(N, T, D)`."""

    def __init__(self, hidden_size, mlp_hidden_size, group=None):
        super().__init__()
        self.fc1 = column_linear(hidden_size, mlp_hidden_size, group=group)
        self.fc2 = row_linear(mlp_hidden_size, hidden_size, group=group)

    def forward(self, x):
        return linear_of_gelu(self.fc2, self.fc1(x))


class SwiGLU(ops.Layer):
    """SwiGLU (Shazeer 2020) with biases on `(N, T, D)`: `w3(silu(gate) * h)`, gate and h the halves of `w12(x)`."""

    def __init__(self, hidden_size, inner_size, group=None):
        super().__init__()
        self.w12 = column_linear(hidden_size, 2 * inner_size, segments=2, group=group)
        self.w3 = row_linear(inner_size, hidden_size, group=group)

    def forward(self, x):
        gate, h = self.w12(x).split(2, axis=-1)  # (N, T, inner_size) each
        return self.w3(self.ops.swiglu(gate, h))


class DiTBlock(ops.Layer):
    """Transformer block with adaptive norms: tokens `(N, T, D)`, conditioning `(N, D)`, RoPE's tables -> tokens.

    Args:
        mlp_size: inner width of the MLP.
        fused_attention, group, and the switches: see `DiT`.
    """

    def __init__(
        self,
        hidden_size,
        num_heads,
        mlp_size,
        *,
        qk_norm=False,
        swiglu=False,
        rms_norm=False,
        adaln_shift=True,
        fused_attention=False,
        group=None,
    ):
        super().__init__()
        self.norm1, self.norm2 = adaptive_norm(hidden_size, rms_norm), adaptive_norm(hidden_size, rms_norm)
        self.attn = Attention(
            hidden_size, num_heads, qk_norm=qk_norm, rms_norm=rms_norm, fused=fused_attention, group=group
        )
        self.mlp = (SwiGLU if swiglu else Mlp)(hidden_size, mlp_size, group)
        self.modulated = 6 if adaln_shift else 4
        modulation = column_linear(hidden_size, self.modulated * hidden_size, gather=True, group=group)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), modulation)

    def forward(self, x, c, *rotary):
        parts = modulations(self.adaLN_modulation, c, self.modulated)
        parts = parts if self.modulated == 6 else [None, *parts[:2], None, *parts[2:]]  # no shift
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        x = self.ops.gated_add(x, gate_msa, self.attn(self.norm1(x, shift_msa, scale_msa), *rotary))
        return self.ops.gated_add(x, gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class FinalLayer(ops.Layer):
    """Tokens `(N, T, D)`, conditioning `(N, condition_size or D)` -> patches `(N, T, p * p * out_channels)`."""

    def __init__(self, hidden_size, patch_size, out_channels, condition_size=None, *, rms_norm=False):
        super().__init__()
        self.norm_final = adaptive_norm(hidden_size, rms_norm)
        self.linear = linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), linear(condition_size or hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = modulations(self.adaLN_modulation, c, 2)
        return self.linear(self.norm_final(x, shift, scale))


class DiT(LatentTransformer):
    """Class-conditional diffusion transformer; arguments not named here: see `LatentTransformer`.

    Args:
        num_attention_heads, attention_head_dim: their product is a multiple of 4.
        mlp_ratio: hidden width of the MLP over the hidden width; of SwiGLU's 2/3 are taken.
        qk_norm: norms queries and keys within each head, which keeps long training stable.
        swiglu: SwiGLU in place of the MLP with GELU.
        rope: turns queries and keys by their place in the grid too, see `rotary_table_2d`.
        rms_norm: RMS norms with weights in place of layer norms without.
        adaln_shift: blocks are modulated by shifts beside scales and gates; the final layer always is.
    """

    def __init__(
        self,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=28,
        num_attention_heads=16,
        attention_head_dim=72,
        mlp_ratio=4.0,
        num_classes=1000,
        class_dropout_prob=0.1,
        learn_sigma=True,
        qk_norm=False,
        swiglu=False,
        rope=False,
        rms_norm=False,
        adaln_shift=True,
        sprint_blocks=None,
        fused_attention=False,
        enable_recompute=False,
        single_backward=False,
        tensor_parallel_group=None,
    ):
        super().__init__(locals())
        hidden_size, group = self.hidden_size, prepare_group(tensor_parallel_group)
        self.x_embedder = PatchEmbed(sample_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # Fixed, not trained, but part of the checkpoint, as in the official code.
        self.pos_embed = self.create_parameter(
            [1, self.grid_size**2, hidden_size], default_initializer=nn.initializer.Constant(0.0)
        )
        self.pos_embed.stop_gradient = True
        keep_own_parameters_float32(self)  # because no optimizer keeps a float32 master of pos_embed
        self.blocks = nn.LayerList(
            DiTBlock(
                hidden_size,
                num_attention_heads,
                mlp_width(self.settings),
                qk_norm=qk_norm,
                swiglu=swiglu,
                rms_norm=rms_norm,
                adaln_shift=adaln_shift,
                fused_attention=fused_attention,
                group=group,
            )
            for _ in range(num_layers)
        )
        self.final_layer = self.new_final_layer()
        self.rotary = rotary_tensors(rotary_table_2d(attention_head_dim, self.grid_size)) if rope else ()
        self.finish()

    def new_final_layer(self):
        """Returns a new `FinalLayer` for this network."""
        return FinalLayer(self.hidden_size, self.patch_size, self.out_channels, rms_norm=self.rms_norm)

    @paddle.no_grad()
    def initialize_weights(self):
        """Initialises the weights as the official code does: see the comments; tested tensor by tensor."""
        self._initialize_linears()
        table = get_2d_sincos_pos_embed(self.hidden_size, self.grid_size).astype("float32")[None]  # (1, T, D)
        nn.initializer.Assign(table)(self.pos_embed)

        # The patch embedding is a Linear over a flattened patch: Xavier over (p * p * C, D), not over the kernel.
        patch_width = self.in_channels * self.patch_size**2
        nn.initializer.XavierUniform(fan_in=patch_width, fan_out=self.hidden_size)(self.x_embedder.proj.weight)
        nn.initializer.Constant(0.0)(self.x_embedder.proj.bias)
        self._initialize_conditioning(self.blocks)

    def forward(self, x, t, y, force_drop_ids=None, hooks=()):
        """Predicts noise (and variance) at timesteps t `(N,)` of the whole process, 0..999; see `LatentTransformer`."""
        x = self.x_embedder(x.astype(self.x_embedder.proj.weight.dtype))  # (N, T, D)
        x = self.ops.add_table(x, self.pos_embed.astype(x.dtype))
        c = self.t_embedder(t) + self.y_embedder(y, self.training, force_drop_ids)  # (N, D)
        x = self._run_blocks(self.blocks, x, (c, *self.rotary), hooks)  # (N, T, D)
        return self._result(self.read_out(self.final_layer, x, c), hooks)
