"""Large-DiT from weights to images: official shards merged, pipeline folders, demo scripts, samplers; and Large-SiT."""

import json
import os
import runpy
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest
from PIL import Image
from support.golden import relative_error
from support.pipelines import (
    ODD,
    ddim_latents,
    make_config,
    make_model,
    make_vae,
    state_of,
    stock_latents,
    tree_of,
    write_checkpoint,
)
from support.runs import ROOT, command_environment

import infer_demo_dit
import infer_demo_largedit_3b
import infer_demo_largedit_7b
import infer_demo_sit
from diffusion import create_diffusion
from models.state import paddle_to_official
from objectives import build_objective
from sampling import SiTPipeline
from sampling.demo import draw_dit
from sampling.guidance import guided
from sampling.labels import IMAGENET_LABELS, read_labels
from sampling.pipelines.export import export_pipeline
from sampling.pipelines.folder import CARD, CODE, TREE
from tools import convert_dit_to_ppdiffusers, convert_official_weights, convert_sit_to_ppdiffusers
from transport import Sampler, create_transport
from weights.files import safe_load, save_pdparams, save_torch
from weights.output import save_paddle
from weights.shards import shard_axis

TOLERANCE = 3e-5  # ppdiffusers computes the timestep frequencies in float32


# -- Official weights and their tensor-parallel shards ----------------------------------------------------------------

# fairscale's layers in the official models.py. Column: weight [out, in] and bias by rows. Row: weight by columns, its
# bias whole. Embedding: by columns. The norms of queries and keys are made for the heads of one rank.
COLUMN = "x_embedder t_embedder.mlp.0 wq wk wv w1 w3 adaLN_modulation.1 final_layer.linear q_norm k_norm".split()
ROW, EMBEDDING = "t_embedder.mlp.2 wo w2".split(), ["y_embedder.embedding_table"]
WHOLE = "attention_norm ffn_norm".split()


