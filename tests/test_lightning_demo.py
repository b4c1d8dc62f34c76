"""LightningDiT from weights to images: the published settings, the statistics of its latents, folders, exports."""

import json
import os
import pickle
import shutil

import numpy as np
import paddle
import pytest
from PIL import Image
from support.golden import GOLDEN
from support.pipelines import DIGITS_VAE, make_config, make_model, make_vae, seeded, state_of

import infer_demo_lightningdit
import infer_demo_sit
from features.autoencoder import LatentDecoder, load_vae
from models import DiT, LightningDiT
from sampling import SiTPipeline
from sampling.generator import load_exportable, load_generator
from sampling.model_path import describe_model
from sampling.pipelines.inference import export_inference as save_programs
from sampling.pipelines.inference import load_inference
from tools import convert_dit_to_ppdiffusers, convert_sit_to_ppdiffusers, export_inference, sample_npz
from transport import Sampler, create_transport
from weights.files import safe_load, save_pdparams
from weights.source import read_weights

CHANNELS = 8  # of the statistics in tests/golden
STATISTICS = GOLDEN / "lightning_latents" / "latents_stats.pt"
PUBLISHED = {"cfg_scale": 6.7, "cfg_interval": True, "cfg_interval_start": 0.125}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A network of 8 channels as a file of weights, which says nothing of itself, its config, and an autoencoder."""
    root = tmp_path_factory.mktemp("lightning")
    config = make_config("LightningDiT", sample_size=4, in_channels=CHANNELS)
    save_pdparams(state_of(make_model(config)), root / "lightning.pdparams")
    (root / "Lightning.json").write_text(json.dumps({name: config[name] for name in ("model", "objective")}))
    make_vae(CHANNELS).save_pretrained(str(root / "vae"), safe_serialization=False)
    return root


def file_flags(models):
    return ["--model_path", models / "lightning.pdparams", "--config_file", models / "Lightning.json"]


def draw(output, *arguments, demo=infer_demo_lightningdit):
    demo.main([*map(str, arguments), "--output", str(output), "--device", "cpu"])
    return np.asarray(Image.open(output)).astype(int)


def by_hand(models, num_steps, guidance, multiplier=1.0, statistics=STATISTICS, **settings):
    """The images of classes 1 and 7 side by side, by the official code's steps."""
    from ppdiffusers.utils.paddle_utils import randn_tensor

    config = json.loads((models / "Lightning.json").read_text())
    model, y = make_model(config), paddle.to_tensor([1, 7, 10, 10])
    z = randn_tensor((2, CHANNELS, 4, 4), generator=seeded(0), dtype="float32")
    sample = Sampler(create_transport()).sample_ode(sampling_method="euler", num_steps=num_steps, **settings)
    latents = sample(paddle.concat([z, z]), model.forward_with_cfg, y=y, **guidance)[-1][:2].numpy()
    vae = load_vae(str(models / "vae"))
    if statistics is not None:
        vae.register_to_config(scaling_factor=1.0)
        values = safe_load(statistics)
        latents = latents * values["std"] / multiplier + values["mean"]
    images = LatentDecoder(vae).decode(paddle.to_tensor(latents), "diffusers")
    return np.concatenate(list(images), axis=1).astype(int)


@pytest.mark.paddle26
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"guidance": PUBLISHED, "timestep_shift": 0.3}),
        (
            ["--guidance_scale", 10, "--guidance_interval", 0.4, "--timestep_shift", 2, "--latent_multiplier", 0.5],
            {
                "guidance": {"cfg_scale": 10.0, "cfg_interval": True, "cfg_interval_start": 0.4},
                "timestep_shift": 2,
                "multiplier": 0.5,
            },
        ),
        (
            ["--guidance_interval", 0, "--timestep_shift", 0, "--guidance_channels", "all"],
            {"guidance": {"cfg_scale": 6.7, "cfg_channels": None}},
        ),
    ],
)
def test_images_are_those_of_the_official_steps(models, tmp_path, flags, expected):
    # The autoencoder has a scaling factor, by which LightningDiT's latents are not scaled.
    given = ["--classes", 1, 7, "--num_inference_steps", 12, "--vae", models / "vae", "--latents_stats", STATISTICS]
    image = draw(tmp_path / "a.png", *file_flags(models), *given, *flags)
    hand = by_hand(models, 12, **expected)
    assert image.shape == hand.shape and hand.std() > 5
    assert np.abs(image - hand).max() <= 1


