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

import functools
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import paddle

from models.parallel import rank_part
from models.weights import (
    check_finite,
    check_state,
    is_state,
    load_weights,
    official_to_paddle,
    plain_names,
    readable,
    safe_load,
    save_pdparams,
    without_rounding,
)
from sampling.checkpoint import is_training_checkpoint, read_weights
from training.config import differences, own_config, resolve_config, sampling_differences
from training.manifest import MANIFEST, FolderWriter, clear_leftovers, damage, delete_folder, restore_replaced
from training.optimizer import optimizer_state, set_optimizer_state
from training.packed import available_memory
from training.run_lock import check_experiment_idle, experiment_name, list_experiments
from training.runtime import SAVING_THREAD, counted, is_refusal, one_line, say
from training.shares import Shares, held_name, held_part, master_weights
from untrusted import inside, printable, read_json

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


def _random_state():
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def _set_random_state(state):
    try:
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype="uint32"), *rest))
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{STATE}: holds no states of Python's and numpy's generators ({error})") from None


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


def whole_weights(model, shares, masters):
    """`{name: float32 array}` of the network's weights on rank 0; under O2 of the masters, which are the weights."""
    # Without masters, and without sharding of the weights, the ranks of a sharding group hold the same ones.
    shares = shares if masters or shares.sliced else Shares(model)
    return shares.whole(
        {
            name: masters.get(held_name(parameter), held_part(parameter))
            for name, parameter in model.named_parameters()
            if shares.own(name)
        }
    )


def _whole_optimizer_state(optimizer, model, shares, masters):
    held = optimizer_state(optimizer, model, shares)
    names = [name for name, parameter in model.named_parameters() if not parameter.stop_gradient]
    arrays = {name: {} for name in names}
    for key in ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc", *(["master_weight"] if masters else [])):
        tensors = {name: state[key] for name, state in held.items() if key in state}
        gather = shares.whole_scalars if key.endswith("pow_acc") else shares.whole
        for name, array in gather(tensors, names).items():
            arrays[name][key] = array
    return arrays


def _is_plain(value):
    return isinstance(value, (int, float, str, bool))


def _plain_scaler(scaler):
    state = scaler.state_dict() if scaler is not None else {}
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in state.items()}


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


def load_checkpoint(path, experiment_name=None):
    """Reads a checkpoint folder (or a run's folder: `pick_checkpoint`), or an official `train.py` file `.pt`.

    Nothing that the files hold is executed. Every rank calls it; rank 0 chooses and checks.

    Raises:
        ValueError: one line: nothing there, not a checkpoint, a damaged or unreadable file.
    """
    path = str(path)
    if os.path.isfile(path):
        return _load_official(path)
    folder = of_rank_0(lambda: pick_checkpoint(path, experiment_name))
    if folder is None:
        raise ValueError(
            f"{path}: no training checkpoint there; expected a folder with {CONFIG}, {MODEL} and {STATE}, a run's "
            "folder of such, or an official .pt file"
        )

    def optional(name):
        file = inside(folder, name)
        return load_weights(file) if os.path.isfile(file) else None

    state = inside(folder, STATE)
    progress = read_json(state, infinity=True)
    if not isinstance(progress, dict) or not isinstance(progress.get("global_step"), int):
        raise ValueError(f"{state}: not the state of a training run: it has no global_step")

    optimizer = inside(folder, OPTIMIZER)
    if not os.path.isfile(optimizer):
        raise ValueError(f"{optimizer}: no such file")
    return Checkpoint(
        source=folder,
        config=resolve_config(read_json(inside(folder, CONFIG)), source=os.path.join(folder, CONFIG)),
        model=load_weights(inside(folder, MODEL)),
        ema=optional(EMA_STATE),
        read_optimizer=functools.partial(_read_optimizer, optimizer),
        objective=optional(OBJECTIVE) or {},
        progress=progress,
    )


def _read_optimizer(path):
    state = safe_load(path)
    if not isinstance(state, dict) or not all(isinstance(n, str) and is_state(entry) for n, entry in state.items()):
        raise ValueError(f"{path}: not an optimizer's state: expected {{parameter: {{accumulator: array}}}}")
    return state


