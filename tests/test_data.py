"""Feature sets: pairs and packed, their order, flips, posterior samples, parts, the index, and the loader."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support.feature_sets import SHAPE, dataset, everything, load, pack_set, sampler, write_set
from support.runs import ROOT, loop_arguments, read_losses, run_script, write_config, write_features

from features import pairs
from features.dataset import FeatureDataset
from features.layout import Layout
from features.loader import FeatureLoader
from features.packed import PackedStore, ShardWriter, finish, finished_shards
from features.store import find_features
from tools.pack_features import main as pack


def assert_same(batches, expected):
    assert len(batches) == len(expected) > 0
    for (x, y), (expected_x, expected_y) in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(x, expected_x)
        np.testing.assert_array_equal(y, expected_y)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same set of moments with mirrored twins, as pairs and packed into shards of 16."""
    folder = tmp_path_factory.mktemp("both")
    write_set(folder / "pairs", flip=True, moments=True)
    pack_set(folder / "pairs", folder / "packed", "--shard_samples", 16)
    return folder


# The two formats.

ORDERS = [
    (["10", "9", "100", "1", "02"], ["1", "02", "9", "10", "100"]),
    (["b2", "a10", "a9", "a", "b10"], ["a9", "a10", "a", "b2", "b10"]),
    (["img 3", "img 20", "图 1", "img 1"], ["img 1", "img 3", "img 20", "图 1"]),
]


@pytest.mark.parametrize(("names", "order"), ORDERS)
def test_packed_samples_are_those_of_the_pairs_in_natural_order(names, order, tmp_path):
    latents, _ = write_set(tmp_path / "pairs", names=names)
    source = dataset(tmp_path / "pairs")
    np.testing.assert_array_equal(everything(source)[0], latents[[names.index(name) for name in order]])
    target = dataset(pack_set(tmp_path / "pairs", tmp_path / "packed", "--shard_samples", 2))
    assert_same([everything(target)], [everything(source)])
    assert target[-1][0].dtype == np.float32 and target[-1][1].dtype == np.int64
    assert [os.fsdecode(name) for name in target.store.names()] == order
    back = pack_set(tmp_path / "packed", tmp_path / "back")
    for path in (tmp_path / "pairs").glob("*/*.npy"):
        assert (back / path.relative_to(tmp_path / "pairs")).read_bytes() == path.read_bytes()


def test_latents_without_the_leading_axis_and_of_other_dtypes(tmp_path):
    write_set(tmp_path / "pairs", 6, dtype="float16")
    for path in (tmp_path / "pairs/imagenet64_features").iterdir():
        np.save(path, np.load(path)[0])
    target = dataset(pack_set(tmp_path / "pairs", tmp_path / "packed"))
    assert target.store.dtype == np.float16  # kept, and no file grew
    assert_same([everything(target)], [everything(dataset(tmp_path / "pairs"))])


def write_npy(path, array, way):
    """A `.npy` file of an array in one of the ways that numpy may write it."""
    with open(path, "wb") as file:
        if way == "version 2":
            np.lib.format.write_array(file, array, version=(2, 0))
        elif way == "Fortran order":
            np.save(file, np.asfortranarray(array))
        elif way == "big-endian":
            np.save(file, array.astype(array.dtype.newbyteorder(">")))
        else:
            np.save(file, array)
        if way == "an array behind":
            np.save(file, array + 3)
        elif way == "zeros behind":
            file.write(bytes(8))


WAYS = ["an array behind", "zeros behind", "version 2", "Fortran order", "big-endian", "plain"]


def test_files_are_read_as_numpy_reads_them_however_often(tmp_path):
    """The first array counts, whatever stands behind it, and whichever file was read before."""
    rng = np.random.default_rng(3)
    names = [f"{way} {copy}" for copy in range(2) for way in WAYS]
    write_set(tmp_path, names=names)
    latents, labels = rng.standard_normal((len(names), 1, *SHAPE)).astype("float32"), np.arange(len(names)) % 7
    for index, name in enumerate(names):
        write_npy(tmp_path / f"imagenet64_features/{name}.npy", latents[index], name[:-2])
        label = np.array(labels[index]) if index % 2 else labels[index : index + 1]  # of no dimension, or of one
        write_npy(tmp_path / f"imagenet64_labels/{name}.npy", label, name[:-2])
    data = dataset(tmp_path)
    place = {os.fsdecode(name): index for index, name in enumerate(data.store.names())}
    order = np.array([place[name] for name in names])
    for start in range(len(names)):
        rolled = np.roll(np.arange(len(names)), start).repeat(2)
        found, classes = data.read(order[rolled])
        np.testing.assert_array_equal(found, latents[rolled, 0])
        assert classes.tolist() == labels[rolled].tolist()


