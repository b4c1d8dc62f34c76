"""What is told of an evaluation: the report, its table, and ADM's published values beside ours."""

import platform
from importlib.metadata import version

from config.options import METRICS
from evaluation.run import (
    METRIC_NAMES,
    NEIGHBOURS,
    PROJECTIONS,
    SPLIT_SIZE,
    SUBSET_SIZE,
    SUBSETS,
    USUAL_COUNT,
)
from runtime.process import counted

PROTOCOL = {
    "inception_score_split_size": SPLIT_SIZE,
    "precision_recall_k": NEIGHBOURS,
    "kid_subsets": SUBSETS,
    "kid_subset_size": SUBSET_SIZE,
    "mind_projections": PROJECTIONS,
}
QUALITY = ("psnr", "ssim")  # of an autoencoder
NAMES = {**METRIC_NAMES, "psnr": "PSNR", "ssim": "SSIM"}
ADM_SAMPLES, ADM_REFERENCE = "admnet_guided_upsampled_imagenet256", "VIRTUAL_imagenet256_labeled"
# README of guided-diffusion's evaluations/: the value, and how far from it another implementation may be.
# ADM's evaluator multiplies in float16 for precision and recall, which moves them by 0.001 to 0.003.
PUBLISHED = {
    "inception_score": (215.84, 0.2),
    "fid": (3.943, 0.01),
    "sfid": (6.140, 0.02),
    "precision": (0.8265, 0.005),
    "recall": (0.5309, 0.005),
}


def make_report(numbers, num_samples, num_reference, settings):
    """Returns the JSON of an evaluation: counts, every metric, null if it was not computed, and the settings."""
    names = [*METRICS[:6], "kid_standard_error", *METRICS[6:], *(name for name in QUALITY if name in numbers)]
    return {
        "num_samples": num_samples,
        "num_reference": num_reference,
        **{name: numbers.get(name) for name in names},
        "settings": {**settings, **PROTOCOL, "kid_subset_size": subset_size(num_samples, num_reference)}
        | {"versions": versions()},
    }


def subset_size(num_samples, num_reference):
    """Returns how many rows KID draws from each set."""
    return min(SUBSET_SIZE, num_samples, num_reference or num_samples)


def versions():
    """Returns the versions of what numbers depend on, by name."""
    import numpy
    import paddle
    import PIL

    found = {"python": platform.python_version(), "paddle": paddle.__version__, "numpy": numpy.__version__}
    return {**found, "scipy": version("scipy"), "pillow": PIL.__version__}


def table(report, reference):
    """Returns the lines of a table, metric, value, note, of a report and the `Reference` that it compares with."""
    rows = [("metric", "value", "note")]
    for name in NAMES:
        if name in reference.left_out:
            rows.append((NAMES[name], "-", reference.left_out[name]))
        elif name in report and (report[name] is not None or name in QUALITY):
            value = "infinite" if report[name] is None else f"{report[name]:.6g}"
            rows.append((NAMES[name], value, _note(name, report, reference)))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{name:{widths[0]}}  {value:>{widths[1]}}  {note}" for name, value, note in rows]


def _note(name, report, reference_set):
    samples, reference = report["num_samples"], report["num_reference"]
    subset = subset_size(samples, reference)
    drawn = f"standard error {report['kid_standard_error'] or 0:.2g}, {SUBSETS} subsets of {subset:,}"
    bias = f", biased upwards: fewer than {USUAL_COUNT:,} samples" if samples < USUAL_COUNT else ""
    origin = "the reference's stored statistics" if reference_set.has_stored(name) else "the reference's images"
    distance = f"N = {samples:,}, against {origin}{bias}"
    splits = counted(-(-samples // SPLIT_SIZE), "split")
    return {
        "fid": distance,
        "sfid": distance,
        "inception_score": f"{splits} of {min(SPLIT_SIZE, samples):,}",
        "precision": f"k = {NEIGHBOURS}, N = {samples:,}",
        "recall": f"k = {NEIGHBOURS}, {reference or 0:,} reference images",
        "kid": drawn if subset < max(samples, reference or 0) else "all of both sets, nothing drawn",
        "mind": f"{PROJECTIONS:,} projections of {min(samples, reference or samples):,} samples",
        "psnr": "dB, mean over the images",
        "ssim": "Gaussian of 11x11, mean over channels and images",
    }[name]


def compare_published(report):
    """Returns `(lines, agrees)`: each of ADM's published values beside ours, and whether all lie within tolerance."""
    lines, agrees = [f"published for {ADM_SAMPLES}.npz (50,000 images) against {ADM_REFERENCE}.npz:"], True
    for name, (value, tolerance) in PUBLISHED.items():
        ours = report[name]
        good = abs(ours - value) <= tolerance
        agrees &= good
        verdict = "agrees" if good else "DIFFERS"
        lines.append(f"{NAMES[name]}: {ours:.6g}, published {value:g} +- {tolerance:g}: {verdict}")
    return lines, agrees
