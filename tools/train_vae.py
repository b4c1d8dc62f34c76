"""Train a small AutoencoderKL on a folder of images and save it in ppdiffusers' format.

    python tools/train_vae.py --data_path my_images --output outputs/my_vae

fine-tunes the autoencoder in assets/colour_vae on your pictures, 64 pixels a side: two to three minutes on a CPU.
extract_features.py, the training and the samplers take the result with --vae outputs/my_vae. It is made for small
pictures of a few hundred to some thousand; for photographs of 256 pixels take a published autoencoder.

--config_file FILE trains a new network, {"vae": AutoencoderKL's keywords, "training": {...}}, instead.

The loss is the mean squared error over pixels in [-1, 1] plus kl_weight times the mean KL divergence of a latent's
posterior to a unit Gaussian. OUTPUT gets config.json (with the scaling_factor that gives the latents of the training
images unit standard deviation, after a shift or statistics that the settings name), model_state.pdparams and
training.json, the settings that made it. At the end stands the PSNR of pictures that were not trained on: those of
--heldout, else one in ten of --data_path.

The autoencoder in assets/digits_vae was made by
    python tools/prepare_digits.py --output digits
    python tools/train_vae.py --config_file assets/digits_vae/training.json \\
        --data_path digits/train --heldout digits/heldout --output digits_vae
that in assets/colour_vae as its README.md says.
"""

import math
import os

import _root  # (the project's root, on sys.path)
import numpy as np

from config.flags import CommandParser, check_flag
from config.options import ABOVE_0, FROM_0, MAX_SEED, OBJECT, POSITIVE_INT, REQUIRED, SEED, Option, or_null
from config.schema import check_section
from features.autoencoder import LatentScaling, load_vae, weights_digest
from features.images import (
    BACKGROUND,
    ON_ERROR,
    UnreadableImage,
    dim_note,
    find_images,
    load_image,
    parse_background,
    see_through_note,
    unreadable_list,
)
from runtime.files import write_json
from runtime.precision import cast_layer
from runtime.process import configure_runtime, counted, run_cli
from runtime.progress import tqdm
from runtime.untrusted import read_json, read_json_object

configure_runtime()  # before Paddle is imported

TRAINING = {
    "steps": Option(3000, POSITIVE_INT, "optimizer steps; as all below, wins over the JSON"),
    "batch_size": Option(32, POSITIVE_INT, "images a step"),
    "lr": Option(2e-3, ABOVE_0, "peak learning rate"),
    "crop": Option(
        None, or_null(POSITIVE_INT), "learn from random squares of this side, which is faster [whole images]"
    ),
    "kl_weight": Option(3e-3, FROM_0, "weight of the KL term (mean over latent elements)"),
    "seed": Option(0, SEED._replace(accepts=lambda value: SEED.accepts(value) and value <= MAX_SEED), "of all noise"),
}
FINE_TUNING = {  # two to three minutes on a CPU
    "steps": 300, "batch_size": 8, "lr": 1e-3, "kl_weight": 1e-3, "crop": None, "seed": 0,
}  # fmt: skip
FLAGS = {"steps": "max_steps", "lr": "learning_rate"}  # others are called as their keys
INIT = "assets/colour_vae"  # unless a network's settings are given
MEASURED = 2000  # training images at most, of which the scale of the latents is taken
MEANING = (  # from this PSNR in dB on
    (33, "hard to tell from the originals by eye"),
    (28, "good, small details are lost"),
    (25, "fair, edges are soft"),
    (0, "blurred (it is below 25 dB): train longer, on more pictures, or with a larger network"),
)


def load_settings(path: str, **flags) -> dict:
    """Reads `{"vae": AutoencoderKL keywords, "training": {...}}`; flags win over it, then come the defaults.

    Anything else is a `ValueError` that names the flag, or file and key.
    """
    check_flags(flags)
    keys = {"vae": Option(REQUIRED, OBJECT), "training": Option({}, OBJECT), "init": Option(None, OBJECT)}
    settings = check_section(keys, read_json(path), path)
    if settings["init"] is not None:
        raise ValueError(f"{path}: is of a network that was fine-tuned; give --init instead of --config_file")
    training = check_section(TRAINING, {**settings["training"], **flags}, f"{path}: training")
    return {"vae": settings["vae"], "training": training}


