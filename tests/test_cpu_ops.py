"""The operators that a CPU gets against the formulas that a GPU gets: values, gradients, a training run."""

import time

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F
from support.runs import TINY_MODELS
from support.versions import PADDLE_2

from config.schema import resolve_config
from models import build_model, cpu_ops, ops
from models.dit import Mlp
from models.embeddings import rotary_table
from models.ops import Operators, modulate
from models.parallel import linear
from objectives import Batch, build_objective
from training.optimizer import build_lr_scheduler, build_optimizer

pytestmark = pytest.mark.paddle26


def leaf(*shape):
    tensor = paddle.randn(shape)
    tensor.stop_gradient = False
    return tensor


def outputs(function, inputs):
    """The value, and the gradients of the inputs for a fixed gradient of the value."""
    out = function(*inputs)
    weights = paddle.to_tensor(np.random.RandomState(1).randn(*out.shape).astype("float32"))
    gradients = paddle.grad([out], [x for x in inputs if not x.stop_gradient], [weights])
    return [out.numpy(), *(gradient.numpy() for gradient in gradients)]


def assert_same(ours, others):
    assert len(ours) == len(others)
    for a, b in zip(ours, others, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()), rtol=0)


SHAPES = [(3, 5, 8), (1, 7, 12), (4, 1, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_adaptive_layer_norm(shape):
    batch, _, width = shape
    x, shift, scale = leaf(*shape), leaf(batch, 1, width), leaf(batch, 1, width)
    assert_same(
        outputs(lambda *a: cpu_ops.adaptive_norm(a[0], a[1], 1 + a[2], epsilon=1e-6, center=True), (x, shift, scale)),
        outputs(lambda *a: modulate(F.layer_norm(a[0], width, epsilon=1e-6), a[1], a[2]), (x, shift, scale)),
    )


def test_a_layer_norm_far_from_zero_keeps_its_digits():
    """A variance by the mean of the squares would lose them."""
    x, none = paddle.randn([2, 5, 64]) + 1000.0, paddle.zeros([2, 1, 64])
    ours = cpu_ops.adaptive_norm(x, none, none + 1, epsilon=1e-6, center=True)
    np.testing.assert_allclose(ours, F.layer_norm(x.astype("float64"), 64, epsilon=1e-6), atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_adaptive_rms_norm(shape):
    batch, _, width = shape
    x, shift, factor = leaf(*shape), leaf(batch, 1, width), leaf(batch, 1, width)
    assert_same(
        outputs(lambda *a: cpu_ops.adaptive_norm(*a, epsilon=1e-5, center=False), (x, shift, factor)),
        outputs(
            lambda x, shift, factor: x * paddle.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * factor + shift,
            (x, shift, factor),
        ),
    )


@pytest.fixture
def both_forms(monkeypatch):
    """`same(name, inputs, ...)` calls an operator of `Operators` in its two forms."""
    monkeypatch.setattr(cpu_ops, "faster", lambda: True)
    fast, plain = Operators(single_backward=True), Operators()

    def same(name, *inputs, **options):
        assert fast.fast(*inputs) and not plain.fast(*inputs)
        leaves = [x for x in inputs if x is not None]

        def call(operators):
            def function(*leaves):
                given = iter(leaves)
                return getattr(operators, name)(*(x if x is None else next(given) for x in inputs), **options)

            return function

        assert_same(outputs(call(fast), leaves), outputs(call(plain), leaves))

    return same


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_without_a_shift(shape, both_forms):
    batch, _, width = shape
    x, weight, scale = leaf(*shape), leaf(width), leaf(batch, 1, width)
    both_forms("adaptive_norm", x, None, scale)
    both_forms("adaptive_rms_norm", x, weight, None, scale, epsilon=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 4, 1, 12), (6, 16)])
def test_norms_within_heads(shape, both_forms):
    x, weight, bias = 9 * leaf(*shape), leaf(shape[-1]), leaf(shape[-1])
    both_forms("rms_norm", x, weight, epsilon=1e-6)
    both_forms("layer_norm", x, weight, bias, epsilon=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_add(shape):
    inputs = leaf(*shape), leaf(shape[0], 1, shape[2]), leaf(*shape)
    assert_same(outputs(cpu_ops.gated_add, inputs), outputs(lambda x, gate, h: x + gate * h, inputs))


@pytest.mark.parametrize("shape", [(3, 2, 5, 5), (1, 1, 1, 64), (2, 7)])
def test_softmax(shape):
    x = leaf(*shape)
    assert_same(outputs(lambda x: cpu_ops.softmax(9 * x), (x,)), outputs(lambda x: F.softmax(9 * x), (x,)))


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 7)])
def test_swiglu(shape):
    inputs = leaf(*shape), leaf(*shape)
    assert_same(
        outputs(lambda gate, x: cpu_ops.swiglu(9 * gate, x), inputs),
        outputs(lambda gate, x: F.silu(9 * gate) * x, inputs),
    )


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_add_table(wants_gradient):
    table, x = leaf(1, 5, 8), leaf(3, 5, 8)
    table.stop_gradient = not wants_gradient
    assert_same(outputs(Operators(single_backward=True).add_table, (x, table)), outputs(paddle.add, (x, table)))


