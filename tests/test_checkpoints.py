"""Checkpoints are all or nothing: kills while saving, damaged files, rotation, file systems that refuse."""

import json
import os
import re
import shutil
import signal
import threading
from types import SimpleNamespace

import pytest
from support.kills import kill_at_operation
from support.runs import checkpoint_path, loop_arguments, read_losses, write_config

from runtime import files as manifest
from runtime.paddle_private import master_weights
from runtime.process import SAVING_THREAD
from training.checkpoints import find
from training.checkpoints.find import pick_checkpoint
from training.checkpoints.read import load_checkpoint
from training.checkpoints.saver import rotate_checkpoints
from training.checkpoints.state import restore_model, restore_training
from weights.runs import damage, find_checkpoints, list_checkpoints, step_of

LOOPS = ["trainer", "notrainer"]
FILES = ["config.json", "model_state.pdparams", "ema_state.pdparams", "optimizer.pdopt", "trainer_state.json"]


@pytest.fixture(scope="module")
def saved(features, tmp_path_factory):
    """`{loop: output folder}` of finished runs of 6 steps with checkpoints at 2, 4 and 6: never written to."""
    from support.runs import run_in_process

    outputs = {}
    for loop in LOOPS:
        folder = tmp_path_factory.mktemp(loop)
        outputs[loop] = folder / "out"
        run_in_process(loop, arguments_of(loop, folder, features))
    return outputs


def arguments_of(loop, folder, features, steps=6):
    config = write_config(folder / "Tiny.json")
    return loop_arguments(
        loop, config=config, features=features, output=folder / "out", steps=steps, batch=2, save_every=2
    )


@pytest.fixture(params=LOOPS)
def run(request, saved, features, tmp_path, run_loop):
    """A copy of one loop's finished run."""
    return Run(request.param, saved, features, tmp_path, run_loop)


@pytest.fixture
def trainer_run(saved, features, tmp_path, run_loop):
    return Run("trainer", saved, features, tmp_path, run_loop)


class Run:
    def __init__(self, loop, saved, features, folder, run_loop):
        self.loop, self.output, self.run_loop = loop, folder / "out", run_loop
        shutil.copytree(saved[loop], self.output)
        self.arguments = arguments_of(loop, folder, features)
        self.expected = read_losses(saved[loop])

    def at(self, step):
        return checkpoint_path(self.loop, self.output, step)

    def steps(self):
        """The steps that checkpoints are listed of."""
        return [step_of(path) for path in find_checkpoints(self.output)]

    def resume(self, path="auto"):
        flag = "--resume" if self.loop == "notrainer" else "--resume_from_checkpoint"
        self.run_loop(self.loop, [*self.arguments, f"{flag}={path}"])


def flip_bit(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


# Which one is resumed.


@pytest.mark.parametrize(
    ("harm", "name", "reason"),
    [
        (flip_bit, "optimizer.pdopt", "optimizer.pdopt is damaged"),
        (truncate, "ema_state.pdparams", r"ema_state.pdparams has [\d,]+ bytes, [\d,]+ were written"),
        (os.unlink, "trainer_state.json", "trainer_state.json is missing"),
        (os.unlink, "manifest.json", "it has no manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(trainer_run, harm, name, reason, capsys):
    run = trainer_run
    harm(run.at(6) / name)
    capsys.readouterr()
    run.resume()
    out = capsys.readouterr().out
    assert re.search(rf"note: checkpoint \S+6 is passed over: {reason}", out), out
    assert f"resumed {run.at(4)} at step 4" in out
    # Steps 5 and 6 were done again, in the same place, with the same losses; checkpoint 6 is whole again.
    assert read_losses(run.output) == run.expected
    assert pick_checkpoint(run.output) == str(run.at(6))


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_any_flipped_bit_is_found(trainer_run, name):
    whole = (trainer_run.at(6) / name).read_bytes()
    for where in (0, 0.3, 0.7, 0.9999):
        flip_bit(trainer_run.at(6) / name, where)
        assert pick_checkpoint(trainer_run.output) == str(trainer_run.at(4)), where
        (trainer_run.at(6) / name).write_bytes(whole)
    assert pick_checkpoint(trainer_run.output) == str(trainer_run.at(6))


def test_a_damaged_checkpoint_that_is_named_is_refused(run):
    flip_bit(run.at(4) / "model_state.pdparams")
    before = sorted(path.name for path in run.at(4).parent.iterdir())
    with pytest.raises(ValueError, match="model_state.pdparams is damaged: .*; resume another one") as error:
        run.resume(run.at(4))
    assert str(run.at(4)) in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in run.at(4).parent.iterdir()) == before


def test_no_whole_checkpoint_is_no_reason_to_start_anew(trainer_run):
    run = trainer_run
    for step in (2, 4, 6):
        truncate(run.at(step) / "optimizer.pdopt")
    with pytest.raises(ValueError, match=r"none of its 3 checkpoint\(s\) is known to be whole; the newest is .*6: opt"):
        run.resume()
    assert read_losses(run.output) == run.expected and run.steps() == [6, 4, 2]


def test_checkpoints_of_before_manifests(run, capsys):
    for step in (2, 4, 6):
        (run.at(step) / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match="has no manifest.json; one without a manifest.json can be resumed by its own path"
    ):
        run.resume()
    run.arguments = [*run.arguments, "--max_steps=8"]
    run.resume(run.at(6))
    out = capsys.readouterr().out
    assert f"note: {run.at(6)} has no manifest.json" in out and f"resumed {run.at(6)} at step 6" in out
    assert run.steps() == [8, 6, 4, 2]
    assert pick_checkpoint(run.output) == str(run.at(8))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"files": {}}',
        '{"files": [1]}',
        '{"files": {"config.json": {}}}',
        '{"files": {"../x": {"size": 1, "sha256": ""}}}',
    ],
)
def test_a_manifest_that_says_little_is_not_believed(trainer_run, text, capsys):
    (trainer_run.at(6) / "manifest.json").write_text(text)
    assert pick_checkpoint(trainer_run.output) == str(trainer_run.at(4))
    assert "its manifest.json is damaged" in capsys.readouterr().out


