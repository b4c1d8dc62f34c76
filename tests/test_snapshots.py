"""Profiles of post-hoc EMA in both loops: exact averages, and snapshots that neither kills nor resumes change."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from support.runs import (
    LOOPS,
    ROOT,
    checkpoint_path,
    command_environment,
    loop_arguments,
    resume_flag,
    run_in_process,
    write_config,
)

from config.schema import ineffective_settings, load_config
from runtime import files
from training.averages import PowerFunctionEMA, ema_weights
from training.checkpoints.background import FolderSaver
from training.checkpoints.snapshots import SnapshotSaver, list_snapshots
from training.posthoc_ema import power_function_decay
from weights.files import load_weights, safe_load

STDS, STEPS = [0.05, 0.1], 10
PROFILES = {"ema_profiles": STDS, "ema_snapshot_steps": 4, "ema_snapshot_dtype": "float32"}


def train(loop, features, folder, *extra, config=None, save_every=3, steps=STEPS, **training):
    """Trains into `folder/LOOP`; returns the folder `ema` of the run."""
    config = config or write_config(folder / "Tiny.json", **{**PROFILES, **training})
    arguments = loop_arguments(
        loop, config=config, features=features, output=folder / loop, steps=steps, save_every=save_every
    )
    run_in_process(loop, [*arguments, *extra])
    return snapshots_of(loop, folder)


def snapshots_of(loop, folder):
    return checkpoint_path(loop, folder / loop, STEPS).parents[0 if loop == "trainer" else 1] / "ema"


@pytest.fixture(scope="module")
def runs(features, tmp_path_factory):
    """`{loop: folder "ema"}` of ten steps with a checkpoint after each; "folder": where they are."""
    folder = tmp_path_factory.mktemp("runs")
    return {"folder": folder} | {loop: train(loop, features, folder, save_every=1) for loop in LOOPS}


@pytest.fixture(scope="module")
def weights(runs):
    """The weights after each of the steps."""
    steps = range(1, STEPS + 1)
    return {step: safe_load(checkpoint_path("trainer", runs["folder"] / "trainer", step) / MODEL) for step in steps}


MODEL, EMA_STATE = "model_state.pdparams", "ema_state.pdparams"


def contents(folder):
    """`{path: bytes}` of all that is in a folder, below it too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def averaged(weights, std, steps, start=None):
    """The power-function average in float64 of the weights after these steps, which follow `start`, if any."""
    average, before = start, 0 if start is None else steps[0] - 1
    for step in steps:
        decay = power_function_decay(step, std, step - before)
        average = {
            name: (0 if average is None else decay * average[name]) + (1 - decay) * value.astype("float64")
            for name, value in weights[step].items()
        }
        before = step
    return average


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


# The averages.


def test_snapshots_are_the_averages_of_the_weights_of_every_step(runs, weights):
    found = list_snapshots(runs["trainer"])
    assert [snapshot.step for snapshot in found] == [4, 8, 10]
    for snapshot in found:
        assert list(snapshot.paths) == STDS
        for std, path in snapshot.paths.items():
            state = load_weights(path)
            assert {value.dtype for value in state.values()} == {np.dtype("float32")}
            assert_close(state, averaged(weights, std, range(1, snapshot.step + 1)), 5e-7)
    model = json.loads((runs["trainer"] / "0000004/snapshot.json").read_text())["model"]
    assert model == load_config(runs["folder"] / "Tiny.json")["model"]


def test_both_loops_write_the_same_bytes(runs):
    trainer, notrainer = (contents(runs[loop]) for loop in LOOPS)
    assert trainer == notrainer and len(trainer) == 3 * 4


def test_profiles_change_nothing_else(runs, features, tmp_path):
    train("trainer", features, tmp_path, ema_profiles=[])
    for name in (MODEL, EMA_STATE, "optimizer.pdopt", "trainer_state.json"):
        mine, theirs = (
            (checkpoint_path("trainer", folder / "trainer", STEPS) / name).read_bytes()
            for folder in (tmp_path, runs["folder"])
        )
        if name == "trainer_state.json":
            theirs = re.sub(rb'"ema_updates_std_[\d.]+": 10, ', b"", theirs)
        assert mine == theirs, name
    assert not snapshots_of("trainer", tmp_path).exists()


