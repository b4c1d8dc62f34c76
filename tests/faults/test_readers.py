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
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import paddle
import pytest
import requests
from PIL import Image
from safetensors.numpy import save_file
from support.mutations import READERS, fuzz_all
from support.pipelines import make_config, make_model, make_vae, state_of
from support.runs import TINY_MODELS, write_config, write_features

import infer_demo_dit
import infer_demo_sit
from config.schema import load_config
from features.autoencoder import load_vae
from features.image_source import ImageSource, open_source
from features.images import UnreadableImage, find_images, load_pixels
from features.npy import load_npy, load_npz
from features.packed import PackedStore
from models.state import check_state
from runtime.untrusted import inside, parse_json, read_json, shortened
from sampling.generator import load_generator
from sampling.pipelines.export import export_pipeline
from sampling.pipelines.folder import read_component
from sampling.pipelines.pretrained import SCHEDULERS, load_dit_pipeline
from tools import convert_dit_to_ppdiffusers, convert_official_weights, extract_weights
from training.checkpoints.read import load_checkpoint, load_pretrained
from weights.files import load_weights, safe_load, safetensors_layout, save_pdparams, save_safetensors, save_torch
from weights.pretrained import find_weights
from weights.source import read_weights


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 700, text
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


class Ordered(OrderedDict):
    """An OrderedDict of another class, whose state is set."""


def ordered():
    value = Ordered(a=1)
    value.extra = 2
    return value


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
    "io.open": lambda mark: Call(open, mark, "w"),
    "numpy.load": lambda mark: Call(np.load, mark),
    "_pickle.loads": lambda mark: Call(pickle.loads, b"N."),
    f"{__name__}.Ordered": lambda mark: ordered(),
}
RAW = {
    "posixpath.exists": b"cposixpath\nexists\n(S'/'\ntR.",
    "torch.storage._load_from_bytes": b"\x80\x02ctorch.storage\n_load_from_bytes\n(C\x01xtR.",
    "torch._tensor._rebuild_from_type_v2": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n)R.",
    "paddle.base.core.eager.Tensor": b"\x80\x04\x8c\x16paddle.base.core.eager\x8c\x06Tensor\x93)R.",
    "copy_reg._reconstructor": b"ccopy_reg\n_reconstructor\n)R.",
    "os.system": b"(S'mkdir x'\nios\nsystem\n.",
    "builtins.dict.get": b"\x80\x04\x8c\x08builtins\x8c\x08dict.get\x93.",
    "collections.OrderedDict.fromkeys": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
    "weights.files.safe_load": b"\x80\x02cweights.files\nsafe_load\n(S'x'\ntR.",
}


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


