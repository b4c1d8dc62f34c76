"""Do whole training steps give the losses that they must: network, objective, AdamW, watch and averages together?

First the four steps of the official training loop that are stored (tests/golden), then ten steps of each network beside
the losses of `losses.json`. These are this toolkit's own, of float32 on a CPU:

    python -m verification.training_steps --record    # after a change that is to change them
"""

import contextlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import paddle

from config.schema import MODEL_TYPES, resolve_config
from models.state import official_to_paddle
from objectives import Batch, build_objective
from runtime.files import write_json
from runtime.paddle_private import full_float32, master_weights
from runtime.precision import Precision
from training import setup
from training.optimizer import build_lr_scheduler, build_optimizer, optimizer_state
from training.supervision.number_watch import NumberWatch
from verification.parity import ROOM
from verification.vectors import OFFICIAL, TINY, Pair, as_array, fill, load_golden
from verification.verdicts import Check, within

STORED = Path(__file__).with_name("losses.json")
STEPS, BATCH = 10, 8
FLOAT32 = Precision()
# As a user might set it: half of the steps are clipped, the first ones warm up.
TRAINING = {
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 3,
    "ema_decay": 0.9,
}
OFFICIAL_TRAINING = {"learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": 0.0, "ema_decay": 0.9999}
OFFICIAL_MODEL = {"type": "DiT", **TINY, "num_layers": 2, "attention_head_dim": 8}


# Numbers of fewer bits: the largest relative errors with products (TF32) or all operators (half precisions) rounded,
# measured on a CPU (`emulation.emulated`); `ROOM` times as much is allowed, see `parity`. AdamW's first steps depend on
# the sign of a gradient alone, so that a gradient near 0 changes its weight by a step more or less.
COARSE = {
    "TF32": {"losses": 1.4e-4, "change": 4.7e-2, "loss": 5.1e-5, "grad_norm": 5.3e-4},
    "float16": {"losses": 1.5e-4, "change": 4.7e-2, "loss": 6.8e-5, "grad_norm": 5.3e-4},
    "bfloat16": {"losses": 1.5e-3, "change": 4.7e-2, "loss": 7.6e-4, "grad_norm": 6.7e-3},
}
# With 22 bits of mantissa these errors are 2e-7. An epsilon of AdamW of 1e-7 instead of 1e-8 is 1e-4, no decay 2e-4.
FLOAT32_BOUND = 2e-5


def checks(settings):
    """Yields the checks of this group."""
    for mode in ("float32", "TF32") if settings.on_gpu else ("float32",):
        yield Check(f"4 official steps of DiT, {mode}", partial(judge_steps, official_errors, mode))
        for kind in () if settings.quick else OFFICIAL:
            yield Check(f"{STEPS} steps of {kind}, {mode}", partial(judge_steps, partial(stored_errors, kind), mode))


def judge_steps(errors, mode):
    """Judges steps in float32 or TF32: `errors(mode)` is called, which returns `{what: (error, bound)}`."""
    with full_float32() if mode == "float32" else contextlib.nullcontext():
        return within(errors(mode))


def official_errors(mode, precision=FLOAT32):
    """Returns `{what: (error, bound)}` of the official steps; mode: `float32`, or one of `COARSE`."""
    pairs = official_steps(precision)
    if mode == "float32":
        return {what: (pair.error(), pair.tolerance) for what, pair in pairs.items()}
    bounds = {what: COARSE[mode]["change" if what.startswith("change") else "losses"] for what in pairs}
    counted = [what for what in pairs if what.startswith("change") or " of step " in what]
    return {what: (pairs[what].error(), ROOM * bounds[what]) for what in counted}


def stored_errors(kind, mode, precision=FLOAT32):
    """Returns `{what: (error, bound)}` of ten steps beside the stored ones; mode as of `official_errors`."""
    stored, errors = json.loads(STORED.read_text(encoding="utf-8"))[kind], {}
    for name, values in ten_steps(kind, precision).items():
        coarse = mode != "float32" and ROOM * COARSE[mode]["grad_norm" if name == "grad_norm" else "loss"]
        expected = stored[name]
        errors[name] = Pair(values, expected, 1.0, "entry").error(), coarse or FLOAT32_BOUND
    return errors


