"""tools/check_features.py: a healthy set passes, and each fault is found in either format."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.feature_sets import pack_set, write_set
from support.runs import ROOT, run_script, write_config

from features.image_source import open_source
from tools.check_features import choose_samples, main

VAE = ROOT / "assets/digits_vae"


def run(folder, *flags, expect=0):
    """The report of a check of `folder`; `expect` is the exit code."""
    output = folder.parent / "report.json"
    arguments = ["--feature_path", folder, "--resolution", 64, "--output", output, "--overwrite", "--num_workers", 2]
    code = 0
    try:
        main([str(value) for value in (*arguments, *flags)])
    except SystemExit as end:
        code = end.code
    assert code == expect
    return json.loads(output.read_text())


def problems(folder, *flags):
    """`[(kind, text)]` of a faulty set."""
    report = run(folder, *flags, expect=1)
    assert all("\n" not in problem["text"] for problem in report["problems"])
    return [(problem["kind"], problem["text"]) for problem in report["problems"]]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Packed and pairs of the same moments with twins, both with manifest and checksums."""
    folder = tmp_path_factory.mktemp("healthy")
    write_set(folder / "made", flip=True, moments=True)
    (folder / "made/imagenet64_manifest.json").write_text(
        json.dumps({"moments": True, "sample_shape": [4, 8, 8], "num_classes": 10, "scaling_factor": 0.5})
    )
    pack_set(folder / "made", folder / "packed", "--shard_samples", 16)
    pack_set(folder / "packed", folder / "pairs")
    return folder


@pytest.fixture(params=["pairs", "packed"])
def own(request, healthy, tmp_path):
    """A copy to spoil."""
    shutil.copytree(healthy / request.param, tmp_path / "data")
    return tmp_path / "data"


def drop_manifest(folder):
    (folder / "imagenet64_manifest.json").unlink()


def edit(folder, index, change, *, kind="latents"):
    """Replaces one row of latents, flipped or labels by `change(row)`, in either format."""
    if (folder / "imagenet64_packed").is_dir():
        path, row = folder / f"imagenet64_packed/shard-{index // 16:05d}/{kind}.npy", index % 16
    else:
        names = {"latents": "features", "flipped": "features_flip", "labels": "labels"}
        path, row = folder / f"imagenet64_{names[kind]}/{index}.npy", 0
    array = np.load(path)
    array[row] = change(array[row])
    np.save(path, array)


def test_a_healthy_set(own, capsys):
    report = run(own)
    assert report["problems"] == [] and report["samples"] == 40
    assert report["class_counts"] == [4] * 10 and report["labels"] == {"min": 0, "max": 9}
    assert report["moments"] and report["flip"] and report["row_shape"] == [8, 8, 8]
    files = 9 + 3 if report["format"] == "packed" else 120
    assert report["files_with_checksum"] == files
    # Of mean + std * noise, mean and std as `write_set` makes them.
    rows, mirrored = write_set(own.parent / "again", flip=True, moments=True)
    mean, std = np.split(np.concatenate([rows, mirrored]).astype("float64"), 2, axis=1)
    assert report["latents"]["mean"] == pytest.approx(mean.mean(), abs=1e-6)
    assert report["latents"]["std"] == pytest.approx((mean.var() + (std**2).mean()) ** 0.5, rel=1e-6)
    assert len(report["latents"]["channel_std"]) == 4
    assert "40 samples in" in capsys.readouterr().out


def test_numbers_that_are_not_finite(own):
    edit(own, 7, lambda row: np.where(np.arange(8)[:, None, None] == 2, np.nan, row))
    edit(own, 20, lambda row: row * np.inf, kind="flipped")
    found = problems(own, "--no_checksums")
    assert [kind for kind, _ in found] == ["finite", "finite"]
    assert found[0][1].endswith("64 numbers not finite") and ("7.npy" in found[0][1] or "row 7" in found[0][1])
    assert "flip" in found[1][1] and ("20.npy" in found[1][1] or "shard-00001/flipped.npy row 4" in found[1][1])


def test_labels_outside_the_classes(own):
    edit(own, 33, lambda label: -1, kind="labels")
    edit(own, 3, lambda label: 10, kind="labels")
    found = [text for kind, text in problems(own, "--no_checksums") if kind == "labels"]
    assert [text.split(": ")[-1] for text in found] == ["label 10, expected 0..9", "label -1, expected 0..9"]


def test_standard_deviations_that_are_none(own):
    edit(own, 5, lambda row: -np.abs(row))
    ((kind, text),) = problems(own, "--no_checksums")
    assert kind == "moments" and text.endswith("a standard deviation is not above 0")


