"""Averages put together from snapshots: the same numbers as by the formulas, usable as weights, and judged by width."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import paddle
import pytest
from support.evaluated import write_reference
from support.golden import load_golden
from support.runs import ROOT, checkpoint_path, loop_arguments, run_in_process, run_script, write_config

from config.schema import load_config
from models.state import expected_shapes, paddle_to_official
from runtime.files import FolderWriter, write_json
from sampling.generator import load_generator
from tools import convert_official_weights, evaluate, extract_weights, reconstruct_ema, sample_npz
from training import reconstruction
from training.checkpoints.snapshots import list_snapshots
from training.posthoc_ema import reconstruction_coefficients
from training.reconstruction import plan_averages, write_averages
from weights.files import load_weights, save_safetensors
from weights.runs import is_checkpoint, is_training_checkpoint

STEPS, EVERY = 48, 4
MODEL = "model_state.pdparams"
VAE = str(ROOT / "assets/digits_vae")


def write_snapshot(run, step, averages, model, dtype="float32"):
    """Writes a snapshot of `{std: state}` into a run's folder."""
    writer, profiles = FolderWriter(run / "ema" / f"{step:07d}"), []
    for std, state in averages.items():
        profiles.append({"std": std, "file": f"std_{std:g}.safetensors"})
        with writer.open(profiles[-1]["file"]) as file:
            save_safetensors({name: value.astype(dtype) for name, value in state.items()}, file)
    writer.write_json("snapshot.json", {"step": step, "dtype": dtype, "profiles": profiles, "model": model})
    writer.finish()


def made_up(run, steps, stds, dtype="float32", kind="DiT"):
    """Writes a run of random snapshots of a tiny network; returns `{(step, std): state}`."""
    run.mkdir()
    config = load_config(write_config(run / "Tiny.json", kind))
    write_json(run / "config.json", config)
    shapes, rng, states = expected_shapes(config["model"]), np.random.default_rng(0), {}
    for step in steps:
        of_step = {}
        for std in stds:
            of_step[std] = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
            states[step, std] = of_step[std]
        write_snapshot(run, step, of_step, config["model"], dtype)
    return states


@pytest.fixture(scope="module")
def random_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("random") / "run"
    return run, made_up(run, [10, 20, 30], [0.05, 0.1])


@pytest.fixture(scope="module")
def trained(features, tmp_path_factory):
    """A tiny training whose snapshots hold two widths, another of the same course with other ones; their folders."""
    folder, runs = tmp_path_factory.mktemp("trained"), []
    for name, stds, every in (("two", [0.05, 0.1], EVERY), ("tracked", [0.07, 0.001], 1)):
        profiles = {"ema_profiles": stds, "ema_snapshot_steps": every, "ema_snapshot_dtype": "float32"}
        config = write_config(folder / "Tiny.json", **profiles)
        flags = {"config": config, "features": features, "output": folder / name, "steps": STEPS}
        run_in_process("notrainer", loop_arguments("notrainer", **flags))
        runs.append(checkpoint_path("notrainer", folder / name, STEPS).parents[1])
    return runs


def reconstructed(run, stds, output, step=None):
    """Returns the states of widths that are written to a folder."""
    return [load_weights(Path(folder) / MODEL) for folder in write_averages(plan_averages(run, stds, step), output)]


# The numbers.


def test_streaming_gives_the_golden_reconstructions(tmp_path, monkeypatch):
    walk, run = load_golden("posthoc_ema_walk"), tmp_path / "run"
    run.mkdir()
    config = load_config(write_config(run / "Tiny.json", sizes={"num_layers": 1}))
    write_json(run / "config.json", config)
    shapes, delta = expected_shapes(config["model"]), int(walk["delta"])
    averages = {}
    for step, std, row in zip(walk["in_steps"], walk["in_stds"], walk["snapshots"], strict=True):
        # The walk's seven numbers fill every parameter, over and over.
        state = {name: np.resize(row, shape) for name, shape in shapes.items()}
        averages.setdefault(int(step), {})[float(std)] = state
    for step, states in averages.items():
        write_snapshot(run, step, states, config["model"])
    monkeypatch.setattr(reconstruction, "CHUNK", 1000)  # tensors in parts
    spread = walk["theta"].std(axis=0).max()
    for step, std, expected in zip(walk["out_steps"], walk["out_stds"], walk["reconstructed"], strict=True):
        (state,) = reconstructed(run, [float(std)], tmp_path / f"{step}-{std}", int(step))
        assert {name: value.shape for name, value in state.items()} == {
            name: tuple(shape) for name, shape in shapes.items()
        }
        for value in state.values():
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, np.resize(expected, value.shape), rtol=0, atol=1e-6 * spread)
    assert delta == 1


