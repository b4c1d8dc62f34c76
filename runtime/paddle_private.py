"""Every private name of Paddle's, and whatever differs between Paddle's versions: it stands here and nowhere else."""

import functools


def zero_if(flag, tensors):
    """Fills tensors with zeros, in place, if a flag on the device is set; otherwise they are not touched.

    Paddle's public operators need the flag on the host, or write every tensor in any case.

    Args:
        flag: a bool tensor (1,).
        tensors: of any floating types.
    """
    import paddle

    by_dtype = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        paddle._C_ops.update_loss_scaling_(same, flag, *_scaler_state(paddle.get_device()), 1, 1, 2.0, 0.5, True)


@functools.lru_cache
def _scaler_state(device):
    """Returns a scale and two counters, which the operator of loss scaling asks for and `zero_if` does not use."""
    import paddle

    return paddle.ones([1]), paddle.zeros([1], "int32"), paddle.zeros([1], "int32")


def is_scaler_on(scaler):
    """Returns whether `scaler`, a `paddle.amp.GradScaler` or None, scales anything."""
    return scaler is not None and scaler._enable


def loss_scale(scaler):
    """Returns a scaler's current scale, a tensor on the device; the public method brings it to the host."""
    return scaler._scale


def found_overflow(scaler):
    """Returns a bool tensor (1,), on the device: the last unscaled gradients were not finite."""
    return scaler._found_inf.reshape([1])
