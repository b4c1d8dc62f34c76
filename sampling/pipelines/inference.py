"""Generators as static programs for Paddle Inference: a folder of programs, its export, and loading it.

The folder holds `transformer/` (latents, timesteps and labels to the network's output) and `vae/` (latents to images),
each a program and its weights, `scheduler/` (settings of a ppdiffusers scheduler, or of a `TransportScheduler`) and
`inference.json`, which says the rest. The batch size is free, all else is fixed. Weights are float32; half precision is
chosen when it is loaded.

A program is code: a folder from somebody else can do on this machine whatever Paddle's operators can, write files for
one. The JSON files and the sizes of the others are checked so that a broken folder is one line, not to make a hostile
one safe.
"""

import os
from types import SimpleNamespace

import paddle
from paddle import nn

from config.checks import INT
from config.options import ABOVE_0, LARGE_DIT_KEYS, POSITIVE_INT
from config.schema import MODEL_TYPES, SCALING_KEYS, exported_features
from features.autoencoder import LatentScaling
from models import LargeDiT
from models.attention import separate_projections
from models.state import check_finite
from runtime.files import sha256_of_file, whole_folder, write_json
from runtime.machine import cpu_has_bfloat16, read_processor
from runtime.paddle_private import cpu_runs_bfloat16
from runtime.programs import PROGRAMS, WEIGHTS, Program, save_program
from runtime.untrusted import MAX_SIZE, inside, read_json_object, shortened
from sampling.generator import Generator
from sampling.pipelines.folder import (
    INFERENCE_MANIFEST,
    TRANSPORT_SCHEDULER,
    check_free,
    complete_features,
    known_features,
)
from sampling.pipelines.pretrained import SCHEDULERS, is_id2label, load_scheduler
from sampling.schedulers import PipelineSampler
from sampling.step_counts import is_timestep_fit
from weights.pretrained import without_null_rows

MANIFEST, FORMAT = INFERENCE_MANIFEST, 1
NETWORK_KEYS = ("in_channels", "sample_size", "num_classes", "null_class")
PARTS = ("transformer", "vae")


class StockTransformer(nn.Layer):
    """A `ppdiffusers.Transformer2DModel` with tensors as the only arguments and result."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    @paddle.jit.not_to_static  # Paddle's rewriting of that class's source does not come to an end
    def forward(self, x, t, y):
        return self.transformer(x, timestep=t, class_labels=y).sample


class Decoder(nn.Layer):
    """An `AutoencoderKL`'s way from latents, as it encodes them itself, to images in [-1, 1]."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    @paddle.jit.not_to_static
    def forward(self, latents):
        return self.vae.decode(latents).sample


def own_large_dit(transformer):
    """Returns a pipeline's Large-DiT as this project's own network, which can be traced: it has no complex numbers."""
    settings = {**transformer.config, "num_kv_heads": transformer.config.n_kv_heads}
    network = LargeDiT(**{name: settings[name] for name in LARGE_DIT_KEYS if name in settings})
    network.set_state_dict(transformer.state_dict())
    network.eval()
    return network


