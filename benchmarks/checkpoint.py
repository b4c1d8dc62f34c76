"""What checkpoints cost a training: its wait for a save, the time until it is on the disk, resuming, and converting.

- save: a training on random latents saves with CheckpointSaver, in the background and in the foreground in turn, and
  after each of them as many bytes are written to the same disk from memory and flushed, which is held against it.
  "wait": how long the loop is inside the save call; "whole": until the checkpoint has its name on the disk, for the
  background with training going on; "steps beside": steps during a save against steps without.
- load: what --resume does (choose, check every SHA-256, read, give it to network, averages and optimizer) against a
  plain read of the same files; from the system's cache, then with the files dropped from it.
- memory: the resident peak above what the training held before, in bytes of the checkpoint, each in a process of its
  own.
- tools: tools/extract_weights.py and the converter to a pipeline folder, in a process that has imported what they need,
  against reading and writing the bytes of the weights; and their peak above what that process held before.

The system's cache takes what is written until it is flushed, and disks write in bursts: figures of writing vary most.
`--work_dir` on a tmpfs shows what is left without a disk.
"""

import argparse
import contextlib
import ctypes
import gc
import glob
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import time

import _root  # noqa: F401 (the project's root, on sys.path)

from benchmarks.data import drop_cache, read_plain
from benchmarks.turns import answer, ask, memory, reset_peak
from config.schema import load_config
from runtime.files import write_json
from runtime.process import configure_runtime, run_cli

PARTS = ("save", "load", "memory", "tools")
BLOCK = 1 << 24


class Training:
    """The hand-written loop's parts on random latents, without its data."""

    def __init__(self, config_file, batch_size):
        configure_runtime()
        import paddle

        from objectives import Batch, build_objective
        from runtime.paddle_private import master_weights
        from training import setup
        from training.optimizer import build_lr_scheduler, build_optimizer
        from training.supervision.number_watch import NumberWatch

        self.config = load_config(config_file)
        settings, shape = self.config["training"], self.config["model"]
        paddle.set_device("cpu")
        setup.setup_precision(settings, "cpu")
        self.model = setup.build_network(self.config)
        self.objective = build_objective(self.config)
        self.averages, self.watch = setup.build_averages(settings, self.model), NumberWatch(settings)
        self.lr_scheduler = build_lr_scheduler(settings, 1 << 20)
        self.optimizer = build_optimizer(self.model, settings, self.lr_scheduler, watch=self.watch)
        self.scaler = None
        x = paddle.randn([batch_size, shape["in_channels"], shape["sample_size"], shape["sample_size"]])
        self.batch = Batch(x, paddle.randint(0, shape["num_classes"], [batch_size]))
        self.masters, self.steps = master_weights, 0
        self.model.train()

    def step(self):
        """Runs a training step; returns its seconds."""
        start = time.perf_counter()
        self.steps += 1
        loss = self.objective.training_losses(self.model, self.batch)["loss"].mean()
        loss.backward()
        self.watch.add(loss.detach())
        self.watch.begin_update(self.steps, 1e-4)
        self.optimizer.step()
        self.watch.end_update(self.objective)
        self.optimizer.clear_grad()
        self.lr_scheduler.step()
        self.objective.end_step()
        for average in self.averages:
            average.update(self.model, self.masters(self.optimizer))
        return time.perf_counter() - start

    def progress(self):
        """Returns what `CheckpointSaver` asks for."""
        return {"global_step": self.steps, "samples_seen": self.steps * len(self.batch.x)}

    def save(self, folder, background):
        """Saves; returns `(seconds in the call, end)`, where `end` gives the seconds until it was whole, or None."""
        from training.checkpoints.saver import CheckpointSaver

        said, self.folder = [], os.path.dirname(folder)
        saver = CheckpointSaver(self, say=lambda text: said.append((time.perf_counter(), text)), background=background)
        start = time.perf_counter()
        saver.save(folder)
        waited = time.perf_counter() - start

        def end(wait=False):
            if wait:
                saver.finish()
            if wait and not os.path.isfile(os.path.join(folder, "manifest.json")):
                raise ValueError(f"{folder} is not saved: {said}")
            return said[-1][0] - start if said and said[-1][1].startswith("saved") else None

        return waited, end

    def resume(self, folder):
        """Restores this training as --resume does."""
        from training.checkpoints.experiment import open_checkpoint
        from training.checkpoints.state import restore_model, restore_training

        checkpoint = open_checkpoint(folder, self.config)
        restore_model(checkpoint, self.model, self.averages)
        restore_training(checkpoint, self)


def files_of(folder):
    return sorted(path for path in glob.glob(os.path.join(folder, "**"), recursive=True) if os.path.isfile(path))


def bytes_of(folder):
    return sum(map(os.path.getsize, files_of(folder)))


def write_plain(path, size, buffer, flush=True):
    """Writes `size` bytes one after the other, flushes them to the disk and deletes them; returns the seconds."""
    start, left = time.perf_counter(), size
    with open(path, "wb", buffering=0) as file:
        while left > 0:
            left -= file.write(buffer[: min(left, len(buffer))])
        if flush:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    os.unlink(path)
    os.sync()
    return seconds


