"""From a JSON file to the resolved config, and how two configs differ. Standard library only.

A run prints the resolved config once and saves it in every checkpoint: command line over JSON over the defaults of
`config.options`. It fills in the section `features` from its set, for every tool that gets a checkpoint.
"""

import copy
import json
import math
import os
import re
from typing import NamedTuple

from config import options
from config.checks import holds_timestep, no_effect
from runtime.untrusted import check_sizes, read_json

SCALING_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
SECTIONS = ("model", "objective", "training", "data", "features", "evaluation", "guidance")
# Names of the official code: DiT's and SiT's, which PaddleMIX's SiT configs use, Large-DiT's and LightningDiT's.
ALIASES = {
    "input_size": "sample_size", "depth": "num_layers", "num_heads": "num_attention_heads", "dim": "hidden_size",
    "n_layers": "num_layers", "n_heads": "num_attention_heads", "n_kv_heads": "num_kv_heads",
    "use_qknorm": "qk_norm", "use_swiglu": "swiglu", "use_rope": "rope", "use_rmsnorm": "rms_norm",
    "in_chans": "in_channels",
}  # fmt: skip
# Off where a file that names one of them, or wo_shift, leaves them out: the defaults of the official LightningDiT.
_OFFICIAL_SWITCHES = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm")


class ModelType(NamedTuple):
    """All that the project knows of a network by its `type`, beside its class in `models`."""

    keys: dict  # its options, the keyword arguments of the class
    family: str  # the network itself; types of one family differ in `drops_variance` and in defaults
    drops_variance: bool  # of the channels that `learn_sigma` doubles, only the first half leaves the network
    objective: str  # the default type of the objective
    demo: str  # the script that samples it
    pipeline: str  # the class of its pipeline folder
    guided_channels: int | str = "auto"  # that its samplers guide by default, see `sampling.guidance.default_channels`


MODEL_TYPES = {
    "DiT": ModelType(options.DIT_KEYS, "DiT", False, "diffusion", "infer_demo_dit.py", "DiTPipeline"),
    "SiT": ModelType(options.DIT_KEYS, "DiT", True, "transport", "infer_demo_sit.py", "SiTPipeline"),
    "LargeDiT": ModelType(options.LARGE_DIT_KEYS, "LargeDiT", False, "diffusion", "infer_demo_dit.py", "DiTPipeline"),
    "LargeSiT": ModelType(options.LARGE_DIT_KEYS, "LargeDiT", True, "transport", "infer_demo_sit.py", "SiTPipeline"),
    "LightningDiT": ModelType(
        options.LIGHTNING_DIT_KEYS, "DiT", True, "transport", "infer_demo_lightningdit.py", "SiTPipeline", 3
    ),
}


def _check_object(given, where):
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected an object {{...}}, got {json.dumps(given)[:60]}")


def check_section(keys, given, where):
    """Returns every key of a section, from what is given and the defaults; ValueError for what a key can't be."""
    _check_object(given, where)
    for name, value in given.items():
        if name not in keys:
            raise ValueError(f"{where}: unknown key {name!r}; known: {', '.join(sorted(keys))}")
        if not keys[name].check.accepts(value):
            raise ValueError(f"{where}: {name} must be {keys[name].check.expected}, got {json.dumps(value)[:60]}")
    values = {}
    for name, option in keys.items():
        if name not in given and option.default is options.REQUIRED:
            raise ValueError(f"{where}: {name} is missing; expected {option.check.expected}")
        value = given.get(name, copy.copy(option.default))
        # JSON writes 4.0 as 4: keep the type of the default, so that two runs of one config save the same text.
        values[name] = float(value) if isinstance(option.default, float) else value
    return values


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
    """Returns the model section with the official names (`ALIASES`, `hidden_size`, `wo_shift`) turned into ours."""
    _check_object(model, where)
    given = {}  # our name: the name in the file
    for name in model:
        other = given.setdefault(ALIASES.get(name, name), name)
        if other != name:
            raise ValueError(f"{where}: {' and '.join(sorted((name, other)))} are the same; give one")
    renamed = {ours: model[name] for ours, name in given.items()}
    if "wo_shift" in renamed:
        if "adaln_shift" in renamed or not options.BOOL.accepts(renamed["wo_shift"]):
            raise ValueError(f"{where}: wo_shift must be true or false, the opposite of adaln_shift; give one of them")
        renamed["adaln_shift"] = not renamed.pop("wo_shift")
    if renamed.get("type") == "LightningDiT" and not {"wo_shift", *_OFFICIAL_SWITCHES}.isdisjoint(model):
        renamed = {**dict.fromkeys(map(ALIASES.get, _OFFICIAL_SWITCHES), False), **renamed}
    if "hidden_size" in renamed:
        name, width, heads = given["hidden_size"], renamed.pop("hidden_size"), renamed.get("num_attention_heads")
        if "attention_head_dim" in renamed:
            raise ValueError(f"{where}: {name} and attention_head_dim say the same; give one")
        if not (options.POSITIVE_INT.accepts(width) and options.POSITIVE_INT.accepts(heads) and width % heads == 0):
            rule = f"must be a multiple of num_attention_heads {json.dumps(heads)}"
            raise ValueError(f"{where}: {name} {rule}, got {json.dumps(width)}")
        renamed["attention_head_dim"] = width // heads
    return renamed


