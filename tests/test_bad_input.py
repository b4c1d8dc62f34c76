"""A user's mistakes: one clear line each, an exit code that is not 0, and nothing overwritten."""

import shutil

import numpy as np
import paddle
import pytest
from support.runs import (
    checkpoint_path,
    launch,
    loop_arguments,
    resume_flag,
    run_script,
    write_config,
    write_features,
)

LOOPS = ("trainer", "notrainer")


@pytest.fixture
def own_features(tmp_path):
    return write_features(tmp_path / "features", count=12)


def spoil_missing_folder(folder):
    shutil.rmtree(folder)


def spoil_empty(folder):
    for path in folder.glob("*/*.npy"):
        path.unlink()


def spoil_no_label(folder):
    (folder / "imagenet64_labels/7.npy").unlink()


def spoil_no_feature(folder):
    (folder / "imagenet64_features/7.npy").unlink()


def spoil_no_label_folder(folder):
    shutil.rmtree(folder / "imagenet64_labels")


def spoil_truncated(folder):
    path = folder / "imagenet64_features/7.npy"
    path.write_bytes(path.read_bytes()[:200])


def spoil_archive(folder):
    with open(folder / "imagenet64_features/7.npy", "wb") as file:
        np.savez(file, x=np.zeros((1, 4, 8, 8), dtype="float32"))


def spoil_not_npy(folder):
    (folder / "imagenet64_labels/7.npy").write_text("seven")


def spoil_shape(folder):
    np.save(folder / "imagenet64_features/7.npy", np.zeros((1, 4, 16, 16), dtype="float32"))


def spoil_label(folder):
    np.save(folder / "imagenet64_labels/7.npy", np.array([10]))


def spoil_two_sets(folder):
    (folder / "imagenet64_features").rename(folder / "a_features")
    (folder / "b_features").mkdir()


DATA_MISTAKES = [
    (spoil_missing_folder, "feature_path .*features: no such folder"),
    (spoil_empty, "imagenet64_features: no .npy file in it"),
    (spoil_no_label, r"imagenet64_features/7.npy: has no counterpart in .*imagenet64_labels"),
    (spoil_no_feature, r"imagenet64_labels/7.npy: has no counterpart in .*imagenet64_features"),
    (spoil_no_label_folder, "its labels folder .*imagenet64_labels is missing"),
    (spoil_truncated, r"imagenet64_features/7.npy: not a readable .npy file \(truncated\?\)"),
    (spoil_archive, r"imagenet64_features/7.npy: not a readable .npy file .*: it holds an archive"),
    (spoil_not_npy, r"imagenet64_labels/7.npy: not a readable .npy file"),
    (spoil_shape, r"7.npy: holds float32 of shape \(4, 16, 16\), the config's model takes .* \(4, 8, 8\)"),
    (spoil_label, r"7.npy: label 10 is outside the config's num_classes: 0..9"),
    (spoil_two_sets, "no imagenet64_features/ and several others"),
]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("spoil", "message"), DATA_MISTAKES, ids=[spoil.__name__ for spoil, _ in DATA_MISTAKES])
def test_data(own_features, tmp_path, run_loop, loop, spoil, message):
    spoil(own_features)
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(loop, config=config, features=own_features, output=tmp_path / "out", steps=4)
    with pytest.raises(ValueError, match=message) as caught:
        run_loop(loop, arguments)
    from runtime.process import one_line

    assert "\n" not in one_line(caught.value) and "Traceback" not in one_line(caught.value)


