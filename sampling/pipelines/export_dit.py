"""Export of a DiT as a folder that the stock `ppdiffusers.DiTPipeline` loads.

What the stock classes do differently, and what the export does about it, stands in docs/inference.md. Beside that:

* Without a null class (class_dropout_prob 0) the rows of the label table from there on are NaN: sample with
  `guidance_scale=1`; guidance, which such a network can't do, then shows at once.
* The transformer computes its sin-cos table itself; weights whose `pos_embed` is another one, by more than the rounding
  of a half precision, are refused.
* The MLP's width is fixed at 4 times the hidden width; a narrower one is padded with zeros, a wider one refused.
* A learned variance is ignored by both schedulers: the pipeline cuts it off.
"""

import numpy as np

from config.options import SWITCHES
from models.state import is_rounded
from sampling.pipelines.pretrained import NULL_CLASS
from sampling.step_counts import FIT_KEY, VISITS

STOCK_CLASS = ("ppdiffusers", "Transformer2DModel")
OTHER = {"ddim": "dpm", "dpm": "ddim", "dpm3": "ddim"}


def check(config):
    """Returns the keywords of the `Transformer2DModel`; see `sampling.pipelines.export.exporter`."""
    return transformer_config(config["model"])


def transformer_config(model):
    """Returns the keywords of the `Transformer2DModel` for a `model` section; ValueError where it can't be one."""
    hidden_size = model["num_attention_heads"] * model["attention_head_dim"]
    if model["type"] not in ("DiT", "SiT"):
        raise ValueError(f"a model of type {model['type']!r} can't be exported; sample it from its checkpoint")
    switched = [key for key, switch in SWITCHES.items() if model.get(key, switch.default) != switch.default]
    if switched:
        named = ", ".join(f"{key} {str(model[key]).lower()}" for key in switched)
        raise ValueError(
            f"{named}: Transformer2DModel has no such layers; such a model can't be a DiTPipeline, sample it from its "
            "checkpoint"
        )
    if int(hidden_size * model["mlp_ratio"]) > 4 * hidden_size:
        raise ValueError(
            f"mlp_ratio {model['mlp_ratio']}: Transformer2DModel's MLP has 4 times the hidden width; a wider one can't "
            "be exported; sample such a model from its checkpoint"
        )
    scale = model["sample_size"] // 64
    if scale > 1 and model["sample_size"] > model["patch_size"]:  # one token alone stands at 0
        raise ValueError(
            f"sample_size {model['sample_size']}: from 128 on Transformer2DModel divides the positions by "
            f"sample_size // 64, here {scale}; such a model can't be a DiTPipeline, sample it from its checkpoint"
        )
    return {
        **shared_settings(model),
        "num_embeds_ada_norm": NULL_CLASS,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
    }


def shared_settings(model):
    """Returns the keywords of both stock transformers; ValueError for what neither of them has."""
    if model["sprint_blocks"]:
        raise ValueError(
            f"sprint_blocks {model['sprint_blocks']}: ppdiffusers' transformers have no second path; such a model "
            "can't be a DiTPipeline, sample it from its checkpoint"
        )
    if model["num_classes"] > NULL_CLASS:
        raise ValueError(
            f"num_classes {model['num_classes']}: DiTPipeline takes class {NULL_CLASS} for the null class, so at most "
            f"{NULL_CLASS} classes can be exported; sample such a model from its checkpoint"
        )
    same = ("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim")
    out_channels = model["in_channels"] * (2 if model["learn_sigma"] else 1)
    return {**{name: model[name] for name in same}, "out_channels": out_channels}


