"""Weight files: what is read, what is refused, and both layouts. PyTorch is not needed."""

import argparse
import collections
import datetime
import enum
import functools
import gc
import json
import os
import pickle
import shutil
import struct
import sys
import types
import weakref
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file
from support.golden import GOLDEN, TINY, load_golden, relative_error

from features.autoencoder import load_vae
from models import DiT
from models.state import (
    check_finite,
    check_state,
    expected_shapes,
    official_to_paddle,
    paddle_to_official,
    plain_names,
)
from sampling.pipelines.pretrained import load_dit_pipeline
from tools import convert_dit_to_ppdiffusers, convert_official_weights, extract_weights
from weights.files import (
    load_weights,
    pick_weights,
    safe_load,
    safetensors_layout,
    save_pdparams,
    save_safetensors,
    save_torch,
)
from weights.source import read_weights

DATA = Path(__file__).parent / "data"
VAE = Path(__file__).parent.parent / "assets" / "digits_vae"


class TestOfficialFiles:
    @pytest.mark.parametrize("key", ["model", "ema"])
    def test_training_checkpoint_holds_both_sets(self, key):
        state = official_to_paddle(load_weights(GOLDEN / "dit_tiny_train_ckpt.pt", key=key))
        model = DiT(**{**TINY, "num_layers": 2, "attention_head_dim": 8})
        assert model.set_state_dict(state) == ([], [])
        model.eval()
        case = load_golden("dit_train_steps")
        x, t, y = (paddle.to_tensor(a) for a in (case["x"][0], case["t"][1], case["fwd_y"]))
        with paddle.no_grad():
            out = model(x, t, y)
        assert relative_error(out.numpy(), case[f"fwd_{key}2"]) < 6e-5

    def test_training_checkpoint_is_read_whole(self):
        tree = safe_load(GOLDEN / "dit_tiny_train_ckpt.pt")
        assert tree["args"]["global_batch_size"] == 6  # an argparse.Namespace
        assert tree["opt"]["param_groups"][0]["betas"] == (0.9, 0.999)
        assert tree["opt"]["state"][1]["step"] == 2 and 0 not in tree["opt"]["state"]

    def test_keys_are_asked_for(self):
        path = GOLDEN / "dit_tiny_train_ckpt.pt"
        with pytest.raises(ValueError, match="several sets of weights; choose a key of: model, ema"):
            load_weights(path)
        with pytest.raises(ValueError, match="no weights under the key 'best'"):
            load_weights(path, key="best")
        with pytest.raises(ValueError, match="a plain state dict"):
            load_weights(GOLDEN / "dit_tiny.pt", key="ema")
        ema, auto = load_weights(path, key="ema"), load_weights(path, key="auto")
        assert all(np.array_equal(ema[name], auto[name]) for name in ema)

    @pytest.mark.parametrize("name", ["torch_views.pt", "torch_views_legacy.pt"])
    def test_views_and_dtypes(self, name):
        tree = safe_load(DATA / name)
        assert tree["args"] == {"lr": 1e-4, "name": "x"} and tree["step"] == 3
        expected = dict(np.load(DATA / "torch_views.npz"))
        assert set(tree["model"]) == set(expected)
        for key, value in tree["model"].items():
            assert value.shape == expected[key].shape, key
            np.testing.assert_array_equal(value.astype("float64"), expected[key], err_msg=key)
        kinds = {key: str(value.dtype) for key, value in tree["model"].items()}
        assert kinds["bfloat16"] == "float32" and kinds["half"] == "float16" and kinds["int64"] == "int64"

    @pytest.mark.parametrize(
        "name",
        [
            "module.a.weight",
            "_orig_mod.a.weight",
            "module._orig_mod.a.weight",
            "_orig_mod.module.a.weight",
            "module._orig_mod.module.a._orig_mod.weight",
            "model._orig_mod.a.weight",
            "_layers.a.weight",
        ],
    )
    def test_prefixes_of_wrappers_are_taken_off(self, name):
        assert list(plain_names({name: np.ones([2, 3])})) == ["a.weight"]
        assert list(plain_names({"n_averaged": np.array(7), name: np.ones(2)})) == ["a.weight"]
        assert list(plain_names({name: np.ones(2), "b": np.ones(2)}))[1] == "b"  # not all names have it


