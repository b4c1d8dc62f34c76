"""What a command says at its start, that Paddle is loading, and at its end, what to do next. Standard library only."""

import contextlib
import importlib.util
import io
import os
import shlex
import sys
import time

from runtime.commands import python_command
from runtime.process import is_terminal, launched_rank, say

SLOW = ("paddle", "paddlenlp", "ppdiffusers")  # seconds each


class LoadingNotice:
    """Says `loading paddle ...` on stderr when a slow package is about to be imported; at a terminal also how long.

    It watches imports, so that a command which ends without Paddle says nothing. Rank 0 alone speaks.
    """

    def __init__(self):
        self._busy = False

    @classmethod
    def install(cls):
        """Lets this process say it from now on; does nothing on other ranks."""
        if launched_rank()[0] == 0:
            sys.meta_path.insert(0, cls())

    def find_spec(self, name, path=None, target=None):
        """Returns the spec of a slow package, with a loader that speaks; None for others, as a finder does."""
        if name not in SLOW or self._busy:
            return None
        self._busy = True  # those that it imports in its turn are a part of it
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy = False
        if spec is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                with self._said(name if "paddle" in sys.modules else "paddle"):
                    load(module)

            spec.loader.exec_module = exec_module
        return spec

    @contextlib.contextmanager
    def _said(self, name):
        start, at_terminal, self._busy = time.monotonic(), is_terminal(sys.stderr), True
        self._write(f"loading {name} ..." + ("" if at_terminal else "\n"))
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                yield
        finally:
            self._busy = False
            if at_terminal:
                self._write(f" {time.monotonic() - start:.1f} s\n")
            # Paddle warns of more than one thread, which `configure_runtime` chose.
            lines = said.getvalue().splitlines(keepends=True)
            self._write("".join(line for line in lines if "OMP_NUM_THREADS" not in line))

    @staticmethod
    def _write(text):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)
            sys.stderr.flush()


def say_next(*commands):
    """Prints `next_commands`, a line each, on rank 0."""
    if launched_rank()[0] == 0:
        for line in next_commands(*commands):
            say(line)


def says_next():
    """Returns whether commands say what can be done next; `SAY_NEXT=0` is set by a script that does it itself."""
    return os.environ.get("SAY_NEXT") != "0"


def next_commands(*commands):
    """Returns lines `next: ...` of commands that can be pasted into the shell that this one was started from.

    There are none where commands do not say it, see `says_next`.

    Args:
        commands: lists of words; the first is a Python script, by its path or that from the project's root.
    """
    lines = []
    for script, *words in commands if says_next() else ():
        lines.append("next: " + python_command(script, shlex.join(map(str, words))))
    return lines
