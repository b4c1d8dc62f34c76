"""Exponential moving averages of a network's parameters, and a network that holds them for a while."""

import contextlib

import numpy as np
import paddle

from training.parallel.shares import Shares, held_name, held_part


class EMA:
    """Averages `ema = decay * ema + (1 - decay) * parameter`, in float32, by parameter name.

    Covers what the official `update_ema` covers: every parameter, frozen ones (`pos_embed`) included, and no buffer.
    Where the model's own weights are low precision (AMP O2), the optimizer's float32 master weights are averaged.

    Args:
        model: the layer to follow, not wrapped in `DataParallel`.
        decay: 0.9999 as in the papers.
        warmup: use `min(decay, (1 + n) / (10 + n))` at update n, so that a short run forgets its start.
        on_host: wait on the host for `shard`: a GPU that is to hold a share need not hold all of them before.
    """

    def __init__(self, model, decay=0.9999, *, warmup=False, on_host=False):
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_decay must be from 0 to 1, got {decay}")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        with paddle.no_grad():
            self.shadow = {}
            for name, parameter in model.named_parameters():
                copy = parameter.astype("float32").clone().detach()
                self.shadow[name] = copy.cpu() if on_host else copy

    @paddle.no_grad()
    def shard(self, shares):
        """Keeps the averages of this rank's share only; call it when the optimizer has got its wrappers.

        Args:
            shares: the rank's `training.parallel.shares.Shares`.
        """
        self.shadow = {
            name: shares.slice(name, value).to(device=paddle.get_device())
            for name, value in self.shadow.items()
            if shares.own(name)
        }

    def current_decay(self):
        """The decay of the next update."""
        if self.warmup:
            return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        return self.decay

    @paddle.no_grad()
    def update(self, model, master_weights=None):
        """One step towards the model. Enqueues device work only: nothing waits for the host.

        Args:
            model: the layer given to the constructor.
            master_weights: float32 copies by `training.parallel.shares.held_name`, used where they exist.
        """
        decay = self.current_decay()
        master_weights = master_weights or {}
        for name, parameter in model.named_parameters():
            shadow = self.shadow.get(name)
            if shadow is not None:
                value = master_weights.get(held_name(parameter), held_part(parameter))
                if value.dtype != shadow.dtype:
                    value = value.astype("float32")
                shadow.scale_(decay).add_(value * (1.0 - decay))
        self.num_updates += 1

    def state_dict(self):
        """The averages by parameter name: the tensors themselves, float32."""
        return dict(self.shadow)

    @paddle.no_grad()
    def set_state_dict(self, state):
        """Takes averages by parameter name (tensors or arrays); every name must be there, with its shape."""
        for name, shadow in self.shadow.items():
            if name not in state:
                raise ValueError(f"the EMA state has no {name!r}")
            value = paddle.to_tensor(np.asarray(state[name]), place=shadow.place).astype("float32")
            if list(value.shape) != list(shadow.shape):
                raise ValueError(f"the EMA state's {name!r} has shape {list(value.shape)}, not {list(shadow.shape)}")
            paddle.assign(value, output=shadow)


@paddle.no_grad()
def _copy(value, target):
    paddle.assign(value.astype(target.dtype), output=target)


@contextlib.contextmanager
def ema_weights(model, ema, shares=None):
    """Lends a model its averages: evaluation mode inside, its own weights and mode after. Collective if sharded."""
    targets = {name: held_part(parameter) for name, parameter in model.named_parameters()}
    own = {name: target.detach().clone() for name, target in targets.items()}
    was_training = model.training
    shares = shares or Shares(model)
    averages = ema.state_dict()
    try:
        for name, target in targets.items():  # one by one: no rank holds all averages at once
            _copy(averages[name] if shares.sliced else shares.of_rank(name, averages.get(name)), target)
        model.eval()
        yield model
    finally:
        for name, parameter in model.named_parameters():
            _copy(own[name], held_part(parameter))
        if was_training:
            model.train()
