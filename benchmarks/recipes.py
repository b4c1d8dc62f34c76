"""What the recipes of docs/recipes.md gain on digits: FID and MIND at equal steps and at equal time, speed, memory.

    python benchmarks/recipes.py --write

Every recipe of `RECIPES` is one training of one network for each seed, all else alike: weights at the start, order of
the digits, times and noise. Samples of a seed have one noise, whatever the recipe.

Two trainings of one thread each run side by side (--jobs). Speeds are measured afterwards, by the processor's time of
one thread: a recipe and the plain training take turns, step by step, in one process. "Equal time" is that in which the
plain training makes two of its three thirds; the metrics of another recipe at the step that it reaches until then are
interpolated between its checkpoints, both axes logarithmic.

Everything is kept in --output: the same command goes on where it was stopped, and `--only NAME` does a part of it. A
recipe that has changed is refused until its folder under runs/ is deleted.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np

from benchmarks import turns
from benchmarks.digits import ROOT, VAE, add_encoder, check_settings, measure, open_judge, point_path, prepare, train
from benchmarks.recipes_page import draw_figure, show, write_page
from config.schema import resolve_config
from runtime.files import write_json
from runtime.process import configure_runtime, run_cli, say
from runtime.untrusted import read_json

METRICS, TIMED = ["fid", "mind", "recall"], ["fid", "mind"]  # at equal steps; at equal time
# Deeper and narrower than the presets, because recipes look at middle blocks; 16 tokens, because they route tokens.
SIZES = {"patch_size": 1, "num_layers": 8, "num_attention_heads": 2, "attention_head_dim": 32}
TRAINING = {"global_batch_size": 32, "learning_rate": 1e-3, "lr_scheduler_type": "constant_with_warmup"}
ODE = {"sampler": "ode", "method": "ab2", "num_inference_steps": 11, "guidance_scale": 1.0}
SAMPLING = {"SiT": ODE, "DiT": {"method": "dpm", "num_inference_steps": 20, "guidance_scale": 1.0}}
THIRDS = 3  # checkpoints of a training
STEPS, SAMPLES = 900, 1000
WARM_UP, ROUNDS = 5, 100  # steps of which speeds are measured


@dataclass(frozen=True)
class Recipe:
    """What differs from the plain training of a network.

    Args:
        base: "SiT" or "DiT". changes: of the config, by section. sampling: of `Generator.sample`.
        weights_of: the recipe whose weights are sampled; None for its own.
    """

    base: str = "SiT"
    changes: dict = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)
    weights_of: str | None = None

    @property
    def plain(self):
        """Returns the name of the recipe that this one is compared with."""
        return f"plain {self.base}"


def with_terms(*entries):
    """Returns the recipe of a SiT with regularizers."""
    return Recipe(changes={"objective": {"regularizers": list(entries)}})


# Blocks count from 1. Weights are the official ones, and so are the places of blocks, in proportion: 8 and 16 of 28 for
# regularizers, 3 to 9 of 12 for TREAD, all but the first and last two for SPRINT.
LAYER_SYNC = {"type": "layer_sync", "weight": 0.2, "block": 2, "target_block": 5}
LATENT_ALIGNMENT = {"type": "latent_alignment", "weight": 1.0, "block": 2}
INTERNAL_GUIDANCE = {"type": "internal_guidance", "weight": 0.5, "block": 2}
DISPERSIVE = {"type": "dispersive", "weight": 0.25, "temperature": 1.0, "block": -1, "group": 32}
CONTRASTIVE = {"type": "contrastive", "weight": 0.05}
REPRESENTATION = {"type": "representation_alignment", "weight": 0.5, "block": 2}
NARROW = {**REPRESENTATION, "inner_width": 128}  # twice the network's; the official one, 2048, is of large networks
JIT_TIMES = {"timestep_sampling": "logit-normal", "logit_mean": -0.8, "logit_std": 0.8}  # with which x1 was proposed
SHIFT, TREAD = {"timestep_shift": 0.5}, {"training": {"routing": {"share": 0.5, "blocks": [3, 6]}}}
RECIPES = {
    "plain SiT": Recipe(),
    "layer_sync": with_terms(LAYER_SYNC),
    "latent_alignment": with_terms(LATENT_ALIGNMENT),
    "internal_guidance": with_terms(INTERNAL_GUIDANCE),
    "internal_guidance, guided": Recipe(sampling={"internal_scale": 1.5}, weights_of="internal_guidance"),
    "dispersive": with_terms(DISPERSIVE),
    "contrastive": with_terms(CONTRASTIVE),
    "representation_alignment": with_terms(REPRESENTATION),
    "representation_alignment, narrow": with_terms(NARROW),
    "x1": Recipe(changes={"objective": {"prediction": "x1"}}),
    "logit-normal times": Recipe(changes={"objective": JIT_TIMES}),
    "x1, logit-normal times": Recipe(changes={"objective": {"prediction": "x1", **JIT_TIMES}}),
    "timestep_shift": Recipe(changes={"objective": SHIFT}),
    "TREAD": Recipe(changes=TREAD),
    "SPRINT": Recipe(changes={"model": {"sprint_blocks": [3, 6]}, "training": {"routing": {"share": 0.75}}}),
    "contrastive, shift": Recipe(changes={"objective": {"regularizers": [CONTRASTIVE], **SHIFT}}),
    "contrastive, shift, TREAD": Recipe(changes={"objective": {"regularizers": [CONTRASTIVE], **SHIFT}, **TREAD}),
    "plain DiT": Recipe("DiT"),
    "min_snr_gamma": Recipe("DiT", changes={"objective": {"min_snr_gamma": 5.0}}),
}


def config_of(name):
    """Returns the raw config of a recipe's training."""
    recipe = RECIPES[name]
    config = json.loads((ROOT / "config" / f"{recipe.base}_digits.json").read_text())
    for changes in ({"model": SIZES, "training": TRAINING}, recipe.changes):
        for section, values in changes.items():
            config[section] = {**config[section], **values}
    return config


