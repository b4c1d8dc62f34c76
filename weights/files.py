"""Weight files: read without trusting them, write, and translate between the PyTorch and the Paddle layout.

Three kinds of file are read, told apart by their content, not by their name:

* PyTorch checkpoints (``.pt``, ``.pth``, ``.bin``): the zip format of ``torch.save`` and the older one before it,
* Paddle pickles (``.pdparams``, ``.pdopt``), as ``paddle.save`` writes them,
* ``.safetensors``.

The first two are pickles, and a pickle may call any function of the machine that opens it. Here it can't: see
``weights.unpickle``. What a file states of lengths and shapes is compared with its size before memory is taken for it.
Neither PyTorch nor Paddle is imported.
"""

import contextlib
import io
import json
import math
import os
import pickle
import re
import struct
import zipfile

import numpy as np

from models.state import _first, is_state, plain_names
from runtime.untrusted import open_regular, parse_json, shortened
from weights.unpickle import (
    MAX_DEPTH,
    MAX_OPERATIONS,
    STORAGE_TYPES,
    Array,
    Blob,
    Budget,
    Namespace,
    Placeholder,
    Refused,
    Storage,
    Tensor,
    Unpickler,
    checked_shape,
    file_size,
    read_array,
)

_SAFETENSORS_TYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bfloat16", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_PADDLE_FORMATS = ("pd", "np")  # what ppdiffusers and paddlenlp write into the metadata of safetensors
_MAX_HEADER = 1 << 24  # of a safetensors file: some 100,000 tensors
_MAX_DIRECTORY = 1 << 23  # of a zip file: some 100,000 tensors
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a torch file older than the zip format
_PARTS = "UnpackBigParamInfor@@"  # in a paddle.save file: which parameters are split, and into what

# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def safe_load(path, *, tolerant=False):
    """Read a ``.pt``/``.pth``, ``.pdparams``/``.pdopt`` or ``.safetensors`` file; nothing in it is executed.

    Args:
        path: the file.
        tolerant: an entry of the file's dict that holds anything else becomes a ``Placeholder``, and is no error.

    Returns:
        The file's nested dict / list / tuple / set / numbers / str / None, with every tensor as a numpy array of its
        own shape (strides and offsets resolved). bfloat16 becomes float32; an ``argparse.Namespace`` becomes a dict.
        Paddle's own name table is left out, as ``paddle.load`` does.

    Raises:
        ValueError: one line that names the file: absent, truncated, of no known format, or asking for an import
            outside the short list that weights need, where it is not in an entry of a ``tolerant`` reading.
    """
    path = os.fspath(path)
    if os.path.isdir(path) or not os.path.exists(path):
        what = "is a folder, expected a weight file" if os.path.isdir(path) else "there is no such file"
        raise ValueError(f"{path}: {what}")
    return _opened(path, lambda file: _read(file, tolerant))


