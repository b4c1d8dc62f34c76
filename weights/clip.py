"""Reads the vision part of a CLIP: as paddlenlp or ppdiffusers save it, or with the official weights' names."""

import os
import re

import numpy as np

from models.state import check_finite, check_state
from runtime.untrusted import check_sizes, inside, read_json_object
from weights.files import load_weights
from weights.pretrained import refused_settings

CLIP_MODELS = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
CLIP_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
    *("hidden_act", "layer_norm_eps"),
)
CLIP_WEIGHTS = ("model_state.pdparams", "model.safetensors", "pytorch_model.bin")
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PADDLENLP_NAMES = (  # and ppdiffusers', which are the official ones
    ("class_embedding", "embeddings.class_embedding"),
    ("conv1", "embeddings.patch_embedding"),
    ("positional_embedding", "embeddings.position_embedding"),
    ("ln_pre", "pre_layrnorm"),
    ("ln_post", "post_layernorm"),
    (r"transformer\.layers\.(\d+)\.linear([12])", r"encoder.layers.\1.mlp.fc\2"),
    (r"transformer\.layers\.(\d+)\.norm([12])", r"encoder.layers.\1.layer_norm\2"),
    (r"transformer\.layers\.(\d+)\.self_attn", r"encoder.layers.\1.self_attn"),
)


def load_clip(folder):
    """Returns the vision part of the CLIP in a folder, a `CLIPVisionModel` of ppdiffusers, float32, in eval mode.

    Called on images, it returns its last hidden state (N, 1 + T, E) first, the class token in front. ValueError, one
    line that names the file, for what can't be read, or does not fit.
    """
    import paddle
    from ppdiffusers.transformers import CLIPVisionConfig, CLIPVisionModel

    config = inside(folder, "config.json")
    content = read_json_object(config)
    content = content["vision_config"] if isinstance(content.get("vision_config"), dict) else content
    settings = {key: content[key] for key in CLIP_KEYS if key in content}
    check_sizes(settings, config)
    try:
        model = CLIPVisionModel(CLIPVisionConfig(**settings))
    except Exception as error:  # whatever odd settings make a constructor say
        raise refused_settings(config, "CLIPVisionModel", error) from None
    path = next((path for name in CLIP_WEIGHTS if os.path.isfile(path := inside(folder, name))), None)
    if path is None:
        raise ValueError(f"{folder}: no weights there; expected one of {', '.join(CLIP_WEIGHTS)}")
    expected = model.state_dict()
    state = {_official_name(name): value for name, value in load_weights(path).items()}
    state = {name: value for name, value in state.items() if name in expected or name.startswith("vision_model.")}
    state.pop("vision_model.embeddings.position_ids", None)
    linear = {f"{name}.weight" for name, part in model.named_sublayers() if isinstance(part, paddle.nn.Linear)}
    wide = next(name for name in expected if name.endswith("mlp.fc1.weight"))
    if wide in state and tuple(state[wide].shape) == tuple(expected[wide].shape)[::-1] != tuple(expected[wide].shape):
        state = {name: value.T if name in linear else value for name, value in state.items()}  # PyTorch's layout
    check_state(state, {name: tuple(value.shape) for name, value in expected.items()}, source=path)
    check_finite(state, source=path)
    with paddle.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(paddle.to_tensor(np.ascontiguousarray(state[name])).astype(parameter.dtype), False)
    model.eval()
    return model


def _official_name(name):
    """Returns the name of a CLIP's parameter in ppdiffusers, for that of paddlenlp, or for itself."""
    for pattern, official in PADDLENLP_NAMES:
        name = re.sub(rf"^vision_model\.{pattern}(?=$|\.)", rf"vision_model.{official}", name)
    return name
