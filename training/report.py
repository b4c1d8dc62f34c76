"""One HTML page on a run: status, curves, previews, settings, data, environment. It needs no Paddle and no network.

Everything is read from the run's folder, and from its set of features if that is still there. Names and texts may be
anybody's: the template escapes them, and the page's own policy forbids scripts and whatever is not in the page.
"""

import base64
import contextlib
import glob
import io
import json
import math
import os
import shlex
import time

import numpy as np

from config import options
from config.schema import MODEL_TYPES, load_config
from features.layout import Layout
from features.order import total_steps
from features.store import find_features, find_place, open_store, read_manifest, store_path
from runtime.commands import python_command, resume_flag, shell_path
from runtime.process import counted, one_line
from runtime.run_lock import check_idle, list_experiments
from runtime.untrusted import read_json_object, shortened
from training.checkpoints.best import read_best
from training.checkpoints.find import ENVIRONMENT
from training.curves import is_number, last_branch, make_chart, series
from training.metrics import EVALUATIONS, read_rows
from training.parallel.memory_plan import Sizes
from weights.runs import STATE, damage, find_checkpoints, step_of

GENERATOR = "tools/report.py"
MAX_PREVIEWS, MAX_SIDE, TINY_SIDE = 12, 768, 200  # pictures of a page; pixels of one
LATENTS_LOOKED_AT, MAX_LABEL_FILES = 256, 20_000  # samples that are read for the data card


def find_run(path):
    """Returns the folder of the run at `path`: itself, that of a checkpoint, the newest of a folder of runs.

    The folder of runs may also be `train` in that folder, as quickstart.sh makes it. ValueError if there is none.
    """
    folder = os.path.abspath(path)
    above, runs = os.path.dirname(folder), []
    for parent in (folder, os.path.join(folder, "train")):
        runs += [parent, *(run for _, run in reversed(list_experiments(parent)))]
    if os.path.isfile(os.path.join(folder, STATE)):  # a checkpoint, directly in its run or in `checkpoints`
        runs = [above, os.path.dirname(above)]
    for run in runs:
        names = [name for name in ("metrics.jsonl", ENVIRONMENT) if os.path.isfile(os.path.join(run, name))]
        if names and os.path.isfile(os.path.join(run, "config.json")):
            return run
    what = "no such folder" if not os.path.isdir(folder) else "no run of either training loop in it"
    raise ValueError(f"{path}: {what}; expected the folder with a run's config.json and metrics.jsonl")


def is_own_page(path):
    """Returns whether a file is a page that `render_report` has made, so that a new one may replace it."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(1000)
    return False


def render_report(run, *, samples=(), feature_path=None):
    """Returns the page of a run's folder as text.

    Args:
        samples: paths of pictures to show beside the run's own `samples*.png`; ValueError for one that can't be read.
        feature_path: the folder of its set, if that is not where it was when the run started.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(os.path.dirname(os.path.abspath(__file__)))
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return template.get_template("report.html.j2").render(**gather(run, samples=samples, feature_path=feature_path))


def gather(run, *, samples=(), feature_path=None):
    """Returns what the template shows of a run's folder; see `render_report`."""
    notes, config = [], load_config(os.path.join(run, "config.json"))
    environment = {}
    with contextlib.suppress(ValueError):
        environment = read_json_object(os.path.join(run, ENVIRONMENT))
    names = {"train": "metrics.jsonl", "validation": "validation.jsonl", "evaluation": EVALUATIONS}
    rows = {kind: last_branch(read_rows(os.path.join(run, name)) or []) for kind, name in names.items()}
    best = read_best(run)
    best = best if best is not None and is_number(best["value"]) else None
    checkpoints = _checkpoints(run, best)
    status, steps = _status(run, config, rows["train"], checkpoints)
    data, classes = _data(config, environment, feature_path, notes)
    usable = [row["path"] for row in checkpoints if row["usable"]]
    chosen = [row["path"] for row in checkpoints if row["usable"] and row["best"]] or usable
    return {
        "generator": GENERATOR,
        "name": _run_name(run),
        "title": _title(config),
        "folder": shortened(run, 500),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "status": status,
        "tiles": _tiles(rows, best),
        "charts": _charts(rows, steps),
        "previews": _previews(run, notes),
        "averaged": config["training"]["use_ema"],
        "samples": [*_own_samples(run, notes), *map(_sample, samples)],
        "settings": _settings(config),
        "data": data,
        "classes": classes,
        "checkpoints": checkpoints,
        "environment": [
            (key.replace("_", " "), _text(value))
            for key, value in environment.items()
            if key not in ("command", "folder", "features") and value is not None
        ],
        "commands": _commands(run, config, environment, status, chosen),
        "notes": notes,
    }


