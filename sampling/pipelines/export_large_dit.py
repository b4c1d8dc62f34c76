"""Export of a Large-DiT as a folder that the stock `ppdiffusers.DiTPipeline` loads.

Settings and weights are those of ppdiffusers' own Large-DiT transformer, `DiTLLaMA2DModel`, whose parameters have the
official names. That class does not give the official network's numbers: its block norms subtract the mean, as RMS norms
don't; it can't be built with Paddle 3, and in float32 it needs a CUDA build of Paddle. So the folder brings along a
subclass of it that mends this, a copy of `sampling/pipelines/large_dit_transformer.py`, and model_index.json names that
one: DiTPipeline then gives the numbers of this project's Large-DiT anywhere, without this project.

The rest is as for a DiT (`sampling.pipelines.export_dit`): the label table is laid out for the null class 1000, all
latent channels are guided, a learned variance is cut off. Timesteps need no fit: the frequencies are the official ones.
"""

import os

from sampling.pipelines.export_dit import StockModel, check_num_classes, class_table, guidance_notes
from sampling.pipelines.folder import CODE
from sampling.pipelines.pretrained import NULL_CLASS
from sampling.step_counts import check_diffusion

MAX_TOKENS = 4096  # of DiTLLaMA2DModel's table of rotary positions
STOCK_CLASS = ("ppdiffusers", "DiTLLaMA2DModel")
OWN_CLASS = (os.path.splitext(os.path.basename(CODE))[0], "LargeDiTTransformer")
OWN_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.path.basename(CODE))


def check(config):
    """Returns the keywords of the `DiTLLaMA2DModel` for a resolved config; ValueError where there is no export."""
    model = config["model"]
    check_diffusion(config["objective"])
    check_num_classes(model)
    tokens = (model["sample_size"] // model["patch_size"]) ** 2
    if tokens > MAX_TOKENS:
        raise ValueError(
            f"sample_size {model['sample_size']}, patch_size {model['patch_size']}: {tokens} tokens; DiTLLaMA2DModel "
            f"has rotary positions for {MAX_TOKENS}; sample such a model from its checkpoint"
        )
    same = (
        "sample_size patch_size in_channels num_layers num_attention_heads attention_head_dim multiple_of "
        "ffn_dim_multiplier norm_eps learn_sigma qk_norm"
    ).split()
    return {
        **{name: model[name] for name in same},
        "out_channels": model["in_channels"] * (2 if model["learn_sigma"] else 1),
        "mlp_ratio": 4.0,
        "n_kv_heads": model["num_kv_heads"],
        "num_classes": NULL_CLASS,
        "class_dropout_prob": model["class_dropout_prob"] or 0.1,  # 0 would leave no row for the null class
    }


def convert(config, state, source, *, scheduler="ddim", stock_transformer=False):
    """Returns a Large-DiT as a `StockModel`, with `CODE` unless `stock_transformer`.

    Args:
        scheduler: "ddim" or "dpm", see `make_scheduler`.
        stock_transformer: name ppdiffusers' `DiTLLaMA2DModel` as it is, which gives other numbers.
    """
    from sampling.schedulers import make_scheduler

    model, table = config["model"], "y_embedder.embedding_table.weight"
    weights = {**state, table: class_table(model, state[table])}
    notes = guidance_notes(model)
    if stock_transformer:
        notes.append(
            "DiTLLaMA2DModel itself draws other images than this network: its block norms subtract the mean. It can't "
            "be built with Paddle 3, and in float32 needs a CUDA build of Paddle."
        )
    else:
        notes.append(
            f"Loading the folder runs its {CODE}: DiTLLaMA2DModel, mended to give the official network's numbers."
        )
    transformer, code = (STOCK_CLASS, None) if stock_transformer else (OWN_CLASS, OWN_FILE)
    return StockModel(transformer, check(config), weights, make_scheduler(config["objective"], scheduler), notes, code)
