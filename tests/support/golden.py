"""Golden vectors, and the networks that they were made by: those that `tools/self_check.py` compares with too."""

from verification.vectors import (
    GOLDEN,
    NETWORKS,
    OFFICIAL,
    TINY,
    golden_inputs,
    golden_network,
    judged,
    load_golden,
    official_network,
    relative_error,
    tensors,
)

__all__ = [
    "GOLDEN",
    "NETWORKS",
    "OFFICIAL",
    "TINY",
    "golden_inputs",
    "golden_network",
    "judged",
    "load_golden",
    "official_network",
    "relative_error",
    "replay",
    "tensors",
]


def replay(monkeypatch, name, arrays):
    """`paddle.<name>` returns the stored arrays, one a call. The iterator: what is left of them."""
    import paddle

    rest = iter(arrays)
    monkeypatch.setattr(paddle, name, lambda *args, **kwargs: paddle.to_tensor(next(rest)))
    return rest
