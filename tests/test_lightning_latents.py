"""LightningDiT's folders of latents: its numbers, every way to read them, what is broken in them, and a whole run."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.feature_sets import everything, load, write_lightning
from support.golden import GOLDEN, load_golden, relative_error
from support.pipelines import make_halving_vae
from support.runs import LOOPS, checkpoint_path, loop_arguments, read_metrics

from config.schema import load_config, resolve_config
from features import lightning
from features.autoencoder import LatentScaling, open_vae
from features.dataset import FeatureDataset
from features.store import find_features
from tools import check_features, make_config, pack_features
from tools import report as report_tool
from training import suggestion
from training.setup import build_dataset
from weights.files import save_torch

FOLDER = GOLDEN / "lightning_latents"
TOLERANCE = 1e-6
VALUES = load_golden("lightning_latents")


def official(folder=FOLDER, **options):
    return FeatureDataset(folder, sample_shape=(8, 4, 4), num_classes=1000, **options)


def tiny(folder, **options):
    return FeatureDataset(folder, sample_shape=(4, 4, 4), num_classes=3, **options)


@pytest.mark.paddle26
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rows{}", {}),
        ("rows{}_times_0p5", {"latent_multiplier": 0.5}),
        ("rows{}_raw", {"latent_normalization": "none"}),
    ],
)
def test_rows_are_those_of_the_official_class(name, options):
    data = official(**options)
    wanted, twins = (VALUES[name.format(kind)] for kind in ("", "_flip"))
    for index in range(len(data)):
        latent, label = data[index]
        assert relative_error(latent, wanted[index]) < TOLERANCE and label == VALUES["labels"][index]

    data = official(flip=True, **options)
    latents, labels = data.read(np.arange(11).repeat(40), np.arange(440))
    plain, twin = (np.abs(latents - rows.repeat(40, 0)).max(axis=(1, 2, 3)) < 1e-5 for rows in (wanted, twins))
    assert (plain ^ twin).all() and 0.4 < twin.mean() < 0.6 and (labels == VALUES["labels"].repeat(40)).all()


def test_statistics_are_computed_where_none_are_and_not_written(tmp_path, monkeypatch):
    folder = shutil.copytree(FOLDER, tmp_path / "set")
    os.remove(folder / "latents_stats.pt")
    before = sorted(os.listdir(folder))
    data = official(folder)
    for key in ("mean", "std"):
        assert relative_error(np.array(data.normalization[key]), VALUES[f"computed_{key}"].reshape(-1)) < TOLERANCE
    assert "no latents_stats.pt in" in data.notes[0] and sorted(os.listdir(folder)) == before
    assert official().normalization["std"] == VALUES["std"].reshape(-1).tolist() and not official().notes

    # Of a large set it is so many rows, evenly spaced, whatever file they are in.
    monkeypatch.setattr(lightning, "MAX_ROWS", 3)
    some = VALUES["rows_raw"][[0, 5, 10]].transpose(1, 0, 2, 3).reshape(8, -1)
    np.testing.assert_allclose(official(folder).normalization["std"], some.std(axis=1, ddof=1), rtol=1e-5)


def test_decoder_gets_what_the_official_sampler_gives_it(tmp_path):
    """Also where the autoencoder's own config has a scaling factor: the folder's latents were never scaled by it."""
    make_halving_vae(tmp_path / "vae", latent_channels=8, scaling_factor=0.18215)
    config = resolve_config({"model": {"type": "SiT", **SIZES, "in_channels": 8}, "data": {"latent_multiplier": 0.5}})
    dataset, _ = build_dataset(config, FOLDER, None)
    assert not any("another set" in note for note in dataset.notes)  # the config described none
    features = config["features"]
    flags = {"default": None, "flag": "--vae", "normalization": features["latent_normalization"]}
    vae, notes = open_vae(str(tmp_path / "vae"), features["vae"], **flags)
    scaling = LatentScaling.of(vae.config)
    assert relative_error(scaling.denormalize(VALUES["samples"]), VALUES["decoder_input"]) < TOLERANCE
    assert relative_error(scaling.normalize(VALUES["rows_raw"]), VALUES["rows_times_0p5"]) < TOLERANCE
    assert "made with scaling_factor 1.0, not 0.18215, and are decoded so" in notes[0]


SIZES = {"sample_size": 4, "patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}


def normalized(rows):
    mean, std = np.arange(4) / 4, 3 * (1 + np.arange(4) / 4)
    return (rows - mean[:, None, None]) / std[:, None, None]


def test_every_way_to_read_them_gives_the_same(tmp_path):
    latents, mirrored = write_lightning(tmp_path / "set", counts=(5, 0, 4))
    assert find_features(tmp_path / "set", 256) == ("lightning", "latents")
    data = tiny(tmp_path / "set", flip=True)
    np.testing.assert_allclose(everything(data)[0], normalized(latents), atol=1e-5)
    positions = np.arange(9) * 7
    visited, labels = everything(data, positions)
    twins = np.abs(visited - normalized(mirrored)).max(axis=(1, 2, 3)) < 1e-5
    assert twins.any() and not twins.all() and (labels == np.arange(9) % 3).all()
    np.testing.assert_array_equal(everything(data.in_memory(), positions)[0], visited)
    rest, held_out = data.split(3)
    assert len(rest) == 6 and len(held_out) == 3
    np.testing.assert_allclose(everything(data.subset([1]))[0], normalized(latents[1::3]), atol=1e-5)
    data.store.read_exactly()
    np.testing.assert_array_equal(everything(data, positions)[0], visited)
    assert data.source(5) == f"{tmp_path}/set/latents_rank02_shard000.safetensors: latents row 0"
    for workers in (1, 2):
        for (x, y), (x2, y2) in zip(load(data, workers, batch=4), load(data, 0, batch=4), strict=True):
            assert (x == x2).all() and (y == y2).all()

    # Packed, and back, they are the same samples, normalised by the same numbers.
    pack_features.main(["--feature_path", str(tmp_path / "set"), "--output", str(tmp_path / "packed")])
    pack_features.main(["--feature_path", str(tmp_path / "packed"), "--output", str(tmp_path / "pairs")])
    for name, kind in (("packed", "packed"), ("pairs", "pairs")):
        assert find_features(tmp_path / name, None) == (kind, "latents")
        other = tiny(tmp_path / name, flip=True)
        assert other.normalization == data.normalization
        np.testing.assert_array_equal(everything(other, positions)[0], visited)


def test_half_precision_no_twins_and_data_that_begin_anywhere(tmp_path):
    latents, _ = write_lightning(tmp_path, counts=(4,), flip=False, dtype="float16")
    (path,) = tmp_path.glob("*.safetensors")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])  # other writers do not align the data behind the header
    path.write_bytes(struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :])
    data = tiny(tmp_path)
    assert not data.store._rows[0].flags.aligned and not data.store.has_flip
    np.testing.assert_allclose(data.read(np.array([2, 0, 0, 3]))[0], normalized(latents[[2, 0, 0, 3]]), atol=1e-3)
    with pytest.raises(ValueError, match="flips were asked for, but no mirrored latents are there"):
        tiny(tmp_path, flip=True)


def rewritten(path, **changes):
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


FIRST, SECOND = (f"latents_rank0{number}_shard000.safetensors" for number in range(2))
STATISTICS = {key: np.ones((1, 4, 1, 1), "float32") for key in ("mean", "std")}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: os.truncate(f / SECOND, 900), f"{SECOND}: not a readable weight file, or truncated"),
        (lambda f: os.truncate(f / FIRST, 0), f"{FIRST}: not a readable weight file, or truncated"),
        (
            lambda f: rewritten(f / SECOND, labels=None),
            f"{SECOND}: has no labels, but latents.*; expected latents, lat",
        ),
        (lambda f: rewritten(f / FIRST, latents=None), f"{FIRST}: has no latents, but lab.*; expected latents, lat"),
        (lambda f: rewritten(f / SECOND, latents_flip=None), f"{SECOND}: latents_flip must be in every file, or in"),
        (lambda f: rewritten(f / SECOND, labels=np.ones(3, "float32")), f"{SECOND}: labels are float32 of .*int64"),
        (lambda f: rewritten(f / SECOND, labels=np.arange(2)), f"{SECOND}: latents: holds 3 rows, its labels 2"),
        (lambda f: rewritten(f / FIRST, latents=np.ones((5, 4))), f"{FIRST}: latents are of shape .5, 4., expected"),
        (lambda f: rewritten(f / FIRST, latents=np.ones((5, 4, 4, 4))), f"{FIRST}: latents are float64 of shape"),
        (
            lambda f: rewritten(f / SECOND, latents=np.ones((3, 4, 8, 8), "float32")),
            rf"{SECOND}: latents: holds float32 of shape \(3, 4, 8, 8\), the first shard float32 of shape \(5, 4",
        ),
        (lambda f: rewritten(f / SECOND, labels=np.full(3, 7)), f"{SECOND}: labels row 0: label 7 is outside"),
        (lambda f: os.truncate(f / "latents_stats.pt", 99), "latents_stats.pt: not a readable weight file"),
        (lambda f: save_torch({"mean": STATISTICS["mean"]}, f / "latents_stats.pt"), "latents_stats.pt: has no std;"),
        (
            lambda f: save_torch({**STATISTICS, "mean": np.ones(4, "float32")}, f / "latents_stats.pt"),
            r"latents_stats.pt: mean is of shape \(4,\), expected \(1, 4, 1, 1\)",
        ),
        (
            lambda f: save_torch({**STATISTICS, "std": 0 * STATISTICS["std"]}, f / "latents_stats.pt"),
            "latents_stats.pt: std holds numbers not above 0",
        ),
    ],
)
def test_what_is_broken_is_one_line(break_it, message, tmp_path):
    write_lightning(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        tiny(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_files_without_a_row(tmp_path):
    write_lightning(tmp_path, counts=(0, 0))
    with pytest.raises(ValueError, match=f"{tmp_path}: no sample in it"):
        tiny(tmp_path)


def test_another_shape_than_the_models(tmp_path):
    write_lightning(tmp_path)
    with pytest.raises(ValueError, match='for this set write "in_channels": 4 in its section model'):
        official(tmp_path)  # 8 channels of 4x4, and here 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of latents, and of an autoencoder for them."""
    folder = tmp_path_factory.mktemp("lightning")
    write_lightning(folder / "set", counts=(12, 8))
    make_halving_vae(folder / "vae")
    return folder


