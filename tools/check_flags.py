"""Checks the command line of a training script without importing Paddle. The launch scripts do so before they start it.

    python tools/check_flags.py train_image_generation_trainer.py --config_file config/DiT_XL_patch2.json ...

A mistake is one line and exit code 2: an unknown flag, a wrong value or config, a run that is at work in the folder.
Variables of the environment that have a setting's name, and are not what a flag is given, are named on stderr.
"""

import argparse
import os
import sys

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import LOOPS, CommandParser, read_flags
from config.options import FLAG_GROUPS
from features.store import find_features
from runtime.process import run_cli
from runtime.run_lock import check_experiment_idle, check_idle, experiment_name

SCRIPTS = {f"train_image_generation_{loop}.py": loop for loop in LOOPS}


def unused_variables(loop, words, environment):
    """Lists a sentence for each variable with the name of a setting that the launch script has not made a flag of."""
    notes = []
    for name, option in [pair for table in FLAG_GROUPS.values() for pair in table.items()]:
        flags = {one: option.flag_in(one, name) for one in LOOPS}
        given = {value for flag in filter(None, flags.values()) for value in values_of(f"--{flag}", words)}
        for variable in dict.fromkeys(filter(None, (name, *flags.values()))):
            value = environment.get(variable)
            if value and value not in given:
                how = f"give --{flags[loop]} as a flag" if flags[loop] else "it is the other loop's setting"
                notes.append(f"{variable}={value} is not used: this script takes no such variable; {how}")
    return notes


def values_of(flag, words):
    """Yields the values that a command line gives a flag."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.partition("=")[0] == flag:
            yield word.partition("=")[2] if "=" in word else following


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
    for note in unused_variables(loop, given.flags, os.environ):
        print(f"note: {note}", file=sys.stderr)
    if loop == "trainer":
        check_idle(args.output_dir)
    else:
        check_experiment_idle(args.resume, args.output_dir, experiment_name(args.config_file))
    print("the flags are right")


if __name__ == "__main__":
    run_cli(main)
