"""The model card of a pipeline folder: its README.md, as model hubs show it. Names out of files are escaped."""

import json
import math
import os
import re

from config import options
from config.schema import MODEL_TYPES, own_config
from features.autoencoder import LatentScaling, downsampling, weights_digest
from runtime.files import whole_file
from runtime.process import counted
from runtime.untrusted import read_json_object, shortened
from sampling.flags import LIGHTNING
from sampling.model_path import describe_model
from sampling.pipelines.folder import CARD, CARD_MARK, SAMPLES
from sampling.step_counts import (
    FIT_KEY,
    FLOW_SCHEDULER,
    VISITS,
    check_scheduler,
    describe_fit,
    is_timestep_fit,
    own_scheduler,
)

MAX_CLASSES = 50  # listed by name; the others are in model_index.json
MAX_ROWS = 10  # classes in the picture of samples
ALWAYS = ("learning_rate", "global_batch_size", "seed")  # training settings that are shown even if they are defaults


def write_model_card(folder, config, *, weights, vae, vae_name, notes=(), samples=0):
    """Writes the card into a pipeline folder; with `samples` a picture of so many images of up to ten classes too.

    Args:
        config: resolved, of the network. weights: the path that it was exported from.
        vae: the autoencoder, by `vae_name`. notes: sentences on what the pipeline does differently.

    Returns None, or a sentence that says why there is no picture.
    """
    note = None
    try:
        if samples:
            _draw_samples(folder, samples)
    except ValueError as error:  # the pipeline itself is written
        samples, note = 0, f"the model card has no picture: {error}"
    text = model_card(folder, config, weights=weights, vae=vae, vae_name=vae_name, notes=notes, has_samples=samples > 0)
    with whole_file(os.path.join(folder, CARD)) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
    return note


def model_card(folder, config, *, weights, vae, vae_name, notes=(), has_samples=False):
    """Returns the card of a pipeline folder as Markdown; arguments as of `write_model_card`."""
    described, model, size = describe_model(folder), config["model"], config["model"]["sample_size"] * downsampling(vae)
    kind, name = model["type"], os.path.basename(os.path.abspath(folder))
    classes = counted(model["num_classes"], "class", "classes")
    parts = [
        "---\nlibrary_name: ppdiffusers\npipeline_tag: unconditional-image-generation\ntags:\n- class-conditional\n"
        f"- {MODEL_TYPES[kind].family.lower()}\n# license: yours to choose\n---\n{CARD_MARK}\n",
        f"# {escaped(name)}\n",
        f"A {kind} that draws images of {size}x{size} pixels of {classes}, as a `{described.pipeline}` folder.\n",
    ]
    if has_samples:
        rows = f"One row a class, guidance scale {_guidance(model):g}, {_num_steps(folder, described)} steps."
        parts.append(f"![samples of the model]({SAMPLES})\n\n{rows}\n")
    parts += ["## Use\n", _usage(name, folder, described, model)]
    parts += ["## Network\n", _network(config)]
    parts += ["## Training\n", _training(config, weights)]
    parts += ["## Data\n", f"Images of {size}x{size} pixels, of {classes}.\n", _classes(described.labels)]
    parts += ["## Autoencoder\n", _autoencoder(vae, vae_name)]
    if notes:
        parts += ["## What this folder does differently\n", "".join(f"- {escaped(note, 500)}\n" for note in notes)]
    parts += ["## Licence\n", "Not given: whoever publishes this folder writes it here, and in the first lines.\n"]
    return "\n".join(parts)


def escaped(text, limit=200):
    """Returns a text as one line of Markdown that shows it as it is: no markup, link, HTML or control character."""
    text = re.sub(r"([\\`*_{}\[\]|<>~&$@]|:(?=//)|(?<=www)\.)", r"\\\1", shortened(text, limit), flags=re.IGNORECASE)
    return re.sub(
        r"^([#+=-]|\d+(?=[.)](?:\s|$)))", lambda found: "\\" + found[0] if found[0] in "#+=-" else found[0] + "\\", text
    )


def _table(rows):
    lines = ["| | |", "| --- | --- |", *(f"| {escaped(key)} | {escaped(value)} |" for key, value in rows)]
    return "\n".join(lines) + "\n"


def _timestep_fit(folder):
    settings = read_json_object(os.path.join(folder, "transformer", "config.json"))
    fit = settings.get(FIT_KEY)
    return fit if is_timestep_fit(fit) else None


def _num_steps(folder, described):
    """Returns a number of steps in which the pipeline is exact."""
    if described.pipeline == "SiTPipeline" or described.scheduler["_class_name"] == FLOW_SCHEDULER:
        return 50
    kind = VISITS[own_scheduler(described.scheduler) or "ddim"]
    exact = (_timestep_fit(folder) or {}).get(kind) or [25]
    steps = 25 if 25 in exact else max(exact)
    try:
        check_scheduler(described.scheduler, kind, steps)
    except ValueError:  # a diffusion of few timesteps, all of which are valid
        steps = described.scheduler["num_train_timesteps"]
    return steps


def _guidance(model):
    return options.GENTLE_GUIDANCE_SCALE if model["class_dropout_prob"] > 0 else 1.0


