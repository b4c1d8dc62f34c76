"""Tables and figures of benchmarks/quality.py."""

import os
import re

from evaluation.run import METRIC_NAMES

SHOWN = ("fid", "mind", "recall")  # in figures
AXES = {  # what x is, and which axes are logarithmic
    "widths": ("relative width of the average", "y"),
    "scale": ("guidance scale", ""),
    "interval": ("where guidance is on", ""),
    "guide": ("scale of autoguidance", ""),
    "sampler": ("steps", "xy"),
    "transport": ("network evaluations", "xy"),
}


def table(part, rows, metrics):
    """Returns the lines of a table in Markdown."""
    has_curves = len({row["curve"] for row in rows}) > 1
    heads = [*(["which"] if has_curves else []), AXES[part][0], *(METRIC_NAMES[metric] for metric in metrics)]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for row in rows:
        x = row["x"] if isinstance(row["x"], str) else f"{row['x']:g}"
        words = [row["curve"]] if has_curves else []
        words.append("-" if x == "0" else x)
        for metric in metrics:
            mean, deviation = row[metric]
            digits = 3 if metric in ("recall", "precision") else 2
            words.append(f"{mean:.{digits}f} ± {deviation:.{digits}f}")
        lines.append("| " + " | ".join(words) + " |")
    return lines


def show(results, metrics):
    """Prints all tables."""
    for part, rows in results.items():
        print("", part, *table(part, rows, metrics), sep="\n", flush=True)


def write_page(path, results, metrics):
    """Puts the tables between the marks of a page."""
    put_tables(path, "quality.py", {part: table(part, rows, metrics) for part, rows in results.items()})


def put_tables(path, script, tables):
    """Puts tables, `{name: lines}`, between the marks of a page that say that a script has written them."""
    marked = re.compile(rf"(<!-- (\w+), written by benchmarks/{script} -->\n).*?(<!-- end -->\n)", re.DOTALL)
    text = path.read_text(encoding="utf-8")
    text = marked.sub(lambda found: found[1] + "\n".join(tables[found[2]]) + "\n" + found[3], text)
    path.write_text(text, encoding="utf-8")


def draw_figures(results, folder):
    """Writes `quality_PART.png` of each part into a folder; returns their paths."""
    from evaluation.sweep import plot

    paths = []
    for part, rows in results.items():
        label, log = AXES[part]
        panels = []
        for metric in SHOWN:
            curves, lines = {}, {}
            for row in rows:
                mean, deviation = row[metric]
                if row["x"] == 0:
                    lines[row["curve"]] = mean
                    continue
                for values, value in zip(
                    curves.setdefault(row["curve"], ([], [], [])), (row["x"], mean, deviation), strict=True
                ):
                    values.append(value)
            order = {curve: sorted(zip(*values, strict=True)) for curve, values in curves.items()}
            if part != "interval":
                curves = {curve: tuple(zip(*found, strict=True)) for curve, found in order.items()}
            log_of = log if metric != "recall" else log.replace("y", "")
            panels.append({"x": label, "y": METRIC_NAMES[metric], "curves": curves, "lines": lines, "log": log_of})
        paths.append(os.path.join(folder, f"quality_{part}.png"))
        plot(paths[-1], panels)
    return paths
