"""Guidance: its formulas, when which network is asked, in every sampler; guides, flags, and a run's section of it."""

import dataclasses
import json
import math
import shutil

import numpy as np
import paddle
import pytest
from PIL import Image
from support.golden import load_golden, relative_error
from support.pipelines import (
    DIGITS_VAE,
    LABELS,
    make_config,
    make_model,
    make_pipeline,
    make_vae,
    state_of,
    write_checkpoint,
)

import infer_demo_dit
import infer_demo_sit
from config.schema import ineffective_settings, resolve_config
from features.autoencoder import load_vae
from objectives import build_objective
from sampling.generator import Generator, from_weights, latent_sizes, load_generator, load_guide
from sampling.guidance import autoguidance, cfg_zero_star, guided, rescaled, shift_time
from sampling.guidance_settings import SCHEDULES, configured_guidance
from sampling.pipelines.export import export_pipeline
from sampling.times import times_of
from tools import export_inference, sample_grid, sample_npz
from training.checkpoints.find import check_run
from training.preview import Preview
from transport import Sampler, create_transport

DIT = {"sample_size": 4}  # for the digits' autoencoder
DIFFUSION = {"noise_schedule": "linear", "diffusion_steps": 40}
SAMPLERS = {
    "dit": [{"method": "ddim"}, {"method": "ddpm"}, {"method": "dpm"}],
    "sit": [{"sampler": "ode"}, {"sampler": "ode", "method": "rk4"}, {"sampler": "sde"}],
}
EVERY = [(kind, options) for kind, of_kind in SAMPLERS.items() for options in of_kind]
LATENTS = {"num_inference_steps": 5, "output": "latents"}


def dit_config(**model):
    return make_config(objective={"type": "diffusion", **DIFFUSION}, **DIT, **model)


@pytest.fixture(scope="module")
def generators():
    """Of each kind a generator, and another network of it, of another size, as its guide."""
    vae, made = load_vae(DIGITS_VAE), {}
    for name, model in (("dit", {}), ("dit_guide", {"num_layers": 1})):
        config = dit_config(**model)
        made[name] = from_weights(config, state_of(make_model(config, len(made))), vae, dtype="float32")
    for name, model in (("sit", {}), ("sit_guide", {"num_attention_heads": 3})):
        made[name] = make_pipeline(make_config("SiT", **model), vae=vae).generator
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "dit", dit_config())
    write_checkpoint(folder / "small", dit_config(num_layers=1, num_attention_heads=2))
    write_checkpoint(folder / "sit", make_config("SiT"))
    write_checkpoint(folder / "plain", make_config("SiT", class_dropout_prob=0.0))
    return folder


class Asked:
    """A network that notes on how many images it is asked at which times."""

    def __init__(self, network):
        self.network, self.calls = network, []

    def __call__(self, x, t, y):
        self.calls.append((float(t[0]), x.shape[0]))
        return self.network(x, t, y)


def counting(generator):
    """Returns a generator and the `Asked` of its network, and of its guide."""
    network, guide = Asked(generator.network), Asked(generator.guide)
    return dataclasses.replace(generator, network=network, guide=guide if generator.guide else None), network, guide


# -- Formulas ---------------------------------------------------------------------------------------------------------


def test_formulas_are_those_of_diffusers_and_lightning_dit():
    golden = load_golden("guidance")
    main, guide, cond, uncond, t = (paddle.to_tensor(golden[name]) for name in ("main", "guide", "cond", "uncond", "t"))
    for scale in (2.5, 1.3):
        name = str(scale).replace(".", "p")
        assert relative_error(autoguidance(main, guide, scale).numpy(), golden[f"autoguidance_{name}"]) < 3e-6
        assert relative_error(cfg_zero_star(cond, uncond, scale).numpy(), golden[f"cfg_zero_star_{name}"]) < 3e-6
    for shift in (0.3, 1, 3.33):
        found = shift_time(t, shift).numpy()
        assert relative_error(found, golden[f"shift_time_{shift}".replace(".", "p")]) < 3e-6


