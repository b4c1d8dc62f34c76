"""Judges the numbers of every step: one whose loss or gradients are not finite changes no weight.

The verdict is made on the device, by the norm of the gradients and the mean loss over all ranks, at the stations that
`training.optimizer` lists. A bad step's gradients become zero and its learning rate 0, so that weights and master
weights stay bit for bit what they were and the moments decay. The host hears of it where it waits for the device.

- With `on_nonfinite` "stop" no later step changes a weight either, and the run ends with a dump of the bad step.
- With "skip" the run goes on, until `MAX_CONSECUTIVE_BAD_STEPS` steps one after another were bad.
- With `loss_spike_factor` F above 0 a loss of more than F times the running mean before it is bad too. Regularizers are
  left out of it: with some of them the sum goes below 0, where such a factor means nothing.
- With float16, gradients that overflow the loss scaler's scale are no bad step, as the optimizer leaves it out, unless
  the loss itself is not finite or the scale has gone down to 1.
"""

import math
from collections import namedtuple

import paddle
import paddle.distributed as dist

from runtime.paddle_private import found_overflow, loss_scale, zero_if
from runtime.process import EXIT_BAD_STEP, one_line
from training.supervision.stopping import AGREE_EVERY

MAX_CONSECUTIVE_BAD_STEPS = 100  # a run that skips bad steps ends after so many in a row
OWN = "objective"  # the part of the loss that is the objective's own, where there are regularizers
SPIKE_WINDOW, SPIKE_WARMUP = 100, 20  # the loss's running mean is over about so many steps, and of use after the first

# The step that ended a run. `kind` is "nonfinite" or "spike"; `loss` is the mean over all ranks; `objective` is the
# objective's state with which the step's random numbers were drawn.
BadStep = namedtuple("BadStep", "step kind loss grad_norm learning_rate objective")


class BadStepError(ValueError):
    """Ends a run because of a bad step. A scheduler should not restart it: the same step would end it again."""

    exit_code = EXIT_BAD_STEP


