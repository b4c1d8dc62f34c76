"""The parts both loops share: EMA, data order, optimizer, schedules, precision, checkpoints, logs."""

import json

import numpy as np
import paddle
import pytest
from support import device
from support.golden import GOLDEN, judged, load_golden, relative_error, replay
from support.runs import TINY_MODELS, checkpoint_path, loop_arguments, read_losses, write_config

from config.options import TRAINING_KEYS
from config.schema import check_section, resolve_config
from features.order import MicroBatchSampler, SampleStream, total_steps
from models import build_model
from runtime.precision import Precision, resolve_precision
from training import EMA, flat
from training.checkpoints.experiment import open_checkpoint
from training.checkpoints.read import load_checkpoint
from training.checkpoints.state import restore_model
from training.optimizer import build_lr_scheduler, build_optimizer, lr_factor, optimizer_state, set_optimizer_state
from verification.official import Averaged as Toy
from verification.official import averages
from verification.training_steps import OFFICIAL_MODEL as TRAIN_CONFIG
from verification.training_steps import official_steps
from weights.runs import list_checkpoints

# EMA.


@pytest.mark.gpu
def test_ema_is_the_official_update():
    judged(averages())


@pytest.mark.gpu
def test_ema_prefers_master_weights_and_warms_up():
    toy = Toy()
    ema = EMA(toy, decay=0.5)
    assert sorted(ema.state_dict()) == ["b", "frozen", "w"]
    start = toy.b.numpy().copy()
    ema.update(toy, {toy.b.name: paddle.full([7], 3.0)})
    average = ema.state_dict()["b"]
    assert average.dtype == paddle.float32
    np.testing.assert_allclose(average, 0.5 * start + 1.5)
    warm = EMA(toy, decay=0.9999, warmup=True)
    decays = []
    for _ in range(3):
        decays.append(warm.current_decay())
        warm.update(toy)
    assert decays == [1 / 10, 2 / 11, 3 / 12]


@pytest.fixture
def joined(monkeypatch):
    """Joins tensors as on a GPU, but those of more than 16 elements stay alone."""
    monkeypatch.setattr(flat, "pays", lambda: True)
    monkeypatch.setattr(flat, "BUCKET_SIZE", 64)


def test_joined_averages_are_those_of_each_parameter(joined):
    alone, together = EMA(Toy(), decay=0.9, on_host=True), EMA(toy := Toy(), decay=0.9)
    assert [names for names, _ in together._buckets] == [["w"], ["b", "frozen"]]
    alone.set_state_dict(state := {key: value + 1.0 for key, value in toy.state_dict().items() if key != "buf"})
    together.set_state_dict(state)
    master = {toy.b.name: paddle.full([7], 3.0)}
    for average in (alone, together):
        for _ in range(3):
            average.update(toy, master)
    saved = together.state_dict()
    for name, value in alone.state_dict().items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)
        assert saved[name].shape == value.shape


# Order of the data.


def test_every_sample_once_an_epoch_over_all_ranks():
    samplers = [
        MicroBatchSampler(25, global_batch_size=10, accumulation_steps=1, rank=rank, world_size=2, seed=3, last_step=5)
        for rank in range(2)
    ]
    steps = [sum(parts, []) for parts in zip(*samplers, strict=True)]
    stream = sum(steps, [])
    assert all(len(step) == 10 for step in steps)
    first, second = stream[:25], stream[25:]
    assert sorted(first) == sorted(second) == list(range(25))
    assert first != second and first != sorted(first)
    assert SampleStream(25, seed=3).take(0, 50).tolist() == stream
    assert SampleStream(25, seed=4).take(0, 25).tolist() != first


def test_batches_do_not_depend_on_ranks_or_accumulation():
    def global_batches(world, accumulation):
        samplers = [
            iter(
                MicroBatchSampler(
                    30,
                    global_batch_size=12,
                    accumulation_steps=accumulation,
                    rank=rank,
                    world_size=world,
                    seed=0,
                    last_step=4,
                )
            )
            for rank in range(world)
        ]
        return [
            [index for _ in range(accumulation) for sampler in samplers for index in next(sampler)] for _ in range(4)
        ]

    expected = global_batches(1, 1)
    assert global_batches(2, 1) == global_batches(3, 2) == global_batches(1, 4) == expected


