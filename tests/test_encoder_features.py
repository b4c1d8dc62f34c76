"""Encoder features, the third array of a set: as they are loaded, extracted, converted and checked."""

import hashlib
import importlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from support.feature_sets import add_encoder, dataset, everything, load, pack_set, sampler, write_set
from support.runs import LOOPS, checkpoint_path, loop_arguments, run_in_process, write_config

from features.dataset import FeatureDataset
from features.extraction import Journal
from features.images import find_images, load_image
from objectives import make_batch
from runtime.untrusted import read_json
from tools.check_features import main as check_features
from tools.extract_features import main
from tools.prepare_digits import expected_images
from tools.train_digits_classifier import main as train_encoder
from training.supervision.replay import read_dump, replay
from verification.tiny_runs import write_features
from weights.files import save_safetensors


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A set of 40 pairs with twins and encoder features `(4, 6)`: its folder, the features, those of the twins."""
    folder = tmp_path_factory.mktemp("pairs")
    latents, mirrored = write_set(folder, flip=True)
    return folder, np.stack([latents, mirrored]), np.stack(add_encoder(folder, flip=True))


def test_each_latent_comes_with_the_features_of_its_image_or_of_its_mirror_image(pairs):
    folder, rows, features = pairs
    data = dataset(folder, flip=True, encoder_features=True)
    latents, labels, found = everything(data, np.arange(100, 140))
    twin = (latents == rows[1]).all(axis=(1, 2, 3)).astype(int)
    assert 0 < twin.sum() < 40 and found.dtype == np.float16
    assert (found == features[twin, np.arange(40)]).all() and (labels == np.arange(40) % 10).all()
    plain = dataset(folder, flip=True)
    assert plain.encoder is None and all(map(np.array_equal, everything(plain, np.arange(100, 140)), (latents, labels)))
    assert (data[-1][2] == features[0, -1]).all()
    batch = make_batch(everything(data))
    assert (batch.extras["features"] == features[0]).all() and make_batch(everything(plain)).extras == {}


def test_parts_of_a_set_keep_rows_and_features_together(pairs):
    folder, rows, features = pairs
    data = dataset(folder, flip=True, encoder_features=True)
    train, held_out = data.subset([3, 4]).split(2)
    for part in (train, held_out, train.in_memory()):
        latents, _, found = everything(part, np.arange(len(part)))
        place = [np.argwhere((rows == latent).all(axis=(2, 3, 4)))[0] for latent in latents]
        assert (found == features[tuple(np.transpose(place))]).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_passes_them_on(num_workers, pairs, monkeypatch):
    data = dataset(pairs[0], flip=True, encoder_features=True)
    monkeypatch.setattr("features.loader.free_shared_memory", lambda: 1 << 30)
    batches = load(data, num_workers)
    whole = [data.read(*each) for each in sampler(data).batches()]
    assert len(batches) == 9 and all(map(np.array_equal, sum(batches, ()), sum(whole, ())))


def test_mistakes_are_one_line_with_the_command(tmp_path):
    write_set(tmp_path, 4, flip=True)
    command = f"tools/extract_features.py --data_path IMAGES --encoder ENCODER --feature_path {tmp_path}"
    with pytest.raises(
        ValueError, match="has no encoder features, the config takes 16 tokens of width 8; make them:"
    ) as e:
        dataset(tmp_path, encoder_features=(16, 8))
    assert f"{command} --name imagenet64 --token_grid 4" in str(e.value)
    add_encoder(tmp_path)
    with pytest.raises(ValueError, match='holds encoder features of 4 tokens of width 6, .* write "width": 6 in its'):
        dataset(tmp_path, encoder_features=(4, 8))
    with pytest.raises(ValueError, match="make others: .* --token_grid 4 --replace_encoder"):
        dataset(tmp_path, encoder_features=(16, 6))
    with pytest.raises(
        ValueError, match="imagenet64_encoder: has none of the mirrored images; train without: --no_flip"
    ):
        dataset(tmp_path, encoder_features=(4, 6), flip=True)
    (tmp_path / "imagenet64_encoding").mkdir()
    with pytest.raises(ValueError, match="the extraction of encoder features is not finished; run the same command"):
        dataset(tmp_path, encoder_features=True)
    dataset(tmp_path)  # nothing is looked at


# The extraction.

ROOT = Path(__file__).resolve().parents[1]
VAE = str(ROOT / "assets" / "digits_vae")
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven images of two classes, of several sizes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(7):
        folder = root / ("cats", "dogs")[number % 2]
        folder.mkdir(exist_ok=True)
        pixels = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype="uint8"))
        pixels.resize((32 + 8 * (number % 3), 40), Image.BICUBIC).save(folder / f"{number}.png")
    return root


class Patches(paddle.nn.Layer):
    """A convolution over patches of 4 pixels, with a class token or without: (N, 1 + T, 6) or (N, 6, h, w)."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.conv = tokens, paddle.nn.Conv2D(3, 6, 4, 4)

    def forward(self, images):
        x = self.conv(images)
        if not self.tokens:
            return x
        x = x.flatten(2).transpose([0, 2, 1])
        return paddle.concat([x[:, :1] * 0 + 100, x], axis=1)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The same patches as two programs, one of maps and one of tokens: their folders, and the layer."""
    folder = tmp_path_factory.mktemp("programs")
    paddle.seed(0)
    layer = Patches(False)
    for name in ("map", "tokens"):
        layer.tokens = name == "tokens"
        paths = str(folder / name / "model")
        spec = [paddle.static.InputSpec([None, 3, None, None], "float32")]
        paddle.jit.save(paddle.jit.to_static(layer, input_spec=spec, full_graph=True), paths)
    plain = Patches(False)
    plain.set_state_dict(layer.state_dict())
    return folder, plain


def extract(data, output, *more):
    flags = ["--data_path", data, "--feature_path", output, "--image_size", 32, "--vae", VAE, "--device", "cpu", *more]
    main([*map(str, flags)])
    return output


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected_features(images, plain, grid, size=32, mirrored=False):
    """What an encoder of `Patches` says of the images, in plain numpy: float32 (N, grid * grid, 6)."""
    pixels = np.stack([load_image(path, 32) for path, _ in find_images(str(images))[0]]) / 2 + 0.5  # (N, 3, 32, 32)
    pixels = pixels[..., ::-1] if mirrored else pixels
    x = plain(paddle.to_tensor(np.ascontiguousarray(pixels))).numpy()  # (N, 6, 8, 8)
    x = x.reshape(len(x), 6, grid, 8 // grid, grid, 8 // grid).mean(axis=(3, 5))
    return x.reshape(len(x), 6, -1).transpose(0, 2, 1)


@pytest.fixture(scope="module")
def extracted(images, programs, tmp_path_factory):
    output = tmp_path_factory.mktemp("extracted") / "new"
    return extract(images, output, "--encoder", programs[0] / "map", "--token_grid", 4, "--flip", "--encoder_batch", 2)


def read(folder, grid=4, width=6, **options):
    options = {"sample_shape": (4, 4, 4), "num_classes": 2, "encoder_features": (grid * grid, width), **options}
    return FeatureDataset(folder, resolution=32, **options)


def test_patches_are_pooled_to_the_token_grid_and_mirrored_images_have_their_own(images, programs, extracted):
    data = read(extracted, flip=True)
    for mirrored in (False, True):
        found = np.empty((7, 16, 6), "float16")
        data.encoder.read(np.arange(7), found, np.full(7, mirrored))
        expected = expected_features(images, programs[1], 4, mirrored=mirrored)
        np.testing.assert_allclose(found, expected, atol=2e-3)
    entry = json.loads((extracted / "imagenet32_manifest.json").read_text())["encoder"]
    assert (entry["token_grid"], entry["width"], entry["encoder_size"], entry["dtype"]) == (4, 6, 32, "float16")
    weights = (programs[0] / "map" / "model.pdiparams").read_bytes()
    assert entry["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    for line in (extracted / "imagenet32_encoder_checksums.txt").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((extracted / name).read_bytes()).hexdigest() == digest


def test_tokens_in_front_are_left_out_and_normalisation_is_the_preprocessors(images, programs, extracted, tmp_path):
    folder = shutil.copytree(programs[0] / "tokens", tmp_path / "encoder")
    output = extract(images, tmp_path / "tokens", "--encoder", folder, "--token_grid", 4, "--encoder_batch", 2)
    assert np.array_equal(read(output)[5][2], read(extracted)[5][2])
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.5], "crop_size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    output = extract(images, tmp_path / "shifted", "--encoder", folder, "--token_grid", 3)
    path, _ = find_images(str(images))[0][5]
    pixels = (paddle.to_tensor(load_image(path, 32)) / 2 + 0.5)[None]
    pixels = paddle.nn.functional.interpolate(pixels, [24, 24], mode="bicubic")
    mean, std = (paddle.to_tensor(settings[key]).reshape([3, 1, 1]) for key in ("image_mean", "image_std"))
    x = programs[1]((pixels - mean) / std).numpy()[0]  # (6, 6, 6)
    expected = x.reshape(6, 3, 2, 3, 2).mean(axis=(2, 4)).reshape(6, 9).T
    np.testing.assert_allclose(read(output, 3)[5][2], expected, atol=4e-3)


def save_officially(model, folder):
    """Saves a CLIP of ppdiffusers as Hugging Face has it: PyTorch's layout, the vision model's settings inside."""
    linear = {f"{name}.weight" for name, part in model.named_sublayers() if isinstance(part, paddle.nn.Linear)}
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    state = {name: np.ascontiguousarray(value.T) if name in linear else value for name, value in state.items()}
    (folder / "model_state.pdparams").unlink()
    save_safetensors({**state, "logit_scale": np.ones(1, "float32")}, str(folder / "model.safetensors"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"architectures": ["CLIPModel"], "vision_config": settings}))


@pytest.mark.parametrize("library", ["paddlenlp", "ppdiffusers", "official"])
def test_the_patches_of_a_clip_whoever_saved_it(library, images, tmp_path):
    transformers = importlib.import_module(f"{library.replace('official', 'ppdiffusers')}.transformers")
    paddle.seed(1)
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**CLIP, patch_size=4))
    model.eval()
    model.save_pretrained(tmp_path / "clip")
    if library == "official":
        save_officially(model, tmp_path / "clip")
    output = extract(images, tmp_path / "out", "--encoder", tmp_path / "clip", "--token_grid", 4)
    pixels = np.stack([load_image(path, 32) for path, _ in find_images(str(images))[0]]) / 2 + 0.5
    x = paddle.nn.functional.interpolate(paddle.to_tensor(pixels), [16, 16], mode="bicubic")
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    x = (x - paddle.to_tensor(mean).reshape([3, 1, 1])) / paddle.to_tensor(std).reshape([3, 1, 1])
    with paddle.no_grad():
        expected = model.vision_model(x)[0][:, 1:].numpy()
    np.testing.assert_allclose(read(output, 4, 16).read(np.arange(7))[2], expected, atol=5e-3)


def test_packed_and_pairs_at_once_or_later_all_are_the_same(images, programs, extracted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("features.writers.MIN_SHARD_SAMPLES", 4)
    flags = ("--token_grid", 4, "--encoder_batch", 2, "--encoder", programs[0] / "map")
    packed = extract(images, tmp_path / "packed", "--flip", "--format", "packed", "--batch_size", 4, *flags)
    assert sorted(os.listdir(packed / "imagenet32_packed")) == ["shard-00000", "shard-00001"]
    later = extract(images, tmp_path / "later", "--flip")
    before = files_of(later)
    capsys.readouterr()
    main(["--feature_path", str(later), "--image_size", "32", "--device", "cpu", *map(str, flags)])  # nothing twice
    told = capsys.readouterr().out
    assert "7 images and their mirror images x 16 tokens x 6 x 2 bytes = 2.69 KB; " in told
    assert files_of(later).items() >= {k: v for k, v in before.items() if "manifest" not in k}.items()
    positions = np.arange(100, 107)
    ours = read(extracted, flip=True).read(range(7), positions)[2]
    for folder in (packed, later):
        assert np.array_equal(read(folder, flip=True).read(range(7), positions)[2], ours)
    manifests = [json.loads((folder / "imagenet32_manifest.json").read_text()) for folder in (extracted, later)]
    assert manifests[0] == manifests[1]
    main(["--feature_path", str(later), "--image_size", "32", "--device", "cpu", *map(str, flags)])
    assert "its encoder features are complete since an earlier start, nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["npy", "packed"])
def test_interrupted_it_goes_on_with_any_number_of_ranks(kind, images, programs, tmp_path, monkeypatch):
    monkeypatch.setattr("features.writers.MIN_SHARD_SAMPLES", 2)
    flags = ("--batch_size", 2, "--format", kind)
    flags = (*flags, "--flip", "--encoder", programs[0] / "map", "--token_grid", 4, "--encoder_batch", 2)
    whole = files_of(extract(images, tmp_path / "whole", *flags))

    def stop(self, part, *result, add=Journal.add):
        if self.folder.endswith("_encoding") and part == 1:
            raise KeyboardInterrupt  # its files are written, and not in the journal
        add(self, part, *result)

    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="interrupted; the same command goes on"):
        patch.setattr(Journal, "add", stop)
        extract(images, output, *flags)
    with pytest.raises(ValueError, match="the extraction of encoder features is not finished"):
        read(output)
    with pytest.raises(ValueError, match="belongs to other encoder features: --token_grid was 4, now it is 2; repeat"):
        extract(images, output, *flags, "--token_grid", 2)
    for rank in (1, 0):
        monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
        monkeypatch.setenv("PADDLE_TRAINER_ID", str(rank))
        extract(images, output, *flags)
    assert files_of(output) == whole


def test_mistakes_write_nothing(images, programs, extracted, tmp_path, monkeypatch):
    before, path = files_of(extracted), programs[0] / "map"

    def refused(message, *flags, data=images, output=tmp_path / "new"):
        with pytest.raises(ValueError, match=message) as error:
            extract(data, output, "--encoder", path, *flags)
        assert "\n" not in str(error.value)

    refused("has 8 x 8 patches of images of 32 pixels, fewer than --token_grid 16", "--token_grid", 16)
    refused("belongs to other encoder features: --token_grid was 4, now it is 2", output=extracted)
    refused("belongs to another extraction: --seed was 0, now it is 3", "--seed", 3, output=extracted)
    other = shutil.copytree(images, tmp_path / "other")
    os.rename(other / "cats" / "0.png", other / "cats" / "00.png")
    refused("holds other images, or other names", "--token_grid", 4, "--encoder_batch", 2, data=other, output=extracted)
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    refused("7 images x 4 tokens x 6 x 2 bytes = 336 bytes; 100 bytes are free in .*; nothing was", "--token_grid", 2)
    path = tmp_path / "nothing"
    refused("--encoder .*nothing: expected a program of Paddle Inference, a folder with model.json")
    with pytest.raises(
        ValueError, match="imagenet256_manifest.json: is not there, .* name one by --image_size or --name"
    ):
        main(["--feature_path", str(extracted), "--encoder", str(path)])  # 256 pixels, if nothing is said
    assert not (tmp_path / "new").exists() and files_of(extracted) == before


def test_another_encoder_replaces_the_features_if_told_to(images, programs, extracted, tmp_path):
    output = shutil.copytree(extracted, tmp_path / "copy")
    extract(images, output, "--encoder", programs[0] / "tokens", "--token_grid", 2, "--replace_encoder")
    expected = expected_features(images, programs[1], 2)
    np.testing.assert_allclose(read(output, 2).read(range(7))[2], expected, atol=2e-3)
    assert not (output / "imagenet32_encoding").exists()


# Other tools.


@pytest.mark.parametrize("kind", ["packed", "npy"])
def test_conversion_and_check_take_them_along(kind, extracted, tmp_path, capsys):
    packed = pack_set(extracted, tmp_path / "packed", "--shard_samples", 3)
    folder = packed if kind == "packed" else pack_set(packed, tmp_path / "npy")
    positions = np.arange(100, 107)
    read_all = [read(each, flip=True).read(range(7), positions) for each in (extracted, folder)]
    assert all(map(np.array_equal, *read_all))
    if kind == "npy":
        assert {k: v for k, v in files_of(folder).items()} == files_of(extracted)
    check = ["--feature_path", str(folder), "--image_size", "32", "--no_checksums", "--num_workers", "1"]
    capsys.readouterr()
    check_features([*check[:-3], *check[-2:]])
    assert "encoder features: 16 tokens of width 6, float16" in capsys.readouterr().out
    path = next(folder.rglob("encoder_flipped.npy" if kind == "packed" else "imagenet32_encoder_flip/4.npy"))
    array = np.load(path)
    array.reshape(-1, 16, 6)[-1, 2, 3] = np.inf
    np.save(path, array)
    with pytest.raises(SystemExit):
        check_features([*check[:-3], *check[-2:]])
    told = capsys.readouterr().out
    assert "1 number not finite" in told and f"{path}: its checksum is another" in told
    path.unlink()
    with pytest.raises(SystemExit):
        check_features(check)
    assert "problem: " in capsys.readouterr().out


def test_an_encoder_of_digits_is_trained_in_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.train_digits_classifier.COPIES", 1)
    monkeypatch.setattr("tools.train_digits_classifier.EPOCHS", 3)
    monkeypatch.setattr("tools.train_digits_classifier.BATCH_SIZE", 32)
    for path, image in [*expected_images(32).items()][:240]:
        (tmp_path / "digits" / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "digits" / path)
    data = {"--data_path": "digits/train", "--heldout": "digits/heldout", "--output": "encoder"}
    for name in data:
        data[name] = str(tmp_path / data[name])
    train_encoder([*itertools.chain(*data.items()), "--as_encoder"])
    output = extract(
        tmp_path / "digits/heldout", tmp_path / "set", "--encoder", tmp_path / "encoder", "--token_grid", 4
    )
    features = read(output, 4, 128, num_classes=10).read(range(8))[2]
    assert np.isfinite(features).all() and 0 < features.std()


# In a run.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A set for the tiny SiT, 4 x 4 tokens, with encoder features of width 6; and its config, which takes them."""
    folder = tmp_path_factory.mktemp("tiny")
    entry = {"type": "representation_alignment", "block": 1, "inner_width": 8}
    write_features(folder, encoder_shape=(16, 6))
    return folder, {"type": "transport", "regularizers": [entry]}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_aligns_with_the_features_of_its_samples(loop, tiny, tmp_path):
    folder, objective = tiny
    config = write_config(tmp_path / "Tiny.json", "SiT", objective)
    flags = loop_arguments(loop, config=config, features=folder, output=tmp_path / "out", steps=3)
    run_in_process(loop, [*flags, *(["--validation_samples", "4", "--validation_steps", "3"])])
    saved = checkpoint_path(loop, tmp_path / "out", 3)
    assert read_json(saved / "config.json")["objective"]["regularizers"][0]["width"] == 6
    losses = [line["loss_representation_alignment"] for line in metrics(tmp_path / "out")]
    assert len(losses) == 3 and all(-1 < loss < 1 for loss in losses)