def split(state, degree):
    """What `degree` ranks of the official code would each save."""
    shards = [{} for _ in range(degree)]
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        (axis,) = [
            axis
            for layers, axis in ((COLUMN, 0), (ROW, 1 if kind == "weight" else None), (EMBEDDING, 1), (WHOLE, None))
            if layer.endswith(tuple(layers))
        ]
        parts = [value] * degree if axis is None else np.split(value, degree, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part
    return shards


def write_shards(folder, state, degree, prefix="consolidated"):
    folder.mkdir(exist_ok=True)
    for rank, shard in enumerate(split(state, degree)):
        save_torch(shard, folder / f"{prefix}.{rank:02d}-of-{degree:02d}.pth")
    return folder


def file_of(folder, rank, degree=2):
    return folder / f"consolidated.{rank:02d}-of-{degree:02d}.pth"


def sharded_config(tmp_path, **model):
    """A config file of a network that 2 and 4 ranks can share, and its weights in the official layout."""
    sizes = {"num_attention_heads": 8, "attention_head_dim": 6, "num_kv_heads": 4, "qk_norm": True, "multiple_of": 20}
    config = make_config("LargeDiT", **{**sizes, **model})
    path = tmp_path / "LargeDiT.json"
    path.write_text(json.dumps(config))
    return path, paddle_to_official(state_of(make_model(config)))


def convert(config, weights, output, *flags):
    arguments = ["--config_file", config, "--weights", weights, "--output", output, *flags]
    convert_official_weights.main([str(argument) for argument in arguments])
    return safe_load(output)


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_shards_merge_to_the_bits_of_the_whole(tmp_path, capsys, degree, qk_norm):
    config, state = sharded_config(tmp_path, qk_norm=qk_norm)
    save_torch(state, tmp_path / "whole.pt")
    whole = convert(config, tmp_path / "whole.pt", tmp_path / "whole.pdparams")
    folder = write_shards(tmp_path / "shards", state, degree)
    capsys.readouterr()
    for given in (folder, file_of(folder, degree - 1, degree)):
        merged = convert(config, given, tmp_path / "merged.pdparams", "--overwrite")
        assert merged.keys() == whole.keys()
        assert all(merged[name].tobytes() == whole[name].tobytes() for name in whole)
    # Each rank took the mean over its own heads.
    assert ("note: the official code normalises" in capsys.readouterr().out) is (qk_norm and degree > 1)
    axes = {name: shard_axis(name) for name in state}
    shapes = [
        [n // degree if i == axes[name] else n for i, n in enumerate(value.shape)] for name, value in state.items()
    ]
    assert shapes == [list(value.shape) for value in split(state, degree)[0].values()]


@pytest.mark.parametrize("key", [None, "model", "ema"])
def test_averages_are_taken_unless_said_otherwise(tmp_path, key):
    config, state = sharded_config(tmp_path)
    folder = write_shards(tmp_path / "0005000", state, 2)
    write_shards(folder, {name: value * 2 for name, value in state.items()}, 4, "consolidated_ema")
    (folder / "model_args.pth").write_bytes(b"not read")
    merged = convert(config, folder, tmp_path / "y.pdparams", *(["--key", key] if key else []))
    expected = state["final_layer.linear.weight"].T * (1 if key == "model" else 2)
    np.testing.assert_array_equal(merged["final_layer.linear.weight"], expected)
    merged = convert(config, file_of(folder, 1), tmp_path / "z.pdparams")  # a file says itself what it is
    np.testing.assert_array_equal(merged["final_layer.linear.weight"], state["final_layer.linear.weight"].T)


def test_half_precision_shards(tmp_path):
    config, state = sharded_config(tmp_path)
    half = {name: value.astype("float16") for name, value in state.items()}
    merged = convert(config, write_shards(tmp_path / "s", half, 2), tmp_path / "y.pdparams")
    assert all(value.dtype == np.float32 for value in merged.values())
    np.testing.assert_array_equal(merged["layers.1.feed_forward.w2.weight"], half["layers.1.feed_forward.w2.weight"].T)


def edit_shard(path, edit):
    shard = safe_load(path)
    edit(shard)
    save_torch(shard, path)


NORM = "layers.0.attention_norm.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda f: file_of(f, 0).unlink(), r"shards: 1 of 2 shards are missing: consolidated\.00-of-02\.pth"),
        (lambda f: shutil.copy(file_of(f, 0), file_of(f, 0, 4)), r"shards: .*several networks \(of 2, 4 ranks\)"),
        (lambda f: edit_shard(file_of(f, 1), lambda s: s.pop(NORM)), rf"01-of-02\.pth: {NORM} is in .*00-of-02\.pth"),
        (
            lambda f: edit_shard(file_of(f, 1), lambda s: s.update({NORM: s[NORM] + 1})),
            rf"01-of-02\.pth: {NORM} differs from that in .*00-of-02\.pth; every shard must hold the same",
        ),
        (
            lambda f: edit_shard(file_of(f, 1), lambda s: s.update({"x_embedder.bias": s["x_embedder.bias"][1:]})),
            r"01-of-02\.pth: x_embedder\.bias is float32 \[23\], in .*00-of-02\.pth float32 \[24\]",
        ),
        (
            lambda f: edit_shard(file_of(f, 1), lambda s: s.update({NORM: s[NORM].astype("float16")})),
            rf"01-of-02\.pth: {NORM} is float16 \[48\], in .* float32 \[48\]",
        ),
        (
            lambda f: [edit_shard(file_of(f, i), lambda s: s.update({"pos_embed": s[NORM]})) for i in (0, 1)],
            r"00-of-02\.pth: pos_embed is no parameter of Large-DiT; only its shards can be merged",
        ),
        (
            lambda f: [edit_shard(file_of(f, i), lambda s: s.pop("x_embedder.bias")) for i in (0, 1)],
            r"these weights do not fit the config: 1 missing: x_embedder\.bias",
        ),
        (lambda f: file_of(f, 1).write_bytes(b"PK broken"), r"01-of-02\.pth: not a readable weight file"),
    ],
    ids="missing counts absent replicated shape dtype unknown config broken".split(),
)
def test_shards_that_do_not_fit_together(tmp_path, edit, message):
    config, state = sharded_config(tmp_path)
    folder = write_shards(tmp_path / "shards", state, 2)
    edit(folder)
    with pytest.raises(ValueError, match=message) as error:
        convert(config, folder, tmp_path / "y.pdparams")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("y.pdparams*"))


