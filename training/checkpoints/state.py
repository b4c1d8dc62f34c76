"""The state of a run as plain data: gathered from network, averages and optimizer, and given back to them."""

import random

import numpy as np
import paddle

from models.parallel import rank_part
from models.state import check_state
from training.checkpoints.find import STATE
from training.optimizer import optimizer_state, set_optimizer_state
from training.parallel.shares import Shares, held_name, held_part


def _random_state():
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


def whole_weights(model, shares, masters):
    """`{name: float32 array}` of the network's weights on rank 0; under O2 of the masters, which are the weights."""
    # Without masters, and without sharding of the weights, the ranks of a sharding group hold the same ones.
    shares = shares if masters or shares.sliced else Shares(model)
    return shares.whole(
        {
            name: masters.get(held_name(parameter), held_part(parameter))
            for name, parameter in model.named_parameters()
            if shares.own(name)
        }
    )


def _whole_optimizer_state(optimizer, model, shares, masters):
    held = optimizer_state(optimizer, model, shares)
    names = [name for name, parameter in model.named_parameters() if not parameter.stop_gradient]
    arrays = {name: {} for name in names}
    for key in ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc", *(["master_weight"] if masters else [])):
        tensors = {name: state[key] for name, state in held.items() if key in state}
        gather = shares.whole_scalars if key.endswith("pow_acc") else shares.whole
        for name, array in gather(tensors, names).items():
            arrays[name][key] = array
    return arrays


def _is_plain(value):
    return isinstance(value, (int, float, str, bool))


def _plain_scaler(scaler):
    state = scaler.state_dict() if scaler is not None else {}
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in state.items()}


@paddle.no_grad()
def restore_model(checkpoint, model, ema=None):
    """Gives a model (not wrapped) and its EMA a checkpoint's weights; the EMA falls back to the weights.

    Raises:
        ValueError: weights of another architecture.
    """
    _load_weights(checkpoint.model, model, checkpoint.source)
    if ema is not None:
        averages = checkpoint.ema or checkpoint.model
        check_state(averages, Shares(model).whole_shapes(), source=checkpoint.source)
        ema.set_state_dict(_parts(averages, model))
        ema.num_updates = checkpoint.progress.get("ema_updates", checkpoint.progress.get("global_step", 0))
    checkpoint.ema = None


def _parts(state, model):
    return {name: rank_part(parameter, state[name]) for name, parameter in model.named_parameters()}


def _load_weights(state, model, source):
    """Gives a model this rank's parts of whole weights by name; `ValueError` if they are another architecture's."""
    check_state(state, Shares(model).whole_shapes(), source=source)
    for name, parameter in model.named_parameters():
        parameter.set_value(paddle.to_tensor(rank_part(parameter, state[name])).astype(parameter.dtype))


def restore_training(checkpoint, *, model, optimizer, lr_scheduler, scaler, objective):
    """Gives optimizer, LR schedule, loss scaler, objective and generators a checkpoint's state.

    Call it after the model has its weights and the optimizer its wrappers.
    """
    # The weights are wanted for masters that the state may lack; else they go before the largest part is read.
    half = any(parameter.dtype != paddle.float32 for parameter in model.parameters())
    weights, checkpoint.model = (checkpoint.model if half else None), {}
    set_optimizer_state(optimizer, model, checkpoint.optimizer, Shares(model, optimizer), weights=weights)
    progress = checkpoint.progress
    lr_scheduler.step(progress.get("lr_scheduler", {}).get("last_epoch", progress["global_step"]))
    scaler_state = progress.get("scaler") or {}
    if scaler is not None and scaler_state and getattr(scaler, "_enable", False):
        scaler.load_state_dict({**scaler_state, "scale": np.float32(scaler_state["scale"])})
    if checkpoint.objective:
        objective.set_state_dict({key: paddle.to_tensor(value) for key, value in checkpoint.objective.items()})
    if "random" in progress:
        _set_random_state(progress["random"])
    # On every rank: not needed any more.
    checkpoint.ema, checkpoint.objective = None, {}
    checkpoint.read_optimizer = dict
