"""Large-DiT: parity with the official network, attention against numpy, its initialisation, configs, weights."""

import json
import math

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F
from support.device import either
from support.golden import GOLDEN, OFFICIAL, golden_inputs, judged, load_golden, official_network, relative_error
from support.initialisation import check_initialisation
from support.runs import ROOT

from config.schema import load_config, resolve_config
from models import LargeDiT, LargeSiT, build_model
from models.embeddings import rotary_table
from models.large_dit import FeedForward, GroupedQueryAttention
from models.norms import RMSNorm
from models.ops import Operators
from models.state import expected_shapes, paddle_to_official
from runtime.paddle_private import swiglu
from tools import convert_official_weights
from verification import official
from weights.files import load_weights

pytestmark = pytest.mark.paddle26

_, _, TINY, TOLERANCE = OFFICIAL["LargeDiT"]
# The official sizes: layers, width, whether the published weights (600M: the reference's network) have qk_norm.
SIZES = {
    "600M_patch2": (16, 1536, True),
    "3B_patch2": (32, 3072, False),
    "3B_patch2_512": (32, 3072, False),
    "7B_patch2": (32, 4096, True),
}


def random_model(**settings):
    """Every weight random: adaLN-Zero's zeros hide errors."""
    paddle.seed(0)
    model = build_model({**TINY, **settings})
    for parameter in model.parameters():
        parameter.set_value(parameter + paddle.randn(parameter.shape) * 0.1)
    model.eval()
    return model


# -- The official network ---------------------------------------------------------------------------------------------


def test_parts_are_the_official_ones():
    judged(official.large_dit_parts())


# -- Attention and feed-forward, against numpy ------------------------------------------------------------------------


def numpy_attention(layer, x, theta=10000.0):
    """The official attention in float64, head by head, RoPE by complex numbers."""
    weights = {name: value.numpy().astype("float64") for name, value in layer.named_parameters()}
    q, k, v = (x @ weights[f"{name}.weight"] for name in ("wq", "wk", "wv"))  # (N, T, heads * head_dim)
    for name, z in (("q_norm", q), ("k_norm", k)):
        if f"{name}.weight" in weights:
            z -= z.mean(-1, keepdims=True)
            z /= np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)
            z[:] = z * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    dim = layer.head_dim
    turns = np.exp(1j * np.outer(np.arange(x.shape[1]), theta ** (-np.arange(0, dim, 2) / dim)))  # (T, head_dim / 2)

    def head(z, index):
        return z[..., index * dim : (index + 1) * dim]

    def turned(z):
        pairs = (z[..., ::2] + 1j * z[..., 1::2]) * turns
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(z.shape)

    shared = q.shape[-1] // k.shape[-1]
    outs = []
    for index in range(q.shape[-1] // dim):
        scores = turned(head(q, index)) @ turned(head(k, index // shared)).transpose(0, 2, 1) / math.sqrt(dim)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        outs.append(scores / scores.sum(-1, keepdims=True) @ head(v, index // shared))
    return np.concatenate(outs, axis=-1) @ weights["wo.weight"]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 10), (5, 1, 6), (3, 3, 14)])
def test_attention_is_numpys(heads, kv_heads, head_dim, qk_norm, fused):
    paddle.seed(1)
    layer = GroupedQueryAttention(heads, kv_heads, head_dim, qk_norm=qk_norm, fused=fused)
    for parameter in layer.parameters():
        parameter.set_value(parameter + paddle.randn(parameter.shape) * 0.2)
    x = paddle.randn([2, 9, heads * head_dim])
    rope = [paddle.to_tensor(z).unsqueeze(1) for z in rotary_table(head_dim, 9)]
    assert relative_error(layer(x, *rope), numpy_attention(layer, x.numpy().astype("float64"))) < 1e-5


def test_qk_norm_and_grouped_heads_come_from_the_config():
    model = random_model(num_kv_heads=2, qk_norm=True)
    shapes = {name: parameter.shape for name, parameter in model.layers[1].attention.named_parameters()}
    assert shapes == {
        "wq.weight": [64, 64], "wk.weight": [64, 32], "wv.weight": [64, 32], "wo.weight": [64, 64],
        "q_norm.weight": [64], "q_norm.bias": [64], "k_norm.weight": [32], "k_norm.bias": [32],
    }  # fmt: skip


