"""The memory planner: counts against built networks, activations against Paddle's allocator, degrees, the tool."""

import dataclasses
import gc
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import paddle
import pytest
from paddle.base import core
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.dygraph_sharding_optimizer import (
    DygraphShardingOptimizer as Stage1,
)
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_optimizer_stage2 import (
    GroupShardedOptimizerStage2 as Stage2,
)
from support.memory_runs import CASES, resolved
from support.runs import ROOT, TINY, TINY_MODELS, command_environment, loop_arguments, run_script, write_config
from support.versions import PADDLE_2

from config.schema import load_config, resolve_config
from models import build_model, cpu_ops
from models.state import expected_shapes
from objectives import Batch, build_objective
from tools import plan_memory
from training.checkpoints.saver import CheckpointSaver
from training.parallel.memory_plan import KINDS, Plan, Setting, Sizes, activations, states
from training.parallel.step_time import (
    Machine,
    fitting,
    ring_all_reduce,
    ring_gather,
    step_flops,
    step_seconds,
    traffic,
)

CONFIGS = sorted((ROOT / "config").glob("*.json"))
GIB = 2**30
DIT_XL = load_config(ROOT / "config/DiT_XL_patch2.json")
LIGHTNING_XL = load_config(ROOT / "config/LightningDiT_XL_patch1_f16d32.json")
LARGE_3B = load_config(ROOT / "config/LargeDiT_3B_patch2.json")


def config_of(kind="DiT", routing=None, **model):
    return resolve_config({"model": {**TINY_MODELS[kind], **model}, "training": {"routing": routing}})


# The network's parameters


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configs_parameters_are_those_of_its_network(path):
    config = load_config(path)
    assert {p.name: p.shape for p in Sizes(config).parameters} == expected_shapes(config["model"])


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_parameters_come_in_the_networks_order_and_know_what_is_trained(kind):
    """Sharding deals them out in this order."""
    config = config_of(kind)
    built = [(name, tuple(p.shape), not p.stop_gradient) for name, p in build_model(config).named_parameters()]
    assert [(p.name, p.shape, p.trainable) for p in Sizes(config).parameters] == built


SWITCHES = ("qk_norm", "swiglu", "rope", "rms_norm", "adaln_shift")


def test_parameters_of_every_combination_of_switches():
    for values in itertools.product((False, True), repeat=len(SWITCHES)):
        config = config_of("DiT", num_layers=1, **dict(zip(SWITCHES, values, strict=True)))
        built = [(name, tuple(p.shape)) for name, p in build_model(config).named_parameters()]
        assert [(p.name, p.shape) for p in Sizes(config).parameters] == built


# Activations


counts_peaks = pytest.mark.skipif(PADDLE_2, reason="Paddle 2.6 can't count a peak anew; what is planned is Paddle 3's")


def allocated(which):
    return getattr(core, f"host_memory_stat_{which}_value")("Allocated", 0)


def measured_activations(config, batch, recompute):
    """Bytes at the end of a forward pass and at the peak of a training step, beside weights and gradients."""
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