def test_a_width_that_was_not_kept_comes_close_to_the_one_that_was_tracked(trained, tmp_path):
    two, tracked = trained
    snapshots = list_snapshots(tracked / "ema")
    weights = [load_weights(snapshot.paths[0.001]) for snapshot in snapshots]  # of that width: those of its step
    (state,) = reconstructed(two, [0.07], tmp_path / "averages")
    expected = load_weights(snapshots[-1].paths[0.07])
    spreads, errors = [], []
    for name, value in expected.items():
        spreads.append(np.stack([one[name] for one in weights]).std(axis=0).reshape(-1))
        errors.append(np.abs(state[name] - value).reshape(-1))
    spread, error = np.concatenate(spreads), np.concatenate(errors)
    assert spread.max() > 1e-3
    assert np.sqrt(np.mean(error**2)) < 0.003 * np.sqrt(np.mean(spread**2))
    # The nearest that was kept is much further away.
    kept = [load_weights(path) for path in list_snapshots(two / "ema")[-1].paths.values()]
    nearest = min(np.sqrt(np.mean([np.mean((one[name] - expected[name]) ** 2) for name in one])) for one in kept)
    assert nearest > 10 * np.sqrt(np.mean(error**2))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_stored_average_is_given_back_to_the_bit(dtype, tmp_path):
    states = made_up(tmp_path / "run", [10, 20, 30], [0.05, 0.1], dtype)
    for value in states[20, 0.1].values():
        value.reshape(-1)[0] = -0.0
    write_snapshot(tmp_path / "run", 20, {std: states[20, std] for std in (0.05, 0.1)}, load_config(
        tmp_path / "run/config.json")["model"], dtype)  # fmt: skip
    plan = plan_averages(tmp_path / "run", [0.1, 0.2], 20)
    assert plan.are_stored.tolist() == [True, False]
    folder, _ = write_averages(plan, tmp_path / "averages")
    for name, value in load_weights(Path(folder) / MODEL).items():
        assert value.tobytes() == states[20, 0.1][name].astype("float32").tobytes()
    report = json.loads((Path(folder) / "reconstruction.json").read_text())
    assert report["snapshots"] == [
        {"step": 20, "std": 0.1, "file": "ema/0000020/std_0.1.safetensors", "coefficient": 1.0}
    ]
    assert report["profile_error"] < 1e-6


@pytest.mark.paddle26
def test_several_widths_in_one_pass_are_those_one_by_one(random_run, tmp_path):
    run, states = random_run
    stds = [0.03, 0.05, 0.2]
    together = reconstructed(run, stds, tmp_path / "together", 25)
    keys = list(states)
    coefficients = reconstruction_coefficients(*zip(*keys, strict=True), [25], stds)
    for column, (std, state) in enumerate(zip(stds, together, strict=True)):
        (alone,) = reconstructed(run, [std], tmp_path / f"alone{std}", 25)
        for name, value in state.items():
            assert value.tobytes() == alone[name].tobytes()
            expected = sum(coefficients[row, column] * states[key][name] for row, key in enumerate(keys))
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)


