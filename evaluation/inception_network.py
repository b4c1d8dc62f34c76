"""The Inception network of 2015-12-05, which FID is defined by, with its batch norms folded into the convolutions.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015, as it stands in TensorFlow's graph
`classify_image_graph_def.pb`: average pools leave the padding out of the mean, and the last block has a max pool.
Weights have the names of pytorch-fid.
"""

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

BATCH_NORM_EPS = 1e-3
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of the first branch of `SPATIAL_BLOCK`: what sFID looks at (Nash et al., 2021)
SPATIAL_BLOCK = "Mixed_6d"


def _conv(name, channels, height=1, width=None, stride=1, padding=None):
    """Returns a convolution as `(name, output channels, kernel, stride, padding)`; with stride 1 it keeps the size."""
    kernel = (height, width or height)
    if padding is None:
        padding = 0 if stride == 2 else tuple((side - 1) // 2 for side in kernel)
    return name, channels, kernel, stride, padding


def _block_a(pool):
    return (
        (_conv("branch1x1", 64),),
        (_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)),
        (_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)),
        ("average", _conv("branch_pool", pool)),
    )


def _block_c(n):
    return (
        (_conv("branch1x1", 192),),
        (_conv("branch7x7_1", n), _conv("branch7x7_2", n, 1, 7), _conv("branch7x7_3", 192, 7, 1)),
        (
            *(_conv("branch7x7dbl_1", n), _conv("branch7x7dbl_2", n, 7, 1), _conv("branch7x7dbl_3", n, 1, 7)),
            *(_conv("branch7x7dbl_4", n, 7, 1), _conv("branch7x7dbl_5", 192, 1, 7)),
        ),
        ("average", _conv("branch_pool", 192)),
    )


def _block_e(pool):
    return (
        (_conv("branch1x1", 320),),
        (_conv("branch3x3_1", 384), [_conv("branch3x3_2a", 384, 1, 3), _conv("branch3x3_2b", 384, 3, 1)]),
        (
            *(_conv("branch3x3dbl_1", 448), _conv("branch3x3dbl_2", 384, 3)),
            [_conv("branch3x3dbl_3a", 384, 1, 3), _conv("branch3x3dbl_3b", 384, 3, 1)],
        ),
        (pool, _conv("branch_pool", 192)),
    )


# A branch is a chain of steps: a pool by its name, a convolution, or a list of those side by side, which are joined.
POOLS = {
    "max": lambda x: F.max_pool2d(x, 3, 2),
    "max, size kept": lambda x: F.max_pool2d(x, 3, 1, padding=1),
    "average": lambda x: F.avg_pool2d(x, 3, 1, padding=1, exclusive=True),
}
STEM = (
    *(_conv("Conv2d_1a_3x3", 32, 3, stride=2), _conv("Conv2d_2a_3x3", 32, 3, padding=0), _conv("Conv2d_2b_3x3", 64, 3)),
    *("max", _conv("Conv2d_3b_1x1", 80), _conv("Conv2d_4a_3x3", 192, 3, padding=0), "max"),
)
# {block: its branches, whose outputs are joined}
BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        (_conv("branch3x3", 384, 3, stride=2),),
        (_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3, stride=2)),
        ("max",),
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        (_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, stride=2)),
        (
            *(_conv("branch7x7x3_1", 192), _conv("branch7x7x3_2", 192, 1, 7), _conv("branch7x7x3_3", 192, 7, 1)),
            _conv("branch7x7x3_4", 192, 3, stride=2),
        ),
        ("max",),
    ),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max, size kept"),
}


class InceptionNetwork(nn.Layer):
    """Maps float32 images (N, 3, 299, 299), scaled to about [-1, 1], to `(pool, spatial, logits)`.

    They are (N, 2048), the mean over the last 8x8; (N, 2023), 7 channels of 17x17 in the order row, column, channel;
    and (N, 1008), without a bias. All weights are 0 at first, so that no random number is drawn: see `set_weights`.
    """

    def __init__(self):
        super().__init__(dtype="float32")
        self.convolutions = {}
        channels = self._add_chain("", STEM, 3)
        for block, branches in BLOCKS.items():
            channels = sum(self._add_chain(f"{block}.", branch, channels) for branch in branches)
        self.class_weights = self._add_parameter([channels, CLASSES])
        self.eval()

    def _add_parameter(self, shape):
        return self.create_parameter(shape, dtype="float32", default_initializer=nn.initializer.Constant(0.0))

    def _add_chain(self, prefix, steps, channels):
        """Adds the convolutions of a chain whose input has `channels`; returns the channels of its output."""
        for step in steps:
            side_by_side = step if isinstance(step, list) else [] if step in POOLS else [step]
            for name, out_channels, kernel, stride, padding in side_by_side:
                weight, bias = (
                    self._add_parameter([out_channels, channels, *kernel]),
                    self._add_parameter([out_channels]),
                )
                label = f"{prefix}{name}"
                self.add_parameter(f"{label}.weight".replace(".", "_"), weight)
                self.add_parameter(f"{label}.bias".replace(".", "_"), bias)
                self.convolutions[label] = weight, bias, stride, padding
            channels = sum(step[1] for step in side_by_side) or channels
        return channels

    def file_shapes(self):
        """Returns `{name: shape}` of what a file of weights must have."""
        shapes = {"fc.weight": (CLASSES, self.class_weights.shape[0])}
        for name, (weight, bias, _, _) in self.convolutions.items():
            shapes[f"{name}.conv.weight"] = tuple(weight.shape)
            for key in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{name}.bn.{key}"] = tuple(bias.shape)
        return shapes

    def set_weights(self, state):
        """Takes the weights of a file, `{name: array}` with the names and shapes of `file_shapes`."""
        self.class_weights.set_value(np.ascontiguousarray(state["fc.weight"].T.astype("float32")))
        for name, (weight, bias, _, _) in self.convolutions.items():
            keys = ("weight", "bias", "running_mean", "running_var")
            scale, shift, mean, variance = (state[f"{name}.bn.{key}"].astype("float64") for key in keys)
            scale = scale / np.sqrt(variance + BATCH_NORM_EPS)
            kernel = state[f"{name}.conv.weight"].astype("float64") * scale[:, None, None, None]
            weight.set_value(kernel.astype("float32"))
            bias.set_value((shift - mean * scale).astype("float32"))

    def _run_chain(self, prefix, steps, x):
        for step in steps:
            if isinstance(step, list):
                x = paddle.concat([self._run_chain(prefix, [one], x) for one in step], axis=1)
            elif step in POOLS:
                x = POOLS[step](x)
            else:
                weight, bias, stride, padding = self.convolutions[prefix + step[0]]
                x = F.relu(F.conv2d(x, weight, bias, stride, padding))
        return x

    @paddle.jit.not_to_static  # there is nothing to rewrite in it: no branch depends on a tensor
    def forward(self, x):
        x = self._run_chain("", STEM, x)  # (N, 192, 35, 35)
        for block, branches in BLOCKS.items():
            outputs = [self._run_chain(f"{block}.", branch, x) for branch in branches]
            x = paddle.concat(outputs, axis=1)
            if block == SPATIAL_BLOCK:
                spatial = outputs[0][:, :SPATIAL_CHANNELS].transpose([0, 2, 3, 1]).flatten(1)  # (N, 17 * 17 * 7)
        pool = F.avg_pool2d(x, 8).flatten(1)  # (N, 2048) of (N, 2048, 8, 8)
        return pool, spatial, paddle.matmul(pool, self.class_weights)
