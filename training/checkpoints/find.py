"""Finds training checkpoints: which folders are one, which are whole, and which one a run resumes."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.files import MANIFEST, restore_replaced
from runtime.process import say
from runtime.run_lock import list_experiments
from training.checkpoints.whole_folder import damage
from weights.source import is_training_checkpoint

CONFIG, MODEL, EMA_STATE = "config.json", "model_state.pdparams", "ema_state.pdparams"
OPTIMIZER, OBJECTIVE, STATE = "optimizer.pdopt", "objective.pdparams", "trainer_state.json"
_CHECKPOINT_NAME = re.compile(r"^(?:checkpoint-)?(\d+)$")


@dataclass
class Checkpoint:
    """What was read of a checkpoint: arrays by name, and `progress` with `global_step` and `samples_seen`."""

    source: str
    config: dict | None
    model: dict
    ema: dict | None
    read_optimizer: Callable[[], dict]  # the largest part is read when it is wanted
    objective: dict = field(default_factory=dict)
    progress: dict = field(default_factory=dict)

    @property
    def optimizer(self):
        return self.read_optimizer()


def is_checkpoint(folder):
    """Whether `folder` is a training checkpoint that can be resumed, not only sampled; perhaps a damaged one."""
    if _holds(folder, MANIFEST):
        return _holds(folder, MODEL, OPTIMIZER, STATE)
    return is_training_checkpoint(folder) and _holds(folder, STATE)


def _holds(folder, *names):
    """Whether any of these files is in `folder`."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def list_checkpoints(folder):
    """The checkpoints `checkpoint-N` or `N` directly in `folder`, oldest step first, as paths; damaged ones too."""
    if not os.path.isdir(folder):
        return []
    restore_replaced(folder)
    found = []
    for entry in os.scandir(folder):
        match = _CHECKPOINT_NAME.match(entry.name)
        if match and _holds(entry.path, MODEL, OPTIMIZER, STATE):
            found.append((int(match.group(1)), entry.path))
    return [path for _, path in sorted(found)]


def find_checkpoints(folder, experiment_name=None):
    """The checkpoints of a run's folder, newest first; damaged ones too.

    Args:
        folder: a checkpoint itself; a folder of `checkpoint-N` (the Trainer's output_dir); an experiment folder with
            `checkpoints/`; or a results folder of experiments `NNN-NAME`, those of the newest experiment first.
        experiment_name: consider experiments of this NAME only.
    """
    if is_checkpoint(folder):
        return [folder]
    experiments = [path for _, path in reversed(list_experiments(folder, experiment_name))]
    direct = list_checkpoints(folder) or list_checkpoints(os.path.join(folder, "checkpoints"))
    found = [direct] if direct else [list_checkpoints(os.path.join(path, "checkpoints")) for path in experiments]
    return [path for paths in found for path in reversed(paths)]


def _damage(path, checksums=False):
    return damage(path, required=(CONFIG, MODEL, OPTIMIZER, STATE), checksums=checksums)


def pick_checkpoint(folder, experiment_name=None):
    """The newest whole checkpoint, with every checksum right; prints why a newer one is passed over.

    A checkpoint of a time before manifests is taken only if `folder` is that checkpoint itself: what can't be checked
    is not chosen, and the user who knows it whole can name it.

    Args:
        folder: as for `find_checkpoints`.

    Returns:
        Its path; None if there is no checkpoint at all.

    Raises:
        ValueError: one line: there are checkpoints, but no whole one. A new run in their place is the user's choice.
    """
    if is_checkpoint(folder):
        if not _holds(folder, MANIFEST):
            say(f"note: {folder} has no {MANIFEST}, as before there were any: it is resumed unchecked")
        elif wrong := _damage(folder, checksums=True):
            raise ValueError(
                f"{folder}: {wrong}; resume another one (or delete its {MANIFEST}, if you changed the files yourself)"
            )
        return folder
    passed = []  # (path, what is wrong)
    for path in find_checkpoints(folder, experiment_name):
        wrong = _damage(path, checksums=True)
        if wrong is None:
            return path
        say(f"note: checkpoint {path} is passed over: {wrong}")
        passed.append((path, wrong))
    if passed:
        path, wrong = passed[0]
        raise ValueError(
            f"{folder}: none of its {len(passed)} checkpoint(s) is known to be whole; the newest is {path}: {wrong}; "
            f"one of a time before there was a {MANIFEST} can be resumed by its own path"
        )
    return None


def _step_of(path):
    return int(_CHECKPOINT_NAME.match(os.path.basename(path)).group(1))
