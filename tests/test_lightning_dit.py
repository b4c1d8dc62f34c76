"""LightningDiT: parity with the official network, its initialisation, its weights there, back and without a config."""

import json
import tracemalloc

import numpy as np
import paddle
import pytest
from support.golden import (
    GOLDEN,
    NETWORKS,
    OFFICIAL,
    golden_inputs,
    judged,
    load_golden,
    official_network,
    relative_error,
    replay,
    tensors,
)
from support.initialisation import check_initialisation
from support.runs import ROOT, loop_arguments, read_losses, resume_flag, write_features

from config.schema import load_config, resolve_config
from models import LightningDiT, build_model
from models.embeddings import rotary_table_2d
from models.state import expected_shapes, official_to_paddle
from sampling.model_path import describe_model
from tools import convert_official_weights
from training.averages import EMA
from training.checkpoints.experiment import open_checkpoint
from training.checkpoints.read import load_pretrained
from training.checkpoints.state import restore_model
from transport import create_transport
from verification import official
from weights.files import load_weights, safe_load, save_pdparams, save_torch
from weights.recognised import lightning_dit_config
from weights.rope_tables import NAMES, rope_tables
from weights.source import read_weights

KINDS = [kind for kind in NETWORKS if kind.startswith("LightningDiT")]
FULL, TOLERANCE = OFFICIAL["LightningDiT"][2:]
TRAINED = {
    "type": "LightningDiT", "sample_size": 4, "patch_size": 1, "in_channels": 4, "num_layers": 1,
    "num_attention_heads": 2, "attention_head_dim": 16, "num_classes": 10,
}  # fmt: skip
TRAIN_FILE = GOLDEN / "lightningdit_train_ckpt.pt"


# -- The official network ---------------------------------------------------------------------------------------------


@pytest.mark.paddle26
@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_is_the_official_one(kind, monkeypatch):
    judged(official.training_mode(kind))
    arrays, model = load_golden(NETWORKS[kind][1]), official_network(kind)
    replay(monkeypatch, "rand", [arrays["drop_rand"]])
    model.train()
    assert relative_error(model(*golden_inputs(arrays)), arrays["out_train"]) < NETWORKS[kind][3]


@pytest.mark.paddle26
@pytest.mark.parametrize("single_backward", [True, False])
def test_loss_and_gradients_are_the_official_ones(single_backward):
    judged(official.lightning_gradients(single_backward=single_backward))


def test_noise_is_drawn_before_times(monkeypatch):
    arrays = load_golden("lightningdit_losses")
    rest = replay(monkeypatch, "randn", [arrays["x0"], arrays["normals"]])
    x1, y = tensors(arrays, "x1", "y")
    transport = create_transport(timestep_sampling="logit-normal", cosine_loss=True)
    losses = transport.training_losses(official_network("LightningDiT"), x1, {"y": y})
    np.testing.assert_allclose(losses["loss"], arrays["loss"], rtol=2e-5)
    np.testing.assert_allclose(losses["cos_loss"], arrays["cos_loss"], rtol=2e-5)
    assert not list(rest)


@pytest.mark.paddle26
def test_initialisation_tensor_by_tensor():
    paddle.seed(0)
    model = LightningDiT(16, 4, 3, num_layers=2, num_attention_heads=4, attention_head_dim=32, num_classes=500)
    width, inner, patch = 128, 341, 3 * 4 * 4
    xavier = {
        "x_embedder.proj.weight": (patch, width),
        "attn.qkv.weight": (width, 3 * width),
        "attn.proj.weight": (width, width),
        "mlp.w12.weight": (width, 2 * inner),
        "mlp.w3.weight": (inner, width),
    }
    check_initialisation(model, xavier)
    x = paddle.randn([2, 3, 16, 16])
    assert not model(x, paddle.to_tensor([0.1, 0.2]), paddle.to_tensor([0, 500])).any()


