"""The loss of held-out samples at fixed timesteps and noise: a curve without the jumps of random draws."""

import numpy as np
import paddle
import paddle.distributed as dist

from objectives import make_batch
from training.averages import ema_weights


class Validation:
    """Computes mean losses of held-out samples; no label is dropped.

    Sample i gets the same noise and the same place in the time interval at every call, in every run and on any number
    of ranks; the places are spread evenly over the samples.

    Args:
        dataset: the held-out part of a `FeatureDataset`.
        sampler: this rank's `MicroBatchSampler`, which knows its place among the data-parallel ranks.
    """

    SEED = 20250

    def __init__(self, objective, dataset, sampler):
        self.objective, self.dataset = objective, dataset
        self.batch_size = min(sampler.batch_size, len(dataset))  # of a forward pass on one device
        self.rank, self.world_size = sampler.rank, sampler.world_size
        order = np.random.default_rng([self.SEED, len(dataset)]).permutation(len(dataset))
        self._places = ((order + 0.5) / len(dataset)).astype("float32")  # in (0, 1)

    @paddle.no_grad()
    def loss(self, model, precision):
        """Returns the mean loss of the held-out samples, by a model in evaluation mode. A collective; waits for it."""
        totals, count = paddle.zeros([2]), len(self.dataset)  # of losses and of samples, over the ranks
        # All ranks make the same number of passes: a network in parts computes only with all of them.
        stride = self.batch_size * self.world_size
        for first in range(self.rank * self.batch_size, -(-count // stride) * stride, stride):
            mine = np.arange(first, min(first + self.batch_size, count))
            indices = mine if len(mine) else np.zeros(1, "int64")
            batch = make_batch(map(paddle.to_tensor, self.dataset.read(indices)))
            rngs = [np.random.default_rng([self.SEED, index]) for index in indices]
            noise = np.stack([rng.standard_normal(batch.x.shape[1:], "float32") for rng in rngs])
            place, noise = paddle.to_tensor(self._places[indices]), paddle.to_tensor(noise)
            with precision.autocast():
                losses = self.objective.validation_losses(model, batch, place, noise)
            total = losses[: len(mine)].astype("float32").sum()
            totals = totals + paddle.stack([total, paddle.full_like(total, len(mine))])
        if dist.get_world_size() > 1:
            dist.all_reduce(totals)
        loss, samples = totals.tolist()
        return loss / samples

    def run(self, session):
        """Logs the losses after the session's step: of its weights, and of the first of its averages."""
        model = session.model
        values = {"loss": self.loss(model, session.precision)}
        for average in session.averages[:1]:
            with ema_weights(model, average, session.optimizer):
                values["ema_loss"] = self.loss(model, session.precision)
        session.log.report_validation(session.step, values)
