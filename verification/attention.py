"""Are fused attention and recompute what they should be: another way to the same numbers?"""

import contextlib
from functools import partial

import numpy as np
import paddle
from paddle.nn import functional as F

from config.schema import resolve_config
from models import build_model
from models.attention import scaled_dot_product
from objectives import build_objective
from runtime.paddle_private import full_float32, operators
from runtime.patching import replaced
from runtime.precision import Precision
from verification import official
from verification.half_precision import precision_on_gpu
from verification.parity import ROOM, TF32
from verification.training_steps import given
from verification.vectors import OFFICIAL, as_array, fill, judged, relative_error
from verification.verdicts import Check, Wrong, within

HEAD_DIMS = (64, 72, 96, 128)  # 72 is DiT-XL's
TOKENS = (256, 1024)  # of images of 256 and 512 pixels in 2 x 2 patches
# The largest relative error of output and gradients with products, and of the half precisions all else, rounded to so
# many bits, measured on a CPU by the plain formula (`emulation.emulated`); `ROOM` times as much is allowed. Of float32,
# 22 bits would give 6e-7; kernels also use faster exponentials.
EMULATED = {"float32": 2.5e-6, "TF32": 1.4e-3, "float16": 2.5e-3, "bfloat16": 1.9e-2}
# Paddle's fused operators; without them `F.scaled_dot_product_attention` computes the plain formula.
KERNELS = {
    "flash_attn": "FlashAttention-2",
    "flash_attn_v3": "FlashAttention-3",
    "memory_efficient_attention": "the memory-efficient kernel",
}
RECOMPUTED = {**OFFICIAL, "LargeSiT": ("largedit_tiny.pt", None, {**OFFICIAL["LargeDiT"][2], "type": "LargeSiT"}, None)}


def checks(settings):
    """Yields the checks of this group."""
    for dtype in ("float32", "bfloat16", "float16") if settings.on_gpu else ("float32",):
        for head_dim in HEAD_DIMS[1:2] if settings.quick else HEAD_DIMS:
            name = f"fused, head_dim {head_dim}, {dtype}"
            yield Check(name, partial(compare_kernels, settings, head_dim, dtype))
    for kind in OFFICIAL:
        yield Check(f"fused, {kind}, float32", partial(compare_network, settings, kind))
    for dtype in ("float32", "bfloat16", "float16") if settings.on_gpu else ("float32",):
        for kind in RECOMPUTED:
            yield Check(f"recompute, {kind}, {dtype}", partial(compare_recompute, settings, kind, dtype))


def compare_kernels(settings, head_dim, dtype):
    """Fused attention in a dtype beside the plain formula in float32 of the same numbers, forward and backward."""
    if settings.on_gpu and dtype != "float32":
        precision_on_gpu(dtype, "O1")  # or Skip
    errors, kernels = {}, set()
    for tokens in TOKENS[:1] if settings.quick else TOKENS:
        inputs = attention_inputs(tokens, head_dim, dtype, wide=settings.on_gpu)
        with full_float32():
            expected = attend([x.astype("float32") for x in inputs], fused=False)
            with noted_kernels() as noted:
                actual = attend(inputs, fused=True)
        kernel = noted[0] if noted else None
        kernels.add(KERNELS.get(kernel, "the plain formula"))
        # The memory-efficient kernel chooses its own products, whatever Paddle's switches for TF32 say.
        kind = "TF32" if dtype == "float32" and kernel else dtype
        for what in expected:
            error = relative_error(actual[what], expected[what])
            errors[f"{what} of {tokens} tokens"] = error, ROOM * EMULATED[kind]
    text, figures = within(errors)
    return f"{' and '.join(sorted(kernels))}: {text}", figures


def attention_inputs(tokens, head_dim, dtype, *, wide):
    """Returns q, k, v and the gradient of the output `(N, T, heads, head_dim)`; `wide`: of more samples and heads.

    The queries are large, so that each attends to few keys: a wrong scale changes everything.
    """
    random = np.random.RandomState(tokens + head_dim)
    shape = [2, tokens, 4, head_dim] if wide else [1, tokens, 2, head_dim]
    arrays = [random.standard_normal(shape).astype("float32") for _ in range(4)]
    arrays[0] *= 3
    return [paddle.to_tensor(array).astype(dtype) for array in arrays]


def attend(inputs, *, fused):
    """Returns output and gradients of attention by name."""
    *qkv, gradient = inputs
    qkv = [x.detach() for x in qkv]
    for x in qkv:
        x.stop_gradient = False
    out = scaled_dot_product(*qkv, F.softmax, fused=fused)
    gradients = paddle.grad([out], qkv, [gradient])
    return {"output": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


@contextlib.contextmanager
def noted_kernels():
    """Yields a list, to which the names of `KERNELS` that run in the block are added."""
    module, noted = operators(), []

    def noting(name):
        original = getattr(module, name)

        def call(*args, **options):
            noted.append(name)
            return original(*args, **options)

        return call

    with replaced(module, **{name: noting(name) for name in KERNELS if hasattr(module, name)}):
        yield noted


def compare_network(settings, kind):
    """A network with fused attention beside the official one, in float32."""
    with full_float32(), noted_kernels() as noted:
        pairs = official.forward(kind, fused_attention=True)
    bound = ROOM * TF32[kind] if settings.on_gpu and noted else None
    text, figures = judged(pairs, bound)
    return f"{KERNELS[noted[0]] if noted else 'the plain formula'}: {text}", figures


def compare_recompute(settings, kind, dtype):
    """Loss and gradients with and without recompute, with Paddle's operators and with those of a training run."""
    precision = precision_on_gpu(dtype, "O2") if settings.on_gpu and dtype != "float32" else Precision()
    # The same operators on the same numbers; but a GPU adds the gradients of embeddings in any order, and on a CPU a
    # training run has GELU once in another form. In half precision one bit of a sum is 2^-8.
    bound = {"float32": 1e-5 if settings.on_gpu else 2e-6, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    errors, equal = {}, []
    for promised, what in ((False, "any use"), (True, "a training run")):
        with full_float32():
            kept, again = (gradients(kind, precision, promised, recompute) for recompute in (False, True))
        if missing := kept.keys() - again.keys():
            raise Wrong(f"no {min(missing)} in {what} with recompute")
        errors |= {f"{name} in {what}": (relative_error(again[name], kept[name]), bound) for name in kept}
        if all((again[name] == kept[name]).all() for name in kept):
            equal.append(what)
    text, figures = within(errors)
    return f"{text}; bit for bit in {' and '.join(equal) or 'neither'}", figures


def gradients(kind, precision, promised, recompute):
    """Returns the losses of a network, and the gradients of their mean by parameter name, as arrays."""
    weights, _, config, _ = RECOMPUTED[kind]
    model = build_model(config, enable_recompute=recompute, single_backward=promised)
    fill(model, weights)
    model.train()
    precision.decorate(model)
    batch, drawn = given(kind)
    objective = build_objective(resolve_config({"model": config}, source="self check"))
    with precision.autocast():
        losses = objective.training_losses(model, batch, drawn=drawn)["loss"]
    scale = official.backward(losses.mean(), precision)
    found = {name: as_array(p.grad) / scale for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": as_array(losses), **{f"gradient of {name}": value for name, value in found.items()}}
