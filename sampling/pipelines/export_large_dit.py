"""Export of a Large-DiT as a folder that the stock `ppdiffusers.DiTPipeline` loads.

Settings and weights are those of ppdiffusers' own Large-DiT transformer, `DiTLLaMA2DModel`, whose parameters have the
official names. That class does not give the official network's numbers, see docs/inference.md. So the folder brings
along a subclass that mends it, a copy of `sampling/pipelines/large_dit_transformer.py`, and model_index.json names it.

The rest is as for a DiT (`sampling.pipelines.export_dit`). Timesteps need no fit: their frequencies are the official
ones.
"""

import os

from sampling.pipelines.export_dit import class_table, guidance_notes, shared_settings
from sampling.pipelines.folder import CODE
from sampling.pipelines.pretrained import NULL_CLASS

MAX_TOKENS = 4096  # of DiTLLaMA2DModel's table of rotary positions


def check(config):
    """Returns the keywords of the `DiTLLaMA2DModel`; see `sampling.pipelines.export.exporter`."""
    model = config["model"]
    settings = shared_settings(model)
    tokens = (model["sample_size"] // model["patch_size"]) ** 2
    if tokens > MAX_TOKENS:
        raise ValueError(
            f"sample_size {model['sample_size']}, patch_size {model['patch_size']}: {tokens} tokens; DiTLLaMA2DModel "
            f"has rotary positions for {MAX_TOKENS}; sample such a model from its checkpoint"
        )
    same = ("multiple_of", "ffn_dim_multiplier", "norm_eps", "learn_sigma", "qk_norm")
    return {
        **settings,
        **{name: model[name] for name in same},
        "mlp_ratio": 4.0,
        "n_kv_heads": model["num_kv_heads"],
        "num_classes": NULL_CLASS,
        "class_dropout_prob": model["class_dropout_prob"] or 0.1,  # 0 would leave no row for the null class
    }


def convert(config, state, source, *, scheduler="ddim", stock_transformer=False):
    """Returns a Large-DiT for a stock DiTPipeline; see `sampling.pipelines.export.exporter`.

    Args:
        scheduler: of `EXPORTED`, see `make_scheduler`.
        stock_transformer: name ppdiffusers' `DiTLLaMA2DModel` as it is, which gives other numbers.
    """
    from sampling.schedulers import make_scheduler

    model, table = config["model"], "y_embedder.embedding_table.weight"
    notes = guidance_notes(model)
    if stock_transformer:
        package, name, code = "ppdiffusers", "DiTLLaMA2DModel", None
        notes.append(
            "DiTLLaMA2DModel itself draws other images than this network: its block norms subtract the mean. It can't "
            "be built with Paddle 3, and in float32 needs a CUDA build of Paddle."
        )
    else:
        file = os.path.basename(CODE)
        package, name = os.path.splitext(file)[0], "LargeDiTTransformer"
        code = os.path.join(os.path.dirname(os.path.abspath(__file__)), file)
        notes.append(
            f"Loading the folder runs its {CODE}: DiTLLaMA2DModel, mended to give the official network's numbers."
        )
    return {
        "transformer": (package, name, check(config)),
        "weights": {**state, table: class_table(model, state[table])},
        "scheduler": ("ppdiffusers", make_scheduler(config["objective"], scheduler)),
        "code": code,
    }, notes
