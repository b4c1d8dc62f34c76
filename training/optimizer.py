"""AdamW, learning-rate schedules, and optimizer state by parameter name."""

import math

import paddle
from paddle import nn


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


def build_optimizer(model, training, lr_scheduler, *, multi_precision=False):
    """AdamW over the trainable parameters, with gradient clipping by global norm if `max_grad_norm` is above 0."""
    max_norm = training["max_grad_norm"]
    return paddle.optimizer.AdamW(
        learning_rate=lr_scheduler,
        parameters=[parameter for parameter in model.parameters() if not parameter.stop_gradient],
        beta1=training["adam_beta1"],
        beta2=training["adam_beta2"],
        epsilon=training["adam_epsilon"],
        weight_decay=training["weight_decay"],
        grad_clip=nn.ClipGradByGlobalNorm(max_norm) if max_norm > 0 else None,
        multi_precision=multi_precision,
    )


@paddle.no_grad()
def squared_grad_norm(parameters):
    """Sum of the squared gradients as a float32 tensor on the device; does not wait for it."""
    squares = [
        parameter.grad.astype("float32").square().sum() for parameter in parameters if parameter.grad is not None
    ]
    return paddle.add_n(squares) if squares else paddle.zeros([])


def inner_optimizer(optimizer):
    """The Paddle optimizer inside fleet's and the sharding wrappers."""
    while hasattr(optimizer, "_inner_opt"):
        optimizer = optimizer._inner_opt
    return optimizer


def master_weights(optimizer):
    """Float32 master weights by `parameter.name`; empty unless the optimizer keeps some (AMP O2)."""
    return getattr(inner_optimizer(optimizer), "_master_weights", {})


_ACCUMULATORS = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")


def _create_accumulators(inner, parameters):
    inner._create_accumulators(paddle.static.default_main_program().global_block(), parameters)


def optimizer_state(optimizer, model, names=None):
    """AdamW's state by the model's parameter names: `{name: {accumulator: tensor, ...}}`.

    Paddle's own keys hold `parameter.name` ("linear_3.w_0"), which depends on what else the process built before; the
    model's names don't, so that this state can be loaded by another loop, process or number of ranks.

    Args:
        names: of these parameters only (a rank's share); None for all trainable ones.
    """
    inner = inner_optimizer(optimizer)
    parameters = _trainable(model, names)
    _create_accumulators(inner, list(parameters.values()))
    masters = master_weights(inner)
    state = {}
    for name, parameter in parameters.items():
        state[name] = {key: inner._get_accumulator_master(key, parameter) for key in _ACCUMULATORS}
        if parameter.name in masters:
            state[name]["master_weight"] = masters[parameter.name]
    return state


@paddle.no_grad()
def set_optimizer_state(optimizer, model, state, names=None, weights=None):
    """Gives an optimizer the state that `optimizer_state` returned (arrays or tensors).

    Args:
        weights: float32 weights by name: master weights that the state lacks, because it came from a float32 run.

    Raises:
        ValueError: a parameter or accumulator is missing or has another shape.
    """
    current = optimizer_state(optimizer, model, names)
    for name, accumulators in current.items():
        for key, tensor in accumulators.items():
            entry = state.get(name, {})
            if key == "master_weight" and key not in entry and weights is not None:
                entry = {key: weights[name]}
            if key not in entry:
                raise ValueError(f"the optimizer state has no {key} of {name}")
            value = paddle.to_tensor(entry[key]).astype("float32")
            if value.size != tensor.size:
                raise ValueError(f"the optimizer state's {key} of {name} has shape {value.shape}, not {tensor.shape}")
            paddle.assign(value.reshape(tensor.shape), output=tensor)


def _trainable(model, names):
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not parameter.stop_gradient and (names is None or name in names)
    }