@pytest.mark.paddle26
@pytest.mark.parametrize("rms_norm", [True, False])
def test_order_of_parameters(rms_norm):
    """That of the official optimizer's state."""
    model = build_model({**FULL, "num_layers": 1, "rms_norm": rms_norm})
    names = [name.removeprefix("blocks.0.") for name, _ in model.named_parameters()]
    norms = ["attn.q_norm.weight", "attn.k_norm.weight"]
    if not rms_norm:
        norms = [f"attn.{which}_norm.{part}" for which in "qk" for part in ("weight", "bias")]
    assert names[8:-4] == [
        *(["norm1.weight", "norm2.weight"] if rms_norm else []),
        *("attn.qkv.weight", "attn.qkv.bias", *norms, "attn.proj.weight", "attn.proj.bias"),
        *("mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias"),
        *("adaLN_modulation.1.weight", "adaLN_modulation.1.bias"),
        *(["final_layer.norm_final.weight"] if rms_norm else []),
    ]


# -- Weights there and back -------------------------------------------------------------------------------------------


def convert(*arguments, **files):
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    convert_official_weights.main([*arguments, *flags])


@pytest.fixture
def config_of(tmp_path):
    """A function that writes the config of a network, and returns its path."""

    def write(model, **changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model": {**model, **changes}}))
        return path

    return write


@pytest.mark.paddle26
@pytest.mark.parametrize("ending", ["pdparams", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_official_weights_there_and_back(kind, ending, tmp_path, config_of):
    """Every bit, of the tables of rotary positions too, in the same order; in Paddle's file they are no parameters."""
    source, config = GOLDEN / NETWORKS[kind][0], config_of(NETWORKS[kind][2])
    there, back = tmp_path / f"there.{ending}", tmp_path / "back.pt"
    convert(config_file=config, weights=source, output=there)
    convert("--reverse", config_file=config, weights=there, output=back)
    original, returned = load_weights(source), load_weights(back)
    assert list(original) == list(returned)
    for name, value in original.items():
        assert value.dtype == returned[name].dtype and value.tobytes() == returned[name].tobytes(), name
    if ending == "pdparams":
        assert build_model(NETWORKS[kind][2]).set_state_dict(paddle.load(str(there))) == ([], [])


def test_tables_are_written_where_none_were_read(tmp_path, config_of):
    """The official code loads strictly. Its tables come from PyTorch, whose sines differ by a bit."""
    source = load_weights(GOLDEN / "lightningdit_full.pt")
    tables = {name: source.pop(name) for name in NAMES}
    save_torch(source, tmp_path / "without.pt")
    config = config_of(FULL)
    convert(config_file=config, weights=tmp_path / "without.pt", output=tmp_path / "there.pdparams")
    convert("--reverse", config_file=config, weights=tmp_path / "there.pdparams", output=tmp_path / "back.pt")
    back = load_weights(tmp_path / "back.pt")
    assert list(back)[8:10] == list(NAMES) and list(back)[10].startswith("blocks.0.")
    for name, table in tables.items():
        assert back[name].shape == table.shape and back[name].dtype == np.float32
        np.testing.assert_allclose(back[name], table, atol=1.2e-7)


@pytest.mark.parametrize(("head_dim", "grid_size"), [(72, 16), (64, 32), (12, 5)])
def test_tables_are_those_of_the_network(head_dim, grid_size):
    for written, computed in zip(
        rope_tables(head_dim, grid_size).values(), rotary_table_2d(head_dim, grid_size), strict=True
    ):
        np.testing.assert_allclose(written, np.repeat(computed, 2, axis=1), atol=5e-6)


@pytest.mark.parametrize("key", ["model", "ema", None])
def test_training_checkpoint(key, tmp_path, config_of):
    """Names of the weights begin with `module.`, of the averages not."""
    arrays = load_golden("lightningdit_train_ckpt_forward")
    flags = ["--key", key] if key else []
    convert(*flags, config_file=config_of(TRAINED), weights=TRAIN_FILE, output=tmp_path / "w.pdparams")
    model = build_model(TRAINED)
    model.set_state_dict(paddle.load(str(tmp_path / "w.pdparams")))
    model.eval()
    assert relative_error(model(*golden_inputs(arrays)), arrays[f"out_{key or 'ema'}"]) < 2e-5


def test_a_run_begins_with_an_official_file_or_resumes_it():
    config = resolve_config({"model": TRAINED})
    model, expected = build_model(config), official_to_paddle(load_weights(TRAIN_FILE, "ema"))
    load_pretrained(str(TRAIN_FILE), model, config=config)
    for name, value in model.named_parameters():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)

    checkpoint, moments = open_checkpoint(TRAIN_FILE, config), safe_load(TRAIN_FILE)["opt"]["state"]
    ema = EMA(model)
    restore_model(checkpoint, model, [ema])
    expected = official_to_paddle(load_weights(TRAIN_FILE, "model"))
    for index, (name, value) in enumerate(model.named_parameters()):
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
        if name != "pos_embed":  # numbered without the tables
            moment = official_to_paddle({name: moments[index]["exp_avg"]})[name]
            np.testing.assert_array_equal(checkpoint.optimizer[name]["moment1"], moment, err_msg=name)


def test_a_loop_resumes_an_official_file(tmp_path, run_loop, config_of):
    features = write_features(tmp_path / "features", count=16, shape=(4, 4, 4))
    run = {"config": str(config_of(TRAINED)), "features": features, "output": tmp_path / "out"}
    step = open_checkpoint(TRAIN_FILE, resolve_config({"model": TRAINED})).progress["global_step"]
    loop = "notrainer"
    run_loop(loop, [*loop_arguments(loop, **run, steps=step + 1), resume_flag(loop, TRAIN_FILE)])
    assert list(read_losses(tmp_path / "out")) == [step + 1]


def test_conversion_takes_little_more_memory_than_the_weights(tmp_path, config_of):
    """Of XL/1, 2.7 GB, it was 1.14 times their size forth, 1.15 back, Paddle included, and of a checkpoint the same."""
    model = {**FULL, "num_layers": 8, "attention_head_dim": 48}
    config, forth, back = config_of(model), tmp_path / "forth.pdparams", tmp_path / "back.pt"
    save_pdparams({name: np.ones(shape, "float32") for name, shape in expected_shapes(model).items()}, forth)
    size = forth.stat().st_size
    for flags in ({"weights": forth, "output": back}, {"weights": back, "output": tmp_path / "again.pdparams"}):
        tracemalloc.start()
        convert(*["--reverse"][: flags["output"] == back], config_file=config, **flags)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.2 * size, flags


# -- Weights that do not fit, or whose config is not given ------------------------------------------------------------


def stretched(table, factor):
    """The table of a grid whose steps are `factor` long."""
    exponents = np.arange(0, 8, 2, dtype="float32") / 8
    angles = np.repeat(np.outer(np.arange(4) * factor, 10000.0**-exponents), 2, axis=1)
    rows, columns = np.indices([4, 4]).reshape(2, -1)
    return np.cos(np.concatenate([angles[rows], angles[columns]], axis=1)).astype("float32")


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        (None, {"rope": False}, "these weights do not fit the config: they have rope, which the config has not"),
        (None, {"num_attention_heads": 6, "attention_head_dim": 8}, r"\[16, 16\], expected \[16, 8\] by the config's"),
        (lambda table: stretched(table, 0.5), {}, "are not those of a network here, of theta 10000 and whole steps on"),
        (lambda table: table[:9], {}, r"feat_rope.freqs_cos is \[9, 16\], expected \[16, 16\]"),
        (lambda table: table * np.nan, {}, "feat_rope.freqs_cos, are not those of a network here"),
    ],
)
def test_other_rotary_positions_are_refused(table, change, message, tmp_path):
    state = load_weights(GOLDEN / "lightningdit_full.pt")
    if table is not None:
        state[NAMES[0]] = table(state[NAMES[0]])
    save_torch(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"w\.pt: .*{message}"):
        read_weights(tmp_path / "w.pt", model={**FULL, "rope": True, **change})
    if table is not None and "expected" not in message:
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / "w.pt")
    model = build_model({**FULL, **change})
    with pytest.raises(ValueError, match=message):
        load_pretrained(str(tmp_path / "w.pt"), model)


