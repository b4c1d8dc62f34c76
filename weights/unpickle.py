"""Reads a pickle as arrays and plain values: nothing that it names is imported or called.

A pickle is a program of a stack machine, whose GLOBAL imports, and whose REDUCE calls, whatever it names. `run` is such
a machine that imports nothing: it gives a `Name` for an import, and a `Call` for a call of a listed one. `Records`
makes arrays of the calls. Both keep to the memory and time that a file of this size warrants.
"""

import math
import os
import pickletools
import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from runtime.untrusted import shortened

LISTED = {
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict", "numpy.dtype",
    "argparse.Namespace", "_codecs.encode", "builtins.bytes", "__builtin__.bytes", "builtins.tuple",
    "__builtin__.tuple", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
}  # fmt: skip
# torch storage class -> numpy type of one element; bfloat16 is read as its 16 bits and widened later.
STORAGE_TYPES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "bfloat16",
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
MAX_DEPTH = 100  # of containers in containers
_UNUSED = {"DUP", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
_DTYPE = re.compile(r"[<>=|]?(f[248]|[iu][1248]|b1|\?)")  # no objects, records, strings
_PLAIN = (type(None), bool, int, float, str, bytes)


class Refused(Exception):
    """The file asks for something that weights don't need."""


@dataclass(eq=False)
class Name:
    """What a pickle imports. A call of a name that is not listed, such as a path among the settings, is the name."""

    name: str


@dataclass(eq=False)
class Call:
    """A call of a listed name; `state` is what BUILD gives to the object that it would return."""

    name: str
    arguments: tuple
    state: object = None


def run(file):
    """Runs the pickle at which a file, on disk or a BytesIO, stands; the file then stands behind it.

    Returns `(tree, storages)`: plain values, containers, names and calls; `{key: (dtype, numel)}` of the storages that
    torch tensors refer to, each as `Call("storage", (key,))`. Raises `Refused`, or whatever a damaged file makes Python
    say.
    """
    stack, marks, memo, storages, start = [], [], {}, {}, file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(start)
    bounded = SimpleNamespace(tell=file.tell, readline=file.readline)  # memory is taken for what is there alone
    bounded.read = lambda count: file.read(min(count, end - file.tell()))
    for operation, argument, _ in pickletools.genops(bounded):
        name, takes = operation.name, operation.stack_before
        if name in _UNUSED:
            raise Refused(f"it uses the pickle operation {name}, which no weights need; nothing was run")
        if pickletools.markobject in takes:
            first = marks.pop() - takes.index(pickletools.markobject) if marks else -1
        else:
            first = len(stack) - len(takes)
        if first < (marks[-1] if marks else 0):
            raise ValueError(f"its {name} takes more than there is")
        parts = stack[first:]
        del stack[first:]
        if name == "MARK":
            marks.append(len(stack))
        elif operation.stack_after:
            stack.append(memo[argument] if "GET" in name else _result(name, argument, parts, storages))
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
    return parts[0], storages


def _result(name, argument, parts, storages):
    """Returns what an operation leaves on the stack in the place of `parts`."""
    target, *values = parts or [None]
    match name:
        case "MEMOIZE":
            return target
        case "NEWTRUE" | "NEWFALSE":
            return name == "NEWTRUE"
        case "EMPTY_LIST" | "LIST":
            return parts
        case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
            return tuple(parts)
        case "EMPTY_DICT" | "DICT":
            return _with_items({}, parts)
        case "EMPTY_SET" | "FROZENSET":
            return set()  # its members are of no use: weights hold no sets
        case "GLOBAL" | "STACK_GLOBAL":
            return Name(".".join(parts or argument.split(" ")))
        case "BINPERSID":
            return _storage(target, storages)
        case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
            if not isinstance(target, Name) or not isinstance(values[0], tuple):
                raise ValueError(f"'{type(target).__name__}' object is not callable")
            if target.name == "collections.OrderedDict" and not values[0]:
                return {}
            return Call(target.name, values[0]) if target.name in LISTED else target
    if not parts:
        return argument
    match target:
        case list() if name.startswith("APPEND"):
            target.extend(values)
        case dict() if name.startswith("SETITEM"):
            _with_items(target, values)
        case Call() if name == "BUILD":
            target.state = values[0]
        case Name():
            pass
        case set() | dict() if name in ("ADDITEMS", "BUILD"):
            pass  # members of a set, attributes of an OrderedDict
        case _:
            raise ValueError(f"{name} of a {type(target).__name__}")
    return target


def _with_items(target, items):
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key if isinstance(key, _PLAIN) else object()] = value  # because to hash others may take any time
    return target


