"""Reads the pickles of PyTorch and Paddle weight files: tensors, numpy arrays and plain containers, nothing else.

A pickle is a program: its GLOBAL imports, and its REDUCE calls, whatever they name. Here Python's own machine runs it
with an allow-list, `_ALLOWED`, of functions of this module. Any other name, and whatever the file makes of it, becomes
a `Placeholder`, which is refused where it is wanted.

The machine is `pickle._Unpickler`, which is written in Python, so that every call and every state can be overridden.
The one in C takes memory for any length or memo index that a file states, and sets attributes of what a file names.
"""

import math
import mmap
import pickle
import re
import struct
from collections import OrderedDict

import numpy as np

from runtime.untrusted import shortened

# torch storage class -> numpy type of one element; bfloat16 is read as its 16 bits and widened later.
STORAGE_TYPES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "bfloat16",
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
MAX_DEPTH = 100  # of containers in containers
_LARGE = 4096  # bytes that are read into memory of their own, which an array may keep
_MAPPED = 1 << 20  # bytes above which memory is asked of the system
_DTYPE = re.compile(r"[<>=|]?(f[248]|[iu][1248]|b1|\?)")  # no objects, records, strings
_PLAIN = (type(None), bool, int, float, str, bytes)


class Refused(Exception):
    """The file asks for something that weights don't need."""


class Placeholder:
    """A placeholder stands for an object that weights don't need, such as a path or a device among the settings.

    The object is not made, and nothing is kept of its arguments and state. `error` says why it is not there.
    """

    def __init__(self, error):
        self.error = error

    def _ignore(self, *items):
        pass

    append = extend = add = __setitem__ = _ignore


class Budget:
    """Counts the bytes that are copied beside those of the file itself, so that a small file can't ask for many."""

    def __init__(self, file_size):
        self.left = 4 * file_size + (1 << 26)

    def take(self, count):
        self.left -= count
        if self.left < 0:
            raise ValueError("its tensors take many times more memory than the file has bytes")


class BoundedFile:
    """A binary file of `size` bytes that refuses to read more than it has, before memory is taken for it."""

    def __init__(self, file, size):
        self.file, self.size, self.readline = file, size, file.readline

    def _check_left(self, count):
        left = self.size - self.file.tell()
        if count > left:
            raise ValueError(f"it states a length of {count:,} bytes where {left:,} are left")

    def read(self, count):
        self._check_left(count)
        return self.file.read(count)

    def read_memory(self, count):
        """Returns the next `count` bytes as a writable memoryview, whose memory goes back to the system when freed."""
        self._check_left(count)
        # numpy asks for huge pages, which are slow to get where memory is in pieces: 2 s against 0.4 s for 640 MB.
        memory = memoryview(mmap.mmap(-1, count, access=mmap.ACCESS_COPY) if count > _MAPPED else bytearray(count))
        done = 0
        while done < count:
            read = self.file.readinto(memory[done : done + (1 << 24)])
            if not read:
                raise ValueError("its data end early")
            done += read
        return memory


# ---------------------------------------------------------------------------------------------------------------------
# What a file may make: what becomes an array (in `to_arrays`, when all is read), tuples, bytes and empty containers
# ---------------------------------------------------------------------------------------------------------------------


class Storage:
    """The flat memory behind one or more torch tensors; in the format before zip, `data` come after the pickle."""

    def __init__(self, dtype, numel, data=None):
        self.dtype, self.numel, self.data = dtype, numel, data


class _Tensor:
    """A view of a storage: element (i, j, ...) lies at offset + i*stride[0] + j*stride[1] + ..."""

    def __init__(self, unpickler, storage, offset, size, stride, *unused):
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)
        numbers = (offset, *self.size, *self.stride)
        are_sizes = len(numbers) < 100 and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        if len(self.size) != len(self.stride) or not are_sizes:
            raise ValueError("a tensor of impossible shape, stride or offset")

    def to_array(self, budget):
        """Returns a view of the storage where the elements lie in order, else a copy."""
        dtype, size = self.storage.dtype, self.size
        if 0 in size:
            return np.zeros(size, "f4" if dtype == "bfloat16" else dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(size, self.stride, strict=True))
        if last >= self.storage.numel:
            raise ValueError(f"a tensor of shape {size} that reaches past the end of its data")
        flat = self.storage.data[self.offset :]
        if self.stride == contiguous_stride(size):
            return widened(flat[: math.prod(size)].reshape(size), dtype, budget)
        budget.take(math.prod(size) * flat.itemsize)
        strides = [s * flat.itemsize for s in self.stride]
        view = np.lib.stride_tricks.as_strided(flat, size, strides, writeable=False)
        return widened(np.array(view, order="C"), dtype, budget)