def test_weights_are_read_with_and_without_a_manifest(trainer_run):
    from weights.source import read_weights

    _, file = read_weights(trainer_run.at(6))
    (trainer_run.at(6) / "manifest.json").unlink()
    assert read_weights(trainer_run.at(6))[1] == file == str(trainer_run.at(6) / "ema_state.pdparams")


# Rotation.


def test_rotation_counts_whole_checkpoints_only(trainer_run):
    truncate(trainer_run.at(6) / "optimizer.pdopt")
    rotate_checkpoints(trainer_run.output, 2)
    assert trainer_run.steps() == [6, 4, 2]
    rotate_checkpoints(trainer_run.output, 1)
    assert trainer_run.steps() == [6, 4]
    truncate(trainer_run.at(4) / "optimizer.pdopt")
    rotate_checkpoints(trainer_run.output, 1)
    assert trainer_run.steps() == [6, 4]


def test_rotation_takes_away_what_is_older_than_the_whole_ones(trainer_run):
    run = trainer_run
    (run.at(2) / "manifest.json").unlink()  # of before manifests
    truncate(run.at(4) / "optimizer.pdopt")
    run.arguments = [*run.arguments, "--max_steps=8", "--save_total_limit=2"]
    run.resume()
    assert run.steps() == [8, 6]
    assert not list(run.at(8).parent.glob(".*"))


# Kills.


def write_folder(folder, value):
    writer = manifest.FolderWriter(folder)
    for name in FILES:
        with writer.open(name) as file:
            file.write(value)
    writer.finish()


