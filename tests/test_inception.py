"""Features of images: FID's Inception, its weights, and networks by name."""

import hashlib
import os

import numpy as np
import paddle
import pytest
from paddle.base import core
from support.golden import GOLDEN
from support.inception_weights import digest, save
from support.versions import PADDLE_2

from evaluation.inception import Inception, find_weights, read_weights
from evaluation.networks import load_features
from runtime.programs import PROGRAMS
from weights.files import load_weights, save_pdparams

PROGRAM = PROGRAMS[PADDLE_2]
SIZES = ("32", "64", "40x72", "256", "299", "400x320")


@pytest.fixture(scope="module")
def inception(inception_weights):
    return Inception.from_file(inception_weights)


@pytest.fixture(scope="module")
def state(inception_weights):
    return load_weights(inception_weights)


@pytest.fixture(scope="module")
def shapes(state):
    useful = (name for name in state if not name.endswith("num_batches_tracked") and name != "fc.bias")
    return {name: state[name].shape for name in useful}


def assert_features(network, golden, prefix):
    vectors = golden("evaluation_inception")
    for size in SIZES:
        found = network(vectors[f"images_{size}"])
        for name in ("pool", "spatial", "logits"):
            expected = vectors[f"{prefix}{name}_{size}"]
            assert found[name].shape == expected.shape and found[name].dtype == np.float32
            error = np.abs(found[name] - expected).max() / np.abs(expected).max()
            assert error <= 1e-4, f"{name} at {size}: {error}"


@pytest.mark.paddle26
def test_features_are_those_of_torch_fidelity(inception, inception_weights, golden):
    assert_features(inception, golden, "")
    checksum = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    weights = {"weights_sha256": checksum, "weights_published": False}
    assert inception.settings == {"features": "inception", "preprocessing": "adm", **weights}


def test_features_are_those_of_pytorch_fid(inception_weights, golden):
    """Loading draws no random numbers: evaluation in the middle of a training must not change the run."""
    paddle.seed(5)
    expected = paddle.rand([3]).tolist()
    paddle.seed(5)
    network = load_features("inception", weights=inception_weights, preprocessing="pytorch-fid")
    assert_features(network, golden, "pf_")
    assert paddle.rand([3]).tolist() == expected


@pytest.mark.skipif(PADDLE_2, reason="a build of Paddle 2.6 for CPUs has no switch for TF32")
def test_a_gpu_runs_the_network_without_a_program(inception_weights, golden, monkeypatch):
    """What a GPU does, on this CPU: also, no TF32 within the call, and Paddle's own choice after it."""
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    network = Inception.from_file(inception_weights)
    vectors, switches = golden("evaluation_inception"), []
    run = network._run
    network._run = lambda x: (switches.append(core.get_cudnn_switch()), run(x))[1]
    core.set_cudnn_switch(True)
    for name, found in network(vectors["images_32"]).items():
        expected = vectors[f"{name}_32"]
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert switches == [False, False] and core.get_cudnn_switch()  # 3 images: 2 and 1


def test_a_batch_changes_no_image(inception, golden, monkeypatch):
    images = golden("evaluation_inception")["images_64"][[0, 1, 2, 0, 1, 2, 1]]
    alone = [inception(images[i : i + 1]) for i in range(3)]
    monkeypatch.setattr("evaluation.inception.CHUNK", 2)  # what passes through the network at once
    for name, found in inception(images).items():
        expected = np.concatenate([alone[i][name] for i in (0, 1, 2, 0, 1, 2, 1)])
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["legacy", "pdparams", "paddle's names"])
def test_formats_of_weights(form, state, shapes, tmp_path):
    path = tmp_path / "weights"
    if form == "legacy":
        save(state, path, legacy=True)
    elif form == "pdparams":
        save_pdparams({name: state[name] for name in shapes}, path)
    else:
        names = {"running_mean": "_mean", "running_var": "_variance"}
        turned = {name: value.T if name == "fc.weight" else value for name, value in state.items()}
        save_pdparams(
            {".".join(names.get(part, part) for part in name.split(".")): turned[name] for name in state}, path
        )
    expected = {name: state[name] for name in shapes}
    assert digest(read_weights(path, shapes)) == digest(expected)


def torchvision(state, shapes):
    return {**state, "fc.weight": np.zeros([1000, 2048], "f4"), "fc.bias": np.zeros(1000, "f4")}


def with_aux_logits(state, shapes):
    return {"Conv2d_1a_3x3.conv.weight": np.zeros(shapes["Conv2d_1a_3x3.conv.weight"], "f4"),
            "AuxLogits.conv0.conv.weight": np.zeros([128, 768, 1, 1], "f4")}  # fmt: skip


def incomplete(state, shapes):
    return {name: value for name, value in state.items() if not name.startswith("Mixed_7c.branch1x1")}


def not_finite(state, shapes):
    return {**state, "Mixed_5b.branch1x1.bn.bias": np.full(64, np.nan, "f4")}


def negative_variance(state, shapes):
    return {**state, "Mixed_5b.branch1x1.bn.running_var": np.full(64, -1, "f4")}