def test_rotation_stays_float32():
    from paddle.amp.auto_cast import amp_initialize

    model = official_network("LargeDiT")
    before = [part.numpy().copy() for part in model.rotary]
    amp_initialize([model], "bfloat16", None)  # what amp.decorate does on a GPU; on a CPU it stops before
    assert model.layers[0].attention.wq.weight.dtype == paddle.bfloat16
    model.to(dtype="float16")
    for part, expected in zip(model.rotary, before, strict=True):
        assert part.dtype == paddle.float32
        np.testing.assert_array_equal(part, expected)
    # The rotation itself: only its result is rounded.
    rotate = Operators().rotate
    cos, sin = (paddle.to_tensor(z).unsqueeze(1) for z in rotary_table(8, 1001))
    x = paddle.randn([1, 1001, 1, 8]).astype("bfloat16")
    out = rotate(x, cos, sin)
    assert out.dtype == paddle.bfloat16
    np.testing.assert_array_equal(
        out.astype("float32"), rotate(x.astype("float32"), cos, sin).astype("bfloat16").astype("float32")
    )


@pytest.mark.parametrize(
    ("width", "multiple_of", "multiplier", "inner"),
    [(64, 256, None, 256), (3072, 256, None, 8192), (4096, 256, None, 11008), (30, 7, 1.3, 105), (96, 32, 1, 256)],
)
def test_inner_width_of_the_feed_forward(width, multiple_of, multiplier, inner):
    with paddle.LazyGuard():
        layer = FeedForward(width, multiple_of, multiplier)
    assert [layer.w1.weight.shape, layer.w2.weight.shape, layer.w3.weight.shape] == [
        [width, inner],
        [inner, width],
        [width, inner],
    ]


@pytest.mark.skipif(not hasattr(F, "swiglu"), reason="this version of Paddle has no fused swiglu")
def test_swiglu_is_the_same_without_paddles_kernel(monkeypatch):
    gate, x = paddle.randn([3, 5]), paddle.randn([3, 5])
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.delattr(F, "swiglu")
        arguments = [paddle.to_tensor(z.numpy(), stop_gradient=False) for z in (gate, x)]
        out = swiglu(*arguments)
        out.square().sum().backward()
        results.append([out.numpy(), *(z.grad.numpy() for z in arguments)])
    for fused, plain in zip(*results, strict=True):
        assert relative_error(fused, plain) < 1e-6


def test_rms_norm_keeps_the_type_of_its_input():
    norm = RMSNorm(4, 1e-5)
    x = paddle.to_tensor([[3e4, -3e4, 1e4, 0.0]], dtype="float16")  # its squares overflow float16
    expected = x.astype("float32") / math.sqrt(np.square([3e4, -3e4, 1e4, 0.0]).mean())
    assert norm(x).dtype == paddle.float16
    np.testing.assert_allclose(norm(x).astype("float32"), expected, rtol=1e-3)


# -- Initialisation, gradients ----------------------------------------------------------------------------------------


def test_initialisation_tensor_by_tensor():
    paddle.seed(0)
    model = LargeDiT(16, 4, 3, 2, 4, 32, num_classes=500, num_kv_heads=2, qk_norm=True, multiple_of=64)
    width, kv_width, inner, patch = 128, 64, 384, 3 * 4 * 4
    xavier = {
        "x_embedder.weight": (patch, width),
        "attention.wq.weight": (width, width),
        "attention.wk.weight": (width, kv_width),
        "attention.wv.weight": (width, kv_width),
        "attention.wo.weight": (width, width),
        "feed_forward.w1.weight": (width, inner),
        "feed_forward.w2.weight": (inner, width),
        "feed_forward.w3.weight": (width, inner),
    }
    assert check_initialisation(model, xavier) == 7 + 2 * 15 + 4
    x = paddle.randn([2, 3, 16, 16])
    assert not model(x, paddle.to_tensor([1, 2]), paddle.to_tensor([0, 500])).any()


@pytest.mark.parametrize("change", [{"enable_recompute": True}, {"fused_attention": True}], ids=["recompute", "fused"])
def test_same_gradients(change):
    arrays = load_golden("largedit_forward")
    drop = paddle.to_tensor([0, 1, 0, 0, 1])
    gradients, outputs = [], []
    for overrides in ({}, change):
        model = random_model(qk_norm=True, num_kv_heads=2, **overrides)
        model.train()
        out = model(*golden_inputs(arrays), drop)
        out.square().mean().backward()
        outputs.append(out.numpy())
        gradients.append({name: p.grad.numpy() for name, p in model.named_parameters()})
    assert relative_error(outputs[1], outputs[0]) < either(1e-6, 1e-5)
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert relative_error(gradients[1][name], gradient) < either(2e-5, 1e-4), name


# -- For a transport --------------------------------------------------------------------------------------------------