class Mode(enum.Enum):
    FAST = "fast"


class AttributeDict(dict):
    """As Lightning keeps hyperparameters."""


# Among the settings of other people's checkpoints.
SETTINGS = {
    "path": PurePosixPath("/x"),
    "windows": PureWindowsPath("C:/x"),
    "enum": Mode.FAST,
    "date": datetime.datetime(2024, 5, 1),
    "defaultdict": collections.defaultdict(list, {"a": [PurePosixPath("/x")]}),
    "subclass of dict": AttributeDict(lr=1e-4),
    "namespace": types.SimpleNamespace(out=PurePosixPath("/x")),
    "numbers": [np.float32(1), np.str_("x"), np.array(["x", None], dtype=object), np.datetime64("2024-05-01"), 1j],
    "keys": {(1, 2): 3, PurePosixPath("/x"): 4, frozenset([5]): 6},
    "sets": [{PurePosixPath("/x")}, frozenset([(1, 2)]), range(3), slice(2)],
    "call": functools.partial(os.path.join, "x"),
    "function": os.path.join,
    "class": datetime.datetime,
}


class TestWhatStandsBesideTheWeights:
    @pytest.mark.parametrize("name", SETTINGS)
    def test_is_left_out(self, tmp_path, name):
        path, weights = tmp_path / "x.pt", {"a": np.ones(2, "f4")}
        for protocol in range(6):
            for value in (SETTINGS[name], argparse.Namespace(x=SETTINGS[name]), {"x": [SETTINGS[name]]}):
                path.write_bytes(pickle.dumps({"args": value, "model": weights, "last": value}, protocol=protocol))
                assert list(load_weights(path, "auto")) == ["a"]

    def test_of_a_torch_file(self, tmp_path):
        """torch.save of {"model": ..., "args": (torch.device("cpu"), torch.float16, a complex tensor)}."""
        names = b"ctorch\ndevice\n(X\x03\0\0\0cputRctorch\nfloat16\n"
        complex_storage = b"(X\x07\0\0\0storagectorch\nComplexFloatStorage\nX\x01\0\0\0" + b"9X\x03\0\0\0cpuK\x01tQ"
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + complex_storage + b"K\x00K\x01\x85K\x01\x85\x89NtR"
        args = b"(X\x04\0\0\0args" + names + b"\x86" + tensor + b"\x86"
        save_torch({"a": np.ones(2, "f4")}, tmp_path / "plain.pt")
        with zipfile.ZipFile(tmp_path / "plain.pt") as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        state = parts["archive/data.pkl"][2:-1]
        parts["archive/data.pkl"] = b"\x80\x02}" + args + b"X\x05\0\0\0model" + state + b"u."
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, data)
        np.testing.assert_array_equal(load_weights(tmp_path / "x.pt", "auto")["a"], np.ones(2, "f4"))

    def test_nothing_of_it_is_run(self, tmp_path):
        mark, path = tmp_path / "was_run", tmp_path / "x.pt"
        path.write_bytes(pickle.dumps({"model": {"a": np.ones(2, "f4")}, "args": Hostile(mark)}))
        assert list(load_weights(path, "model")) == ["a"]
        assert not mark.exists()
        with pytest.raises(ValueError, match=r"x\.pt: refused: it asks to import posix\.mkdir"):
            load_weights(path, "args")
        path.write_bytes(pickle.dumps({"a": np.ones(2, "f4"), "b": Hostile(mark)}))
        with pytest.raises(ValueError, match=r"x\.pt: refused: it asks to import posix\.mkdir"):
            load_weights(path, "auto")
        assert not mark.exists()


