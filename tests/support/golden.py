"""Golden vectors, and the networks that they were made by: those that `tools/self_check.py` compares with too."""

from verification.vectors import (
    GOLDEN,
    OFFICIAL,
    TINY,
    golden_inputs,
    golden_network,
    load_golden,
    official_network,
    relative_error,
)

__all__ = [
    "GOLDEN",
    "OFFICIAL",
    "TINY",
    "golden_inputs",
    "golden_network",
    "load_golden",
    "official_network",
    "relative_error",
]
