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

import os

import paddle

from runtime.files import delete_folder
from runtime.paddle_private import master_weights
from runtime.process import one_line, say
from training.checkpoints import state
from training.checkpoints.background import FolderSaver
from training.checkpoints.best import BEST, best_checkpoint, settle_best
from training.checkpoints.find import OBJECTIVE
from training.parallel.shares import LocalShard
from weights.runs import CONFIG, MODEL, OPTIMIZER, STATE, damage, list_checkpoints


class CheckpointSaver(FolderSaver):
    """Saves the checkpoints of a run and deletes old ones; after a refusal the next save tries again.

    Args:
        save_total_limit: whole checkpoints to keep, None: all.
        metric: the one that says which checkpoint is the best, which is kept beyond the limit; None: as it was.
        options: those of `FolderSaver`.
    """

    what, refused = "checkpoints", "training goes on, and the next save tries again"

    def __init__(self, session, *, save_total_limit=None, metric=None, **options):
        super().__init__(session, **options)
        self.save_total_limit, self.metric = save_total_limit, metric

    def files(self):
        """Yields the files of the session's checkpoint, as `FolderSaver` says."""
        session = self.session
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

    def copies(self):
        """Returns the weights, AdamW's two moments, masters if there are any, and the averages."""
        return 3 + len(self.session.averages) + bool(master_weights(self.session.optimizer))

    def written(self, folder):
        """Settles which checkpoint is the best, and deletes old ones."""
        self.settle_best(os.path.dirname(folder))
        spared = best_checkpoint(self.session.folder)
        rotate_checkpoints(os.path.dirname(folder), self.save_total_limit, self.say, spared=spared)

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