def _run_name(run):
    name, above = os.path.basename(run), os.path.basename(os.path.dirname(run))
    return shortened(f"{above}/{name}" if list_experiments(os.path.dirname(run)) and name[:1].isdigit() else name, 200)


def _text(value):
    """Returns a setting's value as text: that of JSON, but words without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _title(config):
    model, parameters = config["model"], ""
    with contextlib.suppress(ValueError):  # a network that the planner does not know
        numel = sum(parameter.numel() for parameter in Sizes(config).parameters)
        parameters = f" with {numel / 1e6:,.1f} million parameters"
    latents = f"{model['in_channels']} x {model['sample_size']} x {model['sample_size']}"
    kind = f"{model['type']}, patch {model['patch_size']}{parameters}"
    return f"{kind}, latents {latents}, {counted(model['num_classes'], 'class', 'classes')}"


# ---- Where the run stands ----


def _checkpoints(run, best):
    rows = []
    for path in find_checkpoints(run, restore=False)[::-1]:  # it may go on while this reads
        wrong, folder = damage(path), os.path.relpath(path, run)
        sizes = [entry.stat().st_size for entry in os.scandir(path) if entry.is_file()]
        is_best = best is not None and folder == best["checkpoint"]
        note = f"best by {best['metric']}: {best['value']:.4g}" if is_best else ""
        row = {"step": step_of(path), "path": path, "folder": folder, "size": f"{sum(sizes) / 2**20:,.1f} MiB"}
        rows.append({**row, "usable": wrong is None, "best": is_best, "note": wrong or note})
    return rows


def _status(run, config, rows, checkpoints):
    """Returns `({"kind", "text"}, (first, last) step of the curves)`."""
    progress = {}
    for row in checkpoints[::-1]:
        with contextlib.suppress(ValueError):
            progress = read_json_object(os.path.join(row["path"], STATE))
            break
    training = config["training"]
    last = training["max_steps"] if training["max_steps"] > 0 else None
    if last is None and isinstance(progress.get("num_samples"), int):
        settings = {key: training[key] for key in ("global_batch_size", "max_steps", "epochs")}
        last = total_steps(progress["num_samples"], **settings)
    saved = checkpoints[-1]["step"] if checkpoints else 0
    step = max(rows[-1]["step"] if rows else 0, saved)
    where = f"step {step:,} of {last:,}" if last else f"step {step:,}"
    try:
        check_idle(run)
        is_idle = True
    except ValueError:
        is_idle = False
    if not is_idle:
        status = {"kind": "running", "text": f"under way: {where}"}
    elif last is not None and step >= last:
        status = {"kind": "finished", "text": f"finished: {where}"}
    else:
        status = {
            "kind": "stopped",
            "text": f"stopped at {where}; saved: " + (f"step {saved:,}" if saved else "nothing"),
        }
    if dumps := os.path.isdir(os.path.join(run, "bad_steps")) and os.listdir(os.path.join(run, "bad_steps")):
        status["text"] += f"; {counted(len(dumps), 'step')} that was not finite: bad_steps/"
    return status, (0, last if not is_idle else step)


def _tiles(rows, best):
    train, tiles = rows["train"], []
    if train:
        losses = [value for _, value in series(train, "loss") if value is not None]
        speeds = [value for _, value in series(train, "samples_per_second") if value is not None]
        steps = [0, *(row["step"] for row in train)]
        rates = [value for _, value in series(train, "steps_per_second")]
        seconds = sum((b - a) / rate for a, b, rate in zip(steps, steps[1:], rates, strict=False) if rate)
        if losses:
            losses = losses[-min(10, math.ceil(len(losses) / 10)) :]
            tiles.append(("loss", f"{np.mean(losses):.4f}", f"mean of the last {counted(len(losses), 'report')}"))
        if speeds:
            tiles.append(("samples a second", f"{np.median(speeds):,.1f}", "median of all reports"))
        if seconds:
            hours, minutes = divmod(round(seconds / 60), 60)
            shown = f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
            tiles.append(("training", shown, "without saving and drawing"))
        if is_number(train[-1].get("epoch")):
            tiles.append(("epochs", f"{train[-1]['epoch']:.1f}", "passes over the set"))
    for row in rows["validation"][-1:]:
        key = "ema_loss" if "ema_loss" in row else "loss"
        shown = f"{row[key]:.4f}" if is_number(row.get(key)) else "not finite"
        tiles.append(("validation loss", shown, "averaged weights" * (key == "ema_loss")))
    if best is not None:
        tiles.append((f"best {best['metric']}", f"{best['value']:.4g}", f"step {best['step']:,}"))
    return tiles


def _charts(rows, steps):
    first, last = steps
    train, validation, evaluation = (rows[kind] for kind in ("train", "validation", "evaluation"))
    parts = sorted({key for row in train for key in row if key.startswith("loss_")})
    held_out = {"network": series(validation, "loss"), "averaged": series(validation, "ema_loss")}
    metrics = {key: None for row in evaluation for key in row if key not in ("step", "num_samples", "settings")}
    ends = {"first": first, "last": last}
    charts = [
        make_chart("Training loss", {"loss": series(train, "loss")}, smooth=True, **ends),
        make_chart("Validation loss", held_out, **ends),
        *(make_chart(f"Loss of {key[5:]}", {key[5:]: series(train, key)}, smooth=True, **ends) for key in parts),
        *(make_chart(key, {key: series(evaluation, key)}, **ends) for key in metrics),
        make_chart("Gradient norm", {"norm": series(train, "grad_norm")}, smooth=True, **ends),
        make_chart("Learning rate", {"rate": series(train, "learning_rate")}, may_be_log=False, **ends),
        make_chart("Samples a second", {"speed": series(train, "samples_per_second")}, **ends),
        make_chart("Peak memory, GiB", {"memory": series(train, "peak_memory_gib")}, **ends),
    ]
    return [chart for chart in charts if chart is not None]


# ---- Pictures ----


def _picture(path, caption):
    """Returns a picture for the template, made smaller if it is large; OSError or ValueError if it can't be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            image = image.convert("RGBA" if alpha else "RGB")
    except (Image.DecompressionBombError, SyntaxError) as error:  # Pillow's own, of a damaged PNG
        raise ValueError(f"{path}: {one_line(error)}") from None
    if alpha:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    tiny = max(image.size) <= TINY_SIDE
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer, kind = io.BytesIO(), "png" if tiny else "jpeg"
    image.save(buffer, kind.upper(), **({} if tiny else {"quality": 88}))
    data = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"data": data, "caption": caption, "tiny": tiny}