@counts_peaks
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
@pytest.mark.parametrize(
    "kind, model",
    [
        ("DiT", {"sample_size": 16, "num_layers": 3}),
        ("DiT", {"sample_size": 16, "learn_sigma": False}),
        ("SiT", {"sample_size": 32, "patch_size": 4, "mlp_ratio": 2.5}),
        ("LargeDiT", {"sample_size": 16, "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 3}),
        ("LargeSiT", {"sample_size": 16}),
        ("LightningDiT", {"sample_size": 16, "in_channels": 16, "num_layers": 3}),
        ("LightningDiT", {"sample_size": 16, "attention_head_dim": 32, "rms_norm": False, "adaln_shift": False}),
        ("DiT", {"sample_size": 16, "num_layers": 3, "rms_norm": True, "qk_norm": True}),
        ("SiT", {"sample_size": 16, "patch_size": 1, "swiglu": True, "adaln_shift": False}),
        ("SiT", {"sample_size": 32, "num_layers": 4, "routing": {"blocks": [2, 3]}}),
        ("LightningDiT", {"sample_size": 16, "num_layers": 4, "sprint_blocks": [2, 3], "routing": {"share": 0.75}}),
        ("DiT", {"sample_size": 16, "sprint_blocks": [2, 2]}),
    ],
    ids="DiT DiT-no-variance SiT LargeDiT-qk_norm-GQA LargeSiT LightningDiT layer-norms RMS SwiGLU TREAD SPRINT "
    "SPRINT-all".split(),
)
def test_activations_are_what_paddle_allocates(kind, model, recompute, monkeypatch):
    config = config_of(kind, **model)
    if kind == "LightningDiT":
        config["objective"]["cosine_loss"] = True  # as in its presets
    if model.get("patch_size") == 4:
        config["objective"]["prediction"] = "x1"
    kept, _, peak = activations(Sizes(config), Setting(batch=8, recompute=recompute, device="cpu"))
    monkeypatch.setattr(cpu_ops, "faster", lambda: False)
    measured_kept, measured_peak = measured_activations(config, 8, recompute)
    # The batch is planned too; labels, timesteps and a few more numbers a sample are not.
    assert sum(kept) == pytest.approx(measured_kept, rel=0.03)
    assert sum(peak) == pytest.approx(measured_peak, rel=0.03)


MEASURED = [line.split("|") for line in (ROOT / "docs/memory.md").read_text().splitlines() if line.count("|") == 9]


def test_the_plan_is_within_4_percent_of_every_measured_run():
    rows = {(model.strip(), case.strip()): float(peak) for _, model, case, _, _, peak, *_ in MEASURED[2:]}
    assert len(rows) == len(CASES) == 36
    for case in CASES:
        measured = rows[case["model"]["type"], case["name"]]
        assert Plan(*resolved(case)).peak / 2**20 == pytest.approx(measured, rel=0.04), case["name"]


@counts_peaks
def test_a_training_runs_peak_is_the_plans(features, run_loop, tmp_path, monkeypatch):
    """The loop's weights, gradients, moments, averages, and a step. The host's copies of a checkpoint are left out."""
    path, peaks = write_config(tmp_path / "config.json", "LargeDiT", ema_profiles=[0.05, 0.1]), []
    monkeypatch.setattr(CheckpointSaver, "save", lambda *args, **options: peaks.append(allocated("peak")))
    gc.collect()
    before = allocated("current")
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    monkeypatch.setattr(cpu_ops, "faster", lambda: False)
    run_loop("notrainer", loop_arguments("notrainer", config=path, features=features, output=tmp_path, steps=3))
    config = load_config(path)
    setting = Setting.of(config["training"], batch=8, device="cpu")
    assert Plan(config, setting).peak == pytest.approx(peaks[0] - before, rel=0.03)


@pytest.mark.parametrize(
    "config, model, tokens_width, scores",
    [
        (DIT_XL, {}, (80, 48, 40), (4, 6, 2)),
        (LARGE_3B, {}, (96, 60, 60), (4, 6, 2)),
        # The norms' inputs, and the rotations and norms of a quarter of the keys.
        (LARGE_3B, {"qk_norm": True, "num_kv_heads": 8}, (98, 62, 59.5), (4, 6, 2)),
        (LIGHTNING_XL, {}, (96, 64, 60), (4, 6, 2)),
        (LIGHTNING_XL, {"qk_norm": True}, (112, 80, 76), (4, 6, 2)),
        (LIGHTNING_XL, {"qk_norm": True, "rms_norm": False}, (96, 64, 52), (4, 6, 2)),
        (DIT_XL, {"rope": True}, (88, 56, 48), (4, 6, 2)),
    ],
    ids="DiT LargeDiT LargeDiT-qk_norm-GQA LightningDiT LightningDiT-qk_norm layer-norms-qk_norm DiT-rope".split(),
)
def test_a_block_keeps_what_the_tables_of_the_documentation_add_up_to(config, model, tokens_width, scores):
    """In bytes over N T D, and over N heads T^2; row statistics and conditioning are below 0.4."""
    sizes = Sizes({**config, "model": {**config["model"], **model}})
    unit = 4 * sizes.tokens * sizes.hidden
    inner = sizes.mlp - sizes.hidden * (8 / 3 if sizes.large or sizes.swiglu else 4)
    for mode, (precision, level) in enumerate((("float32", "O1"), ("bfloat16", "O1"), ("bfloat16", "O2"))):
        setting = Setting(batch=4, precision=precision, level=level)
        _, (keeps, *_), _ = activations(sizes, setting)
        expected = tokens_width[mode] + (12, 6, 6)[mode] * inner / sizes.hidden
        assert keeps[0] / unit == pytest.approx(expected, abs=0.4)
        assert keeps[1] / (4 * sizes.heads * sizes.tokens**2) == scores[mode]
        matrices = sum(p.numel() for p in sizes.parameters if p.block == 0 and len(p.shape) == 2)
        assert keeps[2] == (2 * matrices if mode == 1 else 0)
        _, (keeps, *_), _ = activations(sizes, dataclasses.replace(setting, recompute=True))
        assert sum(keeps) == unit * sizes.block.residual[mode]


def test_half_precision_and_fused_attention_are_a_gpus():
    config = config_of()
    wanted = Setting(batch=4, precision="bfloat16", level="O2", fused_attention=True)
    gpu, cpu = Plan(config, wanted), Plan(config, dataclasses.replace(wanted, device="cpu"))
    plain = Plan(config, Setting(batch=4, device="cpu"))
    assert cpu.peak == plain.peak and cpu.phases == plain.phases
    assert gpu.states["weights"] < cpu.states["weights"] and gpu.states["master weights"] > 0
    assert gpu.kept["attention scores"] == 0 < cpu.kept["attention scores"] and set(gpu.kept) == set(KINDS)


# Parallel degrees


def test_sharding_spreads_what_its_stage_says():
    sizes = Sizes(DIT_XL)
    whole = states(sizes, Setting(precision="bfloat16", level="O2", profiles=2))
    assert whole["master weights"] == 2 * whole["gradients"] == whole["AdamW moments"] / 2
    stage1, stage2, stage3 = (
        states(sizes, Setting(8, sharding=stage, sharding_degree=8, precision="bfloat16", level="O2", profiles=2))
        for stage in ("stage1", "stage2", "stage3")
    )
    for held in (stage1, stage2, stage3):
        for kind in ("master weights", "AdamW moments", "EMA", "profiles of post-hoc EMA"):
            assert held[kind] == pytest.approx(whole[kind] / 8, rel=0.05), kind
    assert stage1["weights"] == stage2["weights"] == whole["weights"]
    assert stage1["gradients"] == whole["gradients"] and stage2["gradients"] < whole["gradients"] / 2
    for kind in ("weights", "gradients"):
        assert stage3[kind] == pytest.approx(whole[kind] / 8, rel=0.05)


@pytest.mark.parametrize("degree", [2, 3])
def test_owners_are_those_that_paddles_sharding_chooses(degree):
    config = config_of("DiT", num_layers=3)
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
        held = states(Sizes(config), Setting(degree, sharding=stage, sharding_degree=degree, ema=False))
        assert held["AdamW moments"] == 8 * loads[stage]
    assert loads["stage1"] < loads["stage2"]
    # All gradients of this small network are in buffers, as large as the fullest rank needs.
    assert held["gradients"] == 4 * (2 * degree - 1) * loads["stage2"]


def test_profiles_cost_as_much_as_the_ema_each_unless_they_stay_on_the_host():
    none, two = (Plan(DIT_XL, Setting(batch=2, profiles=count)) for count in (0, 2))
    assert two.states["profiles of post-hoc EMA"] == 2 * two.states["EMA"] == two.peak - none.peak
    away = Setting(batch=2, profiles=2, profiles_on_host=True)
    assert Plan(DIT_XL, away).peak == none.peak
    cpu, cpu_away = (Plan(DIT_XL, dataclasses.replace(setting, device="cpu")) for setting in (two.setting, away))
    assert cpu.states == cpu_away.states  # which has one memory


def test_averaged_gradients_take_a_copy_of_them():
    """paddle.DataParallel holds buckets all the time, recompute and tensor parallelism fuse them after the pass."""
    plain, recompute = (Plan(DIT_XL, Setting(2, batch=2, recompute=value)) for value in (False, True))
    gradients = plain.states["DataParallel's buckets"]
    assert gradients == plain.states["gradients"] == 4 * plain.trained
    assert recompute.states["DataParallel's buckets"] == 0
    assert recompute.phases["averaging the gradients"] == {"gradients": gradients, "fused gradients": gradients}
    assert "averaging the gradients" not in Plan(DIT_XL, Setting(1, batch=2, recompute=True)).phases


def test_gradients_are_held_between_micro_batches_only():
    """Between optimizer steps there are none; the activations go while the backward pass makes them."""
    plain, accumulated = (Plan(DIT_XL, Setting(batch=2, accumulation=count)) for count in (1, 2))
    gradients = 4 * plain.trained
    assert "gradients" not in plain.states and accumulated.states["gradients"] == gradients
    assert 0.9 * gradients < plain.phases["end of the backward pass"]["gradients"] < gradients  # without block 0's
    assert accumulated.peak - gradients < plain.peak < accumulated.peak


def test_the_start_of_a_sharded_run_holds_the_whole_network():
    setting = Setting(8, sharding="stage3", sharding_degree=8, precision="bfloat16", level="O2", recompute=True)
    planned = Plan(load_config(ROOT / "config/LargeDiT_7B_patch2.json"), setting)
    assert planned.peak_phase == "start"
    assert planned.peak == 4 * planned.parameters  # the average waits on the host


# Traffic and time


def test_traffic_is_that_of_ring_collectives():
    config = config_of()
    gradients = 4 * Plan(config, Setting()).trained

    def sent(world_size, **options):
        return [size for size, _ in traffic(Plan(config, Setting(world_size, **options))).values()]

    assert sent(1) == []
    assert sent(8, accumulation=4) == [ring_all_reduce(gradients, 8)]
    assert sent(4, sharding="stage1", sharding_degree=4) == [ring_gather(gradients, 4)] * 2  # together an all-reduce
    assert sent(8, sharding="stage2", sharding_degree=4, accumulation=3) == [
        3 * ring_gather(gradients, 4),
        ring_gather(gradients, 4),
        ring_all_reduce(gradients / 4, 2),
    ]
    for recompute, gathers in ((False, 2), (True, 3)):
        assert sent(4, sharding="stage3", sharding_degree=4, accumulation=3, recompute=recompute) == [
            3 * gathers * ring_gather(gradients, 4),
            3 * ring_all_reduce(gradients, 4),
        ]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["DiT", "LargeSiT"])
def test_tensor_parallel_traffic_of_a_block(kind, recompute):
    """Forward: two sums of (N, T, D), a gather of (N, 6D); backward: two sums of (N, T, D), one of (N, E)."""
    config = config_of(kind)
    sizes = Sizes(config)
    tokens, width = 8 * sizes.tokens * sizes.hidden * 4, 8 * sizes.hidden * 4
    forward = 2 * ring_all_reduce(tokens, 2) + ring_gather(6 * width, 2)
    backward = 2 * ring_all_reduce(tokens, 2) + ring_all_reduce(width, 2)
    planned = Plan(config, Setting(2, tensor_parallel=2, batch=8, accumulation=3, recompute=recompute))
    expected = 3 * sizes.layers * ((2 if recompute else 1) * forward + backward)
    assert traffic(planned) == {"activations (tensor parallel)": (expected, 2)}


def test_flops_and_seconds():
    half = Setting(batch=32, precision="bfloat16")
    planned = Plan(DIT_XL, half)
    # The paper's 118.6 G multiply-adds of a forward pass (Peebles and Xie 2022, Table 4); three passes, 2 each.
    assert step_flops(planned) == pytest.approx(32 * 3 * 2 * 118.64e9, rel=0.01)
    recompute = Plan(DIT_XL, dataclasses.replace(half, recompute=True))
    assert step_flops(recompute) / step_flops(planned) == pytest.approx(4 / 3, rel=0.01)
    halves = Plan(DIT_XL, dataclasses.replace(half, world_size=2, tensor_parallel=2))
    assert step_flops(halves) == pytest.approx(step_flops(planned) / 2, rel=0.01)
    machine = Machine(tflops=100.0, efficiency=0.5, bandwidth=10.0, network=1.0, per_node=2)
    assert step_seconds(planned, machine) == (pytest.approx(step_flops(planned) / 50e12), 0)
    for world, bandwidth in ((2, 10e9), (4, 1e9)):  # two fit into a node
        many = Plan(DIT_XL, dataclasses.replace(half, world_size=world))
        ((sent, _),) = traffic(many).values()
        assert step_seconds(many, machine)[1] == pytest.approx(sent / bandwidth)
    launches = Machine(tflops=1e9)
    assert step_seconds(planned, launches)[0] == pytest.approx(28 * 102 * launches.launch)


def test_only_what_fits_is_listed_fastest_first():
    setting = Setting(8, batch=32, precision="bfloat16", recompute=True, fused_attention=True)
    assert Plan(LARGE_3B, setting).peak > 78 * GIB
    found, least = fitting(LARGE_3B, setting, 78 * GIB, Machine())
    assert len(found) > 10
    assert all(planned.peak <= 78 * GIB and planned.setting.global_batch == 256 for planned, _ in found)
    seconds = [sum(step_seconds(planned, Machine())) for planned, _ in found]
    assert seconds == [second for _, second in found] == sorted(seconds)
    settings = [planned.setting for planned, _ in found]
    ways = {(s.tensor_parallel, s.sharding, s.sharding_degree, s.recompute) for s in settings}
    assert len(ways) == len(found)
    assert {way[0] for way in ways} == {1, 2, 4, 8} and {way[1] for way in ways} == {"", "stage1", "stage2", "stage3"}
    # Each with its largest micro-batch: twice of it does not fit, or there is no twice.
    for s in settings[:5]:
        if s.accumulation > 1:
            twice = dataclasses.replace(s, batch=2 * s.batch, accumulation=s.accumulation // 2)
            assert Plan(LARGE_3B, twice).peak > 78 * GIB
    assert least.peak <= min(planned.peak for planned, _ in found)
    fixed, _ = fitting(LARGE_3B, setting, 78 * GIB, Machine(), fixed={"tensor_parallel", "recompute"})
    assert fixed and all(p.setting.tensor_parallel == 1 and p.setting.recompute for p, _ in fixed)
    assert fitting(LARGE_3B, setting, GIB, Machine())[0] == []


# The tool


def run_tool(capsys, *arguments):
    plan_memory.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_tool_prints_tables_and_writes_json(capsys, tmp_path):
    target = tmp_path / "plan.json"
    flags = ["--config_file", ROOT / "config/DiT_XL_patch2.json", "--world_size", 4, "--gpu_memory", 24]
    out = run_tool(capsys, *flags, "--json", target, "--recompute", "False", "--top", 2)
    assert "675,129,632 parameters" in out and "4 GPUs, data parallel 4; 64 samples x 1 micro-batch a GPU" in out
    assert "bfloat16 O1, no recompute, EMA, fused attention" in out
    assert "this setting does not fit into 24 GiB" in out
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
        *("--fp16_opt_level", "O2", "--max_grad_norm", -1, "--dp_degree", 1, "--ema_profiles", "0.05,0.1"),
    )
    assert "tensor parallel 4, sharding stage1 x 2; 8 samples x 2 micro-batches a GPU, 32 a step" in out
    assert "float16 O2, recompute, no EMA" in out and "master weights" in out and "\n  EMA " not in out
    assert "2 profiles" in out and "\n  profiles of post-hoc EMA " in out


GQA = {"type": "LargeDiT", "num_attention_heads": 4, "attention_head_dim": 8, "num_kv_heads": 2}
ODD_WIDTH = {"type": "LargeDiT", "num_attention_heads": 4, "attention_head_dim": 8, "multiple_of": 1}


@pytest.mark.parametrize(
    "model, flags, words",
    [
        ({}, "--world_size 6 --tensor_parallel_degree 4", "4 does not divide the 6 processes"),
        ({}, "--world_size 6 --tensor_parallel_degree 3", "num_attention_heads 2 is not divisible"),
        (GQA, "--tensor_parallel_degree 4", "num_kv_heads 2 is not divisible"),
        (ODD_WIDTH, "--tensor_parallel_degree 4", "ffn_dim_multiplier) 85 is not divisible"),
        ({"mlp_ratio": 0.53125}, "--tensor_parallel_degree 2", "hidden size * mlp_ratio, 17 is not divisible"),
        ({}, "--sharding stage2 --sharding_parallel_degree 3", "3 does not divide the 8 processes"),
        ({}, "--sharding stage4", "--sharding must be '' or stage1, stage2, stage3, got 'stage4'"),
        ({}, "--world_size 3", "256 is not divisible by 3 data-parallel ranks x 1"),
        ({}, "--gradient_accumulation_steps 7", "256 is not divisible by 8 data-parallel ranks x 7"),
        ({}, "--pipeline_parallel_degree 2", "--pipeline_parallel_degree must be 1, got 2"),
        ({}, "--dp_degree 4", "the data-parallel degree is 8"),
        ({}, "--world_size 0", "--world_size must be a positive integer, got 0"),
        ({}, "--gpu_memory 0.0001 --reserve 0", "no setting fits into 0.0001 GiB"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(model, flags, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": {"type": "DiT", **TINY, **model}}))
    with pytest.raises(ValueError) as error:
        plan_memory.main(["--config_file", str(path), *flags.split()])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_command_answers_without_paddle():
    code = "import sys, tools.plan_memory as t; t.main(['--gpu_memory', '80']); assert 'paddle' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=command_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wrong = run_script("tools/plan_memory.py", ["--tensor_parallel_degree", 3])
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1
