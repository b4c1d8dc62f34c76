"""`SiTPipeline`: class labels to images with a network of a transport, as `ppdiffusers.DiTPipeline` is for a DiT.

from sampling import SiTPipeline

pipe = SiTPipeline.from_pretrained("SiT_XL_2_256")
images = pipe(pipe.get_label_ids(["golden retriever"]), sampler="sde", num_inference_steps=250).images
"""

import inspect
import math
import operator
import os
import sys
from collections.abc import Iterable
from functools import partial
from numbers import Real

import numpy as np
import paddle
from PIL import Image
from ppdiffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from ppdiffusers.configuration_utils import register_to_config
from ppdiffusers.utils.paddle_utils import get_rng_state_tracker

from config.checks import POSITIVE_INT
from config.schema import MODEL_TYPES, internal_guidance_block
from models import MODELS, SiT, get_2d_sincos_pos_embed
from models.regularizers import second_index
from models.state import INTERNAL_GUIDANCE, without_regularizers, without_rounding
from objectives.transport import sample_transport
from runtime.precision import cast_layer
from runtime.process import is_terminal
from runtime.untrusted import inside, listed, shortened
from sampling.generator import Generator, in_float32, latent_sizes, layer_digests, load_network
from sampling.pipelines.folder import (
    SECOND_BLOCK,
    check_id2label,
    check_vae,
    component_class,
    index_features,
    read_component,
    read_index,
    write_pipeline,
)
from sampling.step_counts import check_objective
from transport import create_transport
from weights.files import load_weights
from weights.pretrained import find_weights, load_model

OUTPUT_TYPES = ("pil", "np", "numpy", "latent")


class TransportScheduler(SchedulerMixin, ConfigMixin):
    """Holds `transport`, what a SiT was trained on; its settings are the pipeline's scheduler/scheduler_config.json.

    Args: those of `transport.create_transport`, which also checks them.
    """

    @register_to_config
    def __init__(
        self,
        path_type="Linear",
        prediction="velocity",
        loss_weight=None,
        train_eps=None,
        sample_eps=None,
        t_eps=0.05,
    ):
        self.transport = create_transport(path_type, prediction, loss_weight, train_eps, sample_eps, t_eps=t_eps)

    @classmethod
    def from_objective(cls, objective):
        """Makes the scheduler of an `objective` section of type transport, without what only training needs."""
        check_objective(objective, "transport")
        return cls(**{name: objective[name] for name in inspect.signature(cls).parameters})

    @classmethod
    def from_folder(cls, folder):
        """Reads the scheduler of a SiTPipeline folder."""
        path = inside(folder, "scheduler/scheduler_config.json")
        keywords = read_component(path, cls.__name__, cls)
        try:
            return cls(**keywords)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def sample(self, denoiser, noise, **options):
        """Turns noise into latents; as `objectives.transport.sample_transport`."""
        return sample_transport(self.transport, denoiser, noise, **options)


# All that a folder may name in model_index.json; nothing is imported by a name that stands in a file.
COMPONENTS = {
    "scheduler": (TransportScheduler,),
    "transformer": tuple(MODELS[name] for name, kind in MODEL_TYPES.items() if kind.pipeline == "SiTPipeline"),
    "vae": (AutoencoderKL,),
}
NAMES = {name: [one.__name__ for one in known] for name, known in COMPONENTS.items()}


