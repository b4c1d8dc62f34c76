"""The samplers of a diffusion beside DDIM and DDPM: diffusers' numbers, orders, numbers of steps, exports."""

import math

import numpy as np
import paddle
import pytest
from support.golden import load_golden, relative_error
from support.pipelines import make_config

from diffusion import get_named_beta_schedule
from sampling.schedulers import CheckpointSampler, PipelineSampler, make_scheduler, pipeline_scheduler, run_scheduler
from sampling.step_counts import EXPORTED, SCHEDULERS, VISITS, own_scheduler

pytestmark = pytest.mark.paddle26

SOLVERS = [name for name in SCHEDULERS if name != "ddim"]
GOLDEN = sorted(name for name in load_golden("multistep") if name.count("-") == 4)
MEAN, STD = 0.8, 0.35  # of the data: each entry is near MEAN or -MEAN


def make_objective(schedule="linear", steps=1000, kind="epsilon"):
    settings = {"noise_schedule": schedule, "diffusion_steps": steps, "predict_xstart": kind == "sample"}
    return {"type": "diffusion", **settings}


def schedule_of(objective):
    """Returns alpha and sigma of each timestep."""
    squares = np.cumprod(1 - get_named_beta_schedule(objective["noise_schedule"], objective["diffusion_steps"]))
    return np.sqrt(squares), np.sqrt(1 - squares)


def exact_denoiser(objective):
    """What a network learns of that data, with as many channels of variance."""
    alphas, sigmas = schedule_of(objective)

    def denoiser(x, t):
        a, s, noisy = alphas[int(t[0])], sigmas[int(t[0])], x.numpy().astype("float64")
        variance = (a * STD) ** 2 + s**2
        data = np.tanh(a * MEAN * noisy / variance) * MEAN * s**2 / variance + a * STD**2 / variance * noisy
        output = data if objective["predict_xstart"] else (noisy - a * data) / s
        return paddle.to_tensor(np.concatenate([output, np.full_like(output, 9)], axis=1).astype("float32"))

    return denoiser


@pytest.mark.parametrize("case", GOLDEN)
def test_every_state_is_the_one_of_diffusers(case):
    golden = load_golden("multistep")
    name, schedule, steps, kind, count = case.split("-")
    schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule]
    objective = make_objective(schedule, int(steps), kind)
    scheduler = pipeline_scheduler(make_scheduler(objective), name)
    states = []
    noise = paddle.to_tensor(golden["noise"])
    run_scheduler(
        scheduler, exact_denoiser(objective), noise, int(count), callback=lambda *step: states.append(step[2].numpy())
    )
    assert scheduler.timesteps.tolist() == golden[f"{case}-t"].tolist()
    for state, expected in zip(states, golden[case], strict=True):
        assert relative_error(state, expected) < 1e-4


@pytest.mark.parametrize("name, lowest, highest", [("dpm", 2, 2.5), ("dpm3", 2.8, 9), ("unipc", 2.8, 9)])
def test_converges_to_the_exact_flow_at_its_order(name, lowest, highest):
    """Of Gaussian data; at timestep 99, which is before the last, long step. A corrector adds an order."""
    objective, errors = make_objective(), []
    alphas, sigmas = schedule_of(objective)

    def denoiser(x, t):
        a, s = alphas[int(t[0])], sigmas[int(t[0])]
        return (x.astype("float64") - a * MEAN) * (s / ((a * STD) ** 2 + s**2))

    noise, times = paddle.to_tensor([[[[-1.0, 0.2, 1.5]]]], dtype="float64"), [999, 99]
    widths = [np.hypot(alphas[t] * STD, sigmas[t]) for t in times]
    exact = alphas[99] * MEAN + (noise.numpy() - alphas[999] * MEAN) * widths[1] / widths[0]
    for count in (10, 50):
        states, scheduler = [noise], pipeline_scheduler(make_scheduler(objective), name)
        run_scheduler(scheduler, denoiser, noise, count, callback=lambda *step, s=states: s.append(step[2]))
        errors.append(np.abs(states[scheduler.timesteps.tolist().index(99)].numpy() - exact).max())
    assert lowest < math.log(errors[0] / errors[1]) / math.log(5) < highest


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", SOLVERS)
def test_makes_as_many_steps_as_it_is_asked_for(schedule, name):
    objective = make_objective(schedule)
    scheduler = pipeline_scheduler(make_scheduler(objective), name)
    first = {"linear": 999, "squaredcos_cap_v2": 995}[schedule]  # the last steps of the second are cut
    for count in (1, 2, 14, 15, 61, 103, 121, 201, 769, 990, 1000):
        scheduler.set_timesteps(count)
        timesteps = scheduler.timesteps.numpy()
        assert timesteps[0] == first and timesteps[-1] >= 0 and (np.diff(timesteps) < 0).all()
        if schedule == "linear" or count < 250:
            assert len(timesteps) == count
    for count in (61, 769):  # ppdiffusers asks for timestep -1; after timestep 0 the result is NaN
        seen, noise = [], paddle.ones([1, 1, 1, 1])
        options = {"callback": lambda *step, seen=seen: seen.append(step[:2])}
        latents = run_scheduler(scheduler, exact_denoiser(objective), noise, count, **options)
        assert np.isfinite(latents.numpy()).all() and seen[-1] == (len(seen), len(seen))


