"""Encoders, whose features a network's tokens may be aligned with (REPA): Paddle Inference programs, and CLIP's models.

An encoder is a path:

- a program, as for `evaluation.networks.ProgramFeatures`: its one input is float32 images (N, 3, S, S), RGB; its first
  output the features of patches, (N, E, h, w), or (N, T, E) row by row of a square grid. In front of the patches there
  may be up to `MAX_EXTRA_TOKENS` others, of the class or registers, so that T is no square number: they are left out.
- a folder of CLIPVisionModel or CLIPVisionModelWithProjection, of paddlenlp or ppdiffusers (or of CLIP's official
  weights with Hugging Face's names): the patches of `last_hidden_state`.

A preprocessor_config.json beside either says `image_mean`, `image_std` and the size (`crop_size`, else `size`).
"""

import math
import os
import re

import numpy as np

from config.options import ABOVE_0, NUMBER
from features.autoencoder import weights_digest
from features.images import encodable
from models.state import check_finite, check_state
from runtime.files import sha256_of_file
from runtime.programs import PROGRAMS, Program, program_file, weights_of
from runtime.untrusted import check_sizes, inside, read_json_object, shortened
from weights.files import load_weights
from weights.pretrained import refused_settings

MAX_EXTRA_TOKENS = 8
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


def find_encoder(path):
    """Returns the file of a program, or the folder of a CLIP; imports no Paddle. ValueError if it is neither."""
    if found := program_file(path):
        return found
    config = os.path.join(path, "config.json")
    if not os.path.isfile(config):
        raise ValueError(
            f"--encoder {shortened(os.fspath(path), 500)}: expected a program of Paddle Inference, a folder with "
            f"{' or '.join(PROGRAMS)} or what paddle.jit.save was given, or the folder of a {CLIP_MODELS[0]}"
        )
    kinds = read_json_object(config).get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else None
    if kind not in CLIP_MODELS:
        others = "any other network is taken as a program of Paddle Inference"
        raise ValueError(f"{config}: holds a {shortened(kind)}, expected {', '.join(CLIP_MODELS)}; {others}")
    return os.fspath(path)


def read_preprocessor(folder):
    """Returns `(mean, std, size)` of a folder's preprocessor_config.json; None for what it, or the folder, lacks."""
    path = inside(folder, "preprocessor_config.json")
    if not os.path.isfile(path):
        return None, None, None
    content = read_json_object(path)
    mean, std = content.get("image_mean"), content.get("image_std")
    for key, value, check in (("image_mean", mean, NUMBER), ("image_std", std, ABOVE_0)):
        if not isinstance(value, list) or len(value) != 3 or not all(map(check.accepts, value)):
            raise ValueError(f"{path}: {key} is {shortened(value)}, expected three numbers")
    sizes = [content.get("crop_size"), content.get("size")]
    sizes = [size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size for size in sizes]
    return mean, std, next((size for size in sizes if isinstance(size, int) and size > 0), None)


