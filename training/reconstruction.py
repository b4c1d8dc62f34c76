"""Averages of any width, put together from a run's snapshots: the second half of post-hoc EMA.

    plan = plan_averages("outputs/trainer", [0.03, 0.12])  # of the newest snapshot's step
    folders = write_averages(plan, "averages")  # averages/std_0.03, averages/std_0.12

The weights are read tensor by tensor, and of a tensor some million numbers at once, so that the widths together take no
more memory than a few of the network's largest tensors.
"""

import contextlib
import math
import os
from dataclasses import dataclass

import numpy as np

from config.schema import load_config
from models.state import INTERNAL_GUIDANCE, check_state, expected_shapes, without_regularizers
from runtime.files import whole_folder, write_json
from runtime.progress import tqdm
from runtime.run_lock import list_experiments
from runtime.untrusted import listed, read_json
from training.checkpoints.snapshots import FOLDER, SNAPSHOT, list_snapshots
from training.posthoc_ema import exponent_from_std, inner_products, reconstruction_coefficients
from weights.files import ParameterWriter, safe_load, safetensors_places
from weights.runs import CONFIG, MODEL, damage, list_checkpoints

REPORT = "reconstruction.json"
CHUNK = 1 << 22  # numbers of a tensor in memory at once, of each width and of one snapshot, in float64
ROUGH, AMPLIFIED = 0.1, 10.0  # from there on `notes` warn of a profile's error, and of the rounding of float16


@dataclass
class Plan:
    """Says which averages of a run give the wanted ones: `wanted[j] = sum over i of coefficients[i, j] stored[i]`.

    Attributes:
        run: folder of the run. config: its resolved settings. snapshots: those that are used, earliest first.
        step, stds: the wanted averages.
        stored: `[(step, std, path)]`, one for each file of averages, n of them.
        coefficients: (n, number of stds), float64. A width that is stored is taken as it is.
        condition: of the matrix of inner products that was solved.
        errors: of each std, how far the best combination of profiles is from the wanted one, as a part of its norm.
        shapes: of the averages by name: the network's, and those of internal guidance where every snapshot has it.
    """

    run: str
    config: dict
    snapshots: list
    step: int
    stds: list
    stored: list
    coefficients: np.ndarray
    condition: float
    errors: np.ndarray
    shapes: dict

    @property
    def amplification(self):
        """Returns by which factor errors that snapshots don't share, as those of float16 are, grow, of each std."""
        return np.sqrt((self.coefficients**2).sum(axis=0))

    @property
    def are_stored(self):
        """Returns, of each std, whether it is one of the stored averages."""
        return ((self.coefficients != 0).sum(axis=0) == 1) & (self.coefficients == 1).any(axis=0)

    def notes(self):
        """Lists sentences for the user on what can't be told well from these snapshots."""
        found, half = [], any(self.coefficients[i].any() and self._is_half(i) for i in range(len(self.stored)))
        for std, error, factor in zip(self.stds, self.errors, self.amplification, strict=True):
            if error > ROUGH:
                found.append(
                    f"std {std:g} at step {self.step} is a rough guess: its profile is missed by {error:.0%}; the "
                    "snapshots are too few, too far from that step, or of too different widths"
                )
            elif half and factor > AMPLIFIED:
                found.append(f"std {std:g}: the rounding of float16 snapshots is made {factor:.0f} times larger")
        return found

    def _is_half(self, index):
        return any(dtype == "f2" for dtype, _, _ in safetensors_places(self.stored[index][2]).values())


def plan_averages(run, stds, step=None):
    """Returns the `Plan` for averages of widths `stds` at a step, None for the newest snapshot's.

    Args:
        run: the Trainer's output folder, the hand-written loop's experiment, or its results folder with one of them.

    Raises:
        ValueError: one line: no snapshots, widths or a step that they can't give, or snapshots of another network.
    """
    exponent_from_std(stds)  # checks them
    if len({f"{std:g}" for std in stds}) < len(stds):
        raise ValueError(f"std {' '.join(f'{std:g}' for std in stds)}: names a width twice")
    run = _find_run(run)
    config = load_config(_find_config(run))
    snapshots = list_snapshots(os.path.join(run, FOLDER))
    if not snapshots:
        raise ValueError(f"{os.path.join(run, FOLDER)}: holds no whole snapshot")
    first, last = snapshots[0].step, snapshots[-1].step
    step = last if step is None else step
    if not first <= step <= last:
        raise ValueError(f"step {step}: expected one from {first}, the first snapshot's, to {last}, the last one's")
    stored = [(one.step, std, path) for one in snapshots for std, path in sorted(one.paths.items())]
    if len(stored) == 1 and (others := [std for std in stds if not _is_same(std, stored[0][1])]):
        raise ValueError(
            f"{stored[0][2]}: is the only average of {run}, of std {stored[0][1]:g}; for std {listed(others, 3)} it "
            "takes snapshots of more steps or widths"
        )
    shapes = _check_networks(snapshots, config, os.path.join(run, CONFIG))
    return Plan(run, config, snapshots, step, list(stds), stored, *_solve(stored, step, stds), shapes)


