"""The groups of tools/self_check.py that train, launch, time and export: right on a CPU, and what they find."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from verification import gpus, loops, parallel, pipelines, speed
from verification.tiny_runs import TINY_MODELS
from verification.verdicts import OK, SKIPPED, WRONG, Settings, judge


def verdicts(group, folder, quick=True):
    """`{check: Verdict}` of a group on a CPU, in this process."""
    settings = Settings("cpu", quick, str(folder))
    return {check.name: judge(group.__name__, check) for check in group.checks(settings)}


class OnGPU(Settings):
    """Settings of a GPU, which Paddle's CPU stands for."""

    device, on_gpu = "cpu", True


def verdicts_of_gpu(group, folder, quick=True):
    """`{check: Verdict}` of a group that takes the CPU for a GPU: its ways are gone, not its kernels."""
    return {check.name: judge(group.__name__, check) for check in group.checks(OnGPU("gpu", quick, str(folder)))}


@pytest.fixture
def card(monkeypatch):
    """Makes this the card of a machine with so many."""

    def make(count=1, name="NVIDIA A100-SXM4-80GB", major=8, total_memory=80 * 2**30):
        found = SimpleNamespace(name=name, major=major, minor=0, total_memory=total_memory)
        monkeypatch.setattr(gpus, "card", lambda: found)
        monkeypatch.setattr(speed, "card", lambda: found)
        monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: count)

    return make


def statuses(found):
    return {name: verdict.status for name, verdict in found.items()}


# Loops.


def test_both_loops_give_the_same_bits_resumed_or_not(tmp_path):
    found = verdicts(loops, tmp_path)
    assert statuses(found) == dict.fromkeys(found, OK) and len(found) == 3
    assert all(verdict.text.startswith("the same bits, loss 0.9") for verdict in found.values())
    figures = found["DiT, float32: both loops"].figures
    assert figures["loss"] == figures["model"] == figures["ema"] == {"error": 0.0, "bound": 0.0}


def test_moments_that_a_resume_loses_are_found(tmp_path, monkeypatch):
    from training import session

    monkeypatch.setattr(session, "restore_training", lambda _, run: session.optimizer_state(run.optimizer, run.model))
    found = verdicts(loops, tmp_path)
    assert statuses(found) == {
        "DiT, float32: trainer resumed": WRONG,
        "DiT, float32: notrainer resumed": WRONG,
        "DiT, float32: both loops": OK,
    }
    figures = found["DiT, float32: trainer resumed"].figures
    assert figures["model"]["error"] > 2 * loops.BOUNDS["float32"][1]  # by more than a GPU's bound


def test_a_run_that_ends_early_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "read_losses", lambda _: {1: 1.0, 2: float("nan")})
    found = verdicts(loops, tmp_path)
    assert statuses(found) == dict.fromkeys(found, WRONG)
    assert found["DiT, float32: both loops"].text.startswith("expected finite losses of steps 1 to 10, got ")


def test_a_gpu_trains_in_bfloat16_too(tmp_path, card):
    card()
    found = verdicts_of_gpu(loops, tmp_path)  # which is float32 here
    assert statuses(found) == dict.fromkeys(found, OK) and len(found) == 9
    assert found["DiT, bfloat16 O2: trainer resumed"].figures["loss"]["bound"] == loops.BOUNDS["bfloat16"][0]
    card(major=7)
    found = verdicts_of_gpu(loops, tmp_path / "again")
    assert list(statuses(found).values()) == [OK] * 3 + [SKIPPED] * 6
    assert found["DiT, bfloat16 O1: both loops"].text == "compute capability 7.0; bfloat16 needs 8.0"


# Several processes.


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    found = verdicts(parallel, tmp_path, quick=False)
    assert statuses(found) == dict.fromkeys(parallel.CASES, OK)
    for verdict in found.values():
        assert verdict.text.startswith("2 processes: ") and verdict.figures["world_size"] == 2
        assert 0 < max(verdict.figures[key]["error"] for key in ("loss", "grad_norm"))


