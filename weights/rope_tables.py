"""The tables of rotary positions in official LightningDiT files, which the networks here compute instead of storing.

They are the buffers `feat_rope.freqs_cos` and `feat_rope.freqs_sin`, `(T, head_dim)`, each angle twice in a row. The
official code loads strictly, so that it wants them back. Their last bit depends on the machine that computed them.
"""

import math

import numpy as np

NAMES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
TOLERANCE = 1e-4  # of a table; another theta or an interpolated grid changes it by more
HALF_PRECISION = 2.0**-8  # of a table that was rounded with the weights


def split_rope_tables(state, *, source, model=None):
    """Returns `(state without the tables, tables)`; ValueError, one line with `source`, if no network computes such.

    `model` is the `model` section of the config that the weights are for. Where it is not known, head and grid are
    taken from the tables themselves.
    """
    tables = {name: state[name] for name in NAMES if name in state}
    if tables and model is not None and not model.get("rope"):
        raise ValueError(
            f"{source}: these weights do not fit the config: they have rope, which the config has not; are they a "
            "LightningDiT's?"
        )
    for name, table in tables.items():
        tokens, head_dim = table.shape if table.ndim == 2 else (0, 0)
        grid_size = math.isqrt(tokens)
        if model is not None:
            grid_size, head_dim = _sizes(model)
        if not grid_size or not head_dim or head_dim % 4 or table.shape != (grid_size**2, head_dim):
            expected = f"{[grid_size**2, head_dim]} by the config's grid and heads" if model else "those of a grid"
            raise ValueError(f"{source}: {name} is {list(table.shape)}, expected {expected}")
        table = np.ascontiguousarray(table, "float32")
        exact = rope_tables(head_dim, grid_size)[name]
        is_half = not (table.view("u4") & 0x1FFF).any()  # bits that neither bfloat16 nor float16 has
        if not np.abs(table - exact).max() <= (HALF_PRECISION if is_half else TOLERANCE):
            raise ValueError(
                f"{source}: its rotary positions, {name}, are not those of a network here, of theta 10000 and whole "
                f"steps on a grid of {grid_size} x {grid_size}: it would draw other images"
            )
    return {name: value for name, value in state.items() if name not in tables}, tables


def with_rope_tables(state, model, tables):
    """Returns an official state with the tables, where its official code has them, if its network has any.

    They are those of `tables`, or computed if that is empty.
    """
    if not model.get("rope"):
        return state
    grid_size, head_dim = _sizes(model)
    embedders = {name: value for name, value in state.items() if not name.startswith(("blocks.", "final_layer."))}
    return {**embedders, **rope_tables(head_dim, grid_size), **tables, **state}


def _sizes(model):
    return model["sample_size"] // model["patch_size"], model["attention_head_dim"]


def rope_tables(head_dim, grid_size):
    """Returns the tables by name, float32 `(grid_size**2, head_dim)`, from float32 angles, as the official code has."""
    exponents = np.arange(0, head_dim // 2, 2, dtype="float32") / np.float32(head_dim // 2)
    frequencies = np.float32(1) / (10000 ** exponents.astype("float64")).astype("float32")
    angles = np.repeat(np.outer(np.arange(grid_size, dtype="float32"), frequencies), 2, axis=1).astype("float64")
    rows, columns = np.indices([grid_size, grid_size]).reshape(2, -1)
    tables = (function(angles).astype("float32") for function in (np.cos, np.sin))  # (grid_size, head_dim / 2)
    whole = (np.concatenate([table[rows], table[columns]], axis=1) for table in tables)
    return dict(zip(NAMES, whole, strict=True))
