"""What the demo scripts share: flags of their own, the way from a model to a PNG, and progress.

Nothing here imports Paddle before `draw` does: what a user gets wrong is said at once.
"""

import io
import os
import re
from dataclasses import dataclass

from config.flags import CommandParser
from config.options import DEFAULT_VAE, GUIDANCE_SCALE, POSITIVE_INT
from runtime.files import check_output, whole_file
from runtime.process import configure_runtime
from runtime.progress import tqdm
from runtime.untrusted import shortened
from sampling.flags import (
    TransportDefaults,
    add_diffusion_flags,
    add_loading_flags,
    add_sampling_flags,
    add_statistics_flags,
    add_transport_flags,
    add_vae_flag,
    check_sampling_flags,
    check_transport_flags,
    check_weights_flags,
    describe_flags,
    note_unused,
    note_weights_flags,
    open_generator,
    transport_options,
)
from sampling.guidance_flags import add_guidance_flags, check_interval, choose_scale, guidance_options
from sampling.labels import DEFAULT_CLASS, find_classes
from sampling.model_path import check_no_file, describe_model

OUTPUTS = "outputs"  # the folder of results in the current one, git-ignored


def add_flags(parser, kind, *, gpu_dtype="float32", like="PaddleMIX's demos", guidance, **defaults):
    """Adds the flags of all demos; kind is that of the file names.

    `guidance` are the defaults of `add_guidance_flags`, `defaults` those of `add_sampling_flags`, `like` is both's.
    """
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help=f"name or id [{DEFAULT_CLASS}; else the first ten]"
    )
    parser.add_argument(
        "--images_per_class",
        check=POSITIVE_INT,
        help="label the grid with the names of the classes, N images a row [a plain grid, one image a class]",
    )
    add_sampling_flags(parser, like=like, **defaults)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"PNG to write [outputs/result_{kind}_<class>.png, numbered if it is there]",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    add_loading_flags(parser, gpu_dtype)
    add_guidance_flags(parser, like=like, **guidance)


def check_flags(args, min_steps=1):
    """Raises `ValueError` for values of `add_flags` that no model takes."""
    check_sampling_flags(args, min_steps)
    for text in args.classes or ():
        if re.fullmatch(r"-\d+", text):
            raise ValueError(f"--classes {text}: expected names, or ids from 0")
    if args.output is not None:
        check_output(args.output, args.overwrite, "--output ")
        check_ending("output", args.output)
        return
    if args.overwrite:
        note_unused(["overwrite"], "without --output, whose default is a free name")
    folder = OUTPUTS if os.path.exists(OUTPUTS) else os.curdir
    if not os.access(folder, os.W_OK):
        what = "the working directory" if folder == os.curdir else f"the folder {OUTPUTS}"
        raise ValueError(f"{what} can't be written to; give a file by --output")


def draw(kind, args, model, *, defaults=None, **options):
    """Samples a `Model` and saves, as the flags of `add_flags` say, and says where the image is.

    Classes and guidance that the model lacks are a `ValueError`, and flags of no effect on it are named.

    Args:
        kind: of the file names, such as DiT. defaults: `TransportDefaults`, None for a DiT's.
        options: of `Generator.sample`.
    """
    if model.num_classes is not None:
        find_classes(args.classes, model.labels, model.num_classes)
    guidance = guidance_options(args, model, defaults)
    note_weights_flags(args, model)

    configure_runtime()
    steps = args.num_inference_steps
    generator = open_generator(args, model, **options)
    from sampling.grid import class_grid, make_grid  # after Paddle, so that its loading is said at once

    classes, per_class = generator.find_classes(args.classes), args.images_per_class or 1
    ids = [one for one in classes for _ in range(per_class)]
    for note in generator.describe(steps, **options):
        print(f"note: {note}", flush=True)
    scale = GUIDANCE_SCALE if defaults is None else defaults.guidance_scale
    images = generator.sample(
        ids,
        seed=args.seed,
        num_inference_steps=steps,
        guidance_scale=choose_scale(args, generator.null_class is not None, generator.path, scale),
        callback=show_steps(),
        **guidance,
        **options,
    )
    names = generator.names(classes)
    overwrite = args.overwrite and args.output is not None
    if args.images_per_class is None or len(images) == 1:
        picture = make_grid(images, min(len(images), 8))
    else:
        picture = class_grid(images, classes, generator.labels, per_class)
    path = save_image(picture, args.output or default_output(kind, names), overwrite)
    print(f"{', '.join(shortened(name) for name in names)}: {path}")


def show_steps(description="sampling"):
    """Returns a callback for `Generator.sample` that shows a progress bar."""
    bar = None

    def callback(step, num_steps, latents):
        nonlocal bar
        bar = tqdm(total=num_steps, desc=description) if step == 1 else bar
        bar.update()
        if step == num_steps:
            bar.close()

    return callback


def check_ending(flag, path):
    """Raises `ValueError` for an ending that no format of colour images has."""
    from PIL import Image

    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format=_image_format(path))
    except (ValueError, OSError, KeyError):
        ending = os.path.splitext(path)[1]
        what = f"the ending {shortened(ending)} names no format for colour images" if ending else "has no ending"
        raise ValueError(
            f"--{flag} {shortened(path, 500)}: {what}; expected .png, or another that Pillow writes, such as .jpg"
        ) from None


