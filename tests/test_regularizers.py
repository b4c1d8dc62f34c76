"""Regularizers: their numbers, what they learn, and that ranks, accumulation and a resume change nothing."""

import json

import numpy as np
import paddle
import pytest
from support.golden import judged
from support.runs import LOOPS, TINY_MODELS, checkpoint_path, loop_arguments, run_in_process, write_config

from config.schema import resolve_config
from models import build_model
from objectives import Batch, build_objective
from objectives import regularizers as losses
from tools import plan_memory
from training.checkpoints.state import fit_regularizers
from training.parallel.memory_plan import Sizes
from training.supervision.replay import read_dump, replay
from verification import official_regularizers as official
from verification.vectors import load_golden
from weights.files import safe_load

ENTRIES = {
    "layer_sync": {"block": 1, "target_block": 2},
    "latent_alignment": {"block": 1},
    "internal_guidance": {"block": 1},
    "dispersive": {"group": 2},
    "contrastive": {},
    "representation_alignment": {"block": -2, "width": 6, "inner_width": 8},
}
LEARNED = ("internal_guidance", "latent_alignment", "representation_alignment")


def entries(*kinds):
    return [{"type": kind, **ENTRIES[kind]} for kind in kinds]


def config_of(network, *kinds, **objective):
    return resolve_config({"model": TINY_MODELS[network], "objective": {"regularizers": entries(*kinds), **objective}})


def batch(count=4):
    paddle.seed(0)
    features = paddle.randn([count, 16, 6])
    return Batch(paddle.randn([count, 4, 8, 8]), paddle.arange(count) % 3, {"features": features})


# -- Values -----------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "dispersive_1": ("dispersive_loss", ("tokens",), {"temperature": 1.0}),
    "dispersive_0p5": ("dispersive_loss", ("tokens",), {"temperature": 0.5}),
    "dispersive_twins": ("dispersive_loss", ("twin_tokens",), {}),
    "contrastive": ("contrastive_loss", ("prediction", "target", "partner_target"), {}),
    "layer_sync": ("layer_sync_loss", ("tokens", "target_tokens"), {}),
    "latent_alignment": ("latent_alignment_loss", ("projected", "latents"), {}),
    "representation_alignment": ("representation_alignment_loss", ("tokens", "features"), {}),
    "auxiliary": ("auxiliary_loss", ("prediction", "target"), {}),
}


@pytest.mark.paddle26
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_the_official_ones(name):
    arrays = load_golden("regularizers")
    function, arguments, options = FUNCTIONS[name]
    first, *others = (paddle.to_tensor(arrays[argument]) for argument in arguments)
    first.stop_gradient = False
    value = getattr(losses, function)(first, *others, **options)
    (gradient,) = paddle.grad(value.mean(), [first])
    for actual, expected in ((value, arrays[name]), (gradient, arrays[f"{name}_grad"])):
        assert list(actual.shape) == list(expected.shape)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_tokens_far_from_0_disperse_as_those_around_it():
    tokens = paddle.to_tensor(load_golden("regularizers")["tokens"])
    np.testing.assert_allclose(losses.dispersive_loss(tokens + 100), losses.dispersive_loss(tokens), rtol=1e-4)


@pytest.mark.parametrize("kind", official.REGULARIZED)
def test_losses_and_gradients_of_a_network_are_the_official_ones(kind):
    judged(official.regularized(kind))


def test_internal_guidance_is_the_official_one():
    judged(official.internal_guidance())


def test_half_precision_is_left_for_the_loss():
    arrays = {name: paddle.to_tensor(value) for name, value in load_golden("regularizers").items()}
    half = arrays["tokens"].astype("bfloat16")
    with paddle.amp.auto_cast(dtype="bfloat16"):
        value = losses.dispersive_loss(half)
    assert value.dtype == paddle.float32
    np.testing.assert_allclose(value, losses.dispersive_loss(half.astype("float32")), rtol=1e-6)


