"""Patch, timestep and label embeddings, and the fixed position table of DiT. The letters of shapes: see `base`."""

import math

import numpy as np
import paddle
from paddle import nn

from .parallel import linear


def get_2d_sincos_pos_embed(embed_dim, grid_size, cls_token=False, extra_tokens=0):
    """Returns the fixed 2-D position table, float64 `(grid_size**2, embed_dim)`, as the official function (MAE's).

    Its columns are the sines and cosines of a token's column in the grid, then those of its row. With `cls_token`,
    `extra_tokens` zero rows are put in front.
    """
    if embed_dim % 4 != 0:
        raise ValueError(f"the hidden width must be a multiple of 4 for the 2-D position table, got {embed_dim}")
    frequencies = 1.0 / 10000 ** (np.arange(embed_dim // 4) / (embed_dim // 4))
    rows, columns = (np.outer(axis, frequencies) for axis in np.indices([grid_size, grid_size]))
    table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
    return np.concatenate([np.zeros([extra_tokens if cls_token else 0, embed_dim]), table])


def rotary_table(head_dim, num_tokens, theta=10000.0):
    """Returns cosine and sine of RoPE's angles, float32 `(num_tokens, head_dim / 2)` each (Su et al. 2021).

    The angle of pair i at token m is `m * theta ** (-2 i / head_dim)`; the official `precompute_freqs_cis`.
    """
    exponents = np.arange(0, head_dim, 2, dtype="float32") / np.float32(head_dim)
    angles = np.outer(np.arange(num_tokens, dtype="float32"), 1 / np.float32(theta) ** exponents)
    return np.cos(angles), np.sin(angles)


def rotary_table_2d(head_dim, grid_size, theta=10000.0):
    """Returns the same of a grid's tokens, float32 `(grid_size**2, head_dim / 2)` each (EVA-02, LightningDiT).

    The first half of a head turns by the token's row, the second half by its column, each by the angles of a head of
    half the width.
    """
    if head_dim % 4 != 0:
        raise ValueError(f"attention_head_dim must be a multiple of 4 for 2-D rotary positions, got {head_dim}")
    rows, columns = np.indices([grid_size, grid_size]).reshape(2, -1)
    tables = rotary_table(head_dim // 2, grid_size, theta)
    return tuple(np.concatenate([table[rows], table[columns]], axis=1) for table in tables)


def rotary_tensors(tables):
    """Returns cosine and sine `(T, head_dim / 2)` as tensors `(T, 1, head_dim / 2)`, which blocks take.

    They come in a tuple, so that they are no buffers: they stay float32 when the weights are cast, and out of the
    checkpoint.
    """
    return tuple(paddle.to_tensor(table).unsqueeze(1) for table in tables)


class PatchEmbed(nn.Layer):
    """Latents `(N, C, H, W)` to patch tokens `(N, T, D)`, T = (H / p) * (W / p), by a convolution of stride p."""

    def __init__(self, input_size, patch_size, in_channels, hidden_size):
        super().__init__()
        self.patch_size, self.grid_size = patch_size, input_size // patch_size
        self.num_patches = self.grid_size**2
        self.proj = nn.Conv2D(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        x = self.proj(x)  # (N, D, H/p, W/p)
        return x.flatten(2).transpose([0, 2, 1])  # (N, T, D)


class TimestepEmbedder(nn.Layer):
    """Timesteps `(N,)` to vectors `(N, D)`: sinusoidal features, then a two-layer MLP."""

    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        self.mlp = nn.Sequential(
            linear(frequency_embedding_size, hidden_size), nn.Silu(), linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        """Returns sinusoidal features of t `(N,)`, float32 `(N, dim)`, as GLIDE's; an odd `dim` ends in a zero column.

        Cosines come first; `max_period` is the longest period, in timesteps.
        """
        half = dim // 2
        # float32 exp is off by an ulp here and there, and t = 999 multiplies it: round float64's instead.
        exponents = paddle.arange(half, dtype="float32") * (-math.log(max_period) / half)
        freqs = paddle.exp(exponents.astype("float64")).astype("float32")
        args = t.astype("float32").unsqueeze(1) * freqs.unsqueeze(0)  # (N, half)
        features = [paddle.cos(args), paddle.sin(args)]
        if dim % 2:
            features.append(paddle.zeros_like(args[:, :1]))
        return paddle.concat(features, axis=-1)

    def forward(self, t):
        with paddle.amp.auto_cast(enable=False):  # under O2 it would round t = 999 to 1000
            features = self.timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(features.astype(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Layer):
    """Class labels `(N,)` to vectors `(N, D)`, with label dropout for classifier-free guidance.

    The table has one row more than there are classes, the null class `num_classes`, if `dropout_prob > 0`.
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels, force_drop_ids=None):
        """Replaces labels by the null class: where `force_drop_ids` is 1, else with probability `dropout_prob`."""
        if force_drop_ids is None:
            drop = paddle.rand([labels.shape[0]]) < self.dropout_prob
        else:
            drop = force_drop_ids.astype("int64") == 1
        return paddle.where(drop, paddle.full_like(labels, self.num_classes), labels)

    def forward(self, labels, train, force_drop_ids=None):
        if self.dropout_prob > 0 and (train or force_drop_ids is not None):
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)
