"""The transformer of a Large-DiT pipeline folder: `ppdiffusers.DiTLLaMA2DModel` with the official network's numbers.

Stands alone, on paddle and ppdiffusers: a copy of this file lies in each exported folder, beside the weights, and the
stock `ppdiffusers.DiTPipeline` loads it from there.
"""

import functools

import paddle
from paddle import nn
from ppdiffusers import DiTLLaMA2DModel
from ppdiffusers.models.transformer_2d import Transformer2DModelOutput


class RMSNorm(nn.Layer):
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis, in float32; x keeps its type."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x):
        h = x.astype("float32")
        h = h * paddle.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * self.weight.astype("float32")).astype(x.dtype)


class LargeDiTTransformer(DiTLLaMA2DModel):
    """`DiTLLaMA2DModel`, its settings and its weights, where that class does something else than the official network.

    * Its block norms are layer norms: they subtract the mean, which the official RMS norms don't.
    * Its table of rotary positions multiplies integers by floats, which Paddle 3 refuses.
    * Its float32 attention calls a function that only a CUDA build of Paddle gets from ppdiffusers.
    * It rounds timesteps to the weights' type: in bfloat16, 999 becomes 1000.
    """

    @functools.wraps(DiTLLaMA2DModel.__init__)  # from_pretrained reads the keywords off the signature
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        for layer in self.layers:
            layer.attention.fused_attn = False  # in float32; in half precision it is flash attention all the same
            layer.attention_norm = RMSNorm(layer.attention_norm.weight, self.norm_eps)
            layer.ffn_norm = RMSNorm(layer.ffn_norm.weight, self.norm_eps)

    @staticmethod
    def precompute_freqs_cis(dim, end, theta=10000.0):
        """Complex64 `(end, dim / 2)`: the angle of pair i at token m is `m * theta ** (-2 i / dim)`."""
        freqs = 1 / theta ** (paddle.arange(0, dim, 2, dtype="float32") / dim)
        angles = paddle.outer(paddle.arange(end, dtype="float32"), freqs)
        return paddle.complex(paddle.cos(angles), paddle.sin(angles))

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        """Noise (and variance) of noisy latents.

        Args:
            hidden_states: `(N, C, H, W)`. timestep: `(N,)`. class_labels: `(N,)`, int64, 1000 for the null class.
            return_dict: a `Transformer2DModelOutput`, else a tuple.
        """
        x = self.x_embedder(self.patchify(hidden_states.astype(self.dtype)))  # (N, T, D)
        c = self.t_embedder(timestep) + self.y_embedder(class_labels)  # (N, min(D, 1024))
        for layer in self.layers:
            x = layer(x, self.freqs_cis[: x.shape[1]], c)
        output = self.unpatchify(self.final_layer(x, c))  # (N, C or 2C, H, W)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
