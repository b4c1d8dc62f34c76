"""What a training loop optimises and a sampler inverts, behind one interface.

`build_objective(config)` returns an object with

- the methods of `base.Objective`,
- `validation_losses(model, batch, place, noise) -> (N,)`, with nothing left to chance, and without regularizers,
- `sample(denoiser, noise, *, num_steps, ...) -> latents`, and `check_num_steps(num_steps)` to ask before.

The loops know nothing else, so neither of them asks which model it trains.
"""

from objectives.base import Batch, Rows, make_batch
from objectives.diffusion import DiffusionObjective
from objectives.regularizers import build_regularizers
from objectives.routing import build_routing
from objectives.transport import TransportObjective

__all__ = ["OBJECTIVES", "Batch", "DiffusionObjective", "Rows", "TransportObjective", "build_objective", "make_batch"]

OBJECTIVES = {"diffusion": DiffusionObjective, "transport": TransportObjective}


def build_objective(config, ranks_per_batch=1):
    """Returns the objective that a resolved config (`config.schema.load_config`) names.

    `ranks_per_batch` is the tensor-parallel degree: so many ranks, one after another, have the same batch. Raises
    ValueError for a setting that is not accepted; the message names those that are.
    """
    settings, model = dict(config["objective"]), config["model"]
    kind = settings.pop("type")
    regularizers = build_regularizers(settings.pop("regularizers", []), model["num_layers"])
    network = {name: model[name] for name in ("class_dropout_prob", "learn_sigma")}
    objective = OBJECTIVES[kind](settings, regularizers=regularizers, ranks_per_batch=ranks_per_batch, **network)
    objective.routing = build_routing(config)
    return objective
