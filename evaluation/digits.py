"""How good drawn digits are: does a classifier of real ones know them, and are they new?

Samples much nearer to the training images than held-out digits are have been memorised. Real images pass through the
pipeline's VAE (encoded and decoded) first, as the samples have left its decoder.
"""

import numpy as np
from PIL import Image

from features.images import load_image
from runtime.progress import tqdm


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
