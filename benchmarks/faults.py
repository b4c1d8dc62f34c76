"""Shows what training survives: kills, damaged files, file systems that fail, ranks that hang or are gone.

- kills: a training that saves every two steps gets SIGKILL, in turn at any moment and inside a save (the harness waits
  for the folder `.N.partial` and then a random part of a save's time), and is started again, until it ends. After each
  kill every checkpoint that has its name must be whole, and none that was there may be lost; each restart must resume
  the newest; at the end weights, averages, optimizer, generators and losses must be those of an unbroken run, bit for
  bit. Both loops in turn, half of the runs with two loader processes, of which a kill must leave none.
- bitflips: one random bit of one file of the newest checkpoint is flipped: the one before must be resumed.
- full, readonly: the checkpoints' file system has no room (a small tmpfs), or becomes read-only and is mended. Training
  must go on, say so, and save again when it can. Needs the right to mount; readonly only if run by root.
- slow: writing is slowed down to so many bytes a second; training must go on meanwhile.
- ranks: SIGTERM, SIGINT, SIGSTOP and SIGKILL to one of two processes, SIGTERM to their launcher: how all of them end.
- fuzz: the mutated files of tests/support/mutations.py, many more than in the tests.

Trainings are forked from a process that has imported Paddle and computed nothing: a start takes half a second, not ten.
A kill is that of a process. It does not show what a power cut leaves on a disk.
"""

import argparse
import contextlib
import glob
import importlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests"), os.path.join(ROOT, "tests", "faults")]

from runtime.process import SAVING_THREAD, configure_runtime, exit_now, run_cli  # noqa: E402

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process must not miss the threads of its parent
configure_runtime()  # before Paddle is imported

PARTS = ("kills", "bitflips", "full", "readonly", "slow", "ranks", "fuzz")
LOOPS = ("trainer", "notrainer")
# Every file of a checkpoint is there: the timestep sampler has a state.
OBJECTIVE = {"timestep_sampler": "loss-second-moment", "diffusion_steps": 21}


# ---------------------------------------------------------------------------------------------------------------------
# Trainings
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """A training in `folder`, which is started as often as it takes.

    Args:
        output: where its output goes; `folder`/out if None.
    """

    def __init__(self, folder, loop, *, steps, save_every=2, output=None, flags=()):
        from support.runs import TINY_MODELS, loop_arguments, write_features

        self.folder, self.loop, self.steps = folder, loop, steps
        self.output = output or os.path.join(folder, "out")
        os.makedirs(folder, exist_ok=True)
        self.config = os.path.join(folder, "Small.json")
        model = {**TINY_MODELS["DiT"], "num_layers": 4, "attention_head_dim": 32}
        with open(self.config, "w") as file:
            json.dump({"model": model, "objective": OBJECTIVE, "training": {"ema_decay": 0.9}}, file)
        self.features = write_features(Path(folder) / "features")
        self.arguments = loop_arguments(
            loop,
            config=self.config,
            features=self.features,
            output=self.output,
            steps=steps,
            batch=4,
            save_every=save_every,
        )
        self.arguments += ["--resume=auto"] if loop == "notrainer" else []
        self.arguments += flags
        self.starts = 0

    @property
    def log(self):
        """The file that holds what the latest start has printed."""
        return os.path.join(self.folder, f"start-{self.starts:03d}.log")

    def printed(self):
        with contextlib.suppress(FileNotFoundError):  # killed before it was there
            with open(self.log, errors="replace") as file:
                return file.read()
        return ""

    def start(self, prepare=None):
        """Forks a process that trains, and calls `prepare()` first; returns its id."""
        self.starts += 1
        from tqdm import tqdm

        script = importlib.import_module(f"train_image_generation_{self.loop}")
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            os.setpgid(0, 0)
            tqdm.set_lock(threading.RLock())  # the parent's is one for all forked processes: killed, they would keep it
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = [script.__file__, *self.arguments]
            if prepare is not None:
                prepare()
            run_cli(script.main)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            exit_now(code)

    def finish(self, prepare=None):
        """Starts the training and waits for its end; returns the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(prepare), 0)[1])

    def train(self):
        """Trains without a break; raises if the run does not end well. Returns the run."""
        if code := self.finish():
            raise RuntimeError(f"a training ended with exit code {code}: {self.printed()[-2000:]}")
        return self

    def _places(self):
        return [self.output] if self.loop == "trainer" else glob.glob(os.path.join(self.output, "*", "checkpoints"))

    def checkpoints(self):
        """Returns `{step: path}` of what has a checkpoint's name."""
        paths = [path for place in self._places() for path in glob.glob(os.path.join(place, "*"))]
        names = {path: re.fullmatch(r"(?:checkpoint-)?(\d+)", os.path.basename(path)) for path in paths}
        return {int(name.group(1)): path for path, name in names.items() if name}

    def partial(self):
        """Returns the folders of checkpoints that are being written, deleted or replaced."""
        return [path for place in self._places() for path in _hidden(place)]

    def digests(self):
        """Returns the checksums of the last checkpoint's files."""
        with open(os.path.join(self.checkpoints()[self.steps], "manifest.json")) as file:
            return {name: entry["sha256"] for name, entry in json.load(file)["files"].items() if name != "config.json"}

    def losses(self):
        """Returns `{step: loss}`, of all experiment folders that restarts have made."""
        from support.runs import read_losses

        folders = sorted(glob.glob(os.path.join(self.output, "**", "metrics.jsonl"), recursive=True))
        losses = {}
        for path in folders:
            losses.update(read_losses(os.path.dirname(path)))
        return losses

    def damaged(self):
        """What is wrong with checkpoints that have their names: lines."""
        from weights.runs import damage

        wrong = {path: damage(path, checksums=True) for path in self.checkpoints().values()}
        return [f"{path}: {reason}" for path, reason in wrong.items() if reason]

    def differences(self, other):
        """Returns the names of files and steps that are not what `other` has, bit for bit."""
        mine, theirs = ({**run.digests(), **run.losses()} for run in (self, other))
        return [str(key) for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]

    def same_as(self, other):
        return not self.differences(other)