@pytest.mark.parametrize(("loop", "workers"), [("trainer", 2), ("notrainer", 0)])
def test_unreadable_file_ends_the_command_with_one_line(own_features, tmp_path, loop, workers):
    spoil_truncated(own_features)
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(loop, config=config, features=own_features, output=tmp_path / "out", steps=4)
    flag = "--dataloader_num_workers" if loop == "trainer" else "--num_workers"
    done = run_script(f"train_image_generation_{loop}.py", [*arguments, f"{flag}={workers}"])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "imagenet64_features/7.npy: not a readable .npy file" in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_mistake_under_the_launcher(features, tmp_path):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "out", steps=4, batch=7)
    done = launch(2, "train_image_generation_notrainer.py", arguments, tmp_path / "log", timeout=90)
    assert done.returncode != 0
    logs = (tmp_path / "log/workerlog.0").read_text()
    assert "error: global batch size 7 is not divisible by 2 data-parallel ranks" in logs
    assert "Traceback" not in logs and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("loop", "flags", "message"),
    [
        ("trainer", ["--tensor_parallel_degree=2"], "tensor_parallel_degree 2 does not divide the 1 processes"),
        ("trainer", ["--pipeline_parallel_degree=2"], "pipeline_parallel_degree must be 1, got 2"),
        (
            "trainer",
            ["--sharding_parallel_config=split_params"],
            "sharding_parallel_config: unknown setting 'split_params'; known: disable_stage1_reduce_avg",
        ),
        ("trainer", ["--do_train=False"], "--do_train False: this script does nothing else"),
        ("trainer", ["--use_fp8=True"], "use_fp8 must be False"),
        ("trainer", ["--sharding_parallel_degree=2"], "sharding_parallel_degree 2 does not divide the 1 processes"),
        ("trainer", ["--sharding=stage9"], "sharding must be '' or stage1, stage2, stage3, got 'stage9'"),
        ("trainer", ["--save_steps=0"], "--save_steps must be a positive integer, got 0"),
        ("trainer", ["--no_such_flag=1"], "command line: unknown flag --no_such_flag"),
        ("trainer", ["--warmup_ratio=0.5"], "command line: unknown flag --warmup_ratio"),
        (
            "notrainer",
            ["--image_logging_steps=1", "--num_inference_steps=2000"],
            "--num_inference_steps 2000: expected 1 to 1000",
        ),
        ("notrainer", ["--pretrained_model_path=/no/such.pdparams"], "/no/such.pdparams: there is no such file"),
        ("trainer", ["--learning_rate=1e30", "--max_steps=8"], "step 2: the loss is (nan|inf).*have diverged"),
        ("notrainer", ["--learning_rate=1e30", "--max_steps=8"], "step 2: the loss is (nan|inf).*have diverged"),
        ("notrainer", ["--gradient_accumulation_steps=3"], "global batch size 8 is not divisible by 1 .* x 3"),
        ("notrainer", ["--device=tpu"], "device must be auto, cpu, gpu or gpu:N, got 'tpu'"),
        ("notrainer", ["--global_batch_size=0"], "command line: --global_batch_size must be a positive integer, got 0"),
        ("notrainer", ["--config_file=/no/such.json"], "/no/such.json: no such file"),
    ],
)
def test_flags(features, tmp_path, run_loop, loop, flags, message):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / "out", steps=2)
    with pytest.raises(ValueError, match=message):
        run_loop(loop, [*arguments, *flags])
    assert not list(tmp_path.glob("out/**/model_state.pdparams"))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_checkpoint_that_is_not_there(features, tmp_path, run_loop, loop):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / "out", steps=2)
    (tmp_path / "empty").mkdir()
    for name, message in (("gone", "there is no such file or folder"), ("empty", "no training checkpoint there")):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            run_loop(loop, [*arguments, resume_flag(loop, tmp_path / name)])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="a GPU build may see a GPU")
@pytest.mark.parametrize("loop", LOOPS)
def test_gpu_asked_for_and_not_there(features, tmp_path, run_loop, loop):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / "out", steps=2)
    with pytest.raises(ValueError, match="device gpu was asked for, but Paddle sees no GPU here"):
        run_loop(loop, [*arguments, "--device=gpu"])


@pytest.mark.parametrize("loop", LOOPS)
def test_checkpoint_of_another_architecture(features, tmp_path, run_loop, loop):
    config = write_config(tmp_path / "Tiny.json")
    run_loop(loop, loop_arguments(loop, config=config, features=features, output=tmp_path / "out", steps=1))
    source = checkpoint_path(loop, tmp_path / "out", 1)
    other = tmp_path / "Other.json"
    other.write_text((tmp_path / "Tiny.json").read_text().replace('"num_layers": 2', '"num_layers": 3'))
    flag = "--resume" if loop == "notrainer" else "--resume_from_checkpoint"
    arguments = loop_arguments(loop, config=str(other), features=features, output=tmp_path / "new", steps=2)
    with pytest.raises(ValueError, match="holds another run's model: num_layers 2 there, 3 here"):
        run_loop(loop, [*arguments, flag, source])
    config = write_config(tmp_path / "Start.json", objective={"type": "diffusion", "predict_xstart": True})
    arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / "new", steps=2)
    with pytest.raises(ValueError, match="holds another run's objective: predict_xstart False there, True here"):
        run_loop(loop, [*arguments, flag, source])

    # The same config, but weights that are not its own.
    weights = paddle.load(str(source / "model_state.pdparams"))
    del weights["blocks.1.attn.qkv.bias"]
    paddle.save(weights, str(source / "model_state.pdparams"))
    (source / "manifest.json").unlink()
    config = str(tmp_path / "Tiny.json")
    arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / "new", steps=2)
    with pytest.raises(ValueError, match=r"do not fit the config: 1 missing: blocks.1.attn.qkv.bias"):
        run_loop(loop, [*arguments, flag, source])


def test_output_folder_of_another_run(features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    output = tmp_path / "out"
    run_loop("trainer", loop_arguments("trainer", config=config, features=features, output=output, steps=1))
    before = (output / "checkpoint-1/model_state.pdparams").read_bytes()
    other = tmp_path / "Other.json"
    other.write_text((tmp_path / "Tiny.json").read_text().replace('"num_layers": 2', '"num_layers": 3'))
    arguments = loop_arguments("trainer", config=str(other), features=features, output=output, steps=1)
    with pytest.raises(ValueError, match="holds another run's model: num_layers 2 there, 3 here; choose another"):
        run_loop("trainer", arguments)
    assert (output / "checkpoint-1/model_state.pdparams").read_bytes() == before
    assert (output / "config.json").read_text().count('"num_layers": 2') == 1
