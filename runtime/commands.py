"""Command lines of this project that can be pasted into the shell from which a command was called."""

import os
import shlex
import shutil
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def shell_path(path, folder=None):
    """Returns a path as a quoted word of a command line: relative if it lies below `folder`, the working folder."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute, folder)
    return shlex.quote(absolute if relative.split(os.sep)[0] == os.pardir else relative)


def python_command(script, *words, launcher=(), folder=None):
    """Returns the command line that calls a script of the repository by this interpreter; empty words are left out.

    `words` and `launcher` (`-m MODULE ...`, before the script) are words for the shell: quote what a user has named.
    With `folder` the command is one that starts there, because its words have paths that are relative to it.
    """
    enter = f"cd {shlex.quote(folder)} && " if folder not in (None, os.getcwd()) else ""
    found = shutil.which("python")
    same = found is not None and os.path.abspath(found) == os.path.abspath(sys.executable)
    python = "python" if same else shell_path(sys.executable, folder)
    return enter + " ".join([python, *launcher, shell_path(os.path.join(ROOT, script), folder), *filter(None, words)])


def resume_flag(words):
    """Returns the name by which a training command was given its `--resume`, so that a later one wins over it."""
    given = (str(word).split("=")[0].replace("-", "_").replace("__", "--", 1) for word in words)
    return next((flag for flag in given if flag in ("--resume", "--resume_from_checkpoint")), "--resume")
