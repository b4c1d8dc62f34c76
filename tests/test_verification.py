"""The checks of numbers behind tools/self_check.py: all is well on a CPU, and each kind of fault is found."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F

from models import base, dit, ops
from models.embeddings import TimestepEmbedder
from runtime.paddle_private import operators
from runtime.precision import Precision
from training.averages import EMA
from verification import attention, half_precision, official, parity, training_steps, vectors
from verification.emulation import emulated, round_mantissa
from verification.verdicts import OK, SKIPPED, WRONG, Settings, judge

GROUPS = {module.__name__.split(".")[1]: module for module in (parity, half_precision, attention, training_steps)}


@pytest.fixture
def settings(tmp_path):
    return Settings("cpu", False, str(tmp_path))


def verdicts(group, settings, *parts):
    """The verdicts of a group's checks whose names contain one of the parts."""
    chosen = (check for check in GROUPS[group].checks(settings) if not parts or any(p in check.name for p in parts))
    return [judge(group, check) for check in chosen]


@pytest.mark.parametrize(
    ("group", "parts"),
    [  # What the official code has computed is compared in the tests of its subjects; here some of it.
        ("parity", ("SiT", "ODE", "averages")),
        ("half_precision", ()),
        ("attention", ()),
        ("training_steps", ("10 steps",)),
    ],
)
def test_all_is_well_on_a_cpu(group, parts, settings):
    found = verdicts(group, dataclasses.replace(settings, quick=group == "parity"), *parts)
    assert len(found) >= 3
    for verdict in found:
        assert verdict.status == OK and verdict.text, verdict.line()
        if group == "half_precision" and not verdict.check.startswith("weights"):
            assert verdict.text.startswith("emulated on a CPU: ")


