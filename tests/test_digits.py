"""The digits, the shipped autoencoder, its training script, the evaluation, and quickstart.sh's options."""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.pipelines import make_config, make_model, make_pipeline, state_of

from evaluation.digits import METRICS, Digits, evaluate, judge, nearest_distance, pass_through_vae, read_digits, spread
from features.autoencoder import load_vae
from features.images import find_images, load_image
from sampling.generator import load_generator
from sampling.model_path import describe_model
from sampling.pipelines.export import export_pipeline
from tools import prepare_digits, train_vae
from tools.evaluate_digits import main, sampler_settings

ROOT = Path(__file__).resolve().parents[1]
VAE = ROOT / "assets" / "digits_vae"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "all"
    prepare_digits.main(["--output", str(root)])
    return root


@pytest.fixture(scope="module")
def few_digits(digits, tmp_path_factory):
    """Eight training and two held-out digits a class."""
    root = tmp_path_factory.mktemp("digits") / "few"
    for part, count in (("train", 8), ("heldout", 2)):
        for label in range(10):
            (root / part / str(label)).mkdir(parents=True)
            for path in sorted((digits / part / str(label)).iterdir())[:count]:
                shutil.copy(path, root / part / str(label))
    return root


@pytest.fixture(scope="module")
def vae():
    from ppdiffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(str(VAE))
    vae.eval()
    return vae


def test_digits_are_all_there_and_split(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    train, classes = find_images(str(digits / "train"))
    heldout, _ = find_images(str(digits / "heldout"))
    assert classes == [str(label) for label in range(10)]
    assert (len(train), len(heldout)) == (1500, 297)
    for label in range(10):
        share = sum(found == label for _, found in heldout) / (source.target == label).sum()
        assert 0.15 < share < 0.18
    indices = sorted(int(Path(path).stem) for path, _ in train + heldout)
    assert indices == list(range(1797))
    for path, label in heldout[::50]:
        with Image.open(path) as image:
            assert image.size == (32, 32) and image.mode == "RGB"
            small = np.asarray(image.convert("L").resize((8, 8), Image.BOX), dtype="float32") / 255 * 16
        assert source.target[int(Path(path).stem)] == label
        assert np.abs(small - source.images[int(Path(path).stem)]).mean() < 1.0


def test_digits_again_writes_nothing_but_what_is_missing(digits, capsys):
    path = digits / "train" / "0" / sorted(os.listdir(digits / "train" / "0"))[0]
    content = path.read_bytes()
    path.unlink()
    prepare_digits.main(["--output", str(digits)])
    assert "1 image written" in capsys.readouterr().out
    assert path.read_bytes() == content
    prepare_digits.main(["--output", str(digits)])
    assert "0 images written" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["notes.txt", "partial.png", "train/0/0000.png"])
def test_digits_refuse_a_folder_with_other_files(name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=name):
        prepare_digits.main(["--output", str(tmp_path)])
    assert (tmp_path / name).read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_digits_write_nothing_through_links(digits, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copytree(digits / "train", tmp_path / "mine")
    own = sorted((tmp_path / "mine/0").iterdir())[0]
    own.write_bytes(b"mine")
    (tmp_path / "out/train").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=f"holds train/0/{own.name}, which is not one of the digits"):
        prepare_digits.main(["--output", str(tmp_path / "out")])
    assert own.read_bytes() == b"mine" and os.listdir(tmp_path / "out") == ["train"]


def test_shipped_vae_reconstructs_heldout_digits(digits, vae):
    import paddle

    x = np.stack([load_image(path, 32) for path, _ in find_images(str(digits / "heldout"))[0]])
    with paddle.no_grad():
        reconstruction = vae.decode(vae.encode(paddle.to_tensor(x)).latent_dist.mean).sample.clip(-1, 1).numpy()
    psnr = 10 * math.log10(4 / np.square(reconstruction - x).mean())
    assert psnr > 25.0


