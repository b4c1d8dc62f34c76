"""What the networks on latents share: sizes, recompute, the way back from patches, guidance, initialisation.

Shapes: N batch, T tokens, D hidden width, C latent channels, H and W latent height and width, p patch size.
"""

import inspect

import paddle
from paddle import nn

from . import cpu_ops
from .guidance import combine_guidance
from .parallel import initialize


class LatentTransformer(cpu_ops.Layer):
    """Base of `DiT` and `LargeDiT`: transformers `forward(x, t, y)` on square latents in p x p patches.

    A subclass makes `t_embedder`, `y_embedder` and `final_layer`, and blocks with `adaLN_modulation`.

    Attributes:
        settings: the constructor's keywords and their values, defaults included: `type(network)(**settings)` is the
            same network.
    """

    def __new__(cls, *args, **keywords):
        network = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind(network, *args, **keywords)
        bound.apply_defaults()
        network.__dict__["settings"] = dict(list(bound.arguments.items())[1:])  # nn.Layer's __init__ is yet to run
        return network

    def __init__(
        self,
        *,
        sample_size,
        patch_size,
        in_channels,
        num_attention_heads,
        attention_head_dim,
        num_classes,
        class_dropout_prob,
        learn_sigma,
        enable_recompute,
    ):
        super().__init__()
        if sample_size % patch_size != 0:
            raise ValueError(f"sample_size {sample_size} is not divisible by patch_size {patch_size}")
        self.sample_size = self.input_size = sample_size
        self.patch_size = patch_size
        self.grid_size = sample_size // patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.hidden_size = num_attention_heads * attention_head_dim
        self.num_heads = num_attention_heads
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.learn_sigma = learn_sigma
        self.enable_recompute = enable_recompute

    def _initialize_linears(self):
        """Every Linear: Xavier uniform, bias 0."""
        xavier, zeros = nn.initializer.XavierUniform(), nn.initializer.Constant(0.0)
        for layer in self.sublayers():
            if layer.__class__.__name__.endswith("Linear"):  # fleet's too
                initialize(layer.weight, xavier)
                if layer.bias is not None:
                    zeros(layer.bias)

    def _initialize_conditioning(self, blocks):
        """Embeddings of label and timestep, and adaLN-Zero: every block starts as the identity, the output as 0."""
        normal, zeros = nn.initializer.Normal(std=0.02), nn.initializer.Constant(0.0)
        normal(self.y_embedder.embedding_table.weight)
        normal(self.t_embedder.mlp[0].weight)
        normal(self.t_embedder.mlp[2].weight)
        for layer in [*(block.adaLN_modulation[1] for block in blocks), self.final_layer.adaLN_modulation[1]]:
            zeros(layer.weight)
            zeros(layer.bias)
        zeros(self.final_layer.linear.weight)
        zeros(self.final_layer.linear.bias)

    def _run_block(self, block, *inputs):
        if self.enable_recompute and self.training:
            from paddle.distributed.fleet.utils import recompute

            def run(*inputs):
                with cpu_ops.keeping_gelu():
                    return block(*inputs)

            # Reentrant recompute is a PyLayer, with the limits of those in `cpu_ops`; it leaves the weights without
            # gradients where no input wants one, as with frozen embeddings. The other kind does neither.
            reentrant = self.single_backward and not all(x.stop_gradient for x in inputs)
            # Blocks draw no random numbers: there is no generator state to save and restore.
            return recompute(run, *inputs, preserve_rng_state=False, use_reentrant=reentrant)
        return block(*inputs)

    def unpatchify(self, x):
        """Patches `(N, T, p * p * out_channels)` to images `(N, out_channels, H, W)`."""
        batch, tokens = x.shape[:2]
        side, p, channels = self.grid_size, self.patch_size, self.out_channels
        if tokens != side * side:
            raise ValueError(f"{tokens} tokens do not make a {side} x {side} grid")
        x = x.reshape([batch, side, side, p, p, channels])
        x = x.transpose([0, 5, 1, 3, 2, 4])  # (N, out_channels, side, p, side, p)
        return x.reshape([batch, channels, side * p, side * p])

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
            `(2N, channels of forward, H, W)`, the guided channels equal in both halves.

        Raises:
            ValueError: the network has no null class.
        """
        if self.class_dropout_prob == 0:
            raise ValueError("this network has no null class (class_dropout_prob 0): it can't be guided")
        half = x[: x.shape[0] // 2]
        out = self(paddle.concat([half, half], axis=0), t, y)
        channels = self.in_channels if cfg_channels is None else min(cfg_channels, self.in_channels)
        guided, rest = out[:, :channels], out[:, channels:]
        cond, uncond = guided.split(2, axis=0)
        half_guided = combine_guidance(cond, uncond, cfg_scale)
        guided = paddle.concat([half_guided, half_guided], axis=0)
        return paddle.concat([guided, rest], axis=1) if rest.shape[1] else guided