def _load_official(path):
    """The official train.py's `{model, ema, opt, args}`: torch.optim.AdamW's state by parameter index."""
    raw = safe_load(path, tolerant=True)
    if isinstance(raw, dict):
        raw = {**raw, **{name: readable(raw, name, path) for name in ("model", "ema", "opt") if name in raw}}
    if not isinstance(raw, dict) or not {"model", "opt"} <= set(raw):
        raise ValueError(
            f"{path}: not a training checkpoint: the official layout has 'model', 'ema' and 'opt'; to start from "
            "weights alone use --pretrained_model_path"
        )
    for name in ("model", "ema"):
        if name in raw and not is_state(raw[name]):
            raise ValueError(f"{path}: its {name!r} is no state dict")
        if name in raw:
            raw[name] = plain_names(raw[name])
            check_finite(raw[name], source=f"{path}: {name}")
    try:
        moments, step = _official_moments(raw)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        said = printable(repr(error), 200)
        raise ValueError(f"{path}: its 'opt' is not the state of torch.optim.AdamW ({said})") from None
    for kind in ("moment1", "moment2"):
        check_finite({name: entry[kind] for name, entry in moments.items()}, source=f"{path}: opt, {kind}")
    return Checkpoint(
        source=path,
        config=None,
        model=official_to_paddle(raw["model"]),
        ema=official_to_paddle(raw["ema"]) if "ema" in raw else None,
        read_optimizer=lambda: moments,
        progress={"global_step": step, **_official_batch(raw.get("args"))},
    )


def _official_batch(args):
    """Returns the global batch of the run that wrote an official file, if its `args` tell."""
    batch = args.get("global_batch_size") if isinstance(args, dict) else None
    return {"global_batch_size": batch} if type(batch) is int and batch > 0 else {}


def _official_moments(raw):
    names = list(raw["model"])
    beta1, beta2 = (_number(beta, below=1) for beta in raw["opt"]["param_groups"][0]["betas"])
    moments, step = {}, 0
    for index, entry in raw["opt"]["state"].items():
        name = names[index]
        step = int(_number(entry["step"], below=1 << 53))
        if not is_state({key: entry[key] for key in ("exp_avg", "exp_avg_sq")}):
            raise ValueError("a moment that is no tensor")
        moments[name] = {
            "moment1": official_to_paddle({name: entry["exp_avg"]})[name],
            "moment2": official_to_paddle({name: entry["exp_avg_sq"]})[name],
            # Paddle keeps beta^(n + 1) after n steps.
            "beta1_pow_acc": np.float32([beta1 ** (step + 1)]),
            "beta2_pow_acc": np.float32([beta2 ** (step + 1)]),
        }
    return moments, step


def _number(value, below):
    """A number of the file, or the one in a tensor, whose power is quick to take; ValueError if it is none."""
    value = value.item() if isinstance(value, np.ndarray) else value
    if not isinstance(value, (int, float)) or not 0 <= value < below:
        raise ValueError(f"a {type(value).__name__} where a number from 0 to {below} is expected")
    return value


def open_experiment(resume, results_dir, config_file, config, lock):
    """The checkpoint to resume (or None) and the experiment folder `results_dir/NNN-CONFIG` of the hand-written loop.

    A run that goes on from the newest checkpoint of an experiment in `results_dir` goes on in its folder; any other
    gets a new one, so that nothing is overwritten. All ranks get the same answer.

    Args:
        resume: None, a path for `load_checkpoint`, or `auto`: the newest checkpoint of this config, if there is one.
        config_file: its name without `.json` names the experiment.
        lock: a `RunLock`, which takes the experiment folder on rank 0.

    Raises:
        ValueError: what `load_checkpoint` raises; another run is at work in the experiment that would go on.
    """
    name = experiment_name(config_file)
    try:
        of_rank_0(lambda: check_experiment_idle(resume, results_dir, name))
        if resume == "auto":
            any_there = of_rank_0(lambda: bool(find_checkpoints(results_dir, name)))
            checkpoint = open_checkpoint(results_dir, config, name) if any_there else None
        else:
            checkpoint = open_checkpoint(resume, config) if resume else None
    except ValueError as error:
        raise ValueError(f"{error}" + ("; to start anew: --resume None" if resume == "auto" else "")) from None

    def folder():
        for _, experiment in list_experiments(results_dir, name) if checkpoint is not None else []:
            found = find_checkpoints(experiment)
            # What `auto` passed over is damaged, and may be done again in its place.
            mine = found if resume == "auto" else found[:1]
            if any(os.path.samefile(path, checkpoint.source) for path in mine):
                lock.take(experiment)
                clear_leftovers(os.path.dirname(checkpoint.source))
                return experiment
        index = max((index for index, _ in list_experiments(results_dir)), default=-1) + 1
        while True:
            path = os.path.join(results_dir, f"{index:03d}-{name}")
            try:
                os.makedirs(path)
            except FileExistsError:  # of a run that was started in the same moment
                index += 1
            else:
                lock.take(path)
                return path

    return checkpoint, of_rank_0(folder)