# -- In an objective --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["SiT", "DiT", "LargeDiT", "LightningDiT"])
def test_each_is_added_by_its_weight_and_leaves_the_rest_alone(network):
    config, plain = config_of(network, *ENTRIES), config_of(network)
    paddle.seed(0)
    model, objective = build_model(config), build_objective(config)
    paddle.seed(0)
    own, before = build_model(plain), build_objective(plain)
    theirs = dict(own.named_parameters())
    learned = {name for name, _ in model.named_parameters()} - theirs.keys()
    assert {name.split(".")[1] for name in learned} == {*LEARNED}
    assert all(name.startswith("regularizers.") for name in learned)
    # Each may begin later than another, so that the optimizer's one operator is not for two of them.
    assert {getattr(value, "own_steps", None) for value in model.parameters()} == {None, *LEARNED}
    for name, parameter in model.named_parameters():
        if name in theirs:
            np.testing.assert_array_equal(parameter, theirs[name])
        with paddle.no_grad():
            parameter.add_(0.05 * paddle.randn(parameter.shape))
    own.set_state_dict(model.state_dict())
    paddle.seed(1)
    drawn = before.draw(batch())
    expected = before.training_losses(own, batch(), drawn=drawn)
    paddle.seed(1)
    found = objective.training_losses(model, batch(), drawn=objective.draw(batch()))
    assert found.keys() == {*expected, *ENTRIES}
    total = expected["loss"]
    for part in objective.regularizers:
        assert found[part.name].shape == [4]
        total = total + part.sign * part.weight * found[part.name]
    np.testing.assert_allclose(found["loss"], total, rtol=2e-5)
    found["loss"].mean().backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if name in learned)
    place, noise = paddle.to_tensor([0.1, 0.7, 0.2, 0.4]), paddle.randn([4, 4, 8, 8])
    model.eval(), own.eval()
    held_out = [of.validation_losses(net, batch(), place, noise) for of, net in ((objective, model), (before, own))]
    np.testing.assert_array_equal(*held_out)


def test_latents_are_cut_as_the_network_puts_them_together():
    model = build_model(TINY_MODELS["SiT"])
    x = paddle.randn([2, model.out_channels, 8, 8])
    np.testing.assert_array_equal(model.unpatchify(losses.latents_as_tokens(x, 16)), x)


def test_what_compares_samples_sees_groups_alone():
    """Two groups are two batches, so that ranks and micro-batches of whole groups change nothing."""
    config = config_of("SiT", "dispersive", "contrastive")
    paddle.seed(0)
    model, objective = build_model(config), build_objective(config)
    with paddle.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * paddle.randn(parameter.shape))
    whole = batch()
    drawn = objective.draw(whole)
    together = objective.training_losses(model, whole, drawn=drawn)
    halves = [
        objective.training_losses(
            model,
            Batch(whole.x[part], whole.y[part]),
            drawn={name: value[part] for name, value in drawn.items()},
        )
        for part in (slice(0, 2), slice(2, 4))
    ]
    for name in ("dispersive", "contrastive", "loss"):
        apart = np.concatenate([half[name].numpy() for half in halves])
        np.testing.assert_allclose(together[name], apart, rtol=1e-5)
    assert not np.allclose(together["dispersive"][0], together["dispersive"][2])
    odd = Batch(whole.x[:3], whole.y[:3])
    with pytest.raises(ValueError, match="^the regularizer dispersive compares .* group of 2; .* got 3 samples$"):
        objective.training_losses(model, odd)


def test_a_network_without_what_is_learned_is_named():
    config = config_of("SiT", "latent_alignment")
    model = build_model(config["model"])
    with pytest.raises(
        ValueError, match=r"^the network has no regularizers\.latent_alignment: build it from a config with that$"
    ):
        build_objective(config).training_losses(model, batch())


# -- In a run ---------------------------------------------------------------------------------------------------------


def run(loop, config, features, output, steps, *extra, **options):
    run_in_process(loop, [*loop_arguments(loop, config=config, features=features, output=output, steps=steps), *extra])
    return checkpoint_path(loop, output, steps)


@pytest.mark.paddle26
def test_a_resume_with_other_regularizers_says_what_becomes_of_them(features, tmp_path, capsys):
    def config(*kinds):
        objective = {"type": "transport", "regularizers": entries(*kinds)}
        return write_config(tmp_path / "Tiny.json", "SiT", objective)

    kinds = ("latent_alignment", "internal_guidance")
    begun = run("notrainer", config("dispersive", kinds[0]), features, tmp_path / "first", 3)
    before = safe_load(begun / "model_state.pdparams")
    capsys.readouterr()
    resume = ["--resume", begun]
    after = run("notrainer", config("contrastive", kinds[1]), features, tmp_path / "second", 4, *resume)
    said = capsys.readouterr().out
    assert "what regularizers learned, begun anew: internal_guidance; dropped: latent_alignment" in said
    state, optimizer = (safe_load(after / name) for name in ("model_state.pdparams", "optimizer.pdopt"))
    learned = {name for name in state if name.startswith("regularizers.")}
    assert {name.split(".")[1] for name in learned} == {kinds[1]}
    assert state.keys() - learned == {name for name in before if not name.startswith("regularizers.")}
    # They have done one step, the others four; Paddle keeps the power of the next one.
    powers = {name: float(entry["beta1_pow_acc"][0]) for name, entry in optimizer.items()}
    assert powers.keys() == state.keys() - {"pos_embed"}
    assert all(np.isclose(power, 0.9 ** (2 if name in learned else 5)) for name, power in powers.items())
    # A second final layer that moves goes on there. Back again, and in the other loop; weights alone are a start too.
    moved = {"type": "transport", "regularizers": [{**entries(kinds[1])[0], "block": 2}]}
    config_file = write_config(tmp_path / "Tiny.json", "SiT", moved)
    run("notrainer", config_file, features, tmp_path / "moved", 5, "--resume", after)
    said = "regularizers go on with other settings: internal_guidance block 1 there, 2 here\n"
    assert said in capsys.readouterr().out
    again = run(
        "trainer", config("dispersive", *kinds), features, tmp_path / "third", 5, f"--resume_from_checkpoint={after}"
    )
    said = capsys.readouterr().out
    assert "note: what regularizers learned, begun anew: latent_alignment\n" in said
    start = ["--pretrained_model_path", again]
    run("notrainer", config(), features, tmp_path / "fourth", 1, *start)
    assert "what regularizers learned, dropped: internal_guidance, latent_alignment" in capsys.readouterr().out


