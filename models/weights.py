"""Weight files: read without trusting them, write, and translate between the PyTorch and the Paddle layout.

Three kinds of file are read, told apart by their content, not by their name:

* PyTorch checkpoints (``.pt``, ``.pth``): the zip format of ``torch.save`` and the older one before it,
* Paddle pickles (``.pdparams``, ``.pdopt``), as ``paddle.save`` writes them,
* ``.safetensors``.

The first two are pickles, and a pickle may call any function of the machine that opens it. Here it can't: only the
handful of names that tensors, numpy arrays and plain containers need are known, each stands for an inert object of
this module, and any other name ends the reading with an error. Neither PyTorch nor Paddle is imported.
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
from collections import OrderedDict

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# What a pickle may hold
# ---------------------------------------------------------------------------------------------------------------------

# torch storage class -> numpy type of one element; bfloat16 is read as its 16 bits and widened later.
_STORAGE_TYPES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_SAFETENSORS_TYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bfloat16", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip

_NUMPY_KINDS = "fiub"  # the numpy dtypes a weight file can need: no objects, no records, no strings
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a torch file older than the zip format


class _Refused(Exception):
    """The file asks for something outside the list above."""


class _Storage:
    """The flat memory behind one or more torch tensors; ``data`` may be filled after unpickling."""

    def __init__(self, dtype, numel, data=None):
        self.dtype, self.numel, self.data = dtype, numel, data


class _Tensor:
    """A view of a storage: element (i, j, ...) lies at offset + i*stride[0] + j*stride[1] + ..."""

    def __init__(self, storage, offset, size, stride):
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)

    def to_numpy(self):
        storage = self.storage
        if not isinstance(storage, _Storage) or storage.data is None:
            raise ValueError("a tensor without its data")
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"a tensor of impossible shape {self.size}, stride {self.stride}")
        if 0 in self.size:
            return np.zeros(self.size, _numpy_dtype(storage.dtype))
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if last >= storage.numel:
            raise ValueError(f"a tensor of shape {self.size} that reaches past the end of its data")
        flat = storage.data[self.offset :]
        if self.stride == _contiguous_stride(self.size):
            return _widen(flat[: math.prod(self.size)].reshape(self.size), storage.dtype)
        strides = tuple(s * flat.itemsize for s in self.stride)
        view = np.lib.stride_tricks.as_strided(flat, self.size, strides, writeable=False)
        return _widen(np.array(view, order="C"), storage.dtype)


def _contiguous_stride(size):
    return tuple(math.prod(size[i + 1 :]) for i in range(len(size)))


class _DType:
    """Stand-in for a pickled numpy dtype: a type code and, from its state, the byte order."""

    def __init__(self, code, align=False, copy=False):
        dtype = np.dtype(code) if isinstance(code, str) else None
        if dtype is None or dtype.kind not in _NUMPY_KINDS:
            raise ValueError(f"an array of type {code!r}")
        self.dtype = dtype

    def __setstate__(self, state):
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "=", "|"):
            raise ValueError(f"an array of byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stand-in for a pickled numpy array: made empty by ``_reconstruct``, filled by its state."""

    def __init__(self, *unused):
        self.array = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        flat = np.frombuffer(data, dtype.dtype)  # (prod(shape),)
        array = flat.reshape(shape, order="F" if fortran else "C")
        self.array = np.array(array, dtype=dtype.dtype.newbyteorder("="), order="C")


class _Namespace:
    """Stand-in for ``argparse.Namespace``; becomes a dict."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise ValueError("a Namespace whose state is no dict")
        self.__dict__ = dict(state)


class _Callable:
    """Stand-in for a function or class named in the pickle. Slots: a pickle cannot hang attributes on it."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)


def _rebuild_tensor(storage, offset, size, stride, *unused):
    return _Tensor(storage, offset, size, stride)


def _numpy_scalar(dtype, data):
    return np.frombuffer(data, dtype.dtype, count=1)[0].astype(dtype.dtype.newbyteorder("=")).item()


