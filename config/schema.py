"""From a JSON file to the resolved config, and how two configs differ. Standard library only.

The resolved config is what a run prints once and saves in every checkpoint: command line over JSON over the defaults
of `config.options`. A run fills in the section `features` from its set (`training.setup.build_dataset`), so that every
tool that gets a checkpoint knows its autoencoder and its class names.
"""

import copy
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from config.options import (
    AUXILIARY_KEYS,
    AUXILIARY_TYPES,
    DATA_KEYS,
    DIT_KEYS,
    FEATURES_KEYS,
    LARGE_DIT_KEYS,
    OBJECTIVE_KEYS,
    POSITIVE_INT,
    REQUIRED,
    TRAINING_KEYS,
    VAE_KEYS,
)
from config.options import DEFAULT_VAE as DEFAULT_VAE
from config.options import MAX_SEED as MAX_SEED
from runtime.untrusted import check_network, read_json

SCALING_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
SECTIONS = ("model", "objective", "training", "data", "features")
# Names of the official code: DiT's and SiT's, which PaddleMIX's SiT configs use, and Large-DiT's.
ALIASES = {
    "input_size": "sample_size",
    "depth": "num_layers",
    "num_heads": "num_attention_heads",
    "dim": "hidden_size",
    "n_layers": "num_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_kv_heads",
}


def _check_dit(model, where):
    width = model["num_attention_heads"] * model["attention_head_dim"]
    if width % 4:  # two coordinates, each with sines and cosines
        raise ValueError(f"{where}: num_attention_heads * attention_head_dim must be a multiple of 4, got {width}")


def _check_large_dit(model, where):
    heads, head_dim, kv_heads = (model[n] for n in ("num_attention_heads", "attention_head_dim", "num_kv_heads"))
    if head_dim % 2:
        raise ValueError(f"{where}: attention_head_dim must be even for rotary positions, got {head_dim}")
    if kv_heads and heads % kv_heads:
        raise ValueError(f"{where}: num_kv_heads must divide num_attention_heads {heads}, got {kv_heads}")


@dataclass(frozen=True)
class ModelType:
    """All that the project knows of a network by its `type`, beside its class in `models`."""

    keys: dict  # its options, the keyword arguments of the class
    check_sizes: Callable  # check_sizes(model, where) raises ValueError for sizes that don't fit together
    family: str  # the network itself; types of one family differ only in `drops_variance`
    drops_variance: bool  # of the channels that `learn_sigma` doubles, only the first half leaves the network
    objective: str  # the default type of the objective
    demo: str  # the script that samples it
    pipeline: str  # the class of its pipeline folder


_DIFFUSION = {"objective": "diffusion", "demo": "infer_demo_dit.py", "pipeline": "DiTPipeline"}
_TRANSPORT = {"objective": "transport", "demo": "infer_demo_sit.py", "pipeline": "SiTPipeline"}
MODEL_TYPES = {
    "DiT": ModelType(DIT_KEYS, _check_dit, "DiT", drops_variance=False, **_DIFFUSION),
    "SiT": ModelType(DIT_KEYS, _check_dit, "DiT", drops_variance=True, **_TRANSPORT),
    "LargeDiT": ModelType(LARGE_DIT_KEYS, _check_large_dit, "LargeDiT", drops_variance=False, **_DIFFUSION),
    "LargeSiT": ModelType(LARGE_DIT_KEYS, _check_large_dit, "LargeDiT", drops_variance=True, **_TRANSPORT),
}


def check_value(options, name, value, where):
    """Returns a value that `options[name]` accepts, of the default's type.

    Raises:
        ValueError: one line: the place, the key, and what was expected.
    """
    if name not in options:
        raise ValueError(f"{where}: unknown key {name!r}; known: {', '.join(sorted(options))}")
    option = options[name]
    if not option.check.accepts(value):
        raise ValueError(f"{where}: {name} must be {option.check.expected}, got {json.dumps(value)[:60]}")
    # JSON writes 4.0 as 4: keep the type of the default, so that two runs of one config save the same text.
    return float(value) if isinstance(option.default, float) else value


def _check_object(given, where):
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected an object {{...}}, got {json.dumps(given)[:60]}")


def check_section(options, given, where):
    """Returns every key of a section, from what is given and the defaults; raises `ValueError` as `check_value`."""
    _check_object(given, where)
    values = {name: check_value(options, name, value, where) for name, value in given.items()}
    for name, option in options.items():
        if name not in values and option.default is REQUIRED:
            raise ValueError(f"{where}: {name} is missing; expected {option.check.expected}")
    return {name: values.get(name, copy.copy(option.default)) for name, option in options.items()}


def _check_typed(tables, given, default_type, where, subject):
    """Returns `{"type": ..., every key of that type}`, where `tables` holds the options of each type."""
    _check_object(given, where)
    kind = given.get("type", default_type)
    if not isinstance(kind, str) or kind not in tables:
        known = ", ".join(tables) or "(there is none yet)"
        raise ValueError(f"{where}: {subject} type must be one of {known}, got {json.dumps(kind)[:60]}")
    own = {name: value for name, value in given.items() if name != "type"}
    return {"type": kind, **check_section(tables[kind], own, where)}