def test_every_kind_of_model_gives_the_same_images(models, tmp_path):
    """A folder knows what a file was told, and the other demo and tools draw the same by the same settings."""
    flags = ["--classes", 1, 7, "--num_inference_steps", 6]
    own = [*file_flags(models), "--vae", models / "vae", "--latents_stats", STATISTICS]
    first = draw(tmp_path / "a.png", *own, *flags)
    convert_sit_to_ppdiffusers.main([*map(str, [*own, "--output", tmp_path / "pipeline"])])
    assert np.array_equal(first, draw(tmp_path / "b.png", "--model_path", tmp_path / "pipeline", *flags))
    export_inference.main([*map(str, [*own, "--output", tmp_path / "programs"])])
    programs = draw(tmp_path / "d.png", "--model_path", tmp_path / "programs", "--backend", "inference", *flags)
    assert np.abs(programs - first).max() <= 1
    settings = ["--sampler", "ode", "--timestep_shift", 0.3, "--guidance_interval", 0.125, "--guidance_scale", 6.7]
    same = draw(tmp_path / "c.png", *own, *flags, *settings, demo=infer_demo_sit)
    assert np.array_equal(first, same)
    pipe = SiTPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 6.7, "guidance_interval": (0.125, 1), "timestep_shift": 0.3}
    images = pipe([1, 7], num_inference_steps=6, generator=seeded(0), **settings).images
    assert np.array_equal(first, np.concatenate([np.asarray(image) for image in images], axis=1))
    with pytest.raises(ValueError, match="timestep_shift 0.3: is for the ODE; expected 0 with sampler='sde'"):
        pipe([1], sampler="sde", timestep_shift=0.3)

    card = (tmp_path / "pipeline/README.md").read_text()
    assert "timestep_shift=0.3" in card and "guidance_scale=6.7" in card
    assert load_generator(str(tmp_path / "pipeline")).count_guided() == 3
    stated = describe_model(str(tmp_path / "pipeline")).features["latent_normalization"]
    np.testing.assert_allclose(stated["mean"], safe_load(STATISTICS)["mean"].reshape(-1))


def test_many_images_say_how_they_were_drawn(models, tmp_path):
    flags = ["--latents_stats", STATISTICS, "--vae", models / "vae", "--num_images", 3, "--num_inference_steps", 4]
    for name, more in (("shifted", ["--timestep_shift", 0.3, "--guidance_interval", 0.1]), ("plain", [])):
        output = ["--output", tmp_path / f"{name}.npz", "--sampler", "ode", "--device", "cpu"]
        sample_npz.main([*map(str, [*file_flags(models), *flags, *output, *more])])
    shifted, plain = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("shifted", "plain"))
    assert (shifted["timestep_shift"], shifted["guidance_interval"], shifted["guidance_channels"]) == (0.3, [0.1, 1], 3)
    assert "timestep_shift" not in plain and plain["guidance_interval"] is None
    images = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("shifted", "plain")]
    assert not np.array_equal(*images)