def _allowed(module, name):
    """The inert object that stands for ``module.name``, or None where that name has no place in a weight file."""
    if module == "torch" and name in _STORAGE_TYPES:
        return _Callable(name)  # never called: persistent_load looks inside
    if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        return {"_reconstruct": _Callable(_Array), "scalar": _Callable(_numpy_scalar)}.get(name)
    if module in ("builtins", "__builtin__"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset, "list": list, "dict": dict}.get(name)
    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("argparse", "Namespace"): _Namespace,
        ("torch._utils", "_rebuild_tensor_v2"): _Callable(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): _Callable(lambda data, *unused: data),
        ("torch", "Size"): tuple,
        ("numpy", "ndarray"): _Callable(_Array),
        ("numpy", "dtype"): _Callable(_DType),
    }.get((module, name))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, storage=None):
        super().__init__(file, encoding="utf-8")
        self._storage = storage  # (key, dtype, numel) -> _Storage

    def find_class(self, module, name):
        found = _allowed(module, name)
        if found is None:
            raise _Refused(f"it asks to import {module}.{name}, which no weights need; nothing was run")
        return found

    def persistent_load(self, pid):
        # ("storage", storage class, key, device, number of elements[, view of another storage: older files])
        if self._storage is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise _Refused(f"it refers to an outside object {str(pid)[:60]!r}")
        if not isinstance(pid[1], _Callable) or pid[1]._function not in _STORAGE_TYPES:
            raise _Refused(f"it has a storage of unknown type {str(pid[1])[:60]!r}")
        if len(pid) > 5 and pid[5] is not None:
            raise _Refused("it has a storage that is a view of another one: save it with a newer PyTorch")
        return self._storage(str(pid[2]), _STORAGE_TYPES[pid[1]._function], int(pid[4]))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def safe_load(path):
    """Read a ``.pt``/``.pth``, ``.pdparams``/``.pdopt`` or ``.safetensors`` file; nothing in it is executed.

    Returns:
        The file's nested dict / list / tuple / set / numbers / str / None, with every tensor as a numpy array of its
        own shape (strides and offsets resolved). bfloat16 becomes float32; an ``argparse.Namespace`` becomes a dict.
        Paddle's own name table is left out, as ``paddle.load`` does.

    Raises:
        ValueError: one line that names the file: absent, truncated, of no known format, or asking for an import
            outside the short list that weights need.
    """
    path = os.fspath(path)
    if os.path.isdir(path) or not os.path.exists(path):
        what = "is a folder, expected a weight file" if os.path.isdir(path) else "there is no such file"
        raise ValueError(f"{path}: {what}")
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            file.seek(0)
            if start.startswith(b"PK"):
                return _plain(_read_torch_zip(file))
            if len(start) > 8 and start[8:9] == b"{":
                return _read_safetensors(file)
            if start.startswith(b"\x80"):
                return _read_pickle(file)
    except _Refused as error:
        raise ValueError(f"{path}: refused: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever a broken or hostile file makes the parsers say
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable weight file, or truncated ({reason})") from None
    raise ValueError(f"{path}: not a weight file (expected .pt/.pth, .pdparams or .safetensors content)")


def _read_torch_zip(file):
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file without PyTorch's data.pkl")
        prefix = pickles[0][: -len("data.pkl")]
        names = set(archive.namelist())
        big = prefix + "byteorder" in names and archive.read(prefix + "byteorder").strip() == b"big"
        storages = {}

        def storage(key, dtype, numel):
            if key not in storages:
                record = archive.getinfo(f"{prefix}data/{key}")
                if record.file_size != numel * _itemsize(dtype):
                    raise ValueError(f"{record.filename} has {record.file_size} bytes for {numel} elements")
                storages[key] = _Storage(dtype, numel, _flat(archive.read(record), dtype, big))
            elif (storages[key].dtype, storages[key].numel) != (dtype, numel):
                raise ValueError(f"data/{key} is used as two different types")
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(pickles[0])), storage).load()


