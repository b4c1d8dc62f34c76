"""Between pixels and latents: autoencoders, the scale of their latents, encoding and decoding."""

import hashlib
import os
import re
from collections import namedtuple
from dataclasses import asdict, dataclass, replace

import numpy as np

from config.options import ABOVE_0, DEFAULT_VAE_CHANNELS, REQUIRED, VAE_KEYS, Option
from config.schema import SCALING_KEYS, check_section
from runtime.precision import cast_layer
from runtime.untrusted import shortened


class NotFiniteError(ValueError):
    """Images hold numbers that are not finite: they can't be shown. Doing the same again would end in the same way."""

    exit_code = 65  # as runtime.process.EXIT_BAD_STEP


def load_vae(name_or_path):
    """Loads the `AutoencoderKL` in a folder (config.json, model_state.pdparams) or of a hub name, in eval mode.

    Nothing in the folder is executed. No VAE there, one with an impossible scale, or no download is a `ValueError`.
    """
    from ppdiffusers import AutoencoderKL

    from weights.pretrained import explained, load_model

    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "config.json")):
        raise ValueError(f"{name_or_path}: no config.json in this folder; expected an AutoencoderKL")
    folder = "its folder, which holds config.json and model_state.pdparams"
    with explained(name_or_path, f"copy the VAE here from a machine that has one and give {folder}"):
        vae = load_model(AutoencoderKL, name_or_path)
    LatentScaling.of(vae.config, channels=vae.config.latent_channels, source=f"VAE {name_or_path}")
    return vae


# How images x in [-1, 1] become numbers 0 to 255: in words, and as a function of float32 numpy. The conversion to uint8
# cuts off what follows the point.
Rounding = namedtuple("Rounding", "words function")
ROUNDINGS = {  # of DiT's and SiT's sample_ddp.py, of diffusers, and of guided-diffusion's image_sample.py
    "dit": Rounding("127.5 x + 128, cut off", lambda x: (x * 127.5 + 128).clip(0, 255)),
    "diffusers": Rounding("255 (x / 2 + 0.5), rounded", lambda x: ((x / 2 + 0.5).clip(0, 1) * 255).round()),
    "adm": Rounding("127.5 (x + 1), cut off", lambda x: ((x + 1) * 127.5).clip(0, 255)),
}


class LatentDecoder:
    """Decodes latents, as networks see them: scaled as the config of the `AutoencoderKL` says, see `LatentScaling`."""

    def __init__(self, vae, batch_size=16):
        self.vae, self.batch_size = vae, batch_size
        self.scaling = LatentScaling.of(vae.config, channels=vae.config.latent_channels)

    def decode(self, latents, rounding=None, numbers=None):
        """Returns the images of latents `(N, C, h, w)`: float32 numpy `(N, H, W, 3)`, cut to [0, 1].

        With a `rounding`, a key of `ROUNDINGS`, they are uint8. NotFiniteError says in how many images, and in which,
        there is NaN or infinity: by their `numbers` `(N,)`, of which several may be the same, or their places.
        """
        import paddle

        finish = (lambda x: (x / 2 + 0.5).clip(0, 1)) if rounding is None else ROUNDINGS[rounding].function
        dtype, numbers = "float32" if rounding is None else "uint8", range(len(latents)) if numbers is None else numbers
        images, bad = [], set()
        with paddle.no_grad():
            for start in range(0, latents.shape[0], self.batch_size):
                batch = self.scaling.denormalize(latents[start : start + self.batch_size])
                decoded = self.vae.decode(batch.astype(self.vae.dtype)).sample.astype("float32")  # (n, 3, H, W)
                good = batch.astype("float32").isfinite().all([1, 2, 3]) & decoded.isfinite().all([1, 2, 3])  # (n,)
                bad.update(int(numbers[start + i]) for i, is_good in enumerate(good.tolist()) if not is_good)
                pixels = decoded.transpose([0, 2, 3, 1]).numpy()
                with np.errstate(invalid="ignore"):  # NaN has no integer
                    images.append(finish(pixels).astype(dtype))
        if bad:
            which = ", ".join(map(str, sorted(bad)[:10])) + (", ..." if len(bad) > 10 else "")
            raise NotFiniteError(
                f"{len(bad)} of {len(set(numbers))} images hold numbers that are not finite (NaN or infinity): number "
                f"{which}, counted from 0. Such weights, half precision or a large guidance scale lead to it"
            )
        return np.concatenate(images)

    def __call__(self, latents):
        """Returns the images of latents `(N, C, h, w)`, uint8 numpy `(N, H, W, 3)`; raises as `decode`."""
        return self.decode(latents, "diffusers")


_SCALING = {key: VAE_KEYS[key] for key in SCALING_KEYS} | {"scaling_factor": Option(REQUIRED, ABOVE_0)}