@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
@pytest.mark.parametrize("shape", [(3, 5, 8), (6, 8), (2, 3, 4, 8)])
def test_linear(shape, gelu):
    inputs = leaf(*shape), leaf(8, 12), leaf(12)
    assert_same(
        outputs(lambda *a: cpu_ops.linear(*a, gelu=gelu), inputs),
        outputs(lambda x, w, b: F.linear(F.gelu(x, approximate=True) if gelu else x, w, b), inputs),
    )


@pytest.mark.parametrize("shape", [(2, 9, 3, 8), (1, 4, 1, 2)])
def test_rotate(shape):
    tables = [paddle.to_tensor(part).unsqueeze(1) for part in rotary_table(shape[-1], shape[1])]
    x = leaf(*shape)
    assert_same(outputs(cpu_ops.rotate, (x, *tables)), outputs(Operators().rotate, (x, *tables)))


def test_what_wants_no_gradient_gets_none():
    for frozen in range(3):
        for function, inputs in (
            (cpu_ops.gated_add, [leaf(2, 3, 4), leaf(2, 1, 4), leaf(2, 3, 4)]),
            (lambda gate, x, h: cpu_ops.swiglu(gate, x) + h, [leaf(2, 4), leaf(2, 4), leaf(2, 4)]),
            (lambda *a: cpu_ops.linear(*a), [leaf(2, 4), leaf(4, 5), leaf(5)]),
            (lambda *a: cpu_ops.linear(*a, gelu=True), [leaf(2, 4), leaf(4, 5), leaf(5)]),
            (
                lambda *a: cpu_ops.adaptive_norm(*a, epsilon=1e-6, center=True),
                [leaf(2, 3, 4), leaf(2, 1, 4), leaf(2, 1, 4)],
            ),
        ):
            inputs[frozen].stop_gradient = True
            function(*inputs).sum().backward()
            assert [x.grad is None for x in inputs] == [i == frozen for i in range(3)]


def test_where_they_are_used(monkeypatch):
    monkeypatch.setattr(cpu_ops, "faster", lambda: True)
    x, layer = leaf(2, 3, 4), linear(4, 5)
    assert not layer.ops.fast(x) and "PyLayer" not in layer(x).grad_fn.name()
    with paddle.no_grad():
        assert layer.ops.fast(x)
    ops.use(layer, Operators(single_backward=True))
    assert layer.ops.fast(x) and not layer.ops.fast(x, x.astype("float64"))
    assert "PyLayer" in layer(x).grad_fn.name()
    monkeypatch.setattr(cpu_ops, "faster", lambda: False)  # measured on this machine
    assert not layer.ops.fast(x) and "PyLayer" not in layer(x).grad_fn.name()


def test_the_faster_form_is_measured(monkeypatch):
    def slowly(row, tokens):
        time.sleep(0.01)
        return row.expand([row.shape[0], tokens, row.shape[2]]).clone()

    monkeypatch.setattr(cpu_ops, "_to_tokens", slowly)
    assert cpu_ops.faster.__wrapped__() is False


