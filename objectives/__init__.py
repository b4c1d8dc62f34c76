"""What a training loop optimises and a sampler inverts, behind one interface.

`build_objective(config)` returns an object with

- `draw(batch, rows=None) -> dict` of the random numbers of a training step, per sample,
- `training_losses(model, batch, rows=None, drawn=None) -> dict` of per-sample tensors with the key `loss`,
- `validation_losses(model, batch, place, noise) -> (N,)`, with nothing left to chance,
- `end_step()`, called once after each optimizer step,
- `sample(denoiser, noise, *, num_steps, ...) -> latents`, and `check_num_steps(num_steps)` to ask before,
- `state_dict()` / `set_state_dict(state)`, empty unless the objective learns something (a timestep sampler).

The loops know nothing else, so neither of them asks which model it trains.
"""

from objectives.base import Batch, Rows
from objectives.diffusion import DiffusionObjective
from objectives.transport import TransportObjective

__all__ = ["OBJECTIVES", "Batch", "DiffusionObjective", "Rows", "TransportObjective", "build_objective"]

OBJECTIVES = {"diffusion": DiffusionObjective, "transport": TransportObjective}


def build_objective(config, ranks_per_batch=1):
    """The objective that a resolved config (`config.schema.load_config`) names.

    Args:
        ranks_per_batch: the tensor-parallel degree: so many ranks, one after another, have the same batch.
    """
    return OBJECTIVES[config["objective"]["type"]](config, ranks_per_batch)