class TestPrograms:
    @pytest.mark.parametrize("name", PROGRAMS)
    def test_is_refused_by_the_name_it_asks_for(self, tmp_path, name):
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

    @pytest.mark.parametrize("name", RAW)
    def test_handmade(self, tmp_path, name):
        path = tmp_path / "x.pt"
        for write in (lambda: path.write_bytes(RAW[name]), lambda: as_zip(path, RAW[name])):
            write()
            with pytest.raises(ValueError, match=rf"x\.pt: refused: it asks to import {name},"):
                safe_load(path)

    @pytest.mark.parametrize(
        "program, message",
        [
            (b"\x80\x02ctorch\nFloatStorage\n)R.", "it calls FloatStorage"),
            (b"\x80\x02cnumpy\nndarray\n)R.", "it calls ndarray"),
            (b"\x80\x02X\x01\x00\x00\x00x)R.", "it calls a str"),
            (b"\x80\x02cbuiltins\nset\n)R)R.", "it calls a set"),
            (b"\x80\x02]}b.", "it sets the state of a list"),
            (b"\x80\x02ctorch\nFloatStorage\n}b.", "it sets the state of a _Name"),
            (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)}X\x0c\0\0\0__defaults__)s\x86b.", "the state of a _Name"),
            (b"\x80\x02\x82\x01.", "unregistered extension code 1"),
            (b"\x80\x05\x97.", "out-of-band data"),
            (b"\x80\x02Pabc\n.", "it refers to an object outside of the file"),
            (b"\x80\x02K\x01Q.", "it refers to an object outside of the file"),
            (b"\x80\x02}X\x01\x00\x00\x00wcnumpy\ndtype\ns.", "it holds a dtype"),
            (pickle.dumps({"w": np.array([None, print])}, protocol=4), "an array of type 'O8'"),
            (pickle.dumps({"w": np.zeros(2, "i4,f4")}, protocol=4), "an array of type 'V8'"),
        ],
    )
    def test_other_gadgets(self, tmp_path, program, message):
        path = tmp_path / "x.pdparams"
        path.write_bytes(program)
        with pytest.raises(ValueError, match=message) as error:
            safe_load(path)
        one_line(error)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A DiT pipeline folder, a SiT pipeline folder, a VAE folder and their parts."""
    from sampling import SiTPipeline

    folder = tmp_path_factory.mktemp("models")
    vae = make_vae()
    state = state_of(make_model(make_config()))
    labels = {i: f"digit {i}" for i in range(10)}
    export_pipeline(make_config(), state, vae, folder / "dit", id2label=labels)
    config = make_config(type="SiT", objective={"type": "transport"})
    SiTPipeline.from_weights(config, state, vae, labels).save_pretrained(folder / "sit")
    vae.save_pretrained(str(folder / "vae"), safe_serialization=False)
    return {"dit": folder / "dit", "sit": folder / "sit", "vae": folder / "vae", "state": state}


@pytest.fixture
def hostile(tmp_path):
    """Writes a file that would make a folder if it were unpickled, and checks at the end that it was not."""
    mark = tmp_path / "was_run"

    def write(path):
        Path(path).write_bytes(pickle.dumps({"model": {"w": Call(os.mkdir, str(mark))}}, protocol=4))
        return str(path)

    yield write
    assert not mark.exists()


class TestEntries:
    """Every way by which a file of a user's comes in."""

    REFUSED = r"refused: it asks to import posix\.mkdir, which no weights need; nothing was run"

    @pytest.mark.parametrize("loop, flag", [("trainer", "pretrained_model_path"), ("notrainer", "resume")])
    def test_loops(self, tmp_path, hostile, run_loop, loop, flag, features):
        config = write_config(tmp_path / "DiT_tiny.json")
        flags = [f"--config_file={config}", f"--feature_path={features}", f"--{flag}={hostile(tmp_path / 'x.pt')}"]
        flags += ["--device=cpu", "--max_steps=1", f"--{'output' if loop == 'trainer' else 'results'}_dir={tmp_path}/o"]
        with pytest.raises(ValueError, match=self.REFUSED):
            run_loop(loop, flags)

    @pytest.mark.parametrize("name", ["model_state.pdparams", "ema_state.pdparams", "optimizer.pdopt"])
    def test_checkpoint_folders(self, tmp_path, hostile, name):
        folder = write_checkpoint(tmp_path / "checkpoint-1")
        hostile(folder / name)
        with pytest.raises(ValueError, match=f"{name}: {self.REFUSED}"):
            load_checkpoint(folder).optimizer  # noqa: B018 (read when it is wanted)

    @pytest.mark.parametrize("kind", ["dit", "sit"])
    @pytest.mark.parametrize("part", ["transformer", "vae"])
    def test_pipeline_folders(self, models, tmp_path, hostile, kind, part):
        folder = tmp_path / "pipeline"
        shutil.copytree(models[kind], folder)
        hostile(folder / part / "model_state.pdparams")
        demo = {"dit": infer_demo_dit, "sit": infer_demo_sit}[kind]
        for call in (
            lambda: demo.main(["--model_path", str(folder), "--output", str(tmp_path / "a.png"), "--device", "cpu"]),
            lambda: load_generator(str(folder)),
        ):
            with pytest.raises(ValueError, match=self.REFUSED):
                call()

    @pytest.mark.parametrize(
        "call",
        [
            lambda path, config: read_weights(path),
            lambda path, config: load_pretrained(path, None),
            lambda path, config: infer_demo_sit.main(["--model_path", path, "--config_file", config]),
            lambda path, config: extract_weights.main(["--model_file", path, "--checkpoint_path", path + ".pdparams"]),
            lambda path, config: convert_official_weights.main(
                ["--config_file", config, "--weights", path, "--output", path + ".pdparams"]
            ),
            lambda path, config: convert_dit_to_ppdiffusers.main(
                ["--config_file", config, "--model_weights", path, "--checkpoint_path", path + "_out"]
            ),
        ],
    )
    def test_files_of_weights(self, tmp_path, hostile, call):
        kind = "SiT" if call.__code__.co_names[0] == "infer_demo_sit" else "DiT"
        with pytest.raises(ValueError, match=self.REFUSED):
            call(hostile(tmp_path / "x.pt"), write_config(tmp_path / f"{kind}_tiny.json", kind))

    def test_vae_folder(self, models, tmp_path, hostile):
        shutil.copytree(models["vae"], tmp_path / "vae")
        hostile(tmp_path / "vae" / "model_state.pdparams")
        with pytest.raises(ValueError, match=self.REFUSED):
            load_vae(str(tmp_path / "vae"))


