"""Attributes of other people's modules and objects, replaced for a while."""

import contextlib


@contextlib.contextmanager
def replaced(module, **attributes):
    """Replaces attributes of a module, or of any object, as long as the block runs."""
    with contextlib.ExitStack() as undo:
        for name, value in attributes.items():
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield
