"""Reads a pickle as a tree of records: nothing that it names is imported or run.

A pickle is a program: its GLOBAL imports, and its REDUCE calls, whatever they name. The standard library's Unpickler
runs it, but gets a `Name` for each import and a `Call` for each call of a listed one, of which `weights.records` makes
arrays. The program is read before it runs, because a small one could take much memory or time.
"""

import io
import mmap
import pickle
import pickletools

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
MAX_NAMES = 1000  # each costs a class
MAX_KEY_PARTS = 1000  # a tuple in tuples is hashed once for each place where it stands: 2^n times
_UNUSED = {"DUP", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
# Of the objects that an operation takes from the stack, those that it hashes.
_HASHED = {"SETITEM": slice(1, None, 2), "SETITEMS": slice(1, None, 2), "DICT": slice(0, None, 2)}
_HASHED.update(ADDITEMS=slice(1, None), FROZENSET=slice(0, None))


class Refused(Exception):
    """The file asks for something that weights don't need."""


class Call(dict):
    """A record of a call: the name, the arguments, the state of what is returned (BUILD), and its items (SETITEM)."""

    __slots__ = ("name", "arguments", "state")
    __hash__, __eq__ = object.__hash__, object.__eq__

    def __init__(self, name, arguments):
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state):
        self.state = state


class Name(type):
    """A name stands for what a pickle imports; nothing is kept of what is put in.

    A call of a listed one gives a `Call`, that of any other, such as a path among the settings, the name again. It is a
    class, because NEWOBJ takes nothing else, with `__setstate__`, because BUILD would set attributes without one.
    """

    def __new__(cls, name):
        return super().__new__(cls, "Name", (), {"name": name, "__new__": lambda cls, *items, **_: cls(*items)})

    def __call__(cls, *arguments):
        return Call(cls.name, arguments) if cls.name in LISTED else cls

    def _ignore(cls, *items):
        pass

    append = extend = add = __setitem__ = __setstate__ = _ignore


class Unpickler(pickle.Unpickler):
    """Reads one pickle from where a file, on disk or a BytesIO, stands; the file then stands behind it.

    `load` returns plain values, containers, names and calls, or raises whatever a damaged file makes Python say.
    `storages` then holds `{key: (dtype, numel)}` of what torch tensors refer to, each as a `Call("storage", (key,))`.
    """

    def __init__(self, file):
        super().__init__(file, encoding="latin1")
        self.file, self.names, self.storages = file, {}, {}

    def load(self):
        start, in_memory = self.file.tell(), isinstance(self.file, io.BytesIO)
        # The pages of the map count as resident memory, so that it is closed before the data are read.
        program = self.file if in_memory else _Map(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        program.seek(start)
        _check_program(program)
        del program
        self.file.seek(start)
        return super().load()

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name not in self.names:
            if len(self.names) == MAX_NAMES:
                raise Refused(f"it asks to import more than {MAX_NAMES} names")
            self.names[name] = Name(name)
        return self.names[name]

    def persistent_load(self, pid):
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
        if self.storages.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise ValueError(f"its storage {shortened(key)} has two types or sizes")
        return Call("storage", (key,))


class _Map(mmap.mmap):
    def read(self, count):
        """Returns the next bytes; long ones as a view, because `pickletools` looks at nothing but their number."""
        if count < 4096:
            return super().read(count)
        view = memoryview(self)[self.tell() :][:count]
        self.seek(self.tell() + len(view))
        return view


def _check_program(file):
    """Raises for a pickle that would take more memory or time than its length warrants; it is read, not run.

    `pickletools` compares every length with the file. Checked here are frames and memo indices, for which the
    Unpickler takes memory, and the keys of dicts and sets: instead of each object, the number of its parts lies on
    the stack.
    """
    stack, marks, memo, before, frame_end = [], [], {}, 0, 0
    for operation, argument, place in pickletools.genops(file):
        name, takes = operation.name, operation.stack_before
        if name in _UNUSED:
            raise Refused(f"it uses the pickle operation {name}, which no weights need; nothing was run")
        # The Unpickler drops the rest of a frame when it reads beyond it, and would run another program than this.
        if before < frame_end < place or (name == "FRAME" and place < frame_end):
            raise ValueError("its frames overlap")
        before, frame_end = place, place + 9 + argument if name == "FRAME" else frame_end
        if pickletools.markobject in takes:
            first = marks.pop() - takes.index(pickletools.markobject) if marks else -1
        else:
            first = len(stack) - len(takes)
        if first < (marks[-1] if marks else 0):
            raise ValueError(f"its {name} takes more than there is")
        parts = stack[first:]
        del stack[first:]
        if name in _HASHED and any(count > MAX_KEY_PARTS for count in parts[_HASHED[name]]):
            raise ValueError(f"a key of more than {MAX_KEY_PARTS} parts")
        if name == "MARK":
            marks.append(len(stack))
        elif operation.stack_after:
            count = memo.get(argument, 1) if name in ("GET", "BINGET", "LONG_BINGET") else 1 + sum(parts)
            stack.append(min(count, MAX_KEY_PARTS + 1))
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if argument is None else argument
            if not 0 <= index < place:
                raise ValueError(f"it states a memo index of {index:,}")
            memo[index] = stack[-1]
    if frame_end > place + 1:
        raise ValueError("it states a frame that is longer than the program")