def _solve(stored, step, stds):
    """Returns `(coefficients, condition, errors)` of a `Plan`."""
    in_steps, in_stds = (np.array(values, "float64") for values in list(zip(*stored, strict=True))[:2])
    steps = np.full(len(stds), step, "float64")
    coefficients = reconstruction_coefficients(in_steps, in_stds, steps, stds)
    for column, std in enumerate(stds):  # a stored one is itself, free of the solver's rounding
        same = (in_steps == step) & _is_same(in_stds, std)
        if same.any():
            coefficients[:, column] = same
    profiles, wanted = (in_steps, exponent_from_std(in_stds)), (steps, exponent_from_std(stds))
    among = inner_products(profiles, profiles)
    norms = inner_products(wanted, wanted).diagonal()  # squared
    shared = (coefficients * inner_products(profiles, wanted)).sum(axis=0)
    errors = norms - 2 * shared + (coefficients * (among @ coefficients)).sum(axis=0)
    return coefficients, float(np.linalg.cond(among)), np.sqrt(np.clip(errors / norms, 0, None))


def _is_same(std, other):
    return np.isclose(std, other, rtol=1e-9, atol=0)


def check_folders(output, stds, overwrite=False):
    """Raises ValueError for a folder of `write_averages` that is there already, or can't be."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"{output}: is no folder")
    for folder in _folders(output, stds):
        if os.path.lexists(folder) and not (overwrite and os.path.isfile(os.path.join(folder, REPORT))):
            why = "is no folder of this tool" if overwrite else "exists already; give another --output, or --overwrite"
            raise ValueError(f"{folder}: {why}")


def _folders(output, stds):
    return [os.path.join(output, f"std_{std:g}") for std in stds]


def write_averages(plan, output, *, overwrite=False):
    """Writes the averages of a `Plan`, each into a folder `output/std_X` that commands take as a model; returns these.

    Each has config.json, model_state.pdparams and reconstruction.json. All are written in one pass over the snapshots,
    whose checksums are compared before, so that each is read twice. After an error there is none of them.

    Raises:
        ValueError: one line: a folder that exists, a snapshot that is damaged, or holds numbers that are not finite.
    """
    check_folders(output, plan.stds, overwrite)
    used = [index for index, row in enumerate(plan.coefficients) if row.any()]
    _check_sums(plan, used)
    folders, shapes = _folders(output, plan.stds), plan.shapes
    os.makedirs(output, exist_ok=True)
    with contextlib.ExitStack() as whole:
        partials = [whole.enter_context(whole_folder(folder)) for folder in folders]
        files = [whole.enter_context(open(os.path.join(partial, MODEL), "wb")) for partial in partials]
        writers = list(map(ParameterWriter, files))
        readers = [(_Averages(plan.stored[index][2]), plan.coefficients[index]) for index in used]
        total = sum(reader.size for reader, _ in readers)
        with tqdm(total=total, desc="reading the snapshots", unit="B", unit_scale=True) as progress:
            for name, shape in shapes.items():
                for writer, value in zip(writers, _combine(readers, name, shape, len(files), progress), strict=True):
                    writer.add(name, value.reshape(shape))
        for column, (writer, file, partial) in enumerate(zip(writers, files, partials, strict=True)):
            writer.finish()
            file.close()
            write_json(os.path.join(partial, CONFIG), plan.config)
            write_json(os.path.join(partial, REPORT), _report(plan, column))
    return folders


def _combine(readers, name, shape, width, progress):
    """Returns averages of a parameter, float32 (width, numel), summed in float64 over `[(reader, coefficients)]`."""
    numel = math.prod(shape)
    result = np.empty((width, numel), "float32")
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        sums = np.full((width, stop - start), -0.0)  # what is added to it stays as it is, -0.0 too
        for reader, coefficients in readers:
            values = reader.read(name, start, stop, progress)
            for column in coefficients.nonzero()[0]:
                sums[column] += coefficients[column] * values
        result[:, start:stop] = sums
    return result


class _Averages:
    """Reads parts of the parameters in a snapshot's file, as float64."""

    def __init__(self, path):
        self.path, self.places = path, safetensors_places(path)
        self.size = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape, _ in self.places.values())

    def read(self, name, start, stop, progress):
        dtype, _, place = self.places[name]
        size = np.dtype(dtype).itemsize
        values = np.fromfile(self.path, f"<{dtype}", stop - start, offset=place + start * size)
        if len(values) < stop - start or not np.isfinite(values).all():
            raise ValueError(f"{self.path}: {name} holds NaN or infinity, or is cut off; move this snapshot away")
        progress.update((stop - start) * size)
        return values.astype("float64")


