"""Say how good images are: FID, sFID, Inception Score, precision, recall, KID and MIND.

    python tools/evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz

Samples and reference are ADM's .npz (arr_0, uint8 (N, H, W, 3)) or folders of .png, .jpg, .jpeg. Where the reference
holds statistics (mu, sigma, mu_s, sigma_s), FID and sFID are computed with them; precision, recall, KID and MIND take
its images. The numbers go into a JSON with all settings, and the last lines are a table.

    python tools/evaluate.py --reference FOLDER --save_statistics reference.npz

writes the statistics of a set, which can be a reference then.

    python tools/evaluate.py --reference FOLDER --vae NAME --image_size 256

is the rFID of an autoencoder, with PSNR and SSIM: it encodes the reference's images to the mean of the posterior, not a
sample of it, and compares what is decoded with the originals. SSIM is that of Wang et al. 2004, a Gaussian of 11x11
pixels and sigma 1.5, of each channel by itself; the mean over channels and images.

    python tools/evaluate.py --selfcheck --samples admnet_guided_upsampled_imagenet256.npz \\
        --reference VIRTUAL_imagenet256_labeled.npz

compares the numbers of ADM's two files with the published ones.

Many GPUs: python -m paddle.distributed.launch tools/evaluate.py ...; the ranks share the images.
"""

import contextlib
import os
import sys

import _root  # noqa: F401 (the project's root, on sys.path)

from config.checks import FLAG_SEED, VAE
from config.flags import CommandParser, add_device_flag, check_paths, check_vae
from config.options import METRICS, POSITIVE_INT
from features.images import encodable
from runtime.files import check_output, sha256_of_file, write_json
from runtime.process import configure_runtime, resolve_device, run_cli, say
from runtime.untrusted import read_json_object, shortened

REPORT = "outputs/report.json"
# Of the settings that tools/sample_npz.py writes, what is printed.
TOLD = (
    *("labels", "seed", "scheduler", "sampler", "method", "diffusion_form", "num_inference_steps"),
    *("guidance_scale", "guidance_channels", "guidance_interval", "guidance_sigma_interval", "guidance_schedule"),
    *("guidance_rescale", "cfg_zero_star", "guide_scale", "internal_scale", "internal_interval", "timestep_shift"),
    *("zero_init_steps", "rounding", "dtype"),
)


def build_parser():
    parser = CommandParser(description=__doc__)
    parser.add_argument("--samples", metavar="PATH", help=".npz or folder of the images to judge")
    parser.add_argument(
        "--reference",
        required=True,
        metavar="PATH",
        help=".npz or folder of real images, or .npz of their statistics",
    )
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", help=f"some of {' '.join(METRICS)} [all]")
    parser.add_argument(
        "--features", default="inception", help="inception, digits, or the path of a Paddle Inference program"
    )
    parser.add_argument("--inception", metavar="FILE", help="Inception's weights [looked for, see docs/evaluation.md]")
    parser.add_argument(
        "--preprocessing",
        choices=("adm", "pytorch-fid"),
        default="adm",
        help="how Inception gets images: as in ADM and TensorFlow, or as pytorch-fid resizes them",
    )
    parser.add_argument(
        "--image_size", check=POSITIVE_INT, help="centre-crop images of another size to this side, as for training"
    )
    parser.add_argument("--batch_size", check=POSITIVE_INT, default=64, help="images at once")
    add_device_flag(parser)
    parser.add_argument("--seed", check=FLAG_SEED, default=0, help="of KID's subsets and MIND's projections")
    parser.add_argument("--output", default=REPORT, metavar="FILE", help="JSON to write, of --samples or --vae")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--save_statistics", metavar="FILE", help=".npz that gets the statistics of the reference's images"
    )
    parser.add_argument(
        "--vae",
        check=VAE,
        help="folder or hub name of an AutoencoderKL, or ema or mse, whose reconstructions are the samples",
    )
    parser.add_argument(
        "--selfcheck", action="store_true", help="compare with ADM's published values; exit with 1 if not"
    )
    return parser


