"""Features of images by the Inception of 2015-12-05, as ADM's evaluator, pytorch-fid and torch-fidelity compute them.

The weights are their authors' and are not shipped: `find_weights` says where they may lie and where to get them.
"""

import os
import tempfile

import numpy as np

from models.state import check_finite, check_state
from runtime.files import sha256_of_file
from runtime.untrusted import listed
from weights.files import load_weights

VARIABLE = "FID_INCEPTION_WEIGHTS"
SHA256_PREFIX = "6726825d"  # of the published file, which pytorch-fid and torch-fidelity keep by different names
PYTORCH_FID_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
PUBLISHED = (f"pt_inception-2015-12-05-{SHA256_PREFIX}.pth", f"weights-inception-2015-12-05-{SHA256_PREFIX}.pth")
PREPROCESSING = ("adm", "pytorch-fid")
SIDE = 299  # pixels that the network takes
CHUNK = 16  # images that pass through the network at once: more are no faster on a CPU, and take memory
GPU_CHUNK = 64


def find_weights(path=None):
    """Returns the path of the weights: the one given, else that in `FID_INCEPTION_WEIGHTS`, else a file in the cache.

    The cache is PyTorch's, where pytorch-fid and torch-fidelity keep what they download: `TORCH_HOME`, else
    `XDG_CACHE_HOME/torch`, else `~/.cache/torch`.

    Raises ValueError, one line that says where to get which file and where to put it, if there is none.
    """
    cache = os.environ.get("TORCH_HOME")
    cache = cache or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "torch")
    checkpoints = os.path.join(os.path.expanduser(cache), "hub", "checkpoints")
    advice = (
        f"download {PUBLISHED[0]} (96 MB, SHA-256 {SHA256_PREFIX}...) from {PYTORCH_FID_URL}{PUBLISHED[0]} to "
        f"{checkpoints}{os.sep}, or say where it is: {VARIABLE}=PATH in the environment, --inception PATH of "
        "tools/evaluate.py, or inception_weights in a config's section evaluation"
    )
    chosen = path or os.environ.get(VARIABLE)
    if chosen:
        if os.path.exists(chosen):
            return os.fspath(chosen)
        source = "" if path else f"{VARIABLE}: "
        raise ValueError(f"{source}{chosen}: there is no such file of Inception weights; {advice}")
    found = [file for name in PUBLISHED if os.path.isfile(file := os.path.join(checkpoints, name))]
    if not found:
        raise ValueError(f"the weights of FID's Inception are not on this machine; {advice}")
    return found[0]


class Inception:
    """A network that gives `pool` (N, 2048), `spatial` (N, 2023) and `logits` (N, 1008, without bias) of images.

    `pool` belongs to FID, KID, MIND, precision and recall, `spatial` to sFID, `logits` to the Inception Score.
    `settings` say for a report which preprocessing and weights these are.

    Args:
        network: an `InceptionNetwork` with its weights; it computes on Paddle's current device.
        preprocessing: "adm" resizes as TensorFlow 1 did (no half-pixel centres), which the papers' figures belong to;
            "pytorch-fid" with half-pixel centres. Neither smooths.
    """

    outputs = ("pool", "spatial", "logits")

    def __init__(self, network, preprocessing="adm", **settings):
        import paddle

        if preprocessing not in PREPROCESSING:
            raise ValueError(f"preprocessing {preprocessing!r}: expected one of {', '.join(PREPROCESSING)}")
        self.preprocessing = preprocessing
        self.settings = {"features": "inception", "preprocessing": preprocessing, **settings}
        self._on_gpu = paddle.get_device() != "cpu"
        self._run = network if self._on_gpu else _as_program(network)

    @classmethod
    def from_file(cls, path, preprocessing="adm"):
        """Returns the network of a weight file: pytorch-fid's or torch-fidelity's `.pth`, or the same as `.pdparams`.

        Nothing in the file is executed. Raises ValueError, one line with the path: unreadable, the weights of another
        network, incomplete, or not finite.
        """
        from evaluation.inception_network import InceptionNetwork

        network = InceptionNetwork()
        network.set_weights(read_weights(path, network.file_shapes()))
        checksum = sha256_of_file(path).hex()
        published = checksum.startswith(SHA256_PREFIX)
        return cls(network, preprocessing, weights_sha256=checksum, weights_published=published)

    def __call__(self, images):
        """Returns `{name: float32 (N, ...)}` of uint8 images (N, H, W, 3), RGB, of any height and width."""
        import paddle

        from runtime.paddle_private import full_float32

        check_images(images)
        parts, start = [], 0
        with paddle.no_grad(), paddle.amp.auto_cast(enable=False), full_float32():
            while start < len(images):
                left = len(images) - start
                # Of what is left the largest power of two: each size is prepared once, so that there are but few.
                size = min(GPU_CHUNK if self._on_gpu else CHUNK, 1 << left.bit_length() - 1)
                parts.append([part.numpy() for part in self._run(self._prepared(images[start : start + size]))])
                start += size
        return dict(zip(self.outputs, map(np.concatenate, zip(*parts, strict=True)), strict=True))

    def _prepared(self, images):
        """Returns images as the network takes them, a float32 tensor (N, 3, 299, 299)."""
        import paddle
        import paddle.nn.functional as F

        x = paddle.to_tensor(images).astype("float32").transpose([0, 3, 1, 2])
        if self.preprocessing == "adm":
            # align_mode 1: source = index * in / out in float32, as in TensorFlow 1.
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, align_mode=1)
            return (x - 128) / 128
        x = F.interpolate(x / 255, (SIDE, SIDE), mode="bilinear", align_corners=False, align_mode=0)
        return 2 * x - 1