def _opened(path, read):
    """`read(file)` of a weight file that is opened for it; ValueError with one line for whatever it raises."""
    try:
        file = open_regular(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        with file:
            return read(file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except NotImplementedError as error:  # of no known format, or a zip file with what PyTorch never uses
        raise ValueError(f"{path}: not a weight file ({shortened(error, 200)})") from None
    except Exception as error:  # whatever a broken or hostile file makes the parsers say
        raise _one_line(path, error) from None


def readable(tree, name, path):
    """Returns the entry `name` of what `safe_load(path, tolerant=True)` gave; ValueError if it can't be read."""
    if isinstance(tree[name], Placeholder):
        raise _one_line(path, tree[name].error())
    return tree[name]


def _one_line(path, error):
    """The `ValueError` for what a reader or a `Placeholder` says of a file."""
    if isinstance(error, Refused):
        return ValueError(f"{path}: refused: {error}")
    reason = shortened(str(error) or type(error).__name__, 200)
    return ValueError(f"{path}: not a readable weight file, or truncated ({reason})")


def _read(file, tolerant):
    start = file.read(16)
    file.seek(0)
    if start.startswith(b"PK"):
        return _read_torch_zip(file, tolerant)
    if len(start) > 8 and start[8:9] == b"{" and start[5:8] == b"\0\0\0":
        return _read_safetensors(file)
    if start[:1] == b"\x80" or start[:1] in b"(}]c" and start:  # protocols 0 and 1 have no mark of their own
        return _read_pickle(file, tolerant)
    raise NotImplementedError("expected .pt/.pth, .pdparams or .safetensors content")


def _read_torch_zip(file, tolerant):
    size = file_size(file)
    limited = _ZipFile(file)
    with zipfile.ZipFile(limited) as archive:
        limited.limit = None
        pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file without PyTorch's data.pkl")
        prefix = pickles[0][: -len("data.pkl")]
        left = size

        def member(name):
            # PyTorch stores its members as they are; several of them in one place would make much of a small file.
            nonlocal left
            record = archive.getinfo(prefix + name)
            left -= record.file_size
            if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size or left < 0:
                raise ValueError(f"{record.filename} is compressed or overlaps others, which PyTorch's never do")
            with archive.open(record) as data:
                return read_array(data, record.file_size)

        big = f"{prefix}byteorder" in archive.NameToInfo and member("byteorder").tobytes().strip() == b"big"
        storages = {}

        def storage(key, dtype, numel):
            if key not in storages:
                stated = archive.getinfo(f"{prefix}data/{key}").file_size
                if stated != numel * _itemsize(dtype):
                    raise ValueError(f"data/{key} has {stated} bytes for {numel} elements")
                storages[key] = Storage(dtype, numel, _native(member(f"data/{key}"), dtype, big))
            elif (storages[key].dtype, storages[key].numel) != (dtype, numel):
                raise ValueError(f"data/{key} is used as two different types")
            return storages[key]

        program = member("data.pkl").data
        budget = Budget(size)
        tree = Unpickler(io.BytesIO(program), len(program), budget, storage).load()
        return _plain(tree, budget, tolerant=tolerant)


class _ZipFile:
    """A file whose reads are limited while `zipfile` takes in the whole directory of it, as long as that says it is."""

    def __init__(self, file):
        self.file, self.limit = file, _MAX_DIRECTORY
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count=-1):
        if self.limit is not None and count > self.limit:
            raise ValueError(f"a directory of {count:,} bytes")
        return self.file.read(count)


def _read_pickle(file, tolerant):
    """Paddle's pickle, or the torch format before zip: pickles of magic, version, system, object, keys; then data."""
    size = file_size(file)
    budget = Budget(size)

    def load(storage=None):
        return Unpickler(file, size, budget, storage).load()

    first = load()
    if first != _LEGACY_MAGIC:
        return _paddle_tree(_plain(first, budget, paddle=True, tolerant=tolerant), budget)
    load()  # protocol version
    big = not load().get("little_endian", True)
    storages = {}

    def storage(key, dtype, numel):
        return storages.setdefault(key, Storage(dtype, numel))

    tree = load(storage)
    keys = load()
    if not isinstance(keys, list) or not all(isinstance(key, (str, int)) for key in keys):
        raise ValueError("it has no list of its storages")
    for key in keys:
        if str(key) not in storages:  # how long it is can't be told
            raise Refused("it has a storage of a type that weights don't have")
        item = storages[str(key)]
        (numel,) = struct.unpack("<q", file.read(8))
        length = item.numel * _itemsize(item.dtype)
        if numel != item.numel or length > size - file.tell() or item.data is not None:
            raise ValueError("its data end early")
        item.data = _native(read_array(file, length), item.dtype, big)
    return _plain(tree, budget, tolerant=tolerant)


def _safetensors_header(file):
    """`(entries by name, metadata)`; `file` then stands where the data begin."""
    size = file_size(file)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(_MAX_HEADER, size - 8):
        raise ValueError(f"its header states {length:,} bytes, the file has {size:,}")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not {name: text}")
    return header, metadata


def _read_safetensors(file):
    """The checks are those of the official reader: no gap, no overlap, nothing behind the last tensor."""
    header, metadata = _safetensors_header(file)
    left = file_size(file) - file.tell()
    # Paddle's arrays have no type for bfloat16, so that ppdiffusers writes it as uint16.
    types = {**_SAFETENSORS_TYPES, "U16": "bfloat16"} if _is_paddles(metadata) else _SAFETENSORS_TYPES
    entries = sorted((_safetensors_entry(*item, types) for item in header.items()), key=lambda entry: entry[1:3])
    place = 0
    for name, start, end, _, _ in entries:
        if start != place:
            raise ValueError(f"the data of {name[:80]!r} overlap others, or leave a gap")
        place = end
    if place != left:
        raise ValueError(f"its tensors take {place:,} bytes, it holds {left:,}")
    state = {}
    for name, start, end, dtype, shape in entries:  # in the order of the file
        state[name] = _widen(_native(read_array(file, end - start), dtype, False).reshape(shape), dtype)
    return {name: state[name] for name in header}


def _safetensors_entry(name, entry, types):
    """`(name, start, end, dtype, shape)`"""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name[:80]!r} has not the keys dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in types:
        raise ValueError(f"{name[:80]!r} is of type {str(dtype)[:20]!r}")
    dtype = types[dtype]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or len(numbers) > 32 or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{what} of {name[:80]!r} is {str(numbers)[:60]}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _itemsize(dtype):
        raise ValueError(f"the data of {name[:80]!r} are not as long as its shape {str(shape)[:60]} needs")
    return name, *offsets, dtype, shape


