"""Checks the command line of a training script without importing Paddle. The launch scripts do so before they start it.

    python tools/check_flags.py train_image_generation_trainer.py --config_file config/DiT_XL_patch2.json ...

A mistake is one line and exit code 2: an unknown flag, a wrong value or config, a run that is at work in the folder.
Variables of the environment with the name of a setting that did not become it are named on stderr.
"""

import argparse
import os
import sys

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import LOOPS, CommandParser, read_flags
from config.run_flags import FLAG_GROUPS
from features.store import find_features
from runtime.process import run_cli
from runtime.run_lock import check_experiment_idle, check_idle, experiment_name

SCRIPTS = {f"train_image_generation_{loop}.py": loop for loop in LOOPS}


def unused_variables(loop, args, environment):
    """Lists a sentence for each variable with the name of a setting that is not what the flag of that setting is given.

    `args` are the parsed flags, of which the launch script has made some of variables.
    """
    notes = []
    for name, option in [pair for table in FLAG_GROUPS.values() for pair in table.items()]:
        flag, given = option.flag_in(loop, name), getattr(args, name, None)
        names = (each for one in LOOPS for each in (option.flag_in(one, name), *option.other_names(one, name)))
        for variable in dict.fromkeys(filter(None, (name, *names))):
            value = environment.get(variable)
            if value and not (flag and _is_value(value, option, given)):
                why = f"give --{flag} as a flag" if given is None else f"--{flag} is {given}"
                notes.append(f"{variable}={value} is not used: {why if flag else 'it is no setting of this loop'}")
    return notes


def _is_value(text, option, given):
    try:
        return option.check.parse(text) == given
    except (ValueError, argparse.ArgumentTypeError):
        return False


def main():
    parser = CommandParser(description=__doc__)
    parser.add_argument("script", help=" or ".join(SCRIPTS))
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="as the script takes them")
    given = parser.parse_args()
    loop = SCRIPTS.get(os.path.basename(given.script))
    if loop is None:
        raise ValueError(f"{given.script}: expected {' or '.join(SCRIPTS)}")
    args, _ = read_flags(loop, given.flags)
    find_features(args.feature_path, args.image_size)
    for note in unused_variables(loop, args, os.environ):
        print(f"note: {note}", file=sys.stderr)
    if loop == "trainer":
        check_idle(args.output_dir)
    else:
        check_experiment_idle(args.resume, args.output_dir, experiment_name(args.config_file))
    print("the flags are right")


if __name__ == "__main__":
    run_cli(main)
