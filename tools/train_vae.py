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

from config.options import MAX_SEED
from features.images import UnreadableImage, dim_note, find_images, load_image, unreadable_list
from runtime.files import write_json
from runtime.process import configure_runtime, counted, run_cli
from runtime.untrusted import read_json

configure_runtime()  # before Paddle is imported

DEFAULTS = {"steps": 3000, "batch_size": 32, "lr": 2e-3, "kl_weight": 3e-3, "seed": 0}
RULES = {
    "steps": ((int,), lambda value: value >= 1, "an integer from 1 on"),
    "batch_size": ((int,), lambda value: value >= 1, "an integer from 1 on"),
    "lr": ((int, float), lambda value: 0 < value < math.inf, "a number above 0"),
    "kl_weight": ((int, float), lambda value: 0 <= value < math.inf, "a number from 0 on"),
    "seed": ((int,), lambda value: 0 <= value <= MAX_SEED, f"an integer from 0 to {MAX_SEED}"),
}


def load_settings(path: str) -> dict:
    """Reads `{"vae": AutoencoderKL keywords, "training": {...}}`, and fills in the defaults of training.

    Raises:
        ValueError: anything else; names file and key.
    """
    settings = read_json(path)
    sections = [settings.get("vae"), settings.get("training", {})] if isinstance(settings, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise ValueError(f'{path}: expected {{"vae": {{...}}, "training": {{...}}}}')
    unknown = set(settings) - {"vae", "training"} | set(settings.get("training", {})) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"{path}: unknown key {sorted(unknown)[0]!r}; training takes {', '.join(DEFAULTS)}")
    return {"vae": settings["vae"], "training": {**DEFAULTS, **settings.get("training", {})}}


def check_training(training: dict, given: dict, path: str) -> None:
    """Raises `ValueError` for the first setting that can't be; those in `given` are flags, the others in `path`."""
    for key, value in training.items():
        types, is_right, expected = RULES[key]
        if type(value) not in types or not is_right(value):
            raise ValueError(f"{f'--{key}' if key in given else f'{path}: {key}'} {value!r}: expected {expected}")


def load_folder(root: str, size: int, lost: list | None = None):
    """Returns the images of an image folder, float32 `(N, 3, size, size)` in [-1, 1], and prints notes on them.

    Args:
        lost: gets `(name, reason)` of unreadable images, which are left out; None: the first is an error.

    Raises:
        ValueError: an image that can't be read, or none that can.
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

    from runtime.progress import tqdm

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
    """Returns `(PSNR in dB, latents' standard deviation)` over images `(N, 3, H, W)`.

    The PSNR is that of decoding the posterior's mean; the deviation that of posterior samples, before the
    scaling_factor, which follows from it.
    """
    import paddle

    from features.autoencoder import LatentScaling

    config = vae.config
    scaling = LatentScaling(1.0, config.shift_factor, config.latents_mean, config.latents_std)
    squared_error, latents = 0.0, []
    with paddle.no_grad():
        for start in range(0, len(images), batch_size):
            x = paddle.to_tensor(images[start : start + batch_size])
            posterior = vae.encode(x).latent_dist
            reconstruction = vae.decode(posterior.mean).sample.clip(-1, 1)
            squared_error += (reconstruction - x).square().sum().item()
            latents.append(scaling.normalize(posterior.sample()).numpy())
    return 10 * math.log10(4 * images.size / squared_error), float(np.concatenate(latents).std())


def run(args) -> None:
    settings = load_settings(args.config_file)
    given = {key: getattr(args, key) for key in DEFAULTS if getattr(args, key) is not None}
    settings["training"].update(given)
    check_training(settings["training"], given, args.config_file)
    if os.path.isdir(args.output) and os.listdir(args.output):
        raise ValueError(f"--output {args.output} is not empty; nothing was written")
    size = settings["vae"].get("sample_size", 32)
    if type(size) is not int or size < 1:
        raise ValueError(f"{args.config_file}: sample_size {size!r}: expected an integer from 1 on")
    lost = [] if args.on_error == "skip" else None
    images = load_folder(args.data, size, lost)
    heldout = load_folder(args.heldout, size, lost) if args.heldout else None

    import paddle
    from ppdiffusers import AutoencoderKL

    from features.autoencoder import LatentScaling

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


def main(argv: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="image folder by class to train on")
    parser.add_argument("--heldout", help="image folder by class on which to measure the reconstruction")
    parser.add_argument("--config_file", required=True, help="JSON with sections vae and training")
    parser.add_argument("--output", required=True, help="new or empty folder for the trained autoencoder")
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="at an image that can't be read: stop there (default), or skip it and list it at the end",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps; as all below, wins over the JSON")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--kl_weight", type=float, help="weight of the KL term (mean over latent elements)")
    parser.add_argument("--seed", type=int)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
