"""Weight files: read without trusting them, and written. Neither PyTorch nor Paddle is imported.

PyTorch's (the zip format of `torch.save` and the older one before it), Paddle's and safetensors are told apart by their
content, not by their name. What a file states of lengths and shapes is compared with its size before memory is taken.
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
from safetensors import safe_open

from models.state import is_state, plain_names
from runtime.process import launched_rank
from runtime.untrusted import listed, open_regular, shortened
from weights import rope_tables
from weights.records import Records, contiguous_stride, elements, read_elements, widened
from weights.unpickle import STORAGE_TYPES, Refused, Unpickler

_SAFETENSORS_TYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bfloat16", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a torch file older than the zip format

# ---- Reading ----


def safe_load(path, *, tolerant=False, only=None, shapes_only=False, wanted=None):
    """Reads a `.pt`/`.pth`, `.pdparams`/`.pdopt` or `.safetensors` file; nothing in it is executed.

    Returns its nested dict / list / tuple / numbers / str / None, with every tensor as a numpy array of its own shape.
    bfloat16 becomes float32; an `argparse.Namespace` becomes a dict. Paddle's name table is left out. With `tolerant`
    an entry of the file's dict that holds anything else becomes the exception that says so (`readable`).

    Of a `.pt` file the entries of its dict can be read one by one: `only` names the one that is wanted. With
    `shapes_only` the arrays of a `.pt` or `.safetensors` file have their shapes alone, no numbers: they take no memory.
    With `wanted`, a function of a name, every other named tensor of a PyTorch or safetensors file becomes an empty
    array; its data are not read, as far as the format allows.

    Raises ValueError, one line that names the file: absent, truncated, of no known format, or asking for an import
    outside the short list that weights need.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise ValueError(f"{path}: there is no such file")
    file = open_regular(path)
    try:
        with file:
            start = file.read(16)
            file.seek(0)
            if start.startswith(b"PK"):
                return _read_torch_zip(file, tolerant, only, shapes_only, wanted)
            if start[8:9] == b"{" and start[5:8] == b"\0\0\0":
                return _read_safetensors(path, file, shapes_only, wanted)
            if start[:1] in (b"\x80", b"(", b"}", b"]", b"c"):  # protocols 0 and 1 have no mark of their own
                return _read_pickle(file, tolerant, wanted)
    except Exception as error:  # whatever a broken or hostile file makes the parsers say
        raise _one_line(path, error) from None
    raise ValueError(f"{path}: not a weight file (expected .pt/.pth, .pdparams or .safetensors content)")


def readable(tree, name, path):
    """Returns the entry `name` of what `safe_load(path, tolerant=True)` gave; ValueError if it can't be read."""
    if isinstance(tree[name], Exception):
        raise _one_line(path, tree[name])
    return tree[name]


def _one_line(path, error):
    """Returns the `ValueError` for what a reader says of a file."""
    if isinstance(error, Refused):
        return ValueError(f"{path}: refused: {error}")
    if isinstance(error, OSError):
        return ValueError(f"{path}: cannot be read: {error.strerror or error}")
    reason = shortened(str(error) or type(error).__name__, 200)
    return ValueError(f"{path}: not a readable weight file, or truncated ({reason})")


def _read_torch_zip(file, tolerant, only, shapes_only, wanted):
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file without PyTorch's data.pkl")
        members = _Members(archive, pickles[0][: -len("data.pkl")], _size(file))
        program = Unpickler(io.BytesIO(members.bytes("data.pkl")))
        tree, storages = program.load(), _Storages(members, program.storages)
        if shapes_only:
            storages = {key: _without_numbers(*storage) for key, storage in program.storages.items()}
        if only is not None and isinstance(tree, dict):
            tree = {name: value for name, value in tree.items() if name == only}
        return Records(_size(file), storages, wanted).read(tree, tolerant)


class _Members:
    """The members of a torch file; PyTorch stores them as they are.

    Several of them in one place would make much of a small file.
    """

    def __init__(self, archive, prefix, size):
        self.archive, self.prefix, self.left = archive, prefix, size
        name = f"{prefix}byteorder"
        self.big_endian = name in archive.NameToInfo and self.bytes("byteorder").strip() == b"big"

    def bytes(self, name):
        record = self.archive.getinfo(self.prefix + name)
        self.left -= record.file_size
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size or self.left < 0:
            raise ValueError(f"{record.filename} is compressed or overlaps others, which PyTorch's never do")
        return self.archive.read(record)


