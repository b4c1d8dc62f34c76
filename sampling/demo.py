"""What the demo scripts share: what --model_path is, classes by name or id, the common flags, and the way to a PNG.

Nothing here imports Paddle before `draw` does: what a user gets wrong is said at once.
"""

import contextlib
import io
import math
import os
import re
from dataclasses import dataclass, field

from PIL import Image

from config.flags import check_seed
from config.schema import DEFAULT_VAE, load_config
from features.autoencoder import open_vae
from runtime.process import configure_runtime, resolve_device
from runtime.untrusted import inside, read_json, shortened
from sampling.pipelines.converter import IMAGENET_LABELS, class_names  # noqa: F401 (as a name of this module too)
from sampling.pipelines.folder import INFERENCE_MANIFEST, is_exported
from sampling.pipelines.pretrained import is_id2label
from weights.source import checkpoint_hint, is_training_checkpoint

DEFAULT_CLASS = "golden retriever"
MAX_NAME = 240  # bytes of a file's name; file systems take 255
SCHEDULER_CONFIG = os.path.join("scheduler", "scheduler_config.json")
# The demo for a pipeline folder, by the class that model_index.json names, and for a model, by its config's type.
PIPELINE_DEMOS = {"DiTPipeline": "infer_demo_dit.py", "SiTPipeline": "infer_demo_sit.py"}
MODEL_DEMOS = {
    "DiT": "infer_demo_dit.py",
    "LargeDiT": "infer_demo_dit.py",
    "SiT": "infer_demo_sit.py",
    "LargeSiT": "infer_demo_sit.py",
}


