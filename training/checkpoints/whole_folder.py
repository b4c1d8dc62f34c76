"""Folders that are whole or not there: flushed to disk, checksummed in a manifest, renamed in one step.

`manifest.json` is written last: `{"files": {name: {"size": bytes, "sha256": hex}}}`.

A folder `N` is written as `.N.partial`. One that is replaced is `.N.replaced` until the new one has its name, so that a
kill between the two renames loses neither; `restore_replaced` gives it its name back.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

from runtime.progress import tqdm
from runtime.untrusted import read_json

MANIFEST = "manifest.json"
_LEFTOVER = re.compile(r"^\.((?:checkpoint-)?\d+(?:-\d+)?)\.(partial|replaced)$")
_BUFFER = 1 << 24


class FolderWriter:
    """Writes the files of a folder, of which nothing is seen under its name before `finish`.

    What a kill left of earlier ones beside it is deleted. Every method may raise `OSError`.
    """

    def __init__(self, folder):
        self.folder = os.path.abspath(folder)
        self.partial = _beside(self.folder, "partial")
        self.files = {}
        parent = os.path.dirname(self.folder)
        os.makedirs(parent, exist_ok=True)
        clear_leftovers(parent)
        os.mkdir(self.partial)

    @contextlib.contextmanager
    def open(self, name):
        """A binary file to write, of which size and checksum are taken on the way."""
        path = os.path.join(self.partial, name)
        try:
            with open(path, "wb") as file:
                hashed = _HashedFile(file)
                yield hashed
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        self.files[name] = {"size": hashed.size, "sha256": hashed.digest.hexdigest()}

    def write_json(self, name, value, indent=2):
        with self.open(name) as file:
            file.write((json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())

    def finish(self):
        """Writes the manifest and gives the folder its name; one that has it is deleted after that."""
        self.write_json(MANIFEST, {"files": self.files})
        _flush_folder(self.partial)
        replaced = _beside(self.folder, "replaced")
        if os.path.isdir(self.folder):
            os.rename(self.folder, replaced)
        os.rename(self.partial, self.folder)
        parent = os.path.dirname(self.folder)
        _flush_folder(parent)
        _flush_folder(os.path.dirname(parent))
        shutil.rmtree(replaced, ignore_errors=True)

    def discard(self):
        """Gives back the room of a folder that is not finished; an old one of its name stays."""
        shutil.rmtree(self.partial, ignore_errors=True)
        restore_replaced(os.path.dirname(self.folder))


class _HashedFile:
    def __init__(self, file):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data):
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)


def delete_folder(folder):
    """Deletes a folder so that a kill on the way leaves nothing of it under its name."""
    hidden = _beside(folder, "partial")
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def clear_leftovers(parent):
    """Deletes what a kill left of folders that were on their way to or from a name in `parent`; for its one writer."""
    restore_replaced(parent)
    for path, name, kind in _leftovers(parent):
        if kind == "partial" or os.path.exists(os.path.join(parent, name)):
            shutil.rmtree(path, ignore_errors=True)


def restore_replaced(parent):
    """Gives back its name to a folder in `parent` that a kill caught while it was being replaced, where it may."""
    for path, name, kind in _leftovers(parent):
        original = os.path.join(parent, name)
        if kind == "replaced" and not os.path.exists(original):
            with contextlib.suppress(OSError):
                os.rename(path, original)


def damage(folder, *, required, checksums=False):
    """What is wrong with a folder by its manifest, in words, or None.

    Args:
        required: names of files that the manifest must list.
        checksums: read every file to its end, not only its size.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        return f"it has no {MANIFEST}"
    try:
        files = read_json(path)["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"its {MANIFEST} is damaged"
    if not set(required) <= set(expected) or any(os.path.basename(name) != name for name in expected):
        return f"its {MANIFEST} is damaged"
    for name, (size, _) in expected.items():
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            return f"{name} is missing"
        if os.path.getsize(file) != size:
            return f"{name} has {os.path.getsize(file):,} bytes, {size:,} were written"
    if checksums:
        total = sum(size for size, _ in expected.values())
        name = os.path.basename(os.path.normpath(folder))
        stop = threading.Event()
        with (
            tqdm(total=total, desc=f"checking {name}", unit="B", unit_scale=True, delay=2, leave=False) as bar,
            ThreadPoolExecutor(4) as pool,  # SHA-256 is slower than a disk; a checkpoint has three large files
        ):
            try:
                digests = {name: pool.submit(_sha256, os.path.join(folder, name), bar, stop) for name in expected}
                for name, (_, digest) in expected.items():
                    try:
                        read = digests[name].result()
                    except OSError as error:
                        return f"{name} cannot be read: {error.strerror}"
                    if read != digest:
                        return f"{name} is damaged: its checksum is not that of what was written"
            finally:
                stop.set()  # neither Ctrl-C nor what is damaged waits for the files that are still being read
    return None


def _sha256(path, bar, stop):
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        while not stop.is_set() and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
            bar.update(count)
    return digest.hexdigest()


def _beside(folder, kind):
    parent, name = os.path.split(os.path.abspath(folder))
    return os.path.join(parent, f".{name}.{kind}")


def _leftovers(parent):
    """`(path, name, kind)` of what was on its way to or from a name in `parent`."""
    matches = [_LEFTOVER.match(name) for name in os.listdir(parent)]
    return [(os.path.join(parent, match.group()), match.group(1), match.group(2)) for match in matches if match]


def _flush_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that flush names by themselves
            raise
    finally:
        os.close(descriptor)
