"""tools/extract_features.py: layout, values, determinism, going on after a kill, manifest, errors."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pipelines import make_halving_vae
from support.runs import launch

from features.extraction import Journal
from features.images import find_images, load_image
from tools.extract_features import main

ROOT = Path(__file__).resolve().parents[1]
VAE = str(ROOT / "assets" / "digits_vae")
SIZES = [(32, 32), (40, 33), (97, 50), (33, 130), (64, 64)]


def write_images(root: Path) -> None:
    """Two classes, several formats and modes, in an order of names that is not that of creation."""
    rng = np.random.default_rng(0)
    for folder, suffix, mode in (("b_second", "jpg", "RGB"), ("a_first", "png", "RGBA"), ("a_first", "bmp", "L")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i, (width, height) in enumerate(SIZES):
            smooth = rng.integers(0, 256, (4, 4, 4), dtype="uint8")
            image = Image.fromarray(smooth, "RGBA").resize((width, height), Image.BILINEAR).convert(mode)
            image.save(root / folder / f"{i}.{suffix}")
    (root / "a_first" / "notes.txt").write_text("not an image")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


def arguments(data, output, *more):
    return ["--data_path", str(data), "--features_path", str(output), "--image_size", "32", "--vae", VAE, *more]


def load(output: Path, name: str = "imagenet32"):
    """(features [N, C, h, w], labels [N]) with the layout's shapes and types checked file by file."""
    files = sorted(os.listdir(output / f"{name}_features"), key=lambda file: int(file[:-4]))
    assert files == [f"{i}.npy" for i in range(len(files))]
    assert sorted(os.listdir(output / f"{name}_labels")) == sorted(files)
    features = [np.load(output / f"{name}_features" / file) for file in files]
    labels = [np.load(output / f"{name}_labels" / file) for file in files]
    assert all(feature.shape == (1, 4, 4, 4) and feature.dtype == np.float32 for feature in features)
    assert all(label.shape == (1,) and label.dtype == np.int64 for label in labels)
    return np.concatenate(features), np.concatenate(labels)


@pytest.fixture(scope="module")
def extracted(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("features") / "new" / "folder"
    main(arguments(images, output, "--batch_size", "4"))
    return output


def test_layout_and_classes(extracted):
    features, labels = load(extracted)
    assert labels.tolist() == [0] * 10 + [1] * 5
    classes = json.loads((extracted / "imagenet32_classes.json").read_text())
    assert classes == {"id2label": {"0": "a_first", "1": "b_second"}}
    manifest = json.loads((extracted / "imagenet32_manifest.json").read_text())
    rows = np.moveaxis(features, 1, 0).reshape(features.shape[1], -1)
    np.testing.assert_allclose(manifest["channel_mean"], rows.mean(axis=1, dtype="float64"), rtol=1e-6)
    np.testing.assert_allclose(manifest["channel_std"], rows.std(axis=1, dtype="float64"), rtol=1e-6)


def test_values_are_scaled_posterior_samples(images, extracted):
    """(latent / scaling_factor - mean) / std must be standard normal noise, different for each image."""
    import paddle
    from ppdiffusers import AutoencoderKL

    features, _ = load(extracted)
    vae = AutoencoderKL.from_pretrained(VAE)
    x = np.stack([load_image(path, 32) for path, _ in find_images(str(images))[0]])
    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(x)).latent_dist
    noise = (features / vae.config.scaling_factor - posterior.mean.numpy()) / posterior.std.numpy()
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1 and np.abs(noise).max() < 5
    correlation = np.corrcoef(noise.reshape(len(noise), -1)) - np.eye(len(noise))
    assert np.abs(correlation).max() < 0.6


