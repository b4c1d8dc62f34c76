"""Tensor parallelism and sharding stages 2 and 3 on a CPU, where Paddle refuses them, over the plain collectives.

For trials of parallel training without GPUs: fleet's layers and the sharding wrappers run as they are. Replaced are
the three operators that have no CPU kernel, by the same collectives with their gradients; the wrappers' checks of the
device; and the store that the addresses of a group are exchanged through. On a GPU nothing here is called.
"""

import functools
import os
import socket
from types import SimpleNamespace

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.base import core

from runtime.paddle_private import give_groups_own_stores, parameters_of, replace_tensor_parallel_operators


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
    dist.sharding.group_sharded_parallel = _group_sharded_parallel
    give_groups_own_stores(_own_store)


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


def _instead(module, **attributes):
    """Returns a module's attributes, some of them replaced."""
    return SimpleNamespace(**{**vars(module), **attributes})


def _group_sharded_parallel(
    model, optimizer, level, scaler=None, group=None, dp_group=None, exclude_layer=None, sync_comm=False, **_
):
    """Wraps as `paddle.distributed.sharding.group_sharded_parallel` does, by the same wrappers, on a CPU."""
    from paddle.distributed.fleet.meta_parallel.sharding import (
        group_sharded_optimizer_stage2,
        group_sharded_stage2,
        group_sharded_stage3,
        group_sharded_storage,
    )

    has_device = _instead(core, is_compiled_with_cuda=lambda: True)
    group_sharded_optimizer_stage2.core = group_sharded_stage3.core = has_device
    group_sharded_optimizer_stage2.paddle = _instead(paddle, get_device=lambda: "cpu:0")
    # Fills the buffer in place; on a GPU it is filled on the host and moved.
    storage = group_sharded_storage.ParamStorage
    storage.add_rank_params = functools.partialmethod(storage.add_rank_params, convert_gpu=False)
    options = {"group": group, "dp_group": dp_group, "device": "cpu"}
    if level == "os_g":
        optimizer = group_sharded_optimizer_stage2.GroupShardedOptimizerStage2(
            params=parameters_of(optimizer), optim=optimizer, **options
        )
        model = group_sharded_stage2.GroupShardedStage2(model, optimizer, **options)
    else:
        # Slices what has more than 100 elements: on a GPU it would be 2 ** 20, more than a test's whole network.
        model = group_sharded_stage3.GroupShardedStage3(
            model, optimizer=optimizer, segment_size=100, exclude_layer=exclude_layer, sync_comm=sync_comm, **options
        )
    return model, optimizer, scaler
