"""Export of a Large-DiT as a folder that the stock `ppdiffusers.DiTPipeline` loads.

Settings and weights are those of ppdiffusers' own Large-DiT transformer, `DiTLLaMA2DModel`, whose parameters have the
official names. That class does not give the official network's numbers: its block norms subtract the mean, as RMS norms
don't; it can't be built with Paddle 3, and in float32 it needs a CUDA build of Paddle. So the folder brings along a
subclass of it that mends this, a copy of `sampling/pipelines/large_dit_transformer.py`, and model_index.json names that
one: DiTPipeline then gives the numbers of this project's Large-DiT anywhere, without this project.

The rest is as for a DiT (`sampling.pipelines.export`): the label table is laid out for the null class 1000, all latent
channels are guided, a learned variance is cut off. Timesteps need no fit: the frequencies are the official ones.
"""

import os

from sampling.pipelines.export import (
    check_export,
    check_num_classes,
    class_table,
    guidance_notes,
    write_stock_folder,
)
from sampling.pipelines.folder import CODE
from sampling.pipelines.pretrained import NULL_CLASS

MAX_TOKENS = 4096  # of DiTLLaMA2DModel's table of rotary positions
STOCK_CLASS = ("ppdiffusers", "DiTLLaMA2DModel")
OWN_CLASS = (os.path.splitext(os.path.basename(CODE))[0], "LargeDiTTransformer")
OWN_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.path.basename(CODE))


def transformer_config(model):
    """Returns the keywords of the `DiTLLaMA2DModel` for a `model` section; ValueError where it can't be one."""
    if model["type"] != "LargeDiT":
        raise ValueError(f"a model of type {model['type']!r} can't be a DiTLLaMA2DModel; expected LargeDiT")
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


def export_large_dit_pipeline(
    config,
    state,
    vae,
    output_dir,
    *,
    scheduler="ddim",
    id2label=None,
    overwrite=False,
    safe_serialization=False,
    stock_transformer=False,
    source="weights",
):
    """Writes a Large-DiT and a VAE as a `ppdiffusers.DiTPipeline` folder, with `CODE` unless `stock_transformer`.

    Args:
        stock_transformer: name ppdiffusers' `DiTLLaMA2DModel` as it is, which gives other numbers. The others, result
            and errors are those of `sampling.pipelines.export.export_dit_pipeline`.
    """
    from sampling.schedulers import make_scheduler

    model = config["model"]
    settings = transformer_config(model)
    the_scheduler = make_scheduler(config["objective"], scheduler)
    labels, weights = check_export(model, state, vae, output_dir, id2label, overwrite, source)
    table = "y_embedder.embedding_table.weight"
    weights[table] = class_table(model, weights[table])
    package, class_name = STOCK_CLASS if stock_transformer else OWN_CLASS
    write_stock_folder(
        output_dir,
        (package, class_name, settings),
        weights,
        the_scheduler,
        vae,
        labels,
        overwrite,
        safe_serialization=safe_serialization,
        code=None if stock_transformer else OWN_FILE,
    )
    if stock_transformer:
        note = (
            "DiTLLaMA2DModel itself draws other images than this network: its block norms subtract the mean. It can't "
            "be built with Paddle 3, and in float32 needs a CUDA build of Paddle."
        )
    else:
        note = f"Loading the folder runs its {CODE}: DiTLLaMA2DModel, mended to give the official network's numbers."
    return [*guidance_notes(model), note]