def test_background_goes_to_the_latents_and_the_manifest(images, tmp_path, capsys):
    only = tmp_path / "images/one"
    only.mkdir(parents=True)
    shutil.copy(images / "a_first/0.png", only)
    command = arguments(only.parent, tmp_path / "out")
    main(command)
    assert "1 image with transparent parts, whose hidden colours show: " in capsys.readouterr().out
    plain = load(tmp_path / "out")[0]
    with pytest.raises(ValueError, match=r"--background was null, now it is \[255, 255, 255\]"):
        main([*command, "--background", "white"])
    main([*command, "--background", "white", "--name", "imagenet32w"])
    assert "transparent" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out/imagenet32w_manifest.json").read_text())["background"] == [255, 255, 255]
    assert np.abs(load(tmp_path / "out", "imagenet32w")[0] - plain).max() > 0.1


def test_result_depends_on_seed_but_not_on_batches_or_workers(images, extracted, tmp_path):
    features, labels = load(extracted)
    main(arguments(images, tmp_path, "--name", "one", "--batch_size", "1", "--num_workers", "1"))
    same, same_labels = load(tmp_path, "one")
    np.testing.assert_allclose(same, features, atol=2e-5)
    assert (same_labels == labels).all()
    main(arguments(images, tmp_path, "--name", "two", "--seed", "1"))
    assert np.abs(load(tmp_path, "two")[0] - features).mean() > 1e-3


