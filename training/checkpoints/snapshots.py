"""Snapshots of a run's profiles, `RUN/ema/0005000`, from which averages of other widths are reconstructed afterwards.

    std_0.05.safetensors    averages of one profile, official names, Paddle's layout; one file for each
    snapshot.json           {"step", "dtype", "profiles": [{"std", "file"}], "model": the config's section}
    manifest.json           sizes and checksums of the others; written last

They are never deleted. A resumed run renames those of later steps, `0005000.superseded`, and writes these steps again.
What has the same bytes takes the place of the renamed one; else both stay. See `training.posthoc_ema`.
"""

import filecmp
import itertools
import math
import os
import re
import shutil
from collections import namedtuple

import numpy as np

from config.checks import MAX_STD
from models.parallel import whole_shape
from runtime import process
from runtime.files import MANIFEST, clear_leftovers, delete_folder
from runtime.process import counted, one_line
from runtime.untrusted import read_json
from training.averages import PowerFunctionEMA
from training.checkpoints.background import FolderSaver
from training.parallel.shares import LocalShard
from weights.runs import damage

FOLDER = "ema"  # in a run's
SNAPSHOT = "snapshot.json"
_NAME, _SUPERSEDED = re.compile(r"^\d+$"), re.compile(r"^(\d+)\.superseded(?:-\d+)?$")

Snapshot = namedtuple("Snapshot", "step folder paths")  # paths: {std: path of its averages}


def list_snapshots(folder, say=process.say):
    """Lists the whole snapshots in the folder `ema` of a run, earliest first; it is said why another is passed over."""
    found = []
    for step, path in _numbered(folder, _NAME):
        try:
            found.append(_read(step, path))
        except ValueError as error:
            say(f"note: snapshot {path} is passed over: {error}")
    return found


def _read(step, path):
    if wrong := damage(path, required=(SNAPSHOT,)):
        raise ValueError(wrong)
    about = read_json(os.path.join(path, SNAPSHOT))
    try:
        files = {float(profile["std"]): str(profile["file"]) for profile in about["profiles"]}
        is_right = about["step"] == step and all(0 < std <= MAX_STD for std in files)
    except (TypeError, KeyError, ValueError):
        is_right = False
    if not is_right:
        raise ValueError(f"its {SNAPSHOT} is damaged")
    if wrong := damage(path, required=(SNAPSHOT, *files.values())):
        raise ValueError(wrong)
    return Snapshot(step, path, {std: os.path.join(path, name) for std, name in files.items()})


def _numbered(folder, pattern):
    """Lists `(step, path)` of the folders in `folder` whose name fits the pattern, in the order of their steps."""
    matches = map(pattern.match, os.listdir(folder) if os.path.isdir(folder) else ())
    return sorted((int(re.match(r"\d+", found[0])[0]), os.path.join(folder, found[0])) for found in matches if found)


class SnapshotSaver(FolderSaver):
    """Saves a session's profiles every `ema_snapshot_steps` and at its last step; does nothing if it has none.

    What float16 can't hold is kept in float32, tensor by tensor.
    """

    what, refused = "snapshots of the profiles", "training goes on without it"

    def __init__(self, session, **options):
        super().__init__(session, **options)
        training = session.config["training"]
        self.every, self.dtype = training["ema_snapshot_steps"], training["ema_snapshot_dtype"]
        self.profiles = [average for average in session.averages if isinstance(average, PowerFunctionEMA)]
        self.folder = os.path.join(session.folder, FOLDER)
        self._said = False

    def due(self, step):
        """Returns whether a snapshot is to be saved after this step."""
        return bool(self.profiles) and (step % self.every == 0 or step == self.session.last_step)

    def path(self, step):
        """Returns the folder of a step's snapshot."""
        return os.path.join(self.folder, f"{step:07d}")

    def begin(self):
        """Renames snapshots of later steps, and says how much room those to come will take; on rank 0."""
        first, last = self.session.first_step, self.session.last_step
        if not self.profiles or first >= last:
            return
        clear_leftovers(self.folder)
        aside = [(step, path) for step, path in _numbered(self.folder, _NAME) if step > first]
        for _, path in aside:
            name = f"{path}.superseded"
            names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
            os.rename(path, next(name for name in names if not os.path.exists(name)))
        if aside:
            steps = ", ".join(f"{step}" for step, _ in aside[:5]) + (", ..." if len(aside) > 5 else "")
            what = counted(len(aside), "snapshot")
            self.say(
                f"renamed {what} of later steps ({steps}) in {self.folder} to NAME.superseded, to be written again"
            )
        count = last // self.every - first // self.every + (last % self.every > 0)
        numel = sum(math.prod(whole_shape(parameter)) for parameter in self.session.model.parameters())
        size = len(self.profiles) * numel * np.dtype(self.dtype).itemsize
        free = shutil.disk_usage(self.session.folder).free
        stds = ", ".join(f"{profile.std:g}" for profile in self.profiles)
        self.say(
            f"post-hoc EMA (std {stds}): {counted(count, 'snapshot')} to come in {self.folder}, {_size(size)} each in "
            f"{self.dtype}, {_size(count * size)} in all; {_size(free)} are free there"
            + (": not enough" if count * size > free else "")
        )

    def files(self):
        """Yields the files of a snapshot, as `FolderSaver` says; the averages in float32."""
        session, profiles = self.session, []
        for profile in self.profiles:
            profiles.append({"std": profile.std, "file": f"{profile.name}.safetensors"})
            yield profiles[-1]["file"], LocalShard(session.model, session.optimizer).gather(profile.state_dict())
        about = {"step": session.step, "dtype": self.dtype, "profiles": profiles, "model": session.config["model"]}
        yield SNAPSHOT, about

    def copies(self):
        """Returns how many: the profiles, one of them in its own type beside."""
        return len(self.profiles) + np.dtype(self.dtype).itemsize / 4

    def prepare(self, name, value):
        """Returns the averages of a file in the snapshots' type; `value` is emptied on the way."""
        if name == SNAPSHOT or self.dtype == "float32":
            return value
        half, large = {}, []
        for key in list(value):
            array = value.pop(key)
            with np.errstate(over="ignore"):
                half[key] = array.astype(self.dtype)
            if not np.isfinite(half[key]).all():
                half[key] = array
                large.append(key)
        if large and not self._said:
            self._said = True
            self.say(f"note: {self.dtype} can't hold all values of {large[0]} and the like, which are saved in float32")
        return half

    def written(self, folder):
        """Deletes superseded snapshots of the step that have the same bytes."""
        try:
            for step, path in _numbered(self.folder, _SUPERSEDED):
                manifests = [os.path.join(each, MANIFEST) for each in (folder, path)]
                if step == int(os.path.basename(folder)) and filecmp.cmp(*manifests, shallow=False):
                    delete_folder(path)
        except OSError as error:
            self.say(f"warning: no superseded snapshot is deleted: {one_line(error)}")


def _size(number):
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
