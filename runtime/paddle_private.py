"""Every private name of Paddle's, and whatever differs between Paddle's versions: it stands here and nowhere else."""

# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def keep_own_parameters_float32(layer):
    """Makes AMP O2 leave a layer's own parameters in float32; those of its sublayers are cast as usual."""
    layer._cast_to_low_precision = False


def sum_gradient_over_group(x, group):
    """Returns x; in the backward pass its gradient is summed over a tensor-parallel group."""
    from paddle.distributed.fleet.layers.mpu import mp_ops

    return mp_ops._c_identity(x, group=group)


def concat_over_group(x, group):
    """Returns the ranks' tensors `(..., D)`, in the group's order, as one `(..., D * ranks)`."""
    from paddle.distributed.fleet.layers.mpu import mp_ops

    return mp_ops._c_concat(x, group=group)
