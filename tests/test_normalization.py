"""Normalisation by channel, of every format: what training gets, and that whoever decodes undoes it."""

import json
import os
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from ppdiffusers import DiTPipeline
from support.evaluated import write_program, write_reference
from support.feature_sets import dataset, everything, pack_set, write_lightning, write_set
from support.pipelines import make_halving_vae
from support.runs import TINY_MODELS

from config.schema import load_config, resolve_config
from features.autoencoder import LatentScaling, choose_vae, describe_vae
from features.normalization import normalize
from models import build_model
from objectives import build_objective
from sampling import SiTPipeline
from sampling.generator import load_generator
from tools import check_features, convert_dit_to_ppdiffusers, convert_sit_to_ppdiffusers, export_inference, sample_npz
from training.checkpoints.find import check_run
from training.checkpoints.read import load_pretrained
from training.evaluation import Evaluation
from training.preview import Preview
from training.setup import build_dataset
from weights.files import save_pdparams

MEAN, STD = [0.5, -1.0, 2.0, 0.25], [2.0, 0.5, 4.0, 1.5]
CHANNEL = {"latent_normalization": "channel", "latent_multiplier": 0.5}


def with_manifest(folder, name="imagenet64", **manifest):
    (folder / f"{name}_manifest.json").write_text(json.dumps({"channel_mean": MEAN, "channel_std": STD, **manifest}))
    return folder


def by_hand(latents, multiplier=0.5):
    return (latents - np.reshape(MEAN, (4, 1, 1))) / np.reshape(STD, (4, 1, 1)) * multiplier


# ---- What training gets ----


@pytest.mark.parametrize("packed", [False, True])
def test_sets_of_both_formats_are_normalised_on_request(packed, tmp_path):
    latents, _ = write_set(tmp_path / "set")
    folder = pack_set(tmp_path / "set", tmp_path / "packed") if packed else tmp_path / "set"
    with_manifest(folder)
    np.testing.assert_array_equal(everything(dataset(folder))[0], latents)
    np.testing.assert_allclose(everything(dataset(folder, **CHANNEL))[0], by_hand(latents), atol=1e-6)
    np.testing.assert_array_equal(everything(dataset(folder, latent_multiplier=0.5))[0], latents / 2)
    data = dataset(folder, **CHANNEL)
    assert data.normalization == {"mean": MEAN, "std": STD, "multiplier": 0.5}
    np.testing.assert_array_equal(everything(data.in_memory())[0], everything(data)[0])


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_of_moments_what_is_drawn_is_normalised(posterior, tmp_path):
    write_set(tmp_path, moments=True)
    with_manifest(tmp_path, moments=True)
    places = np.arange(40) * 3
    drawn = everything(dataset(tmp_path, posterior=posterior, seed=4), places)[0]
    normalised = everything(dataset(tmp_path, posterior=posterior, seed=4, **CHANNEL), places)[0]
    np.testing.assert_allclose(normalised, by_hand(drawn), atol=1e-6)


def test_a_set_without_statistics_is_told_how_to_get_them(tmp_path, capsys):
    latents, _ = write_set(tmp_path)
    for path in (tmp_path / "imagenet64_features").glob("*.npy"):
        np.save(path, 5 * np.load(path))
    told = f"tools/check_features.py --feature_path {tmp_path} --write_statistics computes them"
    with pytest.raises(ValueError, match=f"channel_mean and channel_std in the set's manifest; {told}"):
        dataset(tmp_path, **CHANNEL)
    flags = ["--feature_path", str(tmp_path), "--output", str(tmp_path / "report.json"), "--write_statistics"]
    with pytest.raises(SystemExit):  # the scale of the latents is a problem, until a run normalises them
        check_features.main([*flags, "--image_size", "64", "--num_workers", "1"])
    normalised = everything(dataset(tmp_path, **CHANNEL))[0]
    np.testing.assert_allclose(normalised.std(axis=(0, 2, 3)), [0.5] * 4, rtol=1e-5)
    assert json.loads((tmp_path / "imagenet64_manifest.json").read_text())["version"] == 1


@pytest.mark.parametrize("packed", [False, True])
def test_statistics_of_moments_that_no_manifest_tells_of(packed, tmp_path, capsys):
    write_set(tmp_path / "set", moments=True)
    folder = pack_set(tmp_path / "set", tmp_path / "packed") if packed else tmp_path / "set"
    for path in folder.glob("*_manifest.json"):
        os.remove(path)
    flags = ["--feature_path", folder, "--output", tmp_path / "report.json", "--write_statistics", "--num_workers", 1]
    check_features.main([*map(str, flags)])
    assert "taken for moments, mean and standard deviation of 4 channels" in capsys.readouterr().out
    drawn, normalised = (
        everything(dataset(folder, posterior="mean", **options))[0]
        for options in ({"latent_normalization": "none"}, CHANNEL)
    )
    values = json.loads((folder / "imagenet64_manifest.json").read_text())
    mean, std = (np.array(values[f"channel_{what}"])[:, None, None] for what in ("mean", "std"))
    np.testing.assert_allclose(normalised, (drawn - mean) / std * CHANNEL["latent_multiplier"], atol=1e-5)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (
            {"channel_std": [1.0, 2.0]},
            "its channel_std can't normalise its latents: expected a number above 0 for each of",
        ),
        (
            {"channel_std": [1.0, 0.0, 1.0, 1.0]},
            "its channel_std can't normalise .*: expected a number above 0 for each",
        ),
        ({"channel_mean": [1.0, "x", 1.0, 1.0]}, "its channel_mean can't normalise its latents: expected a number for"),
    ],
)
def test_statistics_that_cannot_be(statistics, message, tmp_path):
    write_set(tmp_path)
    with_manifest(tmp_path, **statistics)
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, **CHANNEL)


