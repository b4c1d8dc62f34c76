"""Judges the numbers of every step: one whose loss or gradients are not finite changes no weight.

The verdict is made on the device, from the gradients' norm (`training.optimizer.GradientNorm`) and the mean loss over
all ranks. A bad step's gradients become zero and its learning rate 0, so that weights and master weights stay bit for
bit what they were and the moments decay as if the gradient had been zero. The host hears of it at the next report or
save, where it waits for the device anyway.

A step passes these stations:

1. `add`, after each micro-batch: its loss, and the parts of it that have names.
2. `begin_update`: the number of the step, its learning rate, the loss scaler.
3. `judge`, called by `GradientNorm` inside the optimizer's step: the verdict; gradients of a bad step become zero.
4. `applied_rate`, called by `training.optimizer.AdamW`: the learning rate of a bad step becomes 0.
5. `end_update`: keeps the objective's state with a bad step.

With `on_nonfinite` "stop" no later step changes a weight either, and the run ends with a dump of the bad step
(`training.supervision.step_dump`), made with the weights that it met. With "skip" the run goes on and counts, until
`MAX_CONSECUTIVE_BAD_STEPS` steps one after another were bad. With `loss_spike_factor` F above 0 a step is bad too if
its loss is more than F times the running mean of those before it.

With float16 the loss scaler finds gradients that are too large for its scale, and the optimizer does nothing: that is
no bad step, unless the loss itself is not finite or the scale has gone down to 1.

On several ranks the verdict takes one all-reduce a step. It also carries whether a rank was asked to stop.
"""

import math
from collections import namedtuple

import paddle
import paddle.distributed as dist

from runtime.paddle_private import found_overflow, loss_scale, zero_if
from runtime.process import EXIT_BAD_STEP, one_line
from training.supervision.stopping import AGREE_EVERY

# A run that skips bad steps ends after so many in a row.
MAX_CONSECUTIVE_BAD_STEPS = 100
# The running mean of the loss is over about so many steps, and of use after the first few.
SPIKE_WINDOW, SPIKE_WARMUP = 100, 20

# The step that ended a run. `kind` is "nonfinite" or "spike"; `loss` is the mean over all ranks; `objective` is the
# objective's state with which the step's random numbers were drawn.
BadStep = namedtuple("BadStep", "step kind loss grad_norm learning_rate objective")


class BadStepError(ValueError):
    """Ends a run because of a bad step. A scheduler should not restart it: the same step would end it again."""

    exit_code = EXIT_BAD_STEP


