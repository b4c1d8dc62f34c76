"""Reads `.npy` and `.npz` files of others: a header is compared with the file's size before memory is taken for it."""

import math
import zipfile

import numpy as np

from runtime.untrusted import open_regular

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MAX_DIRECTORY = 1 << 20  # bytes of a .npz's list of its arrays


def load_npy(path, *, mapped=False):
    """The array of a `.npy` file, or a read-only map of it.

    Raises:
        ValueError: one line that names the file: not there, no `.npy`, Python objects, or shorter than its header says.
    """
    try:
        with open_regular(path) as file:
            _read_header(file, file.seek(0, 2))
            if not mapped:
                file.seek(0)
                return np.lib.format.read_array(file, allow_pickle=False)
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing") from None
    except Exception as error:  # whatever a broken file makes numpy say
        raise ValueError(f"{path}: not a readable .npy file (truncated?): {_reason(error)}") from None


def header_bytes(data):
    """Returns how many bytes stand in front of the array in `data`, a `.npy` file that `load_npy` has read."""
    start = 10 if data[6:7] == b"\1" else 12  # magic, version and the length, of 2 or 4 bytes
    return start + int.from_bytes(data[8:start], "little")


def load_npz(path, names):
    """`{name: array}` of a `.npz` file that `numpy.savez` wrote; names that it lacks are left out.

    Raises:
        ValueError: one line that names the file, as `load_npy`; also for compressed arrays, which may be of any size.
        FileNotFoundError: it is not there (yet).
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(-min(size, 22), 2)  # the end of a zip file without a comment
            end = file.read()
            if end[:4] != b"PK\5\6" or int.from_bytes(end[12:16], "little") > _MAX_DIRECTORY:
                raise ValueError("no archive of a few arrays")
            with zipfile.ZipFile(file) as archive:
                return {
                    name: _read_member(archive, name, size) for name in names if f"{name}.npy" in archive.NameToInfo
                }
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a broken file makes numpy and zipfile say
        raise ValueError(f"{path}: not a readable .npz file (truncated?): {_reason(error)}") from None


def _read_member(archive, name, size):
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
        raise ValueError(f"{name} is compressed, or larger than the file")
    with archive.open(member) as file:
        _read_header(file, member.file_size)
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _read_header(file, size):
    """`(shape, fortran order, dtype)` of a `.npy` of `size` bytes, if they can be what it holds; else ValueError."""
    file.seek(0)
    if file.read(2) == b"PK":
        raise ValueError("it holds an archive of arrays")
    file.seek(0)
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"of the version {version}")
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError("it holds Python objects, or nothing at all")
    needed, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if any(n < 0 for n in shape) or len(shape) > 32 or needed > there:
        raise ValueError(f"its header says {dtype} of shape {str(shape)[:60]}, which {there:,} bytes are too few for")
    return shape, fortran, dtype


def _reason(error):
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