def test_a_manifest_that_says_no_known_normalisation(tmp_path):
    write_set(tmp_path)
    with_manifest(tmp_path, latent_normalization="chanel")
    with pytest.raises(ValueError, match="latent_normalization is chanel in its manifest, expected none or channel"):
        dataset(tmp_path)
    assert dataset(tmp_path, **CHANNEL).normalization["mean"] == MEAN  # the config wins


# ---- What decodes ----


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling_factor": 0.2},
        {"scaling_factor": 1.5, "shift_factor": 0.6},
        {"scaling_factor": 0.8, "latents_mean": [0.5, -0.3, 0.1, 2.0], "latents_std": [2.0, 0.5, 1.0, 4.0]},
    ],
)
@pytest.mark.parametrize("normalization", [{"mean": MEAN, "std": STD}, {"mean": None, "std": None}])
def test_scaling_and_normalisation_are_one_scaling(settings, normalization):
    own, z = LatentScaling.of(settings), np.random.default_rng(0).standard_normal((3, 4, 2, 2)).astype("float32")
    normalization = {**normalization, "multiplier": 0.5}
    both = own.normalized(normalization, 4)
    seen = normalize(own.normalize(z), normalization)
    np.testing.assert_allclose(both.normalize(z), seen, atol=1e-5)
    np.testing.assert_allclose(both.denormalize(seen), z, atol=1e-5)


def test_a_normalisation_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="latent_normalization: latents_mean has 4 values, expected one for each of 3"):
        LatentScaling.of({"scaling_factor": 0.2}).normalized({"mean": MEAN, "std": STD, "multiplier": 1.0}, 3)


