"""Tiny networks with random weights, autoencoders, training checkpoints and pipeline folders."""

import json
import os

from support.runs import ROOT
from verification.tiny_models import (  # noqa: F401 (for the tests)
    SIZES,
    ddim_latents,
    make_config,
    make_model,
    seeded,
    state_of,
    stock_latents,
)

DIGITS_VAE = str(ROOT / "assets" / "digits_vae")
LABELS = {str(i): f"digit {i}, number {i}" for i in range(10)}
# Of a Large-DiT whose every size is another number, with grouped heads and qk_norm.
ODD = {"num_attention_heads": 6, "attention_head_dim": 10, "num_kv_heads": 2, "qk_norm": True, "norm_eps": 1e-3}
ODD.update(multiple_of=7, ffn_dim_multiplier=0.7)


def make_vae(latent_channels=4):
    import paddle
    from ppdiffusers import AutoencoderKL

    paddle.seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=latent_channels, sample_size=8, scaling_factor=0.5
    )
    vae.eval()
    return vae


def make_halving_vae(folder=None, **settings):
    """A tiny autoencoder of 2x smaller latents, random weights; it is saved if there is a folder."""
    import paddle
    from ppdiffusers import AutoencoderKL

    paddle.seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=8, **blocks, **settings)
    vae.eval()
    if folder is not None:
        vae.save_pretrained(str(folder), safe_serialization=False)
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