def _previews(run, notes):
    paths = {}
    for path in glob.glob(os.path.join(glob.escape(run), "images", "*.png")):
        name = os.path.splitext(os.path.basename(path))[0]
        if name.isdecimal():
            paths[int(name)] = path
    steps, found = sorted(paths), []
    for place in np.linspace(0, len(steps) - 1, min(MAX_PREVIEWS, len(steps))).round().astype(int):
        step = steps[place]
        try:
            found.append(_picture(paths[step], f"step {step:,}"))
        except (OSError, ValueError):  # one that is being written, or that a kill has cut
            notes.append(f"the preview of step {step:,} can't be read")
    if len(steps) > MAX_PREVIEWS:
        notes.append(f"{MAX_PREVIEWS} of {len(steps)} previews are shown, evenly chosen; all are in images/")
    return found


def _own_samples(run, notes):
    """Lists the pictures `samples*.png` in the run's folder, which `_commands` proposes to draw."""
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(run), "samples*.png")))[:MAX_PREVIEWS]:
        try:
            found.append(_sample(path))
        except ValueError as error:
            notes.append(str(error).removeprefix("--samples "))
    return found


def _sample(path):
    try:
        return _picture(path, shortened(os.path.basename(path), 200))
    except FileNotFoundError:
        raise ValueError(f"--samples {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--samples {path}: can't be read as a picture ({one_line(error)})") from None


# ---- Settings, data, what comes next ----


def _settings(config):
    """Lists every key of a resolved config with its default and help; `differs` says that it has another value."""
    objective = options.OBJECTIVE_KEYS[config["objective"]["type"]]
    kind = MODEL_TYPES[config["model"]["type"]]
    tables = {"model": kind.keys, "objective": objective, "training": options.TRAINING_KEYS}
    tables |= {"data": options.DATA_KEYS, "evaluation": options.EVALUATION_KEYS, "guidance": options.GUIDANCE_KEYS}
    rows = []
    for section, table in tables.items():
        if "type" in config[section]:
            default = kind.objective if section == "objective" else "DiT"
            value, row = config[section]["type"], {"section": section, "key": "type", "default": default, "help": ""}
            rows.append({**row, "value": value, "differs": section == "model" or value != default})
        for key, option in table.items():
            value, required = config[section][key], option.default is options.REQUIRED
            row = {
                "section": section,
                "key": key,
                "value": _text(value),
                "help": options.in_loop(option.help, "trainer"),
            }
            default = "-" if required else _text(option.default)
            rows.append({**row, "default": default, "differs": required or value != option.default})
    return rows