def _usage(name, folder, described, model):
    """Returns a program that draws an image, and what it may be changed to."""
    steps, own = _num_steps(folder, described), described.pipeline == "SiTPipeline"
    code = [
        "import paddle",
        f"from {'sampling' if own else 'ppdiffusers'} import {described.pipeline}",
        "",
        f"pipe = {described.pipeline}.from_pretrained({json.dumps(name)})",
        "generator = paddle.Generator().manual_seed(0)",
        f"images = pipe(class_labels=[0], num_inference_steps={steps}, guidance_scale={_guidance(model):g}, "
        "generator=generator).images",
        'images[0].save("sample.png")',
    ]
    code = "\n".join(code)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", code)), 0)
    where = "In the folder that holds this one" + (", with the toolkit's folder on `PYTHONPATH`" if own else "")
    lines = [f"{where}:\n", f"{fence}python\n{code}\n{fence}\n"]
    if fit := _timestep_fit(folder):
        lines.append(f"{escaped(describe_fit(fit)[0].upper() + describe_fit(fit)[1:], 2000)}.\n")
    elif own or described.scheduler["_class_name"] == FLOW_SCHEDULER:
        lines.append("Any number of steps is valid; more are more exact.\n")
    else:
        lines.append(f"Any number of steps is valid that its {escaped(described.scheduler['_class_name'])} takes.\n")
    if model["class_dropout_prob"] == 0:
        lines.append("The network has no null class: `guidance_scale` must be 1.\n")
    else:
        lines.append("`guidance_scale` 1 is no guidance; larger values give clearer images that are more alike.\n")
    if described.has_second:
        lines.append("`internal_scale` above 1 is internal guidance, in the same passes.\n")
    if model["type"] == "LightningDiT":
        lines.append(
            f"The published figures of LightningDiT-XL/1 are those of `num_inference_steps={LIGHTNING.num_steps}, "
            f"guidance_scale={LIGHTNING.guidance_scale}, guidance_interval={LIGHTNING.guidance_interval}, "
            f"timestep_shift={LIGHTNING.timestep_shift}` after 800 epochs. Three channels are guided, as there.\n"
        )
    return "\n".join(lines)


def _network(config):
    from models.state import expected_shapes

    model, objective = config["model"], config["objective"]
    parameters = sum(math.prod(shape) for shape in expected_shapes(model).values())
    rows = [("parameters", f"{parameters:,}")]
    rows += [(key, value) for key, value in model.items() if value is not None]
    rows += [
        ("objective" if key == "type" else key, value)
        for key, value in objective.items()
        if key == "type" or value != options.OBJECTIVE_KEYS[objective["type"]][key].default
    ]
    return _table(rows)


def _training(config, weights):
    """Returns how long the network was trained, and the settings that are not the defaults."""
    if own_config(weights) is None:
        return "Not known: it was exported from a file of weights.\n"
    folder = weights if os.path.isdir(weights) else os.path.dirname(weights)
    state = os.path.join(folder, "trainer_state.json")
    state = read_json_object(state) if os.path.isfile(state) else {}
    names = {
        "global_step": "steps",
        "samples_seen": "images seen",
        "num_samples": "images of the set",
        "epoch": "epochs",
    }
    known = {name: state[key] for key, name in names.items() if isinstance(state.get(key), (int, float))}
    rows = [(name, f"{round(value, 1):,}") for name, value in known.items()]
    for section, keys in (("training", options.TRAINING_KEYS), ("data", options.DATA_KEYS)):
        values = config[section].items()
        rows += [(key, value) for key, value in values if key in ALWAYS or value != keys[key].default]
    return _table(rows)


def _classes(labels):
    shown = sorted(labels.items())[:MAX_CLASSES]
    lines = ["| class | name |", "| --- | --- |", *(f"| {number} | {escaped(name)} |" for number, name in shown)]
    if len(labels) > len(shown):
        lines += ["", f"{len(labels) - len(shown):,} more are in `model_index.json`."]
    return "\n".join(lines) + "\n"


def _autoencoder(vae, name):
    name = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
    rows = [("name", name), ("sha256 of its weights", weights_digest(vae)), ("downsampling", downsampling(vae))]
    rows += [(key, value) for key, value in LatentScaling.of(vae.config).as_dict().items() if value is not None]
    return _table(rows)


def _draw_samples(folder, per_class):
    """Draws the classes, of many evenly spaced ones, by the exported pipeline into a picture of the folder."""
    from sampling.generator import load_generator
    from sampling.grid import class_grid

    generator = load_generator(folder)
    count = min(MAX_ROWS, generator.num_classes)
    classes = [round(i * (generator.num_classes - 1) / max(1, count - 1)) for i in range(count)]
    num_steps = _num_steps(folder, describe_model(folder))
    generator.describe(num_steps)  # what it would warn of, the export has said
    images = generator.sample(
        [one for one in classes for _ in range(per_class)],
        num_inference_steps=num_steps,
        guidance_scale=1.0 if generator.null_class is None else options.GENTLE_GUIDANCE_SCALE,
        batch_size=16,
    )
    picture = class_grid(images, classes, generator.labels, per_class)
    with whole_file(os.path.join(folder, SAMPLES)) as partial, open(partial, "wb") as file:
        picture.save(file, format="PNG")
