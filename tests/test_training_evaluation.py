"""Evaluation while training: a curve that leaves the training alone, and the best checkpoint, which is kept."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from support.evaluated import write_program, write_reference
from support.runs import (
    LOOPS,
    ROOT,
    checkpoint_path,
    loop_arguments,
    read_losses,
    run_in_process,
    write_features,
)

import training.evaluation
from config.schema import resolve_config
from evaluation.networks import load_features
from evaluation.run import compute_metrics, extract, load_reference
from features.autoencoder import NotFiniteError
from objectives import build_objective
from runtime.files import FolderWriter
from runtime.process import EXIT_STOPPED
from sampling.generator import load_generator
from sampling.many import choose_labels, draw_images
from training.checkpoints.best import best_checkpoint, is_best, read_best, settle_best
from training.checkpoints.saver import rotate_checkpoints
from training.metrics import TrainingLog
from training.supervision.stopping import Stopping

MODEL = {
    "sample_size": 2,
    "patch_size": 2,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_classes": 4,
}
METRICS = ["kid", "fid", "inception_score", "precision", "recall", "mind"]
VAE = str(ROOT / "assets/digits_vae")
FILES = ("config.json", "model_state.pdparams", "optimizer.pdopt", "trainer_state.json")


def write_checkpoint(folder):
    writer = FolderWriter(folder)
    for name in FILES:
        with writer.open(name) as file:
            file.write(b"content")
    writer.finish()


def write_rows(folder, rows):
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step, num_samples=8, **metrics):
    return {"step": step, **metrics, "num_samples": num_samples, "settings": {"features": "digits"}}


def test_best_json_follows_from_rows_and_whole_checkpoints(tmp_path):
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    rows = [row(1, fid=1.0), row(2, fid=4.0, recall=0.1), row(4, fid=3.0, recall=0.3), row(6, fid=None, recall=0.2)]
    write_rows(tmp_path, [*rows, row(8, fid=3.5, recall=0.2)])

    def best(metric=None):
        settle_best(tmp_path, tmp_path, metric)
        return (read_best(tmp_path) or {}).get("step")

    assert best() is None  # nothing says which metric counts
    assert best("fid") == 4 and best() == 4  # step 1 has no checkpoint, step 6 no number
    held = json.loads((tmp_path / "best.json").read_text())
    assert held == {"step": 4, "checkpoint": "checkpoint-4", "metric": "fid", "value": 3.0, "evaluation": rows[2]}
    assert best("recall") == 4 and best("fid") == 4
    rotate_checkpoints(tmp_path, 1, spared=best_checkpoint(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    (tmp_path / "checkpoint-4/optimizer.pdopt").write_bytes(b"")
    assert best() == 8  # of what is whole
    write_rows(tmp_path, rows)  # a run that was resumed from step 6 has not evaluated step 8 yet
    assert best() is None and not (tmp_path / "best.json").exists()


@pytest.mark.parametrize(("metric", "better", "worse"), [("fid", 2.9, 3.1), ("recall", 0.4, 0.2), ("mind", 0.1, 0.5)])
def test_which_of_two_is_better(tmp_path, metric, better, worse):
    write_checkpoint(tmp_path / "checkpoint-2")
    write_rows(tmp_path, [row(2, fid=3.0, recall=0.3, mind=0.3)])
    settle_best(tmp_path, tmp_path, metric)
    best = read_best(tmp_path)
    assert is_best(row(4, **{metric: better}), metric, best)
    assert not is_best(row(4, **{metric: worse}), metric, best) and not is_best(row(4, **{metric: None}), metric, best)
    assert is_best(row(4, num_samples=9, **{metric: worse}), metric, best)  # they can't be compared


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Features, a program, and a reference of random images, in one folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_features(folder / "features", count=16, shape=(4, 2, 2), num_classes=4)
    write_program(folder / "program")
    write_reference(folder / "reference.npz", side=16)
    return folder


def arguments(place, loop, output, *, kind="SiT", length=5, save_every=None, **evaluation):
    """The flags of a run of `length` steps with these settings of its evaluation; `steps=None`: without."""
    settings = {"steps": 2, "num_samples": 10, "metrics": METRICS, "num_inference_steps": 3, "batch_size": 4}
    settings |= {"reference": str(place / "reference.npz"), "features": str(place / "program"), **evaluation}
    output.mkdir(parents=True, exist_ok=True)
    config = output.parent / f"{output.name}.json"
    training = {"ema_decay": 0.5, "learning_rate": 1e-2}
    config.write_text(json.dumps({"model": {"type": kind, **MODEL}, "training": training, "evaluation": settings}))
    run = {"config": str(config), "features": place / "features", "output": output}
    flags = loop_arguments(loop, **run, steps=length, save_every=save_every)
    return [*map(str, flags), f"--vae_name_or_path={VAE}"]


def read_rows(output):
    (path,) = Path(output).rglob("evaluation.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(output):
    return sorted(int(path.parent.name.split("-")[-1]) for path in Path(output).rglob("model_state.pdparams"))


def find_best(output):
    (path,) = Path(output).rglob("best.json")
    return json.loads(path.read_text()), path.parent


@pytest.fixture(scope="module")
def runs(place):
    """`{loop, or loop-plain: output}` of five steps, evaluated at every second and the last, or never."""
    outputs = {}
    for loop in LOOPS:
        outputs[loop], outputs[f"{loop}-plain"] = place / loop, place / f"{loop}-plain"
        run_in_process(loop, arguments(place, loop, outputs[loop], save_every=2))
        run_in_process(loop, arguments(place, loop, outputs[f"{loop}-plain"], save_every=2, steps=None))
    return outputs


@pytest.mark.parametrize("loop", LOOPS)
def test_losses_are_those_of_a_run_without(runs, loop):
    losses = read_losses(runs[loop])
    assert len(losses) == 5 and losses == read_losses(runs[f"{loop}-plain"])
    for name in ("model_state.pdparams", "ema_state.pdparams", "optimizer.pdopt", "trainer_state.json"):
        ours, theirs = (checkpoint_path(loop, runs[key], 5) / name for key in (loop, f"{loop}-plain"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_both_loops_report_the_same_curve(runs):
    rows = read_rows(runs["trainer"])
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert rows == read_rows(runs["notrainer"])
    assert len({row["fid"] for row in rows}) == 3


def test_settings_name_the_guidance_that_is_no_default(place):
    """So that the rows of a run without it stay comparable, and those of another guidance are not compared."""
    features = {"features": str(place / "program"), "reference": str(place / "reference.npz"), "num_samples": 10}

    def settings(guidance, **evaluation):
        evaluation = {"steps": 2, "metrics": ["kid"], **features, **evaluation}
        config = resolve_config({"model": {"type": "SiT", **MODEL}, "evaluation": evaluation, "guidance": guidance})
        made = training.evaluation.Evaluation(build_objective(config), config, vae=VAE)
        assert made.sampling.items() <= made.settings.items()
        return made.settings

    changed = {"schedule": "linear", "interval": [0.1, 0.9], "timestep_shift": 0.5}
    plain, guided = settings({}), settings({}, guidance_scale=2.0)
    assert not [name for name in plain if "interval" in name or "shift" in name]
    assert settings(changed) == {**plain, "timestep_shift": 0.5}  # nothing is guided
    names = {"guidance_schedule": "linear", "guidance_interval": [0.1, 0.9], "timestep_shift": 0.5}
    assert settings(changed, guidance_scale=2.0) == {**guided, **names}


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_numbers_are_those_of_the_checkpoints_averages(place, tmp_path, run_loop, kind):
    sampling = {"num_inference_steps": 4, "guidance_scale": 1.5}
    run_loop("notrainer", arguments(place, "notrainer", tmp_path / "out", kind=kind, length=2, **sampling))
    (row,) = read_rows(tmp_path / "out")
    generator = load_generator(checkpoint_path("notrainer", tmp_path / "out", 2), vae=VAE)
    labels = choose_labels("random", 10, 4, 0)
    drawn = draw_images(generator, np.arange(10), labels, seed=0, batch_size=10, **sampling)
    network = load_features(str(place / "program"))
    reference = load_reference(str(place / "reference.npz"), network, METRICS, sample_size=(16, 16))
    samples = extract(network, [images for _, images in drawn], metrics=METRICS)
    expected = compute_metrics(samples, reference, METRICS)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert row["num_samples"] == 10 and row["settings"]["reference"] == "reference.npz"


def test_the_curve_is_in_the_log_that_visualdl_shows(runs):
    from visualdl.reader.reader import LogReader

    (path,) = (runs["trainer"] / "tb_log").glob("*.log")
    shown = LogReader(file_path=str(path)).get_data("scalar", "evaluation/fid")
    assert [(record.id, record.value) for record in shown] == [
        (row["step"], pytest.approx(row["fid"], rel=1e-6)) for row in read_rows(runs["trainer"])
    ]


def pretend(monkeypatch, values):
    """The FID of the evaluations to come is these values, in turn."""
    values = iter(values)
    monkeypatch.setattr(training.evaluation, "compute_metrics", lambda *_, **__: {"fid": next(values)})


def test_the_inception_score_needs_no_reference(place, tmp_path, run_loop):
    run_loop(
        "notrainer",
        arguments(place, "notrainer", tmp_path / "out", length=1, reference=None, metrics=["inception_score"]),
    )
    (row,) = read_rows(tmp_path / "out")
    assert 1 <= row["inception_score"] <= 5 and row["settings"]["reference"] is None


@pytest.mark.parametrize("loop", LOOPS)
def test_the_best_checkpoint_is_kept_beyond_the_limit(place, tmp_path, run_loop, loop, monkeypatch, capsys):
    pretend(monkeypatch, [3.0, 1.5, float("nan"), 2.0])
    flags = arguments(place, loop, tmp_path / "out", length=8, save_every=3, metrics=["fid"])
    run_loop(loop, [*flags, "--save_total_limit=1"])
    out = capsys.readouterr().out
    saved = [int(line.split()[1].split("/")[-1].split("-")[-1]) for line in out.splitlines() if line[:6] == "saved "]
    assert saved == [2, 3, 4, 6, 8]  # the first and the better one come on top
    assert steps_of(tmp_path / "out") == [4, 8]
    best, folder = find_best(tmp_path / "out")
    assert (best["step"], best["metric"], best["value"]) == (4, "fid", 1.5)
    assert (folder / best["checkpoint"]).samefile(checkpoint_path(loop, tmp_path / "out", 4))
    assert [row["fid"] for row in read_rows(tmp_path / "out")] == [3.0, 1.5, None, 2.0]
    assert "(step=0000004) Evaluation of 10 samples: fid 1.5000" in out
    assert "note: step 6: fid of its samples is not finite" in out
    assert out.count("note: FID of N = 10 samples") == 1


def test_a_resumed_run_forgets_the_evaluations_of_later_steps(place, runs, tmp_path, run_loop, monkeypatch):
    output = tmp_path / "out"
    pretend(monkeypatch, [3.0, 1.5, 2.0])
    run_loop("trainer", arguments(place, "trainer", output, save_every=1, metrics=["fid"]))
    assert find_best(output)[0]["step"] == 4
    # Without evaluations: the best one so far is kept all the same.
    resume = f"--resume_from_checkpoint={output / 'checkpoint-3'}"
    plain = arguments(place, "trainer", output, length=7, steps=None)
    run_loop("trainer", [*plain, resume, "--save_total_limit=1"])
    assert [row["step"] for row in read_rows(output)] == [2]
    best, _ = find_best(output)
    assert (best["step"], best["value"], best["checkpoint"]) == (2, 3.0, "checkpoint-2")
    assert (output / "checkpoint-2").is_dir() and (output / "checkpoint-7").is_dir()
    assert not (output / "checkpoint-3").exists()
    # Begun anew, the run before is moved aside with all that belongs to it.
    run_loop("trainer", [*arguments(place, "trainer", output, length=1, steps=None), "--overwrite_output_dir=True"])
    assert len(list(output.glob("previous-*/evaluation.jsonl")) + list(output.glob("previous-*/best.json"))) == 2
    assert not (output / "best.json").exists() and not (output / "evaluation.jsonl").exists()


def test_an_evaluation_that_fails_does_not_end_training(place, tmp_path, run_loop, monkeypatch, capsys):
    errors = [NotFiniteError("4 of 4 images hold numbers that are not finite"), MemoryError("Out of memory")]

    def fail(*_, **__):
        raise errors.pop(0)
        yield

    monkeypatch.setattr(training.evaluation, "draw_images", fail)
    run_loop("notrainer", arguments(place, "notrainer", tmp_path / "out", length=3))
    out = capsys.readouterr().out
    assert "note: there is no evaluation of step 2: 4 of 4 images hold numbers that are not finite" in out
    assert "no evaluation of step 3: not enough memory; give the section evaluation a smaller batch_size than 4" in out
    assert len(read_losses(tmp_path / "out")) == 3 and not list(tmp_path.rglob("best.json"))
    assert steps_of(tmp_path / "out") == [3]


def test_a_signal_breaks_an_evaluation_off(place, tmp_path, run_loop, monkeypatch, capsys):
    """It may take longer than the time that a machine gives its jobs to save."""
    labels = []

    def draw(generator, indices, own_labels, **_):
        labels.extend(own_labels.tolist())
        os.kill(os.getpid(), signal.SIGTERM)
        while stoppings[-1].request is None:
            time.sleep(0.01)
        yield indices[:4], np.zeros([4, 16, 16, 3], "uint8")
        raise AssertionError("drew on")

    stoppings, start = [], Stopping.start
    monkeypatch.setattr(Stopping, "start", lambda self, *a, **k: (stoppings.append(self), start(self, *a, **k)))
    monkeypatch.setattr(training.evaluation, "draw_images", draw)
    with pytest.raises(SystemExit) as end:
        run_loop("notrainer", [*arguments(place, "notrainer", tmp_path / "out"), "--classes=1,3"])
    assert end.value.code == EXIT_STOPPED
    assert set(labels) == {1, 3} and len(labels) == 10  # no class that is not trained
    assert "note: there is no evaluation of step 2: the run is asked to stop" in capsys.readouterr().out
    assert steps_of(tmp_path / "out") == [2] and len(read_losses(tmp_path / "out")) == 2


def test_slow_metrics_are_no_hang_and_no_part_of_the_speeds(place, tmp_path, run_loop, monkeypatch):
    phases, pauses, phase = [], [], Stopping.phase
    monkeypatch.setattr(Stopping, "phase", lambda self, name: (phases.append(name), phase(self, name)))
    monkeypatch.setattr(TrainingLog, "pause", lambda self, seconds: pauses.append(seconds))
    monkeypatch.setattr(training.evaluation.Evaluation, "PATIENCE", 0.05)
    monkeypatch.setattr(training.evaluation, "compute_metrics", lambda *_: time.sleep(0.5) or {"fid": 1.0})
    run_loop("notrainer", arguments(place, "notrainer", tmp_path / "out", length=1, metrics=["fid"]))
    assert phases.count("evaluating") >= 8 and max(pauses) > 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reference": "/no/such.npz"}, "/no/such.npz: no such file"),
        ({"features": "/no/such"}, "features /no/such: expected inception, digits, or the path of a program"),
        (
            {"metrics": ["fid", "sfid"]},
            "metrics: sfid is impossible: these features have no output 'spatial'; possible: fid",
        ),
        ({"reference": VAE}, "digits_vae: .*image"),
        ({"num_inference_steps": 1}, "evaluation: num_steps"),
        ({"num_inference_steps": 300, "kind": "DiT"}, "evaluation: --num_inference_steps 300: no integer stride"),
    ],
)
def test_what_is_missing_is_said_before_training(place, tmp_path, run_loop, changed, message):
    with pytest.raises(ValueError, match=message):
        run_loop("notrainer", arguments(place, "notrainer", tmp_path / "out", **changed))
    assert not list(tmp_path.rglob("metrics.jsonl"))