class TestKeys:
    """Which set of weights "auto" takes of a checkpoint that holds some."""

    @pytest.mark.parametrize(
        "names, taken, of_weights",
        [
            (["state_dict"], "state_dict", "state_dict"),
            (["best_of_all"], "best_of_all", "best_of_all"),
            (["model", "ema"], "ema", "model"),
            (["state_dict", "state_dict_ema"], "state_dict_ema", "state_dict"),
            (["model", "discriminator", "model_ema"], "model_ema", "model"),
            (["generator", "ema"], "ema", "generator"),
        ],
    )
    def test_taken(self, tmp_path, capsys, monkeypatch, names, taken, of_weights):
        path = tmp_path / "x.pdparams"
        path.write_bytes(pickle.dumps({"epoch": 3, **{name: {name: np.ones(2, "f4")} for name in names}}))
        assert list(load_weights(path, "auto")) == [taken]
        said = capsys.readouterr().out
        assert bool(said) == (len(names) > 1 and names != ["model", "ema"])
        assert not said or f"{', '.join(names)}; {taken} is taken" in said
        monkeypatch.setenv("PADDLE_TRAINER_ID", "1")  # once, of all ranks
        load_weights(path, "auto")
        assert not capsys.readouterr().out
        weights, key = pick_weights(safe_load(path), path, "auto", averages=False)
        assert list(weights) == [of_weights] == [key]

    @pytest.mark.parametrize("names", [["generator", "discriminator"], ["model", "ema_0.999", "ema_0.9999"]])
    def test_there_is_no_telling(self, tmp_path, names):
        path = tmp_path / "x.pdparams"
        path.write_bytes(pickle.dumps({name: {name: np.ones(2, "f4")} for name in names}))
        with pytest.raises(ValueError, match=f"several sets of weights; choose a key of: {', '.join(names)}"):
            load_weights(path, "auto")
        assert list(load_weights(path, names[1])) == [names[1]]


class TestOtherFormats:
    def test_paddle_files_as_paddle_load_reads_them(self, tmp_path):
        layer = paddle.nn.Linear(3, 4)
        paddle.save(layer.state_dict(), str(tmp_path / "m.pdparams"))
        state = load_weights(tmp_path / "m.pdparams")
        assert list(state) == ["weight", "bias"]
        np.testing.assert_array_equal(state["weight"], layer.weight.numpy())

        nested = {"a": {"x": paddle.arange(6).reshape([2, 3])}, "n": 3, "f": np.float64(0.5), "l": [paddle.ones([2])]}
        nested["bf16"] = paddle.to_tensor([1.0, -2.5]).astype("bfloat16")
        paddle.save(nested, str(tmp_path / "n.pdparams"))
        tree = safe_load(tmp_path / "n.pdparams")
        np.testing.assert_array_equal(tree["a"]["x"], [[0, 1, 2], [3, 4, 5]])
        np.testing.assert_array_equal(tree["bf16"], np.array([1.0, -2.5], "float32"))
        assert tree["n"] == 3 and tree["f"] == 0.5 and tree["l"][0].shape == (2,)

    def test_pairs_of_a_users(self, tmp_path):
        """Paddle writes a tensor as (name, array); a user's own pair of a name and a tensor stays one."""
        paddle.save({"pair": ("a", paddle.ones([2])), "two": ("a", "b")}, str(tmp_path / "n.pdparams"))
        tree = safe_load(tmp_path / "n.pdparams")
        assert tree["pair"][0] == "a" and tree["two"] == ("a", "b")
        np.testing.assert_array_equal(tree["pair"][1], [1.0, 1.0])

    @pytest.mark.parametrize("kind", ["pdparams", "pt", "safetensors"])
    def test_memory_is_given_back(self, tmp_path, kind):
        """Without the garbage collector, which may come late."""
        path = tmp_path / f"x.{kind}"
        state = {"a": np.ones([512, 1024], "f4"), "b": np.ones(1024, "f4")}
        {"pdparams": save_pdparams, "pt": save_torch, "safetensors": save_safetensors}[kind](state, path)
        gc.collect()
        gc.disable()
        try:
            tree = safe_load(path)
            array = tree["a"]
            holders = sys.getrefcount(array.base)
            assert holders == 2  # the array, and this call
            held = weakref.ref(array)
            del tree, array
            assert held() is None
        finally:
            gc.enable()

    def test_optimizer_state(self, tmp_path):
        layer = paddle.nn.Linear(3, 4)
        optimizer = paddle.optimizer.AdamW(parameters=layer.parameters())
        layer(paddle.ones([2, 3])).sum().backward()
        optimizer.step()
        paddle.save(optimizer.state_dict(), str(tmp_path / "o.pdopt"))
        tree, loaded = safe_load(tmp_path / "o.pdopt"), paddle.load(str(tmp_path / "o.pdopt"))
        arrays = {name: value.numpy() for name, value in loaded.items() if paddle.is_tensor(value)}
        assert len(arrays) >= 8
        for name, value in arrays.items():
            np.testing.assert_array_equal(tree[name], value, err_msg=name)


