"""Internal guidance in sampling: its formula, in every sampler, where its layer is kept, flags and messages."""

import dataclasses
import json

import numpy as np
import paddle
import pytest
from PIL import Image
from support.golden import GOLDEN, load_golden, relative_error
from support.pipelines import DIGITS_VAE, make_config, make_model, make_vae, state_of, write_checkpoint

import infer_demo_dit
import infer_demo_sit
from config.schema import ineffective_settings, resolve_config
from features.autoencoder import load_vae
from models.state import INTERNAL_GUIDANCE, has_second_layer
from objectives import build_objective
from sampling import SiTPipeline
from sampling.generator import from_weights, load_exportable, load_generator
from sampling.guidance import guided, internally_guided
from sampling.guidance_settings import configured_guidance
from sampling.model_path import describe_model
from tools import (
    convert_dit_to_ppdiffusers,
    convert_official_weights,
    convert_sit_to_ppdiffusers,
    export_inference,
    extract_weights,
    sample_npz,
)
from training.preview import Preview
from weights.files import safe_load, save_pdparams, save_torch
from weights.source import read_weights

DIFFUSION = {"type": "diffusion", "diffusion_steps": 40}
EVERY = [
    *(("DiT", {"method": method}) for method in ("ddim", "ddpm", "dpm", "unipc")),
    *(("SiT", {"sampler": "ode", "method": method}) for method in ("euler", "heun2", "ab2", "dopri5")),
    ("SiT", {"sampler": "sde"}),
    ("LightningDiT", {"sampler": "ode"}),
    ("LargeDiT", {"method": "ddim"}),
]
LATENTS = {"num_inference_steps": 4, "output": "latents"}
OFFICIAL = str(GOLDEN / "internal_guidance_sit.pt")
OFFICIAL_MODEL = {"type": "SiT", "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3}
OFFICIAL_MODEL |= {"num_attention_heads": 4, "attention_head_dim": 8, "num_classes": 10, "learn_sigma": False}
NO_LAYER = "has no second final layer for internal guidance; expected the scale 1. The entry "


def with_layer(kind, block=1, others=(), **model):
    objective = dict(DIFFUSION) if kind in ("DiT", "LargeDiT") else {}
    objective["regularizers"] = [*others, {"type": "internal_guidance", "block": block}]
    return make_config(kind, objective, **({"sample_size": 4} | model))


def run(main, *arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def generators():
    """Of each kind a generator whose network has the layer, and one of the same network without it."""
    vae, made = load_vae(DIGITS_VAE), {}
    for kind in ("DiT", "LargeDiT", "SiT", "LightningDiT"):
        config = with_layer(kind)
        state = state_of(make_model(config))
        for name, entries in (("with", config["objective"]["regularizers"]), ("plain", [])):
            own = {**config, "objective": {**config["objective"], "regularizers": entries}}
            if config["objective"]["type"] == "diffusion":
                made[kind, name] = from_weights(own, state, vae, dtype="float32")
            else:
                made[kind, name] = SiTPipeline.from_weights(own, state, vae).generator
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Training checkpoints: their averages are other weights."""
    folder = tmp_path_factory.mktemp("models")
    learned = [{"type": "latent_alignment", "block": 1}, {"type": "layer_sync", "block": 1, "target_block": 2}]
    write_checkpoint(folder / "sit", with_layer("SiT", block=-2, others=learned))
    write_checkpoint(folder / "dit", with_layer("DiT"))
    write_checkpoint(folder / "plain", make_config("SiT"))
    return folder


@pytest.fixture(scope="module")
def official_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "ig.json"
    regularizers = [{"type": "internal_guidance", "block": 2}]
    path.write_text(json.dumps({"model": OFFICIAL_MODEL, "objective": {"regularizers": regularizers}}))
    return path


# -- The formula ------------------------------------------------------------------------------------------------------


@pytest.mark.paddle26
def test_it_is_the_official_outputs_difference(official_config):
    """The official file as it is."""
    arrays = load_golden("internal_guidance_sit_losses")
    generator = load_generator(OFFICIAL, config=str(official_config), vae=make_vae())
    x1, x0, t, y = (paddle.to_tensor(arrays[name]) for name in ("x1", "x0", "t", "y"))
    x = t.reshape([-1, 1, 1, 1]) * x1 + (1 - t.reshape([-1, 1, 1, 1])) * x0
    for scale in (1.4, -0.5):
        found = internally_guided(generator.network, x, t, y, scale)
        expected = arrays["out_auxiliary"] + scale * (arrays["out"] - arrays["out_auxiliary"])
        assert relative_error(found.numpy(), expected) < 1e-5


def test_it_comes_before_the_other_kinds_and_leaves_the_variance():
    """On both halves, of all channels, also of those that guidance by class leaves."""
    paddle.seed(0)
    outputs = {label: paddle.randn([8, 3, 3]) for label in (1, 10)}
    seconds = {label: paddle.randn([8, 3, 3]) for label in (1, 10)}
    worse, passes = paddle.randn([2, 8, 3, 3]), []

    def network(x, t, y, hooks=()):
        passes.append(len(hooks))
        for hook in hooks:
            hook.output = paddle.stack([seconds[label] for label in y.tolist()])
        return paddle.stack([outputs[label] for label in y.tolist()])

    how = {"channels": 3, "null_class": 10, "guide": lambda x, t, y: worse, "guide_scale": 1.5}
    how |= {"internal_scale": 1.4, "internal_interval": (0.2, 0.5)}
    denoiser = guided(network, paddle.to_tensor([1, 1]), 3.0, **how)
    x = paddle.randn([2, 4, 3, 3])
    for time in (0.1, 0.5):
        cond, uncond = (outputs[label].numpy().copy() for label in (1, 10))
        for output, label in ((cond, 1), (uncond, 10)) if time == 0.5 else ():
            second = seconds[label].numpy()
            output[:4] = second[:4] + 1.4 * (output - second)[:4]
        expected = np.stack([cond, cond])
        expected[:, :3] = uncond[:3] + 3.0 * (cond - uncond)[:3]
        expected[:, :4] += 0.5 * (cond - worse.numpy())[:, :4]
        np.testing.assert_allclose(denoiser(x, paddle.to_tensor([time, time])), expected, atol=1e-5)
    assert passes == [0, 1]


# -- In every sampler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_the_scale_1_changes_no_bit_and_another_one_does(kind, options, generators):
    generator, plain = generators[kind, "with"], generators[kind, "plain"]
    assert generator.has_second and not plain.has_second
    drawn = {}
    for scale in (1.0, 3.0):
        call = {**LATENTS, **options, "guidance_scale": scale, "cfg_zero_star": True, "guidance_rescale": 0.5}
        expected = plain.sample([3, 7], **call).numpy()
        for how in ({}, {"internal_scale": 1, "internal_interval": (0, 1)}):
            np.testing.assert_array_equal(generator.sample([3, 7], **how, **call), expected)
        drawn[scale] = generator.sample([3, 7], internal_scale=1.6, **call).numpy()
        assert np.abs(drawn[scale] - expected).max() > 1e-3
    assert np.abs(drawn[1.0] - drawn[3.0]).max() > 1e-3
    with pytest.raises(ValueError, match=f"^the network: {NO_LAYER}"):
        plain.sample([3], internal_scale=2, **LATENTS)


def test_it_costs_no_pass_and_has_an_interval_of_its_own(generators):
    for kind, interval, steps in (("DiT", (10, 30), 8), ("SiT", (0.3, 0.6), 9)):
        calls = []

        def network(x, t, y, calls=calls, own=generators[kind, "with"].network, **hooks):
            calls.append((float(t[0]), x.shape[0], len(hooks)))
            return own(x, t, y, **hooks)

        generator = dataclasses.replace(generators[kind, "with"], network=network)
        how = {"num_inference_steps": steps, "output": "latents", "internal_scale": 1.5}
        generator.sample([3, 7], guidance_scale=2.0, internal_interval=interval, **how)
        assert {hooks for *_, hooks in calls} == {0, 1}
        assert all((count, hooks) == (4, interval[0] <= t <= interval[1]) for t, count, hooks in calls)
        assert len(calls) == (8 if kind == "DiT" else 8)


def test_a_half_precision_network(generators):
    """Outputs of the two layers are subtracted in float32, where the network gives that."""

    def network(x, t, y, hooks=()):
        for hook in hooks:
            hook.output = paddle.full_like(x, 0.5).astype("bfloat16")
        return paddle.ones_like(x)

    x = paddle.zeros([2, 4, 2, 2])
    found = internally_guided(network, x, paddle.zeros([2]), paddle.zeros([2], "int64"), 3.0)
    assert found.dtype == paddle.float32 and (found.numpy() == 2.0).all()


# -- Where the layer is kept ------------------------------------------------------------------------------------------


def latents(generator, scale=1.5, **options):
    how = {"internal_scale": scale, "num_inference_steps": 4, "output": "latents", **options}
    return generator.sample([3, 7], **how).numpy()


def test_a_pipeline_folder_keeps_it_when_asked(models, tmp_path, capsys):
    checkpoint = load_generator(str(models / "sit"), vae=DIGITS_VAE)
    given = ["--model_path", models / "sit", "--vae", DIGITS_VAE]
    run(convert_sit_to_ppdiffusers.main, *given, "--output", tmp_path / "plain")
    said = capsys.readouterr().out
    assert "note: left out what regularizers learned, which plain sampling does not need: internal_guidance, " in said
    assert "latent_alignment; --keep_internal_guidance keeps" in said
    plain = load_generator(str(tmp_path / "plain"))
    np.testing.assert_array_equal(latents(plain, 1), latents(checkpoint, 1))
    with pytest.raises(ValueError, match=f"plain: {NO_LAYER}"):
        latents(plain)

    run(convert_sit_to_ppdiffusers.main, *given, "--output", tmp_path / "kept", "--keep_internal_guidance")
    assert ": latent_alignment\n" in capsys.readouterr().out
    settings = json.loads((tmp_path / "kept/transformer/config.json").read_text())
    assert settings["internal_guidance_block"] == 1  # block -2 of two
    pipe = SiTPipeline.from_pretrained(tmp_path / "kept")
    pipe.save_pretrained(tmp_path / "again", safe_serialization=True)
    for folder in ("kept", "again"):
        for scale in (1, 1.5):
            found = latents(load_generator(str(tmp_path / folder)), scale)
            np.testing.assert_array_equal(found, latents(checkpoint, scale))
    pipe.set_progress_bar_config(disable=True)

    def draw(**how):
        options = {"generator": paddle.Generator().manual_seed(4), "num_inference_steps": 4, "output_type": "latent"}
        return pipe([3], **options, **how).images.numpy()

    assert np.abs(draw(internal_scale=1.5) - draw()).max() > 1e-3
    np.testing.assert_array_equal(draw(internal_scale=1.5, internal_interval=(0.0, 0.0)).shape, draw().shape)
    assert "`internal_scale` above 1" in (tmp_path / "kept/README.md").read_text()
    with pytest.raises(
        ValueError, match=r"^internal_interval \(0.5, 2\): expected \(lowest, highest\) times in \[0, 1"
    ):
        draw(internal_scale=1.5, internal_interval=(0.5, 2))

    path = tmp_path / "again/transformer/config.json"
    for wrong in (0, 3, "1"):
        path.write_text(json.dumps({**settings, "internal_guidance_block": wrong}))
        with pytest.raises(ValueError, match="config.json: internal_guidance_block is .*, expected 1 to num_layers 2$"):
            SiTPipeline.from_pretrained(tmp_path / "again")


def test_weights_files_keep_it_when_asked(models, tmp_path, capsys):
    for output, flags in (("plain.pdparams", []), ("kept.safetensors", ["--keep_internal_guidance"])):
        run(extract_weights.main, "--model_path", models / "sit", "--key", "ema", "--output", tmp_path / output, *flags)
    said = capsys.readouterr().out
    assert said.count("note: left out what regularizers learned") == 2
    kept = read_weights(tmp_path / "kept.safetensors", kept=[INTERNAL_GUIDANCE])[0]
    assert not any(name.startswith("regularizers.") for name in safe_load(str(tmp_path / "plain.pdparams")))
    assert has_second_layer(kept) and not any("latent_alignment" in name for name in kept)
    how = {"vae": DIGITS_VAE, "config": str(models / "sit/config.json")}
    expected = latents(load_generator(str(models / "sit"), vae=DIGITS_VAE))
    np.testing.assert_array_equal(latents(load_generator(str(tmp_path / "kept.safetensors"), **how)), expected)
    with pytest.raises(ValueError, match=f"plain.pdparams: {NO_LAYER}"):
        latents(load_generator(str(tmp_path / "plain.pdparams"), **how))
    # A single file of a checkpoint is told the same way.
    file = ["--model_path", models / "sit/model_state.pdparams", "--output", tmp_path / "file.pdparams"]
    run(extract_weights.main, *file)
    assert not any(name.startswith("regularizers.") for name in safe_load(str(tmp_path / "file.pdparams")))
    with pytest.raises(ValueError, match=r"has no second final layer of internal guidance \(regularizers.internal_gui"):
        run(
            extract_weights.main,
            *("--model_path", models / "plain", "--output", tmp_path / "no.pdparams", "--keep_internal_guidance"),
        )


def test_official_files_there_and_back(official_config, tmp_path, capsys):
    official = safe_load(OFFICIAL)
    official["projectors.0.0.weight"] = np.ones([5, 32], "float32")  # REPA's
    save_torch(official, tmp_path / "ig.pt")
    convert = ["--config_file", official_config, "--model_path"]
    run(convert_official_weights.main, *convert, tmp_path / "ig.pt", "--output", tmp_path / "plain.pdparams")
    said = capsys.readouterr().out
    assert "internal_guidance, representation_alignment; --keep_internal_guidance keeps" in said
    assert set(safe_load(str(tmp_path / "plain.pdparams"))) == {
        name for name in official if not name.startswith(("final_layer_xr.", "projectors."))
    }
    keep = "--keep_internal_guidance"
    run(convert_official_weights.main, *convert, tmp_path / "ig.pt", "--output", tmp_path / "ig.pdparams", keep)
    back = ["--reverse", "--output", tmp_path / "back.pt"]
    run(convert_official_weights.main, *convert, tmp_path / "ig.pdparams", *back, keep)
    del official["projectors.0.0.weight"]
    returned = safe_load(str(tmp_path / "back.pt"))
    assert returned.keys() == official.keys()
    for name, value in official.items():
        np.testing.assert_array_equal(returned[name], value)
    how = {"config": str(official_config), "vae": make_vae()}
    np.testing.assert_array_equal(
        latents(load_generator(str(tmp_path / "ig.pdparams"), **how)), latents(load_generator(OFFICIAL, **how))
    )


def test_what_has_no_place_for_it_says_so(models, tmp_path, capsys):
    keep, vae = "--keep_internal_guidance", ["--vae", DIGITS_VAE]
    dit = ["--model_path", models / "dit", "--output", tmp_path / "out", *vae]
    for main, flags, message in (
        (convert_dit_to_ppdiffusers.main, [*dit, keep], "--keep_internal_guidance: a DiTPipeline has no place for it"),
        (
            convert_sit_to_ppdiffusers.main,
            ["--model_path", models / "sit", "--output", tmp_path / "out", *vae, "--stock", keep],
            "--keep_internal_guidance: a DiTPipeline has no place for it; a SiTPipeline folder has",
        ),
        (
            convert_sit_to_ppdiffusers.main,
            ["--model_path", models / "plain", "--output", tmp_path / "out", *vae, keep],
            f"--keep_internal_guidance: .*plain: {NO_LAYER}",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(main, *flags)
    capsys.readouterr()
    run(convert_dit_to_ppdiffusers.main, *dit)
    assert "does not need: internal_guidance\n" in capsys.readouterr().out
    kept = tmp_path / "kept"
    sit = ["--model_path", models / "sit", *vae]
    run(convert_sit_to_ppdiffusers.main, *sit, "--output", kept, keep)
    said = "left out what regularizers learned, which plain sampling does not need: internal_guidance"
    checkpoint = load_exportable(describe_model(str(models / "sit")), vae=DIGITS_VAE)
    assert checkpoint.notes == [f"{said}, latent_alignment"]
    capsys.readouterr()
    run(export_inference.main, "--model_path", kept, "--output", tmp_path / "programs")
    assert f"note: {said}\n" in capsys.readouterr().out
    counts = [
        sum(tensor.numpy().size for tensor in network.state_dict().values())
        for network in (checkpoint.network, paddle.jit.load(str(tmp_path / "programs/transformer/model")))
    ]
    assert counts[0] == counts[1]
    programs = ["--model_path", tmp_path / "programs", "--backend", "inference", "--internal_guidance_scale", 1.4]
    with pytest.raises(ValueError, match="--internal_guidance_scale: programs of Paddle Inference have one output"):
        run(infer_demo_sit.main, *programs)


# -- Commands ---------------------------------------------------------------------------------------------------------


def test_the_demo_guides_official_files_and_checkpoints(models, official_config, tmp_path, capsys):
    make_vae().save_pretrained(str(tmp_path / "vae"), safe_serialization=False)
    official = ["--model_path", OFFICIAL, "--config_file", official_config, "--vae", tmp_path / "vae"]
    for demo, given in (
        (infer_demo_sit.main, official),
        (infer_demo_dit.main, ["--model_path", models / "dit", "--vae", DIGITS_VAE]),
    ):
        images = []
        for index, flags in enumerate(([], ["--internal_guidance_scale", 1], ["--internal_guidance_scale", 3])):
            output = ["--output", tmp_path / f"{index}.png", "--overwrite", "--num_inference_steps", 4]
            run(demo, *given, "--classes", 3, 7, *output, *flags)
            images.append(np.asarray(Image.open(tmp_path / f"{index}.png")).astype(int))
        np.testing.assert_array_equal(images[0], images[1])
        assert np.abs(images[0] - images[2]).max() > 3
    capsys.readouterr()
    interval = ["--internal_guidance_interval", 5, 30, "--output", tmp_path / "b.png", "--num_inference_steps", 4]
    run(infer_demo_dit.main, "--model_path", models / "dit", "--vae", DIGITS_VAE, "--classes", 3, *interval)
    said = "--internal_guidance_interval has no effect without an --internal_guidance_scale"
    assert said in capsys.readouterr().out


def test_mistakes_are_said_before_paddle_is_imported(models, monkeypatch):
    monkeypatch.setattr("sampling.demo.configure_runtime", lambda: pytest.fail("it would be imported here"))
    scale = ["--internal_guidance_scale", "1.4"]
    for model, flags, message in (
        ("plain", scale, f'--internal_guidance_scale: .*plain: {NO_LAYER}{{"type": "internal_guidance", "block": N}}'),
        (
            "sit",
            [*scale, "--backend", "inference"],
            "programs of Paddle Inference have one output; use --backend eager",
        ),
        ("sit", ["--internal_guidance_scale", "nan"], "--internal_guidance_scale nan: expected a finite number, 1 for"),
        ("sit", [*scale, "--internal_guidance_interval", "0.5", "2"], "--internal_guidance_interval 0.5 2: expected"),
        ("sit", [*scale, "--internal_guidance_interval", "0.5", "0.2"], "--internal_guidance_interval 0.5 0.2: "),
    ):
        with pytest.raises(ValueError, match=message):
            run(infer_demo_sit.main, "--model_path", models / model, *flags)
    with pytest.raises(ValueError, match="--internal_guidance_interval 5 40: expected two timesteps in"):
        flags = ["--num_inference_steps", 4, *scale, "--internal_guidance_interval", 5, 40]
        run(infer_demo_dit.main, "--model_path", models / "dit", *flags)


def test_many_images_record_it(models, tmp_path, capsys):
    def draw(*flags, output="a.npz"):
        given = ["--model_path", models / "sit", "--vae", DIGITS_VAE, "--output", tmp_path / output, "--device", "cpu"]
        how = ["--num_images", 2, "--num_inference_steps", 3, "--guidance_scale", 1]
        run(sample_npz.main, *given, *how, *flags)
        return json.loads((tmp_path / output).with_suffix(".json").read_text())

    plain = draw("--internal_guidance_scale", 1)
    assert not {"internal_scale", "internal_interval"} & plain.keys()
    scale = ["--internal_guidance_scale", 1.4]
    with pytest.raises(ValueError, match="a.npz: is complete, with other settings: --internal_guidance_scale was null"):
        draw(*scale)
    capsys.readouterr()
    found = draw(*scale, "--internal_guidance_interval", 0, 0.5, output="b.npz")
    assert (found["internal_scale"], found["internal_interval"], found["guidance_channels"]) == (1.4, [0.0, 0.5], None)
    assert ", internal guidance 1.4, " in capsys.readouterr().out


# -- A run's section --------------------------------------------------------------------------------------------------


def section(kind="SiT", regularizers=({"type": "internal_guidance", "block": 1},), **guidance):
    config = with_layer(kind)
    objective = {**config["objective"], "regularizers": list(regularizers)}
    return resolve_config({"model": config["model"], "objective": objective, "guidance": guidance})


def test_the_section_of_a_config():
    assert configured_guidance(section()) == {}
    config = section(internal_scale=1.4, internal_interval=[0, 0.5])
    assert configured_guidance(config) == {"internal_scale": 1.4, "internal_interval": [0, 0.5]}
    assert ineffective_settings(config) == []
    assert ineffective_settings(section(internal_interval=[0, 0.5])) == [
        "internal_interval has no effect without an internal_scale"
    ]
    for kind, how, message in (
        (
            "SiT",
            {"internal_scale": 1.4, "regularizers": []},
            "internal_scale 1.4 needs the regularizer internal_",
        ),
        ("SiT", {"internal_interval": [0, 2]}, "guidance: internal_interval must end at 1 or before"),
        ("DiT", {"internal_interval": [0.2, 0.8]}, r"internal_interval must hold a timestep, from 0 to 39, got \[0.2,"),
    ):
        with pytest.raises(ValueError, match=message):
            section(kind, **how)


def test_previews_guide_as_the_section_says(monkeypatch):
    monkeypatch.setattr("features.autoencoder.load_vae", lambda path: make_vae())
    drawn = []
    for scale in (1.0, 1.5):
        config = section(internal_scale=scale)
        preview = Preview(build_objective(config), config, vae="vae", num_inference_steps=4, guidance_scale=1.0)
        drawn.append(preview.sample(make_model(config)).numpy())
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


def test_a_network_whose_weights_have_it_not(tmp_path):
    """As a run has that was started anew with the entry, but whose averages are of before."""
    config = with_layer("SiT")
    state = state_of(make_model(make_config("SiT")))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_pdparams(state, tmp_path / "model_state.pdparams")
    generator = load_generator(str(tmp_path), vae=DIGITS_VAE)
    assert latents(generator, 1).shape == (2, 4, 4, 4)
    with pytest.raises(ValueError, match=NO_LAYER):
        latents(generator)
