"""DiT: diffusion transformer with adaLN-Zero conditioning (Peebles and Xie, arXiv:2212.09748).

Parameter names, shapes and initialisation are those of the official PyTorch code; Linear weights are stored `[in, out]`
as Paddle does. Shapes: N batch, T tokens, D hidden width, C latent channels, H and W latent height and width.
"""

import paddle
from paddle import nn

from . import cpu_ops
from .attention import Attention
from .base import LatentTransformer
from .embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, get_2d_sincos_pos_embed
from .parallel import column_linear, linear, linear_of_gelu, row_linear


def modulate(x, shift, scale):
    """`x * (1 + scale) + shift`: x `(N, T, D)`, shift and scale `(N, D)` or `(N, 1, D)`."""
    if shift.ndim == 2:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    return x * (1 + scale) + shift


class AdaptiveLayerNorm(cpu_ops.Layer, nn.LayerNorm):
    """Layer norm without weights of its own, modulated: x `(N, T, D)`, shift and scale `(N, 1, D)` -> `(N, T, D)`."""

    def __init__(self, hidden_size):
        super().__init__(hidden_size, epsilon=1e-6, weight_attr=False, bias_attr=False)

    def forward(self, x, shift, scale):
        if self.fast(x, shift, scale):
            return cpu_ops.adaptive_norm(x, shift, 1 + scale, epsilon=1e-6, center=True)
        return modulate(super().forward(x), shift, scale)


class Block(cpu_ops.Layer):
    """A base that gives the blocks of all networks their gated sum."""

    def add_gated(self, x, gate, h):
        """`x + gate * h`: x and h `(N, T, D)`, gate `(N, 1, D)`."""
        return cpu_ops.gated_add(x, gate, h) if self.fast(x, gate, h) else x + gate * h


def modulations(layer, c, count):
    """`layer`'s output of the conditioning `(N, E)`, in `count` tensors `(N, 1, D)`."""
    return layer(c).unsqueeze(1).split(count, axis=-1)


class Mlp(nn.Layer):
    """Linear, GELU (tanh approximation), Linear on `(N, T, D)`."""

    def __init__(self, hidden_size, mlp_hidden_size):
        super().__init__()
        self.fc1 = column_linear(hidden_size, mlp_hidden_size)
        self.fc2 = row_linear(mlp_hidden_size, hidden_size)

    def forward(self, x):
        return linear_of_gelu(self.fc2, self.fc1(x))


class DiTBlock(Block):
    """Transformer block with adaptive layer norm: tokens `(N, T, D)`, conditioning `(N, D)` -> tokens."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, fused_attention=False):
        super().__init__()
        self.norm1 = AdaptiveLayerNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, fused=fused_attention)
        self.norm2 = AdaptiveLayerNorm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.Silu(), column_linear(hidden_size, 6 * hidden_size, gather=True))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulations(self.adaLN_modulation, c, 6)
        x = self.add_gated(x, gate_msa, self.attn(self.norm1(x, shift_msa, scale_msa)))
        return self.add_gated(x, gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class FinalLayer(nn.Layer):
    """Tokens `(N, T, D)` to patches `(N, T, p * p * out_channels)`, modulated by the conditioning.

    Args:
        condition_size: width of the conditioning `(N, condition_size)`; None is the hidden width D.
    """

    def __init__(self, hidden_size, patch_size, out_channels, condition_size=None):
        super().__init__()
        self.norm_final = AdaptiveLayerNorm(hidden_size)
        self.linear = linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), linear(condition_size or hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = modulations(self.adaLN_modulation, c, 2)
        return self.linear(self.norm_final(x, shift, scale))


class DiT(LatentTransformer):
    """Class-conditional diffusion transformer.

    Args:
        sample_size: latent height and width (32 for 256 px images with the SD autoencoder).
        patch_size: latent pixels per token along a side; divides `sample_size`.
        in_channels: latent channels.
        num_layers: transformer blocks.
        num_attention_heads, attention_head_dim: the hidden width is their product, a multiple of 4.
        mlp_ratio: hidden width of the MLP over the hidden width.
        num_classes: classes; the null class of guidance is the label `num_classes`.
        class_dropout_prob: share of labels replaced by the null class in training. 0 builds no null class: such a
            model can't be guided.
        learn_sigma: twice the output channels; the second half parametrises the variance (Nichol and Dhariwal 2021).
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
        num_layers=28,
        num_attention_heads=16,
        attention_head_dim=72,
        mlp_ratio=4.0,
        num_classes=1000,
        class_dropout_prob=0.1,
        learn_sigma=True,
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
        hidden_size = self.hidden_size
        self.x_embedder = PatchEmbed(sample_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # Fixed, not trained, but part of the checkpoint, as in the official code.
        self.pos_embed = self.create_parameter(
            [1, self.x_embedder.num_patches, hidden_size], default_initializer=nn.initializer.Constant(0.0)
        )
        self.pos_embed.stop_gradient = True
        # Paddle's switch for AMP O2: this layer's own parameters (pos_embed, which no optimizer keeps a float32 master
        # of) are not cast; those of its sublayers are.
        self._cast_to_low_precision = False
        self.blocks = nn.LayerList(
            [
                DiTBlock(hidden_size, num_attention_heads, mlp_ratio, fused_attention=fused_attention)
                for _ in range(num_layers)
            ]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()
        if single_backward:
            cpu_ops.promise_single_backward(self)

    @paddle.no_grad()
    def initialize_weights(self):
        """The official initialisation: see the comments; tested tensor by tensor."""
        self._initialize_linears()
        table = get_2d_sincos_pos_embed(self.hidden_size, self.grid_size).astype("float32")[None]  # (1, T, D)
        nn.initializer.Assign(table)(self.pos_embed)

        # The patch embedding is a Linear over a flattened patch: Xavier over (p * p * C, D), not over the kernel.
        patch_width = self.in_channels * self.patch_size**2
        nn.initializer.XavierUniform(fan_in=patch_width, fan_out=self.hidden_size)(self.x_embedder.proj.weight)
        nn.initializer.Constant(0.0)(self.x_embedder.proj.bias)
        self._initialize_conditioning(self.blocks)

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
        x = self.x_embedder(x.astype(self.x_embedder.proj.weight.dtype))  # (N, T, D)
        x = x + self.pos_embed.astype(x.dtype)
        c = self.t_embedder(t) + self.y_embedder(y, self.training, force_drop_ids)  # (N, D)
        for block in self.blocks:
            x = self._run_block(block, x, c)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p * p * out_channels)
        return self.unpatchify(x)