@pytest.mark.parametrize("ema_on_host", [False, True])
def test_an_update_after_several_steps_is_as_exact(weights, features, tmp_path, ema_on_host):
    """They come every third step, and before a snapshot. The averages may stay on the host, which a CPU is anyway."""
    folder = train("notrainer", features, tmp_path, ema_update_steps=3, ema_on_host=ema_on_host)
    for snapshot in list_snapshots(folder):
        steps = [step for step in (3, 4, 6, 8, 9, 10) if step <= snapshot.step]
        for std, path in snapshot.paths.items():
            assert_close(load_weights(path), averaged(weights, std, steps), 5e-7)


def test_halves_are_the_rounded_averages(runs, features, tmp_path):
    folder = train("trainer", features, tmp_path, ema_snapshot_dtype="float16")
    for half, single in zip(list_snapshots(folder), list_snapshots(runs["trainer"]), strict=True):
        for std in STDS:
            expected = load_weights(single.paths[std])
            for name, value in load_weights(half.paths[std]).items():
                assert value.dtype == np.float16
                np.testing.assert_array_equal(value, expected[name].astype("float16"))


def test_what_float16_can_not_hold_stays_float32(tmp_path):
    config = load_config(write_config(tmp_path / "Tiny.json", **{**PROFILES, "ema_snapshot_dtype": "float16"}))
    said = []
    session = SimpleNamespace(config=config, averages=[], folder=tmp_path)
    saver = SnapshotSaver(session, say=said.append)
    for _ in range(2):
        arrays = {"a": np.float32([1, 7e4]), "b": np.float32([1, 2])}
        state = saver.prepare("std_0.1.safetensors", dict(arrays))
        assert {name: value.dtype.name for name, value in state.items()} == {"a": "float32", "b": "float16"}
        np.testing.assert_array_equal(state["a"], arrays["a"])
    (line,) = said
    assert line.startswith("note: float16 can't hold all values of a ")


def test_a_profile_takes_the_first_weights_over_and_lends_its_own():
    layer = paddle.nn.Linear(2, 3)
    profile = PowerFunctionEMA(layer, 0.1)
    layer.weight.set_value(paddle.full([2, 3], 5.0))
    profile.update(layer)
    assert profile.num_updates == 1 and (profile.state_dict()["weight"] == 5).all()
    layer.weight.set_value(paddle.full([2, 3], 7.0))
    profile.update(layer, step=4)
    expected = 7 - 2 * power_function_decay(4, 0.1, 3)
    np.testing.assert_allclose(profile.state_dict()["weight"], expected, rtol=1e-6)
    with ema_weights(layer, profile):
        np.testing.assert_allclose(layer.weight, expected, rtol=1e-6)
    assert (layer.weight == 7).all()
    with pytest.raises(ValueError, match="delta must be above 0"):
        profile.update(layer, step=4)
    with pytest.raises(ValueError, match="std must be above 0 and at most 0.2887, got 0.3"):
        PowerFunctionEMA(layer, 0.3)


# Resumed and killed.

