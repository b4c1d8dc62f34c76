"""SiT: parity with the official network, and what it shares with DiT."""

import numpy as np
import paddle
import pytest
from conftest import GOLDEN, load_golden, relative_error

from models import DiT, SiT, build_model
from models.weights import load_weights, official_to_paddle

TINY = {
    "type": "SiT",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_classes": 10,
}
RESIDUAL = ("x_embedder.", "pos_embed", ".attn.proj.", ".mlp.fc2.")


def golden_model(scale=None, **overrides):
    model = build_model(TINY, **overrides)
    state = official_to_paddle(load_weights(GOLDEN / "sit_tiny.pt"))
    assert list(state) == [name for name, _ in model.named_parameters()]
    if scale is not None:
        state = {name: value * scale if any(r in name for r in RESIDUAL) else value for name, value in state.items()}
    for name, parameter in model.named_parameters():
        parameter.set_value(state[name])
    model.eval()
    return model


def inputs(arrays, prefix=""):
    return [paddle.to_tensor(arrays[prefix + key]) for key in "xty"]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_forward_is_the_official_one(fused):
    arrays = load_golden("sit_forward")
    model = golden_model(fused_attention=fused)
    assert isinstance(model, SiT)
    assert relative_error(model(*inputs(arrays)), arrays["out"]) < 2e-5
    # A residual stream of 0.01 shows the norms' epsilon.
    small = golden_model(scale=np.float32(0.01), fused_attention=fused)
    assert relative_error(small(*inputs(arrays)), arrays["out_small"]) < 2e-5


@pytest.mark.parametrize("scale", [4, 1])
def test_guidance_is_the_official_one(scale):
    arrays = load_golden("sit_forward")
    model = golden_model()
    x, t, y = inputs(arrays, "cfg_")
    out = model.forward_with_cfg(x, t, y, float(scale))
    assert relative_error(out, arrays[f"cfg_out_{scale}"]) < 2e-5
    half = len(y) // 2
    garbage = paddle.concat([x[:half], paddle.full_like(x[half:], 9.0)])
    np.testing.assert_array_equal(model.forward_with_cfg(garbage, t, y, float(scale)), out)


def test_guidance_of_all_channels():
    arrays = load_golden("sit_forward")
    model = golden_model()
    x, t, y = inputs(arrays, "cfg_")
    half = len(y) // 2
    cond, uncond = model(paddle.concat([x[:half], x[:half]]), t, y).split(2)
    out = model.forward_with_cfg(x, t, y, 2.5, cfg_channels=None)
    for part in out.split(2):
        assert relative_error(part, uncond + 2.5 * (cond - uncond)) < 1e-6


def test_without_variance_channels_nothing_is_dropped():
    paddle.seed(0)
    sit, dit = build_model(TINY, learn_sigma=False), build_model({**TINY, "type": "DiT"}, learn_sigma=False)
    paddle.seed(1)
    for (name, p), (other, q) in zip(sit.named_parameters(), dit.named_parameters(), strict=True):
        assert name == other
        q.set_value(p.set_value(paddle.randn(p.shape) * 0.1) or p)
    sit.eval(), dit.eval()
    arrays = inputs(load_golden("sit_forward"))
    out = sit(*arrays)
    assert out.shape == [5, 4, 8, 8]
    np.testing.assert_array_equal(out, dit(*arrays))


def test_starts_as_dit_does():
    models = []
    for kind in (DiT, SiT):
        paddle.seed(0)
        models.append(kind(8, 2, 4, 2, 2, 16, num_classes=10))
    for (name, p), (other, q) in zip(*(model.named_parameters() for model in models), strict=True):
        assert name == other
        assert p.stop_gradient == q.stop_gradient
        np.testing.assert_array_equal(p, q)


def test_forced_label_dropout_reaches_the_embedder():
    arrays = load_golden("sit_forward")
    model = golden_model()
    x, t, y = inputs(arrays)
    dropped = model(x, t, y, paddle.ones_like(y))
    np.testing.assert_array_equal(dropped, model(x, t, paddle.full_like(y, 10)))
