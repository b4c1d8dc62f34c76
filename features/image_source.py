"""Labelled images in a fixed order, whatever holds them: a folder by class, a list file, or tar files left unopened."""

import csv
import hashlib
import json
import os
import posixpath
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from features.images import encodable, find_images, image_formats, left_out, load_pixels, order_classes, some_of
from features.npy import load_npz
from runtime.files import whole_file
from runtime.process import counted
from runtime.progress import tqdm
from runtime.untrusted import parse_json

MAX_LABEL = 999_999  # a number beyond it is a mistake in the list


@dataclass
class ImageSource:
    """Image i is called `name(i)` and is of class `labels[i]`; `pixels(i, size)` reads it.

    Attributes:
        kind: folder, list or tar.
        root: what names and archives are relative to; it may move while an extraction rests.
        classes: names of the classes, by label.
        notes: sentences for the user on what was left out.
        archives: the tar files, "" for `root` itself.
        arrays: `labels` (N,); `names`, one block of bytes instead of a million str objects, which `ends` (N,) cuts;
            `spans` (N, 3), archive, offset and size of each image, (0, 3) for files of their own.
        background: colour that transparent images are laid over; like the next, no part of the listing.
        dim, see_through: images that were read and that the user should know of, see `load_pixels`.
    """

    kind: str
    root: str
    classes: list
    notes: list
    archives: list
    arrays: dict
    background: list | None = None
    dim: list = field(default_factory=list)
    see_through: list = field(default_factory=list)

    @property
    def labels(self):
        return self.arrays["labels"]

    def __len__(self):
        return len(self.labels)

    def _sizes(self):
        return [os.path.getsize(os.path.join(self.root, name).rstrip("/")) for name in self.archives]

    def class_counts(self):
        """Returns how many images each label has, int64 (classes,)."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def name(self, index):
        """Returns `class/file` in a folder or tar file, or the list's own entry."""
        ends = self.arrays["ends"]
        return os.fsdecode(self.arrays["names"][ends[index - 1] if index else 0 : ends[index]].tobytes())

    def pixels(self, index, size):
        """Returns the centre-cropped image, uint8 (size, size, 3); arguments and errors of `load_pixels`."""
        path = os.path.join(self.root, self.name(index))
        how = {"background": self.background, "dim": self.dim, "see_through": self.see_through}
        if not self.archives:
            return load_pixels(path, size, **how)
        archive, offset, length = self.arrays["spans"][index].tolist()
        with open(os.path.join(self.root, self.archives[archive]).rstrip("/"), "rb") as file:
            data = os.pread(file.fileno(), length, offset)
        return load_pixels(path, size, data, **how)

    def digest(self):
        """Returns the sha256 of classes, names and labels: the same for a folder and the tar files it came out of."""
        digest = hashlib.sha256(os.fsencode("\0".join(self.classes)))
        for key in ("names", "ends", "labels"):
            digest.update(self.arrays[key].tobytes())
        return digest.hexdigest()

    def save(self, path):
        """Writes the listing as `.npz`."""
        meta = {key: getattr(self, key) for key in ("kind", "classes", "archives", "notes")}
        meta = np.frombuffer(json.dumps({**meta, "sizes": self._sizes()}).encode(), dtype="uint8")
        with whole_file(path) as partial, open(partial, "wb") as file:
            np.savez(file, meta=meta, **self.arrays)

    @classmethod
    def load(cls, path, root):
        """Reads the listing that `save` wrote, of images now in `root`; ValueError if its tar files have changed."""
        arrays = load_npz(path, ["meta", "names", "ends", "labels", "spans"])
        meta = parse_json(arrays.pop("meta").tobytes())
        sizes = meta.pop("sizes")
        source = cls(root=str(root), arrays=arrays, **meta)
        if sizes != source._sizes():
            raise ValueError(f"{root}: its tar files are not those whose images were listed when the extraction began")
        return source


def source_root(data_path, list_file):
    """Returns the folder that names are relative to: `data_path`, else the list's."""
    return str(data_path or os.path.dirname(os.path.abspath(list_file)))