def test_it_holds_less_than_a_snapshot(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = load_config(write_config(run / "Tiny.json", sizes={"num_layers": 12, "attention_head_dim": 32}))
    write_json(run / "config.json", config)
    state = {name: np.ones(shape, "float32") for name, shape in expected_shapes(config["model"]).items()}
    for step in (1, 2, 3):
        write_snapshot(run, step, {0.05: state, 0.1: state}, config["model"])
    plan = plan_averages(run, [0.07, 0.12])
    tracemalloc.start()
    write_averages(plan, tmp_path / "averages")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size, largest = sum(value.nbytes for value in state.values()), max(value.nbytes for value in state.values())
    # Checksums are compared in buffers of 16 MiB, one a thread.
    assert peak - 4 * (1 << 24) < 15 * largest < size


def test_a_profile_that_can_not_be_told_is_said(random_run):
    run, _ = random_run
    assert "rough guess: its profile is missed by" in plan_averages(run, [0.01]).notes()[0]
    assert plan_averages(run, [0.07]).notes() == []
    errors = plan_averages(run, [0.01, 0.05, 0.07]).errors
    assert errors[0] > 0.5 and errors[1] < 1e-6 < errors[2] < 0.1


# The folders as weights.


def test_commands_take_the_folders(trained, features, tmp_path, capsys):
    output = tmp_path / "averages"
    reconstruct_ema.main([f"--run={trained[0]}", "--std=0.07", f"--output={output}"])
    folder = output / "std_0.07"
    assert f"averages of step {STEPS}: {folder}" in capsys.readouterr().out
    assert is_training_checkpoint(folder) and not is_checkpoint(folder)
    assert (folder / "config.json").read_bytes() == (trained[0] / "config.json").read_bytes()
    state = load_weights(folder / MODEL)
    assert_same({name: value.numpy() for name, value in paddle.load(str(folder / MODEL)).items()}, state)

    generator = load_generator(str(folder), vae=VAE)
    assert generator.sample([1, 2], num_inference_steps=2, output="latents").shape == [2, 4, 8, 8]
    extract_weights.main([f"--model_path={folder}", f"--output={tmp_path}/plain.pdparams"])
    assert_same(load_weights(tmp_path / "plain.pdparams"), state)
    convert_official_weights.main([f"--model_path={folder}", f"--output={tmp_path}/official.pt", "--reverse"])
    assert_same(load_weights(tmp_path / "official.pt"), paddle_to_official(state))
    # A training begins with them, and can't go on from them.
    config = write_config(tmp_path / "Tiny.json", learning_rate=1e-12)
    flags = {"config": config, "features": features, "steps": 1}
    run_in_process("notrainer", [*loop_arguments("notrainer", output=tmp_path / "next", **flags),
                                 f"--pretrained_model_path={folder}"])  # fmt: skip
    for name, value in load_weights(checkpoint_path("notrainer", tmp_path / "next", 1) / MODEL).items():
        np.testing.assert_allclose(value, state[name], rtol=1e-6, atol=1e-10)
    with pytest.raises(ValueError, match="std_0.07"):
        run_in_process("notrainer", [*loop_arguments("notrainer", output=tmp_path / "resumed", **flags),
                                     f"--resume={folder}"])  # fmt: skip


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


def test_folders_are_replaced_only_if_asked(random_run, tmp_path):
    run, _ = random_run
    words = [f"--run={run}", "--std", "0.07", "0.2", f"--output={tmp_path}"]
    reconstruct_ema.main([*words, "--step=20"])
    with pytest.raises(ValueError, match=r"std_0.07: exists already.*--overwrite"):
        reconstruct_ema.main(words)
    reconstruct_ema.main([*words, "--overwrite"])
    assert json.loads((tmp_path / "std_0.2/reconstruction.json").read_text())["step"] == 30
    (tmp_path / "std_0.07/reconstruction.json").unlink()  # somebody else's
    with pytest.raises(ValueError, match="std_0.07: is no folder of this tool"):
        reconstruct_ema.main([*words, "--overwrite"])


# Mistakes.


def change_snapshot(run, step, **changes):
    path = run / f"ema/{step:07d}"
    about = json.loads((path / "snapshot.json").read_text()) | changes
    averages = {std: load_weights(path / f"std_{std:g}.safetensors") for std in (0.05, 0.1)}
    write_snapshot(run, step, averages, about["model"])


def flip_byte(run):
    path = run / "ema/0000020/std_0.1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def put_nan(run):
    path = run / "ema/0000020"
    averages = {std: load_weights(path / f"std_{std:g}.safetensors") for std in (0.05, 0.1)}
    averages[0.1]["pos_embed"].reshape(-1)[-1] = np.nan
    write_snapshot(run, 20, averages, json.loads((path / "snapshot.json").read_text())["model"])


def leave_one(run):
    for step in (10, 20):
        shutil.rmtree(run / f"ema/{step:07d}")
    path = run / "ema/0000030"
    averages = {0.05: load_weights(path / "std_0.05.safetensors")}
    write_snapshot(run, 30, averages, json.loads((path / "snapshot.json").read_text())["model"])


@pytest.mark.parametrize(
    ("spoil", "flags", "words"),
    [
        (lambda run: shutil.rmtree(run / "ema"), [], "holds no snapshots (no folder ema)"),
        (lambda run: [shutil.rmtree(path) for path in (run / "ema").iterdir()], [], "holds no whole snapshot"),
        (None, ["--std=0.5"], "--std"),
        (None, ["--std", "0.1", "0.10"], "names a width twice"),
        (None, ["--step=31"], "step 31: expected one from 10, the first snapshot's, to 30, the last one's"),
        (None, ["--step=9"], "step 9: expected one from 10"),
        (None, ["--guidance_scale=3"], "--guidance_scale is for the samples of --evaluate; give that too"),
        (leave_one, [], "std_0.05.safetensors: is the only average of"),
        (lambda run: change_snapshot(run, 20, model={"type": "SiT"}), [], "is of another network than"),
        (flip_byte, [], "0000020: std_0.1.safetensors is damaged: its checksum"),
        (put_nan, [], "0000020/std_0.1.safetensors: pos_embed holds NaN"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(random_run, tmp_path, spoil, flags, words):
    run = tmp_path / "run"
    shutil.copytree(random_run[0], run)
    if spoil:
        spoil(run)
    given = [f"--run={run}", f"--output={tmp_path}/averages", *([] if "--std" in "".join(flags) else ["--std=0.07"])]
    with pytest.raises(ValueError) as error:
        reconstruct_ema.main([*given, *flags])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path).glob("averages/*"))


def test_one_average_alone_is_itself(random_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(random_run[0], run)
    leave_one(run)
    (state,) = reconstructed(run, [0.05], tmp_path / "averages")
    assert_same(state, random_run[1][30, 0.05])


# The sweep.


def test_widths_are_judged(features, tmp_path, capsys):
    run = tmp_path / "run"
    made_up(run, [10, 20], [0.05, 0.1])
    reference = write_reference(tmp_path / "real.npz", side=64)
    words = [f"--run={run}", "--std", "0.05", "0.08", f"--output={tmp_path}/averages", f"--evaluate={reference}"]
    words += ["--features=digits", "--num_samples=8", "--metrics", "fid", "recall", "--num_inference_steps=2"]
    reconstruct_ema.main([*words, f"--vae={VAE}"])
    lines = capsys.readouterr().out.splitlines()
    (start,) = [place for place, line in enumerate(lines) if line.split()[:2] == ["std", "FID"]]
    table = [line.split() for line in lines[start : start + 3]]
    assert table[0] == ["std", "FID", "recall"] and [row[0] for row in table[1:]] == ["0.05", "0.08"]
    found = json.loads((tmp_path / "averages/widths.json").read_text())
    assert [row["std"] for row in found["widths"]] == [0.05, 0.08] and found["step"] == 20
    assert found["widths"][0]["fid"] == pytest.approx(float(table[1][1]), rel=1e-4)
    assert (tmp_path / "averages/widths.png").read_bytes().startswith(b"\x89PNG")
    # The other tools say the same.
    drawn = [
        "--num_images=8",
        "--num_inference_steps=2",
        "--guidance_scale=1",
        f"--vae={VAE}",
        f"--output={tmp_path}/a.npz",
    ]
    sample_npz.main([f"--model_path={tmp_path}/averages/std_0.08", *drawn])
    judged = [
        f"--samples={tmp_path}/a.npz",
        f"--reference={reference}",
        "--features=digits",
        "--metrics",
        "fid",
        "recall",
    ]
    evaluate.main([*judged, f"--output={tmp_path}/report.json"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert found["widths"][1]["fid"] == pytest.approx(report["fid"], rel=1e-3)
    assert found["widths"][1]["recall"] == report["recall"]
    with pytest.raises(ValueError, match="--sampler is for a SiT"):
        reconstruct_ema.main([*words, "--overwrite", "--sampler=ode"])


def test_widths_of_a_transport_are_judged(tmp_path, capsys):
    run = tmp_path / "run"
    made_up(run, [10, 20], [0.05, 0.1], kind="SiT")
    words = [f"--run={run}", "--std=0.05", f"--output={tmp_path}/averages", f"--vae={VAE}", "--features=digits"]
    words += [f"--evaluate={write_reference(tmp_path / 'real.npz', side=64)}", "--num_samples=6", "--metrics=fid"]
    with pytest.raises(ValueError, match="--method rk5"):
        reconstruct_ema.main([*words, "--method=rk5"])
    assert not (tmp_path / "averages").exists()
    reconstruct_ema.main([*words, "--sampler=sde", "--num_inference_steps=3", "--guidance_scale=1.5"])
    settings = json.loads((tmp_path / "averages/widths.json").read_text())["settings"]
    assert (settings["sampler"], settings["diffusion_form"], settings["guidance_scale"]) == ("sde", "sigma", 1.5)


@pytest.mark.slow
def test_the_benchmark_of_quality_runs(tmp_path):
    words = ["--quick", "--seeds", "0", "--parts", "widths", "guide", "--output", tmp_path / "quality"]
    done = run_script("benchmarks/quality.py", words, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "quality/results.json").read_text())["results"]
    assert {row["curve"] for row in results["guide"]} == {"earlier", "smaller", "wider"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "quality/points").iterdir()}
    assert run_script("benchmarks/quality.py", words, timeout=600).returncode == 0  # goes on: nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "quality/points").iterdir()} == before