class SiTPipeline(DiffusionPipeline):
    """Class-conditional image generation with a SiT, a Large-SiT or a LightningDiT.

    Args:
        transformer: a `models.SiT`, `models.LargeSiT` or `models.LightningDiT`.
        vae: an `AutoencoderKL` of as many latent channels.
        scheduler: a `TransportScheduler`.
        id2label: `{class id: label}`; None names the classes by their numbers.

    What does not fit together is a `ValueError`: a component of another class, latent channels, labels.
    """

    def __init__(self, transformer, vae, scheduler, id2label=None):
        super().__init__()
        components = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
        for name, component in components.items():
            _check_class(name, f"{name}: is", type(component))
        if id2label is not None and not isinstance(id2label, dict):
            raise ValueError(f"id2label: is a {type(id2label).__name__}, expected {{class id: label}}")
        check_vae(vae, transformer.in_channels)
        self.register_modules(**components)
        self.id2label = check_id2label(id2label, transformer.num_classes)
        ids = {name.strip(): int(i) for i, label in self.id2label.items() for name in label.split(",")}
        self.labels = dict(sorted(ids.items()))  # one-name label: class id, as in DiTPipeline
        self.features = None  # a `features` section: what the latents were made of, if it is known
        transformer.eval()
        vae.eval()

    @classmethod
    def from_weights(cls, config, state, vae, id2label=None, *, source="weights"):
        """Makes the pipeline of a SiT's resolved config and `{name: array}` in the Paddle layout.

        `ValueError` names `source`: another network's config, or weights that don't fit it or are not finite.
        """
        _check_class("transformer", f"{source}: the config describes", MODELS[config["model"]["type"]])
        scheduler = TransportScheduler.from_objective(config["objective"])
        network = load_network(config["model"], state, source, internal_guidance_block(config))
        if isinstance(network, SiT):  # a position table that is the exact one in half precision becomes the exact one
            table = get_2d_sincos_pos_embed(network.hidden_size, network.grid_size)[None].astype("float32")
            network.pos_embed.set_value(without_rounding(network.pos_embed.numpy(), table))
        pipe = cls(network, vae, scheduler, id2label)
        pipe.features = config["features"]
        return pipe

    # -- The folder ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, *, overwrite=False, safe_serialization=False, to_diffusers=False):
        """Writes model_index.json, scheduler/, transformer/ (float32) and vae/: the tree of a DiTPipeline folder.

        Args:
            save_directory: free, or with `overwrite` a pipeline folder and nothing else; else a `ValueError`.
            safe_serialization: weights as `.safetensors`, not `.pdparams`.
            to_diffusers: as in ppdiffusers; only False, the layout of the weights is Paddle's.
        """
        if to_diffusers:
            raise ValueError(f"to_diffusers={to_diffusers!r}: a SiTPipeline is saved in Paddle's layout only")
        network, index = self.transformer, second_index(self.transformer)
        weights = without_regularizers(network.state_dict(), [INTERNAL_GUIDANCE])
        own = {} if index is None else {SECOND_BLOCK: index + 1}
        write_pipeline(
            os.fspath(save_directory),
            pipeline=type(self).__name__,
            transformer=("models", type(network).__name__, {**network.settings, **own}),
            weights={name: value.astype("float32").numpy() for name, value in weights.items()},
            scheduler=("sampling.sit_pipeline", self.scheduler),
            vae=self.vae,
            labels=self.id2label,
            overwrite=overwrite,
            safe_serialization=safe_serialization,
            features=self.features,
        )

    @classmethod
    def from_pretrained(cls, folder, paddle_dtype=None):
        """Loads the pipeline of a local folder. Nothing in it is executed, and no name in it is imported.

        Args:
            folder: what `save_pretrained` or tools/convert_sit_to_ppdiffusers.py wrote; else a `ValueError`, one line.
            paddle_dtype: of network and VAE; None for the files'.
        """
        folder = os.fspath(folder)
        index = read_index(inside(folder, "model_index.json"), NAMES, pipeline=cls.__name__)
        kind = component_class(index, "transformer")
        path = inside(folder, "transformer/config.json")
        settings = read_component(path, kind, [*MODEL_TYPES[kind].keys, SECOND_BLOCK])
        block, layers = settings.pop(SECOND_BLOCK, None), settings.get("num_layers")
        if block is not None and not (POSITIVE_INT.accepts(block) and POSITIVE_INT.accepts(layers) and block <= layers):
            raise ValueError(f"{path}: {SECOND_BLOCK} is {shortened(block)}, expected 1 to num_layers {layers}")
        (weights, *others), layout = find_weights(folder, "transformer")
        if others or layout != "paddle":
            raise ValueError(f"{weights}: expected one file in Paddle's layout, as save_pretrained writes it")
        transformer = load_network({"type": kind, **settings}, load_weights(weights), weights, block)
        scheduler, vae = TransportScheduler.from_folder(folder), load_model(AutoencoderKL, folder, "vae")
        pipe = cls(transformer, vae, scheduler, index.get("id2label"))
        pipe.features = index_features(index, folder)
        for part in (transformer, vae) if paddle_dtype is not None else ():
            cast_layer(part, paddle_dtype)
        return pipe

    @property
    def dtype(self):
        """Returns the network's dtype."""
        return self.transformer.y_embedder.embedding_table.weight.dtype

    @property
    def device(self):
        """Returns where the network is."""
        return self.transformer.y_embedder.embedding_table.weight.place

    # -- Sampling -----------------------------------------------------------------------------------------------------

    @property
    def generator(self):
        """Returns the `sampling.generator.Generator` that draws the pipeline's images."""
        network = self.transformer
        return Generator(
            in_float32(network),
            self.scheduler,
            **latent_sizes({"type": type(network).__name__, **network.settings}),
            vae=self.vae,
            labels={int(index): label for index, label in self.id2label.items()},
            digests=partial(layer_digests, network, self.vae),
            features=self.features,
            has_second=second_index(network) is not None,
        )

    def get_label_ids(self, label):
        """Lists the class ids of one label or several; one of a class's comma-separated names will do."""
        names = list(label) if isinstance(label, Iterable) and not isinstance(label, str) else [label]
        for name in names:
            if not isinstance(name, str) or name not in self.labels:
                raise ValueError(f"no class has the label {name!r}; known: {listed(list(self.labels), 10)}")
        return [self.labels[name] for name in names]

    @paddle.no_grad()
    def __call__(
        self,
        class_labels,
        guidance_scale=4.0,
        guidance_interval=None,
        guidance_channels="auto",
        sampler="ode",
        method=None,
        num_inference_steps=50,
        generator=None,
        output_type="pil",
        return_dict=True,
        *,
        diffusion_form="sigma",
        diffusion_norm=1.0,
        last_step="Mean",
        last_step_size=0.04,
        atol=1e-6,
        rtol=1e-3,
        timestep_shift=0.0,
        zero_init_steps=0,
        guidance_sigma_interval=None,
        guidance_schedule="constant",
        guidance_rescale=0.0,
        cfg_zero_star=False,
        guide=None,
        guide_scale=None,
        internal_scale=1.0,
        internal_interval=None,
    ):
        """Draws one image for each class id. Time runs from noise (`t = 0`) to data (`t = 1`).

        Args:
            class_labels: class ids, a list or one.
            guidance_scale, guidance_interval, guidance_sigma_interval, guidance_schedule, guidance_rescale,
                cfg_zero_star, guide_scale, internal_scale, internal_interval: as of
                `sampling.generator.Generator.sample`.
            guide: another `SiTPipeline`, a worse one, for autoguidance; with `guidance_scale=1` by that alone.
            guidance_channels: how many leading latent channels are guided: an integer, or None for all as in
                DiTPipeline. "auto": 3 of 4 as in the official code, of any other number all; of a LightningDiT 3.
            sampler: "ode" or "sde". Its method, the eight options from `diffusion_form` on (the SDE's, then dopri5's
                tolerances, the ODE's shift and its first steps), and `num_inference_steps`, the points of the time
                grid, are those of `transport.Sampler.sample_ode` and `sample_sde`; the form's default is that of the
                official sample.py.
            generator: as in ppdiffusers, for the noise that sampling starts from and, with the SDE, that of its steps.
                A list, one for each image, for the ODE only. On a CPU, Paddle has one generator for all:
                `paddle.Generator().manual_seed(seed)` seeds it, so make the generator just before the call.
            output_type: "pil"; "np" (or "numpy"), float32 `(N, H, W, 3)` in [0, 1]; or "latent", the tensor
                `(N, C, h, w)` that the VAE would decode times its scaling factor.
            return_dict: an `ImagePipelineOutput`, with `images`; else the tuple `(images,)`.

        Raises:
            ValueError: what is not accepted, or images that are not finite, a `features.autoencoder.NotFiniteError`.
        """
        y = self._class_ids(class_labels)
        _check_call(guidance_scale, guide, output_type)
        generator = _one_or_each(generator, len(y), sampler)
        sde = {"diffusion_form": diffusion_form, "diffusion_norm": diffusion_norm, "last_step": last_step}
        sde["last_step_size"] = last_step_size
        shift = {"timestep_shift": timestep_shift, "zero_init_steps": zero_init_steps}
        ode = {"atol": atol, "rtol": rtol, **shift}
        for name, value in shift.items() if sampler == "sde" else ():
            if value != 0:
                raise ValueError(f"{name} {value!r}: is for the ODE; expected 0 with sampler='sde'")
        hidden = getattr(self, "_progress_bar_config", {}).get("disable", False)
        draw = self.generator if guide is None else self.generator.guided_by(guide.generator)
        images = draw.sample(
            y,
            seed=generator,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_channels="default" if guidance_channels == "auto" else guidance_channels,
            guidance_interval=guidance_interval,
            guidance_sigma_interval=guidance_sigma_interval,
            guidance_schedule=guidance_schedule,
            guidance_rescale=guidance_rescale,
            cfg_zero_star=cfg_zero_star,
            guide_scale=guide_scale,
            internal_scale=internal_scale,
            internal_interval=internal_interval,
            output="latents",
            progress=is_terminal(sys.stderr) if hidden is None else not hidden,  # as tqdm has it
            sampler=sampler,
            method=method,
            **(sde if sampler == "sde" else ode),
        )
        images = images if output_type == "latent" else draw.decode(images)
        if output_type == "pil":
            images = [Image.fromarray(image) for image in (images * 255).round().astype("uint8")]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _class_ids(self, class_labels):
        labels, count = np.asarray(class_labels, dtype=object).reshape(-1), self.transformer.num_classes
        if not len(labels):
            raise ValueError("class_labels: expected at least one class id")
        for label in labels:
            if not hasattr(label, "__index__"):
                raise ValueError(
                    f"class_labels: {label!r} is no class id, an integer; get_label_ids gives the ids of labels"
                )
            if not 0 <= operator.index(label) < count:
                raise ValueError(f"class_labels: there is no class {label}; the classes are 0..{count - 1}")
        return [operator.index(label) for label in labels]


def _check_call(guidance_scale, guide, output_type):
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale {guidance_scale!r}: expected a number, 1 for none")
    if guide is not None and not isinstance(guide, SiTPipeline):
        raise ValueError(f"guide: is a {type(guide).__name__}, expected a SiTPipeline")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")


def _one_or_each(generator, count, sampler):
    """Returns a generator, or a list of one for each of `count` images, checked."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    if len(generators) not in (1, count):
        raise ValueError(f"{len(generators)} generators for {count} images; give one, or one for each")
    if len(generators) > 1 and sampler == "sde":
        raise ValueError("a list of generators is for the ODE; the SDE takes one")
    for one in generators:
        # ppdiffusers knows a seeded generator by a name.
        if one is not None and not (isinstance(one, str) and one in get_rng_state_tracker().states_):
            raise ValueError(f"generator {one!r}: expected what paddle.Generator().manual_seed(seed) returns")
    return generators[0] if len(generators) == 1 else generators


def _check_class(component, what, kind):
    if not issubclass(kind, COMPONENTS[component]):
        raise ValueError(f"{what} a {kind.__name__}, expected a {' or '.join(NAMES[component])}")