def check_flags(flags: dict) -> None:
    """Raises `ValueError` for a setting of the training that can't be; the message has the flag's name."""
    for name, value in flags.items():
        check_flag(FLAGS.get(name, name), TRAINING[name], value)


def load_folder(root: str, size: int, lost: list | None = None, background: list | None = None):
    """Returns the images of an image folder, float32 `(N, 3, size, size)` in [-1, 1], and prints notes on them.

    `lost` gets `(name, reason)` of unreadable images, which are left out; without it the first is a ValueError.
    `background` is a colour that transparent images are laid over, `[red, green, blue]`.
    """
    notes, dim, see_through, images = [], [], [], []
    samples, _ = find_images(root, notes=notes)
    for path, _ in tqdm(samples, desc=f"reading {root}", unit="image", leave=False):
        try:
            images.append(load_image(path, size, dim=dim, background=background, see_through=see_through))
        except UnreadableImage as error:
            if lost is None:
                raise ValueError(f"{error}; repair or remove it, or give --on_error skip") from None
            lost.append((path, error.reason))
    if not images:
        raise ValueError(f"{root}: not one of its {len(samples)} images can be read: {lost[-1][1]}")
    notes += [dim_note(dim)] if dim else []
    notes += [see_through_note(see_through)] if see_through else []
    for note in notes:
        print(note, flush=True)
    return np.stack(images)


def train(
    vae, images, *, steps: int, batch_size: int, lr: float, crop: int | None, kl_weight: float, seed: int
) -> None:
    """Trains `vae` in place on images `(N, 3, H, W)` with AdamW, a short warm-up and a cosine decay to zero.

    With `crop` each step sees random squares of this side, a multiple of the down-factor: the network is made of
    convolutions, so that what it learns of small pictures is right for large ones.
    """
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
        batch = images[rng.integers(0, len(images), batch_size)]  # (B, 3, H, W)
        if crop:
            top, left = rng.integers(0, images.shape[-1] - crop + 1, 2)
            batch = np.ascontiguousarray(batch[..., top : top + crop, left : left + crop])
        x = paddle.to_tensor(batch)
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


def make_network(args, settings):
    """Returns the autoencoder to train: new, by `settings`, or that of --init; ValueError if it can't be."""
    import paddle
    from ppdiffusers import AutoencoderKL

    paddle.seed(settings["training"]["seed"])
    if "init" in settings:
        vae = load_vae(args.init)
        for parameter in vae.parameters():
            parameter.stop_gradient = False  # a loaded network is frozen
        settings["init"]["weights_sha256"] = weights_digest(vae)
        settings["vae"] = {key: value for key, value in vae.config.items() if not key.startswith("_")}
        print(f"fine-tunes {args.init}", flush=True)
        return vae
    try:
        vae = AutoencoderKL(**settings["vae"])
        LatentScaling.of(vae.config, channels=vae.config.latent_channels, source="its config")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{args.config_file}: AutoencoderKL refuses these settings: {error}") from None
    return vae


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--data_path", required=True, metavar="FOLDER", help="image folder by class to train on")
    parser.add_argument(
        "--heldout", metavar="FOLDER", help="image folder by class on which to measure [one in ten, held out]"
    )
    parser.add_argument("--init", metavar="FOLDER", help=f"autoencoder to fine-tune [{INIT}, without --config_file]")
    parser.add_argument("--config_file", metavar="FILE", help="JSON with sections vae and training, of a new network")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="new or empty folder for the trained autoencoder"
    )
    parser.add_argument("--image_size", check=POSITIVE_INT, help="side of the crops in pixels [the network's]")
    parser.add_argument("--background", **BACKGROUND)
    parser.add_argument("--on_error", **ON_ERROR)
    for name, option in TRAINING.items():
        defaults = f" [{option.default}; fine-tuning: {FINE_TUNING[name]}]" if option.default is not None else ""
        shown = option.help + defaults
        parser.add_argument(
            f"--{FLAGS.get(name, name)}",
            dest=name,
            aliases=("--steps",) * (name == "steps"),
            type=option.check.parse,
            metavar=option.check.metavar,
            help=shown,
        )
    parser.add_argument(
        "--save_dtype",
        choices=("float32", "float16"),
        default="float32",
        help="type of the numbers in the file; float16 halves it and changes nothing one can see",
    )
    return parser


