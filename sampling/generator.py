"""Generators: a network and what turns noise into its latents, with one way to draw images for every kind of model.

    generator = load_generator("outputs/trainer/checkpoint-5000")
    images = generator.sample(["golden retriever", 207], seed=0, num_inference_steps=50)  # uint8 (2, H, W, 3)

The noise of image i is a function of the seed and of i's place among the classes.
"""

import tempfile
import warnings
from dataclasses import dataclass, field, replace
from functools import partial

import paddle

from config.options import DEFAULT_VAE, GUIDANCE_SCALE, SIT_VAE
from config.schema import MODEL_TYPES, internal_guidance_block
from features.autoencoder import LatentDecoder, NotFiniteError, choose_vae, downsampling, open_vae, weights_digest
from models import build_model
from models.regularizers import second_index
from models.state import REGULARIZERS, check_finite, check_state, expected_shapes, for_sampling
from runtime.precision import cast_layer
from runtime.process import resolve_device
from runtime.untrusted import shortened
from sampling.guidance import default_channels, guided
from sampling.guidance_settings import GUIDE_SCALE, check_guidance, check_scale, no_second_layer
from sampling.guides import guide_differences
from sampling.labels import find_classes
from sampling.model_path import Model, check_dtype, describe_model
from sampling.pipelines.folder import check_vae
from sampling.schedulers import CheckpointSampler, PipelineSampler, make_scheduler
from sampling.times import times_of
from transport import Sampler
from weights.source import leave_out, read_weights


