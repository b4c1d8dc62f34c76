"""What a feature set is made of travels with it: to the run, its checkpoints, its pipelines and the demos."""

import contextlib
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import DiTPipeline
from support.pipelines import make_halving_vae as make_vae
from support.runs import TINY_MODELS, checkpoint_path, loop_arguments, write_config, write_features

import infer_demo_dit
import infer_demo_sit
from config.options import FEATURES_KEYS
from config.schema import load_config, resolve_config
from features.autoencoder import LatentDecoder, LatentScaling, choose_vae, load_vae
from models import build_model
from sampling import SiTPipeline
from sampling.generator import from_weights
from sampling.labels import find_classes, find_labels, weights_labels
from sampling.model_path import describe_model
from sampling.pipelines import inference
from sampling.pipelines.export import export_pipeline
from tools import check_features, convert_dit_to_ppdiffusers, convert_sit_to_ppdiffusers, export_inference, sample_npz
from tools.extract_features import main
from training.setup import build_dataset, describe_data_changes, describe_features
from weights.files import save_pdparams


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
    assert "class_names 2 names" in capsys.readouterr().out

    # Its config.json with another set: that one counts, and it is said.
    other = write_set(tmp_path / "other", {**MANIFEST, "scaling_factor": 0.5}, {"0": "bird"})
    config = checkpoint_path(loop, tmp_path / "out", 1) / "config.json"
    run_loop(loop, loop_arguments(loop, config=config, features=other, output=tmp_path / "two", steps=1))
    assert load_config(checkpoint_path(loop, tmp_path / "two", 1) / "config.json")["features"]["class_names"] == {
        "0": "bird"
    }
    said = capsys.readouterr().out
    assert "scaling_factor 0.5 here, 1.5 there; class 0 is bird here, cat there" in said
    plain = write_features(tmp_path / "plain")
    run_loop(loop, loop_arguments(loop, config=config, features=plain, output=tmp_path / "three", steps=1))
    assert "this one counts: it has neither manifest nor class names" in capsys.readouterr().out


def test_relative_autoencoder_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    features = write_set(tmp_path / "set", {**MANIFEST, "vae": {"name": "vae"}}, {})
    monkeypatch.chdir(tmp_path)
    assert describe_features(features, 64, 10)[0]["vae"]["name"] == str(tmp_path / "vae")


def test_sets_without_a_manifest_tell_nothing(features):
    assert describe_features(features, 64, 10) == (dict.fromkeys(FEATURES_KEYS), [])


def test_a_config_that_does_not_fit_its_set_is_told_what_to_write(tmp_path):
    manifest = {**MANIFEST, "num_classes": 10, "class_counts": [2, 2, 2, 2, 2, 2, 1, 1, 1, 1]}
    features = write_set(tmp_path / "set", manifest, {})

    def notes(image_size=None, classes=None, **model):
        raw = {"model": {**TINY_MODELS["DiT"], "num_classes": 10, **model}, "data": {"classes": classes}}
        return " ".join(build_dataset(resolve_config(raw), features, image_size)[0].notes)

    assert not notes() and not notes(64)
    write = 'the config\'s num_classes is {}: write "num_classes": 10 in its section model'
    assert write.format(1000) in notes(num_classes=1000)
    with pytest.raises(ValueError, match=write.format(9) + ", or choose classes by --classes"):
        notes(num_classes=9)
    assert not notes(num_classes=9, classes=[0, 3])
    with pytest.raises(ValueError, match='; for this set write "sample_size": 8 in its section model'):
        notes(sample_size=16)
    assert "image size 32: the set imagenet64 in" in notes(32)


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


# ---------------------------------------------------------------------------------------------------------------------
# The scale of latents
# ---------------------------------------------------------------------------------------------------------------------

SHIFTED = {"latent_channels": 16, "shift_factor": 0.6, "scaling_factor": 1.5}
STATISTICS = {"latents_mean": [0.5, -0.3, 0.1, 2.0], "latents_std": [2.0, 0.5, 1.0, 4.0], "scaling_factor": 0.8}


def expected_latents(z, settings):
    """What diffusers' pipelines make of `z`: Stable Diffusion 3 of a shift, Stable Diffusion XL of statistics."""
    if "shift_factor" in settings:
        return (z - settings["shift_factor"]) * settings["scaling_factor"]
    mean, std = (np.reshape(np.array(settings[key]), [1, -1, 1, 1]) for key in ("latents_mean", "latents_std"))
    return (z - mean) * settings["scaling_factor"] / std


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for index in range(2):
            Image.fromarray(random.integers(0, 256, [8, 8, 3], "uint8")).save(root / name / f"{index}.png")
    return root


