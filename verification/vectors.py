"""The golden vectors of the official code (`tests/golden`), the networks that they were made by, and errors."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verification.verdicts import Skip, within

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_classes": 10,
}
LIGHTNING = {**TINY, "type": "LightningDiT", "num_layers": 2}
# The official networks: file of weights, of vectors, config, and the tolerance of tests/golden/README.md, twice.
OFFICIAL = {
    "DiT": ("dit_tiny.pt", "dit_forward", {"type": "DiT", **TINY}, 6e-5),
    "SiT": ("sit_tiny.pt", "sit_forward", {"type": "SiT", **TINY}, 2e-5),
    "LargeDiT": ("largedit_tiny.pt", "largedit_forward", {"type": "LargeDiT", **TINY, "num_layers": 2}, 6e-5),
    "LightningDiT": (
        "lightningdit_full.pt",
        "lightningdit_forward_full",
        {**LIGHTNING, "num_attention_heads": 3, "qk_norm": True},
        2e-5,
    ),
}
# The same with other switches: those of the published LightningDiT, and none.
NETWORKS = {
    **OFFICIAL,
    "LightningDiT without qk_norm": (
        "lightningdit_default.pt",
        "lightningdit_forward_default",
        {**LIGHTNING, "sample_size": 4, "patch_size": 1, "in_channels": 8},
        2e-5,
    ),
    "LightningDiT without switches": (
        "lightningdit_plain.pt",
        "lightningdit_forward_plain",
        {
            **{**LIGHTNING, "attention_head_dim": 12, "mlp_ratio": 2.0, "learn_sigma": True},
            **dict.fromkeys(("swiglu", "rope", "rms_norm", "adaln_shift"), False),
        },
        4e-5,
    ),
}
# Arrays of the forward pass, and by what each multiplies the parameters whose names contain a part: of a small residual
# stream, and of small queries and keys, the epsilon of the norms shows.
RESIDUAL = (
    *("x_embedder.", "pos_embed", ".attn.proj.", ".mlp.fc2.", ".mlp.w3."),
    *(".attention.wo.", ".feed_forward.w2.", ".attention.wq.", ".attention.wk."),
)
FORWARD = {
    "out": {},
    "out_small": dict.fromkeys(RESIDUAL, 0.01),
    "out_small_qk": {".attn.qkv.": 0.001, ".attn.proj.weight": 1000.0},
}


def golden_file(name):
    """Returns the path of a golden file; raises `Skip` where it is missing."""
    if not (GOLDEN / name).is_file():
        raise Skip(f"tests/golden/{name} is missing: this check needs the whole repository, not the packages alone")
    return GOLDEN / name


def load_golden(name):
    """Returns a golden file's arrays by name."""
    with np.load(golden_file(f"{name}.npz")) as arrays:
        return dict(arrays)


def official_network(kind, scales=None, **overrides):
    """Returns an official network of `NETWORKS`; arguments as of `golden_network`."""
    weights, _, config, _ = NETWORKS[kind]
    return golden_network(weights, config, scales, **overrides)


def golden_network(weights, config, scales=None, **overrides):
    """Returns the network of a golden `.pt` file in evaluation mode; `scales` as of `FORWARD`.

    `overrides` are further keywords of the network's constructor.
    """
    from models import build_model

    model = build_model(config, **overrides)
    fill(model, weights, scales)
    model.eval()
    return model


def fill(model, weights, scales=None):
    """Gives a network the weights of a golden `.pt` file; `scales` as of `FORWARD`."""
    from models.state import INTERNAL_GUIDANCE
    from weights.source import read_weights

    state, _ = read_weights(golden_file(weights), model=model.settings, kept=[INTERNAL_GUIDANCE])
    names = [name for name, _ in model.named_parameters()]
    assert names == list(model.state_dict()) == sorted(state, key=lambda name: name.startswith(INTERNAL_GUIDANCE))
    for name, parameter in model.named_parameters():
        factors = (factor for part, factor in (scales or {}).items() if part in name)
        parameter.set_value(state[name] * np.float32(next(factors, 1.0)))


def golden_inputs(arrays, prefix=""):
    """Returns x, t, y of a golden file as tensors."""
    return tensors(arrays, *(prefix + key for key in "xty"))


def tensors(arrays, *names):
    """Returns some of the arrays as tensors on Paddle's current device."""
    import paddle

    return [paddle.to_tensor(arrays[name]) for name in names]


# Errors.


def as_array(value):
    """Returns a tensor, of half precision too, or anything else, as a float64 array."""
    return np.asarray(value.astype("float64") if hasattr(value, "stop_gradient") else value, dtype="float64")


def relative_error(actual, expected):
    """Returns max|a - b| / max|b|, the golden files' measure."""
    actual, expected = as_array(actual), as_array(expected)
    return np.abs(actual - expected).max() / np.abs(expected).max()


@dataclass(frozen=True)
class Pair:
    """A result beside the official one, and its tolerance (tests/golden/README.md).

    measure: `array`, max|a - b| / max|b|; `entry`, the same entry by entry; `norm`, by Euclidean norms; `absolute`,
        max|a - b|.
    float64_run: with `entry`, the official result in float64: room is given to what float32 can't resolve.
    """

    actual: object
    expected: object
    tolerance: float
    measure: str = "array"
    float64_run: object = None

    def error(self):
        """Returns the error, infinite if the shapes differ."""
        actual, expected = as_array(self.actual), as_array(self.expected)
        if actual.shape != expected.shape:
            return np.inf
        distance = np.abs(actual - expected)
        if self.measure == "array":
            return distance.max() / np.abs(expected).max()
        if self.measure == "norm":
            return np.linalg.norm(distance) / np.linalg.norm(expected)
        if self.measure == "absolute":
            return distance.max()
        room = np.zeros_like(expected) if self.float64_run is None else 10 * np.abs(expected - self.float64_run)
        return (distance / (np.abs(expected) + (2 * room + 2e-12) / self.tolerance)).max()


def judged(pairs, bound=None):
    """Returns text and figures of `{what: Pair}`, or raises `Wrong`; `bound` takes the place of all tolerances."""
    return within({what: (pair.error(), bound or pair.tolerance) for what, pair in pairs.items()})