class NumberWatch:
    """Judges the steps of a run and keeps their losses. On several ranks all come to the same verdicts.

    `training` is the config's section. `stopping` (or None) hears through the watch what the other ranks were asked.
    """

    def __init__(self, training, stopping=None):
        self.skips = training["on_nonfinite"] == "skip"
        self.spike_factor = training["loss_spike_factor"]
        self.dump = lambda bad: ""  # called on every rank before the run ends; returns sentences for the error
        self._stopping = stopping
        self._max_consecutive = MAX_CONSECUTIVE_BAD_STEPS if self.skips else 1
        self._losses = []  # of the step's micro-batches: loss and parts, `(1 + parts,)`
        self._names = ()  # of the parts
        self._objective = {}
        # On the device, each of shape (1,).
        self._consecutive = paddle.zeros([1], "int64")
        self._mean, self._mean_steps = paddle.zeros([1]), paddle.zeros([1])
        self._stop_asked = paddle.zeros([1])  # how many ranks were asked to stop, as of the last step
        # Of the step that ended the run: step, whether not finite, loss, squared norm, and of the loss without
        # regularizers the running mean before it, and it.
        self._bad = paddle.zeros([6], "float64")
        self._start_report()

    def _start_report(self):
        self._sums = paddle.zeros([1])  # over the steps that were not skipped: 1, the loss, its parts
        self._skipped, self._first_skipped = paddle.zeros([1], "int64"), paddle.zeros([1], "int64")
        self._rates = {}  # learning rates of the steps since the last report

    # A step. Nothing here waits for the device, but for every tenth step on several ranks.

    def add(self, loss, parts=None):
        """Adds a micro-batch's mean loss, and further means to report, `{name: tensor}`; all detached.

        The names are the same in every step, on every rank; `OWN` is the first, if it is there.
        """
        parts = parts or {}
        self._names = tuple(parts)
        self._losses.append(paddle.concat([v.astype("float32").reshape([1]) for v in (loss, *parts.values())]))

    def begin_update(self, step, learning_rate, scaler=None):
        """Tells the watch that optimizer step `step` (1-based) comes next, through this `GradScaler`, if it is on."""
        self._step, self._rates[step] = step, learning_rate
        self._scaler = scaler if scaler is not None and scaler.is_enable() else None
        self._loss_scale = None if self._scaler is None else loss_scale(scaler)

    @paddle.no_grad()
    def judge(self, square, gradients):
        """Judges the step by the squared norm `(1,)` of its gradients, float32, and returns it, 0 for a bad step.

        The norm is over all ranks' parts. Into this rank's `gradients`, tensors, zeros are written in a bad step.
        """
        self._decide(square)
        bad = ~self._ok
        zero_if(bad, gradients)
        return paddle.where(bad, paddle.zeros_like(square), square)

    def applied_rate(self, rate):
        """Returns the learning rate to apply, 0 in a bad step; the same tensor for all parameters."""
        if self._rate is None:
            self._rate = rate * self._ok.astype(rate.dtype).reshape(rate.shape)
        return self._rate

    @paddle.no_grad()
    def end_update(self, objective=None):
        """Ends the step, before the objective's `end_step`; with a bad step the objective's state is kept."""
        if self._losses:  # the scaler has not even called the optimizer
            self._decide(paddle.full([1], math.inf))
        for name, value in objective.state_dict().items() if objective is not None else ():
            kept = self._objective.get(name, value)
            self._objective[name] = paddle.where(self._new.reshape([1] * value.ndim), value, kept)
        if self._stopping is not None and dist.get_world_size() > 1 and self._step % AGREE_EVERY == 0:
            self._stopping.agree(bool(self._stop_asked > 0))

    def _decide(self, square):
        """Sets `_ok`, whether the step may change anything, and adds the step to the next report."""
        means = paddle.add_n(self._losses) / len(self._losses)
        self._losses, self._rate = [], None
        infinite = ~paddle.isfinite(square)
        if self._scaler is not None:
            infinite = infinite & ~(found_overflow(self._scaler) & (self._loss_scale.reshape([1]) > 1.0))
        infinite = infinite | ~paddle.isfinite(means[:1])
        if (ranks := dist.get_world_size()) > 1:  # the same bits on each of them
            asked = self._stopping is not None and self._stopping.request is not None
            sums = paddle.concat([means / ranks, infinite.astype("float32"), paddle.full([1], float(asked))])
            dist.all_reduce(sums)
            means, infinite, self._stop_asked = sums[:-2], sums[-2:-1] > 0, sums[-1:]
        loss, bad = means[:1], infinite
        own = means[1:2] if self._names[:1] == (OWN,) else loss
        if self.spike_factor > 0:
            bad = infinite | ((self._mean_steps >= SPIKE_WARMUP) & (own > self.spike_factor * self._mean))
        step, ended = paddle.full([1], self._step, "int64"), self._bad[:1] > 0

        self._consecutive = paddle.where(bad, self._consecutive + 1, paddle.zeros_like(self._consecutive))
        self._new = (self._consecutive >= self._max_consecutive) & ~ended
        record = paddle.concat([value.astype("float64") for value in (step, infinite, loss, square, self._mean, own)])
        self._bad = paddle.where(self._new, record, self._bad)
        self._ok = ~(bad | ended | self._new)

        self._first_skipped = paddle.where(bad & (self._skipped == 0), step, self._first_skipped)
        self._skipped = self._skipped + bad.astype("int64")
        self._sums = paddle.where(self._ok, self._sums + paddle.concat([paddle.ones([1]), means]), self._sums)
        if self.spike_factor > 0:
            steps = paddle.clip(self._mean_steps + 1, max=float(SPIKE_WINDOW))
            self._mean = paddle.where(self._ok, self._mean + (own - self._mean) / steps, self._mean)
            self._mean_steps = paddle.where(self._ok, steps, self._mean_steps)

    # What the host reads.

    def check(self):
        """Waits for the device, and raises `BadStepError` if a bad step has ended the run. A collective."""
        if bool(self._bad[0] > 0):
            self._end()

    def take(self):
        """Returns the numbers since it was last called, for a report; waits and raises as `check` does. A collective.

        They are `loss`, the mean over the steps that were not skipped and all ranks, None if there are none; `parts`,
        the same of what `add` got by name; `skipped_steps`, how many were; `first_skipped`, the first of them, or None.
        """
        means = self._sums / paddle.clip(self._sums[:1], min=1.0)
        numbers = (self._bad[:1], self._stop_asked, self._skipped, self._first_skipped, means)
        numbers = paddle.concat([value.astype("float64") for value in numbers]).tolist()
        ended, stop_asked, skipped, first, has_loss, *means = numbers
        if ended:
            self._end()
        if self._stopping is not None:
            self._stopping.agree(stop_asked > 0)
        self._start_report()
        loss, *parts = means if has_loss else [None]
        parts, first = dict(zip(self._names, parts, strict=False)), int(first) if skipped else None
        return {"loss": loss, "parts": parts, "skipped_steps": int(skipped), "first_skipped": first}

    def _end(self):
        step, infinite, loss, square, mean, own = self._bad.tolist()
        step, kind, norm = int(step), "nonfinite" if infinite else "spike", square**0.5
        bad = BadStep(step, kind, loss, norm, self._rates.get(step), self._objective)
        reason = f"the loss is {loss:.6g}"
        if infinite and math.isfinite(loss):
            reason = f"the gradients are not finite (norm {norm:.3g}; {reason})"
        elif not infinite:
            reason += f", without regularizers {own:.6g}" if own != loss else ""
            reason += f", more than {self.spike_factor:g} times its running mean {mean:.6g}"
        if self.skips:
            reason += f"; so were {self._max_consecutive} steps one after another"
        try:
            dumped = self.dump(bad)
        except (OSError, ValueError) as error:
            dumped = f"no dump of it could be made: {one_line(error)}."
        again = "" if self.skips else "; or leave such steps out: --on_nonfinite skip"
        raise BadStepError(
            f"step {step}: {reason}. It has changed no weight, and training stops. {dumped} Resume the last "
            f"checkpoint with data that are right, a lower --learning_rate or --max_grad_norm{again}"
        )

    def state_dict(self):
        """Returns the running mean of a spike guard as JSON values, so that a resumed run judges as an unbroken one."""
        return {"loss_mean": float(self._mean), "loss_steps": float(self._mean_steps)} if self.spike_factor > 0 else {}

    def set_state_dict(self, state):
        """Takes over what `state_dict` returned."""
        if "loss_mean" in state:
            self._mean = paddle.full([1], float(state["loss_mean"]))
            self._mean_steps = paddle.full([1], float(state["loss_steps"]))
