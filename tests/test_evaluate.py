"""tools/evaluate.py: whole runs against the golden numbers, what is read and refused, statistics, reports."""

import io
import json
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from support.golden import load_golden
from support.runs import ROOT, launch

from evaluation import report as reports
from evaluation.inception import Inception
from evaluation.reconstruction import psnr, ssim
from evaluation.run import METRICS
from evaluation.sets import open_images
from tools.evaluate import main

# Of a case of `evaluation_pipeline.npz`.
OF_CASE = ("fid", "sfid", "inception_score", "precision", "recall", "precision_fragile", "recall_fragile")
OF_CASE += ("kid", "kid_sd", "kid_size", "mind_mean", "mind_sd")


class Blocks:
    """A cheap feature network: means of 4x4 parts, of which some are `spatial`, and `logits` made of them."""

    outputs = ("pool", "spatial", "logits")
    settings = {"features": "blocks", "preprocessing": "adm", "weights_sha256": "0" * 64}

    def __init__(self, outputs=outputs, settings=settings):
        self.outputs, self.settings = outputs, settings

    def __call__(self, images):
        n, h, w, _ = images.shape
        parts = images.reshape(n, 4, h // 4, 4, w // 4, 3).mean(axis=(2, 4), dtype="float64") / 32  # (n, 4, 4, 3)
        pool = parts.reshape(n, -1).astype("float32")
        found = {"pool": pool, "spatial": pool[:, ::3], "logits": pool[:, :10]}
        return {name: found[name] for name in self.outputs}


@pytest.fixture
def blocks(monkeypatch):
    """Makes the tool take `Blocks`, or another network."""

    def use(network):
        monkeypatch.setattr("evaluation.networks.load_features", lambda name, **options: network)
        monkeypatch.setattr("evaluation.networks.check_features", lambda *_: None)

    use(Blocks())
    return use


def images(seed, count=12, size=(16, 16)):
    """Smooth random images, uint8 (count, *size, 3)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 4, 4, 3)).repeat(size[0] // 4, axis=1).repeat(size[1] // 4, axis=2)
    return (small * 0.9 + rng.integers(0, 25, (count, *size, 3))).astype("uint8")


def write_folder(folder, pixels, ending="png"):
    folder.mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03}.{ending}")
    return folder


@pytest.fixture
def sets(tmp_path):
    """Samples as .npz and a reference as a folder."""
    np.savez(tmp_path / "samples.npz", arr_0=images(0), arr_1=np.zeros(12, "int64"))
    write_folder(tmp_path / "reference", images(1, 20))
    return tmp_path


def run(folder, *flags, samples="samples.npz", reference="reference", output="report.json"):
    """Runs the tool in this process; returns the report."""
    arguments = ["--samples", folder / samples] if samples else []
    arguments += ["--reference", folder / reference, "--output", folder / output, "--device", "cpu", *flags]
    main([str(argument) for argument in arguments])
    return json.loads((folder / output).read_text()) if (folder / output).exists() else None


# -- Whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The golden arrays, and a folder with the samples and the references of its cases."""
    golden, folder = load_golden("evaluation_pipeline"), tmp_path_factory.mktemp("pipeline")
    np.savez(folder / "samples.npz", arr_0=golden["samples"])
    np.savez(folder / "images.npz", arr_0=golden["reference"])
    stored = {"arr_0": golden["reference"]}
    for tail in ("", "_s"):
        factor, variance = (golden[f"reference_{name}{tail}"].astype("float64") for name in ("factor", "variance"))
        stored |= {f"mu{tail}": golden[f"reference_mu{tail}"].astype("float64")}
        stored |= {f"sigma{tail}": factor.T @ factor + np.diag(variance)}
    np.savez(folder / "stored.npz", **stored)
    return golden, folder


@pytest.fixture
def remembered(monkeypatch, known={}):  # noqa: B006 (two cases have the same features)
    """Lets the Inception compute a batch once, which takes most of the time."""

    def call(self, pixels, original=Inception.__call__):
        key = self.settings["preprocessing"], pixels.tobytes()
        if key not in known:
            known[key] = original(self, pixels)
        return known[key]

    monkeypatch.setattr(Inception, "__call__", call)


CASES = {"images": ("images.npz", "adm"), "stored": ("stored.npz", "adm"), "pytorch_fid": ("images.npz", "pytorch-fid")}


@pytest.mark.parametrize("case", CASES)
def test_whole_runs_give_the_official_numbers(case, pipeline, inception_weights, remembered):
    """Tolerances are those of tests/golden/README.md."""
    golden, folder = pipeline
    reference, preprocessing = CASES[case]
    flags = ("--inception", inception_weights, "--preprocessing", preprocessing)
    found = run(folder, *flags, reference=reference, output=f"{case}.json")
    b = {name: float(golden[f"{case}_{name}"]) for name in OF_CASE}
    assert (found["num_samples"], found["num_reference"]) == (60, 80)
    for name in ("fid", "sfid"):
        assert abs(found[name] - b[name]) <= max(1e-3, 1e-4 * abs(b[name]))
    assert abs(found["inception_score"] / b["inception_score"] - 1) <= 1e-4
    for name in ("precision", "recall"):
        assert abs(found[name] - b[name]) <= b[f"{name}_fragile"] + 1e-12
    assert abs(found["kid"] - b["kid"]) <= 4e-6 * b["kid_size"] + 6 * b["kid_sd"]
    assert abs(found["mind"] - b["mind_mean"]) <= 6 * b["mind_sd"]


# -- What is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_in_blocks_from_any_image_on(save, tmp_path):
    pixels = images(0)
    save(tmp_path / "a.npz", arr_0=pixels)
    found = open_images(str(tmp_path / "a.npz"))
    assert len(found) == 12 and found.image_size == (16, 16)
    blocks = list(found.batches(3, 2, 10))
    assert [len(block) for block in blocks] == [3, 3, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), pixels[2:10])
    np.testing.assert_array_equal(np.concatenate(list(found.batches(5))), pixels)