# ---------------------------------------------------------------------------------------------------------------------
# What --model_path is
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A model describes what a model path is, as far as its JSON files say.

    Attributes:
        kind: "checkpoint" of a training loop, "pipeline" folder, "exported" for Paddle Inference, "file" of weights, or
            "hub": a name, of which nothing is known before it is downloaded.
        path: of it.
        config: resolved, of a checkpoint or a file. labels: `{id: label}`, perhaps empty.
        num_classes: None if it is not known.
        has_null_class: whether it can be guided; None if that is not known.
        scheduler: a pipeline's scheduler_config.json with its class in `_class_name`, or {}.
    """

    kind: str
    path: str
    config: dict | None = None
    labels: dict = field(default_factory=dict)
    num_classes: int | None = None
    has_null_class: bool | None = None
    scheduler: dict = field(default_factory=dict)


def describe_model(path, pipeline, id2label=None):
    """Returns the `Model` of a folder or a name on the hub.

    Args:
        pipeline: the class of pipeline that is expected, of `PIPELINE_DEMOS`. id2label: JSON of labels, or None.

    Raises:
        ValueError: one line: another pipeline, or a checkpoint of another demo's.
    """
    given = None if id2label is None else read_labels(id2label)
    if is_training_checkpoint(path):
        config_file = os.path.join(path, "config.json")
        return describe_weights("checkpoint", path, load_config(config_file), config_file, pipeline, id2label)
    if pipeline == "DiTPipeline" and is_exported(path):
        index, kind = _json_object(path, INFERENCE_MANIFEST), "exported"
        scheduler, num_classes = index.get("scheduler"), index.get("num_classes")
        has_null_class = index["null_class"] is not None if "null_class" in index else None
    elif os.path.isdir(path):
        check_pipeline(path, pipeline)
        index, kind = _json_object(path, "model_index.json"), "pipeline"
        num_classes = has_null_class = None
        if pipeline == "SiTPipeline":
            network = _json_object(path, os.path.join("transformer", "config.json"))
            num_classes, has_null_class = network.get("num_classes"), network.get("class_dropout_prob") != 0
        scheduler = index.get("scheduler")
        scheduler = scheduler[1] if isinstance(scheduler, list) and len(scheduler) == 2 else None
    else:
        return Model("hub", path, labels=given or {})
    # What is not as it should be is left to the loaders, which say so.
    labels = {}
    if is_id2label(index.get("id2label") or {}):
        labels = {int(key): label for key, label in (index.get("id2label") or {}).items()}
        if num_classes is None:
            num_classes = max(labels, default=999) + 1
    return Model(
        kind,
        path,
        labels=labels if given is None else given,
        num_classes=num_classes if type(num_classes) is int and num_classes > 0 else None,
        has_null_class=has_null_class,
        scheduler={**_json_object(path, SCHEDULER_CONFIG), "_class_name": scheduler},
    )


def describe_weights(kind, path, config, config_file, pipeline, id2label=None):
    """Returns the `Model` of a checkpoint or a file of weights, `kind`; config_file is where its config comes from."""
    model = config["model"]
    verb = f"--model_path {path}: is" if pipeline == "DiTPipeline" else f"{config_file}: describes"
    check_model_type(model["type"], PIPELINE_DEMOS[pipeline], verb)
    objective = {"DiTPipeline": "diffusion", "SiTPipeline": "transport"}[pipeline]
    if config["objective"]["type"] != objective:
        raise ValueError(
            f"{verb} a {model['type']} for the objective {config['objective']['type']!r}; "
            f"{PIPELINE_DEMOS[pipeline]} samples {objective!r}"
        )
    return Model(
        kind,
        path,
        config=config,
        labels=checkpoint_labels(id2label, config),
        num_classes=model["num_classes"],
        has_null_class=model["class_dropout_prob"] > 0,
    )


def _json_object(folder, name):
    path = inside(folder, name)
    content = read_json(path, infinity=True) if os.path.isfile(path) else {}
    return content if isinstance(content, dict) else {}


def check_exportable(path):
    """Raises `ValueError` for a SiT, which Paddle Inference runs by way of a DiTPipeline folder or not at all."""
    if is_training_checkpoint(path):
        config = load_config(os.path.join(path, "config.json"))
        kind, objective = config["model"]["type"], config["objective"]
        is_velocity = objective.get("prediction") == "velocity"
    else:
        index = _json_object(path, "model_index.json")
        transformer = index.get("transformer")
        if index.get("_class_name") != "SiTPipeline" or not isinstance(transformer, list) or len(transformer) != 2:
            return
        kind, is_velocity = transformer[1], _json_object(path, SCHEDULER_CONFIG).get("prediction") == "velocity"
    if kind == "SiT" and is_velocity:
        raise ValueError(
            f"--model_path {path}: is a SiT, which is exported by way of a DiTPipeline folder: give the one that "
            "tools/convert_sit_to_ppdiffusers.py --stock makes of its training checkpoint"
        )
    if kind in ("SiT", "LargeSiT"):
        what = "a LargeSiT" if kind == "LargeSiT" else "a SiT that does not predict velocity"
        raise ValueError(
            f"--model_path {path}: is {what}, which can't be exported for Paddle Inference; sample it by "
            "infer_demo_sit.py"
        )


def check_pipeline(path, pipeline):
    """Raises `ValueError`, saying which demo takes it, if a folder holds another pipeline than `pipeline`, or none.

    Args:
        path: a folder that is no training checkpoint. pipeline: a class of `PIPELINE_DEMOS`.
    """
    index = os.path.join(path, "model_index.json")
    if not os.path.isfile(index):
        raise ValueError(
            f"--model_path {path}: neither a {pipeline} folder (model_index.json) nor a training checkpoint "
            f"(config.json and model_state.pdparams){checkpoint_hint(path)}"
        )
    content = read_json(index)
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if kind != pipeline:
        other = PIPELINE_DEMOS.get(kind) if isinstance(kind, str) else None
        hint = f"use {other}" if other else f"expected a {pipeline}"
        raise ValueError(f"--model_path {path}: is a {kind}; {hint}")


def check_model_type(kind, demo, what):
    """Raises `ValueError`, "`what` a DiT; use ...", if a model of the type `kind` is none of the demo's."""
    if MODEL_DEMOS[kind] != demo:
        raise ValueError(f"{what} a {kind}; use {MODEL_DEMOS[kind]}")


def check_model_path(path):
    """Raises `ValueError` for what is neither a folder nor may be a name on the hub."""
    if os.path.isfile(path):
        raise ValueError(
            f"--model_path {path}: is a file; expected a folder (tools/convert_dit_to_ppdiffusers.py makes one of a "
            "file of weights)"
        )
    parts = path.split("/")
    if not os.path.isdir(path) and (len(parts) != 2 or parts[0] in ("", ".", "..", "~") or os.path.isdir(parts[0])):
        raise ValueError(f"--model_path {path}: there is no such folder")  # a name on the hub is OWNER/NAME


