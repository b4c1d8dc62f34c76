"""Preview grids: images sampled from the averages while a model trains."""

import contextlib
import math
import os
import time

import numpy as np
import paddle
from PIL import Image

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
        objective: from `objectives.build_objective`.
        config: the resolved config.
        vae: folder or name of an `AutoencoderKL`, None for the features' own; loaded at once, on rank 0, which draws.
        num_inference_steps: steps of the sampler.
        cfg_scale: guidance scale; 1 where the model has no null class.
        num_images: images in the grid.

    Raises:
        ValueError: no such autoencoder, one of other latents, or a number of steps that can't be.
    """

    def __init__(self, objective, config, *, vae, num_inference_steps=25, cfg_scale=4.0, num_images=8, seed=0):
        model = config["model"]
        objective.check_num_steps(num_inference_steps)
        if not math.isfinite(cfg_scale):
            raise ValueError(f"--cfg_scale {cfg_scale}: expected a finite number, 1 for no guidance")
        self.decoder = None
        if paddle.distributed.get_rank() == 0:
            vae, notes = open_vae(
                vae,
                config["features"]["vae"],
                default=DEFAULT_VAE,
                flag="--vae_name_or_path",
                channels=model["in_channels"],
            )
            for note in notes:
                say(f"note: {note}")
            self.decoder = LatentDecoder(vae)
        self.objective = objective
        self.num_inference_steps = num_inference_steps
        self.cfg_scale = cfg_scale if model["class_dropout_prob"] > 0 else 1.0
        self.sizes = latent_sizes(model)
        shape = [num_images, model["in_channels"], model["sample_size"], model["sample_size"]]
        self.noise = np.random.default_rng(seed).standard_normal(shape).astype("float32")
        self.labels = np.linspace(0, model["num_classes"] - 1, num_images).round().astype("int64")

    def sample(self, model):
        """Returns latents `(N, C, H, W)`, by a model in evaluation mode."""
        return Generator(model, self.objective, **self.sizes).sample(
            self.labels,
            seed=None,
            noise=paddle.to_tensor(self.noise),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.cfg_scale,
            output="latents",
        )

    def decode(self, latents):
        """Returns the grid of their images, uint8 `(H, W, 3)`; on rank 0."""
        images = self.decoder(latents)
        return np.asarray(make_grid(images, columns=max(1, round(len(images) ** 0.5))))


def log_preview(preview, session):
    """Samples a grid into the run's `images/STEP.png` and its log: rank 0, with those that hold parts of its network.

    Args:
        session: the run's `training.session.Session`; its first averages are sampled, or the network without any.
    """
    start = time.perf_counter()
    model, averages = session.model, session.averages
    shard = LocalShard(model, session.optimizer)
    with ema_weights(model, averages[0], shard) if averages else contextlib.nullcontext():
        model.eval()
        latents = preview.sample(model) if session.rank == 0 or shard.forward_is_collective else None
        if session.rank == 0:
            _save_preview(preview, latents, session.log, os.path.join(session.folder, "images"), session.step)
    model.train()
    session.log.pause(time.perf_counter() - start)


def _save_preview(preview, latents, log, folder, step):
    try:
        grid = preview.decode(latents)
    except NotFiniteError as error:  # the watch on the numbers ends training, not its previews
        log.print(f"note: there is no preview of step {step}: {error}")
        return
    path = os.path.join(folder, f"{step:07d}.png")
    log.add_image("samples/ema", grid, step)
    try:
        os.makedirs(folder, exist_ok=True)
        Image.fromarray(grid).save(path)
        log.print(f"preview of step {step}: {path}")
    except OSError as error:  # a full disk does not end training
        log.print(f"warning: {path} is not saved: {one_line(error)}")
