"""Parameters, memory, traffic and time of a training run, from its config alone. Standard library only.

Memory is that of the fullest device, in bytes: what stays from step to step (weights, gradients, optimizer state, EMA),
and what comes and goes in a step, which `training.parallel.memory_tape` plays operator by operator. The states are
ZeRO's (Rajbhandari et al. 2020, arXiv:1910.02054) as Paddle's sharding wrappers spread them, the tensor-parallel parts
Megatron-LM's (Shoeybi et al. 2019, arXiv:1909.08053). docs/memory.md has the formulas and compares with measurements.
"""

import dataclasses
import functools
import math
from collections import namedtuple
from dataclasses import dataclass

from training.parallel.memory_tape import SINGLE, activations, ring_all_reduce, ring_gather

SHARDING = ("", "stage1", "stage2", "stage3")
MAX_CONDITION_SIZE = 1024  # of Large-DiT
FREQUENCIES = 256  # features of a timestep
# Paddle's sharding: stage 2 collects gradients in one buffer a rank, stage 3 leaves smaller parameters whole.
GRADIENT_BUFFER = 2**23
SLICED_FROM = 2**20

# shape: of the whole parameter; split: whether tensor parallelism cuts it.
Parameter = namedtuple("Parameter", "name shape split trainable", defaults=(False, True))