def test_large_sit_is_large_dit_without_the_variance():
    dit, sit = random_model(), random_model(type="LargeSiT")
    assert isinstance(sit, LargeSiT)
    arrays = load_golden("largedit_forward")
    x, _, y = golden_inputs(arrays)
    t = paddle.to_tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    out = sit(x, t, y)
    assert out.shape == [5, 4, 8, 8]
    np.testing.assert_array_equal(out, dit(x, t, y)[:, :4])
    np.testing.assert_array_equal(sit(x, t, y, paddle.ones_like(y)), sit(x, t, paddle.full_like(y, 10)))
    labels = paddle.to_tensor([1, 2, 10, 10])
    guided = sit.forward_with_cfg(x[:4], t[:4], labels, 4.0)
    np.testing.assert_array_equal(guided, dit.forward_with_cfg(x[:4], t[:4], labels, 4.0)[:, :4])
    variance_free = random_model(type="LargeSiT", learn_sigma=False)
    assert variance_free(x, t, y).shape == [5, 4, 8, 8]


# -- Sizes and configs ------------------------------------------------------------------------------------------------


def parameter_count(layers, width, *, qk_norm, classes=1000, patch=2, channels=4):
    """By hand, no grouped heads: what the official network has."""
    condition, inner = min(width, 1024), 256 * math.ceil(int(8 * width / 3) / 256)
    embedders = (patch**2 * channels + 1) * width + (256 + 1 + condition + 1 + classes + 1) * condition
    block = 4 * width**2 + 3 * width * inner + 2 * width + (condition + 1) * 6 * width + 4 * width * qk_norm
    final = (condition + 1) * 2 * width + (width + 1) * patch**2 * 2 * channels
    return embedders + layers * block + final


@pytest.mark.parametrize("name", SIZES)
def test_shipped_configs_have_the_official_sizes(name):
    config = load_config(ROOT / f"config/LargeDiT_{name}.json")
    model, (layers, width, qk_norm) = config["model"], SIZES[name]
    assert (model["type"], config["objective"]["type"]) == ("LargeDiT", "diffusion")
    assert model["num_attention_heads"] == 32 and model["num_attention_heads"] * model["attention_head_dim"] == width
    assert (model["num_layers"], model["patch_size"], model["qk_norm"]) == (layers, 2, qk_norm)
    assert model["sample_size"] == (64 if name.endswith("512") else 32)
    assert model["class_dropout_prob"] == 0.1  # a null class, without which there is no guidance
    shapes = expected_shapes(model)
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count == parameter_count(layers, width, qk_norm=qk_norm)
    billions = {1536: 0.61, 3072: 4.24, 4096: 7.29}[width]  # the one called 3B has 4.2
    assert count / 1e9 == pytest.approx(billions, rel=0.01)
    with paddle.LazyGuard():  # nothing is allocated: 7B float32 weights are 29 GB
        lazy = build_model(config)
    assert {name: tuple(parameter.shape) for name, parameter in lazy.named_parameters()} == shapes


@pytest.mark.parametrize("kind", ["LargeDiT", "LargeSiT"])
def test_flat_files_of_paddlemix_and_official_names(tmp_path, kind):
    shipped = load_config(ROOT / "config/LargeDiT_3B_patch2.json")
    path = tmp_path / f"{kind}_3B_patch2.json"
    sizes = {"sample_size": 32, "patch_size": 2, "in_channels": 4, "num_layers": 32}
    flat = {**sizes, "num_attention_heads": 32, "attention_head_dim": 96, "qk_norm": False}
    official = {"input_size": 32, "patch_size": 2, "dim": 3072, "n_layers": 32, "n_heads": 32, "n_kv_heads": None}
    for content in (flat, official):
        path.write_text(json.dumps(content))
        config = load_config(path)
        assert config["model"] == {**shipped["model"], "type": kind}
        assert config["objective"]["type"] == {"LargeDiT": "diffusion", "LargeSiT": "transport"}[kind]
        assert resolve_config(config) == config
    path.write_text(json.dumps({**sizes, "num_attention_heads": 32, "attention_head_dim": 128}))  # PaddleMIX's 7B
    shipped = load_config(ROOT / "config/LargeDiT_7B_patch2.json")
    assert load_config(path)["model"] == {**shipped["model"], "type": kind}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "model: num_kv_heads must divide num_attention_heads 4, got 3"),
        ({"num_kv_heads": 0}, "model: num_kv_heads must be a positive integer, or null, got 0"),
        ({"attention_head_dim": 15}, "model: attention_head_dim must be even for rotary positions, got 15"),
        ({"patch_size": 3}, "model: patch_size must divide sample_size 8, got 3"),
        ({"mlp_ratio": 4.0}, "model: unknown key 'mlp_ratio'; known: .*ffn_dim_multiplier"),
        ({"qk_norm": 1}, "model: qk_norm must be true or false, got 1"),
        ({"multiple_of": 2.5}, "model: multiple_of must be a positive integer, got 2.5"),
        ({"ffn_dim_multiplier": 0}, "model: ffn_dim_multiplier must be a number above 0, or null, got 0"),
        ({"norm_eps": 0}, "model: norm_eps must be a number above 0, got 0"),
        ({"dim": 64}, "model: dim and attention_head_dim say the same; give one"),
        ({"n_heads": 4}, "model: n_heads and num_attention_heads are the same; give one"),
        ({"type": "DiT", "num_kv_heads": 2}, "model: unknown key 'num_kv_heads'"),
    ],
)
def test_mistakes_in_the_config(change, message):
    with pytest.raises(ValueError, match=message):
        resolve_config({"model": {**TINY, **change}})