def test_resuming_continues_the_stream_without_reading_what_went_before():
    def make():
        return MicroBatchSampler(
            30, global_batch_size=8, accumulation_steps=2, rank=0, world_size=1, seed=0, last_step=10
        )

    whole, resumed = make(), make()
    resumed.resume(7, 56)
    assert list(resumed) == list(whole)[14:] and len(resumed) == 6
    assert resumed.epoch(10) == whole.epoch(10) == 80 / 30
    # A run that goes on with another batch size goes on in the stream where it stopped.
    resumed.resume(7, 20)
    assert next(iter(resumed)) == whole.stream.take(20, 24).tolist()


def test_length_of_a_run():
    assert total_steps(100, global_batch_size=32, max_steps=7, epochs=2) == 7
    assert total_steps(100, global_batch_size=32, max_steps=-1, epochs=2) == 6
    resumed = {"max_steps": -1, "epochs": 2, "first_step": 4}  # of batches of 20
    assert total_steps(100, global_batch_size=40, samples_seen=80, **resumed) == 4 + 3
    assert total_steps(100, global_batch_size=10, samples_seen=80, **resumed) == 4 + 12
    assert total_steps(30, global_batch_size=10, samples_seen=80, **resumed) == 4  # a smaller set
    with pytest.raises(ValueError, match="global batch size 10 is not divisible by 4 data-parallel ranks"):
        MicroBatchSampler(9, global_batch_size=10, accumulation_steps=1, rank=0, world_size=4, seed=0, last_step=1)


# Optimizer and schedules.


def test_learning_rate_schedules():
    defaults = resolve_config({"model": TRAIN_CONFIG, "training": {"warmup_steps": 10, "lr_end": 0.0}})["training"]

    def factors(kind, steps=(0, 5, 10, 55, 100), **options):
        training = {**defaults, "lr_scheduler_type": kind, **options}
        return [round(lr_factor(training, step, total_steps=100), 6) for step in steps]

    assert factors("constant") == [0, 0.5, 1, 1, 1]
    assert factors("linear") == [0, 0.5, 1, 0.5, 0]
    assert factors("cosine") == [0, 0.5, 1, 0.5, 0]
    assert factors("polynomial", power=2.0, lr_end=1e-3, learning_rate=1e-2) == [0, 0.5, 1, 0.325, 0.1]


def test_schedules_are_those_of_paddlenlp():
    from paddlenlp.trainer.trainer_utils import get_scheduler

    for kind in ("constant", "constant_with_warmup", "linear", "cosine", "polynomial"):
        theirs = get_scheduler(kind, learning_rate=2e-4, num_warmup_steps=5, num_training_steps=40, lr_end=1e-5)
        given = {"learning_rate": 2e-4, "lr_scheduler_type": kind, "warmup_steps": 5, "lr_end": 1e-5}
        ours = build_lr_scheduler(check_section(TRAINING_KEYS, given, "test"), 40)
        for step in range(41):
            if kind != "constant":  # theirs ignores the warm-up
                assert ours.get_lr() == pytest.approx(theirs.get_lr(), rel=1e-6, abs=1e-12), (kind, step)
            ours.step()
            theirs.step()


