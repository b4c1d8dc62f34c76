"""The device that tests compute on: pytest's --device."""

DEVICE = "cpu"  # tests/conftest.py sets it


def either(cpu, gpu):
    """Returns the value for the device: a GPU adds in another order than a CPU, and may do so from run to run."""
    return gpu if DEVICE == "gpu" else cpu
