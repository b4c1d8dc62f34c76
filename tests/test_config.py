"""Configs: the shipped ones, defaults, flat files, and one line for each mistake."""

import json
from pathlib import Path

import pytest
from support.runs import ROOT

from config.flags import LOOPS, Parser, resolve_training
from config.options import REGULARIZER_KEYS
from config.schema import ineffective_settings, load_config, resolve_config
from objectives.regularizers import REGULARIZERS
from tools.options_table import pages

SMALL = {"sample_size": 8, "patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
# Sizes of the paper (Table 1): layers, width, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@pytest.mark.parametrize("kind", ["DiT", "SiT"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_shipped_configs_have_the_papers_sizes(kind, size, patch):
    config = load_config(ROOT / "config" / f"{kind}_{size}_patch{patch}.json")
    model = config["model"]
    assert (model["type"], config["objective"]["type"]) == (kind, {"DiT": "diffusion", "SiT": "transport"}[kind])
    assert model["class_dropout_prob"] == 0.1  # a null class, without which there is no guidance
    width = model["num_attention_heads"] * model["attention_head_dim"]
    assert (model["num_layers"], width, model["num_attention_heads"]) == SIZES[size]
    assert (model["patch_size"], model["sample_size"], model["num_classes"]) == (patch, 32, 1000)


def test_every_shipped_config_is_valid():
    paths = sorted((ROOT / "config").glob("*.json"))
    assert {"DiT_XL_patch2.json", "DiT_XL_patch2_512.json", "DiT_digits.json"} <= {path.name for path in paths}
    for path in paths:
        load_config(path)
    assert load_config(ROOT / "config/DiT_XL_patch2_512.json")["model"]["sample_size"] == 64


def test_flat_file_is_the_model_section(tmp_path):
    path = tmp_path / "DiT_tiny.json"
    path.write_text(json.dumps(SMALL))
    config = load_config(path)
    assert config["model"]["type"] == "DiT"
    assert config["model"]["class_dropout_prob"] == 0.1
    assert config["training"]["ema_decay"] == 0.9999
    assert config["objective"]["type"] == "diffusion"
    assert config["evaluation"]["steps"] is None
    assert resolve_config(config) == config


def test_names_of_the_official_code_and_of_paddlemix(tmp_path):
    official = {"input_size": 32, "patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16}
    path = tmp_path / "SiT_XL_patch2.json"
    path.write_text(json.dumps(official))
    config = load_config(path)
    shipped = load_config(ROOT / "config/SiT_XL_patch2.json")
    assert config["model"] == shipped["model"]
    assert config["model"]["type"] == "SiT" and config["objective"]["type"] == "transport"
    lightning = {"in_chans": 32, "use_rope": False, "use_qknorm": True, "use_rmsnorm": False, "use_swiglu": False}
    model = resolve_config({"model": {**official, "type": "LightningDiT", **lightning}})["model"]
    assert [model[key] for key in ("in_channels", "rope", "qk_norm", "rms_norm", "swiglu")] == [*lightning.values()]
    for change, message in (
        ({"hidden_size": 1150}, "hidden_size must be a multiple of num_attention_heads 16, got 1150"),
        ({"num_layers": 28}, "depth and num_layers are the same"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_config({"model": {**official, **change}})


def test_switches_of_the_official_lightning_dit():
    sizes = {"type": "LightningDiT", "input_size": 8, "patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 4}

    def switches(**given):
        model = resolve_config({"model": {**sizes, **given}})["model"]
        return [model[name] for name in ("qk_norm", "swiglu", "rope", "rms_norm", "adaln_shift")]

    assert switches() == [False, True, True, True, True]
    assert switches(rope=False) == [False, True, False, True, True]
    # Those that official arguments leave out are off, as in the official code.
    assert switches(wo_shift=True) == [False, False, False, False, False]
    assert switches(use_qknorm=True, wo_shift=False) == [True, False, False, False, True]
    assert switches(use_swiglu=True, use_rope=True, use_rmsnorm=True) == [False, True, True, True, True]
    for wrong in ({"wo_shift": True, "adaln_shift": True}, {"wo_shift": 1}):
        with pytest.raises(ValueError, match="wo_shift must be true or false, the opposite of adaln_shift"):
            switches(**wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {"sample_size": 8,}}', r"DiT_x.json: broken JSON at line 1, column \d+"),
        ('{"modle": {}}', "DiT_x.json: model: unknown key 'modle'"),
        ('{"model": {}, "trainig": {}}', "DiT_x.json: unknown section 'trainig'; known: model, objective, training"),
        ('{"model": {"sample_siz": 8}}', "DiT_x.json: model: unknown key 'sample_siz'; known: .*sample_size"),
        ({"model": {**SMALL, "num_layers": "12"}}, 'model: num_layers must be a positive integer, got "12"'),
        ({"model": {**SMALL, "learn_sigma": 1}}, "model: learn_sigma must be true or false, got 1"),
        ({"model": {**SMALL, "patch_size": 3}}, "patch_size must divide sample_size 8, got 3"),
        ({"model": {**SMALL, "attention_head_dim": 7}}, "must be a multiple of 4, got 14"),
        ({"model": {**SMALL, "class_dropout_prob": 1.5}}, "class_dropout_prob must be a number from 0 to below 1"),
        ({"model": {"sample_size": 8}}, "model: patch_size is missing; expected a positive integer"),
        ({"model": {**SMALL, "type": "DitX"}}, 'model type must be one of DiT.*, got "DitX"'),
        ({"model": SMALL, "objective": {"noise_schedule": "cosine"}}, "one of linear, squaredcos_cap_v2"),
        (
            {"model": SMALL, "training": {"ema_decay": 2}},
            "training: ema_decay must be a number from 0 to below 1, got 2",
        ),
        ({"model": SMALL, "training": {"amp_dtype": "fp16"}}, "one of float32, float16, bfloat16"),
        (
            {"model": {**SMALL, "num_classes": 3}, "data": {"classes": [0, 3]}},
            "data: classes: label 3 is outside the config's num_classes: 0..2",
        ),
        ("[1, 2]", "expected an object \\{...\\}, got"),
        ({"model": SMALL, "objective": {"regularizers": {}}}, "objective: regularizers must be a list of objects"),
        (
            {"model": SMALL, "objective": {"regularizers": [{"type": "no_such", "weight": 1}]}},
            r'objective: regularizers\[0\]: regularizer type must be one of layer_sync, .*, got "no_such"',
        ),
        ({"model": SMALL, "objective": {"regularizers": [3]}}, r"regularizers\[0\]: expected an object .*, got 3"),
        (
            {"model": SMALL, "objective": {"type": "transport"}},
            "a DiT with learn_sigma can't be trained by the objective 'transport'; use the model type SiT",
        ),
        (
            {"model": {"type": "SiT", **SMALL}, "objective": {"type": "diffusion"}},
            "a SiT with learn_sigma can't be trained by the objective 'diffusion'; use the model type DiT",
        ),
        (
            {"model": {"type": "SiT", **SMALL}, "objective": {"type": "transport", "train_eps": 0.7}},
            "objective: train_eps must be a number from 0 to below 0.5, or null, got 0.7",
        ),
        (
            {"model": {"type": "SiT", **SMALL}, "objective": {"prediction": "noise", "cosine_loss": True}},
            "objective: cosine_loss is for the prediction velocity or x1, got 'noise'",
        ),
        (
            {"model": SMALL, "objective": {"min_snr_gamma": 5, "use_kl": True}},
            "objective: min_snr_gamma weights the squared error, which use_kl replaces; give one of them",
        ),
        ({"model": SMALL, "objective": {"min_snr_gamma": 0}}, "min_snr_gamma must be a number above 0, or null, got 0"),
        (
            {"model": {"type": "SiT", **SMALL}, "objective": {"prediction": "x1", "t_eps": 0}},
            "objective: t_eps must be a number above 0 and below 1, got 0",
        ),
        ({"model": SMALL, "evaluation": {"steps": 0}}, "evaluation: steps must be a positive integer, or null, got 0"),
        ({"model": SMALL, "evaluation": {"steps": 9}}, "evaluation: steps needs a reference, the path of an npz or"),
        (
            {"model": SMALL, "evaluation": {"metrics": ["fid", "FID"]}},
            r'evaluation: metrics must be a list, without repeats, of fid, sfid, .*, mind, got \["fid", "FID"\]',
        ),
        ({"model": SMALL, "evaluation": {"metrics": ["kid", "kid"]}}, "metrics must be a list, without repeats"),
        ({"model": SMALL, "evaluation": {"num_samples": 3}}, "num_samples must be an integer of 4 or more, got 3"),
        (
            {
                "model": {**SMALL, "class_dropout_prob": 0},
                "evaluation": {"steps": 9, "reference": "a.npz", "guidance_scale": 1.5},
            },
            "evaluation: guidance_scale must be 1, got 1.5: guidance needs a null class, a class_dropout_prob above 0",
        ),
    ],
)
def test_mistakes_name_file_key_and_what_was_expected(tmp_path, text, message):
    path = tmp_path / "DiT_x.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path / "none.json")
    with pytest.raises(ValueError, match="official.yaml: a config is JSON"):
        load_config(tmp_path / "official.yaml")


@pytest.mark.parametrize("loop", LOOPS)
def test_command_line_over_json_over_default(tmp_path, loop):
    path = tmp_path / "DiT_x.json"
    path.write_text(
        json.dumps({"model": SMALL, "training": {"ema_decay": 0.5, "recompute": True, "amp_dtype": "bfloat16"}})
    )
    args = Parser(loop).parse_args(["--config_file", str(path), "--recompute", "False", "--learning_rate", "1e-3"])
    training = resolve_training(args)["training"]
    assert training["recompute"] is False and training["learning_rate"] == 1e-3  # command line
    assert training["ema_decay"] == 0.5 and training["amp_dtype"] == "bfloat16"  # JSON
    assert training["weight_decay"] == 0.0 and training["use_ema"] is True  # defaults
    args = Parser(loop).parse_args(["--config_file", str(path), "--bf16", "False"])
    assert resolve_training(args)["training"]["amp_dtype"] == "float32"
    args = Parser(loop).parse_args(["--config_file", str(path), "--fp16", "--fp16_opt_level", "O2"])
    assert resolve_training(args)["training"]["amp_dtype"] == "float16"
    args = Parser(loop).parse_args(["--config_file", str(path), "--fp16", "--bf16", "True"])
    with pytest.raises(ValueError, match="at most one of --bf16 and --fp16"):
        resolve_training(args)
    args = Parser(loop).parse_args(["--config_file", str(path), "--path_type", "GVP"])
    with pytest.raises(
        ValueError, match="command line: --path_type is no setting of the config's objective 'diffusion'"
    ):
        resolve_training(args)
    args = Parser(loop).parse_args(["--config_file", str(path), "--classes", "0,1000"])
    with pytest.raises(ValueError, match="command line: data: classes: label 1000 is outside .*num_classes: 0..999"):
        resolve_training(args)
    with pytest.raises(ValueError, match="command line: --learning_rate must be a number above 0, got -1.0"):
        Parser(loop).parse_args(["--config_file", str(path), "--learning_rate", "-1"])


@pytest.mark.parametrize("loop", LOOPS)
def test_transport_flags_over_json(tmp_path, loop):
    path = tmp_path / "SiT_x.json"
    objective = {"type": "transport", "prediction": "noise", "loss_weight": "velocity"}
    path.write_text(json.dumps({"model": {"type": "SiT", **SMALL}, "objective": objective}))
    flags = ["--config_file", str(path), "--path-type", "VP", "--loss_weight", "None", "--train_eps", "0.01"]
    resolved = resolve_training(Parser(loop).parse_args(flags))["objective"]
    assert (resolved["path_type"], resolved["prediction"], resolved["loss_weight"]) == ("VP", "noise", None)
    assert (resolved["train_eps"], resolved["sample_eps"]) == (0.01, None)
    with pytest.raises(
        ValueError, match="command line: argument --path_type: invalid choice: 'linear' .*Linear.*GVP.*VP"
    ):
        Parser(loop).parse_args(["--config_file", str(path), "--path_type", "linear"])


def test_regularizers_by_their_type():
    def resolve(*entries):
        config = resolve_config({"model": {**SMALL, "num_layers": 4}, "objective": {"regularizers": list(entries)}})
        return config["objective"]["regularizers"]

    (dispersive,) = resolve({"type": "dispersive", "group": 4})
    assert dispersive == {"type": "dispersive", "weight": 0.25, "block": -1, "temperature": 1.0, "group": 4}
    layer_sync = {"type": "layer_sync", "block": 2, "target_block": 4}
    assert resolve(layer_sync, {"type": "contrastive"})[0]["weight"] == 0.2
    for entries, message in (
        ([{"type": "layer_sync", "block": 2}], r"\[0\]: target_block is missing; expected the number of a block, .*"),
        ([{**layer_sync, "block": 0}], r"\[0\]: block must be the number of a block, from 1 on, .*, got 0"),
        ([{**layer_sync, "block": -5}], r"\[0\]: block must be 1 to 4, or -1 to -4 from the end, got -5"),
        ([{**layer_sync, "target_block": -3}], r"\[0\]: block and target_block are the same block, 2"),
        ([layer_sync, layer_sync], r"\[1\]: a regularizer of the type layer_sync stands there already"),
        ([{"type": "contrastive", "weight": -0.05}], r"\[0\]: weight must be a number of 0 or more, got -0\.05"),
        ([{"type": "contrastive", "gruop": 2}], r"\[0\]: unknown key 'gruop'; known: group, weight"),
    ):
        with pytest.raises(ValueError, match=rf"^config: objective: regularizers{message}$"):
            resolve(*entries)


def test_the_key_of_older_checkpoints_is_read():
    assert resolve_config({"model": SMALL, "objective": {"auxiliary": []}}) == resolve_config({"model": SMALL})


@pytest.mark.parametrize("loop", LOOPS)
def test_the_other_loops_name_of_a_flag_is_told(loop):
    twins = {"output_dir": "results_dir", "per_device_train_batch_size": "global_batch_size"}
    for names in twins.items():
        ours, theirs = names if loop == "trainer" else names[::-1]
        ours = "output" if ours.endswith("dir") else ours
        with pytest.raises(ValueError, match=rf"unknown flag --{theirs} \(did you mean --{ours}\?\)"):
            Parser(loop).parse_args([f"--{theirs}=2"])


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"use_ema": False, "ema_decay": 0.5}, "ema_decay has no effect without use_ema"),
        ({"ema_decay": 0.5}, None),
        (
            {"lr_scheduler_type": "cosine", "power": 2.0, "lr_end": 0},
            "lr_end and power have no effect on the schedule c",
        ),
        ({"lr_scheduler_type": "polynomial", "num_cycles": 2.0}, "num_cycles has no effect on the schedule polynomial"),
        ({"lr_scheduler_type": "polynomial", "power": 2.0}, None),
        ({"max_steps": 5, "epochs": 3}, "epochs has no effect beside max_steps"),
        ({"epochs": 3}, None),
        ({"validation_steps": 5}, "validation_steps has no effect without validation_samples"),
    ],
)
def test_settings_without_effect_are_said(settings, note):
    section = "data" if "validation_steps" in settings else "training"
    notes = ineffective_settings(resolve_config({"model": SMALL, section: settings}))
    assert [text[: len(note or "")] for text in notes] == ([note] if note else [])


def test_tables_in_the_docs_are_current():
    for path, text in pages().items():
        assert Path(path).read_text(encoding="utf-8") == text, "run python tools/options_table.py --write"


def test_options_know_every_regularizer():
    assert set(REGULARIZER_KEYS) == set(REGULARIZERS)
