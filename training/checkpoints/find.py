"""Finds training checkpoints: which folders are one, which are whole, and which one a run resumes."""

import hashlib
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from runtime.files import MANIFEST, restore_replaced
from runtime.process import say
from runtime.progress import tqdm
from runtime.run_lock import list_experiments
from runtime.untrusted import read_json
from weights.source import is_training_checkpoint

CONFIG, MODEL = "config.json", "model_state.pdparams"
OPTIMIZER, OBJECTIVE, STATE = "optimizer.pdopt", "objective.pdparams", "trainer_state.json"
ENVIRONMENT = "environment.json"  # of a run's folder: where and on what it trains
AVERAGES = re.compile(r"^ema_state(?:_(.+))?\.pdparams$")
_CHECKPOINT_NAME = re.compile(r"^(?:checkpoint-)?(\d+)$")


@dataclass
class Checkpoint:
    """The contents of a checkpoint: arrays by name, and `progress`, see `Session.progress`."""

    source: str
    config: dict | None
    model: dict
    averages: dict[str, dict]  # by their names, see `EMA`
    read_optimizer: Callable[[], dict]  # the largest part is read when it is wanted
    objective: dict = field(default_factory=dict)
    progress: dict = field(default_factory=dict)

    @property
    def optimizer(self):
        return self.read_optimizer()


def is_checkpoint(folder):
    """Returns whether `folder` is a training checkpoint that can be resumed, not only sampled; damaged or not."""
    if _holds(folder, MANIFEST):
        return _holds(folder, MODEL, OPTIMIZER, STATE)
    return is_training_checkpoint(folder) and _holds(folder, STATE)


def _holds(folder, *names):
    """Returns whether any of these files is in `folder`."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def list_checkpoints(folder):
    """Lists the checkpoints `checkpoint-N` or `N` directly in `folder`, oldest first, as paths; damaged ones too."""
    if not os.path.isdir(folder):
        return []
    restore_replaced(folder)
    paths = [entry.path for entry in os.scandir(folder) if _CHECKPOINT_NAME.match(entry.name)]
    return sorted((path for path in paths if _holds(path, MODEL, OPTIMIZER, STATE)), key=step_of)


def find_checkpoints(folder, experiment_name=None):
    """Lists the checkpoints of a folder, newest first; damaged ones too.

    The folder may be a checkpoint itself; one of `checkpoint-N` (the Trainer's output_dir); an experiment's with
    `checkpoints/`; or one of experiments `NNN-NAME`, only those of `experiment_name` if that is given.
    """
    if is_checkpoint(folder):
        return [folder]
    found = list_checkpoints(folder) or list_checkpoints(os.path.join(folder, "checkpoints"))
    for _, experiment in list_experiments(folder, experiment_name) if not found else []:
        found += list_checkpoints(os.path.join(experiment, "checkpoints"))
    return found[::-1]


def damage(folder, *, required=(CONFIG, MODEL, OPTIMIZER, STATE), checksums=False):
    """Returns, in words, what is wrong with a folder that `runtime.files.FolderWriter` wrote; None for a whole one.

    Its manifest must list the `required` files. With `checksums` every file is read to its end.
    """
    if not _holds(folder, MANIFEST):
        return f"it has no {MANIFEST}"
    try:
        files = read_json(os.path.join(folder, MANIFEST))["files"]
        sizes = {name: int(entry["size"]) for name, entry in files.items()}
        digests = {name: str(entry["sha256"]) for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sizes = {}
    if not {*required} <= {*sizes} or not sizes or any(os.path.basename(name) != name for name in sizes):
        return f"its {MANIFEST} is damaged"
    for name, size in sizes.items():
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            return f"{name} is missing"
        if os.path.getsize(file) != size:
            return f"{name} has {os.path.getsize(file):,} bytes, {size:,} were written"
    return _wrong_checksum(folder, digests, sum(sizes.values())) if checksums else None


def _wrong_checksum(folder, digests, total):
    stop = threading.Event()

    def check(name):
        digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 24))
        try:
            with open(os.path.join(folder, name), "rb", buffering=0) as file:
                while not stop.is_set() and (count := file.readinto(buffer)):
                    digest.update(buffer[:count])
                    bar.update(count)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        right = digest.hexdigest() == digests[name]
        return None if right else f"{name} is damaged: its checksum is not that of what was written"

    title = f"checking {os.path.basename(os.path.normpath(folder))}"
    with (
        tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=2, leave=False) as bar,
        ThreadPoolExecutor(4) as pool,  # SHA-256 is slower than a disk; a checkpoint has three large files
    ):
        try:
            return next(filter(None, pool.map(check, digests)), None)
        finally:
            stop.set()  # neither Ctrl-C nor what is damaged waits for the files that are still being read


def pick_checkpoint(folder, experiment_name=None):
    """Returns the newest of `find_checkpoints` whose checksums are right, None if there are no checkpoints at all.

    One without a manifest, which can't be checked, is taken only if `folder` is that checkpoint itself. It is printed
    why a newer one is passed over. Raises ValueError, one line, if there are checkpoints, but no whole one.
    """
    if is_checkpoint(folder):
        if not _holds(folder, MANIFEST):
            say(f"note: {folder} has no {MANIFEST}, as older ones: it is resumed unchecked")
        elif wrong := damage(folder, checksums=True):
            raise ValueError(
                f"{folder}: {wrong}; resume another one (or delete its {MANIFEST}, if you changed the files yourself)"
            )
        return folder
    passed = []
    for path in find_checkpoints(folder, experiment_name):
        wrong = damage(path, checksums=True)
        if wrong is None:
            return path
        say(f"note: checkpoint {path} is passed over: {wrong}")
        passed.append(f"{path}: {wrong}")
    if passed:
        raise ValueError(
            f"{folder}: none of its {len(passed)} checkpoint(s) is known to be whole; the newest is {passed[0]}; "
            f"one without a {MANIFEST} can be resumed by its own path"
        )
    return None


def step_of(path):
    """Returns the step in the name of a checkpoint."""
    return int(_CHECKPOINT_NAME.match(os.path.basename(path)).group(1))
