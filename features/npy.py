"""Reads `.npy` and `.npz` files of others; sizes that a header states are compared with the file's first."""

import contextlib
import io
import math
import zipfile

import numpy as np

from runtime.untrusted import open_regular

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def load_npy(path, *, mapped=False):
    """Returns the array of a `.npy` file, or a read-only map of it.

    ValueError names a file that is not there, no `.npy`, of Python objects, or shorter than its header says.
    """
    try:
        with open_regular(path) as file:
            if file.read(2) == b"PK":
                raise ValueError("it holds an archive of arrays")
            file.seek(0)
            array = np.lib.format.open_memmap(path, mode="r")  # takes no memory, and refuses what the file has not
            return array if mapped else np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing") from None
    except Exception as error:  # whatever a broken file makes numpy say
        raise _unreadable(path, "npy", error) from None


def load_npz(path, names):
    """Returns `{name: array}` of a `.npz` file that `numpy.savez` wrote; names that it lacks are left out.

    Raises as `load_npy`, also for compressed arrays, which may be of any size; FileNotFoundError if it is not there.
    """
    with open_regular(path) as file:
        try:
            archive, size = zipfile.ZipFile(file), file.seek(0, 2)
            return {name: _read_member(archive, name, size) for name in names if f"{name}.npy" in archive.NameToInfo}
        except Exception as error:  # whatever a broken file makes numpy and zipfile say
            raise _unreadable(path, "npz", error) from None


class NpzArray:
    """An array in a `.npz` file, compressed or not, that is read by blocks of rows; it may be larger than the memory.

    Attributes `shape` and `dtype`. ValueError, here and while it is read, names a file that is no whole `.npz`, a name
    that is not in it, Python objects, and a header that states another size than the file has.
    """

    def __init__(self, path, name):
        self.path, self.name = path, name
        with self._errors(), self._open() as (_, header):
            self.shape, self.fortran, self.dtype = header

    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # whatever a broken file makes numpy, zipfile and zlib say
            raise _unreadable(self.path, "npz", error) from None

    @contextlib.contextmanager
    def _open(self):
        """Yields the stream of the array, its header read, and `(shape, fortran, dtype)`."""
        with open_regular(self.path) as file, zipfile.ZipFile(file) as archive:
            with archive.open(f"{self.name}.npy") as stream:
                shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
                stated = stream.tell() + math.prod(shape) * dtype.itemsize
                if dtype.hasobject or any(n < 0 for n in shape):
                    raise ValueError(f"{self.name} is of the type {dtype} and the shape {shape}")
                if stated != (size := archive.getinfo(f"{self.name}.npy").file_size):
                    raise ValueError(f"{self.name} should have {stated:,} bytes, and has {size:,}")
                yield stream, (shape, fortran, dtype)

    def check_order(self):
        """Raises `ValueError` for an array that `blocks` can't read, since its rows do not lie one after the other."""
        if self.fortran and len(self.shape) > 1:
            raise ValueError(f"{self.path}: {self.name} is in Fortran order; save numpy.ascontiguousarray of it")

    def blocks(self, rows, start=0, stop=None):
        """Yields the rows from `start` to `stop` (None: all), at most `rows` at once, as arrays."""
        stop = self.shape[0] if stop is None else stop
        self.check_order()
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        with contextlib.ExitStack() as stack:
            with self._errors():
                stream, _ = stack.enter_context(self._open())
                stream.seek(start * row, io.SEEK_CUR)
            for first in range(start, stop, rows):
                count = min(rows, stop - first)
                with self._errors():
                    data = stream.read(count * row)
                    block = np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
                yield block

    def read(self):
        """Returns the whole array."""
        with self._errors(), self._open() as (stream, _):
            array = np.frombuffer(stream.read(), self.dtype)
        return array.reshape(self.shape, order="F" if self.fortran else "C")


def npz_names(path):
    """Returns the names of the arrays in a `.npz` file, sorted; ValueError for any other file."""
    with open_regular(path) as file:
        try:
            names = zipfile.ZipFile(file).namelist()
        except Exception as error:  # whatever a broken file makes zipfile say
            raise _unreadable(path, "npz", error) from None
    return sorted(name[:-4] for name in names if name.endswith(".npy"))


def _read_member(archive, name, size):
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
        raise ValueError(f"{name} is compressed, or larger than the file")
    data = archive.read(member)
    file = io.BytesIO(data)
    shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    if any(n < 0 for n in shape):
        raise ValueError(f"{name} is of the shape {shape}")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def _unreadable(path, kind, error):
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return ValueError(f"{path}: not a readable .{kind} file (truncated?): {reason}")