def test_a_large_npz_takes_the_memory_of_a_batch(tmp_path):
    import tracemalloc

    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((4000, 64, 64, 3), "uint8"))  # 49 MB
    tracemalloc.start()
    assert sum(len(batch) for batch in open_images(str(tmp_path / "a.npz")).batches(50)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_a_folder_is_sorted_by_path_and_converted_by_pillow(tmp_path):
    colours = {"b.png": "RGBA", "a/z.jpg": "L", "a/b.JPEG": "CMYK", "c.png": "P"}
    (tmp_path / "a").mkdir()
    for number, (name, mode) in enumerate(colours.items()):
        Image.fromarray(images(number, 1)[0]).convert(mode).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "d.png").symlink_to(tmp_path / "gone.png")
    found = open_images(str(tmp_path))
    assert "notes.txt" in found.notes[0] and "lead nowhere" in found.notes[1] and "d.png" in found.notes[1]
    expected = [np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in sorted(colours)]
    np.testing.assert_array_equal(np.concatenate(list(found.batches(3))), expected)
    np.testing.assert_array_equal(np.concatenate(list(found.batches(1, 1, 3))), expected[1:3])


def test_image_size_crops_as_training_does(tmp_path):
    from features.images import load_pixels

    for number, (width, height) in enumerate([(40, 24), (20, 60)]):
        Image.fromarray(images(number, 1, (height, width))[0]).save(tmp_path / f"{number}.png")
    found = open_images(str(tmp_path), image_size=16)
    expected = [load_pixels(str(tmp_path / f"{number}.png"), 16) for number in (0, 1)]
    np.testing.assert_array_equal(next(found.batches(2)), expected)
    np.savez(tmp_path / "a.npz", arr_0=images(0, 2, (24, 40)))
    Image.fromarray(images(0, 2, (24, 40))[1]).save(tmp_path / "one.png")
    cropped = next(open_images(str(tmp_path / "a.npz"), image_size=16).batches(2))
    np.testing.assert_array_equal(cropped[1], load_pixels(str(tmp_path / "one.png"), 16))


# -- What is refused --------------------------------------------------------------------------------------------------


