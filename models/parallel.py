"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019): the one place that chooses between whole and split layers.

A network built with a `group` of ranks holds this rank's part of the wide matrices, in the layers of Paddle's fleet:
queries, keys, values and the first MLP matrix by column, what follows them by row, the modulations of the blocks by
column with the output gathered. Everything else is replicated. All ranks of a group must be given the same batch and
random numbers; their outputs are the whole network's, and so are its initial weights.

In this module `group` is a `paddle.distributed` group that fleet has made, or None for a whole layer.
"""

from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.distributed.fleet import meta_parallel
from paddle.distributed.fleet.layers.mpu.random import MODEL_PARALLEL_RNG, get_rng_state_tracker
from paddle.nn import functional as F

from runtime.paddle_private import concat_over_group, keep_own_parameters_float32, sum_gradient_over_group

from . import ops


def prepare_group(group):
    """Returns the group to build a network with, None if it has one rank; fleet's layers can be made after this."""
    if group is None or group.nranks == 1:
        return None
    # fleet's layers take a generator of their own, although nothing is drawn from it here.
    tracker = get_rng_state_tracker()
    if MODEL_PARALLEL_RNG not in tracker.states_:
        state = paddle.get_rng_state()
        tracker.add(MODEL_PARALLEL_RNG, 1 + max(tracker.seeds_, default=0))
        paddle.set_rng_state(state)
    return group


@dataclass(frozen=True)
class Split:
    """How a parameter is cut: axis `axis` of the whole one holds `segments` equal blocks, each cut evenly over `group`.

    A joint projection to queries, keys and values has three segments: every rank holds its heads of each.
    """

    axis: int
    segments: int
    group: object

    def _replaced(self, shape, *sizes):
        return [*shape[: self.axis], *sizes, *shape[self.axis + 1 :]]

    def whole_shape(self, shape):
        """Returns the shape of the whole parameter, from that of a part."""
        return self._replaced(shape, shape[self.axis] * self.group.nranks)

    def part(self, whole):
        """Returns this rank's part of a whole array or tensor."""
        blocks = whole.reshape(self._replaced(whole.shape, self.segments, self.group.nranks, -1))
        own = blocks[(*[slice(None)] * (self.axis + 1), self.group.rank)]
        return own.reshape(self._replaced(whole.shape, -1))

    def merge(self, parts):
        """Returns the whole array, from all ranks' parts, arrays in the group's order."""
        shape = parts[0].shape
        blocks = [part.reshape(self._replaced(shape, self.segments, -1)) for part in parts]
        return np.stack(blocks, axis=self.axis + 1).reshape(self._replaced(shape, -1))


def _mark(parameter, axis, group, segments=1):
    # Without `is_distributed`, fleet would treat this parameter as replicated: average its gradient and count it once
    # in the norm.
    parameter.is_distributed = True
    parameter.parallel_split = Split(axis, segments, group)


def whole_shape(parameter):
    """Returns the shape of a parameter in the whole network."""
    split = getattr(parameter, "parallel_split", None)
    return list(parameter.shape) if split is None else split.whole_shape(parameter.shape)


def rank_part(parameter, whole):
    """Returns what this rank holds of a whole array or tensor that belongs to `parameter`."""
    split = getattr(parameter, "parallel_split", None)
    return whole if split is None else split.part(whole)


def initialize(parameter, initializer):
    """Initialises a parameter as in the whole network: a rank draws all of it, and keeps its part."""
    if not hasattr(parameter, "parallel_split"):
        initializer(parameter)
        return
    whole = paddle.create_parameter(whole_shape(parameter), parameter.dtype, default_initializer=initializer)
    parameter.set_value(rank_part(parameter, whole))


def _undrawn():
    # Networks initialise every weight themselves: random numbers drawn here would be thrown away, and how many they
    # are would depend on the degree.
    return paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))


class Linear(ops.Layer, nn.Linear):
    """A whole linear layer: x `(..., in)` -> `(..., out)`; with `gelu`, of GELU (tanh approximation) of x.

    Nobody else uses its weight: under sharding stage 3 it is there only while the layer is called.
    """

    def forward(self, x, gelu=False):
        return self.ops.linear(x, self.weight, self.bias, gelu=gelu)


class SharedColumnLinear(meta_parallel.ColumnParallelLinear):
    """fleet's layer split by column, for an input that comes from `share_input`; the output is never gathered."""

    def forward(self, x):
        return self.linear(x, self.weight, self.bias)


