"""Preview grids: sampled from the EMA weights by the trained schedule, without touching the training."""

import json

import numpy as np
import paddle
import pytest
from conftest import ROOT, loop_arguments, read_losses, write_config, write_features
from PIL import Image

from models import build_model
from training import EMA
from training.preview import ema_weights

LATENT4 = {
    "type": "DiT",
    "sample_size": 4,
    "patch_size": 2,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_classes": 10,
}


def test_ema_weights_are_lent_and_taken_back():
    model = build_model(LATENT4)
    ema = EMA(model, decay=0.5)
    own = {name: parameter.numpy().copy() for name, parameter in model.named_parameters()}
    for shadow in ema.state_dict().values():
        paddle.assign(shadow + 1.0, output=shadow)
    model.train()
    with ema_weights(model, ema):
        assert not model.training
        for name, parameter in model.named_parameters():
            np.testing.assert_array_equal(parameter, ema.state_dict()[name])
    assert model.training
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter, own[name])


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_previews_leave_the_losses_alone(kind, loop, tmp_path, run_loop):
    features = write_features(tmp_path / "features", count=16, shape=(4, 4, 4))
    config = tmp_path / "preview.json"
    config.write_text(json.dumps({"model": {**LATENT4, "type": kind}, "training": {"learning_rate": 1e-3}}))
    runs = {}
    vae_flag = "--vae" if loop == "notrainer" else "--vae_name_or_path"
    for name, extra in (
        ("plain", []),
        ("preview", ["--image_logging_steps=2", f"{vae_flag}={ROOT / 'assets/digits_vae'}"]),
    ):
        arguments = loop_arguments(loop, config=str(config), features=features, output=tmp_path / name, steps=4)
        run_loop(loop, [*arguments, *extra, "--num_inference_steps=3"])
        runs[name] = read_losses(tmp_path / name)
    assert runs["plain"] == runs["preview"]
    images = sorted((tmp_path / "preview").rglob("images/*.png"))
    assert [path.name for path in images] == ["0000002.png", "0000004.png"]
    picture = np.asarray(Image.open(images[0]))
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 0
    assert not list((tmp_path / "plain").rglob("*.png"))


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_a_resumed_run_shows_its_earlier_previews(loop, tmp_path, run_loop):
    from visualdl.reader.reader import LogReader

    features = write_features(tmp_path / "features", count=16, shape=(4, 4, 4))
    config = tmp_path / "preview.json"
    config.write_text(json.dumps({"model": LATENT4}))
    vae_flag = "--vae" if loop == "notrainer" else "--vae_name_or_path"
    flags = ["--image_logging_steps=1", f"{vae_flag}={ROOT / 'assets/digits_vae'}", "--num_inference_steps=1"]
    flags.append("--resume=auto" if loop == "notrainer" else "--resume_from_checkpoint=auto")
    shown = {}
    for steps in (12, 13, 14):
        if steps == 14:  # no new one comes: the earlier ones are there at once
            flags.append("--image_logging_steps=-1")
        run = {"config": str(config), "features": features, "output": tmp_path / "out", "steps": steps}
        run_loop(loop, [*loop_arguments(loop, **run), *flags, f"--logging_dir={tmp_path / str(steps)}"])
        (log,) = (tmp_path / str(steps)).glob("*.log")
        shown[steps] = {record.id: record for record in LogReader(file_path=str(log)).get_data("image", "samples/ema")}
    assert sorted(shown[12]) == list(range(1, 13))
    assert sorted(shown[13]) == [1, 2, 4, 5, 7, 8, 9, 11, 12, 13]  # at most nine, evenly spread, and the new one
    assert sorted(shown[14]) == [1, 3, 4, 5, 7, 9, 10, 11, 13]
    assert shown[13][1].image.encoded_image_string == shown[12][1].image.encoded_image_string


def test_previews_need_an_autoencoder_that_is_there(features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "out", steps=2)
    with pytest.raises(ValueError, match="/no/such/vae"):
        run_loop("notrainer", [*arguments, "--image_logging_steps=1", "--vae_name_or_path=/no/such/vae"])
