"""Weights for sampling and conversion, from wherever a user has them, in the Paddle layout."""

import glob
import os

from models.weights import load_weights, official_to_paddle

LAYOUTS = ("auto", "paddle", "torch")


def is_training_checkpoint(path):
    """Whether `path` is a folder that a training loop saved: config.json beside model_state.pdparams."""
    return all(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "model_state.pdparams"))


def read_weights(path, *, key=None, layout="auto"):
    """Read one model's weights as `{name: float32 array}`, Linear weights `[in, out]`.

    Args:
        path: a training checkpoint folder, a `.pdparams`, or an official `.pt`, `.pth` or `.safetensors` file.
        key: "model" or "ema" of a training checkpoint folder or of an official training checkpoint; None takes the
            averages where there are any.
        layout: "paddle" or "torch": how the file stores Linear weights; "auto" goes by its ending.

    Returns:
        `(weights, file)`: file is the one that was read.

    Raises:
        ValueError: one line that names path: not there, unreadable, no such key, or no weights.
    """
    path = os.fspath(path)
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if os.path.isdir(path):
        path, key = _file_in_checkpoint(path, key), None
        layout = "paddle"
    if layout == "auto":
        layout = _layout_of(path)
    weights = load_weights(path, key or "auto")
    if layout == "torch":
        weights = official_to_paddle(weights)
    return {name: value.astype("float32", copy=False) for name, value in weights.items()}, path


def _file_in_checkpoint(folder, key):
    if not is_training_checkpoint(folder):
        inside = glob.glob(os.path.join(glob.escape(folder), "**", "trainer_state.json"), recursive=True)
        inside = [os.path.dirname(name) for name in inside if is_training_checkpoint(os.path.dirname(name))]
        hint = f"; did you mean {max(inside, key=os.path.getmtime)}?" if inside else ""
        raise ValueError(f"{folder}: not a training checkpoint (config.json and model_state.pdparams){hint}")
    averages, weights = (os.path.join(folder, name) for name in ("ema_state.pdparams", "model_state.pdparams"))
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
    if ending in (".pt", ".pth", ".bin", ".safetensors", ".ckpt"):
        return "torch"
    raise ValueError(f"{path}: whose layout is this? Expected .pdparams, .pt, .pth or .safetensors, or say which")