def terms_of(name):
    """Lists the regularizers of a recipe."""
    return config_of(name)["objective"].get("regularizers", [])


class Runs:
    """The trained network of a recipe and a seed.

    Args:
        output: the folder of all that is made. settings: `max_steps`, a multiple of `THIRDS`, and `num_samples`.
    """

    def __init__(self, output, name, seed, settings):
        recipe = RECIPES[name]
        self.output, self.seed, self.num_samples = Path(output), seed, settings["num_samples"]
        self.steps = [settings["max_steps"] * part // THIRDS for part in range(1, THIRDS + 1)]
        self.trained = recipe.weights_of or name
        self.config, sampling = config_of(self.trained), {**SAMPLING[recipe.base], **recipe.sampling}
        self.folder = self.output / "runs" / self.trained.replace(" ", "_") / f"seed{seed}"
        self.points = [{"config": self.config, "step": step, "sampling": sampling} for step in self.steps]

    def rows(self):
        """Lists the metrics of the checkpoints; None if one is missing."""
        paths = [point_path(point, self.seed, self.output / "points") for point in self.points]
        return [read_json(path) for path in paths] if all(path.exists() for path in paths) else None

    def measure(self):
        """Trains the network and measures its checkpoints, unless that is done."""
        if not list(self.folder.glob(f"*/checkpoints/{self.steps[-1]:07d}")):
            steps = {"max_steps": self.steps[-1], "save_steps": self.steps[0], "logging_steps": self.steps[0]}
            train(self.config, self.output, self.folder, seed=self.seed, **steps)
        judge = open_judge(self.output, self.num_samples, METRICS, self.seed)
        for point in self.points:
            measure(self, judge, point, self.output / "points")

    def sampler(self, point):
        """Returns the generator of a checkpoint's averages."""
        from sampling.generator import load_generator

        (path,) = self.folder.glob(f"*/checkpoints/{point['step']:07d}")
        return load_generator(path, vae=VAE, key="ema")


def measure_worker(output, name, seed, settings):
    """Does `Runs.measure` in this process, and answers that it is done."""
    configure_runtime()
    Runs(output, name, seed, settings).measure()
    turns.answer("done")


def measure_all(output, names, seeds, settings, jobs):
    """Trains and measures recipes, `jobs` at once, each in a process of its own with one thread."""
    missing = [(name, seed) for name in names for seed in seeds if not Runs(output, name, seed, settings).rows()]
    # What samples the weights of another recipe comes after it: one training is not to run twice at once.
    for last in (False, True):

        def run(job):
            say(f"{job[0]}, seed {job[1]}")
            turns.ask(__file__, "measure", json.dumps([str(output), *job, settings]))

        with ThreadPoolExecutor(jobs) as pool:
            started = [pool.submit(run, job) for job in missing if bool(RECIPES[job[0]].weights_of) is last]
        for future in started:  # all have ended: what one fails on stops none of the others
            future.result()


class Steps:
    """Makes steps of a recipe's training, as the hand-written loop does, in this process.

    Args:
        data: the folder of `prepare`. folder: for the run.
    """

    def __init__(self, name, data, folder):
        from features.loader import FeatureLoader
        from training import setup
        from training.session import Outputs, build_session

        raw = config_of(name)
        config = resolve_config({**raw, "training": {**raw["training"], "max_steps": 10**6}})
        opened = setup.open_data(config, str(data / "features"), 32)
        outputs = Outputs(save_every=10**6, log_every=10**6, show_bar=False)
        self.session, self.step = build_session(config, opened, folder, outputs=outputs).start(), 0
        self.batches = iter(FeatureLoader(opened.dataset, opened.sampler, num_workers=0))

    def __call__(self):
        """Makes a step."""
        from objectives import Rows, make_batch
        from runtime.process import seed_step

        session, self.step = self.session, self.step + 1
        batch = make_batch(next(self.batches))
        seed_step(0, self.step)
        losses = session.objective.training_losses(session.model, batch, Rows(*session.sampler.rows(0)))
        loss = losses["loss"].mean()
        session.scaler.scale(loss).backward()
        session.add_losses(loss, losses)
        session.begin_update(self.step)
        session.scaler.step(session.optimizer)
        session.scaler.update()
        session.end_update()
        session.optimizer.clear_grad()
        session.lr_scheduler.step()
        session.after_step(self.step)


def speed_worker(names, data):
    """Answers the seconds of the processor of steps of recipes, which take turns in this process."""
    configure_runtime()
    with contextlib.ExitStack() as stack:
        runs = [Steps(name, Path(data), stack.enter_context(tempfile.TemporaryDirectory())) for name in names]
        seconds = []
        for _ in range(WARM_UP + ROUNDS):
            starts = []
            for run in runs:
                starts.append(time.process_time())
                run()
            seconds.append(np.diff([*starts, time.process_time()]).tolist())
    turns.answer(seconds[WARM_UP:])


def memory_worker(name, data):
    """Answers the bytes that a process which makes steps of a recipe has taken at most, and those of the allocator."""
    configure_runtime()
    from paddle.base import core

    with tempfile.TemporaryDirectory() as folder:
        step = Steps(name, Path(data), folder)
        for _ in range(WARM_UP):
            step()
    allocated = core.host_memory_stat_peak_value("Allocated", 0)
    turns.answer({"peak": turns.memory("VmHWM"), "allocated": allocated})


def measure_speed(output, name):
    """Returns speed and memory of a recipe's training, of its file if that is there.

    `speed` is the median, over turns, of a plain step's seconds over those of the recipe's.
    """
    name, plain = RECIPES[name].weights_of or name, RECIPES[name].plain
    path = output / "speed" / f"{name.replace(' ', '_')}.json"
    if not path.exists():
        say(f"{name}: steps beside those of the plain training")
        seconds = turns.ask(__file__, "speed", json.dumps([[plain, name], str(output)]))
        ratios, plain_s = [a / b for a, b in seconds], statistics.median(a for a, _ in seconds)
        speed = {"speed": statistics.median(ratios), "plain_s": plain_s}
        speed |= turns.ask(__file__, "memory", json.dumps([name, str(output)]))
        path.parent.mkdir(exist_ok=True)
        write_json(path, {**speed, "seconds": seconds})
    return read_json(path)


def at_step(rows, steps, step, metric):
    """Returns a metric at a step between checkpoints, both axes logarithmic; beyond the last one, that of the last."""
    return float(np.exp(np.interp(np.log(step), np.log(steps), np.log([row[metric] for row in rows]))))


def summary(output, names, seeds, settings):
    """Lists a row for each recipe: speed, memory, and `(mean, deviation)` of its metrics.

    `better` counts the seeds in which its FID is below that of the plain training, at equal steps and at equal time.
    What is slower than the first checkpoint has nothing to show at equal time.
    """
    found = []
    steps = Runs(output, names[0], 0, settings).steps
    rows = {name: [Runs(output, name, seed, settings).rows() for seed in seeds] for name in names}
    for name in names:
        speed, plain = measure_speed(output, name), RECIPES[name].plain
        own, base = speed["speed"] if name != plain else 1.0, measure_speed(output, plain)
        reached = steps[-2] * own  # in the time of the plain training's
        numbers = {"equal_steps": {metric: [of_seed[-1][metric] for of_seed in rows[name]] for metric in METRICS}}
        if reached >= steps[0]:
            numbers["equal_time"] = {
                metric: [at_step(of_seed, steps, reached, metric) for of_seed in rows[name]] for metric in TIMED
            }
        row = {"recipe": name, "step": round(reached), "better": {}}
        for when, place in (("equal_steps", -1), ("equal_time", -2)):
            if when in numbers and name != plain and plain in rows:
                theirs = [of_seed[place]["fid"] for of_seed in rows[plain]]
                row["better"][when] = sum(a < b for a, b in zip(numbers[when]["fid"], theirs, strict=True))
        row |= {when: spread(values) for when, values in numbers.items()}
        row |= {"speed": own, "samples_per_s": TRAINING["global_batch_size"] / base["plain_s"] * own}
        found.append({**row, "peak": speed["peak"], "allocated": speed["allocated"]})
    return found


def spread(numbers):
    """Returns `{metric: (mean, deviation)}` of `{metric: [number of each seed]}`."""
    return {
        metric: (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for metric, values in numbers.items()
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="outputs/recipes", help="folder for all that is made [%(default)s]")
    parser.add_argument("--only", nargs="+", choices=tuple(RECIPES), metavar="NAME", help="of these recipes [all]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, of one thread each [%(default)s]")
    parser.add_argument("--list", action="store_true", help="print what each recipe changes in a config, and stop")
    parser.add_argument("--train_only", action="store_true", help="neither speeds nor tables")
    parser.add_argument("--quick", action="store_true", help="few samples and steps: does it run?")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/recipes.md, and its figure")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        part, case = args.worker[0], json.loads(args.worker[1])
        {"measure": measure_worker, "speed": speed_worker, "memory": memory_worker}[part](*case)
        return
    names = [name for name in RECIPES if not args.only or name in args.only]
    for name in names:
        config = resolve_config(config_of(name), source=f"recipe {name}")
        if args.list:
            print(f"{name}: {json.dumps(RECIPES[name].changes)}, {config['model']['type']}")
    if args.list:
        return
    if args.write and (args.quick or args.only):
        raise ValueError("--write: not with --quick or --only, because all recipes are written")
    output = Path(args.output)
    settings = {"num_samples": 20 if args.quick else SAMPLES, "max_steps": 2 * THIRDS if args.quick else STEPS}
    check_settings(output, settings)
    (output / "points").mkdir(exist_ok=True)
    configure_runtime()
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # of the processes that are started
    prepare(output)
    if any(term["type"] == REPRESENTATION["type"] for name in names for term in terms_of(name)):
        add_encoder(output)
    measure_all(output, names, args.seeds, settings, args.jobs)
    if args.train_only:
        return
    with ThreadPoolExecutor(args.jobs) as pool:  # each of them has a core to itself
        trained = {RECIPES[name].weights_of or name for name in names} | {RECIPES[name].plain for name in names}
        list(pool.map(lambda name: measure_speed(output, name), sorted(trained)))
    results = summary(output, names, args.seeds, settings)
    write_json(output / "results.json", {**settings, "seeds": args.seeds, "results": results})
    show(results, len(args.seeds))
    figure = draw_figure(results, ROOT / "docs/images" if args.write else output)
    if args.write:
        write_page(ROOT / "docs/recipes.md", results, len(args.seeds))
    print(f"{output}/results.json, {figure}")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        main()
    else:
        run_cli(main)
