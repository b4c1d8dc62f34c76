"""Command lines: one name for one thing, its other names, both forms of switches, and one line for a mistake."""

import importlib
from argparse import SUPPRESS

import pytest
from support.commands import commands

from config.checks import VAE
from config.flags import LOOPS, CommandParser, Parser
from config.names import OTHER_NAMES


def make_parser():
    parser = CommandParser(prog="tool")
    parser.add_argument("--image_size", type=int, default=256, help="pixels")
    parser.add_argument("--vae", check=VAE)
    group = parser.add_argument_group("output")
    group.add_argument("--output", aliases=("--checkpoint_path",), help="file to write [none]")
    group.add_argument("--flip", action="store_true", help="mirror")
    group.add_argument("--no_checksums", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ("--image-size 64", "image_size", 64),
        ("--resolution=64", "image_size", 64),
        ("--resolution 64 --image_size 64", "image_size", 64),
        ("--image_size 32 --image_size 64", "image_size", 64),  # the last wins, as a script's user expects
        ("--ima 64", "image_size", 64),
        ("--checkpoint-path x", "output", "x"),
        ("--check x", "output", "x"),
        ("--flip", "flip", True),
        ("--flip True", "flip", True),
        ("--flip=false", "flip", False),
        ("--no_flip", "flip", False),
        ("--no-flip=False", "flip", True),
        ("--no_checksums", "no_checksums", True),
        ("--no", "no_checksums", True),
        ("--checksums", "no_checksums", False),
        ("--vae None", "vae", None),  # as launch scripts do
    ],
)
def test_what_parses(words, name, expected):
    assert getattr(make_parser().parse_args(words.split()), name) == expected


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--resolution 64 --image_size 32", "--resolution and --image_size are one setting, and were given two values"),
        ("--flip --no_flip", "--flip and --no_flip are one setting, and were given two values"),
        ("--resolution x", "argument --resolution: invalid int value: 'x'"),
        ("--flip maybe", "argument --flip: expected True or False, got 'maybe'"),
        ("--checkpoint_path", "argument --checkpoint_path: expected one argument"),
        ("--imagesize 64", "unknown flag --imagesize (did you mean --image_size?)"),
        ("--chekpoint-path x", "unknown flag --chekpoint-path (did you mean --output?)"),
        ("--results_dir x", "unknown flag --results_dir (did you mean --output?)"),
        ("--no_flp", "unknown flag --no_flp (did you mean --no_flip?)"),
        ("--num-classes 10", "unknown flag --num-classes"),
        ("--nothing_like_it", "unknown flag --nothing_like_it"),
        ("word", "unexpected 'word'"),
    ],
)
def test_mistakes_are_one_line(words, line):
    with pytest.raises(ValueError) as refused:
        make_parser().parse_args(words.split())
    text = str(refused.value)
    assert text.startswith(f"command line: {line}") and text.endswith("; see --help") and "\n" not in text
    assert ("did you mean" in text) == ("did you mean" in line)


def test_official_flags_of_what_a_model_or_a_config_brings_along():
    parser = CommandParser()
    parser.add_argument("--model_path")
    for words in ("--model DiT-XL/2 --ckpt a", "--num-classes 10"):
        with pytest.raises(ValueError, match=r"unknown flag --(model|num-classes) \(the model brings it along\)"):
            parser.parse_args(words.split())
    with pytest.raises(ValueError, match=r"unknown flag --model \(the config's section model brings it along\)"):
        Parser("notrainer").parse_args(["--model", "DiT-XL/2"])


def test_a_misspelt_flag_that_is_required_is_told_so():
    parser = CommandParser()
    parser.add_argument("--feature_path", required=True)
    with pytest.raises(ValueError, match=r"unknown flag --feature_pth \(did you mean --feature_path\?\)"):
        parser.parse_args(["--feature_pth", "x"])


