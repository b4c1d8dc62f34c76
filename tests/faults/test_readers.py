"""Files from strangers: nothing in them is run, and the sizes that they state are refused before memory is taken."""

import functools
import json
import math
import operator
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image
from support.mutations import READERS, fuzz_all
from support.pipelines import make_config, make_model, make_vae, state_of
from support.runs import TINY_MODELS, write_config

import infer_demo_sit
from features.autoencoder import load_vae
from features.image_source import ImageSource
from features.images import UnreadableImage, find_images, load_pixels
from features.npy import load_npy, load_npz
from features.packed import PackedStore
from models.state import check_state
from runtime.untrusted import inside, parse_json, read_json, shortened
from sampling import SiTPipeline
from sampling.generator import load_generator
from sampling.pipelines.export import export_pipeline
from sampling.pipelines.folder import read_component
from sampling.pipelines.pretrained import SCHEDULERS, load_dit_pipeline
from tools import convert_dit_to_ppdiffusers, convert_official_weights, extract_weights
from training.checkpoints.read import load_checkpoint, load_pretrained
from weights.files import load_weights, safe_load, save_pdparams, save_torch
from weights.pretrained import find_weights
from weights.source import read_weights

ROOT = Path(__file__).resolve().parents[2]


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 700 and text.isprintable(), text
    return text


def test_damaged_files_are_read_or_refused():
    """200 mutations of each kind; benchmarks/faults.py makes many more."""
    for figures in fuzz_all(list(READERS), 200):
        assert not figures["failures"], figures
        assert figures["loaded"] + figures["refused"] == 200 and figures["refused"] > 60, figures
        assert figures["peak_growth_mib"] < 500, figures


# ---------------------------------------------------------------------------------------------------------------------
# Pickles that are programs
# ---------------------------------------------------------------------------------------------------------------------


