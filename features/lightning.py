"""LightningDiT's folders of latents: safetensors, memory-mapped, and their mean and standard deviation by channel.

    FEATURE_PATH/*.safetensors        in the order of their names, row by row:
        latents                       float32 or float16 (n, C, h, w), as the autoencoder gives them: not scaled
        latents_flip                  in every file or in none: the same of the mirrored images
        labels                        int64 (n,)
    FEATURE_PATH/latents_stats.pt     {"mean", "std"}, each (1, C, 1, 1); without it they are computed at every start

The official extraction writes them as latents_rankRR_shardSSS.safetensors.
"""

import os

import numpy as np

from features.packed import MappedStore, allow_open_files
from features.statistics import channel_sums, sample_statistics
from runtime.untrusted import listed
from weights.files import safe_load, safetensors_places

NAME = "latents"  # of the set, for the files that may stand beside it: latents_classes.json, latents_manifest.json
STATISTICS = "latents_stats.pt"
MAX_ROWS = 10_000  # of which the statistics are computed, as officially
_BYTES = 1 << 26  # read at a time for them


def latent_files(folder):
    """Lists the names of a folder's files of latents, sorted; none for what is no folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("."))


def complete_manifest(folder, manifest):
    """Returns what a folder tells, as a set's manifest tells it, with what is in its latents_manifest.json."""
    channels = _places(os.path.join(folder, latent_files(folder)[0]))["latents"][1][1]
    told = {"moments": False, "scaling_factor": 1.0, "latent_normalization": "channel", **manifest}
    vae = told.get("vae")
    told["vae"] = {"latent_channels": channels, **(vae if isinstance(vae, dict) else {})}
    statistics = os.path.join(folder, STATISTICS)
    if os.path.exists(statistics):
        mean, std = read_statistics(statistics, channels)
        told |= {"channel_mean": mean.tolist(), "channel_std": std.tolist()}
    return told


def read_statistics(path, channels):
    """Returns `(mean, std)`, each `(C,)`, of a latents_stats.pt; ValueError if it is broken or misfits."""
    content, found = safe_load(path), []
    for key in ("mean", "std"):
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            raise ValueError(f'{path}: has no {key}; expected {{"mean", "std"}}, float tensors (1, C, 1, 1)')
        if value.shape != (1, channels, 1, 1):
            raise ValueError(f"{path}: {key} is of shape {value.shape}, expected (1, {channels}, 1, 1)")
        if not np.isfinite(value).all() or (key == "std" and not (value > 0).all()):
            raise ValueError(f"{path}: {key} holds {'numbers not above 0' if key == 'std' else 'no finite numbers'}")
        found.append(value.reshape(-1))
    return found


class LightningStore(MappedStore):
    """The latents in `folder`; ValueError names a file that is broken, not whole, or unlike the others."""

    labels_name = "labels"

    def __init__(self, folder):
        folder = os.fspath(folder)
        paths = [os.path.join(folder, name) for name in latent_files(folder)]
        if not paths:
            raise ValueError(f"{folder}: no .safetensors file in it")
        allow_open_files(2 * len(paths))
        self.files, has_flip = [], "latents_flip" in _places(paths[0])
        super().__init__(folder, self._open(paths, has_flip), has_flip=has_flip)

    def _open(self, paths, has_flip):
        """Yields labels and maps of each file that has rows."""
        for path in paths:
            places = _places(path)
            if ("latents_flip" in places) != has_flip:
                raise ValueError(f"{path}: latents_flip must be in every file, or in none")
            dtype, shape, _ = places["labels"]
            names = ["latents", "latents_flip"][: 1 + has_flip]
            if dtype not in ("i8", "i4") or len(shape) != 1:
                raise ValueError(f"{path}: labels are {_named(dtype)} of shape {shape}, expected int64 (n,)")
            if shape == (0,) and all(0 in places[name][1] for name in names):
                continue
            labels = np.array(_mapped(path, places["labels"]) if shape[0] else np.empty(0, "int64"), "int64")
            for name in names:
                dtype, rows, _ = places[name]
                if dtype not in ("f4", "f2") or len(rows) != 4 or 0 in rows:
                    expected = "expected float32 or float16 (n, C, h, w)"
                    raise ValueError(f"{path}: {name} are {_named(dtype)} of shape {rows}, {expected}")
            self.files.append(path)
            yield labels, {f"{path}: {name}": _mapped(path, places[name]) for name in names}

    def names(self):
        """Returns names for the samples, their numbers: `(N,)` bytes."""
        return np.array([b"%08d" % index for index in range(len(self))], dtype=bytes)

    def source(self, index, kind="latents"):
        """Returns where a sample's latent, its mirrored twin ("flipped") or its label ("labels") stands."""
        file, row = self.place(index)
        return f"{self.files[file]}: {'latents_flip' if kind == 'flipped' else kind} row {row}"

    def compute_statistics(self):
        """Returns `(mean, std)`, each float32 `(C,)`, of all rows, or of `MAX_ROWS` of them that lie evenly apart.

        The official class draws rows at random; these are the same on every rank.
        """
        indices = np.unique(np.linspace(0, len(self) - 1, min(MAX_ROWS, len(self))).round().astype("int64"))
        step, sums = max(1, _BYTES // self._row_bytes), 0
        for start in range(0, len(indices), step):
            part = indices[start : start + step]
            rows = np.empty((len(part), *self.row_shape), "float32")
            self.read(part, rows)
            sums += channel_sums(rows, self.row_shape[0])
        return [values.astype("float32") for values in sample_statistics(sums)]


def _places(path):
    """Returns what `safetensors_places` does of a file of latents; ValueError if it holds something else."""
    places = safetensors_places(path)
    if missing := [name for name in ("latents", "labels") if name not in places]:
        holds = listed(list(places), 5) or "nothing"
        raise ValueError(f"{path}: has no {missing[0]}, but {holds}; expected latents, latents_flip and labels")
    if len(places["latents"][1]) != 4:
        raise ValueError(f"{path}: latents are of shape {places['latents'][1]}, expected (n, C, h, w)")
    return places


def _mapped(path, place):
    dtype, shape, offset = place
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", offset, shape)


def _named(dtype):
    return dtype if dtype == "bfloat16" else np.dtype(dtype).name
