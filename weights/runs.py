"""The checkpoints in a run's folder: which folders are one, which are whole, which is the newest.

A run's folder is the Trainer's `output_dir`, with `checkpoint-N` in it, or the hand-written loop's
`results_dir/NNN-NAME`, with `checkpoints/N`. Paddle is not imported.
"""

import glob
import hashlib
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

from runtime.files import MANIFEST, restore_replaced
from runtime.process import launched_rank, say
from runtime.progress import tqdm
from runtime.run_lock import list_experiments
from runtime.untrusted import listed, read_json

CONFIG, MODEL = "config.json", "model_state.pdparams"
OPTIMIZER, STATE = "optimizer.pdopt", "trainer_state.json"
_PIPELINES = ("model_index.json", "inference.json")  # of a pipeline's folder, and of one of programs
_CHECKPOINT_NAME = re.compile(r"^(?:checkpoint-)?(\d+)$")


def is_training_checkpoint(path):
    """Returns whether `path` is a folder that a training loop saved: config.json beside model_state.pdparams."""
    return all(os.path.isfile(os.path.join(path, name)) for name in (CONFIG, MODEL))


def checkpoint_hint(folder):
    """Returns "; did you mean ...?" with the newest training checkpoint below a folder; empty if there is none."""
    found = glob.glob(os.path.join(glob.escape(folder), "**", "trainer_state.json"), recursive=True)
    found = [os.path.dirname(name) for name in found if is_training_checkpoint(os.path.dirname(name))]
    return f"; did you mean {max(found, key=os.path.getmtime)}?" if found else ""


def is_checkpoint(folder):
    """Returns whether `folder` is a training checkpoint that can be resumed, not only sampled; damaged or not."""
    if holds(folder, MANIFEST):
        return holds(folder, MODEL, OPTIMIZER, STATE)
    return is_training_checkpoint(folder) and holds(folder, STATE)


def holds(folder, *names):
    """Returns whether any of these files is in `folder`."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def list_checkpoints(folder, *, restore=True):
    """Lists the checkpoints `checkpoint-N` or `N` directly in `folder`, oldest first, as paths; damaged ones too.

    With `restore`, for the process that writes them, one that a kill caught while it was being replaced is put back.
    """
    if not os.path.isdir(folder):
        return []
    if restore:
        restore_replaced(folder)
    paths = [entry.path for entry in os.scandir(folder) if _CHECKPOINT_NAME.match(entry.name)]
    return sorted((path for path in paths if holds(path, MODEL, OPTIMIZER, STATE)), key=step_of)


def find_checkpoints(folder, experiment_name=None, *, restore=True):
    """Lists the checkpoints of a folder, newest first; damaged ones too. `restore`: see `list_checkpoints`.

    The folder may be a checkpoint itself; one of `checkpoint-N` (the Trainer's output_dir); an experiment's with
    `checkpoints/`; or one of experiments `NNN-NAME`, only those of `experiment_name` if that is given.
    """
    if is_checkpoint(folder):
        return [folder]
    found = _of_run(folder, restore=restore)
    for _, experiment in list_experiments(folder, experiment_name) if not found else []:
        found += list_checkpoints(os.path.join(experiment, "checkpoints"), restore=restore)
    return found[::-1]


def _of_run(folder, **options):
    """Lists the checkpoints of one run, oldest first."""
    return list_checkpoints(folder, **options) or list_checkpoints(os.path.join(folder, "checkpoints"), **options)


def resolve_run(path):
    """Returns the newest whole checkpoint of a run's folder, in the order of the steps; any other path as it is.

    `path` may also be a `results_dir` in which one run alone has checkpoints. It is printed which checkpoint is taken,
    and why a newer one is not. ValueError, one line: several runs, or checkpoints of which none is whole.
    """
    path = os.fspath(path)
    if not os.path.isdir(path) or is_checkpoint(path) or is_training_checkpoint(path) or holds(path, *_PIPELINES):
        return path
    runs = {path: _of_run(path, restore=False)}  # nothing is renamed under a run that goes on
    if not runs[path]:
        experiments = [experiment for _, experiment in list_experiments(path)]
        runs = {folder: found for folder in experiments if (found := _of_run(folder, restore=False))}
    if not runs:
        return path
    if len(runs) > 1:
        names = listed([os.path.basename(run) for run in runs], 5)
        raise ValueError(f"{path}: holds checkpoints of {len(runs)} runs ({names}); give the folder of one")
    ((run, found),) = runs.items()
    passed = []
    for checkpoint in found[::-1]:
        wrong = damage(checkpoint, required=(CONFIG, MODEL))
        if wrong is None:
            _say_once(f"{run}: its newest whole checkpoint is taken, {checkpoint}")
            return checkpoint
        _say_once(f"note: checkpoint {checkpoint} is passed over: {wrong}")
        passed.append(f"{checkpoint}: {wrong}")
    raise ValueError(
        f"{path}: none of its {len(found)} checkpoint(s) is known to be whole; the newest is {passed[0]}; one without "
        f"a {MANIFEST} can be given by its own path"
    )


def _say_once(text):
    if launched_rank()[0] == 0:
        say(text)


def damage(folder, *, required=(CONFIG, MODEL, OPTIMIZER, STATE), checksums=False):
    """Returns, in words, what is wrong with a folder that `runtime.files.FolderWriter` wrote; None for a whole one.

    Its manifest must list the `required` files. With `checksums` every file is read to its end.
    """
    if not holds(folder, MANIFEST):
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


def step_of(path):
    """Returns the step in the name of a checkpoint."""
    return int(_CHECKPOINT_NAME.match(os.path.basename(path)).group(1))