def _image_format(path):
    """Returns Pillow's name of the format that a file's ending stands for."""
    from PIL import Image

    return Image.registered_extensions()[os.path.splitext(path)[1].lower()]


def default_output(kind, names):
    """Returns the name of the PNG for these classes where the user gives none."""
    name = re.sub(r"[^\w-]+", "_", names[0].split(",")[0]) if len(names) == 1 else "grid"
    name = name.encode("utf-8", "ignore")[:100].decode("utf-8", "ignore")  # a label may be longer than a file's name
    return os.path.join(OUTPUTS, f"result_{kind}_{name}.png")


def save_image(image, path, overwrite):
    """Writes an image; returns its path, with a number where something is there already."""
    if os.path.dirname(path) == OUTPUTS:
        os.makedirs(OUTPUTS, exist_ok=True)
    (stem, ending), number = os.path.splitext(path), 1
    while os.path.exists(path) and not overwrite:
        number += 1
        path = f"{stem}-{number}{ending}"
    try:
        with whole_file(path, shared=True) as partial, open(partial, "wb") as file:
            image.save(file, format=_image_format(path))
    except OSError as error:
        raise ValueError(f"{path}: can't be written: {error.strerror or error}") from None
    return path


@dataclass(frozen=True)
class DiTDemo:
    """What differs between the demos of DiTs of several sizes: their defaults."""

    description: str  # of --help
    kind: str = "DiT"  # of the PNG's name
    local_folder: str = "./DiT_XL_2_256"  # sampled without --model_path, if it is there
    public_name: str = "facebook/DiT-XL-2-256"  # else
    seed: int = 0
    gpu_dtype: str = "float32"


def draw_dit(argv, demo):
    """Runs the demo of a DiT: reads the command line, draws the images, and saves them as a PNG."""
    parser = CommandParser(description=demo.description)
    parser.add_argument(
        "--model_path",
        metavar="PATH",
        help="pipeline folder, its hub name, training checkpoint, run folder, or (inference) exported folder",
    )
    add_flags(parser, demo.kind, guidance={"channels": "all"}, seed=demo.seed, gpu_dtype=demo.gpu_dtype)
    add_diffusion_flags(parser)
    checkpoint = parser.add_argument_group("for a training checkpoint")
    add_vae_flag(checkpoint, f"{DEFAULT_VAE}, as in the official DiT")
    checkpoint.add_argument("--key", choices=("model", "ema"), help="which weights [ema]")
    args = parser.parse_args(argv)
    check_flags(args)

    path = args.model_path
    if path is None:
        path = demo.local_folder if os.path.isdir(demo.local_folder) else demo.public_name
    check_no_file(path)
    model = describe_model(path, "DiTPipeline", id2label=args.id2label)
    model.check_backend(args.backend)
    model.check_diffusion(args.scheduler, args.num_inference_steps, args.backend)
    draw(demo.kind, args, model, method=args.scheduler)


@dataclass(frozen=True)
class TransportDemo:
    """What differs between the demos of networks of a transport."""

    description: str  # of --help
    kind: str  # of the PNG's name
    defaults: TransportDefaults
    like: str  # whose number of steps and guidance scale they are
    guidance_channels: str  # the default, as --help names it
    vae: str  # the same
    config: str | None  # JSON of a file of weights that has none; None: it is recognised by its shapes
    find: object  # `find(args)` gives --model_path, and what belongs to it, a value where there is none


def draw_transport(argv, demo):
    """Runs the demo of a network of a transport: reads the command line, draws the images, and saves them as a PNG."""
    parser = CommandParser(description=demo.description)
    parser.add_argument(
        "--model_path",
        metavar="PATH",
        help="pipeline folder, training checkpoint, run folder, file of weights, or (inference) exported folder",
    )
    guidance = {"scale": demo.defaults.guidance_scale, "interval": demo.defaults.guidance_interval}
    guidance["channels"] = demo.guidance_channels
    add_flags(parser, demo.kind, guidance=guidance, like=demo.like, num_steps=demo.defaults.num_steps)
    add_transport_flags(parser, demo.defaults)
    weights = parser.add_argument_group("for a training checkpoint or a file of weights")
    known = "by its shapes" if demo.config is None else os.path.join("config", os.path.basename(demo.config))
    weights.add_argument("--config_file", metavar="FILE", help=f"JSON of a file's network [its checkpoint's; {known}]")
    add_vae_flag(weights, demo.vae)
    add_statistics_flags(weights)
    weights.add_argument("--key", help="which weights of a checkpoint: model, ema or another of its keys [ema]")
    args = parser.parse_args(argv)
    check_transport_flags(args, demo.defaults)
    check_interval(args)
    check_flags(args, min_steps=2)

    demo.find(args)
    model = describe_flags(args, "SiTPipeline", default_config=demo.config)
    model.check_backend(args.backend)
    check_weights_flags(args, model)
    options = transport_options(args, demo.defaults)
    draw(demo.kind, args, model, defaults=demo.defaults, **options)
