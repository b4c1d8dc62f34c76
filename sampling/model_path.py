"""What a path to a model is, as far as its JSON files say. Paddle is not imported: mistakes are said at once."""

import copy
import os
from dataclasses import dataclass, field

from config.options import CLASS_NAMES, POSITIVE_INT, VAE_KEYS
from config.schema import (
    MODEL_TYPES,
    exported_features,
    internal_guidance_block,
    load_config,
    own_config,
    weights_config,
)
from runtime.untrusted import inside, read_json, read_json_object, shortened
from sampling.labels import read_labels, weights_labels
from sampling.pipelines.folder import (
    INFERENCE_MANIFEST,
    SECOND_BLOCK,
    TRANSPORT_SCHEDULER,
    component_class,
    index_features,
)
from sampling.step_counts import SCHEDULERS, check_num_steps, check_scheduler
from weights.runs import checkpoint_hint, is_training_checkpoint, resolve_run

# The class of pipeline that model_index.json names: what its networks have in common, and the demo that takes them all.
PIPELINES = {kind.pipeline: kind for kind in (MODEL_TYPES["DiT"], MODEL_TYPES["SiT"])}


@dataclass
class Model:
    """Says what a model path is."""

    # "checkpoint" of a training loop, "pipeline" folder, "exported" for Paddle Inference, "file" of weights, or "hub":
    # a name, of which nothing is known before it is downloaded.
    kind: str
    path: str
    pipeline: str  # of `PIPELINES`, what samples it
    type: str | None = None  # the class of its network; None if it is not known
    config: dict | None = None  # resolved, of a checkpoint or a file
    labels: dict = field(default_factory=dict)  # `{id: label}`, the user's where there are any; perhaps empty
    num_classes: int | None = None  # None if it is not known
    has_null_class: bool | None = None  # it can be guided; None if that is not known
    has_second: bool = False  # there should be the second final layer of internal guidance
    features: dict | None = None  # `features` section of a config: what the latents were made of, as far as it is known
    scheduler: dict = field(default_factory=dict)  # a pipeline's settings with its class in `_class_name`, or {}
    notes: list = field(default_factory=list)  # sentences for the user

    @property
    def holds_all(self):
        """Is True for a model that brings weights and VAE along, so that neither can be chosen."""
        return self.kind in ("pipeline", "exported", "hub")

    @property
    def demo(self):
        """Returns the name of the demo that samples it."""
        return MODEL_TYPES.get(self.type, PIPELINES[self.pipeline]).demo

    def check_diffusion(self, method, num_steps, backend="eager"):
        """Raises `ValueError` for a method (of `SCHEDULERS`, "ddpm", None) or steps that the model does not take."""
        if method == "ddpm" and backend == "inference":
            raise ValueError(f"--scheduler ddpm: not with --backend inference; expected {', '.join(SCHEDULERS)}")
        if method == "ddpm" and self.config is None:
            raise ValueError(f"--scheduler ddpm needs a training checkpoint; for a pipeline: {', '.join(SCHEDULERS)}")
        if self.config is None:
            return check_scheduler(self.scheduler, method, num_steps)
        spacing = {"eager": "stride", "inference": "leading"}[backend] if method in (None, "ddim") else None
        return check_num_steps(num_steps, self.config["objective"]["diffusion_steps"], spacing)

    def check_backend(self, backend):
        """Raises `ValueError` for programs in eager mode."""
        if self.kind == "exported" and backend == "eager":
            raise ValueError(
                f"{self.path}: holds programs for Paddle Inference; if you trust whoever made them (they run as code), "
                "add --backend inference"
            )


def check_dtype(device, dtype):
    """Raises `ValueError` for a type that Paddle does not compute in on a device, in eager mode."""
    if device == "cpu" and dtype not in (None, "float32"):
        raise ValueError(f"--dtype {dtype}: Paddle computes in float32 only on a CPU; use --dtype float32")


