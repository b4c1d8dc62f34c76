"""Both loops on the same run: equal losses and weights, on one process and many, however parallel, resumed or not."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from support.device import either
from support.evaluated import write_program, write_reference
from support.runs import (
    LOOPS,
    ROOT,
    TINY_MODELS,
    checkpoint_path,
    launch_loops,
    loop_arguments,
    read_losses,
    read_metrics,
    run_in_process,
    write_config,
)

from training.checkpoints.snapshots import list_snapshots
from training.posthoc_ema import power_function_decay
from weights.files import load_weights, safe_load

REGULARIZERS = [
    {"type": "layer_sync", "block": 1, "target_block": 2},
    {"type": "latent_alignment", "block": 1},
    {"type": "internal_guidance", "block": 1},
    {"type": "dispersive", "group": 2},
    {"type": "contrastive", "group": 2},
]
KINDS = (*TINY_MODELS, "regularized")
# Every step is clipped. Profiles of post-hoc EMA move when there is a checkpoint, whose weights tell what they must be.
TRAINING = {"max_grad_norm": 0.3}
TRAINING |= {
    "ema_profiles": [0.05, 0.1],
    "ema_snapshot_dtype": "float32",
    "ema_snapshot_steps": 4,
    "ema_update_steps": 4,
}


def tiny_config(path, kind):
    """Writes the config of a kind, as `write_config` does; `regularized` is a SiT with all the regularizers above."""
    if kind == "regularized":
        return write_config(path, "SiT", {"type": "transport", "regularizers": REGULARIZERS}, **TRAINING)
    return write_config(path, kind, **TRAINING)


def weights(loop, output, step, name="model_state.pdparams"):
    return safe_load(checkpoint_path(loop, output, step) / name)


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    tolerance = either(tolerance, 5e-3)  # of ten steps of 1e-3: AdamW makes steps of gradients that are rounding alone
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=tolerance, atol=tolerance, err_msg=str(key))


@pytest.fixture(scope="module")
def references(features, tmp_path_factory):
    """`{kind: {loop: output}}` of unbroken runs of ten steps, one process."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(f"reference-{kind}")
        found[kind] = {"config": tiny_config(folder / "Tiny.json", kind)}
        for loop in LOOPS:
            run = {"config": found[kind]["config"], "features": features, "output": folder / loop}
            run_in_process(loop, loop_arguments(loop, **run, steps=10, save_every=4))
            found[kind][loop] = folder / loop
    return found


@pytest.fixture
def reference(references):
    return references["DiT"]


def same(losses, tolerance=0.0):
    """What equals `{step: loss}`, to the bit on a CPU."""
    return pytest.approx(losses, rel=either(tolerance, 1e-4), abs=0)


@pytest.mark.gpu
@pytest.mark.paddle26
@pytest.mark.parametrize("kind", KINDS)
def test_loops_agree_bit_for_bit(references, kind):
    reference = references[kind]
    losses = [read_losses(reference[loop]) for loop in LOOPS]
    assert list(losses[0]) == list(range(1, 11))
    assert losses[0] == same(losses[1])
    assert len(set(losses[0].values())) == 10
    for name in ("model_state.pdparams", "ema_state.pdparams"):
        trainer, notrainer = (weights(loop, reference[loop], 10, name) for loop in LOOPS)
        assert_same(trainer, notrainer)
    assert any((trainer[key] != weights("trainer", reference["trainer"], 4)[key]).any() for key in trainer)


@pytest.mark.gpu
@pytest.mark.paddle26
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("source", LOOPS)
@pytest.mark.parametrize("kind", ["DiT", "regularized"])
def test_resume_continues_with_the_same_losses(references, features, tmp_path, run_loop, loop, source, kind):
    reference = references[kind]
    arguments = loop_arguments(loop, config=reference["config"], features=features, output=tmp_path / "out", steps=10)
    resume = "--resume" if loop == "notrainer" else "--resume_from_checkpoint"
    run_loop(loop, [*arguments, resume, checkpoint_path(source, reference[source], 4)])
    expected = {step: loss for step, loss in read_losses(reference["trainer"]).items() if step > 4}
    assert read_losses(tmp_path / "out") == same(expected)
    for name in ("model_state.pdparams", "ema_state.pdparams"):
        assert_same(weights(loop, tmp_path / "out", 10, name), weights("trainer", reference["trainer"], 10, name))


