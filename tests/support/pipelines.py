"""Tiny networks with random weights, autoencoders, training checkpoints and pipeline folders."""

import json
import os

import numpy as np

from support.runs import ROOT, TINY_MODELS

DIGITS_VAE = str(ROOT / "assets" / "digits_vae")
LABELS = {str(i): f"digit {i}, number {i}" for i in range(10)}
# A DiT as wide as a fit of its timestep embedding needs; a SiT for the latents of the digits' autoencoder.
SIZES = {
    **TINY_MODELS,
    "DiT": {**TINY_MODELS["DiT"], "num_attention_heads": 4},
    "SiT": {**TINY_MODELS["SiT"], "sample_size": 4},
}
# Of a Large-DiT whose every size is another number, with grouped heads and qk_norm.
ODD = {"num_attention_heads": 6, "attention_head_dim": 10, "num_kv_heads": 2, "qk_norm": True, "norm_eps": 1e-3}
ODD.update(multiple_of=7, ffn_dim_multiplier=0.7)


def make_config(kind="DiT", objective=None, **model):
    """A resolved config."""
    from config.schema import resolve_config

    return resolve_config({"model": {**SIZES[kind], **model}, "objective": objective or {}})


def make_model(config, seed=0):
    """A network whose every weight is random (adaLN-Zero's zeros hide errors), pos_embed the plain table."""
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
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}


def make_vae(latent_channels=4):
    import paddle
    from ppdiffusers import AutoencoderKL

    paddle.seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=latent_channels, sample_size=8, scaling_factor=0.5
    )
    vae.eval()
    return vae


def tree_of(folder):
    return sorted(
        os.path.relpath(os.path.join(root, name), folder) for root, _, names in os.walk(folder) for name in names
    )


def write_checkpoint(folder, config):
    """A training checkpoint whose weights and averages differ; returns the network of the averages."""
    from weights.files import save_pdparams

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, seed in (("model_state", 1), ("ema_state", 2)):
        model = make_model(config, seed)
        save_pdparams(state_of(model), folder / f"{name}.pdparams")
    return model


def make_pipeline(config=None, vae=None, labels=LABELS):
    """A SiTPipeline, by default for the digits' autoencoder."""
    from features.autoencoder import load_vae
    from sampling import SiTPipeline

    config = config or make_config("SiT")
    pipe = SiTPipeline.from_weights(config, state_of(make_model(config)), vae or load_vae(DIGITS_VAE), labels)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=3):
    """A generator of ppdiffusers, for the noise of a pipeline."""
    import paddle

    return paddle.Generator().manual_seed(seed)


def stock_latents(folder, steps, guidance_scale):
    """The final latents `(2, C, h, w)` of classes 1 and 2 by the stock DiTPipeline of a folder, and its noise."""
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
    """The same by `ddim_sample_loop`."""
    import paddle

    from diffusion import create_diffusion
    from sampling.guidance import guided

    objective = {key: config["objective"][key] for key in ("noise_schedule", "predict_xstart")}
    diffusion = create_diffusion(f"ddim{steps}", learn_sigma=config["model"]["learn_sigma"], **objective)
    y = paddle.to_tensor([1, 2])
    denoiser = guided(model, y, guidance_scale, channels=None, null_class=config["model"]["num_classes"])
    with paddle.no_grad():
        return diffusion.ddim_sample_loop(denoiser, noise.shape, noise=noise, clip_denoised=False).numpy()
