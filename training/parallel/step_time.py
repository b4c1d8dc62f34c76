"""Work, traffic and time of a planned training step, and the settings that fit a device. Needs no Paddle.

It orders settings; it does not promise seconds. docs/memory.md has the formulas.
"""

import dataclasses
import itertools

from config.schema import group_size
from models.sizes import check_tensor_parallel
from training.parallel.degrees import STAGES
from training.parallel.memory_plan import Plan


def step_flops(planned):
    """Returns the floating-point operations of a step on one device: two per multiply-add, the backward pass twice.

    Matrix products only: every weight matrix on every token (the conditioning's on every sample), the scores and the
    weighted values of attention. Recompute adds another forward pass of the blocks.
    """
    sizes, setting = planned.sizes, planned.setting
    blocks, rest = sum(4 * tokens**2 * sizes.hidden for tokens in sizes.block_tokens) / setting.tensor_parallel, 0
    for p in sizes.parameters:
        if len(p.shape) > 1 and p.trainable and "embedding_table" not in p.name:
            tokens = sizes.tokens if p.block is None else sizes.block_tokens[p.block]
            work = 2 * p.numel() * (1 if "adaLN" in p.name or "t_embedder" in p.name else tokens)
            if p.block is None:
                rest += work
            else:
                blocks += work / setting.tensor_parallel
    return setting.accumulation * setting.batch * ((4 if setting.recompute else 3) * blocks + 3 * rest)


def ring_gather(size, ranks):
    """Returns the bytes that each rank sends in a ring all-gather, reduce-scatter or, on average, broadcast."""
    return size * (ranks - 1) / ranks


def ring_all_reduce(size, ranks):
    """Returns the bytes that each rank sends in a ring all-reduce: a reduce-scatter and an all-gather."""
    return 2 * ring_gather(size, ranks)


def traffic(planned):
    """Returns `{what: (bytes that a device sends in a step, ranks that it spans)}`."""
    sizes, setting = planned.sizes, planned.setting
    size = setting.weight_size * sum(p.numel(setting.tensor_parallel) for p in sizes.parameters if p.trainable)
    tensor, sharding, micro_batches = setting.tensor_parallel, setting.sharding_degree, setting.accumulation
    rows, part, times = {}, size, 1  # part: what the data-parallel ranks average, so many times
    if tensor > 1:
        item, residual = (4, 2, 2)[setting.mode], sizes.block.residual[setting.mode]
        tokens = setting.batch * sum(sizes.block_tokens) / sizes.layers * sizes.hidden
        forward = 2 * ring_all_reduce(item * tokens, tensor)
        forward += ring_gather(sizes.modulations * item * setting.batch * sizes.hidden, tensor)
        backward = 2 * ring_all_reduce(residual * tokens, tensor)
        backward += ring_all_reduce(setting.weight_size * setting.batch * sizes.condition, tensor)
        sent = sizes.layers * ((2 if setting.recompute else 1) * forward + backward)
        rows["activations (tensor parallel)"] = (micro_batches * sent, tensor)
    span = tensor * sharding
    if setting.sharding == "stage3":
        gathers = 3 if setting.recompute else 2
        rows["weights, every pass"] = (micro_batches * gathers * ring_gather(size, sharding), span)
        # Paddle's wrapper sums whole gradients, and then keeps its slice.
        rows["gradients, every micro-batch"] = (micro_batches * ring_all_reduce(size, sharding), span)
        times = micro_batches
    elif setting.sharding == "stage2":
        part = size / sharding
        rows["gradients to their owners, every micro-batch"] = (micro_batches * ring_gather(size, sharding), span)
    elif setting.sharding:
        rows["gradients to their owners"] = (ring_gather(size, sharding), span)
    if setting.sharding in ("stage1", "stage2"):
        rows["new weights"] = (ring_gather(size, sharding), span)
    if setting.data_parallel > 1:
        rows["gradients (data parallel)"] = (times * ring_all_reduce(part, setting.data_parallel), setting.world_size)
    return rows


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the cost model knows of the devices. The defaults are an A100's."""

    tflops: float | None = None  # peak of the matrix units in the precision, 1e12 operations a second; None: an A100's
    efficiency: float = 0.45  # share of it that the matrix products of a step reach
    bandwidth: float = 240.0  # 1e9 bytes a second that a device sends to others of its node
    network: float = 25.0  # the same between nodes
    per_node: int = 8  # devices of a node
    launch: float = 10e-6  # seconds that starting an operator takes


def step_seconds(planned, machine):
    """Returns `(seconds of compute, seconds of communication)` of an optimizer step; nothing is taken to overlap.

    Compute is the work over the rate, or the time to start the operators if that is longer; a collective takes its
    bytes over the bandwidth, the network's if its ranks are more than a node has.
    """
    sizes, setting = planned.sizes, planned.setting
    tflops = machine.tflops or (312.0 if setting.mode else 19.5)
    operators = setting.accumulation * sizes.layers * sizes.block.operators[setting.mode]
    operators *= 4 / 3 if setting.recompute else 1
    compute = max(step_flops(planned) / (tflops * 1e12 * machine.efficiency), operators * machine.launch)
    communication = sum(
        sent / (1e9 * (machine.bandwidth if ranks <= machine.per_node else machine.network))
        for sent, ranks in traffic(planned).values()
    )
    return compute, communication


def fitting(config, setting, memory, machine, *, fixed=()):
    """Returns `(found, least)`: the ways to train the same global batch in `memory` bytes per device, fastest first.

    A way is a choice of tensor parallelism, sharding and recompute; all else is as in `setting`, and so are its fields
    `fixed`. Each is found as `(Plan, seconds of a step)` with the largest micro-batch that fits, which is its fastest.
    `least` is the `Plan` that needs the least memory of all that were tried, None if no way takes this batch.
    """
    ranks = _divisors(setting.world_size)
    choices = {"tensor_parallel": ranks, "sharding": STAGES, "sharding_degree": ranks, "recompute": (False, True)}
    choices.update({name: [getattr(setting, name)] for name in fixed if name in choices})
    found, least = [], None
    for values in itertools.product(*choices.values()):
        way = dataclasses.replace(setting, **dict(zip(choices, values, strict=True)))
        if not _is_possible(way, config) or setting.global_batch % way.data_ranks:
            continue
        samples = setting.global_batch // way.data_ranks
        for batch in reversed(_divisors(samples)):
            if batch % group_size(config):
                continue
            tried = dataclasses.replace(way, batch=batch, accumulation=samples // batch)
            if any(getattr(tried, name) != getattr(setting, name) for name in fixed):
                continue
            planned = Plan(config, tried)
            if least is None or planned.peak < least.peak:
                least = planned
            if planned.peak <= memory:
                found.append((planned, sum(step_seconds(planned, machine))))
                break
    return sorted(found, key=lambda pair: (pair[1], pair[0].peak)), least


def _divisors(number):
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _is_possible(setting, config):
    try:
        check_tensor_parallel(config["model"], setting.tensor_parallel)
    except ValueError:
        return False
    divides = setting.world_size % (setting.tensor_parallel * setting.sharding_degree) == 0
    return divides and (setting.sharding != "") == (setting.sharding_degree > 1)
