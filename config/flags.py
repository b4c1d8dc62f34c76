"""Command lines of both training loops, made from the tables of `config.options`. Standard library only.

Parsed flags have the names of their options, which are the same in both loops. That of a config's key is None if it is
not given: then the config's JSON decides, then the default of the key.
"""

import argparse
import difflib
import math
import re
import sys

from config import options
from config.options import PerLoop, in_loop
from config.schema import check_together, load_config

LOOPS = PerLoop._fields


class Parser(argparse.ArgumentParser):
    """Parses and checks a loop's command line, "trainer" or "notrainer"; an error is one line, without the usage."""

    def __init__(self, loop):
        how = in_loop(PerLoop("the PaddleNLP Trainer", "a hand-written loop"), loop)
        devices = in_loop(PerLoop("--nproc_per_node 8", "--gpus 0,1,2,3"), loop)
        super().__init__(
            description=f"Trains a class-conditional diffusion transformer on latent features with {how}. What is not "
            "given here the config decides, for its own keys, then the default in [].",
            epilog=f"On several GPUs: python -m paddle.distributed.launch {devices} train_image_generation_{loop}.py "
            "... Environment: OMP_NUM_THREADS, FLAGS_use_stride_kernel, malloc's thresholds and, on processors that "
            "are not Intel's, MKL_DEBUG_CPU_TYPE are set for Paddle unless you have set them; see docs/performance.md.",
            allow_abbrev=False,
        )
        self.options = {}  # (name, option) by flag
        self.twins = {}  # the other loop's name of a setting: this loop's
        (other,) = {*LOOPS} - {loop}
        for title, table in options.FLAG_GROUPS.items():
            group = self.add_argument_group(title)
            for name, option in table.items():
                flag, theirs = option.flag_in(loop, name), option.flag_in(other, name)
                if flag != theirs:
                    twin = getattr(option, "twin", None)
                    self.twins[theirs or twin] = flag or twin
                if not flag:
                    continue
                self.options[flag] = name, option
                check, default, help = option.check, in_loop(option.default, loop), in_loop(option.help, loop)
                shown = in_loop(option.unset, loop) if default is None else default
                words = {"type": check.parse, "metavar": check.metavar, "choices": check.choices, "nargs": check.nargs}
                words |= {"const": True} if check is options.BOOL else {}
                words |= {"default": default} if isinstance(option, options.Flag) else {}
                names = [f"--{each}" for each in (flag, *option.aliases)]
                group.add_argument(*names, dest=name, help=help if shown == "" else f"{help} [{shown}]", **words)

    def error(self, message):
        raise ValueError(f"command line: {message}; see --help")

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        # The official SiT spells --path-type.
        words = [re.sub(r"^--[\w-]+", lambda found: f"--{found[0][2:].replace('-', '_')}", word) for word in words]
        args, unknown = self.parse_known_args(words, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), None)
            self.error(f"unexpected {unknown[0]!r}" if flag is None else self._unknown(flag.split("=")[0]))
        for flag, (name, option) in self.options.items():
            if getattr(args, name) != "None":
                check_flag(flag, option, getattr(args, name))
        return args

    def _unknown(self, flag):
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.7)
        meant = [f"--{twin}"] if (twin := self.twins.get(flag.lstrip("-"))) else near
        return f"unknown flag {flag}" + (f" (did you mean {meant[0]}?)" if meant else "")


def read_flags(loop, words=None):
    """Returns `(args, config)` of a loop's command line (None: this process's); ValueError for what is wrong in it."""
    args = Parser(loop).parse_args(words)
    return args, resolve_training(args)


def resolve_training(args):
    """Returns the config of a run, of parsed flags of either loop: command line over JSON over defaults."""
    if args.bf16 and args.fp16:
        raise ValueError("command line: at most one of --bf16 and --fp16 can be True")
    config = load_config(args.config_file)
    transport = options.OBJECTIVE_KEYS["transport"]
    sections = {"training": options.TRAINING_KEYS, "objective": transport, "data": options.DATA_KEYS}
    for section, keys in sections.items():
        given = {name: value for name in keys if (value := getattr(args, name, None)) is not None}
        for name in given:
            if name not in config[section]:
                kind = config["objective"]["type"]
                raise ValueError(f"command line: --{name} is no setting of the config's objective {kind!r}")
        config[section].update({name: None if value == "None" else value for name, value in given.items()})
    training = config["training"]
    if args.bf16 is not None or args.fp16 is not None:
        training["amp_dtype"] = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    check_together(config, "command line")
    if training["seed"] > options.MAX_SEED:
        where = f"{args.config_file}: training" if getattr(args, "seed", None) is None else "command line"
        raise ValueError(f"{where}: seed must be an integer from 0 to {options.MAX_SEED}, got {training['seed']}")
    return config


def check_seed(name, value):
    """Raises `ValueError` for a seed, the flag `--name`'s, that is not in the range that every command takes."""
    if not 0 <= value <= options.MAX_SEED:
        raise ValueError(f"--{name} {value}: expected an integer from 0 to {options.MAX_SEED}")


def check_positive(args, *names):
    """Raises `ValueError` for a flag among `names` that is given and not a positive number."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"command line: --{name} must be above 0, got {value}")


def check_flag(name, option, value):
    """Raises `ValueError` for a value of the flag `--name` that its option does not accept; None was not given."""
    if value is not None and not option.check.accepts(value):
        raise ValueError(f"command line: --{name} must be {option.check.expected}, got {value!r}")
