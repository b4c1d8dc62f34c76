"""Draw one model by several guidance scales and numbers of steps, from the same noise, as labelled pictures.

    python tools/sample_grid.py --model_path outputs/trainer/checkpoint-5000 --classes 3 7 \\
        --guidance_scales 1 1.5 4 --num_inference_steps 10 25 50

--model_path is what the demos take. --output, a folder, gets sweep.png, with a row for each guidance scale, a column
for each number of steps, and in each place the images of all classes; and for each setting a picture with one row a
class, such as guidance1.5_steps25.png. An image begins from the same noise in all of them: what differs is the setting.
"""

import argparse
import os

import _root  # noqa: F401 (the project's root, on sys.path)

from config.checks import FLAG_SEED
from config.flags import CommandParser
from config.options import POSITIVE_INT
from runtime.files import check_output
from runtime.process import configure_runtime, counted, run_cli
from sampling.demo import save_image, show_steps
from sampling.flags import (
    DEFAULT_CHANNELS,
    DEMO,
    add_model_flags,
    check_sampling_flags,
    describe_flags,
    note_weights_flags,
    open_generator,
    sampler_options,
)
from sampling.guidance_flags import add_guidance_flags, guidance_options
from sampling.labels import find_classes

SCALES, STEPS = [1.0, 1.5, 4.0], [10, 25, 50]


def parse(argv):
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model_path", required=True, metavar="PATH", help="see above")
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="names or ids [golden retriever; else the first ten]"
    )
    parser.add_argument("--images_per_class", check=POSITIVE_INT, default=1, help="images in each row of a class")
    parser.add_argument(
        "--guidance_scales",
        nargs="+",
        type=float,
        metavar="X",
        help="rows of the sweep [1 1.5 4; 1 without a null class, and beside --guide_path]",
    )
    parser.add_argument(
        "--num_inference_steps", nargs="+", type=int, default=STEPS, metavar="N", help="columns of the sweep"
    )
    parser.add_argument("--seed", check=FLAG_SEED, default=0, help="of the noise")
    parser.add_argument("--batch_size", check=POSITIVE_INT, default=32, help="images drawn at once")
    parser.add_argument("--output", default="outputs/sample_grid", metavar="FOLDER", help="folder for the pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    add_guidance_flags(parser, channels=DEFAULT_CHANNELS, scale=None)
    add_model_flags(parser, DEMO)
    return parser.parse_args(argv)


def check(args):
    """Returns the `Model`, the scales, options of guidance, and `{num_steps: options}`, those of `Generator.sample`.

    ValueError for a mistake.
    """
    model = describe_flags(args)
    model.check_backend(args.backend)
    is_plain = model.has_null_class is False or args.guide_path is not None
    scales = dict.fromkeys(args.guidance_scales or ([1.0] if is_plain else SCALES))
    guidance = guidance_options(args, model, DEMO, scales)
    options = {}
    for steps in args.num_inference_steps:
        own = argparse.Namespace(**{**vars(args), "num_inference_steps": steps})
        check_sampling_flags(own)
        options[steps] = sampler_options(own, model, DEMO)
    if model.num_classes is not None:
        find_classes(args.classes, model.labels, model.num_classes)
    note_weights_flags(args, model)
    return model, [*scales], guidance, options


def output_files(args, scales, steps):
    """Returns the path of "sweep" and of each `(scale, steps)`; ValueError for one that can't be written."""
    settings = [(scale, count) for scale in scales for count in steps]
    names = {setting: "guidance{:g}_steps{}.png".format(*setting) for setting in settings}
    if len(settings) > 1:
        names["sweep"] = "sweep.png"
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise ValueError(f"--output {args.output}: is a file; expected a folder")
    files = {what: os.path.join(args.output, name) for what, name in names.items()}
    for path in files.values() if os.path.isdir(args.output) else ():
        check_output(path, args.overwrite, "--output ")
    return files


def draw(args, generator, ids, scale, num_steps, options):
    """Returns the images of class ids, uint8 `(N, H, W, 3)`; the noise of each depends on seed and place alone."""
    import numpy as np

    from sampling.many import draw_images

    drawn = draw_images(
        generator,
        range(len(ids)),
        ids,
        seed=args.seed,
        batch_size=args.batch_size,
        tile=min(args.batch_size, len(ids)),
        rounding="diffusers",
        callback=show_steps(f"guidance {scale:g}, {counted(num_steps, 'step')}"),
        num_inference_steps=num_steps,
        guidance_scale=scale,
        **options,
    )
    return np.concatenate([images for _, images in drawn])


def main(argv=None):
    args = parse(argv)
    model, scales, guidance, options = check(args)
    files = output_files(args, scales, options)

    configure_runtime()
    from sampling.grid import class_grid, class_labels, make_grid

    first = next(iter(options))
    generator = open_generator(
        argparse.Namespace(**{**vars(args), "num_inference_steps": first}), model, **options[first]
    )
    classes, per_class = generator.find_classes(args.classes), args.images_per_class
    ids = [one for one in classes for _ in range(per_class)]
    notes = [note for steps, own in options.items() for note in generator.describe(steps, **own)]
    for note in dict.fromkeys(notes):
        print(f"note: {note}", flush=True)
    os.makedirs(args.output, exist_ok=True)
    cells, columns = [], per_class if per_class > 1 else min(len(ids), max(4, round(len(ids) ** 0.5)))
    named = {"row_labels" if per_class > 1 else "column_labels": class_labels(classes, generator.labels)}
    for scale in scales:
        for steps, own in options.items():
            images = draw(args, generator, ids, scale, steps, {**guidance, **own})
            picture = class_grid(images, classes, generator.labels, per_class)
            save_image(picture, files[scale, steps], args.overwrite)
            cells.append(make_grid(images, columns, gap=2, **named))
    if "sweep" in files:
        rows, tops = [f"guidance {scale:g}" for scale in scales], [counted(steps, "step") for steps in options]
        sweep = make_grid(cells, len(options), gap=8, row_labels=rows, column_labels=tops)
        print(f"guidance x steps: {save_image(sweep, files['sweep'], args.overwrite)}")
        print(f"one row a class: {os.path.join(args.output, 'guidance*_steps*.png')}")
    else:
        print(f"one row a class: {files[scales[0], first]}")


if __name__ == "__main__":
    run_cli(main)
