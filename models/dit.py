"""DiT: diffusion transformer with adaLN-Zero conditioning (Peebles and Xie, arXiv:2212.09748).

Parameter names, shapes and initialisation are those of the official PyTorch code; Linear weights are stored `[in, out]`
as Paddle does. Shapes: N batch, T tokens, D hidden width, C latent channels, H and W latent height and width.
"""

import paddle
from paddle import nn
from paddle.nn import functional as F

from .attention import Attention
from .embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, get_2d_sincos_pos_embed
from .guidance import combine_guidance


def modulate(x, shift, scale):
    """`x * (1 + scale) + shift`: x `(N, T, D)`, shift and scale `(N, D)`."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Mlp(nn.Layer):
    """Linear, GELU (tanh approximation), Linear on `(N, T, D)`."""

    def __init__(self, hidden_size, mlp_hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=True))


def _layer_norm(hidden_size):
    return nn.LayerNorm(hidden_size, epsilon=1e-6, weight_attr=False, bias_attr=False)


class DiTBlock(nn.Layer):
    """Transformer block with adaptive layer norm: tokens `(N, T, D)`, conditioning `(N, D)` -> tokens."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, fused_attention=False):
        super().__init__()
        self.norm1 = _layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, fused=fused_attention)
        self.norm2 = _layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.Silu(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).split(6, axis=-1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Layer):
    """Tokens `(N, T, D)` to patches `(N, T, p * p * out_channels)`, modulated by the conditioning `(N, D)`."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = _layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).split(2, axis=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Layer):
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
    ):
        super().__init__()
        if sample_size % patch_size != 0:
            raise ValueError(f"sample_size {sample_size} is not divisible by patch_size {patch_size}")
        hidden_size = num_attention_heads * attention_head_dim
        self.sample_size = self.input_size = sample_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.num_heads = num_attention_heads
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.learn_sigma = learn_sigma
        self.enable_recompute = enable_recompute

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

    @paddle.no_grad()
    def initialize_weights(self):
        """The official initialisation: see the comments; tested tensor by tensor."""
        xavier, zeros, normal = nn.initializer.XavierUniform(), nn.initializer.Constant(0.0), nn.initializer.Normal
        for layer in self.sublayers():
            if isinstance(layer, nn.Linear):
                xavier(layer.weight)
                zeros(layer.bias)

        grid_size = self.x_embedder.grid_size
        self.pos_embed.set_value(
            get_2d_sincos_pos_embed(self.hidden_size, grid_size).astype("float32")[None]
        )  # (1, T, D)

        # The patch embedding is a Linear over a flattened patch: Xavier over (p * p * C, D), not over the kernel.
        patch_width = self.in_channels * self.patch_size**2
        nn.initializer.XavierUniform(fan_in=patch_width, fan_out=self.hidden_size)(self.x_embedder.proj.weight)
        zeros(self.x_embedder.proj.bias)

        normal(std=0.02)(self.y_embedder.embedding_table.weight)
        normal(std=0.02)(self.t_embedder.mlp[0].weight)
        normal(std=0.02)(self.t_embedder.mlp[2].weight)

        # adaLN-Zero: every block starts as the identity and the network's output as 0.
        for block in self.blocks:
            zeros(block.adaLN_modulation[1].weight)
            zeros(block.adaLN_modulation[1].bias)
        zeros(self.final_layer.adaLN_modulation[1].weight)
        zeros(self.final_layer.adaLN_modulation[1].bias)
        zeros(self.final_layer.linear.weight)
        zeros(self.final_layer.linear.bias)

    def unpatchify(self, x):
        """Patches `(N, T, p * p * out_channels)` to images `(N, out_channels, H, W)`."""
        batch, tokens = x.shape[:2]
        side, p, channels = self.x_embedder.grid_size, self.patch_size, self.out_channels
        if tokens != side * side:
            raise ValueError(f"{tokens} tokens do not make a {side} x {side} grid")
        x = x.reshape([batch, side, side, p, p, channels])
        x = x.transpose([0, 5, 1, 3, 2, 4])  # (N, out_channels, side, p, side, p)
        return x.reshape([batch, channels, side * p, side * p])

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

    def _run_block(self, block, *inputs):
        if self.enable_recompute and self.training:
            from paddle.distributed.fleet.utils import recompute

            # Blocks draw no random numbers: there is no generator state to save and restore.
            return recompute(block, *inputs, preserve_rng_state=False)
        return block(*inputs)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=3):
        """`forward` with classifier-free guidance, both halves of the batch in one pass.

        Args:
            x: `(2N, C, H, W)`; the second half is ignored, as in the official code, and the first used twice.
            t: `(2N,)`.
            y: `(2N,)`: the classes, then the null class `num_classes`, N times.
            cfg_scale: guidance scale, 1 for none.
            cfg_channels: how many leading channels are guided: 3 as in the official code, or None for all
                `in_channels` latent channels. The others (and the variance) keep the output of their own half.

        Returns:
            `(2N, out_channels, H, W)`, the guided channels equal in both halves.

        Raises:
            ValueError: the network has no null class.
        """
        if self.class_dropout_prob == 0:
            raise ValueError("this network has no null class (class_dropout_prob 0): it can't be guided")
        half = x[: x.shape[0] // 2]
        out = self.forward(paddle.concat([half, half], axis=0), t, y)
        channels = self.in_channels if cfg_channels is None else min(cfg_channels, self.in_channels)
        guided, rest = out[:, :channels], out[:, channels:]
        cond, uncond = guided.split(2, axis=0)
        half_guided = combine_guidance(cond, uncond, cfg_scale)
        guided = paddle.concat([half_guided, half_guided], axis=0)
        return paddle.concat([guided, rest], axis=1) if rest.shape[1] else guided