class _Array:
    """A numpy array: empty as `_reconstruct` makes it, filled by its state."""

    def __init__(self, data=b"", dtype=None, shape=(), order="C"):
        self.data, self.dtype, self.shape, self.order = data, dtype, shape, order

    def set_state(self, state):
        _, self.shape, self.dtype, fortran, self.data = state
        self.order = "F" if fortran else "C"

    def to_array(self, budget):
        """Returns the array, of this machine's byte order and in C order."""
        if not isinstance(self.dtype, _DType):
            raise getattr(self.dtype, "error", ValueError("an array without its data"))
        dtype, data = self.dtype.value, _bytes(self.data)
        native = dtype.newbyteorder("=")
        array = (np.frombuffer(data, dtype) if len(data) else np.zeros(0, native)).reshape(self.shape, order=self.order)
        if array.flags.c_contiguous and array.flags.writeable and array.dtype == native:
            return array
        budget.take(array.nbytes)
        return np.array(array, dtype=native, order="C")


class _DType:
    """A numpy dtype: a type code and, from its state, the byte order."""

    def __init__(self, code):
        self.value = np.dtype(code)

    def set_state(self, state):
        self.value = self.value.newbyteorder(state[1])


class _Name:
    """A name of the allow-list: called as `function(unpickler, *arguments)`, or nothing that can be called."""

    def __init__(self, name, function):
        self.name, self.function = name, function


class _Tuple(tuple):
    """A tuple whose hash is that of the object: the hash of tuples in tuples can take 2^n steps."""

    __hash__ = object.__hash__


def _bytes(data):
    return data.encode("latin1") if isinstance(data, str) else data  # text: bytes of Python 2


def _dtype(unpickler, code, *unused):
    if isinstance(code, str) and _DTYPE.fullmatch(code):
        return _DType(code)
    code = code[:60] if isinstance(code, str) else type(code).__name__
    return Placeholder(ValueError(f"an array of type {code!r}"))


def _scalar(unpickler, dtype, data):
    return np.frombuffer(_bytes(data), dtype.value, count=1)[0].item()


def _encode(unpickler, text, encoding):
    """Returns bytes, as protocols before 3 write them."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("text in another encoding than latin1")
    unpickler.budget.take(len(text))
    return text.encode("latin1")


def _container(kind):
    def build(unpickler, values=()):
        unpickler.budget.take(64 * len(values))
        return kind(values)

    return build


_ALLOWED = {
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_parameter": lambda unpickler, data, *unused: data,
    "torch.Size": _container(_Tuple),
    "collections.OrderedDict": _container(OrderedDict),
    "collections.defaultdict": lambda unpickler, *unused: {},
    "argparse.Namespace": lambda unpickler: {},
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    **{f"torch.{name}": dtype for name, dtype in STORAGE_TYPES.items()},
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray._reconstruct"] = lambda unpickler, *unused: _Array()
    _ALLOWED[f"{_core}.multiarray.scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric._frombuffer"] = lambda unpickler, *state: _Array(*state)
for _builtins in ("builtins", "__builtin__"):
    _ALLOWED.update(dict.fromkeys((f"{_builtins}.list", f"{_builtins}.dict")))  # what a defaultdict is of
    _ALLOWED[f"{_builtins}.bytes"] = lambda unpickler: b""
    _ALLOWED[f"{_builtins}.tuple"] = _container(_Tuple)
    _ALLOWED[f"{_builtins}.set"] = _container(set)
    _ALLOWED[f"{_builtins}.frozenset"] = _container(frozenset)


class Unpickler(pickle._Unpickler):
    """Reads one pickle from where a file stands; the file then stands behind it.

    Args:
        file: a `BoundedFile`.
        budget: of what is copied.
        storage: `storage(key, dtype, numel)` gives the `Storage` that a torch tensor refers to; None: no such file.

    `load` raises `Refused` for a call or a state that no weights need, and any other exception for a damaged pickle.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, budget, storage=None):
        super().__init__(file, encoding="latin1")
        self.file, self.budget, self.storage = file, budget, storage

    def find_class(self, module, name):
        asked = f"{module}.{name}"
        if asked in _ALLOWED:
            return _Name(name, _ALLOWED[asked])
        asked = shortened(asked, 100)
        return Placeholder(Refused(f"it asks to import {asked}, which no weights need; nothing was run"))

    def persistent_load(self, pid):
        # ("storage", storage class, key, device, number of elements[, view of another storage: older files])
        if self.storage is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise Refused("it refers to an object outside of the file")
        _, kind, key, _, numel, *view = pid
        if isinstance(kind, Placeholder):
            return kind
        if not isinstance(kind, _Name) or kind.name not in STORAGE_TYPES:
            raise Refused("it has a storage of unknown type")
        if view and view[0] is not None:
            raise Refused("it has a storage that is a view of another one: save it with a newer PyTorch")
        if not isinstance(key, (str, int)) or type(numel) is not int or not 0 <= numel < 1 << 60:
            raise ValueError("a storage of impossible size")
        return self.storage(str(key), kind.function, numel)

    def _call(self, function, arguments):
        for part in (function, *arguments[:1]):
            if isinstance(part, Placeholder):  # what is made of one is one
                return part
        if not isinstance(function, _Name) or not callable(function.function):
            what = function.name if isinstance(function, _Name) else f"a {type(function).__name__}"
            raise Refused(f"it calls {what}, which no weights need; nothing was run")
        return function.function(self, *arguments)

    def _instantiate(self, function, arguments):  # of the operations INST and OBJ
        self.append(self._call(function, arguments))

    def load_reduce(self):
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj_ex(self):
        self.stack.pop()  # keywords, which nothing in the list takes
        self.load_reduce()

    def load_build(self):
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, (_Array, _DType)):
            target.set_state(state)
        elif type(target) is dict:  # an argparse.Namespace
            self.budget.take(64 * len(state))
            target.update(state)
        elif not isinstance(target, (OrderedDict, Placeholder)):  # attributes of a torch state dict, such as versions
            raise Refused(f"it sets the state of a {type(target).__name__}; nothing was run")

    def load_tuple(self):
        items = self.pop_mark()
        self.append(_Tuple(items))

    def _load_short_tuple(self, count):
        self.stack[-count:] = [_Tuple(self.stack[-count:])]

    def _load_bytes(self, form):
        (count,) = struct.unpack(form, self.read(struct.calcsize(form)))
        self.append(self.read(count) if count < _LARGE else self.file.read_memory(count))

    for _code, _load in (
        *((pickle.REDUCE, load_reduce), (pickle.NEWOBJ, load_reduce), (pickle.NEWOBJ_EX, load_newobj_ex)),
        *((pickle.BUILD, load_build), (pickle.TUPLE, load_tuple)),
        (pickle.TUPLE1, lambda self: self._load_short_tuple(1)),
        (pickle.TUPLE2, lambda self: self._load_short_tuple(2)),
        (pickle.TUPLE3, lambda self: self._load_short_tuple(3)),
        (pickle.BINBYTES, lambda self: self._load_bytes("<I")),
        (pickle.BINBYTES8, lambda self: self._load_bytes("<Q")),
        (pickle.BYTEARRAY8, lambda self: self._load_bytes("<Q")),
        (pickle.FRAME, lambda self: self.read(8)),  # a hint for buffering: what is in it is read piece by piece
    ):
        dispatch[_code[0]] = _load


