"""Exact resume: an interrupted run ends with every bit that the unbroken one has, and reads no sample twice."""

import json
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle.amp import grad_scaler
from support.device import either
from support.feature_sets import write_set
from support.runs import (
    LOOPS,
    ROOT,
    checkpoint_path,
    launch_loops,
    loop_arguments,
    read_losses,
    read_metrics,
    resume_flag,
    run_in_process,
    write_config,
    write_features,
)

from features.dataset import FeatureDataset
from features.order import MicroBatchSampler
from features.packed import PackedStore
from features.pairs import NpyReader
from objectives import DiffusionObjective
from runtime.precision import Precision
from tools.pack_features import main as pack
from training.checkpoints.saver import CheckpointSaver
from weights.files import safe_load

EPOCH, STEPS = 5, 10  # steps of 8 samples, 40 in an epoch beside 8 held-out ones
MIDDLE = 3

# Everything that a run can draw, learn or keep: posterior samples and flips, label dropout, a timestep sampler that
# learns, an EMA that warms up, clipping, a schedule.
CONFIG = {
    "objective": {"timestep_sampler": "loss-second-moment", "diffusion_steps": 21},
    "ema_warmup": True,
    "max_grad_norm": 0.3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
}
# And what happens between the steps.
BETWEEN = ["--flip", "--posterior=sample", "--validation_samples=8", "--validation_steps=2"]
BETWEEN += ["--image_logging_steps=4", "--num_inference_steps=2", f"--vae_name_or_path={ROOT / 'assets/digits_vae'}"]


def workers_flag(loop, workers):
    return f"--{'num_workers' if loop == 'notrainer' else 'dataloader_num_workers'}={workers}"


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """48 means and standard deviations with mirrored twins."""
    folder = tmp_path_factory.mktemp("moments")
    write_set(folder, 48, flip=True, moments=True)
    return folder


@pytest.fixture(scope="module")
def unbroken(moments, tmp_path_factory):
    """`{loop: output}` of runs that were never interrupted, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(folder / "Tiny.json", **CONFIG)
    outputs = {"config": config}
    for loop in LOOPS:
        outputs[loop] = folder / loop
        arguments = loop_arguments(
            loop, config=config, features=moments, output=outputs[loop], steps=STEPS, accumulation=2, save_every=1
        )
        run_in_process(loop, [*arguments, *BETWEEN])
    return outputs


def files(loop, output, step=STEPS):
    """The contents of a checkpoint by file; generators and all are in `trainer_state.json`."""
    folder = checkpoint_path(loop, output, step)
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("manifest.json", "config.json")
    }


def assert_same_checkpoint(loop, output, source, other):
    """Every bit of the last checkpoints of two runs on a CPU; on a GPU their weights, as near as its sums allow."""
    either(assert_same_files, assert_near_weights)(loop, output, source, other)


def assert_same_files(loop, output, source, other):
    assert files(loop, output) == files(source, other)


def assert_near_weights(loop, output, source, other):
    for name in ("model_state.pdparams", "ema_state.pdparams"):
        one, two = (safe_load(checkpoint_path(*run, STEPS) / name) for run in ((loop, output), (source, other)))
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_allclose(one[key], two[key], atol=5e-3, err_msg=key)


def near(values):
    """What equals `{step: value}`, to the bit on a CPU."""
    return pytest.approx(values, rel=either(0, 1e-3), abs=0)


def scramble():
    """Whatever a new process would find in its generators."""
    for number, seed in enumerate((random.seed, np.random.seed, paddle.seed)):
        seed(12345 + number)


def validations(folder):
    (path,) = Path(folder).rglob("validation.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


CASES = [(source, loop, MIDDLE, 0) for source in LOOPS for loop in LOOPS] + [(loop, loop, EPOCH, 2) for loop in LOOPS]


@pytest.mark.gpu
@pytest.mark.parametrize(("source", "loop", "step", "workers"), CASES)
def test_every_bit_is_that_of_the_unbroken_run(unbroken, moments, tmp_path, run_loop, source, loop, step, workers):
    arguments = loop_arguments(
        loop, config=unbroken["config"], features=moments, output=tmp_path / "out", steps=STEPS, accumulation=2
    )
    scramble()
    begun = checkpoint_path(source, unbroken[source], step)
    run_loop(loop, [*arguments, *BETWEEN, workers_flag(loop, workers), resume_flag(loop, begun)])
    assert_same_checkpoint(loop, tmp_path / "out", source, unbroken[source])
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        expected = read_metrics(unbroken[source], key)
        assert read_metrics(tmp_path / "out", key) == near({at: expected[at] for at in range(step + 1, STEPS + 1)})
    mine, theirs = (validations(folder) for folder in (tmp_path / "out", unbroken[source]))
    rows = [row for row in theirs if row["step"] > step]
    assert mine == [near(row) for row in rows] and len(rows) >= 3


def test_the_unbroken_runs_used_what_they_should(unbroken, moments):
    """What the test above holds equal is there: each option changes the losses, each state changes between steps."""
    state = json.loads(files("trainer", unbroken["trainer"])["trainer_state.json"])
    assert state["ema_updates"] == STEPS and state["samples_seen"] == 80 and state["num_samples"] == 40
    assert state["random"]["python"] and state["random"]["numpy"]
    assert len(set(read_metrics(unbroken["trainer"], "learning_rate").values())) == STEPS - 1  # 5e-4 twice
    before, after = (files("trainer", unbroken["trainer"], step) for step in (MIDDLE, STEPS))
    assert {name for name in after if before[name] == after[name]} == set()
    assert set(after) == {"model_state.pdparams", "ema_state.pdparams", "optimizer.pdopt", "objective.pdparams"} | {
        "trainer_state.json"
    }
    assert len(list(Path(unbroken["trainer"]).rglob("images/*.png"))) == 2


def test_restarted_after_every_step_by_the_other_loop(unbroken, moments, tmp_path, run_loop, monkeypatch):
    """Ten processes' worth of a run: each does one step."""

    class Interrupted(Exception):
        pass

    save = CheckpointSaver.save

    def save_and_die(self, folder):
        save(self, folder)
        self.finish()
        raise Interrupted

    monkeypatch.setattr(CheckpointSaver, "save", save_and_die)
    begun = None
    for step in range(1, STEPS + 1):
        turn = LOOPS[step % 2]
        arguments = loop_arguments(
            turn,
            config=unbroken["config"],
            features=moments,
            output=tmp_path / str(step),
            steps=STEPS,
            accumulation=2,
            save_every=1,
        )
        extra = [resume_flag(turn, begun)] if begun else []
        with pytest.raises(Interrupted):
            run_loop(turn, [*arguments, *BETWEEN[:2], "--validation_samples=8", *extra])
        begun = checkpoint_path(turn, tmp_path / str(step), step)
    mine, theirs = files(turn, tmp_path / str(STEPS)), files(turn, unbroken[turn])
    assert mine == theirs