class Run:
    """A training run as the loops build it.

    `weights` is a golden file; without it they are as the network begins. Attributes: model, ema, optimizer.
    """

    def __init__(self, model, training, weights=None, precision=FLOAT32):
        config = resolve_config({"model": model, "training": training}, source="self check")
        settings = config["training"]
        self.precision, self.objective = precision, build_objective(config)
        self.model = setup.build_network(config)
        if weights is not None:
            fill(self.model, weights)
        self.model.train()
        (self.ema,), self.watch = setup.build_averages(settings, self.model), NumberWatch(settings)
        precision.decorate(self.model)
        self.schedule = build_lr_scheduler(settings, STEPS)
        masters = precision.low_precision_weights
        self.optimizer = build_optimizer(self.model, settings, self.schedule, multi_precision=masters, watch=self.watch)
        optimizer_state(self.optimizer, self.model)
        self.scaler, self.steps = precision.scaler(), 0

    def step(self, batch, drawn):
        """Does a step on a `Batch` with what an objective would draw; returns the losses by name, and the norm.

        They are of before the update: float32 `(N,)`, and the norm of the gradients before clipping, a number.
        """
        losses, loss = self.losses(batch, drawn)
        self.scaler.scale(loss).backward()
        self.update(loss)
        return losses, self.optimizer.gradient_norm.take()

    def losses(self, batch, drawn=None):
        """Returns the losses by name, and their mean; None: the objective draws by itself."""
        with self.precision.autocast():
            losses = self.objective.training_losses(self.model, batch, drawn=drawn)
            return losses, losses["loss"].mean()

    def update(self, loss):
        """Does what follows a backward pass."""
        self.steps += 1
        self.watch.add(loss.detach())
        self.watch.begin_update(self.steps, self.optimizer.get_lr(), self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.watch.end_update(self.objective)
        self.objective.end_step()
        self.optimizer.clear_grad()
        if self.precision.stepped(self.scaler):
            self.schedule.step()
        self.ema.update(self.model, master_weights(self.optimizer))

    @paddle.no_grad()
    def loss_of_averages(self, batch, drawn):
        """Returns the mean loss of a float32 network with the averages."""
        network = type(self.model)(**self.model.settings)
        network.set_state_dict(self.ema.state_dict())
        return float(self.objective.training_losses(network, batch, drawn=drawn)["loss"].mean())


def official_steps(precision=FLOAT32):
    """The four steps of the official loop as `{what: Pair}`: losses, then weights, their change, and averages."""
    arrays, pairs = load_golden("dit_train_steps"), {}
    run = Run(OFFICIAL_MODEL, OFFICIAL_TRAINING, "dit_train_init.pt", precision)
    start = {name: as_array(value) for name, value in run.ema.state_dict().items()}
    for i in range(4):
        x, y, t, noise = (paddle.to_tensor(arrays[name][i]) for name in ("x", "y", "t", "noise"))
        dropped = paddle.to_tensor((arrays["drop_rand"][i] < 0.1).astype("int64"))
        losses, _ = run.step(Batch(x, y), {"t": t, "noise": noise, "force_drop_ids": dropped})
        for name in ("loss", "mse", "vb"):
            pairs[f"{name} of step {i + 1}"] = Pair(losses[name], arrays[name][i], 6e-5, "entry")
    weights, averages = float32_weights(run), run.ema.state_dict()
    stored = official_to_paddle({key: value for key, value in arrays.items() if key.startswith(("p4:", "ema4:"))})
    for key, value in stored.items():
        which, name = key.split(":")
        if which == "ema4":
            pairs[f"average of {name}"] = Pair(averages[name], value, 6e-5)
            continue
        pairs[name] = Pair(weights[name], value, 6e-5)
        if (value != start[name]).any():  # no position table
            # Of a change of 4e-4 float32 can't resolve the last 1e-4 in a weight of 1.
            pairs[f"change of {name}"] = Pair(as_array(weights[name]) - start[name], value - start[name], 1e-3, "norm")
    return pairs


def float32_weights(run):
    """Returns the float32 weights by name: the masters, where the network's own are cast (AMP O2)."""
    masters = master_weights(run.optimizer)
    return {name: masters.get(p.name, p) for name, p in run.model.named_parameters()}


def given(kind):
    """Returns the batch of all steps, and what the objective would draw for it; the same on every device.

    Because it is the same in every step, the losses tell what the updates have done.
    """
    random = np.random.RandomState(7)
    x, noise = (random.standard_normal((BATCH, 4, 8, 8)).astype("float32") for _ in range(2))
    y = random.randint(0, TINY["num_classes"], BATCH)
    # Not 0, where the likelihood's gradient is a cancellation in float32.
    is_continuous = MODEL_TYPES[kind].objective == "transport"
    t = random.rand(BATCH).astype("float32") if is_continuous else random.randint(1, 1000, BATCH)
    drawn = {"t": t, "noise": noise, "force_drop_ids": (np.arange(BATCH) == 3).astype("int64")}
    tensors = {name: paddle.to_tensor(value) for name, value in drawn.items()}
    return Batch(paddle.to_tensor(x), paddle.to_tensor(y)), tensors


def ten_steps(kind, precision=FLOAT32):
    """Returns the numbers of ten steps of a network of `OFFICIAL`: lists by name."""
    weights, _, model, _ = OFFICIAL[kind]
    run, (batch, drawn) = Run(model, TRAINING, weights, precision), given(kind)
    steps = [run.step(batch, drawn) for _ in range(STEPS)]
    return {
        "loss": [float(losses["loss"].mean()) for losses, _ in steps],
        "grad_norm": [norm for _, norm in steps],
        "loss of the averages": [run.loss_of_averages(batch, drawn)],
    }


def main(arguments):
    if arguments != ["--record"]:
        raise SystemExit("python -m verification.training_steps --record")
    paddle.set_device("cpu")
    write_json(STORED, {kind: ten_steps(kind) for kind in OFFICIAL})


if __name__ == "__main__":
    main(sys.argv[1:])
