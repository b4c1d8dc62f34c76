"""Latents to pixels. The step from [-1, 1] to 8 bits lives here only, the scale of latents in `autoencoder`."""

import os

import numpy as np
import paddle

from sampling.autoencoder import LatentScaling
from sampling.pretrained import load_model


class NotFiniteError(ValueError):
    """Images hold numbers that are not finite: they can't be shown. Doing the same again would end in the same way."""

    exit_code = 65  # as training.runtime.EXIT_BAD_STEP


def load_vae(name_or_path):
    """The `AutoencoderKL` in a folder (config.json, model_state.pdparams) or of that name on the hub, in eval mode.

    Nothing that it holds is executed.

    Raises:
        ValueError: one line: no VAE there, one whose scale of latents can't be, or the download failed, and what to do
            without a network.
    """
    from ppdiffusers import AutoencoderKL

    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "config.json")):
        raise ValueError(f"{name_or_path}: no config.json in this folder; expected an AutoencoderKL")
    try:
        vae = load_model(AutoencoderKL, name_or_path)
    except Exception as error:  # the hub clients raise a dozen unrelated types
        if isinstance(error, ValueError) and os.path.isdir(name_or_path):
            raise
        reason = str(error).strip().split("\n")[0].split(". ")[0][:200]
        raise ValueError(
            f"VAE {name_or_path}: cannot be loaded or downloaded ({reason}). Without a network, copy the VAE here "
            "from a machine that has one and give its folder, which holds config.json and model_state.pdparams"
        ) from None
    LatentScaling.of(vae.config, channels=vae.config.latent_channels, source=f"VAE {name_or_path}")
    return vae


class LatentDecoder:
    """Latents, as networks see them, to images.

    Args:
        vae: an `AutoencoderKL`; its config says how the latents were scaled, see `LatentScaling`.
        batch_size: latents decoded at once.
    """

    def __init__(self, vae, batch_size=16):
        self.vae = vae
        self.scaling = LatentScaling.of(vae.config, channels=vae.config.latent_channels)
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(cls, name_or_path, batch_size=16):
        """With the VAE of a folder or of the hub; see `load_vae`."""
        return cls(load_vae(name_or_path), batch_size)

    @paddle.no_grad()
    def decode(self, latents):
        """Latents `(N, C, h, w)` to float32 numpy `(N, H, W, 3)` in [0, 1]; what lies outside is cut off.

        Raises:
            NotFiniteError: NaN or infinity in latents or images; says in how many images, and which.
        """
        images, bad = [], []
        for start in range(0, latents.shape[0], self.batch_size):
            batch = self.scaling.denormalize(latents[start : start + self.batch_size])
            decoded = self.vae.decode(batch.astype(self.vae.dtype)).sample  # (n, 3, H, W) in [-1, 1]
            decoded = decoded.astype("float32")
            good = batch.astype("float32").isfinite().all([1, 2, 3]) & decoded.isfinite().all([1, 2, 3])  # (n,)
            bad.extend(start + i for i, is_good in enumerate(good.tolist()) if not is_good)
            images.append((decoded / 2 + 0.5).clip(0, 1).transpose([0, 2, 3, 1]).numpy())
        if bad:
            which = f"{', '.join(map(str, bad[:10]))}{', ...' if len(bad) > 10 else ''}"
            raise NotFiniteError(
                f"{len(bad)} of {latents.shape[0]} images hold numbers that are not finite (NaN or infinity): number "
                f"{which}, counted from 0. Such weights, half precision or a large guidance scale lead to it"
            )
        return np.concatenate(images)

    def __call__(self, latents):
        """Latents `(N, C, h, w)` to uint8 numpy `(N, H, W, 3)`; raises as `decode`."""
        return (self.decode(latents) * 255).round().astype("uint8")
