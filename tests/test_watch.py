"""The watch on the numbers: what a step that is not finite changes, what the run says of it, and doing it again."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from support.runs import (
    ROOT,
    checkpoint_path,
    launch,
    loop_arguments,
    read_metrics,
    write_config,
    write_features,
)

import training.supervision.number_watch
from features.dataset import FeatureDataset
from features.order import MicroBatchSampler
from objectives import DiffusionObjective
from runtime.paddle_private import skipped_step
from runtime.precision import Precision
from training.checkpoints.background import write_folder
from training.optimizer import build_optimizer
from training.supervision.number_watch import BadStepError, NumberWatch
from training.supervision.stopping import Stopping
from weights.files import safe_load, save_pdparams
from weights.runs import damage

LOOPS = ("trainer", "notrainer")
LAST_GOOD, BAD, STEPS = 4, 5, 8
LOG_EVERY = {"trainer": "--logging_steps", "notrainer": "--log_every"}
SETTINGS = {"on_nonfinite": "stop", "loss_spike_factor": 0.0, "max_grad_norm": -1.0}
ADAMW = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.1}


def spoil(folder, value, step=BAD, last_step=STEPS):
    """Multiplies a number of a latent that step `step` alone sees (all numbers, if value is finite).

    Returns:
        `(path, row)`: its file, and its row in the batch.
    """
    dataset = FeatureDataset(folder, resolution=64, sample_shape=(4, 8, 8), num_classes=10)
    sampler = MicroBatchSampler(
        len(dataset), global_batch_size=8, accumulation_steps=1, rank=0, world_size=1, seed=0, last_step=last_step
    )
    batches = [sampler.batch(other, 0)[0].tolist() for other in range(1, last_step + 1)]
    seen = [index for other in batches[: step - 1] + batches[step:] for index in other]
    row, index = next((row, index) for row, index in enumerate(batches[step - 1]) if index not in seen and row >= 4)
    latent = np.load(path := dataset.source(index))
    if math.isfinite(value):
        latent *= value
    else:
        latent[0, 1, 2, 3] = value
    np.save(path, latent)
    return path, row


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """`(features, path, row)`: the latents, of which one that step BAD alone sees holds a NaN."""
    folder = write_features(tmp_path_factory.mktemp("spoiled"))
    return folder, *spoil(folder, math.nan)


def dump_path(output, step=BAD, suffix=""):
    (path,) = output.glob(f"**/bad_steps/{step:07d}{suffix}")
    return path


def weights(loop, output, step):
    return safe_load(checkpoint_path(loop, output, step) / "model_state.pdparams")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# A run that stops.


@pytest.mark.parametrize(("loop", "accumulation"), [("trainer", 1), ("trainer", 2), ("notrainer", 2)])
def test_a_run_stops_with_a_dump(spoiled, tmp_path, run_loop, monkeypatch, capsys, loop, accumulation):
    features, path, row = spoiled
    drawn = []
    draw = DiffusionObjective.draw
    monkeypatch.setattr(
        DiffusionObjective, "draw", lambda self, *rest: drawn.append(draw(self, *rest)) or dict(drawn[-1])
    )
    routing = {"blocks": [2, 2]} if loop == "notrainer" else None
    config = write_config(tmp_path / "Tiny.json", on_nonfinite="skip", weight_decay=0.1, routing=routing)
    out = tmp_path / "out"
    arguments = loop_arguments(
        loop, config=config, features=features, output=out, steps=STEPS, save_every=LAST_GOOD, accumulation=accumulation
    )
    # Reported three steps after it: no later step must change anything either.
    with pytest.raises(BadStepError) as error:
        run_loop(loop, [*arguments, f"{LOG_EVERY[loop]}=4", "--on_nonfinite=stop"])
    dump = dump_path(out)
    for part in (f"step {BAD}: the loss is nan", f"its sample {row} ({path})", str(dump), "--on_nonfinite skip"):
        assert part in str(error.value)
    assert not [other for other in out.glob("**/model_state.pdparams") if f"{LAST_GOOD}" not in other.parent.name]

    assert_equal(safe_load(dump / "weights.pdparams"), weights(loop, out, LAST_GOOD))
    batch, state = safe_load(dump / "batch.pdparams"), json.loads((dump / "state.json").read_text())
    assert damage(str(dump), required=("batch.pdparams", "state.json"), checksums=True) is None
    assert np.flatnonzero(~np.isfinite(batch["x"]).reshape(8, -1).all(axis=1)).tolist() == [row]
    assert np.flatnonzero(~np.isfinite(batch["loss"])).tolist() == [row]
    assert state["sources"][row] == str(path) and (state["step"], state["loss"]) == (BAD, "nan")
    assert (
        state["learning_rate"] == 1e-3
        and batch["micro_step"].tolist() == np.repeat(range(2), 4).tolist()
        or (accumulation == 1 and not batch["micro_step"].any())
    )
    first = (BAD - 1) * accumulation  # what the run itself drew in that step
    assert ("routing" in batch) == (routing is not None)
    for name, values in batch.items():
        if name in ("t", "noise", "force_drop_ids", "routing"):
            own = np.concatenate([one[name].numpy() for one in drawn[first : first + accumulation]])
            np.testing.assert_array_equal(values, own)

    printed = replay(dump, monkeypatch, capsys)
    assert "the same samples are finite, finite losses differ by 0 at most" in printed
    assert f"1 number not finite: {path}" in printed and f"Numbers of its sample {row} ({path}) are not" in printed
    assert "gradients: 31 of 31 parameters not finite" in printed


def replay(dump, monkeypatch, capsys, *flags):
    from tools import replay_step

    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["replay_step.py", str(dump), "--device=cpu", *flags])
    replay_step.main()
    return capsys.readouterr().out


def test_a_dump_is_never_overwritten(spoiled, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(
        "trainer", config=config, features=spoiled[0], output=tmp_path / "out", steps=STEPS, save_every=LAST_GOOD
    )

    def dumped():
        return sorted(path.name for path in (tmp_path / "out/bad_steps").iterdir())

    for names in (["0000005"], ["0000005", "0000005-2"]):
        with pytest.raises(BadStepError, match=f"The step is kept in .*{names[-1]}: see"):
            run_loop("trainer", arguments)  # resumes, and meets the same step
        assert dumped() == names
        if len(names) == 1:
            before = (dump_path(tmp_path) / "weights.pdparams").stat().st_mtime_ns
    assert (dump_path(tmp_path) / "weights.pdparams").stat().st_mtime_ns == before
    (tmp_path / "out/bad_steps/0000005-3").mkdir()
    with pytest.raises(BadStepError, match="holds 3 dumps of this step, and no other is written"):
        run_loop("trainer", arguments)
    assert len(dumped()) == 3
    shutil.rmtree(tmp_path / "out/bad_steps")
    (tmp_path / "out/bad_steps").write_text("in the way")
    with pytest.raises(BadStepError, match="step 5: the loss is nan.*no dump of it could be made: .*bad_steps"):
        run_loop("trainer", arguments)


def test_timesteps_drawn_by_their_losses_are_drawn_again(tmp_path, run_loop, monkeypatch):
    """The distribution that they were drawn from has learned from later steps when the host hears of the bad one."""
    bad = 18
    features = write_features(tmp_path / "features", count=160)
    spoil(features, math.nan, bad, last_step=20)
    draws = []
    draw = DiffusionObjective.draw
    monkeypatch.setattr(DiffusionObjective, "draw", lambda *a: draws.append(draw(*a)) or dict(draws[-1]))
    objective = {
        "type": "diffusion",
        "diffusion_steps": 8,
        "noise_schedule": "squaredcos_cap_v2",
        "timestep_sampler": "loss-second-moment",
    }
    config = write_config(tmp_path / "Tiny.json", "DiT", objective)
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "out", steps=20)
    with pytest.raises(BadStepError):
        run_loop("notrainer", [*arguments, "--log_every=20"])
    batch = safe_load(dump_path(tmp_path, bad) / "batch.pdparams")
    assert len(draws) == 20 + 1
    assert (batch["weights"] != 1).all()  # it has warmed up
    for name in ("t", "weights"):
        np.testing.assert_array_equal(batch[name], draws[bad - 1][name].numpy())


# A run that skips.


@pytest.mark.parametrize(("loop", "max_grad_norm"), [("trainer", -1), ("notrainer", 0.3)])
def test_a_run_skips(spoiled, tmp_path, run_loop, capsys, loop, max_grad_norm):
    config = write_config(
        tmp_path / "Tiny.json", on_nonfinite="skip", weight_decay=0.1, max_grad_norm=max_grad_norm, use_ema=True
    )
    arguments = loop_arguments(loop, config=config, features=spoiled[0], output=tmp_path, steps=STEPS, save_every=1)
    run_loop(loop, arguments)
    assert "Train Loss: n/a" in (printed := capsys.readouterr().out)
    assert printed.count("Skipped Steps: 1 (first 5)") == 1
    skipped, losses = read_metrics(tmp_path, "skipped_steps"), read_metrics(tmp_path, "loss")
    assert skipped == {step: int(step == BAD) for step in range(1, STEPS + 1)}
    assert [step for step, loss in losses.items() if loss is None] == [BAD]
    assert_equal(weights(loop, tmp_path, BAD), weights(loop, tmp_path, LAST_GOOD))
    after = weights(loop, tmp_path, BAD + 1)
    assert (after["blocks.0.mlp.fc1.weight"] != weights(loop, tmp_path, BAD)["blocks.0.mlp.fc1.weight"]).any()
    folder = checkpoint_path(loop, tmp_path, STEPS)
    states = [safe_load(folder / f"{name}_state.pdparams") for name in ("model", "ema")]
    states += safe_load(folder / "optimizer.pdopt").values()
    assert all(np.isfinite(array).all() for state in states for array in state.values())
    assert not list(tmp_path.glob("**/bad_steps"))


def test_skipping_without_end_ends(tmp_path, run_loop, monkeypatch, features):
    monkeypatch.setattr(training.supervision.number_watch, "MAX_CONSECUTIVE_BAD_STEPS", 3)
    config = write_config(tmp_path / "Tiny.json", on_nonfinite="skip")
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "out", steps=STEPS)
    with pytest.raises(BadStepError, match="step 4: .*; so were 3 steps one after another.*weights have diverged"):
        run_loop("notrainer", [*arguments, "--learning_rate=1e30"])
    assert not list(tmp_path.glob("out/**/model_state.pdparams"))


# Spikes of the loss.


@pytest.fixture
def spike(tmp_path, monkeypatch):
    """`(features, path, row)`: a sample of step BAD is 50 times as large; three steps warm the guard up."""
    monkeypatch.setattr(training.supervision.number_watch, "SPIKE_WARMUP", 3)
    folder = write_features(tmp_path / "features")
    return folder, *spoil(folder, 50.0)


def test_a_spike_of_the_loss_stops(spike, tmp_path, run_loop, monkeypatch, capsys):
    (features, path, row), loop = spike, "notrainer"
    config = write_config(tmp_path / "Tiny.json", "SiT")
    arguments = loop_arguments(
        loop, config=config, features=features, output=tmp_path / "out", steps=STEPS, save_every=LAST_GOOD
    )
    with pytest.raises(
        BadStepError, match=f"step {BAD}: the loss is [0-9.]+, more than 3 times its running mean [0-9.]+"
    ):
        run_loop(loop, [*arguments, "--loss_spike_factor=3"])
    dump = dump_path(tmp_path / "out")
    assert_equal(safe_load(dump / "weights.pdparams"), weights(loop, tmp_path / "out", LAST_GOOD))
    batch = safe_load(dump / "batch.pdparams")
    assert np.argmax(batch["loss"]) == row
    state = json.loads((dump / "state.json").read_text())
    assert state["kind"] == "spike" and state["loss"] == pytest.approx(batch["loss"].mean(), rel=1e-6)
    printed = replay(dump, monkeypatch, capsys)
    assert f"the largest is that of sample {row} ({path})" in printed and "gradients: 0 of 31 parameters" in printed
    norm = float(printed.split("\nnorm ")[1].split(";")[0])
    assert norm == pytest.approx(state["grad_norm"], rel=1e-4)


def test_the_guard_goes_on_after_a_resume(spike, tmp_path, run_loop):
    """Its running mean is in the checkpoint: with a new one it would still be warming up when the spike comes."""
    config = write_config(tmp_path / "Tiny.json", "SiT", on_nonfinite="skip", loss_spike_factor=3)
    outputs = [tmp_path / name for name in ("unbroken", "resumed")]
    for output, extra in zip(outputs, ((), ("--resume", None)), strict=True):
        arguments = loop_arguments(
            "notrainer", config=config, features=spike[0], output=output, steps=STEPS, save_every=LAST_GOOD
        )
        if extra:
            extra = ("--resume", checkpoint_path("notrainer", outputs[0], LAST_GOOD))
        run_loop("notrainer", [*arguments, *extra])
        assert read_metrics(output, "skipped_steps")[BAD] == 1
    assert_equal(*(weights("notrainer", output, STEPS) for output in outputs))


# The watch by itself.


class Toy:
    """A linear layer under the watch; `step(x)` takes a step on the mean of its output."""

    def __init__(self, stopping=None, **settings):
        settings = {**SETTINGS, **settings}
        paddle.seed(0)
        self.model = paddle.nn.Linear(3, 2)
        self.watch = NumberWatch(settings, stopping)
        self.optimizer = build_optimizer(self.model, {**settings, **ADAMW}, 0.1, watch=self.watch)
        self.steps = 0

    def step(self, factor, scaler=None, parts=None):
        self.steps += 1
        loss = (self.model(paddle.ones([4, 3])) ** 2 * factor).mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        self.watch.add(loss.detach(), parts)
        self.watch.begin_update(self.steps, 0.1, scaler)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.watch.end_update()
        self.optimizer.clear_grad()

    def state(self):
        return [parameter.numpy() for parameter in self.model.parameters()]


def test_nothing_waits_for_the_device(monkeypatch):
    toys = [Toy(on_nonfinite="skip", loss_spike_factor=2.0, max_grad_norm=1.0), Toy()]
    factors = [paddle.full([], factor) for factor in (1.0, 1.0, math.nan, 1.0, math.inf, 1.0)]

    def wait(self, *args):
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patch:
        for name in ("numpy", "item", "__float__", "__int__", "__bool__", "__array__", "tolist", "cpu"):
            patch.setattr(paddle.Tensor, name, wait)
        for toy in toys:
            for factor in factors:
                toy.step(factor)
    assert toys[0].watch.take()["skipped_steps"] == 2
    with pytest.raises(BadStepError, match="step 3: "):
        toys[1].watch.take()


def test_a_report_is_the_mean_of_the_steps_that_were_not_skipped():
    toy, losses = Toy(on_nonfinite="skip"), []
    assert toy.watch.take() == {"loss": None, "parts": {}, "skipped_steps": 0, "first_skipped": None}
    for factor, part in ((1.0, 2.0), (math.nan, 100.0), (1.0, 4.0)):
        losses.append(float((toy.model(paddle.ones([4, 3])) ** 2).mean()))
        toy.watch.add(paddle.to_tensor(losses[-1]), {"align": paddle.to_tensor(part + 2.0)})  # another micro-batch
        toy.step(factor, parts={"align": paddle.to_tensor(part)})
    expected = {"loss": pytest.approx((losses[0] + losses[2]) / 2), "parts": {"align": 4.0}}
    assert toy.watch.take() == {**expected, "skipped_steps": 1, "first_skipped": 2}
    toy.step(1.0)
    assert toy.watch.take()["parts"] == {}
    toy.step(math.nan, parts={"align": paddle.to_tensor(1.0)})
    assert toy.watch.take() == {"loss": None, "parts": {}, "skipped_steps": 1, "first_skipped": 5}


def test_a_spike_is_one_of_the_loss_without_regularizers():
    """The sum is below 0 here, and so is its mean, times any factor."""
    toy = Toy(loss_spike_factor=2.0)
    toy.optimizer.set_lr(0.0)
    for own in [1.0] * (training.supervision.number_watch.SPIKE_WARMUP + 2) + [3.0]:
        assert toy.watch.take()["skipped_steps"] == 0
        toy.step(-1.0, parts={"objective": paddle.to_tensor(own), "align": paddle.to_tensor(-2.0)})
    why = r"step 23: the loss is -[0-9.]+, without regularizers 3, more than 2 times its running mean 1\."
    with pytest.raises(BadStepError, match=why):
        toy.watch.check()


def test_ranks_agree_on_a_stop_in_the_all_reduce(monkeypatch):
    """Another rank, played here, is asked to stop in step 3: the host hears of it in a report, or after step 10."""

    class OtherRank:
        asked = False

        def all_reduce(self, sums):
            loss, part, infinite, asked = sums.tolist()
            assert asked == 0.0
            sums.set_value(paddle.to_tensor([2 * loss, part + 3.0, infinite, float(self.asked)]))

    for reported in (True, False):
        other, stopping = OtherRank(), Stopping()
        stopping.world_size = 2
        stopping._first_step, stopping._longest_step, stopping._last_due = 0, 0.0, 0.0
        with monkeypatch.context() as patch:
            patch.setattr(paddle.distributed, "get_world_size", lambda: 2)
            patch.setattr(paddle.distributed, "all_reduce", other.all_reduce)
            toy = Toy(stopping)
            for step in range(1, 11):
                other.asked = step >= 3
                toy.step(1.0, parts={"align": paddle.to_tensor(2.0)})
                if reported and step in (2, 4):
                    assert toy.watch.take()["parts"] == {"align": 4.0}
                assert stopping.due(step) is (step >= (4 if reported else 10))
        assert stopping.request is None


def test_gradients_that_are_not_finite_though_the_loss_is():
    toy = Toy()
    toy.step(1.0)
    before = toy.state()
    toy.model.weight.register_hook(lambda gradient: gradient * math.inf)
    toy.step(1.0)
    for old, new in zip(before, toy.state(), strict=True):
        np.testing.assert_array_equal(old, new)
    with pytest.raises(BadStepError, match=r"step 2: the gradients are not finite \(norm inf; the loss is [0-9.]+\)"):
        toy.watch.check()


def test_the_running_mean():
    toy = Toy(loss_spike_factor=2.0, on_nonfinite="skip")
    toy.optimizer.set_lr(0.0)
    for _ in range(training.supervision.number_watch.SPIKE_WARMUP - 1):
        toy.step(1.0)
    toy.step(1000.0)  # within the warm-up
    assert toy.watch.take()["skipped_steps"] == 0
    mean = toy.watch.state_dict()["loss_mean"]
    toy.step(500.0)
    assert toy.watch.take()["skipped_steps"] == 1
    assert toy.watch.state_dict() == {"loss_mean": mean, "loss_steps": training.supervision.number_watch.SPIKE_WARMUP}
    for _ in range(2 * training.supervision.number_watch.SPIKE_WINDOW):
        toy.step(1.0)
    assert toy.watch.state_dict()["loss_steps"] == training.supervision.number_watch.SPIKE_WINDOW
    assert toy.watch.state_dict()["loss_mean"] < mean / 2  # it has forgotten


# Loss scaling: Paddle's scaler itself, which asks for a GPU, but whose kernels a CPU has too.


@pytest.fixture
def make_scaler(monkeypatch):
    from paddle.amp import grad_scaler

    tracer = SimpleNamespace(_expected_place=SimpleNamespace(is_gpu_place=lambda: True))
    monkeypatch.setattr(grad_scaler, "amp_global_state", lambda: SimpleNamespace(amp_dtype="float16"))

    def make(scale):
        with monkeypatch.context() as patch:
            patch.setattr(grad_scaler, "_dygraph_tracer", lambda: tracer)
            return paddle.amp.GradScaler(init_loss_scaling=scale)

    return make


@pytest.mark.paddle26
def test_overflow_of_the_loss_scale_is_no_bad_step(make_scaler):
    toy, scaler = Toy(), make_scaler(2.0**126)
    before = toy.state()
    toy.step(1e4, scaler)
    assert skipped_step(scaler) and float(scaler._scale) == 2.0**125
    np.testing.assert_array_equal(before[0], toy.state()[0])
    taken = toy.watch.take()
    assert taken["skipped_steps"] == 0 and 0 < taken["loss"] < 1e5
    while skipped_step(scaler):
        toy.step(1e4, scaler)
    assert (before[0] != toy.state()[0]).any() and toy.steps < 30
    toy.watch.check()


@pytest.mark.paddle26
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_overflow_at_the_smallest_loss_scale_is_a_bad_step(make_scaler, scale):
    toy, scaler = Toy(), make_scaler(scale)
    toy.model.weight.register_hook(lambda gradient: gradient * math.inf)
    toy.step(1.0, scaler)
    if scale == 2.0:  # there is a smaller one to try
        toy.watch.check()
        toy.step(1.0, scaler)
    with pytest.raises(BadStepError, match=f"step {scale:.0f}: the gradients are not finite"):
        toy.watch.check()


def test_a_loss_that_is_not_finite_is_no_overflow(make_scaler):
    toy = Toy(on_nonfinite="skip")
    scaler = make_scaler(2.0**10)
    toy.step(math.nan, scaler)
    toy.step(1.0, scaler)
    assert toy.watch.take()["skipped_steps"] == 1


def test_a_run_with_loss_scaling(tmp_path, run_loop, monkeypatch, make_scaler):
    scaler = make_scaler(2.0**126)
    monkeypatch.setattr(Precision, "scaler", lambda self: scaler)
    large = write_features(tmp_path / "large")
    for path in (large / "imagenet64_features").iterdir():
        np.save(path, np.load(path) * np.float32(300))
    config = write_config(tmp_path / "Tiny.json", "SiT", use_ema=False)
    arguments = loop_arguments("notrainer", config=config, features=large, output=tmp_path / "good", steps=16)
    run_loop("notrainer", arguments)
    assert set(read_metrics(tmp_path / "good", "skipped_steps").values()) == {0}
    norms = read_metrics(tmp_path / "good", "grad_norm")
    assert norms[1] is None and norms[16] > 0 and None not in read_metrics(tmp_path / "good", "loss").values()
    assert 1.0 < float(scaler._scale) < 2.0**126


# Flags and the tool.


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--on_nonfinite=ignore", "on_nonfinite: invalid choice: 'ignore'"),
        ("--loss_spike_factor=0.5", "loss_spike_factor must be 0 for off, or a number above 1, got 0.5"),
        ("--loss_spike_factor=nan", "loss_spike_factor must be 0 for off, or a number above 1, got nan"),
    ],
)
def test_flags(features, tmp_path, run_loop, flag, message):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "out", steps=1)
    with pytest.raises(ValueError, match=message):
        run_loop("notrainer", [*arguments, flag])


def test_replay_finds_the_layer(tmp_path, features, run_loop, monkeypatch, capsys):
    """Latents are fine, one weight is not: the layer that it is in is named."""
    config = write_config(tmp_path / "Tiny.json", "SiT")
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "a", steps=1)
    run_loop("notrainer", arguments)
    state = weights("notrainer", tmp_path / "a", 1)
    state["blocks.1.mlp.fc1.bias"][3] = np.inf
    save_pdparams(state, str(tmp_path / "spoiled.pdparams"))
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "b", steps=3)
    with pytest.raises(
        ValueError, match=r"spoiled\.pdparams: blocks\.1\.mlp\.fc1\.bias has 1 of 128 values .* not finite"
    ):
        run_loop("notrainer", [*arguments, "--pretrained_model_path", tmp_path / "spoiled.pdparams"])
    monkeypatch.setattr("training.checkpoints.read.check_finite", lambda state, source: None)  # as if it came later
    with pytest.raises(BadStepError, match="step 1: .*the losses of all of them are not"):
        run_loop("notrainer", [*arguments, "--pretrained_model_path", tmp_path / "spoiled.pdparams"])
    printed = replay(dump_path(tmp_path / "b", 1), monkeypatch, capsys, "--show=3")
    assert "sample 0: the first output that is not finite is that of blocks.1.mlp.fc1 (Linear)" in printed
    assert "... and 5 more samples" in printed


def test_replay_refuses_what_is_no_dump(spoiled, tmp_path, run_loop, monkeypatch, capsys):
    with pytest.raises(ValueError, match="no such folder; expected RUN/bad_steps/STEP"):
        replay(tmp_path / "none", monkeypatch, capsys)
    with pytest.raises(ValueError, match=r"not a whole dump of a step: it has no manifest\.json"):
        replay(tmp_path, monkeypatch, capsys)
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments("notrainer", config=config, features=spoiled[0], output=tmp_path / "out", steps=STEPS)
    with pytest.raises(BadStepError):
        run_loop("notrainer", arguments)
    dump = dump_path(tmp_path)
    batch, state = safe_load(dump / "batch.pdparams"), json.loads((dump / "state.json").read_text())
    raw, weights = json.loads((dump / "config.json").read_text()), safe_load(dump / "weights.pdparams")
    without_noise = {name: array for name, array in batch.items() if name != "noise"}
    other_size = {**raw, "model": {**raw["model"], "sample_size": 16}}
    for name, *parts in (("noise", raw, weights, without_noise, state), ("size", other_size, weights, batch, state)):
        files = ("config.json", "weights.pdparams", "batch.pdparams", "state.json")
        write_folder(str(tmp_path / name), zip(files, parts, strict=True))
        with pytest.raises(ValueError, match="batch.pdparams and state.json are not those of a step of config.json"):
            replay(tmp_path / name, monkeypatch, capsys)
    data = bytearray((dump / "batch.pdparams").read_bytes())
    data[len(data) // 2] ^= 1
    (dump / "batch.pdparams").write_bytes(data)
    with pytest.raises(ValueError, match="batch.pdparams is damaged: its checksum"):
        replay(dump, monkeypatch, capsys)


# Real processes.


BAD_RUNS = """
import importlib, json, sys
from pathlib import Path
from runtime.process import configure_runtime, leave_distributed
configure_runtime()
from runtime.paddle_private import keep_groups
from training.supervision.number_watch import BadStepError
keep_groups()
script = importlib.import_module("train_image_generation_trainer")
for flags in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv = [script.__file__, *flags]
    try:
        script.main()
    except BadStepError as error:
        print("ended:", error, flush=True)