def test_keys_that_the_shards_do_not_have(tmp_path):
    config, state = sharded_config(tmp_path)
    folder = write_shards(tmp_path / "shards", state, 2)
    with pytest.raises(ValueError, match="shards: has no shards of the key 'ema'; it has those of model"):
        convert(config, folder, tmp_path / "y.pdparams", "--key", "ema")
    with pytest.raises(ValueError, match="00-of-02.pth: has no shards of the key 'ema'; it has those of model"):
        convert(config, file_of(folder, 0), tmp_path / "y.pdparams", "--key", "ema")
    with pytest.raises(ValueError, match="02-of-02.pth: there is no such file"):
        convert(config, file_of(tmp_path, 2), tmp_path / "y.pdparams")


def test_pdparams_are_paddles(tmp_path):
    state = {"a.weight": np.arange(6, dtype="float32").reshape(2, 3).T, "b": np.float32(3)}
    save_pdparams(state, tmp_path / "x.pdparams")
    for loaded in (paddle.load(str(tmp_path / "x.pdparams")), safe_load(tmp_path / "x.pdparams")):
        assert [(name, tuple(value.shape)) for name, value in loaded.items()] == [("a.weight", (3, 2)), ("b", ())]
        np.testing.assert_array_equal(np.asarray(loaded["a.weight"]), state["a.weight"])
    save_paddle({"a": np.float32([1, 2**-8 + 1])}, tmp_path / "half.pdparams", "bfloat16")
    loaded = paddle.load(str(tmp_path / "half.pdparams"))["a"]
    assert loaded.dtype == paddle.bfloat16
    np.testing.assert_array_equal(loaded.astype("float32").numpy(), [1, 1])


# -- The DiTPipeline folder -------------------------------------------------------------------------------------------


def inputs(model, seed=0):
    random = np.random.RandomState(seed)
    x = random.standard_normal([4, model.in_channels, model.sample_size, model.sample_size]).astype("float32")
    return paddle.to_tensor(x), paddle.to_tensor([0, 1, 500, 999]), paddle.to_tensor([0, 3, 6, 6])


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        ODD,
        {"learn_sigma": False, "class_dropout_prob": 0.0, "in_channels": 3, "patch_size": 4},
        {"num_attention_heads": 33, "attention_head_dim": 32, "num_layers": 1},  # wider than the conditioning
    ],
    ids=["plain", "odd", "no_null_class", "wide"],
)
def test_stock_pipelines_transformer_gives_our_output(tmp_path, sizes):
    from ppdiffusers import DiTPipeline

    config = make_config("LargeDiT", **sizes)
    model = make_model(config)
    export_pipeline(config, state_of(model), make_vae(model.in_channels), tmp_path / "out")
    transformer = DiTPipeline.from_pretrained(str(tmp_path / "out")).transformer
    x, t, y = inputs(model)
    with paddle.no_grad():
        expected = model(x, t, y)
        assert relative_error(transformer(x, timestep=t, class_labels=y).sample, expected) < TOLERANCE
        (out,) = transformer(x, timestep=t, class_labels=y, return_dict=False)
        assert relative_error(out, expected) < TOLERANCE
        null = transformer(x, timestep=t, class_labels=paddle.full_like(y, 1000)).sample
        if model.class_dropout_prob:
            assert relative_error(null, model(x, t, paddle.full_like(y, 10))) < TOLERANCE
        else:
            assert null.isnan().all()  # there is no null class: guidance must not look as if it worked


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_stock_pipeline_draws_ddim_sample_loops_latents(tmp_path, guidance_scale):
    config = make_config("LargeDiT", **ODD)
    model = make_model(config)
    export_pipeline(config, state_of(model), make_vae(), tmp_path / "out")
    latents, noise = stock_latents(tmp_path / "out", 25, guidance_scale)
    expected = ddim_latents(config, model, noise, 25, guidance_scale)
    assert relative_error(latents, expected) < 1e-4


