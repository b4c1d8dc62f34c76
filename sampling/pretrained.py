"""Pipelines and autoencoders from folders and from the hub. Nothing that they hold is run, no name in them imported.

ppdiffusers' own `from_pretrained` unpickles `.pdparams` and `.bin` files freely, imports the packages that
model_index.json names, and runs `.py` files that lie in the folder. Here it only downloads files and makes the classes
of the tables below; weights go through `models.weights`. A folder's own code is never run, not even that which
`sampling.export_large_dit` puts there: this project has it already.
"""

import os

import numpy as np

from models.weights import check_finite, check_state, load_weights
from sampling.folder import check_sizes
from sampling.step_counts import FIT_KEY, is_timestep_fit
from untrusted import inside, printable, read_json

# Of a model's weights, in the order of preference, and how each stores Linear weights. ppdiffusers' own names first.
WEIGHTS = {
    "diffusion_paddle_model.safetensors": "paddle",
    "model_state.pdparams": "paddle",
    "diffusion_pytorch_model.safetensors": "torch",
    "diffusion_pytorch_model.bin": "torch",
}
VARIANTS = ("", ".fp16", ".fp32")
MAX_SHARDS = 1000
# What model_index.json and the transformer's config.json may name: of a DiT, the second is diffusers' name for the same
# settings and weights; of a Large-DiT.
DIT_TRANSFORMERS = ("Transformer2DModel", "DiTTransformer2DModel")
LARGE_DIT_TRANSFORMERS = ("DiTLLaMA2DModel", "LargeDiTTransformer")
TRANSFORMERS = (*DIT_TRANSFORMERS, *LARGE_DIT_TRANSFORMERS)
SCHEDULERS = (
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler"),
    *("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler"),
    *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "IPNDMScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
)


def find_file(name_or_path, name, subfolder="", *, needed=True):
    """The path of a file in a folder, or of a name on the hub, downloaded if need be.

    Args:
        needed: without it, None where there is surely no such file.

    Raises:
        ValueError: one line: not in the folder, or a link leads out of it. The hub clients raise a dozen other types.
    """
    if os.path.isdir(name_or_path):
        path = inside(name_or_path, os.path.join(subfolder, name))
        if os.path.exists(path):
            return path
        if needed:
            raise ValueError(f"{path}: no such file")
        return None
    from ppdiffusers.utils import DIFFUSERS_CACHE, FROM_AISTUDIO, FROM_HF_HUB, PPDIFFUSERS_CACHE
    from ppdiffusers.utils.download_utils import bos_aistudio_hf_download

    cache = None if FROM_AISTUDIO else DIFFUSERS_CACHE if FROM_HF_HUB else PPDIFFUSERS_CACHE
    try:
        return bos_aistudio_hf_download(
            str(name_or_path),
            name,
            subfolder=subfolder,
            cache_dir=cache,
            from_hf_hub=FROM_HF_HUB,
            from_aistudio=FROM_AISTUDIO,
        )
    except Exception as error:
        if needed or not _is_absent(error):
            raise
        return None


def _is_absent(error):
    """Whether a hub says that it has no such file. A lost connection must not make us take another one instead."""
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    while error is not None:  # ppdiffusers makes an OSError of it
        if isinstance(error, EntryNotFoundError):
            return not isinstance(error, LocalEntryNotFoundError)  # the network is not there
        error = error.__context__
    return False


def read_settings(name_or_path, name, subfolder="", class_names=None):
    """A JSON file of settings: `(keywords, path)`, without the keys that begin with `_`.

    Raises:
        ValueError: one line: broken, sizes that no network has, or not the settings of one of `class_names`.
    """
    path = find_file(name_or_path, name, subfolder)
    settings = read_json(path, infinity=True)  # ppdiffusers' schedulers have it
    kind = settings.get("_class_name") if isinstance(settings, dict) else None
    if class_names is not None and kind not in class_names:
        raise ValueError(f"{path}: holds a '{printable(kind)}', expected {' or '.join(class_names)}")
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object")
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    check_sizes(settings, path)
    return settings, path


