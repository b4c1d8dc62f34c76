"""Do the two training commands do what they should here: the same run in both loops, and after a resume?"""

import contextlib
import math
from pathlib import Path

import numpy as np

from runtime.paddle_private import full_float32
from verification.gpus import need_bfloat16
from verification.tiny_runs import (
    LOOPS,
    checkpoint_path,
    loop_arguments,
    read_losses,
    resume_flag,
    run_in_process,
    write_config,
    write_features,
)
from verification.verdicts import Check, Wrong, within

STEPS, MIDDLE = 10, 5
WEIGHTS = ("model_state.pdparams", "ema_state.pdparams")
# On a CPU two runs of the same steps have the same bits. A GPU's kernels may add in another order from run to run: a
# loss then differs by float32's rounding, 6e-8, times the thousands of sums that it passed through. AdamW turns a
# gradient that is only rounding, such as that of the keys' bias, into whole steps: so the weights are compared by the
# norm of all of them, against the way that they went in the last five steps. A moment, a seed or a sample that a resume
# loses changes that by its whole size. bfloat16 rounds by 2e-3, which a different order carries into the loss.
BOUNDS = {"cpu": (0.0, 0.0), "float32": (1e-4, 0.05), "bfloat16": (2e-2, 0.3)}


def checks(settings):
    """Yields the checks of this group."""
    runs = TinyRuns(settings)
    for kind in ("DiT",) if settings.quick else ("DiT", "LargeSiT"):
        yield from _checks(runs, kind)
    if settings.on_gpu:
        for level in ("O1", "O2"):
            yield from _checks(runs, "DiT", "bfloat16", level)


def _checks(runs, kind, dtype="float32", level="O1"):
    name = f"{kind}, float32" if dtype == "float32" else f"{kind}, {dtype} {level}"
    case = (kind, dtype, level)
    for loop in LOOPS:
        yield Check(f"{name}: {loop} resumed", lambda loop=loop: runs.compare_resumed(case, loop))
    yield Check(f"{name}: both loops", lambda: runs.compare_loops(case))


class TinyRuns:
    """Runs of ten steps on the device, and the same after a resume from step five. Each is done once.

    A case is `(kind of TINY_MODELS, amp_dtype, amp_level)`.
    """

    def __init__(self, settings):
        self._settings, self._folder, self._outputs = settings, Path(settings.folder), {}

    def compare_resumed(self, case, loop):
        """Compares a resumed run with the unbroken one of the same loop."""
        unbroken = self._output(case, loop)
        return self._compare(case, (loop, unbroken), (loop, self._output(case, loop, resumed=True)), MIDDLE)

    def compare_loops(self, case):
        """Compares the unbroken runs of both loops."""
        return self._compare(case, *((loop, self._output(case, loop)) for loop in LOOPS), first=0)

    def _output(self, case, loop, resumed=False):
        """Returns the output folder of a run."""
        key = (*case, loop, resumed)
        if key not in self._outputs:
            extra = []
            if resumed:
                extra = [resume_flag(loop, checkpoint_path(loop, self._output(case, loop), MIDDLE))]
            self._outputs[key] = self._run(case, loop, self._folder / "-".join(map(str, key)), extra)
        return self._outputs[key]

    def _run(self, case, loop, output, extra):
        kind, dtype, level = case
        device, features = self._settings.device, self._folder / "features"
        if self._settings.on_gpu:
            use_deterministic_kernels()
            if dtype == "bfloat16":
                need_bfloat16()
        if not features.exists():
            write_features(features)
        config = write_config(self._folder / f"{kind}.json", kind, max_grad_norm=0.3, amp_dtype=dtype, amp_level=level)
        run = {"config": config, "features": features, "output": output, "device": device}
        with full_float32():
            run_in_process(loop, [*loop_arguments(loop, **run, steps=STEPS, save_every=MIDDLE), *extra])
        return output

    def _compare(self, case, one, other, first):
        """Judges the losses after step `first` and the last weights of two runs, each `(loop, output)`."""
        losses = [{s: loss for s, loss in read_losses(output).items() if s > first} for _, output in (one, other)]
        steps = list(range(first + 1, STEPS + 1))
        if any(list(run) != steps or not all(map(math.isfinite, run.values())) for run in losses):
            raise Wrong(f"expected finite losses of steps {first + 1} to {STEPS}, got {losses}")
        errors = {"loss": max(abs(losses[0][step] / losses[1][step] - 1) for step in steps)}
        begun, *ended = (_weights(*one, MIDDLE), _weights(*one, STEPS), _weights(*other, STEPS))
        for name in WEIGHTS:
            moved, apart = (_distance(state[name], ended[0][name]) for state in (begun, ended[1]))
            errors[name.split("_")[0]] = apart / moved
        bounds = BOUNDS["cpu" if not self._settings.on_gpu else case[1]]
        text, figures = within({what: (error, bounds[what != "loss"]) for what, error in errors.items()})
        figures["loss of step 10"] = losses[0][STEPS]
        return (f"the same bits, loss {losses[0][STEPS]:.6f}" if not any(errors.values()) else text), figures


def _weights(loop, output, step):
    from weights.files import safe_load

    return {name: safe_load(checkpoint_path(loop, output, step) / name) for name in WEIGHTS}


def _distance(a, b):
    """Returns the Euclidean distance of two states `{name: array}`; infinite where they differ in names."""
    if a.keys() != b.keys():
        return math.inf
    return math.sqrt(sum(float(np.square(np.float64(a[name]) - np.float64(b[name])).sum()) for name in a))


def use_deterministic_kernels():
    """Chooses a GPU's kernels that add in the same order in every run, where Paddle has the choice."""
    import paddle

    for flag in ("FLAGS_cudnn_deterministic", "FLAGS_embedding_deterministic"):
        with contextlib.suppress(ValueError):  # one that this Paddle does not know
            paddle.set_flags({flag: 1})
