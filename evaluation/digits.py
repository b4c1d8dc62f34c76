"""How good drawn digits are: does a classifier of real ones know them, and are they new?

`Digits` is the classifier, and the feature network that distances between digits are measured with.
"""

import os

import numpy as np
from PIL import Image

from evaluation.run import METRICS as ALL_METRICS
from evaluation.run import OUTPUTS, Reference, compute_metrics, extract
from features.images import load_pixels
from runtime.files import sha256_of_file
from runtime.progress import tqdm
from weights.files import load_weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WEIGHTS = os.path.join(ROOT, "assets", "digits_classifier", "model.safetensors")
SIDE = 16  # of what the classifier sees


class Digits:
    """Is the feature network for digits: a small classifier, whose weights tools/train_digits_classifier.py made.

    It was trained on the training digits alone, and to be the less sure the noisier or the more blurred a digit is, so
    that its features tell corrupted digits from clean ones. numpy computes it, in float32.
    """

    outputs = ("pool", "logits")

    def __init__(self, path=WEIGHTS):
        state = load_weights(path)
        self.layers = [(state[f"{i}.weight"], state[f"{i}.bias"]) for i in range(len(state) // 2)]
        self.settings = {"features": "digits", "weights_sha256": sha256_of_file(path).hex()}

    def __call__(self, images):
        """Returns `{"pool": (N, 64), "logits": (N, 10)}`, float32, of uint8 images `(N, H, W, 3)`; see `shrink`.

        `pool` is the last hidden layer, `logits` what the classifier says of the digits 0 to 9.
        """
        x = shrink(images)  # (N, 256)
        *hidden, (weight, bias) = self.layers
        for into, offset in hidden:
            x = np.maximum(x @ into + offset, 0)
        return {"pool": x, "logits": x @ weight + bias}


METRICS = tuple(metric for metric in ALL_METRICS if OUTPUTS[metric] in Digits.outputs)


def shrink(images):
    """Returns what the classifier sees of uint8 images `(N, H, W, 3)`: grey, 16x16, in [0, 1]; float32 `(N, 256)`.

    Each of its pixels is the mean over a block of the image's. `ValueError` for images that have no such blocks.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images of {images.dtype} {images.shape}: expected uint8 (N, H, W, 3)")
    n, h, w, _ = images.shape
    if not h or not w or h % SIDE or w % SIDE:
        raise ValueError(f"images of {h}x{w} pixels: digits features need height and width in multiples of {SIDE}")
    grey = images.mean(axis=-1, dtype="float32") / 255  # (N, H, W)
    return grey.reshape(n, SIDE, h // SIDE, SIDE, w // SIDE).mean(axis=(2, 4)).reshape(n, -1)


def check_size(side, path):
    """Raises `ValueError` unless the digit at `path` has `side` pixels in height and in width, as the samples have."""
    with Image.open(path) as digit:
        found = "{}x{}".format(*digit.size)
    if found != f"{side}x{side}":
        raise ValueError(
            f"the pipeline draws images of {side}x{side} pixels, {path} is {found}; expected digits of that size: "
            f"tools/prepare_digits.py --image_size {side}"
        )


def read_digits(samples, size):
    """Returns images and labels of the samples of `find_images`: uint8 `(N, size, size, 3)`, cropped, and `(N,)`."""
    return np.stack([load_pixels(path, size) for path, _ in samples]), np.array([label for _, label in samples])


def pass_through_vae(vae, images, what, batch_size=50):
    """Returns uint8 images `(N, H, W, 3)`, encoded and decoded, as samples look; `what` is for the progress bar."""
    import paddle

    decoded = []
    with paddle.no_grad():
        for start in tqdm(range(0, len(images), batch_size), desc=f"real {what} digits"):
            x = images[start : start + batch_size].astype("float32").transpose(0, 3, 1, 2) / 127.5 - 1  # (n, 3, H, W)
            x = vae.decode(vae.encode(paddle.to_tensor(x)).latent_dist.mean).sample
            x = (x / 2 + 0.5).clip(0, 1).transpose([0, 2, 3, 1]).numpy()
            decoded.append((x * 255).round().astype("uint8"))
    return np.concatenate(decoded)


def grey(images):
    """Returns images `(N, H, W, 3)` as rows of grey pixels in [0, 1], float64 `(N, H * W)`."""
    return images.mean(axis=-1).reshape(len(images), -1) / 255


def nearest_distance(images, train_images):
    """Returns the distance of each image to the nearest training image: root mean square of grey pixels, `(N,)`."""
    a, b = grey(images), grey(train_images)  # (N, H * W), (M, H * W)
    squared = (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)[None]  # (N, M)
    return np.sqrt(squared.min(axis=1).clip(0) / a.shape[1])


def spread(images, labels, real):
    """Returns the variance of grey pixels within a class, as a part of that of `real` digits `(images, labels)`.

    It is the mean over pixels and classes; None where a class has one image.
    """
    found = []
    for pictures, classes in ((images, labels), real):
        rows = [grey(pictures[classes == label]) for label in np.unique(classes)]
        if min(map(len, rows)) < 2:
            return None
        found.append(np.mean([of_class.var(axis=0, ddof=1).mean() for of_class in rows]))
    return float(found[0] / found[1])


def share(network, images, labels):
    """Returns the share of images that a `Digits` assigns to their class, of the labels `(N,)`."""
    return float((network(images)["logits"].argmax(axis=1) == labels).mean())


def judge(network, images, labels, heldout):
    """Returns the figures of images `(N, H, W, 3)` of the classes `(N,)`, beside `heldout` digits `(images, labels)`.

    The metrics are those on the features of `network`.
    """
    samples = extract(network, [images], metrics=METRICS)
    reference = Reference("held-out digits", None, {})
    reference.extracted = extract(network, [heldout[0]], metrics=METRICS)
    return {"share": share(network, images, labels), **compute_metrics(samples, reference, METRICS)}


def evaluate(samples, labels, train, heldout, vae):
    """Returns the figures of samples, uint8 `(N, H, W, 3)`, drawn for labels `(N,)`, as a dict.

    `train` and `heldout` are `(images, labels)` of real digits. Samples are compared with held-out digits as these are,
    so what the autoencoder loses counts: "real" has the same figures of as many training digits of each class that
    have passed through `vae`. The spread within a class is a part of that of the training digits, which a network is to
    give back; "real" has that of held-out ones. For it and for the distances all images have left the decoder.
    """
    network = Digits()
    found = judge(network, samples, labels, heldout)
    assigned = network(samples)["logits"].argmax(axis=1)
    train_images, heldout_images = (
        pass_through_vae(vae, images, what) for what, (images, _) in (("train", train), ("heldout", heldout))
    )
    order = np.random.default_rng(0).permutation(len(train_images))
    of_class = {label: order[train[1][order] == label][: (labels == label).sum()] for label in np.unique(labels)}
    chosen = np.concatenate([*of_class.values()])
    real = train_images[chosen], train[1][chosen]
    taught = train_images, train[1]
    return {
        "num_images": len(samples),
        "num_heldout": len(heldout[0]),
        "classifier_accuracy_on_heldout": share(network, *heldout),
        "share_assigned_to_class_asked_for": found.pop("share"),
        "share_by_class": {str(c): float((assigned[labels == c] == c).mean()) for c in sorted(set(labels.tolist()))},
        "nearest_train_distance_of_samples": float(nearest_distance(samples, train_images).mean()),
        "nearest_train_distance_of_heldout": float(nearest_distance(heldout_images, train_images).mean()),
        "spread": spread(samples, labels, taught),
        **found,
        "real": {"spread": spread(heldout_images, heldout[1], taught), **judge(network, *real, heldout)},
        "settings": network.settings,
    }
