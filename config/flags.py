"""Command lines: the parser of every command, and that of both training loops, made from `config.options`.

Standard library only. Parsed flags of a loop have the names of their options, which are the same in both loops. That of
a config's key is None if it is not given: then the config's JSON decides, then the default of the key.
"""

import argparse
import difflib
import math
import os
import re
import sys

from config import options, run_flags
from config.checks import MAX_SEED, str2bool
from config.names import MEANINGS, OF_THE_MODEL, OTHER_NAMES
from config.options import PerLoop, in_loop
from config.schema import check_together, load_config

LOOPS = PerLoop._fields


class CommandParser(argparse.ArgumentParser):
    """Parses a command line so that what is one thing has one name in every command, and an error is one line.

    - `add_argument("--output", aliases=("--checkpoint_path",))`: an alias parses, and does not show in --help. Other
      names in `config.names.OTHER_NAMES` are aliases without being named. Two names with two values are refused.
    - `action="store_true"` takes `--flip`, `--flip True`, `--flip=false` and `--no_flip`.
    - Dashes and underscores are the same; `--path-type` is `--path_type`. Unless `allow_abbrev` is False, the
      beginning of a flag stands for it.
    - `add_argument("--seed", check=FLAG_SEED)`: a `config.checks.Check` says what a value must be.
    - The default is shown at the end of the help, in [], unless the help itself ends so.
    - A mistake is a `ValueError` of one line; an unknown flag is told what it may have been.
    """

    def __init__(self, *, allow_abbrev=True, formatter_class=argparse.RawDescriptionHelpFormatter, **words):
        super().__init__(allow_abbrev=False, formatter_class=formatter_class, **words)
        self.register("action", None, _Store)
        self.register("action", "store", _Store)
        self.register("action", "store_true", _Switch)
        self.abbreviates = allow_abbrev
        self.given = {}  # {dest: {name as it was typed: value}}
        self.typed = {}  # {flag: its name as it was typed}
        self.unknown = []  # flags that are none here

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), None)
            self.error(f"unexpected {unknown[0]!r}" if flag is None else self._unknown(flag.split("=")[0]))
        return args

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else [*args]
        self.given.clear()
        self.typed.clear()
        self.unknown.clear()
        aliases = self.register_aliases()
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args(
            [self._resolved(word, aliases) for word in words[:end]] + words[end:], namespace
        )

    def error(self, message):
        if message.startswith("the following arguments are required") and self.unknown:
            message = self._unknown(self.unknown[0])  # a misspelt one, as it may be
        message = re.sub(r"^argument (--\w+)", lambda found: f"argument {self.typed.get(found[1], found[1])}", message)
        raise ValueError(f"command line: {message}; see --help")

    def record(self, action, name, value):
        """Keeps the value that a flag was given by one of its names, and refuses another one by another name."""
        given = self.given.setdefault(action.dest, {})
        for other, before in given.items():
            if other != name and before != value:
                self.error(f"{other} and {name} are one setting, and were given two values: give one")
        given[name] = value

    def register_aliases(self):
        """Lets every other name of a flag parse as the flag; returns those that may be abbreviated."""
        known, aliases = self._option_string_actions, []
        for action in self._actions:
            names, hidden = action.option_strings, [*getattr(action, "aliases", ())]
            others = (f"--{other}" for name in names for other in OTHER_NAMES.get(name.lstrip("-"), ()))
            hidden += [other for other in others if known.get(other, action) is action]
            aliases += hidden
            if isinstance(action, _Switch):
                action.opposites = {_negated(name) for name in (*names, *hidden)}
            for name in (*hidden, *getattr(action, "opposites", ())):
                assert known.setdefault(name, action) is action, f"{name} stands for two flags"
        return aliases

    def _resolved(self, word, aliases):
        """Returns a word with the full name of its flag, as the parser knows it; any other word as it is."""
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            return word
        name, known = f"--{flag[2:].replace('-', '_')}", self._option_string_actions
        visible = [name for action in self._actions for name in action.option_strings]
        is_short = self.abbreviates and name not in known and name[2:] not in OF_THE_MODEL
        for names in (visible, aliases) if is_short else ():
            found = {id(known[long]): long for long in names if long.startswith(name)}
            if len(found) > 1:
                self.error(f"{flag} may be {' or '.join(found.values())}")
            name = next(iter(found.values()), name)
            if found:
                break
        if name not in known:
            self.unknown.append(flag)
            return word
        self.typed.update(dict.fromkeys(known[name].option_strings, name))
        return name + equals + value

    def _unknown(self, flag):
        name, known = flag.lstrip("-").replace("-", "_"), self._option_string_actions
        for source, what in (("--model_path", "the model"), ("--config_file", "the config's section model")):
            if name in OF_THE_MODEL and source in known:
                return f"unknown flag {flag} ({what} brings it along)"
        near = difflib.get_close_matches(f"--{name}", known, n=1, cutoff=0.7) if name not in MEANINGS else []
        meant = [f"--{this}" for this in MEANINGS.get(name, ()) if f"--{this}" in known]
        for other in meant or near:
            is_opposite = other in getattr(known[other], "opposites", ())
            meant = [other if is_opposite else known[other].option_strings[0]]
        return f"unknown flag {flag}" + (f" (did you mean {meant[0]}?)" if meant else "")


class _Store(argparse.Action):
    def __init__(self, *, aliases=(), check=None, help=None, default=None, required=False, **words):
        if help != argparse.SUPPRESS and default not in (None, "", [], argparse.SUPPRESS):
            if not required and not (help or "").endswith("]") and "%(default)" not in (help or ""):
                help = f"{help or ''} [{_shown(default)}]".strip()
        if check is not None:
            words = {"type": check.parse, "metavar": check.metavar, "choices": check.choices, **words}
        super().__init__(help=help, default=default, required=required, **words)
        self.aliases, self.check = aliases, check

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string is not None:
            parser.record(self, option_string, values)
        if self.check is not None and values not in (None, "None") and not self.check.accepts(values):
            parser.error(f"{option_string or self.dest} must be {self.check.expected}, got {values!r}")
        setattr(namespace, self.dest, values)