@pytest.mark.parametrize("name", ["dpm3", "unipc", "ddim"])
def test_ends_at_the_data(name):
    """Data of one point, of which an exact network leaves no noise; "dpm" leaves some, as ppdiffusers does."""
    objective, noise = make_objective(), paddle.ones([1, 1, 1, 1])
    alphas, sigmas = schedule_of(objective)

    def denoiser(x, t):
        return (x - alphas[int(t[0])] * MEAN) / sigmas[int(t[0])]

    def sample(name):
        return run_scheduler(pipeline_scheduler(make_scheduler(objective), name), denoiser, noise, 8).item()

    assert sample(name) == pytest.approx(MEAN, abs=1e-4)
    assert abs(sample("dpm") - MEAN) > 1e-3


def test_what_samples_and_what_is_exported():
    config = make_config()
    denoiser, noise = exact_denoiser(config["objective"]), paddle.ones([2, 1, 2, 2])
    checkpoint = CheckpointSampler(config)
    results = {}
    for name in SOLVERS:
        results[name] = checkpoint.sample(denoiser, noise, num_steps=16, method=name).numpy()
        for own in EXPORTED:  # whatever scheduler the folder has
            folder = PipelineSampler(make_scheduler(config["objective"], own))
            latents = folder.sample(denoiser, noise, num_steps=16, method=name).numpy()
            np.testing.assert_allclose(latents, results[name], rtol=1e-5)
    assert len({value.tobytes() for value in results.values()}) == len(SOLVERS)
    for name in EXPORTED:
        scheduler = make_scheduler(config["objective"], name)
        assert own_scheduler({**scheduler.config, "_class_name": type(scheduler).__name__}) == name
        assert type(scheduler).__module__.startswith("ppdiffusers.")
    assert own_scheduler({"_class_name": "EDMEulerScheduler"}) is None
    with pytest.raises(ValueError, match="unknown scheduler 'unipc'; known: ddim, dpm, dpm3$"):
        make_scheduler(config["objective"], "unipc")
    with pytest.raises(ValueError, match="unknown scheduler 'odd'; known: ddim, dpm, dpm3, unipc$"):
        folder.sample(denoiser, noise, num_steps=4, method="odd")
    assert set(VISITS.values()) == {"ddim", "dpm"}  # the keys of `_timestep_fit` in exported folders


def test_a_folders_own_settings_do_not_change_what_a_name_means():
    from ppdiffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    objective, noise = make_objective(), paddle.ones([1, 1, 1, 1])
    plain = make_scheduler(objective)
    folders = [
        UniPCMultistepScheduler.from_config(plain.config, solver_order=3, solver_type="bh1"),
        DPMSolverMultistepScheduler.from_config(plain.config, algorithm_type="sde-dpmsolver++", solver_order=1),
    ]
    for name in ("dpm3", "unipc"):
        expected = run_scheduler(pipeline_scheduler(plain, name), exact_denoiser(objective), noise, 6)
        for folder in folders:
            latents = run_scheduler(pipeline_scheduler(folder, name), exact_denoiser(objective), noise, 6)
            assert latents.item() == pytest.approx(expected.item(), rel=1e-6)
