"""Progress: a bar on a terminal, plain lines in a log."""

import io

import pytest
from support.runs import loop_arguments, write_config

from runtime import progress


class Stream(io.StringIO):
    """A stream that is a terminal, or is none."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def test_a_log_gets_a_plain_line_now_and_then(monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log, quick = Stream(False), Stream(False)
    for _ in progress.tqdm(range(40), file=log, desc="packing", unit="sample", mininterval=0, miniters=1):
        pass
    lines = log.getvalue().splitlines()
    assert 3 <= len(lines) <= 8 and all(line.startswith("packing: ") for line in lines)
    assert "40/40" in lines[-1] and "\r" not in log.getvalue() and "█" not in log.getvalue()
    with progress.tqdm(total=2, desc="quick", file=quick) as bar:  # done before the first line is due
        bar.update(2)
        progress.tqdm.write("a line", file=quick)
    first, last = quick.getvalue().splitlines()
    assert first == "a line" and last.startswith("quick: 100%")


def test_a_terminal_gets_the_bar():
    terminal = Stream(True)
    for _ in progress.tqdm(range(3), file=terminal, desc="packing"):
        pass
    assert "\rpacking: 100%" in terminal.getvalue() and "3/3" in terminal.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_draws_its_bar_on_a_terminal_only(terminal, features, tmp_path, run_loop, monkeypatch, capsys):
    stderr = Stream(terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    arguments = loop_arguments(
        "notrainer", config=write_config(tmp_path / "Tiny.json"), features=features, output=tmp_path / "out", steps=3
    )
    run_loop("notrainer", [*arguments, "--disable_tqdm=False"])
    assert ("train: " in stderr.getvalue()) == terminal
    lines = capsys.readouterr().out.splitlines()
    assert sum("Train Loss" in line for line in lines) == 3