def check(args):
    """Raises `ValueError` for flags that don't go together, and for files that would be overwritten."""
    check_paths(args, "samples", "reference", "inception")
    for name in args.metrics or ():
        if name not in METRICS:
            raise ValueError(f"--metrics: {shortened(name)} is unknown; expected some of {', '.join(METRICS)}")
    if args.samples and args.vae:
        raise ValueError("--samples and --vae: give one; with --vae the samples are the reference's reconstructions")
    check_vae(args.vae)
    if not (args.samples or args.vae or args.save_statistics):
        raise ValueError("nothing to do: give --samples, --vae or --save_statistics")
    if args.selfcheck and not args.samples:
        raise ValueError("--selfcheck: give --samples admnet_guided_upsampled_imagenet256.npz")
    if args.selfcheck and (args.metrics or args.features != "inception" or args.preprocessing != "adm"):
        raise ValueError("--selfcheck is of the published metrics: leave out --metrics, --features and --preprocessing")
    if args.output == REPORT and (args.samples or args.vae):
        os.makedirs(os.path.dirname(REPORT), exist_ok=True)
    outputs = {"save_statistics": args.save_statistics, "output": args.output if args.samples or args.vae else None}
    outputs = {flag: path for flag, path in outputs.items() if path}
    if len({os.path.realpath(path) for path in outputs.values()}) < len(outputs):
        raise ValueError(f"--output {args.output}: is --save_statistics too; give two names")
    for flag, path in outputs.items():
        check_output(path, args.overwrite, f"--{flag} ")
        for read in filter(None, (args.samples, args.reference, args.inception)):
            if os.path.realpath(read) == os.path.realpath(path):
                raise ValueError(f"--{flag} {path}: is a file that is read; give another name")


def describe_samples(samples):
    """Returns what a report tells of samples; with the settings in the JSON that tools/sample_npz.py writes."""
    is_folder, drawn = os.path.isdir(samples.path), None
    beside = os.path.join(samples.path, "samples.json") if is_folder else os.path.splitext(samples.path)[0] + ".json"
    if samples.kind != "reconstructions" and os.path.isfile(beside):
        with contextlib.suppress(ValueError):  # somebody else's
            drawn = read_json_object(beside)
        count = (drawn or {}).get("num_images")
        if count is None:  # such as a report of these samples
            drawn = None
        elif count != len(samples):
            raise ValueError(
                f"{beside}: tells of {shortened(count)} images, there are {len(samples)}; is it of others?"
            )
    path = encodable(samples.path)
    return {"path": path, "kind": samples.kind, "image_size": list(samples.image_size), "settings": drawn}


def describe_reference(reference):
    """Returns what a report tells of a reference."""
    is_file = os.path.isfile(reference.path)
    return {
        "path": encodable(reference.path),
        "kind": reference.images.kind if reference.images else "statistics",
        "sha256": sha256_of_file(reference.path).hex() if is_file else None,
        "image_size": list(reference.images.image_size) if reference.images else None,
        "statistics": sorted(name for name in reference.stored if name not in ("num_images", "settings")),
    }


def load_reconstructions(args, reference):
    """Returns what a report tells of the autoencoder, and the reconstructions of the reference's images."""
    from evaluation.reconstruction import Reconstructions
    from features.autoencoder import load_vae, weights_digest

    if not reference.images:
        raise ValueError(f"--vae: {args.reference} holds statistics and no images")
    vae = load_vae(args.vae)
    settings = {"name": args.vae, "weights_sha256": weights_digest(vae), "latents": "mean of the posterior"}
    return settings, Reconstructions(reference.images, vae, args.vae, args.batch_size)