def test_float16_on_request(tmp_path, capsys):
    latents, _ = write_set(tmp_path / "pairs", 6)
    target = dataset(pack_set(tmp_path / "pairs", tmp_path / "packed", "--dtype", "float16"))
    np.testing.assert_array_equal(everything(target)[0], latents.astype("float16").astype("float32"))
    assert "stored as float16, the largest rounding error is" in capsys.readouterr().out
    np.save(tmp_path / "pairs/imagenet64_features/3.npy", np.full((1, *SHAPE), 1e6, "float32"))
    with pytest.raises(ValueError, match=r"latents up to 1e\+06 do not fit into float16"):
        pack_set(tmp_path / "pairs", tmp_path / "other", "--dtype", "float16")
    assert not (tmp_path / "other/imagenet64_packed").exists()


def test_mixed_dtypes_are_not_rounded_unasked(tmp_path):
    latents, _ = write_set(tmp_path / "pairs", 6, dtype="float16")
    np.save(tmp_path / "pairs/imagenet64_features/3.npy", np.full((1, *SHAPE), 1 / 3, "float32"))
    data = dataset(tmp_path / "pairs")
    assert_same([everything(data.in_memory())], [everything(data)])
    with pytest.raises(ValueError, match="row 3: is not the same as .*3.npy; were its dtypes mixed"):
        pack_set(tmp_path / "pairs", tmp_path / "packed")
    assert not (tmp_path / "packed/imagenet64_packed").exists()


def test_packing_goes_on_after_a_kill_with_the_same_result(both, tmp_path, monkeypatch):
    def dying(self, *arguments, append=ShardWriter.append):
        if self.path.endswith("2"):
            raise OSError(28, "No space left on device", self.path)
        append(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(ShardWriter, "append", dying)
        pack_set(both / "pairs", tmp_path, "--shard_samples", 16)
    assert sorted(os.listdir(tmp_path / "imagenet64_packed.partial")) == ["shard-00000", "shard-00001"]
    with pytest.raises(ValueError, match="is not finished; run again the command that writes it"):
        find_features(tmp_path, 64)
    with pytest.raises(ValueError, match="another conversion is not finished: its shard_samples was 16, now it is 20"):
        pack_set(both / "pairs", tmp_path, "--shard_samples", 20)
    first = (tmp_path / "imagenet64_packed.partial/shard-00000/latents.npy").stat().st_mtime_ns
    (tmp_path / "imagenet64_packed.partial/.shard-00002.partial").mkdir()  # what a real kill leaves
    pack_set(both / "pairs", tmp_path, "--shard_samples", 16)
    assert (tmp_path / "imagenet64_packed/shard-00000/latents.npy").stat().st_mtime_ns == first
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(both / "packed") for path in (both / "packed").rglob("*") if path.is_file())
    assert all((tmp_path / name).read_bytes() == (both / "packed" / name).read_bytes() for name in files)


