"""Finds the project's commands, and how each is asked for its help."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commands():
    """Returns every command of the project that answers `--help`, as paths from the repository's root."""
    found = []
    for pattern in ("*.py", "tools/*.py", "benchmarks/*.py", "*.sh", "tools/*.sh"):
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".py" and "__main__" in text:
                found.append(path)
            elif text.startswith("#!") and ("--help" in text or "tools/launch_" in text):
                found.append(path)  # not run_tests.sh, whose flags are pytest's
    return [str(path.relative_to(ROOT)) for path in found]


def help_command(command):
    """Returns the words that ask a command for its help."""
    return ["bash" if command.endswith(".sh") else sys.executable, str(ROOT / command), "--help"]
