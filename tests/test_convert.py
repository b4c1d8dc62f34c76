"""Conversion of official weights and back, export to ppdiffusers, extraction: files in, files out."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import paddle
import pytest
from support.golden import GOLDEN, TINY, relative_error
from support.pipelines import (
    ddim_latents,
    make_config,
    make_model,
    make_vae,
    state_of,
    stock_latents,
    tree_of,
    write_checkpoint,
)
from support.runs import ROOT, command_environment

from models import build_model
from models.state import official_to_paddle, paddle_to_official
from sampling.pipelines.converter import latent_shape, named_config
from sampling.pipelines.export import export_pipeline
from sampling.pipelines.export_dit import transformer_config, transformer_state
from sampling.pipelines.folder import TREE
from sampling.pipelines.timestep_fit import fit_timestep_embedding
from sampling.schedulers import make_scheduler
from tools import convert_dit_to_ppdiffusers, convert_official_weights, extract_weights
from training.checkpoints.read import load_pretrained
from weights.files import load_weights, safe_load, save_pdparams, save_torch

SCRIPTS = [
    "tools/convert_official_weights.py",
    "tools/convert_dit_to_ppdiffusers.py",
    "tools/convert_sit_to_ppdiffusers.py",
    "tools/extract_weights.py",
    "infer_demo_dit.py",
    "infer_demo_sit.py",
    "infer_demo_largedit_3b.py",
    "infer_demo_largedit_7b.py",
]


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    make_vae().save_pretrained(str(folder), safe_serialization=False)
    return str(folder)


@pytest.fixture
def checkpoint(tmp_path):
    """A training checkpoint folder whose weights and averages differ; (folder, model's state, ema's state)."""
    config, folder = make_config(), tmp_path / "checkpoint-7"
    write_checkpoint(folder, config)
    (folder / "trainer_state.json").write_text("{}")
    return folder, *(safe_load(folder / f"{name}.pdparams") for name in ("model_state", "ema_state"))


@pytest.fixture
def config_file(tmp_path):
    """The flat config of the golden dit_tiny.pt."""
    path = tmp_path / "DiT_tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.mark.paddle26
class TestOfficialConverter:
    def run(self, *arguments):
        convert_official_weights.main([str(argument) for argument in arguments])

    def test_there_and_back_gives_the_same_bits(self, tmp_path, config_file):
        source, there, back = GOLDEN / "dit_tiny.pt", tmp_path / "dit.pdparams", tmp_path / "back.pt"
        self.run("--config_file", config_file, "--weights", source, "--output", there)
        loaded = paddle.load(str(there))
        assert all(value.dtype == paddle.float32 for value in loaded.values())
        official = load_weights(source)
        np.testing.assert_array_equal(loaded["blocks.1.mlp.fc1.weight"].numpy(), official["blocks.1.mlp.fc1.weight"].T)
        np.testing.assert_array_equal(loaded["pos_embed"].numpy(), official["pos_embed"])

        self.run("--reverse", "--config_file", config_file, "--weights", there, "--output", back)
        again = load_weights(back)
        assert list(again) == list(official)
        assert all(again[name].tobytes() == official[name].tobytes() for name in official)
        assert sorted(os.listdir(tmp_path)) == sorted(["DiT_tiny.json", "dit.pdparams", "back.pt"])

    @pytest.mark.parametrize("key", [None, "model", "ema"])
    def test_training_checkpoint(self, tmp_path, key):
        config = tmp_path / "DiT.json"
        config.write_text(json.dumps({"model": {"type": "DiT", **TINY, "num_layers": 2, "attention_head_dim": 8}}))
        source = GOLDEN / "dit_tiny_train_ckpt.pt"
        flags = ["--key", key] if key else []
        self.run("--config_file", config, "--weights", source, "--output", tmp_path / "y.pdparams", *flags)
        expected = official_to_paddle(load_weights(source, key=key or "ema"))
        state = safe_load(tmp_path / "y.pdparams")
        assert all(np.array_equal(state[name], expected[name]) for name in expected)

    def test_our_checkpoint_folder_to_official(self, tmp_path, checkpoint):
        folder, _, ema = checkpoint
        config = folder / "config.json"
        self.run("--reverse", "--config_file", config, "--weights", folder, "--output", tmp_path / "x.pt")
        state = official_to_paddle(load_weights(tmp_path / "x.pt"))
        assert all(np.array_equal(state[name], ema[name]) for name in ema)

    def test_weights_of_another_network(self, tmp_path, config_file):
        other = json.loads(config_file.read_text())
        config_file.write_text(json.dumps({**other, "num_layers": 2}))
        with pytest.raises(ValueError, match=r"dit_tiny\.pt: these weights do not fit.*unexpected: blocks\.2\."):
            self.run("--config_file", config_file, "--weights", GOLDEN / "dit_tiny.pt", "--output", tmp_path / "y")
        config_file.write_text(json.dumps({**other, "num_classes": 11}))
        with pytest.raises(ValueError, match=r"embedding_table\.weight is \[11, 64\], expected \[12, 64\]"):
            self.run("--config_file", config_file, "--weights", GOLDEN / "dit_tiny.pt", "--output", tmp_path / "y")
        assert not (tmp_path / "y").exists()

    def test_an_existing_output_stays(self, tmp_path, config_file):
        output = tmp_path / "y.pdparams"
        output.write_text("mine")
        flags = ["--config_file", config_file, "--weights", GOLDEN / "dit_tiny.pt", "--output", output]
        with pytest.raises(ValueError, match="exists already"):
            self.run(*flags)
        assert output.read_text() == "mine"
        self.run(*flags, "--overwrite")
        assert len(safe_load(output)) == 42

    def test_exit_code_and_one_line(self, tmp_path, config_file):
        command = [sys.executable, SCRIPTS[0], "--config_file", config_file, "--weights", tmp_path / "no.pt"]
        result = subprocess.run(
            [*map(str, command), "--output", str(tmp_path / "y")],
            cwd=ROOT,
            env=command_environment(),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2
        assert result.stderr.strip().splitlines()[-1] == (
            f"error: --model_path {tmp_path / 'no.pt'}: there is no such file or folder"
        )
        assert "Traceback" not in result.stderr


class TestTransformer:
    """The exported `Transformer2DModel` gives the DiT's own output."""

    @pytest.mark.parametrize(
        "sizes",
        [
            {},
            {"patch_size": 4, "learn_sigma": False},
            {"patch_size": 1, "num_classes": 7, "in_channels": 3},
            {"patch_size": 8, "mlp_ratio": 2.5},
            {"num_classes": 1000},
            {"sample_size": 16, "class_dropout_prob": 0.0},
        ],
    )
    def test_same_output(self, tmp_path, sizes):
        from ppdiffusers import Transformer2DModel

        config = make_config(**sizes)
        settings = config["model"]
        model = make_model(config)
        export_pipeline(config, state_of(model), make_vae(settings["in_channels"]), tmp_path / "out")
        exported = Transformer2DModel.from_pretrained(str(tmp_path / "out" / "transformer"))
        exported.eval()

        t = paddle.arange(0, 1000, 20)  # the timesteps of 50 steps, in which 25 and 10 are contained
        x = paddle.to_tensor(
            np.random.RandomState(0)
            .standard_normal([50, settings["in_channels"], settings["sample_size"], settings["sample_size"]])
            .astype("float32")
        )
        y = paddle.arange(50) % settings["num_classes"]
        with paddle.no_grad():
            expected = model(x, t, y).numpy()
            out = exported(x, timestep=t, class_labels=y).sample.numpy()
            assert out.shape == expected.shape
            assert relative_error(out, expected) < 1e-5
            null = exported(x, timestep=t, class_labels=paddle.full_like(y, 1000)).sample.numpy()
            if settings["class_dropout_prob"] > 0:
                expected = model(x, t, paddle.full_like(y, settings["num_classes"])).numpy()
                assert relative_error(null, expected) < 1e-5
            else:
                assert np.isnan(null).all()  # there is no null class: guidance must not look as if it worked

    def test_timestep_embedding_of_a_wide_network_is_right_everywhere(self):
        random = np.random.RandomState(0)
        shapes = {"0.weight": (256, 1024), "0.bias": (1024,), "2.weight": (1024, 1024), "2.bias": (1024,)}
        state = {f"t_embedder.mlp.{name}": random.normal(0, 0.02, shape) for name, shape in shapes.items()}
        _, report = fit_timestep_embedding(state, make_scheduler(make_config()["objective"]))
        assert report["all_timesteps"] and report["max_error"] < 3e-5
        assert report["kept_error"] > 0.1  # why it is fitted at all

    def test_timestep_embedding_of_a_narrow_one_says_where_it_is_right(self):
        state = state_of(make_model(make_config()))
        _, report = fit_timestep_embedding(state, make_scheduler(make_config()["objective"]))
        assert {10, 25, 50} <= set(report["exact_steps"]) and 1000 not in report["exact_steps"]
        assert not report["all_timesteps"]

    def test_keep_copies_the_weights(self):
        config = make_config()
        state = state_of(make_model(config))
        exported = transformer_state(config["model"], state)
        for i in range(2):
            name = f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1.weight"
            np.testing.assert_array_equal(exported[name], state["t_embedder.mlp.0.weight"])

    @pytest.mark.parametrize(
        "sizes, message",
        [
            ({"num_classes": 1001}, "num_classes 1001: DiTPipeline takes class 1000 for the null class"),
            ({"mlp_ratio": 5.0}, "mlp_ratio 5.0"),
        ],
    )
    def test_refusals(self, tmp_path, sizes, message):
        config = make_config(**sizes)
        with pytest.raises(ValueError, match=message):
            export_pipeline(config, state_of(make_model(config)), make_vae(), tmp_path / "out")
        assert tree_of(tmp_path) == []

    def test_another_pos_embed_is_refused(self, tmp_path):
        config = make_config(num_layers=3)  # dit_tiny.pt, whose table is not the plain one
        state = official_to_paddle(load_weights(GOLDEN / "dit_tiny.pt"))
        with pytest.raises(ValueError, match="pos_embed differs by up to 0.0"):
            export_pipeline(config, state, make_vae(), tmp_path / "out")
        assert tree_of(tmp_path) == []

    def test_another_vae_is_refused(self, tmp_path):
        config = make_config()
        with pytest.raises(ValueError, match="the VAE has 3 latent channels"):
            export_pipeline(config, state_of(make_model(config)), make_vae(3), tmp_path / "out")


