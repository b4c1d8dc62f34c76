"""What a network predicts, how its error is weighted, which times it sees: from a config to losses and samples."""

import json

import numpy as np
import paddle
import pytest
from support.pipelines import make_config, make_pipeline, make_vae
from support.runs import LOOPS, checkpoint_path, loop_arguments, read_losses, write_config

from config.schema import ineffective_settings, resolve_config
from diffusion import create_diffusion
from objectives import Batch, build_objective
from sampling import SiTPipeline
from sampling.generator import load_generator
from verification.tiny_runs import TINY_MODELS

OBJECTIVES = {
    "x1": ("SiT", {"prediction": "x1", "t_eps": 0.1, "timestep_sampling": "logit-normal", "logit_mean": -0.8}),
    "timestep_shift": ("SiT", {"timestep_shift": 0.3}),
    "min_snr_gamma": ("DiT", {"type": "diffusion", "min_snr_gamma": 5, "timestep_sampler": "loss-second-moment"}),
}


def read_held_out(folder):
    (file,) = folder.rglob("validation.jsonl")
    return json.loads(file.read_text())["loss"]


@pytest.mark.paddle26
@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_loops_train_alike_and_their_checkpoints_sample(name, features, tmp_path, run_loop):
    kind, objective = OBJECTIVES[name]
    changed = write_config(tmp_path / "Changed.json", kind, objective)
    runs = {loop: (loop, changed) for loop in LOOPS}
    runs["without"] = "notrainer", write_config(tmp_path / "Tiny.json", kind)
    for output, (loop, config) in runs.items():
        arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / output, steps=2)
        run_loop(loop, [*arguments, "--validation_samples=4", "--validation_steps=2"])
    trainer, notrainer, without = (read_losses(tmp_path / output) for output in runs)
    assert trainer == notrainer != without
    assert read_held_out(tmp_path / "trainer") == read_held_out(tmp_path / "notrainer")
    generator = load_generator(str(checkpoint_path("notrainer", tmp_path / "notrainer", 2)), vae=make_vae())
    for sampler in ({"sampler": "ode", "method": "heun2"}, {"sampler": "sde"}) if kind == "SiT" else ({},):
        latents = generator.sample([1, 2], num_inference_steps=5, guidance_scale=2.0, output="latents", **sampler)
        assert paddle.isfinite(latents).all()


def objective_of(kind, **settings):
    return build_objective(resolve_config({"model": TINY_MODELS[kind], "objective": settings}))


def draw(kind, size=8):
    """Returns a stand-in for a network, a batch, places, and noise."""
    channels = 8 if kind == "DiT" else 4
    output = paddle.randn([size, channels, 4, 4])
    batch = Batch(paddle.randn([size, 4, 4, 4]), paddle.zeros([size], "int64"))
    return lambda x, t, y: output, batch, paddle.linspace(0, 0.99, size), paddle.randn([size, 4, 4, 4])


@pytest.mark.parametrize(("kind", "name", "value"), [("DiT", "min_snr_gamma", 5.0), ("SiT", "timestep_shift", 0.2)])
def test_held_out_losses_are_those_of_a_run_without_weights_or_shift(kind, name, value):
    drawn = draw(kind)
    plain, changed = (objective_of(kind, **settings).validation_losses(*drawn) for settings in ({}, {name: value}))
    np.testing.assert_array_equal(plain, changed)


def test_the_sampler_of_timesteps_learns_from_weighted_losses():
    model, batch, _, noise = draw("DiT")
    losses = {}
    for gamma in (None, 1.0):
        objective = objective_of("DiT", min_snr_gamma=gamma, timestep_sampler="loss-second-moment")
        drawn = {"t": paddle.arange(8) * 100, "weights": paddle.ones([8]), "noise": noise}
        objective.training_losses(lambda x, t, y: model(x, t, y), batch, drawn=drawn)
        objective.end_step()
        losses[gamma] = objective.state_dict()["loss_history"].numpy()[::100][:8, 0]
    squares = create_diffusion("").alphas_cumprod[::100][:8]
    assert (losses[1.0] <= losses[None]).all() and (losses[1.0] < losses[None])[squares > 0.5].all()


def test_a_pipeline_folder_keeps_the_clamp(tmp_path):
    make_pipeline(make_config("SiT", {"prediction": "x1", "t_eps": 0.2})).save_pretrained(tmp_path / "out")
    transport = SiTPipeline.from_pretrained(tmp_path / "out").scheduler.transport
    assert (transport.model_type.value, transport.t_eps) == ("x1", 0.2)


def test_settings_without_effect_are_named():
    def notes(**objective):
        config = resolve_config({"model": TINY_MODELS["SiT"], "objective": objective, "training": {"max_steps": -1}})
        return ineffective_settings(config)

    assert notes(prediction="x1", t_eps=0.1, timestep_shift=0.3) == []
    assert notes(t_eps=0.1) == ["t_eps has no effect on velocity prediction"]
    assert notes(prediction="x1", loss_weight="velocity") == [
        "loss_weight has no effect on x1 prediction with the path Linear"
    ]
    assert notes(logit_mean=-0.8, logit_std=0.8) == ["logit_mean and logit_std have no effect on uniform times"]