@pytest.mark.parametrize(("factor", "words"), [(0.1, "is in them twice"), (10, "is not in them"), (1e4, "about 1")])
def test_scale(own, factor, words):
    for index in range(40):
        for kind in ("latents", "flipped"):
            edit(own, index, lambda row: row * np.float32(factor), kind=kind)
    manifest = json.loads((own / "imagenet64_manifest.json").read_text())
    manifest["scaling_factor"] = 0.1
    (own / "imagenet64_manifest.json").write_text(json.dumps(manifest))
    ((kind, text),) = problems(own, "--no_checksums")
    assert kind == "scale" and text.endswith(words if factor == 1e4 else f"scaling factor 0.1 {words}")


def test_duplicates(own):
    first = {}
    edit(own, 4, lambda row: first.setdefault("row", row.copy()))
    for index in (14, 25):
        edit(own, index, lambda row: first["row"])
    found = problems(own, "--no_checksums")
    assert [kind for kind, _ in found] == ["duplicates", "duplicates"]
    assert "is the same latent as" in found[0][1] and "but label" not in found[0][1]
    assert found[1][1].endswith("but label 5, there 4")
    assert run(own, "--no_checksums", "--allow_duplicates", expect=1)["duplicates"] == 2
    edit(own, 25, lambda row: row + 1)
    assert run(own, "--no_checksums", "--allow_duplicates")["duplicates"] == 1


def test_twins_that_are_not_mirrored(own):
    for index in range(40):
        row = {}
        edit(own, index, lambda value, row=row: row.setdefault("row", value.copy()))
        edit(own, index, lambda value, row=row: row["row"], kind="flipped")
    ((kind, text),) = problems(own, "--no_checksums")
    assert kind == "mirrored" and text.endswith("every mirrored latent is the same as its original")


def test_checksums(own):
    edit(own, 4, lambda row: row + np.float32(1e-3))
    edited = [text for _, text in problems(own)]
    assert len(edited) == 1 and edited[0].endswith(
        ("latents.npy: its checksum is another", "4.npy: its checksum is another")
    )
    with open(own / "imagenet64_checksums.txt", "a") as file:
        file.write(f"{'0' * 64}  imagenet64_nowhere.npy\nnonsense\n")
    found = [text for kind, text in problems(own) if kind == "checksums"]
    ends = ("is not the file that the manifest was written with", "is no checksum", "has a checksum, but is not there")
    assert all(any(text.endswith(end) for text in found) for end in ends) and len(found) == 4


def test_manifest_that_does_not_fit(own):
    manifest = json.loads((own / "imagenet64_manifest.json").read_text())
    manifest.update(num_samples=41, class_counts=[40, *[0] * 9], flip=False)
    (own / "imagenet64_manifest.json").write_text(json.dumps(manifest))
    found = problems(own)
    assert [kind for kind, _ in found] == ["manifest"] * 3
    assert "num_samples 41, found 40" in found[0][1] and "flip False, found True" in found[1][1]
    assert "class_counts are not those of the labels" in found[2][1]


def test_every_broken_pair_is_listed(healthy, tmp_path, capsys):
    own = tmp_path / "data"
    shutil.copytree(healthy / "pairs", own)
    (own / "imagenet64_labels/0.npy").unlink()
    (own / "imagenet64_features_flip/1.npy").unlink()
    (own / "imagenet64_features/2.npy").write_bytes(b"\x93NUMPY")
    np.save(own / "imagenet64_features/3.npy", np.zeros((1, 8, 4, 4), "float32"))
    np.save(own / "imagenet64_features/4.npy", np.zeros((1, 8, 8, 8)))
    np.save(own / "imagenet64_labels/5.npy", np.array([1, 2]))
    (own / "imagenet64_labels/6.npy").write_text("six")
    for index in range(20, 40):
        edit(own, index, lambda row: row * np.nan)
    found = [text.replace(f"{own}/imagenet64_", "") for _, text in problems(own, "--no_checksums")]
    assert [text for text in found if "20.npy" not in text and "not finite" not in text] == [
        "features/0.npy: has no counterpart in labels",
        "features/1.npy: has no counterpart in features_flip",
        "labels/1.npy: has no counterpart in features_flip",
        "features_flip/0.npy: has no counterpart in labels",
        found[4],
        "features/3.npy: holds float32 of shape (8, 4, 4), expected float32 of shape (8, 8, 8)",
        "features/4.npy: holds float64 of shape (8, 8, 8), expected float32 of shape (8, 8, 8)",
        "labels/5.npy: expected one integer label, found int64 of shape (2,)",
        found[8],
        *found[-2:],
    ]
    assert "features/2.npy: not a readable .npy file" in found[4] and "labels/6.npy: not a readable" in found[8]
    assert "num_samples 40, found 38" in found[-2]
    assert sum("not finite" in text for text in found) == 20
    assert "problem: 10 more of the kind 'finite', in the report" in capsys.readouterr().out