def test_a_folder_without_the_vectors_is_told(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(vectors, "GOLDEN", tmp_path)
    (verdict,) = verdicts("parity", settings, "SDE")
    assert verdict.status == SKIPPED
    assert verdict.text.startswith("tests/golden/sit_sde_euler_sigma.npz is missing: this check needs the whole repo")


# -- Faults -----------------------------------------------------------------------------------------------------------


def wrong_epsilon(patch):
    original = ops.Operators.adaptive_norm
    patch(ops.Operators, "adaptive_norm", lambda self, *args, epsilon: original(self, *args, epsilon=1e-5))


def dropped_scale(patch):
    original = ops.Operators.adaptive_norm
    patch(ops.Operators, "adaptive_norm", lambda self, x, shift, scale, **_: original(self, x, shift, 0 * scale))


def gelu_by_erf(patch):
    def linear(self, x, weight, bias, *, gelu=False):
        return F.linear(F.gelu(x) if gelu else x, weight, bias)

    patch(ops.Operators, "linear", linear)


def attention_scale(patch):
    original = attention.scaled_dot_product

    def scaled(q, k, v, softmax, *, fused):
        return original(q if fused else 1.01 * q, k, v, softmax, fused=fused)

    patch(attention, "scaled_dot_product", scaled)


def recompute_without_gradients(patch):
    patch(base, "recompute", lambda block, *inputs, **options: block(*(x.detach() for x in inputs)))


def recompute_of_other_numbers(patch):
    patch(base, "recompute", lambda block, x, *inputs, **options: block(x * (1 + 1e-5), *inputs))


def other_schedule(patch):
    original = official.create_diffusion
    patch(official, "create_diffusion", lambda respacing: original(respacing, "squaredcos_cap_v2"))


def cast_positions(patch):
    patch(dit, "keep_own_parameters_float32", lambda layer: None)


def rounded_times(patch):
    original = TimestepEmbedder.timestep_embedding

    def embedding(t, dim, max_period=10000):
        return original(round_mantissa(t.astype("float32"), 7), dim)

    patch(TimestepEmbedder, "timestep_embedding", staticmethod(embedding))


def other_averages(patch):
    patch(EMA, "current_decay", lambda self: 0.99)


def other_epsilon_of_adamw(patch):
    patch(training_steps, "TRAINING", {**training_steps.TRAINING, "adam_epsilon": 1e-7})


@pytest.mark.parametrize(
    ("fault", "group", "check", "told"),
    [
        (wrong_epsilon, "parity", "DiT, float32", "out_small 0.0"),
        (dropped_scale, "parity", "SiT, float32", "out "),
        (gelu_by_erf, "parity", "SiT, float32", "out "),
        (other_schedule, "parity", "DDIM, float32", "step0_pred_xstart "),
        (attention_scale, "attention", "fused, head_dim 72, float32", "output of 256 tokens 0.0"),
        (recompute_without_gradients, "attention", "recompute, SiT", "no gradient of blocks.0.adaLN_modulation"),
        (recompute_of_other_numbers, "attention", "recompute, LargeDiT", " in any use "),
        (cast_positions, "half_precision", "weights, bfloat16", "DiT: pos_embed is paddle.bfloat16, not float32"),
        (rounded_times, "half_precision", "DiT, bfloat16", "out 0.098, at most 0.031"),
        (other_averages, "training_steps", "10 steps of SiT", "loss of the averages 0."),
        (other_epsilon_of_adamw, "training_steps", "10 steps of DiT", "loss 9.7e-05, at most 2e-05"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_is_found(fault, group, check, told, settings, monkeypatch):
    fault(monkeypatch.setattr)
    verdict, *_ = verdicts(group, settings, check)
    assert verdict.status == WRONG and told in verdict.text, verdict.line()


# -- Bounds -----------------------------------------------------------------------------------------------------------


def test_rounding_leaves_as_many_bits_as_the_type_has():
    x = np.random.RandomState(0).standard_normal(4096).astype("float32") * 1e3
    mantissa, exponent = np.frexp(x.astype("float64"))
    for bits in (7, 10):
        expected = np.ldexp(np.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)
        np.testing.assert_array_equal(round_mantissa(paddle.to_tensor(x), bits), expected)
    np.testing.assert_array_equal(expected, x.astype("float16"))


def test_bounds_of_tf32_are_what_rounding_to_it_gives():
    """The figures that they are made of are the emulation's, to a tenth."""
    with emulated("tf32"):
        for name in (*vectors.NETWORKS, "transport gradients", "LightningDiT gradients", "DDPM"):
            error = max(pair.error() for pair in parity.CASES[name](True).values())
            assert error == pytest.approx(parity.TF32[name], rel=0.1), name
        for kind in vectors.OFFICIAL:
            for what, (error, bound) in training_steps.stored_errors(kind, "TF32").items():
                assert error < 1.1 * bound / parity.ROOM, (kind, what)
        inputs = attention.attention_inputs(256, 72, "float32", wide=True)
        rounded = attention.attend(inputs, fused=False)
    errors = [
        vectors.relative_error(rounded[what], value) for what, value in attention.attend(inputs, fused=False).items()
    ]
    assert 0.5 < max(errors) / attention.EMULATED["TF32"] < 1


# -- What a GPU is asked, with float32 behind it ----------------------------------------------------------------------


@pytest.fixture
def as_if_gpu(settings, monkeypatch):
    """Settings that say GPU; its compute capability is `.capability`. AMP does nothing here, so all is float32."""
    fake = SimpleNamespace(device="cpu", on_gpu=True, quick=False, folder=settings.folder, capability=(8, 0))
    inputs = attention.attention_inputs
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda *_: fake.capability)
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(Precision, "stepped", lambda self, scaler: True)  # a scaler that is off can't tell
    monkeypatch.setattr(attention, "HEAD_DIMS", (72,))
    monkeypatch.setattr(attention, "TOKENS", (256,))
    monkeypatch.setattr(attention, "attention_inputs", lambda t, d, dtype, wide: inputs(t, d, "float32", wide=wide))
    return fake


@pytest.mark.parametrize(
    ("group", "parts", "last"),
    [
        ("parity", ["DiT, TF32", "transport gradients, TF32"], "transport gradients, TF32"),
        ("half_precision", ["SiT, ", "diffusion gradients"], "10 steps of SiT, float16 O2"),
        ("attention", ["fused", "recompute, LargeSiT"], "recompute, LargeSiT, float16"),
        ("training_steps", ["TF32"], "10 steps of LightningDiT, TF32"),
    ],
)
def test_a_gpu_is_asked_more(group, parts, last, as_if_gpu):
    found = verdicts(group, as_if_gpu, *parts)
    assert [verdict.line() for verdict in found if verdict.status != OK] == []
    assert found[-1].check == last and not any("emulated" in verdict.text for verdict in found)


def test_a_gpu_without_bfloat16_or_float16_is_not_asked(as_if_gpu):
    as_if_gpu.capability = (7, 5)
    bfloat16, _, float16, _ = verdicts("half_precision", as_if_gpu, "transport gradients")
    assert bfloat16.status == SKIPPED and float16.status == OK
    assert bfloat16.text.startswith(
        "amp_dtype bfloat16 needs a GPU of compute capability 8.0 or newer, this one has 7.5"
    )
    as_if_gpu.capability = (6, 1)
    (_, _, verdict) = verdicts("attention", as_if_gpu, "fused, head_dim 72")
    assert verdict.status == SKIPPED and "float16 needs a GPU of compute capability 7.0" in verdict.text


def test_the_kernel_is_named(settings, monkeypatch):
    fused, module = F.scaled_dot_product_attention, operators()
    monkeypatch.setattr(module, "flash_attn", fused)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: module.flash_attn(*qkv))
    verdict, *_ = verdicts("attention", settings, "fused, head_dim 72")
    assert verdict.status == OK and verdict.text.startswith("FlashAttention-2: ")
