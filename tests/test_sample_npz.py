"""Many images: what each depends on, rounding, and tools/sample_npz.py with kills, ranks and other settings."""

import fcntl
import itertools
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from PIL import Image
from support.kills import kill_at_operation
from support.pipelines import DIGITS_VAE, make_config, make_model, make_pipeline, state_of, write_checkpoint
from support.runs import launch, run_script

from features.autoencoder import LatentDecoder, NotFiniteError, load_vae
from runtime.process import EXIT_BAD_STEP
from runtime.run_lock import LOCK
from sampling.generator import from_weights
from sampling.many import choose_labels, draw_images, image_noise
from sampling.png_folder import PngFolder
from sampling.sample_sets import MAX_SHARDS, SampleSet, shard_bounds
from tools import sample_npz

DIT = {"sample_size": 4}  # for the digits' autoencoder


@pytest.fixture(scope="module")
def generators():
    vae, config = load_vae(DIGITS_VAE), make_config(**DIT)
    dit = from_weights(config, state_of(make_model(config)), vae, dtype="float32")
    return {"dit": dit, "sit": make_pipeline(vae=vae).generator}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "dit", make_config(**DIT))
    write_checkpoint(folder / "plain", make_config(**DIT, class_dropout_prob=0.0))
    write_checkpoint(folder / "sit", make_config("SiT"))
    return folder


def arguments(model, output, *flags, num_images=40, steps=3):
    given = ["--model_path", model, "--vae", DIGITS_VAE, "--output", output, "--device", "cpu"]
    return [*map(str, [*given, "--num_images", num_images, "--num_inference_steps", steps, *flags])]


class TestImages:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            *(("dit", {"method": method}) for method in ("ddim", "ddpm", "dpm")),
            ("sit", {"sampler": "ode", "method": "heun2"}),
            *(("sit", {"sampler": "sde", "method": method}) for method in ("Euler", "Heun")),
        ],
    )
    def test_depend_on_seed_and_number_alone(self, kind, options, generators):
        def draw(indices, seed=0, tile=None):
            found = draw_images(
                generators[kind], indices, [i % 3 for i in indices], seed=seed, batch_size=5, tile=tile,
                num_inference_steps=3, **options,
            )  # fmt: skip
            return {int(i): image for part, images in found for i, image in zip(part, images, strict=True)}

        paddle.seed(7)
        expected = paddle.randn([2]).numpy()
        paddle.seed(7)
        images = draw(range(20))
        assert (paddle.randn([2]).numpy() == expected).all()  # a training beside it draws what it would
        some = draw([7, 2, 19, 4, 11], tile=2)
        assert [*some] == [7, 2, 19, 4, 11]
        for i, image in some.items():
            assert np.abs(image.astype(int) - images[i]).max() <= 1
        assert not (images[0] == images[3]).all()  # of the same class
        assert not (draw([7], seed=1)[7] == images[7]).all()

    def test_noise_is_standard_normal_and_new_for_each_number(self):
        noise = image_noise(3, range(500), (4, 4, 4))
        assert noise.dtype == np.float32 and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
        assert np.abs(np.corrcoef(noise.reshape(500, -1)) - np.eye(500)).max() < 0.7
        assert (image_noise(3, [7], (4, 4, 4))[0] == noise[7]).all()

    def test_not_finite_ones_are_named_by_their_numbers(self, generators):
        draw = draw_images(
            generators["dit"], [5, 8, 9], [0, 1, 2], seed=0, batch_size=2, guidance_scale=1e38, num_inference_steps=3
        )
        with pytest.raises(NotFiniteError, match=r"3 of 3 images .* number 5, 8, 9,"):
            next(draw)

    def test_labels(self):
        balanced = choose_labels("balanced", 1003, 10, seed=0)
        assert balanced.dtype == np.int64 and sorted(np.bincount(balanced)) == [100] * 7 + [101] * 3
        random = choose_labels("random", 10000, 10, seed=0)
        assert np.bincount(random).min() > 900 and np.bincount(random).max() < 1100
        assert (random != choose_labels("random", 10000, 10, seed=1)).any()
        for kind in ("balanced", "random"):
            assert set(choose_labels(kind, 50, [3, 7], seed=0)) == {3, 7}

    @pytest.mark.parametrize(
        ("rounding", "expected"),
        [
            ("dit", [0, 0, 1, 128, 191, 243, 255, 255]),
            ("diffusers", [0, 0, 1, 128, 191, 243, 255, 255]),
            ("adm", [0, 0, 0, 127, 191, 242, 255, 255]),
        ],
    )
    def test_rounding(self, rounding, expected):
        x = np.array([-2, -1, -0.9945, 0, 0.5, 0.905, 1, 2], "float32")
        vae = SimpleNamespace(
            config=SimpleNamespace(scaling_factor=1.0, latent_channels=3),
            dtype=paddle.float32,
            decode=lambda latents: SimpleNamespace(sample=latents),
        )
        latents = paddle.to_tensor(x).reshape([2, 1, 2, 2]).expand([2, 3, 2, 2])
        images = LatentDecoder(vae).decode(latents, rounding)
        assert images.dtype == np.uint8 and images[..., 0].reshape(-1).tolist() == expected


