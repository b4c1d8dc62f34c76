"""Autoencoders of LDM, from their checkpoints to AutoencoderKL folders of stock ppdiffusers."""

import json
import os

import numpy as np
import paddle
import pytest
import yaml
from PIL import Image
from support.golden import GOLDEN, relative_error
from support.ldm_vae import LdmVae
from support.pipelines import make_config
from support.runs import loop_arguments

import infer_demo_dit
from features.autoencoder import downsampling
from tools import (
    check_features,
    convert_dit_to_ppdiffusers,
    convert_ldm_vae,
    export_inference,
    extract_features,
    sample_npz,
)
from tools import make_config as make_config_tool
from verification.tiny_runs import run_in_process
from weights.files import load_weights, save_safetensors, save_torch
from weights.ldm_vae import is_part

WEIGHTS, CONFIG = GOLDEN / "ldm_vae_f4d4.pt", GOLDEN / "ldm_vae_f4d4.yaml"


def convert(weights, output, *flags):
    convert_ldm_vae.main(["--weights", str(weights), "--output", str(output), *map(str, flags)])


def stock(folder):
    """The AutoencoderKL that ppdiffusers itself loads from a folder."""
    from ppdiffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(str(folder))
    vae.eval()
    return vae


def outputs(vae, images, latents):
    """Moments and images of a stock autoencoder, numpy."""
    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(images)).latent_dist
        return posterior.parameters.numpy(), vae.decode(paddle.to_tensor(latents)).sample.numpy()


@pytest.mark.paddle26
@pytest.mark.parametrize("flags", [[], ["--config", CONFIG]], ids=["weights alone", "with config"])
def test_golden(tmp_path, capsys, flags):
    golden = dict(np.load(GOLDEN / "ldm_vae.npz"))
    convert(WEIGHTS, tmp_path / "vae", *flags)
    said = capsys.readouterr().out
    assert "latents of 4 channels, one for 4 x 4 pixels" in said
    assert "left out: loss (3), foundation_model (1), linear_proj (1)" in said
    vae = stock(tmp_path / "vae")
    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(golden["images"])).latent_dist
        found = {"moments": posterior.parameters, "mean": posterior.mode(), "std": posterior.std}
        found["decoded"] = vae.decode(paddle.to_tensor(golden["latents"])).sample
        found["reconstruction"] = vae.decode(posterior.mode()).sample
    for name, value in found.items():
        assert relative_error(value.numpy(), golden[name]) < 6e-5, name
    assert vae.config.scaling_factor == 1
    assert vae.config.sample_size == (64 if flags else 256)
    assert sorted(os.listdir(tmp_path / "vae")) == ["config.json", "model_state.pdparams"]


