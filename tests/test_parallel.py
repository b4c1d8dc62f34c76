"""What is split over ranks, and what can't be."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from support.runs import TINY_MODELS

from config.schema import resolve_config
from models import build_model
from models.parallel import Split
from models.sizes import check_tensor_parallel
from training import EMA
from training.parallel.degrees import Degrees, resolve_degrees
from training.parallel.shares import LocalShard


def resolved(**model):
    return resolve_config({"model": model})["model"]


SIZES = {"sample_size": 8, "patch_size": 2, "num_layers": 1, "num_attention_heads": 6, "attention_head_dim": 8}


@pytest.mark.parametrize(
    ("model", "degree", "message"),
    [
        ({"type": "DiT", **SIZES}, 4, "num_attention_heads 6 is not divisible"),
        ({"type": "SiT", **SIZES, "mlp_ratio": 4.05}, 3, r"mlp_ratio, 194 is not divisible"),
        ({"type": "LightningDiT", **SIZES}, 3, r"hidden size \* mlp_ratio \* 2/3 \(swiglu\), 128 is not divisible"),
        ({"type": "LargeDiT", **SIZES, "num_kv_heads": 2}, 3, "num_kv_heads 2 is not divisible"),
        ({"type": "LargeSiT", **SIZES, "multiple_of": 1}, 6, r"feed-forward width .* 128 is not divisible"),
    ],
)
def test_what_can_not_be_split_is_refused_with_the_reason(model, degree, message):
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(resolved(**model), degree)
    check_tensor_parallel(resolved(**model), 1)


@pytest.mark.parametrize(
    ("axis", "segments", "shape"), [(1, 1, (3, 8)), (1, 3, (5, 24)), (0, 1, (8, 3)), (0, 3, (24,))]
)
def test_parts_make_the_whole_again(axis, segments, shape):
    whole = np.arange(np.prod(shape)).reshape(shape)
    splits = [Split(axis, segments, SimpleNamespace(nranks=4, rank=rank)) for rank in range(4)]
    parts = [split.part(whole) for split in splits]
    assert sum(part.size for part in parts) == whole.size
    assert splits[0].whole_shape(parts[0].shape) == list(shape)
    np.testing.assert_array_equal(splits[0].merge(parts), whole)
    np.testing.assert_array_equal(splits[2].part(paddle.to_tensor(whole)), parts[2])


def test_a_rank_holds_its_heads_of_queries_keys_and_values():
    heads, head_dim = 4, 2
    head_of_column = np.tile(np.repeat(np.arange(heads), head_dim), 3)  # the columns of qkv
    part = Split(0, 3, SimpleNamespace(nranks=2, rank=1)).part(head_of_column)
    assert part.tolist() == [2, 2, 3, 3] * 3


def test_a_group_of_one_builds_the_plain_network(kind):
    paddle.seed(5)
    alone = build_model(TINY_MODELS[kind])
    paddle.seed(5)
    grouped = build_model(TINY_MODELS[kind], tensor_parallel_group=SimpleNamespace(nranks=1, rank=0))
    assert [type(layer) for layer in alone.sublayers()] == [type(layer) for layer in grouped.sublayers()]
    for (name, ours), (_, theirs) in zip(alone.named_parameters(), grouped.named_parameters(), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    shard = LocalShard(grouped)
    assert all(map(shard.owns, dict(grouped.named_parameters()))) and not shard.forward_is_collective


def test_averages_follow_the_master_weight_of_a_slice_whatever_its_tensor_is_called():
    layer = paddle.nn.Linear(2, 3)
    ema = EMA(layer, decay=0.5)
    parameter = layer.weight
    parameter.fw_storage = paddle.zeros([4]).clone()  # as sharding stage 3 leaves it after a forward pass
    ema.shadow["weight"] = paddle.zeros([4])
    ema.update(layer, {f"slice@{parameter.name}": paddle.full([4], 8.0)})
    assert ema.state_dict()["weight"].tolist() == [4.0] * 4


def test_degrees_and_their_notes():
    def degrees(world_size, **given):
        defaults = dict.fromkeys(("pipeline_parallel_degree", "sep_parallel_degree", "tensor_parallel_degree"), 1)
        more = {"sharding": "", "sharding_parallel_degree": None, "dp_degree": None, "sharding_parallel_config": ""}
        more.update(dict.fromkeys(("transformer_engine_backend", "use_fp8")))
        args = SimpleNamespace(**{**defaults, **more, **given})
        return resolve_degrees(args, resolved(type="DiT", **SIZES), world_size)

    assert degrees(1) == Degrees()
    assert degrees(8, tensor_parallel_degree=2, sharding="stage2") == Degrees(2, 4, "stage2", data_ranks=4)
    assert degrees(8, sharding_parallel_degree=2) == Degrees(1, 2, "stage1", data_ranks=8)
    config = "enable_stage1_overlap disable_stage1_reduce_avg"  # overlap: PaddleMIX's launch line
    found = degrees(4, sharding="stage1", sharding_parallel_config=config, dp_degree=2)
    assert found.sharding_settings == "disable_stage1_reduce_avg"
    assert "the data-parallel degree is 1" in found.notes[0] and "enable_stage1_overlap left out" in found.notes[1]
    with pytest.raises(ValueError, match="--sharding_parallel_degree 3 does not divide the 8 processes"):
        degrees(8, sharding_parallel_degree=3)
    with pytest.raises(ValueError, match="--sharding stage3 with --sharding_parallel_degree 1 shards nothing"):
        degrees(8, sharding="stage3", sharding_parallel_degree=1)
    with pytest.raises(ValueError, match="num_attention_heads 6 is not divisible"):
        degrees(8, tensor_parallel_degree=4)
