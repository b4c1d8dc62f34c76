"""The lock of a run's folder: two runs in one folder would write into each other. Imports no Paddle.

The file `run.lock` in the folder tells who holds it. The system frees it when the process ends, however it ends.
"""

import contextlib
import fcntl
import os
import re
import socket
import weakref

LOCK = "run.lock"
_EXPERIMENT_NAME = re.compile(r"^(\d+)-(.+)$")
_held = weakref.WeakValueDictionary()  # the lock files that this process holds, by device and inode


def try_lock(file):
    """Takes the lock of an open file; False: another process has it. A file system without locks checks nothing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


class RunLock:
    """Locks one folder from `take` until this object is gone: keep it as long as the run may write."""

    _file = None

    def take(self, folder):
        """Makes the folder if there is none, and locks it; raises `ValueError` if another run has it."""
        os.makedirs(folder, exist_ok=True)
        file = _lock(folder, "a+b")
        self._file = _held.setdefault(_key(file), file)
        if self._file is file:
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(f"{os.getpid()} {socket.gethostname()}\n".encode())


def check_idle(folder):
    """Raises `ValueError` if another run is at work in a folder; writes nothing."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _lock(folder, "r+b")


def experiment_name(config_file):
    """Returns the NAME of the hand-written loop's experiments `NNN-NAME` with this config."""
    return os.path.splitext(os.path.basename(config_file))[0]


def list_experiments(folder, name=None):
    """Returns `[(index, path)]` of the folders `NNN-NAME` in `folder`, lowest index first."""
    matches = map(_EXPERIMENT_NAME.match, os.listdir(folder) if os.path.isdir(folder) else [])
    found = [(int(match[1]), os.path.join(folder, match[0])) for match in matches if match and name in (None, match[2])]
    return sorted((index, path) for index, path in found if os.path.isdir(path))


def check_experiment_idle(resume, results_dir, name):
    """Raises `ValueError` if a run is at work in the experiment that `--resume` means; `auto`: the newest `name`."""
    found = list_experiments(results_dir, name if resume == "auto" else None)
    if resume != "auto":
        found = [one for one in found if resume and os.path.isdir(resume) and os.path.samefile(one[1], resume)]
    for _, path in found[-1:]:
        check_idle(path)


def close_inherited():
    """Closes the held files in a forked child, which would hold the locks beyond the end of its parent."""
    for file in list(_held.values()):
        file.close()


def _lock(folder, mode):
    path = os.path.join(folder, LOCK)
    try:
        file = open(path, mode, buffering=0)
    except PermissionError:
        if not os.path.exists(path):
            raise
        file = open(path, "rb", buffering=0)  # another user's earlier run has left it
    if _key(file) not in _held and not try_lock(file):
        file.seek(0)
        pid, _, host = file.read(300).decode(errors="replace").strip().partition(" ")
        who = f" (process {pid} on {host})" if pid.isdecimal() and host.isprintable() and host else ""
        raise ValueError(f"another run is at work in {folder}{who}")
    return file


def _key(file):
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino
