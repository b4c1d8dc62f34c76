"""How a set's latents are normalised before a network sees them: `(x - mean) / std * multiplier`, by channel.

`x` are latents as they are stored, of moments their samples. A normalisation is a dict of `NORMALIZATION_KEYS`, numbers
alone: it goes into checkpoints, and is undone before decoding (`features.autoencoder.LatentScaling.normalized`). None
leaves latents as they are.
"""

import os
import shlex

import numpy as np

from config.options import ABOVE_0, NUMBER
from features.lightning import MAX_ROWS, STATISTICS
from runtime.process import counted
from runtime.untrusted import shortened


def choose_normalization(mode, multiplier, manifest, store, channels):
    """Returns `(normalisation or None, note or None)` of a set, by a config's `latent_normalization` and multiplier.

    A `mode` of None is what the set's manifest says, or "none". ValueError for a set without the statistics, or with
    those of other channels.
    """
    mode = mode or manifest.get("latent_normalization") or "none"
    if mode not in ("none", "channel"):
        shown = shortened(mode)
        raise ValueError(f"{store.path}: latent_normalization is {shown} in its manifest, expected none or channel")
    if mode == "none":
        return (None if multiplier == 1 else {"mean": None, "std": None, "multiplier": multiplier}), None
    found, note = [manifest.get(f"channel_{what}") for what in ("mean", "std")], None
    if None in found and hasattr(store, "compute_statistics"):
        found = [values.tolist() for values in store.compute_statistics()]
        rows = counted(min(MAX_ROWS, len(store)), "row")
        note = (
            f"no {STATISTICS} in {store.path}: mean and standard deviation by channel are those of {rows}, counted at "
            "each start; tools/check_features.py --write_statistics keeps those of all"
        )
    if None in found:
        folder = shlex.quote(os.path.dirname(store.path))
        raise ValueError(
            f"{store.path}: latent_normalization channel needs channel_mean and channel_std in the set's manifest; "
            f"tools/check_features.py --feature_path {folder} --write_statistics computes them"
        )
    values = {}
    for key, value, check in zip(("mean", "std"), found, (NUMBER, ABOVE_0), strict=True):
        values[key] = value = value if isinstance(value, list) else [value] * channels
        if len(value) != channels or not all(map(check.accepts, value)):
            expected = f"{check.expected} for each of {counted(channels, 'channel')}"
            hint = "" if note is None else "; it is computed of the latents, which tools/check_features.py looks at"
            raise ValueError(f"{store.path}: its channel_{key} can't normalise its latents: expected {expected}{hint}")
    return {**values, "multiplier": multiplier}, note


def normalize(latents, normalization):
    """Normalises float32 latents `(n, C, h, w)` in place, and returns them."""
    factor = normalization["multiplier"]
    if normalization["mean"] is not None:
        latents -= np.array(normalization["mean"], "float32")[:, None, None]
        factor = (factor / np.array(normalization["std"]))[:, None, None].astype("float32")
    latents *= factor
    return latents


def normalization_differences(theirs, ours):
    """Lists, as `(what, their value, our value)`, how the normalisations of two `features` sections differ.

    Where only one of them is by channel, that is said in place of its numbers. Statistics within 1e-4 of a standard
    deviation are the same: sums in another order differ by rounding.
    """
    plain = {"mean": None, "std": None, "multiplier": 1.0}
    there, here = (features["latent_normalization"] or plain for features in (theirs, ours))
    if (there["std"] is None) != (here["std"] is None):
        return [("latent_normalization", describe_normalization(there), describe_normalization(here))]
    found = []
    if here["std"] is not None:
        room = 1e-4 * np.array(here["std"])
        for key in ("mean", "std"):
            is_same = len(there[key]) == len(room) and (np.abs(np.subtract(there[key], here[key])) <= room).all()
            found += [] if is_same else [(f"latent_normalization's {key}", there[key], here[key])]
    if there["multiplier"] != here["multiplier"]:
        found.append(("latent_normalization's multiplier", there["multiplier"], here["multiplier"]))
    return found


def describe_normalization(normalization):
    """Returns a normalisation in a few words, for a user who knows the set."""
    what = "none" if normalization["mean"] is None else "by channel"
    return what if normalization["multiplier"] == 1 else f"{what}, times {normalization['multiplier']:g}"