def of_rank_0(decide):
    """What `decide()` says on rank 0, on every rank: nodes that don't share a disk must not decide differently.

    An exception of it is raised on every rank.
    """
    answer = [None]
    if paddle.distributed.get_rank() == 0:
        try:
            answer = [decide()]
        except Exception as error:
            answer = [error]
    if paddle.distributed.get_world_size() > 1:
        paddle.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def open_output_dir(output_dir, config, *, resume, overwrite, lock):
    """The checkpoint that a run in `output_dir` (the Trainer's) starts from, or None. Nothing is deleted.

    Without `resume` the newest checkpoint in `output_dir` is resumed, if it is this config's; another run's is refused.
    With `overwrite`, and without `resume`, the run starts anew. Checkpoints that the run would meet on its way, those
    of the run it replaces or later ones than the resumed, are first moved to `output_dir/previous-DATE`.

    Args:
        lock: a `RunLock`, which takes the folder on rank 0.

    Raises:
        ValueError: the folder holds another run, or one is at work in it.
    """
    # A folder that is not there is made, and locked, when it is clear that there is something to run in it.
    of_rank_0(lambda: os.path.isdir(output_dir) and lock.take(output_dir))
    if resume and resume != "auto":
        checkpoint = open_checkpoint(resume, config)
    else:
        anew = overwrite and resume != "auto"
        any_there = not anew and of_rank_0(lambda: bool(find_checkpoints(output_dir)))
        try:
            checkpoint = open_checkpoint(output_dir, config) if any_there else None
        except ValueError as error:
            raise ValueError(
                f"{error}; choose another output folder, or put that run aside: --overwrite_output_dir"
            ) from None
    of_rank_0(lambda: lock.take(output_dir))
    of_rank_0(lambda: _put_aside(output_dir, checkpoint, overwrite))
    return checkpoint


_RUN_FILES = ("config.json", "metrics.jsonl", "validation.jsonl", "tb_log", "images", "bad_steps")


def _put_aside(output_dir, checkpoint, overwrite):
    """Moves what an earlier run left and this one would meet to `output_dir/previous-DATE`; no other file."""
    existing = list_checkpoints(output_dir)
    if existing:
        clear_leftovers(output_dir)
    if checkpoint is not None and any(os.path.samefile(path, checkpoint.source) for path in existing):
        step = checkpoint.progress["global_step"]
        moved = [path for path in existing if _step_of(path) > step]
    elif existing and not overwrite:
        raise ValueError(
            f"output_dir {output_dir}: holds checkpoints of another run; choose another folder, or put them aside: "
            "--overwrite_output_dir"
        )
    else:
        moved = [*existing, *(os.path.join(output_dir, name) for name in _RUN_FILES)]
    moved = [path for path in moved if os.path.exists(path)]
    if moved:
        name = aside = os.path.join(output_dir, time.strftime("previous-%Y%m%d-%H%M%S"))
        number = 1
        while os.path.exists(aside):  # of a run that was started in the same second
            number += 1
            aside = f"{name}-{number}"
        os.makedirs(aside)
        for path in moved:
            shutil.move(path, aside)
        say(f"moved {counted(len(moved), 'item')} of the earlier run to {aside}")


def _step_of(path):
    return int(_CHECKPOINT_NAME.match(os.path.basename(path)).group(1))


def open_checkpoint(path, config, experiment_name=None):
    """`load_checkpoint` for a run with this config; `ValueError` if it holds another model or objective."""
    checkpoint = load_checkpoint(path, experiment_name)
    check_same_model(checkpoint, config)
    progress = checkpoint.progress
    if "samples_seen" not in progress:
        batch = progress.get("global_batch_size", (checkpoint.config or config)["training"]["global_batch_size"])
        progress["samples_seen"] = progress["global_step"] * batch
    if config["training"]["use_ema"] and checkpoint.ema is None and paddle.distributed.get_rank() == 0:
        say(f"note: {checkpoint.source} has no averages: the EMA starts from its weights")
    return checkpoint


def check_same_model(checkpoint, config):
    """Raises `ValueError` if the checkpoint's model or objective section is not the run's, naming the keys."""
    if checkpoint.config is None:
        return
    for section in ("model", "objective"):
        if listed := differences(checkpoint.config[section], config[section]):
            raise ValueError(f"{checkpoint.source}: holds another run's {section}: {listed}")


