"""Token routing: which tokens go through the middle blocks, and SPRINT's network around them."""

import numpy as np
import paddle
import pytest
from support.pipelines import DIGITS_VAE, make_config, make_pipeline
from support.runs import (
    LOOPS,
    TINY_MODELS,
    checkpoint_path,
    launch_loops,
    loop_arguments,
    read_losses,
    resume_flag,
    run_in_process,
    write_config,
)

from config.schema import resolve_config
from models import build_model
from models.hooks import Hook, Routing, Tap
from models.state import expected_shapes
from objectives import Batch, Rows, build_objective
from objectives.routing import TokenRouting
from sampling import SiTPipeline
from sampling.generator import load_generator
from sampling.pipelines.export_dit import shared_settings
from training.parallel.memory_plan import Sizes
from weights.files import safe_load

LAYERS = {"num_layers": 4}
TREAD = {"share": 0.5, "blocks": [2, 3]}


def network(kind, **options):
    """A network of four blocks whose every weight matters, in training mode, and its inputs."""
    paddle.seed(0)
    model = build_model({**TINY_MODELS[kind], **LAYERS}, **options)
    with paddle.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * paddle.randn(parameter.shape))
    return model, inputs_of()


def inputs_of():
    paddle.seed(1)
    return paddle.randn([2, 4, 8, 8]), paddle.to_tensor([0.1, 0.9]), paddle.to_tensor([1, 2]), paddle.zeros([2])


def resolved(kind, routing, **model):
    return resolve_config({"model": {**TINY_MODELS[kind], **LAYERS, **model}, "training": {"routing": routing}})


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


class Watch(Hook):
    """Keeps the tokens before each block, and those after it."""

    def __init__(self):
        self.seen, self.made = {}, {}

    def before(self, index, tokens, conditions):
        self.seen[index] = tokens
        return tokens, conditions

    def after(self, index, tokens):
        self.made[index] = tokens
        return tokens


# -- Which tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.75, 0.3, 0.05])
def test_every_sample_keeps_tokens_of_its_own(share):
    paddle.seed(0)
    routing = TokenRouting(share, [3, 9], 8)
    kept = routing.hook(routing.draw(Rows(0, 64, 64))).kept.numpy()
    assert kept.shape == (64, 64 - int(64 * share))
    assert all(len(set(row)) == len(row) for row in kept.tolist()) and kept.min() >= 0 and kept.max() < 64
    assert len({tuple(sorted(row)) for row in kept.tolist()}) == 64 or share == 0.05
    if share < 0.8:
        assert len(set(kept.flatten())) == 64  # none is always left out
    again = routing.hook(routing.draw(Rows(0, 64, 64))).kept.numpy()
    assert (kept != again).any()