def warm_up(path, size, buffer):
    """Takes the memory that a file of this size needs in the system's cache, and gives it back.

    In a virtual machine memory that was not in use for long comes from the host, many times as slowly.
    """
    write_plain(path, size, buffer, flush=False)


def save_worker(args, folder):
    training, buffer = Training(args.config_file, args.batch_size), memoryview(os.urandom(BLOCK))
    for _ in range(2):
        training.step()
    training.save(os.path.join(folder, "0"), background=False)[1](wait=True)  # warm
    size, rounds = bytes_of(os.path.join(folder, "0")), []
    plain_path = os.path.join(folder, "plain")
    for number in range(1, args.turns + 1):
        shutil.rmtree(os.path.join(folder, str(number - 1)))
        alone = [training.step() for _ in range(2)]
        warm_up(plain_path, size, buffer)
        place = os.path.join(folder, str(number))
        waited, end = training.save(place, background=True)
        beside = []
        while end() is None:
            beside.append(training.step())
        row = {"step": statistics.median(alone), "background wait": waited, "background whole": end(wait=True)}
        row["steps beside"] = statistics.median(beside) / row["step"] if beside else None
        warm_up(plain_path, size, buffer)
        row["plain after background"] = write_plain(plain_path, size, buffer)
        shutil.rmtree(place)
        warm_up(plain_path, size, buffer)
        waited, end = training.save(place, background=False)
        row.update({"foreground wait": waited, "foreground whole": end(wait=True)})
        warm_up(plain_path, size, buffer)
        row["plain after foreground"] = write_plain(plain_path, size, buffer)
        rounds.append(row)
    answer({"bytes": size, "rounds": rounds})


def load_worker(args, folder):
    from weights.runs import damage

    training = Training(args.config_file, 1)
    training.step()
    place = os.path.join(folder, "1")
    training.save(place, background=False)[1](wait=True)
    files, rounds = files_of(place), []
    for cold in (False, True):
        for repeat in range(args.turns + 1):
            row = {"cold": cold}
            for name, do in (
                ("plain read", lambda: read_plain(files, 0)),
                ("checksums", lambda: damage(place, required=(), checksums=True)),
                ("resume", lambda: training.resume(place)),
            ):
                if cold and not drop_cache(files):
                    continue
                start = time.perf_counter()
                do()
                row[name] = time.perf_counter() - start
            if repeat:
                rounds.append(row)
    answer({"bytes": sum(map(os.path.getsize, files)), "rounds": rounds})


def memory_worker(args, folder, kind):
    training = Training(args.config_file, 1)
    for _ in range(2):
        training.step()
    place = os.path.join(folder, "1")
    if kind == "resume":
        training.save(place, background=False)[1](wait=True)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what steps and saves have given back is no room for what is measured
    before = memory("VmRSS")
    reset_peak()
    if kind == "resume":
        training.resume(place)
    else:
        training.save(place, background=kind == "background")[1](wait=True)
    answer({"bytes": bytes_of(place), "above": memory("VmHWM") - before})


def checkpoint_worker(args, folder):
    """Saves a checkpoint, for the tools."""
    training = Training(args.config_file, 1)
    training.step()
    training.save(folder, background=False)[1](wait=True)
    answer(training.config["model"]["type"])


def tool_worker(args, folder, kind):
    checkpoint = os.path.join(folder, "1")
    model_type = ask(__file__, "checkpoint", args.config_file, 1, 1, checkpoint)
    configure_runtime()
    import paddle  # noqa: F401 (before the tool is timed)

    if kind == "extract":
        from tools import extract_weights as tool

        flags = ["--model_file", checkpoint, "--checkpoint_path", os.path.join(folder, "extracted.pdparams")]
        flags += ["--save_ema", "True"]
    else:
        from features.autoencoder import load_vae
        from sampling.pipelines import export, export_large_dit  # noqa: F401 (and ppdiffusers)

        tool = importlib.import_module(f"tools.convert_{'sit' if 'SiT' in model_type else 'dit'}_to_ppdiffusers")
        flags = ["--model_weights", checkpoint, "--checkpoint_path", os.path.join(folder, "pipeline")]
        flags += ["--vae_model", "assets/digits_vae"]
        load_vae("assets/digits_vae")
    averages, buffer = os.path.join(checkpoint, "ema_state.pdparams"), memoryview(os.urandom(BLOCK))
    size, rounds, above, plain_path = os.path.getsize(averages), [], None, os.path.join(folder, "plain")
    for _ in range(args.turns):
        before = memory("VmRSS")
        reset_peak()
        start = time.perf_counter()
        tool.main([*flags, "--overwrite"])
        rounds.append({"seconds": time.perf_counter() - start})
        above = memory("VmHWM") - before if above is None else above  # later ones find what this one has given back
        warm_up(plain_path, size, buffer)
        start = time.perf_counter()
        read_plain([averages], 0)
        rounds[-1]["plain"] = time.perf_counter() - start + write_plain(plain_path, size, buffer)
    answer({"tool": os.path.basename(tool.__file__), "bytes": size, "above": above, "rounds": rounds})