@pytest.mark.parametrize("moved", [(), ("checksums.txt", "labels")])
def test_unpacking_goes_on_after_a_kill(moved, both, tmp_path):
    whole = pack_set(both / "packed", tmp_path / "whole")
    broken = tmp_path / "broken"
    # As a kill leaves it: half of the files written, or all of them compared and some folders moved.
    shutil.copytree(whole, broken)
    work = broken / "imagenet64_unpacking"
    work.mkdir()
    for name in ("features", "features_flip", "labels", "checksums.txt"):
        if name not in moved:
            (broken / f"imagenet64_{name}").rename(work / f"imagenet64_{name}")
    if moved:
        (work / "compared").touch()
    else:
        (work / "imagenet64_features/3.npy").write_bytes(b"\x93NUMPY")
        (work / "imagenet64_labels/30.npy").unlink()
    (broken / "imagenet64_manifest.json").unlink()
    plan = {"to": "npy", "samples": 40}
    (broken / "imagenet64_to_npy.json").write_text(json.dumps(plan))
    pack_set(both / "packed", broken)
    files = sorted(path.relative_to(broken) for path in broken.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert all((broken / name).read_bytes() == (whole / name).read_bytes() for name in files)


def test_packing_never_overwrites(both, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in both.rglob("*") if path.is_file()}
    for source, output in (("pairs", "packed"), ("packed", "pairs")):
        with pytest.raises(ValueError, match="is there already; nothing was overwritten"):
            pack_set(both / source, both / output)
    with pytest.raises(ValueError, match="is the source's folder; choose another"):
        pack_set(both / "packed", both / "packed", "--to", "packed")
    with pytest.raises(ValueError, match="is in pairs of .npy files already"):
        pack_set(both / "pairs", tmp_path / "new", "--to", "npy")
    assert before == {path: path.stat().st_mtime_ns for path in both.rglob("*") if path.is_file()}
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_is_no_finished_conversion(both, tmp_path):
    (tmp_path / "out/imagenet64_packed").mkdir(parents=True)
    pack_set(both / "pairs", tmp_path / "out")
    assert len(PackedStore(str(tmp_path / "out/imagenet64_packed"))) == 40


def test_manifest_and_classes_travel_with_the_samples(tmp_path):
    write_set(tmp_path / "pairs", 12)
    manifest = {"version": 1, "format": "npy", "name": "imagenet64", "num_samples": 12, "seed": 3, "moments": False}
    (tmp_path / "pairs/imagenet64_manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "pairs/imagenet64_classes.json").write_text('{"id2label": {"0": "a"}}')
    output = pack_set(tmp_path / "pairs", tmp_path / "packed")
    written = json.loads((output / "imagenet64_manifest.json").read_text())
    assert (written["format"], written["seed"], written["num_samples"]) == ("packed", 3, 12)
    assert written["class_counts"] == [2, 2] + [1] * 8 and written["dtype"] == "float32"
    rows = np.stack([np.load(path)[0] for path in (tmp_path / "pairs").glob("*_features/*.npy")])
    np.testing.assert_allclose(written["channel_std"], rows.std(axis=(0, 2, 3), dtype="float64"), rtol=1e-6)
    assert (output / "imagenet64_classes.json").read_text() == '{"id2label": {"0": "a"}}'
    back = json.loads((pack_set(output, tmp_path / "back") / "imagenet64_manifest.json").read_text())
    assert {**back, "format": "packed", "checksums": written["checksums"]} == written and back["format"] == "npy"


def test_several_shards_empty_ones_and_exact_reads(both, tmp_path):
    """Shards of any size, reads in any order, and the way of reading for sets larger than the memory."""
    latents, _ = write_set(tmp_path / "pairs", 9)
    folder = Layout(tmp_path, "imagenet64").partial
    for number, (start, stop) in enumerate(((0, 4), (4, 4), (4, 5), (5, 9))):
        with ShardWriter(folder, number * 3, row_shape=SHAPE) as shard:
            for first in range(start, stop, 3):
                part = latents[first : min(first + 3, stop)]
                shard.append(
                    part, np.arange(first, first + len(part)), [str(i) for i in range(first, first + len(part))]
                )
    assert finished_shards(folder) == {0: 4, 3: 0, 6: 1, 9: 4}
    finish(tmp_path, "imagenet64")
    data = dataset(tmp_path)
    order = np.random.default_rng(0).integers(0, 9, 50)
    for _ in range(2):
        x, y = data.read(order)
        np.testing.assert_array_equal(x, latents[order])
        np.testing.assert_array_equal(y, order)
        data.store.read_exactly()
    assert data.store.exact_reads
    mirrored = dataset(both / "packed", flip=True)
    expected = everything(mirrored, np.arange(40))
    mirrored.store.read_exactly()
    assert_same([everything(mirrored, np.arange(40))], [expected])


def test_a_shard_is_there_whole_or_not_at_all(tmp_path):
    row = np.zeros((1, *SHAPE), "float32")
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 0, row_shape=SHAPE) as shard:
        shard.append(row, [0], ["0"])
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    for arguments, message in (
        ((row, [0], ["0"], row), "mirrored latents not expected"),
        ((row[0], [0], ["0"]), r"latents.npy got \(4, 8, 8\) .* expected \(m, 4, 8, 8\)"),
        ((row, [0, 1], ["0"]), r"with labels \(2,\) and 1 names"),
    ):
        with pytest.raises(ValueError, match=message), ShardWriter(tmp_path, 0, row_shape=SHAPE) as shard:
            shard.append(*arguments)
    assert os.listdir(tmp_path) == []
    with ShardWriter(tmp_path, 0, row_shape=SHAPE) as shard:
        shard.append(row, [0], ["0"])
    with (
        pytest.raises(ValueError, match="shard-00000: is there already"),
        ShardWriter(tmp_path, 0, row_shape=SHAPE),
    ):
        pass


# Mistakes.


def truncate(folder):
    path = folder / "shard-00001/latents.npy"
    path.write_bytes(path.read_bytes()[:-100])


def remove_file(folder):
    (folder / "shard-00001/labels.npy").unlink()


def remove_twins(folder):
    (folder / "shard-00001/flipped.npy").unlink()


def other_shape(folder):
    np.save(folder / "shard-00001/latents.npy", np.zeros((16, 8, 4, 4), "float32"))


def other_dtype(folder):
    np.save(folder / "shard-00000/latents.npy", np.zeros((16, 8, 8, 8)))


def fewer_labels(folder):
    np.save(folder / "shard-00001/labels.npy", np.zeros(15, "int64"))


def wrong_label(folder):
    labels = np.load(folder / "shard-00001/labels.npy")
    labels[3] = 10
    np.save(folder / "shard-00001/labels.npy", labels)


def no_shard(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def only_shapes(folder):
    for path in folder.glob("*/*.npy"):
        if path.name in ("latents.npy", "flipped.npy"):
            np.save(path, np.load(path)[:, :, :4, :4])


def unfinished(folder):
    (folder.parent / "imagenet64_extraction").mkdir()


PACKED_MISTAKES = [
    (truncate, r"shard-00001/latents.npy: not a readable .npy file \(truncated\?\)"),
    (remove_file, "shard-00001/labels.npy: is missing"),
    (remove_twins, "shard-00001: flipped.npy must be in every shard, or in none"),
    (other_shape, r"shard-00001/latents.npy: holds float32 of shape \(16, 8, 4, 4\), the first shard float32 of shape"),
    (other_dtype, "shard-00000/latents.npy: holds float64 .*, expected float32 or float16"),
    (fewer_labels, "shard-00001/latents.npy: holds 16 rows, its labels.npy 15"),
    (wrong_label, r"shard-00001/labels.npy row 3: label 10 is outside the config's num_classes: 0..9"),
    (no_shard, "imagenet64_packed: no shard-NNNNN/ folder in it"),
    (only_shapes, r"latents.npy row 0: holds float32 of shape \(8, 4, 4\), the config's model takes .* \(4, 8, 8\)"),
    (unfinished, "the extraction of imagenet64 is not finished; run the same command again"),
]


@pytest.mark.parametrize(("spoil", "message"), PACKED_MISTAKES, ids=[spoil.__name__ for spoil, _ in PACKED_MISTAKES])
def test_packed_mistakes_are_one_line(both, tmp_path, spoil, message):
    shutil.copytree(both / "packed", tmp_path / "data")
    spoil(tmp_path / "data/imagenet64_packed")
    with pytest.raises(ValueError, match=message) as caught:
        dataset(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_manifest_with_a_seed_beyond_todays_range_is_read(tmp_path):
    write_set(tmp_path, 4)
    (tmp_path / "imagenet64_manifest.json").write_text(f'{{"seed": {3**60}, "moments": false}}')
    assert len(dataset(tmp_path)) == 4


def test_a_tar_file_of_features_is_refused_with_the_command_that_unpacks_it(tmp_path):
    (tmp_path / "my data").mkdir()
    tar = tmp_path / "my data/set.tar"
    with tarfile.open(tar, "w") as file:
        file.add(write_features(tmp_path / "set", 4), "set")
    for asked in (tar, tar.with_suffix(""), tar.parent):
        with pytest.raises(ValueError, match=re.escape(f"{asked}: ")) as error:
            find_features(str(asked), 64)
        command = re.search(r"unpack set.tar first: (tar .*), and give the folder", str(error.value))[1]
    subprocess.run(command, shell=True, check=True)
    assert len(dataset(tmp_path / "my data/set")) == 4


def test_mistakes_of_a_mirrored_set_of_pairs(tmp_path):
    write_set(tmp_path, 6, flip=True)
    with pytest.raises(ValueError, match="flips were asked for, but no mirrored latents are there"):
        dataset(write_features(tmp_path / "plain", 3), flip=True)
    (tmp_path / "imagenet64_features_flip/3.npy").unlink()
    with pytest.raises(ValueError, match="features/3.npy: has no counterpart in .*features_flip"):
        dataset(tmp_path)
    np.save(tmp_path / "imagenet64_features_flip/3.npy", np.zeros((1, 4, 2, 2), "float32"))
    data = dataset(tmp_path, flip=True)
    with pytest.raises(
        ValueError, match=r"features_flip/3.npy: holds float32 of shape \(4, 2, 2\), the config's model"
    ):
        for _ in load(data, steps=20):
            pass


def test_packed_wins_over_pairs_and_says_so(both, tmp_path):
    shutil.copytree(both / "packed", tmp_path / "data")
    shutil.copytree(both / "pairs", tmp_path / "data", dirs_exist_ok=True)
    data = dataset(tmp_path / "data")
    assert data.features_dir.endswith("imagenet64_packed")
    (note,) = data.notes
    assert "imagenet64_packed is read, not" in note
    (tmp_path / "data/other_packed").mkdir()
    with pytest.raises(ValueError, match=r"several others \(imagenet64_packed, other_packed\); leave one"):
        find_features(tmp_path / "data", 512)
    assert find_features(tmp_path / "data", 64) == ("packed", "imagenet64")


def test_the_only_set_is_taken_for_another_image_size_and_that_is_said(both):
    for kind in ("pairs", "packed"):
        for resolution in (None, 64, 60):
            data = FeatureDataset(both / kind, resolution=resolution, sample_shape=SHAPE, num_classes=10)
            said = [note for note in data.notes if "image size 60: no imagenet60" in note and "imagenet64" in note]
            assert len(said) == (resolution == 60) and len(data) == 40


# What is drawn at a visit.


def test_flips_take_the_stored_twin_half_of_the_time(tmp_path):
    latents, mirrored = write_set(tmp_path, flip=True)
    data = dataset(tmp_path, flip=True)
    np.testing.assert_array_equal(everything(data)[0], latents)  # without a position: as they are
    visits = np.stack([everything(data, np.arange(40) + 40 * epoch)[0] for epoch in range(50)])  # (50, 40, C, h, w)
    flipped = (visits == mirrored).all(axis=(2, 3, 4))
    assert ((visits == latents).all(axis=(2, 3, 4)) ^ flipped).all()
    # 2,000 fair coins: 4.5 standard deviations each.
    assert abs(flipped.mean() - 0.5) < 0.05
    assert (np.abs(flipped.mean(axis=0) - 0.5) < 0.35).all() and (np.abs(flipped.mean(axis=1) - 0.5) < 0.36).all()
    other = np.stack([everything(dataset(tmp_path, flip=True, seed=1), np.arange(40))[0]])
    assert not np.array_equal(other[0], visits[0])


def test_posterior_samples_are_fresh_at_every_visit_and_normal(both):
    data = dataset(both / "pairs")
    rows, _ = write_set(both / "pairs", flip=True, moments=True)  # the same bytes again
    mean, std = np.split(rows, 2, axis=1)
    visits = [everything(data, np.arange(40) + 40 * epoch)[0] for epoch in range(4)]
    noise = (np.stack(visits) - mean) / std  # (4, 40, C, h, w)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    flat = noise.reshape(160, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(160)).max() < 0.35  # no two visits share their noise
    fixed = everything(data)[0]
    np.testing.assert_array_equal(fixed, everything(data)[0])
    assert not any(np.array_equal(fixed, visit) for visit in visits)
    np.testing.assert_array_equal(everything(dataset(both / "pairs", posterior="mean"), np.arange(40))[0], mean)
    assert not np.array_equal(everything(dataset(both / "pairs", seed=1), np.arange(40))[0], visits[0])


def test_latents_of_twice_the_channels_are_not_taken_for_moments(tmp_path):
    write_set(tmp_path, 3, moments=True)
    assert dataset(tmp_path).moments
    (tmp_path / "imagenet64_manifest.json").write_text('{"moments": false}')
    with pytest.raises(ValueError, match=r"holds float32 of shape \(8, 8, 8\), the config's model takes"):
        dataset(tmp_path)
    (tmp_path / "imagenet64_manifest.json").unlink()
    for path in (tmp_path / "imagenet64_features").iterdir():
        np.save(path, -np.load(path))  # no standard deviation is negative
    with pytest.raises(ValueError, match=r"holds float32 of shape \(8, 8, 8\), the config's model takes"):
        dataset(tmp_path)


@pytest.mark.parametrize("kind", ["pairs", "packed", "in memory"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_formats_and_workers_give_the_same_batches(both, kind, workers):
    expected = load(dataset(both / "pairs", flip=True, seed=5))
    data = dataset(both / ("packed" if kind == "packed" else "pairs"), flip=True, seed=5)
    data = data.in_memory() if kind == "in memory" else data
    assert_same(load(data, workers), expected)


def test_ranks_accumulation_and_resuming_change_nothing(both):
    data = dataset(both / "packed", flip=True)

    def global_batches(world, accumulation, first_step=0):
        ranks = []
        for rank in range(world):
            order = sampler(data, batch=12, accumulation=accumulation, rank=rank, world=world)
            order.resume(first_step, 12 * first_step)
            ranks.append([(x.numpy(), y.numpy()) for x, y in FeatureLoader(data, order, num_workers=1)])
        steps = len(ranks[0]) // accumulation
        parts = [
            [ranks[r][s * accumulation + m] for m in range(accumulation) for r in range(world)] for s in range(steps)
        ]
        return [tuple(np.concatenate(arrays) for arrays in zip(*step, strict=True)) for step in parts]

    positions = [positions for _, positions in sampler(data, batch=12, accumulation=3).batches()]
    np.testing.assert_array_equal(np.concatenate(positions), np.arange(9 * 12))  # in the whole stream
    expected = global_batches(1, 1)
    assert_same(global_batches(2, 1), expected)
    assert_same(global_batches(2, 3), expected)
    assert_same(global_batches(1, 4, first_step=5), expected[5:])


def test_each_loop_trains_alike_on_both_formats(tmp_path, features, run_loop):
    """The same losses, whatever the format, the loop and the number of workers."""
    pack(["--feature_path", str(features), "--output", str(tmp_path / "packed")])
    config = write_config(tmp_path / "Tiny.json")
    losses = []
    for loop, path in (("notrainer", features), ("notrainer", tmp_path / "packed"), ("trainer", tmp_path / "packed")):
        output = tmp_path / f"out{len(losses)}"
        arguments = loop_arguments(loop, config=config, features=path, output=output, steps=8)
        workers = "--num_workers=1" if loop == "notrainer" else "--dataloader_num_workers=1"
        run_loop(loop, [*arguments, workers])
        losses.append(read_losses(output))
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 8


def test_batches_that_do_not_fit_into_shared_memory_go_through_pipes(both, monkeypatch, capsys):
    data = dataset(both / "pairs", flip=True)
    expected = load(data)
    asked = []
    monkeypatch.setattr("features.loader.free_shared_memory", lambda: asked.append(1) or 100_000)
    assert_same(load(data, num_workers=2), expected)
    told = capsys.readouterr().out
    assert asked == [1] and told.count("note: /dev/shm has 0.1 MiB free") == 1
    # (2 * 2 + 4) batches of 8 samples of 4x8x8 float32 and a label, and two pages each.
    monkeypatch.setattr("features.loader.free_shared_memory", lambda: 8 * (8 * (4 * 256 + 8) + 8192))
    assert_same(load(data, num_workers=2), expected)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "2")  # which share it
    load(data, num_workers=2, steps=1)
    assert "were needed" in capsys.readouterr().out


def test_a_container_with_little_shared_memory(both, tmp_path):
    """As Docker's 64 MiB with larger batches."""
    mount = "mount -t tmpfs -o size=128k tmpfs /dev/shm"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False).returncode:
        pytest.skip("needs the right to mount a file system in a namespace of its own")
    (tmp_path / "load.py").write_text(
        f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from runtime.process import run_cli
from support.feature_sets import dataset, load
run_cli(lambda: print("batches", len(load(dataset(Path({str(both / "pairs")!r})), num_workers=2, batch=32))))
"""
    )
    command = ["unshare", "-m", "sh", "-c", f"{mount} && exec {sys.executable} {tmp_path / 'load.py'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and "batches 9" in done.stdout and "Traceback" not in done.stderr
    assert "note: /dev/shm has 0.1 MiB free" in done.stdout


def test_a_loader_process_that_dies_is_one_line(both):
    data = dataset(both / "pairs")
    others = multiprocessing.active_children()  # of tests before, which may still be ending
    batches = iter(FeatureLoader(data, sampler(data, steps=500), num_workers=1))
    next(batches)
    (child,) = [child for child in multiprocessing.active_children() if child not in others]
    with pytest.raises(ValueError, match="a loader process died. .* /dev/shm.* --num_workers 0 .*pack_features.py"):
        child.kill()
        for _ in batches:  # Paddle's handler raises here or there
            time.sleep(0.01)
    subprocess.run(["true"], check=True)  # said once, not again when another child ends


def test_an_error_in_the_loaders_thread_reaches_the_loop_and_the_thread_ends(both):
    data = dataset(both / "packed")
    batches = iter(FeatureLoader(data, sampler(data, steps=1000), num_workers=1))
    next(batches)
    assert any(thread.name.startswith("features") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("features") for thread in threading.enumerate())
    data.store.labels[7] = 99
    with pytest.raises(ValueError, match="row 7: label 99 is outside the config's num_classes"):
        load(data, 1)
    assert not any(thread.name.startswith("features") for thread in threading.enumerate())


# Parts.


@pytest.mark.parametrize("kind", ["pairs", "packed"])
def test_held_out_samples_are_never_trained_on(both, kind):
    data = dataset(both / kind, posterior="mean")
    every = [row.tobytes() for row in everything(data)[0]]
    train, held_out = data.split(7)

    def found(rows):
        return [every.index(row.tobytes()) for row in rows]

    # The same in every run, whatever its seed: a resumed or tuned network must not have seen them.
    assert found(everything(held_out)[0]) == [9, 23, 29, 33, 34, 35, 37]
    assert len(train) == 33 and len(held_out) == 7
    seen = {index for x, _ in load(train, steps=20) for index in found(x)}
    assert seen == set(range(40)) - {9, 23, 29, 33, 34, 35, 37}
    assert_same([everything(train.in_memory())], [everything(train)])
    assert found(everything(data.split(7, seed=1)[1])[0]) != found(everything(held_out)[0])
    with pytest.raises(ValueError, match=r"40 held-out samples: expected 0..39, the set has 40"):
        data.split(40)
    assert data.split(0)[0] is data and len(data.split(0)[1]) == 0


@pytest.mark.parametrize("kind", ["pairs", "packed"])
def test_label_subset(both, kind):
    data = dataset(both / kind)
    x, y = everything(data)
    part = data.subset([7, 3])
    expected = np.flatnonzero((y == 3) | (y == 7))
    assert_same([everything(part)], [(x[expected], y[expected])])
    assert sorted(everything(part.split(3)[1])[1]) and set(everything(part.split(3)[1])[1]) <= {3, 7}
    with pytest.raises(ValueError, match="label 10 is outside the config's num_classes: 0..9"):
        data.subset([3, 10])
    with pytest.raises(ValueError, match="no sample of class 7"):
        data.subset([3]).subset([7])


def test_memory_that_is_not_there(both, monkeypatch):
    monkeypatch.setattr("features.store.available_memory", lambda: 500_000)  # the set takes 163,840
    data = dataset(both / "packed", flip=True)
    assert_same([everything(data.in_memory())], [everything(data)])
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "3")
    with pytest.raises(ValueError, match=r"40 samples take 0.0 GiB of memory in each of 3 process\(es\), 0.0 GiB are"):
        data.in_memory()


# The index of names.


@pytest.fixture
def indexed(tmp_path, monkeypatch):
    """Pairs that get an index although they are few and young; and how often their folders were listed."""
    monkeypatch.setattr(pairs, "MIN_SAMPLES_FOR_INDEX", 5)
    monkeypatch.setattr(pairs, "_CLOCK_NS", 0)
    write_set(tmp_path, 12, flip=True)
    listed = []
    monkeypatch.setattr(
        pairs, "match_pairs", lambda folders, original=pairs.match_pairs: listed.append(folders) or original(folders)
    )
    return tmp_path, listed


def test_folders_are_listed_once_and_again_when_they_change(indexed):
    folder, listed = indexed
    first = dataset(folder)
    assert len(listed) == 1 and "imagenet64_index.npz" in first.notes[0]
    second = dataset(folder)
    assert len(listed) == 1 and "imagenet64_index.npz" in second.notes[0]
    assert_same([everything(second)], [everything(first)])
    for kind in ("features", "labels", "features_flip"):
        shutil.copy(folder / f"imagenet64_{kind}/3.npy", folder / f"imagenet64_{kind}/12.npy")
    assert len(dataset(folder)) == 13 and len(listed) == 2
    assert len(dataset(folder)) == 13 and len(listed) == 2
    (folder / "imagenet64_labels/5.npy").unlink()
    with pytest.raises(ValueError, match="features/5.npy: has no counterpart in .*labels"):
        dataset(folder)


def test_labels_of_pairs_are_kept_in_the_index_and_checked(indexed):
    folder, listed = indexed
    assert len(dataset(folder).subset([0, 1])) == 4
    reads = []
    later = dataset(folder)
    later.store._label = lambda index, original=later.store._label: reads.append(index) or original(index)
    assert len(later.subset([0, 1])) == 4 and reads == []
    np.save(folder / "imagenet64_labels/10.npy", np.array([5]))  # in place: no folder's time tells
    with pytest.raises(ValueError, match="labels have changed since they were listed"):
        everything(later.subset([0, 1]))


@pytest.mark.parametrize("way", ["broken index", "no room for it"])
def test_an_index_is_never_needed(indexed, way):
    folder, listed = indexed
    index = folder / "imagenet64_index.npz"
    if way == "broken index":
        dataset(folder)
        index.write_bytes(b"PK" + index.read_bytes()[10:500])
    else:
        index.mkdir()  # as in a folder that can't be written to, whoever runs the tests
    listed.clear()
    data = dataset(folder)
    assert len(data) == 12 and len(listed) == 1
    if way == "no room for it":
        assert data.notes[0].startswith(f"no index {index} (") and not list(folder.glob(".*"))
    else:
        assert len(dataset(folder)) == 12 and len(listed) == 1


def test_an_index_is_not_trusted_while_a_folders_clock_may_stand_still(indexed, monkeypatch):
    folder, listed = indexed
    monkeypatch.setattr(pairs, "_CLOCK_NS", 10**12)
    assert "have just changed" in dataset(folder).notes[0]
    assert not (folder / "imagenet64_index.npz").exists()


def test_small_sets_get_no_index(tmp_path):
    write_set(tmp_path, 6)
    assert dataset(tmp_path).notes == [] and sorted(os.listdir(tmp_path)) == [
        "imagenet64_features",
        "imagenet64_labels",
    ]


def test_a_packed_set_keeps_nothing_but_labels_in_memory(tmp_path):
    """A hundred times the rows, and no more memory of the process's own than their labels."""
    folder = Layout(tmp_path, "imagenet64").partial
    rows = np.zeros((4000, *SHAPE), "float32")
    with ShardWriter(folder, 0, row_shape=SHAPE) as shard:
        for start in range(0, 40_000, 4000):
            shard.append(rows, np.zeros(4000, "int64"), [str(i) for i in range(start, start + 4000)])
    finish(tmp_path, "imagenet64")
    del rows

    def own_memory():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    data = dataset(tmp_path)
    data.read(np.arange(4000))
    before = own_memory()
    for start in range(0, 40_000, 4000):
        data.read(np.arange(start, start + 4000))
    assert data.store.num_bytes == 40_000 * 1024
    assert own_memory() - before < 4 << 20  # of 40 MiB read
    assert data.store.labels.nbytes == 4 * 40_000


def test_command_line(tmp_path):
    write_set(tmp_path / "pairs", 6)
    done = run_script("tools/pack_features.py", ["--feature_path", tmp_path / "pairs"])
    assert done.returncode == 0, done.stderr
    assert f"6 samples, compared bit for bit: {tmp_path}/pairs_packed/imagenet64_packed" in done.stdout
    assert "packing" in done.stderr and "comparing" in done.stderr
    done = run_script("tools/pack_features.py", ["--feature_path", tmp_path / "nowhere"])
    assert done.returncode == 2 and done.stderr.startswith("error: feature_path") and "Traceback" not in done.stderr


def test_held_out_samples_do_not_depend_on_the_run(tmp_path):
    write_set(tmp_path, moments=True)
    read = [dataset(tmp_path, seed=seed).split(4)[1].read(np.arange(4)) for seed in (0, 1)]
    np.testing.assert_array_equal(read[0][0], read[1][0])
    np.testing.assert_array_equal(dataset(tmp_path).in_memory().split(4)[1].read(np.arange(4))[0], read[0][0])


def test_a_label_subset_holds_out_what_the_whole_set_would(tmp_path):
    write_set(tmp_path)
    whole = dataset(tmp_path).split(20)[1]
    part = dataset(tmp_path).subset([1, 2]).split(3)[1]
    of_these = [latent for latent, label in whole if label in (1, 2)]
    assert len(of_these) >= 3
    assert all(any((latent == other).all() for other in of_these) for latent, _ in part)


def test_memory_holds_no_twins_that_are_not_used(tmp_path):
    write_set(tmp_path, flip=True)
    plain, flipped = dataset(tmp_path).in_memory(), dataset(tmp_path, flip=True).in_memory()
    assert flipped.store.num_bytes == 2 * plain.store.num_bytes
