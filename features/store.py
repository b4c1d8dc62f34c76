"""Where the samples of a feature set lie: finding a set in a folder, opening it, and holding it in memory.

A set is stored as pairs of small files (`features.pairs`), packed into a few large ones (`features.packed`), or as
LightningDiT stores it (`features.lightning`).
"""

import glob
import os
import re
import shlex

import numpy as np

from config.schema import manifest_features
from features import lightning
from features.layout import Layout
from features.lightning import LightningStore
from features.packed import ENCODER_FILES, PackedEncoder, PackedStore, take_rows
from features.pairs import PairEncoder, PairStore
from runtime.machine import available_memory
from runtime.process import local_processes
from runtime.progress import tqdm
from runtime.untrusted import read_json_object

# What the loader's thread reads at a time: many micro-batches in one go cost less than one by one.
READ_BYTES = 1 << 22


def find_features(feature_path, resolution):
    """Returns `(kind, name)` of the set in a feature folder, kind "packed", "pairs" or "lightning".

    The set `imagenet{resolution}` (None: `imagenet256`) if it is there, else the only one, or the only one whose
    manifest tells of images of that size. A set that is there in both forms is read packed. A folder of safetensors
    files and no such set is one of LightningDiT's. ValueError if nothing fits, more than one set does, or the set is
    not finished.
    """
    found = {}  # {name: kinds}
    is_folder = os.path.isdir(feature_path)
    for entry in os.scandir(feature_path) if is_folder else ():
        match = re.fullmatch(r"(.*)_(packed|features|packed\.partial)", entry.name)
        if match and entry.is_dir():
            found.setdefault(match[1], []).append(match[2])
    preferred = f"imagenet{resolution or 256}"
    whole = sorted(name for name, kinds in found.items() if kinds != ["packed.partial"])
    whole = [preferred] if preferred in whole else whole
    if not found and lightning.latent_files(feature_path):
        return "lightning", lightning.NAME
    if not whole and found:
        partial = Layout(feature_path, min(found)).partial
        raise ValueError(f"{partial}: is not finished; run again the command that writes it")
    if not whole:
        lacks = f"no {preferred}_features/ nor any other NAME_features/ or NAME_packed/ folder in it, nor *.safetensors"
        lacks = (
            lacks
            if is_folder
            else "no such folder; expected one with NAME_features/ and NAME_labels/, or with *.safetensors"
        )
        raise ValueError(f"feature_path {feature_path}: {lacks}{_unpacking(feature_path)}")
    if len(whole) > 1 and resolution:
        sizes = {name: read_manifest(feature_path, name).get("image_size") for name in whole}
        whole = [name for name in whole if sizes[name] == resolution] or whole
    if len(whole) > 1:
        names = ", ".join(f"{name}_{'packed' if 'packed' in found[name] else 'features'}" for name in whole)
        raise ValueError(f"{feature_path}: no {preferred}_features/ and several others ({names}); leave one")
    (name,) = whole
    unfinished = Layout(feature_path, name).state
    if os.path.isdir(unfinished):
        raise ValueError(f"{unfinished}: the extraction of {name} is not finished; run the same command again")
    return ("packed" if "packed" in found[name] else "pairs"), name


def size_note(feature_path, name, resolution):
    """Returns a sentence if the set that was found is not of the size that was asked for, else None."""
    if not resolution:
        return None
    made_of = read_manifest(feature_path, name).get("image_size")
    if made_of and made_of != resolution:
        return f"image size {resolution}: the set {name} in {feature_path} is of images of {made_of}"
    if not made_of and name != f"imagenet{resolution}":
        return f"image size {resolution}: no imagenet{resolution} in {feature_path}; its only set, {name}, is taken"
    return None


def _unpacking(feature_path):
    """Returns the end of a message on missing features: how to unpack them, if they lie there in a tar file."""
    path = os.fspath(feature_path).rstrip("/")
    files = [path, *glob.glob(glob.escape(path) + ("/*" if os.path.isdir(path) else ".t*"))]
    for tar in sorted(file for file in files if re.search(r"\.(tar(\.\w+)?|tgz)$", file) and os.path.isfile(file)):
        return (
            f"; unpack {os.path.basename(tar)} first: tar -xf {shlex.quote(tar)} -C "
            f"{shlex.quote(os.path.dirname(tar) or '.')}, and give the folder that then holds NAME_features/ and "
            "NAME_labels/"
        )
    return ""


def store_path(feature_path, kind, name):
    """Returns the `path` of a set's store."""
    layout = Layout(feature_path, name)
    return {"packed": layout.packed, "pairs": layout.features, "lightning": feature_path}[kind]


def find_place(place):
    """Returns `(feature_path, kind, name)` of the set whose store has this path; ValueError if none is there."""
    folder, base = os.path.split(os.path.abspath(place))
    name, _, kind = base.rpartition("_")
    if os.path.isdir(place) and kind in ("packed", "features") and not lightning.latent_files(place):
        return folder, "packed" if kind == "packed" else "pairs", name
    if not lightning.latent_files(place):
        raise ValueError(f"{place} is not there; --feature_path says where it is now")
    return place, "lightning", lightning.NAME