@paddle.no_grad()
def load_pretrained(path, model, ema=None, *, config=None, as_stored=False):
    """Starts a run from weights alone: a checkpoint (its averages), a `.pdparams`, an official file.

    A label table for another number of classes is left as it was initialised; everything else must fit. So is a
    position table that differs from the network's by the rounding of a half precision.

    Args:
        config: the run's; a checkpoint's own must describe the same network. None: not compared.
        as_stored: take all numbers as they are, also those that are not finite.

    Returns:
        A sentence to print.

    Raises:
        ValueError: unreadable, not finite, or weights of another architecture.
    """
    note = _check_start(path, config, hasattr(model, "pos_embed")) if config is not None else ""
    state, source = read_weights(path)
    parameters = dict(model.named_parameters())
    if not as_stored:
        check_finite(state, source=source)
        if "pos_embed" in state and "pos_embed" in parameters:
            state["pos_embed"] = without_rounding(state["pos_embed"], parameters["pos_embed"].numpy())
    table = "y_embedder.embedding_table.weight"
    kept = table in state and table in parameters and list(state[table].shape) != list(parameters[table].shape)
    if kept:
        state[table] = parameters[table].numpy()  # tensor parallelism leaves it whole
    _load_weights(state, model, source)
    if ema is not None:
        ema.set_state_dict(_parts(state, model))
    return f"weights of {source}" + (", but a new label table: it has other classes" if kept else "") + note


# Keys whose values may differ from those of the checkpoint that a run starts from: the label table is made anew, and
# the shapes of the weights tell of the others.
_FREE_AT_THE_START = ("num_classes", "class_dropout_prob", "learn_sigma", "multiple_of", "ffn_dim_multiplier")


def _check_start(path, config, has_position_table):
    """Returns a clause on the objective of the checkpoint `path`, if it is not the run's; else an empty text.

    Args:
        has_position_table: whether the run's network has one, which fits images of one size.

    Raises:
        ValueError: its network is another one.
    """
    own = own_config(path)
    if own is None:
        return ""
    # Without a position table, as with Large-DiT's rotary positions, weights fit images of any size.
    sizes = () if has_position_table else ("sample_size",)
    if listed := differences(own["model"], config["model"], ignored=(*_FREE_AT_THE_START, *sizes)):
        raise ValueError(f"{path}: holds another run's model: {listed}")
    listed = sampling_differences(own["objective"], config["objective"])
    return f"; they were trained for another objective: {listed}" if listed else ""


@paddle.no_grad()
def restore_model(checkpoint, model, ema=None):
    """Gives a model (not wrapped) and its EMA a checkpoint's weights; the EMA falls back to the weights.

    Raises:
        ValueError: weights of another architecture.
    """
    _load_weights(checkpoint.model, model, checkpoint.source)
    if ema is not None:
        averages = checkpoint.ema or checkpoint.model
        check_state(averages, Shares(model).whole_shapes(), source=checkpoint.source)
        ema.set_state_dict(_parts(averages, model))
        ema.num_updates = checkpoint.progress.get("ema_updates", checkpoint.progress.get("global_step", 0))
    checkpoint.ema = None


def _parts(state, model):
    return {name: rank_part(parameter, state[name]) for name, parameter in model.named_parameters()}


def _load_weights(state, model, source):
    """Gives a model this rank's parts of whole weights by name; `ValueError` if they are another architecture's."""
    check_state(state, Shares(model).whole_shapes(), source=source)
    for name, parameter in model.named_parameters():
        parameter.set_value(paddle.to_tensor(rank_part(parameter, state[name])).astype(parameter.dtype))


def restore_training(checkpoint, *, model, optimizer, lr_scheduler, scaler, objective):
    """Gives optimizer, LR schedule, loss scaler, objective and generators a checkpoint's state.

    Call it after the model has its weights and the optimizer its wrappers.
    """
    # The weights are wanted for masters that the state may lack; else they go before the largest part is read.
    half = any(parameter.dtype != paddle.float32 for parameter in model.parameters())
    weights, checkpoint.model = (checkpoint.model if half else None), {}
    set_optimizer_state(optimizer, model, checkpoint.optimizer, Shares(model, optimizer), weights=weights)
    progress = checkpoint.progress
    lr_scheduler.step(progress.get("lr_scheduler", {}).get("last_epoch", progress["global_step"]))
    scaler_state = progress.get("scaler") or {}
    if scaler is not None and scaler_state and getattr(scaler, "_enable", False):
        scaler.load_state_dict({**scaler_state, "scale": np.float32(scaler_state["scale"])})
    if checkpoint.objective:
        objective.set_state_dict({key: paddle.to_tensor(value) for key, value in checkpoint.objective.items()})
    if "random" in progress:
        _set_random_state(progress["random"])
    # On every rank: not needed any more.
    checkpoint.ema, checkpoint.objective = None, {}
    checkpoint.read_optimizer = dict