class _Storages(dict):
    """The storages of a torch file, each of which is read when it is wanted: `{key: (elements, dtype)}`."""

    def __init__(self, members, described):
        super().__init__()
        self.members, self.described = members, described

    def __missing__(self, key):
        dtype, numel = self.described[key]
        self[key] = elements(self.members.bytes(f"data/{key}"), dtype, self.members.big_endian), dtype
        if len(self[key][0]) != numel:
            raise ValueError(f"data/{key} is not {numel} elements of one type")
        return self[key]


def _without_numbers(dtype, numel):
    """Returns what stands for a storage where shapes alone are wanted."""
    dtype = "f4" if dtype == "bfloat16" else dtype
    return np.broadcast_to(np.zeros(1, dtype), numel), dtype


def _read_pickle(file, tolerant, wanted):
    """Reads Paddle's pickle, or torch's of before zip: magic number, version, system, object, storages, their data."""
    program, storages = Unpickler(file), None
    tree = program.load()
    if tree == _LEGACY_MAGIC:
        Unpickler(file).load()  # protocol version
        big_endian = not Unpickler(file).load().get("little_endian", True)
        program, storages = Unpickler(file), {}
        tree = program.load()
        for key in Unpickler(file).load():
            if not isinstance(key, str) or key not in program.storages:  # how long it is can't be told
                raise Refused("it has a storage of a type that weights don't have")
            dtype, numel = program.storages[key]
            if struct.unpack("<q", file.read(8)) != (numel,) or key in storages:
                raise ValueError(f"its storage {shortened(key)} is not of the stated size")
            storages[key] = read_elements(file, numel, dtype, big_endian), dtype
    tree = Records(_size(file), storages, wanted).read(tree, tolerant)
    if storages is None and isinstance(tree, dict):
        tree.pop("StructuredToParameterName@@", None)
        if file.read(1) == b"\x80":  # what `save_pdparams` writes behind it
            file.seek(-1, os.SEEK_CUR)
            more = Records(_size(file), None).read(Unpickler(file).load(), tolerant)
            tree.update({name: more[name] for name in rope_tables.NAMES if name in more})
    return tree


def _read_safetensors(path, file, shapes_only, wanted):
    """Lets the official package check the header, and reads the data, as the package has no bfloat16 for numpy.

    Each tensor gets memory of its own, which can be given back.
    """
    with safe_open(path, framework="np") as header:
        is_paddle = _is_paddle(header)
        entries = [(name, header.get_slice(name)) for name in header.offset_keys()]
        entries = [(name, entry.get_dtype(), entry.get_shape()) for name, entry in entries]
    state = {}
    (length,) = struct.unpack("<Q", file.read(8))
    file.seek(8 + length)
    for name, code, shape in entries:
        if code not in _SAFETENSORS_TYPES:
            raise ValueError(f"{name[:80]!r} is of type {code}")
        # Paddle's arrays have no type for bfloat16, so that ppdiffusers writes it as uint16.
        dtype = "bfloat16" if is_paddle and code == "U16" else _SAFETENSORS_TYPES[code]
        if shapes_only:
            state[name] = np.broadcast_to(np.zeros(1, "f4"), shape)
            continue
        if wanted is not None and not wanted(name):
            file.seek(math.prod(shape) * np.dtype("u2" if dtype == "bfloat16" else dtype).itemsize, os.SEEK_CUR)
            state[name] = np.zeros(0, "f4")
            continue
        state[name] = widened(read_elements(file, math.prod(shape), dtype).reshape(shape), dtype)
    return state


def safetensors_places(path):
    """Returns `{name: (type, shape, place)}` of a safetensors file: numpy's type, or "bfloat16", and where it begins.

    The header is compared with the file's size; the data are not read. Raises as `safe_load`.
    """
    try:
        with open_regular(path) as file, safe_open(path, framework="np") as header:
            found, place = {}, 8 + struct.unpack("<Q", file.read(8))[0]
            for name in header.offset_keys():  # one behind the other, without a gap
                entry = header.get_slice(name)
                if entry.get_dtype() not in _SAFETENSORS_TYPES:
                    raise ValueError(f"{name[:80]!r} is of type {entry.get_dtype()}")
                dtype, shape = _SAFETENSORS_TYPES[entry.get_dtype()], tuple(entry.get_shape())
                found[name] = dtype, shape, place
                place += math.prod(shape) * np.dtype("u2" if dtype == "bfloat16" else dtype).itemsize
        return found
    except Exception as error:  # whatever a broken or hostile file makes the package say
        raise _one_line(path, error) from None


def safetensors_layout(path):
    """Returns how a safetensors file stores Linear weights, "paddle" or "torch", by its metadata.

    ppdiffusers and paddlenlp write `format` "pd" or "np" for Paddle's layout; "pt", or nothing, is PyTorch's.
    """
    try:
        open_regular(path).close()  # no pipe, which the package would wait for
        with safe_open(path, framework="np") as header:
            return "paddle" if _is_paddle(header) else "torch"
    except Exception as error:
        raise _one_line(path, error) from None


