"""Golden vectors, and the networks that they were made by."""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def load_golden(name):
    """A golden file's arrays by name."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


# The parameters that the `out_small` vectors scale by 0.01: a small residual stream shows the norms' epsilon.
RESIDUAL = (
    *("x_embedder.", "pos_embed", ".attn.proj.", ".mlp.fc2."),
    *(".attention.wo.", ".feed_forward.w2.", ".attention.wq.", ".attention.wk."),
)


TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_classes": 10,
}
# The official networks: file of weights, of vectors, config, and the tolerance of tests/golden/README.md, twice.
OFFICIAL = {
    "DiT": ("dit_tiny.pt", "dit_forward", {"type": "DiT", **TINY}, 6e-5),
    "SiT": ("sit_tiny.pt", "sit_forward", {"type": "SiT", **TINY}, 2e-5),
    "LargeDiT": ("largedit_tiny.pt", "largedit_forward", {"type": "LargeDiT", **TINY, "num_layers": 2}, 6e-5),
}


def official_network(kind, scale=None, **overrides):
    """An official network of `OFFICIAL`; arguments as of `golden_network`."""
    weights, _, config, _ = OFFICIAL[kind]
    return golden_network(weights, config, scale, **overrides)


def golden_network(weights, config, scale=None, **overrides):
    """The network of a golden `.pt` file in evaluation mode; `scale` multiplies what feeds the residual stream."""
    from models import build_model
    from models.state import official_to_paddle
    from weights.files import load_weights

    model = build_model(config, **overrides)
    state = official_to_paddle(load_weights(GOLDEN / weights))
    assert list(state) == [name for name, _ in model.named_parameters()] == list(model.state_dict())
    for name, parameter in model.named_parameters():
        small = scale is not None and any(part in name for part in RESIDUAL)
        parameter.set_value(state[name] * np.float32(scale) if small else state[name])
    model.eval()
    return model


def golden_inputs(arrays, prefix=""):
    """x, t, y of a golden file as tensors."""
    import paddle

    return [paddle.to_tensor(arrays[prefix + key]) for key in "xty"]


def relative_error(a, b):
    """max|a - b| / max|b|, the golden files' measure."""
    a, b = np.asarray(a, dtype="float64"), np.asarray(b, dtype="float64")
    return np.abs(a - b).max() / np.abs(b).max()
