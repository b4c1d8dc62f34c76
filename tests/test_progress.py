"""Progress: a bar on a terminal, plain lines in a log."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shlex
import struct
import termios

import pytest
from support.runs import loop_arguments, write_config

from runtime import progress
from training.metrics import TrainingLog


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


def log(folder, steps=3):
    """A run's log of a few steps."""
    options = {"visualdl_dir": str(folder / "vdl"), "log_every": 1, "first_step": 0, "last_step": steps}
    log = TrainingLog(folder, **options, global_batch_size=8)
    for step in range(1, steps + 1):
        log.step_done(step)
        log.report(loss=0.5 / step, lr=0.1, grad_norm=1.0, epoch=0.1)
    log.print("a line")
    log.close()


def read_to_the_end(terminal):
    """Returns what a terminal got, its other side closed. One read gives what has arrived by then, perhaps a part."""
    parts = []
    with os.fdopen(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):  # Linux ends with EIO
        while part := file.read(65536):
            parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.parametrize("columns", [100, 0])
def test_a_terminal_gets_the_bar_with_loss_and_rate_and_no_lines(columns, tmp_path):
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    with open(ours, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        patch.setattr("sys.stderr", stream)
        log(tmp_path)
    shown = read_to_the_end(terminal)
    last = shown.replace("\n", "\r").split("\rtrain: ")[-1]
    assert last.startswith("100%|█") and "3/3" in last and "samples/s" in last
    assert re.search("(step/s|s/step), loss 0.1667, ", last)  # a busy machine is slower than a step a second
    assert "\ra line\r\n" in shown and "Train Loss" not in shown


def test_a_log_gets_a_plain_line_every_logging_step(tmp_path, capsys):
    log(tmp_path)
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()] == [
        "(step=0000001) Train Loss: 0.5000",
        "(step=0000002) Train Loss: 0.2500",
        "(step=0000003) Train Loss: 0.1667",
        "a line",
    ]
    assert not err


def test_a_file_beside_a_terminal_gets_lines_too(tmp_path, monkeypatch, capsys):
    """`python train... | tee log`: the bar on stderr, the lines in the pipe."""
    terminal = Stream(True)
    monkeypatch.setattr("sys.stderr", terminal)
    log(tmp_path)
    assert "train: " in terminal.getvalue() and capsys.readouterr().out.count("Train Loss") == 3


def test_a_run_shows_the_settings_that_are_no_defaults_and_what_to_do_next(features, tmp_path, run_loop, capsys):
    config, output = write_config(tmp_path / "Tiny.json"), tmp_path / "an output"
    run_loop("notrainer", loop_arguments("notrainer", config=config, features=features, output=output, steps=2))
    lines = capsys.readouterr().out.splitlines()
    saved = json.loads((output / "000-Tiny/config.json").read_text())
    training = next(line for line in lines if line.startswith("  training: "))
    assert training == "  training: ema_decay 0.9, learning_rate 0.001, max_steps 2, global_batch_size 8"
    assert saved["training"]["weight_decay"] == 0.0  # the whole is in the run
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("next: ")]
    assert [os.path.basename(words[0]) for words in commands] == [
        "infer_demo_dit.py",
        "convert_dit_to_ppdiffusers.py",
        "report.py",
    ]
    checkpoint = str(output / "000-Tiny/checkpoints/0000002")
    assert os.path.isdir(checkpoint) and all(checkpoint in words for words in commands[:2])
