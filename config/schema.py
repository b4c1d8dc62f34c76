"""JSON configs: sections `model`, `objective`, `training` and `data`, checked key by key. Standard library only.

The resolved config is what a run prints once and saves in every checkpoint: command line over JSON over the defaults
that stand here. Its section `features` says what the run's features were made of; it is filled in from the set itself
(`training.setup.build_dataset`), so that every tool that gets a checkpoint knows its autoencoder and its class names.
"""

import json
import math
import os
import re
from collections import namedtuple

from runtime.untrusted import check_network, read_json

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"  # of latents that nothing is known of
SCALING_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")

# What a key accepts: `check(value)` decides, `expected` is the text of the error.
Key = namedtuple("Key", "default check expected")
REQUIRED = object()
MAX_SEED = 2**32 - 1  # the largest seed that numpy, Python and Paddle all take


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive_int(default=REQUIRED):
    return Key(default, lambda v: _is_int(v) and v > 0, "a positive integer")


def _int_from(least, default):
    return Key(default, lambda v: _is_int(v) and v >= least, f"an integer of {least} or more")


def _bool(default):
    return Key(default, lambda v: isinstance(v, bool), "true or false")


def _number(default, least=0.0):
    return Key(default, lambda v: _is_number(v) and v >= least, f"a number of {least:g} or more")


def _positive(default):
    return Key(default, lambda v: _is_number(v) and v > 0, "a number above 0")