def test_help_shows_each_flag_once_with_its_default():
    shown = make_parser().format_help()
    assert "pixels [256]" in shown and "mirror [False]" in shown and "file to write [none]" in shown
    assert not any(name in shown for name in ("resolution", "checkpoint", "no_flip", "--checksums"))


@pytest.mark.parametrize("loop", LOOPS)
def test_both_loops_take_the_other_names_of_their_flags(loop):
    """Of PaddleMIX's Trainer, of the official train.py, and what all commands have in common."""
    given = "--image_size 64 --seed 3 --resume auto --epochs 2 --logging_steps 5 --save_steps 6 --num_workers 0".split()
    given += "--vae ema --guidance_scale 2 --output out --learning_rate 0.1 --amp_level O2 --fused_attention".split()
    other = "--resolution 64 --global-seed 3 --resume_from_checkpoint auto --num_train_epochs 2 --log-every 5".split()
    other += "--ckpt-every 6 --dataloader_num_workers 0 --vae_name_or_path stabilityai/sd-vae-ft-ema".split()
    other += ["--output_dir" if loop == "trainer" else "--results-dir", "out", "--cfg-scale", "2", "--lr", "0.1"]
    other += "--fp16_opt_level O2 --enable_xformers_memory_efficient_attention True".split()
    assert Parser(loop).parse_args(given) == Parser(loop).parse_args(other)


def test_flags_after_a_launch_scripts_own_win_by_any_name():
    words = ["--seed", "0", "--output_dir", "a", "--overriding", "--global_seed", "5", "--output", "b"]
    args = Parser("trainer").parse_args(words)
    assert (args.seed, args.output_dir) == (5, "b")
    with pytest.raises(ValueError, match="--global_seed and --seed are one setting"):
        Parser("trainer").parse_args([*words, "--seed", "6"])
    with pytest.raises(ValueError, match="command line: --global_seed must be an integer from 0"):
        Parser("trainer").parse_args(["--global_seed=-1"])


# ---- The commands ----

