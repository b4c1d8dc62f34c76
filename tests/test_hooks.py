"""Hooks between the blocks, and the regularizers that see tokens through them."""

import numpy as np
import paddle
import pytest
from support.golden import judged
from support.runs import TINY_MODELS

from config.schema import resolve_config
from models import build_model
from models.hooks import Hook, Tap
from objectives import Batch, build_objective
from objectives.regularizers import REGULARIZERS
from verification import official


@pytest.fixture(autouse=True)
def layer_sync(monkeypatch):
    monkeypatch.setitem(REGULARIZERS, "layer_sync", official.LayerSync)


def network(kind, **options):
    """A network whose every weight matters, in training mode, and its inputs."""
    paddle.seed(0)
    model = build_model(TINY_MODELS[kind], **options)
    with paddle.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * paddle.randn(parameter.shape))
    inputs = paddle.randn([2, 4, 8, 8]), paddle.to_tensor([0.1, 0.9]), paddle.to_tensor([1, 2]), paddle.zeros([2])
    return model, inputs


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


@pytest.mark.parametrize("promised", [False, True], ids=["", "promised"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_tapped_tokens_are_part_of_the_graph(kind, recompute, promised):
    def losses(model, inputs):
        tap = Tap([0])
        out = model(*inputs, hooks=(Hook(), tap))
        return out.square().mean(), tap.tokens[0].square().mean()

    model, inputs = network(kind)
    main, _ = losses(model, inputs)
    np.testing.assert_array_equal(main, model(*inputs).square().mean())  # a look changes nothing
    of_main = gradients(model, main)
    of_tap = gradients(model, losses(model, inputs)[1])
    assert not any(of_tap[name].any() for name in of_tap if name.startswith(("blocks.1.", "layers.1.", "final_layer.")))
    model, inputs = network(kind, enable_recompute=recompute, single_backward=promised)
    both = gradients(model, sum(losses(model, inputs)))
    assert both.keys() == of_main.keys()
    for name, gradient in both.items():
        expected = of_main[name] + of_tap[name]
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_a_hook_may_reorder_and_drop_tokens(kind):
    """Blocks do not care about the order of tokens whose positions go with them; dropped ones are put back as zeros."""
    order = paddle.to_tensor(np.random.RandomState(0).permutation(16))
    back = paddle.argsort(order)

    class Reorder(Hook):
        kept = 16
        seen = ()

        def before(self, index, tokens, conditions):
            if index == 0:
                c, *rotary = conditions
                keep = order[: self.kept]
                tokens = tokens.index_select(keep, axis=1)
                conditions = (c, *(table.index_select(keep) for table in rotary))
            self.seen += (tokens.shape[1],)
            return tokens, conditions

        def after(self, index, tokens):
            if index < 1:
                return tokens
            lost = paddle.zeros([tokens.shape[0], 16 - self.kept, tokens.shape[2]])
            return paddle.concat([tokens, lost], axis=1).index_select(back, axis=1)

    model, inputs = network(kind)
    whole, half = Reorder(), Reorder()
    np.testing.assert_allclose(model(*inputs, hooks=(whole,)), model(*inputs), rtol=1e-3, atol=1e-5)
    half.kept = 8
    out = model(*inputs, hooks=[half])
    assert (whole.seen, half.seen) == ((16, 16), (8, 8))
    out.sum().backward()
    assert all(paddle.isfinite(p.grad).all() for p in model.parameters() if not p.stop_gradient)


# -- Regularizers -----------------------------------------------------------------------------------------------------


def objective_of(kind, *auxiliary, **model):
    config = resolve_config({"model": {**TINY_MODELS[kind], **model}})
    config["objective"]["auxiliary"] = list(auxiliary)
    return build_objective(config)


def test_losses_and_gradients_with_a_regularizer_are_the_official_ones():
    judged(official.regularized())


def test_regularizers_are_added_by_weight_and_leave_the_rest_alone(kind):
    plain = objective_of(kind)
    entry = {"type": "layer_sync", "weight": -0.3, "layer": 1, "target_layer": 0}
    regularized = objective_of(kind, entry)
    model, (x, _, y, _) = network(kind)
    batch = Batch(x, y)
    paddle.seed(1)
    drawn = plain.draw(batch)
    expected = plain.training_losses(model, batch, drawn=drawn)
    paddle.seed(1)
    losses = regularized.training_losses(model, batch)  # and nothing else is drawn
    assert losses.keys() == {*expected, "layer_sync"}
    assert all(value.shape == [2] for value in losses.values())
    np.testing.assert_allclose(losses["loss"], expected["loss"] - 0.3 * losses["layer_sync"], rtol=1e-6)
    place, noise = paddle.to_tensor([0.1, 0.7]), paddle.randn(x.shape)
    held_out = [objective.validation_losses(model, batch, place, noise) for objective in (plain, regularized)]
    np.testing.assert_array_equal(*held_out)


def test_wrong_regularizers_are_named():
    entry = {"type": "layer_sync", "weight": 1.0, "layer": 0, "target_layer": 1}
    with pytest.raises(ValueError, match="unknown type 'dispersed'; known: .*layer_sync"):
        objective_of("SiT", {**entry, "type": "dispersed"})
    with pytest.raises(ValueError, match="'layer_sync' stands there twice"):
        objective_of("SiT", entry, entry)
    model, (x, _, y, _) = network("SiT")
    with pytest.raises(ValueError, match="the network has no block 7"):
        objective_of("SiT", {**entry, "target_layer": 7}).training_losses(model, Batch(x, y))