def export_inference(generator, output_dir):
    """Writes a `Generator` of `load_exportable` as a new folder for `load_inference`: complete, or not there."""
    check_free(output_dir)
    is_transport = generator.kind == "transport"
    scheduler = generator.objective if is_transport else generator.objective.scheduler
    latents = ("x", [generator.in_channels, generator.sample_size, generator.sample_size], "float32")
    parts = {
        "transformer": (generator.network, [latents, ("t", [], "float32"), ("y", [], "int64")]),
        "vae": (Decoder(generator.vae), [latents]),
    }

    with whole_folder(output_dir) as folder:
        for part, (layer, inputs) in parts.items():
            os.makedirs(os.path.join(folder, part))
            for index, table in enumerate(getattr(layer, "rotary", ())):  # RoPE's constants: saved if buffers
                layer.register_buffer(f"rotary_{index}", table, persistable=False)
            with separate_projections(layer):
                save_program(layer, inputs, os.path.join(folder, part, "model"))
        scheduler.save_pretrained(os.path.join(folder, "scheduler"))
        files = [os.path.join(part, name) for part in parts for name in sorted(os.listdir(os.path.join(folder, part)))]
        manifest = {
            "format": FORMAT,
            "paddle_version": paddle.__version__,
            **{name: getattr(generator, name) for name in NETWORK_KEYS},
            **LatentScaling.of(generator.vae.config).as_dict(),
            "scheduler": type(scheduler).__name__,
            "bytes": {name: os.path.getsize(os.path.join(folder, name)) for name in files},
            "sha256": {name: sha256_of_file(os.path.join(folder, name)).hex() for name in files if is_program(name)},
            "id2label": {str(key): label for key, label in generator.labels.items()},
            "timestep_fit": None if is_transport else generator.objective.timestep_fit,
        }
        if is_transport:
            manifest["model_type"] = type(generator.network).__name__
            manifest["guided_channels"] = generator.guided_channels
        features = generator.features
        if features and generator.vae_name is not None:  # else the model brought its own along
            features = complete_features(features, generator.vae, generator.vae_name, generator.sample_size)
        manifest["features"] = known_features(features)
        write_json(os.path.join(folder, MANIFEST), manifest)


def notes_on_dtype(device, dtype):
    """Returns a line for a CPU that multiplies float32 faster than bfloat16: Golden Cove (avx512_fp16) without AMX.

    Its VDPBF16PS does half as many multiplications a second as its FMA. Hypervisors often hide AMX.
    """
    flags = read_processor()[1]
    if device == "cpu" and dtype == "bfloat16" and {"avx512_bf16", "avx512_fp16"} <= flags and "amx_bf16" not in flags:
        return ["bfloat16: this CPU shows no AMX; without it float32 is faster"]
    return []


def check_dtype(device, dtype):
    """Raises ValueError for a type that Paddle Inference does not compute in on that device."""
    if device == "cpu" and dtype == "float16":
        raise ValueError("dtype float16: Paddle Inference has it on a GPU only; use float32 or bfloat16")
    if device == "cpu" and dtype == "bfloat16" and not cpu_has_bfloat16():
        raise ValueError("dtype bfloat16: this CPU does not have it (avx512_bf16 or AMX); use float32")
    if device == "cpu" and dtype == "bfloat16" and not cpu_runs_bfloat16():
        raise ValueError(f"dtype bfloat16: Paddle {paddle.__version__} fails to run it on a CPU; use float32")


def _load_part(folder, part, manifest, device, dtype):
    """Returns a program of `PARTS` as a function of float32 tensors."""
    program = next(name for name in _programs(part) if name in manifest["bytes"])
    by_onednn = part != "vae"  # Paddle 3.3 can't run nearest-neighbour upsampling by oneDNN
    failing = f"cannot run it with the sizes of {MANIFEST}"
    run = Program(os.path.join(folder, program), device, dtype, by_onednn=by_onednn, failing=failing)
    return lambda *inputs: run(*inputs)[0]


def load_inference(folder, *, device="cpu", dtype="float32"):
    """Returns the `Generator` of a folder of `export_inference`. Its programs are run: only for folders you trust.

    Args:
        device: "cpu", "gpu" or "gpu:N".
        dtype: of the network: float32, bfloat16 (on a CPU: one that has it), float16 (GPU). The VAE is in float32.
    """
    check_dtype(device, dtype)
    manifest = _read_manifest(folder)
    if manifest["scheduler"] == TRANSPORT_SCHEDULER:
        from sampling.sit_pipeline import TransportScheduler

        objective = TransportScheduler.from_folder(folder)
    else:
        objective = PipelineSampler(load_scheduler(manifest["scheduler"], folder), manifest.get("timestep_fit"))

    network = _load_part(folder, "transformer", manifest, device, dtype)
    vae = _load_part(folder, "vae", manifest, device, "float32")
    scaling = {key: manifest.get(key) for key in SCALING_KEYS}
    return Generator(
        lambda x, t, y: network(x, t.astype("float32"), y),
        objective,
        **{key: manifest[key] for key in NETWORK_KEYS},
        # What a `LatentDecoder` asks of an AutoencoderKL.
        vae=SimpleNamespace(
            config=SimpleNamespace(**scaling, latent_channels=manifest["in_channels"]),
            dtype=paddle.float32,
            decode=lambda latents: SimpleNamespace(sample=vae(latents)),
        ),
        labels={int(key): label for key, label in manifest["id2label"].items()},
        guided_channels=manifest.get("guided_channels"),
        path=folder,
        notes=notes_on_dtype(device, dtype),
        features=exported_features(manifest.get("features"), f"{os.path.join(folder, MANIFEST)}: features"),
        check_weights=lambda: _check_weights(folder),
        digests=lambda: [sha256_of_file(os.path.join(folder, part, WEIGHTS)).hex() for part in PARTS],
    )