def test_shipped_vae_has_unit_latents_and_is_small(digits, vae):
    import paddle

    x = np.stack([load_image(path, 32) for path, _ in find_images(str(digits / "train"))[0][::5]])
    with paddle.no_grad():
        latents = vae.encode(paddle.to_tensor(x)).latent_dist.sample().numpy() * vae.config.scaling_factor
    assert latents.shape[1:] == (4, 4, 4)
    assert abs(latents.std() - 1) < 0.05
    assert sum(path.stat().st_size for path in VAE.iterdir()) <= 2_000_000


def test_settings_beside_the_shipped_vae_are_its_own(vae):
    settings = train_vae.load_settings(str(VAE / "training.json"))
    for key, value in settings["vae"].items():
        assert vae.config[key] == value, key


def test_train_vae_learns_and_saves(few_digits, tmp_path, capsys):
    settings = json.loads((VAE / "training.json").read_text())
    settings["vae"].update(block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, sample_size=16)
    for key in ("down_block_types", "up_block_types"):
        settings["vae"][key] = settings["vae"][key][:2]
    (tmp_path / "small.json").write_text(json.dumps(settings))
    command = ["--data", str(few_digits / "train"), "--heldout", str(few_digits / "heldout")]
    command += ["--config_file", str(tmp_path / "small.json"), "--batch_size", "8", "--steps", "30"]
    train_vae.main([*command, "--output", str(tmp_path / "vae")])
    psnr = float(capsys.readouterr().out.split("held-out images: PSNR ")[1].split()[0])
    assert psnr > 11  # a constant grey picture gets about 8 dB

    from ppdiffusers import AutoencoderKL

    saved = AutoencoderKL.from_pretrained(str(tmp_path / "vae"))
    assert 0.1 < saved.config.scaling_factor < 10 and saved.config.scaling_factor != 0.18215
    assert json.loads((tmp_path / "vae" / "training.json").read_text())["training"]["steps"] == 30
    with pytest.raises(ValueError, match="not empty"):
        train_vae.main([*command, "--output", str(tmp_path / "vae")])


def test_train_vae_fine_tunes_and_measures_what_it_held_out(few_digits, tmp_path, capsys):
    command = ["--data_path", str(few_digits / "train"), "--init", str(VAE), "--output", str(tmp_path / "vae")]
    train_vae.main([*command, "--max_steps", "1", "--batch_size", "2", "--crop", "16", "--save_dtype", "float16"])
    said = capsys.readouterr().out
    assert "72 training images: " in said
    assert (
        float(re.search("8 held-out images: PSNR ([0-9.]+) dB", said)[1]) > 15
    )  # a first step is long: 29.5 dB before

    settings = json.loads((tmp_path / "vae/training.json").read_text())
    assert settings["init"]["name"] == str(VAE) and settings["training"]["lr"] == train_vae.FINE_TUNING["lr"]
    tuned, before = load_vae(str(tmp_path / "vae")), load_vae(str(VAE))
    moved = np.abs(tuned.decoder.conv_in.weight.numpy() - before.decoder.conv_in.weight.numpy()).max()
    assert 0.5e-3 < moved < 2e-3  # a step of Adam is as long as the learning rate; float16 rounds by less
    assert (tmp_path / "vae/model_state.pdparams").stat().st_size < 0.6 * (VAE / "model_state.pdparams").stat().st_size
    command[-1] = str(tmp_path / "none")
    for crop in ("12", "40"):
        with pytest.raises(ValueError, match=f"--crop {crop}: expected a multiple of 8, at most --image_size 32"):
            train_vae.main([*command, "--crop", crop])
    with pytest.raises(ValueError, match="training.json: is of a network that was fine-tuned; give --init"):
        train_vae.load_settings(str(tmp_path / "vae/training.json"))


def test_train_vae_names_a_misspelt_key(few_digits, tmp_path):
    (tmp_path / "bad.json").write_text('{"vae": {}, "training": {"step": 3}}')
    command = ["--data", str(few_digits), "--config_file", str(tmp_path / "bad.json"), "--output", str(tmp_path / "x")]
    with pytest.raises(ValueError, match="bad.json: training: unknown key 'step'"):
        train_vae.main(command)


