"""Many images of a model, each of them a function of the seed and its number, whatever the batches and the ranks.

    labels = choose_labels("balanced", 1000, generator.num_classes, seed=0)
    for indices, images in draw_images(generator, range(1000), labels, seed=0, batch_size=32, guidance_scale=1.5):
        ...  # uint8 (n, H, W, 3)

All noise of image i, of the start and of every step, is drawn by numpy from (seed, i). Paddle's generators are neither
used nor changed.

What is the same to the bit: a network's results for an image depend, by rounding errors, on how many images it is
called on. So it is always called on a fixed number of them, the tile, the last one padded. Where the indices of the
tiles are the same too, as `tools/sample_npz.py` cuts them, so is every bit on the same machine; whatever the number of
threads, after `runtime.machine.set_mkl_reproducible` on Intel's processors. On a GPU the tile is the batch, for speed:
another batch size then changes some pixels by rounding errors. dopri5 chooses its steps for a tile as a whole.
"""

import numpy as np

LABELS = ("random", "balanced")
CPU_TILE = 32  # more makes a CPU hardly faster


def choose_labels(kind, num_images, num_classes, seed):
    """Returns the labels of the images, int64 `(num_images,)`.

    Args:
        kind: "random": drawn evenly from the classes, as the official sample_ddp.py does; "balanced": in turn, so that
            the classes' counts differ by one at most.
        num_classes: of the network; or the list of class ids to draw from.
    """
    classes = np.arange(num_classes) if np.ndim(num_classes) == 0 else np.array(num_classes)
    if kind not in LABELS:
        raise ValueError(f"labels {kind!r}: expected {' or '.join(LABELS)}")
    if kind == "balanced":
        places = np.arange(num_images) % len(classes)
    else:
        # Of the images' streams, which count from 0, none is the last one.
        places = _stream(seed, 2**64 - 1).integers(0, len(classes), num_images)
    return classes[places].astype("int64")


def image_noise(seed, indices, shape):
    """Returns the noise that images start from, standard normal float32 `(n, *shape)`: a function of (seed, index)."""
    return _draw([_stream(seed, index) for index in indices], shape)


def choose_tile(batch_size):
    """Returns how many images the network is called on at once: `CPU_TILE` on a CPU, `batch_size` on a GPU."""
    import paddle

    return CPU_TILE if paddle.get_device() == "cpu" else batch_size


def draw_images(generator, indices, labels, *, seed, batch_size, tile=None, rounding="dit", callback=None, **sampling):
    """Yields `(indices, images)` of one tile after the other: numbers of images, and uint8 numpy `(n, H, W, 3)`.

    Args:
        generator: a `sampling.generator.Generator`.
        indices: numbers of the images to draw, in this order.
        labels: their classes, one for each of `indices`.
        seed: of the noise, an integer, at least 0.
        batch_size: images at once on a GPU; of no effect on a CPU.
        tile: images that the network is called on at once; None for `choose_tile(batch_size)`.
        rounding: to uint8, a key of `features.autoencoder.ROUNDINGS`.
        callback, sampling: of `Generator.sample`.

    Raises `ValueError` as `Generator.sample`; images that are not finite are a `NotFiniteError` with their numbers.
    """
    import paddle

    indices, labels = np.asarray(indices, "int64"), np.asarray(labels, "int64")
    tile = tile or choose_tile(batch_size)
    shape = (generator.in_channels, generator.sample_size, generator.sample_size)
    for start in range(0, len(indices), tile):
        part = indices[start : start + tile]
        places = np.minimum(np.arange(start, start + tile), len(indices) - 1)  # the last tile repeats its last image
        streams = [_stream(seed, index) for index in indices[places]]

        def draw_noise(x, streams=streams):
            return paddle.to_tensor(_draw(streams, x.shape[1:])).astype(x.dtype)

        latents = generator.sample(
            labels[places].tolist(),
            seed=None,
            noise=paddle.to_tensor(_draw(streams, shape)).astype(generator.dtype),
            draw_noise=draw_noise,
            output="latents",
            callback=callback,
            **sampling,
        )
        images = generator.decode(latents, rounding, indices[places])
        yield part, images[: len(part)]


def _stream(seed, index):
    """Returns numpy's generator of an image's noise: Philox, counter-based, with the two numbers as its key."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], "uint64")))


def _draw(streams, shape):
    return np.stack([stream.standard_normal(shape, "float32") for stream in streams])
