"""Shared fixtures: golden vectors, tiny features, every model, and a loop in this process; the device of the tests."""

import os
import signal

from runtime.process import configure_runtime, resolve_device

configure_runtime()  # before Paddle is imported
# A shell's background job ignores Ctrl-C, and so would what the tests start to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from support import device  # noqa: E402
from support.golden import load_golden  # noqa: E402
from support.inception_weights import save as save_inception  # noqa: E402
from support.inception_weights import weights as make_inception  # noqa: E402
from support.runs import TINY_MODELS, run_in_process, write_features  # noqa: E402

# Modules whose tests make sense on a GPU, but for those that start processes. In others each is marked by itself.
GPU_MODULES = {"test_models", "test_hooks", "test_large_dit", "test_diffusion", "test_transport"}


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="that Paddle computes on; gpu: only the tests with the marker gpu are run [cpu]",
    )


def pytest_configure(config):
    device.DEVICE = config.getoption("--device")
    if device.DEVICE == "gpu":
        # float32 in full, and the same sums in every run, where Paddle has the choice.
        deterministic = dict.fromkeys(("FLAGS_cudnn_deterministic", "FLAGS_embedding_deterministic"), "1")
        os.environ.update(NVIDIA_TF32_OVERRIDE="0", **deterministic)
        try:
            resolve_device("gpu")
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.stem in GPU_MODULES and not item.get_closest_marker("distributed"):
            item.add_marker("gpu")
    if device.DEVICE == "gpu":
        others = [item for item in items if not item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=others)


@pytest.fixture(autouse=True)
def chosen_device():
    """Lets Paddle compute on the device of --device, whatever the test before has chosen."""
    if device.DEVICE == "gpu":
        import paddle

        paddle.set_device("gpu")


@pytest.fixture
def golden():
    return load_golden


@pytest.fixture(params=TINY_MODELS)
def kind(request):
    """Every model that both loops train, in turn."""
    return request.param


@pytest.fixture(scope="session")
def features(tmp_path_factory):
    """40 random latents (4, 8, 8) of 10 classes."""
    return write_features(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """The file of random weights that the golden vectors of the evaluation were made with."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    save_inception(make_inception(20151205), path)
    return path


@pytest.fixture
def run_loop():
    return run_in_process