@pytest.mark.gpu
@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_clipping_and_schedule_in_the_loops(loop, features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / "out", steps=6)
    run_loop(loop, [*arguments, "--max_grad_norm=0.01", "--lr_scheduler_type=linear", "--warmup_steps=2"])
    path = tmp_path / "out/metrics.jsonl" if loop == "trainer" else next(tmp_path.glob("out/*/metrics.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rows[0]["grad_norm"] > 0.1  # reported before clipping
    state = load_checkpoint(checkpoint_path(loop, tmp_path / "out", 6)).optimizer
    # moment1 after six steps of gradients clipped to a global norm of 0.01.
    norm = sum((entry["moment1"] ** 2).sum() for entry in state.values()) ** 0.5
    assert 0 < norm <= 0.01 * (1 - 0.9**6) * 1.01


# The official training loop, and its checkpoints.


@pytest.mark.gpu
@pytest.mark.paddle26
def test_four_steps_are_the_official_ones():
    judged(official_steps())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_operator_updates_as_one_for_each_parameter(weight_decay):
    training = resolve_config({"model": TRAIN_CONFIG})["training"]
    training = {**training, "learning_rate": 1e-2, "weight_decay": weight_decay}
    toys, rng = [Toy(), Toy()], np.random.default_rng(0)
    toys[1].set_state_dict(toys[0].state_dict())
    options = {"beta1": training["adam_beta1"], "beta2": training["adam_beta2"], "epsilon": training["adam_epsilon"]}
    optimizers = [
        build_optimizer(toys[0], training, build_lr_scheduler(training, 10)),
        paddle.optimizer.AdamW(1e-2, parameters=[toys[1].w, toys[1].b], weight_decay=weight_decay, **options),
    ]
    for _ in range(4):
        gradients = {"w": rng.normal(size=[5, 7]), "b": rng.normal(size=[7])}
        for toy, optimizer in zip(toys, optimizers, strict=True):
            for name, gradient in gradients.items():
                (getattr(toy, name) * paddle.to_tensor(gradient, "float32")).sum().backward()
            optimizer.step()
            optimizer.clear_grad()
    states = [optimizer_state(optimizer, toy) for optimizer, toy in zip(optimizers, toys, strict=True)]
    for name in ("w", "b"):
        np.testing.assert_array_equal(getattr(toys[0], name), getattr(toys[1], name))
        for key, value in states[0][name].items():
            np.testing.assert_array_equal(value, states[1][name][key], err_msg=f"{name} {key}")


def test_the_norm_of_joined_gradients(joined):
    gradients = [paddle.randn(shape) for shape in ([5, 7], [7], [3, 2, 2], [2], [16], [16], [16])]
    gradients.append(paddle.randn([6]).astype("float16"))
    kept = [gradient.numpy().copy() for gradient in gradients]
    squares = flat.squared_norms(gradients)
    assert len(squares) == 4 and {square.dtype for square in squares} == {paddle.float32}
    expected = sum(np.square(gradient.astype("float64")).sum() for gradient in kept)
    np.testing.assert_allclose(sum(map(float, squares)), expected, rtol=1e-6)
    for gradient, before in zip(gradients, kept, strict=True):
        np.testing.assert_array_equal(gradient, before)


@pytest.mark.gpu
def test_official_training_checkpoint_goes_on_with_the_official_steps(monkeypatch):
    from diffusion import create_diffusion

    arrays = load_golden("dit_train_steps")
    config = resolve_config({"model": TRAIN_CONFIG})
    checkpoint = open_checkpoint(GOLDEN / "dit_tiny_train_ckpt.pt", config)
    assert checkpoint.progress["global_step"] == 2
    assert checkpoint.progress["samples_seen"] == 2 * 6  # the global batch in its args, not this run's 256
    model = build_model(config)
    ema = EMA(model)
    restore_model(checkpoint, model, [ema])
    training = config["training"]
    optimizer = build_optimizer(model, training, build_lr_scheduler(training, 4))
    set_optimizer_state(optimizer, model, checkpoint.optimizer)

    model.eval()
    x, t, y = paddle.to_tensor(arrays["x"][0]), paddle.to_tensor(arrays["t"][1]), paddle.to_tensor(arrays["fwd_y"])
    assert relative_error(model(x, t, y), arrays["fwd_model2"]) < 6e-5

    model.train()
    diffusion = create_diffusion("")
    for step in (2, 3):
        replay(monkeypatch, "rand", [arrays["drop_rand"][step]])
        x0, t, y, noise = (paddle.to_tensor(arrays[key][step]) for key in ("x", "t", "y", "noise"))
        loss = diffusion.training_losses(model, x0, t, {"y": y}, noise=noise)["loss"]
        np.testing.assert_allclose(loss, arrays["loss"][step], rtol=6e-5)
        loss.mean().backward()
        optimizer.step()
        optimizer.clear_grad()
        ema.update(model)

    from models.state import official_to_paddle

    for prefix, state in (("p4", dict(model.named_parameters())), ("ema4", ema.state_dict())):
        for key, value in arrays.items():
            if key.startswith(prefix + ":"):
                name = key.split(":", 1)[1]
                expected = official_to_paddle({name: value})[name]
                assert relative_error(state[name], expected) < 6e-5, key


@pytest.mark.gpu
@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_loops_resume_an_official_training_checkpoint(loop, features, tmp_path, run_loop):
    path = tmp_path / "DiT_official.json"
    path.write_text(json.dumps({"model": TRAIN_CONFIG}))
    arguments = loop_arguments(loop, config=str(path), features=features, output=tmp_path / "out", steps=4)
    resume = "--resume" if loop == "notrainer" else "--resume_from_checkpoint"
    run_loop(loop, [*arguments, resume, GOLDEN / "dit_tiny_train_ckpt.pt"])
    assert list(read_losses(tmp_path / "out")) == [3, 4]


def test_optimizer_state_does_not_depend_on_paddles_names():
    config = resolve_config({"model": TRAIN_CONFIG})

    def make():
        model = build_model(config)
        return model, build_optimizer(model, config["training"], build_lr_scheduler(config["training"], 4))

    def step(model, optimizer):
        paddle.seed(5)
        labels, times = paddle.to_tensor([1, 2]), paddle.to_tensor([4, 5])
        model(paddle.randn([2, 4, 8, 8]), times, labels).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()

    first, second = make(), make()
    second[0].set_state_dict(first[0].state_dict())
    step(*first)
    second[0].set_state_dict(first[0].state_dict())
    set_optimizer_state(second[1], second[0], optimizer_state(first[1], first[0]))
    step(*first)
    step(*second)
    for (name, a), b in zip(first[0].named_parameters(), second[0].parameters(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    with pytest.raises(ValueError, match="the optimizer state has no moment1 of x_embedder.proj.weight"):
        set_optimizer_state(first[1], first[0], {})


# Precision.


def test_cpu_computes_in_float32_and_says_so():
    precision = resolve_precision("bfloat16", "O2", device="cpu")
    assert precision.dtype == "float32" and not precision.low_precision_weights
    assert "Paddle on a CPU computes in float32" in precision.note
    assert resolve_precision("float32", "O1", device="cpu") == Precision()


def test_half_precision_on_gpus():
    assert resolve_precision("bfloat16", "O1", device="gpu:0", compute_capability=(8, 0)).dtype == "bfloat16"
    assert resolve_precision("float16", "O2", device="gpu:0", compute_capability=(7, 0)).low_precision_weights
    with pytest.raises(ValueError, match=r"bfloat16 needs a GPU of compute capability 8.0 or newer.*7.0; use float16"):
        resolve_precision("bfloat16", "O1", device="gpu:0", compute_capability=(7, 0))


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
@pytest.mark.parametrize(
    "flags", [["--bf16", "True"], ["--fp16", "True", "--fp16_opt_level", "O2"]], ids=["bf16", "fp16"]
)
def test_half_precision_asked_for_on_a_cpu_trains_in_float32(loop, flags, features, tmp_path, run_loop, capsys):
    config = write_config(tmp_path / "Tiny.json")
    plain = loop_arguments(loop, config=config, features=features, output=tmp_path / "plain", steps=3)
    run_loop(loop, plain)
    assert "float32" not in capsys.readouterr().out.replace('"amp_dtype": "float32"', "")
    asked = loop_arguments(loop, config=config, features=features, output=tmp_path / "asked", steps=3)
    run_loop(loop, [*asked, *flags])
    assert capsys.readouterr().out.count("Paddle on a CPU computes in float32 whatever AMP says") == 1
    assert read_losses(tmp_path / "asked") == read_losses(tmp_path / "plain")


# Checkpoints and output folders.


@pytest.mark.gpu
@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
@pytest.mark.parametrize(("dtype", "level"), [("bfloat16", "O1"), ("bfloat16", "O2"), ("float16", "O1")])
def test_half_precision_trains_as_float32_does(loop, dtype, level, features, tmp_path, run_loop):
    if device.DEVICE == "cpu":
        pytest.skip("on a CPU Paddle computes in float32")
    if dtype == "bfloat16" and paddle.device.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU has no bfloat16")
    losses = []
    for amp in ({}, {"amp_dtype": dtype, "amp_level": level}):
        config, output = write_config(tmp_path / "Tiny.json", **amp), tmp_path / (dtype if amp else "float32")
        run_loop(loop, loop_arguments(loop, config=config, features=features, output=output, steps=6))
        losses.append(read_losses(output))
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[1] != losses[0]


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_checkpoint_folder_and_rotation(loop, features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / "out", steps=11, save_every=2)
    run_loop(loop, [*arguments, "--save_total_limit", "2"])
    last = checkpoint_path(loop, tmp_path / "out", 11)
    assert [path.rsplit("/")[-1] for path in list_checkpoints(last.parent)] == (
        ["checkpoint-10", "checkpoint-11"] if loop == "trainer" else ["0000010", "0000011"]
    )
    names = {path.name for path in last.iterdir()}
    assert names == {
        "config.json",
        "model_state.pdparams",
        "ema_state.pdparams",
        "optimizer.pdopt",
        "trainer_state.json",
        "manifest.json",
    }
    model = paddle.load(str(last / "model_state.pdparams"))
    average = paddle.load(str(last / "ema_state.pdparams"))
    names = [name for name, _ in build_model(TINY_MODELS["DiT"]).named_parameters()]  # official, no prefix
    assert list(model) == list(average) == names
    state = json.loads((last / "trainer_state.json").read_text())
    assert (state["global_step"], state["samples_seen"], state["epoch"]) == (11, 88, 2.2)
    assert json.loads((last / "config.json").read_text())["training"]["max_steps"] == 11


def test_no_ema_no_ema_file(features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json", use_ema=False)
    run_loop(
        "notrainer", loop_arguments("notrainer", config=config, features=features, output=tmp_path / "out", steps=1)
    )
    assert not (checkpoint_path("notrainer", tmp_path / "out", 1) / "ema_state.pdparams").exists()


def test_overwrite_puts_the_earlier_run_aside(features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    output = tmp_path / "out"
    arguments = loop_arguments("trainer", config=config, features=features, output=output, steps=3)
    run_loop("trainer", arguments)
    before = (output / "checkpoint-3/model_state.pdparams").read_bytes()
    run_loop("trainer", [*arguments, "--overwrite_output_dir", "True", "--seed", "5"])
    (aside,) = output.glob("previous-*")
    assert (aside / "checkpoint-3/model_state.pdparams").read_bytes() == before
    assert (output / "checkpoint-3/model_state.pdparams").read_bytes() != before
    assert list(read_losses(output)) == list(read_losses(aside)) == [1, 2, 3]


def test_resuming_an_older_checkpoint_puts_the_later_ones_aside(features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    output = tmp_path / "out"
    arguments = loop_arguments("trainer", config=config, features=features, output=output, steps=6, save_every=2)
    run_loop("trainer", arguments)
    run_loop("trainer", [*arguments, "--resume_from_checkpoint", output / "checkpoint-2"])
    (aside,) = output.glob("previous-*")
    assert sorted(path.name for path in aside.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    # Rows of steps done again are replaced.
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_each_new_experiment_gets_its_own_folder(features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "out", steps=2)
    for _ in range(2):
        run_loop("notrainer", arguments)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000-Tiny", "001-Tiny"]


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_visualdl_log_holds_the_metrics(loop, features, tmp_path, run_loop):
    from visualdl.reader.reader import LogReader  # the reader behind VisualDL's own server

    config = write_config(tmp_path / "Tiny.json")
    run_loop(
        loop,
        [
            *loop_arguments(loop, config=config, features=features, output=tmp_path / "out", steps=3),
            f"--logging_dir={tmp_path / 'vdl'}",
        ],
    )
    (log,) = (tmp_path / "vdl").glob("*.log")
    reader = LogReader(file_path=str(log))
    tags = (
        {tag for tags in reader.get_tags().values() for tag in tags}
        if hasattr(reader, "get_tags")
        else set(reader.tags())
    )
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/samples_per_second"} <= tags
    assert {"train/steps_per_second", "train/peak_memory_gib"} <= tags
    losses = [record.value for record in reader.get_data("scalar", "train/loss")]
    assert losses == pytest.approx(list(read_losses(tmp_path / "out").values()), rel=1e-6)


def test_loss_aware_timesteps_survive_a_resume(features, tmp_path, run_loop):
    loop = "notrainer"
    objective = {"timestep_sampler": "loss-second-moment", "diffusion_steps": 21}
    run = {"config": write_config(tmp_path / "Tiny.json", objective=objective), "features": features, "batch": 64}
    run_loop(loop, loop_arguments(loop, **run, output=tmp_path / "whole", steps=12, save_every=8))
    learned = load_checkpoint(checkpoint_path(loop, tmp_path / "whole", 8)).objective
    assert learned["loss_counts"].min() >= 10  # past its warm-up: timesteps are drawn by their losses
    resumed = loop_arguments(loop, **run, output=tmp_path / "resumed", steps=12)
    run_loop(loop, [*resumed, "--resume", checkpoint_path(loop, tmp_path / "whole", 8)])
    expected = {step: loss for step, loss in read_losses(tmp_path / "whole").items() if step > 8}
    assert read_losses(tmp_path / "resumed") == expected


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_starting_from_weights_with_other_classes(loop, features, tmp_path, run_loop, capsys):
    config = write_config(tmp_path / "Tiny.json")
    run_loop(loop, loop_arguments(loop, config=config, features=features, output=tmp_path / "first", steps=2))
    source = checkpoint_path(loop, tmp_path / "first", 2)
    other = tmp_path / "Other.json"
    other.write_text((tmp_path / "Tiny.json").read_text().replace('"num_classes": 10', '"num_classes": 12'))
    capsys.readouterr()
    # A learning rate of almost 0 leaves the weights where they began.
    arguments = loop_arguments(loop, config=str(other), features=features, output=tmp_path / "tuned", steps=1)
    run_loop(loop, [*arguments, f"--pretrained_model_path={source}", "--learning_rate=1e-30"])
    assert "but a new label table: it has other classes" in capsys.readouterr().out
    begun = load_checkpoint(source).averages[""]
    tuned = load_checkpoint(checkpoint_path(loop, tmp_path / "tuned", 1)).model
    table = "y_embedder.embedding_table.weight"
    assert begun.pop(table).shape[0] == 11 and tuned.pop(table).shape[0] == 13
    for name, value in begun.items():
        np.testing.assert_allclose(tuned[name], value, rtol=0, atol=1e-20, err_msg=name)


def test_explicit_auto_resumes_although_overwriting_is_asked_for(features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    output = tmp_path / "out"
    run_loop("trainer", loop_arguments("trainer", config=config, features=features, output=output, steps=2))
    arguments = loop_arguments("trainer", config=config, features=features, output=output, steps=4)
    run_loop("trainer", [*arguments, "--overwrite_output_dir=True", "--resume_from_checkpoint=auto"])
    assert list(read_losses(output)) == [1, 2, 3, 4]
    assert not list(output.glob("previous-*"))


def test_batch_size_of_the_json_is_the_trainers(features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json", global_batch_size=20)
    arguments = loop_arguments("trainer", config=config, features=features, output=tmp_path / "out", steps=2)
    run_loop("trainer", [flag for flag in arguments if not flag.startswith("--per_device")])
    assert load_checkpoint(tmp_path / "out").progress["samples_seen"] == 40


@pytest.mark.parametrize("missing", ["optimizer.pdopt", "global_step"])
def test_incomplete_checkpoints_are_refused(missing, features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    output = tmp_path / "out"
    run_loop("trainer", loop_arguments("trainer", config=config, features=features, output=output, steps=2))
    (output / "checkpoint-2/manifest.json").unlink()  # as of before there was one: the files are looked at themselves
    if missing == "global_step":
        (output / "checkpoint-2/trainer_state.json").write_text('{"a": 1}')
    else:
        (output / "checkpoint-2" / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        load_checkpoint(output / "checkpoint-2")


@pytest.mark.gpu
@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_nothing_reads_the_device_between_reports(loop, features, tmp_path, run_loop, monkeypatch):
    """Host syncs of ten more steps, reported once either way: none."""
    config = write_config(tmp_path / "Tiny.json")
    counts = []
    for steps in (10, 20):
        count = 0

        def counting(name, original):
            def method(self, *args, **kwargs):
                nonlocal count
                count += 1
                return original(self, *args, **kwargs)

            return method

        arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / str(steps), steps=steps)
        flag = "--logging_steps" if loop == "trainer" else "--log_every"
        with monkeypatch.context() as patch:
            for name in ("numpy", "item", "__float__", "__int__", "__bool__", "__array__", "tolist", "cpu"):
                patch.setattr(paddle.Tensor, name, counting(name, getattr(paddle.Tensor, name)))
            run_loop(loop, [*arguments, f"{flag}={steps}"])
        counts.append(count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_transport_settings_from_json_and_from_flags(loop, features, tmp_path, run_loop, capsys):
    settings = {"path_type": "VP", "prediction": "noise", "loss_weight": "likelihood", "train_eps": 0.01}
    configs = {
        "json": write_config(tmp_path / "Json.json", "SiT", {"type": "transport", **settings}),
        "flags": write_config(tmp_path / "Flags.json", "SiT"),
        "default": write_config(tmp_path / "Default.json", "SiT"),
        "beyond": write_config(
            tmp_path / "Beyond.json", "SiT", {"timestep_sampling": "logit-normal", "cosine_loss": True}
        ),
    }
    losses = {}
    for name, config in configs.items():
        arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / name, steps=3)
        flags = [f"--{key}={value}" for key, value in settings.items()] if name == "flags" else []
        run_loop(loop, [*arguments, *flags])
        losses[name] = read_losses(tmp_path / name)
    assert losses["json"] == losses["flags"]
    assert len({tuple(values.values()) for values in losses.values()}) == 3
    saved = load_checkpoint(checkpoint_path(loop, tmp_path / "flags", 3)).config["objective"]
    assert {key: saved[key] for key in settings} == settings
    capsys.readouterr()
    arguments = loop_arguments(loop, config=configs["default"], features=features, output=tmp_path / "note", steps=1)
    run_loop(loop, [*arguments, "--loss_weight=likelihood", "--train_eps=0.1", "--warmup_steps=1"])
    said = capsys.readouterr().out
    assert "note: loss_weight, train_eps has no effect on velocity prediction" in said
    assert "note: warmup_steps 1: the learning rate still rises at the last step, 1" in said


def test_visualdl_shows_one_curve_after_a_resume(features, tmp_path, run_loop):
    from visualdl.reader.reader import LogReader

    config = write_config(tmp_path / "Tiny.json")
    for steps in (2, 4):
        arguments = loop_arguments("trainer", config=config, features=features, output=tmp_path / "out", steps=steps)
        run_loop("trainer", [*arguments, f"--logging_dir={tmp_path / str(steps)}"])
    (log,) = (tmp_path / "4").glob("*.log")
    records = LogReader(file_path=str(log)).get_data("scalar", "train/loss")
    assert [record.id for record in records] == [1, 2, 3, 4]


# The `data` section.


def test_data_options_are_the_same_in_both_loops(features, tmp_path, run_loop):
    config = write_config(tmp_path / "Tiny.json")
    losses = {}
    for name, extra in (("all", []), ("some", ["--classes=1,4,7"]), ("in memory", ["--classes=1,4,7", "--in_memory"])):
        for loop in ("trainer", "notrainer"):
            output = tmp_path / name / loop
            arguments = loop_arguments(loop, config=config, features=features, output=output, steps=4)
            run_loop(loop, [*arguments, *extra])
            losses[name, loop] = read_losses(output)
    for name in ("all", "some", "in memory"):
        assert losses[name, "trainer"] == losses[name, "notrainer"]
    assert losses["some", "trainer"] == losses["in memory", "trainer"] != losses["all", "trainer"]


@pytest.mark.parametrize("loop", ["trainer", "notrainer"])
def test_a_resumed_run_says_that_its_data_are_others(loop, features, tmp_path, run_loop, capsys):
    config = write_config(tmp_path / "Tiny.json")
    output = tmp_path / "out"
    arguments = loop_arguments(loop, config=config, features=features, output=output, steps=2)
    run_loop(loop, arguments)
    assert "when the checkpoint was saved" not in capsys.readouterr().out
    arguments = loop_arguments(loop, config=config, features=features, output=output, steps=4)
    resume = ["--resume=auto"] if loop == "notrainer" else []
    run_loop(loop, [*arguments, *resume, "--validation_samples=4"])
    printed = capsys.readouterr().out
    assert "note: 36 samples here, 40 when the checkpoint was saved; validation_samples 4 here, 0 there" in printed
    assert "held-out samples may have been trained on before" in printed


def test_a_run_without_validation_leaves_no_file_of_it(features, tmp_path, run_loop, capsys):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments("trainer", config=config, features=features, output=tmp_path / "out", steps=1)
    run_loop("trainer", arguments)
    assert (tmp_path / "out/metrics.jsonl").is_file() and not (tmp_path / "out/validation.jsonl").exists()
    assert "on cpu, 1 process; 40 samples in" in capsys.readouterr().out