def _hidden(folder):
    with contextlib.suppress(OSError):
        return [os.path.join(folder, name) for name in os.listdir(folder) if re.fullmatch(r"\..*\d\.\w+", name)]
    return []


def _ended(process):
    """Returns the exit code of a process, or None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


@contextlib.contextmanager
def _quiet():
    """Collects what is printed inside, as the list's one item after it."""
    import io

    said, text = [], io.StringIO()
    with contextlib.redirect_stdout(text):
        yield said
    said.append(text.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------


def save_seconds(run):
    """Returns the median time that a checkpoint takes, seen from outside, and the seconds of the whole run."""
    begin, since, times = time.perf_counter(), None, []
    process = run.start()
    while (code := _ended(process)) is None:
        now, busy = time.perf_counter(), bool(run.partial())
        if busy and since is None:
            since = now
        elif not busy and since is not None:
            times.append(now - since)
            since = None
        time.sleep(0.001)
    if code:
        raise RuntimeError(f"a training ended with exit code {code}: {run.printed()[-2000:]}")
    return statistics.median(times), time.perf_counter() - begin


def kill_inside_a_save(run, process, rng, seconds):
    """Kills inside one of the next saves; returns the exit code if the training has ended before."""
    which, seen = rng.randint(1, 3), set()
    while len(seen) < which:
        if (code := _ended(process)) is not None:
            return code
        seen |= set(run.partial())
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, seconds))
    return kill(process)


def kill_anywhere(run, process, rng, seconds):
    """Kills after a random part of `seconds`; returns the exit code if the training has ended before."""
    time.sleep(rng.uniform(0, seconds))
    return kill(process)


def kill_if_there(process):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def kill(process):
    kill_if_there(process)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return None if code == -signal.SIGKILL else code


def left_alive(group):
    """Returns how many processes of a killed one's group live on after a second; they are killed then."""
    for _ in range(100):
        alive = []
        for path in glob.glob("/proc/[0-9]*/stat"):
            with contextlib.suppress(OSError):
                with open(path) as file:
                    state, _, its_group = file.read().rpartition(")")[2].split()[:3]
                if int(its_group) == group and state not in "ZX":
                    alive.append(path)
        if not alive:
            return 0
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    return len(alive)


