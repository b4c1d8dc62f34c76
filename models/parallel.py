"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019): the one place that chooses between whole and split layers.

A network built inside `with tensor_parallel(group):` holds this rank's part of the wide matrices, in the layers of
Paddle's fleet: queries, keys, values and the first MLP matrix by column, what follows them by row, the modulations of
the blocks by column with the output gathered. Everything else is whole on every rank. All ranks of a group must be
given the same batch and random numbers; their outputs are the whole network's, and so are its initial weights.
"""

import contextlib
import functools
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from . import cpu_ops

_group = None  # of the network that is being built; None: a whole one


@contextlib.contextmanager
def tensor_parallel(group):
    """Networks built inside are split over `group`, a `paddle.distributed` group that fleet has made; None: whole."""
    global _group
    before, _group = _group, group if group is not None and group.nranks > 1 else None
    if _group is not None:
        # fleet's layers take a generator of their own, although nothing is drawn from it here.
        from paddle.distributed.fleet.layers.mpu.random import MODEL_PARALLEL_RNG, get_rng_state_tracker

        tracker = get_rng_state_tracker()
        if MODEL_PARALLEL_RNG not in tracker.states_:
            state = paddle.get_rng_state()
            tracker.add(MODEL_PARALLEL_RNG, 1 + max(tracker.seeds_, default=0))
            paddle.set_rng_state(state)
    try:
        yield
    finally:
        _group = before


@dataclass(frozen=True)
class Split:
    """How a parameter is cut: axis `axis` of the whole one holds `segments` equal blocks, each cut evenly over `group`.

    A joint projection to queries, keys and values has three segments: every rank holds its heads of each.
    """

    axis: int
    segments: int
    group: object

    def whole_shape(self, shape):
        """Shape of the whole parameter, of the shape of a part."""
        shape = list(shape)
        shape[self.axis] *= self.group.nranks
        return shape

    def _blocks(self, shape):
        before, after = shape[: self.axis], shape[self.axis + 1 :]
        width = shape[self.axis] // (self.segments * self.group.nranks)
        return before, [self.segments, self.group.nranks, width], after

    def part(self, whole):
        """This rank's part of a whole array or tensor."""
        before, blocks, after = self._blocks(list(whole.shape))
        index = (*[slice(None)] * (len(before) + 1), self.group.rank)
        return whole.reshape([*before, *blocks, *after])[index].reshape([*before, blocks[0] * blocks[2], *after])

    def merge(self, parts):
        """The whole array of all ranks' parts, arrays in the group's order."""
        shape = self.whole_shape(parts[0].shape)
        before, (segments, _, width), after = self._blocks(shape)
        parts = [part.reshape([*before, segments, width, *after]) for part in parts]
        return np.stack(parts, axis=len(before) + 1).reshape(shape)


def _mark(parameter, axis, segments=1):
    # fleet counts the gradients of parameters that are not `is_distributed` once per group, and makes those equal.
    parameter.is_distributed = True
    parameter.parallel_split = Split(axis, segments, _group)


def whole_shape(parameter):
    """Shape of a parameter in the whole network."""
    split = getattr(parameter, "parallel_split", None)
    return list(parameter.shape) if split is None else split.whole_shape(parameter.shape)


def rank_part(parameter, whole):
    """What this rank holds of a whole array or tensor that belongs to `parameter`."""
    split = getattr(parameter, "parallel_split", None)
    return whole if split is None else split.part(whole)


def initialize(parameter, initializer):
    """Initialises a parameter as in the whole network: a rank draws all of it, and keeps its part."""
    split = getattr(parameter, "parallel_split", None)
    if split is None:
        initializer(parameter)
        return
    shape = split.whole_shape(parameter.shape)
    whole = paddle.create_parameter(shape, parameter.dtype, default_initializer=initializer)
    parameter.set_value(split.part(whole))


def _undrawn():
    # Networks initialise every weight themselves: random numbers drawn here would be thrown away, and how many they
    # are would depend on the degree.
    return paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))


class Linear(cpu_ops.Layer, nn.Linear):
    """`nn.Linear`, which a CPU computes with `models.cpu_ops`."""

    def forward(self, x, gelu=False):
        """`x @ weight + bias` of x `(..., in)`, or of GELU (tanh approximation) of x."""
        if self.bias is not None and self.fast(x, self.weight):
            return cpu_ops.linear(x, self.weight, self.bias, gelu=gelu)
        return super().forward(F.gelu(x, approximate=True) if gelu else x)


def linear(in_features, out_features, bias=True):
    """A whole Linear; its weight is 0 until the network initialises it."""
    return Linear(in_features, out_features, weight_attr=_undrawn(), bias_attr=None if bias else False)


