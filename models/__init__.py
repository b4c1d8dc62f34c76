"""Networks: `DiT`, `SiT`, `LargeDiT`, `LargeSiT`, `LightningDiT`, which `build_model` makes from a config.

Names are imported on first use, so that whoever needs `weights.files` alone does not wait for Paddle.
"""

import importlib

from runtime.machine import set_mkl_cpu_type

set_mkl_cpu_type()  # in programs that know nothing of `runtime.process.configure_runtime`

_EXPORTS = {
    "DiT": "models.dit",
    "LabelEmbedder": "models.embeddings",
    "LargeDiT": "models.large_dit",
    "LargeSiT": "models.large_dit",
    "LightningDiT": "models.lightning_dit",
    "SiT": "models.sit",
    "TimestepEmbedder": "models.embeddings",
    "get_2d_sincos_pos_embed": "models.embeddings",
}

__all__ = ["MODELS", "build_model", *_EXPORTS]


def __getattr__(name):
    if name == "MODELS":
        value = {network: __getattr__(network) for network in ("DiT", "SiT", "LargeDiT", "LargeSiT", "LightningDiT")}
    elif name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    else:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    globals()[name] = value
    return value


def build_model(config, **overrides):
    """Builds the network of a config, or its `model` section alone, with the official initialisation.

    A whole config's has the layers of its regularizers too, see `models.regularizers`. `overrides` are constructor
    keywords that win. Raises ValueError for an unknown type or keyword, or a size that can't be.
    """
    from models import MODELS

    keywords = {**config.get("model", config), **overrides}
    name = keywords.pop("type", "DiT")
    if name not in MODELS:
        raise ValueError(f"unknown model type {name!r}; known: {', '.join(MODELS)}")
    try:
        network = MODELS[name](**keywords)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise ValueError(f"model type {name}: {str(error).split('()')[-1].strip()}") from None
        raise
    if regularizers := config.get("objective", {}).get("regularizers") if "model" in config else None:
        from models.regularizers import add_regularizers

        add_regularizers(network, regularizers)
    return network
