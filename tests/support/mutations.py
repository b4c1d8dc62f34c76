"""Damages valid files in seeded ways, as accidents and attackers do, and watches what the readers make of them.

    python tests/support/mutations.py READER[,READER...] COUNT [SEED]

A reader must load a file or refuse it: `ValueError` or `OSError`, one line that names the file, in little time and
memory. Prints one line of JSON a reader. It runs alone, in a process that may take `HEADROOM` bytes more than it has.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import pickletools
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HEADROOM = 1 << 30
SECONDS = 10  # for one file of some kilobytes
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, -1]
NUMBERS += [2**64 - 1, 10**6, 10**9, -(2**31)]
VALUES = [*NUMBERS, 10**400, 1e308, -0.0, 0.5, None, True, "", "x" * 5000, "\ud800", "../../x"]
VALUES += [[], {}, [[]] * 50, {"a": {}}]
NAMES = ["os system", "builtins eval", "builtins getattr", "torch load", "numpy load", "collections OrderedDict"]
NAMES += ["torch._utils _rebuild_tensor_v2", "numpy.core.multiarray _reconstruct", "numpy dtype", "argparse Namespace"]
NAMES += ["_codecs encode", "builtins tuple", "builtins set", "torch FloatStorage", "numpy.core.multiarray scalar"]


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def damage_bytes(rng, data):
    """Makes one to four blind edits: of bits, bytes, numbers of 1 to 8 bytes, parts that are cut, doubled or moved."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(data)
        place = rng.randrange(size) if size else 0
        # Headers are short, and where it hurts.
        place = rng.choice((place, place % 64, place % 512, max(0, size - 1 - place % 256)))
        length = min(rng.choice((1, 2, 4, 8, 64, 1024)), max(size - place, 0))
        kind = rng.randrange(8)
        if kind == 0 and size:
            data[min(place, size - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            data[place : place + length] = bytes(length) if rng.random() < 0.5 else b"\xff" * length
        elif kind == 3:
            form = rng.choice("BHIQ")
            number = rng.choice((*NUMBERS, size, size - 1, size + 1)) % (1 << 8 * struct.calcsize(form))
            data[place : place + struct.calcsize(form)] = struct.pack(rng.choice("<>") + form, number)
        elif kind == 4:
            del data[place : place + length]
        elif kind == 5:
            data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
        elif kind == 6:
            other = rng.randrange(size) if size else 0
            data[place:place] = data[other : other + length]
        else:
            del data[place:]
    return bytes(data)


def damage_json(rng, data):
    """Returns the JSON with another value, key or whole branch; or its text damaged."""
    if rng.random() < 0.3:
        return damage_bytes(rng, data)
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        nodes = [tree]
        for node in nodes:
            nodes += [child for child in _children(node) if isinstance(child, (dict, list))]
        node = rng.choice([node for node in nodes if node] or [tree])
        if not node:
            continue
        value = copy.deepcopy(rng.choice(VALUES))
        if isinstance(node, list):
            node[rng.randrange(len(node))] = value
        else:
            key = rng.choice(list(node))
            kind = rng.randrange(4)
            if kind == 0:
                node[rng.choice(("", "x", "type", "shape", "\0", "__metadata__", "files", "size"))] = node.pop(key)
            elif kind == 1:
                del node[key]
            else:
                node[key] = value
    text = json.dumps(tree)
    kind = rng.randrange(12)
    if kind == 0:
        depth = rng.choice((10, 100, 1000, 100_000))
        text = text.replace(":", ":" + '{"a":' * depth, 1) + "}" * depth
    elif kind == 1:
        text = text.replace("{", '{"type": 1, "type": 2,', 1)
    elif kind == 2:
        text = text.replace("0", rng.choice(("NaN", "-Infinity", "1e999", "9" * 5000)), 1)
    return text.encode("utf-8", "surrogatepass")


def _children(node):
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def damage_pickle(rng, data):
    """Puts operations of the pickle machine in, out, twice, or with other numbers; or damages bytes."""
    if rng.random() < 0.3:
        return damage_bytes(rng, data)
    with contextlib.suppress(Exception):
        places = [position for _, _, position in pickletools.genops(data)]
        places.append(len(data))
        parts = [data[a:b] for a, b in zip(places, places[1:], strict=False)]
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.randrange(len(parts))
            kind = rng.randrange(5)
            if kind == 0:
                added = _operation(rng)
                parts[place:place] = [added] * rng.choice((1, 1, 1, 3, 300 if len(added) < 100 else 1))
            elif kind == 1:
                del parts[place]
            elif kind == 2:
                parts[place] = _operation(rng)
            elif kind == 3:
                parts[place:place] = [parts[rng.randrange(len(parts))]]
            elif len(parts[place]) > 1:
                parts[place] = parts[place][:1] + damage_bytes(rng, parts[place][1:])
        return b"".join(parts)
    return damage_bytes(rng, data)


def _operation(rng):
    number = rng.choice(NUMBERS)
    module, name = rng.choice(NAMES).split()
    return rng.choice(
        (
            bytes([rng.randrange(256)]),
            rng.choice(b"()]}.0123RbtlduseasNQ\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94").to_bytes(1, "little"),
            b"J" + struct.pack("<i", (number + 2**31) % 2**32 - 2**31),
            b"\x8a\x08" + struct.pack("<Q", number % 2**64),
            rng.choice((b"B", b"X", b"T", b"r", b"j", b"\x8b")) + struct.pack("<I", number % 2**32),
            rng.choice((b"\x8e", b"\x8d", b"\x95", b"\x96")) + struct.pack("<Q", number % 2**64),
            rng.choice((b"h", b"q")) + bytes([rng.randrange(16)]),
            f"c{module}\n{name}\n".encode(),
            f"c{module}\n{name}\n)R".encode(),
            b"2\x86" * rng.choice((1, 30, 2000)),  # (x, x), and that twice, and that ...
            b"]" * 2000 + b"a" * 1999,
        )
    )


def damage_npy(rng, data):
    """Writes another shape, type and order into the header, whose length stays right; or damages bytes."""
    if rng.random() < 0.4 or data[:6] != b"\x93NUMPY":
        return damage_bytes(rng, data)
    (length,) = struct.unpack("<H", data[8:10])
    header = data[10 : 10 + length].decode("latin-1")
    shape = tuple(rng.choice((*NUMBERS, 3, 4)) for _ in range(rng.choice((0, 1, 2, 4, 40))))
    dtype = rng.choice(("<f4", "|O", "<f8", "V" + "9" * 9, "<M8", "|S1000000", "<U9", "f4,f4", "|b1", ">i2", "<i4"))
    header = rng.choice(
        (
            f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}",
            f"{{'descr': '<f4', 'fortran_order': {rng.choice(('True', '1', '()'))}, 'shape': {shape}, }}",
            "(" * rng.choice((90, 3000)),
            "-" * 5000 + "1",
            header.replace("shape", "shapes"),
            "[('a', '|O'), ('b', '<f4')]",
        )
    )
    header += " " * (-(len(header) + 11) % 64) + "\n"
    version = rng.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\0"))
    head = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return data[:6] + version + head + header.encode() + data[10 + length :]


def damage_safetensors(rng, data):
    """Writes another JSON into the header, whose length stays right; or damages bytes."""
    if rng.random() < 0.4:
        return damage_bytes(rng, data)
    (length,) = struct.unpack("<Q", data[:8])
    header = damage_json(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damage_zip(rng, data):
    """Damages a member and writes the zip file anew, so that its checksums are right; or damages bytes."""
    if rng.random() < 0.4:
        return damage_bytes(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[info.filename, archive.read(info)] for info in archive.infolist()]
    for member in members:
        if member[0].endswith(".pkl") and rng.random() < 0.8:
            member[1] = damage_pickle(rng, member[1])
        elif rng.random() < 0.1:
            member[1] = damage_bytes(rng, member[1])
        elif rng.random() < 0.05:
            member[0] = rng.choice(("../../x", "archive/data.pkl", "archive/data/0", "x", "/etc/x"))
    if rng.random() < 0.1:
        members.pop(rng.randrange(len(members)))
    out = io.BytesIO()
    how = zipfile.ZIP_STORED if rng.random() < 0.7 else zipfile.ZIP_DEFLATED
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", how) as archive:
        warnings.simplefilter("ignore")  # two members of one name
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue() if rng.random() < 0.8 else damage_bytes(rng, out.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Readers: valid files, how they are damaged, and what reads them
# ---------------------------------------------------------------------------------------------------------------------


def _arrays():
    rng = np.random.default_rng(0)
    return {f"layer.{i}.weight": rng.standard_normal((8, 6)).astype("f4") for i in range(5)}


def _config(folder):
    for name in ("DiT_XL_patch2.json", "SiT_XL_patch2.json"):
        shutil.copy(ROOT / "config" / name, folder)
    from config.schema import load_config
    from runtime.files import write_json

    write_json(folder / "resolved.json", load_config(str(folder / "SiT_XL_patch2.json")))


def _read_config(path):
    from config.schema import load_config

    load_config(str(path))


def _npy(folder):
    np.save(folder / "latents.npy", np.zeros((1, 4, 8, 8), "f4"))
    np.save(folder / "labels.npy", np.arange(50))
    np.save(folder / "names.npy", np.array([b"a", b"bc"]))
    np.save(folder / "fortran.npy", np.asfortranarray(np.zeros((7, 5))))


def _read_npy(path):
    from features.npy import load_npy
    from features.pairs import NpyReader

    array = NpyReader()(str(path))
    same = load_npy(str(path), mapped=True)
    assert array.shape == same.shape and array.dtype == same.dtype


def _packed(folder):
    from features.packed import ShardWriter

    with contextlib.ExitStack() as stack:
        shard = stack.enter_context(ShardWriter(str(folder), 0, row_shape=(4, 8, 8)))
        rows = np.random.default_rng(0).standard_normal((6, 4, 8, 8)).astype("f4")
        shard.append(rows, np.arange(6), [f"{i}" for i in range(6)])


def _read_packed(path):
    from features.packed import PackedStore

    store = PackedStore(str(path.parent.parent))
    if len(store) and len(store.row_shape) < 9:
        out = np.empty((1, *store.row_shape), "f4")
        for index in range(min(len(store), 8)):
            store.read(np.array([index]), out)
    store.names()


def _pdparams(folder):
    from weights.files import save_pdparams

    state = _arrays()
    save_pdparams(state, folder / "state.pdparams")
    moments = {name: {"moment1": value, "beta1_pow_acc": np.float32([0.9])} for name, value in state.items()}
    save_pdparams(moments, folder / "optimizer.pdopt")
    other = {"StructuredToParameterName@@": {"a": "b"}, "w": state["layer.0.weight"], "step": 7, "lr": [1e-4, None]}
    for protocol in range(6):
        (folder / f"protocol{protocol}.pdparams").write_bytes(pickle.dumps(other, protocol=protocol))


def _read_weights(path):
    from weights.files import safe_load

    safe_load(path, tolerant=True)  # refuses nothing that is read otherwise
    safe_load(path)


def _pt(folder):
    from weights.files import save_torch

    save_torch(_arrays(), folder / "state.pt")
    for name in ("torch_views.pt", "torch_views_legacy.pt"):
        shutil.copy(ROOT / "tests" / "data" / name, folder)


def damage_pt(rng, data):
    return (damage_zip if data.startswith(b"PK") else damage_pickle)(rng, data)


def _safetensors(folder):
    from weights.files import save_safetensors

    state = OrderedDict(_arrays(), empty=np.zeros((0, 3), "f4"), half=np.ones(3, "u2"), scalar=np.array(5))
    save_safetensors(state, folder / "state.safetensors")


def _manifest(folder):
    from runtime.files import FolderWriter

    writer = FolderWriter(folder / "checkpoint-1")
    for name in ("config.json", "model_state.pdparams", "optimizer.pdopt", "trainer_state.json"):
        with writer.open(name) as file:
            file.write(name.encode() * 20)
    writer.finish()


def _read_manifest(path):
    from weights.runs import damage

    wrong = damage(str(path.parent), required=("config.json",), checksums=True)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong}")


# name: (writes valid files into a folder, damages one's bytes, reads it, which files of the folder)
READERS = {
    "config": (_config, damage_json, _read_config, "*.json"),
    "npy": (_npy, damage_npy, _read_npy, "*.npy"),
    "packed": (_packed, damage_npy, _read_packed, "shard-*/*.npy"),
    "pdparams": (_pdparams, damage_pickle, _read_weights, "*.pd*"),
    "pt": (_pt, damage_pt, _read_weights, "*.pt"),
    "safetensors": (_safetensors, damage_safetensors, _read_weights, "*.safetensors"),
    "manifest": (_manifest, damage_json, _read_manifest, "*/manifest.json"),
}


class Hang(BaseException):
    """A file took more than `SECONDS`; no reader may catch it."""


def run(reader, count, seed):
    """Reads `count` damaged files in this process and returns the figures of `fuzz_all`."""
    make, damage, read, pattern = READERS[reader]
    rng = random.Random(f"{reader} {seed}")
    figures = {"reader": reader, "mutations": count, "loaded": 0, "refused": 0, "failures": []}
    slowest = 0.0

    def alarm(*unused):
        raise Hang

    signal.signal(signal.SIGALRM, alarm)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silent:
        folder = Path(folder)
        make(folder)
        files = sorted(folder.glob(pattern))
        originals = {path: path.read_bytes() for path in files}
        for path in files:
            read(path)  # what is not damaged loads
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            path = rng.choice(files)
            data = damage(rng, originals[path])
            path.write_bytes(data)
            failure = None
            began = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
                    read(path)
                figures["loaded"] += 1
            except (ValueError, OSError) as error:
                figures["refused"] += 1
                failure = _complaint(str(error), path)
            except Hang:
                failure = "it takes too long"
            except BaseException as error:
                failure = f"{type(error).__name__}: {error}"
            signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.perf_counter() - began)
            if failure is not None and len(figures["failures"]) < 20:
                kept = Path(tempfile.gettempdir()) / f"mutation-{reader}-{seed}-{number}{path.suffix}"
                kept.write_bytes(data)
                figures["failures"].append(f"{kept}: {failure[:300]}")
            path.write_bytes(originals[path])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**figures, "slowest_ms": round(1000 * slowest, 1), "peak_growth_mib": round(peak / 1024, 1)}