def _data(config, environment, feature_path, notes):
    """Returns `(rows, classes)` of the data card: what the run has saved, and what its set tells if it is there."""
    features, rows, counts = config["features"], [], {}
    place = environment.get("features")
    if feature_path is not None:
        kind, name = find_features(feature_path, features["image_size"])
        place = store_path(feature_path, kind, name)
    if features["image_size"]:
        rows.append(("images", f"{features['image_size']} x {features['image_size']} pixels"))
    if isinstance(place, str):
        try:
            found, counts = _look_at_set(place)
            rows += found
        except (OSError, ValueError) as error:
            notes.append(f"the set of features is not looked at: {shortened(one_line(error), 500)}")
    for key, value in (features["vae"] or {}).items():
        if value is not None:
            rows.append(("autoencoder" if key == "name" else f"autoencoder's {key}", _text(value)))
    if config["data"]["classes"]:
        rows.append(("classes trained on", ", ".join(map(str, config["data"]["classes"]))))
    rows.append(("held out for validation", f"{config['data']['validation_samples']:,} samples"))
    names = features["class_names"] or {}
    labels = sorted({*map(int, names), *counts})
    return rows, [(label, names.get(str(label), ""), counts.get(label, "")) for label in labels]


def _look_at_set(place):
    """Returns `(rows, {label: images})` of the set whose latents lie in the folder `place`."""
    feature_path, kind, name = find_place(place)
    store, manifest = open_store(feature_path, kind, name), read_manifest(feature_path, name)
    counts = manifest.get("class_counts")
    if isinstance(counts, list) and all(isinstance(count, int) for count in counts):
        counts = dict(enumerate(counts))
    elif kind != "pairs" or len(store) <= MAX_LABEL_FILES:
        counts = dict(zip(*(a.tolist() for a in np.unique(store.labels, return_counts=True)), strict=True))
    else:
        counts = {}
    shape = " x ".join(map(str, store.row_shape))
    rows = [("features", shortened(store.path, 500)), ("samples", f"{len(store):,}"), ("stored rows", shape)]
    if isinstance(source := manifest.get("source"), dict) and isinstance(source.get("path"), str):
        rows.append(("made from", shortened(source["path"], 500)))
    if store.has_flip:
        rows.append(("mirrored latents", "yes"))
    if os.path.exists(Layout(feature_path, name).manifest) and manifest.get("unreadable"):
        rows.append(("images left out", f"{len(manifest['unreadable']):,}, which could not be read"))
    indices = np.unique(np.linspace(0, len(store) - 1, min(LATENTS_LOOKED_AT, len(store))).astype("int64"))
    latents = np.empty((len(indices), *store.row_shape), "float32")
    store.read(indices, latents)
    if manifest.get("moments"):
        latents = latents[:, : latents.shape[1] // 2]
    looked = f"of {counted(len(indices), 'latent')}, by channel"
    for what, values in (("mean", latents.mean(axis=(0, 2, 3))), ("standard deviation", latents.std(axis=(0, 2, 3)))):
        rows.append((f"{what} {looked}", ", ".join(f"{value:.3f}" for value in values.astype("float64"))))
    return rows, counts


def _commands(run, config, environment, status, checkpoints):
    """Lists `(what it does, command line)`: to go on, to sample, to export, and what the run was started with."""
    commands, last, kind = [], [], MODEL_TYPES[config["model"]["type"]]
    words = environment.get("command")
    script = os.path.basename(words[0]) if isinstance(words, list) and words and isinstance(words[0], str) else ""
    if script.startswith("train_image_generation_"):
        flags = [shlex.quote(str(word)) for word in words[1:]]
        folder = environment["folder"] if isinstance(environment.get("folder"), str) else None
        count = environment.get("processes", 1)
        launcher = ("-m", "paddle.distributed.launch", "--nproc_per_node", shlex.quote(str(count)))
        launcher = launcher if count != 1 else ()
        goes_on = status["kind"] == "stopped"
        resume = (resume_flag(words), shell_path(run, folder)) if goes_on else ()
        command = python_command(script, *flags, *resume, launcher=launcher, folder=folder)
        (commands if goes_on else last).append(("go on with the run" if goes_on else "the run itself", command))
    if checkpoints:
        checkpoint = shell_path(checkpoints[-1])
        samples, pipeline = (shell_path(os.path.join(run, name)) for name in ("samples.png", "pipeline"))
        how = " ".join(options.first_images_flags(config["model"]))
        draw = f"--model_path {checkpoint} {how} --output {samples}"
        commands.append(("draw samples", python_command(kind.demo, draw)))
        export = f"tools/convert_{'dit' if kind.pipeline == 'DiTPipeline' else 'sit'}_to_ppdiffusers.py"
        flags = f"--model_path {checkpoint} --output {pipeline}"
        commands.append((f"export it as a {kind.pipeline}", python_command(export, flags)))
    again = python_command("tools/report.py", shell_path(run))
    return [*commands, ("make this page anew", again), *last]
