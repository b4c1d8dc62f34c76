"""How training draws its timesteps: uniformly, or more often where the loss is large (Sec. 3.3 of Improved DDPM)."""

import numpy as np
import paddle

from .diffusion_utils import full_precision


class ScheduleSampler:
    """A distribution over the timesteps of a `diffusion`."""

    def __init__(self, diffusion):
        self.num_timesteps = diffusion.num_timesteps

    def weights(self):
        """Returns positive weights, proportional to each timestep's probability: `(num_timesteps,)` tensor."""
        raise NotImplementedError

    def sample(self, batch_size):
        """Draws `(timesteps, weights)`, `(batch_size,)` int64 and float32: so weighted, losses keep their mean."""
        raise NotImplementedError

    def update_with_losses(self, t, losses):
        """Tells the sampler the losses `(N,)` at timesteps `t` `(N,)`. In distributed training every rank calls it."""

    def state_dict(self):
        """Returns tensors by name, for a checkpoint."""
        return {}

    def set_state_dict(self, state):
        """Takes over what `state_dict` returned."""


class UniformSampler(ScheduleSampler):
    """Draws every timestep alike; all weights are 1, and nothing is learned."""

    def weights(self):
        return paddle.ones([self.num_timesteps], dtype="float64")

    def sample(self, batch_size):
        return paddle.randint(0, self.num_timesteps, [batch_size]), paddle.ones([batch_size])


class LossSecondMomentResampler(ScheduleSampler):
    """Probabilities proportional to sqrt(E[loss^2]) over each timestep's last losses, Eq. 18 of Improved DDPM.

    It draws uniformly until every timestep has `history_per_term` losses. The state lives on the device and neither
    drawing nor updating waits for it. On several ranks all hold the same state, made of everyone's losses.

    Args:
        diffusion: its `num_timesteps` is used.
        history_per_term: losses remembered of each timestep.
        uniform_prob: share of the draws that stays uniform, so that no timestep is forgotten.
        group: the data-parallel process group, all ranks if None. Its ranks give batches of equal size.
        ranks_per_batch: ranks of the group that follow one another and have the same batch (tensor parallelism).
    """

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001, group=None, ranks_per_batch=1):
        super().__init__(diffusion)
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._group = group
        self._ranks_per_batch = ranks_per_batch
        self._loss_history = paddle.zeros([self.num_timesteps, history_per_term], dtype="float64")
        self._loss_counts = paddle.zeros([self.num_timesteps], dtype="int64")  # losses ever seen of each timestep

    @paddle.no_grad()
    @full_precision
    def weights(self):
        weights = paddle.sqrt((self._loss_history**2).mean(axis=1))  # (num_timesteps,)
        uniform = paddle.full_like(weights, self.uniform_prob / self.num_timesteps)  # Paddle 2.6 rounds a bare number
        weights = (1 - self.uniform_prob) * weights / weights.sum() + uniform
        warmed_up = (self._loss_counts >= self.history_per_term).all()
        return paddle.where(warmed_up, weights, paddle.ones_like(weights))

    @paddle.no_grad()
    @full_precision
    def sample(self, batch_size):
        probabilities = self.weights()
        probabilities = probabilities / probabilities.sum()
        cumulative = paddle.cumsum(probabilities)
        # Inverse of the cumulative distribution, in float64: rare timesteps have probabilities of 1e-6.
        draws = paddle.rand([batch_size], dtype="float64") * cumulative[-1:]
        t = paddle.searchsorted(cumulative, draws, right=True).clip(max=self.num_timesteps - 1)
        return t, (1.0 / (self.num_timesteps * paddle.gather(probabilities, t))).astype("float32")

    @paddle.no_grad()
    @full_precision
    def update_with_losses(self, t, losses):
        if paddle.distributed.is_initialized() and paddle.distributed.get_world_size(self._group) > 1:
            local = paddle.stack([t.astype("float32"), losses.astype("float32")])  # (2, N): one exchange for both
            gathered = []
            paddle.distributed.all_gather(gathered, local, group=self._group)
            t, losses = paddle.concat(gathered[:: self._ranks_per_batch], axis=1).unbind(axis=0)
        self.update_with_all_losses(t, losses)

    @paddle.no_grad()
    @full_precision
    def update_with_all_losses(self, t, losses):
        """Does `update_with_losses` without the exchange: each rank must pass the same values in the same order."""
        t, losses = t.astype("int64"), losses.astype("float64")
        size, length = t.shape[0], self.history_per_term

        # A ring of `length` losses for each timestep. The i-th loss of this batch at the same timestep goes i places
        # on; those that later ones of the batch would overwrite, and the infinite and NaN ones, go to a spare place.
        valid = paddle.isfinite(losses)
        same = (t.unsqueeze(1) == t.unsqueeze(0)) & valid.unsqueeze(0) & valid.unsqueeze(1)  # (N, N)
        same = same.astype("int64")
        earlier, later = paddle.tril(same, -1).sum(axis=1), paddle.triu(same, 1).sum(axis=1)  # (N,)
        place = t * length + (paddle.gather(self._loss_counts, t) + earlier) % length
        spare = paddle.full([size], self.num_timesteps * length, dtype="int64")
        place = paddle.where(valid & (later < length), place, spare)
        ring = paddle.concat([self._loss_history.flatten(), paddle.zeros([1], dtype="float64")])
        ring = paddle.scatter(ring, place, losses)
        self._loss_history = ring[:-1].reshape([self.num_timesteps, length])
        self._loss_counts = paddle.scatter_nd_add(self._loss_counts, t.unsqueeze(1), valid.astype("int64"))

    def state_dict(self):
        return {"loss_history": self._loss_history, "loss_counts": self._loss_counts}

    def set_state_dict(self, state):
        taken = {}
        for name, tensor in self.state_dict().items():
            if name not in state:
                raise ValueError(f"the timestep sampler's state lacks {name!r}")
            value, expected = np.asarray(state[name]), list(tensor.shape)
            if list(value.shape) != expected:
                raise ValueError(f"the timestep sampler's {name} has shape {list(value.shape)}, expected {expected}")
            taken[f"_{name}"] = paddle.to_tensor(value, dtype=tensor.dtype)
        vars(self).update(taken)


def create_named_schedule_sampler(name, diffusion, **options):
    """Returns the timestep sampler "uniform" or "loss-second-moment" for `diffusion`; ValueError for other names.

    The options are those of `LossSecondMomentResampler`; the uniform one needs none.
    """
    if name not in ("uniform", "loss-second-moment"):
        raise ValueError(f"unknown timestep sampler {name!r}; accepted: uniform, loss-second-moment")
    return UniformSampler(diffusion) if name == "uniform" else LossSecondMomentResampler(diffusion, **options)