def test_a_packed_set_that_can_not_be_opened(healthy, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(healthy / "packed", own)
    path = own / "imagenet64_packed/shard-00001/latents.npy"
    path.write_bytes(path.read_bytes()[:-1])
    ((kind, text),) = problems(own)
    assert kind == "format" and "shard-00001/latents.npy: not a readable .npy file" in text


def test_without_a_manifest_the_config_says_what_is_expected(own, tmp_path):
    drop_manifest(own)
    edit(own, 3, lambda label: 12, kind="labels")
    report = run(own)  # nobody knows how many classes there are
    assert any("number of classes is not known" in note for note in report["notes"])
    config = write_config(tmp_path / "Tiny.json")
    report = run(own, "--config_file", config, expect=1)
    assert report["moments"] and report["problems"][0]["text"].endswith("label 12, expected 0..9")


def test_pairs_of_another_shape_than_the_configs_are_named(own, tmp_path, capsys):
    drop_manifest(own)
    config = json.loads(Path(write_config(tmp_path / "Tiny.json")).read_text())
    config["model"]["sample_size"] = 4
    (tmp_path / "Tiny.json").write_text(json.dumps(config))
    found = [text for _, text in problems(own, "--config_file", tmp_path / "Tiny.json")]
    if (own / "imagenet64_packed").is_dir():
        assert "holds latents of shape (8, 8, 8), expected (8, 4, 4)" in found[0]
    else:
        assert "features/0.npy: holds float32 of shape (8, 8, 8), expected float32 of shape (8, 4, 4)" in found[0]
        assert len(found) == 80  # the twins too
        assert "features: expected moments (8, 4, 4) float32" in capsys.readouterr().out


def test_a_config_of_too_few_classes_is_no_fault_of_the_manifest(own, tmp_path):
    config = json.loads(Path(write_config(tmp_path / "Tiny.json")).read_text())
    config["model"]["num_classes"] = 9
    (tmp_path / "Tiny.json").write_text(json.dumps(config))
    report = run(own, "--no_checksums", "--config_file", tmp_path / "Tiny.json", expect=1)
    assert [problem["text"].split(": ")[-1] for problem in report["problems"]] == ["label 9, expected 0..8"] * 4
    assert report["class_counts"] == [4] * 10 and report["notes"] == []


def test_the_report_lands_beside_the_features(healthy, tmp_path, monkeypatch, capsys):
    shutil.copytree(healthy / "packed", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet64_check.json", "imagenet64_check-2.json"):
        main(["--feature_path", "data", "--num_workers", "1"])
        assert f"report: data/{name}" in capsys.readouterr().out and (tmp_path / "data" / name).exists()
    assert os.listdir(tmp_path) == ["data"]


def die(task):
    os._exit(9)


def test_a_process_that_dies_is_one_line(healthy, monkeypatch):
    monkeypatch.setattr("features.check.check_span", die)
    with pytest.raises(ValueError, match="a process of the check died; .* smaller --num_workers"):
        run(healthy / "pairs")


@pytest.fixture
def encoded(tmp_path):
    """Images of two classes in folders, their features with mirrored twins, and a manifest that tells the images."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(("cat/a", "cat/b", "dog/a")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), "uint8")).save(tmp_path / f"images/{name}.png")
        for kind in ("features", "features_flip", "labels"):
            (tmp_path / f"data/imagenet64_{kind}").mkdir(parents=True, exist_ok=True)
        latent = rng.standard_normal((1, 4, 4, 4)).astype("float32")
        np.save(tmp_path / f"data/imagenet64_features/{index}.npy", latent)
        np.save(tmp_path / f"data/imagenet64_features_flip/{index}.npy", latent[..., ::-1])
        np.save(tmp_path / f"data/imagenet64_labels/{index}.npy", np.array([index // 2]))
    source = {"kind": "folder", "path": str(tmp_path / "images")}
    source["sha256"] = open_source(source["path"]).digest()
    manifest = {"image_size": 32, "num_images": 3, "source": source}
    (tmp_path / "data/imagenet64_manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "data/imagenet64_classes.json").write_text(json.dumps({"id2label": {"0": "cat", "1": "dog"}}))
    return tmp_path


def cells(picture, columns, rows=2):
    """The images (rows, columns, 32, 32, 3) of a picture whose lower right end they are: 32 pixels, gaps of 4."""
    pixels = np.asarray(Image.open(picture))
    header = (pixels.shape[0] - 36 * rows) // 1
    lefts = np.flatnonzero((pixels[header:, :] != 255).any(axis=(0, 2)))
    lefts = [left for left in lefts if {*range(left, left + 32)} <= {*lefts} and left - 1 not in lefts]
    lefts = lefts[-columns:]
    return np.array([[pixels[header + 36 * r :][:32, left : left + 32] for left in lefts] for r in range(rows)])


def test_picture(encoded, capsys):
    """One row a class: the original image of each sample, what is decoded of its latent, its mirrored twin."""
    import paddle
    from ppdiffusers import AutoencoderKL

    run(encoded / "data", "--vae", VAE, "--no_checksums")
    assert "PSNR" in capsys.readouterr().out
    (*_, (original, decoded, mirrored)) = (row[:3] for row in cells(encoded / "report.png", 6))  # the dog's
    assert np.array_equal(original, np.asarray(Image.open(encoded / "images/dog/a.png")))
    vae, latent = AutoencoderKL.from_pretrained(str(VAE)), np.load(encoded / "data/imagenet64_features/2.npy")
    rows = np.concatenate([latent, latent[..., ::-1]]) / vae.config.scaling_factor
    with paddle.no_grad():
        images = vae.decode(paddle.to_tensor(rows)).sample.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(np.stack([decoded, mirrored]), np.clip(images * 127.5 + 127.5, 0, 255), atol=1)


def test_originals_that_moved_or_changed(encoded, capsys):
    (encoded / "images").rename(encoded / "moved")
    run(encoded / "data", "--vae", VAE, "--no_checksums")
    told = "the picture has no originals: the images are not in"
    assert told in capsys.readouterr().out and (encoded / "report.png").exists()
    run(encoded / "data", "--vae", VAE, "--no_checksums", "--data_path", encoded / "moved")
    assert "PSNR" in capsys.readouterr().out
    (encoded / "moved/cat/a.png").rename(encoded / "moved/cat/z.png")
    with pytest.raises(ValueError, match="--data_path .*: .* holds other images than those that were encoded"):
        run(encoded / "data", "--vae", VAE, "--no_checksums", "--data_path", encoded / "moved")


def test_samples_of_the_picture():
    """Every class that is there, as often as others where it can be, and of very many some."""
    labels = np.array([4] * 5 + [2] + [7] * 9)
    classes, samples = choose_samples(labels, np.arange(15) != 14, 12)
    assert classes == [2, 4, 7] and samples.shape == (3, 4)
    assert samples[0].tolist() == [5, -1, -1, -1] and 14 not in samples
    for label, row in zip(classes[1:], samples[1:], strict=True):
        assert (labels[row] == label).all() and len({*row}) == 4
    classes, samples = choose_samples(np.arange(1000), np.ones(1000, bool), 32)
    assert samples.shape == (10, 1) and classes[0] == 0 and classes[-1] == 999


def test_a_vae_of_another_width(healthy, tmp_path):
    write_set(tmp_path / "data", 3)
    for path in (tmp_path / "data/imagenet64_features").iterdir():
        np.save(path, np.load(path)[:, :3])
    with pytest.raises(ValueError, match="decodes 4 channels, the latents have 3"):
        run(tmp_path / "data", "--vae", VAE)


def test_command_line(tmp_path):
    write_set(tmp_path / "data", 3)
    output = tmp_path / "report.json"
    arguments = ["--feature_path", tmp_path / "data", "--output", output]
    done = run_script("tools/check_features.py", arguments)
    assert done.returncode == 0, done.stderr
    assert f"report: {output}" in done.stdout
    before = output.read_bytes()
    done = run_script("tools/check_features.py", arguments)
    assert done.returncode == 2 and "exists already; give another name, or --overwrite" in done.stderr
    assert output.read_bytes() == before
    np.save(tmp_path / "data/imagenet64_labels/1.npy", np.array([-5]))
    done = run_script("tools/check_features.py", [*arguments, "--overwrite"])
    assert done.returncode == 1 and "labels/1.npy: label -5, expected 0.." in done.stdout
    assert "Traceback" not in done.stderr