def read_network_settings(args) -> dict:
    """Returns the sections `vae` and `training`, and `init` of a network to fine-tune; fills in what `args` lack.

    A mistake in the flags is a `ValueError` of one line, before Paddle is imported.
    """
    flags = {name: getattr(args, name) for name in TRAINING if getattr(args, name) is not None}
    if args.init and args.config_file:
        raise ValueError("--init and --config_file: give one; the first has a network, the second describes a new one")
    if args.config_file:
        settings = load_settings(args.config_file, **flags)
    else:
        check_flags(flags)
        name, args.init = args.init or INIT, args.init or os.path.join(_root.ROOT, INIT)
        if not os.path.isdir(args.init):
            raise ValueError(f"--init {args.init}: no such folder; expected that of an AutoencoderKL")
        network = read_json_object(os.path.join(args.init, "config.json"))
        settings = {"vae": network, "training": {**FINE_TUNING, **flags}, "init": {"name": name}}
    if os.path.isdir(args.output) and os.listdir(args.output):
        raise ValueError(f"--output {args.output} is not empty; nothing was written")
    size = settings["vae"].get("sample_size", 32)
    check_section({"sample_size": Option(32, POSITIVE_INT)}, {"sample_size": size}, args.config_file or args.init)
    args.image_size = size if args.image_size is None else args.image_size
    if args.image_size < 1:
        raise ValueError(f"--image_size {args.image_size}: expected at least 1")
    if args.image_size != size:
        settings["vae"]["sample_size"] = args.image_size
    blocks = settings["vae"].get("block_out_channels")
    factor = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else 1  # AutoencoderKL's own has one
    if args.image_size % factor:
        raise ValueError(f"--image_size {args.image_size}: expected a multiple of {factor}")
    crop = settings["training"]["crop"] or args.image_size
    if crop % factor or crop > args.image_size:
        raise ValueError(f"--crop {crop}: expected a multiple of {factor}, at most --image_size {args.image_size}")
    return settings


def main(argv: list | None = None) -> None:
    args = build_parser().parse_args(argv)
    background = parse_background(args.background)
    settings = read_network_settings(args)

    # The images.
    lost = [] if args.on_error == "skip" else None
    images = load_folder(args.data_path, args.image_size, lost, background)
    if args.heldout:
        heldout = load_folder(args.heldout, args.image_size, lost, background)
    else:
        heldout, images = images[9::10], np.delete(images, np.s_[9::10], axis=0)

    vae = make_network(args, settings)
    vae.register_to_config(sample_size=args.image_size)

    # Train, measure, save.
    train(vae, images, **settings["training"])
    some = images[:: -(-len(images) // MEASURED)]
    psnr, std = measure(vae, some)
    vae.register_to_config(scaling_factor=round(1.0 / std, 5))
    print(f"{counted(len(some), 'training image')}: PSNR {psnr:.2f} dB, latents' std {std:.4f} before scaling")
    if len(heldout):
        psnr, _ = measure(vae, heldout)
        print(f"{counted(len(heldout), 'held-out image')}: PSNR {psnr:.2f} dB")
    print(f"What comes back is {next(words for least, words in MEANING if psnr >= least or not least)}")
    if args.save_dtype == "float16":
        cast_layer(vae, "float16")
    vae.save_pretrained(args.output, safe_serialization=False)
    if background is not None:
        settings["background"] = background
    write_json(os.path.join(args.output, "training.json"), settings)
    if lost:
        print(unreadable_list(lost))
    print(f"The autoencoder is in {args.output}")


if __name__ == "__main__":
    run_cli(main)
