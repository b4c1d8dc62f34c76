"""Exponential moving averages of a network's parameters, and a network that holds them for a while."""

import contextlib

import numpy as np
import paddle

from models.state import check_state
from runtime.paddle_private import join
from training import flat
from training.parallel.shares import LocalShard, local_tensor, optimizer_key


class EMA:
    """Averages `ema = decay * ema + (1 - decay) * parameter`, in float32, by parameter name.

    Covers what the official `update_ema` covers: every parameter, frozen ones (`pos_embed`) included, and no buffer.

    Args:
        model: the layer to follow, not wrapped in `DataParallel`.
        warmup: use `min(decay, (1 + n) / (10 + n))` at update n, so that a short run forgets its start.
        name: tells the averages of a run apart in its checkpoints; the usual one has none.
        on_host: keep them on the host until `shard`: a GPU that is to hold a part need not hold all of them before.

    Raises:
        ValueError: a decay that is not from 0 to 1.
    """

    def __init__(self, model, decay=0.9999, *, warmup=False, name="", on_host=False):
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_decay must be from 0 to 1, got {decay}")
        self.decay, self.warmup, self.name = decay, warmup, name
        self.num_updates = 0
        with paddle.no_grad():
            copies = ((key, value.astype("float32").clone().detach()) for key, value in model.named_parameters())
            self._keep({key: copy.cpu() if on_host else copy for key, copy in copies}, may_join=not on_host)

    @paddle.no_grad()
    def shard(self, shard):
        """Keeps the averages of this rank's `LocalShard` only; call it when the optimizer has its wrappers."""
        own = [(name, value) for name, value in self.shadow.items() if shard.owns(name)]
        self._keep({name: paddle.to_tensor(shard.shard(name, value.numpy())) for name, value in own})

    def _keep(self, shadow, may_join=True):
        """Takes averages by name; those of a bucket become views of one tensor, which `update` moves."""
        self.shadow, names = shadow, list(shadow)
        self._buckets = []  # (names, that tensor or None) each
        for indices in flat.buckets(list(shadow.values())) if may_join else [[i] for i in range(len(names))]:
            together, whole = [names[index] for index in indices], None
            if len(together) > 1:
                views, whole = join([shadow[name] for name in together])
                shadow.update(zip(together, views, strict=True))
            self._buckets.append((together, whole))

    def key(self, what):
        """Returns the name of what a checkpoint holds of these averages, "ema_state" or "ema_updates"."""
        return f"{what}_{self.name}" if self.name else what

    def current_decay(self):
        """Returns the decay of the next update."""
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warmup else self.decay

    @paddle.no_grad()
    def update(self, model, master_weights=None):
        """Moves the averages one step towards the model, without waiting for the device.

        Args:
            master_weights: the optimizer's float32 copies of half-precision weights (AMP O2), by `optimizer_key`.
        """
        decay, masters = self.current_decay(), master_weights or {}
        values = {
            name: masters.get(optimizer_key(parameter), local_tensor(parameter))
            for name, parameter in model.named_parameters()
            if name in self.shadow
        }
        for names, shadow in self._buckets:
            value, *others = (values[name].astype("float32") for name in names)
            if others:
                value = join([value, *others])[1]
            shadow = self.shadow[names[0]] if shadow is None else shadow
            shadow.scale_(decay).add_(value * (1.0 - decay))
        self.num_updates += 1

    def state_dict(self):
        """Returns the averages by parameter name: the tensors themselves, float32."""
        return dict(self.shadow)

    @paddle.no_grad()
    def set_state_dict(self, state):
        """Takes averages by parameter name (tensors or arrays); ValueError if names or shapes are others."""
        check_state(state, {name: shadow.shape for name, shadow in self.shadow.items()}, source="the EMA's state")
        for name, shadow in self.shadow.items():
            value = paddle.to_tensor(np.asarray(state[name]), place=shadow.place)
            paddle.assign(value.astype("float32"), output=shadow)


@contextlib.contextmanager
def ema_weights(model, ema, optimizer=None):
    """Lends a model its averages: evaluation mode inside, its own weights and mode after. Collective if sharded."""
    own = {name: local_tensor(parameter).detach().clone() for name, parameter in model.named_parameters()}
    was_training = model.training
    shard, averages = LocalShard(model, optimizer), ema.state_dict()

    @paddle.no_grad()
    def fill(value_of):
        for name, parameter in model.named_parameters():
            target = local_tensor(parameter)
            paddle.assign(value_of(name).astype(target.dtype), output=target)

    try:
        # One by one: no rank holds all averages at once.
        fill(averages.get if shard.weights_are_sharded else lambda name: shard.unshard(name, averages.get(name)))
        model.eval()
        yield model
    finally:
        fill(own.get)
        if was_training:
            model.train()
