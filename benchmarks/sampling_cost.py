"""What a sampler costs beside the network: N evaluations inside it against N bare forward passes, in turn.

Each sampler runs a DiT-S/4 or SiT-S/4 (or another config's network) with random weights at batch 8, pairs of (bare,
sampler) are timed one after the other, and the median of the pairs' ratios is reported: a machine whose speed drifts
slows both.
"""

import argparse
import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from config.schema import load_config  # noqa: E402
from runtime.process import configure_runtime, run_cli  # noqa: E402

configure_runtime()  # before Paddle is imported

SAMPLERS = {
    "DiT": {"ddim": {"method": "ddim"}, "ddpm": {"method": "ddpm"}},
    "SiT": {
        "ode euler": {"method": "euler"},
        "ode heun2": {"method": "heun2"},
        "ode rk4": {"method": "rk4"},
        "ode dopri5": {"method": "dopri5"},
        "sde Euler": {"method": "Euler", "sampler": "sde"},
        "sde Heun": {"method": "Heun", "sampler": "sde"},
    },
}


class Counted:
    """The network, counting its evaluations."""

    def __init__(self, model, y):
        self.model, self.y, self.count = model, y, 0

    def __call__(self, x, t):
        self.count += 1
        return self.model(x, t, self.y)


def measure(options, *, config_file, batch_size, num_steps, pairs):
    """`(evaluations, bare seconds, sampler seconds, ratios)`: medians over the pairs, and each pair's ratio."""
    import numpy as np
    import paddle

    from models import build_model
    from objectives import build_objective

    config = load_config(config_file)
    paddle.seed(0)
    model = build_model(config)
    model.eval()
    # Zero-initialised layers make every output 0: give the network something to say.
    with paddle.no_grad():
        for parameter in model.parameters():
            if not parameter.stop_gradient and not parameter.any():
                parameter.set_value(paddle.randn(parameter.shape) * 0.02)
    shape = config["model"]
    noise = paddle.randn([batch_size, shape["in_channels"], shape["sample_size"], shape["sample_size"]])
    denoiser = Counted(model, paddle.arange(batch_size))
    objective = build_objective(config)
    t = paddle.full([batch_size], 0.5)

    def sampler():
        return objective.sample(denoiser, noise, num_steps=num_steps, **options)

    with paddle.no_grad():
        sampler()  # warm up, and count
        evaluations, denoiser.count = denoiser.count, 0
        bare_times, sampler_times = [], []
        for _ in range(pairs):
            start = time.perf_counter()
            for _ in range(evaluations):
                out = denoiser(noise, t)
            float(out.sum())
            middle = time.perf_counter()
            float(sampler().sum())
            bare_times.append(middle - start)
            sampler_times.append(time.perf_counter() - middle)
    ratios = np.array(sampler_times) / np.array(bare_times)
    return evaluations, statistics.median(bare_times), statistics.median(sampler_times), ratios


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit_config", default="config/DiT_S_patch4.json", help="[%(default)s]")
    parser.add_argument("--sit_config", default="config/SiT_S_patch4.json", help="[%(default)s]")
    parser.add_argument("--batch_size", type=int, default=8, help="[%(default)s]")
    parser.add_argument("--num_steps", type=int, default=25, help="steps of each sampler [%(default)s]")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of each sampler [%(default)s]")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("num_steps", 2), ("pairs", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {least} or more")
    rows = []
    print(f"{'sampler':16} {'evaluations':>11} {'bare s':>8} {'sampler s':>9} {'ratio':>6}  min..max")
    for kind, samplers in SAMPLERS.items():
        for name, options in samplers.items():
            evaluations, bare, sampled, ratios = measure(
                options,
                config_file=args.dit_config if kind == "DiT" else args.sit_config,
                batch_size=args.batch_size,
                num_steps=args.num_steps,
                pairs=args.pairs,
            )
            ratio = float(statistics.median(ratios))
            rows.append({"sampler": f"{kind} {name}", "evaluations": evaluations, "bare_s": bare, "sampler_s": sampled})
            rows[-1].update(ratio=ratio, ratio_min=float(ratios.min()), ratio_max=float(ratios.max()))
            spread = f"{ratios.min():.3f}..{ratios.max():.3f}"
            print(
                f"{kind + ' ' + name:16} {evaluations:11d} {bare:8.2f} {sampled:9.2f} {ratio:6.3f}  {spread}",
                flush=True,
            )
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)
        print(f"figures: {args.output}")


if __name__ == "__main__":
    run_cli(main)
