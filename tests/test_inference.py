"""Export for Paddle Inference, and the demos' --backend inference."""

import json
import os
import shutil
import tempfile

import numpy as np
import pytest
from PIL import Image
from support.golden import GOLDEN
from support.pipelines import make_config, make_model, make_pipeline, make_vae, state_of, tree_of, write_checkpoint
from support.versions import PADDLE_2

import infer_demo_dit
import infer_demo_lightningdit
import infer_demo_sit
from features.autoencoder import NotFiniteError
from runtime.machine import cpu_has_bfloat16
from runtime.programs import PROGRAMS
from sampling.generator import from_weights, load_generator
from sampling.pipelines import inference
from sampling.pipelines.export import export_pipeline
from sampling.pipelines.inference import MANIFEST
from sampling.pipelines.inference import export_inference as save_programs
from tools import export_inference, sample_npz
from verification.pipelines import psnr

KINDS = ("dit", "large_dit", "sit", "checkpoint")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`{kind: (source, exported)}`: a pipeline folder or training checkpoint of each kind, and its export."""
    folder = tmp_path_factory.mktemp("inference")
    vae, labels = make_vae(), {i: f"digit {i}" for i in range(10)}
    vae.save_pretrained(str(folder / "vae"), safe_serialization=False)
    config = make_config()
    export_pipeline(config, state_of(make_model(config)), vae, folder / "dit", id2label=labels)
    large = make_config("LargeDiT", qk_norm=True, num_kv_heads=1)
    state = state_of(make_model(large))
    export_pipeline(large, state, vae, folder / "large_dit", id2label=labels)
    sit = make_config("SiT", sample_size=8, num_attention_heads=4)
    export_pipeline(sit, state_of(make_model(sit)), vae, folder / "sit", id2label=labels)
    write_checkpoint(folder / "checkpoint", make_config(num_attention_heads=2))
    for kind in KINDS:
        flags = ["--vae", str(folder / "vae")] if kind == "checkpoint" else []
        export_inference.main(["--model_path", str(folder / kind), "--output", str(folder / f"{kind}_out"), *flags])
    return {kind: (folder / kind, folder / f"{kind}_out") for kind in KINDS}


def draw(path, *flags, demo=infer_demo_dit):
    """The image that the demo draws."""
    number = len(list(path.parent.glob("*.png")))
    output = path.parent / f"{number}.png"
    vae = ["--vae", path.parent / "vae"] * (demo is infer_demo_dit)
    arguments = ["--model_path", path, *vae, "--output", output, "--device", "cpu", *flags]
    demo.main([str(argument) for argument in arguments])
    return np.asarray(Image.open(output)).astype(int)


FLAGS = ["--seed", 5, "--num_inference_steps", 5, "--guidance_scale", 2, "--classes", 3, 7, 1]


@pytest.mark.paddle26
@pytest.mark.parametrize("kind, channels", [*((kind, "all") for kind in KINDS), ("dit", "3"), ("checkpoint", "3")])
def test_draws_what_eager_mode_draws(models, kind, channels):
    source, exported = models[kind]
    flags = [*FLAGS, "--guidance_channels", channels]
    eager = draw(source, *flags)
    assert eager.std() > 20
    assert psnr(draw(exported, "--backend", "inference", *flags), eager) > 60


@pytest.mark.parametrize("scale", [-2, 0])
def test_scales_below_one_draw_what_eager_mode_draws(models, scale):
    source, exported = models["dit"]
    flags = [*FLAGS, "--guidance_scale", scale]
    assert psnr(draw(exported, "--backend", "inference", *flags), draw(source, *flags)) > 60


FIT = "note: the timestep embedding of this pipeline is exact in these numbers of steps"


@pytest.mark.parametrize("steps", [10, 30])
def test_says_where_a_narrow_network_is_not_exact(models, capsys, steps):
    draw(models["dit"][1], "--backend", "inference", "--num_inference_steps", steps, "--classes", 1)
    assert (f"{FIT}: 10, 20, 25, 50 " in capsys.readouterr().out) == (steps == 30)


def test_programs_whose_weights_are_not_finite_are_named(models, tmp_path):
    """And a scale that overflows is told from them."""
    _, exported = models["dit"]
    flags = ["--backend", "inference", "--classes", 1, "--num_inference_steps", 2]
    with pytest.raises(NotFiniteError, match="1 of 1 images hold numbers that are not finite"):
        draw(exported, *flags, "--guidance_scale", "1e30")
    shutil.copytree(exported, tmp_path / "out")
    path = tmp_path / "out" / "transformer" / "model.pdiparams"
    data = bytearray(path.read_bytes())
    data[-8:-4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"transformer/model.pdiparams: .* has 1 of .* values that are not finite"):
        draw(tmp_path / "out", *flags)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU has no bfloat16 (avx512_bf16 or AMX)")
@pytest.mark.skipif(PADDLE_2, reason="Paddle 2.6 fails in most networks; it is refused")
@pytest.mark.parametrize("kind", ["dit", "large_dit", "checkpoint"])
def test_bfloat16_draws_nearly_that(models, kind):
    source, exported = models[kind]
    eager = draw(source, *FLAGS)
    image = draw(exported, "--backend", "inference", "--dtype", "bfloat16", *FLAGS)
    assert 35 < psnr(image, eager) < 75  # above that float32 was computed in


@pytest.mark.parametrize(
    ("flags", "is_slow"),
    [
        ({"avx512_bf16", "avx512_fp16"}, True),  # Golden Cove whose AMX is hidden
        ({"avx512_bf16", "avx512_fp16", "amx_bf16"}, False),
        ({"avx512_bf16"}, False),  # Zen 4
    ],
)
def test_a_bfloat16_that_is_slower_than_float32_is_noted(monkeypatch, flags, is_slow):
    monkeypatch.setattr(inference, "read_processor", lambda: ("GenuineIntel", flags))
    assert inference.notes_on_dtype("cpu", "float32") == inference.notes_on_dtype("gpu", "bfloat16") == []
    assert [note.startswith("bfloat16: ") for note in inference.notes_on_dtype("cpu", "bfloat16")] == [True] * is_slow


def test_any_other_folder_is_exported_for_the_run(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    source, exported = models["dit"]
    flags = ["--backend", "inference", "--num_inference_steps", 30]
    image = draw(source, *flags)
    assert FIT in capsys.readouterr().out
    assert (image == draw(exported, *flags)).all()
    assert list(tmp_path.iterdir()) == []


def test_seeds_schedulers_names_and_batch_sizes(models):
    source, exported = models["dit"]
    flags = ["--num_inference_steps", 4, "--scheduler", "unipc"]
    images = {}
    for name, more in (
        ("one", ["--classes", "digit 3"]),
        ("same", ["--classes", 3]),
        ("seed", ["--classes", 3, "--seed", 1]),
        ("unguided", ["--classes", 3, "--guidance_scale", 1]),
        ("ten", []),
    ):
        images[name] = draw(exported, "--backend", "inference", *flags, *more)
        assert psnr(images[name], draw(source, *flags, *more)) > 60
    assert (images["one"] == images["same"]).all() and images["ten"].size > images["one"].size
    for name in ("seed", "unguided"):
        assert not (images["one"] == images[name]).all()


def test_what_is_in_the_folder(models):
    _, exported = models["dit"]
    assert [name for name in tree_of(exported) if os.sep not in name] == [MANIFEST]
    assert {name.split(os.sep)[0] for name in tree_of(exported)} == {MANIFEST, "scheduler", "transformer", "vae"}
    manifest = json.loads((exported / MANIFEST).read_text())
    assert manifest["id2label"]["7"] == "digit 7" and manifest["null_class"] == 1000
    assert {"model_type", "guided_channels"}.isdisjoint(manifest)  # so that earlier versions load it


def test_a_network_without_null_class(models, tmp_path, capsys):
    config = make_config(class_dropout_prob=0.0)
    export_pipeline(config, state_of(make_model(config)), make_vae(), tmp_path / "dit")
    export_inference.main(["--model_path", str(tmp_path / "dit"), "--output", str(tmp_path / "out")])
    assert f"{FIT}: 10, 20, 25, 50 (ddim); none (dpm)" in capsys.readouterr().out
    flags = ["--num_inference_steps", 2, "--classes", 1]
    with pytest.raises(ValueError, match="trained without a null class, can't be guided"):
        draw(tmp_path / "out", "--backend", "inference", "--guidance_scale", 4, *flags)
    image = draw(tmp_path / "out", "--backend", "inference", *flags)  # its default is no guidance
    assert psnr(image, draw(tmp_path / "dit", *flags)) > 60


def edit(key, value):
    def change(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest[key] = value
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return change


def cut(folder):
    path = folder / "transformer" / "model.pdiparams"
    path.write_bytes(path.read_bytes()[:-1])


def program_of(folder):
    return next(path for name in PROGRAMS if (path := folder / "vae" / name).exists())


def spoil(folder):
    path = program_of(folder)
    path.write_bytes(path.read_bytes().replace(b"conv2d", b"c\nnv2d"))


def spoil_an_old_one(folder):
    if PADDLE_2:
        pytest.skip("Paddle 2.6 crashes on a damaged program")
    spoil(folder)
    edit("sha256", None)(folder)


def lead_out(folder):
    path = program_of(folder)
    path.unlink()
    path.symlink_to(GOLDEN / "dit_tiny.pt")


@pytest.mark.paddle26
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / MANIFEST).write_text("{"), "inference.json: broken JSON at line 1"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "inference.json: expected a JSON object"),
        (edit("format", 2), "inference.json: format 2, expected 1; export it anew"),
        (edit("in_channels", "4"), "inference.json: in_channels is 4, expected a positive integer"),
        (edit("sample_size", 10**9), "sample_size is 1000000000, expected a positive integer"),
        (edit("null_class", -1), "null_class is -1, expected a class id or null"),
        (edit("scaling_factor", None), "scaling_factor is None, expected a positive number"),
        (edit("scheduler", "os.system"), "scheduler is os.system, expected a scheduler of ppdiffusers"),
        (edit("guided_channels", 0), "guided_channels is 0, expected a positive integer, null for all"),
        (edit("scheduler", ["DDIMScheduler"]), "expected a scheduler of ppdiffusers"),
        (edit("id2label", {"a": "b"}), 'expected {"0": "name", ...}'),
        (edit("timestep_fit", {"ddim": [0], "dpm": []}), 'timestep_fit is .*, expected {"ddim": numbers of steps'),
        (edit("bytes", {}), "inference.json: bytes: names no program and weights of transformer"),
        (cut, r"model.pdiparams: has [\d,]+ bytes, inference.json says [\d,]+: the folder is not whole"),
        (lambda folder: (folder / "vae" / "model.pdiparams").unlink(), "model.pdiparams: is missing, inference.json"),
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json: no such"),
        (edit("sha256", []), r"sha256 is \[\], expected checksums"),
        (spoil, r"vae/model\.\w+: is not the program whose sha256 inference.json has"),
        (spoil_an_old_one, r"vae/model\.json: Paddle [\d.]+ cannot load it: "),
        (lead_out, r"vae/model\.\w+: leads out of the folder"),
    ],
)
def test_a_broken_folder_is_one_line(models, tmp_path, change, message):
    shutil.copytree(models["dit"][1], tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as error:
        draw(tmp_path / "out", "--backend", "inference")
    assert len(str(error.value)) < 600


@pytest.mark.paddle26
def test_mistakes(models, tmp_path, monkeypatch):
    source, exported = models["dit"]
    bfloat16 = ["--backend", "inference", "--dtype", "bfloat16"]
    for path, flags, message in (
        *([(exported, bfloat16, "dtype bfloat16: .*; use float32")] if PADDLE_2 else []),
        (exported, [], "holds programs for Paddle Inference; if you trust whoever made them .* --backend inference"),
        (source, ["--dtype", "bfloat16"], "--dtype bfloat16: Paddle computes in float32 only on a CPU"),
        (exported, ["--backend", "inference", "--dtype", "float16"], "dtype float16: .* on a GPU only"),
        (exported, ["--backend", "inference", "--scheduler", "ddpm"], "--scheduler ddpm: not with --backend"),
        (exported, ["--backend", "inference", "--classes", "10"], r"--classes 10: the classes are 0\.\.9"),
        (tmp_path, ["--backend", "inference"], "neither a DiTPipeline folder"),
        (models["sit"][1], ["--backend", "inference", "--scheduler", "ddim"], "is a SiT, which has its own scheduler"),
        (exported, ["--backend", "inference", "--num_inference_steps", "501"], "start at timestep 500 of 1000"),
        (
            exported,
            ["--backend", "inference", "--scheduler", "dpm", "--num_inference_steps", "1001"],
            "steps 1001: expected 1 to 1000",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            draw(path, *flags)
    for flags, message in (
        (["--model_path", source, "--output", exported], "dit_out: is there already; give the name of a new folder"),
        (["--model_path", exported, "--output", tmp_path / "out"], "dit_out: is exported already"),
        (["--model_path", tmp_path / "no", "--output", tmp_path / "out"], "there is no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            export_inference.main([str(flag) for flag in flags])
    assert list(tmp_path.iterdir()) == []


def test_an_export_leaves_the_network_as_it_was(tmp_path):
    """Although its program has a projection each for queries, keys and values."""
    config = make_config()
    generator = from_weights(config, state_of(make_model(config)), make_vae())
    before = list(generator.network.state_dict())
    save_programs(generator, tmp_path / "out")
    assert list(generator.network.state_dict()) == before


# ---- Networks of a transport ----


@pytest.fixture(scope="module")
def transports(tmp_path_factory):
    """As `models`: a LightningDiT's checkpoint with every switch on, and a Large-SiT's SiTPipeline folder."""
    folder = tmp_path_factory.mktemp("transports")
    make_vae(8).save_pretrained(str(folder / "vae"), safe_serialization=False)
    write_checkpoint(folder / "lightning", make_config("LightningDiT", in_channels=8, qk_norm=True))
    large = make_config("LargeSiT", {"path_type": "GVP", "prediction": "noise"}, qk_norm=True, num_kv_heads=1)
    make_pipeline(large, make_vae(), {i: f"digit {i}" for i in range(10)}).save_pretrained(folder / "large")
    for kind, flags in (("lightning", ["--vae", str(folder / "vae")]), ("large", [])):
        export_inference.main(["--model_path", str(folder / kind), "--output", str(folder / f"{kind}_out"), *flags])
    return {kind: (folder / kind, folder / f"{kind}_out") for kind in ("lightning", "large")}


@pytest.mark.paddle26
@pytest.mark.parametrize("kind, channels", [("lightning", 3), ("large", 3)])
def test_samplers_of_a_transport_draw_what_its_network_draws(transports, kind, channels):
    source, exported = map(str, transports[kind])
    eager = load_generator(source, vae=str(transports[kind][0].parent / "vae"))
    program = load_generator(exported, backend="inference")
    assert program.count_guided() == eager.count_guided() == channels
    assert program.labels == eager.labels and program.kind == "transport"
    for classes, options in (
        ([1], {"timestep_shift": 0.3, "guidance_interval": (0.125, 1), "guidance_scale": 6.7}),
        ([1, 7, 3], {"method": "dopri5"}),
        ([7, 0], {"sampler": "sde", "method": "Heun", "last_step": "Tweedie"}),
    ):
        options = {"seed": 2, "num_inference_steps": 5, "output": "latents", **options}
        expected, latents = (generator.sample(classes, **options) for generator in (eager, program))
        bound = 2e-5 * float(expected.abs().max())
        np.testing.assert_allclose(latents.numpy(), expected.numpy(), atol=bound, rtol=0)
        images, decoded = (generator.decode(expected, "diffusers").astype(int) for generator in (eager, program))
        assert images.std() > 20 and np.abs(decoded - images).max() <= 1


@pytest.mark.parametrize("kind, demo", [("lightning", infer_demo_lightningdit), ("large", infer_demo_sit)])
def test_the_demos_of_a_transport_draw_programs(transports, kind, demo):
    source, exported = transports[kind]
    vae = ["--vae", source.parent / "vae"] * (kind == "lightning")
    flags = ["--num_inference_steps", 4, "--classes", 3, 7]
    eager = draw(source, *flags, *vae, demo=demo)
    assert psnr(draw(exported, "--backend", "inference", *flags, demo=demo), eager) > 60


def test_sets_of_samples_are_drawn_by_programs(transports, tmp_path):
    images = []
    for path, backend in zip(transports["large"], ("eager", "inference"), strict=True):
        flags = ["--model_path", path, "--backend", backend, "--output", tmp_path / f"{backend}.npz", "--device", "cpu"]
        sample_npz.main([*map(str, flags), "--num_images", "3", "--num_inference_steps", "3", "--tile", "2"])
        images.append(np.load(tmp_path / f"{backend}.npz")["arr_0"].astype(int))
    assert np.abs(images[1] - images[0]).max() <= 1


def test_programs_name_their_demo(models, transports, tmp_path):
    lightning, large, dit = transports["lightning"][1], transports["large"][1], models["dit"][1]
    inference = ["--backend", "inference"]
    write_checkpoint(tmp_path / "sit", make_config("SiT"))
    shutil.copytree(large, tmp_path / "odd")
    edit("model_type", "DiT")(tmp_path / "odd")
    for path, demo, flags, message in (
        (lightning, infer_demo_dit, inference, "holds programs of a LightningDiT; use infer_demo_lightningdit.py"),
        (large, infer_demo_dit, [], "holds programs of a LargeSiT; use infer_demo_sit.py"),
        (dit, infer_demo_lightningdit, inference, "holds programs of a DiTPipeline; use infer_demo_dit.py"),
        (lightning, infer_demo_lightningdit, [], "holds programs for Paddle Inference; .* add --backend inference"),
        (large, infer_demo_sit, [*inference, "--dtype", "float16"], "dtype float16: .* on a GPU only"),
        (large, infer_demo_sit, [*inference, "--key", "ema"], "--key is for .*_out is a Paddle Inference folder"),
        (tmp_path / "sit", infer_demo_dit, inference, "is a SiT; use infer_demo_sit.py"),
        (tmp_path / "odd", infer_demo_sit, inference, "model_type is DiT, expected SiT or LargeSiT or LightningDiT"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(path, *flags, demo=demo)