def describe_model(
    path,
    pipeline=None,
    *,
    id2label=None,
    config=None,
    default_config=None,
    key=None,
    latents_stats=None,
    latent_multiplier=None,
):
    """Returns the `Model` of a folder, a run's (its newest checkpoint), a file of weights or a name on the hub.

    Args:
        pipeline: the class of pipeline that is expected, of `PIPELINES`; None for any.
        id2label: JSON of labels that win over the model's, or None.
        config: JSON of the network of a file of weights. default_config: the same, or a resolved config, where there is
            no other; None: a LightningDiT is recognised by its shapes, those of the weights `key`.
        latents_stats, latent_multiplier: of weights, see `stated_features`.

    Raises:
        ValueError: one line: no such file, one whose network is not known, or a model of another pipeline.
    """
    path, stated = resolve_run(path), (latents_stats, latent_multiplier)
    if is_training_checkpoint(path):
        if config is not None:
            raise ValueError(f"--config_file is for a file of weights; {path} is a training checkpoint with its own")
        part = read_json_object(os.path.join(path, "config.json"), infinity=True).get("_class_name")
        if part is not None:
            raise ValueError(f"{path}: is a part of a pipeline, {shortened(part)}; expected the pipeline's folder")
        config = load_config(os.path.join(path, "config.json"))
        return _describe_weights("checkpoint", path, config, f"{path}: is", pipeline, id2label, stated)
    if os.path.isfile(path):
        found, source = weights_config(path, config), config or os.path.join(os.path.dirname(path), "config.json")
        what, notes = f"{source}: describes", []
        if found is None and default_config is None:
            from weights.recognised import recognised_config, recognised_note  # numpy, which demos don't wait for

            found, what = recognised_config(path, key), f"{path}: holds the weights of"
            notes = [recognised_note(found["model"])]
        elif found is None:
            found = default_config if isinstance(default_config, dict) else load_config(default_config)
            what = f"{path if found is default_config else default_config}: describes"
        model = _describe_weights("file", path, found, what, pipeline, id2label, stated)
        model.notes += notes
        return model
    check_holds_no(path, pipeline, config_file=config)
    labels = {} if id2label is None else read_labels(id2label)
    if os.path.isdir(path):
        return _describe_folder(path, pipeline, labels)
    if pipeline == "SiTPipeline":
        raise ValueError(f"{path}: there is no such file or folder")
    parts = path.split("/")  # OWNER/NAME on the hub, unless it looks like a folder that is not there
    if len(parts) != 2 or parts[0] in ("", ".", "..", "~") or os.path.isdir(parts[0]):
        raise ValueError(f"{path}: there is no such folder")
    return Model("hub", path, "DiTPipeline", labels=labels)


def describe_guide(model, path, *, key=None, config=None, backend="eager"):
    """Returns the `Model` of a guide at `path`, to which a `Model` is sampled by autoguidance.

    Args:
        key: which weights of it. config: JSON of the network of a file of weights that has none beside it; None: a
            LightningDiT is recognised, and else it is the model's own.
        backend: "inference": the path is a folder of tools/export_inference.py.

    Raises:
        ValueError: one line: no such model, or one that can't guide, as far as JSON files tell.
    """
    try:
        path = resolve_run(path)
        if config is not None and not os.path.isfile(path):
            raise ValueError(f"--guide_config is for a file of weights; {path} is none")
        guide = describe_model(path, key=key, config=config)
    except ValueError as error:
        is_bare = os.path.isfile(path) and config is None and own_config(path) is None
        if not is_bare or model.config is None:
            text = str(error).replace("--config_file", "--guide_config")
            raise ValueError(f"--guide_path {text}" if text.startswith(str(path)) else text) from None
        guide = describe_model(path, default_config=copy.deepcopy(model.config))
    if backend == "inference" and guide.kind != "exported":
        raise ValueError(
            f"--guide_path {path}: with --backend inference a guide is a folder of tools/export_inference.py; export it"
        )
    guide.check_backend(backend)
    if key is not None and guide.holds_all:
        raise ValueError(f"--guide_key is for a training checkpoint or a file of weights; {path} brings its own along")
    for name, there, here in _unlike(guide, model):
        raise ValueError(f"--guide_path {path}: can't guide {model.path}: {name} {there} there, {here} here")
    return guide