# Every layout of levels: attention at none, some, all; in several sizes; z_channels below, at and above embed_dim.
VARIANTS = {
    "VA-VAE f16d32": dict(ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, attn_levels=[4], z_channels=32, embed_dim=32),
    "attention everywhere": dict(ch_mult=[1, 2, 3], attn_levels=[0, 1, 2]),
    "attention at the top, narrower below": dict(ch=64, ch_mult=[1, 2, 1], attn_levels=[0, 1], num_res_blocks=3),
    "one level": dict(ch_mult=[1], z_channels=3, embed_dim=3),
    "other images": dict(in_channels=1, out_ch=5),
    "fewer z_channels": dict(z_channels=3, embed_dim=8),
    "more z_channels": dict(ch_mult=[1, 2, 1], attn_levels=[1], z_channels=6, embed_dim=2),
    "no attention at all": dict(mid_attention=False),
    "no quant_conv": dict(quant_convs=False, z_channels=16),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layout(tmp_path, capsys, name):
    ldm = LdmVae(**VARIANTS[name])
    save_torch(ldm.state, tmp_path / "x.pt")
    config = {key: value for key, value in ldm.config.items() if key != "embed_dim"}
    params = {"ddconfig": config} | ({"embed_dim": ldm.config["embed_dim"]} if ldm.quant_convs else {})
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    convert(tmp_path / "x.pt", tmp_path / "vae", "--config", tmp_path / "x.yaml", "--scaling_factor", 0.5)

    rng, factor = np.random.default_rng(1), 2 ** (len(ldm.widths) - 1)
    images = rng.standard_normal([2, ldm.config["in_channels"], 3 * factor, 4 * factor]).astype("float32")
    latents = rng.standard_normal([2, ldm.latent_channels, 4, 3]).astype("float32")
    vae = stock(tmp_path / "vae")
    moments, decoded = outputs(vae, images, latents)
    assert relative_error(moments, ldm.encode(paddle.to_tensor(images)).numpy()) < 2e-5
    assert relative_error(decoded, ldm.decode(paddle.to_tensor(latents)).numpy()) < 2e-5
    assert ("two residual blocks more" in capsys.readouterr().out) is (name == "more z_channels")
    assert vae.config.scaling_factor == 0.5
    assert downsampling(vae) == factor


@pytest.fixture(scope="module")
def ldm():
    return LdmVae(ch_mult=[1, 2, 2], attn_levels=[1])


def config_of(ldm, **changes):
    """LDM's config of the fixture as a tree; changes are made where LDM has the key."""
    network = {key: value for key, value in ldm.config.items() if key != "embed_dim"}
    params = {"embed_dim": ldm.config["embed_dim"], "ddconfig": network}
    model = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    for key, value in changes.items():
        next((part for part in (model, params) if key in part), network)[key] = value
    return {"model": model}


def as_float16(state, path):
    save_torch({name: value.astype("float16") for name, value in state.items()}, path)


def as_safetensors(state, path):
    save_safetensors({**state, "loss.logvar": np.zeros(3, "float32")}, path, layout="torch")


def as_part_of_a_diffusion_model(state, path):
    """Stable Diffusion's checkpoints hold the autoencoder as `first_stage_model`."""
    named = {f"first_stage_model.{name}": value for name, value in state.items()}
    save_torch({**named, "model.diffusion_model.out.0.weight": np.ones(3, "float32")}, path)


def as_distributed(state, path):
    save_torch({f"module.{name}": value for name, value in state.items()}, path)


FORMS = {"x.pt": as_float16, "x.safetensors": as_safetensors, "x.ckpt": as_part_of_a_diffusion_model}


@pytest.mark.parametrize("name", [*FORMS, "y.pt"])
def test_forms_of_the_file(tmp_path, ldm, name):
    FORMS.get(name, as_distributed)(ldm.state, tmp_path / name)
    convert(tmp_path / name, tmp_path / "found")
    save_torch(ldm.state, tmp_path / "plain.pt")
    convert(tmp_path / "plain.pt", tmp_path / "expected")
    found, expected = (load_weights(tmp_path / each / "model_state.pdparams") for each in ("found", "expected"))
    assert list(found) == list(expected)
    for weight, value in expected.items():
        value = value.astype("float16").astype("float32") if name == "x.pt" else value
        np.testing.assert_array_equal(found[weight], value)
        assert found[weight].dtype == np.float32


def test_what_is_left_out_is_not_read(tmp_path, ldm):
    """A VA-VAE's training checkpoint has a DINOv2 in it, several times as large as the autoencoder."""
    save_torch({**ldm.state, "foundation_model.block.weight": np.ones(10**6, "float32")}, tmp_path / "x.pt")
    save_safetensors(load_weights(tmp_path / "x.pt"), tmp_path / "x.safetensors", layout="torch")
    for path in (tmp_path / "x.pt", tmp_path / "x.safetensors"):
        state = load_weights(path, "auto", wanted=is_part)
        assert state.pop("foundation_model.block.weight").size == 0
        assert all(np.array_equal(value, ldm.state[name]) for name, value in state.items())
    inside = bytes(np.float32([1] * 8))
    data = (tmp_path / "x.pt").read_bytes().replace(inside, b"\xff" * len(inside))  # its checksum is wrong now
    (tmp_path / "x.pt").write_bytes(data)
    convert(tmp_path / "x.pt", tmp_path / "vae")


def shrink(state, name, rows):
    state[name] = state[name][:rows]


SPOILS = {
    "missing": (lambda s: s.pop("decoder.up.1.attn.0.q.bias"), r"1 missing: decoder\.up\.1\.attn\.0\.q\.bias$"),
    "missing first": (lambda s: s.pop("encoder.conv_in.weight"), r"has no encoder\.conv_in\.weight"),
    "superfluous": (
        lambda s: s.update({"encoder.mid.block_3.conv1.weight": s["encoder.mid.block_1.conv1.weight"]}),
        r"1 unexpected: encoder\.mid\.block_3\.conv1\.weight$",
    ),
    "of something else": (
        lambda s: s.update({"classifier.weight": np.ones(3, "float32")}),
        r"holds 1 tensors that no LDM autoencoder has: classifier\.weight$",
    ),
    "VQ": (lambda s: s.update({"quantize.embedding.weight": np.ones((9, 4), "float32")}), r"a VQ model"),
    "double_z false": (lambda s: shrink(s, "encoder.conv_out.weight", 4), r"encoder gives 4 channels .*double_z true"),
    "shape": (
        lambda s: shrink(s, "encoder.norm_out.bias", 9),
        r"encoder\.norm_out\.bias is \[9\], expected \[64\]$",
    ),
    "a level is missing": (
        lambda s: [s.pop(name) for name in [*s] if name.startswith("encoder.down.1.")],
        r"has encoder\.down\.N of N = 0, 2, expected 0, 1",
    ),
    "ch_mult begins with 2": (
        lambda s: s.update(
            {
                "encoder.conv_in.weight": np.ones((16, 3, 3, 3), "float32"),
                "encoder.conv_in.bias": np.ones(16, "float32"),
            }
        ),
        r"ch is 16 and the first level's width 32.*expected a ch_mult that begins with 1$",
    ),
    "not finite": (
        lambda s: s["quant_conv.bias"].fill(np.nan),
        r"quant_conv\.bias has 8 of 8 values that are not finite",
    ),
    "another network": (
        lambda s: (s.clear(), s.update({"blocks.0.weight": np.ones(3, "float32")})),
        r"no LDM autoencoder \(it has no encoder",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_weights_that_are_no_autoencoder(tmp_path, ldm, name):
    spoil, message = SPOILS[name]
    state = {name: value.copy() for name, value in ldm.state.items()}
    spoil(state)
    save_torch(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        convert(tmp_path / "x.pt", tmp_path / "vae")
    assert os.listdir(tmp_path) == ["x.pt"]


CHANGES = {
    "ch": (64, "ch is 64, expected 32"),
    "ch_mult": ([1, 2, 4], r"ch_mult is \[1, 2, 4\], expected \[1, 2, 2\]"),
    "num_res_blocks": (2, "num_res_blocks is 2, expected 1"),
    "z_channels": (16, "z_channels is 16, expected 4"),
    "embed_dim": (16, "embed_dim is 16, expected 4"),
    "in_channels": (1, "in_channels is 1, expected 3"),
    "out_ch": (1, "out_ch is 1, expected 3"),
    "double_z": (False, "double_z is False, expected True"),
    "attn_resolutions": ([16], r"attn_resolutions is \[16\] of resolution 64, expected \[32\]"),
    "resolution": (128, r"attn_resolutions is \[32\] of resolution 128, expected \[64\]"),
    "resolution ": (None, r"attn_resolutions is \[32\], expected .* resolution beside it"),
    "attn_type": ("linear", "attn_type is linear, expected vanilla or none"),
    "tanh_out": (True, "tanh_out is True, expected False"),
    "target": ("taming.models.vqgan.VQModel", r"describes a VQ model \(taming"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_config_of_another_autoencoder(tmp_path, ldm, key):
    value, message = CHANGES[key]
    save_torch(ldm.state, tmp_path / "x.pt")
    (tmp_path / "c.json").write_text(json.dumps(config_of(ldm, **{key.strip(): value}), indent="\t"))
    with pytest.raises(ValueError, match=rf"c\.json: {message}"):
        convert(tmp_path / "x.pt", tmp_path / "vae", "--config", tmp_path / "c.json")
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2", "broken YAML at line 1"),
        ("model: !!python/object/apply:os.mkdir [made]", "broken YAML at line 1.*constructor"),
        ("a: &a [1]\nb: *a", "it has an alias"),
        ("[" * 5000, "nested too deep"),
        ("- 1", "holds no settings by name"),
        ("steps: 1", "has none of the settings of an LDM autoencoder"),
        ("#" * 300_000, "more than 256 KiB"),
    ],
)
def test_files_that_are_no_config(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"c\.yaml: {message}"):
        convert(WEIGHTS, tmp_path / "vae", "--config", tmp_path / "c.yaml")
    assert os.listdir(tmp_path) == ["c.yaml"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        convert(WEIGHTS, tmp_path / "vae")
    assert os.listdir(tmp_path / "vae") == ["notes.txt"]


# ---- A converted autoencoder from images to samples ----

SIDE, CHANNELS = 32, 6  # of the images, of the latents


@pytest.fixture(scope="module")
def f16(tmp_path_factory):
    """A folder with a converted autoencoder of 16x smaller latents, the features of some images, and a run on them."""
    folder = tmp_path_factory.mktemp("f16")
    ldm = LdmVae(ch_mult=[1, 1, 1, 1, 1], attn_levels=[4], z_channels=CHANNELS, embed_dim=CHANNELS)
    save_torch(ldm.state, folder / "x.pt")
    convert(folder / "x.pt", folder / "vae")
    rng = np.random.default_rng(0)
    for label in range(2):
        (folder / "images" / str(label)).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (SIDE + i, SIDE, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / "images" / str(label) / f"{i}.png")
    flags = ["--data_path", folder / "images", "--feature_path", folder / "features", "--image_size", SIDE, "--moments"]
    extract_features.main([*map(str, flags), "--vae", str(folder / "vae"), "--num_workers", "0", "--device", "cpu"])
    config = make_config(in_channels=CHANNELS, sample_size=SIDE // 16, patch_size=1, num_classes=2)
    (folder / "config.json").write_text(json.dumps(config))
    run = {"config": folder / "config.json", "features": folder / "features", "output": folder / "run", "steps": 1}
    arguments = [word for word in loop_arguments("trainer", **run) if "resolution" not in word]
    run_in_process("trainer", [*arguments, "--image_logging_steps=1", "--num_inference_steps=2"])
    return folder


def size_of_picture(path):
    with Image.open(path) as picture:
        return picture.size


def test_extraction_and_the_config_made_for_it(f16, tmp_path):
    latents = np.load(f16 / "features" / f"imagenet{SIDE}_features" / "5.npy")
    assert latents.shape == (1, 2 * CHANNELS, SIDE // 16, SIDE // 16)
    make_config_tool.main(["--feature_path", str(f16 / "features"), "--output", str(tmp_path / "made.json")])
    model = json.loads((tmp_path / "made.json").read_text())["model"]
    assert (model["in_channels"], model["sample_size"]) == (CHANNELS, SIDE // 16)
    check_features.main(["--feature_path", str(f16 / "features"), "--output", str(tmp_path / "check.json")])
    with pytest.raises(ValueError, match="--image_size 40: expected a multiple of 16"):
        flags = ["--data_path", f16 / "images", "--feature_path", tmp_path, "--image_size", 40, "--vae", f16 / "vae"]
        extract_features.main([*map(str, flags)])


@pytest.mark.parametrize("form", ["run", "pipeline", "stock", "programs"])
def test_images_are_of_the_right_size(f16, tmp_path, form):
    model = tmp_path / "model"
    (picture,) = (f16 / "run").rglob("images/*.png")
    if form == "run":
        assert size_of_picture(picture)[1] >= 2 * SIDE  # a row a class
        model = f16 / "run"
    elif form == "programs":
        export_inference.main(["--model_path", str(f16 / "run"), "--output", str(model)])
    else:
        convert_dit_to_ppdiffusers.main(
            ["--model_path", str(f16 / "run"), "--output", str(model), "--image_size", str(SIDE)]
        )
        assert f"images of {SIDE}x{SIDE} pixels" in (model / "README.md").read_text()
    if form == "stock":
        from ppdiffusers import DiTPipeline

        pipe = DiTPipeline.from_pretrained(str(model))
        pipe.set_progress_bar_config(disable=True)
        assert pipe(class_labels=[1], num_inference_steps=2).images[0].size == (SIDE, SIDE)
        return
    flags = ["--model_path", model, "--classes", 1, "--num_inference_steps", 2, "--output", tmp_path / "image.png"]
    flags += ["--backend", "inference"] * (form == "programs")
    infer_demo_dit.main([*map(str, flags), "--device", "cpu"])
    assert size_of_picture(tmp_path / "image.png") == (SIDE, SIDE)
    if form == "run":
        flags = ["--model_path", model, "--output", tmp_path / "x.npz", "--num_images", 2, "--num_inference_steps", 2]
        sample_npz.main([*map(str, flags), "--device", "cpu"])
        assert np.load(tmp_path / "x.npz")["arr_0"].shape == (2, SIDE, SIDE, 3)
