"""AdamW, learning-rate schedules, and optimizer state by parameter name."""

import math

import numpy as np
import paddle
from paddle import nn
from paddle.base.framework import EagerParamBase

from training.parallel.shares import Shares, held_name, held_part, inner_optimizer, master_weights


def lr_factor(kind, step, *, warmup_steps, total_steps, num_cycles=0.5, lr_end=0.0, power=1.0, learning_rate=1.0):
    """Factor on the learning rate at optimizer step `step` (0-based): linear warm-up, then the schedule `kind`.

    The formulas are those of PaddleNLP's `get_scheduler`: constant, linear to 0, cosine of `num_cycles` waves,
    polynomial of `power` to `lr_end`. But `constant` has its warm-up too, if one is asked for.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if kind in ("constant", "constant_with_warmup"):
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress)))
    end = lr_end / learning_rate
    return (1.0 - end) * (1.0 - progress) ** power + end


def build_lr_scheduler(training, total_steps):
    """A `LambdaDecay` for the resolved `training` section; `scheduler.step()` once an optimizer step."""

    def factor(step):
        return lr_factor(
            training["lr_scheduler_type"],
            step,
            warmup_steps=training["warmup_steps"],
            total_steps=total_steps,
            num_cycles=training["num_cycles"],
            lr_end=training["lr_end"],
            power=training["power"],
            learning_rate=training["learning_rate"],
        )

    return paddle.optimizer.lr.LambdaDecay(learning_rate=training["learning_rate"], lr_lambda=factor)


class AdamW(paddle.optimizer.AdamW):
    """AdamW that leaves the weights alone in a step that its `GradientNorm`'s watch finds bad.

    Gradients are given up between steps, not filled with zeros: a backward pass writes them instead of adding to them.
    """

    def clear_grad(self, set_to_zero=False):
        super().clear_grad(set_to_zero)

    def _create_param_lr(self, param_and_grad):
        rate = super()._create_param_lr(param_and_grad)
        watch = self._grad_clip.watch
        return rate if watch is None else watch.applied_rate(rate)


def build_optimizer(model, training, lr_scheduler, *, multi_precision=False, watch=None):
    """AdamW over the trainable parameters; its `_grad_clip` is a `GradientNorm` of `max_grad_norm` and the `watch`."""
    return AdamW(
        learning_rate=lr_scheduler,
        parameters=[parameter for parameter in model.parameters() if not parameter.stop_gradient],
        beta1=training["adam_beta1"],
        beta2=training["adam_beta2"],
        epsilon=training["adam_epsilon"],
        weight_decay=training["weight_decay"],
        grad_clip=GradientNorm(training["max_grad_norm"], watch),
        multi_precision=multi_precision,
    )


class GradientNorm(nn.clip.ClipGradBase):
    """Gradient clipping by the global norm over all ranks' parts (Pascanu et al. 2013), which also tells the norm.

    Every wrapper of fleet and of sharding calls the optimizer's `grad_clip` with the gradients of this rank's parts,
    reduced over the data-parallel ranks and without the loss scale. The wrappers replace Paddle's own
    `ClipGradByGlobalNorm` by others; this one they leave alone.

    Args:
        max_norm: gradients of a larger norm are scaled down to it; 0 or less: never.
        watch: the `training.supervision.number_watch.NumberWatch` that judges each step by the norm, or None.

    Attributes:
        square: the squared norm before clipping, a float32 tensor `(1,)` on the device, or None if not measured.
        shares: the rank's `Shares`, once the optimizer has its wrappers; None if it holds everything.
    """

    def __init__(self, max_norm, watch=None):
        super().__init__()
        self.max_norm = max_norm
        self.watch = watch
        self.square = None
        self.shares = None

    def take(self):
        """The norm of the last step as a number, or None; waits for the device."""
        square, self.square = self.square, None
        return None if square is None else float(square) ** 0.5

    @paddle.no_grad()
    def _dygraph_clip(self, params_grads):
        self.square = None
        if self.max_norm <= 0 and self.watch is None:
            return params_grads
        gradients = [(parameter, gradient) for parameter, gradient in params_grads if gradient is not None]
        self.square = square = self._squared_norm(gradients)
        if self.watch is not None:
            square = self.watch.judge(square, [gradient for _, gradient in gradients])
        if self.max_norm > 0:
            scale = self.max_norm / square.sqrt().clip(min=self.max_norm)
            for parameter, gradient in gradients:
                gradient.multiply_(scale.astype(gradient.dtype))
                parameter._reset_grad_inplace_version(True)  # the backward pass is over
        return params_grads

    def _squared_norm(self, gradients):
        sums = {True: [paddle.zeros([1])], False: [paddle.zeros([1])]}  # by whether tensor parallelism split it
        for parameter, gradient in gradients:
            split, weight = self.shares.norm_group(parameter.name) if self.shares is not None else (False, 1.0)
            square = nn.clip._squared_l2_norm(gradient.astype("float32")).reshape([1])
            sums[split].append(square if weight == 1.0 else square * weight)
        split, common = paddle.add_n(sums[True]), paddle.add_n(sums[False])
        if self.shares is not None and self.shares.tensor_group is not None:
            paddle.distributed.all_reduce(split, group=self.shares.tensor_group)
        total = split + common
        if self.shares is not None and self.shares.group is not None:
            paddle.distributed.all_reduce(total, group=self.shares.group)
        return total


_ACCUMULATORS = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")


def _create_accumulators(inner, parameters):
    inner._create_accumulators(paddle.static.default_main_program().global_block(), parameters)


def create_state(optimizer, model, shares=None):
    """Makes AdamW's state of this rank's parts now, at 0.

    Paddle makes it at the first step, where the activations were before: the process then grows by as much.
    """
    optimizer_state(optimizer, model, shares)


def optimizer_state(optimizer, model, shares=None):
    """AdamW's state by the model's parameter names: `{name: {accumulator: tensor, ...}}`, of this rank's parts.

    Paddle's own keys hold `parameter.name` ("linear_3.w_0"), which depends on what else the process built before; the
    model's names don't, so that this state can be loaded by another loop, process or number of ranks.
    """
    shares = shares or Shares(model)
    inner = inner_optimizer(optimizer)
    parameters = {
        name: _keyed(parameter)
        for name, parameter in model.named_parameters()
        if not parameter.stop_gradient and shares.own(name)
    }
    _create_accumulators(inner, list(parameters.values()))
    masters = master_weights(inner)
    state = {}
    for name, parameter in parameters.items():
        state[name] = {key: inner._get_accumulator_master(key, parameter) for key in _ACCUMULATORS}
        if parameter.name in masters:
            state[name]["master_weight"] = masters[parameter.name]
    return state


def _keyed(parameter):
    """What the optimizer keys its state by: sharding stage 3 makes a parameter of every slice, but only at a step."""
    held = held_part(parameter)
    if held is parameter or isinstance(held, EagerParamBase):
        return held
    return EagerParamBase(shape=held.shape, dtype=held.dtype, name=held_name(parameter))


@paddle.no_grad()
def set_optimizer_state(optimizer, model, state, shares=None, weights=None):
    """Gives an optimizer the state that `optimizer_state` returned, made whole (arrays or tensors).

    Args:
        shares: the rank's `Shares`; None if it holds everything.
        weights: float32 weights by name: master weights that the state lacks, because it came from a float32 run.

    Raises:
        ValueError: a parameter or accumulator is missing or has another shape.
    """
    shares = shares or Shares(model)
    shapes = shares.whole_shapes()
    for name, accumulators in optimizer_state(optimizer, model, shares).items():
        for key, tensor in accumulators.items():
            entry = state.get(name, {})
            if key == "master_weight" and key not in entry and weights is not None:
                entry = {key: weights[name]}
            if key not in entry:
                raise ValueError(f"the optimizer state has no {key} of {name}")
            value = np.asarray(entry[key])
            shape = list(tensor.shape) if key.endswith("pow_acc") else shapes[name]
            if value.size != np.prod(shape):
                raise ValueError(f"the optimizer state's {key} of {name} has shape {list(value.shape)}, not {shape}")
            value = value.reshape(shape)
            value = value if key.endswith("pow_acc") else shares.part(name, value)
            paddle.assign(paddle.to_tensor(value).astype("float32"), output=tensor)
