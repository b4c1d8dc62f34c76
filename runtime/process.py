"""This process: its terminal, and the others that the launcher started beside it. Standard library only."""

import contextlib
import os


def is_terminal(stream):
    """Returns whether somebody sees at once what is written to a stream; False for one that is closed, or None."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return stream.isatty()
    return False


def local_processes():
    """Returns how many processes the launcher started on this machine; 1 without a launcher."""
    return max(1, int(os.environ.get("PADDLE_LOCAL_SIZE") or os.environ.get("PADDLE_TRAINERS_NUM") or 1))
