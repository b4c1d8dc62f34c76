"""Preview grids: images sampled from the averages while a model trains."""

import contextlib
import math
import os

import numpy as np
import paddle

from config.options import DEFAULT_VAE
from features.autoencoder import LatentDecoder, NotFiniteError, open_vae
from runtime.process import one_line, say
from sampling.generator import Generator, latent_sizes
from sampling.grid import make_grid
from training.averages import ema_weights
from training.parallel.shares import LocalShard


class Preview:
    """Draws the same noise and classes at every call, by the objective that is trained, and decodes them.

    Args:
        vae: folder or name of an `AutoencoderKL`, None for the features' own; loaded at once, on rank 0, which draws.
        cfg_scale: guidance scale; without a null class there is none.

    Raises:
        ValueError: no such autoencoder, one of other latents, or a number of steps or scale that can't be.
    """

    NUM_IMAGES, COLUMNS = 8, 3

    def __init__(self, objective, config, *, vae, num_inference_steps=25, cfg_scale=4.0):
        model = config["model"]
        objective.check_num_steps(num_inference_steps)
        if not math.isfinite(cfg_scale):
            raise ValueError(f"--cfg_scale {cfg_scale}: expected a finite number, 1 for no guidance")
        self.decoder = None
        if paddle.distributed.get_rank() == 0:
            wanted = {"default": DEFAULT_VAE, "flag": "--vae_name_or_path", "channels": model["in_channels"]}
            vae, notes = open_vae(vae, config["features"]["vae"], **wanted)
            for note in notes:
                say(f"note: {note}")
            self.decoder = LatentDecoder(vae)
        self.objective, self.sizes = objective, latent_sizes(model)
        guidance_scale = cfg_scale if model["class_dropout_prob"] > 0 else 1.0
        self.settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        shape = [self.NUM_IMAGES, model["in_channels"], model["sample_size"], model["sample_size"]]
        self.noise = np.random.default_rng(0).standard_normal(shape).astype("float32")
        self.labels = np.linspace(0, model["num_classes"] - 1, self.NUM_IMAGES).round().astype("int64")

    def sample(self, model):
        """Returns latents `(N, C, H, W)`, by a model in evaluation mode."""
        generator, noise = Generator(model, self.objective, **self.sizes), paddle.to_tensor(self.noise)
        return generator.sample(self.labels, seed=None, noise=noise, output="latents", **self.settings)

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
            grid = make_grid(self.decoder(latents), self.COLUMNS)
            log.add_image("samples/ema", np.asarray(grid), session.step)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            grid.save(path)
            log.print(f"preview of step {session.step}: {path}")
        except NotFiniteError as error:  # the watch on the numbers ends training, not its previews
            log.print(f"note: there is no preview of step {session.step}: {error}")
        except OSError as error:  # a full disk does not end training
            log.print(f"warning: {path} is not saved: {one_line(error)}")