def _size(file):
    return os.fstat(file.fileno()).st_size


def _is_paddle(header):
    return (header.metadata() or {}).get("format") in ("pd", "np")


# ---- Which weights of a file ----

# How a checkpoint's sets of weights are named, where a key names averages, and where none does, the likeliest first.
_AVERAGES = re.compile(r"(^|[^a-z])(ema|averages?|shadow)([^a-z]|$)", re.IGNORECASE)
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "network", "net", "params")


def load_weights(path, key=None, wanted=None):
    """Reads one model's weights, {name: array}, in the layout that the file has (see `official_to_paddle`).

    What else the file holds, such as settings, may be of any type: it is left out, and nothing of it is run. What
    wrappers put before the names is taken off, see `plain_names`.

    `key` tells which weights of a checkpoint that holds several, such as "model" or "ema" of the official train.py.
    "auto" takes the averages where a key names them, such as "ema" or "state_dict_ema", else "model", "state_dict" and
    the like, else the file's only state dict. None expects a plain state dict. Tensors that are not `wanted` are empty
    arrays, see `safe_load`.

    Raises ValueError, one line with the path: unreadable (see `safe_load`), no such key, or not a state dict.
    """
    if _is_zip(path):  # of which no more is read than is wanted
        _, key = pick_weights(safe_load(path, tolerant=True, shapes_only=True), path, key)
    return pick_weights(safe_load(path, tolerant=True, only=key, wanted=wanted), path, key)[0]


def load_shapes(path, key=None):
    """Returns `{name: shape}` of the weights that `load_weights` would read; fast for a `.pt` or `.safetensors`."""
    state, _ = pick_weights(safe_load(path, tolerant=True, shapes_only=True), path, key)
    return {name: value.shape for name, value in state.items()}


def _is_zip(path):
    if not os.path.isfile(path):
        return False  # `safe_load` says what it is
    with open_regular(path) as file:
        return file.read(2) == b"PK"


def pick_weights(tree, path, key=None, *, averages=True):
    """Picks `(weights, key)`, as `load_weights` does, out of what `safe_load(path, tolerant=True)` gave.

    Rank 0 prints which were taken, where that is not obvious. The key is None for a plain state dict. Without
    `averages` "auto" leaves averages out.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, expected weights by name")
    nested = [name for name, value in tree.items() if is_state(value)]
    known = listed(nested, 10) or "none"
    if key == "auto":
        of_averages = [name for name in nested if is_averages(name)]
        others = [name for name in nested if name not in of_averages]
        choice = of_averages if averages and of_averages else others
        likely = [name for name in ("ema", *_WEIGHTS) if name in choice]
        key = likely[0] if likely else choice[0] if len(choice) == 1 else None
        surprising = len(nested) > 1 and key is not None and set(nested) != {"model", "ema"}
        if surprising and launched_rank()[0] == 0:
            print(f"note: {path} holds the sets of weights {known}; {shortened(key)} is taken")
    if key is not None:
        if key in tree:
            readable(tree, key, path)
        if key not in nested:
            what = "a plain state dict" if is_state(tree) else f"these sets of weights: {known}"
            raise ValueError(f"{path}: has no weights under the key {key!r}; it holds {what}")
        tree = tree[key]
    elif nested:
        raise ValueError(f"{path}: holds several sets of weights; choose a key of: {known}")
    for name in tree:
        readable(tree, name, path)
        if not isinstance(name, str) or not isinstance(tree[name], np.ndarray):
            what = "tensor" if isinstance(name, str) else "name"
            raise ValueError(f"{path}: not a state dict ('{shortened(name)}' is no {what})")
    if not tree:
        raise ValueError(f"{path}: not a state dict (it is empty)")
    return plain_names(tree), key


def is_averages(key):
    """Returns whether a key of a checkpoint names averages of weights, such as "ema" or "state_dict_ema"."""
    return isinstance(key, str) and bool(_AVERAGES.search(key))


# ---- Writing ----


def save_pdparams(state, path):
    """Writes {name: array} as a `.pdparams` that `paddle.load` reads as tensors; {name: {key: array}} stay arrays.

    `paddle.save` of tensors holds every weight four times at its peak; this holds one more tensor than `state`. Arrays
    of uint16 are read as bfloat16. `path` may be a binary file that is open for writing.

    Tables of rotary positions (`rope_tables`) are no parameters of a network here. They stand in a second pickle behind
    the first, which `safe_load` reads and `paddle.load` does not.
    """
    tables = {name: state[name] for name in rope_tables.NAMES if name in state}
    parameters = {name: value for name, value in state.items() if name not in tables}

    def entry(name, value):
        if isinstance(value, dict):
            return {key: np.asarray(array, order="C") for key, array in value.items()}
        return name, np.asarray(value, order="C")

    with contextlib.nullcontext(path) if hasattr(path, "write") else open(path, "wb") as file:
        for part in (parameters, tables) if tables else (parameters,):
            pickler = pickle.Pickler(file, protocol=4)
            pickler.fast = True  # no memo, which would keep the bytes of every tensor written so far
            pickler.dump({name: entry(name, value) for name, value in part.items()})


class ParameterWriter:
    """Writes a `.pdparams` as `save_pdparams` does, tensor by tensor: `add` each of them to a binary file, `finish`."""

    def __init__(self, file):
        self.file = file
        file.write(pickle.PROTO + b"\x03" + pickle.EMPTY_DICT)  # protocol 4 would have frames

    def add(self, name, value):
        """Writes one tensor, float32 or another type of numpy's."""
        for part in (name, (name, np.asarray(value, order="C"))):
            pickler = pickle.Pickler(self.file, protocol=3)
            pickler.fast = True  # no memo, whose numbers would begin anew in each part
            pickler.dump(part)
            self.file.seek(-len(pickle.STOP), os.SEEK_CUR)
        self.file.write(pickle.SETITEM)

    def finish(self):
        """Ends the dict; the file stays open."""
        self.file.write(pickle.STOP)


