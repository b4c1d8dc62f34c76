"""Sharding stage 3 for networks whose layers are no chain."""

from paddle.distributed import sharding

from runtime.patching import replaced


def stage3_wrapper(model):
    """Returns a context in which Paddle's wrappers for sharding stages 2 and 3 are right for `model`.

    - Stage 3 prefetches the layer before, in the backward pass, as if layers were a chain. Here the conditioning
      branches off: a layer whose turn is over was gathered again, and its old weights used in the next step. With
      `sync_comm` every layer is gathered when its turn comes.
    - Stage 3 gathers a frozen slice for the backward pass and never lets it go. Layers that hold frozen parameters are
      left whole.
    """
    layers = model.sublayers(include_self=True)
    holders = [id(layer) for layer in layers if any(p.stop_gradient for p in layer.parameters(include_sublayers=False))]
    wrap = sharding.group_sharded_parallel

    def wrapper(*args, exclude_layer=(), **options):
        return wrap(*args, exclude_layer=[*exclude_layer, *holders], sync_comm=True, **options)

    return replaced(sharding, group_sharded_parallel=wrapper)