def trainable(kind, **keywords):
    """A network whose every weight matters, in training mode; a function of it to differentiate; its parameters."""
    paddle.seed(0)
    model = build_model(TINY_MODELS[kind], **keywords)
    with paddle.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * paddle.randn(parameter.shape))
    x, t, y = leaf(2, 4, 8, 8), paddle.to_tensor([0.1, 0.9]), paddle.to_tensor([1, 2])

    def loss():
        return model(x, t, y, force_drop_ids=paddle.zeros([2])).square().sum()

    return model, loss, {"x": x, **{n: p for n, p in model.named_parameters() if not p.stop_gradient}}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_any_gradient_of_a_network(kind, recompute):
    """To one of its inputs alone, as a likelihood needs it, and twice through one graph."""
    _, loss, leaves = trainable(kind, enable_recompute=recompute)
    twice = not (recompute and PADDLE_2)  # which crashes
    out = loss()
    out.backward(retain_graph=twice)
    whole = {name: value.grad.numpy().copy() for name, value in leaves.items()}
    if twice:
        out.backward()
    for index, (name, value) in enumerate(leaves.items()):
        assert np.abs(whole[name]).max() > 0, name
        np.testing.assert_allclose(value.grad, (1 + twice) * whole[name], rtol=1e-5, atol=1e-6)
        if index % 5 == 0:  # the latents are the first
            (alone,) = paddle.grad(loss(), value)
            np.testing.assert_allclose(alone, whole[name], rtol=1e-4, atol=1e-5 * np.abs(whole[name]).max())
    with pytest.raises(RuntimeError, match="doesn't have any grad ?op"):
        paddle.grad(loss(), leaves["x"], create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("promised", [False, True], ids=["", "promised"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_frozen_parameters_change_no_other_gradient(kind, recompute, promised):
    _, loss, leaves = trainable(kind, enable_recompute=recompute, single_backward=promised)
    loss().backward()
    whole = {name: value.grad.numpy().copy() for name, value in leaves.items()}
    names = list(leaves)
    for kept in ([name] for name in names[::9]):
        for wanted in (kept, [name for name in names if name not in kept], names[len(names) // 2 :]):
            for name, value in leaves.items():
                value.clear_gradient(False)
                value.stop_gradient = name not in wanted
            loss().backward()
            for name in wanted:
                scale = np.abs(whole[name]).max()
                np.testing.assert_allclose(leaves[name].grad, whole[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def test_a_block_by_itself():
    model, _, _ = trainable("DiT")
    x, c = leaf(2, 16, 32), leaf(2, 32)
    (alone,) = paddle.grad(model.blocks[0](x, c).square().sum(), x)
    model.blocks[0](x, c).square().sum().backward()
    np.testing.assert_allclose(alone, x.grad, rtol=1e-5)


def test_a_kept_gradient_is_not_changed_afterwards():
    """Paddle sums gradients in place."""
    x, gate, h = leaf(2, 3, 4), leaf(2, 1, 4), leaf(2, 3, 4)

    def kept(add_gated):
        middle = add_gated(x, gate, h)
        middle.retain_grads()
        out = add_gated(middle, gate, middle * 2)
        (out * out).sum().backward()
        return middle.grad.numpy()

    np.testing.assert_allclose(kept(cpu_ops.gated_add), kept(lambda *a: a[0] + a[1] * a[2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_a_graph_without_a_backward_pass_is_freed(kind, monkeypatch):
    from paddle.base import core

    monkeypatch.setattr(cpu_ops, "faster", lambda: True)
    _, loss, _ = trainable(kind, single_backward=True)
    loss()  # makes what stays
    before = core.host_memory_stat_current_value("Allocated", 0)
    loss()
    assert core.host_memory_stat_current_value("Allocated", 0) == before


def test_the_gelu_is_kept_only_where_a_block_is_recomputed_anyway(monkeypatch):
    from paddle.base import core

    monkeypatch.setattr(cpu_ops, "faster", lambda: True)

    mlp, x = Mlp(64, 256), leaf(8, 64, 64)
    inner = 4 * 8 * 64 * 256
    for keep, expected in ((False, inner), (True, 2 * inner)):
        ops.use(mlp, Operators(single_backward=True, keep_gelu=keep))
        before = core.host_memory_stat_current_value("Allocated", 0)
        out = mlp(x)
        kept = core.host_memory_stat_current_value("Allocated", 0) - before
        assert kept == pytest.approx(expected + 4 * out.size, rel=0.1)
        del out


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_thirty_steps_are_those_of_the_plain_formulas(kind):
    config = resolve_config({"model": TINY_MODELS[kind], "training": {"learning_rate": 1e-3}})
    side, channels = config["model"]["sample_size"], config["model"]["in_channels"]

    def losses(single_backward):
        paddle.seed(0)
        model, objective = build_model(config, single_backward=single_backward), build_objective(config)
        model.train()
        optimizer = build_optimizer(model, config["training"], build_lr_scheduler(config["training"], 30))
        x, y = paddle.randn([8, channels, side, side]), paddle.randint(0, 10, [8])
        values = []
        for _ in range(30):
            loss = objective.training_losses(model, Batch(x, y))["loss"].mean()
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            values.append(float(loss))
        return values

    np.testing.assert_allclose(losses(True), losses(False), atol=1e-4, rtol=1e-4)


def test_gradients_are_given_up_between_steps_and_summed_within_them():
    config = resolve_config({"model": TINY_MODELS["DiT"]})
    model = build_model(config)
    optimizer = build_optimizer(model, config["training"], build_lr_scheduler(config["training"], 10))
    bias = model.final_layer.linear.bias
    for _ in range(2):
        bias.sum().backward()
    np.testing.assert_array_equal(bias.grad, np.full(bias.shape, 2.0, "float32"))
    optimizer.clear_grad()
    assert bias.grad is None
    bias.sum().backward()
    np.testing.assert_array_equal(bias.grad, np.ones(bias.shape, "float32"))
