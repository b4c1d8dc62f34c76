"""Reads weights and settings of pipelines and autoencoders, from folders and from the hub, and executes nothing.

Of ppdiffusers it takes the downloads alone: `from_pretrained` executes what it finds in pickles and `.py` files.
"""

import contextlib
import os

import numpy as np

from models.state import check_finite, check_state
from runtime.precision import cast_layer
from runtime.process import one_line
from runtime.untrusted import check_sizes, inside, read_json_object, shortened
from weights.files import load_weights

# Files of a model's weights, in the order of preference, and how each stores Linear weights. ppdiffusers' own first.
WEIGHTS = {
    "diffusion_paddle_model.safetensors": "paddle",
    "model_state.pdparams": "paddle",
    "diffusion_pytorch_model.safetensors": "torch",
    "diffusion_pytorch_model.bin": "torch",
}
VARIANTS = ("", ".fp16", ".fp32")
MAX_SHARDS = 1000


def find_file(name_or_path, name, subfolder="", *, needed=True):
    """Returns the path of a file in a folder, or of a name on the hub, downloaded if need be.

    Raises ValueError for a file that is not in the folder (None instead, unless it is `needed`), or a link that leads
    out of it. The hub clients raise a dozen other types.
    """
    if os.path.isdir(name_or_path):
        path = inside(name_or_path, os.path.join(subfolder, name))
        if needed and not os.path.exists(path):
            raise ValueError(f"{path}: no such file")
        return path if os.path.exists(path) else None
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    from ppdiffusers.utils import DIFFUSERS_CACHE, FROM_AISTUDIO, FROM_HF_HUB, PPDIFFUSERS_CACHE
    from ppdiffusers.utils.download_utils import bos_aistudio_hf_download

    cache = None if FROM_AISTUDIO else DIFFUSERS_CACHE if FROM_HF_HUB else PPDIFFUSERS_CACHE
    try:
        hub = {"from_hf_hub": FROM_HF_HUB, "from_aistudio": FROM_AISTUDIO, "cache_dir": cache}
        return bos_aistudio_hf_download(str(name_or_path), name, subfolder=subfolder, **hub)
    except Exception as error:
        while error is not None and not isinstance(error, EntryNotFoundError):  # ppdiffusers makes an OSError of it
            error = error.__context__
        # A lost connection, which is also a LocalEntryNotFoundError, must not make us take another file.
        if needed or error is None or isinstance(error, LocalEntryNotFoundError):
            raise
        return None


@contextlib.contextmanager
def explained(name_or_path, advice):
    """Turns an error in loading a folder or a name on the hub into a `ValueError` of one line.

    `advice` says what to do without a network.
    """
    try:
        yield
    except Exception as error:  # the hub clients raise a dozen unrelated types
        is_folder = os.path.isdir(name_or_path)
        if is_folder and isinstance(error, ValueError):
            raise
        reason = str(error).strip().split("\n")[0].split(". ")[0][:200]
        what = f"cannot be loaded ({reason})"
        if not is_folder:
            what = f"there is no such folder, and it cannot be downloaded ({reason}). Without a network, {advice}"
        raise ValueError(f"{name_or_path}: {what}") from None


def read_settings(name_or_path, name, subfolder="", class_names=None):
    """Reads a JSON file of settings: returns `(keywords, path)`, without the keys that begin with `_`.

    Raises ValueError for sizes that no network has, and for settings of none of `class_names`.
    """
    path = find_file(name_or_path, name, subfolder)
    settings = read_json_object(path, infinity=True)  # ppdiffusers' schedulers have it
    if class_names is not None and (kind := settings.get("_class_name")) not in class_names:
        raise ValueError(f"{path}: holds a '{shortened(kind)}', expected {' or '.join(map(repr, class_names))}")
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    check_sizes(settings, path)
    return settings, path


def find_weights(name_or_path, subfolder=""):
    """Returns the files of a model's weights, one or those that an index names, and their layout, "paddle" or "torch".

    Where ppdiffusers' hub can't be reached, they are those that an earlier download has left.
    """
    try:
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
    except Exception:
        from ppdiffusers.utils import PPDIFFUSERS_CACHE

        earlier = os.path.join(PPDIFFUSERS_CACHE, name_or_path)
        if os.path.isdir(name_or_path) or not os.path.isdir(earlier):
            raise
        print(f"note: {name_or_path} can't be looked up on the hub; taken from {earlier}")
        return find_weights(earlier, subfolder)


def _shards(path):
    names = read_json_object(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f'{path}: expected {{"weight_map": {{weight: file}}}}')
    shards = sorted(set(names.values()))
    beside = all(os.path.basename(name) == name and name.isprintable() for name in shards)
    if not beside or not 0 < len(shards) <= MAX_SHARDS:
        raise ValueError(f"{path}: its weight_map names files that are not beside it, or too many")
    return shards


def load_model(model_class, name_or_path, subfolder="", *, class_names=None, dtype=None):
    """Returns a model of a subclass of `ppdiffusers.ModelMixin` with its weights, of `dtype` or float32, in eval mode.

    Raises ValueError, one line that names the file: a class that is not of `class_names` (by default the model's),
    weights that don't fit or are not finite, or what `find_file` and `load_weights` refuse.
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
        raise refused_settings(config, model_class.__name__, error) from None
    model._update_deprecated_state_dict(state)
    model._convert_deprecated_attention_blocks(state)
    if layout == "torch":
        linear = {f"{name}.weight" for name, part in model.named_sublayers() if isinstance(part, paddle.nn.Linear)}
        state = {name: value.T if name in linear and value.ndim == 2 else value for name, value in state.items()}
    expected = model.state_dict(use_hook=False)
    extra = [name for name in state if name not in expected]
    if extra:
        print(f"note: {source}: {len(extra)} tensors that the model lacks are left out, such as {shortened(extra[0])}")
    state = {name: value for name, value in state.items() if name in expected}
    check_state(state, {name: tuple(value.shape) for name, value in expected.items()}, source=source)
    tables = [name for name in state if name.endswith("embedding_table.weight")]
    check_finite({**state, **{name: without_null_rows(state[name]) for name in tables}}, source=source)
    with paddle.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(paddle.to_tensor(state.pop(name)).astype(parameter.dtype), False)
    if dtype is not None:
        cast_layer(model, dtype)
    model.eval()
    return model


def refused_settings(path, class_name, error):
    """Returns the `ValueError` for settings of a file that a constructor has answered with an error."""
    reason = shortened(f"{type(error).__name__}: {one_line(error)}", 200)
    return ValueError(f"{path}: {class_name} refuses these settings: {reason}")


def without_null_rows(value):
    """Returns an array, a matrix without rows of NaN at its end: the exporter's, where there is no null class."""
    rows = len(value) if value.ndim == 2 else 0
    while rows and np.isnan(value[rows - 1]).all():
        rows -= 1
    return value[:rows] if rows else value