def what_a_kill_left(run, newest):
    """Looks at a run's folder after a kill.

    Args:
        newest: the step of the newest checkpoint before.

    Returns:
        `(step that will be resumed, lines of what is wrong)`.
    """
    from training.checkpoints.find import pick_checkpoint
    from weights.runs import step_of

    wrong = run.damaged()
    expected = max([newest, *run.checkpoints()])
    with _quiet() as said:
        try:
            picked = pick_checkpoint(run.output)
        except ValueError as error:
            picked, wrong = None, [*wrong, str(error)]
    step = step_of(picked) if picked else 0
    if step < expected:
        wrong.append(f"lost: step {expected} was there, {step} is picked; {said[0]}")
    return step, wrong


def kills(args, folder):
    """Kills trainings of both loops in turn, `args.kills` times; returns the figures."""
    from tqdm import tqdm

    rng = random.Random(args.seed)
    references, figures = {}, {"kills": 0, "aimed_inside_a_save": 0, "found_inside_a_save": {}, "resumed": []}
    figures.update(runs=0, runs_equal=0, damaged_or_lost=[], wrong_resumes=[], failures=[], leftovers=0, orphans=0)

    def make(name, loop, workers=0):
        flags = ["--save_total_limit=3", f"--{'dataloader_' if loop == 'trainer' else ''}num_workers={workers}"]
        return Run(os.path.join(folder, name), loop, steps=args.steps, flags=flags)

    for loop in args.loops:
        run = make(f"unbroken-{loop}", loop)
        references[loop] = (run, *save_seconds(run))
        print(f"unbroken, {loop}: {references[loop][2]:.2f} s, a save {references[loop][1] * 1000:.0f} ms", flush=True)
    with tqdm(total=args.kills, unit="kill") as bar:
        while figures["kills"] < args.kills:
            loop = args.loops[figures["runs"] % len(args.loops)]
            reference, a_save, a_run = references[loop]
            run = make(f"run-{figures['runs']:03d}", loop, workers=2 * (figures["runs"] % 4 in (1, 2)))
            newest, first = 0, True
            while True:
                aim, code = figures["kills"] % 2 == 0, None
                process = run.start()
                if figures["kills"] == args.kills:
                    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                elif aim:
                    code = kill_inside_a_save(run, process, rng, 1.2 * a_save)
                else:
                    code = kill_anywhere(run, process, rng, a_run)
                resumed = re.search(r"^resumed \S+ at step (\d+)$", run.printed(), re.MULTILINE)
                if resumed:
                    figures["resumed"].append(int(resumed.group(1)))
                began = "Train Loss" in run.printed()  # what is resumed is said before
                if began and not first and int(resumed.group(1) if resumed else 0) != newest:
                    figures["wrong_resumes"].append(f"{run.log}: expected step {newest}")
                if code is not None:
                    break
                first = False
                figures["kills"] += 1
                figures["aimed_inside_a_save"] += aim
                bar.update(1)
                for path in run.partial()[:1]:
                    inside = _last_written(path)
                    figures["found_inside_a_save"][inside] = figures["found_inside_a_save"].get(inside, 0) + 1
                figures["orphans"] += left_alive(process)
                newest, wrong = what_a_kill_left(run, newest)
                figures["damaged_or_lost"] += wrong
            figures["runs"] += 1
            if code:
                figures["failures"].append(f"{run.log}: exit code {code}: {run.printed()[-500:]}")
                continue
            figures["damaged_or_lost"] += run.damaged()
            # Not those of an experiment folder that was killed in its first save: the next start has made another.
            figures["leftovers"] += len(_hidden(os.path.dirname(run.checkpoints()[run.steps])))
            differences = run.differences(reference)
            figures["runs_equal"] += not differences
            if differences:
                figures["failures"].append(f"{run.folder}: differs in {', '.join(differences)}")
            if not args.keep:
                shutil.rmtree(run.folder)
    return figures