def test_a_file_that_does_not_say_how_its_latents_were_normalised(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [*map(str, [*file_flags(models), "--vae", models / "vae"])]
    asked = r"lightning.pdparams: this file does not say how its latents were normalised; give --latents_stats"
    for main in (infer_demo_lightningdit.main, infer_demo_sit.main, convert_sit_to_ppdiffusers.main):
        with pytest.raises(ValueError, match=asked):
            main(own)
    flags = ["--classes", 1, 7, "--num_inference_steps", 6]
    image = draw("a.png", *own, *flags, "--latents_stats", "none")
    hand = by_hand(models, 6, PUBLISHED, statistics=None, timestep_shift=0.3)
    assert np.abs(image - hand).max() <= 1

    # Weights that know it are not told anew.
    config = json.loads((models / "Lightning.json").read_text())
    values = {key: [1.0] * CHANNELS for key in ("mean", "std")}
    config["features"] = {"latent_normalization": {**values, "multiplier": 1.0}}
    os.makedirs("checkpoint")
    shutil.copy(models / "lightning.pdparams", "checkpoint/model_state.pdparams")
    with open("checkpoint/config.json", "w") as file:
        json.dump(config, file)
    for path in ("checkpoint", "checkpoint/model_state.pdparams"):
        with pytest.raises(ValueError, match="--latents_stats: the config of .* says how its latents were normalised"):
            infer_demo_lightningdit.main(["--model_path", path, "--latents_stats", str(STATISTICS)])
    with pytest.raises(ValueError, match="lightning_latents/latents_stats.pt: mean is of shape .1, 8, 1, 1., expected"):
        four = make_config("LightningDiT")
        describe_model(_written(four), config="four.json", latents_stats=str(STATISTICS))


def test_an_official_file_needs_no_config(models, tmp_path):
    """Its network is recognised, by the demo, tools and the converter."""
    flags = ["--classes", 1, 7, "--num_inference_steps", 4]
    own = ["--model_path", GOLDEN / "lightningdit_full.pt", "--vae", DIGITS_VAE, "--latents_stats", "none"]
    first = draw(tmp_path / "a.png", *own, *flags)
    convert_sit_to_ppdiffusers.main([*map(str, [*own, "--output", tmp_path / "pipeline"])])
    assert np.array_equal(first, draw(tmp_path / "b.png", "--model_path", tmp_path / "pipeline", *flags))
    with pytest.raises(ValueError, match="another model than --image_size 512: sample_size 8 there"):
        convert_sit_to_ppdiffusers.main([*map(str, [*own, "--output", tmp_path / "other", "--image_size", 512])])
    model = describe_model(str(GOLDEN / "lightningdit_full.pt"), latents_stats="none")
    assert model.config["model"]["qk_norm"] and model.config["model"]["num_attention_heads"] == 3

    # Of a file with several sets of weights it is that of --key.
    state, _ = read_weights(GOLDEN / "lightningdit_full.pt")
    with open(tmp_path / "two.pdparams", "wb") as file:
        pickle.dump({"first": {"w": np.zeros(1)}, "second": state}, file)
    own[1] = tmp_path / "two.pdparams"
    assert np.array_equal(first, draw(tmp_path / "c.png", *own, *flags, "--key", "second"))


def _written(config):
    save_pdparams(state_of(make_model(config)), "four.pdparams")
    with open("four.json", "w") as file:
        json.dump(config, file)
    return "four.pdparams"


def test_what_is_missing_of_the_public_files_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "lightningdit-xl-imagenet256-800ep"
    for missing, hint, there in (
        (f"{name}.pt", f"Download it from huggingface.co/hustvl/{name}", f"{name}.pdparams"),
        ("./vavae", "python tools/convert_ldm_vae.py --model_path vavae-imagenet256-f16d32-dinov2.pt", "vavae"),
        ("latents_stats.pt", "huggingface.co/hustvl/vavae-imagenet256-f16d32-dinov2", "latents_stats.pt"),
    ):
        with pytest.raises(ValueError, match=f"^{missing}: there is nothing of that name here. .*{hint}"):
            infer_demo_lightningdit.main([])
        (tmp_path / there).touch()
    with pytest.raises(ValueError, match="mine: there is no such file"):
        infer_demo_lightningdit.main(["--model_path", "mine"])
    (tmp_path / "LightningDiT_XL_1_256").mkdir()
    with pytest.raises(ValueError, match="./LightningDiT_XL_1_256: neither a SiTPipeline folder"):
        infer_demo_lightningdit.main([])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--timestep_shift", "-1"], "--timestep_shift must be a number of 0 or more, got -1"),
        (["--sampler", "sde", "--timestep_shift", "0.3"], "--timestep_shift is for --sampler ode"),
        (["--last_step", "Mean"], "--last_step is for --sampler sde"),
        (["--guidance_interval", "1.5"], "--guidance_interval 1.5: expected two times in .0, 1., the lower first, or"),
        (["--guidance_interval", "0.1", "0.2", "0.3"], "--guidance_interval 0.1 0.2 0.3: expected two times"),
        (["--latent_multiplier", "0"], "--latent_multiplier must be a number above 0, got 0"),
    ],
)
def test_mistakes(models, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        infer_demo_lightningdit.main([*map(str, file_flags(models)), *flags, "--latents_stats", "none"])


# ---- Exports that know DiT ----

SWITCHES = {"qk_norm": True, "swiglu": True, "rope": True, "rms_norm": True, "adaln_shift": False}


def write_switched(folder, kind):
    """A checkpoint of a DiT or SiT with every switch on."""
    config = make_config(kind, sample_size=4, **SWITCHES)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_pdparams(state_of(make_model(config)), folder / "model_state.pdparams")
    return str(folder)


def test_a_program_with_all_switches_is_the_network(tmp_path):
    path = write_switched(tmp_path / "DiT", "DiT")
    make_vae().save_pretrained(str(tmp_path / "vae"), safe_serialization=False)
    exported = load_exportable(describe_model(path), vae=str(tmp_path / "vae"))
    assert isinstance(exported.network, DiT) and not isinstance(exported.network, LightningDiT)
    save_programs(exported, tmp_path / "program")
    program, x = load_inference(str(tmp_path / "program")), paddle.randn([3, 4, 4, 4])
    t, y = paddle.to_tensor([999, 500, 3]), paddle.to_tensor([1, 10, 3])
    with paddle.no_grad():
        eager = exported.network(x, t.astype("float32"), y).numpy()
    np.testing.assert_allclose(program.network(x, t, y).numpy(), eager, atol=2e-5 * np.abs(eager).max())


@pytest.mark.parametrize(
    ("kind", "convert", "flags"),
    [("DiT", convert_dit_to_ppdiffusers.main, []), ("SiT", convert_sit_to_ppdiffusers.main, ["--stock"])],
)
def test_stock_ppdiffusers_has_no_switches(kind, convert, flags, tmp_path):
    path = write_switched(tmp_path / kind, kind)
    named = "qk_norm true, swiglu true, rope true, rms_norm true, adaln_shift false: Transformer2DModel has no such"
    with pytest.raises(ValueError, match=named):
        convert(["--model_path", path, "--output", str(tmp_path / "out"), "--vae", DIGITS_VAE, *flags])
    assert not (tmp_path / "out").exists()


def test_a_lightningdit_is_no_stock_pipeline(models, tmp_path):
    flags = [*map(str, file_flags(models)), "--output", str(tmp_path / "out"), "--stock"]
    with pytest.raises(ValueError, match="--stock is for a SiT; this model is a LightningDiT"):
        convert_sit_to_ppdiffusers.main(flags)
