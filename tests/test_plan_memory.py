"""The memory planner: counts against built networks, activations against Paddle's allocator, degrees, the tool."""

import dataclasses
import json
import math
import subprocess
import sys
import time

import pytest
from support.runs import ROOT, TINY, TINY_MODELS, command_environment, run_script

from benchmarks.memory import measure, planned_for
from config.schema import load_config, resolve_config
from tools import plan_memory
from training.parallel import memory_tape
from training.parallel.memory_plan import (
    Machine,
    Setting,
    Sizes,
    check,
    fitting,
    parameters,
    plan,
    states,
    step_seconds,
)
from training.parallel.memory_tape import activations, ring_all_reduce, ring_gather

CONFIGS = sorted((ROOT / "config").glob("*.json"))
GIB = 2**30


def config_of(kind="DiT", training=None, **model):
    return resolve_config({"model": {**TINY_MODELS[kind], **model}, "training": training or {}})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configs_parameters_are_those_of_its_network(path):
    from models.state import expected_shapes

    config = load_config(path)
    assert {p.name: p.shape for p in parameters(Sizes.of(config))} == expected_shapes(config["model"])


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_parameters_come_in_the_networks_order_and_know_what_is_trained(kind):
    """Sharding deals them out in this order."""
    from models import build_model

    config = config_of(kind)
    built = [(name, tuple(p.shape), not p.stop_gradient) for name, p in build_model(config).named_parameters()]
    assert [(p.name, p.shape, p.trainable) for p in parameters(Sizes.of(config))] == built


@pytest.mark.parametrize(
    "name, count", [("DiT_XL_patch2", 675_129_632), ("LargeDiT_3B_patch2", None), ("LargeDiT_7B_patch2", None)]
)
def test_large_networks_are_counted_without_building_them(name, count):
    """All blocks of 7 billion parameters in a moment, no memory taken; the count is the formula's."""
    import paddle
    from paddle.base import core

    from models import build_model

    config = load_config(ROOT / "config" / f"{name}.json")
    before, start = core.host_memory_stat_current_value("Allocated", 0), time.perf_counter()
    with paddle.LazyGuard():
        built = sum(p.size for p in build_model(config).parameters())
    assert core.host_memory_stat_current_value("Allocated", 0) - before < 2**20
    assert time.perf_counter() - start < 10
    planned = plan(config, Setting())
    assert planned.parameters == built == (count or built)


