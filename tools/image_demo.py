"""What the demo scripts share: classes by name or id, the common flags, and the way from a command line to a PNG."""

import os
import re

from sampling.autoencoder import DEFAULT_VAE, open_vae
from tools.pipeline_converter import IMAGENET_LABELS, class_names  # noqa: F401 (as a name of this module too)
from training.runtime import configure_runtime, resolve_device
from untrusted import read_json

DEFAULT_CLASS = "golden retriever"
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


def check_pipeline(path, pipeline):
    """Raises `ValueError`, saying which demo takes it, if a folder holds another pipeline than `pipeline`, or none.

    Args:
        path: a folder that is no training checkpoint. pipeline: a class of `PIPELINE_DEMOS`.
    """
    index = os.path.join(path, "model_index.json")
    if not os.path.isfile(index):
        raise ValueError(
            f"--model_path {path}: neither a {pipeline} folder (model_index.json) nor a training checkpoint "
            "(config.json and model_state.pdparams)"
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
    from sampling.pretrained import load_dit_pipeline

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


def read_dit(path, *, vae, key=None, id2label=None):
    """A DiT or a Large-DiT in eager mode and float32, as a `sampling.inference.Pipeline`.

    Args:
        path: a DiTPipeline folder, its name on the hub, or a training checkpoint folder.
        vae, key: of a checkpoint: name or folder of its VAE, None for the features' own, and which weights.
        id2label: JSON of labels, or None.

    Raises:
        ValueError: one line: none of these, or what can't be exported.
    """
    from sampling.checkpoint import is_training_checkpoint, read_weights
    from sampling.inference import from_checkpoint, from_dit_pipeline
    from training.config import load_config

    if not is_training_checkpoint(path):
        pipe = load_pipeline(path, "float32")
        return from_dit_pipeline(pipe, pipeline_labels(path, pipe) if id2label is None else read_labels(id2label))
    config = load_config(os.path.join(path, "config.json"))
    check_model_type(config["model"]["type"], "infer_demo_dit.py", f"--model_path {path}: is")
    labels = checkpoint_labels(id2label, config)
    state, source = read_weights(path, key=key)
    return from_checkpoint(config, state, checkpoint_vae(vae, config), labels, source=source)


def checkpoint_vae(given, config, default=DEFAULT_VAE):
    """The autoencoder for a checkpoint's latents: that of --vae, else the features' own, else the default."""
    vae, notes = open_vae(given, config["features"]["vae"], default=default, flag="--vae")
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
    known = ", ".join(sorted(labels.values())[:10]) + (", ..." if len(labels) > 10 else "")
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
    """Labels for weights that come without: those of --id2label, else those of `class_names`, else none."""
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
    """The flags of all demos; kind is that of the file names, the others are defaults."""
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help=f"name or id [{DEFAULT_CLASS}; else the first ten]"
    )
    parser.add_argument("--num_inference_steps", type=int, default=25, help="[25]")
    parser.add_argument("--guidance_scale", type=float, help="1 for none [4; 1 without a null class]")
    parser.add_argument(
        "--guidance_channels",
        choices=("3", "all"),
        default=guidance_channels,
        help="latent channels that are guided: 3 as in the official code, all as DiTPipeline does "
        f"[{guidance_channels}]",
    )
    parser.add_argument("--seed", type=int, default=seed, help=f"of the noise [{seed}]")
    parser.add_argument("--output", help=f"PNG to write [result_{kind}_<class>.png, numbered if it is there]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N [auto: a GPU if there is one]")
    default = "float32" if gpu_dtype == "float32" else f"{gpu_dtype} on a GPU, float32 on a CPU"
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help=f"[{default}]")
    parser.set_defaults(gpu_dtype=gpu_dtype)
    parser.add_argument("--id2label", help='JSON {"id2label": {"0": "name", ...}}: labels of --classes')


def find_output(kind, path, labels, overwrite):
    """The PNG to write: the one asked for, else a free one named after the class."""
    if path is not None:
        if os.path.exists(path) and not overwrite:
            raise ValueError(f"--output {path}: exists already; give another name, or --overwrite")
        return path
    name = re.sub(r"[^\w-]+", "_", labels[0].split(",")[0]) if len(labels) == 1 else "grid"
    stem, number = f"result_{kind}_{name}", 1
    path = f"{stem}.png"
    while os.path.exists(path):
        number += 1
        path = f"{stem}-{number}.png"
    return path


def make_generator(seed):
    """A ppdiffusers generator; on a CPU that is Paddle's global one, seeded."""
    import paddle

    return paddle.Generator().manual_seed(seed)


def draw(kind, args, sample, least_steps=1):
    """Samples and saves, as the flags say; ValueError for whatever can't be.

    Args:
        kind: of the file names, DiT or SiT.
        args: with the flags of `add_flags`.
        sample: `sample(args)` returns uint8 images `(N, H, W, 3)` (or PIL images) and the classes' labels.
        least_steps: the least --num_inference_steps.
    """
    if args.num_inference_steps < least_steps:
        raise ValueError(f"--num_inference_steps {args.num_inference_steps}: expected {least_steps} or more")
    if args.output is not None:
        find_output(kind, args.output, [], args.overwrite)
        if not os.path.isdir(os.path.dirname(os.path.abspath(args.output))):
            raise ValueError(f"--output {args.output}: there is no such folder")

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

    images, labels = sample(args)
    path = find_output(kind, args.output, labels, args.overwrite)
    make_grid(images, columns=min(len(images), 8)).save(path)
    print(f"{', '.join(labels)}: {path}")