def test_rescale_moves_the_deviation():
    wide, cond = paddle.randn([3, 4, 4, 4]) * 5 + 1, paddle.randn([3, 4, 4, 4])
    deviations = [rescaled(wide, cond, amount).numpy().reshape(3, -1).std(1) for amount in (0.0, 0.5, 1.0)]
    expected = [wide.numpy().reshape(3, -1).std(1), None, cond.numpy().reshape(3, -1).std(1)]
    expected[1] = (expected[0] + expected[2]) / 2
    np.testing.assert_allclose(deviations, expected, rtol=1e-5)
    assert not rescaled(paddle.zeros([1, 2]), paddle.zeros([1, 2]), 1.0).numpy().any()  # of a new network


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_both_kinds_of_guidance_together(learn_sigma):
    """The channels that class-free guidance leaves, and the learned variance, are those with the class."""
    outputs = {name: paddle.randn([2, 8 if learn_sigma else 4, 3, 3]) for name in ("cond", "uncond", "guide")}

    def network(x, t, y):
        known = {1: "cond", 10: "uncond"}
        parts = [outputs[known[int(label)]][i % 2] for i, label in enumerate(y.tolist())]
        return paddle.stack(parts)

    x, y = paddle.randn([2, 4, 3, 3]), paddle.to_tensor([1, 1])
    denoiser = guided(
        network, y, 3.0, channels=3, null_class=10, guide=lambda x, t, y: outputs["guide"], guide_scale=1.5
    )
    found = denoiser(x, paddle.to_tensor([0.5, 0.5]))
    cond, uncond, guide = (value.numpy() for value in outputs.values())
    expected = cond.copy()
    expected[:, :3] = uncond[:, :3] + 3.0 * (cond - uncond)[:, :3]
    expected[:, :4] += 0.5 * (cond - guide)[:, :4]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scales_over_time_rise_to_the_data_and_keep_their_mean(schedule):
    shares = (np.arange(1000) + 0.5) / 1000
    values = [SCHEDULES[schedule](share) for share in shares]
    assert abs(np.mean(values) - 1) < 1e-5 and (np.diff(values) >= 0).all()
    for kind, objective in (("DiT", {"type": "diffusion", **DIFFUSION}), ("SiT", {})):
        times = times_of(build_objective(make_config(kind, objective=objective)))
        data, noise = (0, times.largest) if kind == "DiT" else (1, 0)
        assert (times.share(data), times.share(noise), times.noise_level(data) < 0.1) == (1, 0, True)


# -- In every sampler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_settings_that_change_nothing_change_no_bit(kind, options, generators):
    generator = generators[kind]
    with_guide = generator.guided_by(generators[f"{kind}_guide"])
    neutral = {"guidance_interval": (0, times_of(generator.objective).largest), "guidance_schedule": "constant"}
    neutral |= {"guidance_rescale": 0.0, "guidance_sigma_interval": (0, math.inf)}
    if options.get("sampler") == "ode":
        neutral["timestep_shift"] = 1
    for scale in (1.0, 3.0):
        call = {**LATENTS, **options, "guidance_scale": scale}
        expected = generator.sample([3, 7], **call).numpy()
        found = with_guide.sample([3, 7], guide_scale=1, **neutral, **call).numpy()
        np.testing.assert_array_equal(found, expected)
    plain = generator.sample([3, 7], guidance_scale=1, **LATENTS, **options).numpy()
    for how in ({"guide_scale": 2}, {"guide_scale": 2, "guidance_schedule": "cosine"}, {"guidance_scale": 2}):
        assert np.abs(with_guide.sample([3, 7], **how, **LATENTS, **options).numpy() - plain).max() > 1e-3


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_networks_are_asked_where_guidance_is_on(kind, options, generators):
    """30% of the time costs 1.3 passes; a guide is asked there only, on the images alone."""
    generator, main, guide = counting(generators[kind].guided_by(generators[f"{kind}_guide"]))
    largest = times_of(generator.objective).largest
    interval = (0.4 * largest, 0.7 * largest)
    steps = 40 if kind == "dit" else 41
    call = {"num_inference_steps": steps, "output": "latents", "guidance_interval": interval, **options}
    generator.sample([3, 7], guidance_scale=2.0, guide_scale=1.0, **call)
    inside = [interval[0] <= t <= interval[1] for t, _ in main.calls]
    assert [count for _, count in main.calls] == [4 if one else 2 for one in inside] and not guide.calls
    assert 1.25 < sum(count for _, count in main.calls) / (2 * len(main.calls)) < 1.37
    main.calls.clear()
    generator.sample([3, 7], guidance_scale=1.0, guide_scale=2.0, **call)
    assert {count for _, count in main.calls} == {2}
    assert guide.calls == [one for one in main.calls if interval[0] <= one[0] <= interval[1]]


