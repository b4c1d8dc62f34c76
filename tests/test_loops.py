"""Both loops on the same run: equal losses and weights, on one process and two, resumed or not."""

import json

import numpy as np
import pytest
from conftest import (
    TINY_MODELS,
    checkpoint_path,
    launch,
    loop_arguments,
    read_losses,
    write_config,
)

from models.weights import safe_load

LOOPS = ("trainer", "notrainer")
KINDS = tuple(TINY_MODELS)


def weights(loop, output, step, name="model_state.pdparams"):
    return safe_load(checkpoint_path(loop, output, step) / name)


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=tolerance, atol=tolerance, err_msg=str(key))


@pytest.fixture(scope="module", params=KINDS)
def reference(request, features, tmp_path_factory):
    """An unbroken run of ten steps in each loop, one process."""
    kind = request.param
    folder = tmp_path_factory.mktemp(f"reference-{kind}")
    config = write_config(folder / "Tiny.json", kind)
    outputs = {}
    with pytest.MonkeyPatch.context() as patch:
        from conftest import run_in_process

        for loop in LOOPS:
            outputs[loop] = folder / loop
            arguments = loop_arguments(
                loop, config=config, features=features, output=outputs[loop], steps=10, save_every=4
            )
            run_in_process(loop, arguments, patch)
    return {"kind": kind, "config": config, **outputs}


def test_loops_agree_bit_for_bit(reference):
    losses = [read_losses(reference[loop]) for loop in LOOPS]
    assert list(losses[0]) == list(range(1, 11))
    assert losses[0] == losses[1]
    assert len(set(losses[0].values())) == 10
    for name in ("model_state.pdparams", "ema_state.pdparams"):
        trainer, notrainer = (weights(loop, reference[loop], 10, name) for loop in LOOPS)
        assert_same(trainer, notrainer)
    assert any((trainer[key] != weights("trainer", reference["trainer"], 4)[key]).any() for key in trainer)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("source", LOOPS)
def test_resume_continues_with_the_same_losses(reference, features, tmp_path, run_loop, loop, source):
    arguments = loop_arguments(loop, config=reference["config"], features=features, output=tmp_path / "out", steps=10)
    resume = "--resume" if loop == "notrainer" else "--resume_from_checkpoint"
    run_loop(loop, [*arguments, resume, checkpoint_path(source, reference[source], 4)])
    expected = {step: loss for step, loss in read_losses(reference["trainer"]).items() if step > 4}
    assert read_losses(tmp_path / "out") == expected
    for name in ("model_state.pdparams", "ema_state.pdparams"):
        assert_same(weights(loop, tmp_path / "out", 10, name), weights("trainer", reference["trainer"], 10, name))


@pytest.mark.parametrize("loop", LOOPS)
def test_run_again_goes_on_where_it_stopped(reference, features, tmp_path, run_loop, loop):
    arguments = loop_arguments(loop, config=reference["config"], features=features, output=tmp_path, steps=4)
    extra = ["--resume", "auto"] if loop == "notrainer" else []
    run_loop(loop, [*arguments, *extra])
    arguments = loop_arguments(loop, config=reference["config"], features=features, output=tmp_path, steps=10)
    run_loop(loop, [*arguments, *extra])
    assert read_losses(tmp_path) == read_losses(reference[loop])


@pytest.mark.parametrize("loop", LOOPS)
def test_accumulation_gives_the_losses_of_whole_batches(reference, features, tmp_path, run_loop, loop):
    run_loop(
        loop,
        loop_arguments(loop, config=reference["config"], features=features, output=tmp_path, steps=10, accumulation=2),
    )
    expected = read_losses(reference[loop])
    for step, loss in read_losses(tmp_path).items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    assert_same(weights(loop, tmp_path, 10), weights(loop, reference[loop], 10), tolerance=1e-4)


@pytest.mark.parametrize("loop", LOOPS)
def test_recompute_changes_nothing(reference, features, tmp_path, run_loop, loop):
    arguments = loop_arguments(loop, config=reference["config"], features=features, output=tmp_path, steps=3)
    run_loop(loop, [*arguments, "--recompute", "True"])
    expected = read_losses(reference[loop])
    assert read_losses(tmp_path) == {step: expected[step] for step in (1, 2, 3)}


