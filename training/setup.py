"""Builds the parts of a run that both loops have: precision, network, averages, data, and notes about them.

Data are opened without Paddle, so that what does not fit the config is said at once.
"""

import json
import os
import random
from collections import namedtuple

import numpy as np

from config.options import POSITIVE_INT
from config.schema import check_groups, differences
from features.autoencoder import vae_differences
from features.dataset import FeatureDataset
from features.normalization import normalization_differences
from features.order import MicroBatchSampler, total_steps
from features.store import find_features, read_description, read_manifest
from models import build_model
from runtime.precision import resolve_precision
from runtime.process import counted, spare_small_blocks
from runtime.untrusted import shortened
from sampling.labels import read_labels

MAX_NAMES_BYTES = 1 << 20  # of class names in a config.json, which is read up to 4 MiB

# The samples of a run, those held out of it (or None), and the order in which this rank takes them.
Data = namedtuple("Data", "dataset held_out sampler")


def setup_precision(training, device):
    """Returns the `Precision` of a run, see `resolve_precision`."""
    return resolve_precision(training["amp_dtype"], training["amp_level"], device=device)


def build_network(config, tensor_group=None):
    """Builds the network of a run, in float32, from the run's seed: the same weights on every rank, in either loop.

    What its regularizers learn is part of it.
    """
    import paddle

    training = config["training"]
    spare_small_blocks()
    random.seed(training["seed"])
    np.random.seed(training["seed"] % 2**32)
    paddle.seed(training["seed"])
    return build_model(
        config,
        fused_attention=training["fused_attention"],
        enable_recompute=training["recompute"],
        single_backward=True,
        tensor_parallel_group=tensor_group,
    )


def build_averages(training, model, *, on_host=False):
    """Returns the averages of a run: the usual `EMA`, unless it is off, then the profiles of post-hoc EMA, if any.

    Build them while the model's weights are still float32. `on_host`: until they are sharded, see `EMA`.
    """
    from training.averages import EMA, PowerFunctionEMA

    usual = {"decay": training["ema_decay"], "warmup": training["ema_warmup"], "on_host": on_host}
    profiles = {"update_steps": training["ema_update_steps"], "stays_on_host": training["ema_on_host"]}
    averages = [EMA(model, **usual)] if training["use_ema"] else []
    stds = training["ema_profiles"]
    return averages + [PowerFunctionEMA(model, std, on_host=on_host, **profiles) for std in stds]


def open_data(config, feature_path, resolution=None, *, rank=0, world_size=1):
    """Opens the `Data` of a run: a seeded endless stream, of which every rank takes its rows of each global batch.

    Of several sets in the folder, `resolution` picks one. Rank and world size are those of ranks with different data.
    """
    training = config["training"]
    dataset, held_out = build_dataset(config, feature_path, resolution)
    sampler = MicroBatchSampler(
        len(dataset),
        global_batch_size=training["global_batch_size"],
        accumulation_steps=training["gradient_accumulation_steps"],
        rank=rank,
        world_size=world_size,
        seed=training["seed"],
        last_step=0,
    )
    check_groups(config, sampler.batch_size)
    resume_sampler(sampler, training)
    return Data(dataset, held_out, sampler)


def build_dataset(config, feature_path, resolution):
    """Opens `(training samples, held-out samples or None)`, `FeatureDataset`s, and fills in the config's `features`.

    A regularizer that takes encoder features gets their width too.
    """
    model, data = config["model"], config["data"]
    note = compare_classes(feature_path, resolution, model["num_classes"], data["classes"])
    dataset = FeatureDataset(
        feature_path,
        resolution=resolution,
        sample_shape=(model["in_channels"], model["sample_size"], model["sample_size"]),
        num_classes=model["num_classes"],
        flip=data["flip"],
        posterior=data["posterior"],
        seed=config["training"]["seed"],
        latent_normalization=data["latent_normalization"],
        latent_multiplier=data["latent_multiplier"],
        encoder_features=encoder_shape(config),
    )
    if dataset.encoder is not None:
        _alignment(config)["width"] = dataset.encoder.row_shape[1]
    features, notes = describe_features(feature_path, resolution, model["num_classes"])
    features["latent_normalization"] = dataset.normalization
    if dataset.encoder is None:
        features["encoder"] = None
    dataset.notes += [*filter(None, [note]), *notes]
    changes = features_changes(config["features"], features) if any(config["features"].values()) else ""
    if not any(features.values()) and any(config["features"].values()):
        changes = "it has neither manifest nor class names"
    if changes:
        dataset.notes.append(f"the config's section features describes another set; this one counts: {changes}")
    config["features"] = features
    if data["classes"] is not None:
        dataset = dataset.subset(data["classes"])
    if not dataset.moments and data["posterior"] == "mean":
        dataset.notes.append("posterior mean has no effect: the set holds samples, not moments")
    held_out = None
    if data["validation_samples"]:
        dataset, held_out = dataset.split(data["validation_samples"])
    return dataset.in_memory() if data["in_memory"] else dataset, held_out


