"""Widths that follow from a network's keywords, and which tensor-parallel degrees divide them. Needs no Paddle."""

import math

MAX_CONDITION_SIZE = 1024  # of LargeDiT's conditioning, which is as wide as the tokens up to here
# Blocks, heads and width of a head of each size, smallest first. XS is for small sets and a CPU; S to XL are the DiT
# paper's (Peebles and Xie 2022, table 1), 600M to 7B Large-DiT's.
_SMALL = {"XS": (4, 4, 48), "S": (12, 6, 64), "B": (12, 12, 64)}
SIZES = {
    "DiT": {**_SMALL, "L": (24, 16, 64), "XL": (28, 16, 72)},
    "LargeDiT": {**_SMALL, "600M": (16, 32, 48), "3B": (32, 32, 96), "7B": (32, 32, 128)},
}


def size_keys(family, size):
    """Returns the keys of a config's `model` section that make a network of this family the given size."""
    keys = dict(zip(("num_layers", "num_attention_heads", "attention_head_dim"), SIZES[family][size], strict=True))
    return {**keys, "qk_norm": size != "3B"} if family == "LargeDiT" else keys  # as in the presets


def swiglu_width(hidden_size, multiple_of, ffn_dim_multiplier):
    """Returns the inner width of LargeDiT's MLP: 8/3 of the hidden width, scaled, rounded up to a multiple."""
    width = int(2 * 4 * hidden_size / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


def mlp_width(model):
    """Returns the inner width of a block's MLP; model: the `model` section of a resolved config."""
    hidden_size = model["num_attention_heads"] * model["attention_head_dim"]
    if "mlp_ratio" in model:
        width = int(hidden_size * model["mlp_ratio"])
        return int(2 / 3 * width) if model.get("swiglu") else width
    return swiglu_width(hidden_size, model["multiple_of"], model["ffn_dim_multiplier"])


def check_tensor_parallel(model, degree):
    """Raises `ValueError` if the `model` section of a resolved config can't be split over `degree` ranks."""
    heads, mlp = model["num_attention_heads"], "feed-forward width (multiple_of, ffn_dim_multiplier)"
    if "mlp_ratio" in model:
        mlp = f"MLP's width, hidden size * mlp_ratio{' * 2/3 (swiglu)' if model['swiglu'] else ''},"
    sizes = {"num_attention_heads": heads, "num_kv_heads": model.get("num_kv_heads") or heads}
    sizes[f"the {mlp}"] = mlp_width(model)
    for name, size in sizes.items():
        if size % degree:
            raise ValueError(
                f"tensor_parallel_degree {degree} can't split this {model['type']}: {name} {size} is not divisible"
            )