leave_distributed()
"""


@pytest.mark.distributed
def test_parallel_runs(spoiled, tmp_path, monkeypatch, capsys):
    """Verdict and zeros reach the parts of weights and gradients on every rank; the dump is of the whole batch."""
    features, path, row = spoiled
    config = write_config(tmp_path / "Tiny.json", max_grad_norm=0.3)
    kinds = {"stage3": ["--sharding=stage3", "--sharding_parallel_degree=2"], "tensor": ["--tensor_parallel_degree=2"]}
    data_ranks = {"stage3": 2, "tensor": 1}
    runs = []
    for kind, flags in kinds.items():
        given = loop_arguments(
            "trainer",
            config=config,
            features=features,
            output=tmp_path / kind,
            steps=6,
            save_every=2,
            ranks=data_ranks[kind],
        )
        runs.append([*map(str, given), *flags])
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    (tmp_path / "bad_runs.py").write_text(BAD_RUNS)
    finished = launch(2, tmp_path / "bad_runs.py", [tmp_path / "runs.json"], tmp_path / "log")
    logs = [log.read_text() for log in sorted((tmp_path / "log").glob("workerlog.*"))]
    assert finished.returncode == 0, logs[0][-3000:]
    assert [log.count(f"ended: step {BAD}: the loss is nan") for log in logs] == [2, 2]
    for kind, ranks in data_ranks.items():
        dump = dump_path(tmp_path / kind)
        assert_equal(safe_load(dump / "weights.pdparams"), weights("trainer", tmp_path / kind, LAST_GOOD))
        batch = safe_load(dump / "batch.pdparams")
        assert batch["row"].tolist() == list(range(8))
        assert batch["rank"].tolist() == sorted(list(range(ranks)) * (8 // ranks))
        assert np.flatnonzero(~np.isfinite(batch["loss"])).tolist() == [row]
        assert f"Numbers of its sample {row} ({path}) are not finite" in replay(dump, monkeypatch, capsys)


@pytest.mark.distributed
def test_the_launcher_sees_the_exit_code(spoiled, tmp_path):
    """The checkpoint of the step before is still being written then; the launcher kills what is left after 3 s."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import runpy, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from runtime import files as manifest\n"
        "finish = manifest.FolderWriter.finish\n"
        "manifest.FolderWriter.finish = lambda self: (time.sleep(6), finish(self))\n"
        f"runpy.run_path({str(ROOT / 'train_image_generation_notrainer.py')!r}, run_name='__main__')\n"
    )
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(
        "notrainer", config=config, features=spoiled[0], output=tmp_path / "out", steps=STEPS, save_every=LAST_GOOD
    )
    done = launch(2, slow, arguments, tmp_path / "log")
    logs = [log.read_text() for log in sorted((tmp_path / "log").glob("workerlog.*"))]
    assert done.returncode == 65, logs
    for log in logs:
        assert f"error: step {BAD}: the loss is nan" in log and "Traceback" not in log
    assert_equal(safe_load(dump_path(tmp_path) / "weights.pdparams"), weights("notrainer", tmp_path / "out", LAST_GOOD))