def find_weights(name_or_path, subfolder=""):
    """The files of a model's weights and their layout, "paddle" or "torch": one file, or those that an index names.

    Where ppdiffusers' hub can't be reached, those that an earlier download has left.
    """
    try:
        return _find_weights(name_or_path, subfolder)
    except Exception:
        from ppdiffusers.utils import PPDIFFUSERS_CACHE

        earlier = os.path.join(PPDIFFUSERS_CACHE, name_or_path)
        if os.path.isdir(name_or_path) or not os.path.isdir(earlier):
            raise
        print(f"note: {name_or_path} can't be looked up on the hub; taken from {earlier}")
        return _find_weights(earlier, subfolder)


def _find_weights(name_or_path, subfolder):
    for variant in VARIANTS:
        for name, layout in WEIGHTS.items():
            stem, ending = os.path.splitext(name)
            path = find_file(name_or_path, f"{stem}{variant}{ending}", subfolder, needed=False)
            if path is not None:
                return [path], layout
            index = find_file(name_or_path, f"{name}.index{variant}.json", subfolder, needed=False)
            if index is not None:
                return [find_file(name_or_path, shard, subfolder) for shard in _shards(index)], layout
    where = os.path.join(name_or_path, subfolder)
    raise ValueError(f"{where}: no weights there; expected one of {', '.join(WEIGHTS)}")


def _shards(path):
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f'{path}: expected {{"weight_map": {{weight: file}}}}')
    shards = sorted(set(names.values()))
    if not 0 < len(shards) <= MAX_SHARDS or any(
        os.path.basename(name) != name or not name.isprintable() for name in shards
    ):
        raise ValueError(f"{path}: its weight_map names files that are not beside it, or too many")
    return shards


def load_model(model_class, name_or_path, subfolder="", *, class_names=None, dtype=None):
    """A ppdiffusers model with its weights, in eval mode.

    Args:
        model_class: of `ppdiffusers.ModelMixin`. class_names: what its config.json may name [that class].
        name_or_path: folder, or name on the hub.
        dtype: of the weights; None for float32.

    Raises:
        ValueError: one line that names the file: another class, weights that don't fit or are not finite, or what
            `load_weights` refuses. The hub clients raise a dozen other types.
    """
    import paddle

    settings, config = read_settings(name_or_path, "config.json", subfolder, class_names or (model_class.__name__,))
    files, layout = find_weights(name_or_path, subfolder)
    state = {}
    for path in files:
        state.update(load_weights(path))
    source = files[0] if len(files) == 1 else f"{files[0]} and its {len(files) - 1} other shards"
    try:
        with paddle.LazyGuard():  # no memory before the shapes are known to fit, and no initial weights
            model = model_class.from_config(settings)
    except Exception as error:  # whatever odd settings make a constructor say
        raise ValueError(f"{config}: {model_class.__name__} refuses these settings: {_reason(error)}") from None
    model._update_deprecated_state_dict(state)
    model._convert_deprecated_attention_blocks(state)
    if layout == "torch":
        linear = {f"{name}.weight" for name, part in model.named_sublayers() if isinstance(part, paddle.nn.Linear)}
        state = {name: value.T if name in linear and value.ndim == 2 else value for name, value in state.items()}
    expected = model.state_dict(use_hook=False)
    extra = [name for name in state if name not in expected]
    if extra:
        print(f"note: {source}: {len(extra)} tensors that the model lacks are left out, such as {printable(extra[0])}")
    state = {name: value for name, value in state.items() if name in expected}
    check_state(state, {name: tuple(value.shape) for name, value in expected.items()}, source=source)
    tables = [name for name in state if name.endswith("embedding_table.weight")]
    check_finite({**state, **{name: without_null_rows(state[name]) for name in tables}}, source=source)
    with paddle.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(paddle.to_tensor(state.pop(name)).astype(parameter.dtype), False)
    if dtype is not None:
        model.to(dtype=dtype)
    model.eval()
    return model