@pytest.mark.paddle26
class TestPipeline:
    @pytest.mark.parametrize(
        "sizes, objective, steps, guidance_scale",
        [
            ({}, {}, 25, 4.0),
            ({"learn_sigma": False}, {}, 50, 1.0),
            ({"patch_size": 4}, {"predict_xstart": True}, 10, 3.0),
            ({}, {"noise_schedule": "squaredcos_cap_v2"}, 25, 2.0),
        ],
    )
    def test_ddim_gives_ddim_sample_loops_latents(self, tmp_path, sizes, objective, steps, guidance_scale):
        config = make_config(objective=objective, **sizes)
        model = make_model(config)
        export_pipeline(config, state_of(model), make_vae(), tmp_path / "out")
        latents, noise = stock_latents(tmp_path / "out", steps, guidance_scale)
        expected = ddim_latents(config, model, noise, steps, guidance_scale)
        # ppdiffusers multiplies 1000 alphas in float32, ours are float64: the cosine schedule's last ones are tiny.
        assert relative_error(latents, expected) < (1e-3 if objective.get("noise_schedule") else 3e-5)

    @pytest.mark.parametrize("scheduler", ["ddim", "dpm", "dpm3"])
    def test_tree_schedulers_and_labels(self, tmp_path, scheduler):
        from ppdiffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler

        config = make_config()
        labels = {i: f"class {i}, alias {i}" for i in range(10)}
        out = tmp_path / "out"
        state = state_of(make_model(config))
        notes = export_pipeline(config, state, make_vae(), out, scheduler=scheduler, id2label=labels)
        assert tree_of(tmp_path) == sorted(f"out/{name}" for name in TREE)
        assert any("guides all latent channels" in note for note in notes)
        index = json.loads((out / "model_index.json").read_text())
        assert index["id2label"]["3"] == "class 3, alias 3" and len(index["id2label"]) == 10

        pipe = DiTPipeline.from_pretrained(str(out))
        assert type(pipe.scheduler) is (DDIMScheduler if scheduler == "ddim" else DPMSolverMultistepScheduler)
        assert pipe.scheduler.config.get("solver_order") == {"ddim": None, "dpm": 2, "dpm3": 3}[scheduler]
        assert set(json.loads((out / "transformer" / "config.json").read_text())["_timestep_fit"]) == {"ddim", "dpm"}
        assert pipe.get_label_ids(["alias 7"]) == [7]
        assert pipe.scheduler.config.prediction_type == "epsilon"
        # As in the usual demo, whatever was exported; a DDIMScheduler that clips would ruin latents.
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        assert pipe.scheduler.config.clip_sample is False
        pipe.set_progress_bar_config(disable=True)
        images = pipe(class_labels=[0], num_inference_steps=3, output_type="numpy").images
        assert images.shape == (1, 8, 8, 3) and np.isfinite(images).all()

    def test_an_existing_folder_stays(self, tmp_path):
        config, vae = make_config(), make_vae()
        state = state_of(make_model(config))
        out = tmp_path / "out"
        out.mkdir()  # empty: free
        export_pipeline(config, state, vae, out)
        before = (out / "model_index.json").read_bytes()
        with pytest.raises(ValueError, match="is not empty"):
            export_pipeline(config, state, vae, out, scheduler="dpm")
        assert (out / "model_index.json").read_bytes() == before
        export_pipeline(config, state, vae, out, scheduler="dpm", overwrite=True)
        assert b"DPMSolver" in (out / "model_index.json").read_bytes()
        (out / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="holds notes.txt, which is no part of a pipeline"):
            export_pipeline(config, state, vae, out, overwrite=True)
        assert tree_of(tmp_path) == sorted([*(f"out/{name}" for name in TREE), "out/notes.txt"])


