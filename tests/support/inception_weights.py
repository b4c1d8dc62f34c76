"""Random weights for FID's Inception, the same bits on every machine, and in PyTorch's two formats without PyTorch.

The golden vectors `evaluation_*.npz` were made with those of seed 20151205; `digest` tells whether they are the same.
"""

import hashlib
import math
import pickle
import struct
import zipfile

import numpy as np

# Names and shapes


def convolutions():
    """{convolution with its batch norm: (out, in, kernel height, kernel width)} of the whole network."""
    found = {}

    def add(block, **branches):
        for branch, (n_in, n_out, height, width) in branches.items():
            found[f"{block}{branch}"] = n_out, n_in, height, width

    add(
        "Conv2d_",
        **{
            "1a_3x3": (3, 32, 3, 3),
            "2a_3x3": (32, 32, 3, 3),
            "2b_3x3": (32, 64, 3, 3),
            "3b_1x1": (64, 80, 1, 1),
            "4a_3x3": (80, 192, 3, 3),
        },
    )
    for block, n, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        add(
            f"Mixed_{block}.",
            branch1x1=(n, 64, 1, 1),
            branch5x5_1=(n, 48, 1, 1),
            branch5x5_2=(48, 64, 5, 5),
            branch3x3dbl_1=(n, 64, 1, 1),
            branch3x3dbl_2=(64, 96, 3, 3),
            branch3x3dbl_3=(96, 96, 3, 3),
            branch_pool=(n, pool, 1, 1),
        )
    add(
        "Mixed_6a.",
        branch3x3=(288, 384, 3, 3),
        branch3x3dbl_1=(288, 64, 1, 1),
        branch3x3dbl_2=(64, 96, 3, 3),
        branch3x3dbl_3=(96, 96, 3, 3),
    )
    for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        add(
            f"Mixed_{block}.",
            branch1x1=(768, 192, 1, 1),
            branch7x7_1=(768, c, 1, 1),
            branch7x7_2=(c, c, 1, 7),
            branch7x7_3=(c, 192, 7, 1),
            branch7x7dbl_1=(768, c, 1, 1),
            branch7x7dbl_2=(c, c, 7, 1),
            branch7x7dbl_3=(c, c, 1, 7),
            branch7x7dbl_4=(c, c, 7, 1),
            branch7x7dbl_5=(c, 192, 1, 7),
            branch_pool=(768, 192, 1, 1),
        )
    add(
        "Mixed_7a.",
        branch3x3_1=(768, 192, 1, 1),
        branch3x3_2=(192, 320, 3, 3),
        branch7x7x3_1=(768, 192, 1, 1),
        branch7x7x3_2=(192, 192, 1, 7),
        branch7x7x3_3=(192, 192, 7, 1),
        branch7x7x3_4=(192, 192, 3, 3),
    )
    for block, n in (("7b", 1280), ("7c", 2048)):
        add(
            f"Mixed_{block}.",
            branch1x1=(n, 320, 1, 1),
            branch3x3_1=(n, 384, 1, 1),
            branch3x3_2a=(384, 384, 1, 3),
            branch3x3_2b=(384, 384, 3, 1),
            branch3x3dbl_1=(n, 448, 1, 1),
            branch3x3dbl_2=(448, 384, 3, 3),
            branch3x3dbl_3a=(384, 384, 1, 3),
            branch3x3dbl_3b=(384, 384, 3, 1),
            branch_pool=(n, 192, 1, 1),
        )
    return found


def shapes():
    """{name: shape} of the state dict: 566 entries."""
    found = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in convolutions().items():
        found[f"{name}.conv.weight"] = shape
        for key in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.bn.{key}"] = shape[:1]
        found[f"{name}.bn.num_batches_tracked"] = ()
    return found


# Values

UNIT = math.sqrt(3) / 65536  # a sum of four 16-bit numbers, centred, times this has a standard deviation of 1