def extract(images, folder, vae, *flags):
    paths = ["--data_path", str(images), "--features_path", str(folder), "--vae", str(vae)]
    main([*paths, "--image_size", "8", "--device", "cpu", *flags])
    return folder


def read_set(folder, kind="features"):
    return np.concatenate([np.load(folder / f"imagenet8_{kind}" / f"{index}.npy") for index in range(4)])


@pytest.mark.parametrize("settings", [SHIFTED, STATISTICS], ids=["shift", "statistics"])
def test_extraction_and_decoder_scale_as_diffusers_does(settings, images, tmp_path, capsys):
    vae = make_vae(tmp_path / "vae", **settings)
    extract(images, tmp_path / "set", tmp_path / "vae", "--moments", "--flip")
    pixels = [np.asarray(Image.open(path)) for path in sorted(images.rglob("*.png"))]
    mirrored = [image[:, ::-1] for image in pixels]
    for kind, batch in (("features", pixels), ("features_flip", mirrored)):
        x = paddle.to_tensor(np.stack(batch).transpose(0, 3, 1, 2) / 127.5 - 1).astype("float32")
        with paddle.no_grad():
            posterior = vae.encode(x).latent_dist
        mean, std = np.split(read_set(tmp_path / "set", kind), 2, axis=1)
        wanted = expected_latents(posterior.mean.numpy(), settings)
        np.testing.assert_allclose(mean, wanted, atol=2e-5)
        one_std_up = expected_latents((posterior.mean + posterior.std).numpy(), settings)
        np.testing.assert_allclose(std, one_std_up - wanted, atol=2e-5)

    with paddle.no_grad():
        decoded = vae.decode(posterior.mean).sample.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(
        LatentDecoder(vae).decode(paddle.to_tensor(mean)), (decoded / 2 + 0.5).clip(0, 1), atol=1e-5
    )
    manifest = json.loads((tmp_path / "set" / "imagenet8_manifest.json").read_text())
    nothing = {"shift_factor": None, "latents_mean": None, "latents_std": None}
    expected = {**nothing, **settings}
    expected.pop("latent_channels", None)
    assert {key: manifest[key] for key in expected} == expected

    # The same weights with another scale can't go on in this set.
    capsys.readouterr()
    make_vae(tmp_path / "other", **{**settings, "scaling_factor": 1.0})
    with pytest.raises(ValueError, match="scaling_factor of the VAE was"):
        extract(images, tmp_path / "set", tmp_path / "other", "--moments", "--flip")


