"""Commands answer `--help` at once, and importing the networks costs nothing beyond Paddle."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from support.commands import commands, help_command
from support.runs import ROOT, TINY_MODELS, command_environment, write_config, write_features

from runtime.console import say_next
from runtime.process import EXIT_UNREAD

PYTHON = [command for command in commands() if command.endswith(".py")]
SHELL = [command for command in commands() if command.endswith(".sh")]


def run(command, **environment):
    return subprocess.run(
        command, cwd=ROOT, env={**command_environment(), **environment}, capture_output=True, text=True, timeout=60
    )


def test_every_command_is_found():
    for name in (
        "train_image_generation_trainer.py",
        "infer_demo_dit.py",
        "tools/plan_memory.py",
        "benchmarks/data.py",
    ):
        assert name in PYTHON
    assert {"quickstart.sh", "tools/setup_env.sh", "4_run_train_largedit_3b_trainer.sh"} <= set(SHELL)
    assert not {"sampling/demo.py", "runtime/untrusted.py"} & set(PYTHON)  # no commands


def test_help_imports_no_framework():
    """All in one process, because starting Python and importing numpy is most of the time."""
    code = (
        "import contextlib, io, os, runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv, sys.path[0], said = [script, '--help'], os.path.dirname(script), io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(said): runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code, (script, end.code)\n"
        "    heavy = {'paddle', 'paddlenlp', 'ppdiffusers', 'visualdl', 'gradio', 'sklearn', 'torch'}\n"
        "    heavy &= set(sys.modules)\n"
        "    assert not heavy, (script, heavy)\n"
        "    assert said.getvalue().startswith('usage:') and '--help' in said.getvalue(), script\n"
        "print('all')"
    )
    done = run([sys.executable, "-c", code, *(str(ROOT / script) for script in PYTHON)])
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr


@pytest.mark.parametrize("script", SHELL)
def test_help_of_shell_scripts_starts_no_launcher(script, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != -u ] || exit 3\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = run(help_command(script), PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_a_command_says_that_paddle_is_loading_before_it_does(tmp_path):
    text = "import sys; sys.stderr.write('WARNING: OMP_NUM_THREADS\\nodd\\n'); sys.stdin.read()"
    (tmp_path / "paddle.py").write_text(text)
    code = (
        "import sys\n"
        "from runtime.process import run_cli\n"
        "def main():\n"
        "    if len(sys.argv) > 1: raise ValueError('a mistake')\n"
        "    import paddle; print(paddle.__name__)\n"
        "run_cli(main)"
    )
    environment = {**command_environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, stderr=-1, text=True)
    assert process.stderr.readline() == "loading paddle ...\n"  # while it waits
    assert process.communicate(timeout=60) == ("paddle\n", "odd\n")
    assert run([*command, "x"]).stderr == "error: a mistake\n"


def test_commands_to_go_on_with_can_be_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "config/DiT_digits.json", tmp_path / "my config.json")
    command = ["tools/plan_memory.py", "--config_file", "my config.json"]
    say_next(command)
    (line,) = capsys.readouterr().out.splitlines()
    done = subprocess.run(line.removeprefix("next: "), shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
    monkeypatch.setenv("SAY_NEXT", "0")
    say_next(command)
    assert not capsys.readouterr().out


MISTAKES = [  # script, flag, the line that names it
    ("trainer", "--seed=-1", "--seed must be an integer from 0 to 4294967295, got -1"),
    ("notrainer", f"--global_seed={10**22}", f"seed must be an integer from 0 to 4294967295, got {10**22}"),
    ("trainer", "--no_such_flag=1", "unknown flag --no_such_flag; see --help"),
    ("trainer", "--results_dir=out", "unknown flag --results_dir (did you mean --output?)"),
    ("trainer", "--scale_loss=much", "argument --scale_loss: invalid float value: 'much'"),
    ("notrainer", "--save_step=5", "unknown flag --save_step"),
    ("notrainer", "word", "unexpected 'word'"),
    ("notrainer", "--config_file=BIG_SEED", "training: seed must be an integer from 0 to 4294967295, got 4294967296"),
]


@pytest.mark.parametrize(("loop", "flag", "line"), MISTAKES)
def test_mistakes_on_the_command_line_are_told_before_a_framework_is_imported(loop, flag, line, tmp_path):
    path = write_config(tmp_path / "Seed.json", seed=2**32)
    code = (
        "import os, runpy, sys; script, *sys.argv = sys.argv[1:]; sys.argv.insert(0, script)\n"
        "leave, heavy = os._exit, {'paddle', 'paddlenlp', 'visualdl', 'numpy'}\n"
        "os._exit = lambda code: leave(99 if heavy & set(sys.modules) else code)\n"
        "runpy.run_path(script, run_name='__main__')"
    )
    script = str(ROOT / f"train_image_generation_{loop}.py")
    done = run([sys.executable, "-c", code, script, flag.replace("BIG_SEED", path)])
    assert done.returncode == 2, (done.returncode, done.stderr)
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ") and line in error


REFUSED = {  # command line: a part of what is said; in a folder with what the test below makes
    "infer_demo_dit --model_path empty": "neither a DiTPipeline folder",
    "infer_demo_dit --image-size 256": "unknown flag --image-size (the model brings it along)",
    "infer_demo_dit --model_path gone/x/y": "there is no such folder",
    "infer_demo_dit --output full/x.png": "exists already",
    "infer_demo_dit --id2label gone.json": "gone.json: no such file",
    "infer_demo_sit --model_path weights.pdparams --method rk4": "--method rk4: unknown for --sampler sde",
    "infer_demo_sit --model_path weights.pdparams --vae gone": "--vae gone: there is no such folder",
    "infer_demo_sit --model_path weights.pdparams --config_file gone.json": "gone.json: no such file",
    "infer_demo_sit --model_path run --guide_path gone": "--guide_path gone: there is no such folder",
    "infer_demo_sit --model_path run --guide_scale 2": "--guide_scale is for autoguidance; give --guide_path too",
    "infer_demo_lightningdit": "lightningdit-xl-imagenet256-800ep.pt: there is nothing of that name here",
    "infer_demo_sit --model_path weights.pdparams --device cpu --dtype bfloat16": "float32 only on a CPU",
    "infer_demo_dit --device cpu --dtype float16": "--dtype float16: Paddle computes in float32 only on a CPU",
    "infer_demo_largedit_3b --device tpu": "--device must be auto, cpu, gpu or gpu:N, got 'tpu'",
    "tools.check_features --feature_path gone": "gone: no such folder",
    "tools.check_features --feature_path empty --vae empty": "no config.json in this folder",
    "tools.check_features --feature_path empty --config_file gone": "--config_file gone: there is no such file",
    "tools.check_features --feature_path set --data_path gone": "--data_path gone: there is no such file",
    "tools.pack_features --feature_path empty": "nor any other NAME_features/",
    "tools.pack_features --feature_path empty --shard_samples 0": "--shard_samples must be a positive integer, got 0",
    "tools.convert_dit_to_ppdiffusers --model_path gone": "--model_path gone: there is no such file",
    "tools.convert_sit_to_ppdiffusers --model_path empty": "empty: not a training checkpoint",
    "tools.convert_official_weights --config_file empty.json --model_path gone --output o.pt": "ends in .pdparams",
    "tools.evaluate --samples gone --reference full": "--samples gone: there is no such file",
    "tools.evaluate --samples empty --reference empty": "empty: no images in this folder",
    "tools.evaluate --reference pictures --samples pictures --features gone": "features gone: expected inception",
    "tools.evaluate --reference pictures --samples pictures --metrics lpips": "lpips is unknown",
    "tools.evaluate --reference pictures --vae gone": "--vae gone: there is no such folder",
    "tools.evaluate --reference pictures --samples pictures --output full/x.png": "exists already",
    "tools.evaluate --reference pictures --samples pictures --features digits --preprocessing pytorch-fid": "'digits'",
    "tools.evaluate_digits --model_path empty --digits gone": "--digits gone: there is no such file",
    "tools.export_inference --model_path empty --output full": "full: is there already",
    "tools.export_inference --model_path gone --output new": "gone: there is no such folder",
    "tools.extract_features --data_path gone --feature_path new": "--data_path gone: there is no such file",
    "tools.extract_features --data_path empty --feature_path new": "empty: no images found",
    "tools.extract_features --data_path pictures --feature_path full/x.png": "full/x.png: is a file",
    "tools.extract_features --data_path pictures --feature_path new --name a/b": "--name a/b",
    "tools.extract_features --data_path pictures --feature_path new --bf16 --fp16": "are one setting: give one",
    "tools.extract_features --data_path empty.json --feature_path new": "empty.json: not a tar file",
    "tools.extract_features --data_path pictures --feature_path other --vae DIGITS_VAE": "(of another and",
    "tools.extract_features --data_path pictures --feature_path other --flip": "--flip was false, now it is true",
    "tools.extract_weights --model_path empty --output o.pdparams": "empty: not a training checkpoint",
    "tools.plan_memory --json gone/x.json": "--json gone/x.json: there is no such folder",
    "tools.prepare_digits --output full/x.png": "--output full/x.png is a file",
    "tools.replay_step empty": "empty: not a whole dump of a step",
    "tools.sample_npz --model_path empty --output new.npz": "neither a DiTPipeline or SiTPipeline folder",
    "tools.sample_npz --model_path empty --output gone/new.npz": "--output gone/new.npz: there is no such folder",
    "tools.sample_npz --model_path run --output new.npz --device cpu --dtype float16": "float32 only on a CPU",
    "tools.sample_npz --model_path run --output new.npz --key nope": "has no weights under the key 'nope'",
    "tools.sample_npz --model_path run --output done.npz": "complete, with other settings: --num_images was 3, now",
    "tools.train_digits_classifier --data_path gone --heldout gone --output new": "--data_path gone: there is no such",
    "tools.train_vae --data_path pictures --output new --image_size 63": "--image_size 63: expected a multiple of 8",
    "tools.train_vae --data_path pictures --output new --crop 7": "--crop 7: expected a multiple of 8",
    "train_image_generation_trainer --feature_path gone": "gone: no such folder",
    "train_image_generation_trainer --vae gone": "--vae gone: there is no such folder",
    "train_image_generation_trainer --output full/x.png": "--output full/x.png: is a file",
    "train_image_generation_notrainer --resume gone": "--resume gone: there is no such file",
    "train_image_generation_notrainer --pretrained_model_path gone": "--pretrained_model_path gone: there is no such",
    "train_image_generation_trainer --feature_path set": "the config's model takes float latents of shape (4, 32, 32)",
    "train_image_generation_notrainer --feature_path set --config_file few.json": "config's num_classes is 1: write",
    "train_image_generation_trainer FITTING --flip": "no mirrored latents are there",
    "train_image_generation_notrainer FITTING --preview_classes cat1 --image_logging_steps 3": "cat1: no such class",
    "train_image_generation_notrainer FITTING --validation_samples 6": "expected 0..5, the set has 6",
    "train_image_generation_trainer FITTING --sharding stage9": "--sharding must be '' or stage1",
    "train_image_generation_trainer FITTING --tensor_parallel_degree 2": "does not divide the 1 processes",
    "train_image_generation_trainer FITTING --resume run": "run: holds another run's model: type SiT there, DiT here",
    "train_image_generation_notrainer FITTING --pretrained_model_path run": "run: holds another run's model: type SiT",
    "train_image_generation_notrainer FITTING --pretrained_model_path empty.json": "whose layout is it?",
}


def test_what_no_command_can_do_is_said_before_a_framework_is_imported(tmp_path):
    for name in ("empty", "full", "pictures", "other", "run"):
        (tmp_path / name).mkdir()
    for name in ("full/x.png", "weights.pdparams", "done.npz", "run/model_state.pdparams", "run/trainer_state.json"):
        (tmp_path / name).write_text("x")
    write_features(tmp_path / "set", count=6)
    write_config(tmp_path / "fitting.json")
    write_config(tmp_path / "run" / "config.json", "SiT")
    (tmp_path / "few.json").write_text(json.dumps({"model": {**TINY_MODELS["DiT"], "num_classes": 1}}))
    counts = {"num_classes": 10, "class_counts": [1] * 6 + [0] * 4}
    (tmp_path / "set" / "imagenet64_manifest.json").write_text(json.dumps(counts))
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "done.json").write_text('{"version": 1, "num_images": 3}')
    made = {"format": "npy", "image_size": 256, "seed": 0, "moments": False, "flip": False, "background": None}
    made |= {"scaling_factor": 9.0, "vae": {"name": "another"}}
    (tmp_path / "other" / "imagenet256_manifest.json").write_text(json.dumps(made))
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    code = (
        "import importlib, json, sys\n"
        "for line, words in json.loads(sys.argv[1]).items():\n"
        "    sys.argv = line.split()\n"
        "    try: importlib.import_module(sys.argv[0]).main()\n"
        "    except ValueError as error: assert words in str(error), (line, str(error))\n"
        "    else: assert False, line\n"
        "    heavy = {'paddle', 'ppdiffusers', 'paddlenlp'} | ({'numpy'} if line.startswith('infer_') else set())\n"
        "    assert not heavy & set(sys.modules), line"
    )
    words = {"FITTING": "--feature_path set --config_file fitting.json", "DIGITS_VAE": str(ROOT / "assets/digits_vae")}
    config, lines = f" --config_file {ROOT / 'config/DiT_S_patch4.json'}", {}
    for line, said in REFUSED.items():
        line = " ".join(words.get(word, word) for word in line.split())
        lines[line + config * (line.startswith("train_") and "--config_file" not in line)] = said
    command = [sys.executable, "-c", code, json.dumps(lines)]
    environment = {**command_environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command", ["[print('line') for _ in range(10**5)]", "print('line')", "print('line') or exit()"]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone_ends_a_command_without_a_line(command, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from runtime.process import run_cli; run_cli(lambda: {command})"
    environment = {**command_environment(), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (EXIT_UNREAD, "")


def test_networks_import_nothing_beyond_paddle():
    code = (
        "import sys, paddle; before = set(sys.modules)\n"
        "import diffusion, transport, objectives\n"
        "from models import *\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new <= {'models', 'diffusion', 'transport', 'objectives', 'runtime'}, new\n"
        "heavy = {'paddlenlp', 'ppdiffusers', 'visualdl', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