def _last_written(path):
    """Returns the file that a kill has found being written, or what else was going on."""
    if path.endswith(".replaced"):
        return "replaced"
    names = os.listdir(path)
    if "manifest.json" in names:
        return "manifest.json"
    return max(names, key=lambda name: os.stat(os.path.join(path, name)).st_mtime_ns) if names else "empty folder"


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------------


def flip_bits(run, count, seed):
    """Returns `{file: how many of `count` random flipped bits were found}`, of the newest checkpoint of a run."""
    from tqdm import tqdm

    from training.checkpoints.find import pick_checkpoint

    rng, steps = random.Random(seed), sorted(run.checkpoints())
    newest, older = (run.checkpoints()[step] for step in reversed(steps[-2:]))
    found = {}
    for name in sorted(os.listdir(newest)):
        path, found[name] = os.path.join(newest, name), 0
        with open(path, "rb") as file:
            whole = file.read()
        for _ in tqdm(range(count), desc=name, unit="flip", leave=False):
            data, bit = bytearray(whole), rng.randrange(8 * len(whole))
            data[bit // 8] ^= 1 << bit % 8
            with open(path, "wb") as file:
                file.write(data)
            with _quiet() as said:
                picked = pick_checkpoint(run.output)
            found[name] += os.path.samefile(picked, older) and f"{newest} is passed over: " in said[0]
        with open(path, "wb") as file:
            file.write(whole)
    return found


def bitflips(args, folder):
    run = Run(os.path.join(folder, "bitflips"), "trainer", steps=6).train()
    return {"flips_a_file": args.flips, "found": flip_bits(run, args.flips, args.seed)}


# ---------------------------------------------------------------------------------------------------------------------
# File systems
# ---------------------------------------------------------------------------------------------------------------------


def _mount(*arguments):
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"mount {' '.join(arguments)}: {done.stderr.strip()}; this part needs the right to mount")


def _unmount(folder):
    subprocess.run(["umount", "--lazy", folder], check=False)


def at_steps(hooks):
    """Returns a `prepare` of a training that calls `hooks[step]()` after that step, before it is saved."""

    def prepare():
        from training.metrics import TrainingLog

        step_done = TrainingLog.step_done

        def hooked(self, step):
            if step in hooks:
                hooks[step]()
            return step_done(self, step)

        TrainingLog.step_done = hooked

    return prepare


def wait_for_saves():
    """Waits for the checkpoint that this process is writing."""
    for thread in threading.enumerate():
        if thread.name == SAVING_THREAD:
            thread.join()


def _refusals(run):
    return len(re.findall(r"^warning: \S+ is not saved: ", run.printed(), re.MULTILINE))


def full(args, folder):
    """A tmpfs with room for two checkpoints and a half, of six; then it is made larger, and the run started again."""
    figures = {}
    for loop in args.loops:
        reference = Run(os.path.join(folder, f"full-{loop}-unbroken"), loop, steps=12).train()
        size = sum(os.path.getsize(path) for path in glob.glob(os.path.join(reference.checkpoints()[12], "*")))
        disk = os.path.join(folder, f"full-{loop}-disk")
        os.makedirs(disk)
        _mount("-t", "tmpfs", "-o", f"size={size * 5 // 2}", "tmpfs", disk)
        try:
            run = Run(os.path.join(folder, f"full-{loop}"), loop, steps=12, output=os.path.join(disk, "out"))
            code = run.finish()
            row = {"exit_code": code, "refused": _refusals(run), "error": run.printed().strip().splitlines()[-1]}
            row.update(saved=sorted(run.checkpoints()), damaged=run.damaged(), partial=len(run.partial()))
            _mount("-o", f"remount,size={size * 10}", disk)
            row["exit_code_with_room"] = run.finish()
            row["resumed"] = int(re.search(r"^resumed \S+ at step (\d+)$", run.printed(), re.MULTILINE).group(1))
            row["equal"] = run.same_as(reference)
            figures[loop] = row
        finally:
            _unmount(disk)
    return figures


