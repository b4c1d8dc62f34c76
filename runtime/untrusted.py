"""Opens files that others made, without trusting them: JSON, paths in a folder. Standard library only."""

import json
import math
import os
import stat
from pathlib import Path

MAX_JSON_BYTES = 1 << 22  # in memory it can be 30 times as large
MAX_JSON_DEPTH = 64
MAX_INTEGER = 1 << 64
MAX_LAYERS, MAX_POSITIONS = 1000, 1 << 28  # of a network
MAX_SIZE = 1_000_000  # of any other number
MAX_BLOCKS, MAX_BLOCK_LAYERS = 32, 100  # entries of a list, such as a VAE's blocks, and the layers of each
LONG_LISTS = ("trained_betas", "latents_mean", "latents_std")  # by timestep or latent channel


def shortened(value, limit=80):
    """Returns a value out of a file as text for a message: one line, no control characters, `limit` letters at most."""
    text = str(value)[: limit + 1]
    text = text if text.isprintable() else text.encode("unicode_escape").decode()
    return text if len(text) <= limit else text[:limit] + "..."


def listed(names, limit=3):
    """Returns the first of some names as text, each short and on one line."""
    return ", ".join(map(shortened, names[:limit])) + (", ..." if len(names) > limit else "")


def open_regular(path):
    """Opens a regular file to read bytes; ValueError for a folder, a pipe or a device, which may never end."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a NUL, or half a surrogate pair
        raise ValueError(f"{shortened(path, 500)}: no file can have this name") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path}: is a folder, expected a file")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is no regular file but a pipe or device")
    return open(path, "rb")


def inside(folder, name):
    """Returns the path of `name` in a folder that somebody else may have made; a link in it may not lead out.

    The folder itself may be a link. In a snapshot of the Hugging Face cache, `NAME/snapshots/REVISION/`, the files are
    links to `NAME/blobs/`, which is taken for a part of it. Raises ValueError for a path that leaves the folder.
    """
    path = os.path.join(folder, name)
    try:
        root, found = os.path.realpath(folder), os.path.realpath(path)
    except ValueError:  # a NUL, or half a surrogate pair
        raise ValueError(f"{shortened(path, 500)}: no file can have this name") from None
    allowed = [root, *(str(above.parent / "blobs") for above in Path(root).parents if above.name == "snapshots")]
    if not any(os.path.commonpath([found, place]) == place for place in allowed):
        shown = shortened(path, 500)
        raise ValueError(f"{shown}: leads out of the folder, to {shortened(found, 500)}; put the file itself there")
    return path


def parse_json(text, *, infinity=False):
    """Returns the value of a JSON text, str or bytes; integers beyond 64 bits are floats.

    Raises ValueError, one line without a file's name: broken, nested more than `MAX_JSON_DEPTH` deep, a key that is
    there twice, `NaN` or `Infinity`, which Python writes (accepted with `infinity`).
    """
    try:
        hooks = {"object_pairs_hook": _unique, "parse_int": _integer, "parse_float": _finite}
        value = json.loads(text, parse_constant=float if infinity else _finite, **hooks)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep") from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [node for node in level if isinstance(node, (dict, list))]
        if not level:
            return value
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep")


def _unique(pairs):
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]!r} is there twice")
        found[key] = value
    return found


def _integer(digits):
    return int(digits) if len(digits) <= 21 and abs(int(digits)) < MAX_INTEGER else _finite(digits)


def _finite(digits):
    value = float(digits)
    if not math.isfinite(value):
        named = digits.strip("-").isalpha()  # NaN, Infinity
        raise ValueError(f"{digits} is no JSON value" if named else f"the number {shortened(digits, 20)} is too large")
    return value


def read_json(path, *, infinity=False):
    """Reads a JSON file; raises `ValueError`, one line that names the file and what is wrong; see `parse_json`."""
    try:
        with open_regular(path) as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: has more than {MAX_JSON_BYTES >> 20} MiB, too much for a JSON file of settings")
    try:
        return parse_json(text, infinity=infinity)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_json_object(path, **options):
    """Reads the object in a JSON file; raises as `read_json`, which takes the options, and for any other value."""
    value = read_json(path, **options)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def check_sizes(settings, where):
    """Raises ValueError, before memory is taken, for sizes among settings that no network or scheduler has."""
    for key, value in settings.items():
        shown = f"{where}: {shortened(key)} is {shortened(value, 40)}"
        if isinstance(value, list) and len(value) > MAX_BLOCKS and key not in LONG_LISTS:
            raise ValueError(f"{shown}, {len(value):,} values, which is more than any network has")
        limit = MAX_BLOCK_LAYERS if "layers_per" in key else MAX_LAYERS if "layers" in key else MAX_SIZE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and limit < abs(number) < math.inf:
                raise ValueError(f"{shown}, which is more than any network has")
    names = ("sample_size", "patch_size", "num_attention_heads", "attention_head_dim")
    given = [settings[name] if isinstance(settings.get(name), int) else 1 for name in names]
    size, patch, heads, head_dim = (max(1, number) for number in given)
    tokens, width = max(1, size // patch) ** 2, heads * head_dim
    if "patch_size" in settings and tokens * width > MAX_POSITIONS:  # numbers of the table of positions
        made = f"{', '.join(names)} make {tokens:,} tokens of width {width:,}"
        raise ValueError(f"{where}: {made}, which is more than any network has")