# Of every command: its canonical flags, and other names that it has to take, PaddleMIX's, the official codes', earlier
# ones of its own.
SAMPLING = {
    "model_path": "ckpt",
    "vae": "vae_name_or_path vae_model",
    "guidance_scale": "cfg_scale",
    "num_inference_steps": "num_sampling_steps",
    "seed": "global_seed",
    "key": "",
    "output": "",
}
CONVERSION = {"model_path": "model_weights ckpt", "output": "checkpoint_path", "vae": "vae_model", "key": ""}
COMMANDS = {
    "infer_demo_dit": SAMPLING,
    "infer_demo_sit": {**SAMPLING, "method": "sampling_method"},
    "infer_demo_lightningdit": {**SAMPLING, "method": "sampling_method", "guidance_interval": "cfg_interval_start"},
    "infer_demo_largedit_3b": SAMPLING,
    "infer_demo_largedit_7b": SAMPLING,
    "tools.check_features": {"feature_path": "features_path", "image_size": "resolution", "num_workers": "", "vae": ""},
    "tools.check_flags": {},
    "tools.convert_dit_to_ppdiffusers": {**CONVERSION, "image_size": "resolution"},
    "tools.convert_sit_to_ppdiffusers": {**CONVERSION, "image_size": "resolution"},
    "tools.convert_ldm_vae": {"model_path": "weights ckpt", "config_file": "config", "output": "", "key": ""},
    "tools.convert_official_weights": {"model_path": "weights", "output": "", "key": ""},
    "tools.evaluate": {"image_size": "resolution", "batch_size": "", "vae": "vae_model", "seed": "", "output": ""},
    "tools.evaluate_digits": {"model_path": "pipeline", "output": "report", "guidance_scale": "cfg_scale"},
    "tools.export_inference": {"model_path": "ckpt", "output": "", "vae": "vae_model", "key": ""},
    "tools.extract_features": {
        "feature_path": "features_path output",
        "data_path": "data",
        "image_size": "resolution",
        "vae": "vae_name_or_path",
        "num_workers": "dataloader_num_workers",
    },
    "tools.extract_weights": {"model_path": "model_file", "output": "checkpoint_path", "key": ""},
    "tools.make_config": {"feature_path": "features_path", "image_size": "resolution", "max_steps": "", "output": ""},
    "tools.options_table": {},
    "tools.pack_features": {"feature_path": "features_path", "image_size": "resolution", "output": ""},
    "tools.plan_memory": {"config_file": "", "per_device_train_batch_size": ""},
    "tools.prepare_digits": {"image_size": "resolution", "output": ""},
    "tools.prepare_photos": {"image_size": "resolution", "output": "", "seed": "global_seed"},
    "tools.prepare_symbols": {"image_size": "resolution", "output": "", "seed": "global_seed"},
    "tools.reconstruct_ema": {
        **{"output": "", "vae": "vae_model", "seed": "global_seed", "batch_size": ""},
        **{"num_inference_steps": "num_sampling_steps", "guidance_scale": "cfg_scale"},
    },
    "tools.replay_step": {},
    "tools.report": {"model_path": "ckpt", "feature_path": "features_path", "output": ""},
    "tools.sample_grid": {"model_path": "ckpt", "vae": "vae_name_or_path", "key": "", "output": "", "seed": ""},
    "tools.sample_npz": {
        **SAMPLING,
        "num_images": "num_fid_samples",
        "batch_size": "per_proc_batch_size",
        "png": "sample_dir",
    },
    "tools.self_check": {"device": ""},
    "tools.train_digits_classifier": {"data_path": "data", "output": "", "seed": "global_seed"},
    "tools.train_vae": {
        **{"data_path": "data", "output": "", "image_size": "resolution", "max_steps": "steps"},
        **{"learning_rate": "lr", "batch_size": "", "seed": "global_seed"},
    },
    "web_demo": {"model_path": "ckpt", "vae": "vae_model"},
    "train_image_generation_trainer": {"output": "output_dir", "resume": "resume_from_checkpoint", "vae": ""},
    "train_image_generation_notrainer": {"output": "results_dir", "resume": "", "num_workers": "", "vae": ""},
}


class Parsing(Exception):
    """Carries the parser of a command that begins to parse."""


@pytest.fixture
def parser_of(monkeypatch):
    def caught(parser, *_):
        raise Parsing(parser)

    def find(command):
        with monkeypatch.context() as patch, pytest.raises(Parsing) as parsing:
            patch.setattr(CommandParser, "parse_args", caught)
            patch.setattr("sys.argv", [command])
            importlib.import_module(command).main()
        parser = parsing.value.args[0]
        parser.register_aliases()
        return parser

    return find


def test_the_table_has_every_command():
    ours = {path for path in commands() if path.endswith(".py") and not path.startswith("benchmarks/")}
    assert ours == {f"{name.replace('.', '/')}.py" for name in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_commands_are_canonical_and_take_their_other_names(command, parser_of):
    parser = parser_of(command)
    known, shown = parser._option_string_actions, parser.format_help()
    for name, others in COMMANDS[command].items():
        assert f"--{name} " in shown
        for other in others.split():
            assert known[f"--{other}"] is known[f"--{name}"]
    hidden = {name for name, action in known.items() if name not in action.option_strings}
    assert not {f"--{name}" for names in OTHER_NAMES.values() for name in names} & known.keys() - hidden
    assert "default" not in " ".join(action.help.replace("%(default)s", "") for action in parser._actions)
    for action in parser._actions:  # both forms, and none of argparse's own switches
        assert action.nargs != 0 or action.help in (SUPPRESS, "show this help message and exit")
        if (action.metavar, action.nargs) == ("True|False", "?"):
            assert known[f"--no_{action.option_strings[0][2:]}".replace("--no_no_", "--")] is action