def test_a_schedule_begins_with_one_pass(generators):
    generator, network, _ = counting(generators["sit"])
    generator.sample([3], num_inference_steps=5, output="latents", guidance_schedule="linear", sampler="ode")
    assert [count for _, count in network.calls] == [1, 2, 2, 2]
    generator, network, _ = counting(generators["dit"])
    generator.sample([3], num_inference_steps=5, output="latents", guidance_schedule="cosine", method="ddpm")
    assert [count for _, count in network.calls] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
def test_sigmas_of_a_transport_are_its_times(path):
    generator = make_pipeline(make_config("SiT", objective={"type": "transport", "path_type": path})).generator
    times = times_of(generator.objective)
    low, high = 0.35, 0.8  # no points of the grid
    alpha = {"Linear": low, "GVP": math.sin(low * math.pi / 2), "VP": math.exp(-0.25 * 0.65**2 * 19.9 - 0.05 * 0.65)}
    sigma = {name: 1 - low if name == "Linear" else math.sqrt(1 - value**2) for name, value in alpha.items()}
    assert abs(times.noise_level(low) - sigma[path] / alpha[path]) < 1e-6
    sigmas = (times.noise_level(high), times.noise_level(low))
    call = {"num_inference_steps": 12, "output": "latents", "guidance_scale": 3.0}
    for options in SAMPLERS["sit"]:
        by_time, by_sigma, always = (
            generator.sample([3], **how, **call, **options).numpy()
            for how in ({"guidance_interval": (low, high)}, {"guidance_sigma_interval": sigmas}, {})
        )
        np.testing.assert_array_equal(by_time, by_sigma)
        assert np.abs(by_time - always).max() > 1e-3


def test_sigmas_of_a_diffusion_are_its_timesteps(generators):
    generator = generators["dit"]
    bars = np.cumprod(1 - np.linspace(1e-4 * 25, 0.02 * 25, 40))
    sigma = np.sqrt((1 - bars) / bars)
    for options in SAMPLERS["dit"]:
        by_time, by_sigma = (
            generator.sample(
                [3], num_inference_steps=20, output="latents", guidance_scale=3.0, **how, **options
            ).numpy()
            for how in (
                {"guidance_interval": (9.5, 30.5)},
                {"guidance_sigma_interval": (sigma[9] * 1.001, sigma[31] * 0.999)},
            )
        )
        np.testing.assert_array_equal(by_time, by_sigma)


def test_a_stock_folder_of_a_sit_has_the_times_of_its_transport(tmp_path):
    """Its scheduler's timesteps are logarithms; both ends of all times count."""
    config = make_config("SiT", sample_size=8, num_attention_heads=4)
    state = state_of(make_model(config))
    export_pipeline(config, state, make_vae(), tmp_path / "stock", id2label=LABELS)
    stock = load_generator(str(tmp_path / "stock"))
    own = make_pipeline(config, vae=make_vae()).generator
    call = {**LATENTS, "num_inference_steps": 11, "guidance_scale": 3.0, "guidance_channels": None}
    for interval in ((0, 1), (0.3, 0.6), (0.25, 1)):
        counted, network, _ = counting(stock)
        found = counted.sample([3, 7], guidance_interval=interval, **call).numpy()
        expected = own.sample([3, 7], guidance_interval=interval, sampler="ode", method="euler", **call).numpy()
        assert relative_error(found, expected) < 1e-2
        passes = [interval[0] - 1e-6 <= i / 10 <= interval[1] + 1e-6 for i in range(11)]
        assert [count for _, count in network.calls] == [4 if one else 2 for one in passes]
    with pytest.raises(ValueError, match="guidance_sigma_interval: this folder does not tell its noise levels"):
        stock.sample([3], guidance_sigma_interval=(0, 1), **call)
    with pytest.raises(ValueError, match="--guidance_sigma_interval: .*stock does not tell its noise levels"):
        infer_demo_dit.main(["--model_path", str(tmp_path / "stock"), "--guidance_sigma_interval", "0", "1"])


