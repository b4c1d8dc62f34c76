"""How fast features are loaded, what a training step waits for them, and what they cost in memory and at the start.

A set of random latents 4x32x32 is written as pairs of .npy files, packed by tools/pack_features.py, and read

- as the reference does: one np.load of a latent and one of a label a sample, Paddle's DataLoader with 2 workers,
- by FeatureLoader, shuffled, from pairs, packed and from memory, as tensors in batches,
- by FeatureDataset.read, the same without tensors,
- by a plain sequential read of the packed files in blocks of 1 MiB, which all else is held against.

The ways are timed in turn, each right after a plain read, several times with the files in the system's cache ("warm");
the medians of the ratios are reported, also in CPU time, which other programs disturb less. Then once without ("cold":
the cache is asked to drop the files, which a virtual machine's host may still hold). The wait is
measured in the real training step of a config, the start and the memory on a set of ImageNet's size, each in a process
of its own.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from runtime.files import write_json  # noqa: E402
from runtime.process import configure_runtime, run_cli  # noqa: E402

configure_runtime()  # before Paddle is imported

SHAPE = (4, 32, 32)
NUM_CLASSES = 1000
NAME = "imagenet256"
PARTS = ("throughput", "wait", "start")


# ---------------------------------------------------------------------------------------------------------------------
# Sets
# ---------------------------------------------------------------------------------------------------------------------


def write_pairs(folder, count, *, whole=True):
    """Writes random latents as pairs of files; with `whole` false only the first has content, the others are names."""
    import numpy as np
    from tqdm import tqdm

    from features.packed import npy_header

    features, labels = (os.path.join(folder, f"{NAME}_{kind}") for kind in ("features", "labels"))
    os.makedirs(features)
    os.makedirs(labels)
    head, label_head = npy_header((1, *SHAPE), "float32"), npy_header((1,), "int64")
    rng = np.random.default_rng(0)
    for index in tqdm(range(count), desc="pairs", unit="sample"):
        full = whole or index == 0
        with open(os.path.join(features, f"{index}.npy"), "wb") as file:
            if full:
                file.write(head + rng.standard_normal(SHAPE, "float32").tobytes())
        with open(os.path.join(labels, f"{index}.npy"), "wb") as file:
            if full:
                file.write(label_head + np.int64(index % NUM_CLASSES).tobytes())


def write_packed(folder, count, shape):
    """A packed set of zeros in shards as tools/pack_features.py would make them for `SHAPE`."""
    import numpy as np

    from features.layout import Layout
    from features.packed import ShardWriter, finish

    partial, shard_samples = Layout(folder, NAME).partial, (1 << 32) // (4 * int(np.prod(SHAPE)))
    for number, start in enumerate(range(0, count, shard_samples)):
        size = min(shard_samples, count - start)
        with ShardWriter(partial, number, row_shape=shape) as shard:
            names = [str(index) for index in range(start, start + size)]
            shard.append(np.zeros((size, *shape), "float32"), np.arange(start, start + size) % NUM_CLASSES, names)
    finish(folder, NAME)


def open_set(folder, shape=SHAPE):
    from features.dataset import FeatureDataset

    return FeatureDataset(folder, sample_shape=shape, num_classes=NUM_CLASSES)


def packed_files(folder):
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if name in ("latents.npy", "labels.npy")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Ways of reading; each returns the number of samples
# ---------------------------------------------------------------------------------------------------------------------


class OneByOne:
    """The reference's dataset: a pair of files a sample, in the order of the file names as text."""

    def __init__(self, folder, count):
        self.features, self.labels = (os.path.join(folder, f"{NAME}_{kind}") for kind in ("features", "labels"))
        self.names = sorted(os.listdir(self.features))[:count]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        import numpy as np

        features = np.load(os.path.join(self.features, self.names[index]))
        labels = np.load(os.path.join(self.labels, self.names[index]))
        return features[0], labels[0]


def read_reference(folder, count, batch_size):
    from paddle.io import DataLoader

    seen = 0
    for x, _ in DataLoader(OneByOne(folder, count), batch_size=batch_size, num_workers=2, drop_last=True):
        seen += x.shape[0]
    return seen