@dataclass
class Generator:
    """Draws images of classes, or the latents that a VAE decodes to them."""

    # Called as `network(x, t, y)`: latents, times and int64 labels `(N,)`, to `(N, C or 2C, H, W)`; for internal
    # guidance with `hooks` too.
    network: object
    objective: object  # turns noise into latents by `sample(denoiser, noise, *, num_steps, callback, ...)`
    in_channels: int  # of the latents
    sample_size: int  # of the latents
    num_classes: int
    null_class: int | None  # the label without a class; None if the network has none
    vae: object = None  # an `AutoencoderKL`, or what a `LatentDecoder` needs of one; None: latents only
    labels: dict = field(default_factory=dict)  # `{id: label}`
    guided_channels: object = "auto"  # leading latent channels that are guided: an integer, None for all, or "auto"
    dtype: object = "float32"  # of the noise
    path: str = "the network"  # of the model, for messages
    notes: list = field(default_factory=list)  # sentences that a user should read
    vae_name: str | None = None  # folder or hub name, of one that the model does not bring along
    features: dict | None = None  # `features` section of a config, see `sampling.model_path.Model`
    digests: object = None  # returns the sha256 of the weights of network and VAE; see `layer_digests`
    noted: set = field(default_factory=set, repr=False)  # `(steps, method)` on which a user has been told what is odd
    guide: object = None  # called as `network`: a worse network, for autoguidance; see `guided_by`
    guide_digests: object = None  # as `digests`, of the guide
    has_second: bool = False  # the network has the second final layer of internal guidance
    check_weights: object = None  # called where images are not finite; raises `ValueError` if the weights are to blame

    @property
    def kind(self):
        """Is "transport" or "diffusion", of the objective."""
        return "transport" if hasattr(self.objective, "transport") else "diffusion"

    def describe(self, num_inference_steps=None, **options):
        """Lists sentences that a user should read: on the model, and on sampling it by these settings of `sample`."""
        notes = list(self.notes)
        if num_inference_steps is not None:
            notes.append(self._note(num_inference_steps, options.get("method")))
        return [note for note in notes if note]

    def _note(self, num_steps, method):
        """Returns a sentence on a number of steps in which the network is not exact, else None, and remembers it."""
        self.noted.add((num_steps, method))
        return self.objective.note(num_steps, method) if hasattr(self.objective, "note") else None

    def find_classes(self, classes=None):
        """Lists class ids for ids, names or parts of names; see `sampling.labels.find_classes`."""
        return find_classes(classes, self.labels, self.num_classes)

    def names(self, ids):
        """Lists the labels of class ids; the number of one without a label."""
        return [self.labels.get(i, str(i)) for i in ids]

    def count_guided(self, guidance_channels="default"):
        """Returns how many leading latent channels are guided, None for all; "default" for the model's."""
        channels = self.guided_channels if guidance_channels == "default" else guidance_channels
        return default_channels(self.in_channels) if channels == "auto" else channels

    def guided_by(self, guide):
        """Returns this generator with the network of another one, `guide`, to be guided away from.

        ValueError, one line, for a network of other latents, classes or another process. Its size is free.
        """
        for name, there, here in guide_differences(guide, self):
            values = f"{shortened(there, 60)} there, {shortened(here, 60)} here"
            raise ValueError(f"{guide.path}: can't guide {self.path}: {name} {values}")

        def network(x, t, y):
            return guide.network(x.astype(guide.dtype), t, y)

        return replace(self, guide=network, guide_digests=guide.digests, noted=set(self.noted))

    @property
    def image_size(self):
        """Returns `(H, W)` of the images."""
        if hasattr(self.vae.config, "block_out_channels"):
            return (self.sample_size * downsampling(self.vae),) * 2
        latents = paddle.zeros([1, self.in_channels, self.sample_size, self.sample_size], self.dtype)
        return self.decode(latents).shape[1:3]  # of a program, which does not say it

    @paddle.no_grad()
    def sample(
        self,
        classes=None,
        *,
        seed=0,
        noise=None,
        num_inference_steps=25,
        guidance_scale=None,
        guidance_channels="default",
        guidance_interval=None,
        guidance_sigma_interval=None,
        guidance_schedule="constant",
        guidance_rescale=0.0,
        cfg_zero_star=False,
        guide_scale=None,
        internal_scale=1.0,
        internal_interval=None,
        output="images",
        batch_size=None,
        callback=None,
        **options,
    ):
        """Draws one image for each class.

        Args:
            classes: as of `find_classes`.
            seed: of the noise: an integer, or a generator as ppdiffusers has them (a list of one for each image for
                what draws nothing else); None draws by Paddle's generators as they are.
            noise: `(N, C, H, W)`, standard normal; None to draw it.
            num_inference_steps: of the sampler: network evaluations of a diffusion, grid points of a transport.
            guidance_scale: of classifier-free guidance; 1 for none, None for 4, or 1 where there is no null class, and
                beside a `guide`.
            guidance_channels: how many leading latent channels are guided; None for all, "default" for the model's.
            guidance_interval: `(lowest, highest)` times of the model between which guidance is on; None for all. A
                transport's are from 0 (noise) to 1 (data), a diffusion's from the number of its timesteps, less 1
                (noise), to 0.
            guidance_sigma_interval: the same in noise levels, noise over signal.
            guidance_schedule: how the scales go over time: "constant", "linear" or "cosine".
            guidance_rescale: from 0 (none) to 1, see `sampling.guidance.rescaled`.
            cfg_zero_star: guide without a class by `sampling.guidance.cfg_zero_star`.
            guide_scale: of autoguidance by `guide`; 1 for none, None for 2, or 1 without a guide.
            internal_scale: of internal guidance, for a network with a second final layer; 1 for none. It costs no pass.
            internal_interval: as `guidance_interval`, of internal guidance.
            output: "images", uint8 numpy `(N, H, W, 3)`, or "latents" as networks see them, a tensor `(N, C, h, w)`.
            batch_size: images drawn at once; None for all. It changes the noise of those after the first batch.
            callback: called as `callback(step, num_steps, latents)` after each step, from 1 on.
            options: of the objective's `sample`: `method`, `draw_noise`; a transport's `sampler` and what it takes.

        A number of steps in which an exported network is not exact is a warning, once, unless `describe` has told it.
        ValueError, one line, for what is not accepted; `NotFiniteError`, which is one, for images that are not finite.
        """
        from ppdiffusers.utils.paddle_utils import get_rng_state_tracker, randn_tensor

        ids = self.find_classes(classes)
        guidance = self._guidance(
            guidance_channels,
            guide_scale,
            interval=guidance_interval,
            sigma_interval=guidance_sigma_interval,
            schedule=guidance_schedule,
            rescale=guidance_rescale,
            zero_star=cfg_zero_star,
            internal_scale=internal_scale,
            internal_interval=internal_interval,
        )
        default = GUIDANCE_SCALE if self.guide is None else 1.0
        scale = check_scale(guidance_scale, self.null_class is not None, self.path, default)
        tracker, is_seeded = get_rng_state_tracker(), not isinstance(seed, (str, list, tuple, type(None)))
        random = tracker.manual_seed(seed) if is_seeded else seed
        steps_random = random if options.get("sampler") == "sde" else None  # its steps go on where the noise ended
        settings = {"num_steps": num_inference_steps, "callback": callback, **options}
        self._warn_once(num_inference_steps, options.get("method"))
        latents, size = [], batch_size or len(ids)
        try:
            for start in range(0, len(ids), size):
                part = slice(start, start + size)
                y = paddle.to_tensor(ids[part], dtype="int64")
                denoiser = guided(self.network, y, scale, **guidance)
                shape = (len(y), self.in_channels, self.sample_size, self.sample_size)
                x = randn_tensor(shape, generator=random, dtype=self.dtype) if noise is None else noise[part]
                if self.kind == "diffusion" and is_seeded and start == 0:
                    paddle.seed(seed)  # what DDPM's steps draw does not depend on the number of images
                with tracker.rng_state(steps_random):
                    latents.append(self.objective.sample(denoiser, x, **settings))
        finally:
            if is_seeded:
                tracker.remove(random)
        latents = paddle.concat(latents)
        return latents if output == "latents" else self.decode(latents, "diffusers")

    def _warn_once(self, *steps):
        """Warns the caller of `sample` of a number of steps and a method that are odd, once."""
        if steps not in self.noted and (note := self._note(*steps)):
            warnings.warn(note, stacklevel=4)

    def _guidance(self, guidance_channels, guide_scale, **settings):
        """Returns the keywords of `guided`, checked."""
        if self.guide is None and guide_scale not in (None, 1):
            raise ValueError(f"guide_scale {guide_scale!r}: there is no guide; expected 1")
        if guide_scale is None:
            guide_scale = 1.0 if self.guide is None else GUIDE_SCALE
        times = times_of(self.objective)
        settings = {**settings, "channels": self.count_guided(guidance_channels), "guide_scale": guide_scale}
        check_guidance(**settings, largest_time=times.largest)
        if settings["internal_scale"] != 1 and not self.has_second:
            raise ValueError(no_second_layer(self.path))
        null_class = 0 if self.null_class is None else self.null_class
        return {**settings, "null_class": null_class, "guide": self.guide, "times": times}

    def decode(self, latents, rounding=None, numbers=None):
        """Returns the images of latents `(N, C, h, w)`: as `LatentDecoder.decode`, and raises as `sample`."""
        try:
            return LatentDecoder(self.vae).decode(latents, rounding, numbers)
        except NotFiniteError:
            if self.check_weights is not None:
                self.check_weights()
            raise


