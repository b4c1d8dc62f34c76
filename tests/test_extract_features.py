"""tools/extract_features.py: layout, values, determinism, crop, errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.extract_features import main
from tools.image_folder import center_crop, find_images, load_image

ROOT = Path(__file__).resolve().parents[1]
VAE = str(ROOT / "assets" / "digits_vae")
SIZES = [(32, 32), (40, 33), (97, 50), (33, 130), (64, 64)]


def write_images(root: Path) -> None:
    """Two classes, several formats and modes, in an order of names that is not that of creation."""
    rng = np.random.default_rng(0)
    for folder, suffix, mode in (("b_second", "jpg", "RGB"), ("a_first", "png", "RGBA"), ("a_first", "bmp", "L")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i, (width, height) in enumerate(SIZES):
            smooth = rng.integers(0, 256, (4, 4, 4), dtype="uint8")
            image = Image.fromarray(smooth, "RGBA").resize((width, height), Image.BILINEAR).convert(mode)
            image.save(root / folder / f"{i}.{suffix}")
    (root / "a_first" / "notes.txt").write_text("not an image")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


def arguments(data, output, *more):
    return ["--data_path", str(data), "--features_path", str(output), "--image_size", "32", "--vae", VAE, *more]


def load(output: Path, name: str = "imagenet32"):
    """(features [N, C, h, w], labels [N]) with the layout's shapes and types checked file by file."""
    files = sorted(os.listdir(output / f"{name}_features"), key=lambda file: int(file[:-4]))
    assert files == [f"{i}.npy" for i in range(len(files))]
    assert sorted(os.listdir(output / f"{name}_labels")) == sorted(files)
    features = [np.load(output / f"{name}_features" / file) for file in files]
    labels = [np.load(output / f"{name}_labels" / file) for file in files]
    assert all(feature.shape == (1, 4, 4, 4) and feature.dtype == np.float32 for feature in features)
    assert all(label.shape == (1,) and label.dtype == np.int64 for label in labels)
    return np.concatenate(features), np.concatenate(labels)


@pytest.fixture(scope="module")
def extracted(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("features") / "new" / "folder"
    main(arguments(images, output, "--batch_size", "4"))
    return output


def test_layout_and_classes(extracted):
    _, labels = load(extracted)
    assert labels.tolist() == [0] * 10 + [1] * 5
    classes = json.loads((extracted / "imagenet32_classes.json").read_text())
    assert classes == {"id2label": {"0": "a_first", "1": "b_second"}}


def test_values_are_scaled_posterior_samples(images, extracted):
    """(latent / scaling_factor - mean) / std must be standard normal noise, different for each image."""
    import paddle
    from ppdiffusers import AutoencoderKL

    features, _ = load(extracted)
    vae = AutoencoderKL.from_pretrained(VAE)
    x = np.stack([load_image(path, 32) for path, _ in find_images(str(images))[0]])
    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(x)).latent_dist
    noise = (features / vae.config.scaling_factor - posterior.mean.numpy()) / posterior.std.numpy()
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1 and np.abs(noise).max() < 5
    correlation = np.corrcoef(noise.reshape(len(noise), -1)) - np.eye(len(noise))
    assert np.abs(correlation).max() < 0.6


def test_result_depends_on_seed_but_not_on_batches_or_workers(images, extracted, tmp_path):
    features, labels = load(extracted)
    main(arguments(images, tmp_path, "--name", "one", "--batch_size", "1", "--num_workers", "1"))
    same, same_labels = load(tmp_path, "one")
    np.testing.assert_allclose(same, features, atol=2e-5)
    assert (same_labels == labels).all()
    main(arguments(images, tmp_path, "--name", "two", "--seed", "1"))
    assert np.abs(load(tmp_path, "two")[0] - features).mean() > 1e-3


@pytest.mark.distributed
def test_two_processes_write_what_one_does(images, extracted, tmp_path):
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir"]
    command += [str(tmp_path / "log"), str(ROOT / "tools" / "extract_features.py"), "--device", "cpu"]
    command += arguments(images, tmp_path / "out", "--batch_size", "3")
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    features, labels = load(tmp_path / "out")
    np.testing.assert_allclose(features, load(extracted)[0], atol=2e-5)
    assert (labels == load(extracted)[1]).all()


@pytest.mark.parametrize("width, height", [(33, 47), (131, 64), (63, 257), (500, 333), (20, 31), (129, 128)])
def test_center_crop_follows_the_adm_rule(width, height):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype="uint8"))
    size = 32
    w, h, reference = width, height, image
    while w >= 64 and h >= 64:  # shorter side at least twice the target
        w, h = w // 2, h // 2
        reference = reference.resize((w, h), resample=Image.Resampling.BOX)
    w, h = (size, round(h * (size / w))) if w <= h else (round(w * (size / h)), size)
    pixels = np.asarray(reference.resize((w, h), resample=Image.Resampling.BICUBIC))
    expected = pixels[(h - size) // 2 :][:size, (w - size) // 2 :][:, :size]
    assert np.array_equal(np.asarray(center_crop(image, size)), expected)


def test_pixels_are_scaled_to_plus_minus_one(tmp_path):
    Image.new("RGB", (40, 40), (255, 0, 255)).save(tmp_path / "x.png")
    x = load_image(str(tmp_path / "x.png"), 32)
    assert x.shape == (3, 32, 32) and x.dtype == np.float32
    assert (x[0] == 1).all() and (x[1] == -1).all() and (x[2] == 1).all()


def missing_folder(images, tmp_path):
    return arguments(tmp_path / "nowhere", tmp_path / "out"), "nowhere"


def no_classes(images, tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "flat" / "x.png")
    return arguments(tmp_path / "flat", tmp_path / "out"), "no images"


def size_not_divisible(images, tmp_path):
    return [*arguments(images, tmp_path / "out"), "--image_size", "36"], "multiple of 8"


def no_vae(images, tmp_path):
    (tmp_path / "vae").mkdir()
    return [*arguments(images, tmp_path / "out"), "--vae", str(tmp_path / "vae")], "config.json"


def bad_batch_size(images, tmp_path):
    return arguments(images, tmp_path / "out", "--batch_size", "0"), "--batch_size 0"


@pytest.mark.parametrize("case", [missing_folder, no_classes, size_not_divisible, no_vae, bad_batch_size])
def test_mistakes_are_named_and_write_nothing(case, images, tmp_path):
    command, expected = case(images, tmp_path)
    with pytest.raises(ValueError, match=expected):
        main(command)
    assert not (tmp_path / "out").exists()


def test_mistakes_get_one_line_on_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "extract_features.py"), *arguments(tmp_path / "gone", tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and "gone: no such folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_unreadable_image_is_named(images, tmp_path):
    write_images(tmp_path / "in")
    good = (tmp_path / "in" / "a_first" / "3.png").read_bytes()
    (tmp_path / "in" / "a_first" / "3.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="a_first/3.png: cannot be read as an image"):
        main(arguments(tmp_path / "in", tmp_path / "out"))


def test_another_extraction_is_not_overwritten(images, tmp_path):
    (tmp_path / "imagenet32_features").mkdir()
    np.save(tmp_path / "imagenet32_features" / "0.npy", np.zeros(1))
    with pytest.raises(ValueError, match="another extraction"):
        main(arguments(images, tmp_path))
    assert os.listdir(tmp_path) == ["imagenet32_features"]
    assert np.load(tmp_path / "imagenet32_features" / "0.npy").tolist() == [0.0]