def open_source(data_path=None, list_file=None, earlier=None):
    """Lists the images: of a folder by class, of tar files, or those that a list file names.

    Args:
        data_path: a folder with one subfolder per class; a tar file; or a folder of one tar file per class. A tar file
            holds one tar file per class (ImageNet's ILSVRC2012_img_train.tar) or one folder per class.
        list_file: text with a line `path,label` an image. Paths are relative to `source_root`, or names in a tar file.
        earlier: see `order_classes`.

    The order is that of the list, else by label, then by name, whatever the order in a tar file: the same as in the
    folder that it was made from. What is not there, or can't be understood, is a `ValueError` of one line.
    """
    archives, notes = find_archives(data_path) if data_path else ([], [])
    root = source_root(data_path, list_file)
    if list_file:
        kind, notes, (classes, samples) = "list", [], _read_list(list_file, root, archives)
    elif archives:
        kind, (classes, samples) = "tar", _class_tars(root, archives, notes, earlier)
    else:
        kind, (found, classes) = "folder", find_images(root, notes, earlier)
        samples = [(label, path[len(os.path.join(root, "")) :]) for path, label in found]
    names = [os.fsencode(name) for _, name, *_ in samples]
    arrays = {
        "names": np.frombuffer(b"".join(names), dtype="uint8"),
        "ends": np.cumsum([len(name) for name in names], dtype="int64"),
        "labels": np.array([label for label, *_ in samples], dtype="int64"),
        "spans": np.array([span for _, _, *span in samples], dtype="int64").reshape(-1, 3),
    }
    source = ImageSource(kind, root, classes, notes, [path[len(root) :].lstrip("/") for path in archives], arrays)
    empty = [encodable(name) for name, count in zip(classes, source.class_counts(), strict=True) if not count]
    if empty:
        many = counted(len(classes), "class", "classes")
        notes.append(f"{len(empty)} of {many} have no image but keep their label: {some_of(empty)}")
    return source


def find_archives(data_path):
    """Returns (tar files, notes): those that `data_path` is or holds, none for a folder by class."""
    if os.path.isfile(data_path):
        return [data_path], []
    if not os.path.isdir(data_path):
        raise ValueError(
            f"{data_path}: no such folder or tar file; expected an image folder with one subfolder per class, or tar "
            "files of images"
        )
    entries = [entry for entry in os.scandir(data_path) if not entry.name.startswith(".")]
    archives = sorted(entry.path for entry in entries if entry.name.lower().endswith(".tar") and entry.is_file())
    if archives and any(entry.is_dir() for entry in entries):
        are = "is" if len(archives) == 1 else "are"
        return [], [f"{data_path}: its class folders are read, its {counted(len(archives), 'tar file')} {are} not"]
    return archives, []


def scan_archives(archives):
    """Finds the images in tar files by reading the headers alone; ValueError for no tar file, or a damaged one.

    Returns (found, inner, lost): [(name, archive, offset, size), ...] in no order, where one in a tar file within a tar
    file is called `class/name`; the set of those classes; the names of links and of what is no plain file.
    """
    found, inner, lost, (_, endings) = [], set(), [], image_formats()
    total = sum(os.path.getsize(path) for path in archives)
    with tqdm(total=total, desc="tar headers", unit="B", unit_scale=True, leave=False) as progress:
        for number, path in enumerate(archives):
            before = progress.n
            with open(path, "rb") as file:
                for name, offset, size in _members(file, path, inner, lost):
                    progress.update(before + offset + size - progress.n)
                    if name.lower().endswith(endings) and not posixpath.basename(name).startswith("."):
                        found.append((name, number, offset, size))
    return found, inner, lost


