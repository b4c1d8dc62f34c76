"""What both loops build in the same way before their first step."""

import json
import math
import os
import random

import numpy as np
import paddle

from config.schema import SCALING_KEYS, ineffective_settings, manifest_features, weights_features, write_json
from features.dataset import FeatureDataset
from features.order import MicroBatchSampler, total_steps
from features.store import find_features, read_manifest
from models import build_model
from models.parallel import whole_shape
from runtime.precision import resolve_precision
from runtime.process import compute_capability, counted, say
from runtime.untrusted import printable, read_json
from training.averages import EMA

MAX_NAMES_BYTES = 1 << 20  # of class names in a config.json, which is read up to 4 MiB


def setup_precision(config, device):
    """The `Precision` of a run, and a note to print if the device computes otherwise than asked, else None."""
    training = config["training"]
    precision, note = resolve_precision(
        training["amp_dtype"], training["amp_level"], device=device, compute_capability=compute_capability(device)
    )
    return precision, note


def build_network(config, tensor_group=None, *, single_backward=False):
    """The network of a run, in float32, from the run's seed: the same weights on every rank and in either loop.

    Args:
        tensor_group: the tensor-parallel group of ranks that hold a part each; None: whole.
        single_backward: the promise of a training step, see `models.DiT`.
    """
    training = config["training"]
    random.seed(training["seed"])
    np.random.seed(training["seed"] % 2**32)
    paddle.seed(training["seed"])
    return build_model(
        config["model"],
        fused_attention=training["fused_attention"],
        enable_recompute=training["recompute"],
        single_backward=single_backward,
        tensor_parallel_group=tensor_group,
    )


def build_ema(config, model, *, on_host=False):
    """The run's `EMA`, or None; build it while the model's weights are still float32."""
    training = config["training"]
    if not training["use_ema"]:
        return None
    return EMA(model, training["ema_decay"], warmup=training["ema_warmup"], on_host=on_host)


def build_dataset(config, feature_path, resolution):
    """`(training samples, held-out samples or None)`, `FeatureDataset`s for the config's model and `data` section.

    Fills in the config's `features` section, which the set at hand decides, whatever a config file says.
    """
    model, data = config["model"], config["data"]
    dataset = FeatureDataset(
        feature_path,
        resolution=resolution,
        sample_shape=(model["in_channels"], model["sample_size"], model["sample_size"]),
        num_classes=model["num_classes"],
        flip=data["flip"],
        posterior=data["posterior"],
        seed=config["training"]["seed"],
    )
    features, notes = describe_features(feature_path, resolution, model["num_classes"])
    dataset.notes += notes
    changes = features_changes(config["features"], features)
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


def describe_features(feature_path, resolution, num_classes):
    """Returns `(section, notes)`: a set's own description as a config's `features` section, and sentences to print."""
    _, name = find_features(feature_path, resolution)
    manifest = read_manifest(feature_path, name)
    features = manifest_features(manifest, os.path.join(feature_path, f"{name}_manifest.json"))
    vae = features["vae"]
    if vae is not None and vae["name"] is not None:
        # A relative path is the extraction's, and a run may be resumed or sampled from anywhere.
        path = manifest["vae"].get("path")
        if isinstance(path, str) and (os.path.isdir(path) or not os.path.isdir(vae["name"])):
            vae["name"] = path
        elif os.path.isdir(vae["name"]):
            vae["name"] = os.path.abspath(vae["name"])
    features["class_names"], note = read_class_names(os.path.join(feature_path, f"{name}_classes.json"), num_classes)
    return features, [note] if note else []


def read_class_names(path, num_classes):
    """Reads `({label: name} or None, note or None)` from a set's NAME_classes.json, for labels below `num_classes`.

    Raises:
        ValueError: one line: not such a file.
    """
    if not os.path.exists(path):
        return None, None
    too_many = f"{path}: its class names take more than {MAX_NAMES_BYTES >> 20} MiB and stay there"
    if os.path.getsize(path) > 2 * MAX_NAMES_BYTES:
        return None, too_many
    content = read_json(path)
    names = content.get("id2label") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(key.isascii() and key.isdigit() for key in names):
        raise ValueError(f'{path}: expected {{"id2label": {{"0": "name", ...}}}}')
    names = {int(key): printable(name, 200).strip() for key, name in names.items() if len(key) < 8}
    names = {str(label): names[label] for label in sorted(names) if label < num_classes and names[label]}
    if len(json.dumps(names, indent=2, ensure_ascii=False).encode()) > MAX_NAMES_BYTES:
        return None, too_many
    return names or None, None


def features_changes(theirs, ours):
    """Returns, in words, how two `features` sections differ in what matters to a network; empty if they don't."""
    changes = []
    there, here = theirs["vae"] or {}, ours["vae"] or {}
    if None not in (there.get("weights_sha256"), here.get("weights_sha256")):
        if there["weights_sha256"] != here["weights_sha256"]:
            names = [f"{printable(vae['name'])} ({printable(vae['weights_sha256'], 8)})" for vae in (here, there)]
            changes.append(f"autoencoder {names[0]} here, {names[1]} there")
    if None not in (there.get("scaling_factor"), here.get("scaling_factor")):
        for name in SCALING_KEYS:
            if (there[name] or None) != (here[name] or None):  # no shift is one of 0
                changes.append(f"{name} {printable(here[name], 40)} here, {printable(there[name], 40)} there")
    for label, there in (theirs["class_names"] or {}).items():
        here = (ours["class_names"] or {}).get(label, there)
        if here != there:
            changes.append(f"class {label} is {printable(here)} here, {printable(there)} there")
            break
    return "; ".join(changes)