def _storage(pid, storages):
    # ("storage", storage class, key, device, number of elements[, view of another storage: older files])
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Name):
        raise Refused("it refers to an object outside of the file")
    _, kind, key, _, numel, *view = pid
    dtype = STORAGE_TYPES.get(kind.name.removeprefix("torch."))
    if dtype is None:
        return kind
    if view and view[0] is not None:
        raise Refused("it has a storage that is a view of another one: save it with a newer PyTorch")
    if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 60:
        raise ValueError("a storage of impossible size")
    if storages.setdefault(key, (dtype, numel)) != (dtype, numel):
        raise ValueError(f"its storage {shortened(key)} has two types or sizes")
    return Call("storage", (key,))


class Records:
    """Makes what records stand for; tied weights stay one array.

    Args:
        file_size: bounds what is copied, so that a small file can't ask for much memory.
        storages: `{key: (elements, dtype)}` of a torch file; None: a paddle.save file, in which a pair (name, array)
            is a tensor, and uint16 is bfloat16.
    """

    def __init__(self, file_size, storages=None):
        # `done` is by the id of a node, which holds as long as the tree does: only nodes of it may go to `value`.
        self.left, self.storages, self.done = 4 * file_size + (1 << 26), storages, {}

    def read(self, tree, tolerant):
        """Returns `value(tree)`; where `tolerant`, an entry of a dict that has no value becomes the error."""
        if not tolerant or not isinstance(tree, dict):
            return self.value(tree)
        entries = {}
        for name in filter(lambda name: isinstance(name, _PLAIN), tree):
            try:
                entries[name] = self.value(tree[name], 1)
            except Exception as error:
                entries[name] = error.with_traceback(None)
        return entries

    def value(self, node, depth=0):
        """Returns a tree of arrays, dicts, lists, tuples and plain values; raises for anything else."""
        if isinstance(node, _PLAIN):
            return node
        if id(node) not in self.done:
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            self.done[id(node)] = self._make(node, depth + 1)
        return self.done[id(node)]

    def _make(self, node, depth):
        if isinstance(node, Call):
            return self._called(node, depth)
        if isinstance(node, dict):
            if not all(isinstance(name, _PLAIN) for name in node):
                raise ValueError("a dict with a key that is no plain value")
            return {name: self.value(value, depth) for name, value in node.items()}
        if not isinstance(node, (list, tuple)):
            _refuse(node, f"it holds a {type(node).__name__}, neither a tensor nor a plain value")
        values = [self.value(value, depth) for value in node]
        if self.storages is None and len(node) == 2 and type(node) is tuple and isinstance(node[0], str):
            # Paddle's tensor. Where a user saved a pair, the second item is one: a call of `tuple`.
            if isinstance(node[1], Call) and node[1].name.endswith(("_reconstruct", "_frombuffer")):
                return values[1]
        return type(node)(values)

    def _called(self, call, depth):
        arguments = call.arguments
        match call.name.split(".")[-1]:
            case "_rebuild_tensor_v2":
                return self._tensor(*arguments[:4])
            case "_reconstruct":
                _, shape, dtype, is_fortran, data = call.state or [None] * 5
                return self._array(data, dtype, shape, "F" if is_fortran else "C", depth)
            case "_frombuffer":
                data, dtype, shape, order = arguments
                return self._array(data, dtype, shape, order, depth)
            case "scalar":
                return np.frombuffer(self._bytes(arguments[1], depth), _dtype(arguments[0]), count=1)[0].item()
            case "_rebuild_parameter" | "tuple":
                return self.value(arguments[0], depth)
            case "Namespace":
                return {} if call.state is None else self.value(call.state, depth)
            case "bytes":
                return b""
            case "encode" if arguments[1] in ("latin1", "latin-1"):
                return self._bytes(arguments[0], depth)
            case "encode":
                raise ValueError("text in another encoding than latin1")
            case "OrderedDict":
                raise ValueError("a dict as Python 2 writes it: save the file with Python 3")
        return _refuse(call, "")

    def _tensor(self, storage, offset, size, stride):
        """Returns the tensor with element (i, j, ...) at offset + i*stride[0] + j*stride[1] + ... of a storage."""
        if not isinstance(storage, Call) or storage.name != "storage":
            _refuse(storage, "a tensor without its data")
        if not len(size) == len(stride) < 50 or not _are_sizes((offset, *size, *stride)):
            raise ValueError("a tensor of impossible shape, stride or offset")
        (data, dtype), size, stride = self.storages[storage.arguments[0]], tuple(size), tuple(stride)
        if 0 in size:
            return np.zeros(size, "f4" if dtype == "bfloat16" else dtype)
        if offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= len(data):
            raise ValueError(f"a tensor of shape {size} that reaches past the end of its data")
        flat = data[offset:]
        if stride == contiguous_stride(size):
            return self._widened(flat[: math.prod(size)].reshape(size), dtype)
        self._count(math.prod(size) * flat.itemsize)
        strides = [s * flat.itemsize for s in stride]
        view = np.lib.stride_tricks.as_strided(flat, size, strides, writeable=False)
        return self._widened(np.array(view, order="C"), dtype)

    def _array(self, data, dtype, shape, order, depth):
        """Returns a numpy array, of this machine's byte order and in C order."""
        dtype = _dtype(dtype)
        array, native = array_on(self._bytes(data, depth), dtype, shape, order), dtype.newbyteorder("=")
        if not array.flags.c_contiguous or array.dtype != native:
            self._count(array.nbytes)
            array = np.array(array, native, order="C")
        return self._widened(array, "bfloat16" if self.storages is None and native == np.uint16 else native)

    def _bytes(self, data, depth):
        """Returns the bytes of an array, which protocols before 3 write as text of latin1."""
        if isinstance(data, str):
            self._count(len(data))
            return data.encode("latin1")
        return bytes(data) if isinstance(data, (bytes, bytearray)) else self.value(data, depth)

    def _widened(self, array, dtype):
        self._count(2 * array.nbytes if dtype == "bfloat16" else 0)
        return widened(array, dtype)

    def _count(self, size):
        """Counts bytes that are copied."""
        self.left -= size
        if self.left < 0:
            raise ValueError("its tensors take many times more memory than the file has bytes")


