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

from config.schema import DEFAULT_VAE
from runtime.process import is_terminal, run_cli
from sampling.demo import (
    add_flags,
    check_exportable,
    check_flags,
    check_guidance,
    check_model,
    check_model_path,
    checkpoint_vae,
    describe_model,
    draw,
    find_classes,
    load_pipeline,
    make_generator,
    note_weights_flags,
    pipeline_labels,
    read_dit,
)
from sampling.step_counts import check_ddim_stride, check_num_steps, fit_note

SCHEDULERS = ("ddim", "dpm", "ddpm")
SIT_SCHEDULER = "EDMEulerScheduler"  # of a SiT's DiTPipeline folder, see sampling.pipelines.export_sit


@dataclass(frozen=True)
class Demo:
    """What differs between the demos of DiTs of several sizes: their defaults.

    Attributes:
        kind: of the PNG's name. local_folder, public_name: what is sampled without --model_path, the first if it is
            there. seed: of the noise. gpu_dtype: on a GPU. description: of --help.
    """

    description: str
    kind: str = "DiT"
    local_folder: str = "./DiT_XL_2_256"
    public_name: str = "facebook/DiT-XL-2-256"
    seed: int = 0
    gpu_dtype: str = "float32"


DEMO = Demo(description=__doc__)


# ---------------------------------------------------------------------------------------------------------------------
# What can be refused before anything is loaded
# ---------------------------------------------------------------------------------------------------------------------


def check(args, model):
    """Raises `ValueError` for what the model can't do, as far as its JSON files say; notes flags of no effect.

    Args:
        model: a `sampling.demo.Model`.
    """
    if model.kind == "exported" and args.backend == "eager":
        raise ValueError(
            f"--model_path {model.path}: holds programs for Paddle Inference; if you trust whoever made them "
            "(they run as code), add --backend inference"
        )
    if args.scheduler == "ddpm" and args.backend == "inference":
        raise ValueError("--scheduler ddpm: not with --backend inference; expected ddim or dpm")
    if args.scheduler == "ddpm" and model.kind != "checkpoint":
        raise ValueError("--scheduler ddpm needs a training checkpoint; for a pipeline: ddim or dpm")
    check_model(args, model)
    if model.kind == "checkpoint":
        total = model.config["objective"]["diffusion_steps"]
        is_ddim = args.scheduler in (None, "ddim")
        if is_ddim and args.backend == "eager":
            check_ddim_stride(args.num_inference_steps, total)
        else:
            check_num_steps(args.num_inference_steps, total, leading=is_ddim)
    else:
        check_steps(args, model.scheduler)
    note_weights_flags(args, model)


def check_steps(args, settings):
    """Raises `ValueError` for a scheduler or a number of steps that a pipeline with these scheduler settings lacks."""
    kind = settings.get("_class_name")
    if kind == SIT_SCHEDULER:
        if args.scheduler is not None:
            raise ValueError(f"--scheduler {args.scheduler}: {args.model_path} is a SiT, which has its own scheduler")
        return
    total = settings.get("num_train_timesteps", 1000)
    if kind is not None and type(total) is int:
        spacing = settings.get("timestep_spacing", "leading" if kind == "DDIMScheduler" else None)
        leading = args.scheduler in (None, "ddim") and spacing == "leading"
        check_num_steps(args.num_inference_steps, total, leading=leading)


# ---------------------------------------------------------------------------------------------------------------------
# Three kinds of model: a pipeline, a training checkpoint, a folder for Paddle Inference
# ---------------------------------------------------------------------------------------------------------------------


def sample_pipeline(args, model):
    """uint8 images `(N, H, W, 3)` and the classes' labels, through the parts of a DiTPipeline.

    With all channels guided and a scale above 1 these are the pipeline's own images. It ignores scales below 1.
    """
    from sampling.pipelines.inference import StockTransformer, from_dit_pipeline
    from sampling.pipelines.pretrained import read_timestep_fit

    pipe = load_pipeline(model.path, args.dtype)
    labels = pipeline_labels(model.path, pipe) if args.id2label is None else model.labels
    fit = read_timestep_fit(model.path)
    pipeline = from_dit_pipeline(pipe, labels, fit, network=StockTransformer(pipe.transformer))
    return run_pipeline(args, pipeline, pipe.transformer.dtype)