def safetensors_layout(path):
    """How a safetensors file stores Linear weights, "paddle" or "torch", by its metadata; ValueError as `safe_load`.

    ppdiffusers and paddlenlp write `format` "pd" or "np" for Paddle's layout; "pt", or nothing, is PyTorch's.
    """
    _, metadata = _opened(os.fspath(path), _safetensors_header)
    return "paddle" if _is_paddles(metadata) else "torch"


def _is_paddles(metadata):
    return metadata.get("format") in _PADDLE_FORMATS


def _paddle_tree(tree, budget):
    """What ``paddle.load`` does after unpickling: its name table is left out, split big parameters are joined."""
    if not isinstance(tree, (dict, list, tuple, np.ndarray)):
        raise ValueError(f"it holds a lone {type(tree).__name__}")
    if isinstance(tree, dict):
        tree.pop("StructuredToParameterName@@", None)
        for name, info in tree.pop(_PARTS, {}).items():
            if not all(isinstance(part, str) for part in info["slices"]):
                raise ValueError(f"{_PARTS} does not name the parts of {shortened(name)}")
            parts = [tree.pop(part) for part in info["slices"]]
            budget.take(sum(part.nbytes for part in parts))
            tree[name] = np.concatenate(parts).reshape(checked_shape(info["OriginShape"]))
    return tree


def _plain(tree, budget, paddle=False, tolerant=False):
    """Stand-ins -> numpy arrays and dicts; each object once (tied weights stay one array), cycles refused.

    Args:
        budget: of what is copied.
        paddle: of a paddle.save file: a pair (name, array) is a tensor, and uint16 is bfloat16.
        tolerant: an entry of `tree`, a dict, that can't be converted becomes a `Placeholder`.

    Raises:
        ValueError: also for lists of lists that hold the same one many times: whoever walks through them, as
            `np.asarray` does, would take 2^n steps.
    """
    seen, open_nodes, count = {}, set(), 0

    def visit(node, depth):
        nonlocal count
        if id(node) in seen:
            _, result, size = seen[id(node)]
            grow(size)
            return result
        if id(node) in open_nodes:
            raise ValueError("it contains itself")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        open_nodes.add(id(node))
        before = count
        grow(1)
        result = convert(node, depth + 1)
        open_nodes.discard(id(node))
        seen[id(node)] = (node, result, count - before)  # the node is kept alive, so that its id stays its own
        return result

    def grow(size):
        nonlocal count
        count += size
        if count > MAX_OPERATIONS:
            raise ValueError(f"it has more than {MAX_OPERATIONS:,} values, each counted as often as it is there")

    def convert(node, depth):
        if node is None or isinstance(node, (bool, int, float, str, bytes)):
            return node
        if isinstance(node, Tensor):
            return _tensor(node, budget)
        if isinstance(node, Placeholder):
            raise node.error()
        if isinstance(node, Array):
            if node.placeholder is not None:
                raise node.placeholder.error()
            if node.array is None:
                raise ValueError("an array without its data")
            return _widened(node.array, "bfloat16", budget) if paddle and node.array.dtype == np.uint16 else node.array
        if isinstance(node, Blob):
            budget.take(node.data.nbytes)
            return node.data.tobytes()
        if isinstance(node, Namespace):
            node = node.values
        if isinstance(node, dict):
            return type(node)((visit(name, depth), visit(value, depth)) for name, value in node.items())
        if isinstance(node, (list, tuple, set, frozenset)):
            result = type(node)(visit(value, depth) for value in node)
            if paddle and isinstance(node, tuple) and len(node) == 2:
                return result[1] if isinstance(node[0], str) and isinstance(node[1], Array) else result
            return result
        raise Refused(f"it holds a {getattr(node, 'name', type(node).__name__)}, neither a tensor nor a plain value")

    def visit_entry(node):
        try:
            return visit(node, 1)
        except (Refused, ValueError) as error:
            open_nodes.clear()
            return Placeholder(Refused if isinstance(error, Refused) else ValueError, str(error))

    try:
        if tolerant and isinstance(tree, dict):
            entries = ((name, visit_entry(value)) for name, value in tree.items() if not isinstance(name, Placeholder))
            return type(tree)(entries)
        return visit(tree, 0)
    finally:
        seen.clear()  # `visit` and `convert` hold each other and this: the file's memory would wait for the collector


