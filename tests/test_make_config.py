"""tools/make_config.py: sensible choices for small and large sets, a config and commands that work, refusals."""

import dataclasses
import json
import os
import shlex

import pytest
from support.feature_sets import write_set
from support.runs import ROOT, write_config

from config.flags import read_flags
from config.schema import load_config, resolve_config
from models import build_model
from tools import make_config
from training import suggestion
from training.setup import build_dataset
from training.suggestion import Device, FeatureSet, Wishes, describe_set, find_device, measure_step, suggest

GIB = 2**30
CPU = Device("cpu", "CPU", 8 * GIB, machine=suggestion.Machine(tflops=0.1))


def feature_set(samples, side, num_classes, channels=4):
    return FeatureSet("set", samples, channels, side, num_classes, False, 4 * channels * samples * side * side)


def test_the_config_trains_and_its_commands_can_be_pasted(features, tmp_path, monkeypatch, capsys):
    folder, output = tmp_path / "it's mine", tmp_path / "my config.json"
    folder.symlink_to(features)
    monkeypatch.setattr(suggestion, "measure_step", lambda config, batch: 0.1)
    make_config.main(["--feature_path", str(folder), "--output", str(output), "--epochs", "10"])
    config = load_config(output)
    build_model(config)
    model = {key: config["model"][key] for key in ("sample_size", "in_channels", "num_classes")}
    assert model == {"sample_size": 8, "in_channels": 4, "num_classes": 10}  # of a set without a manifest
    said = capsys.readouterr().out.splitlines()
    assert any("measured here" in line for line in said)
    for line, loop in zip(said[-2:], ("trainer", "notrainer"), strict=True):
        words = shlex.split(line.partition(": ")[2])
        assert words[1].endswith(f"train_image_generation_{loop}.py")
        args, resolved = read_flags(loop, words[2:])
        assert (resolved, args.feature_path) == (config, str(folder))


def test_moments_and_mirrored_latents_are_found_without_a_manifest(tmp_path):
    write_set(tmp_path, flip=True, moments=True)
    found = describe_set(str(tmp_path))
    assert (found.channels, found.side, found.num_classes, found.flip) == (4, 8, 10, True)
    config = resolve_config(suggest(found, CPU, Wishes(), trial=False).config)
    dataset, _ = build_dataset(config, str(tmp_path), None)  # as a run reads it
    assert dataset.moments and dataset.flip


@pytest.mark.parametrize(("name", "samples"), [("DiT_digits", 1500), ("DiT_symbols", 2000), ("SiT_symbols", 2000)])
def test_the_sets_of_the_pages_get_their_own_configs(name, samples):
    tuned = load_config(ROOT / f"config/{name}.json")
    features = feature_set(samples, tuned["model"]["sample_size"], 10)
    found = resolve_config(suggest(features, CPU, Wishes(model=tuned["model"]["type"]), trial=False).config)
    quickstart = {"learning_rate": 2e-3, "max_steps": 2000, "global_batch_size": 64}
    assert found["training"] == {**tuned["training"], **quickstart}
    assert (found["model"], found["objective"]) == (tuned["model"], tuned["objective"])


@pytest.mark.parametrize(
    "wishes, world_size, gpu_memory, preset",
    [({}, 8, 80, "DiT_XL_patch2"), ({"model": "LargeDiT", "size": "7B"}, 8, 80, "LargeDiT_7B_patch2")],
)
def test_imagenet_gets_the_papers_recipe(wishes, world_size, gpu_memory, preset):
    """The presets' network; a network that fits no GPU whole is split over them, by the loop that can."""
    device = find_device(1_281_167, world_size=world_size, gpu_memory=gpu_memory)
    made = suggest(feature_set(1_281_167, 32, 1000), device, Wishes(**wishes))
    found, preset = resolve_config(made.config), load_config(ROOT / f"config/{preset}.json")
    assert (found["model"], found["objective"]) == (preset["model"], preset["objective"])
    training = found["training"]
    papers = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "global_batch_size": 256, "ema_decay": 0.9999}
    assert papers.items() <= training.items() and not training["ema_warmup"]
    assert made.planned.peak <= device.memory
    args = make_config.build_parser().parse_args(["--feature_path", "data"])
    commands = make_config.training_commands(args, feature_set(1_281_167, 32, 1000), made)
    assert len(commands) == (1 if made.planned.setting.sharding else 2)
    assert ("--sharding stage1" in commands[0]) == (wishes != {})


