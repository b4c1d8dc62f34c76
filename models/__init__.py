"""Networks: `DiT`, `SiT`, `LargeDiT`, `LargeSiT`; `build_model` makes one from the `model` section of a config.

Names are imported on first use, so that reading a weight file (`models.weights`) does not wait for Paddle.
"""

import importlib

_MODULES = {
    "DiT": "dit",
    "SiT": "sit",
    "LargeDiT": "large_dit",
    "LargeSiT": "large_dit",
    "LabelEmbedder": "embeddings",
    "TimestepEmbedder": "embeddings",
    "get_2d_sincos_pos_embed": "embeddings",
}
_NETWORKS = ("DiT", "SiT", "LargeDiT", "LargeSiT")

__all__ = ["MODELS", "build_model", *_MODULES]  # noqa: PLE0604 (strings)


def __getattr__(name):
    if name == "MODELS":
        value = {kind: __getattr__(kind) for kind in _NETWORKS}
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


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
    if name not in _NETWORKS:
        raise ValueError(f"unknown model type {name!r}; known: {', '.join(_NETWORKS)}")
    keywords.update(overrides)
    try:
        return __getattr__(name)(**keywords)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise ValueError(f"model type {name}: {str(error).split('()')[-1].strip()}") from None
        raise