def without_null_rows(value):
    """Returns a matrix without the rows of NaN at its end, and every other array as it is.

    The exporter gives such rows to a label table where there is no null class.
    """
    rows = len(value) if value.ndim == 2 else 0
    while rows and np.isnan(value[rows - 1]).all():
        rows -= 1
    return value[:rows] if rows else value


def load_scheduler(kind, name_or_path, subfolder="scheduler"):
    """The ppdiffusers scheduler of that class name, with the settings of its scheduler_config.json."""
    import ppdiffusers

    settings, path = read_settings(name_or_path, "scheduler_config.json", subfolder)
    try:
        return getattr(ppdiffusers, kind).from_config(settings)
    except Exception as error:  # as above
        raise ValueError(f"{path}: {kind} refuses these settings: {_reason(error)}") from None


def _reason(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def is_id2label(value):
    """Whether a value out of a JSON file is `{"0": label, ...}`."""
    return isinstance(value, dict) and all(
        key.isascii() and key.isdigit() and len(key) < 7 and isinstance(label, str) for key, label in value.items()
    )


def load_dit_pipeline(name_or_path, dtype=None):
    """The `ppdiffusers.DiTPipeline` of a folder or of a name on the hub.

    The transformer of a Large-DiT is our own class, whatever the folder names: ppdiffusers' gives other numbers (see
    `sampling.export_large_dit`).

    Args:
        dtype: of network and VAE; None for float32.

    Raises:
        ValueError: one line: a component that is none of the classes above, or what `load_model` refuses. The hub
            clients raise a dozen other types.
    """
    from ppdiffusers import AutoencoderKL, DiTPipeline, Transformer2DModel

    from sampling.large_dit_transformer import LargeDiTTransformer

    index_path = find_file(name_or_path, "model_index.json")
    index = read_json(index_path)
    kinds = {}
    if not isinstance(index, dict):
        raise ValueError(f"{index_path}: expected a JSON object")
    for name, known in (("transformer", TRANSFORMERS), ("scheduler", SCHEDULERS), ("vae", ("AutoencoderKL",))):
        given = index.get(name)
        kinds[name] = given[1] if isinstance(given, list) and len(given) == 2 else None
        if kinds[name] not in known:
            raise ValueError(f"{index_path}: {name} is {printable(given)}, expected a {' or '.join(known)}")
    labels = index.get("id2label") or {}
    if not is_id2label(labels):
        raise ValueError(f'{index_path}: id2label: expected {{"0": "name", ...}}')

    large = kinds["transformer"] in LARGE_DIT_TRANSFORMERS
    transformer = load_model(
        LargeDiTTransformer if large else Transformer2DModel,
        name_or_path,
        "transformer",
        class_names=LARGE_DIT_TRANSFORMERS if large else DIT_TRANSFORMERS,
        dtype=dtype,
    )
    vae = load_model(AutoencoderKL, name_or_path, "vae", dtype=dtype)
    # A DiTPipeline decodes latents / scaling_factor, whatever else a VAE's config says: what the folder was made for.
    vae.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)
    return DiTPipeline(transformer, vae, load_scheduler(kinds["scheduler"], name_or_path), labels or None)


def read_timestep_fit(name_or_path):
    """Reads in which numbers of steps a DiTPipeline's timestep embedding is exact, see `sampling.step_counts`."""
    path = find_file(name_or_path, "config.json", "transformer")
    settings = read_json(path, infinity=True)
    fit = settings.get(FIT_KEY) if isinstance(settings, dict) else None
    if not is_timestep_fit(fit):
        raise ValueError(f'{path}: {FIT_KEY}: expected {{"ddim": numbers of steps, "dpm": numbers of steps}}')
    return fit


def has_null_class(transformer):
    """Whether a DiTPipeline's transformer can be guided: the exporter fills the row of a null class that is not there
    with NaN.
    """
    if hasattr(transformer, "y_embedder"):  # a Large-DiT
        embedder = transformer.y_embedder
    else:
        embedder = transformer.transformer_blocks[0].norm1.emb.class_embedder
    return bool(embedder.embedding_table.weight[-1].isfinite().all())
