"""Draw images with a DiT.

    python infer_demo_dit.py                                        # the public DiT-XL/2: a golden retriever
    python infer_demo_dit.py --model_path DiT_pipeline --classes 207 "Siberian husky" --num_inference_steps 50
    python infer_demo_dit.py --model_path output/checkpoint-5000 --vae assets/digits_vae --classes 3 7

--model_path is a DiTPipeline folder (tools/convert_dit_to_ppdiffusers.py), its name on the hub, or a training
checkpoint folder, whose averages are then sampled with --vae. Without it: ./DiT_XL_2_256 if that folder is there, else
the public facebook/DiT-XL-2-256. One class gives one image, several a grid.
"""

import argparse
import json
import os
import re

from training.runtime import configure_runtime, resolve_device, run_cli

LOCAL_FOLDER, PUBLIC_NAME = "./DiT_XL_2_256", "facebook/DiT-XL-2-256"
DEFAULT_CLASS = "golden retriever"
IMAGENET_LABELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "ImageNet_id2label.json")
SCHEDULERS = ("ddim", "dpm", "ddpm")


# ---------------------------------------------------------------------------------------------------------------------
# Classes by name or id
# ---------------------------------------------------------------------------------------------------------------------


def find_class(text, labels, num_classes):
    """The id of a class given by label (one of its comma-separated names will do) or by id.

    Args:
        labels: `{id: label}`, possibly empty.
    """
    found = [i for i, label in labels.items() if text == label]
    found = found or [i for i, label in labels.items() if text in [name.strip() for name in label.split(",")]]
    if len(found) > 1:
        raise ValueError(f"--classes {text}: the name of several classes, give the id: {', '.join(map(str, found))}")
    if found:
        return found[0]
    if re.fullmatch(r"\d+", text):
        if int(text) < num_classes:
            return int(text)
        raise ValueError(f"--classes {text}: the classes are 0..{num_classes - 1}")
    known = ", ".join(sorted(labels.values())[:10]) + (", ..." if len(labels) > 10 else "")
    raise ValueError(f"--classes {text}: no such class; expected an id 0..{num_classes - 1}" + known_names(known))


def known_names(known):
    return f" or a name such as {known}" if known else ""


def find_classes(wanted, labels, num_classes):
    """Ids of the classes asked for; by default the golden retriever, or the first ten where there is none."""
    if wanted:
        return [find_class(text, labels, num_classes) for text in wanted]
    if any(DEFAULT_CLASS in label.split(", ") for label in labels.values()):
        return [find_class(DEFAULT_CLASS, labels, num_classes)]
    return list(range(min(num_classes, 10)))


def read_labels(path):
    """`{id: label}` of a JSON with or without the key "id2label"."""
    from training.config import read_json

    labels = read_json(path)
    labels = labels.get("id2label", labels) if isinstance(labels, dict) else labels
    if not isinstance(labels, dict) or not all(str(key).isdigit() for key in labels):
        raise ValueError(f'{path}: expected {{"id2label": {{"0": "name", ...}}}}')
    return {int(key): str(value) for key, value in labels.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Two kinds of model: a pipeline, a training checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def load_pipeline(name_or_path, dtype):
    """The stock DiTPipeline of a folder or of the hub; ValueError with one line if there is none."""
    from ppdiffusers import DiTPipeline

    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "model_index.json")):
        raise ValueError(
            f"--model_path {name_or_path}: neither a DiTPipeline folder (model_index.json) nor a training checkpoint "
            "(config.json and model_state.pdparams)"
        )
    try:
        return DiTPipeline.from_pretrained(name_or_path, paddle_dtype=dtype)
    except Exception as error:  # the hub clients raise a dozen unrelated types
        reason = str(error).strip().split("\n")[0].split(". ")[0][:200]
        raise ValueError(
            f"{name_or_path}: cannot be loaded or downloaded ({reason}). Without a network, give a folder by "
            "--model_path: one copied from a machine that has a network, or one that "
            "tools/convert_dit_to_ppdiffusers.py wrote"
        ) from None