@pytest.mark.parametrize("step", [4, 6], ids=["replaced", "new"])
def test_killed_at_every_operation_of_a_save(tmp_path, step, monkeypatch):
    """Whenever a process is killed, the newest whole checkpoint is the one before or the new one, never less."""
    kills = 0
    while True:
        place = tmp_path / str(kills)
        for earlier in (2, 4):
            write_folder(place / f"checkpoint-{earlier}", b"old")
        child = os.fork()
        if not child:
            kill_at_operation(kills, monkeypatch)
            write_folder(place / f"checkpoint-{step}", b"new")
            rotate_checkpoints(place, 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        picked = pick_checkpoint(place)
        value = open(os.path.join(picked, "config.json"), "rb").read()
        assert (picked.rsplit("-")[-1], value) in {("4", b"old"), (str(step), b"new")}, kills
        # The next save leaves nothing behind but whole folders.
        write_folder(place / "checkpoint-8", b"next")
        assert not list(place.glob(".*"))
        assert all(damage(path, checksums=True) is None for path in list_checkpoints(place))
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    assert kills > 20 and value == b"new"


# File systems that refuse.


def fail_while(monkeypatch, condition):
    """Writing a checkpoint's file of which `condition(path)` holds meets a full disk."""
    write = manifest.HashedFile.write

    def full(self, data):
        if condition(self.file.name):
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(manifest.HashedFile, "write", full)


def test_a_full_disk_does_not_end_training(run, monkeypatch, capsys):
    run.arguments = [*run.arguments, "--max_steps=10"]
    fail_while(monkeypatch, lambda path: "8.partial/ema_state" in path)
    run.resume()
    out = capsys.readouterr().out
    assert out.count("8 is not saved: ") == out.count("ema_state.pdparams: No space left on device; training goes") == 1
    assert run.steps() == [10, 6, 4, 2]
    assert not list(run.at(6).parent.glob(".*"))  # the room is given back at once


def test_a_last_save_that_fails_is_an_error(trainer_run, monkeypatch):
    run = trainer_run
    run.arguments = [*run.arguments, "--max_steps=8"]
    fail_while(monkeypatch, lambda path: "8.partial/trainer_state" in path)
    with pytest.raises(OSError, match="No space left on device"):
        run.resume()
    assert run.steps() == [6, 4, 2]


def test_a_save_that_fails_leaves_the_one_it_would_replace(trainer_run, monkeypatch):
    place = trainer_run.at(6)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error", source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    writer = manifest.FolderWriter(place)
    with pytest.raises(OSError, match="Input/output"):
        writer.finish()
    writer.discard()
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert json.loads(before["manifest.json"])["files"].keys() == set(FILES)


# In the background.


def weights_at(run, step):
    return {name: (run.at(step) / name).read_bytes() for name in FILES if name != "trainer_state.json"}


def test_training_goes_on_while_a_checkpoint_is_written(run, monkeypatch, capsys):
    """A disk that takes nothing of step 8 until the step after it is done: what is saved is still step 8's."""
    from training.metrics import TrainingLog

    run.arguments = [*run.arguments, "--max_steps=10"]
    run.resume()
    expected = weights_at(run, 8)
    for step in (8, 10):
        shutil.rmtree(run.at(step))
    later, writers = threading.Event(), []
    write, step_done = manifest.HashedFile.write, TrainingLog.step_done

    def slow(self, data):
        if "8.partial" in self.file.name:
            assert later.wait(timeout=60), "training waits for the disk"
        return write(self, data)

    def tell(self, step):
        done = step_done(self, step)
        writers.append([thread.name for thread in threading.enumerate()].count(SAVING_THREAD))
        if step == 9:
            later.set()
        return done

    monkeypatch.setattr(manifest.HashedFile, "write", slow)
    monkeypatch.setattr(TrainingLog, "step_done", tell)
    capsys.readouterr()
    run.resume()
    assert writers[2] == 1 and max(writers) == 1  # steps 7, 8, 9, 10
    assert weights_at(run, 8) == expected
    assert pick_checkpoint(run.output) == str(run.at(10))
    assert read_losses(run.output).keys() == set(range(1, 11))
    out = capsys.readouterr().out
    assert f"saved {run.at(8)}" in out and f"saved {run.at(10)}" in out


def test_training_waits_for_the_disk_if_it_is_told_to_or_lacks_memory(trainer_run, monkeypatch, capsys):
    run, threads = trainer_run, set()
    write = manifest.HashedFile.write

    def note_thread(self, data):
        threads.add(threading.current_thread().name)
        return write(self, data)

    monkeypatch.setattr(manifest.HashedFile, "write", note_thread)
    run.arguments = [*run.arguments, "--max_steps=8"]
    run.resume()
    assert threads == {SAVING_THREAD}
    run.arguments += ["--max_steps=10", "--async_save=False"]
    threads.clear()
    run.resume()
    assert threads == {"MainThread"}
    run.arguments += ["--max_steps=12", "--async_save=True"]
    monkeypatch.setattr("training.checkpoints.background.available_memory", lambda: 1000)
    threads.clear()
    capsys.readouterr()
    run.resume()
    assert threads == {"MainThread"}
    assert "training waits while they are written" in capsys.readouterr().out
    assert run.steps() == [12, 10, 8, 6, 4, 2]


@pytest.mark.parametrize("loop", LOOPS)
def test_weights_are_given_back_before_the_optimizer_is_read(loop, saved, features, tmp_path, run_loop, monkeypatch):
    """The host has them beside the largest file of a checkpoint only where master weights may need them."""
    held, read = [], find.Checkpoint.optimizer.fget
    monkeypatch.setattr(find.Checkpoint, "optimizer", property(lambda self: held.append(len(self.model)) or read(self)))
    flag = "--resume" if loop == "notrainer" else "--resume_from_checkpoint"
    run_loop(loop, [*arguments_of(loop, tmp_path, features), f"{flag}={checkpoint_path(loop, saved[loop], 4)}"])
    assert held == [0]
    losses = read_losses(saved[loop])
    assert read_losses(tmp_path / "out") == {step: losses[step] for step in (5, 6)}


def test_master_weights_that_a_checkpoint_lacks_are_its_weights(saved):
    """A run in half precision (AMP O2) that goes on from a float32 run."""
    from objectives import build_objective
    from training import setup
    from training.optimizer import build_lr_scheduler, build_optimizer

    checkpoint = load_checkpoint(checkpoint_path("trainer", saved["trainer"], 4))
    config, weights = checkpoint.config, dict(checkpoint.model)
    model = setup.build_network(config)
    restore_model(checkpoint, model)
    model.bfloat16()
    schedule = build_lr_scheduler(config["training"], 6)
    optimizer = build_optimizer(model, config["training"], schedule, multi_precision=True)
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule, "scaler": None}
    restore_training(checkpoint, SimpleNamespace(**parts, objective=build_objective(config)))
    masters = master_weights(optimizer)
    trained = {name: parameter for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    assert len(masters) == len(trained) > 0
    for name, parameter in trained.items():
        assert (masters[parameter.name].numpy() == weights[name]).all()
