"""How the official codes initialise a network, tensor by tensor."""

import math

import numpy as np
import pytest

from models import get_2d_sincos_pos_embed

NORMAL = ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight")


def check_initialisation(model, xavier):
    """Holds every parameter of a new network to the official code's; returns how many there are.

    `xavier` are the fans `(in, out)` of the weights that are drawn so, by the ends of their names.
    """
    parameters = list(model.named_parameters())
    for name, parameter in parameters:
        value = parameter.numpy()
        assert parameter.stop_gradient == (name == "pos_embed"), name
        fans = next((fans for ending, fans in xavier.items() if name.endswith(ending)), None)
        if name == "pos_embed":
            np.testing.assert_allclose(value[0], get_2d_sincos_pos_embed(model.hidden_size, model.grid_size), atol=1e-6)
        elif fans:
            std, limit = math.sqrt(2 / sum(fans)), math.sqrt(6 / sum(fans))
            assert value.ndim == 4 or value.shape == fans, name
            assert value.std() == pytest.approx(std, rel=0.03), name
            assert 0.98 * limit < np.abs(value).max() <= limit, name
        elif name in NORMAL:
            assert value.std() == pytest.approx(0.02, rel=0.03), name
            assert np.abs(value).max() > 0.06, name
        elif "norm" in name and name.endswith(".weight"):
            assert (value == 1).all(), name
        else:
            assert name.endswith(".bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight", name
            assert not value.any(), name
    return len(parameters)