def test_the_folder_needs_nothing_of_this_project(tmp_path):
    config = make_config("LargeDiT", **ODD)
    model = make_model(config)
    export_pipeline(config, state_of(model), make_vae(), tmp_path / "out")
    assert tree_of(tmp_path / "out") == sorted([*TREE, CODE])
    x, t, y = inputs(model)
    np.savez(tmp_path / "in.npz", x=x.numpy(), t=t.numpy(), y=y.numpy())
    code = (
        "import numpy as np, paddle\n"
        "from ppdiffusers import DiTPipeline\n"
        "pipe = DiTPipeline.from_pretrained('out')\n"
        "x, t, y = (paddle.to_tensor(value) for value in np.load('in.npz').values())\n"
        "with paddle.no_grad(): np.save('out.npy', pipe.transformer(x, timestep=t, class_labels=y).sample.numpy())\n"
        "assert len(pipe(class_labels=[1], num_inference_steps=2).images) == 1\n"
    )
    environment = {**command_environment(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    del environment["PYTHONPATH"]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert relative_error(np.load(tmp_path / "out.npy"), model(x, t, y)) < TOLERANCE


def test_half_precision_keeps_timesteps_and_norms(tmp_path):
    """In bfloat16 (which has no kernels here) 999 is 1000, and in float16 the squares of 300 overflow."""
    from sampling.pipelines.large_dit_transformer import LargeDiTTransformer

    config = make_config("LargeDiT")
    export_pipeline(config, state_of(make_model(config)), make_vae(), tmp_path / "out")
    transformer = LargeDiTTransformer.from_pretrained(str(tmp_path / "out" / "transformer"), paddle_dtype="float16")
    norm = transformer.layers[0].attention_norm
    assert norm.weight.dtype == paddle.float16
    x = paddle.full([1, 32], 300.0, dtype="float16")
    np.testing.assert_allclose(norm(x).astype("float32"), norm.weight.astype("float32").unsqueeze(0), rtol=1e-3)
    transformer = LargeDiTTransformer.from_pretrained(str(tmp_path / "out" / "transformer"))
    embed, seen = transformer.t_embedder.forward, []
    transformer.t_embedder.forward = lambda t: seen.append(t) or embed(t)
    transformer(paddle.zeros([1, 4, 8, 8]), paddle.to_tensor([999]), paddle.to_tensor([1]))
    assert seen[0].dtype == paddle.int64  # not yet in the weights' type


def test_why_ppdiffusers_own_class_is_not_used(tmp_path, monkeypatch):
    """It takes our settings and weights, can't be built with Paddle 3, and, helped there, gives other numbers."""
    from ppdiffusers import DiTLLaMA2DModel
    from ppdiffusers.models.dit_llama import F as functional

    from sampling.pipelines.large_dit_transformer import LargeDiTTransformer, RMSNorm

    config = make_config("LargeDiT", **ODD)
    model = make_model(config)
    notes = export_pipeline(config, state_of(model), make_vae(), tmp_path / "out", stock_transformer=True)
    assert any("draws other images" in note for note in notes)
    assert tree_of(tmp_path / "out") == sorted(TREE)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == ["ppdiffusers", "DiTLLaMA2DModel"]
    folder = str(tmp_path / "out" / "transformer")
    if paddle.__version__.startswith("3"):
        with pytest.raises(TypeError, match="Type promotion"):
            DiTLLaMA2DModel.from_pretrained(folder)

    tables = LargeDiTTransformer.precompute_freqs_cis
    monkeypatch.setattr(DiTLLaMA2DModel, "precompute_freqs_cis", staticmethod(tables))
    attention = functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention_", attention, raising=False)
    stock, report = DiTLLaMA2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    stock.eval()
    x, t, y = inputs(model)
    with paddle.no_grad():
        expected = model(x, t, y)
        assert relative_error(stock(x, timestep=t, class_labels=y).sample, expected) > 0.01
        for layer in stock.layers:  # and nothing but its norms is to blame
            layer.attention_norm = RMSNorm(layer.attention_norm.weight, 1e-3)
            layer.ffn_norm = RMSNorm(layer.ffn_norm.weight, 1e-3)
        assert relative_error(stock(x, timestep=t, class_labels=y).sample, expected) < TOLERANCE


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"num_classes": 1001}, "num_classes 1001: DiTPipeline takes class 1000 for the null class"),
        ({"sample_size": 130}, "sample_size 130, patch_size 2: 4225 tokens; DiTLLaMA2DModel has rotary positions for"),
    ],
)
def test_what_cannot_be_exported(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        export_pipeline(make_config("LargeDiT", **sizes), {}, make_vae(), tmp_path / "out")
    assert tree_of(tmp_path) == []


# -- tools/convert_dit_to_ppdiffusers.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One network as a training checkpoint and as a pipeline folder that the converter wrote, and its VAE: paths."""
    root = tmp_path_factory.mktemp("models")
    config = make_config("LargeDiT", **ODD)
    make_vae().save_pretrained(str(root / "vae"), safe_serialization=False)
    model = write_checkpoint(root / "checkpoint", config)
    labels = root / "labels.json"
    labels.write_text(json.dumps({str(i): f"digit {i}" for i in range(10)}))
    export(root / "vae", root / "checkpoint", root / "pipeline", "--id2label", labels)
    return {"root": root, "model": model, "config": config} | {
        name: root / name for name in ("vae", "checkpoint", "pipeline")
    }


def export(vae, weights, output, *flags, tool=convert_dit_to_ppdiffusers):
    arguments = ["--model_weights", weights, "--checkpoint_path", output, "--vae_model", vae, *flags]
    tool.main([str(argument) for argument in arguments])


def test_converter_takes_a_checkpoints_averages(models):
    exported = safe_load(models["pipeline"] / "transformer" / "model_state.pdparams")
    state = state_of(models["model"])
    assert exported.keys() == state.keys()
    np.testing.assert_array_equal(exported["layers.1.attention.wk.weight"], state["layers.1.attention.wk.weight"])
    table = exported["y_embedder.embedding_table.weight"]
    np.testing.assert_array_equal(table[:11], state["y_embedder.embedding_table.weight"])
    assert table.shape == (1001, 60) and (table[10:] == table[10]).all()


def test_converter_takes_official_shards(models, tmp_path):
    config, state = sharded_config(tmp_path)
    folder = write_shards(tmp_path / "shards", state, 2)
    export(models["vae"], folder, tmp_path / "out", "--config_file", config)
    exported = safe_load(tmp_path / "out" / "transformer" / "model_state.pdparams")
    np.testing.assert_array_equal(
        exported["layers.0.feed_forward.w2.weight"], state["layers.0.feed_forward.w2.weight"].T
    )


def test_converter_replaces_a_pipeline_of_either_kind(models, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(models["pipeline"], out)
    with pytest.raises(ValueError, match="is not empty"):
        export(models["vae"], models["checkpoint"], out)
    export(models["vae"], models["checkpoint"], out, "--stock_transformer", "--overwrite")
    assert tree_of(out) == sorted([*TREE, CARD])
    export(models["vae"], models["checkpoint"], out, "--overwrite", "--scheduler", "dpm")
    assert tree_of(out) == sorted([*TREE, CODE, CARD])


def test_converters_mistakes(models, tmp_path):
    for kind, tool, flags, message in (
        ("DiT", convert_dit_to_ppdiffusers, ["--stock_transformer"], "is for a Large-DiT; this model is a DiT"),
        ("LargeSiT", convert_dit_to_ppdiffusers, [], "For a SiT or LightningDiT: tools/convert_sit_to_ppdiffusers.py"),
        ("LargeDiT", convert_sit_to_ppdiffusers, [], "this model is a LargeDiT; use tools/convert_dit_to_ppdiffusers"),
        ("LargeSiT", convert_sit_to_ppdiffusers, ["--stock"], "--stock is for a SiT; this model is a LargeSiT"),
    ):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(make_config(kind)))
        with pytest.raises(ValueError, match=message):
            export(models["vae"], models["checkpoint"], tmp_path / "o", "--config_file", path, *flags, tool=tool)
    assert not (tmp_path / "o").exists()


# -- Demo scripts -----------------------------------------------------------------------------------------------------


def draw(output, *arguments, demo=infer_demo_dit, **options):
    demo.main([*map(str, arguments), "--output", str(output), "--device", "cpu"], **options)
    return np.asarray(Image.open(output)).astype(int)


@pytest.mark.parametrize("channels", ["3", "all"])
def test_pipeline_and_checkpoint_draw_the_same(models, tmp_path, channels):
    flags = ["--guidance_channels", channels, "--seed", 5, "--num_inference_steps", 10, "--guidance_scale", 2]
    first = draw(tmp_path / "a.png", "--model_path", models["pipeline"], "--classes", "digit 3", 7, *flags)
    checkpoint = ["--model_path", models["checkpoint"], "--vae", models["vae"]]
    second = draw(tmp_path / "b.png", *checkpoint, "--classes", 3, 7, *flags)
    assert first.shape == (8, 16, 3) and first.std() > 10
    assert np.abs(first - second).max() <= 1


def test_the_code_in_a_folder_is_not_run(models, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(models["pipeline"], folder)
    (folder / CODE).write_text("raise SystemExit('it was run')")
    draw(tmp_path / "a.png", "--model_path", folder, "--classes", 1, "--num_inference_steps", 2)


def test_a_folder_that_lacks_weights(models, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(models["pipeline"], folder)
    path = folder / "transformer" / "model_state.pdparams"
    state = safe_load(path)
    state.pop("layers.1.ffn_norm.weight")
    save_pdparams(state, path)
    with pytest.raises(ValueError, match="do not fit the config: 1 missing: layers.1.ffn_norm.weight"):
        draw(tmp_path / "a.png", "--model_path", folder)


@pytest.mark.parametrize("size, demo", [("3b", infer_demo_largedit_3b.DEMO), ("7b", infer_demo_largedit_7b.DEMO)])
def test_demo_scripts_without_arguments(tmp_path, monkeypatch, size, demo):
    """The seed's class, steps and noise, from the folder that stands here under the public model's name."""
    known = {"3b": (42, "float16"), "7b": (0, "bfloat16")}
    assert (demo.seed, demo.gpu_dtype) == known[size]
    assert demo.public_name == f"Alpha-VLLM/Large-DiT-{size.upper()}-256"
    monkeypatch.chdir(tmp_path)
    config = make_config("LargeDiT", num_classes=1000)
    model = make_model(config)
    labels = read_labels(IMAGENET_LABELS)
    export_pipeline(config, state_of(model), make_vae(), demo.local_folder, id2label=labels)
    draw_dit([], demo)
    image = np.asarray(Image.open(f"outputs/result_LargeDiT_{size.upper()}_golden_retriever.png")).astype(int)
    flags = ["--model_path", demo.local_folder, "--classes", 207, "--num_inference_steps", 25, "--seed", demo.seed]
    assert np.array_equal(image, draw("a.png", *flags))


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_demo_scripts_take_the_options_of_the_others(models, tmp_path, monkeypatch, size):
    output = tmp_path / "a.png"
    flags = ["--model_path", models["pipeline"], "--classes", "1", "--num_inference_steps", "1", "--output", output]
    script = f"infer_demo_largedit_{size}.py"
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags), "--guidance_channels", "3", "--device", "cpu"])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    assert np.asarray(Image.open(output)).shape == (8, 8, 3)


