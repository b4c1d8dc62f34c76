"""Weights for sampling and conversion, from wherever a user has them, in the Paddle layout."""

import glob
import os
import re

from tqdm import tqdm

from models.state import turn_linear
from runtime.untrusted import inside
from weights.files import load_weights, safetensors_layout
from weights.shards import merge_shards

LAYOUTS = ("auto", "paddle", "torch")
# A file that the official Large-DiT's train.py writes on one tensor-parallel rank: weights or averages, rank, ranks.
SHARD = re.compile(r"consolidated(_ema)?\.(\d+)-of-(\d+)\.pth")


def is_training_checkpoint(path):
    """Whether `path` is a folder that a training loop saved: config.json beside model_state.pdparams."""
    return all(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "model_state.pdparams"))


def checkpoint_hint(folder):
    """Returns "; did you mean ...?" with the newest training checkpoint below a folder; empty if there is none."""
    found = glob.glob(os.path.join(glob.escape(folder), "**", "trainer_state.json"), recursive=True)
    found = [os.path.dirname(name) for name in found if is_training_checkpoint(os.path.dirname(name))]
    return f"; did you mean {max(found, key=os.path.getmtime)}?" if found else ""


def read_weights(path, *, key=None, layout="auto"):
    """Read one model's weights as `{name: float32 array}`, Linear weights `[in, out]`.

    Args:
        path: a training checkpoint folder, a `.pdparams` or `.safetensors` file, an official `.pt` or `.pth`, or an
            official Large-DiT's tensor-parallel shards (`consolidated[_ema].NN-of-MM.pth`): their folder or one of
            them, which are merged.
        key: "model" or "ema" of a training checkpoint folder, any key of a file that holds sets of weights; None takes
            the averages where there are any (see `load_weights`).
        layout: "paddle" or "torch": how the file stores Linear weights; "auto" goes by its ending, or by what a
            `.safetensors` file says of itself.

    Returns:
        `(weights, file)`: file is the one that was read.

    Raises:
        ValueError: one line that names path: not there, unreadable, no such key, or no weights.
    """
    path = os.fspath(path)
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    shards = find_shards(path, key)
    if shards:
        path, layout = shards[0], "torch"
        if len(shards) > 1:
            weights = merge_shards(shards, lambda paths: tqdm(paths, desc="merging shards", disable=None))
            path = f"{path} and its {len(shards) - 1} other shards"
        else:
            weights = load_weights(path)
    else:
        if os.path.isdir(path):
            path, key = _file_in_checkpoint(path, key), None
            layout = "paddle"
        if layout == "auto":
            layout = _layout_of(path)
        weights = load_weights(path, key or "auto")
    for name, value in weights.items():  # in place, so that no second set of weights is held
        value = turn_linear(name, value) if layout == "torch" else value
        weights[name] = value.astype("float32", copy=False)
    return weights, path


def find_shards(path, key=None):
    """All the files of the official Large-DiT weights that `path` belongs to, by rank; an empty list if it is none.

    Args:
        path: a folder with `consolidated[_ema].NN-of-MM.pth` files, or one of them.
        key: "model" or "ema"; None takes the averages of a folder that has them, or what the file is.

    Raises:
        ValueError: one line: a shard is missing, there are those of several networks, or the key is another one.
    """
    folder, name = (path, "") if os.path.isdir(path) else os.path.split(path)
    given = SHARD.fullmatch(name)
    if name and not given:
        return []
    found = {}  # (key, number of ranks): {rank: path}
    for other in sorted(os.listdir(folder or ".")):
        match = SHARD.fullmatch(other)
        if match:
            kind = ("ema" if match[1] else "model", int(match[3]))
            found.setdefault(kind, {})[int(match[2])] = os.path.join(folder, other)
    if not found:
        return []
    if given:
        kind = ("ema" if given[1] else "model", int(given[3]))
        if key not in (None, kind[0]):
            raise ValueError(f"{path}: holds the weights of the key {kind[0]}, not of {key}; give the folder instead")
        if kind not in found:  # no such file
            return []
    else:
        keys = sorted({key for key, _ in found})
        wanted = key or keys[0]  # "ema" comes before "model"
        if wanted not in keys:
            raise ValueError(f"{path}: has no shards of the key {wanted!r}; it has those of {', '.join(keys)}")
        kinds = [kind for kind in found if kind[0] == wanted]
        if len(kinds) > 1:
            counts = ", ".join(str(count) for _, count in kinds)
            raise ValueError(f"{path}: has shards of several networks (of {counts} ranks); give a file of the one")
        kind = kinds[0]
    ranks, count = found[kind], kind[1]
    missing = [rank for rank in range(count) if rank not in ranks]
    if missing:
        prefix = "consolidated_ema" if kind[0] == "ema" else "consolidated"
        names = ", ".join(f"{prefix}.{rank:02d}-of-{count:02d}.pth" for rank in missing[:3])
        raise ValueError(f"{folder or '.'}: {len(missing)} of {count} shards are missing: {names}")
    return [ranks[rank] for rank in range(count)]


def _file_in_checkpoint(folder, key):
    if not is_training_checkpoint(folder):
        raise ValueError(
            f"{folder}: not a training checkpoint (config.json and model_state.pdparams){checkpoint_hint(folder)}"
        )
    averages, weights = (inside(folder, name) for name in ("ema_state.pdparams", "model_state.pdparams"))
    if key is None:
        return averages if os.path.isfile(averages) else weights
    if key not in ("model", "ema"):
        raise ValueError(f"{folder}: has no weights under the key {key!r}; known: model, ema")
    if key == "ema" and not os.path.isfile(averages):
        raise ValueError(f"{folder}: was trained without EMA (no ema_state.pdparams); use the key model")
    return averages if key == "ema" else weights


def _layout_of(path):
    ending = os.path.splitext(path)[1].lower()
    if ending in (".pdparams", ".pdopt"):
        return "paddle"
    if ending in (".pt", ".pth", ".bin", ".ckpt"):
        return "torch"
    if ending == ".safetensors":
        return safetensors_layout(path)
    raise ValueError(f"{path}: whose layout is this? Expected .pdparams, .pt, .pth or .safetensors, or say which")