class _Switch(_Store):
    def __init__(self, *, default=False, **words):
        super().__init__(nargs="?", const=True, type=str2bool, metavar="True|False", default=default, **words)

    def __call__(self, parser, namespace, values, option_string=None):
        super().__call__(parser, namespace, values != (option_string in self.opposites), option_string)


def _negated(name):
    return f"--{name[5:]}" if name.startswith("--no_") else f"--no_{name[2:]}"


def _shown(value):
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("%", "%%")  # argparse formats help


class Parser(CommandParser):
    """Parses and checks a loop's command line, "trainer" or "notrainer"."""

    def __init__(self, loop):
        how = in_loop(PerLoop("the PaddleNLP Trainer", "a hand-written loop"), loop)
        devices = in_loop(PerLoop("--nproc_per_node 8", "--gpus 0,1,2,3"), loop)
        super().__init__(
            description=f"Trains a class-conditional diffusion transformer on latent features with {how}. What is not "
            "given here the config decides, for its own keys, then the default in [].",
            epilog=f"On several GPUs: python -m paddle.distributed.launch {devices} train_image_generation_{loop}.py "
            "... Environment: OMP_NUM_THREADS, FLAGS_use_stride_kernel, malloc's thresholds and, on processors that "
            "are not Intel's, MKL_DEBUG_CPU_TYPE are set for Paddle unless you have set them; see docs/performance.md.",
            formatter_class=argparse.HelpFormatter,
            allow_abbrev=False,
        )
        self.options = {}  # (name, option) by flag
        for title, table in run_flags.FLAG_GROUPS.items():
            group = self.add_argument_group(title)
            for name, option in table.items():
                if not (flag := option.flag_in(loop, name)):
                    continue
                self.options[flag] = name, option
                check, default, help = option.check, in_loop(option.default, loop), in_loop(option.help, loop)
                shown = in_loop(option.unset, loop) if default is None else default
                words = {"action": "store_true"} if check is options.BOOL else {"check": check, "nargs": check.nargs}
                words |= {"default": default if isinstance(option, options.Flag) else None}
                words |= {"help": help if shown in ("", []) else f"{help} [{shown}]"}
                aliases = [f"--{other}" for other in option.other_names(loop, name)]
                group.add_argument(f"--{flag}", dest=name, aliases=aliases, **words)
        self.add_argument("--overriding", nargs=0, action=_Override, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _Override(argparse.Action):
    """Lets the flags that follow win over those before, also by another name; a launch script's stand before it."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.given.clear()


def read_flags(loop, words=None):
    """Returns `(args, config)` of a loop's command line (None: this process's); ValueError for what is wrong in it."""
    args = Parser(loop).parse_args(words)
    if getattr(args, "do_train", None) is False:
        raise ValueError("command line: --do_train False: this script does nothing else; leave the flag out")
    config = resolve_training(args)
    check_vae(args.vae)
    check_paths(args, "pretrained_model_path", *(["resume"] if args.resume != "auto" else []))
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise ValueError(f"--output {args.output_dir}: is a file; expected a folder")
    return args, config


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
    if training["seed"] > MAX_SEED:
        where = f"{args.config_file}: training" if getattr(args, "seed", None) is None else "command line"
        raise ValueError(f"{where}: seed must be an integer from 0 to {MAX_SEED}, got {training['seed']}")
    return config


def check_positive(args, *names):
    """Raises `ValueError` for a flag among `names` that is given and not a positive number."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"command line: --{name} must be above 0, got {value}")


def add_device_flag(parser):
    """Adds --device, of which nothing more is known before Paddle is imported; `runtime.process.resolve_device`."""
    device = run_flags.RUN_FLAGS["device"]
    parser.add_argument("--device", check=device.check, default=device.default, help=device.help)


def add_set_flags(parser):
    """Adds --feature_path and --image_size, of a command on a set of features; see `features.store.find_features`."""
    parser.add_argument(
        "--feature_path",
        required=True,
        metavar="FOLDER",
        help="folder that holds NAME_features/ or NAME_packed/, or LightningDiT's *.safetensors",
    )
    parser.add_argument(
        "--image_size",
        check=options.POSITIVE_INT,
        help="picks imagenet{N} of several sets [256, else the only set]",
    )


def check_paths(args, *names):
    """Raises `ValueError` for a flag among `names` that is given and names no file or folder."""
    for name in names:
        path = getattr(args, name)
        if path is not None and not os.path.exists(path):
            raise ValueError(f"--{name} {path}: there is no such file or folder")


def check_vae(name, flag="--vae"):
    """Raises `ValueError` for an autoencoder that is neither a folder with its config nor can be a hub's; None passes.

    Nothing is loaded: whether it is a good one, and whether the hub has it, turns out later.
    """
    if name is None:
        return
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{flag} {name}: no config.json in this folder; expected an AutoencoderKL")
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not os.path.isdir(name.split("/")[0])
    if not (os.path.isdir(name) or is_name):
        raise ValueError(f"{flag} {name}: there is no such folder; expected one with an AutoencoderKL, or a hub name")


def check_flag(name, option, value):
    """Raises `ValueError` for a value of the flag `--name` that its option does not accept; None was not given."""
    if value is not None and not option.check.accepts(value):
        raise ValueError(f"command line: --{name} must be {option.check.expected}, got {value!r}")