@pytest.mark.parametrize("loop", LOOPS)
def test_loader_processes_change_nothing(reference, features, tmp_path, run_loop, loop):
    arguments = loop_arguments(loop, config=reference["config"], features=features, output=tmp_path, steps=4)
    run_loop(loop, [*arguments, "--dataloader_num_workers=2" if loop == "trainer" else "--num_workers=2"])
    expected = read_losses(reference[loop])
    assert read_losses(tmp_path) == {step: expected[step] for step in (1, 2, 3, 4)}


# Two real processes. Those of a group share a launch, which costs ten times as much as a training.
TWO_PROCESSES = {
    "trainer-dp": ("trainer", []),
    "trainer-recompute": ("trainer", ["--recompute=True"]),
    "trainer-sharding1": ("trainer", ["--sharding=stage1", "--sharding_parallel_degree=2"]),
    "notrainer-dp": ("notrainer", []),
    "notrainer-recompute": ("notrainer", ["--recompute=True"]),
    "notrainer-accumulation": ("notrainer", ["--gradient_accumulation_steps=2"]),
}
GROUPS = (
    ("trainer-dp", "trainer-recompute"),
    ("trainer-sharding1",),
    ("notrainer-dp", "notrainer-recompute", "notrainer-accumulation"),
)


@pytest.fixture(scope="module")
def two_processes(features, tmp_path_factory):
    """`outputs(case, kind)`: the output folder of a case, ten steps on two ranks, launched when first asked for."""
    folder = tmp_path_factory.mktemp("two-processes")
    done = set()

    def outputs(case, kind):
        group = next(group for group in GROUPS if case in group)
        if group not in done:
            done.add(group)
            runs = []
            for name in group:
                for model in KINDS:
                    loop, extra = TWO_PROCESSES[name]
                    arguments = loop_arguments(
                        loop,
                        config=write_config(folder / f"{model}.json", model),
                        features=str(features),
                        output=str(folder / name / model),
                        steps=10,
                        ranks=2,
                        save_every=4,
                    )
                    runs.append([loop, [*arguments, *extra]])
            runs_file = folder / f"{group[0]}.json"
            runs_file.write_text(json.dumps(runs))
            log_dir = folder / f"{group[0]}-log"
            finished = launch(2, "tests/run_loops.py", [runs_file], log_dir)
            logs = "".join(path.read_text() for path in sorted(log_dir.glob("workerlog.*")))
            assert finished.returncode == 0, logs[-3000:]
        return folder / case / kind

    return outputs


@pytest.mark.distributed
@pytest.mark.parametrize("case", TWO_PROCESSES)
def test_two_processes_give_the_single_process_losses(reference, two_processes, case):
    loop = TWO_PROCESSES[case][0]
    output = two_processes(case, reference["kind"])
    expected = read_losses(reference[loop])
    losses = read_losses(output)
    assert list(losses) == list(expected)
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    for name in ("model_state.pdparams", "ema_state.pdparams"):
        assert_same(weights(loop, output, 10, name), weights(loop, reference[loop], 10, name), tolerance=1e-4)
    optimizers = [weights(loop, folder, 10, "optimizer.pdopt") for folder in (output, reference[loop])]
    assert optimizers[0].keys() == optimizers[1].keys()
    for name, accumulators in optimizers[1].items():
        assert_same(optimizers[0][name], accumulators, tolerance=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["trainer-sharding1", "notrainer-dp"])
def test_one_process_resumes_what_two_began(reference, two_processes, features, tmp_path, run_loop, case):
    begun = checkpoint_path(TWO_PROCESSES[case][0], two_processes(case, reference["kind"]), 4)
    arguments = loop_arguments("notrainer", config=reference["config"], features=features, output=tmp_path, steps=10)
    run_loop("notrainer", [*arguments, "--resume", begun])
    expected = read_losses(reference["notrainer"])
    losses = read_losses(tmp_path)
    assert list(losses) == [5, 6, 7, 8, 9, 10]
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
