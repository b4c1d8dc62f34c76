"""Tiny networks with random weights, and how stock ppdiffusers and this project's sampler draw with them."""

import numpy as np

from verification.tiny_runs import TINY_MODELS

# A DiT as wide as a fit of its timestep embedding needs; a SiT for the latents of the digits' autoencoder.
SIZES = {
    **TINY_MODELS,
    "DiT": {**TINY_MODELS["DiT"], "num_attention_heads": 4},
    "SiT": {**TINY_MODELS["SiT"], "sample_size": 4},
}


def make_config(kind="DiT", objective=None, **model):
    """Returns a resolved config."""
    from config.schema import resolve_config

    return resolve_config({"model": {**SIZES[kind], **model}, "objective": objective or {}})


def make_model(config, seed=0):
    """Returns a network whose every weight is random (adaLN-Zero's zeros hide errors), pos_embed the plain table."""
    from models import build_model

    model = build_model(config)
    random = np.random.RandomState(seed)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            centre = float((parameter == 1).all())  # a norm's weight
            value = random.normal(centre, 0.06 if model.hidden_size >= 64 else 0.1, parameter.shape)
            parameter.set_value(value.astype("float32"))
    model.eval()
    return model


def state_of(model):
    """Returns a network's weights, `{name: array}`."""
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}


def seeded(seed=3):
    """Returns a generator of ppdiffusers, for the noise of a pipeline."""
    import paddle

    return paddle.Generator().manual_seed(seed)


def stock_latents(folder, steps, guidance_scale):
    """Returns `(latents, noise)` `(2, C, h, w)`: the final ones of classes 1 and 2 by a folder's stock DiTPipeline."""
    from ppdiffusers import DiTPipeline
    from ppdiffusers.utils.paddle_utils import randn_tensor

    pipe = DiTPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    decoded, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda latents: decoded.append(latents) or decode(latents)
    pipe([1, 2], num_inference_steps=steps, guidance_scale=guidance_scale, generator=seeded(), output_type="np")
    latents = decoded[0].numpy() * pipe.vae.config.scaling_factor
    return latents, randn_tensor(latents.shape, generator=seeded(), dtype="float32")


def ddim_latents(config, model, noise, steps, guidance_scale):
    """Returns the same latents by `ddim_sample_loop`, numpy."""
    import paddle

    from diffusion import create_diffusion
    from sampling.guidance import guided

    objective = {key: config["objective"][key] for key in ("noise_schedule", "predict_xstart")}
    diffusion = create_diffusion(f"ddim{steps}", learn_sigma=config["model"]["learn_sigma"], **objective)
    y = paddle.to_tensor([1, 2])
    denoiser = guided(model, y, guidance_scale, channels=None, null_class=config["model"]["num_classes"])
    with paddle.no_grad():
        return diffusion.ddim_sample_loop(denoiser, noise.shape, noise=noise, clip_denoised=False).numpy()