def sample_pipeline(args):
    """uint8 images `(N, H, W, 3)` and the classes' labels, through a DiTPipeline."""
    from paddlenlp.trainer import set_seed
    from ppdiffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if args.scheduler == "ddpm":
        raise ValueError("--scheduler ddpm needs a training checkpoint; for a pipeline: ddim or dpm")
    pipe = load_pipeline(args.model_path, args.dtype)
    scheduler_class = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}[args.scheduler]
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)

    labels = pipeline_labels(args.model_path, pipe) if args.id2label is None else read_labels(args.id2label)
    classes = find_classes(args.classes, labels, max(labels, default=999) + 1)
    guidance_scale = 4.0 if args.guidance_scale is None else args.guidance_scale
    set_seed(42)
    if args.guidance_channels == "all":
        images = pipe(
            class_labels=classes,
            guidance_scale=guidance_scale,
            num_inference_steps=args.num_inference_steps,
            generator=make_generator(args.seed),
        ).images
    else:
        images = sample_transformer(pipe, classes, guidance_scale, args)
    return images, [labels.get(i, str(i)) for i in classes]


def pipeline_labels(path, pipe):
    index = os.path.join(path, "model_index.json")
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            labels = json.load(file).get("id2label") or {}
        return {int(key): label for key, label in labels.items()}
    return {index: label for label, index in pipe.labels.items()}


def sample_transformer(pipe, classes, guidance_scale, args):
    """As DiTPipeline samples, with only the first three channels guided."""
    import paddle

    from sampling.decoder import LatentDecoder
    from sampling.guidance import guided

    def model(x, t, y):
        return pipe.transformer(x, timestep=t, class_labels=y).sample

    y = paddle.to_tensor(classes, dtype="int64")
    settings = pipe.transformer.config
    denoiser = guided(model, y, guidance_scale, channels=3, null_class=1000)
    noise = make_noise(len(classes), settings.in_channels, settings.sample_size, args.seed, pipe.transformer.dtype)
    return LatentDecoder(pipe.vae)(run_scheduler(pipe.scheduler, denoiser, noise, args.num_inference_steps))


def run_scheduler(scheduler, denoiser, latents, num_steps):
    """Latents by a ppdiffusers scheduler and a denoiser(x, t); a learned variance is cut off."""
    import paddle
    from tqdm import tqdm

    scheduler.set_timesteps(num_steps)
    with paddle.no_grad():
        for t in tqdm(scheduler.timesteps, desc="sampling"):
            output = denoiser(latents, t.reshape([1]).expand([latents.shape[0]]))
            latents = scheduler.step(output[:, : latents.shape[1]], t, latents).prev_sample
    return latents


def sample_checkpoint(args):
    """uint8 images `(N, H, W, 3)` and the classes' labels, by this project's own diffusion code."""
    import paddle

    from diffusion import create_diffusion
    from models import build_model
    from models.weights import check_state
    from objectives import build_objective
    from sampling.checkpoint import read_weights
    from sampling.decoder import LatentDecoder
    from sampling.export import make_scheduler
    from sampling.guidance import guided
    from training.config import load_config

    config = load_config(os.path.join(args.model_path, "config.json"))
    settings, objective = config["model"], config["objective"]
    has_null_class = settings["class_dropout_prob"] > 0
    guidance_scale = args.guidance_scale
    if guidance_scale is None:
        guidance_scale = 4.0 if has_null_class else 1.0
    if guidance_scale != 1 and not has_null_class:
        raise ValueError(f"{args.model_path}: trained without a null class, can't be guided; use --guidance_scale 1")

    labels = {}
    if args.id2label is not None or settings["num_classes"] == 1000:
        labels = read_labels(args.id2label or IMAGENET_LABELS)
    classes = find_classes(args.classes, labels, settings["num_classes"])

    # The network.
    decoder = LatentDecoder.from_pretrained(args.vae)
    if decoder.vae.config.latent_channels != settings["in_channels"]:
        raise ValueError(
            f"--vae {args.vae}: has {decoder.vae.config.latent_channels} latent channels, {args.model_path} was "
            f"trained on {settings['in_channels']}"
        )
    state, source = read_weights(args.model_path, key=args.key)
    network = build_model(settings)
    check_state(state, {name: tuple(value.shape) for name, value in network.named_parameters()}, source=source)
    network.set_state_dict(state)
    network.eval()
    network.to(dtype=args.dtype)

    # The sampler.
    def model(x, t, y):
        return network(x, t, y).astype("float32")

    channels = None if args.guidance_channels == "all" else 3
    y = paddle.to_tensor(classes, dtype="int64")
    denoiser = guided(model, y, guidance_scale, channels=channels, null_class=settings["num_classes"])
    noise = make_noise(len(classes), settings["in_channels"], settings["sample_size"], args.seed, "float32")
    paddle.seed(args.seed)  # the noise of ddpm's steps
    steps = args.num_inference_steps
    with paddle.no_grad():
        if args.scheduler == "ddim":
            keywords = {key: value for key, value in objective.items() if key not in ("type", "timestep_sampler")}
            diffusion = create_diffusion(f"ddim{steps}", learn_sigma=settings["learn_sigma"], **keywords)
            latents = diffusion.ddim_sample_loop(denoiser, noise.shape, noise=noise, clip_denoised=False, progress=True)
        elif args.scheduler == "dpm":
            latents = run_scheduler(make_scheduler(objective, "dpm"), denoiser, noise, steps)
        else:
            latents = build_objective(config).sample(denoiser, noise, num_steps=steps, progress=True)
    return decoder(latents), [labels.get(i, str(i)) for i in classes]