def _probability(default):
    return Key(default, lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1")


def _choice(default, *values):
    return Key(default, lambda v: isinstance(v, str) and v in values, "one of " + ", ".join(values))


def _or_null(key):
    return Key(None, lambda v: v is None or key.check(v), key.expected + ", or null")


_EPS = Key(None, lambda v: _is_number(v) and 0 <= v < 0.5, "a number from 0 to below 0.5")

DIT_KEYS = {
    "sample_size": _positive_int(),
    "patch_size": _positive_int(),
    "in_channels": _positive_int(4),
    "num_layers": _positive_int(),
    "num_attention_heads": _positive_int(),
    "attention_head_dim": _positive_int(),
    "mlp_ratio": _positive(4.0),
    "num_classes": _positive_int(1000),
    "class_dropout_prob": _probability(0.1),
    "learn_sigma": _bool(True),
}
LARGE_DIT_KEYS = {
    **{name: key for name, key in DIT_KEYS.items() if name != "mlp_ratio"},
    "qk_norm": _bool(False),
    "num_kv_heads": _or_null(_positive_int(None)),
    "multiple_of": _positive_int(256),
    "ffn_dim_multiplier": _or_null(_positive(None)),
    "norm_eps": _positive(1e-5),
}
MODEL_KEYS = {"DiT": DIT_KEYS, "SiT": DIT_KEYS, "LargeDiT": LARGE_DIT_KEYS, "LargeSiT": LARGE_DIT_KEYS}
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

OBJECTIVE_KEYS = {
    "diffusion": {
        "noise_schedule": _choice("linear", "linear", "squaredcos_cap_v2"),
        "diffusion_steps": _positive_int(1000),
        "predict_xstart": _bool(False),
        "sigma_small": _bool(False),
        "use_kl": _bool(False),
        "rescale_learned_sigmas": _bool(False),
        "timestep_sampler": _choice("uniform", "uniform", "loss-second-moment"),
    },
    "transport": {
        "path_type": _choice("Linear", "Linear", "GVP", "VP"),
        "prediction": _choice("velocity", "velocity", "noise", "score"),
        "loss_weight": _or_null(_choice(None, "velocity", "likelihood")),
        "train_eps": _or_null(_EPS),
        "sample_eps": _or_null(_EPS),
        # Beyond the official code: SD3's and LightningDiT's timesteps, LightningDiT's direction loss.
        "timestep_sampling": _choice("uniform", "uniform", "logit-normal"),
        "logit_mean": Key(0.0, _is_number, "a number"),
        "logit_std": _positive(1.0),
        "cosine_loss": _bool(False),
    },
}
DEFAULT_OBJECTIVE = {"DiT": "diffusion", "SiT": "transport", "LargeDiT": "diffusion", "LargeSiT": "transport"}

LR_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
TRAINING_KEYS = {
    # Switched from the JSON, as the user asked.
    "use_ema": _bool(True),
    "ema_decay": Key(0.9999, lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "ema_warmup": _bool(False),
    "recompute": _bool(False),
    "amp_dtype": _choice("float32", "float32", "float16", "bfloat16"),
    "amp_level": _choice("O1", "O1", "O2"),
    "fused_attention": _bool(False),
    # The optimizer: the defaults are the official train.py's.
    "learning_rate": _positive(1e-4),
    "weight_decay": _number(0.0),
    "adam_beta1": _probability(0.9),
    "adam_beta2": _probability(0.999),
    "adam_epsilon": _positive(1e-8),
    "max_grad_norm": Key(-1.0, _is_number, "a number; 0 or less turns clipping off"),
    "lr_scheduler_type": _choice("constant", *LR_SCHEDULES),
    "warmup_steps": _int_from(0, 0),
    "lr_end": _number(1e-7),
    "num_cycles": _positive(0.5),
    "power": _positive(1.0),
    # The watch on the numbers.
    "on_nonfinite": _choice("stop", "stop", "skip"),
    "loss_spike_factor": Key(0.0, lambda v: _is_number(v) and (v == 0 or v > 1), "0 for off, or a number above 1"),
    # The run.
    "max_steps": Key(-1, lambda v: _is_int(v) and (v == -1 or v > 0), "a positive integer, or -1 to count in epochs"),
    "epochs": _positive(1400),
    "global_batch_size": _positive_int(256),
    "gradient_accumulation_steps": _positive_int(1),
    # Only a run checks the upper end (`resolve_training`): checkpoints of runs with larger seeds are still read.
    "seed": _int_from(0, 0)._replace(expected=f"an integer from 0 to {MAX_SEED}"),
}

DATA_KEYS = {
    "flip": _bool(False),
    "posterior": _choice("sample", "sample", "mean"),
    "classes": Key(
        None,
        lambda v: v is None or (isinstance(v, list) and v and all(_is_int(label) and label >= 0 for label in v)),
        "a list of class labels, or null for all",
    ),
    "in_memory": _bool(False),
    "validation_samples": _int_from(0, 0),
    "validation_steps": _positive_int(1000),
}


def _is_class_names(value):
    return isinstance(value, dict) and all(
        isinstance(name, str) and key.isascii() and key.isdigit() and len(key) < 8 and str(int(key)) == key
        for key, name in value.items()
    )


def _or_one_a_channel(check):
    return lambda v: v is None or check(v) or (isinstance(v, list) and len(v) > 0 and all(map(check, v)))


_TEXT = _or_null(Key(None, lambda v: isinstance(v, str), "text"))
# The autoencoder that encoded the images; null where a set does not tell. The scaling is diffusers', by its names.
VAE_KEYS = {
    "name": _TEXT,
    "weights_sha256": _TEXT,
    "latent_channels": _or_null(_positive_int(None)),
    "downsampling": _or_null(_positive_int(None)),
    "scaling_factor": _or_null(_positive(None)),
    "shift_factor": _or_null(Key(None, _is_number, "a number")),
    "latents_mean": Key(None, _or_one_a_channel(_is_number), "a number, a list of one a channel, or null"),
    "latents_std": Key(
        None, _or_one_a_channel(_positive(None).check), "a number above 0, a list of one a channel, or null"
    ),
}
FEATURES_KEYS = {
    "image_size": _or_null(_positive_int(None)),
    "class_names": _or_null(Key(None, _is_class_names, 'names by label, {"0": "name", ...}')),
    "vae": _or_null(Key(None, lambda v: isinstance(v, dict), "an object {...}")),
}

SECTIONS = ("model", "objective", "training", "data", "features")


def check_value(keys, name, value, where):
    """Checks one value against a table of keys; raises `ValueError` naming place, key and what was expected."""
    if name not in keys:
        raise ValueError(f"{where}: unknown key {name!r}; known: {', '.join(sorted(keys))}")
    if not keys[name].check(value):
        raise ValueError(f"{where}: {name} must be {keys[name].expected}, got {json.dumps(value)[:60]}")
    # JSON writes 4.0 as 4: keep the type of the default, so that two runs of one config save the same text.
    return float(value) if isinstance(keys[name].default, float) else value


def _section(keys, given, where):
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected an object {{...}}, got {json.dumps(given)[:60]}")
    values = {name: check_value(keys, name, value, where) for name, value in given.items()}
    resolved = {}
    for name, key in keys.items():
        if name not in values and key.default is REQUIRED:
            raise ValueError(f"{where}: {name} is missing; expected {key.expected}")
        resolved[name] = values.get(name, key.default)
    return resolved


def _typed_section(tables, given, default_type, where, what):
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected an object {{...}}, got {json.dumps(given)[:60]}")
    given = dict(given)
    kind = given.pop("type", default_type)
    if not isinstance(kind, str) or kind not in tables:
        raise ValueError(f"{where}: {what} type must be one of {', '.join(tables)}, got {json.dumps(kind)[:60]}")
    return {"type": kind, **_section(tables[kind], given, where)}


def _official_names(model, where):
    """The model section with the names of the official codes (`ALIASES`, `hidden_size`) turned into ours."""
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
        if not (_is_int(width) and _is_int(heads) and heads > 0 and width > 0 and width % heads == 0):
            raise ValueError(
                f"{where}: {name} must be a multiple of num_attention_heads {json.dumps(heads)}, "
                f"got {json.dumps(width)}"
            )
        renamed["attention_head_dim"] = width // heads
    return renamed


def _check_sizes(model, where):
    """Raises `ValueError` for sizes that are right one by one, but don't fit together."""
    check_network(model, where)
    heads, head_dim = model["num_attention_heads"], model["attention_head_dim"]
    if model["sample_size"] % model["patch_size"]:
        raise ValueError(
            f"{where}: patch_size must divide sample_size {model['sample_size']}, got {model['patch_size']}"
        )
    if MODEL_KEYS[model["type"]] is DIT_KEYS:
        if heads * head_dim % 4:  # two coordinates, each with sines and cosines
            raise ValueError(
                f"{where}: num_attention_heads * attention_head_dim must be a multiple of 4, got {heads * head_dim}"
            )
        return
    if head_dim % 2:
        raise ValueError(f"{where}: attention_head_dim must be even for rotary positions, got {head_dim}")
    if model["num_kv_heads"] and heads % model["num_kv_heads"]:
        raise ValueError(f"{where}: num_kv_heads must divide num_attention_heads {heads}, got {model['num_kv_heads']}")


def _check_objective(model, objective, source):
    """Raises `ValueError` for a model and an objective that don't fit together."""
    drops_variance = model["type"] in ("SiT", "LargeSiT")
    if model["learn_sigma"] and drops_variance != (objective["type"] == "transport"):
        twin = {"SiT": "DiT", "DiT": "SiT", "LargeSiT": "LargeDiT", "LargeDiT": "LargeSiT"}[model["type"]]
        raise ValueError(
            f"{source}: a {model['type']} with learn_sigma can't be trained by the objective {objective['type']!r}; "
            f"use the model type {twin}, or learn_sigma false"
        )
    if objective["type"] == "transport" and objective["cosine_loss"] and objective["prediction"] != "velocity":
        raise ValueError(
            f"{source}: objective: cosine_loss is for the prediction velocity, got {objective['prediction']!r}"
        )


def _type_from_file_name(path):
    name = os.path.basename(path)
    for kind in sorted(MODEL_KEYS, key=len, reverse=True):
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
    if not isinstance(raw, dict):
        raise ValueError(f"{source}: expected a JSON object, got {json.dumps(raw)[:60]}")
    if "model" not in raw and not set(raw) & set(SECTIONS):
        kind = _type_from_file_name(file_name)
        # PaddleMIX's LargeDiT class has qk_norm on unless its files say otherwise, the official one off.
        paddlemix = "qk_norm" in MODEL_KEYS[kind] and "attention_head_dim" in raw
        defaults = {"qk_norm": True} if paddlemix else {}
        raw = {"model": {"type": kind, **defaults, **raw}}
    for name in raw:
        if name not in SECTIONS:
            raise ValueError(f"{source}: unknown section {name!r}; known: {', '.join(SECTIONS)}")
    if "model" not in raw:
        raise ValueError(f"{source}: the section 'model' is missing")
    model = _typed_section(
        MODEL_KEYS, _official_names(raw["model"], f"{source}: model"), "DiT", f"{source}: model", "model"
    )
    objective = _typed_section(
        OBJECTIVE_KEYS, raw.get("objective", {}), DEFAULT_OBJECTIVE[model["type"]], f"{source}: objective", "objective"
    )
    _check_sizes(model, f"{source}: model")
    _check_objective(model, objective, source)
    training = _section(TRAINING_KEYS, raw.get("training", {}), f"{source}: training")
    data = _section(DATA_KEYS, raw.get("data", {}), f"{source}: data")
    _check_classes(model, data, f"{source}: data: classes")
    features = resolve_features(raw.get("features", {}), f"{source}: features")
    return {"model": model, "objective": objective, "training": training, "data": data, "features": features}


def _check_classes(model, data, where):
    num_classes = model["num_classes"]
    for label in data["classes"] or ():
        if label >= num_classes:
            raise ValueError(f"{where}: label {label} is outside the config's num_classes: 0..{num_classes - 1}")


def resolve_features(given, where):
    """Checks a `features` section and fills in nulls; raises `ValueError` as `resolve_config` does."""
    features = _section(FEATURES_KEYS, given, where)
    if features["vae"] is not None:
        features["vae"] = _section(VAE_KEYS, features["vae"], f"{where}: vae")
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


# Settings that change how a network is trained, not what a sampler makes of it.
_TRAINING_ONLY = (
    *("use_kl", "rescale_learned_sigmas", "timestep_sampler"),
    *("loss_weight", "timestep_sampling", "logit_mean", "logit_std", "cosine_loss"),
)


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
    ignored = set(_TRAINING_ONLY)
    rates = theirs.get("class_dropout_prob"), ours.get("class_dropout_prob")
    if None not in rates and min(rates) > 0:
        ignored.add("class_dropout_prob")  # both have a null class
    return differences(theirs, ours, ignored=ignored)


def weights_config(path, config_file=None, sections=("model", "objective")):
    """Reads the config of weights: that of the checkpoint they lie in, else a config file; None without either.

    Args:
        path: of the weights. config_file: what the user gave, or None. sections: in which the two must agree.

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


def weights_features(path, config):
    """Returns the `features` section of weights: that of the checkpoint they lie in, if it has one, else the config's.

    Args:
        path: a training checkpoint folder, a file of weights in one, or any other. config: what describes the network.
    """
    own = own_config(path)
    if own is not None and any(value is not None for value in own["features"].values()):
        return own["features"]
    return config["features"]


def override(config, training, objective, data=None, where="command line"):
    """The config with values of the command line put over its sections; None means not given.

    Raises:
        ValueError: a wrong value, or an objective's setting that the config's objective does not have.
    """
    kind = config["objective"]["type"]
    tables = {
        "training": (TRAINING_KEYS, training),
        "objective": (OBJECTIVE_KEYS[kind], objective),
        "data": (DATA_KEYS, data or {}),
    }
    result = dict(config)
    for section, (keys, given) in tables.items():
        result[section] = dict(config[section])
        for name, value in given.items():
            if value is not None:
                if name not in keys:
                    raise ValueError(f"{where}: --{name} is no setting of the config's objective {kind!r}")
                value = None if value == "None" else value
                result[section][name] = check_value(keys, name, value, where)
    _check_objective(result["model"], result["objective"], where)
    _check_classes(result["model"], result["data"], f"{where}: --classes")
    return result


def ineffective_settings(objective):
    """A sentence on settings that the official transport, and ours with it, ignores; None if there are none."""
    if objective["type"] != "transport" or objective["prediction"] != "velocity":
        return None
    names = ["loss_weight", *(["train_eps", "sample_eps"] if objective["path_type"] != "VP" else [])]
    given = [name for name in names if objective[name] is not None]
    if not given:
        return None
    return f"{', '.join(given)} has no effect on velocity prediction with the path {objective['path_type']}"
