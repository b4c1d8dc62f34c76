"""A training checkpoint, and which one of a run's folder is resumed."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from config.schema import differences
from features.normalization import normalization_differences
from runtime.files import MANIFEST
from runtime.process import say
from runtime.untrusted import shortened
from weights.runs import damage, find_checkpoints, holds, is_checkpoint

OBJECTIVE = "objective.pdparams"
ENVIRONMENT = "environment.json"  # of a run's folder: where and on what it trains
AVERAGES = re.compile(r"^ema_state(?:_(.+))?\.pdparams$")


@dataclass
class Checkpoint:
    """The contents of a checkpoint: arrays by name, and `progress`, see `Session.progress`."""

    source: str
    config: dict | None
    model: dict
    averages: dict[str, dict]  # by their names, see `EMA`
    read_optimizer: Callable[[], dict]  # the largest part is read when it is wanted
    objective: dict = field(default_factory=dict)
    progress: dict = field(default_factory=dict)
    new: list = field(default_factory=list)  # parameters of the run that it has not, see `fit_regularizers`

    @property
    def optimizer(self):
        return self.read_optimizer()


def check_run(source, theirs, config):
    """Raises ValueError if `theirs`, the config of the checkpoint `source`, has another model, objective or latents.

    Other regularizers are no other objective: `checkpoints.state.fit_regularizers` says what becomes of them.
    Latents that are normalised otherwise are other latents; the `features` of `config` are those of its set.
    """
    for section in ("model", "objective"):
        if listed := differences(theirs[section], config[section], ignored=["regularizers"]):
            raise ValueError(f"{source}: holds another run's {section}: {listed}")
    for what, there, here in normalization_differences(*(each["features"] for each in (theirs, config))):
        raise ValueError(
            f"{source}: was trained on latents normalised otherwise: {what} {shortened(there, 60)} there, "
            f"{shortened(here, 60)} here; resume with its set, latent_normalization and latent_multiplier, or start "
            "anew from its weights by --pretrained_model_path"
        )


def pick_checkpoint(folder, experiment_name=None):
    """Returns the newest of `find_checkpoints` whose checksums are right, None if there are no checkpoints at all.

    One without a manifest, which can't be checked, is taken only if `folder` is that checkpoint itself. It is printed
    why a newer one is passed over. Raises ValueError, one line, if there are checkpoints, but no whole one.
    """
    if is_checkpoint(folder):
        if not holds(folder, MANIFEST):
            say(f"note: {folder} has no {MANIFEST}, as older ones: it is resumed unchecked")
        elif wrong := damage(folder, checksums=True):
            raise ValueError(
                f"{folder}: {wrong}; resume another one (or delete its {MANIFEST}, if you changed the files yourself)"
            )
        return folder
    passed = []
    for path in find_checkpoints(folder, experiment_name):
        wrong = damage(path, checksums=True)
        if wrong is None:
            return path
        say(f"note: checkpoint {path} is passed over: {wrong}")
        passed.append(f"{path}: {wrong}")
    if passed:
        raise ValueError(
            f"{folder}: none of its {len(passed)} checkpoint(s) is known to be whole; the newest is {passed[0]}; "
            f"one without a {MANIFEST} can be resumed by its own path"
        )
    return None
