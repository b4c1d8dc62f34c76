"""The loader of both loops: micro-batches in the sampler's order, read ahead by a thread or by processes."""

import itertools
import multiprocessing
import os
import shutil
import signal
import threading

import numpy as np

from features.read_ahead import map_ahead
from features.store import READ_BYTES
from runtime.process import launched_rank, local_processes, say, start_worker

LOADER_DIED = (
    "a loader process died. Was the memory full, or /dev/shm, through which batches come? Give --num_workers 0 "
    "(--dataloader_num_workers 0 to the Trainer) or a larger /dev/shm (docker run --shm-size), or pack the features "
    "with tools/pack_features.py: packed ones are read without processes"
)


def free_shared_memory():
    """Returns the free bytes of `/dev/shm`; None where there is none."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None


def _name_dead_loaders():
    """Makes the SystemError of many lines that Paddle's handler of SIGCHLD raises for a dead loader one line."""
    handler = signal.getsignal(signal.SIGCHLD)
    is_ours = hasattr(handler, "names_dead_loaders")  # Paddle sets its own only once
    if is_ours or not callable(handler) or threading.current_thread() is not threading.main_thread():
        return

    def handle(signum, frame):
        try:
            handler(signum, frame)
        except SystemError:
            # Reaps it, because Paddle raises at the end of every other child too as long as a dead loader is a zombie.
            multiprocessing.active_children()
            raise ValueError(LOADER_DIED) from None

    handle.names_dead_loaders = True
    signal.signal(signal.SIGCHLD, handle)


class FeatureLoader:
    """Iterates over the tensors of `FeatureDataset.read`, `[latents (n, C, h, w), labels (n,)]`, by micro-batches.

    Args:
        dataset, sampler: a `FeatureDataset` and a `MicroBatchSampler`.
        num_workers: 0 reads in the calling thread, between steps. More read ahead: pairs of files by so many processes,
            a packed set by one thread, which is as fast as the memory is. The samples are the same.
        phase: called with "reading data" and "training" in turn, see `Stopping.phase`; or None.

    Iterating raises what the dataset raises for a sample, and ValueError when a loader process dies.
    """

    def __init__(self, dataset, sampler, *, num_workers, phase=None):
        self.sampler, self._dataset, self._num_workers = sampler, dataset, num_workers
        self._phase = phase or (lambda name: None)

    def __len__(self):
        return len(self.sampler)

    def _read_in_process(self, numbers):
        """Returns a micro-batch's arrays and an error's message or None: Paddle's DataLoader hangs at one raised."""
        step, micro_step = divmod(numbers[0], self.sampler.accumulation_steps)
        indices, positions = self.sampler.batch(self.sampler.first_step + step + 1, micro_step)
        try:
            return [*self._dataset.read(indices, positions)], None
        except Exception as error:  # even a bug must not hang the loop
            message = str(error) if isinstance(error, ValueError) else f"samples {indices.tolist()}: {error!r}"
            return [np.zeros(1)], message  # a batch without an array would not come through

    def _by_processes(self):
        from paddle.io import DataLoader

        # Paddle asks for two batches ahead a process; the loop and the device's copies hold some more.
        batches = (2 * self._num_workers + 4) * local_processes()
        pages = 4096 * (2 if self._dataset.encoder is None else 3)  # that begin an array
        needed = batches * (self.sampler.batch_size * self._dataset.sample_bytes + pages)
        free = free_shared_memory()
        fits = free is None or needed <= free
        if not fits and launched_rank()[0] == 0:
            say(
                f"note: /dev/shm has {free / 2**20:.1f} MiB free, {needed / 2**20:.1f} MiB were needed: loader "
                "processes send batches through pipes, which takes longer; a larger /dev/shm (docker run --shm-size) "
                "or tools/pack_features.py avoids it"
            )
        loader = DataLoader(
            range(len(self)),  # the numbers of the micro-batches, which workers read, as arrays
            collate_fn=self._read_in_process,
            num_workers=self._num_workers,
            worker_init_fn=start_worker,
            use_shared_memory=fits,
        )
        state = np.random.get_state()
        try:
            batches = iter(loader)
        except OSError as error:  # queues between processes take a few pages of /dev/shm too
            raise ValueError(
                f"loader processes can't be started: {error.strerror}. Is /dev/shm full? Give --num_workers 0 "
                "(--dataloader_num_workers 0 to the Trainer)"
            ) from None
        np.random.set_state(state)  # it has drawn a seed for the workers: a resumed run must not draw once more
        _name_dead_loaders()
        try:
            for arrays, error in batches:
                if error is not None:
                    raise ValueError(error)
                yield arrays
        except SystemError:
            raise ValueError(LOADER_DIED) from None

    def _by_thread(self):
        """Yields arrays of the micro-batches, several of them read by one call, while those before are used."""
        batches, size = self.sampler.batches(), self.sampler.batch_size
        max_count = max(1, READ_BYTES // (self._dataset.sample_bytes * size))

        def parts():
            count = 1  # the first step waits for no more
            while part := list(itertools.islice(batches, count)):
                yield [np.concatenate(arrays) for arrays in zip(*part, strict=True)]
                count = min(2 * count, max_count)

        for arrays in map_ahead(lambda part: self._dataset.read(*part), parts(), 1, 1):
            for start in range(0, len(arrays[0]), size):
                yield [array[start : start + size] for array in arrays]

    def __iter__(self):
        self._phase("reading data")
        for batch in self._batches():
            self._phase("training")
            yield batch
            self._phase("reading data")

    def _batches(self):
        if self._num_workers and self._dataset.store.reads_in_processes:
            return self._by_processes()
        import paddle

        from runtime.paddle_private import from_host

        one_by_one = itertools.starmap(self._dataset.read, self.sampler.batches())
        batches = self._by_thread() if self._num_workers else one_by_one
        # On a CPU the tensors are the arrays, without another copy.
        convert = from_host if paddle.get_device() == "cpu" else paddle.to_tensor
        return ([convert(array) for array in batch] for batch in batches)