def check_settings(model, num_inference_steps, **options):
    """Raises `ValueError`, before weights are read, for settings that a transport's sampler does not take."""
    if model.pipeline == "SiTPipeline":
        from sampling.sit_pipeline import TransportScheduler

        objective = model.config["objective"] if model.config else None
        make = TransportScheduler.from_objective if objective else TransportScheduler.from_folder
        Sampler(make(objective or model.path).transport).make(num_steps=num_inference_steps, **options)


def load_generator(path, *, device=None, dtype=None, vae=None, backend="eager", key=None, **description):
    """Loads the `Generator` of a model. Nothing that it holds is executed, but the programs of an exported folder are.

    Args:
        path: a training checkpoint folder, whose averages are taken; a DiTPipeline or SiTPipeline folder; the name of
            a DiTPipeline on the hub; a file of weights, `.pdparams` or official; a folder of tools/export_inference.py;
            or the `sampling.model_path.Model` of one.
        device: "auto", "cpu", "gpu" or "gpu:N"; None for Paddle's current one.
        dtype: that the network computes in; None for float32. Half precision is for a GPU, and bfloat16 in programs.
        vae: folder or hub name of the autoencoder of a checkpoint or a file, or an `AutoencoderKL` as it is; None for
            the features' own.
        backend: "eager", or "inference" for Paddle Inference; what is not exported is then exported for this process.
        key: which weights of a checkpoint: "model" or "ema"; of a file any of its keys.
        description: of `sampling.model_path.describe_model`: `config`, `id2label`, `latents_stats`, ...

    Raises:
        ValueError: one line: no such model, one that can't be loaded, or weights that don't fit or are not finite.
    """
    model = path if isinstance(path, Model) else describe_model(path, key=key, **description)
    model.check_backend(backend)
    if device is not None:
        paddle.set_device(resolve_device(device))
    device, dtype = paddle.get_device(), dtype or "float32"
    if backend == "eager":
        check_dtype(device, dtype)
    if backend == "inference":
        generator = _load_programs(model, device, dtype, vae, key)
    elif not model.holds_all:
        generator = _load_weights(model, dtype, vae, key)
    else:
        generator = _load_pipeline(model, dtype)
    generator.path, generator.labels = model.path, model.labels or generator.labels
    generator.features = model.features or generator.features
    return generator


