"""Pipeline folders: what they hold, their labels, and how one is written without ever standing there half finished.

NumPy is imported where a folder is written, not before, so that what a user gets wrong is said at once.
"""

import contextlib
import inspect
import os
import shutil

from config.schema import exported_features
from runtime.files import MAX_NAME, whole_folder, write_json
from runtime.untrusted import read_json_object, shortened

# Names of ppdiffusers, the second with safe_serialization.
WEIGHTS, SAFE_WEIGHTS = "model_state.pdparams", "diffusion_paddle_model.safetensors"
TREE = (
    *("model_index.json", "scheduler/scheduler_config.json"),
    *("transformer/config.json", f"transformer/{WEIGHTS}"),
    *("vae/config.json", f"vae/{WEIGHTS}"),
)
SAFE_TREE = tuple(name.replace(WEIGHTS, SAFE_WEIGHTS) for name in TREE)
FEATURES_KEY = "_features"  # of model_index.json: that section of a config; ppdiffusers reads no key with a leading "_"
# Of a SiTPipeline's transformer/config.json: the block, from 1, before internal guidance's second final layer.
SECOND_BLOCK = "internal_guidance_block"
CODE = "transformer/large_dit_transformer.py"  # of a Large-DiT's folder only, see `sampling.pipelines.export_large_dit`
CARD, SAMPLES = "README.md", "samples.png"  # what `sampling.pipelines.model_card` writes
CARD_MARK = "<!-- written by the exporter of this folder, which --overwrite replaces -->"
INFERENCE_MANIFEST = "inference.json"  # of a folder of programs, see `sampling.pipelines.inference`
TRANSPORT_SCHEDULER = "TransportScheduler"  # of `sampling.sit_pipeline`, which imports more than its name needs


def component_class(index, name):
    """Returns the class that a model_index.json names for a component, None where it names none."""
    given = index.get(name)
    return given[1] if isinstance(given, list) and len(given) == 2 else None


def index_features(index, folder):
    """Returns the `features` section that a folder's model_index.json carries, null where it says nothing."""
    path = os.path.join(folder, "model_index.json")
    return exported_features(index.get(FEATURES_KEY), f"{path}: {FEATURES_KEY}")


def read_index(path, components, pipeline=None):
    """Reads a model_index.json that names a class of `{component: names of classes}` for each; nothing is imported.

    `ValueError` names the file: not there, broken, another class of a component, or another `pipeline` if one is given.
    """
    index = read_json_object(path)
    if pipeline not in (None, index.get("_class_name")):
        raise ValueError(f"{path}: holds a {shortened(repr(index.get('_class_name')))}, expected {pipeline!r}")
    for name, known in components.items():
        if component_class(index, name) not in known:
            raise ValueError(f"{path}: {name} is {shortened(repr(index.get(name)))}, expected a {' or '.join(known)}")
    return index


def read_component(path, class_name, known):
    """Returns the settings of a component; `ValueError` as `read_settings`, or for others than are `known`.

    These are names, or a function with such keywords.
    """
    from weights.pretrained import read_settings

    if not os.path.isfile(path):  # else its folder would be taken for a name on the hub
        raise ValueError(f"{path}: no such file")
    settings, _ = read_settings(*os.path.split(path), class_names=(class_name,))
    known = inspect.signature(known).parameters if callable(known) else known
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ValueError(f"{path}: unknown setting '{shortened(unknown[0])}'; known: {', '.join(known)}")
    return settings


def check_id2label(id2label, num_classes):
    """Returns `{"0": label, ...}` in order, numbers for None; ValueError unless every class has a label."""
    classes = [str(i) for i in range(num_classes)]
    if id2label is None:
        return dict(zip(classes, classes, strict=True))
    given = {str(key): value for key, value in id2label.items()}
    problems = {
        "no label for class": [key for key in classes if key not in given],
        "a label for class": sorted(given.keys() - {*classes}),
        "no text for class": [key for key, label in given.items() if not isinstance(label, str) or not label.strip()],
    }
    for what, keys in problems.items():
        if keys:
            raise ValueError(f"id2label: {what} {', '.join(keys[:5])}; expected one for each of 0..{num_classes - 1}")
    return {key: given[key] for key in classes}