@pytest.mark.parametrize("options", [{"method": "ddim"}, {"method": "ddpm"}, {"method": "dpm"}])
def test_no_step_of_a_diffusion_waits_for_the_device(options, generators, monkeypatch):
    """Not for guidance: ppdiffusers' DPM-Solver++ waits by itself, so plain sampling is what is compared with."""
    generator, count = generators["dit"], 0

    def counted(original):
        def call(self, *args, **kwargs):
            nonlocal count
            count += 1
            return original(self, *args, **kwargs)

        return call

    for name in ("numpy", "item", "__float__", "__int__", "__bool__", "__array__", "tolist", "cpu"):
        monkeypatch.setattr(paddle.Tensor, name, counted(getattr(paddle.Tensor, name)))
    counts = []
    for how in (
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "guidance_interval": (5, 30)},
        {"guidance_scale": 3.0, "guidance_schedule": "linear", "guidance_sigma_interval": (0.1, 2)},
    ):
        count = 0
        generator.sample([3, 7], num_inference_steps=20, output="latents", **how, **options)
        counts.append(count)
    assert counts == [counts[0]] * 3 and (counts[0] < 5 or options["method"] == "dpm")


@pytest.mark.parametrize(("method", "stages"), [("euler", 1), ("heun2", 2)])
def test_first_steps_that_make_no_move(method, stages):
    """As if the noise were that of the later time: CFG-Zero*'s recipe."""
    sampler, z, asked = Sampler(create_transport()), paddle.randn([2, 3]), []

    def model(x, t):
        asked.append(float(t[0]))
        return x * 0.5 + 1

    sample = sampler.sample_ode(sampling_method=method, num_steps=6, zero_init_steps=2)
    states = sample(z, model)
    assert len(states) == 6 and len(asked) == 3 * stages and abs(asked[0] - 0.4) < 1e-6
    for i in range(3):
        np.testing.assert_array_equal(states[i].numpy(), z.numpy())
    plain = sampler.sample_ode(sampling_method=method, num_steps=6)(z, model)
    none = sampler.sample_ode(sampling_method=method, num_steps=6, zero_init_steps=0)(z, model)
    np.testing.assert_array_equal(plain.numpy(), none.numpy())
    for wrong, other in ((5, method), (-1, method), (True, method), (1, "dopri5")):
        with pytest.raises(ValueError, match=f"zero_init_steps={wrong}: "):
            sampler.sample_ode(sampling_method=other, num_steps=6, zero_init_steps=wrong)


