"""The check of a checkpoint's folder by its manifest, which `runtime.files.FolderWriter` wrote last."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from runtime.files import MANIFEST
from runtime.progress import tqdm
from runtime.untrusted import read_json

_BUFFER = 1 << 24


def damage(folder, *, required, checksums=False):
    """Returns what is wrong with a folder by its manifest, in words; None for a whole one.

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
