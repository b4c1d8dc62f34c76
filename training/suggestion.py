"""A config that fits a set of features and a device, with the reason of each choice. Needs no Paddle but for a trial.

The rules are those of the papers for large sets (`RECIPES`), and for small ones what the handwritten digits were tuned
with (docs/performance.md): few steps, a high rate that falls, a shorter average.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
import subprocess
import time

import numpy as np

from config.schema import MODEL_TYPES, resolve_config
from features.check import STD_RANGE
from features.statistics import can_be_moments, total_std
from features.store import find_features, open_store, read_description, read_manifest
from models.sizes import SIZES, size_keys
from runtime.machine import available_memory
from runtime.process import counted
from training.parallel.memory_plan import Plan, Setting
from training.parallel.step_time import Machine, fitting

GIB = 2**30
FEW, SOME, MANY = 5_000, 20_000, 200_000  # samples: where the choices change
LONG_RUN = 50_000  # steps from which a run is one of the papers' kind
SMALL_LATENTS = 8  # side up to which latents are small
DEEP_LATENTS = (16, 16)  # side up to which, and channels from which on, a position has enough to be a token
MAX_CPU_TOKENS = 64  # beyond that a step takes a CPU seconds
TRIAL_SECONDS = 4.0  # longest estimate of a step that is tried out
RATES = {"XS": 2e-3, "S": 5e-4, "B": 3e-4}  # peak learning rates of short runs; others 2e-4
# Peaks of the matrix units in half precision, dense, from the makers' data sheets; the first name that fits counts.
TFLOPS = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "A800": 312, "L40": 181, "A10": 125, "L4": 121}
TFLOPS |= {"4090": 165, "3090": 71, "V100": 125, "T4": 65}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a paper trains on a large set."""

    batch: int = 256
    steps: int = 400_000
    note: str = "the papers' final models take 7 M"
    rate: float = 1e-4
    training: dict = dataclasses.field(default_factory=dict)  # more of the section, for sets of any size
    objective: dict = dataclasses.field(default_factory=dict)
    why: str = ""  # of `objective`


RECIPES = {  # by the model's type; the others are trained as DiT is
    "LightningDiT": Recipe(
        batch=1024,
        steps=80_000,
        note="the paper's final model takes 1 M",
        rate=2e-4,
        # The gradient of a cosine is 1e8 where the output is still 0. Whole, AdamW remembers it for hundreds of steps.
        training={"adam_beta2": 0.95, "max_grad_norm": 1.0},
        objective={"timestep_sampling": "logit-normal", "cosine_loss": True},
        why="; more of the times in the middle, and a cosine loss",
    )
}


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """What a config must know of a set of features."""

    name: str
    samples: int
    channels: int
    side: int  # of the latents
    num_classes: int
    flip: bool  # mirrored latents are there
    num_bytes: int  # in memory
    vae: str | None = None  # folder of its autoencoder, if that is on this machine
    std: float | None = None  # of its latents, where training does not normalise them unasked and the manifest tells it


MORE = "more is better: --hours, --epochs"