def build_validation(config, objective, held_out, sampler, ranks_per_batch=1):
    """The run's `Validation` on the held-out samples, or None."""
    if held_out is None:
        return None
    from training.validation import Validation

    return Validation(
        objective,
        held_out,
        every=config["data"]["validation_steps"],
        batch_size=sampler.batch_size,
        rank=sampler.rank,
        world_size=sampler.world_size,
        ranks_per_batch=ranks_per_batch,
    )


def build_sampler(config, dataset, *, rank, world_size):
    """The `MicroBatchSampler` of data-parallel rank `rank` of `world_size`, up to the last step of a new run."""
    training = config["training"]
    return MicroBatchSampler(
        len(dataset),
        global_batch_size=training["global_batch_size"],
        accumulation_steps=training["gradient_accumulation_steps"],
        rank=rank,
        world_size=world_size,
        seed=training["seed"],
        last_step=_last_step(config, len(dataset)),
    )


def resume_sampler(sampler, config, checkpoint):
    """Puts a sampler where the run of a checkpoint (or None) stopped; the epochs that are left are counted from there.

    Returns:
        The step that is done.
    """
    if checkpoint is None:
        return 0
    step, seen = checkpoint.progress["global_step"], checkpoint.progress["samples_seen"]
    last_step = _last_step(config, sampler.stream.num_samples, first_step=step, samples_seen=seen)
    sampler.resume(step, seen, last_step)
    return step


def _last_step(config, num_samples, **done):
    training = config["training"]
    settings = {key: training[key] for key in ("global_batch_size", "max_steps", "epochs")}
    return total_steps(num_samples, **settings, **done)


def build_preview(objective, config, args, *, vae):
    """The run's `Preview` by the flags of either loop, or None if `--image_logging_steps` is off."""
    if args.image_logging_steps <= 0:
        return None
    from training.preview import Preview

    return Preview(objective, config, vae=vae, num_inference_steps=args.num_inference_steps, cfg_scale=args.cfg_scale)


def describe_run(config, *, folder, dataset, model, device, world_size, last_step, notes):
    """Prints the resolved settings once, and saves them as `config.json` in the run's folder. Rank 0 only."""
    say(json.dumps(_without_names(config), indent=2))
    for note in filter(None, [*notes, *dataset.notes, ineffective_settings(config["objective"])]):
        say(f"note: {note}")
    parameters = sum(math.prod(whole_shape(parameter)) for parameter in model.parameters())
    say(
        f"{config['model']['type']} with {parameters:,} parameters on {device}, "
        f"{counted(world_size, 'process', 'processes')}; {counted(len(dataset), 'sample')} in {dataset.features_dir}; "
        f"training to step {last_step:,}; output in {folder}"
    )
    os.makedirs(folder, exist_ok=True)
    write_json(os.path.join(folder, "config.json"), config)


def _without_names(config):
    names = config["features"]["class_names"]
    return {**config, "features": {**config["features"], "class_names": names and f"{len(names)} names"}}


def other_data_note(checkpoint, config, dataset):
    """A sentence to print if a resumed run had other data, else None."""
    if checkpoint is None:
        return None
    changes = []
    before = checkpoint.progress.get("num_samples")
    if before not in (None, len(dataset)):
        changes.append(f"{counted(len(dataset), 'sample')} here, {before:,} when the checkpoint was saved")
    theirs = checkpoint.config["data"] if checkpoint.config is not None else config["data"]
    for key in ("flip", "posterior", "classes", "validation_samples"):
        if theirs[key] != config["data"][key]:
            changes.append(f"{key} {config['data'][key]} here, {theirs[key]} there")
    if checkpoint.config is not None:
        changes += filter(None, [features_changes(checkpoint.config["features"], config["features"])])
    if not changes:
        return None
    note = "; ".join(changes) + ": other data, or in another order, from here"
    if (
        theirs["validation_samples"] != config["data"]["validation_samples"]
        or theirs["classes"] != config["data"]["classes"]
    ):
        note += "; held-out samples may have been trained on before"
    return note


def pretrained_note(path, config):
    """Returns a sentence if the weights that a run starts from were trained on another autoencoder's latents."""
    features = {**weights_features(path, config), "class_names": None}
    changes = features_changes(features, config["features"])
    return f"{path} was trained on other latents: {changes}" if changes else None


def progress_state(config, *, step, samples_seen, num_samples, world_size, watch):
    """The `progress` of a checkpoint; `watch` is the `NumberWatch`'s state."""
    return {
        "global_step": step,
        "samples_seen": samples_seen,
        "epoch": samples_seen / num_samples,
        "seed": config["training"]["seed"],
        "global_batch_size": config["training"]["global_batch_size"],
        "world_size": world_size,
        "num_samples": num_samples,
        "watch": watch,
    }