@pytest.mark.parametrize(
    ("share", "side", "group"), [(0.75, 8, 2), (0.5, 6, 2), (2 / 3, 9, 3), (0.875, 8, 4), (0.7, 8, 8), (0.75, 5, 5)]
)
def test_sprint_keeps_as_many_in_each_group_of_the_grid(share, side, group):
    paddle.seed(0)
    routing = TokenRouting(share, [3, 9], side, grouped=True)
    kept = routing.hook(routing.draw(Rows(0, 64, 64))).kept.numpy()
    assert kept.shape == (64, side * side - int(side * side * share + 1e-9))
    mask = np.zeros([64, side * side], "int64")
    np.put_along_axis(mask, kept, 1, axis=1)
    counts = mask.reshape([64, side // group, group, side // group, group]).sum(axis=(2, 4))
    assert len(np.unique(counts)) == 1
    assert len(np.unique(mask, axis=0)) > 60 and mask.any(axis=0).all()


# -- In a network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(1, 2), (0, 3), (2, 2)])
def test_dropped_tokens_come_back_unchanged(kind, first, last):
    model, inputs = network(kind)
    kept = paddle.to_tensor([[3, 9, 0, 14, 5], [15, 1, 2, 3, 4]])
    watch = Watch()
    model(*inputs, hooks=(Routing(first, last, kept), watch))
    for index in range(4):
        assert watch.seen[index].shape[1] == (5 if first <= index <= last else 16)
    before = watch.made[first - 1] if first else watch.seen[0]
    for sample, row in enumerate(kept.tolist()):
        others = [token for token in range(16) if token not in row]
        after, came = watch.made[last].numpy()[sample], watch.seen[first].numpy()[sample]
        if first:
            np.testing.assert_array_equal(came, before.numpy()[sample, row])
            np.testing.assert_array_equal(after[others], before.numpy()[sample, others])
        assert (np.abs(after[row] - came) > 0).all(axis=1).all()


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_a_sample_is_routed_as_it_would_be_alone(kind, recompute):
    """Values and gradients against a pass for each sample, in which all have the same positions."""

    class Alone(Hook):
        def __init__(self, keep):
            self.keep, self.rest = keep, paddle.to_tensor([i for i in range(16) if i not in keep.tolist()])

        def before(self, index, tokens, conditions):
            if index == 1:
                self.left, self.conditions = tokens.index_select(self.rest, axis=1), conditions
                c, *rotary = conditions
                return tokens.index_select(self.keep, 1), (c, *(table.index_select(self.keep) for table in rotary))
            return tokens, self.conditions if index == 3 else conditions

        def after(self, index, tokens):
            if index != 2:
                return tokens
            back = paddle.argsort(paddle.concat([self.keep, self.rest]))
            return paddle.concat([tokens, self.left], axis=1).index_select(back, axis=1)

    model, inputs = network(kind)
    kept = paddle.to_tensor([[3, 9, 0, 14, 5], [15, 1, 2, 3, 4]])
    alone = [model(*(value[i : i + 1] for value in inputs), hooks=(Alone(kept[i]),)) for i in range(2)]
    alone = paddle.concat(alone)
    of_alone = gradients(model, alone.square().mean())
    model, inputs = network(kind, enable_recompute=recompute, single_backward=True, fused_attention=recompute)
    out = model(*inputs, hooks=(Routing(1, 2, kept),))
    np.testing.assert_allclose(out, alone, rtol=1e-3, atol=1e-5)
    of_routed = gradients(model, out.square().mean())
    assert of_routed.keys() == of_alone.keys()
    for name, gradient in of_routed.items():
        expected = of_alone[name]
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(), err_msg=name)


# -- SPRINT ------------------------------------------------------------------------------------------------------------


def test_sprint_begins_as_the_network_without_it(kind):
    plain, sprint = (
        (paddle.seed(0), build_model({**TINY_MODELS[kind], **LAYERS, "sprint_blocks": blocks}))[1]
        for blocks in (None, [2, 3])
    )
    own = {name: parameter.numpy() for name, parameter in plain.named_parameters()}
    added = {name: parameter for name, parameter in sprint.named_parameters() if name not in own}
    assert {name: parameter.shape for name, parameter in added.items()} == {
        "sprint.mask_token": [32],
        "sprint.fusion.weight": [64, 32],
        "sprint.fusion.bias": [32],
    }
    for name, parameter in sprint.named_parameters():
        if name in own:
            np.testing.assert_array_equal(parameter, own[name], err_msg=name)
    with paddle.no_grad():  # a network gives 0 at first
        for model in (plain, sprint):
            paddle.seed(3)
            model.final_layer.linear.weight.set_value(paddle.randn(model.final_layer.linear.weight.shape))
    np.testing.assert_allclose(sprint(*inputs_of()), plain(*inputs_of()), rtol=1e-4, atol=1e-6)
    twin = type(sprint)(**sprint.settings)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in twin.named_parameters()]
    config = resolved(kind, None, sprint_blocks=[2, 3])
    assert dict(shapes) == expected_shapes(config["model"])
    assert shapes == [(parameter.name, parameter.shape) for parameter in Sizes(config).parameters]


def test_sprint_fuses_both_paths(kind):
    """Mask tokens stand for dropped ones, and for all of a sample that goes without its deep path."""
    model, inputs = network(kind, sprint_blocks=[2, 3])
    kept = paddle.to_tensor([[3, 9, 0, 14, 5], [15, 1, 2, 3, 4]])
    tap = Tap([0, 2])
    deep = []
    model.sprint.register_forward_pre_hook(lambda layer, given: deep.append(given[1]))
    out = model(*inputs, hooks=(Routing(1, 2, kept, paddle.to_tensor([1, 0])), tap))
    padded = np.tile(model.sprint.mask_token.numpy(), [2, 16, 1])
    padded[1, kept[1].tolist()] = deep[0].numpy()[1]
    both = np.concatenate([tap.tokens[0].numpy(), padded], axis=-1)
    fused = both @ model.sprint.fusion.weight.numpy() + model.sprint.fusion.bias.numpy()
    np.testing.assert_allclose(tap.tokens[2], fused, rtol=1e-4, atol=1e-5)
    found = gradients(model, out.square().mean())
    assert all(np.abs(found[name]).max() > 0 for name in found if name.startswith(("sprint.", "blocks.", "layers.")))
    # On all tokens every parameter has a gradient too: data parallelism waits for it.
    everything = gradients(model, model(*inputs).square().mean())
    assert everything.keys() == found.keys() and not everything["sprint.mask_token"].any()


