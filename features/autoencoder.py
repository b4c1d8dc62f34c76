"""Between pixels and latents: autoencoders, the scale of their latents, encoding and decoding."""

import hashlib
import math
import os
import re

import numpy as np

from config.schema import SCALING_KEYS
from runtime.untrusted import shortened


class NotFiniteError(ValueError):
    """Images hold numbers that are not finite: they can't be shown. Doing the same again would end in the same way."""

    exit_code = 65  # as runtime.process.EXIT_BAD_STEP


def load_vae(name_or_path):
    """Loads the `AutoencoderKL` in a folder (config.json, model_state.pdparams) or of that name on the hub.

    It is in eval mode. Nothing that the folder holds is executed.

    Raises:
        ValueError: one line: no VAE there, one whose scale of latents can't be, or the download failed, and what to do
            without a network.
    """
    from ppdiffusers import AutoencoderKL

    from weights.pretrained import load_model

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
    """Decodes latents, as networks see them, to images.

    Args:
        vae: an `AutoencoderKL`; its config says how the latents were scaled, see `LatentScaling`.
        batch_size: latents decoded at once.
    """

    def __init__(self, vae, batch_size=16):
        self.vae = vae
        self.scaling = LatentScaling.of(vae.config, channels=vae.config.latent_channels)
        self.batch_size = batch_size

    def decode(self, latents):
        """Returns the images of latents `(N, C, h, w)`, float32 numpy `(N, H, W, 3)`, cut to [0, 1].

        Raises:
            NotFiniteError: NaN or infinity in latents or images; says in how many images, and which.
        """
        import paddle

        images, bad = [], []
        with paddle.no_grad():
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
        """Returns the images of latents `(N, C, h, w)`, uint8 numpy `(N, H, W, 3)`; raises as `decode`."""
        return (self.decode(latents) * 255).round().astype("uint8")


class LatentScaling:
    """Turns an autoencoder's latents `z` into what networks see, and back, by the keys of diffusers' AutoencoderKL.

    Networks see `(z - shift_factor) * scaling_factor` (Stable Diffusion 3, Flux), or with statistics of every channel
    `(z - latents_mean) * scaling_factor / latents_std`, as diffusers' pipelines do.

    Args:
        scaling_factor, shift_factor: numbers. latents_mean, latents_std: numbers, or a list of one a channel.
        channels: of the latents, None for unknown. source: for messages.

    Raises:
        ValueError: one line: a value that can't be, or a shift and a mean at once, which diffusers has no rule for.
    """

    def __init__(
        self, scaling_factor, shift_factor=None, latents_mean=None, latents_std=None, *, channels=None, source="VAE"
    ):
        def number(key, value, is_positive=False):
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not good or (is_positive and value <= 0):
                expected = "a number above 0" if is_positive else "a finite number"
                raise ValueError(f"{source}: {key} is {str(value)[:40]}, expected {expected}")
            return float(value)

        def numbers(key, value, is_positive=False):
            if not isinstance(value, (list, tuple)):
                return number(key, value, is_positive)
            if len(value) != (channels or len(value)) or not value:
                expected = f"expected one for each of {channels} channels"
                raise ValueError(f"{source}: {key} has {len(value)} values, {expected}")
            return [number(key, one, is_positive) for one in value]

        self.scaling_factor = number("scaling_factor", scaling_factor, True)
        self.shift_factor = None if shift_factor is None else number("shift_factor", shift_factor)
        if (latents_mean is None) != (latents_std is None):
            given, missing = ("std", "mean") if latents_mean is None else ("mean", "std")
            raise ValueError(f"{source}: has latents_{given} but no latents_{missing}; expected both or none")
        self.latents_mean = self.latents_std = None
        if latents_mean is not None:
            self.latents_mean = numbers("latents_mean", latents_mean)
            self.latents_std = numbers("latents_std", latents_std, True)
            if self.shift_factor:
                raise ValueError(f"{source}: has shift_factor and latents_mean, which can't be combined; expected one")

    @classmethod
    def of(cls, config, *, channels=None, source="VAE"):
        """Makes one from an autoencoder's config, or any dict or object with the four keys; a missing one is null."""
        values = [config.get(key) if isinstance(config, dict) else getattr(config, key, None) for key in SCALING_KEYS]
        return cls(*values, channels=channels, source=source)

    def as_dict(self):
        """Returns the four keys and their values, for JSON."""
        return {key: getattr(self, key) for key in SCALING_KEYS}

    @property
    def is_plain(self):
        """Is True where networks see `z * scaling_factor`, without shift or statistics."""
        return not self.shift_factor and self.latents_mean is None

    def _offset(self):
        return (self.shift_factor or 0.0) if self.latents_mean is None else self.latents_mean

    def normalize(self, z):
        """Returns latents `(N, C, h, w)`, numpy or Paddle, as networks see them, for an autoencoder's `z`."""
        return self.normalize_std(z if self.is_plain else z - _per_channel(self._offset(), z))

    def normalize_std(self, std):
        """Returns the standard deviation of latents `(N, C, h, w)` as networks see it: scaled, not shifted."""
        std = std * self.scaling_factor
        return std if self.latents_std is None else std / _per_channel(self.latents_std, std)

    def denormalize(self, latents):
        """Returns the `z` that the autoencoder decodes, for latents `(N, C, h, w)` as networks see them."""
        z = latents if self.latents_std is None else latents * _per_channel(self.latents_std, latents)
        z = z / self.scaling_factor
        return z if self.is_plain else z + _per_channel(self._offset(), z)