def check_output(output_dir, overwrite=False):
    """Raises ValueError unless `output_dir` is free, or a pipeline and nothing else and `overwrite` is set."""
    if os.path.isfile(output_dir):
        raise ValueError(f"{output_dir}: is a file; expected a folder to write the pipeline to")
    if not os.path.isdir(output_dir) or not os.listdir(output_dir):
        return
    if not overwrite:
        raise ValueError(f"{output_dir}: is not empty; give another folder, or --overwrite to replace a pipeline")
    for root, _, names in os.walk(output_dir):
        for name in names:
            path = os.path.relpath(os.path.join(root, name), output_dir)
            if path not in (*TREE, *SAFE_TREE, CODE) and not (path in (CARD, SAMPLES) and _is_own_card(output_dir)):
                raise ValueError(f"{output_dir}: holds {path}, which is no part of a pipeline; not overwritten")


def _is_own_card(folder):
    """Returns whether a folder's README.md is the exporter's, and not somebody else's."""
    with contextlib.suppress(OSError), open(os.path.join(folder, CARD), encoding="utf-8", errors="replace") as file:
        return CARD_MARK in file.read(1000)
    return False


def check_free(output_dir):
    """Raises ValueError unless `output_dir` is free for a new folder: nothing there, or an empty folder."""
    if len(os.fsencode(os.path.basename(os.path.abspath(output_dir)))) > MAX_NAME:
        raise ValueError(f"{shortened(output_dir, 500)}: the name has more than {MAX_NAME} bytes")
    if os.path.isfile(output_dir) or (os.path.isdir(output_dir) and os.listdir(output_dir)):
        raise ValueError(f"{output_dir}: is there already; give the name of a new folder")


def check_vae(vae, in_channels):
    """Raises ValueError unless the VAE decodes latents of that many channels, scaled in a way that we know."""
    from features.autoencoder import LatentScaling

    if vae.config.latent_channels != in_channels:
        raise ValueError(
            f"the VAE has {vae.config.latent_channels} latent channels, the network's in_channels is {in_channels}"
        )
    LatentScaling.of(vae.config, channels=in_channels, source="the VAE's config")


def complete_features(features, vae, vae_name, sample_size):
    """Returns a run's `features` section for an exported model, with image size and the autoencoder that it gets."""
    from features.autoencoder import describe_vae, downsampling

    size = features["image_size"] or sample_size * downsampling(vae)
    return {**features, "image_size": size, "vae": describe_vae(vae, vae_name)}


def known_features(features):
    """Returns what a `features` section knows, but for the class names, which an exported model has as labels."""
    known = {key: value for key, value in (features or {}).items() if value is not None}
    known.pop("class_names", None)
    return known


def write_pipeline(
    output_dir,
    *,
    pipeline,
    transformer,
    weights,
    scheduler,
    vae,
    labels,
    overwrite,
    safe_serialization,
    code=None,
    features=None,
):
    """Writes the files of `TREE`, or with `safe_serialization` of `SAFE_TREE`: the folder is complete or not there.

    Args:
        pipeline: name of its class. transformer: `(package, class name, constructor keywords)`.
        weights: `{name: array}` of the transformer, Paddle layout.
        scheduler: `(package, object)`. vae: the object. Both are written by their own `save_pretrained`.
        labels: of `check_id2label`. overwrite: see `check_output`, which says what is in the way.
        code: a file with the transformer's class, to put beside the weights.
        features: of `complete_features`, None if nothing is known.
    """
    from ppdiffusers.version import VERSION

    from weights.files import save_pdparams, save_safetensors

    (package, class_name, settings), (scheduler_package, scheduler) = transformer, scheduler
    index = {
        "_class_name": pipeline,
        "_ppdiffusers_version": VERSION,
        "id2label": labels,
        "scheduler": [scheduler_package, type(scheduler).__name__],
        "transformer": [package, class_name],
        "vae": ["ppdiffusers", "AutoencoderKL"],
    }
    if known := known_features(features):
        index[FEATURES_KEY] = known
    settings = {"_class_name": class_name, "_ppdiffusers_version": VERSION, **settings}
    save, name = (save_safetensors, SAFE_WEIGHTS) if safe_serialization else (save_pdparams, WEIGHTS)
    options = {"safe_serialization": safe_serialization, "to_diffusers": False, "max_shard_size": "100GB"}  # one file
    check_output(output_dir, overwrite)
    with whole_folder(output_dir) as folder:
        own = os.path.join(folder, "transformer")
        os.makedirs(own)
        write_json(os.path.join(own, "config.json"), settings)
        save(weights, os.path.join(own, name))
        if code is not None:
            shutil.copy(code, own)
        vae.save_pretrained(os.path.join(folder, "vae"), **options)
        scheduler.save_pretrained(os.path.join(folder, "scheduler"))
        write_json(os.path.join(folder, "model_index.json"), index)