class Call:
    """Calls `function(*arguments)` where it is unpickled as pickle does."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


# What is asked for by name, and a program that would do it: "mark" is a folder that must not be there at the end.
PROGRAMS = {
    "posix.system": lambda mark: Call(os.system, f"mkdir {mark}"),
    "builtins.eval": lambda mark: Call(eval, f"__import__('os').mkdir({mark!r})"),
    "builtins.getattr": lambda mark: Call(getattr, "text", "upper"),
    "builtins.__import__": lambda mark: Call(__import__, "antigravity"),
    "subprocess.Popen": lambda mark: Call(subprocess.Popen, ["mkdir", mark]),
    "functools.partial": lambda mark: functools.partial(os.mkdir, mark),
    "operator.attrgetter": lambda mark: operator.attrgetter("__class__.__base__"),
    "runpy._run_code": lambda mark: Call(runpy._run_code, f"import os; os.mkdir({mark!r})", {}),
    "numpy.load": lambda mark: Call(np.load, mark),
    "_pickle.loads": lambda mark: Call(pickle.loads, b"N."),
}


def doubled(part, times=200):
    """A program that makes (x, x) of a part x, and that twice, and so on: 2^times parts."""
    return part + b"q\0" + b"0h\0h\0\x86q\0" * times


REBUILD = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
LONG_LIST = b"(" + b"K\x01" * 20_000 + b"l"
# A pickle, and what is said of it; None: it is read.
HOSTILE = {
    "a function of ours": (b"\x80\x02cweights.files\nsafe_load\n(X\1\0\0\0xtR.", "import weights.files.safe_load,"),
    "pickles in torch": (b"\x80\x02ctorch.storage\n_load_from_bytes\n(C\x01xtR.", "torch.storage._load_from_bytes,"),
    "a method": (b"\x80\x04\x8c\x08builtins\x8c\x08dict.get\x93.", "it asks to import builtins.dict.get,"),
    "INST": (b"(Vmkdir x\nios\nsystem\n.", "refused: it uses the pickle operation INST"),
    "OBJ": (b"\x80\x02(cos\nsystem\nX\1\0\0\0xo.", "refused: it uses the pickle operation OBJ"),
    "EXT1": (b"\x80\x02\x82\x01.", "refused: it uses the pickle operation EXT1"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "refused: it uses the pickle operation NEXT_BUFFER"),
    "PERSID": (b"\x80\x02Pabc\n.", "refused: it uses the pickle operation PERSID"),
    "BINPERSID": (b"\x80\x02K\x01Q.", "refused: it refers to an object outside of the file"),
    "a call of a storage class": (b"\x80\x02ctorch\nFloatStorage\n)R.", "import torch.FloatStorage,"),
    "a call of text": (b"\x80\x02X\x01\x00\x00\x00x)R.", "'str' object is not callable"),
    "the state of a list": (b"\x80\x02]}b.", "not a readable weight file"),
    "defaults of a function": (REBUILD + b"}X\x0c\0\0\0__defaults__)sb.", "it holds a torch._utils._rebuild_tensor_v2"),
    "slots of a function": (REBUILD + b"N}X\x0c\0\0\0__defaults__)s\x86b.", "it holds a torch._utils._rebuild_tensor"),
    "a type": (b"\x80\x02}X\x01\x00\x00\x00wcnumpy\ndtype\ns.", "it holds a numpy.dtype"),
    "array of objects": (pickle.dumps({"w": np.array([None, print])}, protocol=4), "an array of type 'O8'"),
    "array of records": (pickle.dumps({"w": np.zeros(2, "i4,f4")}, protocol=4), "an array of type 'V8'"),
    "a length of 2^60": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", "but only 2 remain"),
    "text of 2^40": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", "but only 2 remain"),
    "an integer of 2^30 bytes": (b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"x.", "not a readable weight file"),
    "a frame of 2^60": (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.", "states a frame that is longer"),
    "a frame in a frame": (b"\x80\x04\x95" + struct.pack("<Q", 10) + b"\x95" + bytes(8) + b"}.", "its frames overlap"),
    "a frame that ends in an operation": (b"\x80\x04\x95\2" + bytes(7) + b"J\0\0\0\0.", "its frames overlap"),
    "a memo index of 2^31": (b"\x80\x02}r\0\0\0\x80.", "states a memo index of 2,147,483,648"),
    "a million digits": (b"(I" + b"9" * 10**6 + b"\n.", "not a readable weight file"),
    "lists in lists": (b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".", "nested more than 100 deep"),
    "tuples in tuples": (b"\x80\x04)" + b"\x85" * 50_000 + b".", "nested more than 100 deep"),
    "tuples in tuples as a key": (b"\x80\x04})" + b"\x85" * 50_000 + b"Ns.", "a key of more than 1000 parts"),
    "a list in itself": (b"\x80\x04]\x94h\x00a.", "nested more than 100 deep"),
    "marks": (b"\x80\x04" + b"(" * 50_000 + b".", "takes more than there is"),
    "tuples of 2^200 parts": (b"\x80\x04]" + doubled(b"K\1") + b"a.", "nested more than 100 deep"),
    "such a key": (b"\x80\x04}" + doubled(b"K\1") + b"K\1s.", "a key of more than 1000 parts"),
    "such keys": (b"\x80\x04}(" + doubled(b"K\1") + b"K\1u.", "a key of more than 1000 parts"),
    "such a member of a set": (b"\x80\x04\x8f(" + doubled(b"K\1") + b"\x90.", "a key of more than 1000 parts"),
    "DUP": (b"\x80\x04}K\1" + b"2\x86" * 30 + b"K\1s.", "refused: it uses the pickle operation DUP"),
    "lists of 2^30 parts": (b"\x80\x04]" + b"q\0]h\0ah\0a" * 30 + b".", None),
    "2000 tuples of a long list": (
        b"\x80\x02" + LONG_LIST + b"q\0(" + b"c__builtin__\ntuple\nh\0\x85R" * 2000 + b"t.", None
    ),
    "bytes copied again and again": (
        b"\x80\x02X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"q\0("
        + b"c_codecs\nencode\nh\0X\x06\0\0\0latin1\x86R" * 1000 + b"t.",
        "many times more memory",
    ),
    "a thousand names": (b"".join(b"ca\n%d\n0" % i for i in range(1001)) + b"N.", "more than 1000 names"),
}  # fmt: skip


def as_zip(path, program, **members):
    """A torch file whose data.pkl is `program`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in members.items():
            archive.writestr(f"archive/data/{name[1:]}", data)
    return path