# -- Samplers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, ODD], ids=["plain", "odd"])
def test_ddpm_sampling(sizes):
    """What the objective samples is the official way to sample: p_sample_loop of forward_with_cfg, both halves."""
    config = make_config("LargeDiT", **sizes)
    model = make_model(config)
    noise, y = paddle.randn([2, 4, 8, 8]), paddle.to_tensor([1, 9])
    with paddle.no_grad():
        paddle.seed(3)
        denoiser = guided(model, y, 4.0, channels=3, null_class=10)
        latents = build_objective(config).sample(denoiser, noise, num_steps=10)

        draws = iter(recorded_noise(3, 10, noise.shape))
        diffusion = create_diffusion("10")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paddle, "randn", lambda shape, dtype: paddle.concat([next(draws)] * 2))
            both = diffusion.p_sample_loop(
                model.forward_with_cfg,
                [4, 4, 8, 8],
                noise=paddle.concat([noise, noise]),
                clip_denoised=False,
                model_kwargs={"y": paddle.concat([y, paddle.full_like(y, 10)]), "cfg_scale": 4.0},
            )
    assert latents.isfinite().all()
    assert relative_error(latents, both[:2]) < 1e-5


def recorded_noise(seed, steps, shape):
    paddle.seed(seed)
    return [paddle.randn(shape) for _ in range(steps)]