def load_guide(generator, path, *, key=None, dtype=None, backend="eager", config=None):
    """Returns a `Generator` guided by another model, see `Generator.guided_by`.

    Args:
        path: as of `load_generator`: another checkpoint, also an earlier one of the same run, other averages of it, or
            another network. dtype: the same.
        key: which weights of it: "model" or "ema".
        backend: "inference": the path is a folder of tools/export_inference.py.
        config: JSON of a file of weights that has none beside it.
    """
    model = path if isinstance(path, Model) else describe_model(path, key=key, config=config)
    if backend == "inference" and model.kind != "exported":
        raise ValueError(
            f"{model.path}: with the backend inference a guide is a folder of tools/export_inference.py; export it"
        )
    vae = None if model.holds_all else generator.vae
    return generator.guided_by(load_generator(model, dtype=dtype, backend=backend, key=key, vae=vae))


def load_exportable(model, *, vae=None, key=None):
    """Loads the `Generator` of a `Model`, with a float32 layer as its network, which can be traced."""
    generator = _load_pipeline(model, None) if model.holds_all else _load_weights(model, None, vae, key)
    _, note = leave_out(generator.network.state_dict(), model.path)  # of a pipeline: what is not used is not traced
    generator.notes = generator.notes + ([note] if note else [])
    generator.path, generator.labels = model.path, model.labels or generator.labels
    generator.features = model.features
    return generator


def from_weights(config, state, vae, *, dtype=None, source="weights"):
    """Returns the `Generator` of a DiT's or Large-DiT's resolved config and weights `{name: array}`, Paddle layout.

    With a `dtype` the network computes in that, and this project's own samplers draw. None gives its layer in float32,
    sampled by a scheduler of ppdiffusers.
    """
    sampler = PipelineSampler(make_scheduler(config["objective"])) if dtype is None else CheckpointSampler(config)
    check_vae(vae, config["model"]["in_channels"])
    network = load_network(config["model"], state, source, internal_guidance_block(config))
    has_second = second_index(network) is not None
    digests = partial(layer_digests, network, vae)
    if dtype is not None:
        cast_layer(network, dtype)
        network = in_float32(network)
    keywords = {**latent_sizes(config["model"]), "guided_channels": None}
    return Generator(network, sampler, vae=vae, digests=digests, has_second=has_second, **keywords)


def latent_sizes(model):
    """Returns the keywords of a `Generator` that a `model` section says."""
    keywords = {key: model[key] for key in ("in_channels", "sample_size", "num_classes")}
    keywords["null_class"] = model["num_classes"] if model["class_dropout_prob"] > 0 else None
    return {**keywords, "guided_channels": MODEL_TYPES[model["type"]].guided_channels}


def layer_digests(network, vae):
    """Returns `(network's, VAE's)`: the sha256 of two layers' weights, of `features.autoencoder.weights_digest`."""
    return weights_digest(network), weights_digest(vae)


def load_network(model, state, source, block=None):
    """Returns the network of a `model` section with weights `{name: array}`, Paddle layout, in evaluation mode.

    With a `block`, as configs count it, internal guidance's second final layer is taken over from weights that have it.
    What else regularizers have learned is ignored.

    `ValueError` names `source`: settings that no network has, weights that don't fit them, or that are not finite.
    """
    config, state = for_sampling(model, state, block)
    try:
        shapes = expected_shapes(config)  # before memory is taken for the network
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{source}: its config describes no {model['type']}: {error}") from None
    check_state(state, shapes, source=source)
    check_finite(state, source=source)
    network = build_model(config)
    network.set_state_dict(state)
    network.eval()
    return network