@pytest.mark.parametrize(("loop", "workers"), [("trainer", 0), ("notrainer", 2)])
def test_generators_go_on_where_they_were(unbroken, moments, tmp_path, run_loop, monkeypatch, loop, workers):
    """What code of one's own would draw in a step, from Python's, numpy's and Paddle's generators."""
    drawn, end_step = [], DiffusionObjective.end_step

    def draw(self):
        drawn.append((random.random(), np.random.rand(), float(paddle.rand([1]))))
        end_step(self)

    monkeypatch.setattr(DiffusionObjective, "end_step", draw)
    arguments = loop_arguments(
        loop, config=unbroken["config"], features=moments, output=tmp_path / "out", steps=6, save_every=2
    )
    arguments.append(workers_flag(loop, workers))
    run_loop(loop, arguments)
    whole = drawn.copy()
    assert len(set(whole)) == 6
    drawn.clear()
    scramble()
    begun = checkpoint_path(loop, tmp_path / "out", 2)
    run_loop(
        loop,
        [*arguments, f"--{'results' if loop == 'notrainer' else 'output'}_dir={tmp_path / 'again'}"]
        + [resume_flag(loop, begun)],
    )
    assert drawn == whole[2:]


@pytest.mark.paddle26
def test_a_loss_scaler_goes_on_as_it_was(unbroken, moments, tmp_path, run_loop, monkeypatch):
    """Paddle's own, which it switches off on a CPU: here it doubles its scale every other step."""
    made = []

    place = SimpleNamespace(is_gpu_place=lambda: True)

    def scaler(self):
        with monkeypatch.context() as patch:
            patch.setattr(grad_scaler, "_dygraph_tracer", lambda: SimpleNamespace(_expected_place=place))
            made.append(paddle.amp.GradScaler(init_loss_scaling=1024.0, incr_every_n_steps=2))
        return made[-1]

    monkeypatch.setattr(Precision, "scaler", scaler)
    arguments = loop_arguments(
        "notrainer", config=unbroken["config"], features=moments, output=tmp_path / "out", steps=8, save_every=1
    )
    run_loop("notrainer", arguments)
    assert made[0].state_dict()["scale"] == [1024.0 * 2**4]
    for step in (3, 4):  # between two doublings, and just after one
        begun = checkpoint_path("notrainer", tmp_path / "out", step)
        run_loop("notrainer", [*arguments, f"--results_dir={tmp_path / str(step)}", f"--resume={begun}"])
        assert files("notrainer", tmp_path / str(step), 8) == files("notrainer", tmp_path / "out", 8)
        assert made[-1].state_dict() == made[0].state_dict()


