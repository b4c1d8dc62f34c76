"""What both training loops share, and the PaddleNLP Trainer subclass.

Names are imported on first use, so that a script's `--help` does not wait for Paddle.
"""

import importlib

_EXPORTS = {
    "EMA": "training.averages",
    "FeatureDataset": "features.dataset",
    "LatentDiffusionTrainer": "training.trainer",
    "load_config": "config.schema",
}

__all__ = ["EMA", "FeatureDataset", "LatentDiffusionTrainer", "load_config"]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
