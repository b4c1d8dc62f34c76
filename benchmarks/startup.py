"""Measures how long a command takes to answer, to import, and to reach its first training step or its first image.

- help: every command of the project with `--help`: the scripts in the repository's root, in tools/ and benchmarks/, and
  the shell scripts. The goal is two seconds.
- import: Paddle, this project's networks and what the Trainer and the autoencoders need, one after the other in one
  process: each beyond those before it. `models` may take 0.2 s beyond Paddle.
- first: from the start of the process to the first step that is logged, by both loops, and to the PNG of
  infer_demo_dit.py: the digits' network, a tiny packed set, two sampling steps.

All are started in turn, several times, in processes of their own, with the files in the system's cache; medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.commands import commands, help_command  # noqa: E402

from benchmarks.turns import answer, ask, timed  # noqa: E402

PARTS = ("help", "import", "first")
HELP_GOAL, IMPORT_GOAL = 2.0, 0.2  # seconds
IMPORTS = ("paddle", "models", "objectives", "paddlenlp.trainer", "ppdiffusers")
CONFIG = "config/DiT_digits.json"
STAGES = ("Python and flags", "import paddle", "other imports", "config and data", "network, optimizer, log", "step 1")


# ---------------------------------------------------------------------------------------------------------------------
# --help
# ---------------------------------------------------------------------------------------------------------------------


def time_help(command):
    """Returns the seconds until a command has printed its help and ended."""
    seconds, done = timed(help_command(command))
    if done.returncode or "usage:" not in done.stdout.lower():
        raise ValueError(f"{command} --help: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return seconds


def measure_help(turns):
    times = {command: [] for command in commands()}
    bare = []
    for _ in turns:
        bare.append(timed([sys.executable, "-c", "pass"])[0])
        for command, seconds in times.items():
            seconds.append(time_help(command))
    rows = [{"command": command, "seconds": statistics.median(seconds)} for command, seconds in times.items()]
    rows.sort(key=lambda row: -row["seconds"])
    print("\n| --help of | seconds |\n| --- | --- |")
    for row in [*rows, {"command": "(Python alone)", "seconds": statistics.median(bare)}]:
        print(f"| {row['command']} | {row['seconds']:.2f} |")
    slow = [row["command"] for row in rows if row["seconds"] > HELP_GOAL]
    print(f"{len(rows)} commands, {len(slow)} above {HELP_GOAL:g} s{': ' if slow else ''}{', '.join(slow)}")
    return {"python": statistics.median(bare), "commands": rows}


# ---------------------------------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------------------------------


def import_worker(names):
    """Imports modules in this process, one after the other; prints `[[seconds, new modules], ...]`."""
    from runtime.process import configure_runtime

    configure_runtime()
    rows = []
    for name in names:
        before, start = len(sys.modules), time.perf_counter()
        __import__(name)
        rows.append([time.perf_counter() - start, len(sys.modules) - before])
    answer(rows)


def measure_imports(turns):
    runs, rows = [ask(__file__, "import", *IMPORTS) for _ in turns], []
    print("\n| import of, beyond those above | seconds | of paddle's | modules |\n| --- | --- | --- | --- |")
    for index, name in enumerate(IMPORTS):
        row = {"module": name, "seconds": statistics.median(run[index][0] for run in runs)}
        row["of_paddle"] = statistics.median(run[index][0] / run[0][0] for run in runs)
        row["modules"] = runs[0][index][1]
        rows.append(row)
        print(f"| {name} | {row['seconds']:.3f} | {row['of_paddle']:.3f} | {row['modules']} |")
        if name == "models" and row["seconds"] > IMPORT_GOAL:
            print(f"models is above {IMPORT_GOAL:g} s")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The first step and the first image
# ---------------------------------------------------------------------------------------------------------------------


def first_step_worker(loop, started, arguments):
    """Runs a training loop in this process, and writes down when it passes from one stage to the next."""
    from runtime import process
    from runtime.process import configure_runtime, exit_now

    marks = {}

    def mark(stage):
        marks.setdefault(stage, time.perf_counter() - started)

    def at(owner, name, stage, after=False):
        function = getattr(owner, name)

        def marked(*args, **options):
            if not after:
                mark(stage)
            result = function(*args, **options)
            if after:
                mark(stage)
            return result

        setattr(owner, name, marked)

    at(process, "seed_step", STAGES[4])
    configure_runtime()
    mark(STAGES[0])
    import paddle  # noqa: F401 (timed)

    mark(STAGES[1])
    from training import metrics, setup

    at(setup, "setup_precision", STAGES[2])
    at(setup, "build_network", STAGES[3])
    at(metrics.TrainingLog, "report", STAGES[5], after=True)
    script = __import__(f"train_image_generation_{loop}")
    sys.argv = [script.__file__, *arguments]
    script.main()
    answer([marks[stage] for stage in STAGES])
    exit_now(0)


def measure_first(turns, folder):
    from support.runs import loop_arguments

    from benchmarks.data import write_packed

    features = os.path.join(folder, "set")
    write_packed(features, 10, (4, 4, 4))  # latents of the digits' size, one a class
    own_flags = {  # where the loops' flags have other names
        "trainer": ["--resolution=256", "--dataloader_num_workers=1"],
        "notrainer": ["--image_size=256", "--num_workers=1"],
    }
    demo = [sys.executable, "infer_demo_dit.py", "--vae", "assets/digits_vae", "--classes", "3", "--device", "cpu"]
    demo += ["--num_inference_steps", "2"]
    times = {"trainer": [], "notrainer": [], "infer_demo_dit.py": []}
    for turn in turns:
        for loop, flags in own_flags.items():
            output = os.path.join(folder, f"{loop}-{turn}")
            arguments = loop_arguments(loop, config=CONFIG, features=features, output=output, steps=1) + flags
            ends = ask(__file__, "first", loop, time.perf_counter(), *arguments)  # a clock that all processes share
            times[loop].append([end - start for start, end in zip([0, *ends], ends, strict=False)])
        checkpoint, png = (os.path.join(folder, name) for name in (f"trainer-{turn}/checkpoint-1", f"{turn}.png"))
        seconds, done = timed([*demo, "--model_path", checkpoint, "--output", png])
        if not os.path.isfile(png):
            raise ValueError(f"infer_demo_dit.py: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
        times["infer_demo_dit.py"].append([seconds])
    rows = []
    print(f"\n| to the first step or image | seconds | {' | '.join(STAGES)} |")
    print("| --- | --- |" + " --- |" * len(STAGES))
    for name, runs in times.items():
        row = {"command": name, "seconds": statistics.median(map(sum, runs))}
        if len(runs[0]) > 1:
            stages = [statistics.median(stage) for stage in zip(*runs, strict=True)]
            row["stages"] = dict(zip(STAGES, stages, strict=True))
        shown = [f"{seconds:.2f}" for seconds in row.get("stages", {}).values()] or ["-"] * len(STAGES)
        print(f"| {name} | {row['seconds']:.2f} | {' | '.join(shown)} |")
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def run(args):
    from tqdm import tqdm

    from runtime.files import write_json

    results = {}
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        for part in args.parts:
            turns = tqdm(range(args.turns), desc=part, unit="turn", leave=False)
            if part == "help":
                results[part] = measure_help(turns)
            elif part == "import":
                results[part] = measure_imports(turns)
            else:
                results[part] = measure_first(turns, folder)
            sys.stdout.flush()
    if args.output:
        write_json(args.output, results)
        print(f"figures: {args.output}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="[all]")
    parser.add_argument("--turns", type=int, default=3, help="times that each is started [%(default)s]")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args(argv)
    if args.turns < 1:
        raise ValueError(f"--turns {args.turns}: expected 1 or more")
    run(args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        kind, *words = sys.argv[2:]
        if kind == "import":
            import_worker(words)
        else:
            first_step_worker(words[0], float(words[1]), words[2:])
    else:
        from runtime.process import run_cli

        run_cli(main)