@dataclass(frozen=True)
class LatentScaling:
    """Turns an autoencoder's latents `z` into what networks see, and back, by the keys of diffusers' AutoencoderKL.

    Networks see `(z - shift_factor) * scaling_factor` (Stable Diffusion 3, Flux), or with statistics of every channel
    `(z - latents_mean) * scaling_factor / latents_std`, as diffusers' pipelines do.
    """

    scaling_factor: float
    shift_factor: float | None
    latents_mean: float | list | None  # a list: one a channel
    latents_std: float | list | None

    @classmethod
    def of(cls, config, *, channels=None, source="VAE"):
        """Makes one from an autoencoder's config, or any dict or object with the four keys; a missing one is null.

        A value that can't be, or a list of another length than `channels`, is a `ValueError` of one line that begins
        with `source`; so are a shift and a mean at once, which diffusers has no rule for.
        """
        given = config if isinstance(config, dict) else vars(config)
        given = {key: list(value) if isinstance(value := given.get(key), tuple) else value for key in SCALING_KEYS}
        values = check_section(_SCALING, given, source)
        for key, value in values.items():
            if isinstance(value, list) and len(value) != (channels or len(value)):
                expected = f"expected one for each of {channels} channels"
                raise ValueError(f"{source}: {key} has {len(value)} values, {expected}")
        scaling = cls(**values)
        if (scaling.latents_mean is None) != (scaling.latents_std is None):
            given, missing = ("std", "mean") if scaling.latents_mean is None else ("mean", "std")
            raise ValueError(f"{source}: has latents_{given} but no latents_{missing}; expected both or none")
        if scaling.shift_factor and scaling.latents_mean is not None:
            raise ValueError(f"{source}: has shift_factor and latents_mean, which can't be combined; expected one")
        return scaling

    as_dict = asdict

    @property
    def is_plain(self):
        """Is True where networks see `z * scaling_factor`, without shift or statistics."""
        return not self.shift_factor and self.latents_mean is None

    @property
    def offset_and_std(self):
        """Two numbers, or lists of one a channel: what is taken off `z`, and what it is divided by then."""
        return (self.shift_factor or 0.0, 1.0) if self.latents_mean is None else (self.latents_mean, self.latents_std)

    def normalize(self, z):
        """Returns latents `(N, C, h, w)`, numpy or Paddle, as networks see them, for an autoencoder's `z`."""
        return self.normalize_std(z - _per_channel(self.offset_and_std[0], z))

    def normalize_std(self, std):
        """Returns the standard deviation of latents `(N, C, h, w)` as networks see it: scaled, not shifted."""
        return std * self.scaling_factor / _per_channel(self.offset_and_std[1], std)

    def normalized(self, normalization, channels):
        """Returns the scaling of latents to which a normalisation of `features.normalization` was applied after this.

        `((z - offset) * factor / std - mean) * multiplier / deviation`, with a mean and a deviation for each channel.
        ValueError for those of another number of channels.
        """
        multiplier = normalization["multiplier"]
        after = {"scaling_factor": multiplier, **{f"latents_{key}": normalization[key] for key in ("mean", "std")}}
        after = LatentScaling.of(after, channels=channels, source="the features' latent_normalization")
        if after.latents_mean is None:
            return replace(self, scaling_factor=self.scaling_factor * multiplier)
        mean, deviation = (np.array(value, "float64") for value in after.offset_and_std)
        offset, std = (np.broadcast_to(np.array(value, "float64"), [channels]) for value in self.offset_and_std)
        unit = std / self.scaling_factor  # of z, where the stored latent changes by 1
        return LatentScaling(multiplier, None, (offset + mean * unit).tolist(), (deviation * unit).tolist())

    def denormalize(self, latents):
        """Returns the `z` that the autoencoder decodes, for latents `(N, C, h, w)` as networks see them."""
        offset, std = (_per_channel(value, latents) for value in self.offset_and_std)
        return latents * std / self.scaling_factor + offset


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
    mean, std = (np.broadcast_to(np.array(value, "float64"), [channels]) for value in scaling.offset_and_std)
    state = {name: value.astype("float32").numpy() for name, value in vae.state_dict().items()}

    def fold(name, size, change):
        weight = state.get(f"{name}.weight", np.eye(size)[:, :, None, None]).astype("float64")
        bias = state.get(f"{name}.bias", np.zeros(size)).astype("float64")
        weight, bias = change(weight, bias)
        state.update({f"{name}.weight": weight.astype("float32"), f"{name}.bias": bias.astype("float32")})

    # z = latents * std + mean, and then the convolution.
    fold("post_quant_conv", channels, lambda w, b: (w * std[:, None, None], b + w[:, :, 0, 0] @ mean))
    # The mean of the posterior, and the logarithm of its variance.
    factor, offset = np.concatenate([1 / std, np.ones(channels)]), np.concatenate([-mean / std, -2 * np.log(std)])
    fold("quant_conv", 2 * channels, lambda w, b: (w * factor[:, None, None, None], b * factor + offset))

    settings = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    settings.update(dict.fromkeys(SCALING_KEYS[1:]), use_quant_conv=True, use_post_quant_conv=True)
    folded = type(vae).from_config(settings)
    folded.set_state_dict({name: paddle.to_tensor(value) for name, value in state.items()})
    cast_layer(folded, vae.dtype)
    folded.eval()
    return folded


