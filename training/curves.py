"""Curves of a run as paths of an SVG, to be drawn by a template. Needs no Paddle, and draws no text itself."""

import dataclasses
import math

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 8, 26  # margins
MAX_POINTS = 600  # of a line
LARGEST, MAX_STEP = 1e100, 2**53  # of what a chart holds
MAX_MARKS = 25  # of a line whose points are marked, with their values


def last_branch(rows):
    """Lists the rows of the steps that the run stands on: a resumed run replaces those that it does again."""
    kept = []
    for row in (row for row in rows if 0 <= row["step"] <= MAX_STEP):
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def series(rows, key):
    """Lists `(step, value)` of the numbers under a key; None as the value of what is none, where a line breaks."""
    return [(row["step"], number if is_number(number := row.get(key)) else None) for row in rows]


def is_number(value):
    """Returns whether a value is a number that can be drawn: finite, and not beyond what any run measures."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return value == 0 or 1 / LARGEST <= abs(value) <= LARGEST


def smoothed(points):
    """Returns points averaged over about a twentieth of the curve: exponentially, with the start's bias corrected."""
    decay = 1 - 2 / (max(3.0, len(points) / 20) + 1)
    mean = weight = 0.0
    found = []
    for step, value in points:
        if value is not None:
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        found.append((step, mean / weight if value is not None else None))
    return found


def nice_ticks(low, high, count=5):
    """Lists about `count` round numbers, multiples of 1, 2 or 5 times a power of ten, from low to high."""
    size = 10 ** math.floor(math.log10((high - low) / count))
    size *= next(factor for factor in (1, 2, 5, 10) if size * factor * count >= (high - low) * 0.999)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [round(number * size, 12) for number in range(first, last + 1)]


@dataclasses.dataclass
class Line:
    """A line of a chart; `faint`: the raw values behind a smoothed line."""

    name: str
    path: str  # of an SVG
    color: int
    faint: bool
    marks: list  # (x, y, step, value), of a line of few points
    last: str


@dataclasses.dataclass
class Chart:
    """A chart to be drawn: lines, and ticks as `(place, text)`."""

    title: str
    lines: list
    x_ticks: list
    y_ticks: list
    is_log: bool
    width, height, left, right, top, bottom = WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM


def make_chart(title, named, *, smooth=False, may_be_log=True, first=None, last=None):
    """Returns the `Chart` of `{name: [(step, value), ...]}`; None without a number in it.

    `smooth`: each line is smoothed, its values faint behind it. `first`, `last`: the steps from and to which the axis
    goes at least. The other axis is logarithmic, if it `may_be_log`, for positive values that span a factor above 50.
    """
    lines = []  # (name, points, color, faint)
    for color, (name, points) in enumerate(named.items()):
        count = sum(value is not None for _, value in points)
        if smooth and count >= 10:
            lines += [(name, points, color, True), (name, smoothed(points), color, False)]
        elif count:
            lines.append((name, points, color, False))
    values = [value for _, points, *_ in lines for _, value in points if value is not None]
    if not values:
        return None
    steps = [step for _, points, *_ in lines for step, _ in points]
    steps = [*steps, *(step for step in (first, last) if step is not None)]
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(values), max(values)
    is_log = may_be_log and low > 0 and high / low > 50
    scale = math.log10 if is_log else float
    low, high = scale(low), scale(high)
    pad = 0.05 * (high - low) or abs(high) * 0.5 or 1.0  # a constant has few round numbers around it
    low, high = low - pad, high + pad

    def place(step, value):
        x = LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - scale(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    if is_log and high - low > 2:
        y_ticks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    elif is_log:
        powers = range(math.floor(low), math.ceil(high) + 1)
        y_ticks = [m * 10.0**power for power in powers for m in (1, 2, 5) if low <= scale(m * 10.0**power) <= high]
    else:
        y_ticks = nice_ticks(low, high, 6)
    return Chart(
        title,
        [_line(name, points, color, faint, place) for name, points, color, faint in lines],
        [(place(tick, values[0])[0], f"{tick:,.0f}") for tick in nice_ticks(x_low, x_high, 6) if tick % 1 == 0],
        [(place(x_low, tick)[1], f"{tick:g}") for tick in y_ticks],
        is_log,
    )


def _line(name, points, color, faint, place):
    stride = math.ceil(len(points) / MAX_POINTS)
    points = [*points[:-1:stride], points[-1]]  # the last one is always there
    path, pen_down = [], False
    for step, value in points:
        if value is not None:
            path.append(("L" if pen_down else "M") + "{} {}".format(*place(step, value)))
        pen_down = value is not None
    known = [(step, value) for step, value in points if value is not None]
    marks = [(*place(step, value), step, f"{value:.4g}") for step, value in known]
    return Line(name, "".join(path), color, faint, marks if len(known) <= MAX_MARKS else [], f"{known[-1][1]:.4g}")