LONG = "evil\n\x1b[2J" + "x" * 100_000


class TestMessages:
    """Names out of a file don't steer the terminal, and don't fill it."""

    @pytest.mark.parametrize(
        "tree, message",
        [
            ({LONG: {"w": np.ones(2, "f4")}}, "holds several sets of weights; choose a key of: evil"),
            ({LONG: 3}, "not a state dict .'evil.* is no tensor"),
            ({3: np.ones(2, "f4")}, "not a state dict .'3' is no name"),
            ({"UnpackBigParamInfor@@": {LONG: {"slices": [3]}}}, "does not name the parts of evil"),
        ],
    )
    def test_of_weights(self, tmp_path, tree, message):
        path = tmp_path / "x.pdparams"
        path.write_bytes(pickle.dumps(tree))
        with pytest.raises(ValueError, match=message) as error:
            load_weights(path)
        assert one_line(error).isprintable()

    def test_of_weights_that_do_not_fit(self):
        with pytest.raises(ValueError, match="1 missing: w; 1 unexpected: evil") as error:
            check_state({LONG: np.ones(2)}, {"w": (2,)}, source="x")
        assert one_line(error).isprintable()

    def test_of_settings(self, tmp_path):
        path = tmp_path / "config.json"
        for values, message in (
            ({"_class_name": LONG}, "holds a 'evil"),
            ({"_class_name": "A", LONG: 1}, "unknown setting 'evil"),
        ):
            path.write_text(json.dumps(values))
            with pytest.raises(ValueError, match=message) as error:
                read_component(str(path), "A", lambda known: None)
            assert one_line(error).isprintable()

    def test_what_can_be_shown_is(self):
        assert shortened("blocks.0.ä") == "blocks.0.ä"
        assert shortened("a\x1b\n\u202e\ud800") == r"a\x1b\n\u202e\ud800"
        assert shortened("x" * 81) == "x" * 80 + "..." and shortened("\n" * 80) == r"\n" * 40 + "..."


