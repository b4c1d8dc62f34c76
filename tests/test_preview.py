"""Preview grids: sampled from the EMA weights by the trained schedule, without touching the training."""

import json

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import AutoencoderKL
from support.runs import ROOT, loop_arguments, read_losses, write_config, write_features

from config.flags import Parser
from config.schema import resolve_config
from models import build_model
from objectives import build_objective
from training import EMA
from training.averages import ema_weights
from training.preview import Preview

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


@pytest.mark.parametrize(
    "kind, in_channels, guided_channels", [("DiT", 4, 3), ("DiT", 16, 16), ("LightningDiT", 16, 3)]
)
def test_channels_that_are_guided(kind, in_channels, guided_channels, monkeypatch):
    """Three of four, as in the official code, and all of sixteen; of LightningDiT's always three, as there."""
    model = {**LATENT4, "type": kind, "in_channels": in_channels, "learn_sigma": False}
    config = resolve_config({"model": model})
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=in_channels)
    monkeypatch.setattr("features.autoencoder.load_vae", lambda path: vae)
    preview = Preview(build_objective(config), config, vae="vae", num_inference_steps=2, guidance_scale=4.0)
    seen = {}

    def sample(denoiser, noise, **options):
        seen["output"] = denoiser(noise, paddle.zeros([noise.shape[0]]))
        return noise

    monkeypatch.setattr(preview.sampler, "sample", sample)
    preview.sample(lambda x, t, y: (y != 10).astype("float32").reshape([-1, 1, 1, 1]).expand_as(x))
    assert seen["output"].mean([0, 2, 3]).tolist() == [4.0] * guided_channels + [1.0] * (in_channels - guided_channels)


def test_rows_are_classes_that_are_trained(monkeypatch):
    monkeypatch.setattr("features.autoencoder.load_vae", lambda path: AutoencoderKL(norm_num_groups=4))
    raw = {"model": LATENT4, "data": {"classes": [7, 2, 4]}}
    raw["features"] = {"class_names": {str(label): f"digit {label}" for label in range(10)}}
    config = resolve_config(raw)

    def labels(config, **options):
        return Preview(build_objective(config), config, vae="vae", **options).labels.tolist()

    assert labels(config) == [2, 2, 4, 4, 7, 7]
    config["data"]["classes"] = None
    assert labels(config, images_per_class=1) == list(range(10))
    assert labels(config, images_per_class=1, classes=["digit 9", "3"]) == [9, 3]
    with pytest.raises(ValueError, match="--preview_classes cat: no such class; expected an id 0..9 or a name such as"):
        labels(config, classes=["cat"])


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_flags(loop):
    """PaddleMIX's --cfg_scale is another name of the guidance scale."""
    args = Parser(loop).parse_args(["--cfg_scale", "2", "--preview_classes", "0", "golden retriever"])
    assert args.preview_guidance_scale == 2 and args.preview_classes == ["0", "golden retriever"]
    with pytest.raises(ValueError, match="must be a number, got nan"):
        Parser(loop).parse_args(["--preview_guidance_scale", "nan"])


def test_no_preview_of_numbers_that_are_not_finite(tmp_path, run_loop, capsys, monkeypatch):
    """It is said, and training goes on."""
    features = write_features(tmp_path / "features", count=16, shape=(4, 4, 4))
    (tmp_path / "preview.json").write_text(json.dumps({"model": LATENT4}))
    run = {"config": str(tmp_path / "preview.json"), "features": features, "output": tmp_path / "out", "steps": 2}
    flags = ["--image_logging_steps=1", f"--vae={ROOT / 'assets/digits_vae'}", "--num_inference_steps=2"]
    monkeypatch.setattr(Preview, "sample", lambda self, model: paddle.full(self.noise.shape, float("nan")))
    run_loop("notrainer", [*loop_arguments("notrainer", **run), *flags])
    out = "".join(capsys.readouterr())
    for step in (1, 2):
        assert f"note: there is no preview of step {step}: 20 of 20 images hold numbers that are not finite" in out
    assert not list((tmp_path / "out").rglob("*.png")) and len(read_losses(tmp_path / "out")) == 2


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_a_resumed_run_shows_its_earlier_previews(loop, tmp_path, run_loop, monkeypatch):
    from visualdl.reader.reader import LogReader

    features = write_features(tmp_path / "features", count=16, shape=(4, 4, 4))
    config = tmp_path / "preview.json"
    config.write_text(json.dumps({"model": LATENT4}))
    vae_flag = "--vae" if loop == "notrainer" else "--vae_name_or_path"
    flags = ["--image_logging_steps=1", f"{vae_flag}={ROOT / 'assets/digits_vae'}", "--num_inference_steps=2"]
    flags.append("--resume=auto" if loop == "notrainer" else "--resume_from_checkpoint=auto")
    shown = {}
    for steps in (12, 13, 14):
        if steps == 14:  # no new one comes: the earlier ones are there at once
            monkeypatch.setattr("training.metrics.MAX_EARLIER_IMAGES", 9)
            flags.append("--image_logging_steps=-1")
        run = {"config": str(config), "features": features, "output": tmp_path / "out", "steps": steps}
        run_loop(loop, [*loop_arguments(loop, **run), *flags, f"--logging_dir={tmp_path / str(steps)}"])
        (log,) = (tmp_path / str(steps)).glob("*.log")
        reader = LogReader(file_path=str(log))
        shown[steps] = {record.id: record for record in reader.get_data("image", "samples/ema")}
        (settings,) = reader.get_data("hyper_parameters", "hparam")  # each log has them, with metrics that it has
        settings, metrics = settings.hparam.hparamInfos, settings.hparam.metricInfos
        assert {each.name: each.int_value for each in settings}["training.max_steps"] == steps
        assert [each.name for each in metrics] == ["train/loss"] and reader.get_data("scalar", "train/loss")
    assert sorted(shown[12]) == list(range(1, 13))
    assert sorted(shown[13]) == list(range(1, 14))
    assert sorted(shown[14]) == [1, 3, 4, 5, 7, 9, 10, 11, 13]  # of too many, evenly spread ones
    assert shown[13][1].image.encoded_image_string == shown[12][1].image.encoded_image_string


def test_previews_need_an_autoencoder_that_is_there(features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "out", steps=2)
    with pytest.raises(ValueError, match="/no/such/vae"):
        run_loop("notrainer", [*arguments, "--image_logging_steps=1", "--vae_name_or_path=/no/such/vae"])
