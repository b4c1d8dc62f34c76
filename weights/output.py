"""Weight files that a command writes: which names they may have, and casting to their dtype."""

import os

from runtime import files


def check_output(path, overwrite=False, torch=False):
    """Raises ValueError for a file that can't be written, or whose name would say another layout than it has.

    Args:
        overwrite: it may be there already.
        torch: it will hold PyTorch's layout, not Paddle's.
    """
    other = (".pdparams", ".pdopt") if torch else (".pt", ".pth", ".bin", ".ckpt")
    if path.lower().endswith(other):
        expected = ".pt or .safetensors" if torch else ".pdparams or .safetensors"
        what = "PyTorch's" if torch else "Paddle's"
        raise ValueError(f"{path}: expected a name that ends in {expected}, as the file will be in {what} layout")
    files.check_output(path, overwrite)


def is_safetensors(path):
    """Returns whether a file of that name is to hold safetensors."""
    return os.fspath(path).lower().endswith(".safetensors")


def save_paddle(state, path, dtype="float32"):
    """Writes {name: array} as tensors of `dtype`, by the name of the file safetensors or a `.pdparams`."""
    import numpy as np

    from models.state import check_finite
    from weights.files import save_pdparams, save_safetensors

    def cast(value):
        if dtype != "bfloat16":
            with np.errstate(over="ignore"):
                return value.astype(dtype, copy=False)
        import paddle

        return paddle.to_tensor(value, place=paddle.CPUPlace()).astype(dtype).numpy()  # uint16

    state = {name: cast(value) for name, value in state.items()}
    check_finite(state, source=f"in {dtype}")
    with files.whole_file(path) as partial:
        (save_safetensors if is_safetensors(path) else save_pdparams)(state, partial)
