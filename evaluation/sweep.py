"""Metrics of a model along one setting: the same noise and classes at every point, a table and a figure.

    judge = Judge("digits/train", load_features("digits"), labels)
    rows = sweep(judge, [({"std": 0.05}, generator), ({"std": 0.1}, other)], num_inference_steps=50)
    print(*table("std", rows), sep="\\n")
    plot("widths.png", width_panels(rows))

tools/reconstruct_ema.py sweeps widths so, and benchmarks/quality.py measures every point.
"""

import io
import math

from config.options import HIGHER_IS_BETTER, METRICS
from evaluation.run import METRIC_NAMES, cautions, compute_metrics, extract, load_reference, shown
from sampling.many import draw_images


class Judge:
    """Draws samples of any generator, of one noise and one list of classes, and compares them with one reference.

    Args:
        reference: path as of `evaluation.run.load_reference`, which is called for the first generator. network: the
            feature network.
        labels: classes of the samples, (N,).
        metrics: None for all that are possible.
        seed, batch_size, tile: of `sampling.many.draw_images`.
    """

    def __init__(self, reference, network, labels, *, metrics=None, seed=0, batch_size=32, tile=None):
        self.path, self.network, self.labels, self.asked = reference, network, labels, metrics
        self.drawing = {"seed": seed, "batch_size": batch_size, "tile": tile}
        self.reference, self.cautions = None, []

    @property
    def metrics(self):
        """Lists what is computed; known after `open`."""
        return self.reference.metrics

    def open(self, generator):
        """Reads the reference for images of a generator's size, unless that is done."""
        if self.reference is None:
            sizes = {"sample_size": generator.image_size, "num_samples": len(self.labels)}
            self.reference = load_reference(self.path, self.network, self.asked, **sizes)

    def measure(self, generator, title="samples", **sampling):
        """Returns `{metric: number}` of samples that `Generator.sample` draws with `sampling`."""
        self.open(generator)
        drawn = draw_images(generator, range(len(self.labels)), self.labels, **self.drawing, **sampling)
        batches = shown((images for _, images in drawn), len(self.labels), title)
        samples = extract(self.network, batches, metrics=self.metrics, source="the samples")
        self.cautions = cautions(samples, self.reference, self.metrics)
        return compute_metrics(samples, self.reference, self.metrics, self.drawing["seed"])


def sweep(judge, generators, **sampling):
    """Returns a row for each `(settings, generator)`: the settings, a dict, with the metrics of samples beside them."""
    rows = []
    for settings, generator in generators:
        words = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        rows.append({**settings, **judge.measure(generator, f"samples of {words}", **sampling)})
    return rows


def metrics_of(rows):
    """Lists the metrics that rows have numbers of."""
    return [metric for metric in METRICS if metric in rows[0]]


def table(first, rows):
    """Returns the lines of a table: the setting `first` of each row, and its metrics."""
    lines = [[first, *(METRIC_NAMES[metric] for metric in metrics_of(rows))]]
    lines += [[f"{row[first]:g}", *(f"{row[metric]:.5g}" for metric in metrics_of(rows))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines]


def best(rows, metric):
    """Returns the row that is best by a metric."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    return min(rows, key=lambda row: sign * row[metric] if math.isfinite(row[metric]) else math.inf)


def width_panels(rows):
    """Returns the panels of `plot` for rows of `sweep` over widths: one for each metric."""
    stds = [row["std"] for row in rows]
    return [
        {"x": "relative width (std)", "y": METRIC_NAMES[metric], "curves": {"": (stds, [row[metric] for row in rows])}}
        for metric in metrics_of(rows)
    ]


def plot(path, panels, *, columns=3, width=3.4):
    """Writes a PNG of curves.

    Args:
        panels: a dict each: `x` and `y`, what the axes show; `curves`, {label: (xs, ys)} or (xs, ys, deviations), which
            become error bars; xs are numbers, or words, which are no curve; `log`, "x", "y" or "xy"; `lines`,
            {label: y}, for comparison. width: of a panel, in inches.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system is asked
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
    from PIL import Image

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width * columns, 2.7 * rows), dpi=110, layout="constrained")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        for label, (xs, ys, *deviations) in panel["curves"].items():
            style = {"linestyle": "none"} if isinstance(xs[0], str) else {"linewidth": 1}
            axes.errorbar(xs, ys, *deviations, label=label or None, marker="o", markersize=3, capsize=2, **style)
        for number, (label, y) in enumerate(panel.get("lines", {}).items()):
            axes.axhline(y, label=label, color="0.4", linewidth=1, linestyle=("--", ":", "-.")[number % 3])
        for name in panel.get("log", ""):
            getattr(axes, f"set_{name}scale")("log")
            axis = getattr(axes, f"{name}axis")
            axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        if "x" in panel.get("log", ""):
            axes.set_xticks(sorted({x for xs, *_ in panel["curves"].values() for x in xs}))
        axes.set_xlabel(panel["x"], fontsize=8)
        axes.set_ylabel(panel["y"], fontsize=8)
        axes.tick_params(which="both", labelsize=7)
        if any(isinstance(xs[0], str) for xs, *_ in panel["curves"].values()):
            for word in axes.get_xticklabels():
                word.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")
        axes.grid(alpha=0.3)
        if any([*panel["curves"], *panel.get("lines", {})]):
            axes.legend(fontsize=6)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(path, format="PNG", optimize=True)  # half the bytes
