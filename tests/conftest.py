"""Shared fixtures: golden vectors, tiny features, every model, and a loop in this process."""

from runtime.process import configure_runtime

configure_runtime()  # before Paddle is imported

import pytest  # noqa: E402
from support.golden import load_golden  # noqa: E402
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


@pytest.fixture
def run_loop(monkeypatch):
    def run(loop, arguments):
        run_in_process(loop, [str(argument) for argument in arguments], monkeypatch)

    return run