class TestCheckpointsOfNoArrays:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model": TINY_MODELS["DiT"]}))
        (tmp_path / "trainer_state.json").write_text('{"global_step": 1, "samples_seen": 8}')
        for file in ("model_state.pdparams", "ema_state.pdparams", "objective.pdparams"):
            save_pdparams({"w": np.ones(2, "f4")}, tmp_path / file)
        save_pdparams({"w": {"moment1": np.ones(2, "f4")}}, tmp_path / "optimizer.pdopt")
        assert load_checkpoint(tmp_path).optimizer["w"]["moment1"].sum() == 2
        return tmp_path

    @pytest.mark.parametrize(
        "name, trees",
        [
            ("model_state.pdparams", [{"w": "x"}, ["x"], {3: np.ones(2)}, {"w": {"w": np.ones(2)}}]),
            ("ema_state.pdparams", [{"w": [1.0, 2.0]}, {}]),
            ("objective.pdparams", [[np.ones(2)], {"w": None}]),
            ("optimizer.pdopt", [[], {"w": np.ones(2)}, {"w": {"moment1": [1.0]}}, {3: {"moment1": np.ones(2)}}]),
        ],
    )
    def test_folder(self, folder, name, trees):
        for tree in trees:
            (folder / name).write_bytes(pickle.dumps(tree))
            with pytest.raises(ValueError, match=f"{name}: (not|holds)") as error:
                load_checkpoint(folder).optimizer  # noqa: B018 (read when it is wanted)
            one_line(error)

    def official(self, step=3, betas=(0.9, 0.999), moment=None, model=None):
        moment = np.ones((2, 3), "f4") if moment is None else moment
        entry = {"step": step, "exp_avg": moment, "exp_avg_sq": moment}
        opt = {"state": {0: entry}, "param_groups": [{"betas": betas, "params": [0]}]}
        return {"model": model or {"a.weight": np.ones((2, 3), "f4")}, "opt": opt}

    def test_official_file(self, tmp_path):
        path = tmp_path / "x.pt"

        def load(**values):
            path.write_bytes(pickle.dumps(self.official(**values)))
            return load_checkpoint(path)

        for step in (3, np.float32([3]), np.array(3.0, "f4")):
            checkpoint = load(step=step)
            assert checkpoint.progress["global_step"] == 3
            assert checkpoint.optimizer["a.weight"]["moment1"].shape == (3, 2)
        shared = [0.0, 0.0]
        for _ in range(16):
            shared = [shared, shared]
        for values in (
            {"step": 30_000_000, "betas": (3**30, 7)},  # a power of 10^8 digits
            {"step": math.inf},
            {"step": 1 << 60},
            {"step": -1},
            {"step": np.ones(2)},
            {"betas": (0.9, math.nan)},
            {"betas": ("0", 0.9)},
            {"moment": shared},
            {"moment": 1.0},
        ):
            with pytest.raises(ValueError, match="x.pt: its 'opt' is not the state of torch.optim.AdamW") as error:
                load(**values)
            one_line(error)
        with pytest.raises(ValueError, match="its 'model' is no state dict"):
            load(model={"a.weight": "x"})

    def test_official_file_of_a_wrapped_network(self, tmp_path):
        path = tmp_path / "x.pt"
        weights = {"module._orig_mod.a.weight": np.ones((2, 3), "f4")}
        path.write_bytes(pickle.dumps({**self.official(model=weights), "ema": weights, "args": {"out": tmp_path}}))
        checkpoint = load_checkpoint(path)
        assert list(checkpoint.model) == list(checkpoint.averages[""]) == list(checkpoint.optimizer) == ["a.weight"]

    @pytest.mark.parametrize("part", ["model", "moment"])
    def test_official_file_that_is_not_finite(self, tmp_path, part):
        path = tmp_path / "x.pt"
        bad = np.full((2, 3), np.nan, "f4")
        path.write_bytes(pickle.dumps(self.official(**{part: {"a.weight": bad} if part == "model" else bad})))
        with pytest.raises(ValueError, match=r"x\.pt: .*a\.weight has 6 of 6 values that are not finite") as error:
            load_checkpoint(path)
        one_line(error)

    def test_dump_of_a_step(self, tmp_path):
        from runtime.files import FolderWriter
        from training.supervision.replay import read_dump

        state = dict.fromkeys(("step", "kind", "loss", "grad_norm", "learning_rate", "data_ranks", "device"), 1)
        state.update(micro_batch=2, precision={"dtype": "float32"}, sources=["a", "b"])
        batch = {name: np.ones((2, 4, 8, 8), "f4") for name in ("x", "noise")}
        batch.update({name: np.ones(2, "f4") for name in ("y", "t", "loss", "rank", "micro_step")})

        def read(number, **files):
            folder = tmp_path / str(number)
            writer = FolderWriter(str(folder))
            writer.write_json("config.json", {"model": {**TINY_MODELS["DiT"], "sample_size": 8, "in_channels": 4}})
            writer.write_json("state.json", {**state, **files.get("state", {})})
            for name, tree in (("batch.pdparams", {**batch, **files.get("batch", {})}), ("weights.pdparams", {})):
                with writer.open(name) as file:
                    file.write(pickle.dumps(tree))
            writer.finish()
            if link := files.get("link"):
                (folder / link).rename(tmp_path / link)
                (folder / link).symlink_to(tmp_path / link)
            return read_dump(str(folder))

        assert set(read("whole")[1]) == set(batch)
        wrong = [{"state": {"sources": 3}}, {"state": {"micro_batch": "2"}}, {"state": {"precision": 1}}]
        wrong += [{"batch": {"x": "x"}}, {"batch": {"rank": [0, 1]}}, {"batch": {"t": np.ones((2, 2))}}]
        for number, files in enumerate(wrong):
            with pytest.raises(ValueError, match="are not those of a step of"):
                read(number, **files)
        for name in ("batch.pdparams", "weights.pdparams", "state.json", "config.json"):
            with pytest.raises(ValueError, match=f"{name}: leads out of the folder"):
                read(f"link {name}", link=name)


# ---------------------------------------------------------------------------------------------------------------------
# Files that ask for memory or time
# ---------------------------------------------------------------------------------------------------------------------


