"""The best checkpoint of a run, by the evaluations on its way: `best.json` in the run's folder names it.

    {"step": 200, "checkpoint": "checkpoint-200", "metric": "fid", "value": 12.3, "evaluation": {its row}}

It follows from what is on the disk: the rows of `evaluation.jsonl` and the checkpoints that are whole. So neither a
kill, nor a save that fails, nor a resume from an earlier step leaves it wrong.
"""

import math
import os

from config.options import HIGHER_IS_BETTER
from runtime.files import write_json
from runtime.untrusted import read_json
from training.metrics import EVALUATIONS, read_rows
from weights.runs import damage, list_checkpoints, step_of

BEST = "best.json"


def read_best(folder):
    """Returns what the `best.json` of a run's folder holds; None if there is none that can be read."""
    path = os.path.join(folder, BEST)
    try:
        best = read_json(path) if os.path.isfile(path) else None
    except ValueError:
        return None
    keys = {"step": int, "checkpoint": str, "metric": str, "value": (int, float), "evaluation": dict}
    is_one = isinstance(best, dict) and all(isinstance(best.get(key), kind) for key, kind in keys.items())
    return best if is_one else None


def best_checkpoint(folder):
    """Returns the path of the checkpoint that the `best.json` of a run's folder names, or None."""
    best = read_best(folder)
    return best and os.path.join(folder, best["checkpoint"])


def is_best(row, metric, best):
    """Returns whether a row of `evaluation.jsonl` is better by `metric` than what `read_best` returned.

    So it is where the two can't be compared, because they were measured in different ways.
    """
    if not _holds(row, metric):
        return False
    if best is None or best["metric"] != metric or _way(best["evaluation"]) != _way(row):
        return True
    return _cost(row[metric], metric) < _cost(best["value"], metric)


def _holds(row, metric):
    return isinstance(row.get(metric), (int, float)) and math.isfinite(row[metric])


def _way(row):
    """Returns what two rows have in common whose metrics can be compared."""
    return row.get("num_samples"), row.get("settings")


def _cost(value, metric):
    return -value if metric in HIGHER_IS_BETTER else value


def settle_best(folder, checkpoints, metric=None):
    """Makes `best.json` name the best of the whole checkpoints, or takes it away if none has been evaluated.

    Compared are the rows that were measured as the newest one was. May raise `OSError`.

    Args:
        folder: of the run.
        checkpoints: the folder in which its checkpoints lie.
        metric: what decides; None for what has decided so far.
    """
    best, rows = read_best(folder), read_rows(os.path.join(folder, EVALUATIONS)) or []
    metric = metric or (best and best["metric"])
    paths = {step_of(path): path for path in list_checkpoints(checkpoints)}
    paths = {row["step"]: paths[row["step"]] for row in rows if row["step"] in paths}
    rows = [row for row in rows if metric and row["step"] in paths and _holds(row, metric)]
    rows = [row for row in rows if _way(row) == _way(rows[-1])]
    for row in sorted(rows, key=lambda row: _cost(row[metric], metric)):
        path = paths[row["step"]]
        if damage(path) is None:
            found = {"step": row["step"], "checkpoint": os.path.relpath(path, folder), "metric": metric}
            found |= {"value": row[metric], "evaluation": row}
            if found != best:
                write_json(os.path.join(folder, BEST), found)
            return
    if best is not None and (best["step"] not in paths or damage(paths[best["step"]]) is not None):
        os.remove(os.path.join(folder, BEST))