def _official_names(model, where):
    """Returns the model section with the official codes' names (`ALIASES`, `hidden_size`) turned into ours."""
    if not isinstance(model, dict):
        return model
    given = {}  # our name: the name in the file
    for name in model:
        other = given.setdefault(ALIASES.get(name, name), name)
        if other != name:
            raise ValueError(f"{where}: {' and '.join(sorted((name, other)))} are the same; give one")
    renamed = {ours: model[name] for ours, name in given.items()}
    if "hidden_size" in renamed:
        name, width, heads = given["hidden_size"], renamed.pop("hidden_size"), renamed.get("num_attention_heads")
        if "attention_head_dim" in renamed:
            raise ValueError(f"{where}: {name} and attention_head_dim say the same; give one")
        if not (POSITIVE_INT.accepts(width) and POSITIVE_INT.accepts(heads) and width % heads == 0):
            raise ValueError(
                f"{where}: {name} must be a multiple of num_attention_heads {json.dumps(heads)}, "
                f"got {json.dumps(width)}"
            )
        renamed["attention_head_dim"] = width // heads
    return renamed


def _resolve_model(given, where):
    keys = {name: kind.keys for name, kind in MODEL_TYPES.items()}
    model = _check_typed(keys, _official_names(given, where), "DiT", where, "model")
    check_network(model, where)
    if model["sample_size"] % model["patch_size"]:
        raise ValueError(
            f"{where}: patch_size must divide sample_size {model['sample_size']}, got {model['patch_size']}"
        )
    MODEL_TYPES[model["type"]].check_sizes(model, where)
    return model


def _resolve_objective(given, default_type, where):
    objective = _check_typed(OBJECTIVE_KEYS, given, default_type, where, "objective")
    types = {name: {**AUXILIARY_KEYS, **keys} for name, keys in AUXILIARY_TYPES.items()}
    objective["auxiliary"] = [
        _check_typed(types, entry, None, f"{where}: auxiliary[{index}]", "regularizer")
        for index, entry in enumerate(objective["auxiliary"])
    ]
    return objective


def _check_together(config, source):
    """Raises `ValueError` for sections that are right one by one, but don't fit together."""
    model, objective = config["model"], config["objective"]
    kind = MODEL_TYPES[model["type"]]
    if model["learn_sigma"] and kind.drops_variance != (objective["type"] == "transport"):
        twins = [name for name, other in MODEL_TYPES.items() if other.family == kind.family and other is not kind]
        raise ValueError(
            f"{source}: a {model['type']} with learn_sigma can't be trained by the objective {objective['type']!r}; "
            f"use {''.join(f'the model type {twin}, or ' for twin in twins)}learn_sigma false"
        )
    if objective.get("cosine_loss") and objective["prediction"] != "velocity":
        raise ValueError(
            f"{source}: objective: cosine_loss is for the prediction velocity, got {objective['prediction']!r}"
        )
    for index, entry in enumerate(objective["auxiliary"]):
        if entry["layer"] is not None and entry["layer"] >= model["num_layers"]:
            raise ValueError(
                f"{source}: objective: auxiliary[{index}]: layer {entry['layer']} is outside the blocks "
                f"0..{model['num_layers'] - 1}"
            )
    for label in config["data"]["classes"] or ():
        if label >= model["num_classes"]:
            raise ValueError(
                f"{source}: data: classes: label {label} is outside the config's num_classes: "
                f"0..{model['num_classes'] - 1}"
            )


def _type_from_file_name(path):
    """Returns the model type that a file's name begins with; PaddleMIX's flat files say it in no other way."""
    name = os.path.basename(path)
    for kind in sorted(MODEL_TYPES, key=len, reverse=True):
        if re.match(rf"{kind}(?![A-Za-z])", name, re.IGNORECASE):
            return kind
    return "DiT"


