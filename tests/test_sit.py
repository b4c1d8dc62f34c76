"""SiT: parity with the official network, and what it shares with DiT."""

import numpy as np
import paddle
import pytest
from support.golden import golden_inputs, golden_network, load_golden, relative_error

from models import DiT, SiT, build_model

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


def golden_model(scale=None, **overrides):
    return golden_network("sit_tiny.pt", TINY, scale, **overrides)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_forward_is_the_official_one(fused):
    arrays = load_golden("sit_forward")
    model = golden_model(fused_attention=fused)
    assert isinstance(model, SiT)
    assert relative_error(model(*golden_inputs(arrays)), arrays["out"]) < 2e-5
    # A residual stream of 0.01 shows the norms' epsilon.
    small = golden_model(scale=np.float32(0.01), fused_attention=fused)
    assert relative_error(small(*golden_inputs(arrays)), arrays["out_small"]) < 2e-5


@pytest.mark.parametrize("scale", [4, 1])
def test_guidance_is_the_official_one(scale):
    arrays = load_golden("sit_forward")
    model = golden_model()
    x, t, y = golden_inputs(arrays, "cfg_")
    out = model.forward_with_cfg(x, t, y, float(scale))
    assert relative_error(out, arrays[f"cfg_out_{scale}"]) < 2e-5
    half = len(y) // 2
    garbage = paddle.concat([x[:half], paddle.full_like(x[half:], 9.0)])
    np.testing.assert_array_equal(model.forward_with_cfg(garbage, t, y, float(scale)), out)


def test_guidance_of_all_channels():
    arrays = load_golden("sit_forward")
    model = golden_model()
    x, t, y = golden_inputs(arrays, "cfg_")
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
    arrays = golden_inputs(load_golden("sit_forward"))
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
    x, t, y = golden_inputs(arrays)
    dropped = model(x, t, y, paddle.ones_like(y))
    np.testing.assert_array_equal(dropped, model(x, t, paddle.full_like(y, 10)))