def in_float32(network):
    """Returns a function like the network whose output is float32, in which guidance and samplers compute."""
    return lambda *inputs, **hooks: as_float32(network(*inputs, **hooks))


def as_float32(outputs):
    """Returns what a network returns, an output or several, in float32."""
    return tuple(map(as_float32, outputs)) if isinstance(outputs, tuple) else outputs.astype("float32")


def _load_weights(model, dtype, vae, key):
    """Returns the `Generator` of a training checkpoint or a file of weights; dtype as of `from_weights`."""
    wanted = {"given": vae, "features": model.config["features"]["vae"], "flag": "--vae"}
    wanted["default"] = DEFAULT_VAE if model.pipeline == "DiTPipeline" else SIT_VAE
    wanted["channels"] = model.config["model"]["in_channels"]
    given = vae is None or isinstance(vae, str)
    name = choose_vae(**wanted)[0] if given else None  # before weights are read, which takes longer
    state, source = read_weights(model.path, key=key, model=model.config["model"], kept=[REGULARIZERS])
    if dtype is None:
        state, note = leave_out(state, source)
        model.notes += [note] if note else []
    normalization, notes = model.config["features"]["latent_normalization"], []
    if given:
        vae, notes = open_vae(**wanted, normalization=normalization)
    if model.pipeline == "DiTPipeline":
        generator = from_weights(model.config, state, vae, dtype=dtype, source=source)
    else:
        from sampling.sit_pipeline import SiTPipeline

        generator = _of_transport(SiTPipeline.from_weights(model.config, state, vae, source=source), dtype)
    generator.labels, generator.notes, generator.vae_name = model.labels, model.notes + notes, name
    return generator


def _of_transport(pipe, dtype):
    """Returns the `Generator` of a SiTPipeline; dtype as of `from_weights`."""
    if dtype is None:
        return replace(pipe.generator, network=pipe.transformer)
    return pipe.to(dtype=dtype).generator


def _load_pipeline(model, dtype):
    """Returns the `Generator` of a pipeline, which draws its images; without a dtype a layer that can be traced."""
    if model.pipeline == "SiTPipeline":
        from sampling.sit_pipeline import SiTPipeline

        return _of_transport(SiTPipeline.from_pretrained(model.path, dtype or "float32"), dtype)
    from sampling.pipelines.inference import StockTransformer, own_large_dit
    from sampling.pipelines.pretrained import NULL_CLASS, has_null_class, load_dit_pipeline, read_timestep_fit

    pipe = load_dit_pipeline(model.path, dtype or "float32")
    transformer, labels = pipe.transformer, model.labels or pipe.id2label
    large = dtype is None and hasattr(transformer, "y_embedder")
    return Generator(
        own_large_dit(transformer) if large else StockTransformer(transformer),
        PipelineSampler(pipe.scheduler, read_timestep_fit(model.path)),
        in_channels=transformer.config.in_channels,
        sample_size=transformer.config.sample_size,
        num_classes=max(labels, default=NULL_CLASS - 1) + 1,
        null_class=NULL_CLASS if has_null_class(transformer) else None,
        vae=pipe.vae,
        labels=labels,
        guided_channels=None,
        dtype=transformer.dtype,
        notes=model.notes,
        digests=partial(layer_digests, transformer, pipe.vae),
    )


def _load_programs(model, device, dtype, vae, key):
    """Returns the `Generator` of programs for Paddle Inference."""
    from sampling.pipelines.inference import check_dtype, export_inference, load_inference

    check_dtype(device, dtype)
    if model.kind == "exported":
        return load_inference(model.path, device=device, dtype=dtype)
    print(f"exporting {model.path} for this run (tools/export_inference.py keeps it)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = load_exportable(model, vae=vae, key=key)
        export_inference(source, folder)
        generator = load_inference(folder, device=device, dtype=dtype)
        digests = generator.digests()
    generator.check_weights, generator.notes, generator.vae_name = None, source.notes, source.vae_name
    generator.digests = lambda: digests
    return generator