class TestSafetensors:
    CONFIG = {"model": {"type": "DiT", **TINY}}

    def test_bfloat16(self, tmp_path):
        header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
        data = struct.pack("<HH", 0x3F80, 0xC020)  # 1.0, -2.5
        (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
        np.testing.assert_array_equal(load_weights(tmp_path / "b.safetensors")["w"], np.array([1.0, -2.5], "float32"))
        # ppdiffusers has no name for that type in numpy, and writes uint16.
        values = np.array([0x3F80, 0xC020], "u2")
        path = tmp_path / "x.safetensors"
        for made_by, expected in (("pd", [1.0, -2.5]), ("np", [1.0, -2.5]), ("pt", values)):
            save_file({"w": values}, str(path), metadata={"format": made_by})
            np.testing.assert_array_equal(safe_load(path)["w"], expected)
            np.testing.assert_array_equal(read_weights(path)[0]["w"], expected)

    def test_layouts_there_and_back(self, tmp_path):
        config, there, back = (
            tmp_path / "DiT_tiny.json",
            tmp_path / "paddle.safetensors",
            tmp_path / "torch.safetensors",
        )
        config.write_text(json.dumps(self.CONFIG))
        flags = ["--config_file", str(config), "--weights"]
        convert_official_weights.main([*flags, str(GOLDEN / "dit_tiny.pt"), "--output", str(there)])
        convert_official_weights.main([*flags, str(there), "--output", str(back), "--reverse"])
        assert (safetensors_layout(there), safetensors_layout(back)) == ("paddle", "torch")
        official = load_weights(GOLDEN / "dit_tiny.pt")
        name = "blocks.0.attn.proj.weight"  # square: nothing but the mark tells
        np.testing.assert_array_equal(safe_load(back)[name], official[name])
        for path in (there, back):
            weights, _ = read_weights(path)
            assert all(np.array_equal(weights[name], value) for name, value in official_to_paddle(official).items())
        half = tmp_path / "half.safetensors"
        extract_weights.main(["--model_file", str(there), "--dtype", "bfloat16", "--checkpoint_path", str(half)])
        np.testing.assert_allclose(load_weights(half)[name], official[name].T, rtol=1 / 128)
        with pytest.raises(ValueError, match="is in PyTorch's layout; use tools/convert_official_weights.py"):
            extract_weights.main(["--model_file", str(back), "--checkpoint_path", str(tmp_path / "no.pdparams")])

    def test_stock_ppdiffusers_loads_the_folder(self, tmp_path):
        from ppdiffusers import DiTPipeline

        state = official_to_paddle(load_weights(GOLDEN / "dit_tiny.pt"))
        state["pos_embed"] = DiT(**TINY).pos_embed.numpy()  # stock's own
        save_pdparams(state, tmp_path / "a.pdparams")
        (tmp_path / "DiT_tiny.json").write_text(json.dumps(self.CONFIG))
        convert_dit_to_ppdiffusers.main(
            ["--model_weights", str(tmp_path / "a.pdparams"), "--config_file", str(tmp_path / "DiT_tiny.json")]
            + ["--vae_model", str(VAE), "--checkpoint_path", str(tmp_path / "out"), "--safe_serialization"]
        )
        assert not list((tmp_path / "out").rglob("*.pdparams"))
        ours, stock = load_dit_pipeline(str(tmp_path / "out")), DiTPipeline.from_pretrained(str(tmp_path / "out"))
        for part in ("transformer", "vae"):
            expected, loaded = (getattr(pipe, part).state_dict() for pipe in (ours, stock))
            assert loaded.keys() == expected.keys()
            assert all(bool((loaded[name] == value).all()) for name, value in expected.items())

    @pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
    def test_a_folder_of_pytorchs(self, tmp_path, name):
        """A folder as diffusers writes it: Linear weights are turned."""
        vae = load_vae(str(VAE))
        linear = {f"{name}.weight" for name, part in vae.named_sublayers() if isinstance(part, paddle.nn.Linear)}
        state = {key: value.numpy() for key, value in vae.state_dict().items()}
        state = {key: np.ascontiguousarray(value.T) if key in linear else value for key, value in state.items()}
        assert linear
        shutil.copytree(VAE, tmp_path / "vae", ignore=shutil.ignore_patterns("*.pdparams"))
        path = tmp_path / "vae" / name
        save_torch(state, path) if name.endswith(".bin") else save_safetensors(state, path, layout="torch")
        again = load_vae(str(tmp_path / "vae")).state_dict()
        assert all(bool((again[key] == value).all()) for key, value in vae.state_dict().items())


class Hostile:
    """Would make a file if it were unpickled as pickle does."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestBrokenFiles:
    def test_a_view_past_its_storage_is_refused(self, tmp_path):
        path = tmp_path / "weights.pt"
        save_torch({"w": np.arange(4, dtype="float32")}, path)
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        offset_zero = b"J\x00\x00\x00\x00"
        assert parts["archive/data.pkl"].count(offset_zero) == 1
        parts["archive/data.pkl"] = parts["archive/data.pkl"].replace(offset_zero, b"J\x01\x00\x00\x00")
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, data)
        with pytest.raises(ValueError, match="reaches past the end"):
            safe_load(path)

    def make(self, folder, kind):
        state = {"a.weight": np.arange(600, dtype="float32").reshape(20, 30), "a.bias": np.ones(20, "float32")}
        path = folder / f"weights.{kind}"
        if kind == "pt":
            save_torch(state, path)
        elif kind == "pdparams":
            paddle.save({name: paddle.to_tensor(value) for name, value in state.items()}, str(path))
        elif kind == "safetensors":
            from safetensors.numpy import save_file

            save_file(state, str(path))
        else:
            path.write_bytes((DATA / "torch_views_legacy.pt").read_bytes())
        return path

    @pytest.mark.parametrize("kind", ["pt", "pdparams", "safetensors", "legacy"])
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
    def test_truncated(self, tmp_path, kind, share):
        path = self.make(tmp_path, kind)
        safe_load(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=f"weights.{kind}: ") as error:
            safe_load(path)
        assert "\n" not in str(error.value)

    def test_flipped_bit_in_the_data(self, tmp_path):
        path = self.make(tmp_path, "pt")
        data = bytearray(path.read_bytes())
        data[data.index(np.arange(600, dtype="float32").tobytes()) + 100] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a readable weight file"):
            safe_load(path)

    @pytest.mark.parametrize("content", [b"", b"hello, this is no weight file", b"PK\x03\x04 nor is this"])
    def test_no_weight_file(self, tmp_path, content):
        path = tmp_path / "x.pt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pt: not a"):
            load_weights(path)

    def test_absent_and_folder(self, tmp_path):
        with pytest.raises(ValueError, match="there is no such file"):
            load_weights(tmp_path / "none.pt")
        with pytest.raises(ValueError, match="is a folder"):
            load_weights(tmp_path)


class TestLayouts:
    def test_there_and_back_is_bit_exact(self):
        official = load_weights(GOLDEN / "dit_tiny.pt")
        paddle_state = official_to_paddle(official)
        back = paddle_to_official(paddle_state)
        assert list(back) == list(official)
        assert all(back[name].tobytes() == official[name].tobytes() for name in official)

        turned = {name for name in official if paddle_state[name].shape != official[name].shape}
        assert "blocks.0.attn.qkv.weight" in turned and "final_layer.linear.weight" in turned
        # Square ones are turned as well, embeddings never.
        name = "blocks.0.attn.proj.weight"
        np.testing.assert_array_equal(paddle_state[name], official[name].T)
        for name in ("y_embedder.embedding_table.weight", "x_embedder.proj.weight", "pos_embed"):
            np.testing.assert_array_equal(paddle_state[name], official[name])

    def test_written_torch_file_is_read_back_bit_exact(self, tmp_path):
        state = load_weights(GOLDEN / "dit_tiny.pt")
        state["scalar"] = np.array(2.5, "float64")
        state["strided"] = np.arange(12, dtype=">f4").reshape(3, 4).T
        save_torch(state, tmp_path / "out.pt")
        back = load_weights(tmp_path / "out.pt")
        assert list(back) == list(state)
        for name, value in state.items():
            assert back[name].dtype == value.dtype.newbyteorder("=")
            np.testing.assert_array_equal(back[name], value)


class TestCheckState:
    def test_expected_shapes_are_the_networks(self):
        model = DiT(**TINY)
        own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert expected_shapes({"type": "DiT", **TINY}) == own

    def test_every_difference_is_said(self):
        expected = {"a.weight": [2, 3], "a.bias": [3], "b": [1]}
        good = {name: np.zeros(shape, "float32") for name, shape in expected.items()}
        check_state(good, expected, source="x.pt")
        cases = [
            ({"a.weight": good["a.weight"], "a.bias": good["a.bias"]}, "x.pt: .*1 missing: b"),
            ({**good, "c": good["b"]}, "1 unexpected: c"),
            ({**good, "a.weight": good["a.weight"].T}, r"a\.weight is \[3, 2\], expected \[2, 3\]"),
        ]
        for state, message in cases:
            with pytest.raises(ValueError, match=message) as error:
                check_state(state, expected, source="x.pt")
            assert "\n" not in str(error.value)


class TestCheckFinite:
    def test_the_first_tensor_is_named(self):
        state = {"a": np.ones([3, 4], "f4"), "b": np.ones([5, 6], "f4").T, "n": np.arange(3), "c": np.ones(2, "f8")}
        check_finite(state, source="x.pt")
        state["b"][2, 1] = np.nan
        state["b"][3, 1] = -np.inf
        state["c"][0] = np.inf
        message = r"^x\.pt: b has 2 of 30 values that are not finite .*2 of 4 tensors"
        with pytest.raises(ValueError, match=message) as error:
            check_finite(state, source="x.pt")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("dtype", ["f2", "f4"])  # as stored, and as read
    def test_half_precision_is_named_as_the_cause(self, dtype):
        with np.errstate(over="ignore"):
            half = np.array([0.1, 1e6], "f2").astype(dtype)
        with pytest.raises(ValueError, match="float16 ends at 65504"):
            check_finite({"w": half}, source="x.pt")
        with pytest.raises(ValueError) as error:
            check_finite({"w": np.array([0.1, np.inf], "f4")}, source="x.pt")
        assert "float16" not in str(error.value)