TWICE = b"2\x86" * 200  # (x, x), and that twice, and so on: 2^200 parts
BOMBS = {
    "a length of 2^60": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", "states a length of"),
    "text of 2^40": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", "states a length of"),
    "a frame of 2^60": (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.", None),
    "a memo index of 2^32": (b"\x80\x02}r\xff\xff\xff\xff.", None),
    "an integer of 2^30 bytes": (b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"x.", "states a length of"),
    "a million digits": (b"(I" + b"9" * 10**6 + b"\n.", "not a readable weight file"),
    "lists in lists": (b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".", "nested more than 100 deep"),
    "tuples in tuples": (b"\x80\x04)" + b"\x85" * 50_000 + b".", "nested more than 100 deep"),
    "a list in itself": (b"\x80\x04]\x94h\x00a.", "nested more than 100 deep"),
    "marks": (b"\x80\x04" + b"(" * 50_000 + b".", "not a readable weight file"),
    "tuples of many parts": (b"\x80\x04]K\x01" + TWICE + b"a.", "nested more than 100 deep"),
    "such a key": (b"\x80\x04}K\x01" + TWICE + b"K\x01s.", "a tuple as a key"),
    "such a set": (b"\x80\x04\x8f(K\x01" + TWICE + b"\x90.", "a tuple as a key"),
    "such a type": (b"\x80\x02cnumpy\ndtype\n(K\x01" + TWICE + b"tR.", "of type '_Tuple'"),
    "lists copied again and again": (
        b"\x80\x02(" + b"K\x01" * 20_000 + b"l\x94" + b"cbuiltins\ntuple\nh\x00\x85R0" * 2000 + b".",
        "many times more memory",
    ),
    "bytes copied again and again": (
        b"\x80\x02X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"\x94"
        + b"c_codecs\nencode\nh\x00X\x06\0\0\0latin1\x86R" * 1000 + b".",
        "many times more memory",
    ),
}  # fmt: skip


class TestBombs:
    @pytest.mark.parametrize("name", BOMBS)
    def test_pickles(self, tmp_path, name):
        program, message = BOMBS[name]
        path = tmp_path / "x.pdparams"
        path.write_bytes(program)
        if message is None:
            assert safe_load(path) == {}
            return
        with pytest.raises(ValueError, match=message) as error:
            safe_load(path)
        one_line(error)

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

    @pytest.mark.parametrize(
        "description, message",
        [
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }", "not a readable .npy file"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 4), }", "not a readable .npy"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", "not a readable .npy file"),
            ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "Python objects"),
            ("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }", "Python objects"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 5000, "not a readable .npy file"),
            ("__import__('os').mkdir('x')", "not a readable .npy file"),
        ],
    )
    @pytest.mark.parametrize("mapped", [False, True])
    def test_npy(self, tmp_path, description, message, mapped):
        path = tmp_path / "x.npy"
        head = description.encode() + b"\n"
        path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + bytes(64))
        with pytest.raises(ValueError, match=message) as error:
            load_npy(path, mapped=mapped)
        one_line(error)
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.write(path, "names.npy")
        with pytest.raises(ValueError, match="not a readable .npz file"):
            load_npz(tmp_path / "x.npz", ["names"])

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

    def test_packed_shards_that_lie(self, tmp_path):
        READERS["packed"][0](tmp_path)
        shard = tmp_path / "shard-00000"
        for name, array, message in (
            ("labels.npy", np.arange(5), "holds 6 rows, its labels.npy 5"),
            ("labels.npy", np.array([b"x"] * 6), "expected integers"),
            ("latents.npy", np.zeros((6, 4), "i4"), "expected float32 or float16"),
            ("names.npy", np.arange(6), "expected the names, bytes, of 6 samples"),
            ("names.npy", np.array([b"../x"]), "expected the names, bytes, of 6 samples"),
        ):
            good = (shard / name).read_bytes()
            np.save(shard / name, array)
            with pytest.raises(ValueError, match=message) as error:
                PackedStore(str(tmp_path)).names()
            one_line(error)
            (shard / name).write_bytes(good)


