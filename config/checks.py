"""What values must be: checks for JSON files and for the words of command lines. Standard library only."""

import argparse
import math
import re
from collections.abc import Callable
from typing import NamedTuple

MAX_SEED = 2**32 - 1  # the largest seed that numpy, Python and Paddle all take
MAX_STD = 0.2887  # the largest relative width of an average's profile, that of the mean of all steps, rounded up


class Check(NamedTuple):
    """What a value must be, and how a command line spells it."""

    accepts: Callable  # accepts(value) -> bool
    expected: str  # "must be ..." in errors and in the docs
    parse: Callable = str  # from a word of the command line; ValueError or ArgumentTypeError refuses it
    metavar: str = None
    choices: tuple = None
    nargs: str = None  # argparse's


def no_effect(names, why):
    """Lists the sentence that says which settings, if any, have no effect."""
    return [f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} no effect {why}"] if names else []


def str2bool(text):
    """Reads `True`, `yes`, `1`, `off`, ... as bool, for argparse, which makes one line of the error."""
    lowered = text.lower()
    if lowered in ("true", "t", "1", "yes", "y", "on"):
        return True
    if lowered in ("false", "f", "0", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def _none_or_str(text):
    return None if text in ("None", "none", "") else text


def vae_name(text):
    """Reads an autoencoder's name, for argparse: `ema` and `mse` are Stable Diffusion's, as in the official DiT."""
    return f"stabilityai/sd-vae-ft-{text}" if text in ("ema", "mse") else _none_or_str(text)


def _labels(text):
    try:
        return [int(label) for label in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected class labels such as 0,7,13, got {text!r}") from None


def _widths(text):
    try:
        return [] if text in ("None", "none", "") else [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected widths such as 0.05,0.1, or None, got {text!r}") from None


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_class_names(value):
    return isinstance(value, dict) and all(
        isinstance(name, str) and key.isascii() and key.isdigit() and len(key) < 8 and str(int(key)) == key
        for key, name in value.items()
    )


def _are_widths(value):
    is_right = isinstance(value, list) and all(_is_number(std) and 0 < std <= MAX_STD for std in value)
    return is_right and len({f"{std:g}" for std in value}) == len(value)  # as in the names of files


def holds_timestep(interval):
    """Returns whether a timestep, a whole number, is in an interval of a diffusion's times: (0.2, 0.8) holds none."""
    return math.isfinite(interval[0]) and math.ceil(interval[0]) <= interval[1]


def _all(accepts):
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(accepts, value))


BOOL = Check(lambda v: isinstance(v, bool), "true or false", str2bool, "True|False", nargs="?")
TEXT = Check(lambda v: isinstance(v, str), "text", metavar="TEXT")
PATH = TEXT._replace(parse=_none_or_str, metavar="PATH")
VAE = PATH._replace(parse=vae_name)
INT = Check(_is_int, "an integer", int, "N")
POSITIVE_INT = Check(lambda v: _is_int(v) and v > 0, "a positive integer", int, "N")
INT_FROM_0 = Check(lambda v: _is_int(v) and v >= 0, "an integer of 0 or more", int, "N")
INT_FROM_2 = Check(lambda v: _is_int(v) and v >= 2, "an integer of 2 or more", int, "N")
INT_FROM_4 = Check(lambda v: _is_int(v) and v >= 4, "an integer of 4 or more", int, "N")
BLOCK = Check(lambda v: _is_int(v) and v != 0, "the number of a block, from 1 on, or from the end: -1 is the last")
STEPS = Check(lambda v: _is_int(v) and (v == -1 or v > 0), "a positive integer, or -1 to count in epochs", int, "N")
SEED = INT_FROM_0._replace(expected=f"an integer from 0 to {MAX_SEED}")  # `config.flags` checks the upper end
FLAG_SEED = SEED._replace(accepts=lambda v: _is_int(v) and 0 <= v <= MAX_SEED)
DEVICE = Check(lambda v: re.fullmatch(r"auto|cpu|gpu(:\d+)?", v) is not None, "auto, cpu, gpu or gpu:N", metavar="NAME")
NUMBER = Check(_is_number, "a number", float, "X")
ABOVE_0 = Check(lambda v: _is_number(v) and v > 0, "a number above 0", float, "X")
FROM_0 = Check(lambda v: _is_number(v) and v >= 0, "a number of 0 or more", float, "X")
BELOW_1 = Check(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1", float, "X")
BELOW_HALF = Check(lambda v: _is_number(v) and 0 <= v < 0.5, "a number from 0 to below 0.5", float, "X")
FACTOR = Check(lambda v: _is_number(v) and (v == 0 or v > 1), "0 for off, or a number above 1", float, "X")
FROM_0_TO_1 = Check(lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1", float, "X")
INTERVAL = Check(
    lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_number, v)) and 0 <= v[0] <= v[1],
    "[lowest, highest], numbers of 0 or more",
)
BLOCKS = Check(
    lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_int, v)) and 0 < v[0] <= v[1],
    "[first, last], blocks counted from 1",
)
SHARE = Check(lambda v: _is_number(v) and 0 < v < 1, "a number above 0 and below 1", float, "X")
CHANNELS = Check(lambda v: v in ("auto", None) or (_is_int(v) and v > 0), '"auto", a positive integer, or null for all')
WORDS = Check(_all(TEXT.accepts), "words", metavar="WORD", nargs="+")
LABELS = Check(_all(INT_FROM_0.accepts), "a list of class labels", _labels, "L,L,...")
WIDTHS = Check(_are_widths, f"a list of different widths above 0 and up to {MAX_STD}", _widths, "STD,STD,...")
LIST = Check(lambda v: isinstance(v, list), "a list of objects {...}")
OBJECT = Check(lambda v: isinstance(v, dict), "an object {...}")
CLASS_NAMES = Check(_is_class_names, 'names by label, {"0": "name", ...}')


def one_of(*values):
    """Returns the check of a choice among texts."""
    return Check(lambda v: isinstance(v, str) and v in values, "one of " + ", ".join(values), choices=values)


def some_of(*values):
    """Returns the check of a list of different texts, one or more, among these."""
    accepts = _all(lambda v: isinstance(v, str) and v in values)
    return Check(lambda v: accepts(v) and len({*v}) == len(v), "a list, without repeats, of " + ", ".join(values))


def or_null(check):
    """Returns a check that accepts null too, on the command line `None` if it is a choice."""
    return check._replace(
        accepts=lambda v: v is None or check.accepts(v),
        expected=check.expected + ", or null",
        choices=check.choices and (*check.choices, "None"),
    )


def null_or(check):
    """Returns a check that accepts null in a file, for a choice that has another word for none on the command line."""
    return or_null(check)._replace(choices=check.choices)


def or_one_a_channel(check):
    """Returns a check that accepts null and a list too, whose values belong to the channels of the latents."""
    every = _all(check.accepts)
    return check._replace(
        accepts=lambda v: v is None or check.accepts(v) or every(v),
        expected=check.expected + ", a list of one a channel, or null",
    )