class Killed(BaseException):
    pass


class TestSets:
    SETTINGS = {"num_images": 5, "image_size": [2, 3], "tile": 2, "seed": 0}  # three shards
    IMAGES = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 3), "uint8")
    LABELS = np.arange(5)

    def make(self, folder, drawn=None, **settings):
        samples = SampleSet(folder / "set.npz", {**self.SETTINGS, **settings})

        def draw(start, stop, callback):
            if drawn is not None:
                os.write(drawn, b"%d\n" % start)
            yield self.IMAGES[start:stop]

        pngs = PngFolder(folder / "png", samples.settings)
        if samples.open():
            samples.fill(draw, samples.missing())
            samples.finish(self.LABELS)
        if pngs.open():
            pngs.write(samples.path, SimpleNamespace(update=lambda count: None))
        samples.close()

    def test_is_what_savez_writes(self, tmp_path):
        self.make(tmp_path)
        np.savez(tmp_path / "expected.npz", self.IMAGES, self.LABELS)
        assert (tmp_path / "set.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()
        assert sorted(os.listdir(tmp_path)) == ["expected.npz", "png", "set.json", "set.npz"]
        names = sorted(os.listdir(tmp_path / "png"))
        assert names == [*(f"{i:06d}.png" for i in range(5)), "samples.json"]
        for i in range(5):
            assert (np.asarray(Image.open(tmp_path / "png" / names[i])) == self.IMAGES[i]).all()

    def test_a_kill_at_any_moment_loses_no_finished_shard(self, tmp_path, monkeypatch):
        (tmp_path / "whole").mkdir()
        self.make(tmp_path / "whole")
        expected = (tmp_path / "whole" / "set.npz").read_bytes()
        for kills in itertools.count():
            folder, log = tmp_path / str(kills), tmp_path / f"{kills}.log"
            folder.mkdir()
            drawn = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            pid = os.fork()
            if pid == 0:
                kill_at_operation(kills, monkeypatch)
                self.make(folder, drawn)
                os._exit(0)
            killed = os.waitpid(pid, 0)[1] != 0
            before = len(log.read_bytes().splitlines())
            finished = len([name for name in self.entries(folder) if name.startswith("shard-")])
            was_whole = (folder / "set.npz").exists()
            self.make(folder, drawn)
            os.close(drawn)
            again = len(log.read_bytes().splitlines()) - before
            assert again == (0 if was_whole else 3 - finished)
            assert (folder / "set.npz").read_bytes() == expected
            assert json.loads((folder / "set.json").read_text())["seed"] == 0
            assert sorted(os.listdir(folder)) == ["png", "set.json", "set.npz"]
            assert len(os.listdir(folder / "png")) == 6
            shutil.rmtree(folder)
            if not killed:
                break
        assert kills > 40

    @staticmethod
    def entries(folder):
        parts = folder / ".set.npz.parts"
        return os.listdir(parts) if parts.exists() else []

    def test_another_run_at_work(self, tmp_path):
        (tmp_path / ".set.npz.parts").mkdir()
        with open(tmp_path / ".set.npz.parts" / LOCK, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match=r"another run is at work in .*\.set\.npz\.parts"):
                self.make(tmp_path)

    def test_a_set_of_an_earlier_version_is_the_same(self, tmp_path):
        """Its objective lacks keys that there were not yet, and has one that is gone."""
        known = {"prediction": "velocity", "path_type": "Linear"}
        self.make(tmp_path, objective={**known, "auxiliary": []})
        now = {**self.SETTINGS, "objective": {**known, "regularizers": [], "t_eps": 0.05}}
        assert SampleSet(tmp_path / "set.npz", now).check()
        now["objective"]["prediction"] = "x1"
        with pytest.raises(ValueError, match="the model's prediction was"):
            SampleSet(tmp_path / "set.npz", now).check()

    def test_what_is_there_already_is_kept(self, tmp_path):
        self.make(tmp_path)
        overwriting = SampleSet(tmp_path / "set.npz", {**self.SETTINGS, "seed": 1})
        assert overwriting.open(overwrite=True)
        overwriting.write(0, self.IMAGES[:2])
        del overwriting  # killed
        with pytest.raises(ValueError, match=r"an unfinished run has other settings: --seed was 1, now it is 0;"):
            self.make(tmp_path)
        assert "shard-00000" in self.entries(tmp_path)
        for path in (tmp_path / "set.npz", tmp_path / ".set.npz.parts/settings.json"):
            path.unlink()
        begun = SampleSet(tmp_path / "set.npz", self.SETTINGS)
        assert begun.open(overwrite=True)
        del begun
        (tmp_path / "set.json").write_text("mine")
        with pytest.raises(ValueError, match=r"set\.json: exists already; give another name, or --overwrite"):
            self.make(tmp_path)
        (tmp_path / ".set.npz.parts/settings.json").write_text("{")  # by a disk that is broken
        again = SampleSet(tmp_path / "set.npz", self.SETTINGS)
        assert again.open(overwrite=True) and again.missing() == [0, 1, 2]

    def test_shards_depend_on_the_number_of_images_and_the_tile(self):
        assert shard_bounds(40, 16) == [(0, 16), (16, 32), (32, 40)]
        for num_images in (1, 8191, 8192, 8193, 50000):
            bounds = shard_bounds(num_images, 16)
            assert len(bounds) <= MAX_SHARDS and bounds[0][0] == 0 and bounds[-1][1] == num_images
            assert all(stop == start and start % 16 == 0 for (_, stop), (start, _) in itertools.pairwise(bounds))


class TestCommand:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch):
        monkeypatch.setenv("MKL_CBWR", "AUTO,STRICT")  # as the command does, but for one test only

    def test_batch_size_changes_nothing_and_resumes_need_no_finished_shard(self, models, tmp_path, capsys, monkeypatch):
        for size in (1, 3, 64):
            sample_npz.main(arguments(models / "dit", tmp_path / f"{size}.npz", "--batch_size", size))
        expected = (tmp_path / "1.npz").read_bytes()
        assert expected == (tmp_path / "3.npz").read_bytes() == (tmp_path / "64.npz").read_bytes()
        said = capsys.readouterr().out
        assert "note: --batch_size has no effect on a CPU, which computes 32 images at once (--tile)" in said
        assert "40 images of 32x32, random labels of 10 classes, seed 0, ddim in 3 steps, guidance 1.5" in said

        stop_at, tiles = 1, []

        def counting(*args, **kwargs):
            for found in draw_images(*args, **kwargs):
                if len(tiles) == stop_at:
                    raise Killed
                tiles.append(found[0])
                yield found

        monkeypatch.setattr(sample_npz, "draw_images", counting)
        again = arguments(models / "dit", tmp_path / "a.npz", "--png", tmp_path / "png")
        with pytest.raises(Killed):
            sample_npz.main(again)
        stop_at = None
        sample_npz.main(again)
        assert [part[0] for part in tiles] == [0, 32]
        assert (tmp_path / "a.npz").read_bytes() == expected
        (tmp_path / "png" / "000033.png").unlink()
        sample_npz.main(again)
        assert len(tiles) == 2 and "a.npz: complete already: 40 images" in capsys.readouterr().out

        images, settings = np.load(tmp_path / "a.npz"), json.loads((tmp_path / "a.json").read_text())
        assert (images["arr_1"] == choose_labels("random", 40, 10, seed=0)).all()
        assert images["arr_0"].shape == (40, 32, 32, 3) and images["arr_0"].std() > 10
        assert (np.asarray(Image.open(tmp_path / "png" / "000033.png")) == images["arr_0"][33]).all()
        wanted = {"num_images": 40, "labels": "random", "scheduler": "ddim", "guidance_scale": 1.5, "tile": 32}
        assert {**settings, **wanted, "guidance_channels": "all", "rounding": "dit"} == settings
        assert len(settings["weights_sha256"]) == len(settings["vae_sha256"]) == 64

    def test_settings_matter(self, models, tmp_path):
        def draw(model, *flags):
            output = tmp_path / "x.npz"
            sample_npz.main(arguments(models / model, output, *flags, "--overwrite", num_images=3))
            return np.load(output)["arr_0"].tobytes()

        dit = [(), ("--scheduler", "ddpm"), ("--guidance_channels", "3"), ("--key", "model"), ("--rounding", "adm")]
        assert len({draw("dit", *flags) for flags in [*dit, ("--labels", "balanced"), ("--classes", "4")]}) == 7
        sit = [(), ("--last_step", "None"), ("--sampler", "ode"), ("--guidance_interval", "0.5", "1")]
        assert len({draw("sit", *flags) for flags in sit}) == 4

    def test_other_settings_need_overwrite(self, models, tmp_path, monkeypatch):
        output = tmp_path / "a.npz"

        def run(*flags):
            sample_npz.main(arguments(models / "dit", output, "--scheduler", "ddim", *flags, num_images=5))

        def dying(*args, **kwargs):
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(sample_npz, "draw_images", dying)
            run("--seed", 1)
        with pytest.raises(
            ValueError, match=r"a.npz: an unfinished run has other settings: --seed was 1, now it is 0;"
        ):
            run()
        run("--overwrite")
        first = output.read_bytes()
        with pytest.raises(ValueError, match=r"a.npz: is complete, with other settings: --scheduler was \"ddim\", now"):
            run("--scheduler", "dpm")
        with pytest.raises(ValueError, match=r"the sha256 of the network's weights was"):
            run("--key", "model")
        output.write_bytes(first[:-1])
        with pytest.raises(ValueError, match=rf"a.npz: has {len(first) - 1} bytes, .*a.json says {len(first)}; give "):
            run()
        run("--overwrite")
        assert output.read_bytes() == first
        (tmp_path / "a.json").unlink()
        with pytest.raises(ValueError, match=r"a.npz: exists already, without the .*a.json of a finished run; give"):
            run()

    def test_images_that_are_not_finite_are_not_written(self, models, tmp_path):
        with pytest.raises(NotFiniteError, match="number 0, 1, 2,") as error:
            sample_npz.main(arguments(models / "dit", tmp_path / "a.npz", "--guidance_scale", "1e38", num_images=3))
        assert error.value.exit_code == EXIT_BAD_STEP and not (tmp_path / "a.npz").exists()
        assert sorted(os.listdir(tmp_path / ".a.npz.parts")) == ["run.lock", "settings.json"]

    @pytest.mark.parametrize(
        ("model", "flags", "message"),
        [
            ("dit", ["--sampler", "ode"], "--sampler is for a SiT; .*dit is a DiT"),
            ("sit", ["--scheduler", "ddim"], "--scheduler is for a DiT; .*sit is a SiT"),
            ("sit", ["--sampler", "ode", "--last_step", "Mean"], "--last_step is for --sampler sde"),
            ("sit", ["--method", "rk9"], "rk9"),
            ("plain", ["--guidance_scale", "2"], "plain: trained without a null class, can't be guided"),
            ("dit", ["--num_images", "0"], "--num_images must be a positive integer, got 0"),
            ("dit", ["--tile", "-1"], "--tile must be a positive integer, got -1"),
            ("dit", ["--output", "a.npy"], "--output a.npy: expected a name that ends in .npz"),
            ("dit", ["--classes", "3", "12"], r"--classes 12: the classes are 0\.\.9"),
            ("dit", ["--classes", "3", "1", "3"], "--classes: names class 3 twice"),
            ("dit", ["--png", "."], r"--png \.: holds other files"),
            ("dit", ["--png", "mine.txt"], r"--png mine\.txt: is a file"),
            ("dit", ["--png", "nowhere/png"], "there is no such folder as .*nowhere"),
        ],
    )
    def test_mistakes(self, model, flags, message, models, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine.txt").touch()
        with pytest.raises(ValueError, match=message):
            sample_npz.main(arguments(models / model, "a.npz", *flags))
        assert os.listdir(tmp_path) == ["mine.txt"]

    @pytest.mark.distributed
    def test_any_number_of_ranks_makes_the_same_file(self, models, tmp_path):
        flags = {"num_images": 130, "steps": 4}  # by the SDE, whose steps are random
        alone = run_script("tools/sample_npz.py", arguments(models / "sit", tmp_path / "1.npz", **flags))
        assert alone.returncode == 0, alone.stderr
        done = launch(
            4, "tools/sample_npz.py", arguments(models / "sit", tmp_path / "4.npz", **flags), tmp_path / "log"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "4.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()
        assert not list(tmp_path.glob(".*"))