def test_samples_are_shifted_too(images, tmp_path):
    make_vae(tmp_path / "vae", **SHIFTED)
    make_vae(tmp_path / "plain", **{**SHIFTED, "shift_factor": None})
    sets = [read_set(extract(images, tmp_path / f"{name}_set", tmp_path / name)) for name in ("vae", "plain")]
    np.testing.assert_allclose(sets[0], sets[1] - 0.6 * 1.5, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shift_factor": 0.5, "latents_mean": 0.0, "latents_std": 1.0}, "can't be combined"),
        ({"latents_mean": [0.0] * 4}, "has latents_mean but no latents_std; expected both or none"),
        ({"latents_mean": 0.0, "latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std must be a number above 0, a list of"),
        ({"latents_mean": [0.0] * 3, "latents_std": 1.0}, "3 values, expected one for each of 4 channels"),
        ({"scaling_factor": 0}, "scaling_factor must be a number above 0, got 0"),
    ],
)
def test_a_scale_that_cannot_be_is_one_line(settings, message, tmp_path):
    make_vae(tmp_path, **settings)
    with pytest.raises(ValueError, match=message) as error:
        load_vae(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("settings", [SHIFTED, STATISTICS], ids=["shift", "statistics"])
def test_stock_folders_hold_the_scale_in_their_vae(settings, convolutions, tmp_path):
    """DiTPipeline decodes latents / scaling_factor; its folder must give the pictures of our decoder all the same."""
    from ppdiffusers import DiTPipeline

    channels = settings.get("latent_channels", 4)
    vae = make_vae(use_quant_conv=convolutions, use_post_quant_conv=convolutions, **settings)
    config = resolve_config({"model": {**TINY_MODELS["DiT"], "sample_size": 4, "in_channels": channels}})
    network = build_model(config["model"])
    state = {name: value.numpy() for name, value in network.named_parameters()}
    export_pipeline(config, state, vae, tmp_path / "pipe", timestep_embedding="keep")

    pipe = DiTPipeline.from_pretrained(str(tmp_path / "pipe"))
    latents = paddle.randn([2, channels, 4, 4])
    with paddle.no_grad():
        stock = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    ours = LatentDecoder(vae).decode(latents)
    np.testing.assert_allclose(stock.clip(0, 1).numpy().transpose(0, 2, 3, 1), ours, atol=1e-5)

    # Whoever encodes with the folder's VAE, or decodes with it here, gets the same latents and pictures.
    np.testing.assert_allclose(LatentDecoder(load_vae(str(tmp_path / "pipe" / "vae"))).decode(latents), ours, atol=1e-5)
    with paddle.no_grad():
        pixels = paddle.randn([2, 3, 8, 8])
        theirs, own = (one.encode(pixels).latent_dist for one in (pipe.vae, vae))
    scaling = LatentScaling.of(vae.config)
    factor = settings["scaling_factor"]
    np.testing.assert_allclose(theirs.mean * factor, scaling.normalize(own.mean), atol=1e-5)
    np.testing.assert_allclose(theirs.std * factor, scaling.normalize_std(own.std), atol=1e-5)


def test_programs_for_paddle_inference_shift_too(tmp_path):
    vae = make_vae(**SHIFTED)
    config = resolve_config({"model": {**TINY_MODELS["DiT"], "sample_size": 4, "in_channels": 16, "num_layers": 1}})
    state = {name: value.numpy() for name, value in build_model(config["model"]).named_parameters()}
    inference.export_inference(from_weights(config, state, vae), str(tmp_path / "out"))
    latents = paddle.randn([2, 16, 4, 4])
    loaded = inference.load_inference(str(tmp_path / "out"))
    np.testing.assert_allclose(LatentDecoder(loaded.vae).decode(latents), LatentDecoder(vae).decode(latents), atol=1e-4)

    # A folder of before has the scaling factor alone.
    path = tmp_path / "out" / "inference.json"
    manifest = json.loads(path.read_text())
    for key in ("shift_factor", "latents_mean", "latents_std"):
        del manifest[key]
    path.write_text(json.dumps(manifest))
    assert LatentDecoder(inference.load_inference(str(tmp_path / "out")).vae).scaling.is_plain


def test_statistics_of_many_channels_are_read(tmp_path):
    settings = {"latent_channels": 40, "latents_mean": [0.1] * 40, "latents_std": [2.0] * 40}
    make_vae(tmp_path, **settings)
    assert LatentScaling.of(load_vae(str(tmp_path)).config).latents_std == [2.0] * 40


def test_check_features_knows_latents_without_their_statistics(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    statistics = {"scaling_factor": 1.0, "latents_mean": [5.0, -5.0, 0.0, 0.0], "latents_std": [4.0] * 4}
    write_set(tmp_path, {**MANIFEST, "shift_factor": None, **statistics}, {})
    mean = np.reshape([5, -5, 0, 0], [4, 1, 1])
    for path in (tmp_path / "imagenet64_features").glob("*.npy"):
        np.save(path, (np.load(path) * 4 + mean).astype("float32"))
    with pytest.raises(SystemExit):
        check_features.main(["--feature_path", str(tmp_path), "--resolution", "64", "--num_workers", "1"])
    assert "scaling factor 1, with shift or statistics, is not in them" in capsys.readouterr().out


def test_a_set_of_before_the_shift_was_written_is_the_same_set(images, tmp_path, capsys):
    make_vae(tmp_path / "vae")
    path = extract(images, tmp_path / "set", tmp_path / "vae") / "imagenet8_manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("shift_factor", "latents_mean", "latents_std"):
        del manifest[key]
    path.write_text(json.dumps(manifest))
    extract(images, tmp_path / "set", tmp_path / "vae")
    assert "complete since an earlier start" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Which autoencoder, and the names of classes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A set extracted with a relative VAE, and checkpoints of networks for it: `{"vae", "set", "DiT", "SiT"}`."""
    folder = tmp_path_factory.mktemp("run")
    make_vae(folder / "vae")
    before = os.getcwd()
    os.chdir(folder)
    try:
        extract(images, folder / "set", "vae")
    finally:
        os.chdir(before)
    model = {**TINY_MODELS["DiT"], "sample_size": 4, "num_classes": 3, "num_layers": 1}
    checkpoints = {}
    for kind in ("DiT", "SiT"):
        config = resolve_config({"model": {**model, "type": kind}})
        build_dataset(config, folder / "set", 8)
        checkpoints[kind] = checkpoint = folder / kind / "checkpoint-1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text(json.dumps(config))
        state = {name: value.numpy() for name, value in build_model(config["model"]).named_parameters()}
        save_pdparams(state, str(checkpoint / "model_state.pdparams"))
    return {"vae": folder / "vae", "set": folder / "set", **checkpoints}


CONVERTERS = {"DiT": convert_dit_to_ppdiffusers, "SiT": convert_sit_to_ppdiffusers}
DEMOS = {"DiT": infer_demo_dit, "SiT": infer_demo_sit}


def draw(kind, path, output, *flags):
    DEMOS[kind].main(
        ["--model_path", str(path), "--num_inference_steps", "2", "--output", str(output), *map(str, flags)]
    )
    return np.asarray(Image.open(output))


def convert(kind, weights, output, *flags):
    CONVERTERS[kind].main(["--model_weights", str(weights), "--checkpoint_path", str(output), *map(str, flags)])


def own_features(run):
    return json.loads((run["DiT"] / "config.json").read_text())["features"]


@pytest.mark.parametrize("kind", ["DiT", "SiT"])
def test_tools_take_autoencoder_and_names_from_the_checkpoint(kind, run, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = draw(kind, run[kind], tmp_path / "told.png", "--classes", "1", "--vae", run["vae"])
    image = draw(kind, run[kind], tmp_path / "a.png", "--classes", "dog")
    assert (image == told).all() and "note" not in capfd.readouterr().out
    convert(kind, run[kind], tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["id2label"] == {"0": "cat", "1": "dog", "2": "2"}
    draw(kind, tmp_path / "pipe", tmp_path / "b.png", "--classes", "dog")
    carried = {**own_features(run), "class_names": None}
    assert len(carried["channel_std"]) == 4 and carried["image_size"] == 8 and carried["vae"]["weights_sha256"]
    assert describe_model(str(tmp_path / "pipe")).features == carried
    if kind == "SiT":
        SiTPipeline.from_pretrained(tmp_path / "pipe").save_pretrained(tmp_path / "again")
        assert describe_model(str(tmp_path / "again")).features == carried
    else:  # stock ppdiffusers knows nothing of it, and says nothing
        DiTPipeline.from_pretrained(str(tmp_path / "pipe"))
        assert "_features" not in capfd.readouterr().err

    # Weights by file with a plain config of the same network: what stands beside them is not forgotten.
    config = tmp_path / f"{kind}.json"
    config.write_text(json.dumps({"model": json.loads((run[kind] / "config.json").read_text())["model"]}))
    convert(kind, run[kind] / "model_state.pdparams", tmp_path / "by_file", "--config_file", config)
    assert json.loads((tmp_path / "by_file" / "model_index.json").read_text())["id2label"]["1"] == "dog"


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_from_the_set_to_samples_nothing_is_given_twice(loop, run, tmp_path, run_loop, capsys, monkeypatch):
    """No image size, autoencoder, class name or number of a checkpoint on the way."""
    monkeypatch.chdir(tmp_path)
    model = {**TINY_MODELS["DiT"], "sample_size": 4, "num_classes": 3, "num_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    options = {"output": tmp_path / "out", "steps": 11, "batch": 4, "save_every": 5}
    flags = loop_arguments(loop, config=tmp_path / "config.json", features=run["set"], **options)
    run_loop(loop, [flag for flag in flags if "=64" not in flag])
    newest = str(checkpoint_path(loop, tmp_path / "out", 11))
    capsys.readouterr()
    draw("DiT", "out", tmp_path / "a.png", "--classes", "dog")
    assert f"is taken, {os.path.relpath(newest)}" in capsys.readouterr().out
    convert("DiT", "out", "pipe")
    sample_npz.main(["--model_path", "pipe", "--num_images", "4", "--num_inference_steps", "2", "--output", "s.npz"])
    assert json.loads((tmp_path / "s.json").read_text())["image_size"] == [8, 8]
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["id2label"]["1"] == "dog" and index["_features"]["image_size"] == 8
    assert index["_features"]["vae"] == own_features(run)["vae"]


def test_inference_export_and_names_by_flag(run, tmp_path, capsys):
    export_inference.main(["--model_path", str(run["DiT"]), "--output", str(tmp_path / "out")])
    manifest = json.loads((tmp_path / "out" / "inference.json").read_text())
    assert manifest["id2label"] == {"0": "cat", "1": "dog"}
    assert describe_model(str(tmp_path / "out")).features == {**own_features(run), "class_names": None}
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}}))
    convert("DiT", run["DiT"], tmp_path / "pipe", "--id2label", labels)
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["id2label"]["1"] == "b"


def test_the_features_weights_decode_as_the_features_were_scaled(run, tmp_path, capsys):
    """The same weights beside a config of another scale: the latents are still what they are."""
    make_vae(tmp_path / "v2", scaling_factor=1.1)
    right = draw("DiT", run["DiT"], tmp_path / "a.png")
    image = draw("DiT", run["DiT"], tmp_path / "b.png", "--vae", tmp_path / "v2")
    said = capsys.readouterr().out
    assert said.count("scaling_factor 0.18215, not 1.1") == 1 and str(tmp_path / "v2") in said
    assert (image == right).all()


def other_weights(folder, **settings):
    vae = make_vae(**settings)
    vae.decoder.conv_out.bias.set_value(vae.decoder.conv_out.bias + 0.5)
    vae.save_pretrained(str(folder), safe_serialization=False)
    return folder


def check_set(folder, report, *flags):
    with contextlib.suppress(SystemExit):  # random weights have no latents of unit variance
        check_features.main(["--feature_path", str(folder), "--output", str(report), *map(str, flags)])


def test_check_features_draws_a_picture_by_the_manifests_autoencoder(run, tmp_path, capsys):
    check_set(run["set"], tmp_path / "report.json")
    assert f"picture: {tmp_path}/report.png" in capsys.readouterr().out and (tmp_path / "report.png").exists()
    features = shutil.copytree(run["set"], tmp_path / "set")
    manifest = json.loads((features / "imagenet8_manifest.json").read_text())
    for name, said in (("owner/vae", "may need a download: --vae owner/vae, the"), ("/gone/vae", "give it by --vae")):
        manifest["vae"] |= {"name": name, "path": None}
        (features / "imagenet8_manifest.json").write_text(json.dumps(manifest))
        check_set(features, tmp_path / "other.json", "--overwrite")
        assert said in capsys.readouterr().out and not (tmp_path / "other.png").exists()


@pytest.mark.parametrize("tool", ["demo", "converter", "export_inference", "check_features", "preview"])
def test_another_autoencoder_is_used_and_said(tool, run, tmp_path, capsys, run_loop, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = other_weights(tmp_path / "other")
    bad = make_vae(tmp_path / "bad", latent_channels=8) and tmp_path / "bad"

    def use(vae, output):
        if tool == "demo":
            draw("SiT", run["SiT"], tmp_path / f"{output}.png", "--vae", vae)
        elif tool == "converter":
            convert("SiT", run["SiT"], tmp_path / output, "--vae_model", vae)
        elif tool == "export_inference":
            flags = ["--model_path", run["DiT"], "--vae", vae, "--output", tmp_path / output]
            export_inference.main([str(flag) for flag in flags])
        elif tool == "check_features":
            check_set(run["set"], tmp_path / f"{output}.json", "--vae", vae)
        else:
            config = tmp_path / "config.json"
            model = json.loads((run["DiT"] / "config.json").read_text())["model"]
            config.write_text(json.dumps({"model": model}))
            flags = loop_arguments(
                "notrainer", config=config, features=run["set"], output=tmp_path / output, steps=1, batch=4
            )
            flags = [flag.replace("image_size=64", "image_size=8") for flag in flags]
            run_loop("notrainer", [*flags, "--image_logging_steps=1", "--num_inference_steps=2", f"--vae={vae}"])

    use(vae, "out")
    notes = [line for line in capsys.readouterr().out.splitlines() if "the features were made with" in line]
    assert len(notes) == 1 and str(vae) in notes[0] and "weights of sha256" in notes[0]
    with pytest.raises(ValueError, match="latent_channels is 8, and 4 for the autoencoder that made the features"):
        use(bad, "no")


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_previews_take_the_features_autoencoder(loop, run, tmp_path, run_loop, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": json.loads((run["DiT"] / "config.json").read_text())["model"]}))
    flags = loop_arguments(loop, config=config, features=run["set"], output=tmp_path / "out", steps=1, batch=4)
    flags = [flag.replace("=64", "=8") for flag in flags]
    run_loop(loop, [*flags, "--image_logging_steps=1", "--num_inference_steps=2"])
    assert list((tmp_path / "out").rglob("images/*.png")) and "the features were made" not in capsys.readouterr().out


def test_an_autoencoder_that_is_gone_is_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr("features.autoencoder.load_vae", lambda name: pytest.fail(f"{name} was loaded"))
    checkpoint = shutil.copytree(run["DiT"], tmp_path / "checkpoint-1")
    config = json.loads((checkpoint / "config.json").read_text())
    config["features"]["vae"]["name"] = str(tmp_path / "gone")
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gone: there is no such folder; .*sha256 .* give it by --vae"):
        convert("DiT", checkpoint, tmp_path / "pipe")
    with pytest.raises(ValueError, match="give it by --vae$"):
        draw("DiT", checkpoint, tmp_path / "a.png")

    # Weights alone don't say what they decode: the one that was loaded is named, and not the default.
    config["features"]["vae"] = {"name": str(run["vae"])}
    (checkpoint / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("features.autoencoder.load_vae", lambda name: make_vae(latent_channels=8))
    with pytest.raises(ValueError, match=f"--vae {run['vae']}: decodes 8 channels, the latents have 4"):
        draw("DiT", checkpoint, tmp_path / "a.png")

    # Nothing but a name is known: the default, and a note.
    unknown = {"name": "gone", "weights_sha256": None}
    assert choose_vae(None, unknown, "the/default", "--vae")[0] == "the/default"
    assert choose_vae(None, None, "the/default", "--vae") == ("the/default", None)
    assert choose_vae(None, {**unknown, "name": "owner/name"}, "the/default", "--vae") == ("owner/name", None)


def test_imagenets_names_are_for_those_without_their_own():
    config = resolve_config({"model": {**TINY_MODELS["DiT"], "num_classes": 1000}})
    labels, note = find_labels(None, config)
    assert labels[207] == "golden retriever" and "ImageNet's" in note
    config["features"]["class_names"] = {str(i): f"own {i}" for i in range(1000)}
    assert find_labels(None, config) == ({i: f"own {i}" for i in range(1000)}, None)
    ids = ["n01440764", *(f"n0{i}" for i in range(2000000, 2000998)), "n15075141"]  # ImageNet's own folders
    config["features"]["class_names"] = {str(i): name for i, name in enumerate(ids)}
    assert find_labels(None, config)[0][207] == "golden retriever"


def test_numbered_folders_mean_one_class_everywhere(tmp_path):
    """Labels 2 and 10 are named 10 and 2: a class that is named is that one, with and without a pipeline."""
    config = resolve_config({"model": {**TINY_MODELS["DiT"], "num_classes": 12}})
    names = sorted(map(str, range(12)))
    config["features"]["class_names"] = {str(i): name for i, name in enumerate(names)}
    labels, _ = weights_labels(None, config)
    assert find_classes(["2"], labels, 12) == [4]
    assert find_labels(None, config)[0] == labels


def test_a_resumed_run_with_latents_of_another_autoencoder_says_so(run, tmp_path, images):
    other = extract(images, tmp_path / "set", other_weights(tmp_path / "other"))
    saved = load_config(run["DiT"] / "config.json")
    config = {**saved, "features": describe_features(other, 8, 3)[0]}
    checkpoint = SimpleNamespace(progress={}, config=saved)
    note = describe_data_changes(checkpoint, config, [None] * 4)
    assert f"autoencoder {str(tmp_path / 'other')[:60]}" in note
    assert describe_data_changes(checkpoint, saved, [None] * 4) is None


def test_fine_tuning_on_latents_of_another_autoencoder_says_so(run, tmp_path, images, run_loop, capsys):
    other = extract(images, tmp_path / "set", other_weights(tmp_path / "other"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": json.loads((run["DiT"] / "config.json").read_text())["model"]}))
    for features, count in ((run["set"], 0), (other, 1)):
        output = tmp_path / f"out{count}"
        flags = loop_arguments("notrainer", config=config, features=features, output=output, steps=1, batch=4)
        run_loop("notrainer", [*flags, f"--pretrained_model_path={run['DiT']}"])
        assert capsys.readouterr().out.count("was trained on other latents: autoencoder ") == count