LABELS = {str(i): f"digit {i}" for i in range(10)}


@pytest.mark.parametrize("sizes", [{}, ODD, {"ffn_dim_multiplier": 1.7, "learn_sigma": False}])
def test_large_sit_pipeline_there_and_back(tmp_path, sizes):
    config = make_config("LargeSiT", **sizes)
    model = make_model(config)
    pipe = SiTPipeline.from_weights(config, state_of(model), make_vae(), LABELS)
    pipe.save_pretrained(tmp_path / "out")
    assert tree_of(tmp_path / "out") == sorted(TREE)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == ["models", "LargeSiT"]
    again = SiTPipeline.from_pretrained(tmp_path / "out")
    assert again.dtype == paddle.float32
    assert state_of(again.transformer).keys() == state_of(model).keys()
    x, _, y = inputs(model)
    t = paddle.to_tensor([0.0, 0.3, 0.9, 1.0])
    np.testing.assert_array_equal(again.transformer(x, t, y), model(x, t, y))


def test_large_sit_latents_are_the_samplers(tmp_path):
    config = make_config("LargeSiT", **ODD)
    model = make_model(config)
    pipe = SiTPipeline.from_weights(config, state_of(model), make_vae(), LABELS)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "sampler": "ode", "method": "heun2", "output_type": "latent"}
    latents = pipe([1, 2], generator=paddle.Generator().manual_seed(3), **options).images
    with paddle.no_grad():
        noise = paddle.seed(3) and paddle.randn([2, 4, 8, 8])
        sample = Sampler(create_transport()).sample_ode(sampling_method="heun2", num_steps=5)
        labels = {"y": paddle.to_tensor([1, 2, 10, 10]), "cfg_scale": 4.0}
        expected = sample(paddle.concat([noise, noise]), model.forward_with_cfg, **labels)[-1][:2]
    assert relative_error(latents, expected) < 1e-5


def test_large_sit_from_checkpoint_to_image(models, tmp_path):
    write_checkpoint(tmp_path / "checkpoint", make_config("LargeSiT", **ODD))
    export(models["vae"], tmp_path / "checkpoint", tmp_path / "pipeline", tool=convert_sit_to_ppdiffusers)
    flags = ["--classes", 3, 7, "--num_inference_steps", 4, "--sampler", "ode"]
    first = draw(tmp_path / "a.png", "--model_path", tmp_path / "pipeline", *flags, demo=infer_demo_sit)
    checkpoint = ["--model_path", tmp_path / "checkpoint", "--vae", models["vae"]]
    assert np.array_equal(first, draw(tmp_path / "b.png", *checkpoint, *flags, demo=infer_demo_sit))
    assert first.shape == (8, 16, 3) and first.std() > 10
    with pytest.raises(ValueError, match="is a LargeSiT; use infer_demo_sit.py"):
        draw(tmp_path / "c.png", *checkpoint)
    with pytest.raises(ValueError, match="is a LargeDiT; use infer_demo_dit.py"):
        draw(tmp_path / "c.png", "--model_path", models["checkpoint"], demo=infer_demo_sit)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png", "checkpoint", "pipeline"]