def describe_set(feature_path, image_size=None):
    """Returns the `FeatureSet` in a folder; ValueError if there is none, or its latents are not square."""
    kind, name = find_features(feature_path, image_size)
    store, manifest = open_store(feature_path, kind, name), read_manifest(feature_path, name)
    channels, *size = store.row_shape
    if len(size) != 2 or size[0] != size[1]:
        raise ValueError(
            f"{store.path}: holds latents of shape {store.row_shape}, expected square ones (C, side, side)"
        )
    moments = manifest.get("moments")
    if moments is None:
        # As `features.dataset` finds it out: the second half can be standard deviations.
        rows = np.empty((min(len(store), 16), *store.row_shape), "float32")
        store.read(np.arange(len(rows)), rows)
        moments = can_be_moments(rows)
    num_classes = manifest.get("num_classes")
    if not isinstance(num_classes, int) or num_classes < 1:
        num_classes = int(store.labels.max()) + 1
    told = read_description(feature_path, name)
    mean, std = (np.array(told[key] or np.nan, "float64") for key in ("channel_mean", "channel_std"))
    std = total_std(mean, std)
    vae = (told["vae"] or {}).get("name")
    return FeatureSet(
        name,
        samples=len(store),
        channels=channels // 2 if moments else channels,
        side=size[0],
        num_classes=num_classes,
        flip=store.has_flip,
        num_bytes=(1 + store.has_flip) * len(store) * 4 * math.prod(store.row_shape),
        vae=vae if vae and os.path.isdir(vae) else None,
        std=None if math.isnan(std) or manifest.get("latent_normalization") == "channel" else std,
    )


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a run is to train."""

    kind: str  # "cpu" or "gpu"
    name: str
    memory: float  # bytes of one that a run may take
    count: int = 1
    precision: str = "float32"  # the config's `amp_dtype`
    machine: Machine = Machine()

    @property
    def title(self):
        return self.name if self.count == 1 else f"{self.count} x {self.name}"


def find_device(samples, *, world_size=None, gpu_memory=None, reserve=2.0):
    """Returns the `Device` of this machine, or with `gpu_memory` (GiB) that of another one.

    Of several GPUs a small set gets one. On a CPU the speed of matrix products is measured, which takes 0.1 s.
    """
    if gpu_memory is not None:
        memory = (gpu_memory - reserve) * GIB
        return Device("gpu", f"GPU with {gpu_memory:g} GiB", memory, world_size or 1, "bfloat16")
    if gpus := _list_gpus():
        name, mebibytes, capability = gpus[0]
        count = world_size or (1 if samples < SOME else len(gpus))
        known = next((tflops for key, tflops in TFLOPS.items() if re.search(rf"{key}(?!\d)", name)), None)
        precision = "bfloat16" if capability >= 8 else "float16"
        return Device("gpu", name, (mebibytes / 1024 - reserve) * GIB, count, precision, Machine(known))
    if world_size is not None and world_size > 1:
        raise ValueError(
            f"--world_size {world_size}: Paddle has no GPU here; give --gpu_memory to plan for another one"
        )
    return Device("cpu", "CPU", (available_memory() or 8 * GIB) * 0.8 - GIB, machine=_cpu_machine())


def _list_gpus():
    """Returns `[(name, MiB, compute capability), ...]` of the GPUs that Paddle can use here."""
    gpus = []
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError, importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("paddlepaddle-gpu")
        query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
        for line in subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines():
            name, memory, capability = line.rsplit(",", 2)
            gpus.append((name.strip(), float(memory), float(capability)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else gpus[: len(re.findall(r"(?:^|,)\s*[^,\s-]", visible))]


def _cpu_machine():
    a, times = np.ones((768, 768), "float32"), []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    # The share of a step that is products, and what an operator takes to start: docs/performance.md.
    return Machine(tflops=2 * 768**3 / min(times) / 1e12, efficiency=0.5, launch=25e-6)


@dataclasses.dataclass
class Wishes:
    """What a user has decided; None: not."""

    model: str = "DiT"
    size: str | None = None
    patch: int | None = None
    batch_size: int | None = None
    max_steps: int | None = None
    epochs: float | None = None
    hours: float | None = None

    @property
    def recipe(self):
        return RECIPES.get(self.model, Recipe())


@dataclasses.dataclass
class Suggestion:
    """A config, and what it is expected to take."""

    config: dict  # as it is to be written: what the defaults don't say
    reasons: list  # (what, value, why), texts
    planned: Plan
    seconds: float  # of a step
    source: str  # of `seconds`, in words
    steps: int


def suggest(features, device, wishes, *, trial=True):
    """Returns the `Suggestion` for a `FeatureSet`, a `Device` and `Wishes`.

    With `trial`, a CPU that is not too slow for it takes a few steps, which imports Paddle. ValueError for wishes that
    can't be met: an unknown size, a patch that does not divide the latents, a batch that no device holds.
    """
    reasons = []

    def choose(what, value, why, shown=None):
        reasons.append((what, str(value if shown is None else shown), why))
        return value

    held_out = 0 if features.samples < 100 else min(512, features.samples // 20)
    samples = features.samples - held_out
    patch = choose("patch", *_patch(features, device, wishes))
    batch = _batch(samples, device, wishes)
    model, planned, seconds = _fit(features, device, wishes, patch, batch[0], choose)
    setting = planned.setting
    objective = _objective(features, wishes, choose)
    batch = choose("batch", *batch)
    small = features.num_bytes <= GIB // 4
    why = "their loss shows when the set is learnt by heart" if held_out else "too few samples to spare any"
    data = {"validation_samples": choose("held out", held_out, why)}
    if features.flip:
        data["flip"] = choose("flip", True, "the set has mirrored latents")
    if features.std is not None and not STD_RANGE[0] <= features.std <= STD_RANGE[1]:
        why = f"the latents' standard deviation is {features.std:.3g}, not about 1"
        data["latent_normalization"] = choose("normalised by", "channel", why)
    why = f"the set takes {math.ceil(features.num_bytes / 2**20):,} MiB"
    data["in_memory"] = choose("in memory", small, why, "yes" if small else "no")
    gpu = device.kind == "gpu"
    why = {"float32": "a CPU has no faster one"}.get(device.precision, "matrix units, with float32 weights")
    training = {
        "global_batch_size": batch,
        "gradient_accumulation_steps": setting.accumulation,
        "amp_dtype": choose("precision", setting.precision, why),
        "amp_level": setting.level,
        "fused_attention": gpu,
        "recompute": setting.recompute,
    }
    if setting.accumulation > 1:
        choose("micro-batches", setting.accumulation, "the batch does not fit in one go")
    if gpu:
        why = "without it the batch needs more memory" if setting.recompute else "the memory suffices without"
        choose("recompute", setting.recompute, why, "on" if setting.recompute else "off")
    config = {"model": model, "objective": objective, "training": training, "data": data}
    source = f"estimated for {'an A100' if device.machine.tflops is None else device.name}; no run was measured"
    if not gpu:
        source = "estimated from the speed of this machine's matrix products"
        if trial and seconds <= TRIAL_SECONDS:
            busy = ", beside other programs at work" if os.getloadavg()[0] > 0.7 * (os.cpu_count() or 1) else ""
            seconds, source = measure_step(config, setting.batch), f"measured here in a short trial{busy}"
    steps = choose("steps", *_steps(samples, batch, device, wishes, seconds))
    schedule = _schedule(steps, planned.sizes, wishes.size or _size_of(model), wishes.recipe, choose)
    training.update(max_steps=steps, **schedule, **wishes.recipe.training)
    if data["validation_samples"]:
        data["validation_steps"] = max(1, min(5000, steps // 20))
    if planned.sizes.large:
        training["max_grad_norm"] = 2.0  # as the presets of Large-DiT
    return Suggestion(config, reasons, planned, seconds, source, steps)


def _size_of(model):
    sizes = SIZES[MODEL_TYPES[model["type"]].family]
    keys = ("num_layers", "num_attention_heads", "attention_head_dim")
    return next(name for name, values in sizes.items() if values == tuple(model[key] for key in keys))


def _patch(features, device, wishes):
    side = features.side
    if wishes.patch is not None:
        if wishes.patch < 1 or side % wishes.patch:
            accepted = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
            raise ValueError(f"--patch {wishes.patch}: does not divide the latents' side {side}; accepted: {accepted}")
        return wishes.patch, "as asked"
    if side < 4 or side % 2 or (device.kind == "gpu" and side <= SMALL_LATENTS):
        return 1, f"latents of {side} x {side} are small: every position is a token"
    if device.kind == "gpu" and side <= DEEP_LATENTS[0] and features.channels >= DEEP_LATENTS[1]:
        return 1, f"every position is a token, which has {features.channels} channels; {side**2} tokens"
    if device.kind == "cpu" and (side // 2) ** 2 > MAX_CPU_TOKENS and side % 4 == 0:
        return 4, f"{(side // 4) ** 2} tokens; a CPU takes 5 times as long for the {(side // 2) ** 2} of patch 2"
    if side <= DEEP_LATENTS[0] and features.channels >= DEEP_LATENTS[1]:
        return 2, f"{(side // 2) ** 2} tokens; a CPU takes 5 times as long for the {side**2} of patch 1"
    return 2, f"the papers' best; {(side // 2) ** 2} tokens"


def _batch(samples, device, wishes):
    if wishes.batch_size is not None:
        if wishes.batch_size % device.count:
            raise ValueError(f"--batch_size {wishes.batch_size}: expected a multiple of the {device.count} GPUs")
        return wishes.batch_size, "as asked"
    batch = 32 if samples < 500 else 64 if samples < SOME else 128 if samples < MANY else wishes.recipe.batch
    few = f"small, because {counted(samples, 'sample')} are few"
    if device.kind == "cpu" and batch > 64:
        batch, few = 64, "small, because a CPU's step takes as long as its samples"
    batch = math.ceil(min(batch, samples) / device.count) * device.count
    return batch, "the papers'" if batch >= 256 else few


def _objective(features, wishes, choose):
    kind = MODEL_TYPES[wishes.model].objective
    if kind == "transport":
        choose("objective", kind, f"{wishes.model} predicts velocities on straight paths{wishes.recipe.why}")
        return {"type": kind, "path_type": "Linear", "prediction": "velocity", **wishes.recipe.objective}
    small = features.side <= SMALL_LATENTS
    why = "the linear schedule drowns small latents in noise too early" if small else "the papers'"
    schedule = choose("noise schedule", "squaredcos_cap_v2" if small else "linear", why)
    return {"type": kind, "noise_schedule": schedule}


def _fit(features, device, wishes, patch, batch, choose):
    """Returns `(model section, Plan, seconds of a step)` of the size that is asked for, or the largest that fits."""
    family = MODEL_TYPES[wishes.model].family
    sizes = list(SIZES[family])
    if wishes.size is not None and wishes.size not in sizes:
        raise ValueError(f"--size {wishes.size}: expected one of {', '.join(sizes)} for a {wishes.model}")
    few = features.samples < SOME
    largest = "XS" if device.kind == "cpu" else "S" if few else "B" if features.samples < MANY else sizes[-1]
    largest = {"L": "XL", "7B": "600M"}.get(largest, largest)
    candidates = [wishes.size] if wishes.size else sizes[sizes.index(largest) :: -1]
    for size in candidates:
        model = {"type": wishes.model, "sample_size": features.side, "patch_size": patch}
        model |= {"in_channels": features.channels, **size_keys(family, size)}
        model |= {"num_classes": features.num_classes, "class_dropout_prob": 0.1}
        model["learn_sigma"] = MODEL_TYPES[wishes.model].keys["learn_sigma"].default
        config = resolve_config({"model": model, "objective": wishes.recipe.objective})
        level = "O2" if size in ("3B", "7B") else "O1"
        setting = Setting.of(
            config["training"], device=device.kind, world_size=device.count, precision=device.precision
        )
        fused = device.kind == "gpu"
        setting = dataclasses.replace(setting, batch=batch // device.count, level=level, fused_attention=fused)
        whole = ("tensor_parallel", "sharding", "sharding_degree")  # every GPU has the whole network, if it can
        found, least = fitting(config, setting, device.memory, device.machine, fixed=whole)
        if not found and device.count > 1:
            found, least = fitting(config, setting, device.memory, device.machine)
        if found:
            planned, seconds = found[0]
            why = {"cpu": "what a CPU trains in minutes to hours"}.get(device.kind, "fits the number of samples")
            why = "as asked" if wishes.size else why if size == largest else "the largest that fits into the memory"
            width = model["num_attention_heads"] * model["attention_head_dim"]
            shown = f"{wishes.model}-{size}/{patch}"
            sized = f"{counted(model['num_layers'], 'block')} of width {width}, {planned.parameters / 1e6:,.1f} M"
            choose("model", size, f"{sized} parameters; {why}", shown)
            return model, planned, seconds
    need = f"; {wishes.model}-{size} takes {least.peak / GIB:.1f} GiB at least" if least else ""
    raise ValueError(
        f"batch {batch} does not fit into {device.title}, {device.memory / GIB:.1f} GiB to use{need}; give a smaller "
        "--batch_size, or more memory"
    )


def _steps(samples, batch, device, wishes, seconds):
    def epochs(steps):
        number = steps * batch / samples
        return f"{number:,.{0 if number >= 10 else 1}f} epochs"

    def advice(steps):
        few = steps * batch / samples > 200
        return "few images: if the held-out loss rises, take an earlier checkpoint" if few else MORE

    if wishes.max_steps is not None:
        return wishes.max_steps, f"as asked; {epochs(wishes.max_steps)}"
    if wishes.epochs is not None:
        return max(1, round(wishes.epochs * samples / batch)), f"{wishes.epochs:g} epochs, as asked"
    if wishes.hours is not None:
        steps = max(1, int(0.95 * wishes.hours * 3600 / seconds))  # the rest is for validation, previews, checkpoints
        return steps, f"what {wishes.hours:g} hours allow; {epochs(steps)}"
    if device.kind == "cpu":
        steps = 2_000 if samples < FEW else 5_000 if samples < SOME else 10_000
        steps *= max(1, 64 // batch)
        return steps, f"{epochs(steps)}; {advice(steps)}"
    if samples >= MANY:
        return wishes.recipe.steps, f"{epochs(wishes.recipe.steps)}; {wishes.recipe.note}"
    steps = 10_000 if samples < FEW else 20_000 if samples < SOME else 100_000
    return steps, f"{epochs(steps)}; {advice(steps)}"


def _schedule(steps, sizes, size, recipe, choose):
    """Returns the keys of learning rate and average that follow from the number of steps."""
    if steps >= LONG_RUN:
        rate = choose("learning rate", recipe.rate, "constant, as in the papers")
        decay = choose("EMA", 0.9999, "as in the papers")
        return {"learning_rate": rate, "lr_scheduler_type": "constant", "use_ema": True, "ema_decay": decay}
    warmup = min(1000, steps // 25)
    rate = 1e-4 if sizes.large and size not in RATES else RATES.get(size, 2e-4)
    shown = f"{rate:g}, cosine"
    choose("learning rate", rate, f"high at first for a short run; {counted(warmup, 'step')} of warm-up", shown)
    decay = round(min(0.9999, max(0.9, 1 - 10 / steps)), 4)
    choose("EMA", decay, "averages the last tenth of the run, and grows to that: warm-up")
    schedule = {"learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_steps": warmup}
    return {**schedule, "use_ema": True, "ema_decay": decay, "ema_warmup": True}


def measure_step(config, batch):
    """Returns the seconds of a step of `batch` samples on the CPU, the fastest of three; imports Paddle."""
    import paddle

    from objectives import Batch, build_objective
    from training import setup
    from training.averages import EMA
    from training.optimizer import build_lr_scheduler, build_optimizer

    config = resolve_config(config)
    previous = paddle.get_device()
    paddle.set_device("cpu")
    model, objective = setup.build_network(config), build_objective(config)
    model.train()
    optimizer = build_optimizer(model, config["training"], build_lr_scheduler(config["training"], 10))
    average, shape = EMA(model), [config["model"][key] for key in ("in_channels", "sample_size", "sample_size")]
    x, y = paddle.randn([batch, *shape]), paddle.zeros([batch], "int64")
    times = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        for _ in range(config["training"]["gradient_accumulation_steps"]):
            objective.training_losses(model, Batch(x, y))["loss"].mean().backward()
        optimizer.step()
        optimizer.clear_grad()
        average.update(model)
        float(paddle.abs(next(iter(model.parameters()))).sum())
        times.append(time.perf_counter() - start)
    paddle.set_device(previous)
    return min(times[1:])