def _unlike(guide, model):
    """Lists, as `(what, the guide's, the model's)`, in what two models differ that a guide must share."""
    pairs = [("pipeline", guide.pipeline, model.pipeline), ("num_classes", guide.num_classes, model.num_classes)]
    if guide.config is not None and model.config is not None:
        for section, names in _GUIDED_BY.items():
            both = guide.config[section], model.config[section]
            pairs += [(name, *(one[name] for one in both)) for name in names if all(name in one for one in both)]
    return [(name, there, here) for name, there, here in pairs if None not in (there, here) and there != here]


# Keys that a network and its guide have in common.
_GUIDED_BY = {
    "model": ("in_channels", "sample_size"),
    "objective": ("type", "noise_schedule", "diffusion_steps", "predict_xstart", "path_type", "prediction"),
}


def stated_features(config, path, statistics=None, multiplier=None):
    """Returns the `features` section of the weights `path`, with what flags say of their latents.

    Args:
        config: of these weights, resolved.
        statistics: the latents_stats.pt of a file that does not say it (--latents_stats), or "none".
        multiplier: the same (--latent_multiplier); None for 1.

    Statistics of such a file are those of latents as the autoencoder gives them: its `scaling_factor` is left out.
    ValueError for one of these beside a config that says it.
    """
    features = config["features"]
    if statistics is None and multiplier is None:
        return features
    if features["latent_normalization"] is not None:
        flag = "latent_multiplier" if statistics is None else "latents_stats"
        raise ValueError(f"--{flag}: the config of {path} says how its latents were normalised; leave it out")
    factor = 1.0 if multiplier is None else multiplier
    if statistics in (None, "none"):
        return {**features, **_normalization(None, None, factor)} if factor != 1 else features
    from features.lightning import read_statistics

    channels = config["model"]["in_channels"]
    stated = _normalization(*(values.tolist() for values in read_statistics(statistics, channels)), factor)
    unscaled = {**dict.fromkeys(VAE_KEYS), "latent_channels": channels, "scaling_factor": 1.0}
    return {**features, **stated, "vae": features["vae"] or unscaled}


def _normalization(mean, std, multiplier):
    return {"latent_normalization": {"mean": mean, "std": std, "multiplier": multiplier}}


def check_normalization(config, path, statistics, multiplier):
    """Raises `ValueError` for a file of a LightningDiT of which nobody says how its latents were normalised.

    Arguments as of `stated_features`. Its images would be wrong: the published ones are normalised.
    """
    is_said = statistics is not None or multiplier is not None or own_config(path) is not None
    if config["model"]["type"] == "LightningDiT" and not is_said and not any(config["features"].values()):
        raise ValueError(
            f"{path}: this file does not say how its latents were normalised; give --latents_stats FILE, the "
            "latents_stats.pt of its set (of published weights that of "
            "huggingface.co/hustvl/vavae-imagenet256-f16d32-dinov2), or --latents_stats none"
        )


def check_holds_no(path, pipeline, **flags):
    """Raises `ValueError` for a flag that is given on a pipeline folder, which has all that such flags choose."""
    for name in (name for name, value in flags.items() if value is not None):
        raise ValueError(
            f"--{name} is for a training checkpoint or a file of weights; {path} is a {pipeline or 'pipeline'} folder, "
            "which holds all it needs"
        )


