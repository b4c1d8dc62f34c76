"""Hooks between the blocks."""

import numpy as np
import paddle
import pytest
from support.runs import TINY_MODELS

from models import build_model
from models.hooks import Hook, Tap


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
