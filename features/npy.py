"""Reads `.npy` and `.npz` files of others; sizes that a header states are compared with the file's first."""

import zipfile

import numpy as np

from runtime.untrusted import open_regular


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
    arrays = {}
    with open_regular(path) as file:
        try:
            archive, size = zipfile.ZipFile(file), file.seek(0, 2)
            for name in names:
                if member := archive.NameToInfo.get(f"{name}.npy"):
                    if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                        raise ValueError(f"{name} is compressed, or larger than the file")
                    arrays[name] = np.lib.format.read_array(archive.open(member), allow_pickle=False)
                    if arrays[name].size > size:  # texts without letters take no room
                        raise ValueError(f"{name} has more entries than the file bytes")
        except Exception as error:  # whatever a broken file makes numpy and zipfile say
            raise _unreadable(path, "npz", error) from None
    return arrays


def _unreadable(path, kind, error):
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return ValueError(f"{path}: not a readable .{kind} file (truncated?): {reason}")
