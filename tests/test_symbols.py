"""Colour pictures: the symbols, squares of photographs, the shipped colour autoencoder, configs that fit it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.runs import command_environment

from config.schema import load_config
from features.autoencoder import LatentScaling, load_vae
from features.images import find_images, load_image
from tools import prepare_photos, prepare_symbols

ROOT = Path(__file__).resolve().parents[1]
VAE = ROOT / "assets" / "colour_vae"


def pixels(folder):
    return {path: np.asarray(Image.open(path)) for path, _ in find_images(str(folder))[0]}


@pytest.fixture(scope="module")
def symbols(tmp_path_factory):
    folder = tmp_path_factory.mktemp("symbols") / "all"
    prepare_symbols.main(["--output", str(folder), "--images_per_class", "4", "--seed", "7"])
    return folder


def test_symbols_of_a_class_differ_and_are_no_empty_boxes(symbols):
    """A glyph that the font lacks would be the same box in several classes."""
    assert sorted(os.listdir(symbols)) == sorted(prepare_symbols.SYMBOLS)
    glyphs = [ink for ink, _ in prepare_symbols.load_glyphs(64).values()]
    for number, glyph in enumerate(glyphs):
        left, top, right, bottom = glyph.getbbox()
        assert max(right - left, bottom - top) > 45  # it fills its square, in one direction
        assert all(np.abs(np.float32(glyph) - other).mean() > 13 for other in glyphs[:number])
    found = list(pixels(symbols).values())
    assert len(found) == 40 and all(image.shape == (64, 64, 3) for image in found)
    assert len({image.tobytes() for image in found}) == 40
    assert all(image.std(axis=(0, 1)).max() > 20 for image in found)  # the symbol stands out


def test_symbols_follow_the_seed_and_are_not_overwritten(symbols, tmp_path):
    command = ["--images_per_class", "1", "--seed", "7", "--output"]
    prepare_symbols.main([*command, str(tmp_path / "again")])
    for name in prepare_symbols.SYMBOLS:
        assert (tmp_path / "again" / name / "0.png").read_bytes() == (symbols / name / "0.png").read_bytes()
    with pytest.raises(ValueError, match="again is not empty; give another name, or --overwrite"):
        prepare_symbols.main([*command, str(tmp_path / "again")])
    prepare_symbols.main([*command, str(tmp_path / "again"), "--seed", "8", "--image_size", "32", "--overwrite"])
    changed = pixels(tmp_path / "again").values()
    assert len(changed) == 10 and {image.shape for image in changed} == {(32, 32, 3)}


def test_photographs_to_train_on_and_held_out_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_photos, "HELDOUT", 2)
    prepare_photos.main(["--output", str(tmp_path / "out"), "--num_images", "6", "--image_size", "16"])
    train, heldout = (pixels(tmp_path / "out" / part) for part in ("train", "heldout"))
    assert (len(train), len(heldout)) == (6, 2)
    assert len({image.tobytes() for image in [*train.values(), *heldout.values()]}) == 8
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        prepare_photos.main(["--output", str(tmp_path / "out")])


def test_shipped_vae_brings_symbols_back_and_has_unit_latents(symbols):
    import paddle

    vae = load_vae(str(VAE))
    x = np.stack([load_image(path, 64) for path, _ in find_images(str(symbols))[0]])
    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(x)).latent_dist
        back = vae.decode(posterior.mean).sample.clip(-1, 1).numpy()
    psnr = 10 * math.log10(4 / np.square(back - x).mean())
    latents = LatentScaling.of(vae.config).normalize(posterior.sample().numpy())
    assert psnr > 24
    assert abs(latents.std() - 1) < 0.15
    assert sum(path.stat().st_size for path in VAE.iterdir()) < 1_500_000
    for name in ("DiT", "SiT"):  # the shipped configs are for it
        model = load_config(str(ROOT / f"config/{name}_symbols.json"))["model"]
        assert latents.shape[1:] == (model["in_channels"], model["sample_size"], model["sample_size"])
        assert model["num_classes"] == len(prepare_symbols.SYMBOLS)


@pytest.mark.walkthrough
def test_notebook_runs_from_top_to_bottom(tmp_path):
    """With few pictures and steps, in the place of the kernel IPython in one process."""
    script, notebook = ROOT / "tests/support/notebooks.py", ROOT / "notebooks/quickstart.ipynb"
    small = ["steps=4", "images_per_class=3", f'output="{tmp_path}"']
    done = subprocess.run(
        [sys.executable, str(script), str(notebook), *small],
        cwd=notebook.parent,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(notebook.read_text())["cells"]
    pictures = sum("display(" in line for cell in cells if cell["cell_type"] == "code" for line in cell["source"])
    assert f"all cells ran, {pictures + 1} pictures" in done.stdout  # one is drawn with two guidance scales
    assert (tmp_path / "guidance-2.png").read_bytes() != (tmp_path / "guidance-1.png").read_bytes()
    assert (tmp_path / "pipeline/model_index.json").exists()
    assert len((notebook).read_bytes()) < 500_000