def _check_weights(folder):
    """Raises ValueError, naming file and tensor, if there are weights in a folder of programs that are not finite."""
    for part in PARTS:
        tensors = paddle.jit.load(os.path.join(folder, part, "model")).state_dict().values()
        state = {tensor.name: without_null_rows(tensor.numpy()) for tensor in tensors}
        check_finite(state, source=os.path.join(folder, part, WEIGHTS))


def _programs(part):
    return [f"{part}/{name}" for name in PROGRAMS]


def is_program(name):
    """Returns whether a file of a folder of `export_inference` is a program."""
    return os.path.basename(name) in PROGRAMS


def _read_manifest(folder):
    path = inside(folder, MANIFEST)
    manifest = read_json_object(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format {shortened(manifest.get('format'))}, expected {FORMAT}; export it anew")

    def size(value):
        return POSITIVE_INT.accepts(value) and value <= MAX_SIZE

    checks = {
        **dict.fromkeys(("in_channels", "sample_size", "num_classes"), (size, POSITIVE_INT.expected)),
        "null_class": (lambda value: value is None or size(value), "a class id or null"),
        "scaling_factor": (ABOVE_0.accepts, "a positive number"),
        "scheduler": ((*SCHEDULERS, TRANSPORT_SCHEDULER).__contains__, "a scheduler of ppdiffusers or of a transport"),
        "bytes": (lambda value: isinstance(value, dict) and all(map(INT.accepts, value.values())), "sizes"),
        "sha256": (lambda value: value is None or isinstance(value, dict), "checksums"),  # None: of an older folder
        "id2label": (is_id2label, '{"0": "name", ...}'),
        "timestep_fit": (is_timestep_fit, '{"ddim": numbers of steps, "dpm": numbers of steps}, or null'),
    }
    if manifest.get("scheduler") == TRANSPORT_SCHEDULER:
        types = [name for name, kind in MODEL_TYPES.items() if kind.objective == "transport"]
        checks["model_type"] = types.__contains__, " or ".join(types)
    checks["guided_channels"] = (
        lambda value: value in (None, "auto") or size(value),
        'a positive integer, null for all, or "auto"',
    )
    for key, (accepts, expected) in checks.items():
        if not accepts(manifest.get(key)):
            raise ValueError(f"{path}: {key} is {shortened(manifest.get(key), 40)}, expected {expected}")
    LatentScaling.of(manifest, channels=manifest["in_channels"], source=path)
    sizes = manifest["bytes"]
    for part in PARTS:
        if sizes.keys().isdisjoint(_programs(part)) or f"{part}/{WEIGHTS}" not in sizes:
            raise ValueError(f"{path}: bytes: names no program and weights of {part}")
    for name, expected in sizes.items():
        file = inside(folder, name)
        found = os.path.getsize(file) if os.path.isfile(file) else None
        if found != expected:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise ValueError(f"{file}: {state}, {MANIFEST} says {expected:,}: the folder is not whole")
    for name, expected in (manifest.get("sha256") or {}).items():  # Paddle 2.6 crashes on a damaged program
        if sha256_of_file(inside(folder, name)).hex() != expected:
            raise ValueError(f"{os.path.join(folder, name)}: is not the program whose sha256 {MANIFEST} has")
    return manifest