def header(shape, dtype="|u1"):
    """A .npy header."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue()


def save(name="samples.npz", **arrays):
    return lambda folder: np.savez(folder / name, **arrays)


def truncate(folder):
    data = (folder / "samples.npz").read_bytes()
    (folder / "samples.npz").write_bytes(data[: len(data) // 2])


def spoil_pixels(folder):
    data = bytearray((folder / "samples.npz").read_bytes())
    data[1000] ^= 1
    (folder / "samples.npz").write_bytes(data)


def claim_more_than_there_is(folder):
    with zipfile.ZipFile(folder / "samples.npz", "w") as archive:
        archive.writestr("arr_0.npy", header((50_000, 256, 256, 3)) + bytes(1000))


def empty_folder(folder):
    shutil.rmtree(folder / "reference")
    (folder / "reference").mkdir()
    (folder / "reference" / "a.webp").write_bytes(b"")


def another_size_within(folder):
    Image.new("RGB", (32, 16)).save(folder / "reference" / "zz.png")


def broken_image(folder):
    path = folder / "reference" / "005.png"
    path.write_bytes(path.read_bytes()[:300])


def statistics(width=48, **more):
    spread = {"mu": np.zeros(width), "sigma": np.eye(width), "mu_s": np.zeros(16), "sigma_s": np.eye(16)}
    return {name: value for name, value in {**spread, **more}.items() if value is not None}


FLOATS = (images(0) / 255).astype("float32")
STATISTICS = ("--reference", "{}/r.npz")
MISTAKES = {
    "truncated": (truncate, [], r"samples.npz: not a readable .npz file \(truncated\?\)"),
    "changed bytes": (spoil_pixels, [], "samples.npz: not a readable .npz file.*CRC"),
    "header beyond the file": (claim_more_than_there_is, [], "arr_0 should have 9,830,400,128 bytes, and has 1,128"),
    "objects": (save(arr_0=np.array([{}], object)), [], "samples.npz: not a readable .npz file.*object"),
    "floats": (save(arr_0=FLOATS), [], r"arr_0 is float32 \(12, 16, 16, 3\), not scaled.*expected images, uint8"),
    "other integers": (save(arr_0=images(0).astype("int32")), [], "arr_0 is int32 .*expected images, uint8"),
    "labels": (save(arr_0=np.zeros(12, "int64")), [], r"int64 \(12,\), which looks like labels; expected images"),
    "no arr_0": (save(labels=np.zeros(12), x=images(0)), [], "no images: expected arr_0.*found labels, x"),
    "channels first": (save(arr_0=images(0).transpose(0, 3, 1, 2)), [], r"arr_0 is uint8 \(12, 3, 16, 16\); expected"),
    "one image": (save(arr_0=images(0)[:1]), [], "samples.npz: holds one image"),
    "no images": (save(arr_0=images(0)[:0]), [], r"arr_0 is \(0, 16, 16, 3\); expected"),
    "not there": (None, ["--samples", "{}/gone"], "gone: there is no such file or folder"),
    "empty folder": (empty_folder, [], "reference: no images in this folder; expected .png, .jpg, .jpeg"),
    "sizes within a folder": (another_size_within, [], "zz.png: is of 32x16, 000.png of 16x16.*--image_size"),
    "broken image": (broken_image, [], "005.png: cannot be read as an image"),
    "sizes of the sets": (
        save(arr_0=images(0, size=(32, 16))),
        [],
        "reference: holds images of 16x16, the samples are of 16x32; expected one size",
    ),
    "no covariance": (save("r.npz", **statistics(sigma=None)), STATISTICS, "r.npz: holds mu but no sigma"),
    "covariance of another size": (
        save("r.npz", **statistics(sigma=np.eye(47))),
        STATISTICS,
        r"expected mu \(D,\) and sigma \(D, D\), floats, found mu float64 \(48,\), sigma float64 \(47, 47\)",
    ),
    "NaN in statistics": (save("r.npz", **statistics(mu=np.full(48, np.nan))), STATISTICS, "mu holds NaN or inf"),
    "statistics of other features": (
        save("r.npz", **statistics(40)),
        STATISTICS,
        "r.npz: mu is of 40 features, this network's pool has 48",
    ),
    "statistics of another preprocessing": (
        save("r.npz", **statistics(settings=np.array('{"preprocessing": "pytorch-fid"}'))),
        STATISTICS,
        "r.npz: statistics of other features: preprocessing pytorch-fid, not adm",
    ),
    "sFID without its statistics": (
        save("r.npz", **statistics(mu_s=None, sigma_s=None)),
        [*STATISTICS, "--metrics", "fid", "sfid"],
        "sfid is impossible: the reference .*r.npz holds neither images nor mu_s and sigma_s",
    ),
    "precision without images": (
        save("r.npz", **statistics()),
        [*STATISTICS, "--metrics", "recall"],
        "recall is impossible: the reference .*r.npz holds statistics and no images",
    ),
    "no covariance but a matrix": (
        save("r.npz", **statistics(sigma=-np.eye(48))),
        STATISTICS,
        "r.npz: sigma: not symmetric, or negative on its diagonal",
    ),
    "no metric": (None, ["--metrics", ","], "--metrics: names none"),
    "unknown metric": (None, ["--metrics", "fid", "lpips"], "lpips is unknown; expected some of fid, sfid, "),
    "statistics of statistics": (
        save("r.npz", **statistics()),
        [*STATISTICS, "--save_statistics", "{}/s.npz"],
        "--save_statistics: .*r.npz holds statistics and no images",
    ),
    "Fortran order": (save("r.npz", arr_0=np.asfortranarray(images(0))), STATISTICS, "r.npz: arr_0 is in Fortran"),
    "settings of other samples": (
        lambda folder: (folder / "samples.json").write_text('{"num_images": 13}'),
        [],
        "samples.json: tells of 13 images, there are 12",
    ),
    "two kinds of samples": (None, ["--vae", "x"], "--samples and --vae: give one"),
    "a set as output": (
        None,
        ["--output", "{}/samples.npz", "--overwrite"],
        "--output .*samples.npz: is a file that is",
    ),
    "batch size": (None, ["--batch_size", "0"], "--batch_size must be a positive integer, got 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(mistake, sets, blocks):
    spoil, flags, words = MISTAKES[mistake]
    if spoil:
        spoil(sets)
    before = {path: path.read_bytes() for path in sets.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as error:
        run(sets, *(flag.format(sets) for flag in flags))
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in sets.rglob("*") if path.is_file()} == before


def test_what_ends_one_rank_can_be_sent_to_the_others(sets):
    broken_image(sets)
    with pytest.raises(ValueError) as error:
        list(open_images(str(sets / "reference")).batches(4))
    sent = pickle.loads(pickle.dumps(error.value))
    assert type(sent) is type(error.value) and str(sent) == str(error.value)


def test_features_that_are_not_finite_name_the_image(sets, blocks):
    class Broken(Blocks):
        def __call__(self, pixels):
            found = super().__call__(pixels)
            found["pool"][(pixels == images(0)[7]).all(axis=(1, 2, 3)), 3] = np.nan
            return found

    blocks(Broken())
    with pytest.raises(ValueError, match=r"samples.npz: the features \(pool\) of image 7, counted from 0, hold NaN"):
        run(sets, "--batch_size", "5")


def test_sfid_of_features_without_places(sets, blocks, capsys):
    blocks(Blocks(outputs=("pool", "logits")))
    with pytest.raises(ValueError, match="sfid is impossible: these features have no output 'spatial'"):
        run(sets, "--metrics", "sfid")
    found = run(sets)
    assert found["sfid"] is None and all(found[name] is not None for name in METRICS if name != "sfid")
    assert re.search("^sFID +- +these features have no output 'spatial'$", capsys.readouterr().out, re.MULTILINE)


def test_files_are_replaced_only_with_overwrite(sets, blocks):
    (sets / "report.json").write_text("mine")
    with pytest.raises(ValueError, match="--output .*report.json: exists already"):
        run(sets)
    (sets / "s.npz").write_text("mine")
    with pytest.raises(ValueError, match="--save_statistics .*s.npz: exists already"):
        run(sets, "--save_statistics", str(sets / "s.npz"), output="other.json")
    assert (sets / "report.json").read_text() == (sets / "s.npz").read_text() == "mine"
    run(sets, "--save_statistics", str(sets / "s.npz"), "--overwrite")
    assert json.loads((sets / "report.json").read_text())["num_samples"] == 12 and np.load(sets / "s.npz")["mu"].size


# -- What is computed and told ----------------------------------------------------------------------------------------


def test_stored_statistics_are_the_reference_and_come_back(sets, blocks, capsys):
    direct = run(sets, "--batch_size", "7")
    alone = run(sets, "--save_statistics", str(sets / "s.npz"), samples=None)
    assert alone is not None  # that of the first run
    stored = run(sets, reference="s.npz", output="stored.json")
    assert stored["num_reference"] == 20
    for name in ("fid", "sfid", "inception_score"):
        np.testing.assert_allclose(stored[name], direct[name], rtol=1e-9)
    assert stored["precision"] is None and stored["mind"] is None
    features = Blocks()(images(1, 20))
    with np.load(sets / "s.npz") as arrays:
        for output, tail in (("pool", ""), ("spatial", "_s")):
            rows = features[output].astype("float64")
            np.testing.assert_allclose(arrays[f"mu{tail}"], rows.mean(0), rtol=1e-12)
            np.testing.assert_allclose(arrays[f"sigma{tail}"], np.cov(rows, rowvar=False), atol=1e-12)
    assert "statistics of other features" not in capsys.readouterr().out
    told = "s.npz: statistics of other features: weights_sha256 000.*, not 111"
    blocks(Blocks(settings={**Blocks.settings, "weights_sha256": "1" * 64}))
    with pytest.raises(ValueError, match=told):
        run(sets, "--metrics", "fid,sfid", reference="s.npz", output="other.json")
    # Inception's weights are the same in more than one format.
    blocks(Blocks(settings={**Blocks.settings, "features": "inception"}))
    run(sets, "--save_statistics", str(sets / "i.npz"), samples=None)
    blocks(Blocks(settings={**Blocks.settings, "features": "inception", "weights_sha256": "1" * 64}))
    run(sets, "--metrics", "fid,sfid", reference="i.npz", output="other.json")
    assert re.search(told.replace("s.npz", "i.npz"), capsys.readouterr().out)


def test_distances_take_stored_statistics_and_the_others_the_images(sets, blocks, capsys):
    whole = {**statistics(mu=np.ones(48)), "arr_0": images(1, 20)}
    np.savez(sets / "both.npz", **whole)
    np.savez(sets / "alone.npz", **statistics(mu=np.ones(48)))
    both, alone, direct = (
        run(sets, reference=name, output=f"{name}.json") for name in ("both.npz", "alone.npz", "reference")
    )
    said = capsys.readouterr().out
    assert (
        said.count("12 samples for 48 features") == 2 and said.count("12 samples and 20 reference images for 48") == 1
    )
    for name in METRICS:
        assert both[name] == (alone if name in ("fid", "sfid") else direct)[name]
    assert direct["fid"] != both["fid"] and both["num_reference"] == 20 and alone["num_reference"] is None


def test_batches_and_the_form_of_a_set_change_nothing(sets, blocks):
    write_folder(sets / "folder", images(0))
    np.savez_compressed(sets / "reference.npz", arr_0=images(1, 20))
    one = run(sets, output="1.json")
    other = run(sets, "--batch_size", "5", samples="folder", reference="reference.npz", output="2.json")
    for name in METRICS:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-9)


@pytest.mark.distributed
def test_ranks_share_the_work_and_tell_what_one_does(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=images(0, 21))
    write_folder(tmp_path / "reference", images(1, 20))
    one = run(tmp_path, "--features", "digits", "--save_statistics", str(tmp_path / "one.npz"))
    flags = ["--samples", tmp_path / "samples.npz", "--reference", tmp_path / "reference", "--features", "digits"]
    flags += ["--batch_size", "4", "--device", "cpu", "--output", tmp_path / "two.json"]
    done = launch(2, "tools/evaluate.py", [*flags, "--save_statistics", tmp_path / "two.npz"], tmp_path / "log")
    log = (tmp_path / "log" / "workerlog.0").read_text()
    assert done.returncode == 0, log
    two = json.loads((tmp_path / "two.json").read_text())
    for name in ("num_samples", "num_reference", "sfid", "precision", "recall"):
        assert two[name] == one[name]
    for name in ("fid", "inception_score", "kid", "mind"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5)
    with np.load(tmp_path / "one.npz") as ours, np.load(tmp_path / "two.npz") as theirs:
        np.testing.assert_allclose(theirs["sigma"], ours["sigma"], atol=1e-6)
    assert log.count("report: ") == 1 and "report: " not in (tmp_path / "log" / "workerlog.1").read_text()


def test_report_and_table_tell_what_a_number_belongs_to(sets, blocks, capsys):
    drawn = {"num_images": 12, "guidance_scale": 1.5, "weights": {"sha256": "ab"}}
    (sets / "samples.json").write_text(json.dumps(drawn))
    found = run(sets, "--seed", "3", "--metrics", "fid", "kid")
    settings = found["settings"]
    assert settings["samples"]["settings"] == drawn
    assert settings["features"] == "blocks" and settings["weights_sha256"] == "0" * 64 and settings["seed"] == 3
    assert settings["reference"]["kind"] == "folder" and settings["precision_recall_k"] == 3
    assert settings["versions"]["numpy"] == np.__version__ and found["kid_standard_error"] > 0
    assert found["sfid"] is None and found["num_samples"] == 12 and found["num_reference"] == 20
    said = capsys.readouterr().out
    assert "guidance_scale 1.5" in said and "samples.npz (12 images of 16x16)" in said
    assert "FID of N = 12 samples: biased upwards" in said
    assert "12 samples and 20 reference images for 48 features: the covariances are singular" in said
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["metric", "FID", "KID", "report:"]
    assert f"{found['fid']:.6g}" in lines[-3] and "N = 12" in lines[-3]


def test_a_json_beside_the_samples_may_be_something_else(sets, blocks):
    run(sets, output="samples.json")  # a report
    assert run(sets, output="second.json")["settings"]["samples"]["settings"] is None
    (sets / "samples.json").write_text("[1, 2]")
    assert run(sets, output="third.json")["settings"]["samples"]["settings"] is None


def test_selfcheck_compares_with_the_published_values(sets, blocks, capsys, monkeypatch):
    first = run(sets)
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    monkeypatch.setattr(reports, "PUBLISHED", {name: (first[name] + 0.009, 0.01) for name in names})
    found = run(sets, "--selfcheck", "--overwrite")
    assert found["kid"] is None and capsys.readouterr().out.count(": agrees") == 5
    reports.PUBLISHED["sfid"] = (first["sfid"] + 0.011, 0.01)
    with pytest.raises(SystemExit) as end:
        run(sets, "--selfcheck", "--overwrite")
    said = capsys.readouterr().out
    assert end.value.code == 1 and said.count(": agrees") == 4 and re.search(r"^sFID: .*: DIFFERS$", said, re.MULTILINE)


# -- Reconstructions --------------------------------------------------------------------------------------------------


def test_psnr_and_ssim_are_their_definitions():
    x, y = images(2, 3, (16, 20)), images(3, 3, (16, 20))
    y[1] = x[1] // 2 + 60
    y[2] = x[2]
    expected = [10 * np.log10(255**2 / np.mean((a - b.astype("float64")) ** 2)) for a, b in zip(x[:2], y, strict=False)]
    np.testing.assert_allclose(psnr(x, y), [*expected, np.inf])
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        for row, column in np.ndindex(16 - 10, 20 - 10):
            a, b = (z[1, row : row + 11, column : column + 11, channel].astype("float64") for z in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + 6.5025)
                * (2 * both + 58.5225)
                / ((mean_a**2 + mean_b**2 + 6.5025) * (var_a + var_b + 58.5225))
            )
    np.testing.assert_allclose(ssim(x, y)[1:], [np.mean(values), 1.0], rtol=1e-9)


def test_reconstructions_of_an_autoencoder(tmp_path, blocks, capsys):
    import paddle

    from features.autoencoder import load_vae

    vae = str(ROOT / "assets" / "digits_vae")
    pixels = images(1, 5, (32, 32))
    write_folder(tmp_path / "reference", pixels)
    found = run(tmp_path, "--vae", vae, "--batch_size", "2", "--metrics", "fid", samples=None)
    with paddle.no_grad():
        network = load_vae(vae)
        x = paddle.to_tensor(pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
        decoded = network.decode(network.encode(x).latent_dist.mean).sample.numpy()
    decoded = (decoded.transpose(0, 2, 3, 1) * 127.5 + 128).clip(0, 255).astype("uint8")
    assert found["num_samples"] == found["num_reference"] == 5
    np.testing.assert_allclose(found["psnr"], psnr(pixels, decoded).mean(), rtol=1e-3)
    np.testing.assert_allclose(found["ssim"], ssim(pixels, decoded).mean(), rtol=1e-3)
    np.savez(tmp_path / "samples.npz", arr_0=decoded)
    given = run(tmp_path, "--metrics", "fid", output="given.json")
    np.testing.assert_allclose(found["fid"], given["fid"], rtol=1e-2)
    assert found["settings"]["vae"]["latents"] == "mean of the posterior"
    assert re.search("^PSNR .*dB", capsys.readouterr().out, re.MULTILINE)