def weights_digest(vae):
    """Returns the sha256 of a network's weights by name, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        array = value.numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def downsampling(vae):
    """Returns how many pixels, in height and in width, become one latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def describe_vae(vae, name):
    """Returns the `vae` entry of a `features` section for an autoencoder of that name or path."""
    return {
        "name": os.path.abspath(name) if os.path.isdir(name) else name,
        "weights_sha256": weights_digest(vae),
        "latent_channels": vae.config.latent_channels,
        "downsampling": downsampling(vae),
        **(getattr(vae, "own_scaling", None) or LatentScaling.of(vae.config)).as_dict(),
    }


def choose_vae(given, features, default, flag, channels=None):
    """Returns `(name, note or None)`: the autoencoder asked for, else the features' own, else the default.

    `given` is the value of `flag`, or None; `features` the `vae` entry of a config's `features` section, or None.
    ValueError if the features' own is a folder that is not there, or the default one is not of the features' channels,
    or of `channels`.
    """
    own = features["name"] if features else None
    if given is None and own is None:
        channels, theirs = channels or (features or {}).get("latent_channels"), DEFAULT_VAE_CHANNELS.get(default)
        if None not in (channels, theirs) and channels != theirs:
            raise ValueError(
                f"the latents have {channels} channels, and their set does not tell its autoencoder; {default} has "
                f"{theirs}: give the one that encoded them by {flag}"
            )
        is_guess = None not in (features, default)
        return default, f"the set does not tell its autoencoder: {default} is taken, see {flag}" if is_guess else None
    if given is not None:
        return given, None
    if os.path.isdir(own) or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", own):
        return own, None
    shown, sha = shortened(own, 300), features["weights_sha256"]
    if sha is None:
        return default, f"the autoencoder of the features, {shown}, is not there; {default} is taken, see {flag}"
    raise ValueError(
        f"{shown}: there is no such folder; it held the autoencoder that the features were made with (sha256 of the "
        f"weights {shortened(sha, 12)}); give it by {flag}"
    )


def open_vae(given, features, *, default, flag, channels=None, normalization=None):
    """Loads the autoencoder for a model's latents, with the arguments of `choose_vae`; returns `(vae, notes)`.

    Weights that are the features' own, or that they do not tell, decode latents as those were scaled, whatever the
    config beside them says; a note tells how others differ. A `normalization` of the latents, the entry
    `latent_normalization` of the same section, becomes a part of the autoencoder's scaling: whoever decodes, exports
    or describes it goes by that. ValueError if it can't be loaded, or its latents are not of the features' shape, or
    of `channels`.
    """
    name, note = choose_vae(given, features, default, flag, channels)
    vae = load_vae(name)
    notes = [*filter(None, (note, match_vae(vae, name, features, flag)))]
    theirs = vae.config.latent_channels
    if channels not in (None, theirs):
        raise ValueError(f"{flag} {name}: decodes {theirs} channels, the latents have {channels}")
    if normalization is not None:
        vae.own_scaling = LatentScaling.of(vae.config)  # what `describe_vae` tells
        vae.register_to_config(**vae.own_scaling.normalized(normalization, theirs).as_dict())
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
    ours = describe_vae(vae, name)
    changes = [f"{what} {theirs}, not {own}" for what, theirs, own in vae_differences(features, ours)]
    if not changes:
        return None
    is_same = features["weights_sha256"] in (None, ours["weights_sha256"])
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
        hashes = (f"(weights of sha256 {shortened(vae['weights_sha256'], 12)})" for vae in both)
        names = (f"{shortened(vae['name'] or 'another one')} {sha}" for vae, sha in zip(both, hashes, strict=True))
        found.append(("autoencoder", *names))
    if [vae["scaling_factor"] is not None for vae in both] == [True, True]:
        changed = [key for key in SCALING_KEYS if (theirs[key] or None) != (ours[key] or None)]  # no shift is one of 0
        found += [(key, shortened(theirs[key], 40), shortened(ours[key], 40)) for key in changed]
    return found


class LatentEncoder:
    """Encodes pixels to what is stored of their latents: posterior samples, drawn from `seed`, or their `moments`.

    `vae` is an `AutoencoderKL`, `precision` a `runtime.precision.Precision`.
    """

    def __init__(self, vae, precision, *, seed, moments):
        self.vae, self.precision, self.seed, self.moments = vae, precision, seed, moments
        self.scaling = LatentScaling.of(vae.config)

    def __call__(self, pixels, indices, mirrored=False):
        """Starts the work and returns a tensor float32 (N, C, h, w), with moments (N, 2C, h, w): mean, then std.

        Both are scaled as the VAE's config says, as a sample mean + std * noise is. `pixels` are uint8 (N, S, S, 3),
        `indices` those of the images, for the noise; mirror images have noise of their own.
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