@pytest.mark.gpu
@pytest.mark.parametrize("loop", LOOPS)
def test_run_again_goes_on_where_it_stopped(reference, features, tmp_path, run_loop, loop):
    arguments = loop_arguments(loop, config=reference["config"], features=features, output=tmp_path, steps=4)
    extra = ["--resume", "auto"] if loop == "notrainer" else []
    run_loop(loop, [*arguments, *extra])
    arguments = loop_arguments(loop, config=reference["config"], features=features, output=tmp_path, steps=10)
    run_loop(loop, [*arguments, *extra])
    assert read_losses(tmp_path) == same(read_losses(reference[loop]))


@pytest.mark.gpu
@pytest.mark.paddle26
@pytest.mark.parametrize("loop", LOOPS)
def test_accumulation_gives_the_losses_of_whole_batches(reference, features, tmp_path, run_loop, loop):
    run_loop(
        loop,
        loop_arguments(loop, config=reference["config"], features=features, output=tmp_path, steps=10, accumulation=2),
    )
    assert read_losses(tmp_path) == same(read_losses(reference[loop]), 1e-5)
    assert_same(weights(loop, tmp_path, 10), weights(loop, reference[loop], 10), tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.paddle26
@pytest.mark.parametrize("loop", LOOPS)
def test_recompute_changes_nothing(reference, features, tmp_path, run_loop, loop):
    arguments = loop_arguments(loop, config=reference["config"], features=features, output=tmp_path, steps=3)
    run_loop(loop, [*arguments, "--recompute", "True"])
    expected = read_losses(reference[loop])
    assert read_losses(tmp_path) == same({step: expected[step] for step in (1, 2, 3)})


@pytest.mark.gpu
@pytest.mark.paddle26
@pytest.mark.parametrize("loop", LOOPS)
def test_loader_processes_change_nothing(reference, features, tmp_path, run_loop, loop):
    arguments = loop_arguments(loop, config=reference["config"], features=features, output=tmp_path, steps=4)
    run_loop(loop, [*arguments, "--dataloader_num_workers=2" if loop == "trainer" else "--num_workers=2"])
    expected = read_losses(reference[loop])
    assert read_losses(tmp_path) == same({step: expected[step] for step in (1, 2, 3, 4)})


# Real processes. A launch costs ten times as much as a training: one for each number of ranks does all trainings. Every
# case begins anew, and resumes what the case before it saved after four steps: what one way of parallel training began
# goes on in any other. Two kinds have most layers and both objectives; `FURTHER` have the others, for some cases.
class Case(NamedTuple):
    loop: str
    flags: tuple = ()
    accumulation: int = 1
    ranks: int = 2
    tensor: int = 1


TP2 = "--tensor_parallel_degree=2"
CASES = {
    "notrainer-dp": Case("notrainer"),
    "notrainer-recompute": Case("notrainer", ("--recompute=True",), accumulation=2),
    "trainer-dp": Case("trainer"),
    "trainer-sharding1": Case("trainer", ("--sharding=stage1", "--sharding_parallel_degree=2")),
    "trainer-tp": Case("trainer", (TP2, "--recompute=True"), tensor=2, accumulation=2),
    "trainer-sharding2": Case("trainer", ("--sharding=stage2",), accumulation=2),
    "trainer-sharding3": Case("trainer", ("--sharding=stage3", "--recompute=True"), accumulation=2),
    "trainer-tp-dp": Case("trainer", (TP2,), tensor=2, ranks=4),
    "trainer-sharding1-dp": Case("trainer", ("--sharding=stage1", "--sharding_parallel_degree=2"), ranks=4),
    "trainer-tp-sharding2": Case("trainer", (TP2, "--sharding=stage2"), tensor=2, ranks=4),
    "trainer-tp-sharding3": Case("trainer", (TP2, "--sharding=stage3"), tensor=2, ranks=4),
}
NAMES = list(CASES)
PARALLEL_KINDS = ("DiT", "LargeSiT")
FURTHER = {
    "LightningDiT": ("trainer-tp", "trainer-sharding3", "trainer-tp-sharding3"),
    "regularized": ("notrainer-dp", "notrainer-recompute", "trainer-tp", "trainer-sharding3"),
}
VALIDATED = ("trainer-sharding3", "trainer-tp-dp", "notrainer-dp")
VAE = f"--vae_name_or_path={ROOT / 'assets/digits_vae'}"
VALIDATION = ("--validation_samples=7", "--validation_steps=4", VAE)
METRICS = ["fid", "inception_score", "precision", "recall", "kid", "mind"]
PREVIEWS = ("--image_logging_steps=5", "--num_inference_steps=3", VAE)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A config with an evaluation after every fifth step; the runs that it is for report held-out losses too."""
    folder = tmp_path_factory.mktemp("judged")
    path = Path(write_config(folder / "DiT.json", "DiT", **TRAINING))
    evaluation = {"steps": 5, "num_samples": 10, "batch_size": 3, "num_inference_steps": 3, "metrics": METRICS}
    evaluation |= {"features": write_program(folder), "reference": write_reference(folder / "images.npz", side=64)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "evaluation": evaluation}))
    return str(path)


@pytest.fixture(scope="module")
def parallel_runs(features, judged, tmp_path_factory):
    """`outputs(case, kind, how)`: the output folder of ten steps, begun anew, resumed or validated."""
    folder = tmp_path_factory.mktemp("parallel")
    launched = set()

    def outputs(name, kind, how="anew"):
        if CASES[name].ranks not in launched:
            launched.add(CASES[name].ranks)
            launch_all(CASES[name].ranks)
        return folder / how / name / kind

    def arguments(name, kind, how, extra=()):
        case = CASES[name]
        flags = loop_arguments(
            case.loop,
            config=judged if how == "validated" else tiny_config(folder / f"{kind}.json", kind),
            features=str(features),
            output=str(folder / how / name / kind),
            steps=10,
            ranks=case.ranks // case.tensor,
            accumulation=case.accumulation,
            save_every=4,
        )
        return [case.loop, [*flags, *case.flags, *extra]]

    def launch_all(ranks):
        runs = []
        for index, name in enumerate(NAMES):
            if CASES[name].ranks != ranks:
                continue
            runs += [arguments(name, kind, "anew") for kind in PARALLEL_KINDS]
            runs += [arguments(name, kind, "anew") for kind, cases in FURTHER.items() if name in cases]
            if name in VALIDATED:
                runs.append(arguments(name, "DiT", "validated", VALIDATION))
            for kind in PARALLEL_KINDS if index > 0 else ():
                before = NAMES[index - 1]
                begun = checkpoint_path(CASES[before].loop, folder / "anew" / before / kind, 4, launched=False)
                resume = "--resume" if CASES[name].loop == "notrainer" else "--resume_from_checkpoint"
                runs.append(arguments(name, kind, "resumed", [f"{resume}={begun}", *PREVIEWS]))
        if ranks == 4:  # the first case of four ranks resumes the last one of two
            outputs(NAMES[0], "DiT")
        launch_loops(ranks, runs, folder / f"{ranks}-ranks")

    return outputs


def snapshots(output):
    (ema,) = output.rglob("ema")
    return list_snapshots(ema)


def assert_right_snapshots(output, loop):
    """The snapshots of a run against the power-function averages, in float64, of its own checkpoints' weights."""
    found = snapshots(output)
    assert [snapshot.step for snapshot in found] == [4, 8, 10]
    for std in TRAINING["ema_profiles"]:
        average, before = {}, 0
        for step, _, paths in found:
            decay = power_function_decay(step, std, step - before)
            saved = {name: (1 - decay) * value.astype("float64") for name, value in weights(loop, output, step).items()}
            average = {name: decay * average.get(name, 0) + value for name, value in saved.items()}
            assert_same(load_weights(paths[std]), average, tolerance=2e-6)
            before = step


def assert_same_run(output, loop, reference, first_step=1):
    """Losses, gradient norms, weights, averages and optimizer state of ten steps against the single process's."""
    expected, losses = read_losses(reference[loop]), read_losses(output)
    assert list(losses) == list(range(first_step, 11))
    norms = [read_metrics(folder, "grad_norm") for folder in (output, reference[loop])]
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
        assert norms[0][step] == pytest.approx(norms[1][step], rel=1e-4)
    for name in ("model_state.pdparams", "ema_state.pdparams"):
        assert_same(weights(loop, output, 10, name), weights(loop, reference[loop], 10, name), tolerance=1e-4)
    last, expected = (snapshots(folder)[-1].paths for folder in (output, reference[loop]))
    for std, path in expected.items():
        assert_same(load_weights(last[std]), load_weights(path), tolerance=1e-4)
    optimizers = [weights(loop, folder, 10, "optimizer.pdopt") for folder in (output, reference[loop])]
    assert optimizers[0].keys() == optimizers[1].keys()
    for name, accumulators in optimizers[1].items():
        assert_same(optimizers[0][name], accumulators, tolerance=1e-4)


def paddle26(names):
    """Cases, of which those of one launch of two ranks are marked."""
    return [pytest.param(name, marks=pytest.mark.paddle26) if CASES[name].ranks == 2 else name for name in names]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", PARALLEL_KINDS)
@pytest.mark.parametrize("case", paddle26(NAMES))
def test_parallel_training_is_the_single_process_one(references, parallel_runs, case, kind):
    assert_same_run(parallel_runs(case, kind), CASES[case].loop, references[kind])
    assert_right_snapshots(parallel_runs(case, kind), CASES[case].loop)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, marks=pytest.mark.paddle26 if CASES[case].ranks == 2 else ())
        for kind, cases in FURTHER.items()
        for case in cases
    ],
)
def test_parallel_training_of_further_kinds_is_the_single_process_one(references, parallel_runs, kind, case):
    assert_same_run(parallel_runs(case, kind), CASES[case].loop, references[kind])


