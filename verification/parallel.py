"""Does training on several processes give the numbers of one? By real launches: gloo on a CPU, NCCL on GPUs."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from verification.tiny_runs import (
    ROOT,
    command_environment,
    launch_command,
    loop_arguments,
    read_metrics,
    run_in_process,
    write_config,
    write_features,
)
from verification.verdicts import Check, Skip, Wrong, within

STEPS, BATCH = 4, 8
SECONDS = 240  # for a launch; on two busy cores all of them in one take 60
# {name: (loop, flags, ranks that share a network)}
CASES = {
    "data parallel, notrainer": ("notrainer", (), 1),
    "data parallel, trainer": ("trainer", (), 1),
    "sharding stage1": ("trainer", ("--sharding=stage1",), 1),
    "sharding stage2": ("trainer", ("--sharding=stage2",), 1),
    "sharding stage3": ("trainer", ("--sharding=stage3",), 1),
    "tensor parallel": ("trainer", ("--tensor_parallel_degree=2",), 2),
}
# Losses and gradient norms are sums in another order, rounded to 6e-8 of their size, by thousands of operations; a
# GPU's kernels are others for other shapes. TF32 is off. A gradient that is summed instead of averaged, a sample read
# twice or a shard left out changes them by tenths.
BOUNDS = {"cpu": {"loss": 1e-5, "grad_norm": 1e-4}, "gpu": {"loss": 1e-4, "grad_norm": 1e-3}}


def checks(settings):
    """Yields the checks of this group."""
    launches = Launches(settings)
    for name in CASES:
        yield Check(name, lambda name=name: launches.compare(name))


class Launches:
    """Launched trainings, and the run of one process that they are compared with.

    On GPUs each is a launch of its command, as a user does it. On a CPU one launch does all, because importing the
    stack takes longer than training; when it fails, another one does what is left.
    """

    def __init__(self, settings):
        self._settings, self._folder = settings, Path(settings.folder)
        self._failures, self._done, self._hung, self._expected = {}, set(), 0, None

    def compare(self, name):
        """Returns what `Check.run` returns for a case of `CASES`."""
        ranks, found = self._ranks()
        if name not in self._done | self._failures.keys():
            if self._hung > 1:
                raise Skip("two launches hung already")
            names = list(CASES)
            self._launch([name] if self._settings.on_gpu else names[names.index(name) :], ranks)
        if name in self._failures:
            raise Wrong(self._failures[name])
        if self._expected is None:
            self._expected = self._run_alone()
        errors = {}
        for key, bound in BOUNDS["gpu" if self._settings.on_gpu else "cpu"].items():
            expected, values = read_metrics(self._expected, key), read_metrics(self._output(name), key)
            errors[key] = max(abs(values[step] / expected[step] - 1) for step in expected), bound
        text, figures = within(errors)
        return f"{ranks} processes{found}: {text}", {**figures, "world_size": ranks}

    def _ranks(self):
        """Returns how many processes are launched, and words on the GPUs; `Skip` where there is no launch to do."""
        import paddle

        if not self._settings.on_gpu:
            if paddle.is_compiled_with_cuda():
                raise Skip("a GPU build of Paddle launches processes on GPUs alone")
            return 2, ""
        if ":" in self._settings.requested:
            raise Skip("one GPU is asked about; --device gpu is about all of them")
        count = paddle.device.cuda.device_count()
        if count < 2:
            raise Skip("one GPU")
        return min(BATCH, 1 << count.bit_length() - 1), f" on {count} GPUs"

    def _output(self, name):
        return self._folder / name.replace(", ", "-").replace(" ", "-")

    def _arguments(self, name, ranks=1):
        """Returns a case's training `[loop, flags]`; of one process without its flags."""
        loop, extra, shared = CASES[name] if ranks > 1 else ("notrainer", (), 1)
        features = self._folder / "features"
        if not features.exists():
            write_features(features)
        # Steps so large that the blocks, which begin as zeros, soon matter. On GPUs the network is wide, as stage 3
        # leaves parameters of up to 2 ** 20 numbers whole.
        sizes, training = {}, {"max_grad_norm": 0.3, "learning_rate": 1e-2}
        if self._settings.on_gpu:
            sizes, training["learning_rate"] = {"num_attention_heads": 12, "attention_head_dim": 64}, 1e-3
        flags = loop_arguments(
            loop,
            config=write_config(self._folder / "DiT.json", "DiT", sizes=sizes, **training),
            features=features,
            output=self._output(name),
            steps=STEPS,
            batch=BATCH,
            ranks=ranks // shared,
            device="gpu" if self._settings.on_gpu else "cpu",
        )
        return [loop, [*flags, *extra]]

    def _run_alone(self):
        """Trains in one process, and returns its output. On a GPU that is another one, which leaves it free again."""
        loop, flags = self._arguments("one process")
        if self._settings.on_gpu:
            command = [sys.executable, str(ROOT / f"train_image_generation_{loop}.py"), *map(str, flags)]
            if failure := self._wait_for(command, self._folder / "log of one process"):
                raise Wrong(f"one process: {failure}")
        else:
            run_in_process(loop, flags)
        return self._output("one process")

    def _launch(self, names, ranks):
        """Launches trainings, and notes which of them are done, and how the first one that is not has failed."""
        runs, log = [self._arguments(name, ranks) for name in names], self._folder / f"log of {names[0]}"
        if self._settings.on_gpu:
            ((loop, words),) = runs
            script = f"train_image_generation_{loop}.py"
        else:
            script, words = "verification/run_loops.py", [self._folder / "runs.json"]
            words[0].write_text(json.dumps(runs, default=str))
        failure = self._wait_for(launch_command(ranks, script, words, log), log)
        for name in names:
            with contextlib.suppress(OSError, ValueError):  # no output, or none yet
                if STEPS in read_metrics(self._output(name), "loss") and (failure is None or name != names[-1]):
                    self._done.add(name)
                    continue
            self._failures[name] = failure or "ended without an error and without its last step"
            break

    def _wait_for(self, command, log):
        """Returns None for a launch that ends well, else a line on how it ended. One that hangs is ended."""
        os.makedirs(log)
        environment = {**command_environment(), "NVIDIA_TF32_OVERRIDE": "0", "FLAGS_cudnn_deterministic": "1"}
        with open(log / "launcher.log", "wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            try:
                code = process.wait(SECONDS)
                how = f"the launch ended with exit code {code}"
            except subprocess.TimeoutExpired:
                self._hung += 1
                code, how = None, f"the launch hung, and was ended after {SECONDS} s"
            finally:
                _end(process)
        return None if code == 0 else f"{how}: {_last_words(log)}"


def _end(process):
    """Ends a launcher, which ends its ranks: they are in sessions of their own."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(45)  # it gives them 30 s
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(log):
    """Returns the last line of the first rank's log that ends with an error, else rank 0's, else the launcher's."""
    found = {}
    for path in sorted(log.glob("workerlog.*")) + [log / "launcher.log"]:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            found[path.name] = f"{path.name}: {lines[-1][:300]}"
    errors = [line for line in found.values() if "error" in line.lower()]
    return next(iter([*errors, *found.values()]), "no output")