def column_linear(in_features, out_features, bias=True, *, segments=1, gather=False, shared_input=False):
    """A Linear whose output is split over the group.

    Args:
        segments: see `Split`.
        gather: give every rank the whole output.
        shared_input: the input comes from a `SharedInput`, which sums its gradient over the group for all its users.
    """
    if _group is None:
        return linear(in_features, out_features, bias)
    make = _shared_column_class() if shared_input else _fleet_layers().ColumnParallelLinear
    layer = make(
        in_features, out_features, weight_attr=_undrawn(), has_bias=bias, gather_output=gather, mp_group=_group
    )
    _mark(layer.weight, 1, segments)
    if bias:
        _mark(layer.bias, 0, segments)
    return layer


def row_linear(in_features, out_features, bias=True):
    """A Linear whose input is split over the group and whose output is whole on every rank."""
    if _group is None:
        return linear(in_features, out_features, bias)
    layer = _fleet_layers().RowParallelLinear(
        in_features, out_features, weight_attr=_undrawn(), has_bias=bias, input_is_parallel=True, mp_group=_group
    )
    _mark(layer.weight, 0)
    return layer


def linear_of_gelu(layer, x):
    """GELU (tanh approximation) of x, then `layer`: one of this module's."""
    return layer(x, gelu=True) if isinstance(layer, Linear) else layer(F.gelu(x, approximate=True))


def _fleet_layers():
    from paddle.distributed.fleet import meta_parallel

    return meta_parallel


@functools.cache
def _shared_column_class():
    class SharedColumnLinear(_fleet_layers().ColumnParallelLinear):
        """`ColumnParallelLinear` without the sum of the input's gradient, and never gathered."""

        def forward(self, x):
            return self.linear(x, self.weight, self.bias)

    return SharedColumnLinear


class SharedInput(nn.Layer):
    """The identity; in the backward pass the gradient is summed over the group, once for all layers that share it."""

    def __init__(self):
        super().__init__()
        self._group = _group

    def forward(self, x):
        if self._group is None:
            return x
        from paddle.distributed.fleet.layers.mpu import mp_ops

        return mp_ops._c_identity(x, group=self._group)


def layer_norm(width, epsilon):
    """Layer norm over a width that the group shares: statistics of the whole width, weight and bias of this part."""
    if _group is None:
        return _LayerNorm(width, epsilon=epsilon)
    return _SplitLayerNorm(width, epsilon)


class _LayerNorm(cpu_ops.Layer, nn.LayerNorm):
    def forward(self, x):
        # Where nobody asks for the weight's gradient, Paddle's CPU kernel leaves the weight out of the input's. Whether
        # somebody will is known for a promised backward pass alone.
        promised = self.single_backward and not self.weight.stop_gradient
        eager = paddle.in_dynamic_mode()  # while a program is traced, x has no place, and nobody asks for gradients
        if eager and paddle.is_grad_enabled() and x.place.is_cpu_place() and not promised:
            return F.layer_norm(x, x.shape[-1:], epsilon=self._epsilon) * self.weight + self.bias
        return super().forward(x)


class _SplitLayerNorm(nn.Layer):
    def __init__(self, width, epsilon):
        super().__init__()
        self._group, self._epsilon = _group, epsilon
        self._cast_to_low_precision = False  # AMP O2 leaves `nn.LayerNorm` in float32 too
        part = [width // _group.nranks]
        self.weight = self.create_parameter(part, default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter(part, is_bias=True)
        _mark(self.weight, 0)
        _mark(self.bias, 0)

    def forward(self, x):
        from paddle.distributed.fleet.layers.mpu import mp_ops

        with paddle.amp.auto_cast(enable=False):
            x = x.astype("float32")
            mean = x.mean(-1, keepdim=True)
            variance = (x - mean).square().mean(-1, keepdim=True)
            # The parts have the same width: mean of the means; mean of the variances, and the variance of the means.
            parts = mp_ops._c_concat(paddle.concat([mean, variance], axis=-1), group=self._group)
            # Every rank computes with all parts, but with its own x: their gradients are to be summed.
            parts = mp_ops._c_identity(parts, group=self._group).reshape([*x.shape[:-1], self._group.nranks, 2])
            means, variances = parts.unbind(-1)  # (..., ranks)
            mean = means.mean(-1, keepdim=True)
            variance = variances.mean(-1, keepdim=True) + (means - mean).square().mean(-1, keepdim=True)
            normal = (x - mean) * paddle.rsqrt(variance + self._epsilon)
            return normal * self.weight.astype("float32") + self.bias.astype("float32")
