"""Networks: `DiT`, `SiT`, `LargeDiT`, `LargeSiT`; `build_model` makes one from the `model` section of a config."""

from runtime.machine import set_mkl_cpu_type

from .dit import DiT
from .embeddings import LabelEmbedder, TimestepEmbedder, get_2d_sincos_pos_embed
from .large_dit import LargeDiT, LargeSiT
from .sit import SiT

set_mkl_cpu_type()  # in programs that know nothing of `training.runtime.configure_runtime`

MODELS = {"DiT": DiT, "SiT": SiT, "LargeDiT": LargeDiT, "LargeSiT": LargeSiT}

__all__ = [
    "MODELS",
    "DiT",
    "LabelEmbedder",
    "LargeDiT",
    "LargeSiT",
    "SiT",
    "TimestepEmbedder",
    "build_model",
    "get_2d_sincos_pos_embed",
]


def build_model(config, **overrides):
    """Builds the network that a config describes, with the official initialisation.

    Args:
        config: the `model` section (`type` and constructor keywords), or a whole config that has it.
        overrides: constructor keywords that win over the config's, such as `fused_attention`.

    Raises:
        ValueError: an unknown type or keyword, or a size that can't be.
    """
    keywords = dict(config["model"] if "model" in config else config)
    name = keywords.pop("type", "DiT")
    if name not in MODELS:
        raise ValueError(f"unknown model type {name!r}; known: {', '.join(MODELS)}")
    keywords.update(overrides)
    try:
        return MODELS[name](**keywords)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise ValueError(f"model type {name}: {str(error).split('()')[-1].strip()}") from None
        raise