def _per_channel(value, latents):
    """Returns a number as it is, and a list as an array that broadcasts over the channels of `latents`."""
    if not isinstance(value, list):
        return value
    array = np.array(value, "float32").reshape(-1, 1, 1)
    if isinstance(latents, np.ndarray):
        return array
    import paddle

    return paddle.to_tensor(array).astype(latents.dtype)


def fold_scaling(vae):
    """Makes an autoencoder of the same images whose latents are scaled by `scaling_factor` alone, for stock pipelines.

    They decode `latents / scaling_factor`. Shift and statistics go into the 1x1 convolutions between encoder and
    latents, and between latents and decoder, exactly; a convolution that is missing is added.
    """
    import paddle

    scaling = LatentScaling.of(vae.config)
    if scaling.is_plain:
        return vae
    channels = vae.config.latent_channels
    mean = np.broadcast_to(np.array(scaling._offset(), "float64"), [channels])
    std = np.broadcast_to(np.array(scaling.latents_std or 1.0, "float64"), [channels])
    state = {name: value.astype("float32").numpy() for name, value in vae.state_dict().items()}

    def convolution(name, size):
        weight = state.get(f"{name}.weight", np.eye(size)[:, :, None, None]).astype("float64")
        return weight, state.get(f"{name}.bias", np.zeros(size)).astype("float64")

    # z = latents * std + mean, and then the convolution.
    weight, bias = convolution("post_quant_conv", channels)
    after = {"weight": weight * std[:, None, None], "bias": bias + weight[:, :, 0, 0] @ mean}
    # The mean of the posterior, and the logarithm of its variance.
    weight, bias = convolution("quant_conv", 2 * channels)
    factor = np.concatenate([1 / std, np.ones(channels)])
    before = {
        "weight": weight * factor[:, None, None, None],
        "bias": bias * factor + np.concatenate([-mean / std, -2 * np.log(std)]),
    }
    for name, part in (("post_quant_conv", after), ("quant_conv", before)):
        state.update({f"{name}.{key}": value.astype("float32") for key, value in part.items()})

    settings = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    settings.update(dict.fromkeys(SCALING_KEYS[1:]), use_quant_conv=True, use_post_quant_conv=True)
    folded = type(vae).from_config(settings)
    folded.set_state_dict({name: paddle.to_tensor(value) for name, value in state.items()})
    folded.to(dtype=vae.dtype)
    folded.eval()
    return folded


def weights_digest(vae):
    """Returns the sha256 of a network's weights by name, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        array = value.numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def downsampling(vae):
    """Returns how many pixels, in height and in width, become one latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Which autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def choose_vae(given, features, default, flag):
    """Returns `(name, note or None)`: the autoencoder asked for, else the features' own, else the default.

    Args:
        given: the flag's value, or None.
        features: the `vae` entry of a config's `features` section, or None: what the latents were made with.
        default: folder or hub name for latents that nothing is known of. flag: its name, for messages.

    Raises:
        ValueError: one line: the features' own is a folder that is not there.
    """
    own = features["name"] if features else None
    if given is not None or own is None:
        return given if given is not None else default, None
    if os.path.isdir(own) or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", own):
        return own, None
    shown, sha = shortened(own, 300), features["weights_sha256"]
    if sha is None:
        return default, f"the autoencoder of the features, {shown}, is not there; {default} is taken, see {flag}"
    raise ValueError(
        f"{shown}: there is no such folder; it held the autoencoder that the features were made with (sha256 of the "
        f"weights {shortened(sha, 12)}); give it by {flag}"
    )