def transformer_state(model, state, *, timestep_embedding=None, source="weights"):
    """Returns DiT's weights `{name: float32 array}`, Paddle layout, under `Transformer2DModel`'s names.

    Args:
        timestep_embedding: what `fit_timestep_embedding` returned, or None to keep DiT's own MLP.
    """
    from models import get_2d_sincos_pos_embed
    from sampling.pipelines.timestep_fit import own_timestep_mlp

    pos_embed = state["pos_embed"][0]
    table = get_2d_sincos_pos_embed(pos_embed.shape[-1], model["sample_size"] // model["patch_size"])  # (T, D)
    if not is_rounded(pos_embed, table):
        raise ValueError(
            f"{source}: pos_embed differs by up to {np.abs(table - pos_embed).max():.2g} from the sin-cos table that "
            "Transformer2DModel computes and can't be given; such a model can't be a DiTPipeline, sample it from its "
            "checkpoint"
        )
    missing = 4 * pos_embed.shape[-1] - state["blocks.0.mlp.fc1.bias"].size
    paddings = {"fc1.weight": [(0, 0), (0, missing)], "fc1.bias": [(0, missing)], "fc2.weight": [(0, missing), (0, 0)]}
    state = dict(state)
    for i in range(model["num_layers"] if missing else 0):  # gelu(0) = 0: hidden units of zeros change nothing
        for name, padding in paddings.items():
            state[f"blocks.{i}.mlp.{name}"] = np.pad(state[f"blocks.{i}.mlp.{name}"], padding)
    mlp = timestep_embedding or own_timestep_mlp(state)
    embedding = {
        f"timestep_embedder.linear_{layer}.{kind}": mlp[f"{2 * layer - 2}.{kind}"]
        for layer in (1, 2)
        for kind in ("weight", "bias")
    }
    embedding["class_embedder.embedding_table.weight"] = class_table(model, state["y_embedder.embedding_table.weight"])
    linear = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    result = {}
    for i in range(model["num_layers"]):
        to, block = f"transformer_blocks.{i}", f"blocks.{i}"
        linear[f"{to}.norm1.linear"] = f"{block}.adaLN_modulation.1"
        linear[f"{to}.attn1.to_out.0"] = f"{block}.attn.proj"
        linear[f"{to}.ff.net.0.proj"] = f"{block}.mlp.fc1"
        linear[f"{to}.ff.net.2"] = f"{block}.mlp.fc2"
        result.update({f"{to}.norm1.emb.{name}": value for name, value in embedding.items()})
        for kind in ("weight", "bias"):
            parts = np.split(state[f"{block}.attn.qkv.{kind}"], 3, axis=-1)  # [D, 3D] -> 3 x [D, D]
            result.update({f"{to}.attn1.to_{q}.{kind}": part for q, part in zip("qkv", parts, strict=True)})
    for to, name in linear.items():
        result[f"{to}.weight"], result[f"{to}.bias"] = state[f"{name}.weight"], state[f"{name}.bias"]
    return result


def class_table(model, table):
    """Returns a stock DiTPipeline's label table `(1001, D)`: the classes, then the null class in all other rows."""
    null = table[-1] if model["class_dropout_prob"] > 0 else np.full_like(table[0], np.nan)
    rows = np.tile(null, (NULL_CLASS + 1, 1))  # (1001, D)
    rows[: model["num_classes"]] = table[: model["num_classes"]]
    return rows


def guidance_notes(model):
    """Lists sentences on the guidance of a stock DiTPipeline."""
    notes = ["DiTPipeline guides all latent channels; the official forward_with_cfg guides the first three."]
    if model["class_dropout_prob"] == 0:
        notes.append("This model has no null class: sample it with guidance_scale=1; any other gives NaN.")
    return notes


def convert(config, state, source, *, scheduler="ddim", timestep_embedding="fit"):
    """Returns a DiT for a stock DiTPipeline; see `sampling.pipelines.export.exporter`.

    Args:
        scheduler: of `EXPORTED`, see `make_scheduler`.
        timestep_embedding: "fit" for `fit_timestep_embedding`, "keep" for DiT's own weights as they are.
    """
    from sampling.pipelines.timestep_fit import fit_timestep_embedding
    from sampling.schedulers import make_scheduler, pipeline_scheduler

    if timestep_embedding not in ("fit", "keep"):
        raise ValueError(f"unknown timestep_embedding {timestep_embedding!r}; known: fit, keep")
    model = config["model"]
    the_scheduler, other = make_scheduler(config["objective"], scheduler), OTHER[scheduler]
    mlp, report = fit_timestep_embedding(state, the_scheduler, pipeline_scheduler(the_scheduler, other))
    settings = check(config)
    if timestep_embedding == "keep":
        mlp, settings[FIT_KEY] = None, {VISITS[scheduler]: [], other: []}
    elif not report["all_timesteps"]:
        settings[FIT_KEY] = {VISITS[scheduler]: report["exact_steps"], other: report["other_exact_steps"]}
    weights = transformer_state(model, state, timestep_embedding=mlp, source=source)
    notes = [*guidance_notes(model), _fit_note(scheduler, timestep_embedding, report)]
    transformer = (*STOCK_CLASS, settings)
    return {"transformer": transformer, "weights": weights, "scheduler": ("ppdiffusers", the_scheduler)}, notes


def _fit_note(scheduler, timestep_embedding, report):
    if timestep_embedding == "keep":
        return (
            "The stock transformer embeds timesteps by other frequencies than DiT: with DiT's weights kept, its "
            f"timestep embedding is off by up to {report['kept_error']:.0%}."
        )
    if report["all_timesteps"]:
        return "The timestep embedding was fitted to the stock transformer's frequencies: exact everywhere."
    steps = ", ".join(map(str, report["exact_steps"])) or "no number of"
    others = ", ".join(map(str, report["other_exact_steps"]))
    others = f" (and {OTHER[scheduler]} in {others})" if others else ""
    return (
        f"The timestep embedding was fitted to the stock transformer's frequencies: exact when this {scheduler} "
        f"scheduler samples in {steps} steps{others}; this network is too narrow for all timesteps (off by up to "
        f"{report['max_error']:.1%} at others)."
    )