def decoded_by_hand(vae, latents, factor):
    z = (latents.numpy() / 0.5 * np.reshape(STD, (4, 1, 1)) + np.reshape(MEAN, (4, 1, 1))) / factor
    with paddle.no_grad():
        images = vae.decode(paddle.to_tensor(z.astype("float32"))).sample.numpy()
    return (images.transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A set of a known autoencoder, and checkpoints of networks that were trained on it normalised."""
    folder = tmp_path_factory.mktemp("run")
    vae = make_halving_vae(folder / "vae", scaling_factor=0.6)
    other = make_halving_vae(scaling_factor=0.3)
    other.decoder.conv_out.bias.set_value(other.decoder.conv_out.bias + 0.5)
    other.save_pretrained(str(folder / "other"), safe_serialization=False)
    rng = np.random.default_rng(0)
    for kind in ("features", "labels"):
        (folder / "set" / f"imagenet8_{kind}").mkdir(parents=True)
    for index in range(8):
        np.save(folder / f"set/imagenet8_features/{index}.npy", rng.standard_normal((1, 4, 4, 4)).astype("float32"))
        np.save(folder / f"set/imagenet8_labels/{index}.npy", np.array([index % 3]))
    own = describe_vae(vae, str(folder / "vae"))
    with_manifest(folder / "set", "imagenet8", image_size=8, scaling_factor=0.6, vae=own)
    found = SimpleNamespace(vae=vae, other=other, folder=folder, configs={})
    for kind in ("DiT", "SiT"):
        model = {**TINY_MODELS[kind], "sample_size": 4, "num_classes": 3, "num_layers": 1}
        config = found.configs[kind] = resolve_config({"model": model, "data": CHANNEL})
        build_dataset(config, folder / "set", 8)
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps(config))
        state = {name: value.numpy() for name, value in build_model(config["model"]).named_parameters()}
        save_pdparams(state, str(folder / kind / "model_state.pdparams"))
    found.latents = paddle.randn([2, 4, 4, 4])
    found.images = decoded_by_hand(vae, found.latents, 0.6)
    return found


def assert_same(images, expected):
    np.testing.assert_allclose(images, expected, atol=2e-5)
    assert np.std(expected) > 0.05


@pytest.mark.parametrize("kind", ["DiT", "SiT"])
def test_demos_and_pipeline_folders(kind, run, tmp_path):
    checkpoint, pipeline = str(run.folder / kind), str(tmp_path / "pipe")
    generator = load_generator(checkpoint)
    assert generator.features["latent_normalization"] == {"mean": MEAN, "std": STD, "multiplier": 0.5}
    assert_same(generator.decode(run.latents), run.images)
    other = load_generator(checkpoint, vae=str(run.folder / "other"))  # scaled by its own factor, as ever
    assert_same(other.decode(run.latents), decoded_by_hand(run.other, run.latents, 0.3))

    converter = {"DiT": convert_dit_to_ppdiffusers, "SiT": convert_sit_to_ppdiffusers}[kind]
    converter.main(["--model_path", checkpoint, "--output", pipeline])
    carried = json.loads((tmp_path / "pipe/model_index.json").read_text())["_features"]
    assert carried["latent_normalization"] == {"mean": MEAN, "std": STD, "multiplier": 0.5}
    assert carried["vae"]["scaling_factor"] == 0.6  # the autoencoder's own
    loaded = load_generator(pipeline)
    assert_same(loaded.decode(run.latents), run.images)
    assert loaded.features["latent_normalization"] == carried["latent_normalization"]
    if kind == "SiT":
        SiTPipeline.from_pretrained(pipeline).save_pretrained(tmp_path / "again")
        return assert_same(load_generator(str(tmp_path / "again")).decode(run.latents), run.images)
    stock = DiTPipeline.from_pretrained(pipeline).vae  # decodes latents / scaling_factor
    with paddle.no_grad():
        images = stock.decode(run.latents / stock.config.scaling_factor).sample.numpy()
    assert_same((images.transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1), run.images)


def test_programs_for_paddle_inference(run, tmp_path):
    export_inference.main(["--model_path", str(run.folder / "DiT"), "--output", str(tmp_path / "out")])
    generator = load_generator(str(tmp_path / "out"), backend="inference")
    assert_same(generator.decode(run.latents), run.images)
    assert generator.features["latent_normalization"]["std"] == STD


def test_previews_evaluations_and_sample_files(run, tmp_path):
    config = json.loads(json.dumps(run.configs["SiT"]))
    objective = build_objective(config)
    pictures = (run.images * 255).round()
    assert np.abs(Preview(objective, config, vae=None).decoder(run.latents) - pictures).max() <= 1
    reference = write_reference(tmp_path / "reference.npz", side=8)
    program = write_program(tmp_path)
    config["evaluation"] |= {"steps": 1, "reference": reference, "features": program, "num_samples": 4}
    assert_same(Evaluation(objective, config, vae=None).generator.decode(run.latents), run.images)

    flags = ["--num_images", "2", "--num_inference_steps", "2", "--output", str(tmp_path / "s.npz")]
    sample_npz.main(["--model_path", str(run.folder / "SiT"), *flags])
    scaling = json.loads((tmp_path / "s.json").read_text())["vae_scaling"]
    assert scaling["scaling_factor"] == 0.5 and np.allclose(scaling["latents_std"], np.array(STD) / 0.6)


# ---- What does not fit ----


def test_another_normalisation_than_the_checkpoints_is_one_line(run):
    config = load_config(run.folder / "SiT/config.json")
    config["data"]["latent_multiplier"] = 1.0
    build_dataset(config, run.folder / "set", 8)
    here = "latent_normalization's multiplier 1.0 here, 0.5 there"
    note = load_pretrained(str(run.folder / "SiT"), build_model(config["model"]), config=config)
    assert note.endswith(f"{run.folder}/SiT was trained on other latents: {here}")
    with pytest.raises(ValueError, match="SiT: was trained on latents normalised otherwise: .* 0.5 there, 1.0 here; "):
        check_run("SiT", run.configs["SiT"], config)
    config["features"]["latent_normalization"] = None
    with pytest.raises(ValueError, match="otherwise: latent_normalization by channel, times 0.5 there, none"):
        check_run("SiT", run.configs["SiT"], config)
    same = run.configs["SiT"]
    assert "other latents" not in load_pretrained(str(run.folder / "SiT"), build_model(config["model"]), config=same)


def test_a_set_that_does_not_tell_its_autoencoder(tmp_path):
    write_lightning(tmp_path, shape=(32, 4, 4))
    config = resolve_config({"model": {**TINY_MODELS["SiT"], "sample_size": 4, "in_channels": 32}})
    build_dataset(config, tmp_path, None)
    told = "the latents have 32 channels, and their set does not tell its autoencoder; stabilityai/sd-vae-ft-mse has 4"
    with pytest.raises(ValueError, match=f"{told}: give the one that encoded them by --vae"):
        Preview(build_objective(config), config, vae=None)
    make_halving_vae(tmp_path / "four")
    with pytest.raises(ValueError, match="latent_channels is 4, and 32 for the autoencoder that made the features"):
        Preview(build_objective(config), config, vae=str(tmp_path / "four"))
    told = {**config["features"]["vae"], "latent_channels": 4}
    note = "the set does not tell its autoencoder: owner/vae is taken, see --vae"
    assert choose_vae(None, told, "owner/vae", "--vae") == ("owner/vae", note)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"latent_normalization": "std"}, "latent_normalization must be one of none, channel, or null"),
        ({"latent_multiplier": 0}, "latent_multiplier must be a number above 0"),
    ],
)
def test_options_are_checked(data, message):
    with pytest.raises(ValueError, match=message):
        resolve_config({"model": TINY_MODELS["SiT"], "data": data})
