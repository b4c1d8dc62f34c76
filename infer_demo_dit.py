"""Draw images with a DiT or a Large-DiT.

    python infer_demo_dit.py                                        # the public DiT-XL/2: a golden retriever
    python infer_demo_dit.py --model_path DiT_pipeline --classes 207 "Siberian husky" --num_inference_steps 50
    python infer_demo_dit.py --model_path output/checkpoint-5000 --vae assets/digits_vae --classes 3 7

--model_path is a DiTPipeline folder (tools/convert_dit_to_ppdiffusers.py), its name on the hub, or a training
checkpoint folder, whose averages are sampled. Without it: ./DiT_XL_2_256 if that folder is there, else
the public facebook/DiT-XL-2-256. One class gives one image, several a grid.

--backend inference samples by Paddle Inference, of which --dtype bfloat16 also runs on a CPU that has it. --model_path
may then also be a folder of tools/export_inference.py; any other is exported for this run, which takes a few seconds.
Such a folder is a program: it runs as code of whoever made it.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass

from sampling.autoencoder import DEFAULT_VAE
from tools.image_demo import (
    add_flags,
    check_model_path,
    check_model_type,
    checkpoint_labels,
    checkpoint_vae,
    draw,
    find_classes,
    load_pipeline,
    make_generator,
    pipeline_labels,
    read_dit,
    read_labels,
)
from training.progress import is_terminal
from training.runtime import run_cli

SCHEDULERS = ("ddim", "dpm", "ddpm")


@dataclass(frozen=True)
class Demo:
    """What differs between the demos of DiTs of several sizes: their defaults.

    Attributes:
        kind: of the PNG's name. local_folder, public_name: what is sampled without --model_path, the first if it is
            there. seed: of the noise. gpu_dtype: on a GPU. description: of --help.
    """

    kind: str = "DiT"
    local_folder: str = "./DiT_XL_2_256"
    public_name: str = "facebook/DiT-XL-2-256"
    seed: int = 0
    gpu_dtype: str = "float32"
    description: str = __doc__


# ---------------------------------------------------------------------------------------------------------------------
# Three kinds of model: a pipeline, a training checkpoint, a folder for Paddle Inference
# ---------------------------------------------------------------------------------------------------------------------


def check_guidance(scale, has_null_class, path):
    """The guidance scale asked for, or the default; `ValueError` if the network has no null class to guide with."""
    if scale is None:
        return 4.0 if has_null_class else 1.0
    if scale != 1 and not has_null_class:
        raise ValueError(f"{path}: trained without a null class, can't be guided; use --guidance_scale 1")
    return scale


def sample_pipeline(args):
    """uint8 images `(N, H, W, 3)` and the classes' labels, through a DiTPipeline."""
    from paddlenlp.trainer import set_seed

    from sampling.pretrained import has_null_class

    if args.scheduler == "ddpm":
        raise ValueError("--scheduler ddpm needs a training checkpoint; for a pipeline: ddim or dpm")
    pipe = load_pipeline(args.model_path, args.dtype)
    pipe.set_progress_bar_config(disable=None)  # on a terminal only
    pipe.scheduler = choose_scheduler(pipe.scheduler, args)
    labels = pipeline_labels(args.model_path, pipe) if args.id2label is None else read_labels(args.id2label)
    classes = find_classes(args.classes, labels, max(labels, default=999) + 1)
    guidance_scale = check_guidance(args.guidance_scale, has_null_class(pipe.transformer), args.model_path)
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


def choose_scheduler(scheduler, args):
    """The scheduler that --scheduler names, with the settings of a pipeline's own."""
    from ppdiffusers import DDIMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler

    if isinstance(scheduler, EDMEulerScheduler):  # a SiT, see sampling.export_sit
        if args.scheduler is not None:
            raise ValueError(f"--scheduler {args.scheduler}: {args.model_path} is a SiT, which has its own scheduler")
        return scheduler
    scheduler_class = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}[args.scheduler or "ddim"]
    return scheduler_class.from_config(scheduler.config)


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