def sample_inference(args, model):
    """uint8 images `(N, H, W, 3)` and the classes' labels, by Paddle Inference."""
    import paddle

    from features.autoencoder import NotFiniteError
    from sampling.pipelines.inference import check_dtype, check_programs, export_inference, load_inference

    device = paddle.get_device()
    check_dtype(device, args.dtype)
    if model.kind == "exported":
        pipe = load_inference(model.path, device=device, dtype=args.dtype)
    else:
        print(f"exporting {model.path} for this run (tools/export_inference.py keeps it)", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            export_inference(read_dit(model, vae=args.vae, key=args.key), folder)
            pipe = load_inference(folder, device=device, dtype=args.dtype)
    if args.id2label is not None:
        pipe.id2label = model.labels
    network = pipe.network
    pipe.network = lambda x, t, y: network(x, t.astype("float32"), y)
    try:
        return run_pipeline(args, pipe, "float32")
    except NotFiniteError:
        if model.kind == "exported":
            check_programs(model.path)
        raise


def run_pipeline(args, pipe, dtype):
    """uint8 images `(N, H, W, 3)` and the classes' labels, by a `sampling.pipelines.inference.Pipeline` in that
    dtype."""
    import paddle

    from features.autoencoder import LatentDecoder
    from sampling.guidance import guided
    from sampling.pipelines.export import pipeline_scheduler

    scheduler, name = pipe.scheduler, args.scheduler or "ddim"
    if type(scheduler).__name__ != SIT_SCHEDULER:
        scheduler = pipeline_scheduler(pipe.scheduler, name)
    check_steps(args, {**scheduler.config, "_class_name": type(scheduler).__name__})
    if pipe.timestep_fit is not None:
        schedulers = {kind: pipeline_scheduler(pipe.scheduler, kind) for kind in pipe.timestep_fit}
        note = fit_note(pipe.timestep_fit, schedulers, name, args.num_inference_steps)
        if note:
            print(f"note: {note}", flush=True)
    classes = find_classes(args.classes, pipe.id2label, pipe.num_classes)
    scale = check_guidance(args.guidance_scale, pipe.null_class is not None, args.model_path)
    y = paddle.to_tensor(classes, dtype="int64")
    channels = 3 if args.guidance_channels == "3" else None
    denoiser = guided(pipe.network, y, scale, channels=channels, null_class=pipe.null_class or 0)
    paddle.seed(args.seed)  # the noise of a scheduler's steps, if it draws any
    noise = make_noise(len(classes), pipe.in_channels, pipe.sample_size, args.seed, dtype)
    images = LatentDecoder(pipe.vae)(run_scheduler(scheduler, denoiser, noise, args.num_inference_steps))
    return images, [pipe.id2label.get(i, str(i)) for i in classes]


def run_scheduler(scheduler, denoiser, latents, num_steps):
    """Latents by a ppdiffusers scheduler and a denoiser(x, t); a learned variance is cut off."""
    import paddle

    from runtime.progress import tqdm

    scheduler.set_timesteps(num_steps)
    with paddle.no_grad():
        for t in tqdm(scheduler.timesteps, desc="sampling"):
            latents = scheduler.scale_model_input(latents, t)
            output = denoiser(latents, t.reshape([1]).expand([latents.shape[0]]))
            latents = scheduler.step(output[:, : latents.shape[1]], t, latents).prev_sample
    return latents


def sample_checkpoint(args, model):
    """uint8 images `(N, H, W, 3)` and the classes' labels, by this project's own diffusion code."""
    import paddle

    from diffusion import create_diffusion
    from features.autoencoder import LatentDecoder
    from models import build_model
    from models.state import check_finite, check_state, expected_shapes
    from objectives import build_objective
    from sampling.guidance import guided
    from sampling.pipelines.export import make_scheduler
    from weights.source import read_weights

    config = model.config
    settings, objective = config["model"], config["objective"]
    guidance_scale = check_guidance(args.guidance_scale, model.has_null_class, args.model_path)
    classes = find_classes(args.classes, model.labels, model.num_classes)

    # The network.
    decoder = LatentDecoder(checkpoint_vae(args.vae, config))
    state, source = read_weights(args.model_path, key=args.key)
    check_state(state, expected_shapes(settings), source=source)  # before memory is taken for the network
    check_finite(state, source=source)
    network = build_model(settings)
    network.set_state_dict(state)
    network.eval()
    network.to(dtype=args.dtype)

    # The sampler.
    def predict(x, t, y):
        return network(x, t, y).astype("float32")

    channels = 3 if args.guidance_channels == "3" else None
    y = paddle.to_tensor(classes, dtype="int64")
    denoiser = guided(predict, y, guidance_scale, channels=channels, null_class=settings["num_classes"])
    noise = make_noise(len(classes), settings["in_channels"], settings["sample_size"], args.seed, "float32")
    paddle.seed(args.seed)  # the noise of ddpm's steps
    steps, shown = args.num_inference_steps, is_terminal(sys.stderr)
    with paddle.no_grad():
        if args.scheduler in (None, "ddim"):
            keywords = {
                key: value for key, value in objective.items() if key not in ("type", "timestep_sampler", "auxiliary")
            }
            diffusion = create_diffusion(f"ddim{steps}", learn_sigma=settings["learn_sigma"], **keywords)
            latents = diffusion.ddim_sample_loop(
                denoiser, noise.shape, noise=noise, clip_denoised=False, progress=shown
            )
        elif args.scheduler == "dpm":
            latents = run_scheduler(make_scheduler(objective, "dpm"), denoiser, noise, steps)
        else:
            latents = build_objective(config).sample(denoiser, noise, num_steps=steps, progress=shown)
    return decoder(latents), [model.labels.get(i, str(i)) for i in classes]


def make_noise(count, channels, size, seed, dtype):
    """The pipeline's own initial noise for a seed, `(count, channels, size, size)`."""
    from ppdiffusers.utils.paddle_utils import randn_tensor

    return randn_tensor((count, channels, size, size), generator=make_generator(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None, demo=DEMO):
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
    check_flags(args)
    if args.backend == "inference":
        check_exportable(args.model_path)
    model = describe_model(args.model_path, "DiTPipeline", args.id2label)
    check(args, model)
    draw(demo.kind, args, lambda: sample(args, model))


def sample(args, model):
    """Images and labels of whichever kind of model --model_path is."""
    if args.backend == "inference":
        return sample_inference(args, model)
    return (sample_checkpoint if model.kind == "checkpoint" else sample_pipeline)(args, model)


if __name__ == "__main__":
    run_cli(main)