@pytest.mark.distributed
def test_two_processes_write_what_one_does(images, extracted, tmp_path):
    command = arguments(images, tmp_path / "out", "--batch_size", "3", "--device", "cpu")
    done = launch(2, "tools/extract_features.py", command, tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    features, labels = load(tmp_path / "out")
    np.testing.assert_allclose(features, load(extracted)[0], atol=2e-5)
    assert (labels == load(extracted)[1]).all()


def test_pixels_are_scaled_to_plus_minus_one(tmp_path):
    Image.new("RGB", (40, 40), (255, 0, 255)).save(tmp_path / "x.png")
    x = load_image(str(tmp_path / "x.png"), 32)
    assert x.shape == (3, 32, 32) and x.dtype == np.float32
    assert (x[0] == 1).all() and (x[1] == -1).all() and (x[2] == 1).all()


def missing_folder(images, tmp_path):
    return arguments(tmp_path / "nowhere", tmp_path / "out"), "nowhere"


def no_classes(images, tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "flat" / "x.png")
    return arguments(tmp_path / "flat", tmp_path / "out"), "no images"


def size_not_divisible(images, tmp_path):
    return [*arguments(images, tmp_path / "out"), "--image_size", "36"], "multiple of 8"


def no_vae(images, tmp_path):
    (tmp_path / "vae").mkdir()
    return [*arguments(images, tmp_path / "out"), "--vae", str(tmp_path / "vae")], "config.json"


def bad_batch_size(images, tmp_path):
    return arguments(images, tmp_path / "out", "--batch_size", "0"), "--batch_size must be a positive integer, got 0"


def features_among_the_classes(images, tmp_path):
    shutil.copytree(images, tmp_path / "in")
    return arguments(tmp_path / "in", tmp_path / "in" / "out"), "where the images are"


def seed_beyond_the_range(images, tmp_path):
    words = "--seed must be an integer from 0 to 4294967295, got 4294967296"
    return arguments(images, tmp_path / "out", "--seed", "4294967296"), words


CASES = [missing_folder, no_classes, size_not_divisible, no_vae, bad_batch_size, features_among_the_classes]
CASES += [seed_beyond_the_range]


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_named_and_write_nothing(case, images, tmp_path):
    command, expected = case(images, tmp_path)
    with pytest.raises(ValueError, match=expected):
        main(command)
    assert not list(tmp_path.rglob("out"))


def test_mistakes_get_one_line_on_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "extract_features.py"), *arguments(tmp_path / "gone", tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and "gone: there is no such file or folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_extraction_is_not_overwritten(images, tmp_path):
    (tmp_path / "imagenet32_features").mkdir()
    np.save(tmp_path / "imagenet32_features" / "0.npy", np.zeros(1))
    with pytest.raises(ValueError, match="another extraction"):
        main(arguments(images, tmp_path))
    assert os.listdir(tmp_path) == ["imagenet32_features"]
    assert np.load(tmp_path / "imagenet32_features" / "0.npy").tolist() == [0.0]


# ---------------------------------------------------------------------------------------------------------------------
# What is stored
# ---------------------------------------------------------------------------------------------------------------------


def read_manifest(output, name="imagenet32"):
    return json.loads((output / f"{name}_manifest.json").read_text())


def everything(output):
    """{path: sha256} of all files in a folder."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


def test_manifest_and_checksums(images, extracted):
    manifest, files = read_manifest(extracted), everything(extracted)
    listed = dict(
        reversed(line.split("  ")) for line in (extracted / "imagenet32_checksums.txt").read_text().split("\n")[:-1]
    )
    assert listed == {name: digest for name, digest in files.items() if name.endswith(".npy")} and len(listed) == 30
    assert manifest["checksums"] == {"file": "imagenet32_checksums.txt", "sha256": files["imagenet32_checksums.txt"]}
    assert (manifest["num_images"], manifest["num_samples"], manifest["num_classes"]) == (15, 15, 2)
    assert manifest["class_counts"] == [10, 5] and manifest["unreadable"] == []
    assert manifest["sample_shape"] == [4, 4, 4] and manifest["scaling_factor"] == 1.14637
    assert manifest["vae"]["name"] == VAE and manifest["vae"]["latent_channels"] == 4
    assert manifest["encoding"] == {"device": "cpu", "dtype": "float32", "batch_size": 4}
    assert (manifest["format"], manifest["image_size"], manifest["seed"]) == ("npy", 32, 0)
    assert not (extracted / "imagenet32_extraction").exists()


@pytest.fixture(scope="module")
def moments(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("moments")
    main(arguments(images, output, "--batch_size", "4", "--moments", "--flip"))
    return output


def test_moments_and_seed_give_the_fixed_samples(extracted, moments):
    assert read_manifest(moments)["moments"] is True and read_manifest(moments)["sample_shape"] == [4, 4, 4]
    fixed, _ = load(extracted)
    for index in range(15):
        stored = np.load(moments / "imagenet32_features" / f"{index}.npy")
        assert stored.shape == (1, 8, 4, 4) and stored.dtype == np.float32
        noise = np.random.default_rng((0, index)).standard_normal((4, 4, 4), "float32")
        np.testing.assert_allclose(stored[0, :4] + stored[0, 4:] * noise, fixed[index], atol=1e-5)


def test_flip_is_the_latent_of_the_mirrored_image(images, moments, tmp_path):
    for path, _ in find_images(str(images))[0]:
        mirrored = tmp_path / "in" / f"{Path(path).relative_to(images)}.png"
        mirrored.parent.mkdir(parents=True, exist_ok=True)
        pixels = ((load_image(path, 32).transpose(1, 2, 0) + 1) * 127.5).round().astype("uint8")
        Image.fromarray(pixels[:, ::-1]).save(mirrored)
    main(arguments(tmp_path / "in", tmp_path / "out", "--batch_size", "4", "--moments"))
    for index in range(15):
        twin = np.load(moments / "imagenet32_features_flip" / f"{index}.npy")
        assert np.array_equal(twin, np.load(tmp_path / "out" / "imagenet32_features" / f"{index}.npy"))


def test_flips_have_noise_of_their_own(images, moments, tmp_path):
    main(arguments(images, tmp_path, "--batch_size", "4", "--flip", "--seed", "3"))
    for index in (0, 14):
        stored = np.load(moments / "imagenet32_features_flip" / f"{index}.npy")[0]
        noise = np.random.default_rng((3, index, 1)).standard_normal((4, 4, 4), "float32")
        twin = np.load(tmp_path / "imagenet32_features_flip" / f"{index}.npy")
        np.testing.assert_allclose(twin[0], stored[:4] + stored[4:] * noise, atol=1e-5)


def test_packed_holds_what_the_pairs_hold(images, moments, tmp_path, monkeypatch):
    monkeypatch.setattr("features.writers.MIN_SHARD_SAMPLES", 8)  # two shards
    main(arguments(images, tmp_path, "--batch_size", "4", "--moments", "--flip", "--format", "packed"))
    shards = sorted((tmp_path / "imagenet32_packed").iterdir())
    assert [shard.name for shard in shards] == ["shard-00000", "shard-00001"]
    packed = {
        key: np.concatenate([np.load(shard / f"{key}.npy") for shard in shards])
        for key in ("latents", "flipped", "labels", "names")
    }
    for index in range(15):
        assert packed["names"][index] == str(index).encode()
        for key, folder in (("latents", "features"), ("flipped", "features_flip"), ("labels", "labels")):
            pair = np.load(moments / f"imagenet32_{folder}" / f"{index}.npy")
            assert packed[key].dtype == pair.dtype and np.array_equal(packed[key][index], pair[0])
    theirs, ours = read_manifest(moments), read_manifest(tmp_path)
    assert ours.pop("checksums") != theirs.pop("checksums") and ours.pop("format") == "packed"
    for name in ("channel_mean", "channel_std"):  # whose last bits depend on how the rows are grouped
        assert ours.pop(name) == pytest.approx(theirs.pop(name), rel=1e-12)
    assert {**ours, "format": "npy"} == theirs
    lines = (tmp_path / "imagenet32_checksums.txt").read_text().splitlines()
    assert {line.split("  ")[1]: line.split("  ")[0] for line in lines} == {
        name: digest for name, digest in everything(tmp_path).items() if name.endswith(".npy")
    }


def test_vae_of_another_latent_width(images, tmp_path):
    from features.dataset import FeatureDataset

    make_halving_vae(tmp_path / "vae", latent_channels=16)
    main([*arguments(images, tmp_path / "out"), "--vae", str(tmp_path / "vae")])
    manifest = read_manifest(tmp_path / "out")
    assert manifest["sample_shape"] == [16, 16, 16] and manifest["vae"]["downsampling"] == 2
    assert np.load(tmp_path / "out" / "imagenet32_features" / "3.npy").shape == (1, 16, 16, 16)
    with pytest.raises(ValueError, match=r"\(.*16, 16, 16\).*\(4, 4, 4\).*in_channels"):
        FeatureDataset(str(tmp_path / "out"), resolution=32, sample_shape=(4, 4, 4), num_classes=2)


def test_a_vae_that_overflows_is_not_stored(images, tmp_path):
    vae = make_halving_vae(tmp_path / "vae", scaling_factor=10.0)
    vae.quant_conv.bias.set_value(np.full(8, 1e38, "float32"))
    vae.save_pretrained(str(tmp_path / "vae"), safe_serialization=False)
    with pytest.raises(ValueError, match="a_first/0.bmp: its latent is not finite"):
        main([*arguments(images, tmp_path / "out"), "--vae", str(tmp_path / "vae")])


def test_half_precision_on_a_cpu_is_said_and_done_in_float32(images, extracted, tmp_path, capsys):
    main(arguments(images, tmp_path, "--batch_size", "4", "--bf16"))
    assert "this run is float32 throughout" in capsys.readouterr().out
    assert everything(tmp_path) == everything(extracted)


# ---------------------------------------------------------------------------------------------------------------------
# Images that can't be read
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(images, tmp_path):
    """The images, three of them broken: 3 and 4 of the first batch of four, and 12."""
    shutil.copytree(images, tmp_path / "spoilt")
    paths = [path for path, _ in find_images(str(tmp_path / "spoilt"))[0]]
    Path(paths[3]).write_bytes(Path(paths[3]).read_bytes()[:60])
    Path(paths[4]).write_bytes(b"")
    Path(paths[12]).write_bytes(Path(paths[12]).read_bytes()[:200])
    return tmp_path / "spoilt"


def test_an_unreadable_image_stops_it_and_repaired_it_goes_on(images, extracted, spoilt, tmp_path):
    command = arguments(spoilt, tmp_path / "out", "--batch_size", "4")
    for _ in (3, 4, 12):
        with pytest.raises(
            ValueError, match=r"cannot be read as an image.*--on_error skip: what is done is kept"
        ) as error:
            main(command)
        broken = Path(str(error.value).split(": cannot")[0])
        broken.write_bytes((images / broken.relative_to(spoilt)).read_bytes())
    main(command)
    ours, theirs = everything(tmp_path / "out"), everything(extracted)
    assert ours.pop("imagenet32_manifest.json") != theirs.pop("imagenet32_manifest.json")  # the folder's name
    assert ours == theirs


@pytest.mark.parametrize("kind", ["npy", "packed"])
def test_skipped_images_leave_gaps_and_are_listed(kind, spoilt, extracted, tmp_path, capsys):
    main(arguments(spoilt, tmp_path / "out", "--batch_size", "4", "--on_error", "skip", "--format", kind))
    manifest = read_manifest(tmp_path / "out")
    names = ["a_first/1.png", "a_first/2.bmp", "b_second/2.jpg"]
    assert [entry["image"] for entry in manifest["unreadable"]] == names
    assert [entry["index"] for entry in manifest["unreadable"]] == [3, 4, 12]
    assert (manifest["num_images"], manifest["num_samples"], manifest["class_counts"]) == (15, 12, [8, 4])
    said = capsys.readouterr().out
    assert "3 images could not be read and are left out:\n  a_first/1.png: " in said and "12 images of 2" in said
    kept = [index for index in range(15) if index not in (3, 4, 12)]
    fixed, labels = load(extracted)
    if kind == "npy":
        stored = {int(file.stem): np.load(file) for file in (tmp_path / "out" / "imagenet32_features").iterdir()}
        of_class = {int(file.stem): np.load(file)[0] for file in (tmp_path / "out" / "imagenet32_labels").iterdir()}
    else:
        shard = tmp_path / "out" / "imagenet32_packed" / "shard-00000"
        indices = np.load(shard / "names.npy").astype(int).tolist()
        stored = dict(zip(indices, np.load(shard / "latents.npy")[:, None], strict=True))
        of_class = dict(zip(indices, np.load(shard / "labels.npy"), strict=True))
    assert sorted(stored) == sorted(of_class) == kept
    for index in kept:  # to the bit: a hole in a batch does not change the others
        assert np.array_equal(stored[index][0], fixed[index]) and of_class[index] == labels[index]


def test_going_on_after_skipping_needs_skipping(spoilt, tmp_path):
    (tmp_path / "list.txt").write_text("a_first/1.png,0\na_first/0.png,0\nnowhere.png,1\n")
    command = arguments(spoilt, tmp_path / "out", "--list", str(tmp_path / "list.txt"), "--batch_size", "1")
    plant_full_disk(tmp_path / "out", command, 1)
    with pytest.raises(OSError):
        main([*command, "--on_error", "skip"])
    (tmp_path / "out" / "imagenet32_features" / "1.npy").unlink()
    with pytest.raises(ValueError, match="a_first/1.png: could not be read, and an earlier start with --on_error skip"):
        main(command)
    main([*command, "--on_error", "skip"])
    assert [entry["index"] for entry in read_manifest(tmp_path / "out")["unreadable"]] == [0, 2]
    assert read_manifest(tmp_path / "out")["unreadable"][1]["reason"] == "No such file or directory"


def test_all_images_unreadable(tmp_path):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "x.png").write_text("")
    with pytest.raises(ValueError, match="not one of its 1 images can be read: no image format"):
        main(arguments(tmp_path / "in", tmp_path / "out", "--on_error", "skip"))


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


def plant_full_disk(output, command, index):
    """Begins an extraction, stops it at once, and makes the disk full for one feature file."""
    with pytest.raises(ValueError, match="cannot be read"):
        main(command)
    os.makedirs(output / "imagenet32_features", exist_ok=True)
    os.symlink("/dev/full", output / "imagenet32_features" / f"{index}.npy")


def test_disk_full_is_one_line_and_a_restart_goes_on(spoilt, tmp_path):
    skip = ["--batch_size", "2", "--on_error", "skip"]
    main(arguments(spoilt, tmp_path / "unbroken", *skip))
    output = tmp_path / "out"
    plant_full_disk(output, arguments(spoilt, output, *skip[:2]), 9)
    with pytest.raises(
        OSError, match="No space left on device; what is done is kept, the same command goes on"
    ) as error:
        main(arguments(spoilt, output, *skip))
    assert error.value.filename == str(output / "imagenet32_features" / "9.npy")
    assert not (output / "imagenet32_manifest.json").exists()
    (output / "imagenet32_features" / "9.npy").unlink()
    (done,) = (output / "imagenet32_extraction").glob("rank-*")
    assert done.read_text().count("\n") == 4  # 0 to 7; what stands there is not made again
    before = os.stat(output / "imagenet32_features" / "0.npy").st_mtime_ns
    with open(done, "a") as file:
        file.write('[4, [], "12ab')  # a line that a kill cut short
    main(arguments(spoilt, output, *skip))
    assert os.stat(output / "imagenet32_features" / "0.npy").st_mtime_ns == before
    assert everything(output) == everything(tmp_path / "unbroken")


def test_packed_goes_on_with_the_shards_that_its_journal_names(images, spoilt, tmp_path, monkeypatch):
    monkeypatch.setattr("features.writers.MIN_SHARD_SAMPLES", 4)
    output = tmp_path / "out"
    command = arguments(spoilt, output, "--batch_size", "2", "--format", "packed")
    for path in ("a_first/1.png", "a_first/2.bmp"):
        shutil.copy(images / path, spoilt / path)
    with pytest.raises(ValueError, match="b_second/2.jpg: cannot be read"):
        main(command)  # in the last of four shards
    partial = output / "imagenet32_packed.partial"
    assert sorted(os.listdir(partial)) == ["shard-00000", "shard-00001", "shard-00002"]
    (journal,) = (output / "imagenet32_extraction").glob("rank-*")
    journal.write_text("".join(journal.read_text().splitlines(True)[:2]))  # killed after the third shard's rename
    before = {path: path.stat().st_mtime_ns for path in partial.glob("shard-0000[01]/*")}
    shutil.copy(images / "b_second/2.jpg", spoilt / "b_second/2.jpg")
    main(command)
    whole = output / "imagenet32_packed"
    assert before == {partial / path.relative_to(whole): path.stat().st_mtime_ns for path in whole.glob("*[01]/*")}
    ours = everything(output)
    shutil.rmtree(output)
    main(command)
    assert ours == everything(output) and len(ours) == 4 * 3 + 3


def test_stopped_between_two_parts_it_goes_on_to_the_same_files(images, tmp_path, monkeypatch):
    def stop(self, part, *result, add=Journal.add):
        if part == 5:
            raise KeyboardInterrupt  # its files are written, and not in the journal
        add(self, part, *result)

    output = tmp_path / "out"
    command = arguments(images, output, "--batch_size", "1", "--flip")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="interrupted; the same command goes on"):
        patch.setattr(Journal, "add", stop)
        main(command)
    (journal,) = (output / "imagenet32_extraction").glob("rank-*")
    assert len(journal.read_text().splitlines()) == 5 and not (output / "imagenet32_manifest.json").exists()
    main(command)
    ours = everything(output)
    shutil.rmtree(output)
    main(command)
    assert ours == everything(output)


def test_numbered_classes_of_a_set_begun_in_text_order_keep_it(tmp_path, monkeypatch, capsys):
    for number in range(11):
        (tmp_path / f"images/{number}").mkdir(parents=True)
        Image.new("L", (32, 32), number).save(tmp_path / f"images/{number}/x.png")
    command = arguments(tmp_path / "images", tmp_path / "out")
    with monkeypatch.context() as before:
        before.setattr("features.images.order_classes", lambda names, *_: sorted(names))
        main(command)
    files = everything(tmp_path / "out")
    main(command)
    told = capsys.readouterr().out
    assert "complete since an earlier start" in told
    assert "folder 10 is label 2; a new extraction gives it label 10" in told
    assert everything(tmp_path / "out") == files


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_writes_its_share_and_any_number_of_ranks_goes_on(
    world, images, extracted, spoilt, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    command = arguments(spoilt, output, "--batch_size", "4")
    with pytest.raises(ValueError, match="cannot be read"):
        main(command)  # in the first batch: nothing is written
    shutil.copytree(images, spoilt, dirs_exist_ok=True)
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    main(command)
    written = sorted(int(path.stem) for path in (output / "imagenet32_features").iterdir())
    assert written == [4, 5, 6, 7, 12, 13, 14] and not (output / "imagenet32_manifest.json").exists()
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(world))
    monkeypatch.setenv("PADDLE_TRAINER_ID", "0")
    main(command)
    assert (output / "imagenet32_checksums.txt").read_text() == (extracted / "imagenet32_checksums.txt").read_text()


def test_a_complete_extraction_is_left_alone(images, tmp_path, capsys):
    command = arguments(images, tmp_path)
    main(command)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / "imagenet32_extraction").mkdir()  # killed between the manifest and the end
    capsys.readouterr()
    main([*command, "--num_workers", "1"])
    assert "imagenet32_manifest.json: complete since an earlier start, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.items() >= dict(
        list(times.items())[1:]
    ).items()
    assert not (tmp_path / "imagenet32_extraction").exists()
    shutil.rmtree(tmp_path / "imagenet32_features")
    with pytest.raises(ValueError, match="imagenet32_manifest.json: speaks of .*_features, which is not there"):
        main(command)


OTHER_SETTINGS = {
    "--seed": ["--seed", "1"],
    "--batch_size": ["--batch_size", "8"],
    "--moments": ["--moments"],
    "--flip": ["--flip"],
    "--format": ["--format", "packed"],
    "--image_size": ["--image_size", "16", "--name", "imagenet32"],
}


@pytest.mark.parametrize("what", OTHER_SETTINGS)
def test_other_settings_do_not_mix(what, images, extracted, spoilt, tmp_path):
    with pytest.raises(ValueError, match=f"_manifest.json: belongs to another extraction: {what} was .*, now it is"):
        main(arguments(images, extracted, "--batch_size", "4", *OTHER_SETTINGS[what]))
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="cannot be read"):
        main(arguments(spoilt, output, "--batch_size", "4"))
    before = everything(output)
    with pytest.raises(ValueError, match=f"settings.json: belongs to another extraction: {what} was .*, now it is"):
        main(arguments(spoilt, output, "--batch_size", "4", *OTHER_SETTINGS[what]))
    assert everything(output) == before


def test_other_images_do_not_mix(images, spoilt, tmp_path):
    command = arguments(spoilt, tmp_path / "out")
    with pytest.raises(ValueError, match="cannot be read"):
        main(command)
    shutil.copy(spoilt / "a_first" / "0.png", spoilt / "a_first" / "new.png")
    with pytest.raises(ValueError, match="sha256 of the images' names and labels was"):
        main(command)


def test_two_extractions_at_once_are_refused(spoilt, tmp_path):
    command = arguments(spoilt, tmp_path / "out", "--batch_size", "4")
    with pytest.raises(ValueError, match="cannot be read"):
        main(command)
    with open(tmp_path / "out" / "imagenet32_extraction" / "rank-0000.jsonl") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is at work on this extraction"):
            main(command)
