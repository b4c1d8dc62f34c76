"""`load_generator`: every kind of model, intermediate steps, batches, and what a caller shows."""

import warnings

import numpy as np
import paddle
import pytest
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

from features.autoencoder import NotFiniteError
from models import build_model
from objectives import build_objective
from sampling.generator import Generator, latent_sizes, load_generator
from sampling.pipelines.export import export_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A DiT and a SiT, each as a training checkpoint and as a pipeline folder."""
    root = tmp_path_factory.mktemp("models")
    dit = write_checkpoint(root / "dit", make_config(sample_size=4))
    export_pipeline(make_config(sample_size=4), state_of(dit), make_vae(), root / "DiTPipeline", id2label=LABELS)
    write_checkpoint(root / "sit", make_config("SiT"))
    make_pipeline().save_pretrained(root / "SiTPipeline")
    return root


def test_steps_in_which_an_exported_network_is_not_exact_are_a_warning_once(models):
    generator = load_generator(str(models / "DiTPipeline"))
    options = {"num_inference_steps": 7, "output": "latents"}
    with pytest.warns(UserWarning, match=r"exact in these numbers of steps: .*; in 7 steps \(ddim\) its images differ"):
        generator.sample([3], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.sample([3], **options)
        generator.sample([3], **{**options, "num_inference_steps": 10})
        assert generator.describe(6, method="dpm")
        generator.sample([3], **{**options, "num_inference_steps": 6}, method="dpm")


@pytest.mark.parametrize("schedule, notes", [("squaredcos_cap_v2", 1), ("linear", 0)])
def test_ddpm_of_a_cosine_schedule_is_a_note(schedule, notes, tmp_path):
    config = make_config(sample_size=4, objective={"type": "diffusion", "noise_schedule": schedule})
    write_checkpoint(tmp_path / "dit", config)
    generator = load_generator(str(tmp_path / "dit"), vae=DIGITS_VAE)
    assert len(generator.describe(5, method="ddpm")) == len(generator.describe(38)) == notes
    assert generator.describe(37) == generator.describe(38, method="unipc") == []
    assert generator.describe(5) == generator.describe(5, method="dpm") == []


# Each kind of model and sampler, and how many steps its callback counts of 5.
CASES = [
    ("dit", {}, 5),
    ("dit", {"method": "ddpm"}, 5),
    ("dit", {"method": "dpm"}, 5),
    ("dit", {"method": "dpm3"}, 5),
    ("DiTPipeline", {}, 5),
    ("DiTPipeline", {"method": "dpm"}, 5),
    ("DiTPipeline", {"method": "unipc"}, 5),
    ("sit", {}, 4),
    ("sit", {"sampler": "sde"}, 5),
    ("SiTPipeline", {"method": "dopri5"}, 4),
    ("SiTPipeline", {"method": "ab2"}, 4),
]


@pytest.mark.parametrize("name, options, steps", CASES)
def test_a_callback_sees_every_step_and_changes_nothing(models, name, options, steps):
    generator = load_generator(str(models / name), vae=DIGITS_VAE)
    options = {"seed": 3, "num_inference_steps": 5, "output": "latents", **options}
    expected = generator.sample([3, 7], **options).numpy()
    seen = []
    latents = generator.sample([3, 7], **options, callback=lambda *step: seen.append(step)).numpy()
    np.testing.assert_array_equal(latents, expected)
    assert [step[:2] for step in seen] == [(number, steps) for number in range(1, steps + 1)]
    np.testing.assert_array_equal(seen[-1][2].numpy(), expected)
    assert len({step[2].numpy().tobytes() for step in seen}) >= steps - 1
    assert not np.array_equal(generator.sample([3, 7], **{**options, "seed": 4}).numpy(), expected)


def test_images_are_the_decoded_latents(models):
    generator = load_generator(str(models / "SiTPipeline"))
    options = {"num_inference_steps": 3, "seed": 1}
    images = generator.sample(["digit 3", 7], **options)
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 5
    latents = generator.sample([3, "number 7"], **options, output="latents")
    np.testing.assert_array_equal(images, (generator.decode(latents) * 255).round().astype("uint8"))


def test_what_a_caller_shows(models):
    dit, sit = (load_generator(str(models / name), vae=DIGITS_VAE) for name in ("DiTPipeline", "sit"))
    assert (dit.kind, sit.kind) == ("diffusion", "transport")
    assert (dit.num_classes, dit.sample_size, dit.in_channels, dit.null_class) == (10, 4, 4, 1000)
    assert dit.names([3]) == ["digit 3, number 3"] and sit.names([3]) == ["3"]
    assert dit.describe() == [] and "differ from the checkpoint's" in dit.describe(7)[0]


def test_a_network_in_memory_and_noise_of_ones_own():
    config = make_config("SiT")
    network, noise = make_model(config), paddle.randn([3, 4, 4, 4])
    generator = Generator(network, build_objective(config), **latent_sizes(config["model"]))
    options = {"seed": None, "num_inference_steps": 4, "output": "latents"}
    latents = generator.sample([1, 2, 3], noise=noise, **options)
    alone = generator.sample([2], noise=noise[1:2], **options)
    np.testing.assert_allclose(latents[1:2].numpy(), alone.numpy(), rtol=1e-4, atol=1e-5)
    batches = generator.sample([1, 2, 3], noise=noise, batch_size=2, **options)
    np.testing.assert_allclose(batches.numpy(), latents.numpy(), rtol=1e-4, atol=1e-5)


def test_weights_by_file_need_a_config(models):
    file = str(models / "dit" / "ema_state.pdparams")
    by_file, by_folder = (load_generator(path, vae=DIGITS_VAE) for path in (file, str(models / "dit")))
    options = {"num_inference_steps": 2, "output": "latents"}
    np.testing.assert_array_equal(by_file.sample([1], **options), by_folder.sample([1], **options))
    alone = models / "alone.pdparams"
    alone.write_bytes((models / "dit" / "ema_state.pdparams").read_bytes())
    with pytest.raises(ValueError, match=r"alone\.pdparams: which network's weights are these\?"):
        load_generator(str(alone))
    config = str(models / "dit" / "config.json")
    again = load_generator(str(alone), config=config, vae=DIGITS_VAE)
    np.testing.assert_array_equal(again.sample([1], **options), by_folder.sample([1], **options))


def test_mistakes(models):
    from ppdiffusers.utils.paddle_utils import get_rng_state_tracker

    states = [*get_rng_state_tracker().states_]
    generator = load_generator(str(models / "dit"), vae=DIGITS_VAE)
    for options, message in (
        ({"classes": [10]}, r"the classes are 0\.\.9"),
        ({"method": "euler"}, "unknown sampling method 'euler'; known: ddpm, ddim"),
        ({"guidance_scale": 1e30, "num_inference_steps": 2}, "not finite"),
    ):
        with pytest.raises(NotFiniteError if "1e+30" in str(options) else ValueError, match=message):
            generator.sample(**{"classes": [1], **options})
    assert [*get_rng_state_tracker().states_] == states  # none is left behind


@pytest.mark.parametrize("kind", ["SiT", "LargeSiT", "LightningDiT"])
def test_a_network_remembers_its_settings(kind):
    config = make_config(kind, patch_size=4, class_dropout_prob=0.0)
    settings = build_model(config).settings
    assert {key: value for key, value in config["model"].items() if key != "type"}.items() <= settings.items()