def _tensor(tensor, budget):
    """The array of a torch tensor: a view of its storage where that lies as it is."""
    storage, size, stride = tensor.storage, tensor.size, tensor.stride
    if storage.data is None:
        raise ValueError("a tensor without its data")
    if 0 in size:
        return np.zeros(size, "f4" if storage.dtype == "bfloat16" else storage.dtype)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if last >= storage.numel:
        raise ValueError(f"a tensor of shape {size} that reaches past the end of its data")
    flat = storage.data[tensor.offset :]
    if stride == _contiguous_stride(size):
        return _widened(flat[: math.prod(size)].reshape(size), storage.dtype, budget)
    budget.take(math.prod(size) * flat.itemsize)
    view = np.lib.stride_tricks.as_strided(flat, size, tuple(s * flat.itemsize for s in stride), writeable=False)
    return _widened(np.array(view, order="C"), storage.dtype, budget)


def _contiguous_stride(size):
    return tuple(math.prod(size[i + 1 :]) for i in range(len(size)))


def _itemsize(dtype):
    return np.dtype("u2" if dtype == "bfloat16" else dtype).itemsize


def _native(data, dtype, big_endian):
    """uint8 bytes as elements of this machine's byte order, `(numel,)`."""
    stored = np.dtype("u2" if dtype == "bfloat16" else dtype).newbyteorder(">" if big_endian else "<")
    return data.view(stored).astype(stored.newbyteorder("="), copy=False)


def _widened(array, dtype, budget):
    if dtype == "bfloat16":
        budget.take(2 * array.nbytes)
    return _widen(array, dtype)


def _widen(array, dtype):
    """bfloat16 is the upper half of a float32."""
    if dtype != "bfloat16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32).reshape(array.shape)


# How a checkpoint's sets of weights are named, where a key names averages, and where none does, the likeliest first.
_AVERAGES = re.compile(r"(^|[^a-z])(ema|averages?|shadow)([^a-z]|$)", re.IGNORECASE)
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "network", "net", "params")


def load_weights(path, key=None):
    """Read one model's weights, {name: array}, in the layout that the file has (see ``official_to_paddle``).

    Args:
        path: a file as for ``safe_load``.
        key: which weights of a checkpoint that holds several, such as "model" or "ema" of the official train.py.
            "auto" takes the averages where a key names them, such as "ema" or "state_dict_ema", else "model",
            "state_dict" and the like, else the file's only state dict. None expects a plain state dict.

    What else the file holds, such as settings, may be of any type: it is left out, and nothing of it is run. What
    wrappers put before the names is taken off, see ``plain_names``.

    Raises:
        ValueError: one line with the path: unreadable (see ``safe_load``), no such key, or not a state dict.
    """
    return pick_weights(safe_load(path, tolerant=True), path, key)[0]


def pick_weights(tree, path, key=None, *, averages=True):
    """Picks one model's weights, as ``load_weights`` does, out of what ``safe_load(path, tolerant=True)`` gave.

    Args:
        averages: False: "auto" leaves averages out.

    Returns:
        ``(weights, key)``; the key is None for a plain state dict.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, expected weights by name")
    nested = [name for name, value in tree.items() if is_state(value)]
    listed = _first(nested, 10) or "none"
    if key == "auto":
        key = _pick_key(nested, averages)
        if len(nested) > 1 and key is not None and set(nested) != {"model", "ema"}:
            print(f"note: {path} holds the sets of weights {listed}; {shortened(key)} is taken")
    if key is not None:
        if key in tree:
            readable(tree, key, path)
        if key not in nested:
            what = "a plain state dict" if is_state(tree) else f"these sets of weights: {listed}"
            raise ValueError(f"{path}: has no weights under the key {key!r}; it holds {what}")
        tree = tree[key]
    elif nested:
        raise ValueError(f"{path}: holds several sets of weights; choose a key of: {listed}")
    if not is_state(tree):
        for name in tree:
            readable(tree, name, path)
        odd = next((n for n, v in tree.items() if not isinstance(n, str) or not isinstance(v, np.ndarray)), None)
        why = f"'{shortened(odd)}' is no {'tensor' if isinstance(odd, str) else 'name'}" if tree else "it is empty"
        raise ValueError(f"{path}: not a state dict ({why})")
    return plain_names(tree), key


def _pick_key(nested, averages):
    """The key of "auto" among those of a file's state dicts, or None if there is no telling."""
    of_averages = [name for name in nested if is_averages(name)]
    others = [name for name in nested if name not in of_averages]
    if averages and of_averages:
        return "ema" if "ema" in of_averages else of_averages[0] if len(of_averages) == 1 else None
    known = [name for name in _WEIGHTS if name in others]
    return known[0] if known else others[0] if len(others) == 1 else None


