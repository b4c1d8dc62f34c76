"""How good drawn digits are: does a classifier of real ones know them, and are they new?

`Digits` is the classifier, and the feature network that distances between digits are measured with.
"""

import os

import numpy as np
from PIL import Image

from features.images import load_image
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


def pass_through_vae(vae, samples, size, what, batch_size=50):
    """Returns images and labels of the samples of `find_images`, cropped to `size` pixels, encoded and decoded.

    They are float32 `(N, H, W, 3)` in [0, 1], and int64 `(N,)`; `what` is for the progress bar.
    """
    import paddle

    images = []
    with paddle.no_grad():
        for start in tqdm(range(0, len(samples), batch_size), desc=f"real {what} digits"):
            x = np.stack([load_image(path, size) for path, _ in samples[start : start + batch_size]])
            x = vae.decode(vae.encode(paddle.to_tensor(x)).latent_dist.mean).sample
            images.append((x / 2 + 0.5).clip(0, 1).transpose([0, 2, 3, 1]).numpy())
    return np.concatenate(images), np.array([label for _, label in samples])


def pool(images):
    """Returns what the classifier sees of images `(N, H, W, 3)`: grey, means of 2x2 pixels, `(N, H * W / 4)`."""
    n, h, w, _ = images.shape
    return images.mean(axis=-1).reshape(n, h // 2, 2, w // 2, 2).mean(axis=(2, 4)).reshape(n, -1)


def nearest_distance(images, train_images):
    """Returns the distance of each image to the nearest training image: root mean square of grey pixels, `(N,)`."""
    a, b = (x.mean(axis=-1).reshape(len(x), -1).astype("float64") for x in (images, train_images))  # (N, H * W)
    squared = (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)[None]  # (N, M)
    return np.sqrt(squared.min(axis=1).clip(0) / a.shape[1])


def evaluate(samples, labels, train, heldout):
    """Returns the figures of samples `(N, H, W, 3)` drawn for labels `(N,)`, as a dict.

    `train` and `heldout` are `(images, labels)` of real digits.
    """
    from sklearn.svm import SVC

    classifier = SVC(C=10.0).fit(pool(train[0]), train[1])
    assigned = classifier.predict(pool(samples))
    return {
        "num_images": len(samples),
        "classifier_accuracy_on_heldout": float((classifier.predict(pool(heldout[0])) == heldout[1]).mean()),
        "share_assigned_to_class_asked_for": float((assigned == labels).mean()),
        "share_by_class": {str(c): float((assigned[labels == c] == c).mean()) for c in sorted(set(labels.tolist()))},
        "nearest_train_distance_of_samples": float(nearest_distance(samples, train[0]).mean()),
        "nearest_train_distance_of_heldout": float(nearest_distance(heldout[0], train[0]).mean()),
    }