def readonly(args, folder):
    """The checkpoints' folder can't be written to from step 3 to step 7, and saving is due every second step."""
    figures = {}
    for loop in args.loops:
        reference = Run(os.path.join(folder, f"readonly-{loop}-unbroken"), loop, steps=12).train()
        run = Run(os.path.join(folder, f"readonly-{loop}"), loop, steps=12)

        def place(run=run):
            return os.path.dirname(run.checkpoints()[2])

        def freeze(place=place):
            wait_for_saves()
            if os.geteuid():
                os.chmod(place(), 0o555)
            else:  # whom permissions don't stop
                _mount("--bind", place(), place())
                _mount("-o", "remount,bind,ro", place())

        def thaw(place=place):
            wait_for_saves()
            if os.geteuid():
                os.chmod(place(), 0o755)
            else:
                _unmount(place())

        code = run.finish(at_steps({3: freeze, 7: thaw}))
        row = {"exit_code": code, "refused": _refusals(run), "saved": sorted(run.checkpoints())}
        row.update(damaged=run.damaged(), equal=run.same_as(reference))
        figures[loop] = row
    return figures


def slow_writes(bytes_per_second):
    """Slows the writing of checkpoints down, in this process."""
    from runtime import files as manifest

    write = manifest.HashedFile.write

    def slow(self, data):
        time.sleep(memoryview(data).nbytes / bytes_per_second)
        return write(self, data)

    manifest.HashedFile.write = slow


