"""DiT and SiT, and what all networks share: parity with the official ones, initialisation, attention, recompute."""

import numpy as np
import paddle
import pytest
from support.device import either
from support.golden import (
    NETWORKS,
    OFFICIAL,
    golden_inputs,
    judged,
    load_golden,
    official_network,
    relative_error,
    replay,
)
from support.initialisation import check_initialisation
from support.runs import TINY_MODELS

from models import DiT, SiT, build_model, cpu_ops
from models.embeddings import LabelEmbedder
from verification import official

pytestmark = pytest.mark.paddle26

TINY = OFFICIAL["DiT"][2]


def golden_model(**overrides):
    return official_network("DiT", **overrides)


@pytest.mark.parametrize("of_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_forward_is_the_official_one(kind, of_gpu, monkeypatch):
    """By a CPU's operators and plain attention, by a GPU's and fused attention."""
    if of_gpu:
        monkeypatch.setattr(cpu_ops, "faster", lambda: False)
    judged(official.forward(kind, fused_attention=of_gpu))


@pytest.mark.parametrize("kind", NETWORKS)
def test_guidance_is_the_official_one(kind):
    judged(official.guidance(kind))


@pytest.mark.parametrize("kind", OFFICIAL)
def test_guidance_of_all_latent_channels(kind):
    model = official_network(kind)
    x, t, y = golden_inputs(load_golden(OFFICIAL[kind][1]), "cfg_")
    half = len(y) // 2
    cond, uncond = model(paddle.concat([x[:half], x[:half]]), t, y).split(2)
    out = model.forward_with_cfg(x, t, y, 2.5, cfg_channels=None)
    for part, own in zip(out.split(2), (cond, uncond), strict=True):
        assert relative_error(part[:, :4], uncond[:, :4] + 2.5 * (cond[:, :4] - uncond[:, :4])) < 1e-6
        np.testing.assert_array_equal(part[:, 4:], own[:, 4:])


def test_guidance_without_a_null_class_is_refused():
    model = build_model({**TINY, "class_dropout_prob": 0.0})
    with pytest.raises(ValueError, match="no null class .class_dropout_prob 0.: it can't be guided"):
        model.forward_with_cfg(paddle.randn([2, 4, 8, 8]), paddle.to_tensor([1, 1]), paddle.to_tensor([1, 2]), 4.0)


def test_embeddings_are_the_official_ones():
    judged(official.embeddings())


def test_label_dropout_is_the_official_one(monkeypatch):
    arrays = load_golden("embeddings")
    replay(monkeypatch, "rand", [arrays["drop_rand"]])
    embedder = golden_model().y_embedder
    np.testing.assert_array_equal(embedder(paddle.to_tensor(arrays["labels"]), True), arrays["y_emb_train"])


def test_no_null_class_without_dropout():
    embedder = LabelEmbedder(10, 8, 0.0)
    assert embedder.embedding_table.weight.shape == [10, 8]
    labels = paddle.arange(10)
    np.testing.assert_array_equal(embedder(labels, True), embedder(labels, False))


def test_initialisation_tensor_by_tensor():
    paddle.seed(0)
    model = DiT(16, 4, 3, 2, 4, 32, mlp_ratio=2.0, num_classes=500)
    width, hidden, patch = 128, 256, 3 * 4 * 4
    xavier = {
        "x_embedder.proj.weight": (patch, width),
        "attn.qkv.weight": (width, 3 * width),
        "attn.proj.weight": (width, width),
        "mlp.fc1.weight": (width, hidden),
        "mlp.fc2.weight": (hidden, width),
    }
    assert check_initialisation(model, xavier) == 10 + 2 * 10 + 2
    x = paddle.randn([2, 3, 16, 16])
    assert not model(x, paddle.to_tensor([1, 2]), paddle.to_tensor([0, 500])).any()


@pytest.mark.parametrize(
    ("settings", "out_channels"),
    [
        ({"learn_sigma": False}, 4),
        ({"sample_size": 8, "patch_size": 8, "in_channels": 3}, 6),
        ({"class_dropout_prob": 0.0, "num_classes": 3, "mlp_ratio": 1.5}, 8),
        ({"sample_size": 6, "patch_size": 1}, 8),
    ],
)
def test_other_sizes(settings, out_channels):
    config = {**TINY, **settings}
    model = build_model(config)
    size, channels = config["sample_size"], config["in_channels"]
    last = config["num_classes"] - (config.get("class_dropout_prob") == 0.0)
    labels = paddle.to_tensor([0, last])
    out = model(paddle.randn([2, channels, size, size]), paddle.to_tensor([3, 999]), labels)
    assert out.shape == [2, out_channels, size, size]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_fused_attention_is_asked_for_by_the_config(fused, monkeypatch):
    from paddle.nn import functional as F

    shapes = []
    original = F.scaled_dot_product_attention

    def counting(q, k, v):
        shapes.append(q.shape)
        return original(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    golden_model(fused_attention=fused)(*golden_inputs(load_golden("dit_forward")))
    assert shapes == ([[5, 16, 4, 16]] * 3 if fused else [])


def test_pos_embed_stays_float32_when_amp_o2_casts_the_weights():
    from paddle.amp.auto_cast import amp_initialize

    model = golden_model()
    before = model.pos_embed.numpy().copy()
    amp_initialize([model], "bfloat16", None)  # what amp.decorate does on a GPU; on a CPU it stops before
    assert model.blocks[0].attn.qkv.weight.dtype == paddle.bfloat16
    assert model.pos_embed.dtype == paddle.float32
    np.testing.assert_array_equal(model.pos_embed, before)


@pytest.mark.parametrize("change", [{"enable_recompute": True}, {"fused_attention": True}], ids=["recompute", "fused"])
def test_same_gradients(change):
    arrays = load_golden("dit_forward")
    drop = paddle.to_tensor([0, 1, 0, 0, 1])
    gradients, outputs = [], []
    for overrides in ({}, change):
        model = golden_model(**overrides)
        model.train()
        out = model(*golden_inputs(arrays), drop)
        out.square().mean().backward()
        outputs.append(out.numpy())
        gradients.append({name: p.grad.numpy() for name, p in model.named_parameters() if not p.stop_gradient})
    assert relative_error(outputs[1], outputs[0]) < either(1e-6, 1e-5)
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < either(1e-5, 1e-4), name


def test_recompute_draws_the_same_random_numbers():
    arrays = load_golden("dit_forward")
    after = []
    for recompute in (False, True):
        model = golden_model(enable_recompute=recompute)
        model.train()
        paddle.seed(7)
        model(*golden_inputs(arrays)).mean().backward()
        after.append((paddle.rand([4]).numpy(), model.y_embedder.embedding_table.weight.grad.numpy()))
    np.testing.assert_array_equal(after[0][0], after[1][0])
    np.testing.assert_allclose(after[0][1], after[1][1], atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "DyT"}, "unknown model type 'DyT'; known: DiT, SiT"),
        ({"sample_size": 9}, "sample_size 9 is not divisible by patch_size 2"),
        ({"depth": 3}, "unexpected keyword argument 'depth'"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        build_model({**TINY, **change})


def test_settings_build_the_same_network_again(kind):
    model = build_model(TINY_MODELS[kind], fused_attention=True, single_backward=True)
    again = type(model)(**model.settings)
    again.set_state_dict(model.state_dict())
    assert again.settings == model.settings
    assert all(model.settings[key] == value for key, value in TINY_MODELS[kind].items() if key != "type")
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


# -- SiT --------------------------------------------------------------------------------------------------------------


def test_without_variance_channels_nothing_is_dropped():
    paddle.seed(0)
    sit, dit = build_model({**TINY, "type": "SiT"}, learn_sigma=False), build_model(TINY, learn_sigma=False)
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
    model = official_network("SiT")
    x, t, y = golden_inputs(arrays)
    dropped = model(x, t, y, paddle.ones_like(y))
    np.testing.assert_array_equal(dropped, model(x, t, paddle.full_like(y, 10)))
