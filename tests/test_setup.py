"""Set-up: what tools/setup_env.sh would install, the pins, and the shell scripts' syntax. Installs nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PINS = ["constraints.txt", "constraints-py313.txt"]
PADDLE26 = "constraints-paddle26.txt"
A100 = """case "$*" in -L) echo "GPU 0: NVIDIA A100" ;; *compute_cap*) echo 8.0 ;; esac"""
H100 = A100.replace("A100", "H100").replace("8.0", "9.0")
RTX5090 = A100.replace("A100", "RTX 5090").replace("8.0", "12.0")
SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("tools/*.sh"), ROOT / ".ci" / "run"])


def names(file):
    """Distribution names of a requirements file, normalised (PEP 503), without options and comments."""
    lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
    found = [re.match(r"[A-Za-z0-9._-]+", line) for line in lines if line and line[0] not in "#-"]
    return {re.sub(r"[-_.]+", "-", match.group()).lower() for match in found}


def pin(file, name):
    """The version that `file` pins `name` to."""
    return re.search(rf"^{name}==([^ ;\n]+)", (ROOT / file).read_text(), re.MULTILINE).group(1)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what set-up reads, with no .venv, and an environment without a driver, PADDLE_* or PYTHON."""
    (tmp_path / "repo" / "tools").mkdir(parents=True)
    requirements = ("requirements.txt", "requirements-dev.txt", "constraints-demo.txt")
    for file in ("tools/setup_env.sh", *requirements, *PINS, PADDLE26):
        shutil.copy(ROOT / file, tmp_path / "repo" / file)
    (tmp_path / "bin").mkdir()
    nvidia_smi(tmp_path, "exit 9")
    return tmp_path


def nvidia_smi(checkout, body):
    """Stand-in for the driver's tool, which this machine may or may not have."""
    tool = checkout / "bin" / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)


