"""tools/self_check.py: a verdict a line, a report for an issue, and nothing of the user's."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest
from support.commands import ROOT
from support.runs import command_environment

from tools import self_check
from verification import environment, groups
from verification.verdicts import OK, SKIPPED, WRONG, Check, Settings, Skip, Wrong, judge, within


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Makes a group of checks out of the source of their functions; it runs in a process of its own."""

    def make(*sources):
        (tmp_path / "verification").mkdir()
        (tmp_path / "verification" / "made.py").write_text(
            "import os, signal, time\nfrom verification.verdicts import Check, Skip, Wrong\n"
            + "".join(f"def check{number}():\n    {source}\n" for number, source in enumerate(sources))
            + "def checks(settings):\n"
            + "".join(f"    yield Check('number {number}', check{number})\n" for number in range(len(sources)))
        )
        # The process looks for the group beside the others.
        (tmp_path / "sitecustomize.py").write_text(
            f"import verification\nverification.__path__.append({str(tmp_path / 'verification')!r})\n"
        )
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
        monkeypatch.setitem(groups.GROUPS, "made", False)
        return lambda **options: list(groups.run_group("made", "cpu", **options))

    return make


def test_a_verdict_a_check_with_figures_or_reason(group):
    run = group("return 'all well', {'n': 1}", "raise Skip('no GPU')", "raise Wrong('3, not 2', {'n': 3})", "1 / 0")
    fine, skipped, wrong, broken = run()
    assert (fine.status, fine.text, fine.figures) == (OK, "all well", {"n": 1})
    assert skipped.line() == "skipped  made: number 1: no GPU"
    assert (wrong.status, wrong.text, wrong.figures) == (WRONG, "3, not 2", {"n": 3})
    assert broken.line() == "WRONG    made: number 3: ZeroDivisionError: division by zero"


def test_a_crash_ends_its_group_alone_and_is_told(group):
    fine, crashed = group("return 'well'", "os.kill(os.getpid(), signal.SIGSEGV)", "return 'never reached'")()
    assert fine.status == OK
    assert (crashed.check, crashed.status) == ("number 1", WRONG)
    assert f"ended by {signal.Signals.SIGSEGV.name}" in crashed.text


def test_a_group_that_hangs_is_ended_and_its_check_named(group):
    (hung,) = group("time.sleep(600)")(timeout=4)
    assert (hung.check, hung.status, hung.text) == ("number 0", WRONG, "took more than 4 s")


def test_what_a_check_prints_is_no_verdict_and_paths_are_shortened(group):
    (verdict,) = group(f"print('{{}}'); raise Wrong({str(ROOT / 'models')!r} + os.path.expanduser(' ~/secret'))")()
    assert (verdict.status, verdict.text) == (WRONG, "./models ~/secret")


def test_an_error_that_is_no_number_is_beyond_any_bound():
    assert within({"x": (1e-7, 1e-6), "y": (2e-6, 1e-5)})[0] == "y 2e-06, at most 1e-05"
    for error in (2e-6, float("nan"), float("inf")):
        verdict = judge("g", Check("c", lambda error=error: within({"x": (error, 1e-6), "y": (0, 1)})))
        assert verdict.status == WRONG and verdict.text.startswith("x ") and set(verdict.figures) == {"x", "y"}


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    """Runs the tool with verdicts given; returns `(exit code, what it printed, the report)`."""

    def run(*verdicts):
        monkeypatch.setattr(self_check, "run_groups", lambda device, **options: iter(verdicts))
        path, code = tmp_path / f"report{len(verdicts)}.json", 0
        try:
            self_check.main(["--json", str(path), "--device", "cpu"])
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out, json.loads(path.read_text())

    return run


def test_exit_code_and_report_follow_the_verdicts(report):
    fine, wrong = judge("g", Check("fine", lambda: "well")), judge("g", Check("not", lambda: 1 / 0))
    code, printed, told = report(fine)
    assert code == 0 and "1 ok, 0 WRONG, 0 skipped" in printed and printed.startswith("ok       g: fine: well\n")
    code, printed, told = report(fine, wrong)
    assert code == 1 and told["counts"] == {OK: 1, WRONG: 1, SKIPPED: 0}
    assert told["verdicts"][1]["text"] == "ZeroDivisionError: division by zero"


def test_without_its_device_nothing_else_is_asked(monkeypatch):
    def run_group(group, device, *, quick):
        check = Check("device", lambda: Settings(device, quick, "").device)
        assert group == "environment"
        yield judge(group, check)

    monkeypatch.setattr(groups, "run_group", run_group)
    monkeypatch.setattr(groups, "GROUPS", {"environment": False, "parity": False, "parallel": True})
    device, parity, parallel = groups.run_groups("gpu:99", quick=True)
    assert device.status == WRONG and device.text.startswith("device gpu was asked for")
    assert (parity.status, parity.text) == (SKIPPED, "there is no device to ask")
    assert (parallel.status, parallel.text) == (SKIPPED, "--quick")


def test_packages_that_differ_from_their_pins_are_named(tmp_path, monkeypatch):
    pins = tmp_path / "constraints.txt"
    pins.write_text(
        "# made by hand\nnumpy==0.1\nno-such-package==1.0\nnumpy==0.2 ; python_version < '3'\nonnxoptimizer==1\n"
    )
    monkeypatch.setattr(environment, "ROOT", str(tmp_path))
    monkeypatch.setattr(environment, "pins_of_this_environment", lambda: "constraints.txt")
    with pytest.raises(Wrong, match="numpy is [0-9.]+, not 0.1, no-such-package is missing, not 1.0; run bash"):
        environment.check_packages()


@pytest.mark.parametrize(
    ("built_for", "capability", "said"),
    [
        ([(6, 1), (8, 0), (8, 6)], (9, 0), "no code for 9.0; this Paddle is built for 6.1, 8.0, 8.6"),
        ([(8, 0), (8, 6)], (7, 5), "no code for 7.5"),
        ([(8, 0), (8, 6)], (8, 9), "8.9; built for 8.0, 8.6"),
        ([], (8, 9), "does not tell"),
    ],
)
def test_a_gpu_that_paddle_was_not_built_for_is_told(monkeypatch, built_for, capability, said):
    from runtime import paddle_private

    monkeypatch.setattr(paddle_private, "compiled_architectures", lambda: built_for)
    card = types.SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(environment, "card", lambda: card)
    on_gpu = types.SimpleNamespace(on_gpu=True)
    verdict = judge("environment", Check("c", lambda: environment.check_compute_capability(on_gpu)))
    assert said in verdict.text
    assert verdict.status == (WRONG if "no code" in said else SKIPPED if "not tell" in said else OK)


def test_no_gpu_is_a_reason_and_not_an_error(tmp_path):
    for requested in ("cpu", "gpu:99"):
        with pytest.raises(Skip, match="no GPU"):
            environment.check_cuda(Settings(requested, True, str(tmp_path)))


@pytest.mark.walkthrough
def test_the_command_tells_it_all():
    process_environment = {**command_environment(), "SECRET_TOKEN": "do-not-tell"}
    command = [sys.executable, str(ROOT / "tools/self_check.py"), "--json", "--device", "cpu"]
    done = subprocess.run(command, env=process_environment, capture_output=True, text=True, timeout=600)
    told = json.loads(done.stdout)
    assert {verdict["group"] for verdict in told["verdicts"]} == set(groups.GROUPS)
    assert told["counts"][WRONG] == 0 and done.returncode == 0, done.stderr
    assert os.path.expanduser("~") not in done.stdout and "do-not-tell" not in done.stdout
