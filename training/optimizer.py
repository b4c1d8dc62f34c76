"""AdamW, learning-rate schedules, and optimizer state by parameter name.

An update goes through these stations, none of which waits for the device:

1. `NumberWatch.begin_update` tells the watch which step comes.
2. `scaler.step(optimizer)` takes the loss scale out of the gradients and, unless they overflowed, calls the optimizer;
   fleet's and the sharding wrappers hand it the gradients of this rank's parts.
3. `GradientNorm.clip` measures their norm over all ranks. By it and by the loss the watch judges the step
   (`NumberWatch.judge`): the gradients of a bad one become 0. Then it clips.
4. `NumberWatch.applied_rate`: the learning rate of a bad step becomes 0 too, so that weight decay changes nothing.
   AdamW's moments decay.
5. `NumberWatch.end_update` closes the step's books.
"""

import math

import numpy as np
import paddle

from runtime import paddle_private
from training import flat
from training.parallel.shares import LocalShard, local_tensor, optimizer_key


def lr_factor(training, step, total_steps):
    """Returns the factor on the learning rate at step `step` (0-based): linear warm-up, then the schedule.

    The formulas are those of PaddleNLP's `get_scheduler`, but `constant` has its warm-up too, if one is asked for.
    """
    kind, warmup_steps = training["lr_scheduler_type"], training["warmup_steps"]
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if kind in ("constant", "constant_with_warmup"):
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * training["num_cycles"] * 2.0 * progress)))
    end = training["lr_end"] / training["learning_rate"]
    return (1.0 - end) * (1.0 - progress) ** training["power"] + end


def build_lr_scheduler(training, total_steps):
    """Returns a `LambdaDecay` for the resolved `training` section; `scheduler.step()` once an optimizer step."""
    return paddle.optimizer.lr.LambdaDecay(
        learning_rate=training["learning_rate"], lr_lambda=lambda step: lr_factor(training, step, total_steps)
    )


def build_optimizer(model, training, lr_scheduler, *, multi_precision=False, watch=None):
    """Returns AdamW over the trainable parameters, with its `GradientNorm` as `gradient_norm`.

    `multi_precision` keeps float32 masters of half-precision weights; `watch` is a `NumberWatch`, which judges steps.
    """
    gradient_norm = GradientNorm(training["max_grad_norm"], LocalShard(model), watch)
    optimizer = paddle_private.make_adamw(
        watch.applied_rate if watch is not None else lambda rate: rate,
        learning_rate=lr_scheduler,
        parameters=[parameter for parameter in model.parameters() if not parameter.stop_gradient],
        beta1=training["adam_beta1"],
        beta2=training["adam_beta2"],
        epsilon=training["adam_epsilon"],
        weight_decay=training["weight_decay"],
        grad_clip=paddle_private.make_gradient_clip(gradient_norm.clip),
        multi_precision=multi_precision,
    )
    optimizer.gradient_norm = gradient_norm
    return optimizer


class GradientNorm:
    """Clips gradients by the global norm over all ranks' parts (Pascanu et al. 2013), and tells the norm before it.

    Args:
        max_norm: gradients of a larger norm are scaled down to it; 0 or less: never.
        shard: the rank's `LocalShard`; another one takes its place once the optimizer has its wrappers.
    """

    def __init__(self, max_norm, shard, watch):
        self.max_norm, self.shard, self.watch = max_norm, shard, watch
        self._square = None  # of the norm, float32 (1,), on the device

    def take(self):
        """Returns the norm of the last step as a number, or None; waits for the device."""
        square, self._square = self._square, None
        return None if square is None else float(square) ** 0.5

    @paddle.no_grad()
    def clip(self, params_grads):
        """Measures, judges and clips the gradients `[(parameter, gradient), ...]` of this rank's parts, in place."""
        gradients = [(parameter, gradient) for parameter, gradient in params_grads if gradient is not None]
        self._square = square = self._squared_norm(gradients)
        if self.watch is not None:
            square = self.watch.judge(square, [gradient for _, gradient in gradients])
        if self.max_norm > 0:
            scale = self.max_norm / square.sqrt().clip(min=self.max_norm)
            for parameter, gradient in gradients:
                paddle_private.scale_gradient(parameter, gradient, scale)
        return params_grads

    def _squared_norm(self, gradients):
        alike = {}  # gradients by how they add to the norm
        for parameter, gradient in gradients:
            alike.setdefault(self.shard.norm_weight(parameter.name), []).append(gradient)
        sums = {True: [paddle.zeros([1])], False: [paddle.zeros([1])]}  # by whether tensor parallelism split it
        for (split, weight), same in alike.items():
            sums[split] += [square if weight == 1.0 else square * weight for square in flat.squared_norms(same)]
        total = paddle.add_n(sums[False])
        if self.shard.tensor_group is not None:
            split = paddle.add_n(sums[True])
            paddle.distributed.all_reduce(split, group=self.shard.tensor_group)
            total = split + total
        if self.shard.group is not None:
            paddle.distributed.all_reduce(total, group=self.shard.group)
        return total


ACCUMULATORS = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")


def optimizer_state(optimizer, model):
    """Returns AdamW's state by the model's parameter names: `{name: {accumulator: tensor}}`, of this rank's parts.

    Paddle's own keys hold `parameter.name` ("linear_3.w_0"), which depends on what else the process built before.
    State that is not there yet is made, at 0: called before training, it is not made at the first step, in memory where
    activations were before, by which the process would then grow.
    """
    shard, inner = LocalShard(model, optimizer), paddle_private.inner_optimizer(optimizer)
    # Sharding stage 3 makes a parameter of every slice, but only at a step.
    parameters = {
        name: paddle_private.slice_parameter(local_tensor(parameter), optimizer_key(parameter))
        for name, parameter in model.named_parameters()
        if not parameter.stop_gradient and shard.owns(name)
    }
    accumulators = paddle_private.adamw_accumulators(inner, list(parameters.values()), ACCUMULATORS)
    masters = paddle_private.master_weights(inner)
    state = dict(zip(parameters, accumulators, strict=True))
    for name, parameter in parameters.items():
        if parameter.name in masters:
            state[name]["master_weight"] = masters[parameter.name]
    return state


@paddle.no_grad()
def set_optimizer_state(optimizer, model, state, weights=None, new=()):
    """Gives an optimizer the state that `optimizer_state` returned, made whole (arrays or tensors).

    `weights` by name, float32, are the master weights that the state of a float32 run lacks. The parameters `new`, by
    name, begin without a state. Raises ValueError for a parameter or accumulator that is missing or has another shape.
    """
    shard = LocalShard(model, optimizer)
    shapes = shard.whole_shapes()
    for name, accumulators in optimizer_state(optimizer, model).items():
        for key, tensor in accumulators.items() if name not in new else ():
            value = state.get(name, {}).get(key)
            if value is None and key == "master_weight" and weights is not None:
                value = weights[name]
            if value is None:
                raise ValueError(f"the optimizer state has no {key} of {name}")
            is_number, value = key.endswith("pow_acc"), np.asarray(value)
            shape = [1] if is_number else shapes[name]
            if value.size != np.prod(shape):
                raise ValueError(f"the optimizer state's {key} of {name} has shape {list(value.shape)}, not {shape}")
            value = value.reshape(shape) if is_number else shard.part(name, value.reshape(shape))
            paddle.assign(paddle.to_tensor(value).astype("float32"), output=tensor)
