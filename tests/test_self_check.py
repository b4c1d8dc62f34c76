"""tools/self_check.py: what a bug report needs, and nothing of the user's."""

import json
import os
import subprocess
import sys

import pytest
from support.commands import ROOT
from support.runs import command_environment

from tools import self_check


@pytest.fixture
def report(monkeypatch, capsys):
    """Runs the tool in this process without what takes seconds to import; returns `(exit code, its JSON)`."""
    monkeypatch.setattr(self_check, "IMPORTED", ("paddle",))
    monkeypatch.setattr(self_check, "find_weights", dict)

    def run():
        code = 0
        try:
            self_check.main(["--json", "--device", "cpu"])
        except SystemExit as end:
            code = end.code
        return code, json.loads(capsys.readouterr().out)

    return run


def test_this_machine_gives_the_stored_numbers(report):
    code, told = report()
    assert told["step"]["right"] and told["step"]["device"] == "cpu"
    assert not [line for line in told["problems"] if "step" in line] and code == bool(told["problems"])
    assert told["machine"]["free_disk_gib"] > 0


def test_other_numbers_are_a_problem(report, monkeypatch):
    monkeypatch.setitem(self_check.EXPECTED, "gradient_norm", 1.3320)  # 0.05% more
    code, told = report()
    assert code == 1 and "gradient_norm 1.33135, expected 1.332" in told["problems"][0]


def test_a_step_that_fails_is_told_without_the_paths_of_the_user(report, monkeypatch):
    def fail():
        raise RuntimeError(f"{os.path.expanduser('~')}/secret and {ROOT}/models: no kernel")

    monkeypatch.setattr(self_check, "tiny_step", fail)
    code, told = report()
    assert code == 1 and told["step"]["error"] == "RuntimeError: ~/secret and ./models: no kernel"


def test_packages_that_differ_from_their_pins_are_named(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text(
        "# made by hand\nnumpy==0.1\nno-such-package==1.0\nnumpy==0.2 ; python_version < '3'\nonnxoptimizer==1\n"
    )
    numpy, missing = self_check.compare_pins(pins)
    assert numpy["package"] == "numpy" and numpy["pinned"] == "0.1" and numpy["installed"] not in (None, "0.1")
    assert missing == {"package": "no-such-package", "installed": None, "pinned": "1.0"}


@pytest.mark.walkthrough
def test_the_command_tells_it_all():
    environment = {**command_environment(), "SECRET_TOKEN": "do-not-tell"}
    command = [sys.executable, str(ROOT / "tools/self_check.py"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)
    assert set(told["imports"]) == {"paddle", "paddlenlp", "ppdiffusers"}
    assert not any(tried["error"] for tried in told["imports"].values())
    assert "FID's Inception" in told["weights"] and len(told["weights"]) == 3
    assert os.path.expanduser("~") not in done.stdout and "do-not-tell" not in done.stdout