@pytest.mark.parametrize(("preset", "side", "channels"), [("patch1_f16d32", 16, 32), ("patch2", 32, 4)])
def test_lightning_dit_gets_its_own_papers_recipe(preset, side, channels):
    device = find_device(1_281_167, world_size=8, gpu_memory=80)
    made = suggest(feature_set(1_281_167, side, 1000, channels), device, Wishes(model="LightningDiT"))
    found, preset = resolve_config(made.config), load_config(ROOT / f"config/LightningDiT_XL_{preset}.json")
    assert (found["model"], found["objective"]) == (preset["model"], preset["objective"])
    for key in ("learning_rate", "adam_beta2", "global_batch_size", "max_steps", "lr_scheduler_type", "ema_decay"):
        assert found["training"][key] == preset["training"][key], key
    small = suggest(feature_set(1500, 8, 10), CPU, Wishes(model="LightningDiT"), trial=False).config
    assert small["objective"] == made.config["objective"] and not small["model"]["learn_sigma"]
    assert {"adam_beta2": 0.95, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine"}.items() <= small[
        "training"
    ].items()


def test_latents_that_are_not_scaled_are_normalised():
    for std, expected in ((None, None), (1.1, None), (4.2, "channel")):
        features = dataclasses.replace(feature_set(1500, 8, 10), std=std)
        made = suggest(features, CPU, Wishes(), trial=False)
        assert made.config["data"].get("latent_normalization") == expected


def test_a_smaller_gpu_gets_micro_batches_and_a_smaller_network():
    large, small = (
        suggest(feature_set(1_281_167, 32, 1000), find_device(0, gpu_memory=memory), Wishes()) for memory in (24, 8)
    )
    assert large.config["model"]["num_layers"] == 28 and large.planned.setting.global_batch == 256
    assert large.config["training"]["gradient_accumulation_steps"] > 1
    assert small.config["model"]["num_layers"] < 28


@pytest.mark.parametrize(
    "listed, visible, samples, expected",
    [
        (["NVIDIA A100-SXM4-80GB, 81920, 8.0"] * 2, None, 1_281_167, ("2 x NVIDIA A100-SXM4-80GB", "bfloat16", 312)),
        (["NVIDIA A100-SXM4-80GB, 81920, 8.0"] * 2, None, 300, ("NVIDIA A100-SXM4-80GB", "bfloat16", 312)),
        (["Tesla T4, 15360, 7.5"] * 3, "0,2", 1_281_167, ("2 x Tesla T4", "float16", 65)),
        (["NVIDIA RTX A1000, 8192, 8.6"], "0", 1_281_167, ("NVIDIA RTX A1000", "bfloat16", None)),
        (["Tesla T4, 15360, 7.5"], "-1", 1_281_167, ("CPU", "float32", 0.1)),
    ],
)
def test_the_gpus_that_paddle_can_use_are_found(listed, visible, samples, expected, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in listed))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(suggestion, "_cpu_machine", lambda: CPU.machine)
    assert find_device(samples).kind == "cpu"  # Paddle here is that of CPUs
    monkeypatch.setattr(suggestion.importlib.metadata, "version", lambda name: "3.3.1")
    found = find_device(samples)
    assert (found.title, found.precision, found.machine.tflops) == expected


def test_hours_become_steps(tmp_path):
    made = suggest(feature_set(300, 8, 5), CPU, Wishes(hours=2), trial=False)
    assert 0.9 * 7200 <= made.steps * made.seconds <= 7200
    assert made.config["training"]["max_steps"] == made.steps


def test_a_trial_measures_a_step(tmp_path):
    seconds = measure_step(json.loads(open(write_config(tmp_path / "tiny.json")).read()), 2)
    assert 0 < seconds < 60


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--patch", "3"], "--patch 3: does not divide the latents' side 8; accepted: 1, 2, 4, 8"),
        (["--size", "7B"], "--size 7B: expected one of XS, S, B, L, XL for a DiT"),
        (["--hours", "1", "--epochs", "3"], "--epochs and --hours say the same; give one"),
        (["--gpu_memory", "3"], "takes 8.6 GiB at least"),
        (["--image_size", "0"], "--image_size must be above 0"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line(features, tmp_path, flags, message):
    output = tmp_path / "mine.json"
    size = ["--size", "L"] if "--gpu_memory" in flags else []
    with pytest.raises(ValueError, match=message):
        make_config.main(["--feature_path", str(features), "--output", str(output), *flags, *size])
    assert not output.exists()


def test_an_existing_file_is_kept(features, tmp_path):
    output = tmp_path / "mine.json"
    output.write_text("{}")
    with pytest.raises(ValueError, match="exists already"):
        make_config.main(["--feature_path", str(features), "--output", str(output)])
    assert output.read_text() == "{}"
