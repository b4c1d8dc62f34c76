"""Reads what a checkpoint folder or an official training checkpoint holds, and checks it against the run."""

import os

import numpy as np

from config.schema import MODEL_TYPES, differences, own_config, resolve_config, sampling_differences
from models.state import (
    REGULARIZERS,
    check_finite,
    is_state,
    official_to_paddle,
    own_names,
    plain_names,
    turn_linear,
    without_rounding,
)
from runtime.collective import run_on_rank_0
from runtime.untrusted import inside, read_json, shortened
from training.checkpoints import find
from training.checkpoints.find import OBJECTIVE, Checkpoint
from training.setup import features_changes
from weights.files import load_weights, readable, safe_load
from weights.rope_tables import split_rope_tables
from weights.runs import CONFIG, MODEL, OPTIMIZER, STATE, resolve_run
from weights.source import locate_weights, read_weights


def load_checkpoint(path, experiment_name=None, *, optional=False, model=None):
    """Reads a checkpoint folder (or a run's folder: `pick_checkpoint`), or an official `train.py` file `.pt`.

    `model` is the `model` section of the run's config, which an official file does not have; see `read_weights`.

    Every rank calls it; rank 0 chooses and checks. Raises ValueError, one line, for a damaged or unreadable file, or no
    checkpoint at all; if `optional`, that is None.
    """
    path = str(path)
    if os.path.isfile(path):
        return _load_official(path, model)
    folder = run_on_rank_0(lambda: find.pick_checkpoint(path, experiment_name))
    if folder is None:
        if optional:
            return None
        raise ValueError(
            f"{path}: no training checkpoint there; expected a folder with {CONFIG}, {MODEL} and {STATE}, a run's "
            "folder of such, or an official .pt file"
        )

    state = inside(folder, STATE)
    progress = read_json(state, infinity=True)
    if not isinstance(progress, dict) or not isinstance(progress.get("global_step"), int):
        raise ValueError(f"{state}: not the state of a training run: it has no global_step")
    averages = map(find.AVERAGES.match, sorted(os.listdir(folder)))
    optimizer, objective = inside(folder, OPTIMIZER), inside(folder, OBJECTIVE)
    if not os.path.isfile(optimizer):
        raise ValueError(f"{optimizer}: no such file")
    return Checkpoint(
        source=folder,
        config=resolve_config(read_json(inside(folder, CONFIG)), source=os.path.join(folder, CONFIG)),
        model=load_weights(inside(folder, MODEL)),
        averages={found[1] or "": load_weights(inside(folder, found[0])) for found in averages if found},
        read_optimizer=lambda: _read_optimizer(optimizer),
        objective=load_weights(objective) if os.path.isfile(objective) else {},
        progress=progress,
    )


def _read_optimizer(path):
    state = safe_load(path)
    if not isinstance(state, dict) or not all(isinstance(n, str) and is_state(entry) for n, entry in state.items()):
        raise ValueError(f"{path}: not an optimizer's state: expected {{parameter: {{accumulator: array}}}}")
    return state


def _load_official(path, model):
    """Reads the official train.py's `{model, ema, opt, args}`, with torch.optim.AdamW's state by parameter index."""
    raw = safe_load(path, tolerant=True)
    held = raw if isinstance(raw, dict) else {}
    found = {name: readable(held, name, path) for name in ("model", "ema", "opt") if name in held}
    optimizer = found.pop("opt", None)
    if optimizer is None or "model" not in found:
        raise ValueError(
            f"{path}: not a training checkpoint: the official layout has 'model', 'ema' and 'opt'; to start from "
            "weights alone use --pretrained_model_path"
        )
    for name, state in found.items():
        if not is_state(state):
            raise ValueError(f"{path}: its {name!r} is no state dict")
        state, _ = split_rope_tables(plain_names(state), source=path, model=model)
        found[name] = official_to_paddle(own_names(state))
        check_finite(found[name], source=f"{path}: {name}")
    try:
        moments, step = _official_moments([*found["model"]], optimizer)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        said = shortened(repr(error), 200)
        raise ValueError(f"{path}: its 'opt' is not the state of torch.optim.AdamW ({said})") from None
    for kind in ("moment1", "moment2"):
        check_finite({name: entry[kind] for name, entry in moments.items()}, source=f"{path}: opt, {kind}")
    progress, args = {"global_step": step}, raw.get("args")
    if isinstance(raw.get("config"), dict):  # LightningDiT's
        args = raw["config"].get("train")
    batch = args.get("global_batch_size") if isinstance(args, dict) else None
    if type(batch) is int and batch > 0:
        progress["global_batch_size"] = batch
    averages = {"": found["ema"]} if "ema" in found else {}
    return Checkpoint(path, None, found["model"], averages, read_optimizer=lambda: moments, progress=progress)