@pytest.mark.distributed
@pytest.mark.parametrize("kind", PARALLEL_KINDS)
@pytest.mark.parametrize("case", paddle26(NAMES[1:]))
def test_parallel_training_resumes_any_other(references, parallel_runs, case, kind):
    resumed = parallel_runs(case, kind, "resumed")
    assert_same_run(resumed, CASES[case].loop, references[kind], first_step=5)
    # Previews are drawn with the averages of all ranks' parts.
    images = sorted(resumed.rglob("images/*.png"))
    assert [path.name for path in images] == ["0000005.png", "0000010.png"]
    for path in images:
        (other,) = parallel_runs(NAMES[1], kind, "resumed").rglob(path.name)
        difference = np.asarray(Image.open(path), "int64") - np.asarray(Image.open(other), "int64")
        assert np.abs(difference).max() <= 1


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["notrainer-dp", "trainer-tp-sharding3"])
def test_one_process_resumes_what_many_began(references, parallel_runs, features, tmp_path, run_loop, case):
    reference = references["DiT"]
    begun = checkpoint_path(CASES[case].loop, parallel_runs(case, "DiT"), 4)
    arguments = loop_arguments("notrainer", config=reference["config"], features=features, output=tmp_path, steps=10)
    run_loop("notrainer", [*arguments, "--resume", begun])
    expected, losses = read_losses(reference["notrainer"]), read_losses(tmp_path)
    assert list(losses) == [5, 6, 7, 8, 9, 10]
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)