def is_averages(key):
    """Returns whether a key of a checkpoint names averages of weights, such as "ema" or "state_dict_ema"."""
    return isinstance(key, str) and bool(_AVERAGES.search(key))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def save_pdparams(state, path):
    """Write {name: array} as a `.pdparams` that ``paddle.load`` reads as tensors; {name: {key: array}} stay arrays.

    ``path`` may be a binary file that is open for writing.

    ``paddle.save`` of tensors holds every weight four times at its peak; this holds one more tensor than ``state``.
    Arrays of uint16 are read as bfloat16.
    """

    def entry(name, value):
        if isinstance(value, dict):
            return {key: np.asarray(array, order="C") for key, array in value.items()}
        return name, np.asarray(value, order="C")

    with contextlib.nullcontext(path) if hasattr(path, "write") else open(path, "wb") as file:
        pickler = pickle.Pickler(file, protocol=4)
        pickler.fast = True  # no memo, which would keep the bytes of every tensor written so far
        pickler.dump({name: entry(name, value) for name, value in state.items()})


def save_safetensors(state, path, *, layout="paddle"):
    """Write {name: array} as safetensors, which hold nothing but tensors; arrays of uint16 as bfloat16.

    Args:
        path: the file. layout: of Linear weights, "paddle" or "torch": goes into the metadata, where ppdiffusers and
            `safetensors_layout` look for it.
    """
    names = {np.dtype(code): name for name, code in _SAFETENSORS_TYPES.items() if code != "bfloat16"}
    names[np.dtype("u2")] = "BF16"
    header, place = {"__metadata__": {"format": "pd" if layout == "paddle" else "pt"}}, 0
    for name, value in state.items():
        value = np.asarray(value)
        dtype = names.get(value.dtype.newbyteorder("="))
        if dtype is None:
            raise ValueError(f"{path}: {name} is of type {value.dtype}, which cannot be written")
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [place, place + value.nbytes]}
        place += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in state.values():
            value = np.asarray(value)
            file.write(np.ascontiguousarray(value, value.dtype.newbyteorder("<")).data)


def save_torch(state, path):
    """Write {name: array} as a PyTorch file that ``torch.load(path, weights_only=True)`` reads as an OrderedDict.

    The zip format of ``torch.save``: data.pkl describes each tensor by (storage, offset, size, stride), data/N holds
    its bytes. Arrays must be of a type that torch has; big-endian and strided ones are rewritten plainly.
    """
    classes = {np.dtype(code): name for name, code in STORAGE_TYPES.items() if code != "bfloat16"}
    state = {name: np.asarray(value) for name, value in state.items()}
    for name, value in state.items():
        if value.dtype.newbyteorder("=") not in classes:
            raise ValueError(f"{path}: {name} is of type {value.dtype}, which cannot be written")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        tensors = [(n, v.shape, classes[v.dtype.newbyteorder("=")]) for n, v in state.items()]
        archive.writestr("archive/data.pkl", _torch_pickle(tensors))
        archive.writestr("archive/byteorder", "little")
        for index, value in enumerate(state.values()):
            with archive.open(f"archive/data/{index}", "w", force_zip64=True) as record:
                record.write(np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes())
        archive.writestr("archive/version", "3\n")


def _torch_pickle(tensors):
    """The pickle (protocol 2) of OrderedDict(name -> _rebuild_tensor_v2(...)) for (name, shape, storage class)."""

    def string(text):
        data = text.encode("utf-8")
        return b"X" + struct.pack("<I", len(data)) + data

    def integer(value):
        if value < 2**31:
            return b"J" + struct.pack("<i", value)
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values):
        return b"(" + b"".join(map(integer, values)) + b"t"

    def name_of(module, name):
        return f"c{module}\n{name}\n".encode()

    empty_dict = name_of("collections", "OrderedDict") + b")R"
    parts = [b"\x80\x02", empty_dict, b"("]
    for index, (name, shape, storage_class) in enumerate(tensors):
        numel = math.prod(shape)
        storage = [string("storage"), name_of("torch", storage_class), string(str(index)), string("cpu")]
        storage_id = b"(" + b"".join(storage) + integer(numel) + b"tQ"
        args = [storage_id, integer(0), numbers(shape), numbers(_contiguous_stride(shape)), b"\x89", empty_dict]
        parts += [string(name), name_of("torch._utils", "_rebuild_tensor_v2"), b"(", *args, b"tR"]
    return b"".join(parts) + b"u."
