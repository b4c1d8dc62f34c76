"""Tables and the figure of benchmarks/recipes.py."""

import os

from benchmarks.quality_page import put_tables
from evaluation.run import METRIC_NAMES

QUALITY = ("recipe", "FID", "MIND", "recall", "better in", "step at equal time", "FID then", "MIND then", "better in")
COSTS = ("recipe", "samples/s", "of the plain speed", "peak memory", "of it by Paddle's allocator")
WHEN = ("equal_steps", "equal_time")


def tables(results, seeds):
    """Returns `{name: lines}`, tables in Markdown."""
    quality, costs = [], []
    for row in results:
        better = [f"{row['better'][when]} of {seeds}" if when in row["better"] else "-" for when in WHEN]
        metrics = [shown(row["equal_steps"], metric) for metric in ("fid", "mind", "recall")]
        then = [shown(row["equal_time"], metric) if "equal_time" in row else "-" for metric in ("fid", "mind")]
        quality.append([row["recipe"], *metrics, better[0], f"{row['step']}", *then, better[1]])
        sizes = [f"{row[key] / 2**20:.{digits}f} MiB" for key, digits in (("peak", 0), ("allocated", 1))]
        costs.append([row["recipe"], f"{row['samples_per_s']:.0f}", f"{row['speed']:.2f}", *sizes])
    return {"quality": markdown(QUALITY, quality), "costs": markdown(COSTS, costs)}


def shown(spread, metric):
    """Returns `mean ± deviation` of a metric, in words."""
    mean, deviation = spread[metric]
    digits = 3 if metric == "recall" else 2
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def markdown(heads, rows):
    """Returns the lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def show(results, seeds):
    """Prints all tables."""
    for name, lines in tables(results, seeds).items():
        print("", name, *lines, sep="\n", flush=True)


def write_page(path, results, seeds):
    """Puts the tables between the marks of a page."""
    put_tables(path, "recipes.py", tables(results, seeds))


def draw_figure(results, folder):
    """Writes `recipes.png`, the metrics of all recipes, into a folder; returns its path."""
    from evaluation.sweep import plot

    panels = []
    for metric in ("fid", "mind"):
        curves = {}
        for when in WHEN:
            shown_rows = [row for row in results if when in row]
            numbers = ([row[when][metric][place] for row in shown_rows] for place in (0, 1))
            curves[when.replace("_", " ")] = [row["recipe"] for row in shown_rows], *numbers
        panels.append({"x": "", "y": METRIC_NAMES[metric], "curves": curves, "log": "y"})
    path = os.path.join(folder, "recipes.png")
    plot(path, panels, columns=1, width=9)
    return path
