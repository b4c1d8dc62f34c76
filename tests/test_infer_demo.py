"""Drawing images: guidance, decoding, grids, and infer_demo_dit.py with pipelines and training checkpoints."""

import errno
import json
import os
import shutil

import numpy as np
import paddle
import pytest
from PIL import Image
from support.golden import GOLDEN, relative_error
from support.pipelines import DIGITS_VAE, make_config, make_model, make_vae, state_of

import infer_demo_dit
import infer_demo_largedit_3b
import infer_demo_largedit_7b
import infer_demo_sit
from features.autoencoder import LatentDecoder, NotFiniteError, load_vae
from runtime.process import EXIT_BAD_STEP
from sampling import demo as image_demo
from sampling.grid import make_grid
from sampling.guidance import default_channels, guided
from sampling.labels import IMAGENET_LABELS, find_class, find_classes
from sampling.pipelines.export import export_pipeline
from sampling.schedulers import make_scheduler, pipeline_scheduler
from weights.files import load_weights, save_pdparams, save_safetensors


class TestGuidance:
    @pytest.mark.parametrize("channels", [3, None])
    @pytest.mark.parametrize("learn_sigma", [True, False])
    def test_is_forward_with_cfg(self, channels, learn_sigma):
        model = make_model(make_config(learn_sigma=learn_sigma))
        x, t, y = paddle.randn([3, 4, 8, 8]), paddle.to_tensor([5, 500, 999]), paddle.to_tensor([1, 2, 9])
        with paddle.no_grad():
            out = guided(model, y, 4.0, channels=channels, null_class=10)(x, t)
            labels = paddle.concat([y, paddle.full_like(y, 10)])
            expected = model.forward_with_cfg(
                paddle.concat([x, x]), paddle.concat([t, t]), labels, 4.0, cfg_channels=channels
            )
        assert out.shape == [3, 8 if learn_sigma else 4, 8, 8]
        assert relative_error(out.numpy(), expected[:3].numpy()) < 1e-6
        assert np.abs(out.numpy() - model(x, t, y).numpy()).max() > 1e-3

    def test_interval_and_no_guidance(self):
        model = make_model(make_config())
        x, y = paddle.randn([2, 4, 8, 8]), paddle.to_tensor([1, 2])
        with paddle.no_grad():
            for timestep, is_guided in ((99, False), (100, True), (700, True), (701, False)):
                t = paddle.full([2], timestep, dtype="int64")
                out = guided(model, y, 4.0, null_class=10, interval=(100, 700))(x, t)
                assert bool((out == model(x, t, y)).all()) is not is_guided
            t = paddle.full([2], 500, dtype="int64")
            assert bool((guided(model, y, 1.0, null_class=10**6)(x, t) == model(x, t, y)).all())

    def test_three_of_four_channels_and_all_of_any_other_number(self):
        assert [default_channels(count) for count in (3, 4, 16)] == [None, 3, None]


class TestDecoder:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_images_that_are_not_finite_are_counted(self, value):
        latents = paddle.randn([5, 4, 8, 8])
        latents[1, 0, 0, 0] = latents[4, 3, 7, 7] = value
        for draw in (LatentDecoder(make_vae(), batch_size=2), LatentDecoder(make_vae()).decode):
            with pytest.raises(
                NotFiniteError, match=r"2 of 5 images hold numbers .* not finite .* number 1, 4,"
            ) as error:
                draw(latents)
            assert error.value.exit_code == EXIT_BAD_STEP

    def test_is_the_vaes_image_in_8_bits(self):
        vae = make_vae()
        latents = paddle.randn([5, 4, 8, 8])
        images = LatentDecoder(vae, batch_size=2)(latents)
        assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
        with paddle.no_grad():
            decoded = vae.decode(latents / 0.5).sample.numpy()  # the VAE's scaling_factor
        expected = np.clip(np.round((decoded + 1) * 127.5), 0, 255).transpose(0, 2, 3, 1)
        assert np.abs(images - expected).max() <= 1 and images.std() > 10

    def test_no_vae_there(self, tmp_path):
        with pytest.raises(ValueError, match="no config.json in this folder"):
            load_vae(str(tmp_path))


