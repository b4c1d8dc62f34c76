"""What is installed here, and on what machine: versions, pins, processor, GPUs."""

import importlib

from verification.verdicts import Check, Wrong


def checks(settings):
    """Yields the checks of this group."""
    yield Check("imports", check_imports)


def check_imports():
    """Imports the packages of Paddle's stack."""
    try:
        importlib.import_module("paddle")
    except ImportError as error:
        raise Wrong(str(error)) from error
    return ""
