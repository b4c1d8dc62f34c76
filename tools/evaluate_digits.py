"""Draw digits through an exported DiTPipeline or SiTPipeline folder and say how good they are.

Reports three figures and a grid with one row per class:
- the accuracy of a classifier, trained on the real training digits, on real held-out digits;
- the share of samples that this classifier assigns to the class that was asked for;
- the mean distance of a sample to its nearest training image, next to that of held-out digits: samples much nearer to
  the training images than held-out digits are have been memorised.
Real images pass through the pipeline's VAE (encoded and decoded) first, as the samples have left its decoder.
"""

import argparse
import json
import math
import os
import sys

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import check_seed
from config.schema import read_json
from evaluation.digits import evaluate, load_digits_through_vae
from features.images import find_images
from runtime.process import configure_runtime, run_cli
from sampling.demo import check_ending
from sampling.step_counts import check_num_steps

configure_runtime()  # before Paddle is imported


def load_pipeline(folder: str, sampler: str | None = None):
    """The pipeline of a local folder, and further arguments of its call.

    A DiTPipeline folder is sampled with DDIM; a SiTPipeline folder by this project, with `sampler`
    "ode" (default) or "sde".
    """
    index = os.path.join(folder, "model_index.json")
    if not os.path.isfile(index):
        raise ValueError(f"--pipeline {folder}: no model_index.json there; expected an exported pipeline folder")
    content = read_json(index)
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if kind == "SiTPipeline":
        from sampling import SiTPipeline

        return SiTPipeline.from_pretrained(folder), {"sampler": sampler or "ode"}
    if kind != "DiTPipeline":
        raise ValueError(f"--pipeline {folder}: a {kind}; expected a DiTPipeline or a SiTPipeline")
    if sampler is not None:
        raise ValueError(f"--sampler {sampler} is for a SiTPipeline; {folder} is a DiTPipeline, sampled with DDIM")
    from ppdiffusers import DDIMScheduler, EDMEulerScheduler

    from sampling.pipelines.pretrained import load_dit_pipeline

    pipeline = load_dit_pipeline(folder)
    if not isinstance(pipeline.scheduler, EDMEulerScheduler):  # that one is a SiT's, and part of its export
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline, {}


def draw(pipeline, labels, *, seed: int, batch_size: int = 100, **options):
    """Samples for labels [N] as float32 [N, H, W, 3] in [0, 1]; options are arguments of the pipeline's call."""
    import numpy as np
    import paddle

    generator = paddle.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(labels), batch_size):
        chunk = [int(label) for label in labels[start : start + batch_size]]
        pipeline.set_progress_bar_config(desc=f"samples {start}-{start + len(chunk) - 1}", unit="step", disable=None)
        images.append(
            pipeline(
                class_labels=chunk,
                generator=generator,
                output_type="numpy",
                **options,
            ).images
        )
    return np.concatenate(images)


def check_size(pipeline, path: str) -> int:
    """The side of a pipeline's images in pixels; ValueError if the digit at path is not as large."""
    from PIL import Image

    side = pipeline.transformer.config.sample_size if hasattr(pipeline.transformer, "config") else None
    side = (side or pipeline.transformer.sample_size) * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    with Image.open(path) as digit:
        width, height = digit.size
    if (width, height) != (side, side):
        raise ValueError(
            f"the pipeline draws images of {side}x{side} pixels, {path} is {width}x{height}; expected digits of that "
            f"size: tools/prepare_digits.py --image_size {side}"
        )
    return side


def save_grid(images, path: str, columns: int) -> None:
    """Write float images [N, H, W, 3] in [0, 1] as one PNG, row by row."""
    from sampling.grid import make_grid

    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    make_grid((images * 255).round().astype("uint8"), columns).save(path)


def run(args) -> None:
    import numpy as np

    check_seed("seed", args.seed)
    if not math.isfinite(args.guidance_scale):
        raise ValueError(f"--guidance_scale {args.guidance_scale}: expected a finite number, 1 for no guidance")
    if args.grid:
        check_ending("grid", args.grid)
    train_root, heldout_root = os.path.join(args.digits, "train"), os.path.join(args.digits, "heldout")
    digits, classes = find_images(train_root)
    num_classes = len(classes)
    find_images(heldout_root)
    if args.num_images < num_classes or args.num_images % num_classes:
        raise ValueError(f"--num_images {args.num_images}: expected a multiple of {num_classes}, the number of classes")
    pipeline, options = load_pipeline(args.pipeline, args.sampler)
    if not options:  # a DiTPipeline
        if args.guidance_scale < 1:
            raise ValueError(
                f"--guidance_scale {args.guidance_scale}: a DiTPipeline guides by scales above 1 only; expected 1 or "
                "more"
            )
        settings = pipeline.scheduler.config
        if "timestep_spacing" in settings:
            check_num_steps(
                args.num_inference_steps, settings.num_train_timesteps, leading=settings.timestep_spacing == "leading"
            )

    # Samples, class by class in turn, so that any batch holds every class.
    labels = np.arange(args.num_images) % num_classes
    side = check_size(pipeline, digits[0][0])
    samples = draw(
        pipeline,
        labels,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        seed=args.seed,
        **options,
    )
    if not np.isfinite(samples).all():
        raise ValueError(f"{args.pipeline}: draws numbers that are not finite (NaN or infinity)")
    if args.grid:
        columns = min(10, args.num_images // num_classes)
        rows = np.argsort(labels, kind="stable").reshape(num_classes, -1)[:, :columns]
        save_grid(samples[rows.reshape(-1)], args.grid, columns)

    # Figures.
    train = load_digits_through_vae(pipeline.vae, train_root, size=side)
    heldout = load_digits_through_vae(pipeline.vae, heldout_root, size=side)
    report = evaluate(samples, labels, train, heldout)
    report["settings"] = {
        key: getattr(args, key) for key in ("pipeline", "digits", "guidance_scale", "num_inference_steps", "seed")
    } | options
    if args.report:
        os.makedirs(os.path.dirname(os.path.abspath(args.report)), exist_ok=True)
        with open(args.report, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")

    share = report["share_assigned_to_class_asked_for"]
    print(f"classifier on real held-out digits:      {report['classifier_accuracy_on_heldout']:.3f}")
    print(f"samples assigned to the class asked for: {share:.3f} of {args.num_images}")
    print(
        f"nearest training image (RMS difference of grey pixels in [0, 1]): samples "
        f"{report['nearest_train_distance_of_samples']:.4f}, held-out digits "
        f"{report['nearest_train_distance_of_heldout']:.4f}"
    )
    for what, path in (("grid", args.grid), ("report", args.report)):
        if path:
            print(f"{what}: {path}")
    if args.min_accuracy is not None and share < args.min_accuracy:
        print(f"error: the share {share:.3f} is below --min_accuracy {args.min_accuracy}", file=sys.stderr)
        sys.exit(1)


def main(argv: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="exported DiTPipeline or SiTPipeline folder")
    parser.add_argument("--sampler", choices=("ode", "sde"), help="of a SiTPipeline (default ode)")
    parser.add_argument("--digits", required=True, help="folder that tools/prepare_digits.py wrote")
    parser.add_argument("--num_images", type=int, default=200, help="samples, evenly over the classes (default 200)")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance (default 2)")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="steps of the sampler (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples' noise (default 0)")
    parser.add_argument("--grid", help="PNG to write, one row per class")
    parser.add_argument("--report", help="JSON to write")
    parser.add_argument("--min_accuracy", type=float, help="exit with 1 if the share of samples is below this")
    run(parser.parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