def test_the_pipeline_takes_all_of_it(generators):
    pipe, guide = make_pipeline(), make_pipeline(make_config("SiT", num_layers=1))
    how = {"guidance_sigma_interval": (0.1, 3), "guidance_schedule": "linear", "guidance_rescale": 0.3}
    how |= {"cfg_zero_star": True, "guide_scale": 1.5, "guidance_scale": 2.0}

    def noise():
        return paddle.Generator().manual_seed(4)

    options = {"num_inference_steps": 5, "zero_init_steps": 1}
    found = pipe([3], guide=guide, generator=noise(), output_type="latent", **how, **options).images
    generator = pipe.generator.guided_by(guide.generator)
    expected = generator.sample([3], seed=noise(), output="latents", sampler="ode", **how, **options)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
    for wrong, message in (
        ({"guide": 3}, "guide: is a int, expected a SiTPipeline"),
        ({"guide_scale": 2}, "guide_scale 2: there is no guide; expected 1"),
        ({"guidance_rescale": 2}, r"guidance_rescale 2: expected a number from 0 \(none\) to 1"),
        ({"guidance_schedule": "steep"}, "guidance_schedule 'steep': expected constant, linear, cosine"),
        ({"guidance_sigma_interval": (3, 1)}, r"guidance_sigma_interval \(3, 1\): expected"),
        ({"cfg_zero_star": 1}, "cfg_zero_star 1: expected True or False"),
        ({"zero_init_steps": 1, "sampler": "sde"}, "zero_init_steps 1: is for the ODE"),
        ({"zero_init_steps": 1, "method": "dopri5"}, "zero_init_steps=1: dopri5 chooses its steps itself"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe([3], num_inference_steps=5, **wrong)


# -- Guides -----------------------------------------------------------------------------------------------------------


def test_guides_that_do_not_fit(generators, models):
    dit = generators["dit"]
    for guide, message in (
        (generators["sit"], "diffusion_steps None there, 40 here"),
        (make_guide(num_classes=7), "num_classes 7 there, 10 here"),
        (make_guide(in_channels=3), "in_channels 3 there, 4 here"),
        (make_guide({**DIFFUSION, "diffusion_steps": 50}), "diffusion_steps 50 there, 40 here"),
        (make_guide({**DIFFUSION, "noise_schedule": "squaredcos_cap_v2"}), "alphas_cumprod in the middle 0.4"),
        (make_guide({**DIFFUSION, "predict_xstart": True}), "prediction sample there, epsilon here"),
    ):
        with pytest.raises(ValueError, match=f"the network: can't guide the network: {message}"):
            dit.guided_by(guide)
    with pytest.raises(ValueError, match=r"guidance_interval \(0.2, 0.8\): holds no timestep, from 0 to 39"):
        dit.sample([3], num_inference_steps=5, guidance_interval=(0.2, 0.8))
    scaled = dit_config()["features"]
    one, other = ({**scaled, "latent_normalization": {"mean": None, "std": None, "multiplier": x}} for x in (1.0, 2.0))
    with pytest.raises(ValueError, match="latent_normalization's multiplier 2.0 there, 1.0 here"):
        dataclasses.replace(dit, features=one).guided_by(dataclasses.replace(dit, features=other))
    dataclasses.replace(dit, features=one).guided_by(dataclasses.replace(dit, features=None))  # nobody knows


def make_guide(objective=DIFFUSION, **model):
    """Returns a generator whose network is never called."""
    config = make_config(objective={"type": "diffusion", **objective}, **{**DIT, **model})
    return Generator(None, build_objective(config), **latent_sizes(config["model"]))


def test_a_guide_in_float16_sees_its_own_type(generators):
    seen = []

    def network(x, t, y):
        seen.append(x.dtype)
        return x.astype("float32")

    guide = dataclasses.replace(generators["sit_guide"], network=network, dtype="float16")
    generators["sit"].guided_by(guide).sample([3], guide_scale=2.0, num_inference_steps=3, output="latents")
    assert set(seen) == {paddle.float16}


@pytest.fixture(scope="module")
def programs(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    for name in ("sit", "dit"):
        export_inference.main(
            [*map(str, ["--model_path", models / name, "--output", folder / name, "--vae", DIGITS_VAE])]
        )
    return folder


def test_programs_are_guided_as_networks_are(models, programs):
    """The same by Paddle Inference: an interval, a schedule, and a guide that is exported too."""
    call = {**LATENTS, "guidance_schedule": "linear", "guide_scale": 2.0, "guidance_scale": 2.0}
    for kind, interval in (("sit", (0.2, 0.9)), ("dit", (3, 30))):
        eager = load_guide(load_generator(str(models / kind), vae=DIGITS_VAE), str(models / kind), key="model")
        export = load_generator(str(programs / kind), backend="inference", device="cpu")
        ours, main, guide = counting(load_guide(export, str(programs / kind), backend="inference"))
        same = load_guide(load_generator(str(models / kind), vae=DIGITS_VAE), str(models / kind))
        method = {"method": "ddim"} if kind == "dit" else {}
        call["num_inference_steps"] = 10
        found = ours.sample([3, 7], guidance_interval=interval, guidance_channels=None, **method, **call).numpy()
        expected = same.sample([3, 7], guidance_interval=interval, guidance_channels=None, **method, **call).numpy()
        assert relative_error(found, expected) < 1e-3
        assert 0 < len(guide.calls) < len(main.calls)
        other = eager.sample([3, 7], guidance_interval=interval, guidance_channels=None, **method, **call).numpy()
        assert relative_error(found, other) > 1e-2
    with pytest.raises(ValueError, match="with the backend inference a guide is a folder of tools/export_inference.py"):
        load_guide(export, str(models / "dit"), backend="inference")
    with pytest.raises(ValueError, match="holds programs for Paddle Inference"):
        load_guide(eager, str(programs / "dit"))


# -- Commands ---------------------------------------------------------------------------------------------------------


def draw(models, kind, output, *flags, steps=4):
    demo = infer_demo_dit if kind in ("dit", "small") else infer_demo_sit
    given = ["--model_path", models / kind, "--vae", DIGITS_VAE, "--output", output, "--device", "cpu"]
    demo.main([*map(str, [*given, "--classes", 3, 7, "--num_inference_steps", steps, *flags])])
    return np.asarray(Image.open(output)).astype(int)


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_every_flag_of_guidance_matters(kind, models, tmp_path):
    high, guide = 20 if kind == "dit" else 0.7, ["--guide_path", models / kind, "--guide_key", "model"]
    cases = [["--guidance_scale", 1], [], ["--guidance_interval", 0.5 * high, high], [*guide, "--guidance_scale", 4]]
    if kind == "dit":
        cases += [["--guidance_sigma_interval", 0.3, 3], ["--guidance_rescale", 0.7], ["--cfg_zero_star"], guide]
        cases += [*(["--guidance_schedule", name] for name in ("linear", "cosine")), [*guide, "--guide_scale", 3]]
    else:
        ode = ["--sampler", "ode"]
        cases += [ode, [*ode, "--zero_init_steps", 2], [*ode, "--guidance_interval", 0.5]]
    found = [draw(models, kind, tmp_path / f"{i}.png", *flags, steps=8) for i, flags in enumerate(cases)]
    assert len({image.tobytes() for image in found}) == len(cases)
    neutral = ["--guide_path", models / kind, "--guide_scale", 1, "--guidance_rescale", 0.0]
    assert np.array_equal(found[0], draw(models, kind, tmp_path / "a.png", *neutral, steps=8))


def test_a_guide_of_another_size_or_in_a_file(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    by_folder = draw(models, "dit", "a.png", "--guide_path", models / "small")
    for name in ("small", "dit"):
        shutil.copy(models / name / "ema_state.pdparams", f"{name}.pdparams")
    config = ["--guide_config", models / "small" / "config.json"]
    by_file = draw(models, "dit", "b.png", "--guide_path", "small.pdparams", *config)
    np.testing.assert_array_equal(by_folder, by_file)
    plain = draw(models, "dit", "c.png", "--guidance_scale", 1)
    assert not np.array_equal(by_folder, plain)
    # The model's own network guides to itself; its file needs no config.
    np.testing.assert_array_equal(plain, draw(models, "dit", "d.png", "--guide_path", "dit.pdparams"))
    with pytest.raises(ValueError, match="--guide_path small.pdparams: .*; --guide_config is for another network's"):
        draw(models, "dit", "e.png", "--guide_path", "small.pdparams")
    capsys.readouterr()
    draw(models, "dit", "f.png", "--guide_path", models / "small", "--cfg_zero_star", "--guidance_rescale", 0.5)
    assert "note: --cfg_zero_star has no effect without a --guidance_scale" in capsys.readouterr().out
    draw(models, "dit", "g.png", "--guidance_scale", 1, "--guidance_schedule", "linear", "--guidance_rescale", 0.5)
    said = "note: --guidance_schedule and --guidance_rescale have no effect without guidance"
    assert said in capsys.readouterr().out


DIT_MISTAKES = [
    (["--guidance_interval", "0.5"], r"--guidance_interval 0.5: expected two timesteps in \[0, 39\], the lower first"),
    (["--guidance_interval", "5", "40"], r"--guidance_interval 5 40: expected two timesteps in \[0, 39\]"),
    (["--guidance_interval", "0.2", "0.8"], r"--guidance_interval 0.2 0.8: expected two timesteps in \[0, 39\]"),
    (["--guide_path", "sit"], "--guide_path .*sit: can't guide .*dit: pipeline SiTPipeline there, DiTPipeline here"),
    (["--guide_path", "seven"], "--guide_path .*seven: can't guide .*dit: num_classes 7 there, 10 here"),
    (["--guide_path", "fifty"], "--guide_path .*fifty: can't guide .*dit: diffusion_steps 50 there, 40 here"),
    (["--guide_path", "dit", "--guide_config", "x.json"], "--guide_config is for a file of weights; .*dit is none"),
    (["--guide_path", "nowhere"], "--guide_path .*nowhere: "),
]
MISTAKES = [
    (["--guidance_sigma_interval", "3", "1"], "--guidance_sigma_interval 3 1: expected two noise levels, at least 0"),
    (["--guidance_sigma_interval", "nan", "1"], "--guidance_sigma_interval nan 1: expected two noise levels"),
    (["--guidance_schedule", "steep"], "--guidance_schedule.*steep"),
    (["--guidance_rescale", "1.5"], "--guidance_rescale must be a number from 0 to 1, got 1.5"),
    (["--guide_scale", "2"], "--guide_scale is for autoguidance; give --guide_path too"),
    (["--guide_key", "ema"], "--guide_key is for autoguidance; give --guide_path too"),
    (["--guide_path", "dit", "--guide_scale", "nan"], "--guide_scale nan: expected a finite number"),
]


def test_mistakes_are_said_before_paddle_is_imported(models, tmp_path, monkeypatch):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    write_checkpoint(folder / "seven", dit_config(num_classes=7))
    fifty = {"type": "diffusion", **DIFFUSION, "diffusion_steps": 50}
    write_checkpoint(folder / "fifty", make_config(objective=fifty, **DIT))
    monkeypatch.setattr("sampling.demo.configure_runtime", lambda: pytest.fail("it would be imported here"))
    monkeypatch.setattr("tools.sample_npz.configure_runtime", lambda: pytest.fail("it would be imported here"))
    monkeypatch.setattr("tools.sample_grid.configure_runtime", lambda: pytest.fail("it would be imported here"))
    monkeypatch.chdir(folder)
    for flags, message in DIT_MISTAKES + MISTAKES:
        for main in (infer_demo_dit.main, sample_npz.main, sample_grid.main):
            output = [] if main is infer_demo_dit.main else ["--output", "new.npz"]
            steps = ["--num_inference_steps", "10"]
            with pytest.raises(ValueError, match=message):
                main(["--model_path", "dit", *output, *steps, *flags])
    for flags, message in [
        *MISTAKES,
        (["--guidance_interval", "0.2", "1.5"], r"--guidance_interval 0.2 1.5: expected two times in \[0, 1\]"),
        (["--zero_init_steps", "1"], "--zero_init_steps is for --sampler ode"),
        (["--sampler", "ode", "--zero_init_steps", "-1"], "--zero_init_steps must be an integer of 0 or more"),
        (["--guide_path", "dit"], "can't guide .*sit: pipeline DiTPipeline there, SiTPipeline here"),
    ]:
        with pytest.raises(ValueError, match=message):
            infer_demo_sit.main(["--model_path", "sit", *flags])


def test_many_images_record_what_decides_and_refuse_another(models, tmp_path):
    def run(*flags, output="a.npz"):
        given = ["--model_path", models / "dit", "--vae", DIGITS_VAE, "--output", tmp_path / output, "--device", "cpu"]
        sample_npz.main([*map(str, [*given, "--num_images", 3, "--num_inference_steps", 4, *flags])])
        return json.loads((tmp_path / output).with_suffix(".json").read_text())

    plain = run()
    # What a version without these flags wrote: nothing of them, so that its sets go on.
    assert {key for key in plain if key.startswith(("guid", "cfg"))} == {
        "guidance_scale", "guidance_channels", "guidance_interval",
    }  # fmt: skip
    assert run() == plain and run("--guidance_rescale", 0, "--guidance_schedule", "constant") == plain
    for flags, word in (
        (["--guidance_schedule", "linear"], "--guidance_schedule was null"),
        (["--guidance_rescale", 0.5], "--guidance_rescale was null"),
        (["--cfg_zero_star"], "--cfg_zero_star was null"),
        (["--guidance_interval", 3, 30], "--guidance_interval was null"),
        (["--guidance_sigma_interval", 0.5, "inf"], "--guidance_sigma_interval was null"),
    ):
        with pytest.raises(ValueError, match=f"a.npz: is complete, with other settings: {word}"):
            run(*flags)
    guide = ["--guide_path", models / "small", "--guidance_sigma_interval", 0.5, "inf", "--cfg_zero_star"]
    found = run(*guide, output="b.npz")
    assert (found["guidance_scale"], found["guidance_channels"], found["guide_scale"]) == (1.0, None, 2.0)
    assert found["guidance_sigma_interval"] == [0.5, "inf"] and "cfg_zero_star" not in found
    assert len(found["guide_sha256"]) == 64 and found["guide"]["path"].endswith("small")
    assert run(*guide, output="b.npz") == found
    with pytest.raises(ValueError, match="the sha256 of the guide's weights was"):
        run(*guide, "--guide_key", "model", output="b.npz")
    moved = tmp_path / "elsewhere"
    shutil.copytree(models / "small", moved)
    assert run("--guide_path", moved, *guide[2:], output="b.npz") == found


def test_a_sweep_beside_a_guide_has_no_other_guidance(models, tmp_path):
    given = ["--model_path", models / "dit", "--vae", DIGITS_VAE, "--output", tmp_path / "sweep", "--device", "cpu"]
    flags = ["--classes", 3, "--num_inference_steps", 4, "--guide_path", models / "small"]
    sample_grid.main([*map(str, [*given, *flags])])
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["guidance1_steps4.png"]


# -- A run's section --------------------------------------------------------------------------------------------------


def config_with(guidance, kind="DiT", **model):
    objective = {"type": "diffusion", **DIFFUSION} if kind == "DiT" else {}
    raw = {"model": {**make_config(kind, **model)["model"]}, "objective": objective, "guidance": guidance}
    return resolve_config(raw)


def test_a_config_from_before_the_section_has_the_defaults():
    config = config_with({})
    assert configured_guidance(config) == {}
    old = {name: section for name, section in config.items() if name != "guidance"}
    assert resolve_config(old) == config
    check_run("old", config, config_with({"rescale": 0.5}))  # a run goes on with other previews


@pytest.mark.parametrize(
    ("kind", "guidance", "message"),
    [
        ("DiT", {"interval": [3, 40]}, r"guidance: interval must end at 39 or before, got \[3, 40\]"),
        ("DiT", {"interval": [0.2, 0.8]}, r"guidance: interval must hold a timestep, from 0 to 39, got \[0.2, 0.8\]"),
        ("SiT", {"interval": [0.3, 1.5]}, "guidance: interval must end at 1 or before"),
        ("SiT", {"interval": [0.5, 0.3]}, r"interval must be \[lowest, highest\], numbers of 0 or more, or null"),
        ("DiT", {"timestep_shift": 0.3}, "guidance: timestep_shift is for a transport"),
        ("DiT", {"channels": 5}, "guidance: channels must be in_channels 4 at most, got 5"),
        ("DiT", {"channels": "all"}, 'guidance: channels must be "auto", a positive integer, or null for all, got'),
        ("DiT", {"schedule": "steep"}, "guidance: schedule must be one of constant, linear, cosine"),
        ("DiT", {"rescale": 2}, "guidance: rescale must be a number from 0 to 1, got 2"),
    ],
)
def test_mistakes_of_the_section(kind, guidance, message):
    with pytest.raises(ValueError, match=message):
        config_with(guidance, kind)


def test_a_section_without_effect_is_said():
    (note,) = ineffective_settings(config_with({"rescale": 0.5, "timestep_shift": 2.0}, "SiT", class_dropout_prob=0.0))
    assert note == "rescale has no effect without a null class"


def test_previews_guide_as_the_section_says(monkeypatch):
    monkeypatch.setattr("features.autoencoder.load_vae", lambda path: make_vae())
    guidance = {"channels": None, "interval": [0.2, 0.9], "schedule": "linear", "rescale": 0.2, "timestep_shift": 0.5}
    latents = {}
    for name, section in (("plain", {}), ("guided", guidance)):
        config = config_with(section, "SiT")
        network, objective = make_model(config), build_objective(config)
        preview = Preview(objective, config, vae="vae", num_inference_steps=5, guidance_scale=3.0)
        latents[name] = preview.sample(network).numpy()
    how = {"guidance_channels": None, "guidance_interval": (0.2, 0.9), "guidance_schedule": "linear"}
    how |= {"guidance_rescale": 0.2, "timestep_shift": 0.5, "guidance_scale": 3.0, **LATENTS}
    generator = Generator(network, objective, **latent_sizes(config["model"]))
    noise = paddle.to_tensor(preview.noise)
    expected = generator.sample(preview.labels, noise=noise, seed=None, batch_size=preview.BATCH_SIZE, **how).numpy()
    np.testing.assert_array_equal(latents["guided"], expected)
    assert np.abs(latents["plain"] - expected).max() > 1e-3