def load_pipeline(name_or_path, dtype):
    """The DiTPipeline of a folder or of the hub; `ValueError` with one line if there is none."""
    from sampling.pipelines.pretrained import load_dit_pipeline

    local = os.path.isdir(name_or_path)
    if local:
        check_pipeline(name_or_path, "DiTPipeline")
    try:
        return load_dit_pipeline(name_or_path, dtype)
    except Exception as error:  # the hub clients raise a dozen unrelated types
        if local and isinstance(error, ValueError):
            raise
        reason = str(error).strip().split("\n")[0].split(". ")[0][:200]
        if local:
            raise ValueError(f"--model_path {name_or_path}: cannot be loaded ({reason})") from None
        raise ValueError(
            f"{name_or_path}: there is no such folder, and it cannot be downloaded ({reason}). Without a network, give "
            "a folder by --model_path: one copied from a machine that has a network, or one that "
            "tools/convert_dit_to_ppdiffusers.py wrote"
        ) from None


def read_dit(model, *, vae=None, key=None):
    """A DiT or a Large-DiT in eager mode and float32, as a `sampling.pipelines.inference.Pipeline`.

    Args:
        model: the `Model` of a DiTPipeline folder, of its name on the hub, or of a training checkpoint folder.
        vae, key: of a checkpoint: name or folder of its VAE, None for the features' own, and which weights.

    Raises:
        ValueError: one line: none of these, or what can't be exported.
    """
    from sampling.pipelines.inference import from_checkpoint, from_dit_pipeline
    from sampling.pipelines.pretrained import read_timestep_fit
    from weights.source import read_weights

    if model.kind != "checkpoint":
        pipe = load_pipeline(model.path, "float32")
        return from_dit_pipeline(pipe, model.labels or pipeline_labels(model.path, pipe), read_timestep_fit(model.path))
    state, source = read_weights(model.path, key=key)
    return from_checkpoint(model.config, state, checkpoint_vae(vae, model.config), model.labels, source=source)


def checkpoint_vae(given, config, default=DEFAULT_VAE):
    """Loads the autoencoder for a checkpoint's latents: that of --vae, else the features' own, else the default."""
    channels = config["model"]["in_channels"]
    vae, notes = open_vae(given, config["features"]["vae"], default=default, flag="--vae", channels=channels)
    for note in notes:
        print(f"note: {note}", flush=True)
    return vae