def linear_of_gelu(layer, x):
    """Returns `layer` of GELU (tanh approximation) of x `(..., K)`; layer: a linear one, whole or split.

    A whole one takes the GELU itself: its weight may be there only while it is called (sharding stage 3).
    """
    return layer(x, gelu=True) if isinstance(layer, Linear) else layer(F.gelu(x, approximate=True))


LINEARS = (nn.Linear, meta_parallel.ColumnParallelLinear, meta_parallel.RowParallelLinear)


def linear(in_features, out_features, bias=True):
    """Returns a whole linear layer; its weight is 0 until the network initialises it."""
    return Linear(in_features, out_features, weight_attr=_undrawn(), bias_attr=None if bias else False)


def column_linear(in_features, out_features, bias=True, *, group, segments=1, gather=False, shared_input=False):
    """Returns a linear layer whose output is split over the group in `segments` (see `Split`); whole with `gather`.

    With `shared_input` the input comes from `share_input`.
    """
    if group is None:
        return linear(in_features, out_features, bias)
    make = SharedColumnLinear if shared_input else meta_parallel.ColumnParallelLinear
    layer = make(in_features, out_features, weight_attr=_undrawn(), has_bias=bias, gather_output=gather, mp_group=group)
    _mark(layer.weight, 1, group, segments)
    if bias:
        _mark(layer.bias, 0, group, segments)
    return layer


def row_linear(in_features, out_features, bias=True, *, group):
    """Returns a linear layer whose input is split over the group and whose output is replicated."""
    if group is None:
        return linear(in_features, out_features, bias)
    layer = meta_parallel.RowParallelLinear(
        in_features, out_features, weight_attr=_undrawn(), has_bias=bias, input_is_parallel=True, mp_group=group
    )
    _mark(layer.weight, 0, group)
    return layer


def share_input(x, group):
    """Returns x; in the backward pass the gradient is summed over the group, once for all layers that share it."""
    return x if group is None else sum_gradient_over_group(x, group)


def layer_norm(width, epsilon, *, group):
    """Returns a layer norm over a width that the group shares: whole statistics, this part's weight and bias."""
    return LayerNorm(width, epsilon) if group is None else SplitLayerNorm(width, epsilon, group)


class LayerNorm(ops.Layer, nn.LayerNorm):
    """`nn.LayerNorm`, with right gradients where its weight is frozen.

    `group`: ranks of which each norms other rows, so that the gradients of weight and bias are summed over them.
    """

    def __init__(self, width, epsilon, group=None):
        super().__init__(width, epsilon=epsilon)
        self.epsilon, self.group = epsilon, group

    def forward(self, x):
        weight, bias = (share_input(part, self.group) for part in (self.weight, self.bias))
        return self.ops.layer_norm(x, weight, bias, epsilon=self.epsilon)


class SplitLayerNorm(nn.Layer):
    """Layer norm of x `(..., width)` of which every rank holds `(..., width / ranks)`."""

    def __init__(self, width, epsilon, group):
        super().__init__()
        self.group, self.epsilon = group, epsilon
        keep_own_parameters_float32(self)  # as AMP O2 does with `nn.LayerNorm`
        part = [width // group.nranks]
        self.weight = self.create_parameter(part, default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter(part, is_bias=True)
        _mark(self.weight, 0, group)
        _mark(self.bias, 0, group)

    def forward(self, x):
        with paddle.amp.auto_cast(enable=False):
            x = x.astype("float32")
            mean = x.mean(-1, keepdim=True)
            variance = (x - mean).square().mean(-1, keepdim=True)
            # The parts have the same width: mean of the means; mean of the variances, and the variance of the means.
            parts = concat_over_group(paddle.concat([mean, variance], axis=-1), self.group)
            # Every rank computes with all parts, but with its own x: their gradients are to be summed.
            parts = sum_gradient_over_group(parts, self.group).reshape([*x.shape[:-1], self.group.nranks, 2])
            means, variances = parts.unbind(-1)  # (..., ranks)
            mean = means.mean(-1, keepdim=True)
            variance = variances.mean(-1, keepdim=True) + (means - mean).square().mean(-1, keepdim=True)
            normal = (x - mean) * paddle.rsqrt(variance + self.epsilon)
            return normal * self.weight.astype("float32") + self.bias.astype("float32")
