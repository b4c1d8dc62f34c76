"""The order of training samples: an endless seeded stream, and every rank's rows of each global batch."""

import numpy as np


class SampleStream:
    """The endless order of training samples: one seeded permutation of the dataset after another.

    Position k is sample `permutation(seed, k // n)[k % n]`: each sample once per epoch, another order every epoch, the
    same whatever the number of ranks. Optimizer step s takes positions `[s * G, (s + 1) * G)`, G the global batch, so
    that a batch may hold the end of one epoch and the start of the next.
    """

    def __init__(self, num_samples, seed):
        self.num_samples, self.seed = num_samples, seed
        self._epoch, self._order = -1, None

    def take(self, start, stop):
        """Returns the dataset indices at stream positions `[start, stop)`, `(stop - start,)` int64."""
        parts = [np.empty(0, "int64")]
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            if epoch != self._epoch:
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
                self._epoch = epoch
            parts.append(self._order[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)


class MicroBatchSampler:
    """Dataset indices of one rank's micro-batches, from optimizer step `first_step` up to `last_step`.

    The global batch is laid out as accumulation step, then rank: row `m * world * b + rank * b + i` is sample i of
    micro-batch m. `rows(m)` tells where a micro-batch stands, for the objective's random numbers.
    """

    def __init__(self, num_samples, *, global_batch_size, accumulation_steps, rank, world_size, seed, last_step):
        if global_batch_size % (world_size * accumulation_steps):
            raise ValueError(
                f"global batch size {global_batch_size} is not divisible by {world_size} data-parallel ranks x "
                f"{accumulation_steps} gradient accumulation steps"
            )
        self.stream = SampleStream(num_samples, seed)
        self.global_batch_size, self.accumulation_steps = global_batch_size, accumulation_steps
        self.batch_size = global_batch_size // (world_size * accumulation_steps)
        self.rank, self.world_size = rank, world_size
        self.first_step, self.last_step, self.first_sample = 0, last_step, 0

    def rows(self, micro_step):
        """Returns `(start, stop, total)`: the rows of the global batch in micro-batch `micro_step` of this rank."""
        start = (micro_step * self.world_size + self.rank) * self.batch_size
        return start, start + self.batch_size, self.global_batch_size

    def resume(self, step, samples_seen, last_step=None):
        """Goes on after `step` steps, which took the first `samples_seen` samples, to `last_step` if it is given."""
        self.first_step, self.first_sample = step, samples_seen
        self.last_step = self.last_step if last_step is None else last_step

    def samples_seen(self, step):
        """Returns how many samples of the stream `step` optimizer steps have taken, over all ranks."""
        return self.first_sample + (step - self.first_step) * self.global_batch_size

    def epoch(self, step):
        """Returns the epochs seen after `step` optimizer steps, a fraction."""
        return self.samples_seen(step) / self.stream.num_samples

    def __len__(self):
        return max(0, self.last_step - self.first_step) * self.accumulation_steps

    def batch(self, step, micro_step):
        """Returns `(indices, positions)` of a micro-batch of optimizer step `step` (1-based), `(n,)` int64 each.

        The indices say what to read; from the positions in the stream, all is drawn that is new at every visit.
        """
        first = self.samples_seen(step - 1) + self.rows(micro_step)[0]
        last = first + self.batch_size
        return self.stream.take(first, last), np.arange(first, last)

    def batches(self):
        """Yields `batch` of all micro-batches that are still to come when training starts."""
        for step in range(self.first_step, self.last_step):
            for micro_step in range(self.accumulation_steps):
                yield self.batch(step + 1, micro_step)

    def __iter__(self):
        for indices, _ in self.batches():
            yield indices.tolist()


def total_steps(num_samples, *, global_batch_size, max_steps, epochs, first_step=0, samples_seen=0):
    """Returns the last optimizer step of a run: `max_steps`, or where `epochs` epochs are over if it is -1.

    A resumed run has done `first_step` steps, which took `samples_seen` samples: perhaps with another global batch, of
    a set of another size.
    """
    if max_steps > 0:
        return max_steps
    steps = max(0, int(epochs * num_samples) - samples_seen) // global_batch_size  # a last, smaller batch is left out
    return max(1, first_step + steps)