def _conflicts(model, objective, training, data, evaluation, guidance):
    """Yields in words which values of a config are right one by one, but don't fit together."""
    kind, heads, head_dim = MODEL_TYPES[model["type"]], model["num_attention_heads"], model["attention_head_dim"]
    if model["sample_size"] % model["patch_size"]:
        yield f"model: patch_size must divide sample_size {model['sample_size']}, got {model['patch_size']}"
    if kind.family == "DiT" and heads * head_dim % 4:  # two coordinates, each with sines and cosines
        yield f"model: num_attention_heads * attention_head_dim must be a multiple of 4, got {heads * head_dim}"
    if model.get("rope") and head_dim % 4:  # the same of each head
        yield f"model: attention_head_dim must be a multiple of 4 for 2-D rotary positions, got {head_dim}"
    if kind.family == "LargeDiT" and head_dim % 2:
        yield f"model: attention_head_dim must be even for rotary positions, got {head_dim}"
    if model.get("num_kv_heads") and heads % model["num_kv_heads"]:
        yield f"model: num_kv_heads must divide num_attention_heads {heads}, got {model['num_kv_heads']}"
    if model["learn_sigma"] and kind.drops_variance != (objective["type"] == "transport"):
        others = {name: other for name, other in MODEL_TYPES.items() if other.family == kind.family}
        twins = [name for name, other in others.items() if other.drops_variance != kind.drops_variance]
        use = f"the model type {twins[0]}, or " if twins else ""
        what = f"a {model['type']} with learn_sigma can't be trained by the objective {objective['type']!r}"
        yield f"{what}; use {use}learn_sigma false"
    sprint, routing = model["sprint_blocks"], training["routing"]
    if sprint and sprint[1] > model["num_layers"]:
        yield f"model: sprint_blocks must be within the blocks 1..{model['num_layers']}, got {sprint}"
    if routing:
        yield from _routing_conflicts(model, objective["regularizers"], routing)
    if objective.get("cosine_loss") and objective["prediction"] not in options.VELOCITY_LOSS:
        known = " or ".join(options.VELOCITY_LOSS)
        yield f"objective: cosine_loss is for the prediction {known}, got {objective['prediction']!r}"
    if objective.get("use_kl") and objective["min_snr_gamma"] is not None:
        yield "objective: min_snr_gamma weights the squared error, which use_kl replaces; give one of them"
    yield from _regularizer_conflicts(model, objective["regularizers"])
    for label in data["classes"] or ():
        if label >= model["num_classes"]:
            classes = f"0..{model['num_classes'] - 1}"
            yield f"data: classes: label {label} is outside the config's num_classes: {classes}"
    if evaluation["steps"] is not None:
        if evaluation["reference"] is None and evaluation["metrics"] != ["inception_score"]:
            yield "evaluation: steps needs a reference, the path of an npz or of a folder of images"
        if evaluation["guidance_scale"] != 1 and model["class_dropout_prob"] == 0:
            what = "guidance needs a null class, a class_dropout_prob above 0"
            yield f"evaluation: guidance_scale must be 1, got {evaluation['guidance_scale']:g}: {what}"
    of_diffusion = objective["type"] == "diffusion"
    largest = objective["diffusion_steps"] - 1 if of_diffusion else 1
    for name in ("interval", "internal_interval"):
        interval = guidance[name]
        if interval is not None and interval[1] > largest:
            yield f"guidance: {name} must end at {largest} or before, got {interval}: times of the model"
        elif interval is not None and of_diffusion and not holds_timestep(interval):
            yield f"guidance: {name} must hold a timestep, from 0 to {largest}, got {interval}"
    if guidance["internal_scale"] != 1 and internal_guidance_block({"objective": objective}) is None:
        scale = guidance["internal_scale"]
        yield f"guidance: internal_scale {scale:g} needs the regularizer internal_guidance, an entry of the objective"
    if guidance["timestep_shift"] and of_diffusion:
        yield f"guidance: timestep_shift is for a transport, expected 0, got {guidance['timestep_shift']:g}"
    if guidance["channels"] not in ("auto", None) and guidance["channels"] > model["in_channels"]:
        yield f"guidance: channels must be in_channels {model['in_channels']} at most, got {guidance['channels']}"