def read_rows(output, name="validation.jsonl"):
    (path,) = output.rglob(name)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def validated(features, judged, tmp_path_factory):
    """The held-out losses of a single process, by loop, and its `evaluations`."""
    folder = tmp_path_factory.mktemp("validated")
    losses = {}
    for loop in LOOPS:
        arguments = loop_arguments(loop, config=judged, features=features, output=folder / loop, steps=10)
        run_in_process(loop, [*arguments, *VALIDATION])
        losses[loop] = read_rows(folder / loop)
    losses["evaluations"] = read_rows(folder / "trainer", "evaluation.jsonl")
    return losses


def test_held_out_losses_are_the_same_in_both_loops(validated):
    assert validated["trainer"] == validated["notrainer"]
    rows = validated["trainer"]
    assert [row["step"] for row in rows] == [4, 8, 10]
    assert rows[0]["loss"] > rows[1]["loss"] > rows[2]["loss"]
    assert all(row["loss"] != row["ema_loss"] for row in rows)


@pytest.mark.distributed
@pytest.mark.parametrize("case", VALIDATED)
def test_held_out_losses_do_not_depend_on_the_ranks(validated, parallel_runs, case):
    rows = read_rows(parallel_runs(case, "DiT", "validated"))
    assert len(rows) == 3
    for row, expected in zip(rows, validated["trainer"], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("case", VALIDATED)
def test_evaluations_do_not_depend_on_the_ranks(validated, parallel_runs, case):
    """Nor on how they share the network: those that need one another draw together, and each sample counts once."""
    rows = read_rows(parallel_runs(case, "DiT", "validated"), "evaluation.jsonl")
    assert [row["step"] for row in rows] == [5, 10]
    for row, expected in zip(rows, validated["evaluations"], strict=True):
        assert row["num_samples"] == 10
        for metric in METRICS:
            assert row[metric] == pytest.approx(expected[metric], rel=1e-3), metric