class NumberWatch:
    """Judges the steps of a run and keeps their losses. On several ranks all come to the same verdicts.

    Args:
        training: the config's `training` section.
        stopping: a `Stopping`, which hears through the watch what the other ranks were asked; None: there is none.

    Attributes:
        dump: called with a `BadStep` before the run ends, on every rank; returns sentences for the error.
    """

    def __init__(self, training, stopping=None):
        self.skips = training["on_nonfinite"] == "skip"
        self.spike_factor = training["loss_spike_factor"]
        self.dump = lambda bad: ""
        self._stopping = stopping
        self._max_consecutive = MAX_CONSECUTIVE_BAD_STEPS if self.skips else 1
        self._losses, self._parts = [], {}  # of the step's micro-batches
        self._judged = True
        self._step = 0
        self._scaler = self._loss_scale = None
        self._objective = {}
        self._ok = self._rate = None
        # On the device, each of shape (1,).
        self._halted, self._new = paddle.zeros([1], "bool"), paddle.zeros([1], "bool")
        self._consecutive = paddle.zeros([1], "int64")
        self._mean, self._mean_steps = paddle.zeros([1]), paddle.zeros([1])
        self._stop_asked = paddle.zeros([1])  # how many ranks were asked to stop, as of the last step
        # Step, whether not finite, loss, squared norm and running mean before it, of the step that ended the run.
        self._bad = paddle.zeros([5], "float64")
        self._start_report()

    def _start_report(self):
        self._loss_sum, self._good = paddle.zeros([1]), paddle.zeros([1])
        self._part_sums = {}
        self._skipped, self._first_skipped = paddle.zeros([1], "int64"), paddle.zeros([1], "int64")
        self._rates = {}  # learning rates of the steps since the last report

    # A step. Nothing here waits for the device, but for every tenth step on several ranks.

    def add(self, loss, parts=None):
        """Adds a micro-batch's mean loss, a detached tensor.

        Args:
            parts: further means to report, `{name: detached tensor}`; the same names in every step, on every rank.
        """
        self._losses.append(loss)
        for name, part in (parts or {}).items():
            self._parts.setdefault(name, []).append(part)

    def begin_update(self, step, learning_rate, scaler=None):
        """Tells the watch that the optimizer's step `step` (1-based) comes next.

        Args:
            scaler: the `paddle.amp.GradScaler` that calls the optimizer; None, or one that is off, if none does.
        """
        self._step, self._judged = step, False
        self._rates[step] = learning_rate
        self._scaler = scaler if scaler is not None and scaler.is_enable() else None
        self._loss_scale = None if self._scaler is None else loss_scale(scaler)

    @paddle.no_grad()
    def judge(self, square, gradients):
        """Judges the step by the squared norm `(1,)` of its gradients; of a bad step they are set to zero.

        Args:
            square: float32, over all ranks' parts.
            gradients: the tensors that this rank's optimizer is about to use, changed in place.

        Returns:
            `square`, and 0 in a bad step.
        """
        self._decide(square)
        self._rate = None
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
        """Ends the step; call it after the optimizer's step and before the objective's `end_step`.

        Args:
            objective: its state is kept with a bad step.
        """
        if not self._judged:  # the scaler has not even called the optimizer
            self._decide(paddle.full([1], math.inf))
        for name, value in objective.state_dict().items() if objective is not None else ():
            kept = self._objective.get(name, value)
            self._objective[name] = paddle.where(self._new.reshape([1] * value.ndim), value, kept)
        if self._stopping is not None and dist.get_world_size() > 1 and self._step % AGREE_EVERY == 0:
            self._stopping.agree(bool(self._stop_asked > 0))

    def _decide(self, square):
        """Sets `_ok`, whether the step may change anything, and adds the step to the next report."""
        loss = self._micro_mean(self._losses)
        parts = {name: self._micro_mean(losses) for name, losses in self._parts.items()}
        self._losses, self._parts, self._judged = [], {}, True
        infinite = ~paddle.isfinite(square)
        if self._scaler is not None:
            infinite = infinite & ~(found_overflow(self._scaler) & (self._loss_scale.reshape([1]) > 1.0))
        infinite = infinite | ~paddle.isfinite(loss)
        if dist.get_world_size() > 1:
            loss, infinite, parts = self._over_ranks(loss, infinite, parts)
        bad = infinite
        if self.spike_factor > 0:
            bad = infinite | ((self._mean_steps >= SPIKE_WARMUP) & (loss > self.spike_factor * self._mean))
        step = paddle.full([1], self._step, "int64")

        self._consecutive = paddle.where(bad, self._consecutive + 1, paddle.zeros_like(self._consecutive))
        self._new = (self._consecutive >= self._max_consecutive) & ~self._halted
        record = paddle.concat([value.astype("float64") for value in (step, infinite, loss, square, self._mean)])
        self._bad = paddle.where(self._new.expand([5]), record, self._bad)
        self._halted = self._halted | self._new
        self._ok = ~(bad | self._halted)

        self._first_skipped = paddle.where(bad & (self._skipped == 0), step, self._first_skipped)
        self._skipped = self._skipped + bad.astype("int64")
        self._loss_sum = paddle.where(self._ok, self._loss_sum + loss, self._loss_sum)
        for name, part in parts.items():
            before = self._part_sums.get(name, paddle.zeros([1]))
            self._part_sums[name] = paddle.where(self._ok, before + part, before)
        self._good = self._good + self._ok.astype("float32")
        if self.spike_factor > 0:
            steps = paddle.clip(self._mean_steps + 1, max=float(SPIKE_WINDOW))
            self._mean = paddle.where(self._ok, self._mean + (loss - self._mean) / steps, self._mean)
            self._mean_steps = paddle.where(self._ok, steps, self._mean_steps)

    @staticmethod
    def _micro_mean(losses):
        return paddle.add_n([loss.astype("float32").reshape([1]) for loss in losses]) / len(losses)

    def _over_ranks(self, loss, infinite, parts):
        """Returns means and verdict over all ranks, the same bits on each of them."""
        ranks = dist.get_world_size()
        asked = self._stopping is not None and self._stopping.request is not None
        means = [value / ranks for value in (loss, *parts.values())]
        sums = paddle.concat([*means, infinite.astype("float32"), paddle.full([1], float(asked))])
        dist.all_reduce(sums)
        loss, *means, infinite, self._stop_asked = paddle.split(sums, len(sums))
        return loss, infinite > 0, dict(zip(parts, means, strict=True))

    # What the host reads.

    def check(self):
        """Waits for the device; call it before saving. A collective.

        Raises:
            BadStepError: a bad step has ended the run.
        """
        if bool(self._halted):
            self._end()

    def take(self):
        """Returns the numbers since it was last called, for a report; waits for the device. A collective.

        Returns:
            dict: `loss`, the mean over the steps that were not skipped and all ranks, None if there are none;
            `parts`, the same of what `add` got by name; `skipped_steps`, how many were; `first_skipped`, the first of
            them, or None.

        Raises:
            BadStepError: a bad step has ended the run.
        """
        good = paddle.clip(self._good, min=1.0)
        means = [total / good for total in (self._loss_sum, *self._part_sums.values())]
        numbers = (self._good, self._halted, self._stop_asked, self._skipped, self._first_skipped, *means)
        numbers = paddle.concat([value.astype("float64") for value in numbers]).tolist()
        good, halted, stop_asked, skipped, first, loss, *means = numbers
        if halted:
            self._end()
        if self._stopping is not None:
            self._stopping.agree(stop_asked > 0)
        parts = dict(zip(self._part_sums, means, strict=True)) if good else {}
        self._start_report()
        return {
            "loss": loss if good else None,
            "parts": parts,
            "skipped_steps": int(skipped),
            "first_skipped": int(first) if skipped else None,
        }

    def _end(self):
        step, infinite, loss, square, mean = self._bad.tolist()
        bad = BadStep(
            step=int(step),
            kind="nonfinite" if infinite else "spike",
            loss=loss,
            grad_norm=square**0.5,
            learning_rate=self._rates.get(int(step)),
            objective=self._objective,
        )
        reason = f"the loss is {loss:.6g}"
        if infinite and math.isfinite(loss):
            reason = f"the gradients are not finite (norm {bad.grad_norm:.3g}; the loss is {loss:.6g})"
        elif not infinite:
            reason += f", more than {self.spike_factor:g} times its running mean {mean:.6g}"
        if self.skips:
            reason += f"; so were {self._max_consecutive} steps one after another"
        try:
            dumped = self.dump(bad)
        except (OSError, ValueError) as error:
            dumped = f"no dump of it could be made: {one_line(error)}."
        again = "" if self.skips else "; or leave such steps out: --on_nonfinite skip"
        raise BadStepError(
            f"step {bad.step}: {reason}. It has changed no weight, and training stops. {dumped} Resume the last "
            f"checkpoint with data that are right, a lower --learning_rate or --max_grad_norm{again}"
        )

    # The running mean is in a checkpoint, so that a resumed run judges as an unbroken one.

    def state_dict(self):
        """Returns JSON values; none without a spike guard."""
        if self.spike_factor <= 0:
            return {}
        return {"loss_mean": float(self._mean), "loss_steps": float(self._mean_steps)}

    def set_state_dict(self, state):
        """Takes over what `state_dict` returned; nothing of an empty one."""
        if "loss_mean" in state:
            self._mean = paddle.full([1], float(state["loss_mean"]))
            self._mean_steps = paddle.full([1], float(state["loss_steps"]))