def pipeline_labels(path, pipe):
    index = os.path.join(path, "model_index.json")
    if os.path.isfile(index):
        labels = read_json(index).get("id2label") or {}
        return {int(key): label for key, label in labels.items()}
    return {index: label for label, index in pipe.labels.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Classes by name or id
# ---------------------------------------------------------------------------------------------------------------------


def find_class(text, labels, num_classes):
    """The id of a class given by label (one of its comma-separated names will do) or by id.

    Args:
        labels: `{id: label}`, possibly empty.
    """
    found = [i for i, label in labels.items() if text == label]
    found = found or [i for i, label in labels.items() if text in [name.strip() for name in label.split(",")]]
    if len(found) > 1:
        raise ValueError(f"--classes {text}: the name of several classes, give the id: {', '.join(map(str, found))}")
    if found and found[0] < num_classes:
        return found[0]
    if found:
        raise ValueError(f"--classes {text}: is class {found[0]} of the labels; the classes are 0..{num_classes - 1}")
    if re.fullmatch(r"\d+", text):
        if int(text) < num_classes:
            return int(text)
        raise ValueError(f"--classes {text}: the classes are 0..{num_classes - 1}")
    known = ", ".join(shortened(label) for label in sorted(labels.values())[:10])
    known += ", ..." if len(labels) > 10 else ""
    raise ValueError(f"--classes {text}: no such class; expected an id 0..{num_classes - 1}" + known_names(known))


def known_names(known):
    return f" or a name such as {known}" if known else ""


def find_classes(wanted, labels, num_classes):
    """Ids of the classes asked for; by default the golden retriever, or the first ten where there is none."""
    if wanted:
        return [find_class(text, labels, num_classes) for text in wanted]
    if any(DEFAULT_CLASS in label.split(", ") for label in labels.values()):
        return [find_class(DEFAULT_CLASS, labels, num_classes)]
    return list(range(min(num_classes, 10)))


def read_labels(path):
    """`{id: label}` of a JSON with or without the key "id2label"."""
    labels = read_json(path)
    labels = labels.get("id2label", labels) if isinstance(labels, dict) else labels
    if not isinstance(labels, dict) or not all(str(key).isdigit() for key in labels):
        raise ValueError(f'{path}: expected {{"id2label": {{"0": "name", ...}}}}')
    return {int(key): str(value) for key, value in labels.items()}


def checkpoint_labels(path, config):
    """Returns labels for weights that come without: those of --id2label, else those of `class_names`, else none."""
    if path is not None:
        return read_labels(path)
    names, note = class_names(config)
    if note:
        print(f"note: {note}", flush=True)
    return {int(key): name for key, name in names.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def add_flags(parser, kind, *, guidance_channels, seed=0, gpu_dtype="float32"):
    """The flags of all demos; kind is that of the file names, guidance_channels of --help, the others are defaults."""
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help=f"name or id [{DEFAULT_CLASS}; else the first ten]"
    )
    parser.add_argument("--num_inference_steps", type=int, default=25, help="[25]")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help="1 for none, 0 for images without a class, negative: away from it [4; 1 without a null class]",
    )
    parser.add_argument(
        "--guidance_channels",
        choices=("3", "all"),
        help="latent channels that are guided: 3 as in the official code, all as DiTPipeline does "
        f"[{guidance_channels}]",
    )
    parser.add_argument("--seed", type=int, default=seed, help=f"of the noise, 0 to 4294967295 [{seed}]")
    parser.add_argument("--output", help=f"PNG to write [result_{kind}_<class>.png, numbered if it is there]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N [auto: a GPU if there is one]")
    default = "float32" if gpu_dtype == "float32" else f"{gpu_dtype} on a GPU, float32 on a CPU"
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help=f"[{default}]")
    parser.set_defaults(gpu_dtype=gpu_dtype)
    parser.add_argument("--id2label", help='JSON {"id2label": {"0": "name", ...}}: labels of --classes')


def check_flags(args, min_steps=1):
    """Raises `ValueError` for values of `add_flags` that no model takes."""
    check_seed("seed", args.seed)
    if args.num_inference_steps < min_steps:
        raise ValueError(f"--num_inference_steps {args.num_inference_steps}: expected {min_steps} or more")
    if args.guidance_scale is not None and not math.isfinite(args.guidance_scale):
        raise ValueError(f"--guidance_scale {args.guidance_scale}: expected a finite number, 1 for no guidance")
    if args.output is not None:
        check_output(args.output, args.overwrite)
        return
    if args.overwrite:
        note_unused(["overwrite"], "without --output, whose default is a free name")
    if not os.access(os.curdir, os.W_OK):
        raise ValueError("the working directory can't be written to; give a file by --output")


def check_model(args, model):
    """Raises `ValueError` for classes and guidance that a `Model` lacks, as far as its JSON files say."""
    if model.num_classes is not None:
        find_classes(args.classes, model.labels, model.num_classes)
    if model.has_null_class is not None:
        check_guidance(args.guidance_scale, model.has_null_class, model.path)
    given = [name for name in ("guidance_channels", "guidance_interval") if getattr(args, name, None) is not None]
    if args.guidance_scale == 1 or (args.guidance_scale is None and model.has_null_class is False):
        note_unused(given, "without guidance")


def check_guidance(scale, has_null_class, path):
    """The guidance scale asked for, or the default; `ValueError` if the network has no null class to guide with."""
    if scale is None:
        return 4.0 if has_null_class else 1.0
    if scale != 1 and not has_null_class:
        raise ValueError(f"{path}: trained without a null class, can't be guided; use --guidance_scale 1")
    return scale


def note_weights_flags(args, model):
    """Says that --vae and --key have no effect on a model that brings its own."""
    if model.kind in ("pipeline", "exported", "hub"):
        given = [name for name in ("vae", "key") if getattr(args, name) is not None]
        note_unused(given, f"on {model.path}, which is no training checkpoint and brings its VAE and weights along")


