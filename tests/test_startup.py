"""Commands answer `--help` at once, and importing the networks costs nothing beyond Paddle."""

import subprocess
import sys

import pytest
from conftest import ROOT, command_environment

from benchmarks.startup import commands, help_command

PYTHON = [command for command in commands() if command.endswith(".py")]
SHELL = [command for command in commands() if command.endswith(".sh")]


def run(command, **environment):
    return subprocess.run(
        command, cwd=ROOT, env={**command_environment(), **environment}, capture_output=True, text=True, timeout=60
    )


def test_every_command_is_found():
    for name in (
        "train_image_generation_trainer.py",
        "infer_demo_dit.py",
        "tools/plan_memory.py",
        "benchmarks/data.py",
    ):
        assert name in PYTHON
    assert {"quickstart.sh", "tools/setup_env.sh", "4_run_train_largedit_3b_trainer.sh"} <= set(SHELL)
    assert not {"tools/image_demo.py", "untrusted.py"} & set(PYTHON)  # no commands


@pytest.mark.parametrize("script", PYTHON)
def test_help_imports_no_framework(script):
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'paddle', 'paddlenlp', 'ppdiffusers', 'visualdl', 'sklearn', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run([sys.executable, "-c", code, str(ROOT / script)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:") and "--help" in done.stdout


@pytest.mark.parametrize("script", SHELL)
def test_help_of_shell_scripts_starts_no_launcher(script, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != -u ] || exit 3\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = run(help_command(script), PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_networks_import_nothing_beyond_paddle():
    code = (
        "import sys, paddle; before = set(sys.modules)\n"
        "import diffusion, transport, objectives\n"
        "from models import *\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new <= {'models', 'diffusion', 'transport', 'objectives', 'untrusted'}, new\n"
        "heavy = {'paddlenlp', 'ppdiffusers', 'visualdl', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