def _report(plan, column):
    """Returns reconstruction.json of a width: what it is, and of what."""
    parts = [
        {"step": step, "std": std, "file": os.path.relpath(path, plan.run), "coefficient": float(row[column])}
        for (step, std, path), row in zip(plan.stored, plan.coefficients, strict=True)
        if row[column]
    ]
    return {
        "step": plan.step,
        "std": plan.stds[column],
        "run": os.path.abspath(plan.run),
        "condition_number": plan.condition,
        "profile_error": float(plan.errors[column]),
        "amplification": float(plan.amplification[column]),
        "snapshots": parts,
    }


def _find_run(path):
    """Returns the folder of the one run at `path` that has snapshots."""
    if not os.path.isdir(path):
        raise ValueError(f"{path}: there is no such folder")
    experiments = [run for _, run in list_experiments(path)]
    runs = [run for run in (path, *experiments) if os.path.isdir(os.path.join(run, FOLDER))]
    if not runs:
        raise ValueError(
            f"{path}: holds no snapshots (no folder {FOLDER}); expected the output of a run with --ema_profiles"
        )
    if runs[0] != path and len(runs) > 1:
        names = listed([os.path.basename(run) for run in runs], 5)
        raise ValueError(f"{path}: holds snapshots of {len(runs)} runs ({names}); give the folder of one")
    return runs[0]


def _find_config(run):
    """Returns the path of the run's resolved config: its own, else that of its newest checkpoint."""
    checkpoints = [path for folder in (run, f"{run}/checkpoints") for path in list_checkpoints(folder, restore=False)]
    found = [path for path in (f"{folder}/{CONFIG}" for folder in (run, *checkpoints[::-1])) if os.path.isfile(path)]
    if not found:
        raise ValueError(f"{run}: has no {CONFIG}; expected a run's folder")
    return found[0]


def _check_networks(snapshots, config, source):
    """Returns the `shapes` of a `Plan`; ValueError unless every snapshot is of the network of `config`, in `source`."""
    model, known = config["model"], expected_shapes(config)
    shapes = without_regularizers(known)
    second = {name: shape for name, shape in known.items() if name.startswith(INTERNAL_GUIDANCE)}
    for snapshot in snapshots:
        path = os.path.join(snapshot.folder, SNAPSHOT)
        theirs = read_json(path).get("model") or {}
        keys = [key for key in {**model, **theirs} if model.get(key) != theirs.get(key)]
        if keys:
            raise ValueError(
                f"{path}: is of another network than {source}: {keys[0]} is {theirs.get(keys[0])} there, "
                f"{model.get(keys[0])} here"
            )
        for file in snapshot.paths.values():
            held = safe_load(file, shapes_only=True)
            check_state(without_regularizers(held), shapes, source=file, what=source)
            second = {name: shape for name, shape in second.items() if name in held and held[name].shape == shape}
    return {**shapes, **second}


def _check_sums(plan, used):
    """Raises ValueError for a snapshot, among those used, whose files are not what was written."""
    paths = {plan.stored[index][2] for index in used}
    for snapshot in plan.snapshots:
        names = [os.path.basename(path) for path in snapshot.paths.values() if path in paths]
        if names and (wrong := damage(snapshot.folder, required=names, checksums=True)):
            raise ValueError(f"{snapshot.folder}: {wrong}; move this snapshot away to go without it")