# What is read.


def record_reads(monkeypatch, path):
    """Every file of a pair that is opened and every row of a packed set adds a line to `path`, in any process."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    call, read = NpyReader.__call__, PackedStore.read

    def opened(self, file):
        os.write(log, f"{file}\n".encode())
        return call(self, file)

    def rows(self, indices, *arguments):
        os.write(log, "".join(f"{index}\n" for index in indices).encode())
        return read(self, indices, *arguments)

    monkeypatch.setattr(NpyReader, "__call__", opened)
    monkeypatch.setattr(PackedStore, "read", rows)


@pytest.mark.parametrize(
    ("kind", "loop", "workers"),
    [("pairs", "trainer", 0), ("pairs", "notrainer", 2), ("packed", "trainer", 2), ("packed", "notrainer", 0)],
)
def test_samples_that_a_resume_skips_are_not_read(features, tmp_path, run_loop, monkeypatch, kind, loop, workers):
    place = features
    if kind == "packed":
        place = tmp_path / "packed"
        pack(["--feature_path", str(features), "--output", str(place)])
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(
        loop, config=config, features=place, output=tmp_path / "out", steps=STEPS, save_every=MIDDLE
    )
    arguments.append(workers_flag(loop, workers))
    run_loop(loop, arguments)
    reads = tmp_path / "reads"
    record_reads(monkeypatch, reads)
    FeatureDataset(place, resolution=64, sample_shape=(4, 8, 8), num_classes=10)
    start = len(reads.read_text().splitlines())  # the first sample, to look at its shape
    reads.write_text("")
    begun = checkpoint_path(loop, tmp_path / "out", MIDDLE)
    output = f"--{'results' if loop == 'notrainer' else 'output'}_dir={tmp_path / 'again'}"
    run_loop(loop, [*arguments, output, resume_flag(loop, begun)])
    samples = (STEPS - MIDDLE) * 8
    lines = reads.read_text().splitlines()
    assert len(lines) == start + samples * (2 if kind == "pairs" else 1)
    order = MicroBatchSampler(
        40, global_batch_size=8, accumulation_steps=1, rank=0, world_size=1, seed=0, last_step=STEPS
    )
    expected = sum(list(order)[MIDDLE:], [])
    latents = [int(Path(line).stem) for line in lines[start:] if "_labels" not in line]
    assert sorted(latents) == sorted(expected) if workers else latents == expected


# Another number of ranks, another batch.


def taken(worlds, batch, accumulation, *, steps, seen=0, num_samples=60):
    """The samples that all ranks of a run take, in the order of the stream, and how many there were then."""
    ranks = []
    for rank in range(worlds):
        order = MicroBatchSampler(
            num_samples,
            global_batch_size=batch,
            accumulation_steps=accumulation,
            rank=rank,
            world_size=worlds,
            seed=0,
            last_step=7 + steps,
        )
        order.resume(7, seen)
        ranks.append(list(order))
        assert len(order) == len(ranks[-1]) == steps * accumulation
    parts = [ranks[rank][number] for number in range(steps * accumulation) for rank in range(worlds)]
    return sum(parts, []), order.samples_seen(7 + steps)


@pytest.mark.parametrize("before", [(1, 12, 1), (2, 12, 3), (4, 8, 2)], ids=str)
@pytest.mark.parametrize("after", [(1, 12, 2), (2, 12, 1), (2, 20, 5), (3, 6, 1), (4, 16, 1)], ids=str)
def test_no_sample_of_an_epoch_twice_or_missed_on_other_ranks(before, after):
    first, seen = taken(*before, steps=4)
    assert 0 < seen == len(first) < 60
    second, _ = taken(*after, steps=180 // after[1], seen=seen)
    stream = [*first, *second]
    for epoch in range(len(stream) // 60):
        assert sorted(stream[60 * epoch : 60 * (epoch + 1)]) == list(range(60)), epoch
    assert len(stream) // 60 >= 3


def test_an_epoch_ends_with_another_batch_size(features, tmp_path, run_loop, monkeypatch, loop="trainer"):
    """Three steps of 8, then four of 4: each of the 40 samples once; and on in the next epoch."""
    reads, read = [], FeatureDataset.read

    def recorded(self, indices, positions=None):
        if positions is not None:
            reads.extend(np.asarray(indices).tolist())
        return read(self, indices, positions)

    monkeypatch.setattr(FeatureDataset, "read", recorded)
    run = {"config": write_config(tmp_path / "Tiny.json"), "features": features, "output": tmp_path / "out"}
    run_loop(loop, loop_arguments(loop, **run, steps=3))
    run_loop(loop, [*loop_arguments(loop, **run, steps=8, batch=4), resume_flag(loop, "auto")])
    assert sorted(reads[:40]) == list(range(40)) and len(reads) == 44
    state = json.loads(files(loop, tmp_path / "out", 8)["trainer_state.json"])
    assert (state["global_step"], state["samples_seen"], state["epoch"]) == (8, 44, 1.1)


def test_epochs_are_counted_on_with_another_batch_and_another_set(tmp_path, run_loop, capsys, loop="notrainer"):
    config = write_config(tmp_path / "Tiny.json", lr_scheduler_type="linear")
    run = {"config": config, "features": write_features(tmp_path / "features"), "output": tmp_path / "out"}

    def train(epochs, *more, **batches):
        flag = "--epochs" if loop == "notrainer" else "--num_train_epochs"
        flags = [f"{flag}={epochs}", resume_flag(loop, "auto"), *more]
        run_loop(loop, [*loop_arguments(loop, **run, steps=-1, save_every=1000, **batches), *flags])

    def state(step):
        entries = json.loads(files(loop, tmp_path / "out", step)["trainer_state.json"])
        return entries["samples_seen"], entries["epoch"]

    train(2)  # 10 steps of 8
    assert state(10) == (80, 2.0)
    train(3, batch=16)  # 2 more: the last 8 samples are no whole batch
    assert state(12) == (112, 2.8)
    rates = read_metrics(tmp_path / "out", "learning_rate")
    assert [rates[11], rates[12]] == pytest.approx([1e-3 * 2 / 12, 1e-3 * 1 / 12])
    train(4, batch=4, accumulation=2)
    assert state(24) == (160, 4.0)
    train(4, batch=16)
    assert "nothing to do: step 24 of 24 is reached" in capsys.readouterr().out
    write_features(tmp_path / "features", count=60)
    train(4)  # 240 samples now
    assert state(34) == (240, 4.0)
    train(6, "--max_steps=35")  # as it stands
    assert state(35) == (248, 248 / 60)


@pytest.fixture(scope="module")
def on_two_ranks(unbroken, moments, tmp_path_factory):
    """What one process began, resumed by two: `{name: output}`, of one launch."""
    folder = tmp_path_factory.mktemp("two-ranks")
    runs, outputs = [], {}
    for name, loop, source, step, extra in (
        ("trainer, sharded", "trainer", "notrainer", MIDDLE, ["--sharding=stage2", workers_flag("trainer", 2)]),
        ("hand-written", "notrainer", "trainer", EPOCH, []),
    ):
        outputs[name] = (loop, folder / name.replace(", ", "-"), step)
        arguments = loop_arguments(
            loop,
            config=unbroken["config"],
            features=moments,
            output=outputs[name][1],
            steps=STEPS,
            accumulation=2,
            ranks=2,
        )
        runs.append(
            [loop, [*arguments, *BETWEEN, *extra, resume_flag(loop, checkpoint_path(source, unbroken[source], step))]]
        )
    launch_loops(2, runs, folder / "launch")
    return outputs


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["trainer, sharded", "hand-written"])
def test_two_ranks_go_on_with_what_one_began(unbroken, on_two_ranks, name):
    loop, output, step = on_two_ranks[name]
    expected, losses = read_losses(unbroken[loop]), read_losses(output)
    assert list(losses) == list(range(step + 1, STEPS + 1))
    for at, loss in losses.items():
        assert loss == pytest.approx(expected[at], rel=1e-5)
    mine, theirs = (json.loads(files(loop, folder)["trainer_state.json"]) for folder in (output, unbroken[loop]))
    assert mine["world_size"] == 2 and mine["samples_seen"] == theirs["samples_seen"] == 80


def test_two_runs_are_put_aside_in_the_same_second(features, tmp_path, run_loop, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "previous-now")
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments("trainer", config=config, features=features, output=tmp_path / "out", steps=1)
    for seed in (1, 2, 3):
        run_loop("trainer", [*arguments, "--overwrite_output_dir=True", f"--seed={seed}"])
    folders = [tmp_path / "out" / name for name in ("previous-now", "previous-now-2", "")]
    assert len({(folder / "checkpoint-1/model_state.pdparams").read_bytes() for folder in folders}) == 3


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_that_is_over_clears_what_a_kill_left(features, tmp_path, run_loop, capsys, loop):
    """Killed when the last checkpoint was saved and an old one on its way out: no save comes after that."""
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / "out", steps=2)
    run_loop(loop, arguments)
    last = checkpoint_path(loop, tmp_path / "out", 2)
    left = last.parent / ".checkpoint-1.partial"
    left.mkdir()
    (left / "model_state.pdparams").write_bytes(b"half")
    run_loop(loop, [*arguments, resume_flag(loop, "auto")])
    assert "nothing to do: step 2 of 2 is reached" in capsys.readouterr().out
    assert not left.exists() and last.is_dir()
