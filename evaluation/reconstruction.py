"""How well an autoencoder gives images back: its reconstructions as a set of images, their PSNR and SSIM."""

import numpy as np

from evaluation.sets import ImageSet, size_in_words
from features.autoencoder import LatentDecoder, LatentEncoder, downsampling
from runtime.collective import run_on_every_rank
from runtime.precision import Precision

RANGE = 255.0  # of the pixels
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian
K1, K2 = 0.01, 0.03


def psnr(images, others):
    """Returns the peak signal-to-noise ratio of each pair, (N,) dB, of uint8 (N, H, W, C); infinity for equal images.

    10 log10(255^2 / MSE), the squared error averaged over pixels and channels.
    """
    error = ((images.astype("float64") - others) ** 2).mean(axis=(1, 2, 3))  # (N,)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(RANGE**2 / error)


def ssim(images, others):
    """Returns the structural similarity of each pair, (N,), of uint8 (N, H, W, C) of 11 pixels a side or more.

    Wang et al. 2004, eq. 13: means, variances and covariance under a Gaussian of 11x11 pixels and sigma 1.5, weights of
    sum 1, K1 = 0.01, K2 = 0.03, range 255. Of each channel by itself, averaged over channels and the places where the
    window lies inside the image: what scikit-image gives with `gaussian_weights=True, use_sample_covariance=False`.
    """
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    height, width = (_bands(weights / weights.sum(), size) for size in images.shape[1:3])

    def smooth(x):  # (C, H, W) -> (C, H - 10, W - 10)
        return height @ x @ width.T

    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    values = []
    for pair in zip(images, others, strict=True):
        x, y = (image.transpose(2, 0, 1).astype("float64") for image in pair)
        mean_x, mean_y = smooth(x), smooth(y)
        var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
        covariance = smooth(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        values.append((luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean())
    return np.array(values)


def _bands(weights, size):
    """Returns the matrix (size - len(weights) + 1, size) that takes the weighted mean at every place."""
    bands = np.zeros((size - len(weights) + 1, size))
    for row, band in enumerate(bands):
        band[row : row + len(weights)] = weights
    return bands


class Reconstructions(ImageSet):
    """An `ImageSet` encoded to the mean of the posterior, not a sample of it, and decoded by an `AutoencoderKL`.

    `quality()` tells how near to the originals the images are that `batches` has yielded. ValueError for images of a
    size that the autoencoder `name` does not take.
    """

    kind = "reconstructions"

    def __init__(self, originals, vae, name, batch_size):
        self.originals, self.path = originals, originals.path
        self.image_size, factor = originals.image_size, downsampling(vae)
        shown = f"{self.path}: images of {size_in_words(self.image_size)}"
        if any(side % factor for side in self.image_size):
            raise ValueError(f"{shown}: expected multiples of {factor}, the factor of {name}; see --image_size")
        if min(self.image_size) < WINDOW:
            raise ValueError(f"{shown}: SSIM takes {WINDOW} pixels a side or more")
        if vae.config.in_channels != 3:
            raise ValueError(f"VAE {name}: takes images of {vae.config.in_channels} channels, expected 3")
        self._channels = vae.config.latent_channels
        self._encode = LatentEncoder(vae, Precision("float32", "O1"), seed=0, moments=True)
        self._decoder = LatentDecoder(vae, batch_size)
        self._found = []

    def __len__(self):
        return len(self.originals)

    def batches(self, batch_size, start=0, stop=None):
        for images in self.originals.batches(batch_size, start, stop):
            mean = self._encode(images, ())[:, : self._channels]
            decoded = self._decoder.decode(mean, "dit", range(start, start + len(images)))
            start += len(images)
            self._found.append((psnr(images, decoded), ssim(images, decoded)))
            yield decoded

    def quality(self):
        """Returns `{"psnr": dB, "ssim": number}`, the means over the images of all ranks, which all call it.

        `psnr` is None if an image came back without any error.
        """
        found = [pair for own in run_on_every_rank(lambda: self._found) for pair in own]
        means = [float(np.concatenate(values).mean()) for values in zip(*found, strict=True)]
        return {"psnr": means[0] if np.isfinite(means[0]) else None, "ssim": means[1]}
