"""How long evaluation takes, against PyTorch with the same threads.

Processes take turns (A B A B), so that what else the machine does falls on both; ratios are formed turn by turn, and
their medians reported. "CPU" is the processor time of all threads, which other work on the machine changes less.

features: `evaluation.inception` and pytorch-fid's network (`--torch_python`), from uint8 images of numpy to features in
numpy, with random weights. The largest difference of their features is reported too, as a share of the largest feature.

metrics: `evaluation.metrics` and torch-fidelity, on made-up features; see benchmarks/evaluate_metrics.py.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np
from tqdm import tqdm

from benchmarks import evaluate_metrics
from benchmarks.turns import Worker, memory, reset_peak, serve
from runtime.files import write_json
from runtime.process import configure_runtime, run_cli

SEED = 20151205


def images_of_turn(case, turn):
    """Returns uint8 images (N, H, W, 3): random blocks of 8 pixels."""
    rng, side = np.random.default_rng([SEED, turn]), case["image_size"]
    blocks = rng.integers(0, 256, [case["images"], -(-side // 8), -(-side // 8), 3], dtype="uint8")
    return blocks.repeat(8, axis=1).repeat(8, axis=2)[:, :side, :side]


def our_features(case):
    """Returns a function of images to pooled features, by this project."""
    from evaluation.inception import Inception

    network = Inception.from_file(case["weights"], "pytorch-fid")
    return lambda images: network(images)["pool"]


def torch_features(case):
    """Returns a function of images to pooled features, by pytorch-fid's network."""
    import pytorch_fid.inception
    import torch

    torch.set_num_threads(case["threads"])
    state = torch.load(case["weights"], weights_only=True)
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state
    network = pytorch_fid.inception.InceptionV3([3]).eval()

    def features(images):
        found = []
        with torch.no_grad():
            for start in range(0, len(images), case["batch_size"]):
                x = torch.from_numpy(images[start : start + case["batch_size"]]).permute(0, 3, 1, 2).float() / 255
                found.append(network(x)[0].flatten(1).numpy())
        return np.concatenate(found)

    return features


def work(part, case):
    """Serves one process's turns: a turn's number gives seconds, processor seconds, and the peak of the memory.

    The features of a turn are written to a file of the case's folder.
    """
    features = {"ours": our_features, "torch": torch_features}[part](case)

    def turn(number):
        images = images_of_turn(case, number)
        reset_peak()
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        found = features(images)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        np.save(os.path.join(case["folder"], f"{part}.npy"), found)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": memory("VmHWM")}

    serve(turn)


def features(args):
    """Prints the table of features; returns its figures."""
    from support import inception_weights

    parts = ["ours", "torch"] if args.torch_python else ["ours"]
    workers, turns, difference = {}, [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        case = {"folder": folder, "weights": os.path.join(folder, "inception.pth"), "threads": args.threads}
        case.update(image_size=args.image_size, batch_size=args.batch_size, images=-(-args.images // args.turns))
        inception_weights.save(inception_weights.weights(SEED), case["weights"])
        try:
            for part in parts:
                python = sys.executable if part == "ours" else args.torch_python
                workers[part] = Worker(python, __file__, f"features {part}", case)
            for number in tqdm(range(args.turns + 1), desc="features"):  # the first warms up
                asked = {part: workers[part].ask(number) for part in parts}
                turns += [asked] if number else []
                if "torch" in parts:
                    a, b = (np.load(os.path.join(folder, f"{part}.npy")) for part in parts)
                    difference = max(difference, float(np.abs(a - b).max() / np.abs(b).max()))
        finally:
            for worker in workers.values():
                worker.close()

    count = case["images"] * args.turns
    print(f"features of {count} images of {args.image_size} px, {args.threads} threads")
    print("| by | seconds | CPU seconds | images/s | most memory |\n| --- | --- | --- | --- | --- |")
    figures = {"images": count, "image_size": args.image_size, "turns": turns}
    for part in parts:
        seconds, cpu = (sum(turn[part][key] for turn in turns) for key in ("seconds", "cpu_seconds"))
        peak = max(turn[part]["peak_bytes"] for turn in turns)
        figures[part] = {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}
        name = {"ours": "evaluation.inception", "torch": f"pytorch-fid, batches of {args.batch_size}"}[part]
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {count / seconds:.1f} | {peak / 2**30:.2f} GiB |")
    if "torch" in parts:
        for key, what in (("seconds", "time"), ("cpu_seconds", "CPU time")):
            ratios = [turn["ours"][key] / turn["torch"][key] for turn in turns]
            figures[f"{key}_ratios"] = ratios
            middle, spread = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{what} against PyTorch: {middle:.2f} (of the turns: {spread})")
        print(f"largest difference of the features: {difference:.1e} of the largest feature")
        figures["difference"] = difference
    return figures


PARTS = {"features": features, "metrics": lambda args: evaluate_metrics.metrics(args, __file__)}
WORK = {"features": work, "metrics": evaluate_metrics.work}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="[all]")
    parser.add_argument("--images", type=int, default=500, help="whose features are taken, in all turns [%(default)s]")
    parser.add_argument("--image_size", type=int, default=256, help="pixels [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=50, help="of pytorch-fid, whose own is [%(default)s]")
    names = evaluate_metrics.METRICS
    parser.add_argument("--metrics", nargs="+", choices=names, default=names, help="[all]")
    parser.add_argument("--num_samples", type=int, default=50000, help="made-up features [%(default)s]")
    parser.add_argument("--num_reference", type=int, default=50000, help="made-up features [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--turns", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--torch_python", metavar="PYTHON", help="with pytorch-fid, torch-fidelity [none]")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        part, who = args.worker[0].split()
        return WORK[part](who, json.loads(args.worker[1]))
    least = {"images": 1, "image_size": 1, "batch_size": 1, "threads": 1, "turns": 1}
    for name, smallest in {**least, "num_samples": 1000, "num_reference": 1000}.items():
        if getattr(args, name) < smallest:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {smallest} or more")
    figures = {part: PARTS[part](args) for part in args.parts}
    if args.output:
        write_json(args.output, {"load_average": os.getloadavg(), "threads": args.threads, **figures})
        print(f"figures: {args.output}")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        if not any(word.endswith(" torch") for word in sys.argv):
            configure_runtime()
        main()
    else:
        run_cli(main)