@pytest.mark.parametrize(
    "change, message",
    [
        (torchvision, "holds the weights of torchvision's Inception, of 1000 classes; expected FID's"),
        (with_aux_logits, "holds the weights of torchvision's Inception, with an auxiliary classifier; expected FID's"),
        (lambda *_: {"a.weight": np.ones(3, "f4")}, "holds the weights of another network, such as a.weight"),
        (incomplete, "do not fit FID's Inception: 5 missing: Mixed_7c.branch1x1"),
        (not_finite, "Mixed_5b.branch1x1.bn.bias has 64 of 64 values that are not finite"),
        (negative_variance, "Mixed_5b.branch1x1.bn.running_var has variances below 0"),
    ],
)
def test_other_weights_are_told_apart(change, message, state, shapes, tmp_path):
    path = tmp_path / "weights.pdparams"
    save_pdparams(change(state, shapes), path)
    with pytest.raises(ValueError) as error:
        read_weights(path, shapes)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)


def test_a_diffusion_transformer_is_no_inception():
    with pytest.raises(
        ValueError, match=r"dit_tiny.pt: holds the weights of a diffusion transformer, .*; expected FID's"
    ):
        Inception.from_file(GOLDEN / "dit_tiny.pt")


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    for name in ("FID_INCEPTION_WEIGHTS", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoints = tmp_path / ".cache/torch/hub/checkpoints"
    published = "pt_inception-2015-12-05-6726825d.pth"
    url = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    with pytest.raises(ValueError) as error:
        find_weights()
    for part in (published, "SHA-256 6726825d", url + published, f"to {checkpoints}/", "FID_INCEPTION_WEIGHTS"):
        assert part in str(error.value)

    checkpoints.mkdir(parents=True)
    (checkpoints / "weights-inception-2015-12-05-6726825d.pth").touch()  # as torch-fidelity names it
    assert find_weights() == str(checkpoints / "weights-inception-2015-12-05-6726825d.pth")
    (checkpoints / published).touch()
    assert find_weights() == str(checkpoints / published)
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", str(tmp_path / "mine.pth"))
    with pytest.raises(ValueError, match="^FID_INCEPTION_WEIGHTS: .*mine.pth: there is no such file"):
        find_weights()
    (tmp_path / "mine.pth").touch()
    assert find_weights() == str(tmp_path / "mine.pth")
    with pytest.raises(ValueError, match="^other.pth: there is no such file.*download pt_inception"):
        find_weights("other.pth")


@pytest.mark.parametrize(
    "images",
    [np.zeros([2, 8, 8, 3], "f4"), np.zeros([8, 8, 3], "u1"), np.zeros([2, 8, 8], "u1"), np.zeros([0, 8, 8, 3], "u1")],
)
def test_images_that_are_none(images, inception):
    with pytest.raises(ValueError, match=r"^images: (float32|uint8) \[.*\], expected uint8 \[N, height, width, 3\]$"):
        inception(images)


class Means(paddle.nn.Layer):
    """Returns means of the channels, their doubles, and sums that images of 8x8 pixels alone have."""

    def __init__(self, outputs):
        super().__init__()
        ones = paddle.nn.initializer.Constant(1.0)
        self.scale = self.create_parameter([3], default_initializer=ones)
        self.pixels = self.create_parameter([192, 1], default_initializer=ones)
        self.outputs = outputs

    def forward(self, x):
        pool = x.mean(axis=[2, 3]) * self.scale
        found = {"pool": pool, "logits": 2 * pool}
        if "sums" in self.outputs:
            found["sums"] = paddle.matmul(x.flatten(1), self.pixels)
        return [found[name] for name in self.outputs]


def save_means(folder, *outputs):
    spec = paddle.static.InputSpec([None, 3, None, None], "float32")
    paddle.jit.save(Means(outputs), str(folder / "model"), input_spec=[spec])


@pytest.mark.parametrize("path", ["", "model", PROGRAM])
def test_any_program_gives_features(path, tmp_path):
    save_means(tmp_path, "pool", "logits")
    network = load_features(str(tmp_path / path))
    images = np.random.RandomState(0).randint(0, 256, [70, 6, 8, 3]).astype("u1")  # more than it gets at once
    found, expected = network(images), images.mean(axis=(1, 2)) / 255
    assert network.outputs == ("pool", "logits") and list(found) == ["pool", "logits"]
    np.testing.assert_allclose(found["pool"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["logits"], 2 * expected, rtol=1e-5)


def test_programs_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="^features incepton: expected inception, digits, or the path of a program"):
        load_features("incepton")
    with pytest.raises(ValueError, match="only the features 'inception' take a file of weights"):
        load_features("digits", weights="w.pth")
    save_means(tmp_path, "pool", "logits", "sums")
    with pytest.raises(ValueError, match="has 1 inputs and 3 outputs, expected images alone, and features"):
        load_features(tmp_path)
    save_means(tmp_path, "sums")
    with pytest.raises(ValueError, match=f"{PROGRAM}: Paddle .* cannot run it on these images"):
        load_features(tmp_path)(np.zeros([1, 6, 6, 3], "u1"))
    os.remove(tmp_path / "model.pdiparams")
    with pytest.raises(ValueError, match=f"{PROGRAM}: there is no model.pdiparams beside it"):
        load_features(tmp_path)