def test_a_resume_with_another_encoder_says_so(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny[0], tmp_path / "set")
    config = write_config(tmp_path / "Tiny.json", "SiT", tiny[1])
    for step, sha256 in ((1, "a" * 64), (2, "b" * 64)):
        encoder = {"name": "clip", "weights_sha256": sha256, "token_grid": 4, "width": 6}
        (folder / "imagenet64_manifest.json").write_text(json.dumps({"version": 1, "encoder": encoder}))
        flags = loop_arguments("notrainer", config=config, features=folder, output=tmp_path / "out", steps=step)
        run_in_process("notrainer", [*flags, "--resume", "auto"])
    assert "encoder clip (sha256 bbbb" in (said := capsys.readouterr().out) and "here, clip (sha256 aaaa" in said


def metrics(output):
    (path,) = output.rglob("metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_bad_step_is_kept_with_its_features_and_done_again(tiny, tmp_path):
    folder, objective = tiny
    config = write_config(tmp_path / "Tiny.json", "SiT", objective, learning_rate=1e30, max_grad_norm=-1)
    flags = loop_arguments("notrainer", config=config, features=folder, output=tmp_path / "out", steps=5)
    with pytest.raises(ValueError, match="python tools/replay_step.py"):
        run_in_process("notrainer", flags)
    (dump,) = (tmp_path / "out").rglob("bad_steps/*")
    resolved, arrays, state = read_dump(str(dump))
    stored = [np.load(folder / "imagenet64_encoder" / f"{index}.npy") for index in arrays["index"]]
    assert np.array_equal(arrays["features"], stored)
    found, *_ = replay(str(dump), resolved, arrays, state)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(arrays["loss"]))


def test_a_set_without_them_is_one_line(tiny, tmp_path):
    config = write_config(tmp_path / "Tiny.json", "SiT", tiny[1])
    write_features(tmp_path / "plain")
    flags = loop_arguments("notrainer", config=config, features=tmp_path / "plain", output=tmp_path / "out", steps=3)
    with pytest.raises(
        ValueError, match="has no encoder features, the config takes 16 tokens; make them: python tools"
    ):
        run_in_process("notrainer", flags)