def save_safetensors(state, path, *, layout="paddle"):
    """Writes {name: array} as safetensors, which hold nothing but tensors; arrays of uint16 as bfloat16.

    The package's own writer wants the bytes of all tensors at once; this holds one tensor more than `state`. The layout
    of Linear weights, "paddle" or "torch", is noted for ppdiffusers and `safetensors_layout`. `path` may be a binary
    file that is open for writing.
    """
    names = {np.dtype(code): name for name, code in _SAFETENSORS_TYPES.items() if code != "bfloat16"}
    names[np.dtype("u2")] = "BF16"
    header, place = {"__metadata__": {"format": "pd" if layout == "paddle" else "pt"}}, 0
    for name, value in state.items():
        dtype = _type_name(names, name, value, path)
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [place, place + value.nbytes]}
        place += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with contextlib.nullcontext(path) if hasattr(path, "write") else open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in state.values():
            file.write(_little_endian(value))


def save_torch(state, path):
    """Writes {name: array} as a PyTorch file that `torch.load(path, weights_only=True)` reads as an OrderedDict.

    The zip format of `torch.save`: data.pkl describes each tensor by (storage, offset, size, stride), data/N holds
    its bytes. Arrays must be of a type that torch has.
    """
    classes = {np.dtype(code): name for name, code in STORAGE_TYPES.items() if code != "bfloat16"}
    tensors = [(name, value.shape, _type_name(classes, name, value, path)) for name, value in state.items()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _torch_pickle(tensors))
        archive.writestr("archive/byteorder", "little")
        for index, value in enumerate(state.values()):
            with archive.open(f"archive/data/{index}", "w", force_zip64=True) as record:
                record.write(_little_endian(value))
        archive.writestr("archive/version", "3\n")


def _type_name(names, name, value, path):
    """Returns the name that a file has for the type of an array; ValueError if it has none."""
    dtype = names.get(value.dtype.newbyteorder("="))
    if dtype is None:
        raise ValueError(f"{path}: {name} is of type {value.dtype}, which cannot be written")
    return dtype


def _little_endian(value):
    return np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(-1).view("u1")


def _torch_pickle(tensors):
    """Returns the pickle of OrderedDict(name -> _rebuild_tensor_v2(...)) of tensors `(name, shape, storage class)`."""

    def plain(value):
        return pickle.dumps(value, protocol=2)[2:-1]  # without its first and last operations, PROTO and STOP

    empty_dict, zero = b"ccollections\nOrderedDict\n)R", b"J\0\0\0\0"
    parts = [b"\x80\x02", empty_dict, b"("]
    for index, (name, shape, storage_class) in enumerate(tensors):
        storage = plain("storage") + f"ctorch\n{storage_class}\n".encode() + plain(str(index)) + plain("cpu")
        storage = b"(" + storage + plain(math.prod(shape)) + b"tQ"
        view = zero + plain(tuple(shape)) + plain(contiguous_stride(shape))
        parts += [plain(name), b"ctorch._utils\n_rebuild_tensor_v2\n(", storage, view, b"\x89", empty_dict, b"tR"]
    return b"".join(parts) + b"u."