class TestJson:
    @pytest.mark.parametrize(
        "text, message",
        [
            (b"[" * 100 + b"]" * 100, "nested more than 64 deep"),
            (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
            (b'{"a": ' + b"9" * 5000 + b"}", "has more than 64 bits"),
            (b'{"a": 1e999}', "is too large"),
            (b'{"a": NaN}', "NaN is no JSON value"),
            (b'{"a": "\xff"}', "not UTF-8 text at byte 7"),
            (b"", "broken JSON at line 1"),
        ],
    )
    def test_one_line(self, tmp_path, text, message):
        path = tmp_path / "x.json"
        path.write_bytes(text)
        with pytest.raises(ValueError, match=rf"x\.json: .*({message})") as error:
            read_json(path)
        one_line(error)

    def test_what_is_right_is_read(self):
        value = {"a": [1, -(2**64) + 1, 1.5, None, True, {"b": "ü"}]}
        assert parse_json(json.dumps(value).encode()) == value
        assert parse_json("[-Infinity]", infinity=True) == [-np.inf]

    def test_too_large(self, tmp_path):
        with open(tmp_path / "x.json", "wb") as file:
            file.truncate(1 << 27)
        with pytest.raises(ValueError, match="more than 4 MiB"):
            read_json(tmp_path / "x.json")


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


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

    def test_the_whole_folder_may_be_a_link(self, models, tmp_path):
        (tmp_path / "vae").symlink_to(models["vae"])
        assert load_vae(str(tmp_path / "vae")).config.latent_channels == 4

    def test_a_snapshot_of_the_hub_cache(self, models, tmp_path):
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
        blobs.mkdir()
        for index, path in enumerate(sorted(path for path in models["dit"].rglob("*") if path.is_file())):
            shutil.copy(path, blobs / str(index))
            link = snapshot / path.relative_to(models["dit"])
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blobs / str(index), link.parent))
        assert load_dit_pipeline(str(snapshot)).transformer.config.num_layers == 2
        assert load_vae(str(snapshot / "vae")).config.latent_channels == 4
        (tmp_path / "secret").write_bytes((models["dit"] / "vae" / "config.json").read_bytes())
        (snapshot / "vae" / "config.json").unlink()
        (snapshot / "vae" / "config.json").symlink_to(tmp_path / "secret")
        with pytest.raises(ValueError, match=r"vae/config\.json: leads out of the folder"):
            load_dit_pipeline(str(snapshot))

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

    def test_a_pipe_among_the_features(self, tmp_path):
        from features.pairs import PairStore

        write_features(tmp_path, count=3)
        path = tmp_path / "imagenet64_features" / "1.npy"
        path.unlink()
        os.mkfifo(path)
        store = PairStore(str(tmp_path), "imagenet64")
        with pytest.raises(ValueError, match=r"1\.npy: .*no regular file"):
            store.read(np.array([1]), np.empty((1, *store.row_shape), "f4"))


