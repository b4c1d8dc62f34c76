"""Preview grids: images sampled from the averages while a model trains."""

import contextlib
import os

import numpy as np
import paddle

from config.options import DEFAULT_VAE, GENTLE_GUIDANCE_SCALE
from config.schema import internal_guidance_block
from features.autoencoder import LatentDecoder, NotFiniteError, open_vae
from runtime.process import one_line, say
from sampling.generator import Generator, latent_sizes
from sampling.grid import class_grid
from sampling.guidance_settings import configured_guidance
from sampling.labels import weights_labels
from sampling.schedulers import sampler_in_training
from training.averages import ema_weights
from training.early import choose_classes
from training.parallel.shares import LocalShard


class Preview:
    """Draws the same noise and classes at every call, by the objective that is trained, and decodes them.

    Args:
        vae: folder or name of an `AutoencoderKL`, None for the features' own; loaded at once, on rank 0, which draws.
        config: resolved; how images are guided is its section `guidance`.
        guidance_scale: without a null class there is no guidance.
        classes: names or ids, a row each; None for up to `PREVIEW_CLASSES` of those that are trained, evenly spaced.

    Raises:
        ValueError: no such autoencoder, one of other latents, no such class, or a number of steps that can't be.
    """

    BATCH_SIZE = 8

    def __init__(
        self,
        objective,
        config,
        *,
        vae,
        num_inference_steps=25,
        guidance_scale=GENTLE_GUIDANCE_SCALE,
        classes=None,
        images_per_class=2,
    ):
        model = config["model"]
        self.sampler = sampler_in_training(objective, config, num_inference_steps)
        self.names, _ = weights_labels(None, config)
        self.classes = choose_classes(classes, self.names, config)
        self.images_per_class, self.decoder = images_per_class, None
        if paddle.distributed.get_rank() == 0:
            wanted = {"default": DEFAULT_VAE, "flag": "--vae", "channels": model["in_channels"]}
            wanted["normalization"] = config["features"]["latent_normalization"]
            vae, notes = open_vae(vae, config["features"]["vae"], **wanted)
            for note in notes:
                say(f"note: {note}")
            self.decoder = LatentDecoder(vae)
        self.known = {**latent_sizes(model), "has_second": internal_guidance_block(config) is not None}
        scale = guidance_scale if model["class_dropout_prob"] > 0 else 1.0
        self.settings = {"num_inference_steps": num_inference_steps, "guidance_scale": scale}
        self.settings |= configured_guidance(config)
        self.labels = np.repeat(self.classes, images_per_class)
        shape = [len(self.labels), model["in_channels"], model["sample_size"], model["sample_size"]]
        self.noise = np.random.default_rng(0).standard_normal(shape).astype("float32")

    def sample(self, model):
        """Returns latents `(N, C, H, W)`, by a model in evaluation mode."""
        generator, noise = Generator(model, self.sampler, **self.known), paddle.to_tensor(self.noise)
        # A network that is trained leaves little memory: few images at once.
        how = {"seed": None, "batch_size": self.BATCH_SIZE, "output": "latents", **self.settings}
        return generator.sample(self.labels, noise=noise, **how)

    def run(self, session):
        """Samples the first of the session's averages, or the network without any, into its `images/` and its log.

        Rank 0 draws, with those that hold parts of its network.
        """
        model, averages, log = session.model, session.averages, session.log
        is_collective = LocalShard(model, session.optimizer).forward_is_collective
        latents = None
        with ema_weights(model, averages[0], session.optimizer) if averages else contextlib.nullcontext():
            if session.rank == 0 or is_collective:
                latents = self.sample(model)
        if session.rank > 0:
            return
        path = os.path.join(session.folder, "images", f"{session.step:07d}.png")
        try:
            grid = class_grid(self.decoder(latents), self.classes, self.names, self.images_per_class)
            log.add_image("samples/ema", np.asarray(grid), session.step)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            grid.save(path)
            log.print(f"preview of step {session.step}: {path}")
        except NotFiniteError as error:  # the watch on the numbers ends training, not its previews
            log.print(f"note: there is no preview of step {session.step}: {error}")
        except OSError as error:  # a full disk does not end training
            log.print(f"warning: {path} is not saved: {one_line(error)}")