def _read_pickle(file):
    """Paddle's pickle, or the torch format before zip: pickles of magic, version, system, object, keys; then data."""
    first = _Unpickler(file).load() if file.peek(2)[:1] == b"\x80" else None
    if first != _LEGACY_MAGIC:
        tree = _plain(first)
        return _paddle_tree(tree)
    _Unpickler(file).load()  # protocol version
    big = not _Unpickler(file).load().get("little_endian", True)
    storages = {}

    def storage(key, dtype, numel):
        return storages.setdefault(key, _Storage(dtype, numel))

    tree = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        item = storages[str(key)]
        (numel,) = struct.unpack("<q", file.read(8))
        data = file.read(item.numel * _itemsize(item.dtype))
        if numel != item.numel or len(data) != item.numel * _itemsize(item.dtype):
            raise ValueError("its data ends early")
        item.data = _flat(data, item.dtype, big)
    return _plain(tree)


def _read_safetensors(file):
    (length,) = struct.unpack("<Q", file.read(8))
    size = os.fstat(file.fileno()).st_size
    if length > size - 8:
        raise ValueError("its header ends early")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_TYPES:
            raise ValueError(f"{name} is of type {entry['dtype']}")
        dtype, (start, end) = _SAFETENSORS_TYPES[entry["dtype"]], entry["data_offsets"]
        numel = math.prod(entry["shape"])
        if start < 0 or end - start != numel * _itemsize(dtype) or 8 + length + end > size:
            raise ValueError(f"the data of {name} ends early")
        file.seek(8 + length + start)
        flat = _flat(file.read(end - start), dtype, False)
        state[name] = _widen(flat.reshape(entry["shape"]), dtype)
    return state


def _paddle_tree(tree):
    """What ``paddle.load`` does after unpickling: named tensors, bfloat16 kept as uint16, split big parameters."""
    if not isinstance(tree, (dict, list, tuple, np.ndarray)):
        raise ValueError(f"it holds a lone {type(tree).__name__}")

    def visit(node):
        if isinstance(node, tuple) and len(node) == 2 and isinstance(node[0], str) and isinstance(node[1], np.ndarray):
            node = node[1]  # (name, value): a tensor outside a state dict
        if isinstance(node, np.ndarray):
            return _widen(node, "bfloat16") if node.dtype == np.uint16 else node
        if isinstance(node, dict):
            return type(node)((name, visit(value)) for name, value in node.items())
        return type(node)(visit(value) for value in node) if isinstance(node, (list, tuple)) else node

    tree = visit(tree)
    if isinstance(tree, dict):
        tree.pop("StructuredToParameterName@@", None)
        for name, info in tree.pop("UnpackBigParamInfor@@", {}).items():
            parts = [tree.pop(part) for part in info["slices"]]
            tree[name] = np.concatenate(parts).reshape(info["OriginShape"])
    return tree


def _plain(tree):
    """Stand-ins -> numpy arrays and dicts; each object once (tied weights stay one array), cycles refused."""
    seen, open_nodes = {}, set()

    def visit(node):
        if id(node) in seen:
            return seen[id(node)][1]
        if id(node) in open_nodes:
            raise ValueError("it contains itself")
        open_nodes.add(id(node))
        result = convert(node)
        open_nodes.discard(id(node))
        seen[id(node)] = (node, result)  # the node is kept alive, so that its id stays its own
        return result

    def convert(node):
        if isinstance(node, _Tensor):
            return node.to_numpy()
        if isinstance(node, _Array):
            if node.array is None:
                raise ValueError("an array without its data")
            return node.array
        if isinstance(node, _Namespace):
            node = vars(node)
        if isinstance(node, dict):
            return type(node)((visit(name), visit(value)) for name, value in node.items())
        if isinstance(node, (list, tuple, set, frozenset)):
            return type(node)(visit(value) for value in node)
        if node is None or isinstance(node, (bool, int, float, complex, str, bytes)):
            return node
        raise _Refused(f"it holds a {type(node).__name__}, which is neither a tensor nor a plain value")

    return visit(tree)


def _numpy_dtype(dtype):
    return np.dtype("f4" if dtype == "bfloat16" else dtype)