def test_tables_in_half_precision_are_accepted(tmp_path):
    state = load_weights(GOLDEN / "lightningdit_full.pt")
    save_torch({name: value.astype("float16") for name, value in state.items()}, tmp_path / "half.pt")
    read_weights(tmp_path / "half.pt", model={**FULL, "rope": True})


def test_a_misfit_names_the_switches():
    source = str(GOLDEN / "lightningdit_full.pt")
    other = {**FULL, "swiglu": False, "rms_norm": False, "adaln_shift": False}
    with pytest.raises(ValueError, match="config: they have swiglu, rms_norm, adaln_shift, which the config has not;"):
        load_pretrained(source, build_model(other))
    with pytest.raises(ValueError, match="config: they lack qk_norm, which the config has;"):
        load_pretrained(str(GOLDEN / "lightningdit_default.pt"), build_model({**FULL, "num_attention_heads": 4}))


@pytest.mark.parametrize("key", [None, "ema"])
def test_weights_without_a_config(key, tmp_path):
    """The network is told from names and shapes, in any layout."""
    flags = ["--key", key] if key else []
    source = TRAIN_FILE if key else GOLDEN / "lightningdit_default.pt"
    convert(*flags, weights=source, output=tmp_path / "w.pdparams")
    expected = resolve_config({"model": TRAINED if key else NETWORKS["LightningDiT without qk_norm"][2]})
    model = describe_model(str(source))
    assert model.config["model"] == expected["model"] and model.pipeline == "SiTPipeline"
    assert "recognised by its shapes: type LightningDiT, sample_size 4, patch_size 1" in " ".join(model.notes)
    convert("--reverse", weights=tmp_path / "w.pdparams", output=tmp_path / "back.pt")
    assert list(load_weights(tmp_path / "back.pt")) == list(load_weights(source, key))


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/LightningDiT_*.json")), ids=lambda path: path.stem)
def test_presets_are_recognised_without_tables(path):
    model = load_config(path)["model"]
    assert resolve_config(lightning_dit_config(expected_shapes(model)))["model"] == model


