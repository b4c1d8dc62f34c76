"""How good digits are, by what one chooses after training: FID, MIND and recall, with error bars over training seeds.

    OMP_NUM_THREADS=2 python benchmarks/quality.py --write

One factor at a time is changed around one base (`BASE`): the width of the average, the scale and the interval of
guidance, the guide of autoguidance, the sampler and its steps. For every seed it trains a DiT with post-hoc EMA, the
same with a learning rate that goes to 0, a smaller one as a guide, and a SiT, on the digits of tools/prepare_digits.py,
and draws the same noise and classes at every point, compared with the training digits. The noise of another seed is
another one, so that the error bars, the standard deviation over seeds, are of training and drawing together.

Everything is kept in --output: the same command goes on where it was stopped. --write puts the tables into
docs/quality.md and the figures into docs/images/.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import _root  # noqa: F401 (the project's root, on sys.path)

from benchmarks.digits import ROOT, VAE, check_settings, measure, open_judge, prepare, train
from benchmarks.quality_page import draw_figures, show, write_page
from runtime.files import write_json
from runtime.process import configure_runtime, run_cli, say
from sampling.flags import METHODS
from sampling.step_counts import SCHEDULERS

METRICS = ["fid", "mind", "recall", "precision"]
TRAINING = {
    "global_batch_size": 64,
    "learning_rate": 1e-3,
    "ema_profiles": "0.05,0.1",
    "ema_snapshot_dtype": "float32",
}
# Config, schedule. Where the learning rate goes to 0, as by cosine, the weights stop moving: averages have less to do.
MODELS = {
    "DiT": ("DiT_digits.json", "constant_with_warmup"),
    "small": ("DiT_digits.json", "constant_with_warmup"),
    "cosine": ("DiT_digits.json", "cosine"),
    "SiT": ("SiT_digits.json", "constant_with_warmup"),
}
SMALL = {"num_layers": 2, "num_attention_heads": 2}  # of the smaller guide, which is trained for a quarter of the steps
BASE = {
    "model": "DiT",
    "weights": 0.1,  # width of the average; or "model", the weights themselves, or "ema", the usual average
    "guide": None,
    "sampling": {"num_inference_steps": 20, "guidance_scale": 1.0, "method": "dpm"},
}
BASE_SIT = {**BASE, "model": "SiT", "sampling": {"num_inference_steps": 21, "guidance_scale": 1.0}}
NOISY, MIDDLE, CLEAN = (666, 999), (333, 666), (0, 333)  # thirds of a diffusion's time
INTERVALS = {
    "all": None,
    "noisy third": NOISY,
    "middle third": MIDDLE,
    "clean third": CLEAN,
    "all but noisy": (0, 666),
    "all but clean": (333, 999),
}
GUIDES = {"earlier": ("DiT", 0.1, 0.25), "smaller": ("small", 0.1, 1), "wider": ("DiT", 0.25, 1)}  # model, width, when


def vary(base, sampling=None, **changes):
    """Returns a setting with some other values than `base`."""
    return {**base, **changes, "sampling": {**base["sampling"], **(sampling or {})}}


def points(quick=False):
    """Returns `{part: [(curve, x, setting)]}`: what is measured."""
    widths = [0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25]
    scales, strengths, steps = [1.0, 1.25, 1.5, 2.0, 3.0], [1.25, 1.5, 2.0], [5, 10, 20, 50]
    if quick:
        widths, scales, strengths, steps = [0.05, 0.1], [1.0, 2.0], [1.5], [2, 4]
    guided = {"guidance_scale": scales[-1] if quick else 2.0}
    some = widths[:1] if quick else [0.03, 0.05, 0.1, 0.2]
    cosine = [("cosine schedule", std, vary(BASE, model="cosine", weights=std)) for std in some]
    found = {
        "widths": [("constant rate", std, vary(BASE, weights=std)) for std in widths] + cosine,
        "scale": [("", scale, vary(BASE, {"guidance_scale": scale})) for scale in scales],
        "interval": [
            ("", name, vary(BASE, guided if interval is None else {**guided, "guidance_interval": interval}))
            for name, interval in INTERVALS.items()
        ],
        "guide": [
            (name, scale, vary(BASE, {"guide_scale": scale} if scale > 1 else {}, guide=name if scale > 1 else None))
            for name in GUIDES
            for scale in [1.0, *strengths]
        ],
        "sampler": [
            (method, count, vary(BASE, {"method": method, "num_inference_steps": count}))
            for method in SCHEDULERS
            for count in steps
        ],
        "transport": [],
    }
    # At x = 0: levels for comparison.
    for name, schedule in (("DiT", "constant"), ("cosine", "cosine")):
        found["widths"].append((f"no average, {schedule}", 0.0, vary(BASE, model=name, weights="model")))
    found["widths"].append(("EMA 0.995, constant", 0.0, vary(BASE, weights="ema")))
    evaluations = {"euler": 1, "heun2": 2, "ab2": 1}  # in a step
    for method, calls in ((name, evaluations[name]) for name in METHODS["ode"] if name in evaluations):
        for count in steps:  # network evaluations, of a method that takes two a step an even number
            grid = {"sampler": "ode", "method": method, "num_inference_steps": count // calls + 1}
            found["transport"].append((method, count // calls * calls, vary(BASE_SIT, grid)))
    return found


class Runs:
    """The trained networks of a seed, and what samples are drawn with.

    Args:
        folder: where runs are. data: the folder with digits and features.
    """

    def __init__(self, folder, data, seed, max_steps):
        self.folder, self.data, self.seed, self.max_steps = Path(folder), data, seed, max_steps
        self.generator = functools.lru_cache(maxsize=4)(self._generator)

    def train(self, model):
        """Returns the folder of a trained network of `MODELS`; an interrupted training goes on."""
        steps = self.max_steps // 4 if model == "small" else self.max_steps
        output, snapshot = self.folder / model, f"*/ema/{steps:07d}/manifest.json"
        if not list(output.glob(snapshot)):
            name, schedule = MODELS[model]
            config = json.loads((ROOT / "config" / name).read_text())
            config["model"] |= SMALL if model == "small" else {}
            train(
                config,
                self.data,
                output,
                **TRAINING,
                seed=self.seed,
                lr_scheduler_type=schedule,
                max_steps=steps,
                ema_snapshot_steps=max(1, steps // 30),
                save_steps=max(1, steps // 2),
                logging_steps=max(1, steps // 10),
            )
        (path,) = output.glob(snapshot)
        return path.parent.parent.parent

    def weights(self, model, weights, part=1):
        """Returns `(path, key)` of weights after a part of the training: a width's, or "model" or "ema" at its end."""
        run = self.train(model)
        if weights in ("model", "ema"):
            return run, weights
        from training.reconstruction import plan_averages, write_averages

        steps = sorted(int(path.name) for path in (run / "ema").iterdir() if path.name.isdecimal())
        step = min(steps, key=lambda step: abs(step - part * steps[-1]))
        output = run / f"averages-{step}"
        folder = output / f"std_{weights:g}"
        if not folder.exists():
            write_averages(plan_averages(run, [weights], step), output)
        return folder, None

    def _generator(self, *weights):
        from sampling.generator import load_generator

        path, key = self.weights(*weights)
        return load_generator(path, vae=VAE, key=key)

    def sampler(self, setting):
        """Returns the generator of a setting."""
        generator = self.generator(setting["model"], setting["weights"])
        guide = setting["guide"] and self.generator(*GUIDES[setting["guide"]])
        return generator.guided_by(guide) if guide else generator


