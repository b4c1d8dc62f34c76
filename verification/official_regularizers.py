"""Regularizers as the official codes compute them; see `verification.official`."""

import numpy as np

from models.hooks import Tap
from objectives import Batch, TransportObjective
from objectives.regularizers import build_regularizers
from verification.official import FLOAT32, backward, gradient_pairs
from verification.vectors import TINY, Pair, golden_network, load_golden, official_network, tensors

# Entries of `objective.regularizers`. A group is the whole batch.
REGULARIZED = {
    "layer_sync": {"weight": 0.2, "block": 1, "target_block": 3},
    "dispersive": {"weight": 0.25, "block": -1, "temperature": 1.0, "group": 6},
    "contrastive": {"weight": 0.05, "group": 6},
}


def regularized(kind, precision=FLOAT32):
    """Loss and gradients of SiT with a regularizer, and the tokens that it sees."""
    arrays, model = load_golden("regularized_sit"), official_network("SiT", single_backward=True)
    precision.decorate(model)
    objective = with_regularizer(kind, REGULARIZED[kind], layers=3)
    tokens = Tap([0, 1, 2])

    def tapped(*args, hooks=(), **options):
        return model(*args, hooks=(*hooks, tokens), **options)

    x, x0, t, y = tensors(arrays, "x1", "x0", "u", "y")
    with precision.autocast():
        losses = objective.training_losses(tapped, Batch(x, y), drawn={"t": t, "noise": x0})
    scale = backward(losses["loss"].mean(), precision)
    expected = {"layer_sync": arrays["loss"] + 0.2 * arrays["layer_sync"]}
    expected |= {name: arrays[f"{name}_loss"] for name in ("dispersive", "contrastive")}
    return {
        kind: Pair(losses[kind], np.broadcast_to(arrays[kind], [6]), 2e-5),
        "loss": Pair(losses["loss"], expected[kind], 2e-5, "entry"),
        **{f"tokens_{block}": Pair(tokens.tokens[block - 1], arrays[f"tokens_{block}"], 2e-5) for block in (1, 2, 3)},
        **gradient_pairs(model, arrays, 2e-5, f"{kind}_grad", scale),
    }


def with_regularizer(kind, entry, layers):
    """The objective of a SiT with an entry of `objective.regularizers`."""
    regularizers = build_regularizers([{"type": kind, **entry}], layers)
    return TransportObjective({}, class_dropout_prob=0.1, regularizers=regularizers)


def internal_guidance(precision=FLOAT32):
    """Both outputs of Internal Guidance's SiT, its losses and gradients."""
    arrays, entry = load_golden("internal_guidance_sit_losses"), {"weight": 0.5, "block": 2}
    model = {"type": "SiT", **TINY, "attention_head_dim": 8, "learn_sigma": False}
    regularizers = [{"type": "internal_guidance", **entry}]
    config = {"model": model, "objective": {"regularizers": regularizers}}
    model = golden_network("internal_guidance_sit.pt", config, single_backward=True)
    precision.decorate(model)
    objective = with_regularizer("internal_guidance", entry, layers=3)
    outputs = []

    def observed(*args, hooks, **options):
        outputs.extend(model(*args, hooks=hooks, **options))
        return outputs[0]

    x, x0, t, y = tensors(arrays, "x1", "x0", "t", "y")
    with precision.autocast():
        losses = objective.training_losses(observed, Batch(x, y), drawn={"t": t, "noise": x0})
    scale = backward(losses["loss"].mean(), precision)
    second = losses["internal_guidance"]
    return {
        "out": Pair(outputs[0], arrays["out"], 2e-5),
        "out_auxiliary": Pair(outputs[1], arrays["out_auxiliary"], 2e-5),
        "loss": Pair(losses["loss"], arrays["loss"], 2e-5, "entry"),
        "loss_velocity": Pair(losses["loss"] - 0.5 * second, arrays["loss_velocity"], 2e-5, "entry"),
        "loss_auxiliary": Pair(second, arrays["loss_auxiliary"], 2e-5, "entry"),
        **gradient_pairs(model, arrays, 2e-5, scale=scale),
    }
