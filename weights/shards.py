"""Merges the official Large-DiT shards, `consolidated.NN-of-MM.pth`, into one state."""

import re

import numpy as np
from tqdm import tqdm

from runtime.untrusted import shortened
from weights.files import load_weights

# Of the official Large-DiT: fairscale's ColumnParallelLinear splits weight and bias by rows of [out, in],
# RowParallelLinear the weight by columns (its bias is whole everywhere), ParallelEmbedding by columns.
_SHARD_AXES = (
    (r"(.*\.)?attention_norm\.weight|(.*\.)?ffn_norm\.weight|t_embedder\.mlp\.2\.bias", None),
    (r"t_embedder\.mlp\.2\.weight|y_embedder\.embedding_table\.weight", 1),
    (r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight", 1),
    (r"layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])\.weight", 0),
    (r"layers\.\d+\.attention\.[qk]_norm\.(weight|bias)", 0),
    (r"(layers\.\d+|final_layer)\.adaLN_modulation\.1\.(weight|bias)", 0),
    (r"(x_embedder|t_embedder\.mlp\.0|final_layer\.linear)\.(weight|bias)", 0),
)


def shard_axis(name):
    """Returns the axis along which the official Large-DiT splits a parameter over tensor-parallel ranks.

    It is 0 or 1, in the official layout (Linear weights [out, in]); None: every rank holds the parameter whole.
    """
    for pattern, axis in _SHARD_AXES:
        if re.fullmatch(pattern, name):
            return axis
    raise ValueError(f"{shortened(name)} is no parameter of Large-DiT")


def merge_shards(paths):
    """Returns the weights of tensor-parallel shards, given in the order of ranks, as one state in the official layout.

    One shard is in memory at a time beside the result. Raises ValueError for shards that are not those of one network.
    """
    merged, shapes = {}, {}
    for rank, path in enumerate(tqdm(paths, desc="merging shards", disable=None)):
        shard = load_weights(path)
        if rank and (other := sorted(shard.keys() ^ shapes.keys())):
            raise ValueError(f"{path}: {shortened(other[0])} is in {paths[0]} or here, but not in both")
        for name in list(shard):
            value = shard.pop(name)
            try:
                axis = shard_axis(name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}; only its shards can be merged") from None
            if rank == 0:
                shapes[name] = value.shape
                if axis is not None and value.ndim <= axis:
                    raise ValueError(f"{path}: {name} is {list(value.shape)}, which has no axis {axis} to be split")
                full = [n * len(paths) if i == axis else n for i, n in enumerate(value.shape)]
                merged[name] = value if axis is None else np.empty(full, value.dtype)
            elif value.shape != shapes[name] or value.dtype != merged[name].dtype:
                first = f"{merged[name].dtype} {list(shapes[name])}"
                raise ValueError(f"{path}: {name} is {value.dtype} {list(value.shape)}, in {paths[0]} {first}")
            elif axis is None and value.tobytes() != merged[name].tobytes():
                raise ValueError(f"{path}: {name} differs from that in {paths[0]}; every shard must hold the same")
            if axis is not None:
                rows = slice(rank * value.shape[axis], (rank + 1) * value.shape[axis])
                merged[name][rows if axis == 0 else (slice(None), rows)] = value
    return merged
