"""The network that weights belong to, as far as their names and shapes tell. Paddle is not imported."""

import math
import os
import re

from config.schema import resolve_config
from models.sizes import mlp_width
from models.state import visible_switches
from weights.files import load_shapes
from weights.rope_tables import NAMES

# Heads of the official LightningDiT's widths: of 64 or 72 channels each, which no parameter shows without qk_norm.
HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}
IMAGENET = 1000  # a label table of so many rows has no null class; any other has one, in its last row


def recognised_config(path, key=None):
    """Returns the resolved config of the LightningDiT whose weights a file holds; ValueError, one line, if none's.

    `key` is that of `load_weights`, "auto" if it is None. Objective and training are LightningDiT's defaults.
    """
    unknown = f"{path}: which network's weights are these? Give the JSON of its config"
    if os.path.isdir(path):
        raise ValueError(unknown)
    shapes = load_shapes(path, key or "auto")
    try:
        return resolve_config(lightning_dit_config(shapes), source="by their shapes")
    except ValueError as error:
        raise ValueError(f"{unknown} ({error})") from None


def recognised_note(model):
    """Returns a sentence on the `model` section of a recognised config."""
    return f"recognised by its shapes: {', '.join(f'{name} {value}' for name, value in model.items())}"


def lightning_dit_config(shapes):
    """Returns the raw config `{"model": {...}}` of a LightningDiT by the shapes of its weights, `{name: shape}`.

    The layout of Linear weights is of no consequence. Shapes don't show everything: heads are those of the norms of
    queries or of stored tables of rotary positions, else of the official width; without stored tables positions are
    rotary if the MLP is SwiGLU and the norms are RMS norms. The objective is none of the weights' matters.

    Raises ValueError, one line: what is missing, or what can't be told.
    """
    width, channels, patch_size, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    _, tokens, _ = _shape(shapes, "pos_embed", 3)
    rows, _ = _shape(shapes, "y_embedder.embedding_table.weight", 2)
    (outputs,) = _shape(shapes, "final_layer.linear.bias", 1)
    (modulation,) = _shape(shapes, "blocks.0.adaLN_modulation.1.bias", 1)
    if _shape(shapes, "blocks.0.attn.proj.bias", 1) != (width,) or modulation not in (4 * width, 6 * width):
        raise ValueError(f"they are no LightningDiT's: blocks.0 is not of width {width}")
    switches = visible_switches(shapes)
    switches["rope"] = NAMES[0] in shapes or (switches["swiglu"] and switches["rms_norm"])
    if not any(on for name, on in switches.items() if name != "adaln_shift") and switches["adaln_shift"]:
        raise ValueError("they may be a DiT's, a SiT's or a LightningDiT's without its switches")
    blocks = {match[0] for match in map(re.compile(r"blocks\.\d+\.").match, shapes) if match}
    head_dim = _head_dim(shapes, width)
    null_class = rows != IMAGENET
    model = {
        "type": "LightningDiT",
        "sample_size": patch_size * math.isqrt(tokens),
        "patch_size": patch_size,
        "in_channels": channels,
        "num_layers": len(blocks),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "num_classes": rows - null_class,
        **({} if null_class else {"class_dropout_prob": 0.0}),
        "learn_sigma": outputs == 2 * channels * patch_size**2,
        **switches,
    }
    return {"model": {**model, "mlp_ratio": _mlp_ratio(shapes, model)}}


def _shape(shapes, name, ndim):
    shape = tuple(shapes.get(name, ()))
    if len(shape) != ndim or 0 in shape:
        found = f"is {list(shape)}" if name in shapes else "is missing"
        raise ValueError(f"they are no LightningDiT's: {name} {found}")
    return shape


def _head_dim(shapes, width):
    for name in ("blocks.0.attn.q_norm.weight", NAMES[0]):
        if name in shapes:
            head_dim = shapes[name][-1] if shapes[name] else 0
            if not head_dim or width % head_dim:
                raise ValueError(f"their width {width} has no whole number of heads of {name}'s {head_dim}")
            return head_dim
    if width not in HEADS:
        known = ", ".join(map(str, HEADS))
        raise ValueError(f"their shapes don't tell the heads of width {width}; known are those of {known}")
    return width // HEADS[width]


def _mlp_ratio(shapes, model):
    """Returns the roundest `mlp_ratio` that makes an MLP of the width that the weights have."""
    name, parts, factor = ("w12", 2, 1.5) if model["swiglu"] else ("fc1", 1, 1)
    (outputs,) = _shape(shapes, f"blocks.0.mlp.{name}.bias", 1)
    if outputs % parts:
        raise ValueError(f"they are no LightningDiT's: blocks.0.mlp.{name}.bias is [{outputs}], no even number")
    inner, width = outputs // parts, model["num_attention_heads"] * model["attention_head_dim"]
    ratio = (inner + 0.5) * factor / width
    for digits in range(9):
        if mlp_width({**model, "mlp_ratio": round(ratio, digits)}) == inner:
            return round(ratio, digits)
    raise ValueError(f"no mlp_ratio gives an MLP of width {inner}")