# -- In training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sprint", [None, [2, 3]], ids=["tread", "sprint"])
def test_losses_do_not_depend_on_ranks_and_held_out_ones_see_all_tokens(kind, sprint):
    config = resolved(kind, {"share": 0.75, **({"path_drop_prob": 0.5} if sprint else TREAD)}, sprint_blocks=sprint)
    routed, plain = build_objective(config), build_objective({**config, "training": {"routing": None}})
    model, _ = network(kind, sprint_blocks=sprint)
    paddle.seed(2)
    batch = Batch(paddle.randn([4, 4, 8, 8]), paddle.to_tensor([1, 2, 3, 4]))

    def losses(objective, rows):
        paddle.seed(5)
        part = slice(rows.start, rows.stop)
        return objective.training_losses(model, Batch(batch.x[part], batch.y[part]), rows)["loss"].numpy()

    whole = losses(routed, Rows(0, 4, 4))
    halves = np.concatenate([losses(routed, Rows(start, start + 2, 4)) for start in (0, 2)])
    np.testing.assert_allclose(halves, whole, rtol=1e-5)
    assert (np.abs(whole - losses(plain, Rows(0, 4, 4))) > 1e-5).all()  # same noise, other tokens
    place, noise = paddle.to_tensor([0.1, 0.3, 0.5, 0.7]), paddle.randn(batch.x.shape)
    model.eval()
    held_out = [objective.validation_losses(model, batch, place, noise) for objective in (routed, plain)]
    np.testing.assert_array_equal(*held_out)
    paddle.seed(5)
    drawn = routed.draw(batch)  # as a dump keeps it
    model.train()
    np.testing.assert_array_equal(routed.training_losses(model, batch, drawn=drawn)["loss"], whole)


SETTINGS = {
    "tread": ("DiT", LAYERS, TREAD),
    "sprint": ("LightningDiT", {**LAYERS, "sprint_blocks": [2, 3]}, {"share": 0.75, "path_drop_prob": 0.2}),
    "full": ("LargeSiT", {**LAYERS, "sprint_blocks": [2, 3]}, None),  # SPRINT's last part
}
# A setting, on two ranks: loop, accumulation, flags.
CASES = {
    "tread-dp": ("tread", "notrainer", 2, ()),
    "sprint-tp": ("sprint", "trainer", 2, ("--tensor_parallel_degree=2", "--recompute=True")),
    "sprint-sharding3": ("sprint", "trainer", 1, ("--sharding=stage3",)),
    "full-dp": ("full", "notrainer", 1, ()),
}


@pytest.fixture(scope="module")
def losses(features, tmp_path_factory):
    """Losses of three steps, `{step: loss}`, by setting on one process, and by case."""
    folder, outputs, runs = tmp_path_factory.mktemp("routing"), {}, []
    for setting, (kind, sizes, routing) in SETTINGS.items():
        write_config(folder / f"{setting}.json", kind, sizes=sizes, routing=routing)
    for name, (setting, loop, accumulation, flags) in {
        **{setting: (setting, "notrainer", 1, ()) for setting in SETTINGS},
        **CASES,
    }.items():
        outputs[name] = folder / name
        on_two = name in CASES
        run = {"config": str(folder / f"{setting}.json"), "features": str(features), "output": str(outputs[name])}
        ranks = 2 if on_two and "tp" not in name else 1  # with different samples
        arguments = [*loop_arguments(loop, **run, steps=3, ranks=ranks, accumulation=accumulation), *flags]
        if on_two:
            runs.append([loop, arguments])
        else:
            run_in_process(loop, arguments)
    launch_loops(2, runs, folder / "launch")
    return {name: read_losses(output) for name, output in outputs.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_parallel_training_is_the_single_process_one(losses, case):
    assert losses[case] == pytest.approx(losses[CASES[case][0]], rel=2e-5)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_with_sprint_resumes_and_its_checkpoint_is_sampled(features, tmp_path, run_loop, loop):
    kind, sizes, routing = SETTINGS["sprint"]
    config = write_config(tmp_path / "Tiny.json", kind, sizes=sizes, routing=routing)
    run_loop(loop, loop_arguments(loop, config=config, features=features, output=tmp_path / "a", steps=4, save_every=2))
    arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / "b", steps=4)
    run_loop(loop, [*arguments, resume_flag(loop, checkpoint_path(loop, tmp_path / "a", 2))])
    losses = read_losses(tmp_path / "a")
    assert read_losses(tmp_path / "b") == {step: losses[step] for step in (3, 4)}
    checkpoint = checkpoint_path(loop, tmp_path / "a", 4)
    generator = load_generator(str(checkpoint), vae=DIGITS_VAE)
    averages = build_model({**TINY_MODELS[kind], **sizes})
    averages.set_state_dict(
        {name: paddle.to_tensor(value) for name, value in safe_load(checkpoint / "ema_state.pdparams").items()}
    )
    averages.eval()
    x, t, y, _ = inputs_of()
    with paddle.no_grad():
        np.testing.assert_array_equal(generator.network(x, t, y), averages(x, t, y))


