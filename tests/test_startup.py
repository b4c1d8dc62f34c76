"""Commands answer `--help` at once, and importing the networks costs nothing beyond Paddle."""

import os
import subprocess
import sys

import pytest
from support.commands import commands, help_command
from support.runs import ROOT, command_environment, write_config

from runtime.process import EXIT_UNREAD

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
    assert not {"sampling/demo.py", "runtime/untrusted.py"} & set(PYTHON)  # no commands


def test_help_imports_no_framework():
    """All in one process, because starting Python and importing numpy is most of the time."""
    code = (
        "import contextlib, io, os, runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv, sys.path[0], said = [script, '--help'], os.path.dirname(script), io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(said): runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code, (script, end.code)\n"
        "    heavy = {'paddle', 'paddlenlp', 'ppdiffusers', 'visualdl', 'sklearn', 'torch'} & set(sys.modules)\n"
        "    assert not heavy, (script, heavy)\n"
        "    assert said.getvalue().startswith('usage:') and '--help' in said.getvalue(), script\n"
        "print('all')"
    )
    done = run([sys.executable, "-c", code, *(str(ROOT / script) for script in PYTHON)])
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr


@pytest.mark.parametrize("script", SHELL)
def test_help_of_shell_scripts_starts_no_launcher(script, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != -u ] || exit 3\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = run(help_command(script), PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


MISTAKES = [  # script, flag, the line that names it
    ("trainer", "--seed=-1", "--seed must be an integer from 0 to 4294967295, got -1"),
    ("notrainer", f"--global_seed={10**22}", f"seed must be an integer from 0 to 4294967295, got {10**22}"),
    ("trainer", "--no_such_flag=1", "unknown flag --no_such_flag; see --help"),
    ("trainer", "--results_dir=out", "unknown flag --results_dir (did you mean --output?)"),
    ("trainer", "--scale_loss=much", "argument --scale_loss: invalid float value: 'much'"),
    ("notrainer", "--save_step=5", "unknown flag --save_step"),
    ("notrainer", "word", "unexpected 'word'"),
    ("notrainer", "--config_file=BIG_SEED", "training: seed must be an integer from 0 to 4294967295, got 4294967296"),
]


@pytest.mark.parametrize(("loop", "flag", "line"), MISTAKES)
def test_mistakes_on_the_command_line_are_told_before_a_framework_is_imported(loop, flag, line, tmp_path):
    path = write_config(tmp_path / "Seed.json", seed=2**32)
    code = (
        "import os, runpy, sys; script, *sys.argv = sys.argv[1:]; sys.argv.insert(0, script)\n"
        "leave, heavy = os._exit, {'paddle', 'paddlenlp', 'visualdl', 'numpy'}\n"
        "os._exit = lambda code: leave(99 if heavy & set(sys.modules) else code)\n"
        "runpy.run_path(script, run_name='__main__')"
    )
    script = str(ROOT / f"train_image_generation_{loop}.py")
    done = run([sys.executable, "-c", code, script, flag.replace("BIG_SEED", path)])
    assert done.returncode == 2, (done.returncode, done.stderr)
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ") and line in error


@pytest.mark.parametrize(
    "command", ["[print('line') for _ in range(10**5)]", "print('line')", "print('line') or exit()"]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone_ends_a_command_without_a_line(command, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from runtime.process import run_cli; run_cli(lambda: {command})"
    environment = {**command_environment(), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (EXIT_UNREAD, "")


def test_networks_import_nothing_beyond_paddle():
    code = (
        "import sys, paddle; before = set(sys.modules)\n"
        "import diffusion, transport, objectives\n"
        "from models import *\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new <= {'models', 'diffusion', 'transport', 'objectives', 'runtime'}, new\n"
        "heavy = {'paddlenlp', 'ppdiffusers', 'visualdl', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