def check_images(images):
    """Raises ValueError unless these are uint8 images (N, H, W, 3), at least one."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(f"images: {images.dtype} {list(images.shape)}, expected uint8 [N, height, width, 3]")


def _as_program(network):
    """Returns the network as a program that a CPU runs by oneDNN: in about half the time of eager mode."""
    from runtime.programs import PROGRAMS, Program, save_program

    with tempfile.TemporaryDirectory(prefix="inception-") as folder:
        save_program(network, [("images", [3, SIDE, SIDE], "float32")], os.path.join(folder, "model"))
        program = next(path for name in PROGRAMS if os.path.exists(path := os.path.join(folder, name)))
        return Program(program, "cpu")


# Names that tell what other network a file is of.
OTHERS = {
    "AuxLogits.conv0.conv.weight": "torchvision's Inception, with an auxiliary classifier",
    "x_embedder.proj.weight": "a diffusion transformer, such as a DiT or SiT",
    "x_embedder.weight": "a diffusion transformer, such as a Large-DiT",
    "encoder.conv_in.weight": "an autoencoder (VAE)",
    "conv1.weight": "a ResNet or the like",
}


def read_weights(path, shapes):
    """Returns `{name: array}` of a weight file, with exactly the names and shapes given; see `Inception.from_file`."""
    state = {_file_name(name): value for name, value in load_weights(path).items()}
    wanted = f"expected FID's Inception, {PUBLISHED[0]} of pytorch-fid"
    other = next((what for name, what in OTHERS.items() if name in state), None)
    fc = state.get("fc.weight")
    if fc is not None and fc.shape[::-1] == shapes["fc.weight"]:  # Paddle's layout
        state["fc.weight"] = fc = fc.T
    if other is None and fc is not None and "Mixed_7c.branch1x1.conv.weight" in state and 1000 in fc.shape:
        other = "torchvision's Inception, of 1000 classes"
    if other is None and state.keys().isdisjoint(shapes):
        other = f"another network, such as {listed(list(state), 1)}"
    if other is not None:
        raise ValueError(f"{path}: holds the weights of {other}; {wanted}")
    # What the features have no use for.
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    state.pop("fc.bias", None)
    check_state(state, shapes, source=path, what="FID's Inception")
    check_finite(state, source=path)
    negative = [name for name in state if name.endswith("running_var") and (state[name] < 0).any()]
    if negative:
        raise ValueError(f"{path}: {negative[0]} has variances below 0")
    return state


def _file_name(name):
    """Returns pytorch-fid's name of a tensor, which may have that of a Paddle layer."""
    return name.replace(".bn._mean", ".bn.running_mean").replace(".bn._variance", ".bn.running_var")