def note_unused(names, why):
    """Says in one line which flags, if any, have no effect."""
    if names:
        flags = " and ".join(f"--{name}" for name in names)
        print(f"note: {flags} {'has' if len(names) == 1 else 'have'} no effect {why}", flush=True)


def make_generator(seed):
    """A ppdiffusers generator; on a CPU that is Paddle's global one, seeded."""
    import paddle

    return paddle.Generator().manual_seed(seed)


def draw(kind, args, sample):
    """Samples and saves, as the flags say; ValueError for whatever can't be.

    Args:
        kind: of the file names, DiT or SiT.
        args: with the flags of `add_flags`, checked.
        sample: `sample()` returns uint8 images `(N, H, W, 3)` (or PIL images) and the classes' labels.
    """
    configure_runtime()
    import paddle

    device = resolve_device(args.device)
    paddle.set_device(device)
    if args.dtype is None:
        args.dtype = "float32" if device == "cpu" else args.gpu_dtype
    eager = getattr(args, "backend", "eager") == "eager"
    if device == "cpu" and args.dtype != "float32" and eager:
        raise ValueError(f"--dtype {args.dtype}: Paddle computes in float32 only on a CPU; use --dtype float32")

    from sampling.grid import make_grid

    images, labels = sample()
    path = save_image(make_grid(images, columns=min(len(images), 8)), find_output(kind, args.output, labels), args)
    print(f"{', '.join(shortened(label) for label in labels)}: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# The PNG
# ---------------------------------------------------------------------------------------------------------------------


def check_output(path, overwrite):
    """Raises `ValueError` unless an image can be written there: folder, name, ending, nothing in the way."""
    folder, name = os.path.split(os.path.realpath(path))
    shown = f"--output {shortened(path, 500)}"
    if os.path.isdir(path) or not os.path.basename(path):
        raise ValueError(f"{shown}: is a folder; expected a file such as {os.path.join(path, 'image.png')}")
    if not os.path.isdir(folder):
        raise ValueError(f"{shown}: there is no such folder")
    if len(os.fsencode(name)) > MAX_NAME:
        raise ValueError(f"{shown}: the name has more than {MAX_NAME} bytes")
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"{shown}: exists already; give another name, or --overwrite")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{shown}: is no regular file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{shown}: the folder can't be written to")
    check_ending("output", path)


def check_ending(flag, path):
    """Raises `ValueError` for an ending that no format of colour images has."""
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format=_image_format(path))
    except (ValueError, OSError, KeyError):
        ending = os.path.splitext(path)[1]
        what = f"the ending {shortened(ending)} names no format for colour images" if ending else "has no ending"
        raise ValueError(
            f"--{flag} {shortened(path, 500)}: {what}; expected .png, or another that Pillow writes, such as .jpg"
        ) from None


def _image_format(path):
    """Pillow's name of the format that a file's ending stands for."""
    return Image.registered_extensions()[os.path.splitext(path)[1].lower()]


def find_output(kind, path, labels):
    """The PNG to write: the one asked for, else one named after the class."""
    if path is not None:
        return path
    name = re.sub(r"[^\w-]+", "_", labels[0].split(",")[0]) if len(labels) == 1 else "grid"
    name = name.encode("utf-8", "ignore")[:100].decode("utf-8", "ignore")  # a label may be longer than a file's name
    return f"result_{kind}_{name}.png"


def save_image(image, path, args):
    """Writes an image beside `path` and renames it; returns its path, with a number where something is there already.

    Raises:
        ValueError: one line: the file system refuses. Nothing is left then.
    """
    target = os.path.realpath(path)
    partial = os.path.join(os.path.dirname(target), f".image-{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            image.save(file, format=_image_format(path))
        stem, ending = os.path.splitext(path)
        number = 1
        while os.path.lexists(target) and not (args.overwrite and args.output is not None):
            number += 1
            path = f"{stem}-{number}{ending}"
            target = os.path.abspath(path)
        os.replace(partial, target)
    except OSError as error:
        raise ValueError(f"{path}: can't be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
    return path