def test_a_pipeline_folder_keeps_sprint(tmp_path):
    config = make_config("SiT", sprint_blocks=[1, 2])
    pipe = make_pipeline(config)
    pipe.save_pretrained(tmp_path / "out")
    again = SiTPipeline.from_pretrained(tmp_path / "out")
    assert again.transformer.sprint_blocks == [1, 2]
    _, t, y, _ = inputs_of()
    x = paddle.randn([2, 4, pipe.transformer.sample_size, pipe.transformer.sample_size])
    with paddle.no_grad():
        np.testing.assert_array_equal(again.transformer(x, t, y), pipe.transformer(x, t, y))


@pytest.mark.parametrize(
    ("routing", "model", "message"),
    [
        ({"share": 0.5}, {}, "training: routing: blocks is missing; expected .first, last. of the blocks 1..4"),
        ({"blocks": [2, 5]}, {}, r"training: routing: blocks must be within the blocks 1..4, got \[2, 5\]"),
        ({"blocks": [3, 2]}, {}, r"training: routing: blocks must be \[first, last\], .*, or null, got \[3, 2\]"),
        ({"blocks": [0, 2]}, {}, "blocks counted from 1"),
        ({"blocks": [1, 2], "share": 1.0}, {}, "share must be a number above 0 and below 1, got 1.0"),
        ({"blocks": [1, 2], "share": 0.05}, {}, "share must be at least one of 16 tokens, got 0.05"),
        ({"blocks": [1, 2], "path_drop_prob": 0.1}, {}, "path_drop_prob is for a model with sprint_blocks"),
        ({"blocks": [1, 2]}, {"sprint_blocks": [2, 3]}, r"must be the model's sprint_blocks \[2, 3\], or be left out"),
        (None, {"sprint_blocks": [2, 5]}, r"model: sprint_blocks must be within the blocks 1..4, got \[2, 5\]"),
        ({"blocks": [1, 2], "ratio": 0.5}, {}, "training: routing: unknown key 'ratio'"),
        ([1, 2], {}, "training: routing must be an object"),
    ],
)
def test_mistakes_are_one_line(routing, model, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolved("SiT", routing, **model)
    assert "\n" not in str(caught.value)


def test_regularizers_see_all_tokens():
    def config_of(block):
        layer_sync = {"type": "layer_sync", "weight": 0.5, "block": 1, "target_block": block}
        model, objective = {**TINY_MODELS["SiT"], **LAYERS}, {"regularizers": [layer_sync]}
        return resolve_config({"model": model, "objective": objective, "training": {"routing": TREAD}})

    for block in (2, -3):
        with pytest.raises(ValueError, match=rf"target_block must not be within .* behind block {block} .* 2..3$"):
            config_of(block)
    model, (x, _, y, _) = network("SiT")
    for block in (3, 4):
        losses = build_objective(config_of(block)).training_losses(model, Batch(x, y))
        assert losses["layer_sync"].shape == [2] and (losses["layer_sync"] < 0).all()


def test_what_else_refuses_a_network_with_sprint():
    with pytest.raises(ValueError, match=r"sprint_blocks must be \[first, last\] of the blocks 1..4, got \[4, 5\]"):
        network("DiT", sprint_blocks=[4, 5])
    with pytest.raises(ValueError, match=r"sprint_blocks \[2, 3\]: ppdiffusers' transformers have no second path"):
        shared_settings(resolved("DiT", None, sprint_blocks=[2, 3])["model"])
