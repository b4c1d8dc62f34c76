"""What a feature set is made of travels with it: to the run, its checkpoints, its pipelines and the demos."""

import json

import pytest
from conftest import checkpoint_path, loop_arguments, write_config, write_features

from training.config import load_config
from training.setup import describe_features


def write_set(folder, manifest, names):
    """What tools/extract_features.py writes beside the features of the set imagenet64."""
    write_features(folder, count=16)
    (folder / "imagenet64_manifest.json").write_text(json.dumps(manifest))
    (folder / "imagenet64_classes.json").write_text(json.dumps({"id2label": names}))
    return folder


MANIFEST = {
    "image_size": 64,
    "scaling_factor": 1.5,
    "shift_factor": 0.25,
    "vae": {"name": "owner/vae", "weights_sha256": "ab" * 32, "latent_channels": 4, "downsampling": 8},
}


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_a_run_carries_what_its_features_were_made_of(loop, tmp_path, run_loop, capsys):
    names = {"0": "cat", "2": "dog\x1b[2J", "11": "no label of the model"}
    features = write_set(tmp_path / "set", MANIFEST, names)
    config = write_config(tmp_path / "DiT.json")
    run_loop(loop, loop_arguments(loop, config=config, features=features, output=tmp_path / "out", steps=1))
    saved = load_config(checkpoint_path(loop, tmp_path / "out", 1) / "config.json")["features"]
    assert saved["image_size"] == 64 and saved["class_names"] == {"0": "cat", "2": "dog\\x1b[2J"}
    scaling = {"scaling_factor": 1.5, "shift_factor": 0.25, "latents_mean": None, "latents_std": None}
    assert saved["vae"] == {**MANIFEST["vae"], **scaling}
    assert '"class_names": "2 names"' in capsys.readouterr().out

    # Its config.json with another set: that one counts, and it is said.
    other = write_set(tmp_path / "other", {**MANIFEST, "scaling_factor": 0.5}, {"0": "bird"})
    config = checkpoint_path(loop, tmp_path / "out", 1) / "config.json"
    run_loop(loop, loop_arguments(loop, config=config, features=other, output=tmp_path / "two", steps=1))
    assert load_config(checkpoint_path(loop, tmp_path / "two", 1) / "config.json")["features"]["class_names"] == {
        "0": "bird"
    }
    said = capsys.readouterr().out
    assert "scaling_factor 0.5 here, 1.5 there; class 0 is bird here, cat there" in said


def test_relative_autoencoder_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    features = write_set(tmp_path / "set", {**MANIFEST, "vae": {"name": "vae"}}, {})
    monkeypatch.chdir(tmp_path)
    assert describe_features(features, 64, 10)[0]["vae"]["name"] == str(tmp_path / "vae")


def test_sets_without_a_manifest_tell_nothing(features):
    assert describe_features(features, 64, 10) == ({"image_size": None, "class_names": None, "vae": None}, [])


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("classes", [], "_classes.json: expected"),
        ("classes", {"id2label": {"a": "b"}}, "_classes.json: expected"),
        ("manifest", {"scaling_factor": "1"}, "_manifest.json: vae: scaling_factor must be a number above 0"),
        ("manifest", {"latents_std": [1, 0]}, "_manifest.json: vae: latents_std must be a number above 0"),
    ],
)
def test_odd_files_of_a_set(file, content, message, tmp_path):
    write_set(tmp_path, MANIFEST, {})
    (tmp_path / f"imagenet64_{file}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        describe_features(tmp_path, 64, 10)
