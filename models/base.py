"""What the networks on latents share: sizes, the run through the blocks, the way back from patches, guidance.

Shapes: N batch, T tokens, D hidden width, E conditioning width, C latent channels, H and W latent height and width,
p patch size.
"""

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from . import ops
from .hooks import Routing
from .parallel import LINEARS, initialize
from .sprint import Sprint

# Keywords that say how a network is computed, not what: they change neither parameters nor outputs.
_COMPUTATION = ("fused_attention", "enable_recompute", "single_backward", "tensor_parallel_group")


class LatentTransformer(ops.Layer):
    """Base of the networks: transformers on square latents in p x p patches, conditioned on a time and a class.

    A subclass makes `t_embedder`, `y_embedder`, `final_layer` and blocks with `adaLN_modulation`, calls `finish`, and
    has `new_final_layer()`, another layer as its last, and `forward(x, t, y, force_drop_ids=None, hooks=())`:

    - x: latents `(N, C, H, W)`;
    - t: times `(N,)`, as the network's docstring says; y: class labels `(N,)`, int64, 0..num_classes (the null class);
    - force_drop_ids: `(N,)`, 1 where the label is to be replaced by the null class, instead of a random draw;
    - hooks: `hooks.Hook`s that see the tokens between the blocks, one after the other;
    - the result is `(N, out_channels, H, W)`; a tuple of it and of the hooks' outputs, if hooks have any: Paddle's
      `DataParallel` finds the parameters that a pass has used by what it returns.

    Keywords of every network's constructor:

    - sample_size: latent height and width (32 for 256 px images with the SD autoencoder);
    - patch_size: latent pixels per token along a side; divides `sample_size`;
    - in_channels: latent channels; num_layers: transformer blocks;
    - num_attention_heads, attention_head_dim: the hidden width is their product;
    - num_classes: classes; the null class of guidance is the label `num_classes`;
    - class_dropout_prob: share of labels replaced by the null class in training. 0 builds no null class: such a model
      can't be guided;
    - learn_sigma: twice the output channels; the second half parametrises the variance (Nichol and Dhariwal 2021);
    - sprint_blocks: `(first, last)`, counted from 1, both inclusive, the blocks that are the deep path of `sprint`;
      None for a network without;
    - fused_attention: use Paddle's fused attention where device and dtype allow; same numbers;
    - enable_recompute: recompute each block in the backward pass instead of keeping its activations; same gradients; a
      second pass through a kept graph is a crash of Paddle 2.6;
    - single_backward: the promise that each forward pass is followed by one first-order backward pass at most, to all
      parameters and inputs that want a gradient, as in a training step. Layers on a CPU, and recompute, then cost less;
      anything else of their graph (`paddle.grad` to some of these, a second pass, `create_graph`) is an error of
      Paddle's, or a crash;
    - tensor_parallel_group: the group of ranks to split it over, see `parallel`; None for a whole network.

    Args:
        keywords: `locals()` of the subclass's constructor.

    Attributes:
        settings: the keywords that decide parameters and outputs: `type(self)(**settings)` takes the same weights. Each
            is an attribute, too.

    Raises:
        ValueError: a size that can't be: the message names it.
    """

    sprint_blocks = None  # of a network whose constructor does not have the keyword
    drops_variance = False  # of 2C output channels all leave the network

    def __init__(self, keywords):
        super().__init__()
        self.settings = {}
        self.keep(**{k: v for k, v in keywords.items() if k not in ("self", "__class__", *_COMPUTATION)})
        self.input_size, self.num_heads = self.sample_size, self.num_attention_heads  # the official names
        if self.sample_size % self.patch_size != 0:
            raise ValueError(f"sample_size {self.sample_size} is not divisible by patch_size {self.patch_size}")
        if self.sprint_blocks and not 1 <= self.sprint_blocks[0] <= self.sprint_blocks[1] <= self.num_layers:
            blocks = f"must be [first, last] of the blocks 1..{self.num_layers}"
            raise ValueError(f"sprint_blocks {blocks}, got {list(self.sprint_blocks)}")
        self.grid_size = self.sample_size // self.patch_size
        self.out_channels = self.in_channels * 2 if self.learn_sigma else self.in_channels
        self.hidden_size = self.num_attention_heads * self.attention_head_dim
        self.enable_recompute, self.single_backward = keywords["enable_recompute"], keywords["single_backward"]

    def keep(self, **keywords):
        """Keeps keywords of a constructor as `settings`, and each as an attribute."""
        self.settings.update(keywords)
        for name, value in keywords.items():
            setattr(self, name, value)

    def finish(self):
        """Initialises the weights, and tells the layers how to compute."""
        self.initialize_weights()
        self.sprint = Sprint(self.hidden_size) if self.sprint_blocks else None
        ops.use(self, ops.Operators(self.single_backward, keep_gelu=self.enable_recompute))

    def _initialize_linears(self):
        """Initialises every linear layer: Xavier uniform, bias 0."""
        xavier, zeros = nn.initializer.XavierUniform(), nn.initializer.Constant(0.0)
        for layer in self.sublayers():
            if isinstance(layer, LINEARS):
                initialize(layer.weight, xavier)
                if layer.bias is not None:
                    zeros(layer.bias)

    def _initialize_conditioning(self, blocks):
        """Initialises the embeddings, and adaLN-Zero: every block starts as the identity, and the output as 0."""
        normal, zeros = nn.initializer.Normal(std=0.02), nn.initializer.Constant(0.0)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            normal(layer.weight)
        modulated = [*blocks, self.final_layer]
        for layer in [*(part.adaLN_modulation[1] for part in modulated), self.final_layer.linear]:
            zeros(layer.weight)
            zeros(layer.bias)

    def _run_blocks(self, blocks, x, conditions, hooks):
        """Returns the tokens after all blocks: x `(N, T, D)`, conditions: what a block takes beside them."""
        first, last = self.sprint_blocks or (None, None)
        for hook in hooks:
            hook.begin(self)
        for index, block in enumerate(blocks):
            if index + 1 == first:
                dense = x
            for hook in hooks:
                x, conditions = hook.before(index, x, conditions)
            x = self._run_block(block, x, *conditions)
            if index + 1 == last:
                x = self.sprint(dense, x, next((hook for hook in hooks if isinstance(hook, Routing)), None))
            for hook in hooks:
                x = hook.after(index, x)
        return x

    def _run_block(self, block, *inputs):
        if not (self.enable_recompute and self.training):
            return block(*inputs)
        # Reentrant recompute is a PyLayer, with the limits of those in `cpu_ops`; it leaves the weights without
        # gradients where no input wants one, as with frozen embeddings. The other kind does neither.
        reentrant = self.single_backward and not all(x.stop_gradient for x in inputs)
        # Blocks draw no random numbers: there is no generator state to save and restore.
        return recompute(block, *inputs, preserve_rng_state=False, use_reentrant=reentrant)

    def read_out(self, final_layer, x, c):
        """Returns the output `(N, C or out_channels, H, W)` of tokens x `(N, T, D)`, conditioning c `(N, E)`."""
        x = self.unpatchify(final_layer(x, c))
        return x[:, : self.in_channels] if self.drops_variance else x

    def _result(self, x, hooks):
        """Returns what `forward` returns of its output x."""
        outputs = [hook.output for hook in hooks if hook.output is not None]
        return (x, *outputs) if outputs else x

    def unpatchify(self, x):
        """Returns the images `(N, out_channels, H, W)` of patches `(N, T, p * p * out_channels)`."""
        batch, side, p, channels = x.shape[0], self.grid_size, self.patch_size, self.out_channels
        if x.shape[1] != side * side:
            raise ValueError(f"{x.shape[1]} tokens do not make a {side} x {side} grid")
        x = x.reshape([batch, side, side, p, p, channels])
        x = x.transpose([0, 5, 1, 3, 2, 4])  # (N, out_channels, side, p, side, p)
        return x.reshape([batch, channels, side * p, side * p])

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_interval=None, cfg_interval_start=None, *, cfg_channels=3):
        """Returns `forward` with classifier-free guidance, both halves of the batch in one pass.

        Args:
            x: `(2N, C, H, W)`; the second half is ignored, as in the official code, and the first used twice.
            t, y: `(2N,)`; the labels are the classes, then the null class `num_classes`, N times.
            cfg_scale: guidance scale, 1 for none.
            cfg_interval: guide only from the time `cfg_interval_start` on; before it, which `t[0]` tells, the output
                with the class takes the place of the guided one (LightningDiT's).
            cfg_channels: how many leading channels are guided, and equal in both halves of the result: 3 as in the
                official code, or None for all `in_channels`. The others (and the variance) are those of their half.

        Raises:
            ValueError: the network has no null class.
        """
        if self.class_dropout_prob == 0:
            raise ValueError("this network has no null class (class_dropout_prob 0): it can't be guided")
        half = x[: x.shape[0] // 2]
        cond, uncond = self(paddle.concat([half, half]), t, y).split(2, axis=0)
        channels = self.in_channels if cfg_channels is None else min(cfg_channels, self.in_channels)
        guided = uncond[:, :channels] + cfg_scale * (cond[:, :channels] - uncond[:, :channels])
        if cfg_interval:
            guided = paddle.where(t[0] < cfg_interval_start, cond[:, :channels], guided)
        return paddle.concat([paddle.concat([guided, own[:, channels:]], axis=1) for own in (cond, uncond)])
