"""The autoencoder of latent diffusion (LDM) with random weights, written down from its equations and official names."""

import numpy as np
import paddle
import paddle.nn.functional as F


class LdmVae:
    """Computes moments and images, and has in `state` the weights by official name, `{name: float32 array}`."""

    def __init__(self, seed=0, *, attn_levels=(), mid_attention=True, quant_convs=True, **config):
        self.config = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "embed_dim": 4}
        self.config |= {"in_channels": 3, "out_ch": 3, "resolution": 64, "double_z": True, **config}
        self.config["attn_resolutions"] = [self.config["resolution"] >> level for level in attn_levels]
        self.attn_levels, self.mid_attention, self.quant_convs = attn_levels, mid_attention, quant_convs
        self.widths = [self.config["ch"] * mult for mult in self.config["ch_mult"]]
        self.state, self._rng = {}, np.random.default_rng(seed)
        side = 1 << len(self.widths)
        self.decode(self.encode(paddle.zeros([1, self.config["in_channels"], side, side]))[:, : self.latent_channels])

    @property
    def latent_channels(self):
        return self.config["embed_dim"] if self.quant_convs else self.config["z_channels"]

    @paddle.no_grad()
    def encode(self, x):
        """Moments (N, 2 C, h, w) of images (N, c, H, W)."""
        x = self._conv("encoder.conv_in", x, self.config["ch"])
        for level, width in enumerate(self.widths):
            x = self._level(f"encoder.down.{level}", x, level, width, self.config["num_res_blocks"])
            if level < len(self.widths) - 1:
                x = self._conv(f"encoder.down.{level}.downsample.conv", F.pad(x, [0, 1, 0, 1]), width, stride=2)
        x = self._mid("encoder.mid", x)
        x = self._conv("encoder.conv_out", F.silu(self._norm("encoder.norm_out", x)), 2 * self.config["z_channels"])
        return self._conv("quant_conv", x, 2 * self.config["embed_dim"], 1) if self.quant_convs else x

    @paddle.no_grad()
    def decode(self, z):
        """Images (N, c, H, W) of latents (N, C, h, w)."""
        z = self._conv("post_quant_conv", z, self.config["z_channels"], 1) if self.quant_convs else z
        x = self._mid("decoder.mid", self._conv("decoder.conv_in", z, self.widths[-1], 3))
        for level in reversed(range(len(self.widths))):
            width = self.widths[level]
            x = self._level(f"decoder.up.{level}", x, level, width, self.config["num_res_blocks"] + 1)
            if level > 0:
                x = self._conv(f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2), width)
        return self._conv("decoder.conv_out", F.silu(self._norm("decoder.norm_out", x)), self.config["out_ch"])

    def _level(self, name, x, level, width, blocks):
        for block in range(blocks):
            x = self._resnet(f"{name}.block.{block}", x, width)
            x = self._attention(f"{name}.attn.{block}", x) if level in self.attn_levels else x
        return x

    def _mid(self, name, x):
        x = self._resnet(f"{name}.block_1", x, self.widths[-1])
        x = self._attention(f"{name}.attn_1", x) if self.mid_attention else x
        return self._resnet(f"{name}.block_2", x, self.widths[-1])

    def _resnet(self, name, x, width):
        h = self._conv(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", x)), width)
        h = self._conv(f"{name}.conv2", F.silu(self._norm(f"{name}.norm2", h)), width)
        return h + (x if x.shape[1] == width else self._conv(f"{name}.nin_shortcut", x, width, 1))

    def _attention(self, name, x):
        n, c, h, w = x.shape
        normed = self._norm(f"{name}.norm", x)
        q, k, v = (self._conv(f"{name}.{part}", normed, c, 1).reshape([n, c, h * w]) for part in "qkv")
        weights = F.softmax(paddle.matmul(q, k, transpose_x=True) / c**0.5)  # (N, queries, keys)
        mixed = paddle.matmul(v, weights, transpose_y=True).reshape([n, c, h, w])
        return x + self._conv(f"{name}.proj_out", mixed, c, 1)

    def _norm(self, name, x):
        weight = self._weight(f"{name}.weight", [x.shape[1], 1, 1], 0.2, mean=1)
        bias = self._weight(f"{name}.bias", [x.shape[1], 1, 1], 0.2)
        groups = x.reshape([x.shape[0], 32, -1])
        centred = groups - groups.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return normed.reshape(x.shape) * weight + bias

    def _conv(self, name, x, width, size=3, stride=1):
        weight = self._weight(f"{name}.weight", [width, x.shape[1], size, size], (x.shape[1] * size**2) ** -0.5)
        padding = size // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self._weight(f"{name}.bias", [width], 0.3), stride, padding)

    def _weight(self, name, shape, std, mean=0):
        if name not in self.state:
            value = self._rng.standard_normal(shape) * std + mean
            self.state[name] = value.reshape(-1 if len(shape) == 3 else shape).astype("float32")
        return paddle.to_tensor(self.state[name]).reshape(shape)