def worker(kind, args, folder, *more):
    return ask(__file__, kind, args.config_file, args.batch_size, args.turns, folder, *more)


def median_of(rounds, name, beside=None):
    """Returns the median of a column, or of its ratio to another one."""
    values = [row[name] / row[beside] if beside else row[name] for row in rounds if row.get(name) is not None]
    return statistics.median(values) if values else float("nan")


def save(args, folder):
    found = worker("save", args, folder)
    rounds, size = found["rounds"], found["bytes"]
    step, rows = median_of(rounds, "step"), []
    print(f"\nsave: {size / 1e6:.0f} MB, a step takes {step:.2f} s at batch {args.batch_size}\n")
    print("| save | wait | of a step | whole | MB/s | of a plain write's time | steps beside |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind in ("background", "foreground"):
        row = {"save": kind, "wait_s": median_of(rounds, f"{kind} wait"), "whole_s": median_of(rounds, f"{kind} whole")}
        row["of_step"] = median_of(rounds, f"{kind} wait", "step")
        row["of_plain_write"] = median_of(rounds, f"{kind} whole", f"plain after {kind}")
        row["steps_beside"] = median_of(rounds, "steps beside") if kind == "background" else None
        beside = f"{row['steps_beside']:.2f}" if row["steps_beside"] else "-"
        print(
            f"| {kind} | {row['wait_s']:.3f} s | {row['of_step']:.2f} | {row['whole_s']:.2f} s | "
            f"{size / row['whole_s'] / 1e6:.0f} | {row['of_plain_write']:.2f} | {beside} |"
        )
        rows.append(row)
    return {"bytes": size, "step_s": step, "rows": rows, "rounds": rounds}


def load(args, folder):
    found = worker("load", args, folder)
    rows = []
    print(f"\nload: {found['bytes'] / 1e6:.0f} MB\n\n| cache | what | seconds | of a plain read's time |")
    print("| --- | --- | --- | --- |")
    for cold in (False, True):
        rounds = [row for row in found["rounds"] if row["cold"] == cold and "resume" in row]
        for name in ("plain read", "checksums", "resume") if rounds else ():
            row = {"cache": "cold" if cold else "warm", "what": name, "seconds": median_of(rounds, name)}
            row["of_plain_read"] = median_of(rounds, name, "plain read")
            print(f"| {row['cache']} | {name} | {row['seconds']:.3f} | {row['of_plain_read']:.2f} |")
            rows.append(row)
    return {"bytes": found["bytes"], "rows": rows}


def peaks(args, folder):
    print("\n| memory | peak above | of the checkpoint |\n| --- | --- | --- |")
    rows = []
    for kind in ("background", "foreground", "resume"):
        found = worker("memory", args, tempfile.mkdtemp(dir=folder), kind)
        rows.append({"what": kind, "above": found["above"], "of_checkpoint": found["above"] / found["bytes"]})
        print(f"| {kind} | {found['above'] / 1e6:.0f} MB | {rows[-1]['of_checkpoint']:.2f} |", flush=True)
    return rows


def tools(args, folder):
    rows = []
    print("\n| tool | seconds | of a plain read and write's time | peak above, of the weights |")
    print("| --- | --- | --- | --- |")
    for kind in ("extract", "convert"):
        found = worker("tool", args, tempfile.mkdtemp(dir=folder), kind)
        rounds, size = found["rounds"], found["bytes"]
        row = {"tool": found["tool"], "bytes": size, "seconds": median_of(rounds, "seconds")}
        row.update(of_plain=median_of(rounds, "seconds", "plain"), above_of_weights=found["above"] / size)
        rows.append(row)
        print(
            f"| {row['tool']} | {row['seconds']:.2f} | {row['of_plain']:.1f} | {row['above_of_weights']:.2f} |",
            flush=True,
        )
    return rows


def run(args):
    load_config(args.config_file)  # a mistake is reported here
    if args.work_dir:
        os.makedirs(args.work_dir, exist_ok=True)
    results = {}
    for part in args.parts:
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=args.work_dir) as folder:
            results[part] = {"save": save, "load": load, "memory": peaks, "tools": tools}[part](args, folder)
        sys.stdout.flush()
        if args.output:
            write_json(args.output, results)
    if args.output:
        print(f"figures: {args.output}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="[all]")
    parser.add_argument("--config_file", default="config/DiT_S_patch4.json", help="whose network [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=16, help="of the steps beside the saves [%(default)s]")
    parser.add_argument("--turns", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--work_dir", help="on the disk to measure [the system's temporary folder]")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args(argv)
    for name in ("batch_size", "turns"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 1 or more")
    run(args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        kind, config_file, batch_size, turns, folder, *more = sys.argv[2:]
        settings = argparse.Namespace(config_file=config_file, batch_size=int(batch_size), turns=int(turns))
        globals()[f"{kind}_worker"](settings, folder, *more)
    else:
        run_cli(main)
