"""How far samplers are from the exact result by the number of network evaluations, from the same noise.

    bash quickstart.sh && bash quickstart.sh --model SiT
    python benchmarks/samplers.py --model_path outputs/quickstart/digits-{DiT,SiT}-trainer-seed0/train --xl

The error is the root mean square of the difference of latents from those of a long run (--long_steps evaluations: of
a diffusion UniPC's, of a transport rk4's), over that of the latents. A method of several evaluations a step makes as
many steps as fit. --xl takes networks of XL/2's shape with random weights, on latents of --latent_size: their
outputs, scaled to a standard deviation of 1, are added to what is exact of normal latents, since nothing random
denoises. They are as smooth or rough as weights happen to be, so that their rows show the order of samplers rather
than what one needs. On two cores the quickstart's models take five minutes, --xl half an hour; a third less with
--long_steps 400.
"""

import argparse
import json
import math
import os

import _root  # noqa: F401

from config.schema import load_config
from runtime.process import configure_runtime, run_cli
from runtime.progress import tqdm

# By the kind of the objective: samplers with their evaluations a step, and the one of the long run.
SAMPLERS = {
    "diffusion": {"ddim": 1, "dpm": 1, "dpm3": 1, "unipc": 1},
    "transport": {"euler": 1, "ab2": 1, "midpoint": 2, "heun2": 2, "heun2_euler": 2, "heun3": 3, "rk4": 4},
}
LONG = {"diffusion": "unipc", "transport": "rk4"}
XL = {"DiT": "DiT_XL_patch2.json", "SiT": "SiT_XL_patch2.json"}


def random_generator(kind, sample_size):
    """Returns the `Generator` of --xl: a network of a family's XL/2 with random weights."""
    import paddle

    from models import build_model
    from objectives import build_objective
    from sampling.generator import Generator
    from sampling.schedulers import CheckpointSampler

    config = load_config(_root.ROOT / "config" / XL[kind])
    model = config["model"] = {**config["model"], "sample_size": sample_size, "learn_sigma": False}
    paddle.seed(0)
    network = build_model(config)
    for value in network.parameters():
        if not value.any():  # what adaLN-Zero starts as zeros: every output would be 0
            value.set_value(paddle.randn(value.shape) * 0.02)
    network.eval()
    channels, scales = model["in_channels"], []
    if kind == "DiT":
        objective, squares = CheckpointSampler(config), build_objective(config).diffusion.alphas_cumprod
    else:
        objective = build_objective(config)

    def predict(x, t, y):
        residual = network(x, t, y)
        if not scales:
            scales.append(1 / residual.std().item())
        residual = residual * scales[0]
        if kind == "DiT":  # x_0 = alpha x + sigma residual
            alpha, sigma = math.sqrt(squares[int(t[0])]), math.sqrt(1 - squares[int(t[0])])
            return x * sigma - residual * alpha
        time = float(t[0])
        return x * ((2 * time - 1) / (time**2 + (1 - time) ** 2)) + residual

    sizes = {"in_channels": channels, "sample_size": sample_size, "num_classes": 1000, "null_class": 1000}
    return Generator(predict, objective, **sizes)


def measure(generator, args, scale, images):
    """Lists `{"sampler", "evaluations", "error"}` of every sampler and number of evaluations."""
    import paddle

    paddle.seed(args.seed)
    noise = paddle.randn([images, generator.in_channels, generator.sample_size, generator.sample_size])
    classes = [i * generator.num_classes // images for i in range(images)]
    network, calls = generator.network, []

    def counted(x, t, y):
        calls.append(x.shape[0])
        return network(x, t, y)

    def draw(sampler, stages, evaluations):
        calls.clear()
        options = {"method": sampler, "num_inference_steps": evaluations // stages}
        if generator.kind == "transport":  # whose number is that of points
            options.update(sampler="ode", num_inference_steps=evaluations // stages + 1)
        return generator.sample(classes, noise=noise, guidance_scale=scale, output="latents", **options)

    samplers, rows = SAMPLERS[generator.kind], []
    generator.network = counted
    try:
        long = draw(LONG[generator.kind], samplers[LONG[generator.kind]], args.long_steps)
        size = long.square().mean()
        cells = [(name, count) for name, stages in samplers.items() for count in args.evaluations if count >= stages]
        for name, count in tqdm(cells, leave=False):
            error = ((draw(name, samplers[name], count) - long).square().mean() / size).sqrt().item()
            rows.append({"sampler": name, "evaluations": count, "made": len(calls), "error": error})
    finally:
        generator.network = network
    return rows


def table(title, rows, evaluations):
    """Returns a table in Markdown."""
    cells = {(row["sampler"], row["evaluations"]): f"{row['error']:.2g}" for row in rows}
    lines = [f"| {title} | {' | '.join(map(str, evaluations))} |", "| --- |" + " --- |" * len(evaluations)]
    for name in dict.fromkeys(row["sampler"] for row in rows):
        lines.append(f"| {name} | {' | '.join(cells.get((name, count), '-') for count in evaluations)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", nargs="*", default=[], help="models of any kind, such as the quickstart's")
    parser.add_argument("--vae", help="their autoencoder [the features' own]")
    parser.add_argument("--guidance_scales", nargs="+", type=float, default=[1.0, 1.5], help="of these [%(default)s]")
    parser.add_argument("--images", type=int, default=20, help="of these [%(default)s]")
    parser.add_argument("--xl", action="store_true", help="random networks of XL/2's shape, too")
    parser.add_argument("--latent_size", type=int, default=16, help="of these, height and width [%(default)s]")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[5, 10, 20, 50], help="[%(default)s]")
    parser.add_argument("--long_steps", type=int, default=1000, help="evaluations of the long run [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise [%(default)s]")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args(argv)
    configure_runtime()
    from sampling.generator import load_generator

    cases = [
        (path, scale, lambda path=path: load_generator(path, vae=args.vae), args.images)
        for path in args.model_path
        for scale in args.guidance_scales
    ]
    cases += [
        (f"random {kind}-XL/2", 1.0, lambda kind=kind: random_generator(kind, args.latent_size), 1)
        for kind in XL
        if args.xl
    ]
    figures = []
    for name, scale, load, images in cases:
        rows = measure(load(), args, scale, images)
        print(table(f"{name}, guidance {scale:g}", rows, args.evaluations) + "\n", flush=True)
        figures.append({"model": name, "guidance_scale": scale, "images": images, "rows": rows})
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(
                {"load_average": os.getloadavg(), "long_steps": args.long_steps, "models": figures}, file, indent=2
            )
        print(f"figures: {args.output}")


if __name__ == "__main__":
    run_cli(main)