@pytest.mark.parametrize("loop", LOOPS)
def test_both_loops_train_on_them(loop, folder, tmp_path, run_loop, capsys):
    config = tmp_path / "config.json"
    model = {"type": "LightningDiT", **SIZES, "num_classes": 3}
    config.write_text(json.dumps({"model": model, "data": {"flip": True, "validation_samples": 4}}))
    flags = loop_arguments(loop, config=config, features=folder / "set", output=tmp_path / "out", steps=2)
    flags = [flag for flag in flags if not flag.endswith("=64")]
    run_loop(loop, [*flags, "--image_logging_steps=2", "--num_inference_steps=2", f"--vae={folder / 'vae'}"])
    checkpoint = checkpoint_path(loop, tmp_path / "out", 2)
    saved = load_config(checkpoint / "config.json")["features"]
    assert saved["latent_normalization"] == tiny(folder / "set").normalization
    assert saved["vae"]["latent_channels"] == 4 and saved["vae"]["scaling_factor"] == 1.0
    said = capsys.readouterr().out
    assert "describes another set" not in said
    assert "latent_normalization by channel" in said and f"--vae {folder / 'vae'}" in said.splitlines()[-2]
    assert list((tmp_path / "out").rglob("images/0000002.png"))
    assert list((tmp_path / "out").rglob("validation.jsonl"))
    assert len(read_metrics(tmp_path / "out", "loss")) == 2

    report_tool.main([str(tmp_path / "out"), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert str(folder / "set") in page and "mirrored latents" in page  # read from the set

    # Statistics that have changed since are one line.
    other = shutil.copytree(folder / "set", tmp_path / "other")
    save_torch(STATISTICS, other / "latents_stats.pt")
    resumed = [flag.replace(str(folder / "set"), str(other)).replace("max_steps=2", "max_steps=3") for flag in flags]
    with pytest.raises(
        ValueError, match=r"mean \[0.0, 0.25, 0.5, 0.75\] there, \[1.0, 1.0, 1.0, 1.0\] here; resume with"
    ):
        run_loop(loop, [*resumed, *([f"--resume={checkpoint}"] if loop == "notrainer" else [])])


def test_tools_take_them(folder, tmp_path, capsys, monkeypatch):
    place = ["--feature_path", str(folder / "set")]
    check_features.main([*place, "--output", str(tmp_path / "check.json"), "--vae", str(folder / "vae")])
    checked = json.loads((tmp_path / "check.json").read_text())
    assert checked["samples"] == 20 and checked["row_shape"] == [4, 4, 4] and checked["class_counts"] == [7, 7, 6]
    assert not checked["problems"]
    # The picture is of latents as they are stored, whatever the scale beside an autoencoder's weights.
    make_halving_vae(tmp_path / "plain", scaling_factor=1.0)
    check_features.main([*place, "--output", str(tmp_path / "again.json"), "--vae", str(tmp_path / "plain")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "check.png").read_bytes()
    assert 2.5 < checked["latents"]["std"] < 3.5  # as they are stored: no problem where training normalises them

    monkeypatch.setattr(suggestion, "measure_step", lambda config, batch: 0.1)
    make_config.main([*place, "--output", str(tmp_path / "made.json"), "--model", "SiT"])
    made = load_config(tmp_path / "made.json")
    assert [made["model"][key] for key in ("in_channels", "sample_size", "num_classes")] == [4, 4, 3]
    dataset, _ = build_dataset(made, str(folder / "set"), None)
    assert dataset.flip and dataset.normalization is not None


def test_a_manifest_of_ones_own_tells_the_autoencoder(folder, tmp_path):
    write_lightning(tmp_path / "set")
    told = {"image_size": 8, "vae": {"name": str(folder / "vae")}}
    (tmp_path / "set/latents_manifest.json").write_text(json.dumps(told))
    (tmp_path / "set/latents_classes.json").write_text(json.dumps({"id2label": {"0": "cat"}}))
    config = resolve_config({"model": {"type": "SiT", **SIZES, "num_classes": 3}})
    build_dataset(config, tmp_path / "set", 8)
    features = config["features"]
    assert features["image_size"] == 8 and features["class_names"] == {"0": "cat"}
    vae, notes = open_vae(None, features["vae"], default=None, flag="--vae", channels=4)
    assert vae.config.scaling_factor == 1.0 and "scaling_factor 1.0, not 0.18215" in notes[0]


def test_a_check_finds_what_leaves_a_folder_without_statistics(tmp_path):
    write_lightning(tmp_path / "set", statistics=False)
    broken = load_file(tmp_path / "set" / SECOND)["latents"]
    broken[1, 0, 0, 0] = np.nan
    rewritten(tmp_path / "set" / SECOND, latents=broken)
    with pytest.raises(ValueError, match="its channel_mean can't normalise .* which tools/check_features.py looks at"):
        tiny(tmp_path / "set")
    with pytest.raises(SystemExit):
        check_features.main(["--feature_path", str(tmp_path / "set"), "--output", str(tmp_path / "check.json")])
    problems = json.loads((tmp_path / "check.json").read_text())["problems"]
    assert [problem["kind"] for problem in problems] == ["finite", "scale"]
    assert f"{SECOND}: latents row 1: 1 number not finite" in problems[0]["text"]


def test_a_folder_without_statistics_gets_them_on_request(tmp_path, capsys):
    latents, mirrored = write_lightning(tmp_path / "set", statistics=False)
    flags = ["--feature_path", str(tmp_path / "set"), "--output", str(tmp_path / "check.json"), "--write_statistics"]
    check_features.main(flags)
    assert "counted at each start; tools/check_features.py --write_statistics keeps" in capsys.readouterr().out
    data = tiny(tmp_path / "set")
    both = np.concatenate([latents, mirrored])
    np.testing.assert_allclose(data.normalization["mean"], both.mean(axis=(0, 2, 3)), rtol=1e-5)
    assert not data.notes and (tmp_path / "set/latents_manifest.json").exists()
    write_lightning(tmp_path / "set")
    check_features.main([*flags, "--overwrite"])
    assert "not written, because the set has them in" in capsys.readouterr().out
    assert tiny(tmp_path / "set").normalization["mean"] == [0, 0.25, 0.5, 0.75]