@pytest.mark.parametrize(
    "change",
    [
        {"mlp_ratio": 2.5, "learn_sigma": True},
        {"class_dropout_prob": 0.0, "num_classes": 1000, "swiglu": False, "rope": False},
        {"adaln_shift": False, "rms_norm": False, "rope": False, "mlp_ratio": 3.0},
        {"sample_size": 12, "patch_size": 4, "in_channels": 3, "num_layers": 3},
    ],
)
def test_other_sizes_are_recognised(change):
    model = resolve_config({"model": {**FULL, **change}})["model"]
    assert resolve_config(lightning_dit_config(expected_shapes(model)))["model"] == model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("SiT", "they may be a DiT's, a SiT's or a LightningDiT's without its switches"),
        ("LargeDiT", "they are no LightningDiT's: x_embedder.proj.weight is missing"),
        ("LightningDiT without switches", "their shapes don't tell the heads of width 48; known are those of 768,"),
    ],
)
def test_weights_of_which_shapes_do_not_tell(kind, message, tmp_path):
    source = GOLDEN / NETWORKS[kind][0]
    with pytest.raises(ValueError, match=rf"{source.name}: which network's weights are these\? .*\({message}"):
        convert(weights=source, output=tmp_path / "w.pdparams")


@pytest.mark.parametrize("name", ["pos_embed", "blocks.0.adaLN_modulation.1.bias", "blocks.0.mlp.w12.bias"])
@pytest.mark.parametrize("shape", [None, (), (7,)])
def test_damaged_shapes_are_one_line(name, shape):
    shapes = {key: value.shape for key, value in load_weights(GOLDEN / "lightningdit_full.pt").items()}
    shapes = {**shapes, name: shape} if shape is not None else {key: v for key, v in shapes.items() if key != name}
    with pytest.raises(ValueError, match="^[^\n]+$"):
        resolve_config(lightning_dit_config(shapes))


def test_only_the_wanted_weights_of_a_file_are_read(tmp_path, monkeypatch):
    """A checkpoint is four times as large as the averages in it."""
    from weights import files

    read = []
    elements = files.elements
    monkeypatch.setattr(files, "elements", lambda data, *rest: read.append(len(data)) or elements(data, *rest))
    ema = load_weights(TRAIN_FILE, "ema")
    assert sum(read) == sum(value.nbytes for value in ema.values())
