"""Tensor parallelism and sharding stages 2 and 3 on a CPU, where Paddle refuses them, over the plain collectives.

For trials of parallel training without GPUs: fleet's layers and the sharding wrappers run as they are, but for three
operators, the wrappers' checks of the device, and the store for a group's addresses. On a GPU nothing here is called.
"""

import functools
import logging
import os
import socket
from types import SimpleNamespace

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.base import core
from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_optimizer_stage2 as stage2
from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_stage3 as stage3
from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_storage
from paddle.distributed.sharding import group_sharded

from runtime.paddle_private import give_groups_own_stores, replace_tensor_parallel_operators


def _copy(x, group):
    return x.clone()


def _sum(x, group):
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def _concat(x, group):
    parts = []
    dist.all_gather(parts, x, group=group)
    return paddle.concat(parts, axis=-1)


def _own(x, group):
    return x.split(group.nranks, axis=-1)[group.rank].contiguous()


def _operator(forward, backward):
    class Operator(PyLayer):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            return forward(x, group)

        @staticmethod
        def backward(ctx, gradient):
            return backward(gradient, ctx.group)

    return lambda x, group=None, **_: Operator.apply(x, group)


def use_plain_collectives():
    """Gives fleet's tensor-parallel layers and the sharding wrappers their CPU forms, in this process."""
    replace_tensor_parallel_operators(
        identity=_operator(_copy, _sum), all_reduce=_operator(_sum, _copy), concat=_operator(_concat, _own)
    )
    # The wrappers' checks: a CPU passes for a GPU, but they keep "cpu" as their device.
    group_sharded.paddle = _instead(paddle, get_device=lambda: "gpu:0")
    for name in ("GroupShardedOptimizerStage2", "GroupShardedStage2", "GroupShardedStage3"):
        setattr(group_sharded, name, _kept_on_cpu(getattr(group_sharded, name)))
    stage2.core = stage3.core = _instead(core, is_compiled_with_cuda=lambda: True)
    stage2.paddle = _instead(paddle, get_device=lambda: "cpu:0")
    # Fills the buffer in place; on a GPU it is filled on the host and moved.
    storage = group_sharded_storage.ParamStorage
    storage.add_rank_params = functools.partialmethod(storage.add_rank_params, convert_gpu=False)
    group_sharded.logger_ = logging.getLogger(__name__)
    group_sharded.logger_.disabled = True
    # Stage 3 slices what has more than 100 elements: on a GPU it would be 2 ** 20, more than a test's whole network.
    dist.sharding.group_sharded_parallel = functools.partial(group_sharded.group_sharded_parallel, segment_size=100)
    give_groups_own_stores(_own_store)


def _kept_on_cpu(wrapper):
    return lambda *args, **options: wrapper(*args, **{**options, "device": "cpu"})


def _instead(module, **attributes):
    """Returns a module's attributes, some of them replaced."""
    return SimpleNamespace(**{**vars(module), **attributes})


def _own_store(shared, group_name, rank):
    key = f"store of {group_name}"
    if rank == 0:
        host = os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        store = core.TCPStore(host, port, True, 0)
        shared.set(key, f"{host}:{port}")
        return store
    host, _, port = shared.get(key).decode().rpartition(":")
    return core.TCPStore(host, int(port), False, 0)
