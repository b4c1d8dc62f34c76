"""The state of a run as plain data: gathered from network, averages and optimizer, and given back to them."""

import random

import numpy as np
import paddle

from models.parallel import rank_part
from models.state import REGULARIZERS, check_state
from runtime.paddle_private import master_weights
from training.optimizer import ACCUMULATORS, optimizer_state, set_optimizer_state
from training.parallel.shares import LocalShard, local_tensor, optimizer_key
from weights.runs import STATE


def random_state():
    """Returns the states of Python's and numpy's generators as JSON values."""
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def _set_random_state(state):
    try:
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype="uint32"), *rest))
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{STATE}: holds no states of Python's and numpy's generators ({error})") from None


def whole_weights(model, optimizer):
    """Gathers `{name: float32 array}` of the network's weights on rank 0; under AMP O2 of their float32 masters."""
    shard, masters = LocalShard(model, optimizer), master_weights(optimizer)
    if not masters and not shard.weights_are_sharded:
        # Stages 1 and 2 replicate float32 weights: any rank's copy will do. Master weights have to be gathered.
        shard = LocalShard(model)
    held = {name: masters.get(optimizer_key(value), local_tensor(value)) for name, value in model.named_parameters()}
    return shard.gather(held)


def whole_optimizer_state(model, optimizer):
    """Gathers `{name: {accumulator: float32 array}}` of AdamW's state on rank 0."""
    shard = LocalShard(model, optimizer)
    held = optimizer_state(optimizer, model)
    arrays = {name: {} for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    masters = ["master_weight"] if master_weights(optimizer) else []
    for key in (*ACCUMULATORS, *masters):
        tensors = {name: state[key] for name, state in held.items() if key in state}
        gather = shard.gather_scalars if key.endswith("pow_acc") else shard.gather
        for name, array in gather(tensors, list(arrays)).items():
            arrays[name][key] = array
    return arrays


def plain_state(part):
    """Returns the numbers of a learning-rate schedule's or a loss scaler's state as JSON values; empty without one."""
    state = part.state_dict() if part is not None else {}
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in state.items()}


@paddle.no_grad()
def restore_model(checkpoint, model, averages=()):
    """Gives a model (not wrapped) and its averages a checkpoint's; averages that it lacks start from its weights.

    Returns a sentence on regularizers of the checkpoint that are dropped, and of the run that start anew, or None.
    """
    note, checkpoint.new = fit_regularizers(checkpoint.model, model)
    load_weights_into(model, checkpoint.model, checkpoint.source)
    for average in averages:
        state = checkpoint.averages.get(average.name) or checkpoint.model
        fit_regularizers(state, model)
        check_state(state, LocalShard(model).whole_shapes(), source=checkpoint.source)
        average.set_state_dict({name: rank_part(value, state[name]) for name, value in model.named_parameters()})
        updates = checkpoint.progress.get("global_step", 0)
        average.num_updates = checkpoint.progress.get(average.key("ema_updates"), updates)
    checkpoint.averages = {}
    return note


def fit_regularizers(state, model):
    """Makes the regularizers' part of a state `{name: array}` that of a model, which is not wrapped.

    What one of them has learned is kept if it is all there in the model's shapes. Else it is dropped, and the model's
    own values take its place. Returns `(note, names)`: a sentence on it or None, and the names of what is new.
    """
    own, theirs = _by_regularizer(dict(model.named_parameters())), _by_regularizer(state)
    kept = {kind for kind in own if _shapes(own[kind]) == _shapes(theirs.get(kind, {}))}
    for kind in theirs.keys() - kept:
        for name in theirs[kind]:
            del state[name]
    new = {name: value for kind in sorted(own.keys() - kept) for name, value in own[kind].items()}
    state.update({name: value.numpy() for name, value in new.items()})
    changes = {"begun anew": own.keys() - kept, "dropped": theirs.keys() - own.keys()}
    told = [f"{what}: {', '.join(sorted(kinds))}" for what, kinds in changes.items() if kinds]
    return (f"what regularizers learned, {'; '.join(told)}" if told else None), [*new]


def _by_regularizer(state):
    """Returns what regularizers have learned in a state, `{type: {name: value}}`."""
    found = {}
    for name, value in state.items():
        if name.startswith(REGULARIZERS):
            found.setdefault(name.split(".")[1], {})[name] = value
    return found


def _shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def load_weights_into(model, state, source):
    """Gives a model this rank's parts of whole weights by name; ValueError, which names `source`, if they don't fit."""
    check_state(state, LocalShard(model).whole_shapes(), source=source)
    for name, parameter in model.named_parameters():
        parameter.set_value(paddle.to_tensor(rank_part(parameter, state[name])).astype(parameter.dtype))


def restore_training(checkpoint, session):
    """Gives all but network and averages of a session a checkpoint's state, once the optimizer has its wrappers."""
    model, optimizer = session.model, session.optimizer
    # The weights are wanted for masters that the state may lack; else they go before the largest part is read.
    half = any(parameter.dtype != paddle.float32 for parameter in model.parameters())
    weights, checkpoint.model = (checkpoint.model if half else None), {}
    set_optimizer_state(optimizer, model, checkpoint.optimizer, weights, new=checkpoint.new)
    progress = checkpoint.progress
    session.lr_scheduler.step(progress.get("lr_scheduler", {}).get("last_epoch", progress["global_step"]))
    scaler = progress.get("scaler") or {}
    if scaler and session.scaler is not None and session.scaler.is_enable():
        session.scaler.load_state_dict({**scaler, "scale": np.float32(scaler["scale"])})
    if checkpoint.objective:
        session.objective.set_state_dict({key: paddle.to_tensor(value) for key, value in checkpoint.objective.items()})
    if "random" in progress:
        _set_random_state(progress["random"])
    # On every rank: not needed any more.
    checkpoint.objective, checkpoint.read_optimizer = {}, dict