def make_generator(seed):
    import paddle

    return paddle.Generator().manual_seed(seed)


def make_noise(count, channels, size, seed, dtype):
    """The pipeline's own initial noise for a seed, `(count, channels, size, size)`."""
    from ppdiffusers.utils.paddle_utils import randn_tensor

    return randn_tensor((count, channels, size, size), generator=make_generator(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def find_output(path, labels, overwrite):
    """The PNG to write: the one asked for, else a free one named after the class."""
    if path is not None:
        if os.path.exists(path) and not overwrite:
            raise ValueError(f"--output {path}: exists already; give another name, or --overwrite")
        return path
    name = re.sub(r"[^\w-]+", "_", labels[0].split(",")[0]) if len(labels) == 1 else "grid"
    stem, number = f"result_DiT_{name}", 1
    path = f"{stem}.png"
    while os.path.exists(path):
        number += 1
        path = f"{stem}-{number}.png"
    return path


def run(args):
    """Samples and saves, as the flags say; ValueError for whatever can't be."""
    if args.num_inference_steps < 1:
        raise ValueError(f"--num_inference_steps {args.num_inference_steps}: expected 1 or more")
    if args.output is not None:
        find_output(args.output, [], args.overwrite)
        if not os.path.isdir(os.path.dirname(os.path.abspath(args.output))):
            raise ValueError(f"--output {args.output}: there is no such folder")
    if args.model_path is None:
        args.model_path = LOCAL_FOLDER if os.path.isdir(LOCAL_FOLDER) else PUBLIC_NAME

    configure_runtime()
    import paddle

    device = resolve_device(args.device)
    paddle.set_device(device)
    if device == "cpu" and args.dtype != "float32":
        raise ValueError(f"--dtype {args.dtype}: Paddle computes in float32 only on a CPU; use --dtype float32")

    from sampling.checkpoint import is_training_checkpoint
    from sampling.grid import make_grid

    if is_training_checkpoint(args.model_path):
        images, labels = sample_checkpoint(args)
    else:
        images, labels = sample_pipeline(args)
    path = find_output(args.output, labels, args.overwrite)
    make_grid(images, columns=min(len(images), 8)).save(path)
    print(f"{', '.join(labels)}: {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="pipeline folder, its hub name, or training checkpoint folder")
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help=f"name or id [{DEFAULT_CLASS}; else the first ten]"
    )
    parser.add_argument("--num_inference_steps", type=int, default=25, help="[25]")
    parser.add_argument("--guidance_scale", type=float, help="1 for none [4; 1 without a null class]")
    parser.add_argument(
        "--guidance_channels",
        choices=("3", "all"),
        default="all",
        help="latent channels that are guided: all as DiTPipeline does, 3 as the official DiT code does [all]",
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim", help="ddpm for checkpoints only [ddim]")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise [0]")
    parser.add_argument("--output", help="PNG to write [result_DiT_<class>.png, numbered if it is there]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N [auto: a GPU if there is one]")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="[float32]")
    parser.add_argument("--id2label", help='JSON {"id2label": {"0": "name", ...}}: labels of --classes')
    checkpoint = parser.add_argument_group("for a training checkpoint")
    checkpoint.add_argument("--vae", default="stabilityai/sd-vae-ft-mse", help="folder or hub name of its VAE")
    checkpoint.add_argument("--key", choices=("model", "ema"), help="which weights [ema]")
    run(parser.parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
