"""Train a small AutoencoderKL on an image folder and save it in ppdiffusers' format.

The loss is the mean squared error over pixels in [-1, 1] plus kl_weight times the mean KL divergence of a latent's
posterior to a unit Gaussian. OUTPUT gets config.json (with the scaling_factor that gives the latents of the training
images unit standard deviation, after a shift or statistics that the settings name), model_state.pdparams and
training.json, the settings that made it.

The autoencoder in assets/digits_vae was made by
    python tools/prepare_digits.py --output digits
    python tools/train_vae.py --config_file assets/digits_vae/training.json \\
        --data digits/train --heldout digits/heldout --output digits_vae
"""

import argparse
import math
import os

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np

from config.flags import check_flag
from config.options import ABOVE_0, FROM_0, MAX_SEED, OBJECT, POSITIVE_INT, REQUIRED, SEED, Option
from config.schema import check_section
from features.autoencoder import LatentScaling
from features.images import ON_ERROR, UnreadableImage, dim_note, find_images, load_image, unreadable_list
from runtime.files import write_json
from runtime.process import configure_runtime, counted, run_cli
from runtime.progress import tqdm
from runtime.untrusted import read_json

configure_runtime()  # before Paddle is imported

TRAINING = {
    "steps": Option(3000, POSITIVE_INT, "optimizer steps; as all below, wins over the JSON"),
    "batch_size": Option(32, POSITIVE_INT),
    "lr": Option(2e-3, ABOVE_0, "peak learning rate"),
    "kl_weight": Option(3e-3, FROM_0, "weight of the KL term (mean over latent elements)"),
    "seed": Option(0, SEED._replace(accepts=lambda value: SEED.accepts(value) and value <= MAX_SEED)),
}


def load_settings(path: str, **flags) -> dict:
    """Reads `{"vae": AutoencoderKL keywords, "training": {...}}`; flags win over it, then come the defaults.

    Anything else is a `ValueError` that names the flag, or file and key.
    """
    for name, value in flags.items():
        check_flag(name, TRAINING[name], value)
    settings = check_section({"vae": Option(REQUIRED, OBJECT), "training": Option({}, OBJECT)}, read_json(path), path)
    training = check_section(TRAINING, {**settings["training"], **flags}, f"{path}: training")
    return {"vae": settings["vae"], "training": training}


def load_folder(root: str, size: int, lost: list | None = None):
    """Returns the images of an image folder, float32 `(N, 3, size, size)` in [-1, 1], and prints notes on them.

    `lost` gets `(name, reason)` of unreadable images, which are left out; without it the first is a ValueError.
    """
    notes, dim, images = [], [], []
    samples, _ = find_images(root, notes=notes)
    for path, _ in samples:
        try:
            images.append(load_image(path, size, dim))
        except UnreadableImage as error:
            if lost is None:
                raise ValueError(f"{error}; repair or remove it, or give --on_error skip") from None
            lost.append((path, error.reason))
    if not images:
        raise ValueError(f"{root}: not one of its {len(samples)} images can be read: {lost[-1][1]}")
    for note in [*notes, *([dim_note(dim)] if dim else [])]:
        print(note, flush=True)
    return np.stack(images)


def train(vae, images, *, steps: int, batch_size: int, lr: float, kl_weight: float, seed: int) -> None:
    """Trains `vae` in place on images `(N, 3, H, W)` with AdamW, a short warm-up and a cosine decay to zero."""
    import paddle

    rng = np.random.default_rng(seed)
    warmup = min(100, steps // 10)
    schedule = paddle.optimizer.lr.LambdaDecay(
        lr, lambda step: min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    optimizer = paddle.optimizer.AdamW(
        schedule, parameters=vae.parameters(), weight_decay=0.0, grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0)
    )
    vae.train()
    progress = tqdm(range(steps), desc="VAE", unit="step")
    for step in progress:
        x = paddle.to_tensor(images[rng.integers(0, len(images), batch_size)])  # (B, 3, H, W)
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        mse = (reconstruction - x).square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        (mse + kl_weight * kl).backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        if step % 50 == 0:
            # 4 is the square of the images' range, [-1, 1].
            progress.set_postfix(psnr=f"{10 * math.log10(4 / mse.item()):.1f} dB", kl=f"{kl.item():.2f}")
    vae.eval()


def measure(vae, images, batch_size: int = 64) -> tuple[float, float]:
    """Returns the PSNR in dB of decoding the posterior's mean, and the standard deviation of posterior samples.

    Both are over images `(N, 3, H, W)`; the deviation is that before the scaling_factor, which follows from it.
    """
    import paddle

    scaling = LatentScaling.of({**vae.config, "scaling_factor": 1.0})
    squared_error, latents = 0.0, []
    with paddle.no_grad():
        for start in range(0, len(images), batch_size):
            x = paddle.to_tensor(images[start : start + batch_size])
            posterior = vae.encode(x).latent_dist
            reconstruction = vae.decode(posterior.mean).sample.clip(-1, 1)
            squared_error += (reconstruction - x).square().sum().item()
            latents.append(scaling.normalize(posterior.sample()).numpy())
    return 10 * math.log10(4 * images.size / squared_error), float(np.concatenate(latents).std())


def main(argv: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="image folder by class to train on")
    parser.add_argument("--heldout", help="image folder by class on which to measure the reconstruction")
    parser.add_argument("--config_file", required=True, help="JSON with sections vae and training")
    parser.add_argument("--output", required=True, help="new or empty folder for the trained autoencoder")
    parser.add_argument("--on_error", **ON_ERROR)
    for name, option in TRAINING.items():
        parser.add_argument(f"--{name}", type=option.check.parse, help=option.help or None)
    args = parser.parse_args(argv)

    flags = {name: getattr(args, name) for name in TRAINING if getattr(args, name) is not None}
    settings = load_settings(args.config_file, **flags)
    if os.path.isdir(args.output) and os.listdir(args.output):
        raise ValueError(f"--output {args.output} is not empty; nothing was written")
    size = settings["vae"].get("sample_size", 32)
    check_section({"sample_size": Option(32, POSITIVE_INT)}, {"sample_size": size}, args.config_file)
    lost = [] if args.on_error == "skip" else None
    images = load_folder(args.data, size, lost)
    heldout = load_folder(args.heldout, size, lost) if args.heldout else None

    import paddle
    from ppdiffusers import AutoencoderKL

    paddle.seed(settings["training"]["seed"])
    try:
        vae = AutoencoderKL(**settings["vae"])
        LatentScaling.of(vae.config, channels=vae.config.latent_channels, source="its config")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{args.config_file}: AutoencoderKL refuses these settings: {error}") from None

    # Train, measure, save.
    train(vae, images, **settings["training"])
    psnr, std = measure(vae, images)
    vae.register_to_config(scaling_factor=round(1.0 / std, 5))
    print(f"{counted(len(images), 'training image')}: PSNR {psnr:.2f} dB, latents' std {std:.4f} before scaling")
    if heldout is not None:
        print(f"{counted(len(heldout), 'held-out image')}: PSNR {measure(vae, heldout)[0]:.2f} dB")
    vae.save_pretrained(args.output, safe_serialization=False)
    write_json(os.path.join(args.output, "training.json"), settings)
    if lost:
        print(unreadable_list(lost))
    print(f"The autoencoder is in {args.output}")


if __name__ == "__main__":
    run_cli(main)