@pytest.mark.parametrize(
    ("training", "flags", "message"),
    [
        ({}, ["--seed", "4294967296"], "--seed must be an integer from 0 to 4294967295, got 4294967296"),
        ({"seed": -1}, [], "own.json: training: seed must be an integer from 0 to 4294967295, got -1"),
        ({"steps": "many"}, [], 'own.json: training: steps must be a positive integer, got "many"'),
        ({"steps": "many"}, ["--steps", "0"], "--max_steps must be a positive integer, got 0"),
        ({}, ["--lr", "nan"], "--learning_rate must be a number above 0, got nan"),
    ],
)
def test_train_vae_refuses_settings_before_it_reads_images(training, flags, message, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"vae": {}, "training": training}))
    command = ["--data", str(tmp_path / "none"), "--config_file", str(tmp_path / "own.json")]
    with pytest.raises(ValueError, match=message):
        train_vae.main([*command, "--output", str(tmp_path / "x"), *flags])


def test_train_vae_skips_unreadable_images_on_request(few_digits, tmp_path, capsys):
    shutil.copytree(few_digits / "train", tmp_path / "train")
    spoilt = [*(tmp_path / "train/3").iterdir()][0]
    spoilt.write_bytes(b"no image")
    lost = []
    size = len(train_vae.load_folder(str(few_digits / "train"), 16))
    assert len(train_vae.load_folder(str(tmp_path / "train"), 16, lost)) == size - 1
    assert lost == [(str(spoilt), "no image format that Pillow knows")]
    with pytest.raises(ValueError, match=f"{spoilt.name}: cannot be read .*; repair or remove it, or give --on_error"):
        train_vae.load_folder(str(tmp_path / "train"), 16)

    settings = json.loads((VAE / "training.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(settings))
    command = ["--data", str(tmp_path / "train"), "--config_file", str(tmp_path / "own.json"), "--steps", "1"]
    command += ["--batch_size", "1", "--output", str(tmp_path / "vae")]
    train_vae.main([*command, "--on_error", "skip"])
    told = capsys.readouterr().out
    assert f"1 image could not be read and is left out:\n  {spoilt}: no image format" in told


def test_evaluation_tells_right_from_wrong_and_copies_from_new(digits, vae):
    train, heldout = (read_digits(find_images(str(digits / part))[0], 32) for part in ("train", "heldout"))
    few = train[0][::5], train[1][::5]  # 300: all would be slow
    seen = pass_through_vae(vae, heldout[0], "held-out")
    right = evaluate(seen, heldout[1], few, heldout, vae)
    assert right["classifier_accuracy_on_heldout"] > 0.97
    assert right["share_assigned_to_class_asked_for"] > 0.97
    assert right["nearest_train_distance_of_samples"] == right["nearest_train_distance_of_heldout"] > 0.05
    assert right["num_heldout"] == 297 and set(METRICS) < set(right)
    assert right["spread"] == right["real"]["spread"] and right["precision"] > 0.9 and right["recall"] > 0.6
    wrong = judge(Digits(), heldout[0], (heldout[1] + 1) % 10, heldout)
    assert wrong["share"] < 0.02
    assert wrong["fid"] < 1e-5 and wrong["precision"] == wrong["recall"] == 1
    assert right["real"]["share"] > 0.97 and 0.8 < right["real"]["spread"] < 1.1
    assert nearest_distance(seen[:50], seen).max() < 1e-6  # copies


class TestDigitsFeatures:
    def test_it_knows_heldout_digits_raw_and_after_the_vae(self, digits, vae):
        network = Digits()
        images, labels = read_digits(find_images(str(digits / "heldout"))[0], 32)
        features = network(images)
        assert {name: (array.dtype, array.shape) for name, array in features.items()} == {
            "pool": (np.dtype("float32"), (297, 64)),
            "logits": (np.dtype("float32"), (297, 10)),
        }
        assert tuple(features) == network.outputs
        assert (features["logits"].argmax(axis=1) == labels).mean() >= 0.97
        decoded = pass_through_vae(vae, images, "held-out")
        assert (network(decoded)["logits"].argmax(axis=1) == labels).mean() >= 0.97

    def test_it_sees_blocks_of_pixels(self, digits):
        images, _ = read_digits(find_images(str(digits / "heldout"))[0][:5], 32)
        small = images.reshape(5, 16, 2, 16, 2, 3)
        small[:] = small[:, :, :1, :, :1]  # every block of 2x2 pixels of one colour
        wide = np.repeat(images, 3, axis=2)
        for more in (small[:, :, 0, :, 0], np.repeat(images, 2, axis=1), wide):
            np.testing.assert_allclose(Digits()(more)["pool"], Digits()(images)["pool"], atol=1e-4)

    def test_its_settings_name_its_weights(self):
        path = ROOT / "assets/digits_classifier/model.safetensors"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert Digits().settings == {"features": "digits", "weights_sha256": digest}
        assert path.stat().st_size < 300_000

    @pytest.mark.parametrize(
        "images, message",
        [
            (np.zeros([2, 24, 32, 3], "uint8"), "images of 24x32 pixels: .* multiples of 16"),
            (np.zeros([2, 32, 32, 3], "float32"), r"images of float32 \(2, 32, 32, 3\): expected uint8"),
            (np.zeros([2, 32, 32], "uint8"), "expected uint8"),
        ],
    )
    def test_it_names_mistakes(self, images, message):
        with pytest.raises(ValueError, match=message):
            Digits()(images)


class TestWorseIsWorse:
    """Half-trained and noise-corrupted models have worse figures than the trained one, each of them."""

    BETTER_IF_LARGE = {"inception_score", "precision", "recall"}

    @pytest.fixture(scope="class")
    def figures(self, digits):
        labels = np.arange(300) % 10
        heldout = read_digits(find_images(str(digits / "heldout"))[0], 32)

        def draw(name):
            folder = Path(__file__).parent / "data/digits_2026"
            model = describe_model(str(folder / f"{name}.safetensors"), config=str(folder / "config.json"))
            generator = load_generator(model, vae=str(VAE))
            return generator.sample(labels, num_inference_steps=25, guidance_scale=1.0, sampler="ode", batch_size=100)

        trained = draw("step3000")
        noise = np.random.default_rng(0).normal(size=trained.shape) * 20
        images = {
            "trained": trained,
            "half-trained": draw("step600"),
            "noise-corrupted": (trained + noise).clip(0, 255).round().astype("uint8"),
        }
        return {name: judge(Digits(), drawn, labels, heldout) for name, drawn in images.items()}

    def test_the_trained_model_is_good(self, figures):
        assert figures["trained"]["share"] > 0.95 and figures["trained"]["precision"] > 0.85

    @pytest.mark.parametrize("name", ["half-trained", "noise-corrupted"])
    @pytest.mark.parametrize("metric", METRICS)
    def test_every_metric_tells(self, metric, name, figures):
        found, trained = figures[name][metric], figures["trained"][metric]
        assert found < trained if metric in self.BETTER_IF_LARGE else found > trained


def test_nearest_distance_is_the_rms_difference():
    train, images = (np.full([2, 4, 4, 3], np.uint8([0, 204])[:, None, None, None]) for _ in range(2))
    images[:] = np.uint8([51, 153])[:, None, None, None]
    np.testing.assert_allclose(nearest_distance(images, train), [0.2, 0.2], rtol=1e-6)


def test_spread_is_the_variance_within_a_class():
    images = np.zeros([6, 4, 4, 3], "uint8")
    images[:] = np.uint8([0, 51, 102, 0, 0, 0])[:, None, None, None]  # a class of variance 51^2, one of 0
    labels = np.array([1, 1, 1, 2, 2, 2])
    real = np.concatenate([images, 2 * images]), np.concatenate([labels, labels + 2])
    assert abs(spread(images, labels, real) - 1 / 2 / (5 / 4)) < 1e-9
    assert spread(images, np.array([1, 1, 1, 2, 2, 3]), real) is None


@pytest.fixture(scope="module")
def pipeline_folder(vae, tmp_path_factory):
    from ppdiffusers import DDIMScheduler, DiTPipeline, Transformer2DModel

    transformer = Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        attention_bias=True,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
    )
    folder = tmp_path_factory.mktemp("pipeline")
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(str(folder))
    return folder


def test_evaluation_of_a_pipeline_folder(pipeline_folder, few_digits, tmp_path, capsys):
    command = ["--pipeline", str(pipeline_folder), "--digits", str(few_digits), "--num_images", "20"]
    command += ["--num_inference_steps", "2", "--grid", str(tmp_path / "new" / "grid.png")]
    command += ["--report", str(tmp_path / "report.json")]
    main(command)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_images"] == 20 and len(report["share_by_class"]) == 10
    assert report["settings"]["num_inference_steps"] == 2
    assert report["nearest_train_distance_of_samples"] > 0
    assert {*METRICS, "spread"} < set(report["real"]) & set(report)
    assert report["settings"]["weights_sha256"] == Digits().settings["weights_sha256"]
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.height == 10 * 36 + 4  # ten rows, with gaps
        assert 2 * 36 + 4 < grid.width < 3 * 36  # of two, and the class beside them
    told = capsys.readouterr().out
    assert f"{report['share_assigned_to_class_asked_for']:.3f} of 20" in told
    for name, what in (("fid", "FID"), ("mind", "MIND"), ("recall", "recall"), ("spread", "variance within a class")):
        assert re.search(rf"{what}.* {report[name]:.4f} / {report['real'][name]:.4f}\n", told)
    # An untrained model can't please everybody: the bar is asked for, so the exit code tells.
    with pytest.raises(SystemExit, match="1"):
        main([*command, "--min_accuracy", "0.9"])
    assert json.loads((tmp_path / "report.json").read_text()) == report


@pytest.fixture(scope="module")
def sit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sit"
    make_pipeline().save_pretrained(folder)
    return folder


def test_evaluation_of_a_sit_folder_by_both_samplers(sit_folder, few_digits, tmp_path):
    grids = {}
    for sampler in ("ode", "sde"):
        command = ["--pipeline", str(sit_folder), "--digits", str(few_digits), "--num_images", "10"]
        command += ["--num_inference_steps", "3", "--sampler", sampler]
        command += ["--grid", str(tmp_path / "grid.png"), "--report", str(tmp_path / "report.json")]
        main(command)
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["num_images"] == 10 and report["settings"]["sampler"] == sampler
        assert report["spread"] is None  # of one image a class
        with Image.open(tmp_path / "grid.png") as grid:
            grids[sampler] = np.asarray(grid).astype(float)
    assert grids["ode"].shape == grids["sde"].shape
    assert np.abs(grids["ode"] - grids["sde"]).max() > 1


def test_evaluation_samples_each_kind_of_folder_with_its_own(pipeline_folder, vae, tmp_path):
    from ppdiffusers import DPMSolverMultistepScheduler, EDMEulerScheduler

    # A stock folder of a DiT gets DDIM whatever it holds, one of a SiT keeps what it was exported with.
    shutil.copytree(pipeline_folder, tmp_path / "dit")
    DPMSolverMultistepScheduler().save_pretrained(str(tmp_path / "dit" / "scheduler"))
    index = json.loads((tmp_path / "dit" / "model_index.json").read_text())
    index["scheduler"] = ["ppdiffusers", "DPMSolverMultistepScheduler"]
    (tmp_path / "dit" / "model_index.json").write_text(json.dumps(index))
    generator = load_generator(str(tmp_path / "dit"))
    default, ddim, dpm = (
        generator.sample([1], num_inference_steps=4, output="latents", method=method).numpy()
        for method in (None, "ddim", "dpm")
    )
    assert np.array_equal(default, ddim) and not np.array_equal(default, dpm)
    flags = SimpleNamespace(pipeline="dit", scheduler=None, sampler=None, guidance_scale=1.0, num_inference_steps=4)
    for folder, own in ((pipeline_folder, "ddim"), (tmp_path / "dit", "dpm")):  # but figures are of its own
        assert sampler_settings(flags, describe_model(str(folder))) == {"method": own}
    config = make_config("SiT")
    export_pipeline(config, state_of(make_model(config)), vae, tmp_path / "stock")
    assert type(load_generator(str(tmp_path / "stock")).objective.scheduler) is EDMEulerScheduler


def test_evaluation_names_mistakes(pipeline_folder, sit_folder, few_digits, tmp_path):
    for more, expected in (
        (["--pipeline", str(tmp_path), "--digits", str(few_digits)], "model_index.json"),
        (
            ["--pipeline", str(pipeline_folder), "--digits", str(few_digits), "--sampler", "sde"],
            "--sampler sde is for a SiTPipeline; .* is a DiTPipeline$",
        ),
        (
            ["--pipeline", str(sit_folder), "--digits", str(few_digits), "--scheduler", "dpm"],
            "--scheduler dpm is for a DiTPipeline; .* is a SiTPipeline$",
        ),
        (["--pipeline", str(pipeline_folder), "--digits", str(tmp_path)], "train: no such folder"),
        (["--pipeline", str(pipeline_folder), "--digits", str(few_digits), "--num_images", "7"], "multiple of 10"),
        (["--pipeline", "p", "--digits", "d", "--seed=-1"], "--seed must be an integer from 0 to 4294967295, got -1"),
        (["--pipeline", "p", "--digits", "d", "--grid", "grid"], "--grid grid: has no ending; expected .png"),
        (["--pipeline", "p", "--digits", "d", "--guidance_scale", "nan"], "--guidance_scale nan: expected a finite"),
        (
            ["--pipeline", str(pipeline_folder), "--digits", str(few_digits), "--guidance_scale", "0.5"],
            "--guidance_scale 0.5: a DiTPipeline guides by scales above 1 only",
        ),
        (
            ["--pipeline", str(pipeline_folder), "--digits", str(few_digits), "--num_inference_steps", "501"],
            "--num_inference_steps 501: DDIM would start at timestep 500 of 1000",
        ),
    ):
        with pytest.raises(ValueError, match=expected):
            main(more)


def test_evaluation_wants_digits_of_the_pipelines_size(vae, few_digits, tmp_path):
    config = make_config("SiT", sample_size=2 * vae.config.sample_size // 8)
    export_pipeline(config, state_of(make_model(config)), vae, tmp_path / "large")
    command = ["--pipeline", str(tmp_path / "large"), "--num_images", "10", "--num_inference_steps", "2"]
    message = "draws images of 64x64 pixels, .*png is 32x32; expected digits of that size: .*--image_size 64"
    with pytest.raises(ValueError, match=message):
        main([*command, "--digits", str(few_digits)])
    for path in few_digits.rglob("*.png"):
        larger = tmp_path / "digits" / path.relative_to(few_digits)
        larger.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as digit:
            digit.resize((64, 64)).save(larger)
    main([*command, "--digits", str(tmp_path / "digits"), "--report", str(tmp_path / "report.json")])
    assert json.loads((tmp_path / "report.json").read_text())["num_images"] == 10


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--loop", "both"], "--loop both"),
        (["--model", "LargeDiT"], "--model LargeDiT: expected DiT or SiT"),
        (["--seed", "x"], "--seed x"),
        (["--sed", "1"], "--sed"),
        (["--loop"], "--loop needs a value"),
        (["--data", "smybols"], "--data smybols: expected digits, symbols, or a folder; there is no such folder"),
        (["--data", f"{ROOT}/assets/digits_vae"], "expected a folder for each class in it, with its pictures"),
        (["--data", f"{ROOT}/tests", "--output", f"{ROOT}/tests/out"], "lies in"),
    ],
)
def test_quickstart_refuses_bad_options_in_one_line(options, expected):
    done = subprocess.run(["bash", str(ROOT / "quickstart.sh"), *options], capture_output=True, text=True, timeout=10)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and expected in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout


def test_quickstart_help():
    done = subprocess.run(["bash", str(ROOT / "quickstart.sh"), "--help"], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0
    assert "--model DiT|SiT" in done.stdout and "--loop trainer|notrainer" in done.stdout


# A stand-in for Python: notes its words, and leaves the checkpoint that the next stage looks for.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >>commands.txt
script=$1
while [ $# -gt 1 ]; do
    case "$script $1" in
    *"_trainer.py --output") folder=$2/checkpoint-2000 ;;
    *"_notrainer.py --output") folder=$2/000-SiT/checkpoints/0002000 ;;
    esac
    shift
done
[ -z "$folder" ] || { mkdir -p "$folder" && : >"$folder/ema_state.pdparams"; }
"""


class TestInterruptedQuickstart:
    """With a stand-in for Python that ends as STOP says in the training stage."""

    @pytest.fixture
    def quickstart(self, tmp_path):
        stop = 'case "$1" in train*) if [ -e stop ]; then . ./stop; fi ;; esac\n'
        shutil.copy(ROOT / "quickstart.sh", tmp_path)
        python = FAKE_PYTHON.replace("while [", f"{stop}while [", 1)
        for name, text in (("tools/setup_env.sh", "exit 0\n"), (".venv/bin/python", python)):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)

        def run(*flags, stop="", interrupt=None):
            (tmp_path / "stop").write_text(stop)
            (tmp_path / "commands.txt").unlink(missing_ok=True)
            command = ["bash", str(tmp_path / "quickstart.sh"), *flags]
            process = subprocess.Popen(
                command, cwd=tmp_path, start_new_session=True, stdout=-1, stderr=-1, text=True, stdin=subprocess.DEVNULL
            )
            if interrupt is not None:
                until = time.monotonic() + 20
                while not (tmp_path / "started").exists() and time.monotonic() < until:
                    time.sleep(0.02)
                os.killpg(process.pid, interrupt)
            out, err = process.communicate(timeout=20)
            stages = [line.split()[0] for line in (tmp_path / "commands.txt").read_text().splitlines()]
            return process.returncode, stages, out, err

        return run

    @pytest.mark.parametrize(
        "stop, interrupt, code",
        [
            ("exit 75", None, 75),  # asked to stop in another way, and saved
            (": >started; exec sleep 20", signal.SIGINT, 130),
            ("trap 'exit 75' INT; : >started; while :; do sleep 0.1; done", signal.SIGINT, 130),
            (": >started; exec sleep 20", signal.SIGTERM, 143),
            ("exit 1", None, 1),
        ],
    )
    def test_the_same_command_goes_on(self, tmp_path, quickstart, stop, interrupt, code):
        folder = tmp_path / "a folder"
        flags = ["--seed", "3", "--output", str(folder)]
        found, stages, _, err = quickstart(*flags, stop=stop, interrupt=interrupt)
        assert found == code and len(stages) == 3
        assert ("failed" in err) == (code == 1)
        script = shlex.join(["bash", str(tmp_path / "quickstart.sh"), "--model", "DiT", "--loop", "trainer"])
        said = err.splitlines()[-1].removeprefix("to go on: ").replace("\\ ", "_")
        assert said == f"{script} --seed 3 --output {tmp_path}/a_folder"

        # With other settings it is another run, and goes elsewhere.
        found, stages, out, _ = quickstart("--seed", "4", "--output", str(folder))
        assert found == 0 and len(stages) == 6 and f"{folder}-2/report.json" in out

        found, stages, out, err = quickstart(*flags)
        assert found == 0, err
        assert [stage.split("/")[-1].split("_")[0] for stage in stages] == ["train", "convert", "evaluate", "report.py"]
        assert f"{folder}/report.json" in out and "=== digits: complete already" in out

        found, stages, out, _ = quickstart(*flags)  # a finished one stays
        assert len(stages) == 6 and f"{folder}-3/report.json" in out

        # With --demo it is opened, and nothing else is done.
        found, stages, *_ = quickstart(*flags, "--demo")
        assert found == 0 and stages == ["web_demo.py"]

    def test_a_folder_of_something_else_stays(self, tmp_path, quickstart):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/x").write_text("x")
        found, _, out, _ = quickstart("--output", str(tmp_path / "mine"))
        assert found == 0 and "/mine-2/report.json" in out and os.listdir(tmp_path / "mine") == ["x"]


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
@pytest.mark.parametrize("model", ["DiT", "SiT"])
def test_quickstart_runs_the_stages_of_the_model(model, loop, tmp_path):
    shutil.copy(ROOT / "quickstart.sh", tmp_path)
    for name, text in (("tools/setup_env.sh", "exit 0\n"), (".venv/bin/python", FAKE_PYTHON)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    command = ["bash", str(tmp_path / "quickstart.sh"), "--model", model, "--loop", loop, "--seed", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    output = f"outputs/quickstart/digits-{model}-{loop}-seed3"
    lines = (tmp_path / "commands.txt").read_text().splitlines()
    scripts = [line.split()[0] for line in lines]
    assert scripts[:4] == [
        "tools/prepare_digits.py",
        "tools/extract_features.py",
        f"train_image_generation_{loop}.py",
        f"tools/convert_{model.lower()}_to_ppdiffusers.py",
    ]
    assert set(scripts[4:-1]) == {"tools/evaluate_digits.py"}
    assert f"--config_file config/{model}_digits.json" in lines[2]
    checkpoint = {"trainer": "checkpoint-2000", "notrainer": "000-SiT/checkpoints/0002000"}[loop]
    assert f"--model_path {output}/train/{checkpoint} " in lines[3]
    assert f"--output {output}/pipeline" in lines[3] and ("--scheduler dpm" in lines[3]) == (model == "DiT")
    samplers = {"DiT": [""], "SiT": ["--sampler ode ", "--sampler sde "]}[model]
    grids = [f"--grid {output}/grid.png --output {output}/report.json"]
    grids += [f"--grid {output}/grid-sde.png --output {output}/report-sde.json"]
    assert len(lines) == 5 + len(samplers)
    assert lines[-1].startswith(f"tools/report.py {output}/train ")
    for line, sampler, grid in zip(lines[4:-1], samplers, grids, strict=False):
        assert line.endswith(f"--seed 3 {sampler}{grid}")
        assert grid.split()[1] in done.stdout and grid.split()[3] in done.stdout


def test_quickstart_with_own_pictures_from_another_folder(tmp_path):
    """Paths of the caller, an autoencoder and a config of their own, and commands to go on with."""
    repo, here = tmp_path / "a repo", tmp_path / "here"
    for name, text in (("tools/setup_env.sh", "exit 0\n"), (".venv/bin/python", FAKE_PYTHON)):
        (repo / name).parent.mkdir(parents=True)
        (repo / name).write_text(text)
        (repo / name).chmod(0o755)
    shutil.copy(ROOT / "quickstart.sh", repo)
    (here / "my pictures/cats").mkdir(parents=True)
    (here / "my pictures/cats/1.png").write_text("")
    command = ["bash", str(repo / "quickstart.sh"), "--data", "my pictures", "--model", "SiT"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    output = "outputs/quickstart/my pictures-SiT-trainer-seed0"
    lines = (here / "commands.txt").read_text().replace(f"{repo}/", "").splitlines()
    assert [line.split()[0] for line in lines] == [
        "tools/train_vae.py",
        "tools/extract_features.py",
        "tools/make_config.py",
        "train_image_generation_trainer.py",
        "tools/convert_sit_to_ppdiffusers.py",
        "infer_demo_sit.py",
        "tools/report.py",
    ]
    for line in lines[:2]:
        assert f"--data_path {here}/my pictures " in line and "--on_error skip --background white" in line
    assert f"--config_file {output}/config.json" in lines[3] and f"--vae {output}/vae" in lines[1]
    commands = [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("next: ")]
    assert commands[0][1:4] == [str(repo / "infer_demo_sit.py"), "--model_path", f"{output}/pipeline"]
    assert {"--demo", f"{here}/my pictures", f"{here}/{output}"} <= set(commands[1])
    seconds = [line for line in done.stdout.splitlines() if re.fullmatch(r"\w+ +\d+ s", line)]
    assert [line.split()[0] for line in seconds][-3:] == ["samples", "report", "total"] and len(seconds) == 8