def measured_activations(config, batch, recompute):
    """Bytes at the end of a forward pass and at the peak of a training step, beside weights and gradients."""
    import paddle
    from paddle.base import core

    from models import build_model
    from objectives import Batch, build_objective

    def allocated(which):
        return getattr(core, f"host_memory_stat_{which}_value")("Allocated", 0)

    model = build_model(config, enable_recompute=recompute, single_backward=True)  # as both loops build it
    model.train()
    objective = build_objective(config)
    side = config["model"]["sample_size"]
    for _ in range(2):  # the second step finds the gradients of the first
        before = allocated("current")
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        x = paddle.randn([batch, config["model"]["in_channels"], side, side])
        loss = objective.training_losses(model, Batch(x, paddle.randint(0, 10, [batch])))["loss"].mean()
        forward = allocated("current") - before
        loss.backward()
        peak = allocated("peak") - before
        for parameter in model.parameters():
            parameter.clear_gradient(True)
        del x, loss
    return forward, peak


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
@pytest.mark.parametrize(
    "kind, model",
    [
        ("DiT", {"sample_size": 16, "num_layers": 3}),
        ("DiT", {"sample_size": 16, "learn_sigma": False}),
        ("SiT", {"sample_size": 16, "patch_size": 4, "mlp_ratio": 2.5}),
        ("LargeDiT", {"sample_size": 16, "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 3}),
        ("LargeSiT", {"sample_size": 16}),
    ],
    ids=["DiT", "DiT-no-variance", "SiT", "LargeDiT-qk_norm-GQA", "LargeSiT"],
)
def test_activations_are_what_paddle_allocates(kind, model, recompute, monkeypatch):
    config = config_of(kind, **model)
    from models import cpu_ops

    played = activations(Sizes.of(config), 8, recompute=recompute, fused_attention=False, device="cpu")
    monkeypatch.setattr(cpu_ops, "faster", lambda: False)
    forward, peak = measured_activations(config, 8, recompute)
    # The batch is planned too; labels, timesteps and a few more numbers a sample are not.
    assert sum(played.kept.values()) == pytest.approx(forward, rel=0.03)
    assert sum(played.peak.values()) == pytest.approx(peak, rel=0.02)


def test_a_training_runs_peak_is_the_plans():
    """The whole of it: the loop's weights, gradients, moments, EMA, and a step; in a process of its own."""
    case = {"name": "test", "model": TINY_MODELS["LargeDiT"], "batch": 8, "ranks": 1, "settings": {}}
    assert planned_for(case).peak == pytest.approx(measure(case), rel=0.03)


@pytest.mark.parametrize("kind", ["DiT", "LargeDiT"])
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_that_are_counted_take_what_played_ones_take(kind, recompute, monkeypatch):
    sizes = Sizes.of(config_of(kind, num_layers=6))
    options = {"recompute": recompute, "fused_attention": True, "precision": "bfloat16", "group": 2}
    counted = activations(sizes, 4, **options)
    monkeypatch.setattr(memory_tape, "_PLAYED", 6)
    played = activations(sizes, 4, **options)
    assert (counted.kept, counted.peak) == (played.kept, played.peak)
    assert counted.sent == pytest.approx(played.sent)


def kept_per_token(config, **options):
    """Bytes that a block keeps over N x T x D, by kind; conditioning and row statistics are under 0.1."""
    sizes = Sizes.of(config)
    unit = 4 * sizes.tokens * sizes.hidden
    played = activations(sizes, 4, recompute=False, **options)
    return {kind: size / unit for kind, size in played.per_block.items()}


def test_a_dit_block_keeps_what_its_operators_need():
    """20 tensors of width D and the softmax: 80 bytes in float32, 40 in O2, 48 in O1, where the residual is float32."""
    config = load_config(ROOT / "config/DiT_XL_patch2.json")
    scores = 16 * 256 / 1152
    plain = kept_per_token(config, fused_attention=False)
    assert plain["activations"] == pytest.approx(80, abs=0.2)
    assert plain["attention scores"] == pytest.approx(4 * scores)
    o1 = kept_per_token(config, fused_attention=True, precision="bfloat16")
    assert o1["activations"] == pytest.approx(48, abs=0.3) and o1["attention scores"] == 0
    # Every product keeps its weights' half copy: all of the block's matrices, for the batch of 4.
    matrices = 18 * 1152**2 + (3 + 1 + 4 + 1 + 6) * 1152
    assert o1["cast weights"] == pytest.approx(2 * matrices / (4 * 256 * 1152), rel=0.01)
    o1_plain = kept_per_token(config, fused_attention=False, precision="bfloat16")
    assert o1_plain["attention scores"] == pytest.approx(6 * scores)  # the softmax, and its copy for the product
    o2 = kept_per_token(config, fused_attention=True, precision="bfloat16", level="O2")
    assert o2["activations"] == pytest.approx(40, abs=0.2) and o2["cast weights"] == 0


def test_a_large_dit_block_keeps_what_its_operators_need():
    """The tables of docs/memory.md: norms and rotary positions stay float32, the norms of q and k only under O1."""
    config = load_config(ROOT / "config/LargeDiT_3B_patch2.json")
    inner = Sizes.of(config).mlp / Sizes.of(config).hidden
    single = kept_per_token(config, fused_attention=True)["activations"]
    assert single == pytest.approx(64 + 12 * inner, abs=0.2)
    for level in ("O1", "O2"):
        half = kept_per_token(config, fused_attention=True, precision="bfloat16", level=level)["activations"]
        assert half == pytest.approx(44 + 6 * inner, abs=0.2)
        config["model"]["qk_norm"], config["model"]["num_kv_heads"] = True, 8
        grouped = kept_per_token(config, fused_attention=True, precision="bfloat16", level=level)["activations"]
        # The norms' inputs, and a quarter of the rotary pairs of k.
        assert grouped - half == pytest.approx((4 if level == "O1" else 2) * 1.25 - 3, abs=0.05)
        config["model"]["qk_norm"], config["model"]["num_kv_heads"] = False, None


def test_half_precision_and_fused_attention_are_a_gpus():
    config = config_of()
    wanted = Setting(batch=4, precision="bfloat16", level="O2", fused_attention=True)
    gpu, cpu = plan(config, wanted), plan(config, dataclasses.replace(wanted, device="cpu"))
    plain = plan(config, Setting(batch=4, device="cpu"))
    assert cpu.peak == plain.peak and cpu.phases == plain.phases
    assert gpu.states["weights"] < cpu.states["weights"] and gpu.states["master weights"] > 0
    assert gpu.kept["attention scores"] == 0 < cpu.kept["attention scores"]


def numels(sizes, which=lambda p: True):
    return sum(math.prod(p.shape) for p in parameters(sizes) if p.trainable and which(p))


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_tensor_parallelism_divides_the_split_parameters_and_their_states(kind):
    sizes = Sizes.of(config_of(kind, class_dropout_prob=0.1))
    split, rest = numels(sizes, lambda p: p.split), numels(sizes, lambda p: not p.split)
    held = states(sizes, Setting(world_size=2, tensor_parallel=2, ema=False))
    assert held["gradients"] == 4 * (split // 2 + rest)
    assert held["AdamW moments"] == 8 * (split // 2 + rest)
    assert split > rest


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_the_planner_refuses_the_degrees_that_the_network_refuses(kind):
    from models.parallel import check_tensor_parallel

    config = config_of(kind, num_attention_heads=6, attention_head_dim=4)

    def accepts(test, *arguments):
        try:
            test(*arguments)
        except ValueError:
            return False
        return True

    sizes, degrees = Sizes.of(config), range(1, 13)
    accepted = [degree for degree in degrees if accepts(check, sizes, Setting(degree, tensor_parallel=degree))]
    assert accepted == [degree for degree in degrees if accepts(check_tensor_parallel, config["model"], degree)]
    assert len(accepted) > 1


def test_sharding_spreads_what_its_stage_says():
    config = load_config(ROOT / "config/DiT_XL_patch2.json")
    sizes = Sizes.of(config)
    whole = states(sizes, Setting(precision="bfloat16", level="O2"))
    assert whole["master weights"] == 2 * whole["gradients"] == whole["AdamW moments"] / 2
    spread = {
        stage: states(sizes, Setting(8, sharding=stage, sharding_degree=8, precision="bfloat16", level="O2"))
        for stage in ("stage1", "stage2", "stage3")
    }
    for held in spread.values():
        for kind in ("master weights", "AdamW moments", "EMA"):
            assert held[kind] == pytest.approx(whole[kind] / 8, rel=0.04), kind
    assert spread["stage1"]["weights"] == spread["stage2"]["weights"] == whole["weights"]
    assert spread["stage1"]["gradients"] == whole["gradients"]
    assert spread["stage2"]["gradients"] < whole["gradients"] / 2
    assert spread["stage3"]["weights"] == pytest.approx(whole["weights"] / 8, rel=0.04)
    assert spread["stage3"]["gradients"] == pytest.approx(whole["gradients"] / 8, rel=0.04)


@pytest.mark.parametrize("degree", [2, 3])
def test_owners_are_those_that_paddles_sharding_chooses(degree):
    from types import SimpleNamespace

    from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.dygraph_sharding_optimizer import (
        DygraphShardingOptimizer as Stage1,
    )
    from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_optimizer_stage2 import (
        GroupShardedOptimizerStage2 as Stage2,
    )

    from models import build_model

    config = config_of("DiT", num_layers=3)
    sizes = Sizes.of(config)
    trained = [parameter for parameter in build_model(config).parameters() if not parameter.stop_gradient]
    dealt = {
        "stage1": Stage1._partition_parameters(SimpleNamespace(_sharding_world_size=degree, _parameter_list=trained)),
        "stage2": Stage2._segment_params(
            SimpleNamespace(_GroupShardedOptimizerStage2__segment_params=[], world_size=degree, _local_params=trained)
        ),
    }
    loads = {}
    for stage, shares in dealt.items():
        shares = shares.values() if isinstance(shares, dict) else shares
        loads[stage] = max(sum(parameter.size for parameter in share) for share in shares)
        held = states(sizes, Setting(degree, sharding=stage, sharding_degree=degree, ema=False))
        assert held["AdamW moments"] == 8 * loads[stage]
    assert loads["stage1"] < loads["stage2"]
    # All gradients of this small network are in buffers, as large as the fullest rank needs.
    assert held["gradients"] == 4 * (2 * degree - 1) * loads["stage2"]


def test_averaged_gradients_take_a_copy_of_them():
    """paddle.DataParallel holds buckets all the time, recompute and tensor parallelism fuse them after the pass."""
    config = load_config(ROOT / "config/DiT_XL_patch2.json")
    plain = plan(config, Setting(2, batch=2))
    gradients = plain.states["DataParallel's buckets"]
    assert gradients == plain.states["gradients"] == 4 * plain.trained
    recompute = plan(config, Setting(2, batch=2, recompute=True))
    assert recompute.states["DataParallel's buckets"] == 0
    averaging = recompute.phases["averaging the gradients"]
    assert averaging == {"gradients": gradients, "fused gradients": gradients}
    assert "averaging the gradients" not in plan(config, Setting(1, batch=2, recompute=True)).phases


def test_gradients_are_held_between_micro_batches_only():
    """Between optimizer steps there are none; the activations go while the backward pass makes them."""
    config = load_config(ROOT / "config/DiT_XL_patch2.json")
    plain, accumulated = (plan(config, Setting(batch=2, accumulation=count)) for count in (1, 2))
    gradients = 4 * plain.trained
    assert "gradients" not in plain.states and accumulated.states["gradients"] == gradients
    assert 0.9 * gradients < plain.phases["end of the backward pass"]["gradients"] < gradients  # without block 0's
    assert accumulated.peak - gradients < plain.peak < accumulated.peak


def test_the_start_of_a_sharded_run_holds_the_whole_network():
    planned = plan(
        load_config(ROOT / "config/LargeDiT_7B_patch2.json"),
        Setting(8, sharding="stage3", sharding_degree=8, batch=1, precision="bfloat16", level="O2", recompute=True),
    )
    assert planned.peak_phase == "start"
    assert planned.peak == 4 * planned.parameters  # the average waits on the host


def test_recompute_keeps_one_tensor_a_block():
    config = load_config(ROOT / "config/DiT_XL_patch2.json")
    sizes = Sizes.of(config)
    played = activations(sizes, 4, recompute=True, fused_attention=True)
    assert sum(played.per_block.values()) == 4 * sizes.tokens * sizes.hidden * 4


def test_traffic_is_that_of_ring_collectives():
    config = config_of()
    sizes = Sizes.of(config)
    gradients = 4 * numels(sizes)

    def sent(**options):
        return {name: size for name, (size, _) in plan(config, Setting(**options)).traffic.items()}

    assert sent(world_size=1) == {}
    assert sent(world_size=8, accumulation=4) == {"gradients (data parallel)": ring_all_reduce(gradients, 8)}
    stage1 = sent(world_size=4, sharding="stage1", sharding_degree=4)
    assert list(stage1.values()) == [ring_gather(gradients, 4)] * 2  # together an all-reduce
    stage2 = sent(world_size=8, sharding="stage2", sharding_degree=4, accumulation=3)
    assert list(stage2.values()) == [
        3 * ring_gather(gradients, 4),
        ring_gather(gradients, 4),
        ring_all_reduce(gradients / 4, 2),
    ]
    for recompute, gathers in ((False, 2), (True, 3)):
        stage3 = sent(world_size=4, sharding="stage3", sharding_degree=4, accumulation=3, recompute=recompute)
        assert list(stage3.values()) == [
            3 * gathers * ring_gather(gradients, 4),
            3 * ring_all_reduce(gradients, 4),
        ]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["DiT", "LargeSiT"])
def test_tensor_parallel_traffic_of_a_block(kind, recompute):
    """Forward: two sums of (N, T, D), a gather of (N, 6D); backward: two sums of (N, T, D), one of (N, E)."""
    config = config_of(kind)
    sizes = Sizes.of(config)
    tokens, width = 8 * sizes.tokens * sizes.hidden * 4, 8 * sizes.hidden * 4
    forward = 2 * ring_all_reduce(tokens, 2) + ring_gather(6 * width, 2)
    backward = 2 * ring_all_reduce(tokens, 2) + ring_all_reduce(width, 2)
    planned = plan(config, Setting(2, tensor_parallel=2, batch=8, accumulation=3, recompute=recompute))
    assert planned.traffic == {
        "activations (tensor parallel)": (3 * sizes.layers * ((2 if recompute else 1) * forward + backward), 2)
    }


def test_flops_and_seconds():
    config = load_config(ROOT / "config/DiT_XL_patch2.json")
    planned = plan(config, Setting(batch=32, precision="bfloat16"))
    # The paper's 118.6 G multiply-adds of a forward pass (Peebles and Xie 2022, Table 4); three passes, 2 each.
    assert planned.flops == pytest.approx(32 * 3 * 2 * 118.64e9, rel=0.01)
    recompute = plan(config, Setting(batch=32, precision="bfloat16", recompute=True))
    assert recompute.flops / planned.flops == pytest.approx(4 / 3, rel=0.01)
    halves = plan(config, Setting(2, tensor_parallel=2, batch=32, precision="bfloat16"))
    assert halves.flops == pytest.approx(planned.flops / 2, rel=0.01)
    machine = Machine(tflops=100.0, efficiency=0.5, bandwidth=10.0, network=1.0, per_node=2)
    assert step_seconds(planned, machine) == (pytest.approx(planned.flops / 50e12), 0)
    for world, bandwidth in ((2, 10e9), (4, 1e9)):  # two fit into a node
        many = plan(config, Setting(world, batch=32, precision="bfloat16"))
        ((sent, _),) = many.traffic.values()
        assert step_seconds(many, machine)[1] == pytest.approx(sent / bandwidth)


def test_only_what_fits_is_listed_fastest_first():
    config = load_config(ROOT / "config/LargeDiT_3B_patch2.json")
    setting = Setting(8, batch=32, precision="bfloat16", recompute=True, fused_attention=True)
    assert plan(config, setting).peak > 78 * GIB
    found, least = fitting(config, setting, 78 * GIB, Machine())
    assert len(found) > 10
    assert all(planned.peak <= 78 * GIB and planned.setting.global_batch == 256 for planned, _ in found)
    seconds = [sum(step_seconds(planned, Machine())) for planned, _ in found]
    assert seconds == [second for _, second in found] == sorted(seconds)
    ways = [
        (s.tensor_parallel, s.sharding, s.sharding_degree, s.recompute)
        for s in (planned.setting for planned, _ in found)
    ]
    assert len(set(ways)) == len(ways)
    assert {way[0] for way in ways} == {1, 2, 4, 8} and {way[1] for way in ways} == {"", "stage1", "stage2", "stage3"}
    # Each with its largest micro-batch: twice of it does not fit, or there is no twice.
    for planned, _ in found[:5]:
        s = planned.setting
        if s.accumulation > 1:
            twice = dataclasses.replace(s, batch=2 * s.batch, accumulation=s.accumulation // 2)
            assert plan(config, twice).peak > 78 * GIB
    assert least.peak <= min(planned.peak for planned, _ in found)
    fixed, _ = fitting(config, setting, 78 * GIB, Machine(), fixed={"tensor_parallel", "recompute"})
    assert fixed and all(p.setting.tensor_parallel == 1 and p.setting.recompute for p, _ in fixed)
    assert fitting(config, setting, GIB, Machine())[0] == []


def run_tool(capsys, *arguments):
    plan_memory.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_tool_prints_tables_and_writes_json(capsys, tmp_path):
    target = tmp_path / "plan.json"
    flags = ["--config_file", ROOT / "config/DiT_XL_patch2.json", "--world_size", 4, "--gpu_memory", 24]
    out = run_tool(capsys, *flags, "--json", target, "--operators", "--recompute", "False", "--top", 2)
    assert "675,129,632 parameters" in out and "4 GPUs, data parallel 4; 64 samples x 1 micro-batch a GPU" in out
    assert "bfloat16 O1, no recompute, EMA, fused attention" in out
    assert "mlp gelu" in out and "this setting does not fit into 24 GiB" in out
    written = json.loads(target.read_text())
    assert written["parameters"] == 675_129_632 and written["fits"] is False
    assert written["peak_bytes"] == sum(written["states"].values()) + sum(
        written["phases"][written["peak_phase"]].values()
    )
    listed = written["fitting"]
    assert listed and all(way["peak_bytes"] <= 22 * GIB for way in listed)
    assert all(way["setting"]["recompute"] is False for way in listed)  # was given
    assert {way["setting"]["tensor_parallel"] for way in listed} == {1, 2, 4}  # was not
    with pytest.raises(ValueError, match="exists already"):
        run_tool(capsys, *flags, "--json", target)


def test_the_tool_takes_the_trainers_command_line(capsys):
    out = run_tool(
        capsys,
        *("--do_train", "--feature_path", "data", "--output_dir", "out", "--per_device_train_batch_size", 8),
        *("--config_file", ROOT / "config/LargeDiT_3B_patch2.json", "--gradient_accumulation_steps", 2),
        *("--tensor_parallel_degree", 4, "--sharding", "stage1", "--use_ema", "False", "--fp16", "True"),
        *("--fp16_opt_level", "O2", "--max_grad_norm", -1, "--dp_degree", 1),
    )
    assert "tensor parallel 4, sharding stage1 x 2; 8 samples x 2 micro-batches a GPU, 32 a step" in out
    assert "float16 O2, recompute, no EMA" in out and "master weights" in out and "EMA   " not in out


GQA = {"type": "LargeDiT", "num_attention_heads": 4, "attention_head_dim": 8, "num_kv_heads": 2}
ODD_WIDTH = {"type": "LargeDiT", "num_attention_heads": 4, "attention_head_dim": 8, "multiple_of": 1}


@pytest.mark.parametrize(
    "model, flags, words",
    [
        ({}, "--world_size 6 --tensor_parallel_degree 4", "4 does not divide the 6 processes"),
        ({}, "--world_size 6 --tensor_parallel_degree 3", "num_attention_heads 2 is not divisible"),
        (GQA, "--tensor_parallel_degree 4", "num_kv_heads 2 is not divisible"),
        (ODD_WIDTH, "--tensor_parallel_degree 4", "the feed-forward width 85 is not divisible"),
        ({"mlp_ratio": 0.53125}, "--tensor_parallel_degree 2", "the MLP's width 17 is not divisible"),
        ({}, "--sharding stage2 --sharding_parallel_degree 3", "3 does not divide the 8 processes"),
        ({}, "--sharding stage4", "--sharding must be '' or stage1, stage2, stage3, got 'stage4'"),
        ({}, "--world_size 3", "256 is not divisible by 3 data-parallel ranks x 1"),
        ({}, "--gradient_accumulation_steps 7", "256 is not divisible by 8 data-parallel ranks x 7"),
        ({}, "--pipeline_parallel_degree 2", "--pipeline_parallel_degree must be 1, got 2"),
        ({}, "--dp_degree 4", "the data-parallel degree is 8"),
        ({}, "--world_size 0", "--world_size must be above 0, got 0"),
        ({}, "--bf16 True --fp16 True", "at most one of --bf16 and --fp16"),
        ({}, "--gpu_memory 0.0001 --reserve 0", "no setting fits into 0.0001 GiB"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(model, flags, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": {"type": "DiT", **TINY, **model}}))
    with pytest.raises(ValueError) as error:
        plan_memory.main(["--config_file", str(path), *flags.split()])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_command_answers_at_once_without_paddle():
    start = time.perf_counter()
    done = run_script("tools/plan_memory.py", ["--help"])
    assert done.returncode == 0 and time.perf_counter() - start < 2
    assert "--gpu_memory" in done.stdout and "--tensor_parallel_degree" in done.stdout
    code = "import sys, tools.plan_memory as t; t.main(['--gpu_memory', '80']); assert 'paddle' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=command_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wrong = run_script("tools/plan_memory.py", ["--tensor_parallel_degree", 3])
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1