def open_vae(given, features, *, default, flag, channels=None):
    """Loads the autoencoder for a model's latents, with the arguments of `choose_vae`.

    Weights that are the features' own decode latents as those were scaled, whatever the config beside them says.

    Args:
        channels: of the latents; None: not compared.

    Returns:
        `(vae, notes)`: sentences for the user, among them how it differs from the one that made the features.

    Raises:
        ValueError: one line: it can't be loaded, or its latents are not of the features' shape.
    """
    name, note = choose_vae(given, features, default, flag)
    vae = load_vae(name)
    notes = [text for text in (note, match_vae(vae, name, features, flag)) if text]
    theirs = vae.config.latent_channels
    if channels not in (None, theirs):
        raise ValueError(f"{flag} {name}: decodes {theirs} channels, the latents have {channels}")
    return vae, notes


def match_vae(vae, name, features, flag):
    """Returns a sentence on how an autoencoder differs from the features' own, or None; see `open_vae`."""
    if not features:
        return None
    for key, ours in (("latent_channels", vae.config.latent_channels), ("downsampling", downsampling(vae))):
        if features[key] not in (None, ours):
            raise ValueError(
                f"{flag} {name}: {key} is {ours}, and {features[key]} for the autoencoder that made the features"
            )
    ours = {"name": name, "weights_sha256": weights_digest(vae), **LatentScaling.of(vae.config).as_dict()}
    changes = [f"{what} {theirs}, not {own}" for what, theirs, own in vae_differences(features, ours)]
    if not changes:
        return None
    is_same = features["weights_sha256"] == ours["weights_sha256"]
    if is_same:
        vae.register_to_config(**{key: features[key] for key in SCALING_KEYS})
        LatentScaling.of(vae.config, channels=vae.config.latent_channels, source="the features' autoencoder")
    return f"VAE {name}: the features were made with {', '.join(changes)}{', and are decoded so' if is_same else ''}"


def vae_differences(theirs, ours):
    """Lists, as `(what, their value, our value)` in words, how two `vae` entries of `features` sections differ.

    Weights and scaling are compared, as far as both entries tell them.
    """
    both = [vae for vae in (theirs, ours) if vae]
    found = []
    if len({vae["weights_sha256"] for vae in both} - {None}) == 2:
        names = (f"{shortened(vae['name'])} (weights of sha256 {shortened(vae['weights_sha256'], 12)})" for vae in both)
        found.append(("autoencoder", *names))
    if [vae["scaling_factor"] is not None for vae in both] == [True, True]:
        changed = [key for key in SCALING_KEYS if (theirs[key] or None) != (ours[key] or None)]  # no shift is one of 0
        found += [(key, shortened(theirs[key], 40), shortened(ours[key], 40)) for key in changed]
    return found


class LatentEncoder:
    """Encodes pixels to what is stored of their latents.

    Args:
        vae: an `AutoencoderKL`.
        precision: a `runtime.precision.Precision`.
        seed: of the posterior samples.
        moments: keep mean and standard deviation instead of a sample of them.
    """

    def __init__(self, vae, precision, *, seed, moments):
        self.vae, self.precision, self.seed, self.moments = vae, precision, seed, moments
        self.scaling = LatentScaling.of(vae.config)

    def __call__(self, pixels, indices, mirrored=False):
        """Starts the work and returns a tensor float32 (N, C, h, w), with moments (N, 2C, h, w): mean, then std.

        Both are scaled as the VAE's config says, as a sample mean + std * noise is.

        Args:
            pixels: uint8 (N, S, S, 3).
            indices: of the images, for the noise.
            mirrored: encode the mirror images, with noise of their own.
        """
        import paddle

        images = paddle.to_tensor(np.ascontiguousarray(pixels[:, :, ::-1]) if mirrored else pixels).astype("float32")
        images = images.transpose([0, 3, 1, 2]) / 127.5 - 1.0  # (N, 3, S, S) in [-1, 1]
        try:
            with paddle.no_grad(), self.precision.autocast():
                posterior = self.vae.encode(images).latent_dist
        except MemoryError:
            raise ValueError(f"--batch_size {len(pixels)}: too large for the device's memory; give a smaller") from None
        mean = posterior.mean.astype("float32")  # (N, C, h, w)
        std = paddle.exp(0.5 * posterior.logvar.astype("float32"))
        if self.moments:
            return paddle.concat([self.scaling.normalize(mean), self.scaling.normalize_std(std)], axis=1)
        rngs = [np.random.default_rng((self.seed, index, 1) if mirrored else (self.seed, index)) for index in indices]
        noise = np.stack([rng.standard_normal(mean.shape[1:], "float32") for rng in rngs])
        return self.scaling.normalize(mean + std * paddle.to_tensor(noise))