def make_sampler(data, batch_size, count):
    from features.order import MicroBatchSampler

    return MicroBatchSampler(
        len(data),
        global_batch_size=batch_size,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=0,
        last_step=count // batch_size,
    )


def read_loader(data, count, batch_size, num_workers):
    from features.loader import FeatureLoader

    seen = 0
    for x, _ in FeatureLoader(data, make_sampler(data, batch_size, count), num_workers=num_workers):
        seen += x.shape[0]
    return seen


def read_arrays(data, count, batch_size):
    seen = 0
    for indices, positions in make_sampler(data, batch_size, count).batches():
        seen += len(data.read(indices, positions)[0])
    return seen


def read_plain(files, count):
    block = memoryview(bytearray(1 << 20))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return count


def drop_cache(files):
    """Asks the system to forget the files; True if it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


PLAIN = "plain sequential read, 1 MiB blocks"
REFERENCE = "reference: np.load pairs, DataLoader, 2 workers"


def timed(function, *arguments):
    """`(samples a second, samples a second of this process's CPU time)`."""
    start, cpu = time.perf_counter(), time.process_time()
    seen = function(*arguments)
    return seen / (time.perf_counter() - start), seen / (time.process_time() - cpu)


def throughput(pairs, packed, args):
    """Rows of the table: samples a second by way of reading, and shares of the plain read just before."""
    count, batch = args.samples, args.batch_size
    slow = min(count, args.slow_samples)
    files = packed_files(packed)
    of_pairs, of_packed = open_set(pairs), open_set(packed)
    # name: whether this process does all of it, function, arguments
    ways = {
        REFERENCE: (False, read_reference, pairs, slow, batch),
        "FeatureLoader, pairs, 2 workers": (False, read_loader, of_pairs, slow, batch, 2),
        "FeatureLoader, packed, num_workers 1": (False, read_loader, of_packed, count, batch, 1),
        "FeatureLoader, packed, num_workers 0": (True, read_loader, of_packed, count, batch, 0),
        f"the same, batch {args.large_batch_size}": (True, read_loader, of_packed, count, args.large_batch_size, 0),
        "FeatureDataset.read, packed": (True, read_arrays, of_packed, count, batch),
        "FeatureDataset.read, memory": (True, read_arrays, of_packed.in_memory(), count, batch),
    }
    rates = {name: [] for name in (PLAIN, *ways)}
    shares, cpu_shares = {name: [] for name in ways}, {name: [] for name in ways}
    for repeat in range(args.repeats + 1):
        for name, (alone, *way) in ways.items():
            plain, plain_cpu = timed(read_plain, files, count)
            rate, cpu = timed(*way)
            if repeat:  # the first round warms up
                rates[PLAIN].append(plain)
                rates[name].append(rate)
                shares[name].append(rate / plain)
                cpu_shares[name] += [cpu / plain_cpu] if alone else []
    rows = [{"way": PLAIN, "cache": "warm", "rates": rates[PLAIN]}]
    for name in ways:
        rows.append({"way": name, "cache": "warm", "rates": rates[name], "of_plain": statistics.median(shares[name])})
        rows[-1]["times_reference"] = statistics.median(
            rate / slow for rate, slow in zip(rates[name], rates[REFERENCE], strict=True)
        )
        if cpu_shares[name]:
            rows[-1]["of_plain_cpu"] = statistics.median(cpu_shares[name])
    if drop_cache(files):
        plain = timed(read_plain, files, count)[0]
        rows.append({"way": PLAIN, "cache": "cold", "rates": [plain]})
        for name, exact in (("FeatureDataset.read, packed", False), ("the same, a set larger than the memory", True)):
            drop_cache(files)
            data = open_set(packed)
            if exact:
                data.store.read_exactly()
            # The loader's thread reads several micro-batches at a time.
            rate = timed(read_arrays, data, count, max(batch, 256))[0]
            rows.append({"way": name, "cache": "cold", "rates": [rate], "of_plain": rate / plain})
    return rows


def waiting(folder, num_workers, args):
    """`(seconds a step, seconds of it that the loop waits for data)` of the real training step, medians and mean."""
    import paddle

    from config.schema import load_config
    from features.loader import FeatureLoader
    from objectives import Batch, Rows, build_objective
    from runtime.process import resolve_device
    from training import setup
    from training.optimizer import build_lr_scheduler, build_optimizer

    paddle.set_device(resolve_device(args.device))
    config = load_config(args.config_file)
    config["training"]["recompute"] = False
    model, objective = setup.build_network(config), build_objective(config)
    averages = setup.build_averages(config["training"], model)
    optimizer = build_optimizer(model, config["training"], build_lr_scheduler(config["training"], args.steps))
    data = open_set(folder)
    sampler = make_sampler(data, args.batch_size, (args.steps + 2) * args.batch_size)
    batches = iter(FeatureLoader(data, sampler, num_workers=num_workers))
    model.train()
    waits, steps = [], []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        x, y = next(batches)
        arrived = time.perf_counter()
        loss = objective.training_losses(model, Batch(x, y), Rows(0, args.batch_size, args.batch_size))["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        for average in averages:
            average.update(model)
        float(loss)
        waits.append(arrived - start)
        steps.append(time.perf_counter() - start)
    batches.close()
    return statistics.median(steps[2:]), sum(waits[2:]) / args.steps


def own_memory():
    """`(this process's own memory, mapped file pages)` in bytes."""
    with open("/proc/self/status") as file:
        values = dict(line.split(":", 1) for line in file)
    return tuple(int(values[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))


def measure_open(folder, shape, epoch):
    """Opens a set in this process; returns seconds, and bytes of memory by what was done."""
    import features.loader  # noqa: F401

    before = own_memory()
    start = time.perf_counter()
    data = open_set(folder, shape)
    seconds = time.perf_counter() - start
    opened = own_memory()
    result = {"seconds": seconds, "samples": len(data), "index_bytes_a_sample": (opened[0] - before[0]) / len(data)}
    if epoch:
        for indices, positions in make_sampler(data, 256, len(data) // 256 * 256).batches():
            data.read(indices, positions)
        after = own_memory()
        result["after_epoch_bytes_a_sample"] = (after[0] - before[0]) / len(data)
        result["mapped_file_bytes"] = after[1] - opened[1]
        result["file_bytes"] = data.store.num_bytes
    return result


def in_own_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def start(work, args):
    """Opening sets of `args.start_samples`: packed, and pairs the first and the second time."""
    count, small = args.start_samples, (4, 2, 2)
    packed, pairs = os.path.join(work, "start_packed"), os.path.join(work, "start_pairs")
    write_packed(packed, count, small)
    write_pairs(pairs, count, whole=False)
    time.sleep(2.5)  # an index is only kept once the folders have been left alone for two seconds
    results = {
        "packed": in_own_process(measure_open, packed, small, True),
        "pairs, first start (lists the folders)": in_own_process(measure_open, pairs, SHAPE, False),
        "pairs, later starts (index)": in_own_process(measure_open, pairs, SHAPE, False),
    }
    shutil.rmtree(packed)
    shutil.rmtree(pairs)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def print_throughput(rows):
    print(
        f"{'':4} {'way':48} {'samples/s':>10} {'min..max':>17} {'of plain':>8} {'in CPU time':>11} {'x reference':>11}"
    )
    for row in rows:
        rates = row["rates"]
        values = [f"{row[key]:.0%}" if key in row else "" for key in ("of_plain", "of_plain_cpu")]
        times = f"{row['times_reference']:.1f}" if "times_reference" in row else ""
        spread = f"{min(rates):,.0f}..{max(rates):,.0f}" if len(rates) > 1 else ""
        median = statistics.median(rates)
        print(
            f"{row['cache']:4} {row['way']:48} {median:10,.0f} {spread:>17} {values[0]:>8} {values[1]:>11} {times:>11}"
        )


def run(args):
    for key in ("samples", "slow_samples", "batch_size", "large_batch_size", "repeats", "steps", "start_samples"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key} {getattr(args, key)}: expected 1 or more")
    if max(args.batch_size, args.large_batch_size) > min(args.samples, args.slow_samples):
        raise ValueError("--batch_size and --large_batch_size: expected no more than the samples")
    for part in args.parts:
        if part not in PARTS:
            raise ValueError(f"--parts {part}: expected some of {', '.join(PARTS)}")
    work = tempfile.mkdtemp(prefix="bench_data_", dir=args.work_dir)
    print(f"working in {work}, which is removed at the end", flush=True)
    report = {"arguments": vars(args), "cores": os.cpu_count(), "load_average_before": os.getloadavg()}
    try:
        pairs, packed = os.path.join(work, "pairs"), os.path.join(work, "packed")
        if {"throughput", "wait"} & set(args.parts):
            from tools.pack_features import main as pack

            write_pairs(pairs, args.samples)
            begin = time.perf_counter()
            pack(["--feature_path", pairs, "--output", packed])
            report["packing_samples_per_second"] = args.samples / (time.perf_counter() - begin)
            print(f"packed and compared: {report['packing_samples_per_second']:,.0f} samples/s", flush=True)
        if "throughput" in args.parts:
            report["throughput"] = throughput(pairs, packed, args)
            print_throughput(report["throughput"])
        if "wait" in args.parts:
            report["wait"] = []
            title = f"{os.path.basename(args.config_file)}, batch {args.batch_size}"
            print(f"{title:44} {'s/step':>8} {'wait ms':>8} {'share':>8}")
            for name, folder, workers in (("packed", packed, 1), ("packed", packed, 0), ("pairs", pairs, 1)):
                step, wait = waiting(folder, workers, args)
                report["wait"].append({"format": name, "num_workers": workers, "step_s": step, "wait_s": wait})
                report["wait"][-1]["share"] = wait / step
                print(
                    f"{f'{name}, num_workers {workers}':44} {step:8.3f} {wait * 1e3:8.2f} {wait / step:8.3%}",
                    flush=True,
                )
        if "start" in args.parts:
            report["start"] = start(work, args)
            print(f"{f'opening {args.start_samples:,} samples':44} {'seconds':>8} {'own bytes a sample':>19}")
            for name, result in report["start"].items():
                print(f"{name:44} {result['seconds']:8.3f} {result['index_bytes_a_sample']:19.1f}")
            result = report["start"]["packed"]
            mapped, size = (result[key] / 2**20 for key in ("mapped_file_bytes", "file_bytes"))
            own = result["after_epoch_bytes_a_sample"]
            print(
                f"packed, after an epoch: {own:.1f} own bytes a sample (label 4, place in the epoch's order 8); "
                f"{mapped:.0f} of {size:.0f} MiB mapped from the system's cache"
            )
        report["load_average_after"] = os.getloadavg()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(
        "load average before and after: "
        + ", ".join(f"{report[f'load_average_{k}'][0]:.1f}" for k in ("before", "after"))
    )
    if args.output:
        write_json(args.output, report)
        print(f"figures: {args.output}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), metavar="PART", help="some of %(default)s [all]")
    parser.add_argument("--samples", type=int, default=100_000, help="of the set [%(default)s]")
    parser.add_argument("--slow_samples", type=int, default=20_000, help="read one by one in each repeat [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=32, help="[%(default)s]")
    parser.add_argument(
        "--large_batch_size", type=int, default=256, help="of one row: that of the official train.py [%(default)s]"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of the warm measurements [%(default)s]")
    parser.add_argument("--config_file", default="config/DiT_S_patch4.json", help="of the training step [%(default)s]")
    parser.add_argument("--steps", type=int, default=20, help="training steps to time [%(default)s]")
    parser.add_argument("--device", default="auto", help="of the training steps: auto, cpu, gpu or gpu:N [auto]")
    parser.add_argument("--start_samples", type=int, default=1_280_000, help="of the sets to open [%(default)s]")
    parser.add_argument("--work_dir", help="folder for the sets, about 6 GB [the system's temporary folder]")
    parser.add_argument("--output", help="JSON file for the figures")
    run(parser.parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
