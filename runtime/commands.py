"""Command lines of this project that can be pasted into the shell from which a command was called."""

import os
import shlex
import shutil
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def shell_path(path):
    """Returns a path as a word of a command line: relative where it lies below the working folder, and quoted."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return shlex.quote(absolute if relative.split(os.sep)[0] == os.pardir else relative)


def python_command(script, *words, launcher=()):
    """Returns the command line that calls a script of the repository by this interpreter; empty words are left out.

    `words` and `launcher` (`-m MODULE ...`, before the script) are words for the shell: quote what a user has named.
    """
    found = shutil.which("python")
    same = found is not None and os.path.abspath(found) == os.path.abspath(sys.executable)
    python = "python" if same else shell_path(sys.executable)
    return " ".join([python, *launcher, shell_path(os.path.join(ROOT, script)), *filter(None, words)])