def _complaint(message, path):
    """Returns what is wrong with an error's message, or None."""
    if "\n" in message:
        return f"more than one line: {message!r}"
    if str(path.parent) not in message:
        return f"does not name the file: {message}"
    if "allocate" in message or "MemoryError" in message:
        return f"took memory first: {message}"
    return f"{len(message)} characters: {message}" if len(message) > 1000 else None


def fuzz_all(readers, count, seed=0):
    """Damages valid files of each kind `count` times and reads each, in one process beside this one.

    Args:
        readers: keys of `READERS`.

    Returns:
        For each: `reader`, `mutations`, `loaded`, `refused`, `failures` (a list of sentences; each file is kept and
        named), `slowest_ms`, `peak_growth_mib` (of resident memory over all files), `seconds`.
    """
    began = time.perf_counter()
    command = [sys.executable, __file__, ",".join(readers), str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"reader"')]
    if done.returncode or len(figures) != len(readers):
        died = readers[min(len(figures), len(readers) - 1)]
        failure = f"the process ended with {done.returncode}: {done.stderr[-500:]}"
        figures.append({"reader": died, "mutations": count, "loaded": 0, "refused": 0, "failures": [failure]})
    return [{**one, "seconds": round(time.perf_counter() - began, 1)} for one in figures]


def main():
    sys.path.insert(0, str(ROOT))
    from runtime.process import configure_runtime

    configure_runtime()
    import weights.files  # noqa: F401 (before the limit)

    readers, count, *seed = sys.argv[1:]
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + HEADROOM, taken + HEADROOM))
    for reader in readers.split(","):
        print(json.dumps(run(reader, int(count), int(*seed or [0]))), flush=True)


if __name__ == "__main__":
    main()