def weights(seed):
    """{name: array} in the order of `sorted`: float32, num_batches_tracked int64.

    All draws come from one PCG64(seed), name after name, as raw 64-bit words. Up to the last rounding to float32 the
    arithmetic is that of integers, or a single product or sum of float64, so nothing depends on numpy's version.
    """
    bits = np.random.PCG64(seed)

    def bell(shape):
        """Integers, nearly normal: the four 16-bit parts of each word added, minus 2 * 65535."""
        words = bits.random_raw(math.prod(shape)).astype("<u8")
        return words.view("<u2").reshape(*shape, 4).astype(np.int64).sum(-1) - 131070

    def uniform(shape, low, high):
        return low + (high - low) * ((bits.random_raw(math.prod(shape)) >> np.uint64(11)) * 2.0**-53)

    def convolution(shape):
        # Half of its mean is taken from every filter: then the positive mean of the ReLUs does not drown what tells
        # images apart, as it would if nothing were taken, nor does rounding grow from layer to layer, as with all.
        fan_in = math.prod(shape[1:])
        values = bell(shape)
        values = 2 * fan_in * values - values.sum(axis=(1, 2, 3), keepdims=True)
        return values * (math.sqrt(2.45 / fan_in) * UNIT / (2 * fan_in))

    kinds = {
        "conv.weight": convolution,
        "bn.weight": lambda shape: uniform(shape, 0.8, 1.2),
        "bn.bias": lambda shape: bell(shape) * (0.1 * UNIT),
        "bn.running_mean": lambda shape: bell(shape) * (0.1 * UNIT),
        "bn.running_var": lambda shape: uniform(shape, 0.5, 1.5),
        "fc.weight": lambda shape: bell(shape) * (0.06 * UNIT),
        "fc.bias": lambda shape: bell(shape) * UNIT,
    }
    found = {}
    for name, shape in sorted(shapes().items()):
        kind = ".".join(name.rsplit(".", 2)[-2:])
        if kind == "bn.num_batches_tracked":
            found[name] = np.array(0, np.int64)
        else:
            found[name] = kinds[kind](shape).astype(np.float32)
    return found


def digest(state):
    """sha256 of all names and values, to tell whether two machines made the same."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        total.update(name.encode() + np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()


# PyTorch files

STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage", "int64": "LongStorage"}


def save(state, path, legacy=False):
    """{name: array} as `torch.save` of a state dict writes it: a zip file, or (`legacy`) the format before 1.6."""
    program = _pickle(state, legacy)
    arrays = [np.ascontiguousarray(value, value.dtype.newbyteorder("<")) for value in state.values()]
    if legacy:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        with open(path, "wb") as file:
            for head in (0x1950A86A20F9469CFC6C, 1001, system):
                pickle.dump(head, file, protocol=2)
            file.write(program)
            pickle.dump([str(index) for index in range(len(arrays))], file, protocol=2)
            for value in arrays:
                file.write(struct.pack("<q", value.size) + value.tobytes())
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        for index, value in enumerate(arrays):
            archive.writestr(f"archive/data/{index}", value.tobytes())
        archive.writestr("archive/version", "3\n")


def _pickle(state, legacy):
    """The pickle (protocol 2) of an OrderedDict of tensors: each torch._utils._rebuild_tensor_v2 of its storage."""

    def text(value):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def integer(value):
        return b"J" + struct.pack("<i", value)

    ordered = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", ordered, b"("]
    for index, (name, value) in enumerate(state.items()):
        strides = [step // value.itemsize for step in np.empty(value.shape, value.dtype).strides]
        storage = b"".join(
            [
                b"(",
                text("storage"),
                f"ctorch\n{STORAGES[str(value.dtype)]}\n".encode(),
                text(str(index)),
                text("cpu"),
                integer(value.size),
                b"N" if legacy else b"",
                b"tQ",
            ]
        )
        parts += [
            text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            storage,
            integer(0),
            b"(",
            *map(integer, value.shape),
            b"t",
            b"(",
            *map(integer, strides),
            b"t",
            b"\x89",
            ordered,
            b"tR",
        ]
    return b"".join([*parts, b"u."])