def print_settings(settings, samples, reference):
    """Prints what the numbers belong to."""
    drawn, of = settings["samples"]["settings"], settings["reference"]
    if vae := settings["vae"]:
        print(
            f"samples:   reconstructions by {vae['name']} (weights sha256 {vae['weights_sha256'][:12]}), of {samples}"
        )
    else:
        print(f"samples:   {samples}")
    if drawn:
        pairs = (f"{key} {shortened(drawn[key], 60)}" for key in TOLD if drawn.get(key) is not None)
        print(f"           drawn with {', '.join(pairs)}")
    held = [str(reference.images or reference.path), *of["statistics"]]
    print(f"reference: {', '.join(held)}" + (f"; sha256 {of['sha256'][:12]}" if of["sha256"] else ""))
    words = [shortened(settings["features"], 300)]
    words += [f"preprocessing {settings['preprocessing']}"] if settings.get("preprocessing") else []
    words += [f"weights sha256 {settings['weights_sha256'][:12]}"] if settings.get("weights_sha256") else []
    print(f"features:  {', '.join(words)}")


def save_statistics(path, reference, network):
    """Writes the statistics of the reference's images."""
    from evaluation.sets import write_statistics

    found = reference.extracted
    moments = {output: (each.mean, each.covariance) for output, each in found.moments.items()}
    settings = {**network.settings, "image_size": list(reference.images.image_size)}
    write_statistics(path, moments, found.count, settings)
    say(f"statistics of {reference.images}: {path}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    args.metrics = args.metrics and [name.lower() for words in args.metrics for name in words.split(",") if name]
    if args.metrics == []:
        raise ValueError("--metrics: names none; leave it out for all that are possible")
    check(args)
    configure_runtime()
    from evaluation.networks import check_features, load_features
    from evaluation.report import PUBLISHED, compare_published, make_report, table
    from evaluation.run import cautions, compute_metrics, extract_set, open_reference
    from evaluation.sets import open_images
    from runtime.process import init_distributed

    # What is compared.
    samples = open_images(args.samples, image_size=args.image_size) if args.samples else None
    sample_size = samples.image_size if samples else None
    reference = open_reference(args.reference, image_size=args.image_size, sample_size=sample_size)
    if args.save_statistics and not reference.images:
        raise ValueError(f"--save_statistics: {args.reference} holds statistics and no images")
    check_features(args.features, args.inception, args.preprocessing)

    import paddle

    device = resolve_device(args.device)
    paddle.set_device(device)
    rank, _ = init_distributed()
    network = load_features(args.features, weights=args.inception, preprocessing=args.preprocessing)
    vae = None
    if args.vae:
        vae, samples = load_reconstructions(args, reference)
    if samples:
        reference.choose([*PUBLISHED] if args.selfcheck else args.metrics, network.outputs, len(samples))
        reference.check(network, samples.image_size)
        settings = {
            **network.settings,
            "samples": describe_samples(samples),
            "vae": vae,
            "device": device,
            **{name: getattr(args, name) for name in ("image_size", "batch_size", "seed")},
        }
    for note in [*(samples.notes if samples else ()), *reference.notes] if rank == 0 else ():
        say(f"note: {note}")

    # Features, by all ranks.
    reference.extract(network, args.batch_size, moments=bool(args.save_statistics))
    if args.save_statistics and rank == 0:
        save_statistics(args.save_statistics, reference, network)
    if not samples:
        return
    extracted = extract_set(network, samples, metrics=reference.metrics, batch_size=args.batch_size, what="samples")
    quality = samples.quality() if vae else {}
    if rank > 0:
        return

    # Numbers.
    say("computing the metrics")
    settings["reference"] = describe_reference(reference)
    numbers = compute_metrics(extracted, reference, reference.metrics, seed=args.seed)
    report = make_report({**numbers, **quality}, len(samples), reference.count, settings)
    write_json(args.output, report)
    print_settings(settings, samples, reference)
    for sentence in cautions(extracted, reference, reference.metrics):
        print(f"note: {sentence}")
    lines, agrees = compare_published(report) if args.selfcheck else ([], True)
    print("", *lines, *([""] if lines else []), sep="\n")
    print(*table(report, reference), f"report: {args.output}", sep="\n")
    if not agrees:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
