"""Draw many images of a model into an npz for tools/evaluate.py or ADM's evaluator.py: by default 50,000.

    python tools/sample_npz.py --model_path outputs/trainer/checkpoint-400000 --output samples.npz
    python -m paddle.distributed.launch tools/sample_npz.py --model_path DiT_XL_2_256 --guidance_scale 1.5 ...

--model_path is what the demos take: a training checkpoint folder, whose averages are sampled; a run's folder, whose
newest checkpoint is taken; a DiTPipeline or SiTPipeline folder; the name of a DiTPipeline on the hub; a file of weights
with --config_file, which a LightningDiT's does not need; with --backend inference also a folder of
tools/export_inference.py (a program, which runs as code of whoever made it).

OUTPUT.npz holds arr_0, uint8 (N, H, W, 3), and arr_1, the labels; OUTPUT.json every setting and the weights' checksums.
All noise of image i, that of the steps too, depends on (seed, i) alone. After a kill the same command goes on where it
was, also on another number of ranks, and the files are the same to the bit.

On a CPU the network computes --tile images at once whatever --batch_size: neither batch size nor ranks change a bit.
Another processor may, and on one that is not Intel's the number of threads: fix OMP_NUM_THREADS there. On a GPU the
tile is the batch: another --batch_size changes some pixels by the rounding errors of its kernels.
"""

import os
import platform

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import CommandParser
from config.options import POSITIVE_INT
from features.autoencoder import ROUNDINGS, LatentScaling
from runtime.files import check_output
from runtime.machine import set_mkl_reproducible
from runtime.process import configure_runtime, counted, init_distributed, launched_rank, resolve_device, run_cli
from runtime.progress import tqdm
from sampling.flags import (
    DEFAULT_CHANNELS,
    OFFICIAL,
    add_model_flags,
    add_sampling_flags,
    check_sampling_flags,
    describe_flags,
    note_unused,
    note_weights_flags,
    open_generator,
    sampler_options,
)
from sampling.guidance_flags import add_guidance_flags, choose_scale, guidance_options, guidance_settings
from sampling.labels import find_classes
from sampling.many import CPU_TILE, LABELS, choose_labels, choose_tile, draw_images
from sampling.png_folder import PngFolder
from sampling.sample_sets import SampleSet, differences
from sampling.step_counts import FLOW_SCHEDULER

# Defaults of the official sample_ddp.py: 250 steps, DiT's guidance.
NUM_STEPS, GUIDANCE_SCALE = OFFICIAL.num_steps, OFFICIAL.guidance_scale
METHODS = {"ode": "euler", "sde": "Euler"}  # without --method


def parse(argv):
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model_path", required=True, metavar="PATH", help="see above")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="npz to write; a JSON of its settings gets the same name"
    )
    parser.add_argument(
        "--png", aliases=("--sample_dir",), metavar="FOLDER", help="new folder for the images as 000000.png ... too"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a set, or an unfinished one, of other settings"
    )
    parser.add_argument(
        "--num_images", aliases=("--num_fid_samples",), check=POSITIVE_INT, default=50000, help="images to draw"
    )
    parser.add_argument(
        "--labels",
        choices=LABELS,
        default="random",
        help="random: drawn evenly from the classes; balanced: in turn, counts differ by one at most",
    )
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="names or ids of those to draw [all]")
    like = "the official sample_ddp.py"
    add_sampling_flags(parser, num_steps=NUM_STEPS, like=like)
    words = "; ".join(f"{name}: {rounding.words}" for name, rounding in ROUNDINGS.items())
    parser.add_argument(
        "--rounding", choices=tuple(ROUNDINGS), default="dit", help=f"of x in [-1, 1] to uint8: {words}"
    )
    parser.add_argument(
        "--batch_size", aliases=("--per_proc_batch_size",), check=POSITIVE_INT, help="images at once on a GPU [32]"
    )
    parser.add_argument(
        "--tile",
        check=POSITIVE_INT,
        help=f"images that the network computes at once [{CPU_TILE} on a CPU, else --batch_size]",
    )
    add_guidance_flags(parser, channels=DEFAULT_CHANNELS, scale=GUIDANCE_SCALE, like=like)
    add_model_flags(parser, OFFICIAL)
    return parser.parse_args(argv)


def check(args):
    """Returns the `Model`, the options of its sampler and of guidance; ValueError, before Paddle, for a mistake."""
    check_sampling_flags(args)
    if not args.output.endswith(".npz"):
        raise ValueError(f"--output {args.output}: expected a name that ends in .npz")
    check_output(args.output, True, "--output ")
    model = describe_flags(args)
    model.check_backend(args.backend)
    options = sampler_options(args, model, OFFICIAL)
    if args.classes and model.num_classes is not None:
        check_repeats(find_classes(args.classes, model.labels, model.num_classes))
    guidance = guidance_options(args, model, OFFICIAL)
    note_weights_flags(args, model)
    return model, options, guidance


def check_repeats(classes):
    """Raises `ValueError` for a list of class ids that holds one twice: it would be drawn twice as often."""
    for place, one in enumerate(classes):
        if one in classes[:place]:
            raise ValueError(f"--classes: names class {one} twice; expected different ones")


def known_settings(args, model, options):
    """Returns what is known of `make_settings` before the model is loaded."""
    if model.pipeline == "SiTPipeline":
        sampler = {**options, "method": options["method"] or METHODS[options["sampler"]]}
    else:
        kind = model.scheduler.get("_class_name")
        sampler = {"scheduler": args.scheduler or (kind if kind == FLOW_SCHEDULER else "ddim")}
    given = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    return {
        "version": 1,
        "num_images": args.num_images,
        "labels": args.labels,
        "seed": args.seed,
        **sampler,
        "num_inference_steps": args.num_inference_steps,
        **given,
        "rounding": args.rounding,
        "backend": args.backend,
        "dtype": args.dtype or "float32",
        "objective": model.config["objective"] if model.config else model.scheduler,
    }


