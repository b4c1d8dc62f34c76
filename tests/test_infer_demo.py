"""Drawing images: guidance, decoding, grids, and infer_demo_dit.py with pipelines and training checkpoints."""

import json

import numpy as np
import paddle
import pytest
from conftest import GOLDEN, relative_error
from PIL import Image
from test_convert import make_config, make_model, make_vae, state_of

import infer_demo_dit
from sampling.decoder import LatentDecoder
from sampling.export import export_dit_pipeline
from sampling.grid import make_grid
from sampling.guidance import guided
from tools import image_demo


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


class TestDecoder:
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
            LatentDecoder.from_pretrained(str(tmp_path))


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
    LABELS = {0: "tench, Tinca tinca", 1: "crane", 2: "golden retriever", 3: "crane", 4: "7"}

    @pytest.mark.parametrize("text, expected", [("tench", 0), ("Tinca tinca", 0), ("tench, Tinca tinca", 0), ("3", 3)])
    def test_by_name_or_id(self, text, expected):
        assert image_demo.find_class(text, self.LABELS, 5) == expected

    @pytest.mark.parametrize(
        "text, message",
        [
            ("crane", "the name of several classes, give the id: 1, 3"),
            ("5", r"the classes are 0\.\.4"),
            ("dog", "no such class; expected an id 0..4 or a name such as 7, crane"),
            ("-1", "no such class"),
        ],
    )
    def test_mistakes(self, text, message):
        with pytest.raises(ValueError, match=f"--classes {text}: {message}"):
            image_demo.find_class(text, self.LABELS, 5)

    def test_labels_of_another_network(self):
        with pytest.raises(ValueError, match=r"--classes tench: is class 7 of the labels; the classes are 0\.\.4"):
            image_demo.find_class("tench", {7: "tench"}, 5)

    def test_default(self):
        assert image_demo.find_classes(None, self.LABELS, 5) == [2]
        assert image_demo.find_classes(None, {}, 12) == list(range(10))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One network as a pipeline folder, as a training checkpoint folder, and its VAE: paths."""
    folder = tmp_path_factory.mktemp("models")
    config, vae = make_config(), make_vae()
    state = state_of(make_model(config))
    labels = {i: f"digit {i}" for i in range(10)}
    export_dit_pipeline(config, state, vae, folder / "pipeline", id2label=labels)
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

    @pytest.mark.parametrize("scheduler", ["ddpm", "dpm"])
    def test_other_schedulers_from_a_checkpoint(self, models, scheduler):
        flags = ["--num_inference_steps", 4, "--scheduler", scheduler, "--classes", 1, "--output", "a.png"]
        draw("--model_path", models["checkpoint"], "--vae", models["vae"], *flags)
        assert np.asarray(Image.open("a.png")).shape == (8, 8, 3)

    def test_ids_of_a_checkpoint_can_have_names(self, models, tmp_path):
        labels = tmp_path / "labels.json"
        labels.write_text(json.dumps({"id2label": {str(i): f"digit {i}" for i in range(10)}}))
        flags = ["--id2label", labels, "--num_inference_steps", 2, "--classes", "digit 4"]
        draw("--model_path", models["checkpoint"], "--vae", models["vae"], *flags)
        assert (tmp_path / "result_DiT_digit_4.png").exists()

    def test_no_argument_takes_the_local_folder(self, tmp_path, capsys):
        config = make_config(num_classes=1000)
        labels = json.loads(open(image_demo.IMAGENET_LABELS, encoding="utf-8").read())["id2label"]
        export_dit_pipeline(config, state_of(make_model(config)), make_vae(), "DiT_XL_2_256", id2label=labels)
        infer_demo_dit.main([])
        image = np.asarray(Image.open("result_DiT_golden_retriever.png"))
        assert image.shape == (8, 8, 3)
        # A second run overwrites nothing, and draws the same.
        before = (tmp_path / "result_DiT_golden_retriever.png").stat().st_mtime_ns
        infer_demo_dit.main([])
        assert np.array_equal(image, np.asarray(Image.open("result_DiT_golden_retriever-2.png")))
        assert (tmp_path / "result_DiT_golden_retriever.png").stat().st_mtime_ns == before
        assert "golden retriever: result_DiT_golden_retriever-2.png" in capsys.readouterr().out

    def test_an_existing_output_stays(self, models, tmp_path):
        (tmp_path / "mine.png").write_text("mine")
        flags = ["--model_path", models["pipeline"], "--num_inference_steps", 1, "--output", "mine.png"]
        with pytest.raises(ValueError, match="--output mine.png: exists already"):
            draw(*flags)
        assert (tmp_path / "mine.png").read_text() == "mine"
        draw(*flags, "--overwrite")
        assert np.asarray(Image.open("mine.png")).shape == (16, 64, 3)  # ten classes, eight in a row

    @pytest.mark.parametrize(
        "flags, message",
        [
            (["--model_path", "no-such-owner/no-such-model"], "Without a network, give a folder by --model_path"),
            (["--model_path", "no-such-folder"], "--model_path no-such-folder: there is no such folder$"),
            (["--model_path", "output/checkpoint-5/"], "--model_path output/checkpoint-5/: there is no such folder$"),
            (["--model_path", str(GOLDEN / "checkpoint-5")], "checkpoint-5: there is no such folder$"),
            (["--model_path", str(GOLDEN / "dit_tiny.pt")], "dit_tiny.pt: is a file; expected a folder"),
            (["--model_path", str(GOLDEN)], "neither a DiTPipeline folder .* nor a training checkpoint"),
            (["--num_inference_steps", "0"], "--num_inference_steps 0: expected 1 or more"),
            (["--output", "no/such/folder.png"], "there is no such folder"),
            (["--dtype", "float16"], "--dtype float16: Paddle computes in float32 only on a CPU"),
            (["--classes", "unicorn"], "--classes unicorn: no such class"),
            (["--scheduler", "ddpm"], "--scheduler ddpm needs a training checkpoint"),
        ],
    )
    def test_mistakes(self, models, tmp_path, flags, message):
        with pytest.raises(ValueError, match=message):
            draw("--model_path", models["pipeline"], *flags)
        assert list(tmp_path.iterdir()) == []

    def test_other_pipelines(self, tmp_path):
        for index, message in (
            ({"_class_name": "SiTPipeline"}, "--model_path pipeline: is a SiTPipeline; use infer_demo_sit.py"),
            ({"_class_name": "LDMPipeline"}, "--model_path pipeline: is a LDMPipeline; expected a DiTPipeline"),
            ([], "--model_path pipeline: is a None; expected a DiTPipeline"),
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
        with pytest.raises(ValueError, match="--model_path output/checkpoint-5: there is no such folder$"):
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

        export_dit_pipeline(config, state, make_vae(), tmp_path / "pipeline")
        flags = ["--model_path", tmp_path / "pipeline", "--num_inference_steps", 2, "--classes", 1]
        with pytest.raises(ValueError, match="trained without a null class, can't be guided"):
            draw(*flags, "--guidance_scale", 4)
        draw(*flags, "--output", "b.png")
        assert np.asarray(Image.open("b.png")).std() > 0