class TestFoldersRunNothing:
    @pytest.fixture
    def folder(self, models, tmp_path, monkeypatch):
        """A DiT pipeline folder, and a module `evil` that says so if it is imported."""
        shutil.copytree(models["dit"], tmp_path / "pipeline")
        (tmp_path / "evil.py").write_text("import os; os.mkdir('was_run')\nclass Evil: pass\n")
        for name in ("evil.py", "pipeline.py", "transformer/evil.py", "transformer/large_dit_transformer.py"):
            shutil.copy(tmp_path / "evil.py", tmp_path / "pipeline" / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        yield tmp_path / "pipeline"
        assert not (tmp_path / "was_run").exists() and "evil" not in sys.modules

    def edit(self, path, **values):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    @pytest.mark.parametrize(
        "name, value",
        [
            ("transformer", ["evil", "Evil"]),
            ("vae", ["evil", "Evil"]),
            ("scheduler", ["evil", "Evil"]),
            ("scheduler", ["ppdiffusers", "utils"]),
            ("transformer", ["ppdiffusers", ["Transformer2DModel"]]),
            ("_class_name", ["evil", "Evil"]),
            ("_class_name", ["pipeline", "Evil"]),
            ("id2label", {"x": "y"}),
        ],
    )
    def test_names_in_model_index(self, folder, name, value):
        self.edit(folder / "model_index.json", **{name: value})
        with pytest.raises(ValueError, match="model_index.json|expected a DiTPipeline"):
            infer_demo_dit.main(["--model_path", str(folder), "--output", "a.png", "--device", "cpu"])

    def test_code_that_lies_there_is_left_alone(self, folder):
        self.edit(folder / "model_index.json", transformer=["evil", "Transformer2DModel"], custom_pipeline="pipeline")
        self.edit(folder / "transformer" / "config.json", auto_map={"AutoModel": "evil.Evil"})
        assert load_dit_pipeline(str(folder)).transformer.config.num_layers == 2

    @pytest.mark.parametrize(
        "part, values, message",
        [
            ("transformer/config.json", {"_class_name": "evil.Evil"}, "holds a 'evil.Evil', expected Transformer2D"),
            ("transformer/config.json", {"num_layers": 10**9}, "num_layers is 1000000000, which is more"),
            ("transformer/config.json", {"sample_size": 10**6}, "make 250,000,000,000 tokens of width"),
            ("transformer/config.json", {"num_attention_heads": 10**6, "patch_size": 1}, "make 64 tokens of width 16,"),
            ("transformer/config.json", {"attention_head_dim": 10**5}, "do not fit the config|refuses"),
            ("transformer/config.json", {"num_layers": 3}, "do not fit the config: .* missing"),
            ("vae/config.json", {"block_out_channels": [10**5]}, "do not fit the config"),
            ("vae/config.json", {"down_block_types": ["evil"]}, "refuses these settings"),
            ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "which is more than"),
            ("scheduler/scheduler_config.json", {"beta_schedule": "evil"}, "refuses these settings"),
        ],
    )
    def test_settings(self, folder, part, values, message):
        self.edit(folder / part, **values)
        with pytest.raises(ValueError, match=message) as error:
            load_dit_pipeline(str(folder))
        one_line(error)

    def test_lists_without_end(self, folder):
        path = folder / "vae" / "config.json"
        for values, message in (
            ({"down_block_types": ["DownEncoderBlock2D"] * 33}, "33 values, which is more than any network has"),
            ({"layers_per_block": 101}, "layers_per_block is 101, which is more than any network has"),
        ):
            before = path.read_bytes()
            self.edit(path, **values)
            with pytest.raises(ValueError, match=message):
                load_dit_pipeline(str(folder))
            path.write_bytes(before)
        path = folder / "scheduler" / "scheduler_config.json"
        self.edit(path, trained_betas=np.linspace(1e-4, 0.02, 1000).tolist())
        assert load_dit_pipeline(str(folder)).scheduler.config.trained_betas[-1] == 0.02

    @pytest.mark.parametrize("values", [{"num_layers": 10**9}, {"sample_size": 10**6}, {"attention_head_dim": 10**8}])
    def test_config_of_a_checkpoint(self, tmp_path, values):
        (tmp_path / "config.json").write_text(json.dumps({"model": {**TINY_MODELS["DiT"], **values}}))
        with pytest.raises(ValueError, match=r"config\.json: model: .*(1000 at most|more than any network has)"):
            load_config(str(tmp_path / "config.json"))

    def test_shards_beside_their_index_only(self, folder):
        part = folder / "transformer"
        weights = load_weights(part / "model_state.pdparams")
        names = sorted(weights)
        os.remove(part / "model_state.pdparams")
        files = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
        for file, some in files.items():
            save_safetensors({name: weights[name] for name in some}, part / file)
        index = part / "diffusion_paddle_model.safetensors.index.json"
        where = {name: file for file, some in files.items() for name in some}
        index.write_text(json.dumps({"weight_map": where}))
        loaded = load_dit_pipeline(str(folder)).transformer.state_dict()
        assert all(np.array_equal(loaded[name].numpy(), weights[name]) for name in names)
        index.write_text(json.dumps({"weight_map": {**where, names[0]: "../../evil.py"}}))
        with pytest.raises(ValueError, match="names files that are not beside it"):
            load_dit_pipeline(str(folder))


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


# ---------------------------------------------------------------------------------------------------------------------
# safetensors everywhere
# ---------------------------------------------------------------------------------------------------------------------