def _describe_folder(path, pipeline, labels):
    """Returns the `Model` of a folder that is no checkpoint; its own labels stand in for `labels`."""
    num_classes = has_null_class = network_type = None
    has_second = False
    if os.path.isfile(os.path.join(path, INFERENCE_MANIFEST)):
        index, kind, expected = _json_object(path, INFERENCE_MANIFEST), "exported", pipeline
        features = exported_features(index.get("features"), f"{os.path.join(path, INFERENCE_MANIFEST)}: features")
        scheduler, num_classes = index.get("scheduler"), index.get("num_classes")
        pipeline = "SiTPipeline" if scheduler == TRANSPORT_SCHEDULER else "DiTPipeline"
        network_type = index.get("model_type")
        has_null_class = index["null_class"] is not None if "null_class" in index else None
    else:
        index, kind = _json_object(path, "model_index.json"), "pipeline"
        features = index_features(index, path)
        pipeline = _pipeline_class(path, index, (pipeline,) if pipeline else tuple(PIPELINES))
        if pipeline == "SiTPipeline":
            network = _json_object(path, "transformer/config.json")
            num_classes, has_null_class = network.get("num_classes"), network.get("class_dropout_prob") != 0
            has_second = SECOND_BLOCK in network
        scheduler, network_type = (component_class(index, name) for name in ("scheduler", "transformer"))
    # What is not as it should be is left to the loaders, which say so.
    network_type = network_type if isinstance(network_type, str) else None
    own = index.get("id2label") or {}
    if CLASS_NAMES.accepts(own):
        own = {int(key): label for key, label in own.items()}
        labels = labels or own
        if num_classes is None:
            num_classes = max(own, default=999) + 1
    model = Model(
        kind,
        path,
        pipeline,
        network_type,
        labels=labels,
        num_classes=num_classes if POSITIVE_INT.accepts(num_classes) else None,
        has_null_class=has_null_class,
        has_second=has_second,
        features=features,
        scheduler={**_json_object(path, "scheduler/scheduler_config.json"), "_class_name": scheduler},
    )
    if kind == "exported" and expected not in (None, pipeline):
        raise ValueError(f"{path}: holds programs of a {shortened(network_type or pipeline)}; use {model.demo}")
    return model


def _pipeline_class(path, index, expected):
    """Returns the class that a folder's model_index.json names, which must be one of `expected`."""
    kind = index.get("_class_name")
    if kind in expected:
        return kind
    classes = " or ".join(expected)
    if not os.path.isfile(os.path.join(path, "model_index.json")):
        raise ValueError(
            f"{path}: neither a {classes} folder (model_index.json) nor a training checkpoint (config.json and "
            f"model_state.pdparams){checkpoint_hint(path)}"
        )
    known = PIPELINES.get(kind) if isinstance(kind, str) else None
    raise ValueError(f"{path}: is a {shortened(kind)}; {f'use {known.demo}' if known else f'expected a {classes}'}")


def _describe_weights(kind, path, config, what, pipeline, id2label, stated):
    """Returns the `Model` of a checkpoint or a file of weights; `what` begins a message on its config."""
    model, objective = config["model"], config["objective"]["type"]
    network = MODEL_TYPES[model["type"]]
    if pipeline not in (None, network.pipeline):
        raise ValueError(f"{what} a {model['type']}; use {network.demo}")
    if objective != network.objective:
        expected = f"{network.demo} samples {network.objective!r}"
        raise ValueError(f"{what} a {model['type']} for the objective {objective!r}; {expected}")
    config["features"] = stated_features(config, path, *stated)
    labels, note = weights_labels(id2label, config)
    known = {"num_classes": model["num_classes"], "has_null_class": model["class_dropout_prob"] > 0}
    known |= {"has_second": internal_guidance_block(config) is not None, "features": config["features"]}
    notes = [note] if note else []
    return Model(kind, path, network.pipeline, model["type"], config=config, labels=labels, notes=notes, **known)


def _json_object(folder, name):
    path = inside(folder, name)
    content = read_json(path, infinity=True) if os.path.isfile(path) else {}
    return content if isinstance(content, dict) else {}


def check_no_file(path):
    """Raises `ValueError` for a file, where a folder or a name on the hub is expected."""
    if os.path.isfile(path):
        raise ValueError(
            f"{path}: is a file; expected a folder (tools/convert_dit_to_ppdiffusers.py makes one of a file of weights)"
        )