def _regularizer_conflicts(model, regularizers):
    """Yields in words which regularizers don't fit the network or one another."""
    layers = model["num_layers"]
    for index, entry in enumerate(regularizers):
        where = f"objective: regularizers[{index}]"
        blocks = _blocks_of(entry, layers)
        for key, block in blocks.items():
            if not 1 <= block <= layers:
                yield f"{where}: {key} must be 1 to {layers}, or -1 to -{layers} from the end, got {entry[key]}"
        if "target_block" in blocks and blocks["block"] == blocks["target_block"]:
            yield f"{where}: block and target_block are the same block, {entry['block']}"
        if entry["type"] in [other["type"] for other in regularizers[:index]]:
            yield f"{where}: a regularizer of the type {entry['type']} stands there already"


def _blocks_of(entry, layers):
    """Returns the blocks of a regularizer's entry by their keys, all of them counted from 1 on."""
    blocks = {key: entry[key] for key in ("block", "target_block") if key in entry}
    return {key: block if block > 0 else layers + 1 + block for key, block in blocks.items()}


def group_size(config):
    """Returns the number of consecutive samples that all regularizers can be computed on; 1 without any."""
    return math.lcm(*(entry.get("group", 1) for entry in config["objective"]["regularizers"]))


def check_groups(config, micro_batch):
    """Raises `ValueError` if a micro-batch of a rank can't be cut into the groups of each regularizer."""
    for index, entry in enumerate(config["objective"]["regularizers"]):
        if micro_batch % entry.get("group", 1):
            raise ValueError(
                f"objective: regularizers[{index}]: {entry['type']} compares the samples of a group of "
                f"{entry['group']}; expected micro-batches that are a multiple of it, got {micro_batch} samples a rank"
            )


