"""A part of benchmarks/evaluate.py: seconds and memory of the metrics, without the networks, against torch-fidelity's.

Two processes hold the same made-up features (2048 numbers a row) and logits (1008), and take turns (A B A B), so that
what else the machine does falls on both. "of torch-fidelity's time" is the median over the turns. Timed is all the work
between features and number:

- fid: mean and covariance of both sets, and their distance.
- inception_score: from the samples' logits; 10 splits.
- kid: 100 subsets of 1000.
- precision_recall: k = 3. torch-fidelity holds all distances at once where they fit in 4 GiB, else it works in parts
  (its option save_cpu_ram).
- mind: 1000 directions; torch-fidelity 0.4.0 hasn't got it.

Peak memory is that of the process, its features included.
"""

import statistics
import sys
import time

import numpy as np
from tqdm import tqdm

from benchmarks.turns import Worker, memory, reset_peak, serve

DIM, CLASSES, SPLITS = 2048, 1008, 10
METRICS = ("fid", "inception_score", "kid", "precision_recall", "mind")


def made_up(case):
    """Returns features of the samples and the reference, and the samples' logits."""
    rng = np.random.default_rng(0)
    samples, reference = (
        rng.standard_normal((case[name], DIM), dtype="float32") for name in ("num_samples", "num_reference")
    )
    reference += np.float32(0.02)
    return samples, reference, 2 * rng.standard_normal((case["num_samples"], CLASSES), dtype="float32")


def ours(case):
    """Returns the metrics by name, functions without arguments that return a number or several."""
    from evaluation import metrics
    from evaluation.statistics import Statistics

    samples, reference, logits = made_up(case)

    def fid():
        moments = []
        for features in (samples, reference):
            found = Statistics(DIM)
            found.add(features)
            moments += [found.mean, found.covariance]
        return metrics.frechet_distance(*moments)

    return {
        "fid": fid,
        "inception_score": lambda: metrics.inception_score(metrics.softmax(logits), -(-len(logits) // SPLITS)),
        "kid": lambda: metrics.kernel_distance(samples, reference),
        "precision_recall": lambda: metrics.precision_recall(reference, samples),
        "mind": lambda: metrics.mind(samples, reference),
    }


def torch_fidelity(case):
    """Returns what `ours` does, of torch-fidelity."""
    import torch
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    torch.set_num_threads(case["threads"])
    samples, reference, logits = map(torch.from_numpy, made_up(case))
    n, m = len(samples), len(reference)
    parts = 4 * (n * n + m * m + n * m) > 4 << 30

    def fid():
        found = [metric_fid.fid_features_to_statistics(features) for features in (samples, reference)]
        return metric_fid.fid_statistics_to_metric(*found, False)[metric_fid.KEY_METRIC_FID]

    def kid():
        found = metric_kid.kid_features_to_metric(samples, reference, verbose=False)
        return found[metric_kid.KEY_METRIC_KID_MEAN]

    def precision_recall():
        found = metric_prc.prc_features_to_metric(samples, reference, save_cpu_ram=parts, verbose=False)
        return [found["precision"], found["recall"]]

    return {
        "fid": fid,
        "inception_score": lambda: metric_isc.isc_features_to_metric(logits)[metric_isc.KEY_METRIC_ISC_MEAN],
        "kid": kid,
        "precision_recall": precision_recall,
    }


def work(part, case):
    """Serves one process's turns: a metric's name gives seconds, processor seconds, value and peak memory."""
    found = {"ours": ours, "torch": torch_fidelity}[part](case)

    def turn(name):
        if name not in found:
            return None
        reset_peak()
        start, cpu = time.perf_counter(), time.process_time()
        value = found[name]()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu, "value": value, "peak_bytes": memory("VmHWM")}

    serve(turn)


def metrics(args, script):
    """Prints the table of metrics; returns its rows. `script` is what the processes run."""
    case = {"threads": args.threads, "num_samples": args.num_samples, "num_reference": args.num_reference}
    workers = {"ours": Worker(sys.executable, script, "metrics ours", case)}
    rows = []
    try:
        if args.torch_python:
            workers["torch"] = Worker(args.torch_python, script, "metrics torch", case)
        for name in args.metrics:
            turns = []
            for _ in tqdm(range(args.turns), desc=name):
                turns.append({part: worker.ask(name) for part, worker in workers.items()})
            row = {"metric": name, "turns": turns}
            if turns[0].get("torch"):
                row["of_torch"] = statistics.median(t["ours"]["seconds"] / t["torch"]["seconds"] for t in turns)
            rows.append(row)
    finally:
        for worker in workers.values():
            worker.close()
    report(rows)
    return {"rows": rows}


def report(rows):
    print("| metric | seconds | torch-fidelity's | of torch-fidelity's time | peak memory | torch-fidelity's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        seconds, peak = {}, {}
        for part in ("ours", "torch"):
            found = [turn[part] for turn in row["turns"] if turn.get(part)]
            seconds[part] = f"{statistics.median(turn['seconds'] for turn in found):.2f}" if found else "-"
            peak[part] = f"{max(turn['peak_bytes'] for turn in found) / 1e9:.2f} GB" if found else "-"
        ratio = f"{row['of_torch']:.2f}" if "of_torch" in row else "-"
        print(
            f"| {row['metric']} | {seconds['ours']} | {seconds['torch']} | {ratio} | {peak['ours']} | {peak['torch']} |"
        )
