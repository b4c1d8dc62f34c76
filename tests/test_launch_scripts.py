"""The numbered shell scripts: PaddleMIX's flags, variables from the environment, further flags, CPU, two nodes."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from support.runs import ROOT, command_environment, free_port, loop_arguments, read_losses, write_config

from config.flags import Parser
from config.schema import load_config
from tools import check_flags

SCRIPTS = {
    "0_run_train_dit_trainer.sh": ("trainer", "config/DiT_XL_patch2.json", "./output_trainer/DiT_XL_patch2_trainer"),
    "1_run_train_dit_notrainer.sh": (
        "notrainer",
        "config/DiT_XL_patch2.json",
        "./output_notrainer/DiT_XL_patch2_notrainer",
    ),
    "2_run_train_sit_trainer.sh": ("trainer", "config/SiT_XL_patch2.json", "./outputs/SiT_XL_patch2_trainer"),
    "3_run_train_sit_notrainer.sh": (
        "notrainer",
        "config/SiT_XL_patch2.json",
        "./outputs/SiT_XL_patch2_notrainer",
    ),
    "4_run_train_largedit_3b_trainer.sh": (
        "trainer",
        "config/LargeDiT_3B_patch2.json",
        "./outputs/LargeDiT_3B_patch2_trainer",
    ),
}
LARGE = "4_run_train_largedit_3b_trainer.sh"
LIGHTNING = {
    f"{number}_run_train_lightningdit_{loop}.sh": (
        loop,
        "config/LightningDiT_XL_patch1_f16d32.json",
        f"./outputs/LightningDiT_XL_patch1_f16d32_{loop}",
    )
    for number, loop in ((5, "trainer"), (6, "notrainer"))
}
EVERY = {**SCRIPTS, **LIGHTNING}
PADDLEMIX_FLAGS = (
    "do_train feature_path output_dir per_device_train_batch_size gradient_accumulation_steps learning_rate "
    "weight_decay max_steps lr_scheduler_type warmup_steps image_logging_steps logging_dir logging_steps save_steps "
    "save_total_limit dataloader_num_workers vae_name_or_path config_file num_inference_steps use_ema max_grad_norm "
    "disable_tqdm fp16_opt_level seed recompute enable_xformers_memory_efficient_attention bf16 dp_degree "
    "tensor_parallel_degree sharding_parallel_degree pipeline_parallel_degree sep_parallel_degree"
).split()
FROM_JSON = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "lr_scheduler_type": "lr_scheduler_type",
    "warmup_steps": "warmup_steps",
    "max_grad_norm": "max_grad_norm",
    "use_ema": "use_ema",
    "bf16": "USE_AMP",
    "fp16_opt_level": "FP16_OPT_LEVEL",
    "recompute": "recompute",
    "enable_xformers_memory_efficient_attention": "enable_xformers",
}


def launch_line(script, tmp_path, shell="sh", arguments=(), cwd=ROOT, **variables):
    """Returns the words that a script would run Python with, caught by a stand-in for Python."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    done = subprocess.run(
        [shell, str(ROOT / script), *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def value(words, flag):
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_paddlemix(script, shell, tmp_path):
    loop, config, output = SCRIPTS[script]
    words = launch_line(script, tmp_path, shell)
    assert words[:3] == ["-u", "-m", "paddle.distributed.launch"]
    assert f"train_image_generation_{loop}.py" in words
    assert value(words, "--config_file") == config
    assert value(words, "--max_steps") == "7000000"
    if loop == "trainer":
        assert all(f"--{flag}" in words for flag in PADDLEMIX_FLAGS if flag not in FROM_JSON)
        assert not any(f"--{flag}" in words for flag in FROM_JSON)  # the config decides, and says what PaddleMIX says
        training = load_config(ROOT / config)["training"]
        assert training["use_ema"] and training["recompute"] and training["fused_attention"]
        assert (training["amp_dtype"], training["amp_level"]) == ("bfloat16", "O2" if script == LARGE else "O1")
        assert (training["learning_rate"], training["weight_decay"]) == (1e-4, 0.0)
        assert training["max_grad_norm"] == (2.0 if script == LARGE else -1)
        assert (training["lr_scheduler_type"], training["warmup_steps"]) == ("constant", 0)
        assert value(words, "--output_dir") == output
        assert (value(words, "--per_device_train_batch_size"), value(words, "--save_total_limit")) == ("32", "50")
        # It would turn resuming off.
        assert "--overwrite_output_dir" not in words
    else:
        assert value(words, "--results_dir") == output
        assert (value(words, "--global_batch_size"), value(words, "--ckpt_every")) == ("256", "5000")
        assert value(words, "--resume") == "auto"


@pytest.mark.parametrize("script", LIGHTNING)
def test_the_config_of_lightningdit_says_how_it_is_trained(script, tmp_path):
    loop, config, output = LIGHTNING[script]
    words = launch_line(script, tmp_path)
    batch = ["--per_device_train_batch_size", "--global_batch_size"]
    assert not {"--max_steps", "--learning_rate", "--image_size", "--resolution", *batch} & {*words}
    assert value(words, "--config_file") == config and value(words, "--feature_path") == "./data/vavae_imagenet256"
    assert value(words, "--output_dir" if loop == "trainer" else "--results_dir") == output
    training = load_config(ROOT / config)["training"]
    assert (training["global_batch_size"], training["max_steps"], training["learning_rate"]) == (1024, 80000, 2e-4)
    given = {"batch_size": "8"} if loop == "trainer" else {"global_batch_size": "8"}
    flag = batch[loop == "notrainer"]
    assert value(launch_line(script, tmp_path, max_steps="20", **given), flag) == "8"


@pytest.mark.parametrize("script", ["0_run_train_dit_trainer.sh", "1_run_train_dit_notrainer.sh"])
def test_a_config_of_ones_own_decides_what_it_sets(script, tmp_path):
    batch = "--global_batch_size" if "notrainer" in script else "--per_device_train_batch_size"
    (tmp_path / "own.json").write_text('{"training": {"max_steps": 20, "global_batch_size": 4, "seed": 3}}')
    words = launch_line(script, tmp_path, config_file=str(tmp_path / "own.json"))
    assert not {"--max_steps", batch, "--seed", "--global_seed"} & {*words}
    words = launch_line(script, tmp_path, config_file=str(tmp_path / "own.json"), max_steps="5")
    assert value(words, "--max_steps") == "5"
    words = launch_line(script, tmp_path, arguments=["--num_train_epochs", "2"])
    assert "--max_steps" not in words and batch in words


def test_variables_and_further_flags(tmp_path):
    words = launch_line(
        "0_run_train_dit_trainer.sh",
        tmp_path,
        arguments=["--device", "cpu", "--ema_decay", "0.99"],
        max_steps="20",
        batch_size="4",
        TRAINERS_NUM="2",
        TRAINING_GPUS_PER_NODE="4",
        SHARDING_DEGREE="2",
        MASTER="10.0.0.1:8080",
        TRAINER_INSTANCES="10.0.0.1,10.0.0.2",
        OUTPUT_DIR="out put",
    )
    assert value(words, "--max_steps") == "20"
    assert value(words, "--per_device_train_batch_size") == "4"
    assert (value(words, "--nnodes"), value(words, "--nproc_per_node")) == ("2", "4")
    assert (value(words, "--master"), value(words, "--ips")) == ("10.0.0.1:8080", "10.0.0.1,10.0.0.2")
    assert (value(words, "--dp_degree"), value(words, "--sharding_parallel_degree")) == ("4", "2")
    assert value(words, "--output_dir") == "out put" and value(words, "--logging_dir") == "out put/tb_log"
    assert words[-5:] == ["--overriding", "--device", "cpu", "--ema_decay", "0.99"]  # the last win, by any name


@pytest.mark.parametrize(
    "variables, degrees",
    [
        ({"TRAINING_GPUS_PER_NODE": "8"}, ("1", "4", "2")),
        ({"TRAINING_GPUS_PER_NODE": "8", "TRAINERS_NUM": "2"}, ("2", "4", "2")),
        ({"TRAINING_GPUS_PER_NODE": "4"}, ("1", "4", "1")),
        ({"TRAINING_GPUS_PER_NODE": "6"}, ("3", "2", "1")),
        ({"TRAINING_GPUS_PER_NODE": "1"}, ("1", "1", "1")),
        ({"TRAINING_GPUS_PER_NODE": "8", "MP_DEGREE": "2"}, ("2", "2", "2")),
        ({"TRAINING_GPUS_PER_NODE": "8", "MP_DEGREE": "1", "SHARDING_DEGREE": "8"}, ("1", "1", "8")),
    ],
)
def test_degrees_of_the_large_model(variables, degrees, tmp_path):
    words = launch_line(LARGE, tmp_path, **variables)
    names = ("--dp_degree", "--tensor_parallel_degree", "--sharding_parallel_degree")
    assert tuple(value(words, name) for name in names) == degrees


def test_a_sharding_stage_alone_takes_all_processes(tmp_path):
    words = launch_line("0_run_train_dit_trainer.sh", tmp_path, sharding="stage3", TRAINING_GPUS_PER_NODE="8")
    names = ("--dp_degree", "--sharding_parallel_degree", "--sharding")
    assert [value(words, name) for name in names] == ["1", "8", "stage3"]


def test_further_flags_of_the_large_model(tmp_path):
    words = launch_line(LARGE, tmp_path, TRAINING_GPUS_PER_NODE="8")
    flags = ("--resolution", "--logging_steps", "--amp_master_grad", "--sharding")
    assert [value(words, flag) for flag in flags] == ["256", "1", "1", "stage1"]
    words = launch_line(LARGE, tmp_path, arguments=["--ema_decay", "0.99"], sharding="stage2", resolution="512")
    assert value(launch_line(LARGE, tmp_path, TRAINING_GPUS_PER_NODE="6"), "--sharding_parallel_degree") == "1"
    assert "--sharding" not in launch_line(LARGE, tmp_path, TRAINING_GPUS_PER_NODE="6")
    assert [value(words, flag) for flag in flags] == ["512", "1", "1", "stage2"]
    assert words[-2:] == ["--ema_decay", "0.99"]


@pytest.mark.parametrize("script", EVERY)
def test_settings_of_the_config_as_variables(script, tmp_path):
    words = launch_line(script, tmp_path, **{variable: "x y" for variable in FROM_JSON.values()})
    assert all(value(words, f"--{flag}") == "x y" for flag in FROM_JSON)
    loop, known = EVERY[script][0], set()
    for flag, (name, option) in Parser(loop).options.items():
        known |= {flag, *option.other_names(loop, name)}
    assert {word[2:] for word in words[words.index("--log_dir") + 2 :] if word.startswith("--")} <= known


def test_gpus_chosen_by_number(tmp_path):
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: NVIDIA"; done\n')
    nvidia_smi.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    words = launch_line("1_run_train_dit_notrainer.sh", tmp_path, PATH=path)
    assert value(words, "--nproc_per_node") == "4"
    words = launch_line("1_run_train_dit_notrainer.sh", tmp_path, PATH=path, GPUS="1,3")
    assert (value(words, "--gpus"), value(words, "--nproc_per_node")) == ("1,3", "2")


@pytest.mark.parametrize("script", EVERY)
def test_relative_paths_are_the_callers(script, tmp_path):
    loop, config, output = EVERY[script]
    words = launch_line(script, tmp_path, cwd=tmp_path, feature_path="data set", arguments=["--vae", "a vae"])
    assert str(ROOT / f"train_image_generation_{loop}.py") in words
    assert value(words, "--config_file") == str(ROOT / config)
    assert value(words, "--output_dir" if loop == "trainer" else "--results_dir") == output
    assert value(words, "--log_dir") == f"{output}/launch_log"
    assert value(words, "--feature_path") == "data set" and words[-1] == "a vae"
    words = launch_line(script, tmp_path, cwd=tmp_path, config_file="mine.json", LOG_DIR="log")
    assert (value(words, "--config_file"), value(words, "--log_dir")) == ("mine.json", "log")


@pytest.mark.parametrize("script", EVERY)
def test_variables_that_every_script_takes(script, tmp_path):
    flag = "--resolution" if EVERY[script][0] == "trainer" else "--image_size"
    for name in ("resolution", "image_size"):
        assert value(launch_line(script, tmp_path, **{name: "64"}), flag) == "64"
    theirs = {"output": "OUTPUT_DIR" if flag == "--resolution" else "results_dir", "vae": "vae_name_or_path"}
    theirs |= {"seed": "global_seed", "save_steps": "ckpt_every", "num_workers": "dataloader_num_workers"}
    named = launch_line(script, tmp_path, **dict.fromkeys(theirs, "3"))
    assert named == launch_line(script, tmp_path, **dict.fromkeys(theirs.values(), "3")) and named.count("3") == 5
    words = launch_line(script, tmp_path, num_inference_steps="7", disable_tqdm="False")
    assert (value(words, "--num_inference_steps"), value(words, "--disable_tqdm")) == ("7", "False")


@pytest.mark.parametrize(
    ("script", "variables", "line"),
    [
        ("0_run_train_dit_trainer.sh", {"global_batch_size": "8"}, "global_batch_size=8 is not used by this script"),
        ("2_run_train_sit_trainer.sh", {"resume": "None"}, "the Trainer takes TRAINING_MODEL_RESUME"),
        (LARGE, {"results_dir": "x"}, "the Trainer takes output, the folder of the run itself"),
        ("1_run_train_dit_notrainer.sh", {"batch_size": "8"}, "this loop takes global_batch_size"),
        ("1_run_train_dit_notrainer.sh", {"OUTPUT_DIR": "x"}, "this loop takes output, a folder of runs"),
        ("3_run_train_sit_notrainer.sh", {"TRAINING_MODEL_RESUME": "x"}, "this loop takes resume"),
        ("3_run_train_sit_notrainer.sh", {"MP_DEGREE": "2"}, "MP_DEGREE=2 is not used by this script"),
        ("3_run_train_sit_notrainer.sh", {"image_size": "64", "resolution": "32"}, "are the same setting: give one"),
        (LARGE, {"output": "a", "OUTPUT_DIR": "b"}, "OUTPUT_DIR=b and output=a are the same setting: give one"),
    ],
)
def test_variables_of_other_scripts_are_named(script, variables, line, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        launch_line(script, tmp_path, **variables)
    assert refused.value.returncode == 2
    (error,) = refused.value.stderr.splitlines()
    assert error.startswith("error: ") and line in error


def test_variables_that_no_script_takes_are_named(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "Tiny.json")
    flags = ["--config_file", config, "--image_size", "64", "--seed=3", "--max_steps", "9"]
    script = "train_image_generation_trainer.py"
    for name, value in {"ema_decay": "0.5", "log_every": "7", "seed": "3", "max_steps": "9", "use_fp8": ""}.items():
        monkeypatch.setenv(name, value)
    flags = [flag.replace("image_size", "resolution") for flag in map(str, flags)]
    monkeypatch.setattr(check_flags, "find_features", lambda *_: None)  # there are none
    monkeypatch.setattr("sys.argv", ["check_flags.py", script, *flags, "--output_dir", str(tmp_path / "out")])
    check_flags.main()
    first, second = sorted(capsys.readouterr().err.splitlines())
    assert first == "note: ema_decay=0.5 is not used: give --ema_decay as a flag"
    assert second == "note: log_every=7 is not used: --logging_steps is 50"


def test_paddlemix_variables_that_say_nothing_new_are_taken(tmp_path):
    """What PaddleMIX's README sets for its Trainer script, in the environment of the other loop's."""
    said = {"TRAINING_MODEL_RESUME": "None", "MP_DEGREE": "1", "SHARDING_DEGREE": "1", "DP_DEGREE": "8"}
    words = launch_line("1_run_train_dit_notrainer.sh", tmp_path, TRAINING_GPUS_PER_NODE="8", **said)
    assert value(words, "--nproc_per_node") == "8"


@pytest.mark.parametrize("script", ["0_run_train_dit_trainer.sh", "1_run_train_dit_notrainer.sh"])
def test_a_wrong_flag_is_told_before_the_launcher_starts(script, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != -u ] || exit 3\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", str(ROOT / script), "--learning_rat", "1"],
        env={"PATH": os.environ["PATH"], "PYTHON": str(python)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and not done.stdout
    expected = "error: command line: unknown flag --learning_rat (did you mean --learning_rate?); see --help\n"
    assert done.stderr == expected and not (tmp_path / "output_trainer").exists()


# What stands in for the launcher, and for its one training process, which the terminal does not reach either.
LAUNCHER = """
import os, subprocess, sys
if "-u" in sys.argv:
    log = os.path.join(sys.argv[sys.argv.index("--log_dir") + 1], "workerlog.0")
    os.makedirs(os.path.dirname(log), exist_ok=True)
    rank = [sys.executable, "-c", RANK, log]
    code = subprocess.Popen(rank, start_new_session=True).wait()
    sys.exit(code)
"""
RANK = """
import signal, sys, time
received = []
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, lambda signum, _: received.append(signal.Signals(signum).name))
print("trains", flush=True)
while not received:
    time.sleep(0.01)
if SAVES:
    with open(sys.argv[1], "a") as file:
        print(f"stopped by {received[0]} after step 5 of 9, saved in out; --resume out goes on", file=file)
    sys.exit(75)
while len(received) < 2:
    time.sleep(0.01)
sys.exit(128 + signal.Signals[received[1]])
"""


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize(
    ("signum", "name", "times", "code"),
    [
        (signal.SIGINT, "Ctrl-C", 1, 75),
        (signal.SIGTERM, "SIGTERM", 1, 75),
        (signal.SIGHUP, "SIGHUP", 1, 75),
        (signal.SIGINT, "Ctrl-C", 2, 130),
    ],
)
def test_a_signal_to_a_launch_script_is_the_training_processes(shell, signum, name, times, code, tmp_path):
    rank = RANK.replace("SAVES", repr(times == 1))
    (tmp_path / "launcher.py").write_text(LAUNCHER.replace("RANK", repr(rank)))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/launcher.py "$@"\n')
    python.chmod(0o755)
    log = tmp_path / "log/workerlog.0"
    log.parent.mkdir()
    log.write_text("stopped by SIGTERM after step 1 of 9, saved in an earlier run\n")
    process = subprocess.Popen(
        [shell, str(ROOT / "1_run_train_dit_notrainer.sh")],
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), "LOG_DIR": str(log.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),  # else nothing is told of one that nohup ignores
    )
    assert process.stdout.readline() == "trains\n"
    assert process.stderr.readline() == f"starting 1 process(es); their logs: {log.parent}/workerlog.*\n"
    os.killpg(process.pid, signum)  # as the terminal does: to all in the foreground
    assert process.stderr.readline() == f"{name}: finishing the step, then saving; once more leaves at once\n"
    if times == 2:
        os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, out + err
    said = f"stopped by {name} after step 5 of 9, saved in out; the same command goes on\n"
    assert out == (said if code == 75 else "")
    assert ("ended by Ctrl-C; nothing was saved since the last checkpoint" in err) == (code == 130)


@pytest.mark.parametrize(
    ("script", "flags", "variables", "same"),
    [
        ("0_run_train_dit_trainer.sh", [], {}, True),
        ("0_run_train_dit_trainer.sh", ["--overwrite_output_dir", "True"], {}, False),
        ("0_run_train_dit_trainer.sh", [], {"TRAINING_MODEL_RESUME": "out/checkpoint-5"}, False),
        ("1_run_train_dit_notrainer.sh", [], {"resume": "None"}, False),
        ("1_run_train_dit_notrainer.sh", ["--resume=None"], {}, False),
    ],
)
def test_a_stopped_run_says_which_command_goes_on(script, flags, variables, same, tmp_path):
    log = tmp_path / "log/workerlog.0"
    python = tmp_path / "python"
    said = "stopped by SIGTERM after step 5 of 9, saved in out; --resume out goes on"
    python.write_text(f'#!/bin/sh\n[ "$1" != -u ] || {{ mkdir -p {log.parent}; echo "{said}" >{log}; exit 75; }}\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "LOG_DIR": str(log.parent), **variables}
    done = subprocess.run(
        ["sh", str(ROOT / script), *flags], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 75
    assert done.stdout == (f"{said.split(';')[0]}; the same command goes on\n" if same else f"{said}\n")


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_ctrl_c_before_training_starts_promises_no_checkpoint_and_leaves_no_process(shell, tmp_path):
    # Asked to end, the launcher may be in the middle of starting a process, which would then go on without it.
    (tmp_path / "launcher.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('one more process', flush=True))\n"
        "print('starts', flush=True)\n"
        "time.sleep(20)\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nif [ "$1" = -u ]; then exec {sys.executable} {tmp_path}/launcher.py; fi\n')
    python.chmod(0o755)
    process = subprocess.Popen(
        [shell, str(ROOT / "1_run_train_dit_notrainer.sh")],
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), "LOG_DIR": str(tmp_path / "log")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "starts\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == ""
    said = "ended by Ctrl-C; nothing was saved since the last checkpoint, if there is one"
    assert err.splitlines()[1:] == [said]


@pytest.mark.distributed
def test_ctrl_c_at_a_launch_script_saves(features, tmp_path):
    """Two processes, from another folder than the repository, with relative paths."""
    write_config(tmp_path / "Tiny.json")
    (tmp_path / "data").symlink_to(features)
    settings = {"config_file": "Tiny.json", "feature_path": "data", "results_dir": "out", "resolution": "64"}
    settings.update(global_batch_size="8", num_workers="0", logging_steps="1", TRAINING_GPUS_PER_NODE="2")
    process = subprocess.Popen(
        ["sh", str(ROOT / "1_run_train_dit_notrainer.sh"), "--device", "cpu"],
        env={**command_environment(), "PYTHON": sys.executable, **settings},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob("out/*/metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    (run,) = tmp_path.glob("out/0*")
    last = max(read_losses(run))
    assert process.returncode == 75, out
    assert out.splitlines()[-1].startswith(f"stopped by Ctrl-C after step {last} of 7000000, saved in out/{run.name}")
    assert (run / f"checkpoints/{last:07d}/manifest.json").is_file()


@pytest.mark.distributed
def test_two_nodes_on_one_machine(features, tmp_path, run_loop):
    """Two launchers that find each other by MASTER train what one process trains."""
    config = write_config(tmp_path / "Tiny.json")
    port = free_port()
    environment = {
        **command_environment(),
        "PYTHON": sys.executable,
        "MASTER": f"127.0.0.1:{port}",
        "TRAINERS_NUM": "2",
        "TRAINING_GPUS_PER_NODE": "1",
        "config_file": config,
        "feature_path": str(features),
        "results_dir": str(tmp_path / "two"),
        "global_batch_size": "8",
        "num_workers": "0",
        "max_steps": "3",
        "logging_steps": "1",
    }
    flags = ["--device", "cpu", "--image_size", "64", "--disable_tqdm", "True"]
    nodes = [
        subprocess.Popen(
            ["bash", str(ROOT / "1_run_train_dit_notrainer.sh"), *flags],
            env={**environment, "LOG_DIR": str(tmp_path / f"log{node}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    deadline = time.monotonic() + 200
    for node in nodes:
        output, _ = node.communicate(timeout=max(1, deadline - time.monotonic()))
        assert node.returncode == 0, output[-3000:]
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "one", steps=3)
    run_loop("notrainer", arguments)
    two, one = (
        {step: loss for path in (tmp_path / name).glob("0*") for step, loss in read_losses(path).items()}
        for name in ("two", "one")
    )
    assert list(two) == [1, 2, 3]
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("script", EVERY)
def test_every_flag_of_the_launch_line_is_taken_on_a_cpu(script, features, tmp_path, run_loop):
    loop, output = EVERY[script][0], tmp_path / "out"
    words = launch_line(
        script,
        tmp_path,
        arguments=["--device", "cpu", "--resolution" if EVERY[script][0] == "trainer" else "--image_size", "64"],
        config_file=write_config(tmp_path / "Tiny.json"),
        feature_path=str(features),
        OUTPUT_DIR=str(output),
        results_dir=str(output),
        **({"batch_size": "4"} if loop == "trainer" else {"global_batch_size": "4"}),
        num_workers="0",
        seed=str(2**32 - 1),  # the largest that is accepted
        max_steps="2",
        logging_steps="1",
    )
    run_loop(loop, words[words.index(f"train_image_generation_{loop}.py") + 1 :])
    assert list(read_losses(output)) == [1, 2]