def _refuse(node, message):
    """Raises the error for a record in a wrong place."""
    if isinstance(node, Name) and node.name not in LISTED:
        raise Refused(f"it asks to import {shortened(node.name, 100)}, which no weights need; nothing was run")
    if isinstance(node, (Name, Call)):
        raise Refused(f"it holds a {node.name}, neither a tensor nor a plain value")
    raise ValueError(message)


def _dtype(node):
    if not isinstance(node, Call) or node.name != "numpy.dtype":
        _refuse(node, "an array without its data")
    code = node.arguments[0]
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        raise ValueError(f"an array of type {code[:60] if isinstance(code, str) else type(code).__name__!r}")
    return np.dtype(code).newbyteorder(node.state[1] if node.state else "=")


def array_on(data, dtype, shape, order="C"):
    """Returns a writable array on the memory of bytes, as numpy's own unpickling does, without a copy."""
    if not _are_sizes(shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array whose data are not of its size")
    if not data:
        return np.zeros(shape, dtype)
    array = np.ndarray(0, dtype)
    array.__setstate__((1, tuple(shape), dtype, order == "F", data))
    return array


def read_elements(file, count, dtype, big_endian=False):
    """Returns the next elements of a file, which must have them before memory is taken; see `elements`."""
    size = count * np.dtype("u2" if dtype == "bfloat16" else dtype).itemsize
    if size > os.fstat(file.fileno()).st_size - file.tell():
        raise ValueError(f"it states a length of {size:,} bytes, which is more than it has")
    return elements(file.read(size), dtype, big_endian)


def elements(data, dtype, big_endian):
    """Returns the bytes of a storage as elements `(numel,)` of this machine's byte order; bfloat16 as uint16."""
    stored = np.dtype("u2" if dtype == "bfloat16" else dtype).newbyteorder(">" if big_endian else "<")
    array = array_on(data, stored, (len(data) // stored.itemsize,))
    return array.astype(stored.newbyteorder("="), copy=False)


def _are_sizes(numbers):
    return len(numbers) < 100 and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)


def contiguous_stride(size):
    """Returns the strides, in elements, of a tensor whose elements lie in order."""
    return tuple(math.prod(size[i + 1 :]) for i in range(len(size)))


def widened(array, dtype):
    """Returns an array as it is or, of the 16 bits of "bfloat16" (the upper half of a float32), as float32."""
    return (array.astype(np.uint32) << 16).view(np.float32).reshape(array.shape) if dtype == "bfloat16" else array