class TestSafetensors:
    def test_bfloat16_of_ppdiffusers(self, tmp_path):
        """It has no name for that type in numpy, and writes uint16."""
        values = np.array([0x3F80, 0xC020], "u2")
        path = tmp_path / "x.safetensors"
        for made_by, expected in (("pd", [1.0, -2.5]), ("np", [1.0, -2.5]), ("pt", values)):
            save_file({"w": values}, str(path), metadata={"format": made_by})
            np.testing.assert_array_equal(safe_load(path)["w"], expected)
            np.testing.assert_array_equal(read_weights(path)[0]["w"], expected)

    def test_layouts_there_and_back(self, models, tmp_path):
        config = tmp_path / "DiT_tiny.json"
        config.write_text(json.dumps(make_config()))
        paddle_file, torch_file = tmp_path / "paddle.safetensors", tmp_path / "torch.safetensors"
        save_pdparams(models["state"], tmp_path / "a.pdparams")
        flags = ["--config_file", str(config), "--weights"]
        convert_official_weights.main([*flags, str(tmp_path / "a.pdparams"), "--output", str(torch_file), "--reverse"])
        convert_official_weights.main([*flags, str(torch_file), "--output", str(paddle_file)])
        assert (safetensors_layout(paddle_file), safetensors_layout(torch_file)) == ("paddle", "torch")
        name = "blocks.0.attn.proj.weight"  # square: nothing but the mark tells
        np.testing.assert_array_equal(safe_load(torch_file)[name], models["state"][name].T)
        for path in (paddle_file, torch_file):
            weights, _ = read_weights(path)
            assert all(np.array_equal(weights[name], value) for name, value in models["state"].items())
        network = make_model(make_config(), seed=1)
        load_pretrained(str(paddle_file), network)
        np.testing.assert_array_equal(state_of(network)[name], models["state"][name])
        out = tmp_path / "half.safetensors"
        flags = ["--model_file", str(paddle_file), "--dtype", "bfloat16", "--checkpoint_path", str(out)]
        extract_weights.main(flags)
        np.testing.assert_allclose(load_weights(out)[name], models["state"][name], rtol=1 / 128)
        with pytest.raises(ValueError, match="is in PyTorch's layout; use tools/convert_official_weights.py"):
            extract_weights.main(["--model_file", str(torch_file), "--checkpoint_path", str(tmp_path / "no.pdparams")])

    def test_stock_ppdiffusers_loads_the_folder(self, models, tmp_path):
        from ppdiffusers import DiTPipeline

        save_pdparams(models["state"], tmp_path / "a.pdparams")
        (tmp_path / "DiT_tiny.json").write_text(json.dumps(make_config()))
        convert_dit_to_ppdiffusers.main(
            ["--model_weights", str(tmp_path / "a.pdparams"), "--config_file", str(tmp_path / "DiT_tiny.json")]
            + ["--vae_model", str(models["vae"]), "--checkpoint_path", str(tmp_path / "out"), "--safe_serialization"]
        )
        assert not list((tmp_path / "out").rglob("*.pdparams"))
        ours, stock = load_dit_pipeline(str(tmp_path / "out")), DiTPipeline.from_pretrained(str(tmp_path / "out"))
        other = load_dit_pipeline(str(models["dit"]))
        for part in ("transformer", "vae"):
            expected = getattr(other, part).state_dict()
            for pipe in (ours, stock):
                loaded = getattr(pipe, part).state_dict()
                assert loaded.keys() == expected.keys()
                assert all(bool((loaded[name] == value).all()) for name, value in expected.items())

    @pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
    def test_a_folder_of_pytorchs(self, models, tmp_path, name):
        """A folder as diffusers writes it: Linear weights are turned."""
        shutil.copytree(models["vae"], tmp_path / "vae")
        vae = load_vae(str(models["vae"]))
        linear = {f"{name}.weight" for name, part in vae.named_sublayers() if isinstance(part, paddle.nn.Linear)}
        state = {key: value.numpy() for key, value in vae.state_dict().items()}
        state = {key: np.ascontiguousarray(value.T) if key in linear else value for key, value in state.items()}
        assert linear
        os.remove(tmp_path / "vae" / "model_state.pdparams")
        path = tmp_path / "vae" / name
        save_torch(state, path) if name.endswith(".bin") else save_safetensors(state, path, layout="torch")
        again = load_vae(str(tmp_path / "vae")).state_dict()
        assert all(bool((again[key] == value).all()) for key, value in vae.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


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

    def test_tar_members_that_lead_elsewhere(self, tmp_path):
        """Nothing of a tar file is unpacked: its names are only names, and its links are not followed."""
        Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
        Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(tmp_path / "red.png", "class/good.png")
            tar.add(tmp_path / "red.png", "class/../../secret.png")
            tar.add(tmp_path / "red.png", "/etc/absolute.png")
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
                member = tarfile.TarInfo(f"class/{kind.decode()}.png")
                member.type, member.linkname = kind, str(tmp_path / "secret.png")
                tar.addfile(member)
        before = sorted(tmp_path.rglob("*"))
        source = open_source(str(tmp_path / "x.tar"))
        assert len(source) == 3
        for index in range(3):
            assert (source.pixels(index, 8) == [255, 0, 0]).all()
        assert sorted(tmp_path.rglob("*")) == before
