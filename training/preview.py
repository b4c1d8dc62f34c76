"""Preview grids: images sampled from the EMA weights while a model trains."""

import contextlib
import os
import time

import numpy as np
import paddle

from training.checkpoint import Shares


@paddle.no_grad()
def _copy_into(parameters, values):
    for name, parameter in parameters.items():
        paddle.assign(values[name].astype(parameter.dtype), output=parameter)


@contextlib.contextmanager
def ema_weights(model, ema, optimizer=None):
    """Lends a model its averages: evaluation mode inside, its own weights and mode after. Collective if sharded."""
    parameters = dict(model.named_parameters())
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    was_training = model.training
    averages = ema.state_dict()
    shares = Shares(model, optimizer)
    if shares.names is not None:
        whole = shares.whole(averages, parameters, everywhere=True)
        averages = {name: paddle.to_tensor(value) for name, value in whole.items()}
    try:
        _copy_into(parameters, averages)
        model.eval()
        yield model
    finally:
        _copy_into(parameters, own)
        if was_training:
            model.train()


class Preview:
    """Draws the same noise and classes at every call, by the objective that is trained, and decodes them.

    Args:
        objective: from `objectives.build_objective`.
        config: the resolved config.
        vae: folder or name of an `AutoencoderKL`; loaded at once, on rank 0, which draws.
        num_inference_steps: steps of the sampler.
        cfg_scale: guidance scale; 1 where the model has no null class.
        num_images: images in the grid.

    Raises:
        ValueError: no such autoencoder, one of other latents, or a number of steps that can't be.
    """

    def __init__(self, objective, config, *, vae, num_inference_steps=25, cfg_scale=4.0, num_images=8, seed=0):
        model = config["model"]
        objective.check_num_steps(num_inference_steps)
        self.decoder = None
        if paddle.distributed.get_rank() == 0:
            from sampling.decoder import LatentDecoder

            self.decoder = LatentDecoder.from_pretrained(vae)
            channels = self.decoder.vae.config.latent_channels
            if channels != model["in_channels"]:
                raise ValueError(f"VAE {vae}: has {channels} latent channels, the model {model['in_channels']}")
        self.objective = objective
        self.num_inference_steps = num_inference_steps
        self.cfg_scale = cfg_scale if model["class_dropout_prob"] > 0 else 1.0
        self.null_class = model["num_classes"]
        shape = [num_images, model["in_channels"], model["sample_size"], model["sample_size"]]
        self.noise = np.random.default_rng(seed).standard_normal(shape).astype("float32")
        self.labels = np.linspace(0, model["num_classes"] - 1, num_images).round().astype("int64")

    @paddle.no_grad()
    def sample(self, model):
        """A grid as uint8 `(H, W, 3)`, from a model in evaluation mode."""
        from sampling.grid import make_grid
        from sampling.guidance import guided

        denoiser = guided(model, paddle.to_tensor(self.labels), self.cfg_scale, null_class=self.null_class)
        latents = self.objective.sample(denoiser, paddle.to_tensor(self.noise), num_steps=self.num_inference_steps)
        images = self.decoder(latents)
        return np.asarray(make_grid(images, columns=max(1, round(len(images) ** 0.5))))


def log_preview(preview, *, model, ema, optimizer, log, folder, step, rank):
    """Samples a grid on rank 0, into `folder/step.png` and the VisualDL log; other ranks only lend their averages."""
    start = time.perf_counter()
    with contextlib.nullcontext(model) if ema is None else ema_weights(model, ema, optimizer):
        if rank == 0:
            from PIL import Image

            model.eval()
            grid = preview.sample(model)
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, f"{step:07d}.png")
            Image.fromarray(grid).save(path)
            log.add_image("samples/ema", grid, step)
            log.print(f"preview of step {step}: {path}")
    model.train()
    log.pause(time.perf_counter() - start)