def encoder_shape(config):
    """Returns the shape `(T, E)` of the encoder features that a config takes; None if it takes none.

    E is None where the set's own width is to be taken.
    """
    entry = _alignment(config)
    model = config["model"]
    return None if entry is None else ((model["sample_size"] // model["patch_size"]) ** 2, entry["width"])


def _alignment(config):
    """Returns the regularizer of a config that takes encoder features, or None."""
    kind = "representation_alignment"
    return next((entry for entry in config["objective"]["regularizers"] if entry["type"] == kind), None)


def describe_features(feature_path, resolution, num_classes):
    """Returns `(section, notes)`: a set's own description as a config's `features` section, and sentences to print."""
    _, name = find_features(feature_path, resolution)
    features = read_description(feature_path, name)
    features["class_names"], note = read_class_names(os.path.join(feature_path, f"{name}_classes.json"), num_classes)
    return features, [note] if note else []


def compare_classes(feature_path, resolution, num_classes, wanted=None):
    """Returns a sentence if a config has more classes than its set, None if as many, or if the set does not tell.

    ValueError for a set with samples of more classes, unless only the labels `wanted` are trained.
    """
    _, name = find_features(feature_path, resolution)
    manifest = read_manifest(feature_path, name)
    found, counts = manifest.get("num_classes"), manifest.get("class_counts")
    if not POSITIVE_INT.accepts(found) or found == num_classes:
        return None
    what = f"the set {name} in {feature_path} has {counted(found, 'class', 'classes')}, the config's num_classes is "
    what += f'{num_classes}: write "num_classes": {found} in its section model'
    if found < num_classes:
        return f"{what}, unless labels are to be left free"
    used = isinstance(counts, list) and any(counts[num_classes:])
    if used and wanted is None:
        raise ValueError(f"{what}, or choose classes by --classes")
    return None


def read_class_names(path, num_classes):
    """Reads `({label: name} or None, note or None)` from a set's NAME_classes.json, for labels below `num_classes`."""
    if not os.path.exists(path):
        return None, None
    too_many = f"{path}: its class names take more than {MAX_NAMES_BYTES >> 20} MiB and stay there"
    if os.path.getsize(path) > 2 * MAX_NAMES_BYTES:
        return None, too_many
    names = {label: shortened(name, 200).strip() for label, name in read_labels(path).items()}
    names = {str(label): names[label] for label in sorted(names) if label < num_classes and names[label]}
    if len(json.dumps(names, indent=2, ensure_ascii=False).encode()) > MAX_NAMES_BYTES:
        return None, too_many
    return names or None, None


def features_changes(theirs, ours):
    """Returns, in words, how two `features` sections differ in what matters to a network; empty if they don't."""
    changes = vae_differences(theirs["vae"], ours["vae"])
    normalized = normalization_differences(theirs, ours)
    changes += [(what, shortened(there, 60), shortened(here, 60)) for what, there, here in normalized]
    encoders = [features["encoder"] for features in (theirs, ours) if features["encoder"]]
    if len({encoder["weights_sha256"] for encoder in encoders} - {None}) == 2:
        shown = [f"{shortened(each['name'])} (sha256 {shortened(each['weights_sha256'], 12)})" for each in encoders]
        changes.append(("encoder", *shown))
    names, classes = ours["class_names"] or {}, theirs["class_names"] or {}
    renamed = [label for label in classes if names.get(label, classes[label]) != classes[label]]
    changes += [(f"class {label} is", shortened(classes[label]), shortened(names[label])) for label in renamed[:1]]
    return "; ".join(f"{what} {here} here, {there} there" for what, there, here in changes)


def resume_sampler(sampler, training, step=0, samples_seen=0):
    """Lets a sampler go on after this step and these samples; the epochs that are left are counted from there."""
    settings = {key: training[key] for key in ("global_batch_size", "max_steps", "epochs")}
    last_step = total_steps(sampler.stream.num_samples, first_step=step, samples_seen=samples_seen, **settings)
    sampler.resume(step, samples_seen, last_step)


def describe_data_changes(checkpoint, config, dataset):
    """Returns a sentence to print if a resumed run had other data, else None."""
    changes, theirs = [], checkpoint.config or config
    before = checkpoint.progress.get("num_samples")
    if before not in (None, len(dataset)):
        changes.append(f"{counted(len(dataset), 'sample')} here, {before:,} when the checkpoint was saved")
    keys = ("flip", "posterior", "classes", "validation_samples")
    changed = [key for key in keys if theirs["data"][key] != config["data"][key]]
    changes += [f"{key} {config['data'][key]} here, {theirs['data'][key]} there" for key in changed]
    changes += filter(None, [features_changes(theirs["features"], config["features"])])
    held_out = {"classes", "validation_samples"} & {*changed}
    trained_on = "; held-out samples may have been trained on before" if held_out else ""
    return f"{'; '.join(changes)}: other data, or in another order, from here{trained_on}" if changes else None


def describe_regularizer_changes(checkpoint, config):
    """Returns a sentence to print if regularizers that a resumed run had too have other settings, else None."""
    ours, theirs = (
        {entry["type"]: entry for entry in each["objective"]["regularizers"]}
        for each in (config, checkpoint.config or config)
    )
    changes = {kind: differences(theirs[kind], entry) for kind, entry in ours.items() if kind in theirs}
    told = [f"{kind} {listed}" for kind, listed in changes.items() if listed]
    return f"regularizers go on with other settings: {'; '.join(told)}" if told else None
