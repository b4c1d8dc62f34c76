"""Shared fixtures: golden vectors, tiny features, every model, and a loop in this process."""

from runtime.process import configure_runtime

configure_runtime()  # before Paddle is imported

import pytest  # noqa: E402
from support.golden import load_golden  # noqa: E402
from support.inception_weights import save as save_inception  # noqa: E402
from support.inception_weights import weights as make_inception  # noqa: E402
from support.runs import TINY_MODELS, run_in_process, write_features  # noqa: E402


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