class PatchEncoder:
    """The features of uint8 images on a token grid, by the encoder at a path, on Paddle's current device.

    Args:
        path: see the module. A program is run: only for files you trust.
        size: pixels of a side that it takes; None: what its preprocessor_config.json or config says, else `image_size`.
        image_size, token_grid: pixels and tokens of a side of the images, and of the network that is trained.
        precision: a `runtime.precision.Precision`.

    `settings` are those that decide the features, for a manifest; `notes` sentences for the user. ValueError, one line,
    for an encoder that can't be loaded or run, or gives no features on such a grid.
    """

    def __init__(self, path, *, size, image_size, token_grid, precision):
        found, self.notes = find_encoder(path), []
        folder = found if os.path.isdir(found) else os.path.dirname(found)
        mean, std, told = read_preprocessor(folder)
        self.path, self.grid, self._precision = os.fspath(path), token_grid, precision
        if os.path.isdir(found):
            self._network, own_size = _load_clip(found)
            if (size or own_size) != own_size:
                raise ValueError(f"--encoder_size {size}: {path} takes images of {own_size} pixels a side")
            told, digests = own_size, {"program_sha256": None, "weights_sha256": weights_digest(self._network)}
            if mean is None:
                self.notes.append(
                    f"no preprocessor_config.json in {folder}: mean and standard deviation are CLIP's own"
                )
                mean, std = CLIP_MEAN, CLIP_STD
        else:
            self._network = _load_program(found, precision)
            files = {"program_sha256": found, "weights_sha256": weights_of(found)}
            digests = {key: sha256_of_file(file).hex() for key, file in files.items()}
        self.size = size or told or image_size
        self._shift = None if mean is None else [np.array(value, "float32").reshape(3, 1, 1) for value in (mean, std)]
        blank = np.zeros((1, image_size, image_size, 3), "uint8")
        _, self.width, *own_grid = self._features(blank).shape
        if min(own_grid) < token_grid:
            shown = "{} x {}".format(*own_grid)
            raise ValueError(
                f"--encoder {path}: has {shown} patches of images of {self.size} pixels, fewer than --token_grid "
                f"{token_grid}; give a larger --encoder_size, if it takes one, or another encoder"
            )
        self.settings = {
            "name": encodable(self.path),
            "path": encodable(os.path.abspath(path)),
            **digests,
            "encoder_size": self.size,
            "image_mean": mean,
            "image_std": std,
            "token_grid": token_grid,
            "width": self.width,
            "dtype": "float16",
        }

    def __call__(self, pixels, indices=None, mirrored=False):
        """Starts the work and returns a tensor float16 (N, T, E), row by row of the token grid; takes no `indices`.

        `pixels` are uint8 (N, S, S, 3). They are resized bicubically, as REPA does it, without cutting to [0, 1], and
        the encoder's patches are averaged over each token.
        """
        import paddle

        features = self._features(np.ascontiguousarray(pixels[:, :, ::-1]) if mirrored else pixels)  # (N, E, h, w)
        if tuple(features.shape[2:]) != (self.grid, self.grid):
            features = paddle.nn.functional.adaptive_avg_pool2d(features, [self.grid, self.grid])
        return features.flatten(2).transpose([0, 2, 1]).astype("float16")

    def _features(self, pixels):
        """Returns the encoder's features (N, E, h, w), float32, of pixels (N, S, S, 3)."""
        import paddle

        images = paddle.to_tensor(pixels).astype("float32").transpose([0, 3, 1, 2]) / 255  # (N, 3, S, S)
        if images.shape[-1] != self.size:
            images = paddle.nn.functional.interpolate(images, [self.size, self.size], mode="bicubic")
        if self._shift is not None:
            mean, std = map(paddle.to_tensor, self._shift)
            images = (images - mean) / std
        try:
            with paddle.no_grad(), self._precision.autocast():
                features = self._network(images)
        except MemoryError:
            raise ValueError(f"--encoder_batch {len(pixels)}: too large for the device's memory") from None
        return _as_grid(features.astype("float32"), len(pixels), self.path)


def _as_grid(features, count, path):
    """Returns an encoder's output of `count` images as (N, E, h, w); ValueError for one of another shape."""
    shape = features.shape
    if len(shape) == 4 and shape[0] == count:
        return features
    side = math.isqrt(shape[1]) if len(shape) == 3 and shape[0] == count else 0
    extra = shape[1] - side * side if side else 0
    if not side or extra > MAX_EXTRA_TOKENS:
        raise ValueError(
            f"--encoder {path}: gives {list(shape)} for {count} image(s), expected [N, E, h, w], or [N, T, E] with T a "
            f"square number and up to {MAX_EXTRA_TOKENS} tokens in front of the patches"
        )
    return features[:, extra:].transpose([0, 2, 1]).reshape([count, shape[2], side, side])


def _load_program(path, precision):
    """Returns the first output of a program as a function of images."""
    import paddle

    # Without oneDNN: it doesn't know every operator, and this may be any network.
    options = {"by_onednn": False, "failing": "cannot run it on images of this --encoder_size"}
    program = Program(path, paddle.get_device(), precision.dtype, **options)
    if program.num_inputs != 1:
        raise ValueError(f"{path}: has {program.num_inputs} inputs, expected images alone")
    return lambda images: program(images)[0]


def _load_clip(folder):
    """Returns the vision part of a CLIP, as a function of images, in float32, and the size that it takes."""
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
    return _ClipPatches(model), model.config.image_size


class _ClipPatches:
    """The patches of a CLIP's last hidden state (N, 1 + T, E), as a function of images."""

    def __init__(self, model):
        self.state_dict = model.state_dict
        self._model = model

    def __call__(self, images):
        return self._model(images)[0][:, 1:]


def _official_name(name):
    """Returns the name of a CLIP's parameter in ppdiffusers, for that of paddlenlp, or for itself."""
    for pattern, official in PADDLENLP_NAMES:
        name = re.sub(rf"^vision_model\.{pattern}(?=$|\.)", rf"vision_model.{official}", name)
    return name
