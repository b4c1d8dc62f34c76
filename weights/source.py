"""Weights for sampling, conversion and a run's start, from wherever a user has them, in the Paddle layout."""

import os
import re

from models.state import (
    INTERNAL_GUIDANCE,
    has_second_layer,
    kinds_of,
    own_names,
    turn_linear,
    without_regularizers,
)
from runtime.untrusted import inside
from weights.files import load_weights, safetensors_layout
from weights.rope_tables import split_rope_tables
from weights.runs import checkpoint_hint, is_training_checkpoint, resolve_run
from weights.shards import merge_shards

_ENDINGS = {".pdparams": "paddle", ".pdopt": "paddle", **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), "torch")}
# A file that the official Large-DiT's train.py writes on one tensor-parallel rank: weights or averages, rank, ranks.
SHARD = re.compile(r"consolidated(_ema)?\.(\d+)-of-(\d+)\.pth")


def locate_weights(path, *, key=None, layout="auto"):
    """Returns `(files, key, layout)` of the weights that `read_weights` would read, and raises what it would for them.

    Only names, and the head of a `.safetensors` file, are looked at.
    """
    path = os.fspath(path)
    if shards := find_shards(path, key):
        return shards, None, "torch"
    if os.path.isdir(path):
        return [_file_in_checkpoint(path, key)], None, "paddle"
    ending = os.path.splitext(path)[1].lower()
    if layout == "auto":
        layout = safetensors_layout(path) if ending == ".safetensors" else _ENDINGS.get(ending)
    if layout is None:
        raise ValueError(f"{path}: whose layout is it? Expected .pdparams, .pt, .pth or .safetensors, or say which")
    return [path], key, layout


def read_weights(path, *, key=None, layout="auto", model=None, tables=None, kept=()):
    """Reads one model's weights: `({name: float32 array}, file)`, Linear weights `[in, out]`; the file that was read.

    The tables of rotary positions in official LightningDiT files are left out, see `rope_tables`, and so is what
    regularizers have learned.

    Args:
        path: a training checkpoint folder, or a run's (`resolve_run`), a `.pdparams` or `.safetensors` file, an
            official `.pt` or `.pth`, or the folder or one of the official Large-DiT's shards
            (`consolidated[_ema].NN-of-MM.pth`), which are merged.
        key: "model" or "ema" of a training checkpoint folder, any key of a file that holds sets of weights; None takes
            the averages where there are any (see `load_weights`).
        layout: "paddle" or "torch": how the file stores Linear weights; "auto" goes by its ending, or by what a
            `.safetensors` file says of itself.
        model: the `model` section of the config that they are for, if it is known: other rotary positions are refused.
        tables: a dict, to which the tables that are left out are added.
        kept: beginnings of the names of what regularizers have learned that is not left out, such as
            `models.state.INTERNAL_GUIDANCE`.

    Raises ValueError, one line that names path: not there, unreadable, no such key, or no weights.
    """
    files, key, layout = locate_weights(path, key=key, layout=layout)
    weights = merge_shards(files) if len(files) > 1 else load_weights(files[0], key or "auto")
    path = files[0] + (f" and its {len(files) - 1} other shards" if len(files) > 1 else "")
    weights, left_out = split_rope_tables(weights, source=path, model=model)
    if tables is not None:
        tables.update(left_out)
    weights = without_regularizers(own_names(weights), kept)
    for name, value in weights.items():  # in place, so that no second set of weights is held
        value = turn_linear(name, value) if layout == "torch" else value
        weights[name] = value.astype("float32", copy=False)
    return weights, path


def leave_out(state, source, keep_second=None):
    """Returns `(state, note)` for an exporter: the weights without what regularizers have learned, a sentence or None.

    Args:
        keep_second: the second final layer of internal guidance stays, ValueError if there is none; None for an
            exporter that can't keep it, whose sentence names no flag.
    """
    if keep_second and not has_second_layer(state):
        raise ValueError(
            f"{source}: has no second final layer of internal guidance ({INTERNAL_GUIDANCE}*); leave out "
            "--keep_internal_guidance"
        )
    rest = without_regularizers(state, [INTERNAL_GUIDANCE] if keep_second else [])
    if len(rest) == len(state):
        return rest, None
    hint = "; --keep_internal_guidance keeps what internal guidance needs"
    kinds = ", ".join(kinds_of(state.keys() - rest.keys()))
    shown = hint if keep_second is False and has_second_layer(state) else ""
    return rest, f"left out what regularizers learned, which plain sampling does not need: {kinds}{shown}"


def find_shards(path, key=None):
    """Returns all the files of the official Large-DiT weights that `path` belongs to, by rank; empty if it is none.

    `path` is their folder or one of them, `key` "model" or "ema": None takes a folder's averages if it has them. Raises
    ValueError for a missing shard, and for shards of several networks, or of another key.
    """
    folder, name = (path, "") if os.path.isdir(path) else os.path.split(path)
    given = SHARD.fullmatch(name)
    if name and not given:
        return []
    found = {}  # (key, number of ranks): {rank: path}
    for match in filter(None, map(SHARD.fullmatch, sorted(os.listdir(folder or ".")))):
        if given is None or match.group(1, 3) == given.group(1, 3):
            kind = "ema" if match[1] else "model", int(match[3])
            found.setdefault(kind, {})[int(match[2])] = os.path.join(folder, match[0])
    if not found:
        return []
    keys = sorted({key for key, _ in found})
    wanted = key or keys[0]  # "ema" comes before "model"
    if wanted not in keys:
        raise ValueError(f"{path}: has no shards of the key {wanted!r}; it has those of {', '.join(keys)}")
    count, *others = (count for kind, count in found if kind == wanted)
    if others:
        counts = ", ".join(map(str, (count, *others)))
        raise ValueError(f"{path}: has shards of several networks (of {counts} ranks); give a file of the one")
    ranks = found[wanted, count]
    missing = [rank for rank in range(count) if rank not in ranks]
    if missing:
        prefix = "consolidated_ema" if wanted == "ema" else "consolidated"
        names = ", ".join(f"{prefix}.{rank:02d}-of-{count:02d}.pth" for rank in missing[:3])
        raise ValueError(f"{folder or '.'}: {len(missing)} of {count} shards are missing: {names}")
    return [ranks[rank] for rank in range(count)]


def _file_in_checkpoint(folder, key):
    folder = resolve_run(folder)
    if not is_training_checkpoint(folder):
        hint = checkpoint_hint(folder)
        raise ValueError(f"{folder}: not a training checkpoint (config.json and model_state.pdparams){hint}")
    averages, weights = (inside(folder, name) for name in ("ema_state.pdparams", "model_state.pdparams"))
    has_averages = os.path.isfile(averages)
    if key not in (None, "model", "ema"):
        raise ValueError(f"{folder}: has no weights under the key {key!r}; known: model, ema")
    if key == "ema" and not has_averages:
        raise ValueError(f"{folder}: was trained without EMA (no ema_state.pdparams); use the key model")
    return averages if has_averages and key != "model" else weights