def set_up(checkout, *arguments, **environment):
    ours = ("PYTHON", "PADDLE_PACKAGE", "PADDLE_INDEX_URL", "VENV_DIR")
    env = {k: v for k, v in os.environ.items() if k not in ours}
    env["PATH"] = f"{checkout / 'bin'}{os.pathsep}{env['PATH']}"
    env["PYTHON"] = sys.executable
    command = ["bash", str(checkout / "repo" / "tools" / "setup_env.sh"), *arguments]
    return subprocess.run(command, env={**env, **environment}, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("file", [*PINS, PADDLE26])
def test_every_direct_requirement_is_pinned(file):
    # pip itself is whatever the virtual environment came with.
    direct = (names("requirements.txt") | names("requirements-dev.txt")) - {"pip"}
    assert direct - names(file) == set()
    loose = [line for line in (ROOT / file).read_text().splitlines() if line[:1] not in "#" and "==" not in line]
    assert loose == []


def test_requirements_leave_the_paddle_build_to_the_user():
    listed = names("requirements.txt") | names("requirements-dev.txt")
    assert [name for name in listed if name.startswith("paddlepaddle")] == []
    assert "-c constraints.txt" in (ROOT / "requirements.txt").read_text().splitlines()


def test_pins_agree_on_the_stack_whatever_the_python():
    for name in ["paddlepaddle", "paddlenlp", "ppdiffusers", "visualdl", "aistudio-sdk", "huggingface-hub"]:
        assert pin(PINS[0], name) == pin(PINS[1], name)


def test_cpu_build_without_a_driver(checkout):
    done = set_up(checkout, "--print")
    assert done.returncode == 0, done.stderr
    assert f"setup: paddlepaddle=={pin(PINS[0], 'paddlepaddle')}\n" in done.stdout
    assert not (checkout / "repo" / ".venv").exists()


def test_gpu_build_where_a_driver_answers(checkout):
    nvidia_smi(checkout, 'echo "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0)"')
    out = set_up(checkout, "--print").stdout
    assert f"paddlepaddle-gpu=={pin(PINS[0], 'paddlepaddle')} from https://www.paddlepaddle.org.cn/" in out
    nvidia_smi(checkout, RTX5090)
    assert set_up(checkout, "--print").stdout.count("/stable/cu129/\n") == 1
    # A driver that is installed but finds no device is no driver.
    nvidia_smi(checkout, 'echo "No devices found."')
    assert "paddlepaddle-gpu" not in set_up(checkout, "--print").stdout


def test_environment_overrides_the_choice(checkout):
    done = set_up(checkout, "--print", PADDLE_PACKAGE="paddlepaddle-gpu==3.2.0", PADDLE_INDEX_URL="")
    assert "setup: paddlepaddle-gpu==3.2.0\n" in done.stdout
    done = set_up(checkout, "--print", PADDLE_PACKAGE="paddlepaddle-gpu==3.3.0", PADDLE_INDEX_URL="file:///wheels")
    assert "setup: paddlepaddle-gpu==3.3.0 from file:///wheels\n" in done.stdout


def test_paddle_26_has_pins_of_its_own_and_comes_from_pypi(checkout):
    nvidia_smi(checkout, A100)
    out = set_up(checkout, "--print", PADDLE_PACKAGE="paddlepaddle-gpu==2.6.2").stdout
    assert "setup: paddlepaddle-gpu==2.6.2\n" in out and PADDLE26 in out
    assert pin(PADDLE26, "paddlepaddle") == "2.6.2" and pin(PADDLE26, "paddlenlp").startswith("2.")
    nvidia_smi(checkout, H100)
    refused = set_up(checkout, "--print", PADDLE_PACKAGE="paddlepaddle-gpu==2.6.2")
    assert refused.returncode == 2 and "no code for this GPU's compute capability 9.0" in refused.stderr


@pytest.mark.parametrize(
    ("gpu", "said"), [(A100, "PADDLE_PACKAGE=paddlepaddle-gpu==2.6.2 bash"), (H100, "no code for this GPU's")]
)
def test_an_index_that_does_not_answer_is_told_before_anything_is_made(checkout, gpu, said):
    nvidia_smi(checkout, gpu)
    done = set_up(checkout, https_proxy="http://127.0.0.1:9", no_proxy="")  # where nobody listens
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: https://www.paddlepaddle.org.cn/packages/stable/cu126/ does not answer; ")
    assert said in done.stderr
    assert not (checkout / "repo" / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--help-me"], {}, "unknown argument '--help-me'"),
        ([], {"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python: not a working Python 3.10 to 3.13"),
    ],
)
def test_a_mistake_gets_one_line_and_changes_nothing(checkout, arguments, environment, said):
    done = set_up(checkout, *arguments, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert not (checkout / "repo" / ".venv").exists()


def test_a_broken_venv_is_reported_and_kept(checkout):
    (checkout / "repo" / ".venv" / "mine").mkdir(parents=True)
    done = set_up(checkout)
    assert done.returncode == 2 and "move it away" in done.stderr
    assert (checkout / "repo" / ".venv" / "mine").is_dir()


@pytest.fixture
def venv(checkout):
    """A .venv that writes down pip's command lines instead of downloading, and imports without Paddle."""
    python = checkout / "repo" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/sh
        case "$*" in
        *" show "*) exit 1 ;;
        "-m pip "*)
            echo "$*" >>"{checkout}/pip-calls"
            if [ -n "$PIP_FAILS" ]; then echo "ERROR: no route"; exit 1; fi
            exit 0 ;;
        "-c import "[pg]*) exit 0 ;;
        esac
        exec "{sys.executable}" "$@"
        """
    )
    python.chmod(0o755)
    return checkout / "repo" / ".venv"


def test_second_set_up_does_nothing_until_a_pin_changes(checkout, venv):
    calls = checkout / "pip-calls"
    assert set_up(checkout).returncode == 0
    (call,) = calls.read_text().splitlines()
    assert "install --no-compile" in call and call.endswith(f"paddlepaddle=={pin(PINS[0], 'paddlepaddle')}")
    second = set_up(checkout)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(calls.read_text().splitlines()) == 1
    for file in PINS:
        path = checkout / "repo" / file
        path.write_text(path.read_text().replace("tqdm==", "tqdm==0."))
    assert set_up(checkout).returncode == 0
    assert len(calls.read_text().splitlines()) == 2


def test_a_package_that_was_asked_for_stays(checkout, venv):
    calls = checkout / "pip-calls"
    assert set_up(checkout, PADDLE_PACKAGE="paddlepaddle==2.6.2").returncode == 0
    assert calls.read_text().splitlines()[-1].endswith(" paddlepaddle==2.6.2")
    before = calls.read_text()
    nvidia_smi(checkout, A100)
    assert (set_up(checkout).returncode, calls.read_text()) == (0, before)
    asked = {"PADDLE_PACKAGE": "paddlepaddle-gpu==3.2.0", "PADDLE_INDEX_URL": "file:///wheels"}
    assert set_up(checkout, **asked).returncode == 0
    assert "from file:///wheels\n" in set_up(checkout, "--print").stdout
    assert "from file:///other\n" in set_up(checkout, "--print", PADDLE_INDEX_URL="file:///other").stdout
    assert set_up(checkout, PADDLE_PACKAGE=f"paddlepaddle=={pin(PINS[0], 'paddlepaddle')}").returncode == 0
    assert pin(PINS[0], "paddlepaddle") in (venv / "installed.txt").read_text().splitlines()[0]


def test_an_index_that_was_asked_for_stays(checkout, venv):
    nvidia_smi(checkout, A100)
    assert set_up(checkout, PADDLE_INDEX_URL="file:///wheels").returncode == 0
    before = (checkout / "pip-calls").read_text()
    assert before.splitlines()[-1].endswith(f"paddlepaddle-gpu=={pin(PINS[0], 'paddlepaddle')}")
    assert (set_up(checkout).returncode, (checkout / "pip-calls").read_text()) == (0, before)
    assert "from file:///wheels\n" in set_up(checkout, "--print").stdout


def test_the_demo_is_added_to_the_others_and_changes_none(checkout, venv):
    calls = checkout / "pip-calls"
    assert set_up(checkout).returncode == 0
    done = set_up(checkout, "--demo")
    assert done.returncode == 0, done.stderr
    _, call = calls.read_text().splitlines()  # the first is the usual set-up's
    assert "install --no-deps" in call and call.endswith("-r constraints-demo.txt")
    for again in ((), ("--demo",)):
        second = set_up(checkout, *again)
        assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(calls.read_text().splitlines()) == 2
    for file in PINS:
        assert names(file) & names("constraints-demo.txt") == set()
    assert names("requirements-demo.txt") <= names("constraints-demo.txt")


def test_set_up_needs_no_compiler_and_no_desktop(checkout, venv):
    assert set_up(checkout).returncode == 0
    packages = set(re.findall(r"^([a-z0-9-]+)==", (venv / "packages.txt").read_text(), re.MULTILINE))
    assert packages >= {"paddlenlp", "ppdiffusers", "opencv-python-headless", "pytest", "ruff"}
    assert packages & {"ligo-segments", "onnxoptimizer", "opencv-python", "paddlepaddle"} == set()


def test_failed_set_up_says_so_and_is_tried_again(checkout, venv):
    failed = set_up(checkout, PIP_FAILS="1")
    assert failed.returncode == 2
    assert failed.stderr.startswith("ERROR: no route\nerror: pip could not install everything")
    assert not (venv / "installed.txt").exists()
    assert set_up(checkout).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_script_parses(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "lines"),
    [
        (["-k", "a b"], 5, [".venv -k a b"]),
        (["--device", "gpu", "-x"], 5, [".venv -m gpu --device gpu -x"]),
        (["--paddle", "2.6"], 5, [".venv-paddle26 -n 2 -m paddle26 and not", ".venv-paddle26 -m paddle26 and"]),
        (["--paddle", "2.7"], 2, []),
    ],
)
def test_run_tests_passes_its_arguments_on(checkout, arguments, code, lines):
    shutil.copy(ROOT / "run_tests.sh", checkout / "repo")
    (checkout / "repo" / "tools" / "setup_env.sh").write_text("echo set-up of ${VENV_DIR:-.venv} ran >&2\n")
    for folder in (".venv", ".venv-paddle26"):
        python = checkout / "repo" / folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nshift 2\necho "{folder} $@"\nexit 5\n')
        python.chmod(0o755)
    done = subprocess.run(
        ["bash", "repo/run_tests.sh", *arguments], cwd=checkout, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    told = done.stdout.splitlines()
    assert len(told) == len(lines) and all(line.startswith(start) for line, start in zip(told, lines, strict=True))
    assert ("set-up of" in done.stderr) == bool(lines)