def test_depth_and_n_layers_are_the_same():
    sizes = {name: value for name, value in TINY.items() if name != "num_layers"}
    with pytest.raises(ValueError, match="model: depth and n_layers are the same; give one"):
        resolve_config({"model": {**sizes, "depth": 2, "n_layers": 3}})


def test_head_width_of_two_is_enough():
    resolve_config({"model": {**TINY, "num_attention_heads": 3, "attention_head_dim": 2}})
    model = random_model(num_attention_heads=3, attention_head_dim=2, sample_size=6, in_channels=3)
    out = model(paddle.randn([2, 3, 6, 6]), paddle.to_tensor([3, 999]), paddle.to_tensor([0, 10]))
    assert out.shape == [2, 6, 6, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_attention_heads 4, got 3"),
        ({"attention_head_dim": 15}, "attention_head_dim must be even for rotary positions, got 15"),
        ({"sample_size": 9}, "sample_size 9 is not divisible by patch_size 2"),
        ({"mlp_ratio": 4.0}, "model type LargeDiT: .*unexpected keyword argument 'mlp_ratio'"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        build_model({**TINY, **change})


def test_wrong_inputs():
    model = build_model({**TINY, "class_dropout_prob": 0.0})
    t = y = paddle.to_tensor([1, 2])
    with pytest.raises(ValueError, match=r"expected latents \(N, 4, 8, 8\), got \(2, 4, 4, 16\)"):
        model(paddle.randn([2, 4, 4, 16]), t, y)
    with pytest.raises(ValueError, match="no null class .class_dropout_prob 0.: it can't be guided"):
        model.forward_with_cfg(paddle.randn([2, 4, 8, 8]), t, y, 4.0)


# -- Weight files -----------------------------------------------------------------------------------------------------


def test_official_weights_there_and_back(tmp_path):
    config, forth, back = tmp_path / "LargeDiT_tiny.json", tmp_path / "tiny.pdparams", tmp_path / "tiny.pt"
    config.write_text(json.dumps({"model": TINY}))
    source = GOLDEN / "largedit_tiny.pt"
    flags = ["--config_file", str(config)]
    convert_official_weights.main([*flags, "--weights", str(source), "--output", str(forth)])
    model = build_model(TINY)
    missing, unexpected = model.set_state_dict(paddle.load(str(forth)))
    assert not missing and not unexpected
    model.eval()
    arrays = load_golden("largedit_forward")
    assert relative_error(model(*golden_inputs(arrays)), arrays["out"]) < TOLERANCE
    convert_official_weights.main([*flags, "--weights", str(forth), "--output", str(back), "--reverse"])
    original, returned = load_weights(source), load_weights(back)
    assert list(original) == list(returned)
    for name, value in original.items():
        assert value.dtype == returned[name].dtype
        np.testing.assert_array_equal(returned[name], value)


def test_layouts_and_shapes_of_every_kind_of_weight():
    settings = {**TINY, "num_layers": 3, "num_kv_heads": 2, "qk_norm": True}
    state = {name: parameter.numpy() for name, parameter in build_model(settings).named_parameters()}
    assert expected_shapes(settings) == {name: value.shape for name, value in state.items()}
    official = paddle_to_official(state)
    for name, shape in {
        "x_embedder.weight": (64, 16),
        "y_embedder.embedding_table.weight": (11, 64),
        "layers.2.attention.wk.weight": (32, 64),
        "layers.2.attention.k_norm.weight": (32,),
        "layers.2.feed_forward.w2.weight": (64, 256),
        "layers.2.ffn_norm.weight": (64,),
        "final_layer.linear.weight": (32, 64),
    }.items():
        assert official[name].shape == shape, name