def to_arrays(tree, budget, *, paddle=False, tolerant=False):
    """Returns an unpickled tree of numpy arrays, containers and plain values; tied weights stay one array.

    Args:
        tree: what `Unpickler.load` gave.
        budget: of what is copied.
        paddle: of a paddle.save file: a pair (name, array) is a tensor, and uint16 is bfloat16.
        tolerant: an entry of `tree`, a dict, that can't be converted becomes a `Placeholder`.

    Raises:
        Refused, ValueError: a placeholder, or more than `MAX_DEPTH` containers in one another.
    """
    done = {}  # id: (node, result); the node is kept alive, so that its id stays its own

    def visit(node, depth):
        if id(node) not in done:
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            done[id(node)] = node, convert(node, depth + 1)
        return done[id(node)][1]

    def convert(node, depth):
        if isinstance(node, _PLAIN):
            return node
        if isinstance(node, Placeholder):
            raise node.error
        if isinstance(node, (_Tensor, _Array)):
            array = node.to_array(budget)
            return widened(array, "bfloat16" if paddle and array.dtype == np.uint16 else None, budget)
        if isinstance(node, memoryview):
            budget.take(len(node))
            return bytes(node)
        if isinstance(node, dict):
            return type(node)((key(name), visit(value, depth)) for name, value in node.items())
        if isinstance(node, (set, frozenset)):
            return type(node)(map(key, node))
        if isinstance(node, (list, _Tuple)):
            result = [visit(value, depth) for value in node]
            if paddle and isinstance(node, _Tuple) and len(node) == 2 and isinstance(node[1], _Array):
                return result[1] if isinstance(node[0], str) else tuple(result)
            return tuple(result) if isinstance(node, _Tuple) else result
        raise Refused(f"it holds a {getattr(node, 'name', type(node).__name__)}, neither a tensor nor a plain value")

    def key(value):
        if not isinstance(value, _PLAIN):
            raise getattr(value, "error", ValueError(f"a {type(value).__name__.strip('_').lower()} as a key"))
        return value

    def visit_entry(node):
        try:
            return visit(node, 1)
        except Exception as error:
            return Placeholder(error.with_traceback(None))

    try:
        if tolerant and isinstance(tree, dict):
            return type(tree)((n, visit_entry(value)) for n, value in tree.items() if isinstance(n, _PLAIN))
        return visit(tree, 0)
    finally:
        done.clear()  # `visit` and `convert` hold each other and this: the file's memory would wait for the collector


def contiguous_stride(size):
    """Returns the strides, in elements, of a tensor whose elements lie in order."""
    return tuple(math.prod(size[i + 1 :]) for i in range(len(size)))


def widened(array, dtype, budget):
    """Returns an array as it is or, of the 16 bits of "bfloat16" (the upper half of a float32), as float32."""
    if dtype != "bfloat16":
        return array
    budget.take(2 * array.nbytes)
    return (array.astype(np.uint32) << 16).view(np.float32).reshape(array.shape)