def summary(found, parts, seeds):
    """Returns `{part: [{"curve", "x", metric: (mean, deviation)}]}` of `{(part, place): [row of each seed]}`."""
    table = {}
    for part, listed in parts.items():
        for place, (curve, x, _) in enumerate(listed):
            rows = found[part, place]
            numbers = {metric: [row[metric] for row in rows] for metric in METRICS}
            spread = {name: statistics.stdev(all_) if len(seeds) > 1 else 0.0 for name, all_ in numbers.items()}
            means = {name: (statistics.fmean(all_), spread[name]) for name, all_ in numbers.items()}
            table.setdefault(part, []).append({"curve": curve, "x": x, **means})
    return table


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="outputs/quality", help="folder for all that is made [%(default)s]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--parts", nargs="+", choices=tuple(points()), default=list(points()), help="[all]")
    parser.add_argument("--num_samples", type=int, help="of each point [1000]")
    parser.add_argument("--max_steps", type=int, help="of a training [1500]")
    parser.add_argument("--quick", action="store_true", help="few points, samples and steps: does it run?")
    parser.add_argument("--write", action="store_true", help="write docs/quality.md's tables, and its figures")
    args = parser.parse_args(argv)
    output = Path(args.output)
    settings = {
        "num_samples": args.num_samples or (20 if args.quick else 1000),
        "max_steps": args.max_steps or (40 if args.quick else 1500),
        "training": TRAINING,
    }
    if args.write and (args.quick or set(args.parts) != set(points())):
        raise ValueError("--write: not with --quick, and all parts are written")
    check_settings(output, settings)
    configure_runtime()
    prepare(output)
    start = time.perf_counter()
    parts = {part: listed for part, listed in points(args.quick).items() if part in args.parts}
    found, points_folder = {}, output / "points"
    points_folder.mkdir(exist_ok=True)
    for seed in args.seeds:
        runs = Runs(output / f"seed{seed}", output, seed, settings["max_steps"])
        judge = open_judge(output, settings["num_samples"], METRICS, seed)
        for part, listed in parts.items():
            say(f"seed {seed}, {part}: {len(listed)} points, {time.perf_counter() - start:.0f} s so far")
            for place, (_, _, setting) in enumerate(listed):
                found.setdefault((part, place), []).append(measure(runs, judge, setting, points_folder))
    results = summary(found, parts, args.seeds)
    write_json(output / "results.json", {**settings, "seeds": args.seeds, "results": results})
    show(results, METRICS)
    figures = draw_figures(results, ROOT / "docs/images" if args.write else output)
    if args.write:
        write_page(ROOT / "docs/quality.md", results, METRICS)
    print(f"{output}/results.json, {', '.join(figures)}")


if __name__ == "__main__":
    run_cli(main)