KILLED = """
import os, signal, sys
from runtime.process import configure_runtime
configure_runtime()
from runtime import files
from verification.tiny_runs import run_in_process
moment, write = sys.argv[1], files.HashedFile.write

def kill(self, data):
    if moment in self.file.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data)

files.HashedFile.write = kill
run_in_process(sys.argv[2], sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("ema/.0000008.partial/std_0.1", ["0000004"]),  # while a snapshot is written
        ("checkpoints/.0000009.partial/model_state", ["0000004", "0000008"]),  # before the next checkpoint
    ],
)
def test_a_killed_and_resumed_run_leaves_the_same_bytes(runs, features, tmp_path, capsys, moment, left):
    loop, output = "notrainer", tmp_path / "notrainer"
    run = {"config": write_config(tmp_path / "Tiny.json", **PROFILES), "features": features, "output": output}
    arguments = loop_arguments(loop, **run, steps=STEPS, save_every=3)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, moment, loop, *map(str, arguments)],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    (ema,) = output.rglob("ema")
    assert sorted(path.name for path in ema.glob("[0-9]*")) == left
    run_in_process(loop, [*arguments, resume_flag(loop, "auto")])
    assert contents(ema) == contents(runs[loop])
    assert sorted(os.listdir(ema)) == ["0000004", "0000008", "0000010"]
    renamed = "renamed 1 snapshot of later steps (8)"
    assert (renamed in capsys.readouterr().out) == ("0000008" in left)


def test_snapshots_of_another_course_are_kept(runs, features, tmp_path, capsys):
    """A run goes back to an earlier step, and on from there with another learning rate, twice."""
    loop, output = "notrainer", tmp_path / "notrainer"
    shutil.copytree(runs["folder"] / loop, output)
    ema = snapshots_of(loop, tmp_path)
    before = contents(ema)

    def go_back(rate):
        for path in output.glob("*/checkpoints/*"):
            if int(path.name) > 5:
                shutil.rmtree(path)
        train(loop, features, tmp_path, "--resume=auto", f"--learning_rate={rate}", save_every=5)

    go_back(2e-3)
    assert "renamed 2 snapshots of later steps (8, 10)" in capsys.readouterr().out
    assert sorted(os.listdir(ema)) == ["0000004", "0000008", "0000008.superseded", "0000010", "0000010.superseded"]
    assert contents(ema / "0000008.superseded").keys() == contents(ema / "0000008").keys()
    for name, value in contents(ema / "0000008.superseded").items():
        assert value == before[f"0000008/{name}"]
    assert [snapshot.step for snapshot in list_snapshots(ema)] == [4, 8, 10]
    go_back(3e-3)
    assert (ema / "0000008.superseded-2").is_dir() and (ema / "0000010.superseded-2").is_dir()
    go_back(1e-3)  # the first course again
    assert {name: value for name, value in contents(ema).items() if "superseded" not in name} == before
    assert sorted(os.listdir(ema))[1:4] == ["0000008", "0000008.superseded-2", "0000008.superseded-3"]


def test_a_run_that_starts_anew_moves_them_aside(runs, features, tmp_path):
    shutil.copytree(runs["folder"] / "trainer", tmp_path / "trainer")
    ema = train("trainer", features, tmp_path, "--overwrite_output_dir=True", ema_profiles=[0.2], steps=4)
    (aside,) = (tmp_path / "trainer").glob("previous-*")
    assert contents(aside / "ema") == contents(runs["trainer"])
    assert sorted(contents(ema)) == [
        f"0000004/{name}" for name in ("manifest.json", "snapshot.json", "std_0.2.safetensors")
    ]


def test_a_profile_begins_where_a_checkpoint_lacks_it(runs, weights, features, tmp_path, capsys):
    begun = checkpoint_path("trainer", runs["folder"] / "trainer", 5)
    stds = [0.05, 0.2]
    folder = train("trainer", features, tmp_path, resume_flag("trainer", begun), ema_profiles=stds, use_ema=False)
    note = f"note: {begun} has no averages of std 0.2: they begin with its weights, at step 5"
    out = capsys.readouterr().out
    assert note in out and "the EMA starts" not in out
    last = list_snapshots(folder)[-1]
    assert_close(load_weights(last.paths[0.2]), averaged(weights, 0.2, range(6, 11), start=weights[5]), 5e-7)
    assert_close(load_weights(last.paths[0.05]), averaged(weights, 0.05, range(1, 11)), 5e-7)
    assert not (checkpoint_path("trainer", tmp_path / "trainer", STEPS) / EMA_STATE).exists()


# What is read, said and refused.


def test_damaged_snapshots_are_passed_over(runs, tmp_path):
    ema, said = tmp_path / "ema", []
    shutil.copytree(runs["trainer"], ema)
    shutil.copytree(ema / "0000004", ema / "0000004.superseded")
    assert [snapshot.step for snapshot in list_snapshots(ema, said.append)] == [4, 8, 10] and not said
    (ema / "0000004/manifest.json").unlink()
    os.truncate(ema / "0000008/std_0.1.safetensors", 100)
    (ema / "0000010/snapshot.json").write_bytes(b" " * (ema / "0000010/snapshot.json").stat().st_size)
    assert list_snapshots(ema, said.append) == list_snapshots(tmp_path / "none") == []
    assert [line.split(": ", 2)[1] for line in said] == [
        f"snapshot {ema / name} is passed over" for name in ("0000004", "0000008", "0000010")
    ]
    assert "has no manifest.json" in said[0] and "std_0.1.safetensors has 100 bytes" in said[1]


def test_the_start_says_how_much_room_they_take(features, tmp_path, capsys, monkeypatch):
    sizes = SimpleNamespace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: sizes)
    train("trainer", features, tmp_path, ema_snapshot_steps=1, steps=2)
    sentence = "0.4 MiB each in float32, 0.8 MiB in all; 1.0 MiB are free there\n"
    place = f"post-hoc EMA (std 0.05, 0.1): 2 snapshots to come in {tmp_path / 'trainer/ema'}, "
    out = capsys.readouterr().out
    assert place + sentence in out
    assert f"tools/reconstruct_ema.py --run {tmp_path / 'trainer'} --std " in out
    sizes.free = 1000
    train("trainer", features, tmp_path, ema_snapshot_steps=1, steps=4)
    out = capsys.readouterr().out
    assert ": 2 snapshots to come in " in out and "0.0 MiB are free there: not enough\n" in out


def test_a_full_disk_costs_a_snapshot_and_not_the_run(features, tmp_path, capsys, monkeypatch):
    write = files.HashedFile.write

    def full(self, data):
        if "ema/.0000004.partial/std_0.1" in self.file.name:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(files.HashedFile, "write", full)
    ema = train("trainer", features, tmp_path)
    out = capsys.readouterr().out
    assert out.count("0000004 is not saved: ") == out.count("No space left on device; training goes on without it") == 1
    assert sorted(os.listdir(ema)) == ["0000008", "0000010"]


def test_a_checkpoint_is_not_finished_before_the_snapshot_of_its_step(features, tmp_path, monkeypatch):
    """Else a kill between the two would cost a snapshot that a resumed run does not write again."""
    finished, finish = [], files.FolderWriter.finish

    def note(self):
        finish(self)
        finished.append(Path(self.partial).name[1:-8])

    slow = files.FolderWriter.write_json

    def wait(self, name, value, indent=2):
        if name == "snapshot.json":
            paddle.matmul(*[paddle.randn([1500, 1500])] * 2)
        slow(self, name, value, indent)

    monkeypatch.setattr(files.FolderWriter, "finish", note)
    monkeypatch.setattr(files.FolderWriter, "write_json", wait)
    train("notrainer", features, tmp_path, save_every=4)
    assert finished == [name for step in (4, 8, 10) for name in [f"{step:07d}"] * 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_says_and_tidies_up(rank, tmp_path, monkeypatch):
    """Where training waits for a save every rank takes part; the others are through before rank 0 has written."""
    lines, done = [], []

    class Saver(FolderSaver):
        def files(self):
            yield "state.json", {}

        def written(self, folder):
            done.append(folder)

    monkeypatch.setattr(paddle.distributed, "get_rank", lambda: rank)
    Saver(None, say=lines.append, background=False).save(str(tmp_path / "one"))
    assert (tmp_path / "one").is_dir() == (rank == 0) and len(done) == len(lines) == 1 - rank


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ema_profiles": 0.05}, "ema_profiles must be a list of different widths above 0 and up to 0.2887, got 0.05"),
        ({"ema_profiles": [0.05, 0.3]}, "ema_profiles must be a list"),
        ({"ema_profiles": [0.05, 0.0]}, "ema_profiles must be a list"),
        ({"ema_profiles": [0.1, 0.10000000001]}, "ema_profiles must be a list of different widths"),
        ({"ema_profiles": [True]}, "ema_profiles must be a list"),
        ({"ema_snapshot_dtype": "bfloat16"}, "ema_snapshot_dtype must be one of float16, float32"),
        ({"ema_snapshot_steps": 0}, "ema_snapshot_steps must be a positive integer"),
        ({"ema_update_steps": 0}, "ema_update_steps must be a positive integer"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, settings, words):
    with pytest.raises(ValueError) as error:
        load_config(write_config(tmp_path / "Tiny.json", **settings))
    assert f"training: {words}" in str(error.value) and "\n" not in str(error.value)


def test_settings_without_profiles_have_no_effect(tmp_path):
    config = load_config(
        write_config(tmp_path / "Tiny.json", **{**PROFILES, "ema_profiles": [], "ema_update_steps": 2})
    )
    names = "ema_snapshot_steps and ema_snapshot_dtype and ema_update_steps"
    assert f"{names} have no effect without ema_profiles" in ineffective_settings(config)
