"""What a run compares its samples with in the tests: a tiny program for features, and random images."""

import numpy as np


def write_program(folder):
    """Saves a Paddle Inference program for `evaluation.networks`; returns its path, as text."""
    import paddle

    class Features(paddle.nn.Layer):
        """Means of colours in the quarters of an image, and "logits" of them."""

        def __init__(self):
            super().__init__()
            self.logits = paddle.nn.Linear(12, 5)

        def forward(self, x):
            pool = paddle.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
            return pool, self.logits(pool)

    paddle.seed(0)
    spec = [paddle.static.InputSpec([None, 3, None, None], "float32")]
    paddle.jit.save(Features(), str(folder / "model"), input_spec=spec)
    return str(folder)


def write_reference(path, side, count=20):
    """Writes random images as an npz; returns its path, as text."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3))
    np.savez(path, arr_0=images.astype("uint8"))
    return str(path)