def _routing_conflicts(model, regularizers, routing):
    """Yields in words which settings of token routing don't fit the network or the regularizers."""
    where, layers, sprint, blocks = "training: routing:", model["num_layers"], model["sprint_blocks"], routing["blocks"]
    tokens = (model["sample_size"] // model["patch_size"]) ** 2
    if blocks is None and sprint is None:
        yield f"{where} blocks is missing; expected [first, last] of the blocks 1..{layers}"
        return
    if blocks and blocks[1] > layers:
        yield f"{where} blocks must be within the blocks 1..{layers}, got {blocks}"
    if blocks and sprint and blocks != sprint:
        yield f"{where} blocks must be the model's sprint_blocks {sprint}, or be left out, got {blocks}"
    if int(tokens * routing["share"]) == 0:
        yield f"{where} share must be at least one of {tokens} tokens, got {routing['share']:g}"
    if routing["path_drop_prob"] is not None and sprint is None:
        what = "path_drop_prob is for a model with sprint_blocks, expected null"
        yield f"{where} {what}, got {routing['path_drop_prob']:g}"
    first, last = blocks or sprint
    for index, entry in enumerate(regularizers):
        for key, block in _blocks_of(entry, layers).items():
            if first <= block < last:
                what = f"behind block {entry[key]} there are only the tokens that are routed through {first}..{last}"
                yield f"objective: regularizers[{index}]: {key} must not be within training: routing, {what}"


def check_together(config, source):
    """Raises `ValueError` for sections that are right one by one, but don't fit together."""
    for conflict in _conflicts(**{name: config[name] for name in SECTIONS if name != "features"}):
        raise ValueError(f"{source}: {conflict}")


def resolve_config(raw, *, source="config"):
    """Checks a raw config and returns it with all sections and keys, those that it lacks by default.

    Args:
        raw: what the JSON holds: an object with sections, or a flat one of model keys alone (PaddleMIX's files),
            whose type is that with which the name of the file begins, or DiT.
        source: the file, or another name for errors.

    Raises ValueError for an unknown key, a wrong type or an impossible value; names source, section and key.
    """
    _check_object(raw, source)
    if not set(raw) & set(SECTIONS):
        file_name = os.path.basename(source)
        kinds = [kind for kind in MODEL_TYPES if re.match(rf"{kind}(?![A-Za-z])", file_name, re.IGNORECASE)]
        (kind,) = kinds or ["DiT"]
        # PaddleMIX's LargeDiT class has qk_norm on unless its files say otherwise, the official one off.
        paddlemix = MODEL_TYPES[kind].family == "LargeDiT" and "attention_head_dim" in raw
        raw = {"model": {"type": kind, **({"qk_norm": True} if paddlemix else {}), **raw}}
    for name in raw:
        if name not in SECTIONS:
            raise ValueError(f"{source}: unknown section {name!r}; known: {', '.join(SECTIONS)}")
    if "model" not in raw:
        raise ValueError(f"{source}: the section 'model' is missing")
    types, where = {name: kind.keys for name, kind in MODEL_TYPES.items()}, f"{source}: model"
    model = _check_typed(types, _official_names(raw["model"], where), "DiT", where, "model")
    check_sizes(model, where)
    default_type, where = MODEL_TYPES[model["type"]].objective, f"{source}: objective"
    given = raw.get("objective", {})
    if isinstance(given, dict) and given.get("auxiliary") == []:  # of checkpoints written before there was any
        given = {key: value for key, value in given.items() if key != "auxiliary"}
    objective = _check_typed(options.OBJECTIVE_KEYS, given, default_type, where, "objective")
    objective["regularizers"] = [
        _check_typed(options.REGULARIZER_KEYS, entry, None, f"{where}: regularizers[{index}]", "regularizer")
        for index, entry in enumerate(objective["regularizers"])
    ]
    config = {
        "model": model,
        "objective": objective,
        "training": check_section(options.TRAINING_KEYS, raw.get("training", {}), f"{source}: training"),
        "data": check_section(options.DATA_KEYS, raw.get("data", {}), f"{source}: data"),
        "features": resolve_features(raw.get("features", {}), f"{source}: features"),
        "evaluation": check_section(options.EVALUATION_KEYS, raw.get("evaluation", {}), f"{source}: evaluation"),
        "guidance": check_section(options.GUIDANCE_KEYS, raw.get("guidance", {}), f"{source}: guidance"),
    }
    if config["training"]["routing"] is not None:
        where = f"{source}: training: routing"
        config["training"]["routing"] = check_section(options.ROUTING_KEYS, config["training"]["routing"], where)
    check_together(config, source)
    return config


_PARTS_OF_FEATURES = {
    "vae": options.VAE_KEYS,
    "latent_normalization": options.NORMALIZATION_KEYS,
    "encoder": options.ENCODER_KEYS,
}


def resolve_features(given, where):
    """Returns a `features` section with every key, null where nothing is given; raises as `resolve_config` does."""
    features = check_section(options.FEATURES_KEYS, given, where)
    for name, keys in _PARTS_OF_FEATURES.items():
        if features[name] is not None:
            features[name] = check_section(keys, features[name], f"{where}: {name}")
    return features


def exported_features(given, where):
    """Returns the `features` section that a JSON of an exported model carries; keys of later versions are left out."""
    given = given if isinstance(given, dict) else {}
    known = {name: given.get(name) for name in options.FEATURES_KEYS}
    for part, keys in _PARTS_OF_FEATURES.items():
        if isinstance(known[part], dict):
            known[part] = {name: known[part][name] for name in keys if name in known[part]}
    return resolve_features(known, where)


def manifest_features(manifest, where):
    """Returns the `features` section of a set's manifest, without the class names, which stand in another file."""
    vae = manifest.get("vae") if isinstance(manifest.get("vae"), dict) else {}
    known = {name: manifest.get(name) if name in SCALING_KEYS else vae.get(name) for name in options.VAE_KEYS}
    if all(value is None for value in known.values()):
        known = None
    given = {name: manifest.get(name) for name in ("image_size", "channel_mean", "channel_std")}
    encoder = manifest.get("encoder")
    encoder = {name: encoder.get(name) for name in options.ENCODER_KEYS} if isinstance(encoder, dict) else None
    return resolve_features({**given, "vae": known, "encoder": encoder}, where)


def load_config(path):
    """Reads, checks and completes a config file; see `resolve_config`."""
    if str(path).endswith((".yaml", ".yml")):
        raise ValueError(
            f"{path}: a config is JSON; for an official YAML take the preset of its model, see docs/models.md"
        )
    return resolve_config(read_json(path), source=str(path))


def internal_guidance_block(config):
    """Returns the block of internal guidance's second final layer, as configs count it; None where there is none."""
    entries = config["objective"].get("regularizers", ())
    return next((entry["block"] for entry in entries if entry["type"] == "internal_guidance"), None)


def own_config(path):
    """Reads the resolved config of the training checkpoint that `path` is, or is a file of; None if there is none."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    file = os.path.join(folder, "config.json")
    needed = [file] if folder == path else [file, os.path.join(folder, "model_state.pdparams")]
    if not all(map(os.path.isfile, needed)):
        return None
    raw = read_json(file)
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):  # a config.json of ppdiffusers', say
        return None
    return resolve_config(raw, source=file)


def differences(theirs, ours, *, ignored=()):
    """Lists the keys, but those `ignored`, in which two sections differ: "key A there, B here, ..."; empty for none."""
    keys = {*theirs, *ours} if theirs.get("type") == ours.get("type") else {*theirs} & {*ours}
    different = [key for key in sorted(keys - {*ignored}) if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in different)


def changed_settings(config):
    """Returns `{section: {key: value}}` of a resolved config: only what differs from the defaults, and the types."""
    tables = {
        "model": MODEL_TYPES[config["model"]["type"]].keys,
        "objective": options.OBJECTIVE_KEYS[config["objective"]["type"]],
        "training": options.TRAINING_KEYS,
        "data": options.DATA_KEYS,
        "features": options.FEATURES_KEYS,
        "evaluation": options.EVALUATION_KEYS,
        "guidance": options.GUIDANCE_KEYS,
    }
    changed = {
        section: {key: value for key, value in config[section].items() if key == "type" or value != keys[key].default}
        for section, keys in tables.items()
    }
    return {section: settings for section, settings in changed.items() if settings}


def sampling_differences(theirs, ours):
    """Lists the `differences` of two sections that change a trained network's images."""
    tables = options.OBJECTIVE_KEYS.values()
    ignored = {name for keys in tables for name, option in keys.items() if option.training_only}
    rates = theirs.get("class_dropout_prob"), ours.get("class_dropout_prob")
    if None not in rates and min(rates) > 0:
        ignored.add("class_dropout_prob")  # both have a null class
    return differences(theirs, ours, ignored=ignored)


def weights_config(path, config_file=None, sections=("model", "objective")):
    """Reads the config of weights: that of the checkpoint they lie in, else a config file; None without either.

    Raises ValueError if the two describe another network, with the keys of `sections` in which they do.
    """
    own = own_config(path)
    if config_file is None:
        return own
    config = load_config(config_file)
    for section in sections if own is not None else ():
        if listed := sampling_differences(own[section], config[section]):
            what = f"another run's {section}: {listed}"
            raise ValueError(f"{path}: holds {what}; these weights do not fit the config {config_file}")
    return own or config


def ineffective_settings(config):
    """Lists sentences on the settings of a resolved config that differ from the defaults and have no effect."""
    objective, training, data, notes = config["objective"], config["training"], config["data"], []
    prediction = objective.get("prediction")
    if prediction in options.VELOCITY_LOSS:  # as the official transport has it
        names = ["loss_weight", *(["train_eps", "sample_eps"] if objective["path_type"] != "VP" else [])]
        if given := [name for name in names if objective[name] is not None]:
            path = objective["path_type"]
            notes.append(f"{', '.join(given)} has no effect on {prediction} prediction with the path {path}")
    schedule = training["lr_scheduler_type"]
    of_profiles = ("ema_snapshot_steps", "ema_snapshot_dtype", "ema_update_steps", "ema_on_host")
    own = ("timestep_shift", "internal_scale", "internal_interval")
    guided = [name for name in options.GUIDANCE_KEYS if name not in own]
    cases = (
        (not training["use_ema"], training, ("ema_decay", "ema_warmup"), "without use_ema"),
        (not training["ema_profiles"], training, of_profiles, "without ema_profiles"),
        (schedule != "polynomial", training, ("lr_end", "power"), f"on the schedule {schedule}"),
        (schedule != "cosine", training, ("num_cycles",), f"on the schedule {schedule}"),
        (training["max_steps"] > 0, training, ("epochs",), "beside max_steps"),
        (prediction not in (None, "x1"), objective, ("t_eps",), f"on {prediction} prediction"),
        (objective.get("timestep_sampling") == "uniform", objective, ("logit_mean", "logit_std"), "on uniform times"),
        (not data["validation_samples"], data, ("validation_steps",), "without validation_samples"),
        (config["model"]["class_dropout_prob"] == 0, config["guidance"], guided, "without a null class"),
        (config["guidance"]["internal_scale"] == 1, config["guidance"], own[2:], "without an internal_scale"),
    )
    keys = {
        **options.OBJECTIVE_KEYS["transport"],
        **options.TRAINING_KEYS,
        **options.DATA_KEYS,
        **options.GUIDANCE_KEYS,
    }
    for is_so, section, names, why in cases:
        notes += no_effect([name for name in names if is_so and section[name] != keys[name].default], why)
    return notes
