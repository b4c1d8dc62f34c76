"""tools/sample_grid.py: pictures of a model by several guidance scales and numbers of steps."""

import json

import numpy as np
import pytest
from PIL import Image
from support.pipelines import DIGITS_VAE, make_config, write_checkpoint

from tools.sample_grid import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample_grid") / "checkpoint"
    write_checkpoint(folder, make_config("SiT"))
    return folder


def run(checkpoint, output, *flags):
    sampler = ["--sampler", "ode", "--method", "euler"]
    main([*map(str, ("--model_path", checkpoint, "--vae", DIGITS_VAE, "--output", output, *sampler, *flags))])
    return {path.name: np.asarray(Image.open(path)) for path in output.iterdir()}


def test_a_setting_has_the_same_images_in_every_picture(checkpoint, tmp_path, capsys):
    flags = ["--classes", "3", "7", "--images_per_class", "2"]
    found = run(checkpoint, tmp_path / "all", *flags, "--guidance_scales", 1, 3, "--num_inference_steps", 3, 5)
    names = [f"guidance{scale}_steps{steps}.png" for scale in (1, 3) for steps in (3, 5)]
    assert sorted(found) == sorted([*names, "sweep.png"]) and "sweep.png" in capsys.readouterr().out
    assert len({found[name].tobytes() for name in names}) == 4
    alone = run(checkpoint, tmp_path / "one", *flags, "--guidance_scales", 3, "--num_inference_steps", 5)
    assert list(alone) == [names[3]]  # nothing to compare: no sweep
    assert np.array_equal(alone[names[3]], found[names[3]])
    side, gap = 32, 4  # the last image of a picture with one row a class stands in the corner of the sweep too
    corner = slice(-10 - side, -10)
    last = found[names[3]][-gap - side : -gap, -gap - side : -gap]
    assert np.array_equal(found["sweep.png"][corner, corner], last)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_inference_steps", 4, 1], "--num_inference_steps 1: expected 2 or more"),
        (["--guidance_scales", 1, "nan"], "--guidance_scale nan: expected a finite number"),
        (["--classes", "cat"], "--classes cat: no such class"),
        (["--scheduler", "dpm"], "--scheduler is for a DiT"),
        (["--images_per_class", 0], "--images_per_class must be a positive integer"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(checkpoint, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        run(checkpoint, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_there_are_kept(checkpoint, tmp_path):
    (tmp_path / "sweep.png").write_text("mine")
    with pytest.raises(ValueError, match=r"sweep.png: exists already; .* --overwrite"):
        run(checkpoint, tmp_path)
    assert (tmp_path / "sweep.png").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_model_without_a_null_class_is_not_guided(tmp_path):
    config = make_config("SiT", class_dropout_prob=0)
    config["features"]["class_names"] = {"3": "drei"}
    write_checkpoint(tmp_path / "checkpoint", json.loads(json.dumps(config)))
    found = run(tmp_path / "checkpoint", tmp_path / "out", "--classes", "drei", "--num_inference_steps", 2)
    assert list(found) == ["guidance1_steps2.png"]
