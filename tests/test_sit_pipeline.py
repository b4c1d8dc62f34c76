"""SiT from weights to images: SiTPipeline and its folder, the converter, the stock folder, infer_demo_sit.py."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest
from PIL import Image
from support.golden import GOLDEN, OFFICIAL, load_golden, relative_error
from support.pipelines import (
    DIGITS_VAE,
    LABELS,
    make_config,
    make_model,
    make_pipeline,
    make_vae,
    seeded,
    state_of,
    stock_latents,
    tree_of,
    write_checkpoint,
)
from support.runs import ROOT, TINY_MODELS, command_environment

import infer_demo_dit
import infer_demo_sit
from config.schema import resolve_config
from features.autoencoder import LatentDecoder, NotFiniteError, load_vae
from models import build_model
from models.state import official_to_paddle
from sampling import SiTPipeline
from sampling import demo as image_demo
from sampling.guidance import guided
from sampling.pipelines.export import export_pipeline
from sampling.pipelines.folder import CARD, SAFE_TREE, TREE
from sampling.sit_pipeline import TransportScheduler
from tools import convert_dit_to_ppdiffusers, convert_official_weights, convert_sit_to_ppdiffusers
from transport import Sampler, create_transport
from weights.files import load_weights, safe_load, save_pdparams

TINY_PT = OFFICIAL["SiT"][2]


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sit"
    pipe.save_pretrained(folder)
    return folder


class TestFolder:
    def test_tree_is_dit_pipelines(self, folder):
        assert tree_of(folder) == sorted(TREE)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == "SiTPipeline" and index["id2label"] == LABELS

    @pytest.mark.paddle26
    @pytest.mark.parametrize("sampler", ["ode", "sde"])
    def test_round_trip_gives_the_same_images(self, pipe, folder, sampler):
        again = SiTPipeline.from_pretrained(folder)
        again.set_progress_bar_config(disable=True)
        assert again.labels == pipe.labels
        images = [
            p([1, 2], sampler=sampler, num_inference_steps=4, generator=seeded(), output_type="np").images
            for p in (pipe, again)
        ]
        assert images[0].std() > 0.02
        np.testing.assert_array_equal(*images)

    def test_settings_survive(self, tmp_path):
        config = make_config(
            "SiT",
            {"path_type": "VP", "prediction": "noise", "sample_eps": 0.01},
            patch_size=4,
            mlp_ratio=2.3,
            num_classes=7,
            class_dropout_prob=0.0,
            learn_sigma=False,
        )
        make_pipeline(config, labels=None).save_pretrained(tmp_path / "out")
        settings = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
        widths = {key: value for key, value in config["model"].items() if key not in ("type", "mlp_ratio")}
        assert widths.items() <= settings.items()
        assert int(32 * settings["mlp_ratio"]) == int(32 * 2.3)
        again = SiTPipeline.from_pretrained(tmp_path / "out")
        scheduler = again.scheduler.config
        assert (scheduler.path_type, scheduler.prediction, scheduler.sample_eps) == ("VP", "noise", 0.01)
        assert again.scheduler.transport.sample_eps == 0.01

    def test_nothing_is_overwritten(self, pipe, folder, tmp_path):
        before = (folder / "model_index.json").read_bytes()
        with pytest.raises(ValueError, match="is not empty"):
            pipe.save_pretrained(folder)
        assert (folder / "model_index.json").read_bytes() == before
        pipe.save_pretrained(tmp_path / "out")
        pipe.save_pretrained(tmp_path / "out", overwrite=True)
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="holds notes.txt, which is no part of a pipeline"):
            pipe.save_pretrained(tmp_path / "out", overwrite=True)

    @pytest.mark.parametrize(
        "name, edit, message",
        [
            (
                "model_index.json",
                {"transformer": ["os", "system"]},
                r"transformer is \['os', 'system'\], expected a SiT",
            ),
            ("model_index.json", {"vae": ["evil", "AutoencoderTiny"]}, "vae is .* expected a AutoencoderKL"),
            ("model_index.json", {"scheduler": "x"}, "scheduler is 'x', expected a TransportScheduler"),
            ("model_index.json", {"_class_name": "DiTPipeline"}, "holds a 'DiTPipeline', expected 'SiTPipeline'"),
            ("model_index.json", {"id2label": {"0": "zero"}}, "no label for class 1"),
            ("transformer/config.json", {"_class_name": "DiT"}, "holds a 'DiT', expected 'SiT'"),
            ("transformer/config.json", {"num_layers": 3}, r"model_state\.pdparams: these weights do not fit"),
            ("transformer/config.json", {"depth": 3}, r"config\.json: unknown setting 'depth'; known: sample_size"),
            (
                "scheduler/scheduler_config.json",
                {"path_type": "linear"},
                r"scheduler_config\.json: unknown path_type 'linear'; accepted",
            ),
            ("scheduler/scheduler_config.json", {"sample_eps": "small"}, r"scheduler_config\.json: .*sample_eps"),
            ("model_index.json", {"id2label": ["zero"]}, "id2label: is a list, expected {class id: label}"),
            ("transformer/config.json", {"sample_size": 5}, "describes no SiT: sample_size 5 is not divisible"),
            ("vae/config.json", {"latent_channels": 3}, r"vae/model_state\.pdparams: these weights do not fit"),
        ],
    )
    def test_a_strange_folder_is_refused(self, folder, tmp_path, name, edit, message):
        for file in TREE:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_bytes((folder / file).read_bytes())
        (tmp_path / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **edit}))
        with pytest.raises(ValueError, match=message):
            SiTPipeline.from_pretrained(tmp_path)

    def test_ppdiffusers_keywords_of_saving(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "out", safe_serialization=False, to_diffusers=False)
        assert tree_of(tmp_path / "out") == sorted(TREE)
        with pytest.raises(ValueError, match="to_diffusers=True: .* saved in Paddle's layout only"):
            pipe.save_pretrained(tmp_path / "other", to_diffusers=True)
        assert not (tmp_path / "other").exists()

    def test_safetensors_there_and_back(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "out", safe_serialization=True)
        assert tree_of(tmp_path / "out") == sorted(SAFE_TREE)
        again = SiTPipeline.from_pretrained(tmp_path / "out")
        for one, other in ((pipe.transformer, again.transformer), (pipe.vae, again.vae)):
            for name, value in one.state_dict().items():
                np.testing.assert_array_equal(other.state_dict()[name].numpy(), value.numpy())
        pipe.save_pretrained(tmp_path / "out", overwrite=True)
        assert tree_of(tmp_path / "out") == sorted(TREE)

    @pytest.mark.paddle26
    def test_loads_in_another_dtype(self, pipe, folder):
        assert SiTPipeline.from_pretrained(folder).dtype == paddle.float32
        half = SiTPipeline.from_pretrained(folder, paddle_dtype=paddle.float16)
        assert half.dtype == half.vae.dtype == paddle.float16
        weights = pipe.transformer.state_dict()
        for name, value in half.transformer.state_dict().items():
            assert value.dtype == paddle.float16, name
            np.testing.assert_array_equal(value.numpy(), weights[name].numpy().astype("float16"))

    @pytest.mark.parametrize("part", ["transformer", "vae"])
    def test_no_pickle_is_executed(self, folder, tmp_path, part):
        for file in TREE:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_bytes((folder / file).read_bytes())
        (tmp_path / part / "model_state.pdparams").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
        with pytest.raises(ValueError, match=r"model_state\.pdparams"):
            SiTPipeline.from_pretrained(tmp_path)
        assert not os.path.exists("executed")

    def test_no_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"model_index\.json: no such file"):
            SiTPipeline.from_pretrained(tmp_path / "nowhere")

    @pytest.mark.parametrize("part", ["transformer", "scheduler"])
    def test_a_part_that_is_missing_is_no_name_on_the_hub(self, folder, tmp_path, part):
        shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy" / part)
        with pytest.raises(ValueError, match=rf"{part}.*config\.json: no such file"):
            SiTPipeline.from_pretrained(tmp_path / "copy")

    def test_another_vae_is_refused(self):
        with pytest.raises(ValueError, match="the VAE has 3 latent channels, the network's in_channels is 4"):
            make_pipeline(vae=make_vae(3))

    def test_another_component_is_refused(self, pipe):
        from ppdiffusers import DDIMScheduler

        with pytest.raises(ValueError, match="scheduler: is a DDIMScheduler, expected a TransportScheduler"):
            SiTPipeline(pipe.transformer, pipe.vae, DDIMScheduler())
        with pytest.raises(ValueError, match="transformer: is a DiT, expected a SiT"):
            SiTPipeline(build_model(TINY_MODELS["DiT"]), pipe.vae, pipe.scheduler)
        with pytest.raises(ValueError, match="vae: is a NoneType, expected a AutoencoderKL"):
            SiTPipeline(pipe.transformer, None, pipe.scheduler)

    def test_a_dit_is_refused(self):
        config = make_config("SiT")
        config["model"]["type"] = "DiT"
        with pytest.raises(ValueError, match="the config describes a DiT, expected a SiT"):
            SiTPipeline.from_weights(config, {}, None)


class TestCall:
    def denoiser(self, pipe, classes, scale, channels=3, interval=None):
        y = paddle.to_tensor(classes)
        return guided(pipe.transformer, y, scale, channels=channels, null_class=10, interval=interval)

    def noise(self, count):
        from ppdiffusers.utils.paddle_utils import randn_tensor

        return randn_tensor((count, 4, 4, 4), generator=seeded(), dtype="float32")

    @pytest.mark.parametrize(
        "options, settings",
        [
            ({}, {"sampling_method": "euler"}),
            ({"method": "heun2"}, {"sampling_method": "heun2"}),
            ({"method": "dopri5", "rtol": 1e-2}, {"sampling_method": "dopri5", "rtol": 1e-2}),
        ],
    )
    @pytest.mark.parametrize("scale, channels, interval", [(1.0, 3, None), (4.0, None, None), (3.0, 3, (0.3, 0.7))])
    def test_ode_latents_are_the_samplers(self, pipe, options, settings, scale, channels, interval):
        latents = pipe(
            [1, 2, 9],
            guidance_scale=scale,
            guidance_channels=channels,
            guidance_interval=interval,
            num_inference_steps=6,
            generator=seeded(),
            output_type="latent",
            **options,
        ).images
        noise = self.noise(3)
        sample = Sampler(create_transport()).sample_ode(num_steps=6, **settings)
        with paddle.no_grad():
            expected = sample(noise, self.denoiser(pipe, [1, 2, 9], scale, channels, interval))[-1]
        np.testing.assert_array_equal(latents.numpy(), expected.numpy())
        assert relative_error(noise.numpy(), expected.numpy()) > 0.05

    @pytest.mark.parametrize(
        "options, settings",
        [
            ({}, {"sampling_method": "Euler", "diffusion_form": "sigma", "last_step": "Mean", "last_step_size": 0.04}),
            (
                {"method": "Heun", "diffusion_form": "linear", "diffusion_norm": 0.5, "last_step": "Tweedie"},
                {"sampling_method": "Heun", "diffusion_form": "linear", "diffusion_norm": 0.5, "last_step": "Tweedie"},
            ),
        ],
    )
    def test_sde_latents_are_the_samplers(self, pipe, options, settings):
        call = {"sampler": "sde", "num_inference_steps": 6, "output_type": "latent", "guidance_scale": 2.0, **options}
        latents = pipe([1, 2], generator=seeded(), **call).images
        noise = self.noise(2)  # seeds, and the steps' noise goes on from there
        sample = Sampler(create_transport()).sample_sde(num_steps=6, **settings)
        with paddle.no_grad():
            expected = sample(noise, self.denoiser(pipe, [1, 2], 2.0))[-1]
        np.testing.assert_array_equal(latents.numpy(), expected.numpy())
        other = pipe([1, 2], generator=seeded(4), **call).images
        assert relative_error(other.numpy(), expected.numpy()) > 0.1

    def test_output_types(self, pipe):
        call = {"num_inference_steps": 3, "guidance_scale": 2.0}
        latents = pipe([1, 2], generator=seeded(), output_type="latent", **call).images
        decoder = LatentDecoder(pipe.vae)
        images = pipe([1, 2], generator=seeded(), output_type="np", **call).images
        assert images.dtype == np.float32 and images.shape == (2, 32, 32, 3)
        assert images.min() >= 0 and images.max() <= 1
        np.testing.assert_array_equal(images, decoder.decode(latents))
        pil = pipe([1, 2], generator=seeded(), **call).images
        np.testing.assert_array_equal(np.stack([np.asarray(image) for image in pil]), decoder(latents))
        (images_again,) = pipe([1, 2], generator=seeded(), output_type="numpy", return_dict=False, **call)
        np.testing.assert_array_equal(images_again, images)

    def test_values_outside_are_clipped_not_stretched(self):
        pipe = make_pipeline()
        real = pipe.vae.decode(paddle.ones([1, 4, 4, 4])).sample
        pipe.vae.decode = lambda latents: type("Out", (), {"sample": paddle.clip(real, -0.5, 0.5) * 0 + 0.5})
        image = pipe([1], num_inference_steps=2, output_type="np").images
        np.testing.assert_allclose(image, 0.75, atol=1e-6)  # min-max would have made it 0 or 1
        pipe.vae.decode = lambda latents: type("Out", (), {"sample": paddle.full_like(real, -3.0)})
        assert pipe([1], num_inference_steps=2, output_type="np").images.max() == 0

    def test_labels(self, pipe):
        assert pipe.get_label_ids("number 7") == [7]
        assert pipe.get_label_ids(["digit 3", "number 0"]) == [3, 0]
        with pytest.raises(ValueError, match="no class has the label 'dog'; known: digit 0"):
            pipe.get_label_ids(["dog"])
        for label in (3, [3], [["digit 3"]], None):
            with pytest.raises(ValueError, match="no class has the label"):
                pipe.get_label_ids(label)

    @pytest.mark.parametrize(
        "given", [np.array([1, 2]), range(1, 3), (np.int64(1), 2), "tensor"], ids=["array", "range", "tuple", "tensor"]
    )
    def test_class_ids_of_any_integer_kind(self, pipe, given):
        given = paddle.to_tensor([1, 2]) if isinstance(given, str) else given
        call = {"num_inference_steps": 2, "output_type": "latent"}
        expected = pipe([1, 2], generator=seeded(), **call).images
        np.testing.assert_array_equal(pipe(given, generator=seeded(), **call).images, expected)

    def test_no_null_class(self):
        pipe = make_pipeline(make_config("SiT", class_dropout_prob=0.0))
        with pytest.raises(ValueError, match="without a null class, can't be guided; use guidance_scale=1"):
            pipe([1], num_inference_steps=2)
        assert len(pipe([1], num_inference_steps=2, guidance_scale=1).images) == 1

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"sampler": "ODE"}, "unknown sampler 'ODE'; accepted: 'ode', 'sde'"),
            ({"method": "Euler"}, "unknown sampling_method of an ODE 'Euler'; accepted: 'euler', 'midpoint'"),
            ({"sampler": "sde", "method": "rk4"}, "unknown sampling_method of an SDE 'rk4'; accepted: 'Euler', 'Heun'"),
            ({"sampler": "sde", "diffusion_form": "quadratic"}, "unknown diffusion_form 'quadratic'; accepted"),
            ({"sampler": "sde", "last_step": "mean"}, "unknown last_step 'mean'; accepted"),
            ({"num_inference_steps": 1}, "num_steps=1: expected an integer, at least 2"),
            ({"guidance_interval": (0.7, 0.3)}, r"guidance_interval \(0.7, 0.3\): expected"),
            ({"guidance_interval": (100, 700)}, r"guidance_interval \(100, 700\): expected .* times in \[0, 1\]"),
            ({"guidance_interval": ("a", "b")}, r"guidance_interval \('a', 'b'\): expected"),
            ({"guidance_interval": (0.1, None)}, r"guidance_interval \(0.1, None\): expected"),
            ({"guidance_interval": 0.5}, r"guidance_interval 0.5: expected"),
            ({"guidance_channels": 0}, "guidance_channels 0: expected 3"),
            ({"guidance_scale": float("nan")}, "guidance_scale nan: expected a number"),
            ({"output_type": "jpg"}, "unknown output_type 'jpg'; known: pil, np"),
            ({"class_labels": [3, 10]}, r"there is no class 10; the classes are 0\.\.9"),
            ({"class_labels": []}, "at least one class"),
            ({"class_labels": None}, "class_labels: None is no class id"),
            ({"class_labels": "dog"}, "class_labels: 'dog' is no class id, an integer; get_label_ids gives"),
            ({"class_labels": [1, 1.7]}, "class_labels: 1.7 is no class id"),
            ({"generator": 7}, r"generator 7: expected what paddle\.Generator\(\)\.manual_seed\(seed\) returns"),
            ({"generator": "seven"}, "generator 'seven': expected"),
            ({"generator": [1, 2]}, "generator 1: expected"),
            ({"generator": [1, 2, 3]}, "3 generators for 2 images"),
            ({"generator": [1, 2], "sampler": "sde"}, "a list of generators is for the ODE"),
        ],
    )
    def test_mistakes(self, pipe, options, message):
        with pytest.raises(ValueError, match=message):
            pipe(**{"class_labels": [1, 2], "num_inference_steps": 2, **options})


def test_importing_the_package_stays_light():
    code = (
        "import sys; import sampling\n"
        "assert 'SiTPipeline' in sampling.__all__ and not hasattr(sampling, 'no_such_name')\n"
        "assert not {'paddle', 'ppdiffusers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=command_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.paddle26
class TestStockFolder:
    """A SiT that stock ppdiffusers samples, and the reason for its scheduler."""

    @pytest.mark.parametrize(
        "sizes, path_type, steps, guidance_scale",
        [
            ({}, "Linear", 25, 4.0),
            ({"learn_sigma": False, "class_dropout_prob": 0.0}, "Linear", 50, 1.0),
            ({"sample_size": 8, "num_classes": 1000}, "GVP", 7, 2.0),
            ({"patch_size": 4, "mlp_ratio": 2.0}, "VP", 250, 4.0),
        ],
    )
    def test_stock_pipeline_gives_sample_odes_latents(self, tmp_path, sizes, path_type, steps, guidance_scale):
        config = make_config("SiT", {"path_type": path_type}, attention_head_dim=32, **sizes)
        model = make_model(config)
        export_pipeline(config, state_of(model), load_vae(DIGITS_VAE), tmp_path / "out")
        latents, noise = stock_latents(tmp_path / "out", steps, guidance_scale)
        y, null_class = paddle.to_tensor([1, 2]), config["model"]["num_classes"]
        denoiser = guided(model, y, guidance_scale, channels=None, null_class=null_class)
        sample = Sampler(create_transport(path_type)).sample_ode(sampling_method="euler", num_steps=steps)
        with paddle.no_grad():
            expected = sample(noise, denoiser)[-1].numpy()
        assert relative_error(latents, expected) < 1e-5
        assert relative_error(noise.numpy(), expected) > 0.1

    def test_tree_and_labels(self, tmp_path):
        from ppdiffusers import DiTPipeline, EDMEulerScheduler

        config = make_config("SiT")
        notes = export_pipeline(
            config, state_of(make_model(config)), load_vae(DIGITS_VAE), tmp_path / "out", id2label=LABELS
        )
        assert any("no other scheduler fits it" in note for note in notes)
        assert tree_of(tmp_path / "out") == sorted(TREE)
        pipe = DiTPipeline.from_pretrained(str(tmp_path / "out"))
        assert type(pipe.scheduler) is EDMEulerScheduler and pipe.get_label_ids(["number 4"]) == [4]

    def test_flow_match_scheduler_lacks_what_dit_pipeline_calls(self, tmp_path):
        """Why it is not used. Should this fail, ppdiffusers has got it, and the export could be simpler."""
        from ppdiffusers import DiTPipeline, FlowMatchEulerDiscreteScheduler

        config = make_config("SiT")
        export_pipeline(config, state_of(make_model(config)), load_vae(DIGITS_VAE), tmp_path / "out")
        pipe = DiTPipeline.from_pretrained(str(tmp_path / "out"))
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(AttributeError, match="scale_model_input"):
            pipe([1], num_inference_steps=2)

    @pytest.mark.parametrize("prediction", ["noise", "score"])
    def test_only_velocity(self, tmp_path, prediction):
        config = make_config("SiT", {"prediction": prediction})
        with pytest.raises(ValueError, match=f"prediction '{prediction}': .* need prediction 'velocity'"):
            export_pipeline(config, state_of(make_model(config)), load_vae(DIGITS_VAE), tmp_path / "out")
        assert tree_of(tmp_path) == []


class TestConverter:
    def run(self, *arguments, vae=DIGITS_VAE):
        convert_sit_to_ppdiffusers.main([*map(str, arguments), "--vae_model", str(vae)])

    @pytest.fixture
    def tiny_config(self, tmp_path):
        """The config of the golden sit_tiny.pt."""
        path = tmp_path / "SiT_tiny.json"
        path.write_text(json.dumps({"model": TINY_PT}))
        return path

    def test_checkpoint_folder(self, tmp_path):
        config = make_config("SiT", {"path_type": "GVP"})
        averages = state_of(write_checkpoint(tmp_path / "checkpoint-7", config))
        flags = ["--model_weights", tmp_path / "checkpoint-7", "--checkpoint_path", tmp_path / "out"]
        self.run(*flags)
        exported = safe_load(tmp_path / "out" / "transformer" / "model_state.pdparams")
        assert set(exported) == set(averages)
        assert all(np.array_equal(exported[name], averages[name]) for name in averages)
        assert SiTPipeline.from_pretrained(tmp_path / "out").scheduler.config.path_type == "GVP"
        with pytest.raises(ValueError, match="is not empty"):
            self.run(*flags)
        self.run(*flags, "--overwrite", "--key", "model")
        again = safe_load(tmp_path / "out" / "transformer" / "model_state.pdparams")
        assert not np.array_equal(again["final_layer.linear.weight"], averages["final_layer.linear.weight"])

    @pytest.mark.parametrize("layout", ["torch", "paddle"])
    def test_official_weights_give_the_golden_output(self, tmp_path, tiny_config, layout):
        weights = GOLDEN / "sit_tiny.pt"
        if layout == "paddle":
            weights = tmp_path / "tiny.pdparams"
            convert_official_weights.main(
                ["--config_file", str(tiny_config), "--weights", str(GOLDEN / "sit_tiny.pt"), "--output", str(weights)]
            )
        out = tmp_path / "out"
        self.run("--config_file", tiny_config, "--model_weights", weights, "--checkpoint_path", out)
        network = SiTPipeline.from_pretrained(out).transformer
        golden = load_golden("sit_forward")
        inputs = {name: paddle.to_tensor(golden[name]) for name in ("x", "t", "y", "cfg_x", "cfg_t", "cfg_y")}
        with paddle.no_grad():
            assert relative_error(network(inputs["x"], inputs["t"], inputs["y"]).numpy(), golden["out"]) < 1e-5
            guided_out = network.forward_with_cfg(inputs["cfg_x"], inputs["cfg_t"], inputs["cfg_y"], 4.0)
        assert relative_error(guided_out.numpy(), golden["cfg_out_4"]) < 1e-5

    def test_stock(self, tmp_path):
        config = make_config("SiT")
        write_checkpoint(tmp_path / "checkpoint-7", config)
        out = tmp_path / "out"
        self.run("--stock", "--model_weights", tmp_path / "checkpoint-7", "--checkpoint_path", out)
        assert json.loads((out / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
        assert tree_of(out) == sorted([*TREE, CARD])

    def test_labels_and_save_false(self, tmp_path, capsys):
        write_checkpoint(tmp_path / "checkpoint-7", make_config("SiT"))
        (tmp_path / "labels.json").write_text(json.dumps({"id2label": LABELS}))
        flags = ["--model_weights", tmp_path / "checkpoint-7", "--checkpoint_path", tmp_path / "out"]
        self.run(*flags, "--save", "False")
        assert not (tmp_path / "out").exists()
        self.run(*flags, "--id2label", tmp_path / "labels.json")
        assert SiTPipeline.from_pretrained(tmp_path / "out").get_label_ids("number 3") == [3]
        assert "sampling.SiTPipeline.from_pretrained" in capsys.readouterr().out

    @pytest.mark.parametrize("changed", [{"path_type": "GVP"}, {"prediction": "noise"}])
    @pytest.mark.parametrize("file", ["", "ema_state.pdparams"])
    def test_another_config_than_the_checkpoints(self, tmp_path, changed, file):
        write_checkpoint(tmp_path / "sit", make_config("SiT"))
        (tmp_path / "SiT.json").write_text(json.dumps(make_config("SiT", changed)))
        (key,) = changed
        flags = ["--model_weights", tmp_path / "sit" / file, "--config_file", tmp_path / "SiT.json"]
        with pytest.raises(ValueError, match=f"holds another run's objective: {key} .* there, {changed[key]} here"):
            self.run(*flags, "--checkpoint_path", tmp_path / "out")
        if file:  # the demo refuses any config beside a folder
            with pytest.raises(ValueError, match=f"holds another run's objective: {key}"):
                infer_demo_sit.main(["--model_path", str(flags[1]), "--config_file", str(flags[3]), "--device", "cpu"])

    def test_the_exact_position_table_of_half_precision(self):
        config = make_config("SiT")
        state = state_of(make_model(config))
        exact = state["pos_embed"].copy()
        state["pos_embed"] = exact.astype("float16").astype("float32")
        pipe = SiTPipeline.from_weights(config, state, load_vae(DIGITS_VAE))
        np.testing.assert_array_equal(pipe.transformer.pos_embed.numpy(), exact)
        state["pos_embed"] = exact + np.float32(0.1)
        pipe = SiTPipeline.from_weights(config, state, load_vae(DIGITS_VAE))
        np.testing.assert_array_equal(pipe.transformer.pos_embed.numpy(), state["pos_embed"])

    def test_mistakes(self, tmp_path):
        config = make_config("SiT", {"prediction": "score"})
        write_checkpoint(tmp_path / "sit", config)
        write_checkpoint(tmp_path / "dit", resolve_config({"model": TINY_MODELS["DiT"]}))
        out = ["--checkpoint_path", tmp_path / "out"]
        make_vae(3).save_pretrained(str(tmp_path / "vae"), safe_serialization=False)
        with pytest.raises(ValueError, match="this model is a DiT; use tools/convert_dit_to_ppdiffusers.py"):
            self.run("--model_weights", tmp_path / "dit", *out)
        with pytest.raises(ValueError, match=r"'transport' is not sampled by .*tools/convert_sit_to_ppdiffusers\.py"):
            convert_dit_to_ppdiffusers.main(["--model_weights", str(tmp_path / "sit"), *map(str, out)])
        with pytest.raises(ValueError, match="prediction 'score'"):
            self.run("--stock", "--model_weights", tmp_path / "sit", *out)
        with pytest.raises(ValueError, match="--vae .*: decodes 3 channels, the latents have 4"):
            self.run("--model_weights", tmp_path / "sit", *out, vae=tmp_path / "vae")
        with pytest.raises(ValueError, match="pos_embed differs"):  # its table is not the plain one
            config = resolve_config({"model": TINY_PT})
            state = official_to_paddle(load_weights(GOLDEN / "sit_tiny.pt"))
            export_pipeline(config, state, load_vae(DIGITS_VAE), tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestDemo:
    @pytest.fixture(autouse=True)
    def in_empty_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @pytest.fixture(scope="class")
    def models(self, tmp_path_factory):
        """One network as a checkpoint, a SiTPipeline folder, a stock folder and a file, with its config."""
        root = tmp_path_factory.mktemp("models")
        config = make_config("SiT")
        state = state_of(write_checkpoint(root / "checkpoint", config))
        vae = load_vae(DIGITS_VAE)
        SiTPipeline.from_weights(config, state, vae, LABELS).save_pretrained(root / "pipeline")
        export_pipeline(config, state, vae, root / "stock", id2label=LABELS)
        paddle.save({name: paddle.to_tensor(value) for name, value in state.items()}, str(root / "sit.pdparams"))
        (root / "SiT.json").write_text(json.dumps(config))
        return root

    def draw(self, output, *arguments, demo=infer_demo_sit):
        demo.main([*map(str, arguments), "--output", output, "--device", "cpu"])
        return np.asarray(Image.open(output)).astype(int)

    def test_every_kind_of_model_gives_the_same_images(self, models):
        flags = ["--classes", 3, 7, "--seed", 5, "--num_inference_steps", 5, "--guidance_scale", 2]
        vae = ["--vae", DIGITS_VAE]
        first = self.draw("a.png", "--model_path", models / "pipeline", *flags)
        assert first.shape == (32, 64, 3) and first.std() > 5
        names = self.draw("b.png", "--model_path", models / "pipeline", "--classes", "digit 3", "number 7", *flags[3:])
        np.testing.assert_array_equal(first, names)
        np.testing.assert_array_equal(first, self.draw("c.png", "--model_path", models / "checkpoint", *flags, *vae))
        file = ["--model_path", models / "sit.pdparams", "--config_file", models / "SiT.json"]
        np.testing.assert_array_equal(first, self.draw("d.png", *file, *flags, *vae))

    def test_stock_folder_draws_the_odes_images(self, models):
        flags = ["--classes", 3, 7, "--num_inference_steps", 6, "--guidance_scale", 2]
        ode = self.draw("a.png", "--model_path", models / "pipeline", "--sampler", "ode", *flags)
        stock = self.draw(
            "b.png", "--model_path", models / "stock", "--guidance_channels", 3, *flags, demo=infer_demo_dit
        )
        assert np.abs(ode - stock).max() <= 1
        with pytest.raises(ValueError, match="is a SiT, which has its own scheduler"):
            self.draw("c.png", "--model_path", models / "stock", "--scheduler", "ddim", demo=infer_demo_dit)

    def test_options_matter(self, models):
        def image(name, *flags):
            flags = ["--model_path", models / "pipeline", "--classes", 1, "--num_inference_steps", 4, *flags]
            return self.draw(f"{name}.png", *flags)

        first = image("first")
        assert np.array_equal(first, image("again"))
        seed_values = ["--sampler", "sde", "--method", "Euler", "--diffusion_form", "linear", "--last_step", "Mean"]
        assert np.array_equal(first, image("named", *seed_values, "--last_step_size", 0.4, "--diffusion_norm", 1))
        for i, flags in enumerate(
            (
                ["--seed", 1],
                ["--sampler", "ode"],
                ["--method", "Heun"],
                ["--guidance_scale", 1],
                ["--guidance_channels", "all"],
                ["--guidance_interval", 0.5, 1],
                ["--diffusion_form", "SBDM"],
                ["--last_step", "None"],
            )
        ):
            assert not np.array_equal(first, image(f"other{i}", *flags)), flags

    def test_no_argument_takes_the_public_weights(self, models, tmp_path, monkeypatch, capsys):
        with pytest.raises(ValueError, match=r"SiT-XL-2-256x256\.pdparams: .*tools/convert_official_weights\.py"):
            infer_demo_sit.main([])
        assert list(tmp_path.iterdir()) == []
        # The same, with a small network in the public one's place.
        config = make_config("SiT", num_classes=1000)
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = {name: paddle.to_tensor(value) for name, value in state_of(make_model(config)).items()}
        paddle.save(tensors, "SiT-XL-2-256x256.pdparams")
        monkeypatch.setattr(infer_demo_sit, "PUBLIC_CONFIG", str(tmp_path / "config.json"))
        infer_demo_sit.main(["--vae", DIGITS_VAE])
        image = np.asarray(Image.open("outputs/result_SiT_golden_retriever.png"))
        assert image.shape == (32, 32, 3)
        infer_demo_sit.main(["--vae", DIGITS_VAE])
        assert np.array_equal(image, np.asarray(Image.open("outputs/result_SiT_golden_retriever-2.png")))
        assert "golden retriever: outputs/result_SiT_golden_retriever-2.png" in capsys.readouterr().out

    def test_what_is_taken_without_an_argument(self, tmp_path):
        """The folder before the converted file before the official one."""
        for name in ("SiT-XL-2-256x256.pt", "SiT-XL-2-256x256.pdparams"):
            (tmp_path / name).touch()
            assert infer_demo_sit.find_model(None) == name
        (tmp_path / "SiT_XL_2_256").mkdir()
        assert infer_demo_sit.find_model(None) == "./SiT_XL_2_256"
        assert infer_demo_sit.find_model("mine") == "mine"

    @pytest.mark.parametrize("flag, value", [("--vae", DIGITS_VAE), ("--config_file", "SiT.json"), ("--key", "model")])
    def test_no_flag_is_dropped_silently(self, models, tmp_path, flag, value):
        with pytest.raises(ValueError, match=f"{flag} is for a training checkpoint or a file .* is a SiTPipeline fold"):
            self.draw("a.png", "--model_path", models / "pipeline", flag, value)
        if flag == "--config_file":
            with pytest.raises(ValueError, match="--config_file is for a file of weights; .* is a training checkpoint"):
                self.draw("a.png", "--model_path", models / "checkpoint", "--vae", DIGITS_VAE, flag, value)
        assert list(tmp_path.iterdir()) == []

    def test_official_file_as_it_is(self, models):
        config = models / "tiny.json"
        config.write_text(json.dumps({"model": TINY_PT}))
        flags = ["--config_file", config, "--vae", DIGITS_VAE, "--classes", 1, "--num_inference_steps", 3]
        image = self.draw("a.png", "--model_path", GOLDEN / "sit_tiny.pt", *flags)
        assert image.shape == (64, 64, 3)

    @pytest.mark.parametrize(
        "flags, message",
        [
            (["--model_path", "nowhere"], "nowhere: there is no such file or folder"),
            (["--model_path", str(GOLDEN)], "neither a SiTPipeline folder .* nor a training checkpoint"),
            (["--num_inference_steps", "1"], "--num_inference_steps 1: expected 2 or more"),
            (["--dtype", "float16"], "--dtype float16: Paddle computes in float32 only on a CPU"),
            (["--classes", "unicorn"], "--classes unicorn: no such class"),
            (["--method", "euler"], "--method euler: unknown for --sampler sde; accepted: Euler, Heun"),
            (["--sampler", "ode", "--last_step", "Mean"], "--last_step is for --sampler sde"),
            (["--guidance_interval", "0.9", "0.1"], "guidance_interval"),
            (["--last_step_size", "nan"], "--last_step_size must be a number from 0 to below 1, got nan"),
        ],
    )
    def test_mistakes(self, models, tmp_path, flags, message):
        with pytest.raises(ValueError, match=message):
            infer_demo_sit.main(["--model_path", str(models / "pipeline"), *flags, "--device", "cpu"])
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("kind", ["pipeline", "checkpoint", "sit.pdparams"])
    def test_refused_before_paddle_is_imported(self, models, tmp_path, monkeypatch, kind):
        monkeypatch.setattr(image_demo, "configure_runtime", lambda: pytest.fail("it would be imported here"))
        model = ["--model_path", str(models / kind)]
        model += ["--config_file", str(models / "SiT.json")] if kind.endswith(".pdparams") else []
        for flags, message in (
            (["--classes", "10"], r"--classes 10: the classes are 0\.\.9"),
            (["--seed=-1"], "--seed must be an integer from 0 to 4294967295, got -1"),
            (["--guidance_scale", "inf"], "--guidance_scale inf: expected a finite number"),
            (["--guidance_interval", "0.2", "nan"], "--guidance_interval 0.2 nan: expected two times"),
            (["--num_inference_steps", "1"], "--num_inference_steps 1: expected 2 or more"),
            (["--output", "out"], "--output out: has no ending"),
        ):
            with pytest.raises(ValueError, match=message):
                infer_demo_sit.main([*model, *flags])
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("kind", ["pipeline", "checkpoint", "sit.pdparams"])
    def test_settings_of_the_sampler_are_refused_before_weights_are_read(self, models, monkeypatch, kind):
        for module in ("weights.source.load_weights", "sampling.sit_pipeline.load_weights"):
            monkeypatch.setattr(module, lambda *_: pytest.fail("weights are read"))
        model = ["--model_path", str(models / kind), "--device", "cpu"]
        model += ["--config_file", str(models / "SiT.json")] if kind.endswith(".pdparams") else []
        with pytest.raises(ValueError, match="last_step_size=0.9995: nothing is left of the interval"):
            infer_demo_sit.main([*model, "--diffusion_form", "SBDM", "--last_step_size", "0.9995"])

    def test_numbers_that_are_not_finite(self, models, tmp_path):
        flags = ["--vae", DIGITS_VAE, "--classes", 1, "--num_inference_steps", 3]
        with pytest.raises(NotFiniteError, match="1 of 1 images hold numbers that are not finite"):
            self.draw("a.png", "--model_path", models / "checkpoint", *flags, "--guidance_scale", "1e30")
        state = {name: value.copy() for name, value in load_weights(models / "sit.pdparams").items()}
        state["blocks.1.attn.qkv.weight"].flat[3] = np.inf
        save_pdparams(state, tmp_path / "bad.pdparams")
        file = ["--model_path", "bad.pdparams", "--config_file", models / "SiT.json"]
        with pytest.raises(ValueError, match="bad.pdparams: blocks.1.attn.qkv.weight has 1 of 3,072 values"):
            self.draw("a.png", *file, *flags)
        assert os.listdir() == ["bad.pdparams"]

    def test_flags_of_no_effect_are_named(self, models, capsys):
        flags = ["--classes", 1, "--num_inference_steps", 3, "--guidance_scale", 1, "--guidance_channels", 3]
        more = ["--guidance_interval", 0.1, 0.9, "--last_step", "None", "--last_step_size", 0.1]
        self.draw("a.png", "--model_path", models / "pipeline", *flags, *more)
        out = capsys.readouterr().out
        assert "note: --guidance_channels and --guidance_interval have no effect without guidance" in out
        assert "note: --last_step_size has no effect with --last_step None" in out

    @pytest.mark.parametrize("in_channels", [4, 16])
    def test_channels_that_are_guided_by_default(self, tmp_path, in_channels):
        """Three of four, all of sixteen; --guidance_channels 3 means three."""
        config = make_config("SiT", in_channels=in_channels)
        pipe = make_pipeline(config, make_vae(in_channels))
        pipe.save_pretrained(tmp_path / "pipeline")

        def image(*flags):
            flags = ["--classes", 3, "--num_inference_steps", 3, "--overwrite", *flags]
            return self.draw("a.png", "--model_path", tmp_path / "pipeline", *flags)

        default, three, everything = image(), image("--guidance_channels", 3), image("--guidance_channels", "all")
        assert np.array_equal(default, three if in_channels == 4 else everything)
        assert not np.array_equal(three, everything)
        by_call = [
            pipe([3], guidance_channels=channels, num_inference_steps=3, generator=seeded(), output_type="np").images
            for channels in ("auto", 3 if in_channels == 4 else None)
        ]
        np.testing.assert_array_equal(*by_call)

    def test_a_file_of_another_demos_checkpoint_names_its_config(self, tmp_path):
        config = resolve_config({"model": {**make_config("SiT")["model"], "type": "DiT"}})
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model_state.pdparams").touch()
        with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'}: describes a DiT; use infer_demo_dit.py"):
            self.draw("a.png", "--model_path", tmp_path / "model_state.pdparams")

    def test_the_other_demos_models(self, models):
        with pytest.raises(ValueError, match="is a DiTPipeline; use infer_demo_dit.py"):
            self.draw("a.png", "--model_path", models / "stock")
        with pytest.raises(ValueError, match="is a SiT; use infer_demo_sit.py"):
            self.draw("a.png", "--model_path", models / "checkpoint", demo=infer_demo_dit)


def test_scheduler_checks_its_settings():
    with pytest.raises(ValueError, match="unknown prediction 'eps'; accepted: 'velocity', 'noise', 'score'"):
        TransportScheduler(prediction="eps")
