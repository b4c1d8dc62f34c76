"""Training checkpoints: one folder, the same from both loops, whole tensors whatever the parallel degrees were.

    config.json             the resolved config
    model_state.pdparams    weights, float32, official names
    ema_state.pdparams      their averages, same keys
    optimizer.pdopt         AdamW's moments by parameter name
    trainer_state.json      step, data position, LR schedule, loss scaler, random generators of Python and numpy
    objective.pdparams      only if the objective has a state (the loss-aware timestep sampler)
    manifest.json           sizes and checksums of the others; written last

The random numbers of a step are a function of (seed, step), so that resuming needs no generator state of Paddle's.
"""

import os
import threading

import numpy as np
import paddle

from runtime.files import FolderWriter, delete_folder
from runtime.machine import available_memory
from runtime.process import SAVING_THREAD, is_refusal, one_line, say
from training.checkpoints.find import CONFIG, EMA_STATE, MODEL, OBJECTIVE, OPTIMIZER, STATE, _damage, list_checkpoints
from training.checkpoints.state import _is_plain, _plain_scaler, _random_state, _whole_optimizer_state, whole_weights
from training.parallel.collective import of_rank_0
from training.parallel.shares import Shares, master_weights
from weights.files import save_pdparams


def checkpoint_files(*, config, model, optimizer, lr_scheduler, scaler, ema, objective, progress):
    """The files of a checkpoint, one after the other: `(name, JSON value or arrays by name)`.

    A collective: every rank goes through all of them; on other ranks than 0 the arrays are missing. The arrays are
    copies: training may go on while they are written.

    Args:
        model: the network, not wrapped.
        ema: an `EMA`, or None.
        progress: `global_step`, `samples_seen` and what else is worth knowing, JSON values.
    """
    shares = Shares(model, optimizer)
    masters = master_weights(optimizer)
    state = {
        **progress,
        "ema_updates": ema.num_updates if ema is not None else 0,
        "lr_scheduler": {key: value for key, value in lr_scheduler.state_dict().items() if _is_plain(value)},
        "scaler": _plain_scaler(scaler),
        "random": _random_state(),
    }
    yield CONFIG, config
    yield MODEL, whole_weights(model, shares, masters)
    yield EMA_STATE, shares.whole(ema.state_dict()) if ema is not None else {}
    yield OPTIMIZER, _whole_optimizer_state(optimizer, model, shares, masters)
    yield OBJECTIVE, {key: value.numpy() for key, value in objective.state_dict().items()}
    yield STATE, state


def write_checkpoint(folder, files):
    """Writes a checkpoint of `checkpoint_files`, on rank 0; the others only take part in gathering them.

    It is written beside, flushed and renamed when complete: a folder of this name is a whole checkpoint or is not
    there. An existing one of the same step is replaced, and stays if that fails.

    Raises:
        OSError: the file system refused; on rank 0, when all files were gathered.
    """
    if paddle.distributed.get_rank() > 0:
        for _ in files:
            pass
        return
    writer = failure = None
    try:
        writer = FolderWriter(folder)
    except OSError as error:
        failure = error
    for name, value in files:
        if failure is None and value:
            try:
                _write_file(writer, name, value)
            except OSError as error:
                failure = error
        del value  # at 7B parameters the host has each part once, not all together
    if failure is None:
        try:
            writer.finish()
        except OSError as error:
            failure = error
    if failure is not None:
        if writer is not None:
            writer.discard()
        raise failure


def _write_file(writer, name, value):
    if name.endswith(".json"):
        writer.write_json(name, value, indent=None if name == STATE else 2)
    else:
        with writer.open(name) as file:
            save_pdparams(value, file)


class CheckpointSaver:
    """Saves the checkpoints of a run beside its training, and deletes old ones.

    Training waits for the copy out of the device alone; a thread of rank 0 writes, checksums and flushes. One save is
    under way at a time: the next one waits for it. A file system that refuses is reported, training goes on, and the
    next save tries again.

    Args:
        say: prints a line; it is called from the thread too.
        save_total_limit: whole checkpoints to keep, None: all.
        background: False: training waits until the checkpoint is on the disk. So it does where the copies, which are
            kept until they are written, would take more than half of the memory that is free.
    """

    def __init__(self, *, say, save_total_limit=None, background=True):
        self.say = say
        self.save_total_limit = save_total_limit
        self.background = background
        self._thread = self._failure = None

    def save(self, folder, **parts):
        """Saves `checkpoint_files(**parts)` as `folder`, then deletes what `save_total_limit` says. A collective."""
        self.wait()
        files = checkpoint_files(**parts)
        if not self._in_background(parts):
            self._write(folder, files)
            return
        gathered = list(files)
        if paddle.distributed.get_rank() == 0:
            self._thread = threading.Thread(
                target=self._write, args=(folder, _taken_from(gathered)), name=SAVING_THREAD
            )
            self._thread.start()

    def finish(self):
        """Waits for the save under way; a collective. `OSError` on every rank: the last save of all failed."""
        self.wait()

        def last():
            if self._failure is not None:
                raise self._failure

        of_rank_0(last)

    def wait(self):
        """Waits for the save under way, on rank 0; nothing is under way on the others."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _in_background(self, parts):
        if self.background and paddle.distributed.get_rank() == 0:
            copies = 3 + (parts["ema"] is not None) + bool(master_weights(parts["optimizer"]))
            shapes = Shares(parts["model"]).whole_shapes().values()
            size = copies * 4 * sum(int(np.prod(shape)) for shape in shapes)
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
            if paddle.distributed.get_rank() == 0:
                then = "training goes on, and the next save tries again"
                self.say(f"warning: {folder} is not saved: {one_line(error)}; {then}")
        else:
            self._failure = None
            rotate_checkpoints(os.path.dirname(folder), self.save_total_limit, self.say)
            self.say(f"saved {folder}")


def _taken_from(items):
    """The items of a list, each given away: its memory is free when it has been used."""
    while items:
        yield items.pop(0)


def rotate_checkpoints(folder, save_total_limit, say=say):
    """Deletes what is older than the newest `save_total_limit` whole checkpoints in `folder` (None: nothing).

    Damaged ones don't count: as long as there are fewer whole ones, nothing is deleted. Rank 0 only.
    """
    if save_total_limit and save_total_limit > 0 and paddle.distributed.get_rank() == 0:
        try:
            found = list_checkpoints(folder)
            whole = [path for path in found if _damage(path) is None]
            older = found[: found.index(whole[-save_total_limit])] if len(whole) >= save_total_limit else []
            for path in older:
                delete_folder(path)
        except OSError as error:
            say(f"warning: no old checkpoint is deleted: {one_line(error)}")