def sample_inference(args):
    """uint8 images `(N, H, W, 3)` and the classes' labels, by Paddle Inference."""
    import paddle

    from sampling.decoder import LatentDecoder
    from sampling.guidance import guided
    from sampling.inference import check_dtype, export_inference, is_exported, load_inference

    if args.scheduler == "ddpm":
        raise ValueError("--scheduler ddpm: not with --backend inference; expected ddim or dpm")
    device = paddle.get_device()
    check_dtype(device, args.dtype)
    if is_exported(args.model_path):
        pipe = load_inference(args.model_path, device=device, dtype=args.dtype)
    else:
        print(f"exporting {args.model_path} for this run (tools/export_inference.py keeps it)", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            export_inference(read_dit(args.model_path, vae=args.vae, key=args.key, id2label=args.id2label), folder)
            pipe = load_inference(folder, device=device, dtype=args.dtype)

    labels = pipe.id2label if args.id2label is None else read_labels(args.id2label)
    classes = find_classes(args.classes, labels, pipe.num_classes)
    scale = check_guidance(args.guidance_scale, pipe.null_class is not None, args.model_path)
    scheduler = choose_scheduler(pipe.scheduler, args)

    def model(x, t, y):
        return pipe.network(x, t.astype("float32"), y)

    y = paddle.to_tensor(classes, dtype="int64")
    channels = None if args.guidance_channels == "all" else 3
    denoiser = guided(model, y, scale, channels=channels, null_class=pipe.null_class or 0)
    noise = make_noise(len(classes), pipe.in_channels, pipe.sample_size, args.seed, "float32")
    images = LatentDecoder(pipe.vae)(run_scheduler(scheduler, denoiser, noise, args.num_inference_steps))
    return images, [labels.get(i, str(i)) for i in classes]


def run_scheduler(scheduler, denoiser, latents, num_steps):
    """Latents by a ppdiffusers scheduler and a denoiser(x, t); a learned variance is cut off."""
    import paddle

    from training.progress import tqdm

    scheduler.set_timesteps(num_steps)
    with paddle.no_grad():
        for t in tqdm(scheduler.timesteps, desc="sampling"):
            latents = scheduler.scale_model_input(latents, t)
            output = denoiser(latents, t.reshape([1]).expand([latents.shape[0]]))
            latents = scheduler.step(output[:, : latents.shape[1]], t, latents).prev_sample
    return latents


def sample_checkpoint(args):
    """uint8 images `(N, H, W, 3)` and the classes' labels, by this project's own diffusion code."""
    import paddle

    from diffusion import create_diffusion
    from models import build_model
    from models.weights import check_state, expected_shapes
    from objectives import build_objective
    from sampling.checkpoint import read_weights
    from sampling.decoder import LatentDecoder
    from sampling.export import make_scheduler
    from sampling.guidance import guided
    from training.config import load_config

    config = load_config(os.path.join(args.model_path, "config.json"))
    settings, objective = config["model"], config["objective"]
    check_model_type(settings["type"], "infer_demo_dit.py", f"--model_path {args.model_path}: is")
    guidance_scale = check_guidance(args.guidance_scale, settings["class_dropout_prob"] > 0, args.model_path)

    labels = checkpoint_labels(args.id2label, config)
    classes = find_classes(args.classes, labels, settings["num_classes"])

    # The network.
    decoder = LatentDecoder(checkpoint_vae(args.vae, config))
    if decoder.vae.config.latent_channels != settings["in_channels"]:
        raise ValueError(
            f"--vae {args.vae or DEFAULT_VAE}: has {decoder.vae.config.latent_channels} latent channels, "
            f"{args.model_path} was trained on {settings['in_channels']}"
        )
    state, source = read_weights(args.model_path, key=args.key)
    check_state(state, expected_shapes(settings), source=source)  # before memory is taken for the network
    network = build_model(settings)
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
    steps, shown = args.num_inference_steps, is_terminal(sys.stderr)
    with paddle.no_grad():
        if args.scheduler in (None, "ddim"):
            keywords = {key: value for key, value in objective.items() if key not in ("type", "timestep_sampler")}
            diffusion = create_diffusion(f"ddim{steps}", learn_sigma=settings["learn_sigma"], **keywords)
            latents = diffusion.ddim_sample_loop(
                denoiser, noise.shape, noise=noise, clip_denoised=False, progress=shown
            )
        elif args.scheduler == "dpm":
            latents = run_scheduler(make_scheduler(objective, "dpm"), denoiser, noise, steps)
        else:
            latents = build_objective(config).sample(denoiser, noise, num_steps=steps, progress=shown)
    return decoder(latents), [labels.get(i, str(i)) for i in classes]


def make_noise(count, channels, size, seed, dtype):
    """The pipeline's own initial noise for a seed, `(count, channels, size, size)`."""
    from ppdiffusers.utils.paddle_utils import randn_tensor

    return randn_tensor((count, channels, size, size), generator=make_generator(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None, demo=Demo()):  # noqa: B008 (frozen)
    parser = argparse.ArgumentParser(description=demo.description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_path", help="pipeline folder, its hub name, training checkpoint folder, or (inference) exported folder"
    )
    add_flags(parser, demo.kind, guidance_channels="all", seed=demo.seed, gpu_dtype=demo.gpu_dtype)
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="ddpm for checkpoints only [ddim]")
    parser.add_argument(
        "--backend",
        choices=("eager", "inference"),
        default="eager",
        help="inference: Paddle Inference, see tools/export_inference.py [eager]",
    )
    checkpoint = parser.add_argument_group("for a training checkpoint")
    checkpoint.add_argument("--vae", help=f"folder or hub name of its VAE [the features' own, else {DEFAULT_VAE}]")
    checkpoint.add_argument("--key", choices=("model", "ema"), help="which weights [ema]")
    args = parser.parse_args(argv)
    if args.model_path is None:
        args.model_path = demo.local_folder if os.path.isdir(demo.local_folder) else demo.public_name
    else:
        check_model_path(args.model_path)
    draw(demo.kind, args, sample)


def sample(args):
    """Images and labels of whichever kind of model --model_path is."""
    from sampling.checkpoint import is_training_checkpoint
    from sampling.inference import is_exported

    if args.backend == "inference":
        return sample_inference(args)
    if is_exported(args.model_path):
        raise ValueError(
            f"--model_path {args.model_path}: holds programs for Paddle Inference; if you trust whoever made them "
            "(they run as code), add --backend inference"
        )
    return sample_checkpoint(args) if is_training_checkpoint(args.model_path) else sample_pipeline(args)


if __name__ == "__main__":
    run_cli(main)
