"""Makes numpy arrays and plain values of the records that `weights.unpickle` reads."""

import math
import os
import re

import numpy as np

from runtime.untrusted import shortened
from weights.unpickle import LISTED, Call, Name, Refused

MAX_DEPTH = 100  # of containers in containers
_DTYPE = re.compile(r"[<>=|]?(f[248]|[iu][1248]|b1|\?)")  # no objects, records, strings
_PLAIN = (type(None), bool, int, float, str, bytes)


class Records:
    """Makes what records stand for; tied weights stay one array.

    `storages` are `{key: (elements, dtype)}` of a torch file, None for a paddle.save file, in which a pair (name,
    array) is a tensor, and uint16 is bfloat16. `file_size` bounds what is copied: a small file can't ask for much.
    Of torch tensors in dicts whose name is not `wanted(name)` there are empty arrays.
    """

    def __init__(self, file_size, storages, wanted=None):
        # `done` is by the id of a node, which holds as long as the tree does: only nodes of it may go to `value`.
        self.left, self.storages, self.done = 4 * file_size + (1 << 26), storages, {}
        self.wanted = wanted

    def read(self, tree, tolerant):
        """Returns `value(tree)`; where `tolerant`, an entry of a dict that has no value becomes the error."""
        if not tolerant or not isinstance(tree, dict):
            return self.value(tree)
        entries = {}
        for name in filter(lambda name: isinstance(name, _PLAIN), tree):
            try:
                entries[name] = self._entry(name, tree[name], 1)
            except Exception as error:
                entries[name] = error.with_traceback(None)
        return entries

    def value(self, node, depth=0):
        """Returns a tree of arrays, dicts, lists, tuples and plain values; Refused or ValueError for anything else."""
        if isinstance(node, _PLAIN):
            return node
        if id(node) not in self.done:
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            self.done[id(node)] = self._make(node, depth + 1)
        return self.done[id(node)]

    def _make(self, node, depth):
        if isinstance(node, Call):
            return _MAKERS[node.name.split(".")[-1]](self, node, depth)
        if isinstance(node, dict):
            return self._dict(node, depth)
        if not isinstance(node, (list, tuple)):
            _refuse(node, f"it holds a {type(node).__name__}, neither a tensor nor a plain value")
        values = [self.value(value, depth) for value in node]
        if self.storages is None and len(node) == 2 and type(node) is tuple and isinstance(node[0], str):
            # Paddle's tensor. Where a user saved a pair, the second item is one: a call of `tuple`.
            if isinstance(node[1], Call) and node[1].name.endswith(("_reconstruct", "_frombuffer")):
                return values[1]
        return type(node)(values)

    def _count(self, size):
        """Counts bytes that are copied."""
        self.left -= size
        if self.left < 0:
            raise ValueError("its tensors take many times more memory than the file has bytes")

    def _widened(self, array, dtype):
        self._count(2 * array.nbytes if dtype == "bfloat16" else 0)
        return widened(array, dtype)

    def _dict(self, node, depth):
        for name in node:
            if not isinstance(name, _PLAIN):
                _refuse(name, f"a {type(name).__name__} as a key")
        if getattr(node, "arguments", ()):
            raise ValueError("a dict as Python 2 writes it: save the file with Python 3")
        return {name: self._entry(name, value, depth) for name, value in node.items()}

    def _entry(self, name, node, depth):
        """Returns the value of a dict's entry, which is an empty array for a torch tensor that is not wanted."""
        if self.wanted is not None and isinstance(node, Call) and node.name.startswith("torch._utils."):
            if not self.wanted(name):
                return np.zeros(0, "f4")
        return self.value(node, depth)

    def _tensor(self, call, depth):
        """Returns a view of a storage where the elements lie in order, else a copy.

        Element (i, j, ...) lies at offset + i*stride[0] + j*stride[1] + ...
        """
        storage, offset, size, stride = call.arguments[:4]
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

    def _array(self, call, depth):
        """Returns a numpy array, of this machine's byte order and in C order."""
        if call.name.endswith("_frombuffer"):
            data, dtype, shape, order = call.arguments
        else:
            _, shape, dtype, is_fortran, data = call.state or [None] * 5
            order = "F" if is_fortran else "C"
        dtype = _dtype(dtype)
        array, native = array_on(self._bytes(data, depth), dtype, shape, order), dtype.newbyteorder("=")
        if not array.flags.c_contiguous or array.dtype != native:
            self._count(array.nbytes)
            array = np.array(array, native, order="C")
        return self._widened(array, "bfloat16" if self.storages is None and native == np.uint16 else native)

    def _scalar(self, call, depth):
        dtype, data = call.arguments
        return np.frombuffer(self._bytes(data, depth), _dtype(dtype), count=1)[0].item()

    def _bytes(self, data, depth):
        """Returns an array's bytes, or any; protocols before 3 write them as text of latin1, or a call to encode it."""
        if isinstance(data, Call) and data.name == "_codecs.encode":
            data, encoding = data.arguments
            if encoding not in ("latin1", "latin-1"):
                raise ValueError("text in another encoding than latin1")
        if isinstance(data, str):
            self._count(len(data))
            return data.encode("latin1")
        return data if isinstance(data, (bytes, bytearray)) else self.value(data, depth)


_MAKERS = {
    "_rebuild_tensor_v2": Records._tensor,
    "_reconstruct": Records._array,
    "_frombuffer": Records._array,
    "scalar": Records._scalar,
    "OrderedDict": Records._dict,
    "Namespace": lambda records, call, depth: {} if call.state is None else records.value(call.state, depth),
    "_rebuild_parameter": lambda records, call, depth: records.value(call.arguments[0], depth),
    "tuple": lambda records, call, depth: records.value(call.arguments[0], depth),
    "encode": Records._bytes,
    "bytes": lambda records, call, depth: b"",
    "dtype": lambda records, call, depth: _refuse(call, ""),
    "storage": lambda records, call, depth: _refuse(call, ""),
}


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
    """Returns a writable array on the memory of bytes or a bytearray, as numpy's unpickling does, without a copy."""
    if not _are_sizes(shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array whose data are not of its size")
    if not data:
        return np.zeros(shape, dtype)
    if isinstance(data, bytearray):
        return np.frombuffer(data, dtype).reshape(shape, order=order)
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
