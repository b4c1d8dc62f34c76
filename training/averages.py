"""Exponential moving averages of a network's parameters, and a network that holds them for a while."""

import contextlib

import numpy as np
import paddle

from models.state import check_state
from runtime.paddle_private import join
from training import flat
from training.parallel.shares import LocalShard, local_tensor, optimizer_key
from training.posthoc_ema import power_function_decay, profile_name


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

    stays_on_host = False

    def __init__(self, model, decay=0.9999, *, warmup=False, name="", on_host=False):
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_decay must be from 0 to 1, got {decay}")
        self.decay, self.warmup = decay, warmup
        self._follow(model, name, on_host)

    def _follow(self, model, name, on_host):
        self.name, self.num_updates = name, 0
        with paddle.no_grad():
            copies = ((key, value.astype("float32").clone().detach()) for key, value in model.named_parameters())
            self._keep({key: copy.cpu() if on_host else copy for key, copy in copies}, may_join=not on_host)

    @paddle.no_grad()
    def shard(self, shard):
        """Keeps the averages of this rank's `LocalShard` only; call it when the optimizer has its wrappers."""
        own = [(name, value) for name, value in self.shadow.items() if shard.owns(name)]
        place = paddle.CPUPlace() if self.stays_on_host else None
        own = {name: paddle.to_tensor(shard.shard(name, value.numpy()), place=place) for name, value in own}
        self._keep(own, may_join=not self.stays_on_host)

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

    def due(self, step):
        """Returns whether they are to be updated after optimizer step `step`; more often does no harm."""
        return True

    def current_decay(self):
        """Returns the decay of the next update."""
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warmup else self.decay

    def update(self, model, master_weights=None, *, step=None):
        """Moves the averages one step towards the model, without waiting for the device unless they stay on the host.

        Args:
            master_weights: the optimizer's float32 copies of half-precision weights (AMP O2), by `optimizer_key`.
            step: the optimizer step after which this is; the usual averages count their updates alone.
        """
        self._move(model, master_weights or {}, self.current_decay())
        self.num_updates += 1

    @paddle.no_grad()
    def _move(self, model, masters, decay):
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
            value = value.cpu() if self.stays_on_host else value
            shadow.scale_(decay).add_(value * (1.0 - decay))

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


class PowerFunctionEMA(EMA):
    """Averages by a power-function profile of relative width `std`, from which others are reconstructed afterwards.

    `num_updates` is the optimizer step up to which they go. The weights of the first update are taken over. An update
    may come after any number of steps: its weights stand for those of all steps since the last one. See
    `training.posthoc_ema`.

    Args:
        model: the layer to follow, not wrapped in `DataParallel`.
        update_steps: they are due whenever this divides the step.
        on_host: as for `EMA`.
        stays_on_host: keep them in the host's memory for good; every update copies the weights there.

    Raises:
        ValueError: a `std` that no profile has.
    """

    def __init__(self, model, std, *, update_steps=1, on_host=False, stays_on_host=False):
        power_function_decay(1, std)  # checks it
        self.std, self.update_steps, self.stays_on_host = std, update_steps, stays_on_host
        self._follow(model, profile_name(std), on_host or stays_on_host)

    def due(self, step):
        """Returns whether `update_steps` divides the step; an update between two such steps is as exact."""
        return step % self.update_steps == 0

    def current_decay(self, step=None):
        """Returns the decay of the update that ends at `step`, the next one if that is None."""
        step = self.num_updates + 1 if step is None else step
        decay = power_function_decay(step, self.std, step - self.num_updates)
        return float(np.float32(decay))  # so that both factors sum to 1 in the operators' float32

    def update(self, model, master_weights=None, *, step=None):
        """Moves the averages up to optimizer step `step`, later than the last one; None: the next one."""
        self._move(model, master_weights or {}, self.current_decay(step))
        self.num_updates = self.num_updates + 1 if step is None else step


@contextlib.contextmanager
def ema_weights(model, ema, optimizer=None):
    """Lends a model its averages: evaluation mode inside, its own weights and mode after. Collective if sharded."""
    own = {name: local_tensor(parameter).detach().clone() for name, parameter in model.named_parameters()}
    was_training = model.training
    shard, averages = LocalShard(model, optimizer), ema.state_dict()
    whole = shard.on_device if shard.weights_are_sharded else shard.unshard

    @paddle.no_grad()
    def fill(value_of):
        for name, parameter in model.named_parameters():
            target = local_tensor(parameter)
            paddle.assign(value_of(name).astype(target.dtype), output=target)

    try:
        # One by one: no rank holds all averages at once.
        fill(lambda name: whole(name, averages.get(name)))
        model.eval()
        yield model
    finally:
        fill(own.get)
        if was_training:
            model.train()