def make_settings(args, model, generator, classes, options, sampling, tile):
    """Returns all that decides what the images are, and what else a reader of a number will ask; see `SampleSet`."""
    import numpy
    import paddle

    weights_sha256, vae_sha256 = generator.digests()
    has_scale, has_guide = sampling["guidance_scale"] != 1, sampling.get("guide_scale", 1) != 1
    channels = generator.count_guided(sampling["guidance_channels"])
    guidance = guidance_settings(sampling, has_scale, has_guide)
    if has_guide:
        guidance["guide_sha256"] = generator.guide_digests()[0]
        guidance["guide"] = {"path": os.path.abspath(args.guide.path), "key": args.guide_key}
    return {
        **known_settings(args, model, options),
        "image_size": list(generator.image_size),
        "classes": classes if args.classes else None,
        "num_classes": len(classes),
        "guidance_scale": sampling["guidance_scale"],
        "guidance_channels": ("all" if channels is None else channels) if has_scale else None,
        **guidance,
        "rounding_formula": ROUNDINGS[args.rounding].words,
        "device": paddle.get_device().split(":")[0],
        "tile": tile,
        "weights_sha256": weights_sha256,
        "vae_sha256": vae_sha256,
        "vae_scaling": LatentScaling.of(generator.vae.config).as_dict(),
        "model": {"path": os.path.abspath(model.path), "kind": model.kind, "type": model.type, "key": args.key},
        "vae": generator.vae_name or f"of {model.path}",
        "versions": {"paddle": paddle.__version__, "numpy": numpy.__version__, "python": platform.python_version()},
        "environment": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_CBWR")},
    }


def describe(settings):
    """Returns the settings in one sentence."""
    height, width = settings["image_size"]
    if "scheduler" in settings:
        sampler = settings["scheduler"]
    else:
        sampler = f"{settings['sampler']} {settings['method']}"
    scales = [f"guidance {settings['guidance_scale']:g}"] if settings["guidance_channels"] else []
    for name, words in (("guide_scale", "autoguidance"), ("internal_scale", "internal guidance")):
        scales += [f"{words} {settings[name]:g}"] if name in settings else []
    guidance = " and ".join(scales) or "no guidance"
    return (
        f"{counted(settings['num_images'], 'image')} of {width}x{height}, {settings['labels']} labels of "
        f"{counted(settings['num_classes'], 'class', 'classes')}, seed {settings['seed']}, {sampler} in "
        f"{settings['num_inference_steps']} steps, {guidance}, {settings['dtype']}, rounding {settings['rounding']} "
        f"({settings['rounding_formula']})"
    )


def main(argv=None):
    args = parse(argv)
    model, options, guidance = check(args)
    if launched_rank()[0] == 0:
        SampleSet(args.output, known_settings(args, model, options), partial=True).check(args.overwrite)

    configure_runtime()
    set_mkl_reproducible()
    import paddle

    from runtime.collective import run_on_every_rank, run_on_rank_0

    device = resolve_device(args.device)
    paddle.set_device(device)
    if device != "cpu":
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})  # after a restart too
    rank, world = init_distributed()
    generator = open_generator(args, model, **options)
    tile = args.tile or min(choose_tile(args.batch_size or 32), args.num_images)
    if rank == 0:
        if device == "cpu" and args.batch_size is not None:
            note_unused(["batch_size"], f"on a CPU, which computes {counted(tile, 'image')} at once (--tile)")
        for note in generator.describe(args.num_inference_steps, **options):
            print(f"note: {note}", flush=True)
    classes = generator.find_classes(args.classes) if args.classes else list(range(generator.num_classes))
    check_repeats(classes)
    labels = choose_labels(args.labels, args.num_images, classes, args.seed)
    scale = choose_scale(args, generator.null_class is not None, generator.path, GUIDANCE_SCALE)
    sampling = {"guidance_scale": scale, **guidance}

    every = run_on_every_rank(lambda: make_settings(args, model, generator, classes, options, sampling, tile))
    settings = every[0]
    for other, one in enumerate(every):
        if changed := differences(settings, one):
            raise ValueError(f"rank {other} has other settings than rank 0: {changed[0]}")
    samples = SampleSet(args.output, settings)
    pngs = PngFolder(args.png, samples.settings) if args.png is not None else None

    def start():
        wants_png = pngs is not None and pngs.open(args.overwrite)
        return samples.open(args.overwrite), wants_png

    is_new, wants_png = run_on_rank_0(start)
    run_on_every_rank(samples.check_visible)
    missing = run_on_rank_0(samples.missing) if is_new else []

    def draw(start, stop, callback):
        indices = range(start, stop)
        how = {"seed": args.seed, "batch_size": tile, "tile": tile, "rounding": args.rounding, "callback": callback}
        how |= {"num_inference_steps": args.num_inference_steps, **sampling, **options}
        return (images for _, images in draw_images(generator, indices, labels[start:stop], **how))

    if is_new:
        samples.fill(draw, missing, rank, world)
    if rank > 0:
        return samples.wait()
    if is_new:
        samples.finish(labels)
    if wants_png:
        with tqdm(total=args.num_images, desc="png", unit="image") as progress:
            pngs.write(samples.path, progress)
    samples.close()
    state = "" if is_new else "complete already: "
    print(f"{args.output}: {state}{describe(settings)}; all settings: {samples.report}")
    if pngs is not None:
        print(f"{args.png}: the same as PNG files")


if __name__ == "__main__":
    run_cli(main)