@pytest.mark.paddle26
def test_what_was_learned_in_other_sizes_starts_anew_as_a_whole():
    """Layers that happen to fit would be out of step with those that are new."""

    def network(width):
        entry = {"type": "representation_alignment", "block": 1, "width": width, "inner_width": 8}
        return build_model({"model": TINY_MODELS["SiT"], "objective": {"regularizers": [entry]}})

    model, wider = network(6), network(7)
    state = {name: value.numpy() for name, value in wider.named_parameters()}
    note, new = fit_regularizers(state, model)
    assert note == "what regularizers learned, begun anew: representation_alignment"
    own = {name: value for name, value in model.named_parameters() if name.startswith("regularizers.")}
    assert new == [*own] and state.keys() == dict(model.named_parameters()).keys()
    for name, value in own.items():
        np.testing.assert_array_equal(state[name], value)
    assert fit_regularizers(state, model) == (None, [])


@pytest.mark.parametrize("loop", LOOPS)
def test_micro_batches_that_are_no_multiple_of_a_group_are_refused(features, tmp_path, loop):
    objective = {"type": "transport", "regularizers": [{"type": "dispersive", "group": 3}]}
    config = write_config(tmp_path / "Tiny.json", "SiT", objective)
    what = (
        r"objective: regularizers\[0\]: dispersive compares the samples of a group of 3; expected micro-batches that "
    )
    with pytest.raises(ValueError, match=what + "are a multiple of it, got 8 samples a rank"):
        run(loop, config, features, tmp_path / "out", 1)


def test_a_bad_step_is_kept_and_done_again_with_them(features, tmp_path):
    objective = {"type": "transport", "regularizers": entries("dispersive", "internal_guidance")}
    config = write_config(tmp_path / "Tiny.json", "SiT", objective, learning_rate=1e30, max_grad_norm=-1)
    with pytest.raises(ValueError, match="python tools/replay_step.py"):
        run("notrainer", config, features, tmp_path / "out", 5)
    (dump,) = (tmp_path / "out").rglob("bad_steps/*")
    resolved, arrays, state = read_dump(str(dump))
    found, gradients, layer = replay(str(dump), resolved, arrays, state)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(arrays["loss"]))
    assert "regularizers.internal_guidance.linear.weight" in gradients


# -- In the plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["SiT", "LargeDiT", "LightningDiT"])
def test_the_plan_counts_what_they_learn_in_the_networks_order(network):
    config = config_of(network, *ENTRIES)
    built = [(name, tuple(p.shape)) for name, p in build_model(config).named_parameters()]
    assert [(p.name, p.shape) for p in Sizes(config).parameters] == built


def test_plans_are_of_micro_batches_of_whole_groups(tmp_path):
    def plan(entry, *flags):
        path = write_config(tmp_path / "Tiny.json", "SiT", {"type": "transport", "regularizers": [entry]})
        plan_memory.main(
            ["--config_file", path, "--gpu_memory=80", "--json", str(tmp_path / "plan.json"), "--overwrite", *flags]
        )
        return json.loads((tmp_path / "plan.json").read_text())

    groups = {"type": "dispersive", "group": 32}
    found = plan(groups, "--world_size=4")
    assert found["fitting"] and all(way["setting"]["batch"] % 32 == 0 for way in found["fitting"])
    with pytest.raises(ValueError, match=r"dispersive compares .* group of 32; .* got 16 samples a rank$"):
        plan(groups, "--world_size=16")
    with pytest.raises(ValueError, match="^objective: regularizers: representation_alignment: width is missing, "):
        plan({"type": "representation_alignment", "block": 1})
