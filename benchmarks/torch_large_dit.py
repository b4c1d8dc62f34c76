"""Large-DiT in PyTorch, which diffusers does not have: the network of `models/large_dit.py`, to measure times against.

Its attention is PyTorch's `scaled_dot_product_attention`, its rotation one of complex numbers, its RMS norm PyTorch's.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from models.sizes import MAX_CONDITION_SIZE, swiglu_width


class Block(nn.Module):
    def __init__(self, width, heads, condition):
        super().__init__()
        inner = swiglu_width(width, 256, None)
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 6 * width))

    def attention(self, x, turns):
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)) for layer in (self.wq, self.wk, self.wv))

        def turned(z):
            pairs = torch.view_as_complex(z.unflatten(3, (-1, 2)))
            return torch.view_as_real(pairs * turns).flatten(3)

        q, k, v = (z.transpose(1, 2) for z in (turned(q), turned(k), v))
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x, c, turns):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).unsqueeze(1).chunk(6, dim=2)
        x = x + gate_a * self.attention(self.norms[0](x) * (1 + scale_a) + shift_a, turns)
        h = self.norms[1](x) * (1 + scale_m) + shift_m
        return x + gate_m * self.w2(F.silu(self.w1(h)) * self.w3(h))


class LargeDiT(nn.Module):
    """Latents `(N, C, S, S)`, timesteps and classes `(N,)` -> noise and variance `(N, 2C, S, S)`."""

    def __init__(self, *, layers, heads, head_dim, sample_size, patch, channels, classes):
        super().__init__()
        width = heads * head_dim
        condition = min(width, MAX_CONDITION_SIZE)
        self.patch, self.side = patch, sample_size // patch
        self.embed_x = nn.Linear(patch * patch * channels, width)
        self.embed_t = nn.Sequential(nn.Linear(256, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.embed_y = nn.Embedding(classes + 1, condition)
        self.blocks = nn.ModuleList(Block(width, heads, condition) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * width))
        self.out = nn.Linear(width, patch * patch * 2 * channels)
        angles = torch.outer(torch.arange(self.side**2), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim))
        self.turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]  # (1, T, 1, head_dim / 2)

    def forward(self, x, t, y):
        p, side = self.patch, self.side
        x = self.embed_x(F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2))  # (N, T, D)
        angles = t.float()[:, None] * torch.exp(torch.arange(128) * (-math.log(10000) / 128))
        c = self.embed_t(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.embed_y(y)
        for block in self.blocks:
            x = block(x, c, self.turns)
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=2)
        x = self.out(self.norm(x) * (1 + scale) + shift)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), p)
