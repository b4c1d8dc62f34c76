"""The precision that a run computes in: what was asked for, as far as the device can do it."""

import contextlib
from dataclasses import dataclass

from runtime.paddle_private import skipped_step


@dataclass(frozen=True)
class Precision:
    """The mixed precision of a run."""

    dtype: str = "float32"  # AMP is off
    level: str = "O1"  # or O2
    note: str | None = None  # a sentence to print once where the device computes otherwise than asked

    @property
    def low_precision_weights(self):
        """True if the model's own weights are cast, with float32 masters in the optimizer (O2)."""
        return self.dtype != "float32" and self.level == "O2"

    def autocast(self):
        """Returns the context for the forward pass and the loss."""
        if self.dtype == "float32":
            return contextlib.nullcontext()
        import paddle

        return paddle.amp.auto_cast(True, level=self.level, dtype=self.dtype)

    def decorate(self, model):
        """Casts the model's weights for O2, in place; otherwise does nothing."""
        if self.low_precision_weights:
            import paddle

            paddle.amp.decorate(models=model, level="O2", dtype=self.dtype)

    def scaler(self):
        """Returns a loss scaler for float16; one that does nothing otherwise."""
        import paddle

        return paddle.amp.GradScaler(enable=self.dtype == "float16", init_loss_scaling=2.0**15)

    def stepped(self, scaler):
        """Returns whether the optimizer stepped: float16 leaves out a step whose gradients overflowed."""
        return self.dtype != "float16" or not skipped_step(scaler)


def resolve_precision(dtype, level, *, device, compute_capability=None):
    """Returns the `Precision` nearest to a config's `amp_dtype` and `amp_level` that a device (`cpu`, `gpu:0`) can do.

    Raises ValueError for bfloat16 on a GPU without, by its compute capability `(major, minor)`, which is read if None.
    """
    if dtype == "float32":
        return Precision("float32", level)
    if device.startswith("cpu"):
        note = f"amp_dtype {dtype} was asked for, but Paddle on a CPU computes in float32 whatever AMP says: "
        return Precision("float32", level, note + "this run is float32 throughout.")
    if dtype == "bfloat16" and device.startswith("gpu"):
        import paddle

        major, minor = compute_capability or paddle.device.cuda.get_device_capability(device)
        if major < 8:
            needs = "amp_dtype bfloat16 needs a GPU of compute capability 8.0 or newer"
            raise ValueError(f"{needs}, this one has {major}.{minor}; use float16 or float32")
    return Precision(dtype, level)


def cast_layer(layer, dtype):
    """Does `layer.to(dtype=dtype)`, to half precision by rounding to nearest; on a CPU Paddle 2.6 cuts digits off."""
    import numpy as np
    import paddle

    kind = str(dtype).removeprefix("paddle.")
    # In float16 and in bfloat16 the nearest number to this one lies above it.
    probe = paddle.to_tensor(np.float32([1 + 2**-8 + 2**-11 + 2**-12]), place=paddle.CPUPlace())
    if kind in ("float16", "bfloat16") and float(probe.astype(kind).astype("float32") - probe) < 0:
        for tensor in layer.state_dict(use_hook=False).values():
            if tensor.dtype == paddle.float32 and tensor.place.is_cpu_place():
                tensor.set_value(_rounded(tensor.numpy(), kind))
    layer.to(dtype=dtype)


def _rounded(array, dtype):
    """Returns float32 numbers as the nearest ones of float16 or bfloat16, in float32 still; array: float32."""
    import numpy as np

    if dtype == "float16":
        with np.errstate(over="ignore"):  # beyond 65504 is infinity
            return array.astype("float16").astype("float32")
    bits = array.view("uint32")  # of which bfloat16 has the upper half; the even one of two that are equally near
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(array), rounded.view("float32"), array)
