"""The folder of a run: a new experiment, one to resume, or an earlier run to move aside."""

import contextlib
import itertools
import os
import shutil
import time

import paddle

from runtime.collective import run_on_rank_0
from runtime.files import clear_leftovers
from runtime.process import counted, say
from runtime.run_lock import check_experiment_idle, experiment_name, list_experiments
from training.checkpoints.find import ENVIRONMENT, check_run
from training.checkpoints.read import load_checkpoint
from training.checkpoints.snapshots import FOLDER as SNAPSHOTS
from training.posthoc_ema import profile_name
from weights.runs import find_checkpoints, list_checkpoints, step_of


def open_experiment(resume, results_dir, config_file, config, lock):
    """Returns the checkpoint to resume (or None) and the hand-written loop's folder `results_dir/NNN-CONFIG`.

    A run that goes on from the newest checkpoint of an experiment in `results_dir` goes on in its folder; any other
    gets a new one, so that nothing is overwritten.

    Args:
        resume: None, a path for `load_checkpoint`, or `auto`: the newest checkpoint of this config, if there is one.
        lock: a `RunLock`, which takes the experiment folder on rank 0.

    Raises:
        ValueError: what `open_checkpoint` raises; another run is at work in the experiment that would go on.
    """
    name = experiment_name(config_file)
    try:
        run_on_rank_0(lambda: check_experiment_idle(resume, results_dir, name))
        if resume == "auto":
            checkpoint = open_checkpoint(results_dir, config, name, optional=True)
        else:
            checkpoint = open_checkpoint(resume, config) if resume else None
    except ValueError as error:
        raise ValueError(f"{error}" + ("; to start anew: --resume None" if resume == "auto" else "")) from None

    def folder():
        for _, experiment in list_experiments(results_dir, name) if checkpoint is not None else []:
            # What `auto` passed over is damaged, and may be done again in its place.
            mine = find_checkpoints(experiment)[: None if resume == "auto" else 1]
            if any(os.path.samefile(path, checkpoint.source) for path in mine):
                lock.take(experiment)
                clear_leftovers(os.path.dirname(checkpoint.source))
                return experiment
        for index in itertools.count(max((index for index, _ in list_experiments(results_dir)), default=-1) + 1):
            path = os.path.join(results_dir, f"{index:03d}-{name}")
            with contextlib.suppress(FileExistsError):  # of a run that was started in the same moment
                os.makedirs(path)
                lock.take(path)
                return path

    return checkpoint, run_on_rank_0(folder)


def open_output_dir(output_dir, config, lock, *, resume, overwrite):
    """Returns the checkpoint that a run in the Trainer's `output_dir` starts from, or None.

    Without `resume` that is the newest one in `output_dir`, if it is this config's. With `overwrite`, and without
    `resume`, the run starts anew. Checkpoints that the run would meet on its way, those of the run it replaces or later
    ones than the resumed, are first moved to `output_dir/previous-DATE`.

    Raises:
        ValueError: the folder holds another run, or one is at work in it: `lock`, a `RunLock`, can't take it.
    """
    # A folder that is not there is made, and locked, when it is clear that there is something to run in it.
    run_on_rank_0(lambda: os.path.isdir(output_dir) and lock.take(output_dir))
    if resume and resume != "auto":
        checkpoint = open_checkpoint(resume, config)
    elif overwrite and resume != "auto":
        checkpoint = None
    else:
        try:
            checkpoint = open_checkpoint(output_dir, config, optional=True)
        except ValueError as error:
            raise ValueError(f"{error}; {_WAYS_OUT}") from None
    run_on_rank_0(lambda: lock.take(output_dir))
    run_on_rank_0(lambda: _move_earlier_run_aside(output_dir, checkpoint, overwrite))
    return checkpoint


_WAYS_OUT = "choose another output folder, or put that run aside: --overwrite_output_dir"
_RUN_FILES = (
    *("config.json", ENVIRONMENT, "metrics.jsonl", "validation.jsonl", "evaluation.jsonl", "best.json"),
    *("tb_log", "images", "bad_steps", SNAPSHOTS),
)


def _move_earlier_run_aside(output_dir, checkpoint, overwrite):
    clear_leftovers(output_dir)
    existing = list_checkpoints(output_dir)
    if checkpoint is not None and any(os.path.samefile(path, checkpoint.source) for path in existing):
        step = checkpoint.progress["global_step"]
        moved = [path for path in existing if step_of(path) > step]
    elif existing and not overwrite:
        raise ValueError(f"output_dir {output_dir}: holds checkpoints of another run; {_WAYS_OUT}")
    else:
        moved = [*existing, *(os.path.join(output_dir, name) for name in _RUN_FILES)]
    moved = [path for path in moved if os.path.exists(path)]
    if moved:
        name = os.path.join(output_dir, time.strftime("previous-%Y%m%d-%H%M%S"))
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        aside = next(path for path in names if not os.path.exists(path))  # of a run started in the same second
        os.makedirs(aside)
        for path in moved:
            shutil.move(path, aside)
        say(f"moved {counted(len(moved), 'item')} of the earlier run to {aside}")


def open_checkpoint(path, config, experiment_name=None, *, optional=False):
    """Reads a checkpoint as `load_checkpoint` does; ValueError also if it holds another model or objective."""
    checkpoint = load_checkpoint(path, experiment_name, optional=optional, model=config["model"])
    if checkpoint is None:
        return None
    if checkpoint.config is not None:
        check_run(checkpoint.source, checkpoint.config, config)
    progress = checkpoint.progress
    if "samples_seen" not in progress:  # of an official or an older one
        batch = progress.get("global_batch_size", (checkpoint.config or config)["training"]["global_batch_size"])
        progress["samples_seen"] = progress["global_step"] * batch
    lacks = f"note: {checkpoint.source} has no averages"
    missing = [std for std in config["training"]["ema_profiles"] if profile_name(std) not in checkpoint.averages]
    if config["training"]["use_ema"] and "" not in checkpoint.averages and paddle.distributed.get_rank() == 0:
        say(f"{lacks}: the EMA starts from its weights")
    if missing and paddle.distributed.get_rank() == 0:
        stds = ", ".join(f"{std:g}" for std in missing)
        say(f"{lacks} of std {stds}: they begin with its weights, at step {progress['global_step']:,}")
    return checkpoint
