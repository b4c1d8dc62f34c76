"""Kills a process at a chosen operation on its disk."""

import os
import signal

from runtime.files import HashedFile


def kill_at_operation(number, monkeypatch):
    """Kills this process before its operation of that number, from 0, that changes the disk."""
    count = 0

    def counting(function):
        def call(*args, **kwargs):
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "mkdir", "fsync", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, counting(getattr(os, name)))
    monkeypatch.setattr(HashedFile, "write", counting(HashedFile.write))
