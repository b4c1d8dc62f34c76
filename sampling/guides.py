"""What a network must have in common with one that guides it."""

import math

from features.autoencoder import vae_differences
from features.normalization import normalization_differences
from sampling.times import times_of


def guide_differences(guide, generator):
    """Lists, as `(what, the guide's, the other's)`, in what two `Generator`s differ that a guide must share.

    The sizes of the networks themselves are free.
    """
    theirs, ours = (_needed(one) for one in (guide, generator))
    pairs = [(name, theirs.get(name), ours.get(name)) for name in {**ours, **theirs}]
    return [pair for pair in pairs if not _is_same(*pair[1:])] + _of_latents(guide.features, generator.features)


def _needed(generator):
    sizes = {name: getattr(generator, name) for name in ("in_channels", "sample_size", "num_classes")}
    return {**sizes, **times_of(generator.objective).process}


def _is_same(one, other):
    fractions = isinstance(one, float) and isinstance(other, float)
    return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6) if fractions else one == other


def _of_latents(theirs, ours):
    """Lists how the latents of two `features` sections differ, where both tell of them."""
    if not all(features and any(features.values()) for features in (theirs, ours)):
        return []
    found = vae_differences(theirs["vae"], ours["vae"])
    # Another autoencoder may be another decoder of the same latents.
    return [one for one in found if one[0] != "autoencoder"] + normalization_differences(theirs, ours)
