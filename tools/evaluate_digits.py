"""Draw digits through an exported DiTPipeline or SiTPipeline folder and say how good they are.

Reports a grid with one row per class and the figures of `evaluation.digits`: the accuracy of a classifier on real
held-out digits; the share of samples that it assigns to the class that was asked for; the mean distance of samples to
the nearest training image, next to that of held-out digits; the spread of samples within a class, as a part of the real
one; FID, Inception Score, precision, recall, KID and MIND against the held-out digits on the classifier's features.
"""

import os
import sys

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np

from config.checks import FLAG_SEED
from config.flags import CommandParser, check_paths
from config.options import POSITIVE_INT
from evaluation.digits import METRICS, check_size, evaluate, read_digits
from evaluation.run import METRIC_NAMES
from features.autoencoder import downsampling
from features.images import find_images
from runtime.files import write_json
from runtime.process import configure_runtime, run_cli
from sampling.demo import check_ending, show_steps
from sampling.flags import DEFAULT_CHANNELS
from sampling.grid import class_grid
from sampling.guidance_flags import add_guidance_flags, guidance_options, guidance_settings
from sampling.guidance_settings import check_scale
from sampling.model_path import describe_model
from sampling.step_counts import check_scheduler

BATCH_SIZE = 100  # images drawn at once
SCHEDULERS = {"DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpm"}


def sampler_settings(args, model):
    """Returns the keywords of `Generator.sample` that choose the sampler; `ValueError` for another pipeline's flag."""
    if model.kind != "pipeline":
        raise ValueError(
            f"--model_path {args.model_path}: is no pipeline folder; expected a DiTPipeline or a SiTPipeline"
        )
    flag, owner = ("scheduler", "DiTPipeline") if model.pipeline == "SiTPipeline" else ("sampler", "SiTPipeline")
    if (value := getattr(args, flag)) is not None:
        raise ValueError(f"--{flag} {value} is for a {owner}; {args.model_path} is a {model.pipeline}")
    if model.pipeline == "SiTPipeline":
        form = {"diffusion_form": "sigma"} if args.sampler == "sde" else {}  # SiTPipeline's default
        return {"sampler": args.sampler or "ode", **form}
    if (scale := args.guidance_scale) < 1:
        raise ValueError(f"--guidance_scale {scale}: a DiTPipeline guides by scales above 1 only; expected 1 or more")
    scheduler = args.scheduler or SCHEDULERS.get(model.scheduler.get("_class_name"))
    check_scheduler(model.scheduler, scheduler, args.num_inference_steps)
    return {"method": scheduler}


def show_metrics(report):
    """Prints the figures that samples and real digits have in common, a line each."""
    rows = [("spread", "variance within a class, part of that of training digits")]
    rows += [(metric, METRIC_NAMES[metric]) for metric in METRICS]
    print(f"against {report['num_heldout']} held-out digits: samples / as many training digits after the autoencoder")
    for name, what in rows:
        numbers = ["-" if part[name] is None else f"{part[name]:.4f}" for part in (report, report["real"])]
        print(f"  {what:<58}{numbers[0]:>9} / {numbers[1]}")


def parse(argv):
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--model_path", required=True, metavar="FOLDER", help="exported DiTPipeline or SiTPipeline folder"
    )
    parser.add_argument("--scheduler", choices=("ddim", "dpm"), help="of a DiTPipeline [the folder's own]")
    parser.add_argument(
        "--sampler", choices=("ode", "sde"), help="of a SiTPipeline [ode, which needs fewer steps than the sde]"
    )
    parser.add_argument("--digits", required=True, metavar="FOLDER", help="what tools/prepare_digits.py wrote")
    parser.add_argument("--num_images", check=POSITIVE_INT, default=500, help="samples, evenly over the classes")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        metavar="X",
        default=1.0,
        help="classifier-free guidance [1: none, which shows the network by itself]",
    )
    parser.add_argument("--num_inference_steps", check=POSITIVE_INT, default=50, help="steps of the sampler")
    parser.add_argument("--seed", check=FLAG_SEED, default=0, help="of the samples' noise")
    parser.add_argument("--grid", metavar="FILE", help="PNG to write, one row per class")
    parser.add_argument("--output", aliases=("--report",), metavar="FILE", help="JSON to write")
    parser.add_argument(
        "--min_accuracy", type=float, metavar="X", help="exit with 1 if the share of samples is below this"
    )
    add_guidance_flags(parser, channels=DEFAULT_CHANNELS, scale=None)
    parser.set_defaults(backend="eager")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    check_scale(args.guidance_scale, True, args.model_path)
    if args.grid:
        check_ending("grid", args.grid)
    check_paths(args, "model_path", "digits")
    digits = {part: find_images(os.path.join(args.digits, part)) for part in ("train", "heldout")}
    samples, classes = digits["train"]
    num_classes = len(classes)
    if args.num_images < num_classes or args.num_images % num_classes:
        raise ValueError(f"--num_images {args.num_images}: expected a multiple of {num_classes}, the number of classes")
    model = describe_model(args.model_path)
    sampler = sampler_settings(args, model)
    guidance = guidance_options(args, model, scales=[args.guidance_scale])

    configure_runtime()
    from sampling.generator import load_generator, load_guide

    # Samples, class by class in turn, so that any batch holds every class.
    generator = load_generator(model)
    if args.guide is not None:
        generator = load_guide(generator, args.guide, key=args.guide_key)
    side = generator.sample_size * downsampling(generator.vae)
    check_size(side, samples[0][0])
    labels = np.arange(args.num_images) % num_classes
    images = generator.sample(
        labels,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        batch_size=BATCH_SIZE,
        callback=show_steps("samples"),
        **guidance,
        **sampler,
    )
    for path in filter(None, (args.grid, args.output)):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    if args.grid:
        columns = min(10, args.num_images // num_classes)
        rows = np.argsort(labels, kind="stable").reshape(num_classes, -1)[:, :columns]
        class_grid(images[rows.reshape(-1)], range(num_classes), dict(enumerate(classes)), columns).save(args.grid)

    # Figures.
    train, heldout = (read_digits(found, side) for found, _ in digits.values())
    report = evaluate(images, labels, train, heldout, generator.vae)
    names = ("digits", "guidance_scale", "num_inference_steps", "seed")
    report["settings"] |= {"pipeline": args.model_path, **{name: getattr(args, name) for name in names}, **sampler}
    given = guidance_settings(guidance, args.guidance_scale != 1, guidance.get("guide_scale", 1) != 1)
    report["settings"] |= {name: value for name, value in given.items() if value is not None}
    if "guide_scale" in given:
        report["settings"]["guide"] = args.guide.path
    if args.output:
        write_json(args.output, report)
    share = report["share_assigned_to_class_asked_for"]
    print(
        f"classifier on real held-out digits:      {report['classifier_accuracy_on_heldout']:.3f}\n"
        f"samples assigned to the class asked for: {share:.3f} of {args.num_images}\n"
        f"nearest training image (RMS difference of grey pixels in [0, 1]): samples "
        f"{report['nearest_train_distance_of_samples']:.4f}, held-out digits "
        f"{report['nearest_train_distance_of_heldout']:.4f}"
    )
    show_metrics(report)
    for what, path in (("grid", args.grid), ("report", args.output)):
        if path:
            print(f"{what}: {path}")
    if args.min_accuracy is not None and share < args.min_accuracy:
        print(f"error: the share {share:.3f} is below --min_accuracy {args.min_accuracy}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