@dataclass(frozen=True)
class Sizes:
    """Widths of a network, and what else decides how large its tensors are; see `of`."""

    large: bool
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    condition: int
    mlp: int
    qk_norm: bool
    tokens: int
    patch: int
    in_channels: int
    out_channels: int
    labels: int
    frequencies: int
    transport: bool
    drops_variance: bool

    @classmethod
    def of(cls, config):
        """The sizes of a resolved config's network."""
        model = config["model"]
        heads, hidden = model["num_attention_heads"], model["num_attention_heads"] * model["attention_head_dim"]
        large = model["type"].startswith("Large")
        if large:
            mlp = int(2 * 4 * hidden / 3)
            if model["ffn_dim_multiplier"] is not None:
                mlp = int(model["ffn_dim_multiplier"] * mlp)
            mlp = model["multiple_of"] * math.ceil(mlp / model["multiple_of"])
        else:
            mlp = int(hidden * model["mlp_ratio"])
        return cls(
            large=large,
            layers=model["num_layers"],
            heads=heads,
            kv_heads=model.get("num_kv_heads") or heads,
            head_dim=model["attention_head_dim"],
            condition=min(hidden, MAX_CONDITION_SIZE) if large else hidden,
            mlp=mlp,
            qk_norm=model.get("qk_norm", False),
            tokens=(model["sample_size"] // model["patch_size"]) ** 2,
            patch=model["patch_size"],
            in_channels=model["in_channels"],
            out_channels=model["in_channels"] * (2 if model["learn_sigma"] else 1),
            labels=model["num_classes"] + (model["class_dropout_prob"] > 0),
            frequencies=FREQUENCIES,
            transport=config["objective"]["type"] == "transport",
            drops_variance="SiT" in model["type"] and model["learn_sigma"],
        )

    @property
    def hidden(self):
        return self.heads * self.head_dim

    @property
    def latents(self):
        """Numbers in a sample."""
        return self.tokens * self.patch_in

    @property
    def patch_in(self):
        return self.patch**2 * self.in_channels

    @property
    def patch_out(self):
        return self.patch**2 * self.out_channels

    @property
    def learned_variance(self):
        return not self.transport and self.out_channels > self.in_channels


def parameters(sizes):
    """The network's parameters as `Parameter`s, in its order: names and shapes are those of `models/`."""
    hidden, condition, mlp = sizes.hidden, sizes.condition, sizes.mlp
    if sizes.large:
        yield Parameter("x_embedder.weight", (sizes.patch_in, hidden))
        yield Parameter("x_embedder.bias", (hidden,))
    else:
        yield Parameter("pos_embed", (1, sizes.tokens, hidden), trainable=False)
        yield Parameter("x_embedder.proj.weight", (hidden, sizes.in_channels, sizes.patch, sizes.patch))
        yield Parameter("x_embedder.proj.bias", (hidden,))
    yield from _linear("t_embedder.mlp.0", sizes.frequencies, condition)
    yield from _linear("t_embedder.mlp.2", condition, condition)
    yield Parameter("y_embedder.embedding_table.weight", (sizes.labels, condition))
    for layer in range(sizes.layers):
        if sizes.large:
            yield from _large_block(f"layers.{layer}", sizes)
        else:
            block = f"blocks.{layer}"
            yield from _linear(f"{block}.attn.qkv", hidden, 3 * hidden, column=True)
            yield from _linear(f"{block}.attn.proj", hidden, hidden, row=True)
            yield from _linear(f"{block}.mlp.fc1", hidden, mlp, column=True)
            yield from _linear(f"{block}.mlp.fc2", mlp, hidden, row=True)
            yield from _linear(f"{block}.adaLN_modulation.1", hidden, 6 * hidden, column=True)
    yield from _linear("final_layer.linear", hidden, sizes.patch_out)
    yield from _linear("final_layer.adaLN_modulation.1", condition, 2 * hidden)


def _linear(name, fan_in, fan_out, *, column=False, row=False, bias=True):
    yield Parameter(f"{name}.weight", (fan_in, fan_out), column or row)
    if bias:
        yield Parameter(f"{name}.bias", (fan_out,), column)


def _large_block(block, sizes):
    hidden, kv_width = sizes.hidden, sizes.kv_heads * sizes.head_dim
    for name, fan_out in (("wq", hidden), ("wk", kv_width), ("wv", kv_width)):
        yield from _linear(f"{block}.attention.{name}", hidden, fan_out, column=True, bias=False)
    yield from _linear(f"{block}.attention.wo", hidden, hidden, row=True, bias=False)
    if sizes.qk_norm:
        for name, width in (("q_norm", hidden), ("k_norm", kv_width)):
            yield Parameter(f"{block}.attention.{name}.weight", (width,), True)
            yield Parameter(f"{block}.attention.{name}.bias", (width,), True)
    yield from _linear(f"{block}.feed_forward.w1", hidden, sizes.mlp, column=True, bias=False)
    yield from _linear(f"{block}.feed_forward.w2", sizes.mlp, hidden, row=True, bias=False)
    yield from _linear(f"{block}.feed_forward.w3", hidden, sizes.mlp, column=True, bias=False)
    yield Parameter(f"{block}.attention_norm.weight", (hidden,))
    yield Parameter(f"{block}.ffn_norm.weight", (hidden,))
    yield from _linear(f"{block}.adaLN_modulation.1", sizes.condition, 6 * hidden, column=True)


@dataclass(frozen=True)
class Setting:
    """How a network is trained; names and values as in `config.flags`. `check` says whether it can be.

    Attributes:
        world_size: processes, one a device.
        batch: samples of a micro-batch on one device.
        accumulation: micro-batches an optimizer step.
        precision, level: `amp_dtype`, `amp_level`.
        device: `gpu`, or `cpu`, where everything is float32 and attention is plain.
    """

    world_size: int = 1
    tensor_parallel: int = 1
    sharding: str = ""
    sharding_degree: int = 1
    batch: int = 1
    accumulation: int = 1
    precision: str = "float32"
    level: str = "O1"
    recompute: bool = False
    ema: bool = True
    fused_attention: bool = False
    device: str = "gpu"

    @property
    def data_parallel(self):
        return self.world_size // (self.tensor_parallel * self.sharding_degree)

    @property
    def data_ranks(self):
        """Ranks that get different samples."""
        return self.world_size // self.tensor_parallel

    @property
    def global_batch(self):
        return self.batch * self.accumulation * self.data_ranks

    @property
    def half(self):
        return self.precision != "float32" and self.device != "cpu"

    @property
    def weight_size(self):
        """Bytes of a trained weight, and of its gradient."""
        return 2 if self.half and self.level == "O2" else SINGLE

    @property
    def reducer(self):
        """What copy of the gradients is averaged over the data-parallel ranks, if any.

        `buckets` that stay (paddle.DataParallel), `fused` ones for a moment, None. Recompute runs backward passes
        inside the backward pass, which DataParallel can't follow.
        """
        if self.data_parallel == 1 or self.sharding in ("stage2", "stage3"):
            return None
        plain = self.tensor_parallel == 1 and not self.sharding
        return "buckets" if plain and not self.recompute else "fused"


def check(sizes, setting):
    """Raises `ValueError`, one line, for degrees that do not divide what they split."""
    world, tensor, sharding = setting.world_size, setting.tensor_parallel, setting.sharding_degree
    if world % tensor:
        raise ValueError(f"--tensor_parallel_degree {tensor} does not divide the {world} processes of --world_size")
    split = [("num_attention_heads", sizes.heads)]
    if sizes.large:
        split += [("num_kv_heads", sizes.kv_heads), ("the feed-forward width", sizes.mlp)]
    else:
        split += [("the MLP's width", sizes.mlp)]
    for name, size in split:
        if size % tensor:
            raise ValueError(
                f"--tensor_parallel_degree {tensor} can't split this network: {name} {size} is not divisible"
            )
    if world % (tensor * sharding):
        among = f" / --tensor_parallel_degree {tensor}" if tensor > 1 else ""
        raise ValueError(f"--sharding_parallel_degree {sharding} does not divide the {world} processes{among}")


# ---------------------------------------------------------------------------------------------------------------------
# What stays from step to step
# ---------------------------------------------------------------------------------------------------------------------

_Local = namedtuple("_Local", "numel trainable")  # of this rank's part


def _local_parameters(sizes, setting):
    return [
        _Local(math.prod(p.shape) // (setting.tensor_parallel if p.split else 1), p.trainable)
        for p in _all_parameters(sizes)
    ]


@functools.lru_cache(maxsize=4)
def _all_parameters(sizes):
    return tuple(parameters(sizes))


def _owners(locals_, setting):
    """The sharding rank that owns each parameter: the one with the least so far, the largest first in stage 1."""
    loads = [0] * setting.sharding_degree
    owners = [0] * len(locals_)  # frozen ones: the first rank's
    order = [i for i, p in enumerate(locals_) if p.trainable]
    if setting.sharding == "stage1":
        order.sort(key=lambda i: -locals_[i].numel)
    for i in order:
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += locals_[i].numel
    return owners


def states(sizes, setting):
    """`{kind: bytes}` that the fullest rank of a sharding group holds all the time."""
    locals_ = _local_parameters(sizes, setting)
    trained = [p for p in locals_ if p.trainable]
    frozen = sum(p.numel for p in locals_ if not p.trainable) * SINGLE
    size, degree = setting.weight_size, setting.sharding_degree
    rows = {"weights": size * sum(p.numel for p in trained) + frozen}
    rows["gradients"] = rows["weights"] - frozen
    numel, averaged = sum(p.numel for p in trained), sum(p.numel for p in locals_)
    if setting.sharding == "stage3":
        held = sum(_slice(p.numel, degree) for p in trained)
        rows = {"weights": size * held + frozen, "gradients": size * held}
        numel, averaged = held, held + frozen // SINGLE
    elif setting.sharding:
        owners = _owners(locals_, setting)
        shares = [[p for p, owner in zip(locals_, owners, strict=True) if owner == rank] for rank in range(degree)]
        fullest = max(shares, key=lambda share: sum(p.numel for p in share))
        numel = sum(p.numel for p in fullest if p.trainable)
        averaged = sum(p.numel for p in fullest)
        if setting.sharding == "stage2":
            rows["gradients"] = size * _stage2_gradients(locals_, owners, shares.index(fullest), degree)
    rows["master weights"] = SINGLE * numel if size < SINGLE else 0
    rows["AdamW moments"] = 2 * SINGLE * numel
    rows["EMA"] = SINGLE * averaged if setting.ema else 0
    rows["DataParallel's buckets"] = rows["gradients"] if setting.reducer == "buckets" else 0
    return rows


def _slice(numel, degree):
    """Of a parameter under stage 3: an even part, or all of a small one."""
    return math.ceil(numel / degree) if numel > SLICED_FROM else numel


def _stage2_gradients(locals_, owners, rank, degree):
    """Gradients of the rank's own parameters, and a buffer for the small ones of every rank.

    Paddle makes new buffers for the others at every forward pass, before it lets the earlier ones go.
    """
    loads = [0] * degree
    for p, owner in zip(locals_, owners, strict=True):
        loads[owner] += p.numel if p.trainable else 0
    buffer = min(max(loads), GRADIENT_BUFFER)
    filled = apart = 0
    for numel in sorted(p.numel for p, owner in zip(locals_, owners, strict=True) if p.trainable and owner == rank):
        if filled + numel <= buffer:
            filled += numel
        else:
            apart += numel
    return apart + (2 * degree - 1) * buffer


# ---------------------------------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What `plan` returns. Bytes are those of the fullest device.

    Attributes:
        parameters: how many, frozen ones included.
        trained: how many of them are trained.
        states: `{kind: bytes}` held all the time.
        phases: `{phase: {kind: bytes}}` that comes on top; the run needs the largest.
        kept: `{kind: bytes}` of the activations at the end of the forward pass.
        traffic: `{what: (bytes that a device sends in a step, ranks that it spans)}`.
        flops: of the whole step on one device.
        operators: run in a step.
    """

    setting: Setting
    parameters: int
    trained: int
    states: dict
    phases: dict
    kept: dict
    traffic: dict
    flops: float
    operators: int
    by_operator: list

    @property
    def peak_phase(self):
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self):
        """Bytes at the peak."""
        return sum(self.states.values()) + sum(self.phases[self.peak_phase].values())


_play = functools.lru_cache(maxsize=None)(activations)


def plan(config, setting):
    """The memory, traffic and work of a run.

    Args:
        config: resolved; only its `model` and `objective` are used.
        setting: a `Setting`; `check` it first.

    Returns:
        a `Plan`.
    """
    sizes = Sizes.of(config)
    held = states(sizes, setting)
    # Gradients are made in the backward pass and dropped after the optimizer's step. Sharding stages 1 and 2 keep them,
    # and DataParallel makes them all at its start.
    drops = setting.sharding in ("", "stage3") and setting.accumulation == 1 and setting.reducer != "buckets"
    passing = held.pop("gradients") if drops else 0
    step = _play(
        sizes,
        setting.batch,
        recompute=setting.recompute,
        fused_attention=setting.fused_attention,
        precision=setting.precision if setting.half else "float32",
        level=setting.level,
        group=setting.tensor_parallel,
        device=setting.device,
    )
    whole = _all_parameters(sizes)
    return Plan(
        setting=setting,
        parameters=sum(math.prod(p.shape) for p in whole),
        trained=sum(math.prod(p.shape) for p in whole if p.trainable),
        states=held,
        phases=_phases(sizes, setting, held, step, passing),
        kept=step.kept,
        traffic=_traffic(sizes, setting, step),
        flops=setting.accumulation * step_flops(sizes, setting),
        operators=setting.accumulation * step.operators,
        by_operator=step.by_operator,
    )


def _phases(sizes, setting, held, step, passing):
    locals_ = _local_parameters(sizes, setting)
    weights = sum(p.numel for p in locals_)
    largest = max(p.numel for p in locals_ if p.trainable)
    phases = {"forward and backward": dict(step.peak)}
    if setting.sharding == "stage3":
        # A layer at work and the next one that is fetched, and the gradient of the first.
        sliced = max((p.numel for p in locals_ if p.trainable and p.numel > SLICED_FROM), default=0)
        phases["forward and backward"]["gathered weights"] = 3 * setting.weight_size * sliced
    if passing:
        # In the first block's backward pass the activations of the others are gone, and their gradients are there.
        last = dict(phases["forward and backward"])
        for kind, size in step.per_block.items():
            last[kind] -= (sizes.layers - 1) * size
        names = [p.name for p in _all_parameters(sizes)]
        trained = [(name, p.numel) for name, p in zip(names, locals_, strict=True) if p.trainable]
        there = sum(numel for name, numel in trained if _is_after_first_block(name))
        last["gradients"] = round(passing * there / sum(numel for _, numel in trained))
        phases["end of the backward pass"] = last
    if setting.reducer == "fused":
        phases["averaging the gradients"] = {"gradients": passing, "fused gradients": passing or held["gradients"]}
    # The average of a parameter, or the square of its gradient, and their float32 copies.
    copies = 1 if setting.weight_size == SINGLE else 2
    phases["optimizer and EMA"] = {"one parameter": copies * SINGLE * largest, "gradients": passing}
    phases["start"] = _start(setting, held, weights)
    return phases


def _is_after_first_block(name):
    layer = name.split(".")[1] if name.startswith(("blocks.", "layers.")) else None
    return name.startswith("final_layer") if layer is None else layer != "0"


def _start(setting, held, weights):
    """Beyond what is held later: the network and its average are whole and float32 before they are spread or cast.

    An average that is to be sharded waits on the host.
    """
    average = SINGLE * weights if setting.ema and not setting.sharding else 0
    whole = SINGLE * weights + average
    if setting.sharding == "stage1" and setting.tensor_parallel == 1:
        # Its wrapper sends all weights in one go, of the type that they are trained in.
        whole = max(whole, 2 * setting.weight_size * weights + average)
    return {"whole weights and EMA, beyond the above": max(0, whole - sum(held.values()))}


def step_flops(sizes, setting):
    """Floating-point operations of a micro-batch on one device: twice a multiply-add, backward twice the forward.

    Matrix products only: every weight matrix on every token (the conditioning's on every sample), the scores and the
    weighted values of attention. Recompute adds another forward of the blocks.
    """
    blocks = rest = 0
    for p in _all_parameters(sizes):
        if len(p.shape) < 2 or not p.trainable or "embedding_table" in p.name:
            continue
        rows = 1 if "adaLN" in p.name or "t_embedder" in p.name else sizes.tokens
        work = 2 * math.prod(p.shape) * rows
        if p.name.startswith(("blocks.", "layers.")):
            blocks += work / setting.tensor_parallel
        else:
            rest += work
    blocks += sizes.layers * 4 * sizes.tokens**2 * sizes.hidden / setting.tensor_parallel
    return setting.batch * ((4 if setting.recompute else 3) * blocks + 3 * rest)


def _traffic(sizes, setting, step):
    """Ring collectives: what a device sends, in bytes a step."""
    locals_ = _local_parameters(sizes, setting)
    size = setting.weight_size * sum(p.numel for p in locals_ if p.trainable)
    tensor, sharding, data = setting.tensor_parallel, setting.sharding_degree, setting.data_parallel
    micro_batches, world = setting.accumulation, setting.world_size
    rows = {}
    if tensor > 1:
        rows["activations (tensor parallel)"] = (micro_batches * step.sent, tensor)
    part, times = size, 1
    if setting.sharding == "stage1":
        rows["gradients to their owners"] = (ring_gather(size, sharding), tensor * sharding)
        rows["new weights"] = (ring_gather(size, sharding), tensor * sharding)
    elif setting.sharding == "stage2":
        rows["gradients to their owners, every micro-batch"] = (
            micro_batches * ring_gather(size, sharding),
            tensor * sharding,
        )
        rows["new weights"] = (ring_gather(size, sharding), tensor * sharding)
        part = size / sharding
    elif setting.sharding == "stage3":
        gathers = 3 if setting.recompute else 2
        rows["weights, every pass"] = (micro_batches * gathers * ring_gather(size, sharding), tensor * sharding)
        # Paddle's wrapper sums whole gradients, and then keeps its slice.
        rows["gradients, every micro-batch"] = (
            micro_batches * ring_all_reduce(size, sharding),
            tensor * sharding,
        )
        times = micro_batches
    if data > 1:
        rows["gradients (data parallel)"] = (times * ring_all_reduce(part, data), world)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Time, and which settings fit
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What the cost model knows of the devices. The defaults are an A100's.

    Attributes:
        tflops: peak of the matrix units in the precision used, 1e12 operations a second; None: by precision.
        efficiency: share of it that the matrix products of a step reach.
        bandwidth: bytes a second, 1e9, that a device sends to others of its node.
        network: the same between nodes.
        per_node: devices of a node.
        launch: seconds that starting an operator takes.
    """

    tflops: float | None = None
    efficiency: float = 0.45
    bandwidth: float = 240.0
    network: float = 25.0
    per_node: int = 8
    launch: float = 10e-6


def step_seconds(planned, machine):
    """`(seconds of compute, seconds of communication)` of an optimizer step; nothing is taken to overlap.

    Compute is the work over the rate, or the time to start the operators if that is longer; a collective takes its
    bytes over the bandwidth, the network's if its ranks are more than a node has.
    """
    tflops = machine.tflops or (312.0 if planned.setting.half else 19.5)
    compute = max(planned.flops / (tflops * 1e12 * machine.efficiency), planned.operators * machine.launch)
    communication = sum(
        sent / (1e9 * (machine.bandwidth if ranks <= machine.per_node else machine.network))
        for sent, ranks in planned.traffic.values()
    )
    return compute, communication


def fitting(config, setting, memory, machine, *, fixed=()):
    """The ways to train the same global batch that fit into `memory` bytes a device, fastest first.

    A way is a choice of tensor parallelism, sharding and recompute; each comes with the largest micro-batch that fits,
    which is its fastest.

    Args:
        config: resolved.
        setting: the `Setting` whose world size, global batch, precision and EMA they share.
        memory: bytes.
        machine: a `Machine`.
        fixed: names of fields of `Setting` that must stay as they are.

    Returns:
        `(found, least)`: found is a list of `(Plan, seconds of a step)`, least the `Plan` that needs the least memory
        of all that were tried, or None if no way takes this batch.
    """
    sizes, found, least = Sizes.of(config), [], None
    for way, batches in _ways(setting, fixed):
        try:
            check(sizes, way)
        except ValueError:
            continue
        for batch in batches:
            planned = plan(config, dataclasses.replace(way, batch=batch, accumulation=way.accumulation // batch))
            if least is None or planned.peak < least.peak:
                least = planned
            if planned.peak <= memory:
                found.append((planned, sum(step_seconds(planned, machine))))
                break
    return sorted(found, key=lambda pair: (pair[1], pair[0].peak)), least


def _ways(setting, fixed):
    """`(a Setting whose accumulation is the samples of a data rank, its micro-batches from large to small)` each."""

    def divisors(number):
        return [d for d in range(1, number + 1) if number % d == 0]

    def choices(name, values):
        return [getattr(setting, name)] if name in fixed else values

    for tensor in choices("tensor_parallel", divisors(setting.world_size)):
        ranks = setting.world_size // tensor
        if setting.global_batch % ranks:
            continue
        samples = setting.global_batch // ranks
        batches = [
            b
            for b in reversed(divisors(samples))
            if ("batch" not in fixed or b == setting.batch)
            and ("accumulation" not in fixed or samples // b == setting.accumulation)
        ]
        for sharding in choices("sharding", SHARDING):
            degrees = [d for d in divisors(ranks) if d > 1] if sharding else [1]
            for degree in choices("sharding_degree", degrees):
                for recompute in choices("recompute", (False, True)):
                    way = {"tensor_parallel": tensor, "sharding": sharding, "sharding_degree": degree}
                    yield dataclasses.replace(setting, **way, recompute=recompute, accumulation=samples), batches
