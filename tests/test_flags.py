"""Command lines: one name for one thing, its other names, both forms of switches, and one line for a mistake."""

import pytest

from config.flags import LOOPS, CommandParser, Parser


def make_parser():
    parser = CommandParser(prog="tool")
    parser.add_argument("--image_size", type=int, default=256, help="pixels")
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