def _read_rows(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def _append_row(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def record_waits(path):
    """From now on both loops' saves in this process add `{"step", "seconds"}` to a file: how long each was inside."""
    from training.metrics import TrainingLog

    pause = TrainingLog.pause

    def recorded(self, seconds):
        _append_row(path, {"kind": "save", "step": self._step, "seconds": seconds})
        return pause(self, seconds)

    TrainingLog.pause = recorded  # previews and validation, which pause too, are off here


def slow(args, folder):
    """Saves take half a second each, and come every 60 steps, which take a bit longer; the last one is waited for."""
    figures, seconds, steps = {}, 0.5, 180
    for loop in args.loops:
        reference = Run(os.path.join(folder, f"slow-{loop}-unbroken"), loop, steps=steps, save_every=60).train()
        size = sum(os.path.getsize(path) for path in glob.glob(os.path.join(reference.checkpoints()[steps], "*")))
        run = Run(os.path.join(folder, f"slow-{loop}"), loop, steps=steps, save_every=60)
        waits = os.path.join(run.folder, "waits.jsonl")

        def prepare(size=size, waits=waits):
            slow_writes(size / seconds)
            record_waits(waits)
            at_steps(dict.fromkeys(range(steps), lambda: time.sleep(0.01)))()

        code = run.finish(prepare)
        figures[loop] = {
            "exit_code": code,
            "seconds_a_save": seconds,
            "waited": [row["seconds"] for row in _read_rows(waits)],
            "equal": run.same_as(reference),
        }
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def ranks(args, folder):
    """Signals to one of two processes or to their launcher; how all of them end, and how long it takes."""
    from support.runs import command_environment, launch_command, loop_arguments

    figures, hang_timeout = {}, 5
    cases = [("SIGTERM", 0), ("SIGTERM", 1), ("SIGINT", 1), ("SIGTERM", "launcher")]
    cases += [(name, rank) for name in ("SIGSTOP", "SIGKILL") for rank in (0, 1)]
    for loop in args.loops:
        for name, target in cases:
            run = Run(os.path.join(folder, f"{loop}-{name}-{target}"), loop, steps=10**6)
            given = loop_arguments(
                loop, config=run.config, features=run.features, output=run.output, steps=run.steps, ranks=2
            )
            command = launch_command(
                2, f"train_image_generation_{loop}.py", [*given, f"--hang_timeout={hang_timeout}"], run.folder
            )
            with open(run.log, "w") as log:
                launcher = subprocess.Popen(command, cwd=ROOT, env=command_environment(), stdout=log, stderr=log)
            while not glob.glob(os.path.join(run.output, "**", "metrics.jsonl"), recursive=True):
                if launcher.poll() is not None:
                    raise ValueError(f"{run.log}: exit code {launcher.returncode}")
                time.sleep(0.1)
            processes = _rank_processes(launcher.pid)
            start = time.perf_counter()
            os.kill(processes.get(target, launcher.pid), getattr(signal, name))
            row = {"exit_code": launcher.wait(), "seconds": time.perf_counter() - start}
            for process in processes.values():
                kill_if_there(process)
            row["saved"] = [step == max(run.losses()) for step in run.checkpoints()] == [True] and not run.damaged()
            with open(os.path.join(run.folder, "workerlog.0")) as log:
                row["said"] = [line for line in log.read().splitlines() if re.match("error: |stopped by", line)]
            figures[f"{loop}, {name} to {target}"] = row
            print(f"{loop}, {name} to {target}: {row}", flush=True)
    return figures


def _rank_processes(launcher):
    """Returns `{rank: process id}` of what a launcher has started."""
    found = {}
    for path in glob.glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError):
            with open(f"{path}/stat") as stat, open(f"{path}/environ") as environment:
                parent = int(stat.read().rpartition(")")[2].split()[1])
                rank = re.search(r"(?:^|\0)PADDLE_TRAINER_ID=(\d+)", environment.read())
            if parent == launcher and rank:
                found[int(rank.group(1))] = int(os.path.basename(path))
    return found


def fuzz(args, folder):
    from support import mutations

    rows = mutations.fuzz_all(list(mutations.READERS), args.mutations, args.seed)
    return {row.pop("reader"): row for row in rows}


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def table(part, figures):
    """Returns a part's figures as lines to read."""
    lines = [f"\n{part}"]

    def add(prefix, value):
        if isinstance(value, dict) and value:
            for key, item in value.items():
                add(f"{prefix} {key}".strip(), item)
        elif isinstance(value, list) and len(value) > 12:
            lines.append(f"| {prefix} | {len(value)}: {value[:6]} ... {value[-3:]} |")
        else:
            lines.append(f"| {prefix} | {value:.4g} |" if isinstance(value, float) else f"| {prefix} | {value} |")

    add("", figures)
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), metavar="PART", help="some of %(default)s [all]")
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), metavar="LOOP", help="some of %(default)s [both]")
    parser.add_argument("--kills", type=int, default=200, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=30, help="of the training that is killed [%(default)s]")
    parser.add_argument("--flips", type=int, default=500, help="bits in each file of a checkpoint [%(default)s]")
    parser.add_argument("--mutations", type=int, default=10_000, help="of each reader's files [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of kills, bits and mutations [%(default)s]")
    parser.add_argument("--work_dir", help="where to train [the system's temporary folder]")
    parser.add_argument("--keep", action="store_true", help="leave the folders of the trainings")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args(argv)
    for flag, known in (("parts", PARTS), ("loops", LOOPS)):
        if unknown := sorted(set(getattr(args, flag)) - set(known)):
            raise ValueError(f"--{flag} {' '.join(unknown)}: expected some of {', '.join(known)}")
    run(args)


def run(args):
    from runtime.files import write_json

    # Whatever a training imports, once.
    modules = ["objectives", *(f"train_image_generation_{loop}" for loop in args.loops)]
    modules += ["config.flags", "training.checkpoints.experiment", "training.checkpoints.saver"]
    modules += [f"training.{name}" for name in ("metrics", "optimizer", "preview", "session", "setup")]
    if "trainer" in args.loops:
        modules += ["training.trainer", "training.trainer_arguments"]
    for module in modules:
        importlib.import_module(module)
    if args.work_dir:
        os.makedirs(args.work_dir, exist_ok=True)
    folder, results = tempfile.mkdtemp(prefix="faults-", dir=args.work_dir), {}
    try:
        for part in args.parts:
            place, start = os.path.join(folder, part), time.perf_counter()
            os.makedirs(place)
            results[part] = globals()[part](args, place)
            results[part]["seconds"] = time.perf_counter() - start
            print(table(part, results[part]), flush=True)
            if args.output:
                write_json(args.output, results)
            if not args.keep:
                shutil.rmtree(place)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if args.keep:
        print(f"trainings: {folder}")
    if args.output:
        print(f"figures: {args.output}")


if __name__ == "__main__":
    run_cli(main)