def write_checkpoint(folder):
    """A training checkpoint of one weight, without a manifest."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": TINY_MODELS["DiT"]}))
    (folder / "trainer_state.json").write_text('{"global_step": 1, "samples_seen": 8}')
    for file in ("model_state.pdparams", "ema_state.pdparams", "optimizer.pdopt"):
        save_pdparams({"w": np.ones(2, "f4")}, folder / file)
    return folder


class TestPickles:
    @pytest.mark.parametrize("name", PROGRAMS)
    def test_a_program_is_refused_by_the_name_it_asks_for(self, tmp_path, name):
        mark = str(tmp_path / "was_run")
        for protocol in range(6):
            program = pickle.dumps({"w": [np.ones(2), PROGRAMS[name](mark)]}, protocol=protocol)
            for kind in ("pickle", "zip"):
                path = tmp_path / f"x{protocol}{kind}.pdparams"
                path.write_bytes(program) if kind == "pickle" else as_zip(path, program)
                with pytest.raises(ValueError, match="refused: it asks to import ") as error:
                    safe_load(path)
                asked = one_line(error).split("import ")[1].split(",")[0]
                # Python 2's names stand in the old protocols.
                assert asked.replace("__builtin__", "builtins") == name or protocol < 3, asked
        assert not os.path.exists(mark)

    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_hostile_one_costs_little(self, tmp_path, name):
        program, message = HOSTILE[name]
        path = tmp_path / "x.pdparams"
        path.write_bytes(program)
        began = time.process_time()
        tracemalloc.start()
        try:
            if message is None:
                safe_load(path)
            else:
                with pytest.raises(ValueError, match=message) as error:
                    safe_load(path)
                one_line(error)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 100 << 20 and time.process_time() - began < 10


# ---------------------------------------------------------------------------------------------------------------------
# Files that state sizes
# ---------------------------------------------------------------------------------------------------------------------


class TestSizes:
    def torch(self, path, storage, numel, size, stride, times=1, dtype="FloatStorage"):
        """A torch file with `times` tensors that are views of one storage."""

        def numbers(values):
            return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

        pid = b"(X\x07\0\0\0storagectorch\n" + dtype.encode() + b"\nX\x01\0\0\0" + b"0" + b"X\x03\0\0\0cpu"
        pid += b"\x8a\x08" + struct.pack("<q", numel) + b"tQ"
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K\x00" + numbers(size) + numbers(stride) + b"\x89NtR"
        program = b"\x80\x02](" + tensor * times + b"e."
        return as_zip(path, program, _0=storage)

    @pytest.mark.parametrize(
        "numel, size, stride, times, dtype, message",
        [
            (64, (2**20, 2**20), (0, 0), 1, "FloatStorage", "many times more memory"),
            (64, (2**61, 8), (8, 1), 1, "FloatStorage", "reaches past the end"),
            (64, (2**63 - 1,), (1,), 1, "FloatStorage", "impossible shape"),
            (64, (-1,), (1,), 1, "FloatStorage", "impossible shape"),
            (64, (8, 8), (8,), 1, "FloatStorage", "impossible shape"),
            (2**40, (8,), (1,), 1, "FloatStorage", "data/0 is not 1099511627776 elements"),
            (2**20, (2**10, 2**10), (1, 2**10), 200, "FloatStorage", "many times more memory"),
            (2**21, (2**21,), (1,), 200, "BFloat16Storage", "many times more memory"),
        ],
    )
    def test_torch_tensors(self, tmp_path, numel, size, stride, times, dtype, message):
        count = numel if numel < 2**30 else 64
        storage = bytes(count * (2 if dtype.startswith("B") else 4))
        path = self.torch(tmp_path / "x.pt", storage, numel, size, stride, times, dtype)
        with pytest.raises(ValueError, match=message) as error:
            safe_load(path)
        one_line(error)

    def test_views_of_one_storage_are_no_bomb(self, tmp_path):
        path = self.torch(tmp_path / "x.pt", bytes(4 * 2**20), 2**20, (2**10, 2**10), (2**10, 1), times=500)
        assert len(safe_load(path)) == 500

    def test_storages_of_the_format_before_zip(self, tmp_path):
        head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0kX\3\0\0\0cpu\x8a\6" + bytes(5) + b"\1tQ"
        path = tmp_path / "x.pt"
        for keys, message in (
            (b"]" + doubled(b"K\1") + b"a.", "a storage of a type that weights don't have"),
            (b"]X\1\0\0\0ka.", "it states a length of 4,398,046,511,104 bytes"),
        ):
            path.write_bytes(head + b"\x80\2]" + storage + b"a." + b"\x80\2" + keys + bytes(5) + b"\1\0\0")
            with pytest.raises(ValueError, match=message) as error:
                safe_load(path)
            one_line(error)

    def test_zip_members(self, tmp_path):
        path = tmp_path / "x.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}." + bytes(50_000_000))
        with pytest.raises(ValueError, match="is compressed or overlaps"):
            safe_load(path)
        # The directory says more than the file has.
        save_torch({"w": np.ones(100, "f4")}, path)
        data = path.read_bytes()
        place = data.rindex(b"archive/data/0") - 46
        lying = data[: place + 20] + struct.pack("<II", 2**31, 2**31) + data[place + 28 :]
        path.write_bytes(lying)
        with pytest.raises(ValueError, match="not a readable weight file"):
            safe_load(path)
        # The end record says that the directory is large.
        end = data.rindex(b"PK\5\6")
        path.write_bytes(data[: end + 12] + struct.pack("<I", 2**31) + data[end + 16 :])
        with pytest.raises(ValueError, match="not a readable weight file"):
            safe_load(path)

    @pytest.mark.parametrize(
        "entries",
        [
            {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
            {"w": {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 16]}},
            {"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
            {"w": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
            {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},  # and 8 bytes of nothing
            {"w": {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}},
            {"w": {"dtype": "F32", "shape": [4]}},
            {"__metadata__": {"format": 1}},
            {f"w{i}": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for i in range(9)},
        ],
    )
    def test_safetensors(self, tmp_path, entries):
        path = tmp_path / "x.safetensors"
        text = json.dumps(entries).encode()
        for length in (len(text), 2**39, 3):
            path.write_bytes(struct.pack("<Q", length) + text + bytes(16))
            with pytest.raises(ValueError, match=r"x\.safetensors: not a readable weight file") as error:
                safe_load(path)
            one_line(error)

    def test_npy(self, tmp_path):
        path = tmp_path / "x.npy"
        for description, message in (
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }", "not a readable .npy file"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", "not a readable .npy file"),
            ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "Python objects"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 5000, "not a readable .npy file"),
            ("__import__('os').mkdir('x')", "not a readable .npy file"),
        ):
            head = description.encode() + b"\n"
            path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + bytes(64))
            for mapped in (False, True):
                with pytest.raises(ValueError, match=message) as error:
                    load_npy(path, mapped=mapped)
                one_line(error)
            with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
                archive.write(path, "names.npy")
            with pytest.raises(ValueError, match="not a readable .npz file"):
                load_npz(tmp_path / "x.npz", ["names"])

    def test_packed_shards_that_lie(self, tmp_path):
        READERS["packed"][0](tmp_path)
        for name, array, message in (
            ("labels.npy", np.arange(5), "holds 6 rows, its labels.npy 5"),
            ("labels.npy", np.array([b"x"] * 6), "expected integers"),
            ("latents.npy", np.zeros((6, 4), "i4"), "expected float32 or float16"),
            ("names.npy", np.array([b"../x"]), "expected the names, bytes, of 6 samples"),
        ):
            path = tmp_path / "shard-00000" / name
            good = path.read_bytes()
            np.save(path, array)
            with pytest.raises(ValueError, match=message) as error:
                PackedStore(str(tmp_path)).names()
            one_line(error)
            path.write_bytes(good)

    def test_npz_is_as_large_as_its_file(self, tmp_path):
        path = tmp_path / "x.npz"
        np.savez(path, names=np.arange(5))
        np.testing.assert_array_equal(load_npz(path, ["names", "labels"])["names"], np.arange(5))
        np.savez_compressed(path, names=np.zeros(10**7))
        with pytest.raises(ValueError, match="names is compressed"):
            load_npz(path, ["names"])
        np.savez_compressed(path, meta=np.zeros(10**7, "u1"))
        with pytest.raises(ValueError, match="meta is compressed"):
            ImageSource.load(path, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Every way by which a file of a user's comes in
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path):
    """Writes a file that would make a folder if it were unpickled, and checks at the end that it was not."""
    mark = tmp_path / "was_run"

    def write(path):
        Path(path).write_bytes(pickle.dumps({"model": {"w": Call(os.mkdir, str(mark))}}, protocol=4))
        return str(path)

    yield write
    assert not mark.exists()


@pytest.fixture
def pipeline(tmp_path):
    """A SiT pipeline folder."""
    folder = tmp_path / "pipeline"
    shutil.copytree(ROOT / "tests" / "data" / "sit_pipeline_2026", folder)
    shutil.rmtree(folder / "vae")
    shutil.copytree(ROOT / "assets" / "digits_vae", folder / "vae")
    return folder


def demo(*flags):
    infer_demo_sit.main([*flags, "--device", "cpu"])


WAYS_IN = [
    lambda path, config: read_weights(path),
    lambda path, config: load_pretrained(path, None),
    lambda path, config: load_checkpoint(path),
    lambda path, config: demo("--model_path", path, "--config_file", config),
    lambda path, config: extract_weights.main(["--model_file", path, "--checkpoint_path", path + ".pdparams"]),
    lambda path, config: convert_official_weights.main(
        ["--config_file", config, "--weights", path, "--output", path + ".pdparams"]
    ),
    lambda path, config: convert_dit_to_ppdiffusers.main(
        ["--config_file", config, "--model_weights", path, "--checkpoint_path", path + "_out"]
    ),
]


class TestWaysIn:
    REFUSED = r"refused: it asks to import posix\.mkdir, which no weights need; nothing was run"

    @pytest.mark.parametrize("call", WAYS_IN)
    def test_files_of_weights(self, tmp_path, hostile, call):
        kind = "SiT" if call.__code__.co_names[0] == "demo" else "DiT"
        with pytest.raises(ValueError, match=self.REFUSED):
            call(hostile(tmp_path / "x.pt"), write_config(tmp_path / f"{kind}_tiny.json", kind))

    @pytest.mark.parametrize("name", ["model_state.pdparams", "ema_state.pdparams", "optimizer.pdopt"])
    def test_checkpoint_folders(self, tmp_path, hostile, name):
        folder = write_checkpoint(tmp_path / "checkpoint-1")
        hostile(folder / name)
        with pytest.raises(ValueError, match=f"{name}: {self.REFUSED}"):
            load_checkpoint(folder).optimizer  # noqa: B018 (read when it is wanted)

    @pytest.mark.parametrize("part", ["transformer", "vae"])
    def test_pipeline_folders(self, pipeline, tmp_path, hostile, part):
        hostile(pipeline / part / "model_state.pdparams")
        calls = [lambda: demo("--model_path", str(pipeline), "--output", str(tmp_path / "a.png"))]
        calls += [lambda: load_generator(str(pipeline))]
        calls += [lambda: load_vae(str(pipeline / "vae"))] if part == "vae" else []
        for call in calls:
            with pytest.raises(ValueError, match=self.REFUSED):
                call()

    def test_code_in_a_pipeline_folder_is_left_alone(self, pipeline, tmp_path, monkeypatch):
        (tmp_path / "evil.py").write_text("import os; os.mkdir('was_run')\nclass Evil: pass\n")
        for name in ("evil.py", "pipeline.py", "transformer/evil.py", "transformer/large_dit_transformer.py"):
            shutil.copy(tmp_path / "evil.py", pipeline / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        index = {**json.loads((pipeline / "model_index.json").read_text()), "custom_pipeline": "pipeline"}
        (pipeline / "model_index.json").write_text(json.dumps(index))
        assert SiTPipeline.from_pretrained(str(pipeline)).transformer is not None
        assert not (tmp_path / "was_run").exists() and "evil" not in sys.modules


def test_settings_of_a_pipeline_folder_are_checked_before_they_are_used(tmp_path):
    export_pipeline(make_config(), state_of(make_model(make_config())), make_vae(), tmp_path / "dit")
    for part, values, message in (
        ("model_index.json", {"transformer": ["evil", "Evil"]}, "model_index.json: transformer is"),
        ("model_index.json", {"scheduler": ["ppdiffusers", "utils"]}, "model_index.json: scheduler is"),
        (
            "model_index.json",
            {"transformer": ["ppdiffusers", ["Transformer2DModel"]]},
            "model_index.json: transformer is",
        ),
        ("model_index.json", {"id2label": {"x": "y"}}, "model_index.json: id2label"),
        ("transformer/config.json", {"_class_name": "evil.Evil"}, "holds a 'evil.Evil', expected 'Transformer2D"),
        ("transformer/config.json", {"num_layers": 10**9}, "num_layers is 1000000000, which is more"),
        ("transformer/config.json", {"sample_size": 10**6}, "make 250,000,000,000 tokens of width"),
        ("transformer/config.json", {"num_layers": 3}, "do not fit the config: .* missing"),
        ("vae/config.json", {"block_out_channels": [10**5]}, "do not fit the config"),
        ("vae/config.json", {"down_block_types": ["evil"]}, "refuses these settings"),
        ("vae/config.json", {"down_block_types": ["DownEncoderBlock2D"] * 33}, "33 values, which is more than any"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "which is more than"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "evil"}, "refuses these settings"),
    ):
        path = tmp_path / "dit" / part
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), **values}))
        with pytest.raises(ValueError, match=message) as error:
            load_dit_pipeline(str(tmp_path / "dit"))
        one_line(error)
        path.write_text(before)
    assert load_dit_pipeline(str(tmp_path / "dit")).transformer.config.num_layers == 2


LONG = "evil\n\x1b[2J" + "x" * 100_000


def test_names_out_of_a_file_neither_steer_the_terminal_nor_fill_it(tmp_path):
    weights, settings = tmp_path / "x.pdparams", tmp_path / "config.json"

    def read(tree):
        weights.write_bytes(pickle.dumps(tree))
        load_weights(weights)

    def read_settings(values):
        settings.write_text(json.dumps(values))
        read_component(str(settings), "A", lambda known: None)

    for call, message in (
        (lambda: read({LONG: {"w": np.ones(2, "f4")}}), "holds several sets of weights; choose a key of: evil"),
        (lambda: read({LONG: 3}), "not a state dict .'evil.* is no tensor"),
        (lambda: read({3: np.ones(2, "f4")}), "not a state dict .'3' is no name"),
        (lambda: check_state({LONG: np.ones(2)}, {"w": (2,)}, source="x"), "1 missing: w; 1 unexpected: evil"),
        (lambda: read_settings({"_class_name": LONG}), "holds a 'evil"),
        (lambda: read_settings({"_class_name": "A", LONG: 1}), "unknown setting 'evil"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        one_line(error)
    assert shortened("blocks.0.ä") == "blocks.0.ä"
    assert shortened("a\x1b\n\u202e\ud800") == r"a\x1b\n\u202e\ud800"
    assert shortened("x" * 81) == "x" * 80 + "..." and shortened("\n" * 80) == r"\n" * 40 + "..."


class TestCheckpointsOfNoArrays:
    @pytest.mark.parametrize(
        "name, trees",
        [
            ("model_state.pdparams", [{"w": "x"}, ["x"], {3: np.ones(2)}, {"w": {"w": np.ones(2)}}]),
            ("ema_state.pdparams", [{"w": [1.0, 2.0]}, {}]),
            ("objective.pdparams", [[np.ones(2)], {"w": None}]),
            ("optimizer.pdopt", [[], {"w": np.ones(2)}, {"w": {"moment1": [1.0]}}, {3: {"moment1": np.ones(2)}}]),
        ],
    )
    def test_folder(self, tmp_path, name, trees):
        folder = write_checkpoint(tmp_path / "checkpoint-1")
        for tree in trees:
            (folder / name).write_bytes(pickle.dumps(tree))
            with pytest.raises(ValueError, match=f"{name}: (not|holds)") as error:
                load_checkpoint(folder).optimizer  # noqa: B018 (read when it is wanted)
            one_line(error)

    def test_official_file(self, tmp_path):
        path, ones = tmp_path / "x.pt", np.ones((2, 3), "f4")

        def load(step=3, betas=(0.9, 0.999), moment=ones, weight=ones):
            entry = {"step": step, "exp_avg": moment, "exp_avg_sq": moment}
            opt = {"state": {0: entry}, "param_groups": [{"betas": betas, "params": [0]}]}
            model = {"module._orig_mod.a.weight": weight}
            path.write_bytes(pickle.dumps({"model": model, "ema": model, "opt": opt, "args": {"out": tmp_path}}))
            return load_checkpoint(path)

        for step in (3, np.float32([3]), np.array(3.0, "f4")):
            checkpoint = load(step=step)
            assert checkpoint.progress["global_step"] == 3
            assert checkpoint.optimizer["a.weight"]["moment1"].shape == (3, 2)
            assert list(checkpoint.model) == list(checkpoint.averages[""]) == ["a.weight"]
        wrong_state = "its 'opt' is not the state of torch.optim.AdamW"
        not_finite = r".*a\.weight has 6 of 6 values that are not finite"
        for values, message in (
            ({"step": 30_000_000, "betas": (3**30, 7)}, wrong_state),  # a power of 10^8 digits
            ({"step": math.inf}, wrong_state),
            ({"step": 1 << 60}, wrong_state),
            ({"step": -1}, wrong_state),
            ({"step": np.ones(2)}, wrong_state),
            ({"betas": (0.9, math.nan)}, wrong_state),
            ({"betas": ("0", 0.9)}, wrong_state),
            ({"moment": [[0.0, 0.0]]}, wrong_state),
            ({"moment": 1.0}, wrong_state),
            ({"weight": "x"}, "its 'model' is no state dict"),
            ({"weight": np.full((2, 3), np.nan, "f4")}, not_finite),
            ({"moment": np.full((2, 3), np.nan, "f4")}, not_finite),
        ):
            with pytest.raises(ValueError, match=rf"x\.pt: {message}") as error:
                load(**values)
            one_line(error)


def test_json(tmp_path):
    path = tmp_path / "x.json"
    for text, message in (
        (b"[" * 100 + b"]" * 100, "nested more than 64 deep"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "99... is too large"),
        (b'{"a": 1e999}', "is too large"),
        (b'{"a": NaN}', "NaN is no JSON value"),
        (b'{"a": "\xff"}', "not UTF-8 text at byte 7"),
        (b"", "broken JSON at line 1"),
        (b"1" + b" " * (1 << 22), "more than 4 MiB"),
    ):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=rf"x\.json: .*{message}") as error:
            read_json(path)
        one_line(error)
    value = {"a": [1, -(2**64) + 1, 1.5, None, True, {"b": "ü"}]}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json("[-Infinity]", infinity=True) == [-np.inf]


class TestPaths:
    def test_what_leads_out_is_refused(self, tmp_path):
        folder = tmp_path / "folder"
        (folder / "sub").mkdir(parents=True)
        (tmp_path / "secret").write_text("x")
        (tmp_path / "folder2").mkdir()
        (folder / "link").symlink_to(tmp_path / "secret")
        (folder / "sub" / "up").symlink_to("../..")
        (folder / "good").symlink_to("sub")
        for name in ("../secret", "/etc/passwd", "link", "sub/up/secret", "../folder2/x"):
            with pytest.raises(ValueError, match="leads out of the folder"):
                inside(folder, name)
        for call in (lambda name: inside(folder, name), lambda name: read_json(folder / name)):
            with pytest.raises(ValueError, match=r"folder/a\\x00b: no file can have this name"):
                call("a\0b")
        assert inside(folder, "good/x") == str(folder / "good" / "x")

    def test_a_snapshot_of_the_hub_cache(self, tmp_path):
        """Its files are links to a folder beside it; no other may be linked to."""
        snapshot = tmp_path / "snapshots" / "abc" / "vae"
        snapshot.mkdir(parents=True)
        shutil.copytree(ROOT / "assets" / "digits_vae", tmp_path / "blobs")
        for name in os.listdir(tmp_path / "blobs"):
            (snapshot / name).symlink_to(f"../../../blobs/{name}")
        assert load_vae(str(snapshot)).config.latent_channels == 4
        (tmp_path / "blobs" / "config.json").rename(tmp_path / "secret")
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(tmp_path / "secret")
        with pytest.raises(ValueError, match=r"vae/config\.json: leads out of the folder"):
            load_vae(str(snapshot))

    @pytest.mark.parametrize("name", ["model_state.pdparams", "config.json", "trainer_state.json", "optimizer.pdopt"])
    def test_links_in_a_checkpoint(self, tmp_path, name):
        folder = write_checkpoint(tmp_path / "checkpoint-1")
        load_checkpoint(folder)
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: leads out of the folder"):
            load_checkpoint(folder)

    def test_pipes_and_devices(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", Path("/dev/zero")):
            for read in (safe_load, read_json, load_npy):
                with pytest.raises(ValueError, match="is no regular file but a pipe or device"):
                    read(path)


def test_a_lost_connection_is_not_a_file_that_is_not_there(monkeypatch, tmp_path):
    import ppdiffusers
    from huggingface_hub.utils import EntryNotFoundError
    from ppdiffusers.utils import download_utils

    def bos_download(repo_id, filename, **settings):
        if filename == "model_state.fp16.pdparams":
            return filename
        raise requests.ConnectionError("reset") if filename == lost else EntryNotFoundError("no such file")

    monkeypatch.setattr(download_utils, "bos_download", bos_download)
    lost = None
    assert find_weights("someone/something") == (["model_state.fp16.pdparams"], "paddle")
    lost = "model_state.pdparams"
    monkeypatch.setattr(ppdiffusers.utils, "PPDIFFUSERS_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="Can't load the model for 'someone/something'"):
        find_weights("someone/something")
    # But what was downloaded before is, without a network.
    earlier = tmp_path / "someone/something/model_state.pdparams"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    assert find_weights("someone/something") == ([str(earlier)], "paddle")
    assert all(hasattr(ppdiffusers, name) for name in SCHEDULERS)


class TestImages:
    def test_a_bomb_is_refused_by_its_header(self, tmp_path, monkeypatch):
        path = tmp_path / "a.png"
        Image.new("L", (300, 200)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 29_000)
        with pytest.raises(UnreadableImage, match="60000 pixels. exceeds limit of 58000"):
            load_pixels(str(path), 8)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31_000)  # Pillow warns up to twice as many
        assert load_pixels(str(path), 8).shape == (8, 8, 3)

    def test_no_program_is_started_for_an_image(self, tmp_path):
        (tmp_path / "a").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / "good.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.eps")
        shutil.copy(tmp_path / "a" / "x.eps", tmp_path / "a" / "x.png")
        notes = []
        samples, _ = find_images(str(tmp_path), notes=notes)
        assert [os.path.basename(path) for path, _ in samples] == ["good.png", "x.png"]
        assert notes == ["left out, no images by their names: 1 file (.eps)"]
        with pytest.raises(UnreadableImage, match="no image format that Pillow knows"):
            load_pixels(str(tmp_path / "a" / "x.png"), 8)
