"""Files and folders that are whole or not there: written beside, flushed to disk, renamed in one step.

`N` is written as `.N.partial`. A folder that is replaced is `.N.replaced` until the new one has its name, so that a
kill between the two renames loses neither. Standard library only.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil

from runtime.untrusted import shortened

MAX_NAME = 240  # bytes of a file's name; file systems take 255
MANIFEST = "manifest.json"  # of a folder that FolderWriter wrote: {"files": {name: {"size": bytes, "sha256": hex}}}
# A series of numbered folders, as checkpoints are: one process writes them, one at a time. Snapshots may be superseded.
_LEFTOVER = re.compile(r"^\.((?:checkpoint-)?\d+(?:-\d+)?(?:\.superseded(?:-\d+)?)?)\.(partial|replaced)$")


@contextlib.contextmanager
def named_errors(path, temporary=None):
    """Gives an `OSError` that has no file name, as that of a full disk, or the temporary one, the name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary):
            raise
        raise OSError(error.errno, error.strerror, path) from None


@contextlib.contextmanager
def whole_file(path, *, shared=False):
    """Yields a temporary path to write to; when the block ends, the file gets the name `path` by one rename.

    After an error or a kill `path` is what it was before. A link is followed; a device or pipe is written directly.
    Of several processes that write a `shared` file at once the last one wins. An `OSError` names `path`.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        yield target
        return
    partial = _beside(target, f"{os.uname().nodename}-{os.getpid()}.partial" if shared else "partial")
    with named_errors(path, partial):
        try:
            yield partial
            _flush(partial)
            os.replace(partial, target)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def check_output(path, overwrite=False, flag=""):
    """Raises `ValueError` unless a file can be written there; its message begins with `flag` and `path`."""
    shown, (folder, name) = flag + shortened(path, 500), os.path.split(os.path.realpath(path))
    if os.path.isdir(path) or not os.path.basename(path):
        raise ValueError(f"{shown}: is a folder; expected the name of a file")
    if not os.path.isdir(folder):
        raise ValueError(f"{shown}: there is no such folder as {shortened(folder, 500)}")
    if len(os.fsencode(name)) > MAX_NAME:
        raise ValueError(f"{shown}: the name has more than {MAX_NAME} bytes")
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"{shown}: exists already; give another name, or --overwrite")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{shown}: is no regular file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{shown}: the folder can't be written to")


def write_json(path, value, indent=2):
    """Writes a value as JSON text in UTF-8, indented unless `indent` is None; see `whole_file`."""
    with whole_file(path) as partial, open(partial, "wb") as file:
        file.write(json_bytes(value, indent))


def json_bytes(value, indent=2):
    """Returns a value as JSON text in UTF-8."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()


def sha256_of_file(path):
    """Returns the sha256 of a file's content, 32 bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


@contextlib.contextmanager
def whole_folder(path):
    """Yields a new, empty folder beside `path`, which gets its name when the block ends; a folder there is replaced."""
    partial, replaced = _beside(path, "partial"), _beside(path, "replaced")
    _restore(path)
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        yield partial
        for root, _, names in os.walk(partial):
            for name in names:
                _flush(os.path.join(root, name))
            _flush(root)
        if os.path.isdir(path):
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(path, replaced)
        os.rename(partial, path)
        parent = os.path.dirname(partial)
        _flush(parent)
        _flush(os.path.dirname(parent))  # the parent may be new
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _restore(path)


class FolderWriter:
    """Writes a numbered folder as `whole_folder` does, with a manifest of its files, and clears what kills have left.

    Every method may raise `OSError`.
    """

    def __init__(self, folder):
        clear_leftovers(os.path.dirname(os.path.abspath(folder)))
        self.files, self._folder = {}, whole_folder.__wrapped__(folder)  # a generator can be ended without an error
        self.partial = next(self._folder)

    @contextlib.contextmanager
    def open(self, name):
        """Yields a binary file to write, whose size and checksum are taken on the way."""
        path = os.path.join(self.partial, name)
        with named_errors(path), open(path, "wb") as file:
            hashed = HashedFile(file)
            yield hashed
        self.files[name] = {"size": hashed.size, "sha256": hashed.digest.hexdigest()}

    def write_json(self, name, value, indent=2):
        """Writes a value as a JSON file of the folder."""
        with self.open(name) as file:
            file.write(json_bytes(value, indent))

    def finish(self):
        """Writes the manifest and gives the folder its name; one that has it is deleted after that."""
        self.write_json(MANIFEST, {"files": self.files})
        next(self._folder, None)

    def discard(self):
        """Gives back the room of a folder that is not finished; an old one of its name stays."""
        self._folder.close()


class HashedFile:
    def __init__(self, file):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data):
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)


def delete_folder(folder):
    """Deletes a folder so that a kill on the way leaves nothing of it under its name."""
    hidden = _beside(folder, "partial")
    shutil.rmtree(hidden, ignore_errors=True)  # what a kill has left of another one
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def clear_leftovers(parent):
    """Deletes what a kill left of numbered folders that were on their way to or from a name in `parent`.

    Only the process that writes these folders may call it.
    """
    for path, name, kind in restore_replaced(parent):
        if kind == "partial" or os.path.exists(os.path.join(parent, name)):
            shutil.rmtree(path, ignore_errors=True)


def restore_replaced(parent):
    """Gives the numbered folders in `parent` that a kill caught while they were being replaced their names back.

    Returns `(path, name, kind)` of each folder that was on its way to or from a name in `parent`.
    """
    matches = map(_LEFTOVER.match, os.listdir(parent) if os.path.isdir(parent) else ())
    found = [(os.path.join(parent, match[0]), match[1], match[2]) for match in matches if match]
    for _, name, _ in found:
        _restore(os.path.join(parent, name))
    return found


def _restore(folder):
    if not os.path.exists(folder):
        with contextlib.suppress(OSError):
            os.rename(_beside(folder, "replaced"), folder)


def _beside(path, kind):
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(parent, f".{name}.{kind}")


def _flush(path):
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named_errors(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that flush names by themselves
            raise
    finally:
        os.close(descriptor)