def _itemsize(dtype):
    return np.dtype("u2" if dtype == "bfloat16" else dtype).itemsize


def _flat(data, dtype, big_endian):
    stored = np.dtype("u2" if dtype == "bfloat16" else dtype).newbyteorder(">" if big_endian else "<")
    # From a bytearray, so that the arrays can be written to.
    return np.frombuffer(bytearray(data), stored).astype(stored.newbyteorder("="), copy=False)  # (numel,)


def _widen(array, dtype):
    """bfloat16 is the upper half of a float32."""
    if dtype != "bfloat16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32).reshape(array.shape)


def load_weights(path, key=None):
    """Read one model's weights, {name: array}, in the layout that the file has (see ``official_to_paddle``).

    Args:
        path: a file as for ``safe_load``.
        key: which weights of a checkpoint that holds several, such as "model" or "ema" of the official train.py.
            "auto" takes "ema" where there is one, else "model", else the file's only state dict. None expects a
            plain state dict.

    A leading "module." (DistributedDataParallel) is taken off.

    Raises:
        ValueError: one line with the path: unreadable (see ``safe_load``), no such key, or not a state dict.
    """
    tree = safe_load(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, expected weights by name")
    nested = [name for name, value in tree.items() if isinstance(value, dict) and _is_state(value)]
    listed = ", ".join(map(str, nested)) or "none"
    if key == "auto":
        key = next((name for name in ("ema", "model") if name in nested), None)
    if key is not None:
        if key not in nested:
            what = "a plain state dict" if _is_state(tree) else f"these sets of weights: {listed}"
            raise ValueError(f"{path}: has no weights under the key {key!r}; it holds {what}")
        tree = tree[key]
    elif nested:
        raise ValueError(f"{path}: holds several sets of weights; choose a key of: {listed}")
    if not _is_state(tree):
        odd = next((name for name, value in tree.items() if not isinstance(value, np.ndarray)), None)
        raise ValueError(f"{path}: not a state dict" + (f" ({odd!r} is no tensor)" if tree else " (it is empty)"))
    if all(name.startswith("module.") for name in tree):
        tree = {name[len("module.") :]: value for name, value in tree.items()}
    return dict(tree)


# Of the official Large-DiT: fairscale's ColumnParallelLinear splits weight and bias by rows of [out, in],
# RowParallelLinear the weight by columns (its bias is whole everywhere), ParallelEmbedding by columns.
_SHARD_AXES = [
    (re.compile(pattern + "$"), axis)
    for pattern, axis in (
        (r"(.*\.)?attention_norm\.weight|(.*\.)?ffn_norm\.weight|t_embedder\.mlp\.2\.bias", None),
        (r"t_embedder\.mlp\.2\.weight|y_embedder\.embedding_table\.weight", 1),
        (r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight", 1),
        (r"layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])\.weight", 0),
        (r"layers\.\d+\.attention\.[qk]_norm\.(weight|bias)", 0),
        (r"(layers\.\d+|final_layer)\.adaLN_modulation\.1\.(weight|bias)", 0),
        (r"(x_embedder|t_embedder\.mlp\.0|final_layer\.linear)\.(weight|bias)", 0),
    )
]


def shard_axis(name):
    """The axis along which the official Large-DiT splits a parameter over tensor-parallel ranks.

    Args:
        name: official name; the axis counts in the official layout, Linear weights [out, in].

    Returns:
        0 or 1, or None for a parameter that every rank holds whole.

    Raises:
        ValueError: no parameter of Large-DiT.
    """
    for pattern, axis in _SHARD_AXES:
        if pattern.match(name):
            return axis
    raise ValueError(f"{name} is no parameter of Large-DiT")


def merge_shards(paths, progress=iter):
    """The weights of tensor-parallel shards as one state, in the official layout.

    One shard is in memory at a time beside the result.

    Args:
        paths: the files of all ranks, in their order.
        progress: `progress(paths)` iterates over them, and may show how far it is.

    Raises:
        ValueError: one line: unreadable, no Large-DiT, or shards that are not those of one network.
    """
    merged, shapes = {}, {}
    for rank, path in enumerate(progress(paths)):
        shard = load_weights(path)
        other = sorted(shard.keys() ^ shapes.keys())
        if rank and other:
            raise ValueError(f"{path}: {other[0]} is in {paths[0]} or here, but not in both")
        for name in list(shard):
            value = shard.pop(name)
            try:
                axis = shard_axis(name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}; only its shards can be merged") from None
            if rank == 0:
                shapes[name] = value.shape
                if axis is not None and value.ndim <= axis:
                    raise ValueError(f"{path}: {name} is {list(value.shape)}, which has no axis {axis} to be split")
                full = [n * len(paths) if i == axis else n for i, n in enumerate(value.shape)]
                merged[name] = value if axis is None else np.empty(full, value.dtype)
            elif value.shape != shapes[name] or value.dtype != merged[name].dtype:
                raise ValueError(
                    f"{path}: {name} is {value.dtype} {list(value.shape)}, in {paths[0]} {merged[name].dtype} "
                    f"{list(shapes[name])}"
                )
            elif axis is None and value.tobytes() != merged[name].tobytes():
                raise ValueError(f"{path}: {name} differs from that in {paths[0]}; every shard must hold the same")
            if axis is not None:
                length = value.shape[axis]
                rows = slice(rank * length, (rank + 1) * length)
                merged[name][rows if axis == 0 else (slice(None), rows)] = value
    return merged


def _is_state(tree):
    return bool(tree) and all(isinstance(n, str) and isinstance(v, np.ndarray) for n, v in tree.items())


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def official_to_paddle(state):
    """Official (PyTorch) layout -> this project's: Linear weights [out, in] -> [in, out]; all else as it is.

    The names are the same on both sides. Convolutions, embedding tables, pos_embed and vectors are not turned.
    """
    return {name: turn_linear(name, value) for name, value in state.items()}


def paddle_to_official(state):
    """The inverse of ``official_to_paddle``, bit for bit (a transpose is its own inverse)."""
    return official_to_paddle(state)


def turn_linear(name, value):
    """A Linear weight [out, in] -> [in, out] or back; any other parameter as it is."""
    linear = value.ndim == 2 and name.endswith("weight") and not name.endswith("embedding_table.weight")
    return np.ascontiguousarray(value.T) if linear else value


def check_state(state, expected_shapes, *, source):
    """Raise ValueError, one line, unless ``state`` has exactly the names and shapes of ``expected_shapes``.

    Args:
        state: {name: array}. expected_shapes: {name: shape}. source: the file, for the message.
    """
    expected = {name: tuple(shape) for name, shape in expected_shapes.items()}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} is {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
    problems = [f"{len(found)} {kind}: {_first(found)}" for kind, found in kinds if found]
    if problems:
        raise ValueError(f"{source}: these weights do not fit the config: " + "; ".join(problems))


def expected_shapes(model_config):
    """{parameter name: shape} of the network that the `model` section of a config describes.

    Only one block is built, since all of them have the same shapes, and no memory is allocated for it.
    """
    import paddle

    from . import build_model

    with paddle.LazyGuard():
        model = build_model({**model_config, "num_layers": 1})
    shapes = {}
    for name, parameter in model.named_parameters():
        stem, dot, rest = name.partition(".0.")
        in_block = dot and stem in ("blocks", "layers")
        names = [f"{stem}.{i}.{rest}" for i in range(model_config["num_layers"])] if in_block else [name]
        shapes.update(dict.fromkeys(names, tuple(parameter.shape)))
    return shapes


def _first(names, limit=3):
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


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


def save_torch(state, path):
    """Write {name: array} as a PyTorch file that ``torch.load(path, weights_only=True)`` reads as an OrderedDict.

    The zip format of ``torch.save``: data.pkl describes each tensor by (storage, offset, size, stride), data/N holds
    its bytes. Arrays must be of a type that torch has; big-endian and strided ones are rewritten plainly.
    """
    classes = {np.dtype(code): name for name, code in _STORAGE_TYPES.items() if code != "bfloat16"}
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