FAKE = """
import json, os, sys
runs, log = json.loads(sys.argv[1]), sys.argv[2]
print("a launcher", flush=True)
for loop, flags in runs:
    flags = dict(flag[2:].split("=", 1) for flag in flags)
    output = flags.get("output_dir") or flags["results_dir"]
    {}
    os.makedirs(output)
    off = 1.001 if "tensor" in output else 1
    with open(os.path.join(output, "metrics.jsonl"), "w") as file:
        for step in range(1, 5):
            file.write(json.dumps({{"step": step, "loss": off * step, "grad_norm": 2.0}}) + "\\n")
"""
SHARDED_FAILS = """
    if "stage2" in output:
        open(os.path.join(log, "workerlog.0"), "w").write("went well\\n")
        open(os.path.join(log, "workerlog.1"), "w").write("Traceback\\nRuntimeError: NCCL is out of order\\n")
        sys.exit(3)
"""
ALL_HANG = """
    __import__("time").sleep(60)
"""


@pytest.fixture
def launches(tmp_path, monkeypatch):
    """Runs the group with a launcher that writes metrics, after these words, and counts its starts."""

    def run(words="", check=verdicts):
        started = []

        def command(ranks, script, arguments, log):
            started.append((ranks, script))
            runs = [[script, arguments]] if "train" in script else json.loads(arguments[0].read_text())
            return [sys.executable, "-c", FAKE.format(words), json.dumps(runs), str(log)]

        def alone(self):
            folder = tmp_path / "alone"
            folder.mkdir()
            rows = [{"step": step, "loss": float(step), "grad_norm": 2.0} for step in range(1, 5)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return folder

        monkeypatch.setattr(parallel, "launch_command", command)
        monkeypatch.setattr(parallel.Launches, "_run_alone", alone)
        return check(parallel, tmp_path, quick=False), started

    return run


def test_other_losses_than_one_process_has_are_found(launches):
    found, started = launches()
    assert started == [(2, "verification/run_loops.py")]
    assert statuses(found) == {**dict.fromkeys(parallel.CASES, OK), "tensor parallel": WRONG}
    assert found["tensor parallel"].text == "loss 0.001, at most 1e-05"


def test_a_launch_that_fails_is_told_and_the_others_are_launched_again(launches):
    found, started = launches(SHARDED_FAILS)
    assert len(started) == 2
    text = "the launch ended with exit code 3: workerlog.1: RuntimeError: NCCL is out of order"
    assert (found["sharding stage2"].status, found["sharding stage2"].text) == (WRONG, text)
    assert statuses(found)["sharding stage1"] == statuses(found)["sharding stage3"] == OK


def test_a_launch_that_hangs_is_ended_and_told(launches, monkeypatch):
    monkeypatch.setattr(parallel, "SECONDS", 1)
    found, started = launches(ALL_HANG)
    assert len(started) == 2 and list(statuses(found).values()) == [WRONG] * 2 + [SKIPPED] * 4
    first, *_, last = found.values()
    assert first.text == "the launch hung, and was ended after 1 s: launcher.log: a launcher"
    assert last.text == "two launches hung already" and first.seconds < 10


@pytest.mark.parametrize("count", [2, 6, 16])
def test_gpus_get_a_launch_of_the_real_command_each(launches, card, count):
    card(count)
    found, started = launches(check=verdicts_of_gpu)
    ranks = {2: 2, 6: 4, 16: 8}[count]
    scripts = ["train_image_generation_notrainer.py"] + 5 * ["train_image_generation_trainer.py"]
    assert started == [(ranks, script) for script in scripts]
    assert statuses(found) == {**dict.fromkeys(parallel.CASES, OK), "tensor parallel": WRONG}
    assert found["sharding stage3"].text.startswith(f"{ranks} processes on {count} GPUs: loss 0")


def test_one_gpu_can_not_train_in_parallel(launches, card):
    card(1)
    found, started = launches(check=verdicts_of_gpu)
    assert started == [] and {(verdict.status, verdict.text) for verdict in found.values()} == {(SKIPPED, "one GPU")}


def test_the_gpu_is_free_for_launches(tmp_path, monkeypatch, card):
    """The run of one process is another one; a card that is asked about alone is in no launch."""
    card(2)
    commands = []
    monkeypatch.setattr(parallel.Launches, "_wait_for", lambda _, command, log: commands.append(command))
    parallel.Launches(OnGPU("gpu", False, str(tmp_path)))._run_alone()
    assert commands[0][1].endswith("train_image_generation_notrainer.py") and "--device=gpu" in commands[0]
    one = {check.name: judge("parallel", check) for check in parallel.checks(OnGPU("gpu:1", False, str(tmp_path)))}
    assert set(statuses(one).values()) == {SKIPPED}


# Speed and memory.


@pytest.fixture
def tiny_preset(tmp_path, monkeypatch):
    """A preset of a tiny network instead of those in config/."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "tiny.json").write_text(json.dumps({"model": TINY_MODELS["DiT"]}))
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    monkeypatch.setattr(speed, "PRESETS", ("tiny",))
    return tmp_path


STEP, MEMORY = "step, float32, plain attention", "memory, float32, plain attention"


def test_speed_is_told_and_the_plan_is_that_of_the_step(tiny_preset):
    found = verdicts(speed, tiny_preset)
    assert statuses(found)[STEP] == OK and found[STEP].text.startswith("tiny, batch 4: 0.")
    figures = found[STEP].figures
    assert figures["samples_per_s"] * figures["step_s"] == pytest.approx(4)
    assert 0 < figures["tflops"] < figures["product_tflops"]
    assert found[MEMORY].status in (OK, SKIPPED)
    if found[MEMORY].status == OK:
        figures = found[MEMORY].figures
        # What operators of a CPU save of the plan, and what a step of thousands of bytes holds beside it.
        assert 0.6 < figures["measured_bytes"] / figures["planned_bytes"] < 1.15


def test_a_plan_that_is_too_low_is_found(tiny_preset, monkeypatch):
    monkeypatch.setattr(speed, "measure", lambda *_, **options: (0.5, 1 << 30))
    found = verdicts(speed, tiny_preset)
    assert statuses(found) == {STEP: OK, MEMORY: WRONG}
    assert found[MEMORY].text.startswith("1.00 GiB at the peak, planned 0.0")
    assert found[MEMORY].text.endswith("the plan is more than 15% too low")
    monkeypatch.setattr(speed, "measure", lambda *_, **options: (0.5, None))
    found = verdicts(speed, tiny_preset)
    assert statuses(found) == {STEP: OK, MEMORY: SKIPPED} and "can't count" in found[MEMORY].text


def test_what_does_not_fit_is_told_and_half_of_it_tried(tiny_preset, monkeypatch):
    asked = []

    def measure(config, batch, *_, **options):
        asked.append(batch)
        if batch > 1:
            raise RuntimeError("ResourceExhaustedError: Out of memory error on GPU 0.")
        return 0.5, 1000

    monkeypatch.setattr(speed, "measure", measure)
    found = verdicts(speed, tiny_preset)
    assert asked == [4, 2, 1] and found[STEP].status == OK and found[STEP].figures["batch"] == 1
    did_not_fit = [f"batch {batch} did not fit, planned were 0.0 GiB" for batch in (4, 2)]
    assert found[STEP].text.split("; ")[1:] == did_not_fit


@pytest.mark.parametrize(("quick", "major", "dtype"), [(True, 8, "bfloat16"), (False, 7, "float16")])
def test_a_gpu_is_held_against_its_data_sheet(tmp_path, monkeypatch, card, quick, major, dtype):
    card(major=major)
    asked = []
    monkeypatch.setattr(speed, "measure", lambda *given, **options: asked.append(given[:2]) or (0.5, 20 << 30))
    monkeypatch.setattr(speed, "measure_product", lambda dtype, size: 200.0)
    found = verdicts_of_gpu(speed, tmp_path, quick)
    assert len(found) == 2 * len(asked) == (4 if quick else 10)
    step = found[f"step, {dtype} O2, fused attention"]
    assert step.status == OK and step.text.startswith(
        "DiT_XL_patch2, batch 128: 0.500 s a step, 256 samples/s, 182 TFLOP"
    )
    assert "(58% of the card's 312, 91% of a matrix product's 200 here)" in step.text
    assert {config["training"]["amp_dtype"] for config, _ in asked} == {dtype}
    memory = found[f"memory, {dtype} O1, attention and recompute as in the preset"]
    assert memory.status == WRONG and memory.text.startswith("20.00 GiB at the peak, planned 16.")


def test_an_error_is_told_once(tiny_preset, monkeypatch):
    def measure(*_, **options):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(speed, "measure", measure)
    found = verdicts(speed, tiny_preset)
    assert statuses(found) == {STEP: WRONG, MEMORY: SKIPPED}
    assert found[MEMORY].text == "the step could not be measured: RuntimeError"


def test_the_largest_preset_and_batch_that_fit_are_chosen():
    half = speed.Case("bfloat16", "O2", True, False)
    found = []
    for gib in (80, 24, 8, 1):
        preset, config, planned = speed.choose_preset(half, gib * speed.GIB, speed.PRESETS, speed.BATCHES)
        assert planned.peak <= gib * speed.GIB and config["training"]["amp_level"] == "O2"
        found.append((preset, planned.setting.batch))
    assert found[0] == ("DiT_XL_patch2", 128)
    assert found == sorted(found, key=lambda pair: (speed.PRESETS.index(pair[0]), -pair[1]))
    assert found[1][0] == "DiT_XL_patch2" and found[3][0].startswith("DiT_S")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA TITAN V", None),
    ],
)
def test_the_peak_of_a_card(name, peak):
    assert speed.card_peak(name) == peak


# Pipelines.


def test_latents_pipelines_and_programs_are_right(tmp_path):
    found = verdicts(pipelines, tmp_path)
    skipped = {name for name, verdict in found.items() if verdict.status == SKIPPED}
    assert statuses(found) == {**dict.fromkeys(found, OK), **dict.fromkeys(skipped, SKIPPED)}
    assert {"Paddle Inference, float16"} <= skipped
    assert skipped <= {"Paddle Inference, float16", "Paddle Inference, bfloat16", "FID's Inception"}
    assert found["latents to images"].figures["psnr"] > 19


def test_an_autoencoder_of_another_scale_is_found(tmp_path, monkeypatch):
    shutil.copytree(pipelines.VAE, tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "scaling_factor": 1.05 * config["scaling_factor"]}))
    monkeypatch.setattr(pipelines, "VAE", tmp_path / "vae")
    features = pipelines.Features(Settings("cpu", True, str(tmp_path)))
    with pytest.raises(pipelines.Wrong) as wrong:
        features.compare_latents()
    assert wrong.value.figures["mean"]["error"] > pipelines.LATENTS["gpu"]


def test_images_that_come_back_otherwise_are_found(tmp_path, monkeypatch):
    from features.autoencoder import LatentDecoder

    decode = LatentDecoder.decode
    monkeypatch.setattr(LatentDecoder, "decode", lambda self, latents, *rest: decode(self, 1.1 * latents, *rest))
    with pytest.raises(pipelines.Wrong):
        pipelines.Features(Settings("cpu", True, str(tmp_path))).compare_images()


def changed(export, spoil):
    """An export of weights that `spoil` has changed."""

    def exported(*arguments, **options):
        return export(*spoil(*arguments), **options)

    return exported


def test_exports_of_other_weights_are_found(tmp_path, monkeypatch):
    from sampling.pipelines import export, inference

    def other_state(config, state, *rest):
        return config, {name: 1.001 * value if "mlp" in name else value for name, value in state.items()}, *rest

    def other_network(generator, *rest):
        return replace(generator, network=pipelines.make_model(pipelines.make_config(), seed=1)), *rest

    monkeypatch.setattr(export, "export_pipeline", changed(export.export_pipeline, other_state))
    monkeypatch.setattr(inference, "export_inference", changed(inference.export_inference, other_network))
    settings = Settings("cpu", True, str(tmp_path))
    with pytest.raises(pipelines.Wrong):
        pipelines.compare_stock(settings)
    programs = pipelines.Programs(settings)
    with pytest.raises(pipelines.Wrong):
        programs.compare_latents()


def test_recorded_features_are_of_every_image():
    with np.load(pipelines.RECORDED) as recorded:
        assert recorded["mean"].shape == recorded["std"].shape == (pipelines.IMAGES, 4, 8, 8)
        assert (recorded["std"] > 0).all()
