"""Training: a session that both loops share, its parts, and the PaddleNLP Trainer around it."""


def __getattr__(name):
    if name != "EMA":
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    from training.averages import EMA  # on first use, so that a script's `--help` does not wait for Paddle

    return EMA
