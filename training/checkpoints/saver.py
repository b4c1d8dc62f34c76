"""Training checkpoints: one folder, the same from both loops, whole tensors whatever the parallel degrees were.

    config.json             the resolved config
    model_state.pdparams    weights, float32, official names
    ema_state.pdparams      their averages, same keys; ema_state_NAME.pdparams for averages that have a name
    optimizer.pdopt         AdamW's moments by parameter name
    trainer_state.json      step, data position, LR schedule, loss scaler, random generators of Python and numpy
    objective.pdparams      only if the objective has a state (the loss-aware timestep sampler)
    manifest.json           sizes and checksums of the others; written last

The random numbers of a step are a function of (seed, step), so that resuming needs no generator state of Paddle's.
"""

import collections
import contextlib
import math
import os
import threading

import paddle

from models.parallel import whole_shape
from runtime.collective import run_on_rank_0
from runtime.files import FolderWriter, delete_folder
from runtime.machine import available_memory
from runtime.paddle_private import master_weights
from runtime.process import SAVING_THREAD, is_refusal, one_line, say
from training.checkpoints import state
from training.checkpoints.best import BEST, best_checkpoint, settle_best
from training.checkpoints.find import OBJECTIVE
from training.parallel.shares import LocalShard
from weights.files import save_pdparams
from weights.runs import CONFIG, MODEL, OPTIMIZER, STATE, damage, list_checkpoints


def checkpoint_files(session):
    """Yields the files of a session's checkpoint, `(name, JSON value or arrays by name)`; a collective.

    The arrays, missing on other ranks than 0, are copies: training may go on while they are written.
    """
    model, optimizer = session.model, session.optimizer
    progress = {
        **session.progress(),
        "ema_updates": 0,
        **{average.key("ema_updates"): average.num_updates for average in session.averages},
        "lr_scheduler": state.plain_state(session.lr_scheduler),
        "scaler": state.plain_state(session.scaler),
        "random": state.random_state(),
    }
    yield CONFIG, session.config
    yield MODEL, state.whole_weights(model, optimizer)
    for average in session.averages:
        yield f"{average.key('ema_state')}.pdparams", LocalShard(model, optimizer).gather(average.state_dict())
    yield OPTIMIZER, state.whole_optimizer_state(model, optimizer)
    yield OBJECTIVE, {key: value.numpy() for key, value in session.objective.state_dict().items()}
    yield STATE, progress


def write_checkpoint(folder, files):
    """Writes the files of an iterator as a folder, whole or not at all, on rank 0; the others only help to gather them.

    Raises:
        OSError: the file system refused; on rank 0, when all files were gathered. What had the folder's name stays.
    """
    with contextlib.ExitStack() as at_the_end:
        # The other ranks gather all files, whatever rank 0 has met.
        at_the_end.callback(collections.deque, files, maxlen=0)
        if paddle.distributed.get_rank() == 0:
            writer = FolderWriter(folder)
            at_the_end.callback(writer.discard)  # before that; what is finished stays
            for name, value in files:
                if name.endswith(".json"):
                    writer.write_json(name, value, indent=None if name == STATE else 2)
                elif value:
                    with writer.open(name) as file:
                        save_pdparams(value, file)
                del value  # at 7B parameters the host has each part once, not all together
            writer.finish()


class CheckpointSaver:
    """Saves the checkpoints of a run beside its training, one at a time, and deletes old ones.

    Training waits for the copy out of the device alone; a thread of rank 0 writes, checksums and flushes. A file system
    that refuses is reported, and the next save tries again.

    Args:
        say: prints a line, on rank 0; it is called from the thread too.
        save_total_limit: whole checkpoints to keep, None: all.
        background: False: training waits until the checkpoint is on the disk. So it does where the copies would take
            more than half of the memory that is free.
        metric: the one that says which checkpoint is the best, which is kept beyond the limit; None: as it was.
    """

    def __init__(self, session, *, say=say, save_total_limit=None, background=True, metric=None):
        self.session, self.say, self.metric = session, say, metric
        self.save_total_limit, self.background = save_total_limit, background
        self._thread = self._failure = None

    def save(self, folder):
        """Saves the session as `folder`; a collective."""
        self.wait()
        files = checkpoint_files(self.session)
        if not self._in_background():
            self._write(folder, files)
            return
        gathered = list(files)
        if paddle.distributed.get_rank() == 0:
            # What was written is taken out of the list, so that its memory is free.
            files = (gathered.pop(0) for _ in range(len(gathered)))
            self._thread = threading.Thread(target=self._write, args=(folder, files), name=SAVING_THREAD)
            self._thread.start()

    def finish(self):
        """Waits for the save under way; a collective. Raises its error, on every rank, if the last save failed."""
        self.wait()
        run_on_rank_0(lambda: self._failure)

    def wait(self):
        """Waits for the save under way, on rank 0; nothing is under way on the others."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _in_background(self):
        if self.background and paddle.distributed.get_rank() == 0:
            session = self.session
            copies = 3 + len(session.averages) + bool(master_weights(session.optimizer))
            size = copies * 4 * sum(math.prod(whole_shape(parameter)) for parameter in session.model.parameters())
            memory = available_memory()
            if memory is not None and size > 0.5 * memory:
                self.background = False
                self.say(
                    f"note: checkpoints take {size / 2**30:.1f} GiB and {memory / 2**30:.1f} GiB of memory are free: "
                    "training waits while they are written"
                )
        return self.background

    def _write(self, folder, files):
        try:
            write_checkpoint(folder, files)
        except Exception as error:
            self._failure = error  # of the thread, it would be lost
            if not is_refusal(error):
                raise
            then = "training goes on, and the next save tries again"
            self.say(f"warning: {folder} is not saved: {one_line(error)}; {then}")
        else:
            self._failure = None
            self.settle_best(os.path.dirname(folder))
            spared = best_checkpoint(self.session.folder)
            rotate_checkpoints(os.path.dirname(folder), self.save_total_limit, self.say, spared=spared)
            self.say(f"saved {folder}")

    def settle_best(self, checkpoints):
        """Brings the run's `best.json` up to date, on rank 0, see `training.checkpoints.best`."""
        try:
            settle_best(self.session.folder, checkpoints, self.metric)
        except OSError as error:
            self.say(f"warning: {BEST} is not written: {one_line(error)}")


def rotate_checkpoints(folder, save_total_limit, say=say, *, spared=None):
    """Deletes, on rank 0, what is older than the newest `save_total_limit` whole checkpoints (None: nothing).

    The checkpoint `spared`, a path, stays.
    """
    if save_total_limit and save_total_limit > 0 and paddle.distributed.get_rank() == 0:
        try:
            found = list_checkpoints(folder)
            whole = [path for path in found if damage(path) is None]
            older = found[: found.index(whole[-save_total_limit])] if len(whole) >= save_total_limit else []
            for path in older:
                if spared is None or os.path.abspath(path) != os.path.abspath(spared):
                    delete_folder(path)
        except OSError as error:
            say(f"warning: no old checkpoint is deleted: {one_line(error)}")