class TestGrid:
    def test_rows_and_columns(self):
        images = np.arange(5, dtype="uint8")[:, None, None, None] * np.ones([1, 2, 3, 3], "uint8") + 1
        grid = np.asarray(make_grid(images, columns=3))
        assert grid.shape == (4, 9, 3)
        assert [grid[r * 2, c * 3, 0] for r in range(2) for c in range(3)] == [1, 2, 3, 4, 5, 0]

    def test_pil_images(self):
        assert make_grid([Image.new("RGB", (4, 2))] * 2, columns=2).size == (8, 2)

    def test_floats_are_refused(self):
        with pytest.raises(ValueError, match="expected uint8"):
            make_grid(np.zeros([1, 2, 2, 3]), columns=1)


class TestClasses:
    LABELS = {0: "tench, Tinca tinca", 1: "crane", 2: "golden retriever", 3: "crane", 4: "7", 5: "Tinca minor"}

    @pytest.mark.parametrize(
        "text, expected", [("tench", 0), ("Tinca tinca", 0), ("tench, Tinca tinca", 0), ("3", 3), ("RETR", 2), ("7", 4)]
    )
    def test_by_name_or_id(self, text, expected):
        assert find_class(text, self.LABELS, 6) == expected

    @pytest.mark.parametrize(
        "text, message",
        [
            ("crane", "could be any of 2 classes; give an id: 1 \\(crane\\), 3 \\(crane\\)"),
            ("6", r"the classes are 0\.\.5"),
            ("dog", "no such class; expected an id 0..5 or a name such as 7, Tinca minor, crane"),
            ("-1", "no such class"),
            ("TINCA", r"could be any of 2 classes; give an id: 0 \(tench, Tinca tinca\), 5 \(Tinca minor\)"),
        ],
    )
    def test_mistakes(self, text, message):
        with pytest.raises(ValueError, match=f"--classes {text}: {message}"):
            find_class(text, self.LABELS, 6)

    def test_labels_of_another_network(self):
        with pytest.raises(ValueError, match=r"--classes tench: is class 7 of the labels; the classes are 0\.\.4"):
            find_class("tench", {7: "tench"}, 5)
        with pytest.raises(ValueError) as error:  # labels out of somebody else's folder
            find_class("tench", {0: "\x1b[2J"}, 5)
        assert str(error.value).isprintable()

    def test_default(self):
        assert find_classes(None, self.LABELS, 5) == [2]
        assert find_classes(None, {}, 12) == list(range(10))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One network as a pipeline folder, as a training checkpoint folder, and its VAE: paths."""
    folder = tmp_path_factory.mktemp("models")
    config, vae = make_config(), make_vae()
    state = state_of(make_model(config))
    labels = {i: f"digit {i}" for i in range(10)}
    export_pipeline(config, state, vae, folder / "pipeline", id2label=labels)
    vae.save_pretrained(str(folder / "vae"), safe_serialization=False)
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config))
    tensors = {name: paddle.to_tensor(value) for name, value in state.items()}
    paddle.save(tensors, str(checkpoint / "ema_state.pdparams"))
    paddle.save({name: value * 0 for name, value in tensors.items()}, str(checkpoint / "model_state.pdparams"))
    return {"pipeline": folder / "pipeline", "checkpoint": checkpoint, "vae": folder / "vae"}


def draw(*arguments):
    infer_demo_dit.main([str(argument) for argument in arguments] + ["--device", "cpu"])


class TestSchedulers:
    PUBLIC = {"beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0}

    @pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
    @pytest.mark.parametrize("steps", [25, 100, 250, 500, 1000])
    def test_dpm_on_a_pipeline_is_the_checkpoints(self, schedule, steps):
        """Whatever spacing the folder's scheduler has; the public folder's has none."""
        from ppdiffusers import DDIMScheduler

        objective = {"type": "diffusion", "noise_schedule": schedule, "diffusion_steps": 1000, "predict_xstart": False}
        expected = make_scheduler(objective, "dpm")
        expected.set_timesteps(steps)
        own = [make_scheduler(objective, name) for name in ("ddim", "dpm")]
        if schedule == "linear":
            own.append(DDIMScheduler.from_config(self.PUBLIC))
        for scheduler in own:
            found = pipeline_scheduler(scheduler, "dpm")
            found.set_timesteps(steps)
            assert np.array_equal(found.timesteps.numpy(), expected.timesteps.numpy())
            np.testing.assert_allclose(found.sigmas.numpy(), expected.sigmas.numpy(), rtol=1e-6)
        if schedule == "linear":
            assert expected.timesteps[0] == 999

    def test_ddim_on_a_pipeline_for_dpm_is_the_checkpoints(self):
        objective = {"noise_schedule": "squaredcos_cap_v2", "diffusion_steps": 1000, "predict_xstart": False}
        objective["type"] = "diffusion"
        expected = make_scheduler(objective, "ddim")
        found = pipeline_scheduler(make_scheduler(objective, "dpm"), "ddim")
        for scheduler in (expected, found):
            scheduler.set_timesteps(50)
        assert found.timesteps.tolist() == expected.timesteps.tolist() and found.timesteps[0] == 980
        keys = ("clip_sample", "set_alpha_to_one", "steps_offset", "prediction_type", "beta_schedule")
        assert {key: found.config[key] for key in keys} == {key: expected.config[key] for key in keys}


class TestDemo:
    @pytest.fixture(autouse=True)
    def in_empty_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("channels", ["3", "all"])
    def test_pipeline_and_checkpoint_draw_the_same(self, models, channels):
        flags = ["--guidance_channels", channels, "--seed", 5, "--num_inference_steps", 10, "--guidance_scale", 2]
        draw("--model_path", models["pipeline"], "--classes", "digit 3", 7, "--output", "a.png", *flags)
        checkpoint = ["--model_path", models["checkpoint"], "--vae", models["vae"]]
        draw(*checkpoint, "--classes", 3, 7, "--output", "b.png", *flags)
        a, b = (np.asarray(Image.open(name)).astype(int) for name in ("a.png", "b.png"))
        assert a.shape == (8, 16, 3) and a.std() > 10
        assert np.abs(a - b).max() <= 1

    def test_seed_steps_and_guidance_matter(self, models):
        def image(name, *flags):
            draw("--model_path", models["pipeline"], "--classes", 1, "--output", name, *flags)
            return np.asarray(Image.open(name))

        first = image("1.png", "--num_inference_steps", 5)
        assert np.array_equal(first, image("2.png", "--num_inference_steps", 5))
        for i, flags in enumerate((["--seed", 1], ["--num_inference_steps", 10], ["--guidance_scale", 1])):
            other = ["--num_inference_steps", 5, *flags]
            assert not np.array_equal(first, image(f"other{i}.png", *other))

    @pytest.mark.parametrize("scheduler", ["ddpm", "dpm", "dpm3", "unipc"])
    def test_other_schedulers_from_a_checkpoint(self, models, scheduler):
        flags = ["--num_inference_steps", 4, "--scheduler", scheduler, "--classes", 1, "--output", "a.png"]
        draw("--model_path", models["checkpoint"], "--vae", models["vae"], *flags)
        assert np.asarray(Image.open("a.png")).shape == (8, 8, 3)

    def test_ids_of_a_checkpoint_can_have_names(self, models, tmp_path):
        labels = tmp_path / "labels.json"
        labels.write_text(json.dumps({"id2label": {str(i): f"digit {i}" for i in range(10)}}))
        flags = ["--id2label", labels, "--num_inference_steps", 2, "--classes", "digit 4"]
        draw("--model_path", models["checkpoint"], "--vae", models["vae"], *flags)
        assert (tmp_path / "outputs/result_DiT_digit_4.png").exists()

    def test_no_argument_takes_the_local_folder(self, tmp_path, capsys):
        config = make_config(num_classes=1000)
        labels = json.loads(open(IMAGENET_LABELS, encoding="utf-8").read())["id2label"]
        export_pipeline(config, state_of(make_model(config)), make_vae(), "DiT_XL_2_256", id2label=labels)
        infer_demo_dit.main([])
        image = np.asarray(Image.open("outputs/result_DiT_golden_retriever.png"))
        assert image.shape == (8, 8, 3)
        # A second run overwrites nothing, and draws the same.
        before = (tmp_path / "outputs/result_DiT_golden_retriever.png").stat().st_mtime_ns
        infer_demo_dit.main([])
        assert np.array_equal(image, np.asarray(Image.open("outputs/result_DiT_golden_retriever-2.png")))
        assert (tmp_path / "outputs/result_DiT_golden_retriever.png").stat().st_mtime_ns == before
        assert "golden retriever: outputs/result_DiT_golden_retriever-2.png" in capsys.readouterr().out

    def test_an_existing_output_stays(self, models, tmp_path):
        (tmp_path / "mine.png").write_text("mine")
        flags = ["--model_path", models["pipeline"], "--num_inference_steps", 1, "--output", "mine.png"]
        with pytest.raises(ValueError, match="--output mine.png: exists already"):
            draw(*flags)
        assert (tmp_path / "mine.png").read_text() == "mine"
        draw(*flags, "--overwrite")
        plain = np.asarray(Image.open("mine.png"))
        assert plain.shape == (16, 64, 3)  # ten classes, eight in a row
        draw(*flags, "--classes", 3, 7, "--images_per_class", 2, "--overwrite")
        labelled = np.asarray(Image.open("mine.png"))
        assert labelled.shape[0] > 2 * 8 and labelled.shape[1] > 2 * 8 + 30  # two rows of two, their names beside them
        first = labelled[:, -2 * 12 :][:, :8]  # the second image of each row ends a gap before the edge
        assert not np.array_equal(first, labelled[:, -12:-4])  # noise of its own
        draw(*flags, "--classes", 0, "--images_per_class", 1, "--overwrite")
        assert np.array_equal(np.asarray(Image.open("mine.png")), plain[:8, :8])  # one image has nothing around it

    @pytest.mark.parametrize(
        "flags, message",
        [
            (["--model_path", "no-such-owner/no-such-model"], "Without a network, give a folder by --model_path"),
            (["--model_path", DIGITS_VAE], "digits_vae: is a part of a pipeline, AutoencoderKL; expected"),
            (["--model_path", "no-such-folder"], "no-such-folder: there is no such folder$"),
            (["--model_path", "output/checkpoint-5/"], "output/checkpoint-5/: there is no such folder$"),
            (["--model_path", str(GOLDEN / "checkpoint-5")], "checkpoint-5: there is no such folder$"),
            (["--model_path", str(GOLDEN / "dit_tiny.pt")], "dit_tiny.pt: is a file; expected a folder"),
            (["--model_path", str(GOLDEN)], "neither a DiTPipeline folder .* nor a training checkpoint"),
            (["--dtype", "float16"], "--dtype float16: Paddle computes in float32 only on a CPU"),
        ],
    )
    def test_mistakes(self, models, tmp_path, flags, message):
        with pytest.raises(ValueError, match=message):
            draw("--model_path", models["pipeline"], *flags)
        assert list(tmp_path.iterdir()) == []

    BOTH = ("pipeline", "checkpoint")

    @pytest.mark.parametrize(
        "kinds, flags, message",
        [
            (BOTH, ["--classes", "unicorn"], "--classes unicorn: no such class"),
            (BOTH, ["--classes", "10"], r"--classes 10: the classes are 0\.\.9"),
            (BOTH, ["--seed=-1"], "--seed must be an integer from 0 to 4294967295, got -1"),
            (BOTH, ["--seed", "18446744073709551616"], "--seed must be an integer .*, got 18446744073709551616"),
            (BOTH, ["--guidance_scale", "nan"], "--guidance_scale nan: expected a finite number"),
            (BOTH, ["--guidance_scale=-inf"], "--guidance_scale -inf: expected a finite number"),
            (BOTH, ["--num_inference_steps", "0"], "--num_inference_steps must be a positive integer, got 0"),
            (BOTH, ["--scheduler", "dpm", "--num_inference_steps", "1001"], "steps 1001: expected 1 to 1000"),
            (BOTH, ["--num_inference_steps", "1001"], "--num_inference_steps 1001: expected 1 to 1000"),
            (["checkpoint"], ["--scheduler", "ddpm", "--num_inference_steps", "1001"], "1001: expected 1 to 1000"),
            (["checkpoint"], ["--num_inference_steps", "501"], "501: no integer stride takes exactly 501 of 1000"),
            (["checkpoint"], ["--backend", "inference", "--num_inference_steps", "251"], "start at timestep 750"),
            (["pipeline"], ["--num_inference_steps", "251"], "timestep 750 of 1000, .*; use 250 or 314"),
            (["pipeline"], ["--num_inference_steps", "334"], "timestep 666 of 1000, .*; use 333 or 470"),
            (["pipeline"], ["--num_inference_steps", "501"], "timestep 500 of 1000, .*; use 500 or 940"),
            (["pipeline"], ["--num_inference_steps", "700"], "timestep 699 of 1000"),
            (["pipeline"], ["--scheduler", "ddpm"], "--scheduler ddpm needs a training checkpoint"),
            (BOTH, ["--output", "out"], "--output out: has no ending; expected .png, or another"),
            (BOTH, ["--output", "out.xyz"], "--output out.xyz: the ending .xyz names no format"),
            (BOTH, ["--output", "."], "--output .: is a folder"),
            (BOTH, ["--output", "..", "--overwrite"], "--output ..: is a folder"),
            (BOTH, ["--output", "no/such/folder.png"], "--output no/such/folder.png: there is no such folder"),
            (BOTH, ["--output", f"{'x' * 300}.png"], "the name has more than 240 bytes"),
            (BOTH, ["--output", "/dev/null", "--overwrite"], "--output /dev/null: is no regular file"),
        ],
    )
    def test_refused_before_paddle_is_imported(self, models, tmp_path, monkeypatch, kinds, flags, message):
        monkeypatch.setattr(image_demo, "configure_runtime", lambda: pytest.fail("it would be imported here"))
        for kind in kinds:
            with pytest.raises(ValueError, match=message):
                draw("--model_path", models[kind], *flags)
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_leaves_nothing(self, models, tmp_path, monkeypatch):
        def save(self, file, **options):
            if hasattr(file, "fileno") and not hasattr(file, "getvalue"):
                file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", save)
        flags = ["--model_path", models["pipeline"], "--classes", 1, "--num_inference_steps", 1]
        with pytest.raises(ValueError, match="a.png: can't be written: No space left on device"):
            draw(*flags, "--output", "a.png")
        assert list(tmp_path.iterdir()) == []

    def test_a_long_label_is_cut_and_nothing_that_comes_meanwhile_is_overwritten(self, tmp_path):
        image = Image.new("RGB", (2, 2), (1, 2, 3))
        path = image_demo.default_output("DiT", ["a" * 300])
        assert path == f"outputs/result_DiT_{'a' * 100}.png"
        mine = tmp_path / "mine.png"
        mine.write_text("mine")
        assert image_demo.save_image(image, "mine.png", overwrite=False) == "mine-2.png"
        assert mine.read_text() == "mine" and Image.open("mine-2.png").size == (2, 2)
        assert sorted(os.listdir()) == ["mine-2.png", "mine.png"]
        assert image_demo.save_image(image, "mine.png", overwrite=True) == "mine.png"
        assert Image.open("mine.png").size == (2, 2)

    @pytest.mark.parametrize("scale", [-2, 0, 0.5])
    def test_scales_below_one_mean_the_same_everywhere(self, models, scale):
        def image(kind, *flags):
            draw("--model_path", models[kind], *flags, "--classes", 3, 7, "--output", f"{kind}.png", "--overwrite")
            return np.asarray(Image.open(f"{kind}.png")).astype(int)

        flags = ["--num_inference_steps", 10, "--guidance_scale", scale]
        pipeline = image("pipeline", *flags)
        assert np.abs(pipeline - image("checkpoint", "--vae", models["vae"], *flags)).max() <= 1
        assert np.abs(pipeline - image("pipeline", *flags[:2], "--guidance_scale", 1)).max() > 1
        if scale == 0:  # images without a class: the noise alone makes the difference
            assert np.array_equal(image("pipeline", *flags, "--classes", 1, 2), pipeline)

    def test_above_one_it_is_the_stock_pipelines_image(self, models):
        from sampling.pipelines.pretrained import load_dit_pipeline

        flags = ["--classes", 3, 7, "--num_inference_steps", 10, "--guidance_scale", 3, "--seed", 5]
        draw("--model_path", models["pipeline"], *flags, "--output", "a.png")
        pipe = load_dit_pipeline(str(models["pipeline"]))
        generator = paddle.Generator().manual_seed(5)
        stock = pipe(class_labels=[3, 7], guidance_scale=3.0, num_inference_steps=10, generator=generator).images
        stock = np.asarray(make_grid(stock, columns=2)).astype(int)
        assert np.abs(np.asarray(Image.open("a.png")) - stock).max() <= 1

    @pytest.mark.parametrize("kind", ["pipeline", "checkpoint"])
    def test_weights_that_are_not_finite_are_named(self, models, tmp_path, kind):
        file, tensor = {
            "pipeline": ("transformer/model_state.pdparams", "transformer_blocks.1.ff.net.2.weight"),
            "checkpoint": ("ema_state.pdparams", "blocks.1.mlp.fc1.weight"),
        }[kind]
        shutil.copytree(models[kind], "model")
        state = {name: value.copy() for name, value in load_weights(f"model/{file}").items()}
        state[tensor].flat[3] = np.nan
        save_pdparams(state, f"model/{file}")
        with pytest.raises(ValueError, match=f"{file}: {tensor} has 1 of .* values that are not finite"):
            draw("--model_path", "model", "--vae", models["vae"], "--output", "a.png")
        assert not os.path.exists("a.png")

    @pytest.mark.parametrize("kind", ["pipeline", "checkpoint"])
    def test_no_image_of_numbers_that_are_not_finite(self, models, kind):
        flags = ["--guidance_scale", "1e30", "--classes", 1, "--num_inference_steps", 5, "--output", "a.png"]
        with pytest.raises(NotFiniteError, match="1 of 1 images hold numbers that are not finite"):
            draw("--model_path", models[kind], "--vae", models["vae"], *flags)
        assert os.listdir() == []

    def test_a_folder_of_todays_diffusers(self, models, capsys):
        """Its name of the class, and weights in PyTorch's layout under diffusers' file name."""
        from ppdiffusers import Transformer2DModel

        shutil.copytree(models["pipeline"], "new")
        for file, change in (
            (
                "model_index.json",
                {
                    "transformer": ["diffusers", "DiTTransformer2DModel"],
                    "vae": ["diffusers", "AutoencoderKL"],
                    "scheduler": ["diffusers", "DDIMScheduler"],
                },
            ),
            (
                "transformer/config.json",
                {"_class_name": "DiTTransformer2DModel", "dropout": 0.0, "norm_num_groups": 32},
            ),
        ):
            with open(f"new/{file}") as source:
                content = {**json.load(source), **change}
            with open(f"new/{file}", "w") as target:
                json.dump(content, target)
        with open("new/transformer/config.json") as source:
            network = Transformer2DModel.from_config(json.load(source))
        linear = {f"{name}.weight" for name, part in network.named_sublayers() if isinstance(part, paddle.nn.Linear)}
        weights = load_weights("new/transformer/model_state.pdparams")
        weights = {name: value.T if name in linear else value for name, value in weights.items()}
        os.unlink("new/transformer/model_state.pdparams")
        save_safetensors(weights, "new/transformer/diffusion_pytorch_model.safetensors", layout="torch")
        for name, folder in (("a.png", models["pipeline"]), ("b.png", "new")):
            draw("--model_path", folder, "--classes", 3, 7, "--num_inference_steps", 5, "--output", name)
        assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))

    @pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
    def test_says_where_a_narrow_network_is_not_exact(self, models, capsys, scheduler):
        flags = ["--model_path", models["pipeline"], "--classes", 1, "--scheduler", scheduler]
        steps = {"ddim": (5, 25, 50), "dpm": ()}[scheduler]  # of 64 hidden units DDIM's timesteps take all
        for count in (*steps, 7, 30):
            draw(*flags, "--num_inference_steps", count)
            out = capsys.readouterr().out
            if count in steps:
                assert "note" not in out
            else:
                expected = f"10, 20, 25, 50 (ddim); none (dpm); in {count} steps ({scheduler}) its images differ"
                assert expected in out and out.count("note: ") == 1

    def test_stock_ppdiffusers_reads_what_is_said_of_the_fit_without_a_word(self, models, capfd):
        from ppdiffusers import DiTPipeline

        with open(models["pipeline"] / "transformer" / "config.json") as file:
            assert json.load(file)["_timestep_fit"] == {"ddim": [10, 20, 25, 50], "dpm": []}
        pipe = DiTPipeline.from_pretrained(str(models["pipeline"]), paddle_dtype=paddle.float32)
        said = "".join(capfd.readouterr())
        assert "fit" not in said and "not expected" not in said
        assert len(pipe(class_labels=[1], num_inference_steps=2).images) == 1

    def test_a_pipeline_that_kept_dits_embedding_says_so(self, models, capsys):
        config = make_config()
        export_pipeline(config, state_of(make_model(config)), make_vae(), "kept", timestep_embedding="keep")
        draw("--model_path", "kept", "--classes", 1)
        assert "note: the timestep embedding of this pipeline is exact in these numbers of steps: none" in (
            capsys.readouterr().out
        )

    def test_the_largest_seed_draws(self, models):
        draw("--model_path", models["pipeline"], "--classes", 1, "--num_inference_steps", 1, "--seed", 2**32 - 1)

    def test_as_many_steps_as_the_diffusion_has(self, tmp_path):
        config = make_config(objective={"diffusion_steps": 30})
        state, vae = state_of(make_model(config)), make_vae()
        export_pipeline(config, state, vae, "pipeline")
        vae.save_pretrained("vae", safe_serialization=False)
        os.mkdir("checkpoint")
        (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
        save_pdparams(state, "checkpoint/model_state.pdparams")
        for path in ("pipeline", "checkpoint"):
            for scheduler in ("ddim", "dpm", "dpm3", "unipc"):
                flags = ["--model_path", path, "--vae", "vae", "--scheduler", scheduler, "--classes", 1]
                draw(*flags, "--num_inference_steps", 30, "--output", f"{path}-{scheduler}.png")
                with pytest.raises(ValueError, match="--num_inference_steps 31: expected 1 to 30"):
                    draw(*flags, "--num_inference_steps", 31)
        for scheduler in ("ddim", "dpm", "dpm3", "unipc"):
            pair = [
                np.asarray(Image.open(f"{path}-{scheduler}.png")).astype(int) for path in ("pipeline", "checkpoint")
            ]
            assert np.abs(pair[0] - pair[1]).max() <= 1

    def test_flags_of_no_effect_are_named_and_no_seed_is_announced(self, models, capfd):
        flags = ["--classes", 1, "--num_inference_steps", 2, "--output", "a.png"]
        more = ["--vae", "nowhere", "--key", "ema", "--guidance_channels", 3, "--guidance_scale", 1]
        draw("--model_path", models["pipeline"], *flags, *more)
        out = "".join(capfd.readouterr())
        assert "note: --vae and --key have no effect on" in out
        assert "note: --guidance_channels has no effect without guidance" in out
        assert "seed is set" not in out
        flags = ["--classes", 1, "--num_inference_steps", 2, "--overwrite"]
        draw("--model_path", models["checkpoint"], "--vae", models["vae"], *flags)
        assert "note: --overwrite has no effect without --output" in capfd.readouterr().out

    @pytest.mark.parametrize("demo", [infer_demo_dit, infer_demo_largedit_3b, infer_demo_largedit_7b, infer_demo_sit])
    def test_help_is_the_scripts_own_text(self, demo, capsys):
        with pytest.raises(SystemExit) as end:
            demo.main(["--help"])
        assert end.value.code == 0
        assert demo.__doc__.strip() in capsys.readouterr().out and f"python {demo.__name__}.py" in demo.__doc__

    def test_a_folder_above_a_runs_names_its_checkpoint(self, models):
        for place in ("outputs/trainer/checkpoint-9", "work/results/000-DiT/checkpoints/0000009"):
            shutil.copytree(models["checkpoint"], place)
            open(f"{place}/trainer_state.json", "w").close()
            run = place.split("/")[0]
            for demo in (infer_demo_dit, infer_demo_sit):
                with pytest.raises(ValueError, match=f"{run}: neither a .* did you mean {place}"):
                    demo.main(["--model_path", run])

    def test_other_pipelines(self, tmp_path):
        for index, message in (
            ({"_class_name": "SiTPipeline"}, "pipeline: is a SiTPipeline; use infer_demo_sit.py"),
            ({"_class_name": "LDMPipeline"}, "pipeline: is a LDMPipeline; expected a DiTPipeline"),
            ([], "pipeline: is a None; expected a DiTPipeline"),
            (
                {"_class_name": "DiTPipeline"},
                "pipeline.model_index.json: transformer is None, expected a Transformer2DModel",
            ),
        ):
            (tmp_path / "pipeline").mkdir(exist_ok=True)
            (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
            with pytest.raises(ValueError, match=message) as error:
                draw("--model_path", "pipeline")
            assert "download" not in str(error.value)

    def test_a_mistyped_folder_beside_others(self, tmp_path):
        (tmp_path / "output").mkdir()
        with pytest.raises(ValueError, match="output/checkpoint-5: there is no such folder$"):
            draw("--model_path", "output/checkpoint-5")

    def test_no_gpu(self, models):
        if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
            pytest.skip("there is a GPU")
        with pytest.raises(ValueError, match="sees no GPU here"):
            infer_demo_dit.main(["--model_path", str(models["pipeline"]), "--device", "gpu"])

    def test_a_model_without_null_class(self, models, tmp_path):
        config = make_config(class_dropout_prob=0.0)
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        state = state_of(make_model(config))
        tensors = {name: paddle.to_tensor(value) for name, value in state.items()}
        paddle.save(tensors, str(folder / "model_state.pdparams"))
        flags = ["--model_path", folder, "--vae", models["vae"], "--num_inference_steps", 2, "--classes", 1]
        with pytest.raises(ValueError, match="trained without a null class, can't be guided"):
            draw(*flags, "--guidance_scale", 4)
        draw(*flags, "--output", "a.png")  # its default is no guidance
        with pytest.raises(ValueError, match="was trained without EMA"):
            draw(*flags, "--key", "ema")

        export_pipeline(config, state, make_vae(), tmp_path / "pipeline")
        flags = ["--model_path", tmp_path / "pipeline", "--num_inference_steps", 2, "--classes", 1]
        with pytest.raises(ValueError, match="trained without a null class, can't be guided"):
            draw(*flags, "--guidance_scale", 4)
        draw(*flags, "--output", "b.png")
        assert np.asarray(Image.open("b.png")).std() > 0