class TestPipelineConverter:
    def run(self, vae_folder, *arguments):
        convert_dit_to_ppdiffusers.main([*map(str, arguments), "--vae_model", vae_folder])

    @pytest.mark.parametrize("key", [None, "model", "ema"])
    def test_checkpoint_folder(self, tmp_path, checkpoint, vae_folder, key):
        folder, model_state, ema_state = checkpoint
        flags = ["--key", key] if key else []
        self.run(vae_folder, "--model_weights", folder, "--checkpoint_path", tmp_path / "out", *flags)
        exported = safe_load(tmp_path / "out" / "transformer" / "model_state.pdparams")
        expected = model_state if key == "model" else ema_state
        np.testing.assert_array_equal(exported["pos_embed.proj.weight"], expected["x_embedder.proj.weight"])

    @pytest.mark.paddle26
    @pytest.mark.parametrize("layout", ["torch", "paddle"])
    def test_official_file_and_pdparams(self, tmp_path, vae_folder, layout):
        config = tmp_path / "DiT.json"
        sizes = {"sample_size": 8, "patch_size": 2, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8}
        config.write_text(json.dumps({**sizes, "num_classes": 10}))
        weights = GOLDEN / "dit_train_init.pt"
        if layout == "paddle":
            weights = tmp_path / "init.pdparams"
            convert_official_weights.main(
                ["--config_file", str(config), "--weights", str(GOLDEN / "dit_train_init.pt"), "--output", str(weights)]
            )
        out = tmp_path / "out"
        self.run(vae_folder, "--config_file", config, "--model_weights", weights, "--checkpoint_path", out)
        exported = safe_load(out / "transformer" / "model_state.pdparams")
        official = load_weights(GOLDEN / "dit_train_init.pt")
        np.testing.assert_array_equal(
            exported["transformer_blocks.1.attn1.to_out.0.weight"], official["blocks.1.attn.proj.weight"].T
        )

    def test_imagenet_labels(self, tmp_path, vae_folder):
        from ppdiffusers import DiTPipeline

        config = make_config(num_classes=1000)
        (tmp_path / "c.json").write_text(json.dumps(config))
        state = state_of(make_model(config))
        paddle.save({name: paddle.to_tensor(value) for name, value in state.items()}, str(tmp_path / "w.pdparams"))
        flags = ["--config_file", tmp_path / "c.json", "--model_weights", tmp_path / "w.pdparams"]
        self.run(vae_folder, *flags, "--checkpoint_path", tmp_path / "out")
        pipe = DiTPipeline.from_pretrained(str(tmp_path / "out"))
        assert pipe.get_label_ids(["golden retriever"]) == [207]
        assert pipe.get_label_ids(["Siberian husky", "toilet paper"]) == [250, 999]

    def test_labels_file(self, tmp_path, checkpoint, vae_folder, capsys):
        folder = checkpoint[0]
        labels = tmp_path / "labels.json"
        flags = ["--model_weights", folder, "--id2label", labels, "--checkpoint_path", tmp_path / "out"]
        labels.write_text(json.dumps({"id2label": {str(i): f"digit {i}" for i in range(9)}}))
        with pytest.raises(ValueError, match="no label for class 9; expected one for each of 0..9"):
            self.run(vae_folder, *flags)
        assert not (tmp_path / "out").exists()
        labels.write_text(json.dumps({str(i): f"digit {i}" for i in range(10)}))
        self.run(vae_folder, *flags)
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert index["id2label"]["9"] == "digit 9"
        assert "named '0'" not in capsys.readouterr().out

        self.run(vae_folder, "--model_weights", folder, "--checkpoint_path", tmp_path / "out2")
        assert "No --id2label: the classes are named '0' to '9'." in capsys.readouterr().out

    def test_save_false_writes_nothing(self, tmp_path, checkpoint, vae_folder):
        before = tree_of(tmp_path)
        out = tmp_path / "out"
        self.run(vae_folder, "--model_weights", checkpoint[0], "--save", "False", "--checkpoint_path", out)
        assert tree_of(tmp_path) == before

    @pytest.mark.parametrize(
        "flags, message",
        [
            (["--scheduler", "ddmi"], "argument --scheduler: invalid choice: 'ddmi'"),
            (["--model_weights", "no_such.pdparams"], "no_such.pdparams: there is no such file"),
            (["--id2label", "no_such.json"], "no_such.json: no such file"),
            (["--config_file", str(ROOT / "config" / "DiT_S_patch8.json")], "these weights do not fit the config"),
        ],
    )
    def test_mistakes(self, tmp_path, checkpoint, vae_folder, flags, message):
        with pytest.raises(ValueError, match=message):
            self.run(vae_folder, "--model_weights", checkpoint[0], "--checkpoint_path", tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists()

    def test_a_run_folder_without_a_whole_checkpoint_names_the_newest(self, checkpoint, vae_folder):
        folder = checkpoint[0]
        with pytest.raises(ValueError, match="none of its 1 .* the newest is .*checkpoint-7: it has no manifest.json"):
            self.run(vae_folder, "--config_file", folder / "config.json", "--model_weights", folder.parent)

    def test_a_vae_that_cannot_be_had(self, tmp_path, checkpoint):
        with pytest.raises(ValueError, match="Without a network, copy the VAE here .* give its folder"):
            self.run("no-such-owner/no-such-vae", "--model_weights", checkpoint[0], "--checkpoint_path", tmp_path / "o")
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize("kind", ["DiT", "SiT"])
    @pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
    @pytest.mark.parametrize("patch_size", [2, 4, 8])
    def test_model_names_are_the_configs(self, kind, size, patch_size):
        named = named_config(kind, f"{kind}_{size}_{patch_size}", 256)
        file = json.loads((ROOT / "config" / f"{kind}_{size}_patch{patch_size}.json").read_text())
        assert all(named[section].items() >= file[section].items() for section in ("model", "objective"))

    def test_named_models_are_of_the_autoencoders_latents(self, tmp_path):
        assert latent_shape(None) == latent_shape("owner/name") == {"latent_channels": 4, "downsampling": 8}
        assert latent_shape(None, {"latent_channels": 32, "downsampling": None})["latent_channels"] == 32
        (tmp_path / "config.json").write_text(json.dumps({"block_out_channels": [8] * 5, "latent_channels": 32}))
        model = named_config("DiT", "DiT_S_2", 256, latent_shape(str(tmp_path)))["model"]
        assert (model["in_channels"], model["sample_size"]) == (32, 16)
        with pytest.raises(ValueError, match="--image_size 272: expected a multiple of 32 for DiT_S_2"):
            named_config("DiT", "DiT_S_2", 272, latent_shape(str(tmp_path)))

    @pytest.mark.parametrize("name", ["DiT_S_3", "DiT_XXL_2", "DiT-XL-2", "SiT_XL_2"])
    def test_unknown_model_names(self, name):
        with pytest.raises(ValueError, match=f"--model_name {name}: unknown; known: DiT_XL_2"):
            named_config("DiT", name, 256)


def bfloat16(array):
    """Rounded to bfloat16, and float32 again."""
    return paddle.to_tensor(array).astype("bfloat16").astype("float32").numpy()


class TestConfigOfACheckpoint:
    """What is given beside a checkpoint must agree with its own config."""

    def run(self, *arguments):
        convert_dit_to_ppdiffusers.main([*map(str, arguments), "--save", "False"])

    def write(self, path, objective=None, **model):
        path.write_text(json.dumps(make_config(objective=objective, **model)))
        return path

    @pytest.mark.parametrize("file", ["", "ema_state.pdparams", "model_state.pdparams"])
    @pytest.mark.parametrize(
        "objective, model, message",
        [
            ({}, {"num_attention_heads": 2, "attention_head_dim": 32}, "model: .*num_attention_heads 4 there, 2 here"),
            ({"predict_xstart": True}, {}, "objective: predict_xstart False there, True here"),
            ({"diffusion_steps": 500}, {}, "objective: diffusion_steps 1000 there, 500 here"),
        ],
    )
    def test_another_one_is_refused(self, tmp_path, checkpoint, file, objective, model, message):
        config = self.write(tmp_path / "c.json", objective, **model)
        with pytest.raises(ValueError, match=f"checkpoint-7.*: holds another run's {message}.*do not fit .*c.json"):
            self.run("--config_file", config, "--model_weights", checkpoint[0] / file)

    def test_another_type(self, tmp_path, checkpoint):
        self.write(checkpoint[0] / "config.json", type="SiT")
        config = self.write(tmp_path / "c.json")
        with pytest.raises(ValueError, match="checkpoint-7: holds another run's model: type SiT there, DiT here;"):
            self.run("--config_file", config, "--model_weights", checkpoint[0])

    def test_the_same_network_may_be_trained_otherwise(self, tmp_path, checkpoint, capsys):
        config = self.write(tmp_path / "c.json", {"timestep_sampler": "loss-second-moment"}, class_dropout_prob=0.2)
        self.run("--config_file", config, "--model_weights", checkpoint[0])
        assert "fits" in capsys.readouterr().out

    def test_a_file_of_it_needs_no_config(self, checkpoint, capsys):
        self.run("--model_weights", checkpoint[0] / "ema_state.pdparams")
        assert "ema_state.pdparams fits" in capsys.readouterr().out

    def test_a_config_of_ppdiffusers_is_none(self, tmp_path, checkpoint, capsys):
        """As beside the weights in transformer/ of a pipeline folder."""
        config = checkpoint[0] / "config.json"
        config.rename(tmp_path / "c.json")
        config.write_text('{"_class_name": "DiTLLaMA2DModel", "num_layers": 2}')
        self.run("--config_file", tmp_path / "c.json", "--model_weights", checkpoint[0] / "model_state.pdparams")
        assert "fits" in capsys.readouterr().out

    def test_names_and_sizes(self, checkpoint, vae_folder):
        flags = ["--model_weights", checkpoint[0], "--vae_model", vae_folder]
        with pytest.raises(ValueError, match="another model than --model_name DiT_S_2: .*num_layers 2 there, 12 here"):
            self.run(*flags, "--model_name", "DiT_S_2")
        with pytest.raises(ValueError, match="another model than --image_size 256: sample_size 8 there, 256 here"):
            self.run(*flags, "--image_size", "256")
        self.run(*flags, "--image_size", "8")  # this autoencoder's latents are as large as its images

    def test_the_size_by_the_features_autoencoder(self, tmp_path, checkpoint, monkeypatch):
        """A config.json in the working folder is none of the autoencoder's."""
        (tmp_path / "config.json").write_text(json.dumps({"block_out_channels": [8]}))
        monkeypatch.chdir(tmp_path)
        self.run("--model_weights", checkpoint[0], "--image_size", "64")  # nothing is known: 8 pixels a latent
        config = make_config()
        config["features"]["vae"] = {"name": "owner/name", "downsampling": 16}
        (checkpoint[0] / "config.json").write_text(json.dumps(config))
        self.run("--model_weights", checkpoint[0], "--image_size", "128")
        with pytest.raises(ValueError, match="than --image_size 64: sample_size 8 there, 4 here"):
            self.run("--model_weights", checkpoint[0], "--image_size", "64")

    def test_of_the_official_converter(self, tmp_path, checkpoint):
        config = self.write(tmp_path / "c.json", {"predict_xstart": True}, num_attention_heads=8, attention_head_dim=8)
        out = ["--output", str(tmp_path / "x.pt"), "--weights", str(checkpoint[0]), "--reverse"]
        with pytest.raises(ValueError, match="holds another run's model: .*num_attention_heads 4 there, 8 here"):
            convert_official_weights.main(["--config_file", str(config), *out])
        self.write(config, {"predict_xstart": True})  # weights alone have no objective
        convert_official_weights.main(["--config_file", str(config), *out])

    def test_of_the_start_of_a_run(self, checkpoint):
        def start(objective=None, **model):
            config = make_config(objective=objective, **model)
            return load_pretrained(str(checkpoint[0]), build_model(config), config=config)

        with pytest.raises(ValueError, match="checkpoint-7: holds another run's model: .*num_attention_heads 4 there"):
            start(num_attention_heads=2, attention_head_dim=32)
        with pytest.raises(ValueError, match="checkpoint-7: holds another run's model: type DiT there, SiT here"):
            start(type="SiT")
        with pytest.raises(ValueError, match="checkpoint-7: holds another run's model: patch_size 2 there, 4 here"):
            start(patch_size=4)
        note = start({"predict_xstart": True, "use_kl": True}, num_classes=12, class_dropout_prob=0.2)
        assert "a new label table" in note
        assert note.endswith("trained for another objective: predict_xstart False there, True here")

    @pytest.mark.parametrize("kind", ["DiT", "LargeDiT"])
    def test_only_a_network_without_a_position_table_starts_at_another_size(self, tmp_path, kind):
        source, config = (make_config(type=kind, sample_size=size) for size in (8, 16))
        weights = {name: value.numpy() for name, value in build_model(source).state_dict().items()}
        save_pdparams(weights, tmp_path / "model_state.pdparams")
        (tmp_path / "config.json").write_text(json.dumps(source))
        if kind == "DiT":
            with pytest.raises(ValueError, match="holds another run's model: sample_size 8 there, 16 here"):
                load_pretrained(str(tmp_path), build_model(config), config=config)
        else:
            load_pretrained(str(tmp_path), build_model(config), config=config)


class TestNotFinite:
    @pytest.fixture
    def spoiled(self, tmp_path, checkpoint):
        state = dict(checkpoint[2])
        state["blocks.1.mlp.fc1.bias"] = np.full_like(state["blocks.1.mlp.fc1.bias"], np.nan)
        save_pdparams(state, checkpoint[0] / "ema_state.pdparams")
        save_torch(paddle_to_official(state), tmp_path / "x.pt")
        return checkpoint[0]

    def test_every_way_in(self, tmp_path, spoiled):
        config = ["--config_file", str(spoiled / "config.json")]
        ways = [
            lambda: convert_dit_to_ppdiffusers.main(["--model_weights", str(spoiled)]),
            lambda: convert_official_weights.main(
                [*config, "--weights", str(tmp_path / "x.pt"), "--output", str(tmp_path / "o.pdparams")]
            ),
            lambda: convert_official_weights.main(
                [*config, "--reverse", "--weights", str(spoiled), "--output", str(tmp_path / "o.pt")]
            ),
            lambda: extract_weights.main(
                ["--model_file", str(spoiled), "--save_ema", "1", "--checkpoint_path", str(tmp_path / "o.pdparams")]
            ),
        ]
        for way in ways:
            with pytest.raises(
                ValueError, match=r"(ema_state\.pdparams|x\.pt): blocks\.1\.mlp\.fc1\.bias has 256 of 256"
            ):
                way()
        assert not list(tmp_path.glob("o.*"))

    def test_weights_that_a_type_has_no_room_for(self, tmp_path):
        save_pdparams({"a": np.float32([1.0, 7e4])}, tmp_path / "a.pdparams")
        out = ["--model_file", str(tmp_path / "a.pdparams"), "--checkpoint_path", str(tmp_path / "o.pdparams")]
        with pytest.raises(ValueError, match="in float16: a has 1 of 2 values that are not finite.* ends at 65504"):
            extract_weights.main([*out, "--dtype", "float16"])
        assert not (tmp_path / "o.pdparams").exists()


class TestHalfPrecision:
    """The position table of weights in half precision is the exact one, rounded."""

    @pytest.mark.parametrize("rounded", [bfloat16, lambda array: array.astype("float16").astype("float32")])
    def test_becomes_a_pipeline(self, tmp_path, rounded):
        config = make_config()
        state = {name: rounded(value) for name, value in state_of(make_model(config)).items()}
        export_pipeline(config, state, make_vae(), tmp_path / "out")
        state["pos_embed"] = state["pos_embed"] * np.float32(1.01)
        with pytest.raises(ValueError, match="pos_embed differs by up to 0.0"):
            export_pipeline(config, state, make_vae(), tmp_path / "other")

    def test_starts_a_run_with_the_exact_table(self, tmp_path):
        config = make_config()
        state = {name: bfloat16(value) for name, value in state_of(make_model(config)).items()}
        save_pdparams(state, tmp_path / "half.pdparams")
        model = build_model(config)
        exact = model.pos_embed.numpy()
        load_pretrained(str(tmp_path / "half.pdparams"), model, config=config)
        np.testing.assert_array_equal(model.pos_embed.numpy(), exact)
        name = "blocks.0.attn.qkv.weight"
        np.testing.assert_array_equal(state_of(model)[name], state[name])
        state["pos_embed"] = exact + np.float32(0.1)  # one of its own: kept
        save_pdparams(state, tmp_path / "other.pdparams")
        load_pretrained(str(tmp_path / "other.pdparams"), model, config=config)
        np.testing.assert_array_equal(model.pos_embed.numpy(), state["pos_embed"])


@pytest.mark.parametrize("sample_size, fits", [(124, True), (128, False), (192, False)])
def test_positions_of_large_latents(sample_size, fits):
    """From 128 on the stock transformer scales its positions."""
    from ppdiffusers.models.embeddings import PatchEmbed

    model = make_config(sample_size=sample_size, patch_size=4)["model"]
    if fits:
        settings = transformer_config(model)
        stock = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=4,
            embed_dim=64,
            interpolation_scale=max(settings["sample_size"] // 64, 1),
        )
        own = build_model({**model, "num_layers": 1}).pos_embed.numpy()
        np.testing.assert_allclose(stock.pos_embed.numpy(), own, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=f"sample_size {sample_size}: from 128 on .*sample it from its checkpoint"):
            transformer_config(model)


def test_flags_alone_are_refused_without_paddle(tmp_path, checkpoint):
    (tmp_path / "full").mkdir()
    for path in ("full/x", "w.pdparams", "o.pdparams"):
        (tmp_path / path).write_text("x")
    config = make_config(sample_size=128, patch_size=8)
    (tmp_path / "large.json").write_text(json.dumps(config))
    (tmp_path / "ok.json").write_text(json.dumps(make_config()))
    (tmp_path / "sit.json").write_text(json.dumps(make_config("SiT", {"prediction": "score"})))
    dit, sit = "convert_dit_to_ppdiffusers", "convert_sit_to_ppdiffusers"
    official, extract = "convert_official_weights --config_file ok.json", "extract_weights"
    commands = {
        f"{dit} --model_weights w.pdparams --image_size 60": "--image_size 60",
        f"{dit} --model_weights checkpoint-7 --checkpoint_path full": "full: is not empty",
        f"{dit} --model_weights checkpoint-7 --checkpoint_path w.pdparams": "w.pdparams: is a file",
        f"{dit} --model_weights checkpoint-7 --id2label ok.json": "id2label",
        f"{dit} --model_weights w.pdparams --config_file large.json": "sample_size 128",
        f"{dit} --model_weights w.pdparams --config_file sit.json": "is not sampled by",
        f"{dit} --model_weights checkpoint-7 --stock_transformer": "--stock_transformer is for a Large-DiT",
        f"{dit} --model_weights w.pdparams --config_file ok.json": "w.pdparams: not a weight file",
        f"{sit} --model_weights w.pdparams --config_file sit.json --stock": "prediction 'score'",
        f"{official} --weights none.pt --output y.pdparams": "none.pt: there is no such file",
        f"{official} --weights w.pdparams --output y.pt": "y.pt: expected a name that ends in .pdparams",
        f"{official} --weights w.pdparams --output y.pdparams --reverse": "expected a name that ends in .pt",
        f"{official} --weights w.pdparams --output o.pdparams": "o.pdparams: exists already",
        f"{extract} --model_file none.pdparams --checkpoint_path y.pdparams": "none.pdparams: there is no such file",
        f"{extract} --model_file w.pdparams --checkpoint_path y.pt": "y.pt: expected a name that ends in .pdparams",
    }
    code = (
        "import importlib, json, sys\n"
        "for command, message in json.loads(sys.argv[1]).items():\n"
        "    tool, *flags = command.split()\n"
        "    try: importlib.import_module('tools.' + tool).main(flags)\n"
        "    except ValueError as error: assert message in str(error), (command, str(error))\n"
        "    else: assert False, command\n"
        "    assert not {'paddle', 'ppdiffusers', 'paddlenlp'} & set(sys.modules), command\n"
    )
    command = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, cwd=tmp_path, env=command_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


class TestExtractWeights:
    def run(self, *arguments):
        extract_weights.main([str(argument) for argument in arguments])

    @pytest.fixture
    def reference_file(self, tmp_path):
        """As PaddleMIX's Trainer saves it: prefixed names, averages without dots, a VAE."""
        weights = {"blocks.0.fc.weight": 1.0, "blocks.0.fc.bias": 2.0, "pos_embed": 3.0}
        state = {f"transformer.{name}": paddle.full([2], value) for name, value in weights.items()}
        state["model_ema.blocks0fcweight"] = paddle.full([2], 10.0)
        state["model_ema.blocks0fcbias"] = paddle.full([2], 20.0)
        state["model_ema.decay"] = paddle.full([], 0.99)
        state["vae.conv.weight"] = paddle.zeros([2])
        paddle.save(state, str(tmp_path / "model_state.pdparams"))
        return tmp_path / "model_state.pdparams"

    @pytest.mark.parametrize("text, expected", [("False", 1.0), ("false", 1.0), ("True", 10.0), ("1", 10.0)])
    def test_save_ema_is_a_boolean(self, tmp_path, reference_file, text, expected):
        out = tmp_path / "out.pdparams"
        self.run("--model_file", reference_file, "--checkpoint_path", out, "--save_ema", text)
        state = safe_load(out)
        assert set(state) == {"blocks.0.fc.weight", "blocks.0.fc.bias", "pos_embed"}
        assert state["blocks.0.fc.weight"][0] == expected and state["pos_embed"][0] == 3.0

    def test_averages_by_either_flag(self, tmp_path, reference_file):
        words = ["--model_path", reference_file, "--output", tmp_path / "o.pdparams"]
        with pytest.raises(ValueError, match="argument --save_ema: expected True or False, got 'maybe'"):
            self.run(*words, "--save_ema", "maybe")
        with pytest.raises(ValueError, match="--save_ema False and --key ema are one setting: give one"):
            self.run(*words, "--save_ema", "False", "--key", "ema")
        self.run(*words, "--key", "ema")
        assert safe_load(tmp_path / "o.pdparams")["blocks.0.fc.weight"][0] == 10

    def test_dtype(self, tmp_path, reference_file):
        out = tmp_path / "out.pdparams"
        self.run("--model_file", reference_file, "--checkpoint_path", out, "--dtype", "float16")
        assert paddle.load(str(out))["pos_embed"].dtype == paddle.float16

    def test_our_checkpoint_folder(self, tmp_path, checkpoint):
        folder, model_state, ema_state = checkpoint
        for save_ema, expected in (("False", model_state), ("True", ema_state)):
            out = tmp_path / f"{save_ema}.pdparams"
            self.run("--model_file", folder, "--checkpoint_path", out, "--save_ema", save_ema)
            state = safe_load(out)
            assert all(np.array_equal(state[name], expected[name]) for name in expected)

    def test_mistakes(self, tmp_path, reference_file, checkpoint):
        with pytest.raises(ValueError, match="arguments are required: --model_path"):
            self.run("--checkpoint_path", tmp_path / "o.pdparams")
        with pytest.raises(ValueError, match="exists already"):
            self.run("--model_file", reference_file, "--checkpoint_path", reference_file)
        plain = checkpoint[0] / "model_state.pdparams"
        with pytest.raises(ValueError, match="holds no averages"):
            self.run("--model_file", plain, "--checkpoint_path", tmp_path / "o.pdparams", "--save_ema", "True")

    @pytest.mark.parametrize("save_ema, expected", [("True", 2.0), ("False", 1.0)])
    def test_a_file_of_several_sets(self, tmp_path, save_ema, expected):
        tree = {"state_dict": {"module.a": np.ones(2, "f4")}, "state_dict_ema": {"a": np.full(2, 2.0, "f4")}}
        (tmp_path / "x.pdparams").write_bytes(pickle.dumps({**tree, "epoch": 3}))
        out = tmp_path / "o.pdparams"
        self.run("--model_file", tmp_path / "x.pdparams", "--checkpoint_path", out, "--save_ema", save_ema)
        assert safe_load(out)["a"][0] == expected