def _members(file, shown, inner, lost, start=0, folder=""):
    """Yields (name, offset, size) of the plain files in the tar file at `start` of a file, and in tar files in it."""
    try:
        file.seek(start)
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep a million headers
            name = posixpath.normpath(member.name).lstrip("/")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                lost.append(member.name)
            elif name.lower().endswith(".tar") and not folder:
                inner.add(Path(name).stem)
                yield from _members(file, f"{shown}: {name}", inner, lost, member.offset_data, f"{Path(name).stem}/")
            else:
                yield folder + name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise ValueError(f"{shown}: no plain tar file, or damaged or cut short ({error}); unpack a .tar.gz") from None
    # tarfile takes a damaged header for the end, which is a block of zeros.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise ValueError(f"{shown}: damaged or cut short at byte {tar.offset}")


def _class_tars(data_path, archives, notes, earlier):
    """Returns (classes, samples): samples are sorted, (label, `class/file`, archive, offset, size) of each image."""
    found, inner, lost = scan_archives(archives)
    notes += left_out("links in tar files and what is no plain file", len(lost), lost)

    def folders():
        return {name.split("/", 1)[0] for name, *_ in found}

    if inner and not folders() <= inner:
        raise ValueError(f"{data_path}: tar files of classes and other images side by side; give the first alone")
    if not inner and archives != [data_path]:
        stems = [Path(path).stem for path in archives]
        inner, found = {*stems}, [(f"{stems[span[0]]}/{name}", *span) for name, *span in found]
    # A tar file of one folder with the class folders in it.
    while len(folders()) == 1 and all(name.count("/") > 1 for name, *_ in found):
        found = [(name.split("/", 1)[1], *span) for name, *span in found]
    loose = sum("/" not in name for name, *_ in found)
    if loose:
        raise ValueError(
            f"{data_path}: {counted(loose, 'image')} in no class folder; give their classes with --list FILE, one "
            "path,label a line"
        )
    if not found:
        raise ValueError(f"{data_path}: no images found; expected one tar file or folder per class in the tar file")
    classes = order_classes(folders() | inner, notes, data_path, earlier)
    label = {class_name: number for number, class_name in enumerate(classes)}
    return classes, sorted((label[name.split("/", 1)[0]], name, *span) for name, *span in found)


def _read_list(list_file, root, archives):
    """Returns (classes, samples), as `_class_tars` does, in the list's order; without `archives` no more than names."""
    names, labels = [], []
    try:
        with open(list_file, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row or number == 1 and [cell.strip().lower() for cell in row] == ["path", "label"]:
                    continue
                # Only the last comma separates: names may hold commas, quoted or not.
                name, label = ",".join(row[:-1]), row[-1].strip()
                if not name.strip() or not label:
                    raise ValueError(f"{list_file}: line {number}: expected path,label, found {','.join(row)!r}")
                names.append(name)
                labels.append(label)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{list_file}: cannot be read as text with a line path,label an image ({error})") from None
    if not names:
        raise ValueError(f"{list_file}: no images in it; expected a line path,label an image")
    classes, labels = _number(labels, list_file)
    if not archives:
        return classes, [*zip(labels, names, strict=True)]
    found, _, _ = scan_archives(archives)
    where = {name: span for name, *span in found}
    missing = [name for name in names if posixpath.normpath(name) not in where]
    if missing:
        raise ValueError(
            f"{list_file}: {len(missing)} of its images are not in {root}, the first is {missing[0]}; the tar file "
            f"has names such as {next(iter(where), 'none')}"
        )
    return classes, [(label, name, *where[posixpath.normpath(name)]) for label, name in zip(labels, names, strict=True)]


def _number(labels, list_file):
    """Returns classes and numbers of a list's labels: numbers as they are, names in sorted order."""
    if not any(re.fullmatch(r"[+-]?[0-9.]+", label) for label in labels):
        classes, numbers = np.unique(labels, return_inverse=True)
        return classes.tolist(), numbers
    for label in labels:
        if not re.fullmatch("[0-9]{1,6}", label):
            raise ValueError(f"{list_file}: label {label}: labels are all names, or all numbers 0..{MAX_LABEL}")
    numbers = [int(label) for label in labels]
    return [str(i) for i in range(max(numbers) + 1)], numbers
