"""Class names: where those of a model come from, and which class a user means. Paddle is not imported."""

import os
import re

from runtime.untrusted import listed, read_json

DEFAULT_CLASS = "golden retriever"
IMAGENET_IDS = ("n01440764", "n15075141")  # the first and the last of its 1000 classes
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IMAGENET_LABELS = os.path.join(ROOT, "tools", "ImageNet_id2label.json")
MAX_LISTED = 10  # names in a message


def read_labels(path):
    """Reads `{id: label}` from a JSON file, with or without the key "id2label" around it."""
    labels = read_json(path)
    labels = labels.get("id2label", labels) if isinstance(labels, dict) else labels
    if not isinstance(labels, dict) or not all(re.fullmatch("[0-9]{1,18}", key) for key in labels):
        raise ValueError(f'{path}: expected {{"id2label": {{"0": "name", ...}}}}')
    return {int(key): str(value) for key, value in labels.items()}


def weights_labels(path, config):
    """Returns `({id: label}, note or None)` for weights, which come without: those of a file, or of the config's set.

    1000 classes without names, or with ImageNet's ids (n01440764 ...), get the names of ImageNet's classes, and the
    note says so.
    """
    if path is not None:
        return read_labels(path), None
    names = {int(key): name for key, name in (config["features"]["class_names"] or {}).items()}
    ids = list(names.values())
    are_imagenet = len(ids) == 1000 and (ids[0], ids[-1]) == IMAGENET_IDS and ids == sorted(ids)
    if config["model"]["num_classes"] == 1000 and (not names or are_imagenet):
        return read_labels(IMAGENET_LABELS), "the class names are ImageNet's; --id2label FILE for others"
    return names, None


def find_labels(path, config):
    """Returns `({id: label} or None, note or None)` with a label for every class, as a pipeline folder needs them."""
    labels, note = weights_labels(path, config)
    if path is not None:
        return labels, None
    num_classes = config["model"]["num_classes"]
    if not labels:
        return None, f"No --id2label: the classes are named '0' to '{num_classes - 1}'."
    taken = set(labels.values())
    missing = {i: f"class {i}" if str(i) in taken else str(i) for i in range(num_classes)}
    return {**missing, **labels}, note


def find_class(text, labels, num_classes, flag="--classes"):
    """Returns the id of the class that a user means, of `{id: label}`, which may be empty.

    `text` is a label or one of its comma-separated names, an id, or a part of one class's label, tried in this order.
    No such class, or several, which are listed, are a `ValueError` of one line, which names the `flag`.
    """
    lower, is_id = text.strip().lower(), re.fullmatch(r"\d+", text)
    tests = (
        lambda label: text == label,
        lambda label: text in _names(label),
        lambda label: lower in _names(label.lower()),
        lambda label: lower and not is_id and lower in label.lower(),
    )
    found = next(filter(None, ([i for i, label in labels.items() if test(label)] for test in tests)), [])
    if not found and is_id:
        return _check_id(int(text), num_classes, flag)
    if not found:
        known = f" or a name such as {listed(sorted(labels.values()), MAX_LISTED)}" if labels else ""
        raise ValueError(f"{flag} {text}: no such class; expected an id 0..{num_classes - 1}{known}")
    if len(found) > 1:
        meant = listed([f"{i} ({labels[i]})" for i in found], MAX_LISTED)
        raise ValueError(f"{flag} {text}: could be any of {len(found)} classes; give an id: {meant}")
    if found[0] >= num_classes:
        raise ValueError(f"{flag} {text}: is class {found[0]} of the labels; the classes are 0..{num_classes - 1}")
    return found[0]


def _check_id(value, num_classes, flag="--classes"):
    if not 0 <= int(value) < num_classes:
        raise ValueError(f"{flag} {value}: the classes are 0..{num_classes - 1}")
    return int(value)


def _names(label):
    return [name.strip() for name in label.split(",")]


def find_classes(wanted, labels, num_classes, flag="--classes"):
    """Returns the ids of classes: of ids or what `find_class` takes, which also says what it raises.

    None stands for the golden retriever, or the first ten classes where there is none.
    """
    if wanted is None or not len(wanted):
        if not any(DEFAULT_CLASS in _names(label) for label in labels.values()):
            return list(range(min(num_classes, 10)))
        wanted = [DEFAULT_CLASS]
    return [
        find_class(one, labels, num_classes, flag) if isinstance(one, str) else _check_id(one, num_classes, flag)
        for one in wanted
    ]