def open_store(feature_path, kind, name):
    """Returns the `PackedStore`, `PairStore` or `LightningStore` of a set."""
    if kind == "pairs":
        return PairStore(feature_path, name)
    return {"packed": PackedStore, "lightning": LightningStore}[kind](store_path(feature_path, kind, name))


def open_encoder(feature_path, kind, name, store):
    """Returns the store of a set's encoder features, in the order of `store`, its latents'; None if there are none.

    ValueError if they are not all written, or not `(tokens, width)`.
    """
    layout = Layout(feature_path, name)
    if os.path.isdir(layout.encoder_state):
        raise ValueError(
            f"{layout.encoder_state}: the extraction of encoder features is not finished; run the same command again"
        )
    if kind == "packed" and os.path.exists(os.path.join(store.shards[0], ENCODER_FILES[0])):
        encoder = PackedEncoder(store.path)
    elif kind == "pairs" and os.path.isdir(layout.encoder):
        encoder = PairEncoder(layout, store)
    else:
        return None
    if len(encoder.row_shape) != 2 or encoder.dtype.kind != "f":
        holds = f"holds {encoder.dtype} of shape {encoder.row_shape}"
        raise ValueError(f"{encoder.source(0)}: {holds}, expected encoder features of shape (tokens, width)")
    return encoder


def read_manifest(feature_path, name):
    """Returns the set's NAME_manifest.json as a dict, empty where there is none; ValueError if it is broken.

    What a folder of LightningDiT's tells without one is added.
    """
    layout = Layout(feature_path, name)
    manifest = read_json_object(layout.manifest) if os.path.exists(layout.manifest) else {}
    others = os.path.isdir(layout.features) or os.path.isdir(layout.packed)
    is_lightning = name == lightning.NAME and not others and lightning.latent_files(feature_path)
    return lightning.complete_manifest(feature_path, manifest) if is_lightning else manifest


def read_description(feature_path, name):
    """Returns what a set's manifest says as a config's `features` section; the class names stand in another file."""
    manifest = read_manifest(feature_path, name)
    features = manifest_features(manifest, Layout(feature_path, name).manifest)
    vae = features["vae"]
    if vae is not None and vae["name"] is not None:
        # A relative path is the extraction's, and a run may be resumed or sampled from anywhere.
        path = manifest["vae"].get("path")
        if isinstance(path, str) and (os.path.isdir(path) or not os.path.isdir(vae["name"])):
            vae["name"] = path
        elif os.path.isdir(vae["name"]):
            vae["name"] = os.path.abspath(vae["name"])
    return features


class MemoryStore:
    """The samples `indices`, `(n,)`, of another store, held in this process's memory, with `flip` mirrored ones too.

    Every store has `path`, `dtype`, `row_shape`, `has_flip`, `labels`, `read` and `source`; `reads_in_processes` if
    reading takes Python's lock for long. ValueError if the samples don't fit into the free memory.
    """

    reads_in_processes = False

    def __init__(self, store, indices, *, flip):
        self._store, self._indices = store, indices
        self.path, self.row_shape, self.has_flip = store.path, store.row_shape, flip
        self.dtype = np.dtype("float32") if type(store) is PairStore else store.dtype  # pairs may be of several
        shape = ((1 + flip) * len(indices), *self.row_shape)  # mirrored twins behind all others
        self.num_bytes = int(np.prod(shape)) * self.dtype.itemsize
        memory, processes = available_memory() or np.inf, local_processes()  # each holds the samples for itself
        if self.num_bytes * processes > 0.9 * memory:
            raise ValueError(
                f"{self.path}: {len(indices):,} samples take {self.num_bytes / 2**30:.1f} GiB of memory in each of "
                f"{processes} process(es), {memory / 2**30:.1f} GiB are free; leave them on the disk, which the system "
                "caches for all of them"
            )
        self._rows = np.empty(shape, self.dtype)
        self.labels = np.empty(len(indices), "int64")
        step = max(1, READ_BYTES // (self._rows[:1].nbytes or 1))
        with tqdm(total=len(self._rows), desc="to memory", unit="row", disable=len(indices) < 10_000) as bar:
            for start in range(0, len(self._rows), step):
                twin, part = np.divmod(np.arange(start, min(start + step, len(self._rows))), len(indices))
                self.labels[part] = store.read(indices[part], self._rows[start : start + step], twin.astype(bool))
                bar.update(len(part))

    def __len__(self):
        return len(self.labels)

    def read(self, indices, out, mirrored=None):
        """Puts rows into `out` and returns their labels; see `PackedStore.read`."""
        take_rows(self._rows, indices if mirrored is None else indices + len(self) * mirrored, out)
        return self.labels[indices]

    def source(self, index, kind="latents"):
        return self._store.source(self._indices[index], kind)
