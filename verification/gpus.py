"""What several groups ask of the GPU that Paddle computes on."""

from verification.verdicts import Skip


def card():
    """Returns the properties of the GPU: `name`, `major`, `minor`, `total_memory` in bytes."""
    import paddle

    return paddle.device.cuda.get_device_properties(paddle.get_device())


def has_bfloat16():
    """Returns whether the GPU multiplies bfloat16: compute capability 8.0 or newer."""
    return card().major >= 8


def need_bfloat16():
    """Raises `Skip` where the GPU has no bfloat16."""
    if not has_bfloat16():
        raise Skip(f"compute capability {card().major}.{card().minor}; bfloat16 needs 8.0")