def _official_moments(names, optimizer):
    """Returns `(moments by name, step)` of torch.optim.AdamW's state, whose parameters are numbered as `names`."""
    beta1, beta2 = (_number(beta, below=1) for beta in optimizer["param_groups"][0]["betas"])
    moments, step = {}, 0
    for index, entry in optimizer["state"].items():
        name = names[index]
        step = int(_number(entry["step"], below=1 << 53))
        if not is_state({key: entry[key] for key in ("exp_avg", "exp_avg_sq")}):
            raise ValueError("a moment that is no tensor")
        moments[name] = {
            "moment1": turn_linear(name, entry["exp_avg"]),
            "moment2": turn_linear(name, entry["exp_avg_sq"]),
            # Paddle keeps beta^(n + 1) after n steps.
            "beta1_pow_acc": np.float32([beta1 ** (step + 1)]),
            "beta2_pow_acc": np.float32([beta2 ** (step + 1)]),
        }
    return moments, step


def _number(value, below):
    """Returns a number of the file, or the one in a tensor; ValueError if it is none, or too large to work with."""
    value = value.item() if isinstance(value, np.ndarray) else value
    if not isinstance(value, (int, float)) or not 0 <= value < below:
        raise ValueError(f"a {type(value).__name__} where a number from 0 to {below} is expected")
    return value


def check_pretrained(path, config):
    """Returns the path of weights to start from, of a run that of its newest checkpoint, before Paddle is imported.

    ValueError for what is no file of weights, and for a checkpoint of another network than the config's.
    """
    path = resolve_run(path)
    locate_weights(path)
    _check_start(path, config)
    return path


def load_pretrained(path, model, *, config=None):
    """Starts a network from weights alone: of a checkpoint (its averages) or a run's newest, or a file of them.

    A label table for another number of classes is left as it was initialised, and so is a position table that differs
    from the network's by the rounding of a half precision; everything else must fit.

    Returns a sentence to print, also on how a checkpoint's own config differs from the run's `config`, if that is
    given. Raises ValueError for what is unreadable or not finite, and for weights of another architecture.
    """
    import paddle

    from training.checkpoints.state import fit_regularizers, load_weights_into

    path = resolve_run(path)
    note = _check_start(path, config) if config is not None else ""
    state, source = read_weights(path, model=getattr(model, "settings", None), kept=[REGULARIZERS])
    parameters = dict(model.named_parameters())
    fitted, _ = fit_regularizers(state, model)
    check_finite(state, source=source)
    if "pos_embed" in state and "pos_embed" in parameters:
        state["pos_embed"] = without_rounding(state["pos_embed"], parameters["pos_embed"].numpy())
    table = "y_embedder.embedding_table.weight"
    kept = table in state and table in parameters and list(state[table].shape) != list(parameters[table].shape)
    if kept:
        state[table] = parameters[table].numpy()  # tensor parallelism leaves it whole
    with paddle.no_grad():
        load_weights_into(model, state, source)
    notes = ["but a new label table: it has other classes" if kept else "", fitted or ""]
    return ", ".join([f"weights of {source}", *filter(None, notes)]) + note


# Keys that may differ at the start, because the label table is made anew and the weights' shapes tell of the others.
_FREE_AT_THE_START = ("num_classes", "class_dropout_prob", "learn_sigma", "multiple_of", "ffn_dim_multiplier")


def _check_start(path, config):
    """Returns clauses on objective and latents of a checkpoint, if they are not the run's; refuses another network."""
    own = own_config(path)
    if own is None:
        return ""
    # With rotary positions in place of a position table, weights fit images of any size.
    sizes = ("sample_size",) if MODEL_TYPES[config["model"]["type"]].family == "LargeDiT" else ()
    if listed := differences(own["model"], config["model"], ignored=(*_FREE_AT_THE_START, *sizes)):
        raise ValueError(f"{path}: holds another run's model: {listed}")
    latents = {**own["features"], "class_names": None, "encoder": None}
    notes = {
        "they were trained for another objective": sampling_differences(own["objective"], config["objective"]),
        f"{path} was trained on other latents": features_changes(latents, config["features"]),
    }
    return "".join(f"; {what}: {listed}" for what, listed in notes.items() if listed)