def resolve_config(raw, *, source="config", file_name=""):
    """Checks a raw config and fills in the defaults.

    Args:
        raw: what the JSON holds: an object with sections, or a flat one of model keys alone (PaddleMIX's files).
        source: named in errors.
        file_name: gives a flat file its model type.

    Returns:
        `{"model": {...}, "objective": {...}, "training": {...}, "data": {...}, "features": {...}}`, every key present.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible value; names source, section and key.
    """
    _check_object(raw, source)
    if "model" not in raw and not set(raw) & set(SECTIONS):
        kind = _type_from_file_name(file_name)
        # PaddleMIX's LargeDiT class has qk_norm on unless its files say otherwise, the official one off.
        paddlemix = MODEL_TYPES[kind].family == "LargeDiT" and "attention_head_dim" in raw
        defaults = {"qk_norm": True} if paddlemix else {}
        raw = {"model": {"type": kind, **defaults, **raw}}
    for name in raw:
        if name not in SECTIONS:
            raise ValueError(f"{source}: unknown section {name!r}; known: {', '.join(SECTIONS)}")
    if "model" not in raw:
        raise ValueError(f"{source}: the section 'model' is missing")
    model = _resolve_model(raw["model"], f"{source}: model")
    default_type = MODEL_TYPES[model["type"]].objective
    config = {
        "model": model,
        "objective": _resolve_objective(raw.get("objective", {}), default_type, f"{source}: objective"),
        "training": check_section(TRAINING_KEYS, raw.get("training", {}), f"{source}: training"),
        "data": check_section(DATA_KEYS, raw.get("data", {}), f"{source}: data"),
        "features": resolve_features(raw.get("features", {}), f"{source}: features"),
    }
    _check_together(config, source)
    return config


def resolve_features(given, where):
    """Returns a `features` section with every key, null where nothing is given; raises as `resolve_config` does."""
    features = check_section(FEATURES_KEYS, given, where)
    if features["vae"] is not None:
        features["vae"] = check_section(VAE_KEYS, features["vae"], f"{where}: vae")
    return features


def manifest_features(manifest, where):
    """Returns the `features` section of a set's manifest, without the class names, which stand in another file.

    Raises:
        ValueError: one line: a value that can't be.
    """
    vae = manifest.get("vae") if isinstance(manifest.get("vae"), dict) else {}
    known = {name: manifest.get(name) if name in SCALING_KEYS else vae.get(name) for name in VAE_KEYS}
    if all(value is None for value in known.values()):
        known = None
    return resolve_features({"image_size": manifest.get("image_size"), "vae": known}, where)


def load_config(path):
    """Reads, checks and completes a config file; see `resolve_config`."""
    return resolve_config(read_json(path), source=str(path), file_name=str(path))


def own_config(path):
    """Reads the resolved config of the training checkpoint that `path` is, or is a file of; None if there is none."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    file = os.path.join(folder, "config.json")
    if not os.path.isfile(file):
        return None
    if folder != path and not os.path.isfile(os.path.join(folder, "model_state.pdparams")):
        return None
    raw = read_json(file)
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):  # a config.json of ppdiffusers', say
        return None
    return resolve_config(raw, source=file)


def differences(theirs, ours, *, ignored=()):
    """Lists the keys in which two sections differ, as text "key A there, B here, ..."; empty if there are none.

    Args:
        ignored: keys that are left out.
    """
    keys = {*theirs, *ours} if theirs.get("type") == ours.get("type") else {*theirs} & {*ours}
    different = [key for key in sorted(keys - {*ignored}) if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in different)


def sampling_differences(theirs, ours):
    """Lists the `differences` of two sections that change a trained network's images."""
    ignored = {name for keys in OBJECTIVE_KEYS.values() for name, option in keys.items() if option.training_only}
    rates = theirs.get("class_dropout_prob"), ours.get("class_dropout_prob")
    if None not in rates and min(rates) > 0:
        ignored.add("class_dropout_prob")  # both have a null class
    return differences(theirs, ours, ignored=ignored)


def weights_config(path, config_file=None, sections=("model", "objective")):
    """Reads the config of weights: that of the checkpoint they lie in, else a config file; None without either.

    Args:
        path: of the weights.
        config_file: what the user gave, or None.
        sections: those in which the two must agree.

    Raises:
        ValueError: one line: the keys in which the two describe another network.
    """
    own = own_config(path)
    if config_file is None:
        return own
    config = load_config(config_file)
    for section in sections if own is not None else ():
        if listed := sampling_differences(own[section], config[section]):
            raise ValueError(
                f"{path}: holds another run's {section}: {listed}; these weights do not fit the config {config_file}"
            )
    return own or config


def override(config, given, where="command line"):
    """Returns the config with values of a command line put over its sections.

    Args:
        given: `{section: {key: value}}`, values that their options accept; "None" stands for null.

    Raises:
        ValueError: one line: values that don't fit together, or that the config's objective has no use for.
    """
    result = dict(config)
    for section, values in given.items():
        for name in values:
            if name not in config[section]:
                kind = config["objective"]["type"]
                raise ValueError(f"{where}: --{name} is no setting of the config's objective {kind!r}")
        values = {name: None if value == "None" else value for name, value in values.items()}
        result[section] = {**config[section], **values}
    _check_together(result, where)
    return result


def ineffective_settings(objective):
    """Says which given settings the official transport, and ours with it, ignores; None if there are none."""
    if objective["type"] != "transport" or objective["prediction"] != "velocity":
        return None
    names = ["loss_weight", *(["train_eps", "sample_eps"] if objective["path_type"] != "VP" else [])]
    given = [name for name in names if objective[name] is not None]
    if not given:
        return None
    return f"{', '.join(given)} has no effect on velocity prediction with the path {objective['path_type']}"
