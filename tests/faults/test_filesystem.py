"""File systems that refuse, and streams that take nothing; benchmarks/faults.py has full, slow and read-only disks."""

import contextlib
import json
import resource
import subprocess
import sys
import threading

import pytest
from support.runs import ROOT, checkpoint_path, command_environment, loop_arguments, read_losses, write_config

from runtime import files as manifest
from runtime.process import SAVING_THREAD
from training.checkpoints.find import pick_checkpoint
from training.metrics import TrainingLog, _Rows
from weights.runs import list_checkpoints, step_of

LOOPS = ("trainer", "notrainer")


@contextlib.contextmanager
def no_file_larger_than(size):
    """The kernel takes no byte beyond `size` of any file that this process writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for_saves():
    for thread in threading.enumerate():
        if thread.name == SAVING_THREAD:
            thread.join()


@pytest.mark.parametrize("loop", LOOPS)
def test_training_goes_on_while_files_may_not_grow(features, tmp_path, run_loop, monkeypatch, capsys, loop):
    """From step 3 to step 7 a write stops in the middle of the weights."""
    step_done, limit = TrainingLog.step_done, contextlib.ExitStack()

    def hooked(self, step):
        if step in (3, 7):
            wait_for_saves()
            limit.enter_context(no_file_larger_than(100_000)) if step == 3 else limit.close()
        return step_done(self, step)

    monkeypatch.setattr(TrainingLog, "step_done", hooked)
    arguments = loop_arguments(
        loop,
        config=write_config(tmp_path / "Tiny.json"),
        features=features,
        output=tmp_path / "out",
        steps=10,
        save_every=2,
    )
    with limit:
        run_loop(loop, arguments)
    out = capsys.readouterr().out
    assert out.count("is not saved: ") == out.count("File too large; training goes on") == 2
    folder = checkpoint_path(loop, tmp_path / "out", 10).parent
    assert [step_of(path) for path in list_checkpoints(folder)] == [2, 8, 10]
    assert not list(folder.glob(".*")) and list(read_losses(tmp_path / "out")) == list(range(1, 11))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_while_saving_is_no_success(features, tmp_path, run_loop, monkeypatch):
    """An error that no file system makes, in the thread that writes the last checkpoint."""
    monkeypatch.setattr(manifest.FolderWriter, "finish", lambda self: 1 / 0)
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "out", steps=1)
    with pytest.raises(ZeroDivisionError):
        run_loop("notrainer", arguments)


def test_rows_of_the_log_wait_for_room(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3)) + '\0\0\n[1]\n{"step": 4, "lo'
    )
    rows = _Rows(str(path), 2)
    # On the disk at once: a kill from here on loses neither.
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    with no_file_larger_than(path.stat().st_size + 10):
        assert rows.append({"step": 3}) == f"warning: {path}: File too large; its rows are written when there is room"
        assert rows.append({"step": 4}) is None  # said once
    assert path.read_text().endswith('{"step": 3')
    assert rows.append({"step": 5}) is None
    rows.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_preview_that_cannot_be_written_does_not_end_training(features, tmp_path, run_loop, capsys):
    config, output = write_config(tmp_path / "Tiny.json"), tmp_path / "out"
    run_loop("trainer", loop_arguments("trainer", config=config, features=features, output=output, steps=1))
    (output / "images").write_text("in the way")
    arguments = loop_arguments("trainer", config=config, features=features, output=output, steps=2)
    arguments += ["--image_logging_steps=2", "--num_inference_steps=2"]
    run_loop("trainer", [*arguments, f"--vae_name_or_path={ROOT / 'assets/digits_vae'}"])
    assert f"warning: {output}/images/0000002.png is not saved: " in capsys.readouterr().out
    assert (output / "checkpoint-2").is_dir() and (output / "images").read_text() == "in the way"


def test_streams_that_take_nothing_end_no_run(features, tmp_path):
    """stdout and stderr on a full disk, as a launcher's logs may be; the reader of a pipe gone is the same error."""
    arguments = loop_arguments(
        "notrainer", config=write_config(tmp_path / "Tiny.json"), features=features, output=tmp_path / "out", steps=4
    )
    arguments.remove("--disable_tqdm=True")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "train_image_generation_notrainer.py", *arguments, "--ckpt_every=2"],
            cwd=ROOT,
            env=command_environment(),
            stdout=full,
            stderr=full,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0
    assert pick_checkpoint(tmp_path / "out").endswith("0000004")
