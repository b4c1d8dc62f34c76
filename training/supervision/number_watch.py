"""A watch on the numbers: a step whose loss or gradients are not finite changes no weight.

Every step is judged on the device, by its gradients' norm (`training.optimizer.GradientNorm`) and its mean loss over
all ranks. A bad step's gradients become zero and its learning rate 0, so that weights and master weights stay bit for
bit what they were and the moments decay as if the gradient had been zero. The host hears of it at the next report or
save, where it waits for the device anyway.

With `on_nonfinite` "stop" no later step changes a weight either, and the run ends with a dump of the bad step
(`training.supervision.step_dump`), made with the weights that it met. With "skip" the run goes on and counts, until
`MOST_CONSECUTIVE` steps one after another were bad. With `loss_spike_factor` F above 0 a step is bad too if its loss is
more than F times the running mean of those before it.

With float16 the loss scaler finds gradients that are too large for its scale, and the optimizer does nothing: that is
no bad step, unless the loss itself is not finite or the scale has gone down to 1.
"""

import math
from collections import namedtuple

import paddle
import paddle.distributed as dist
from paddle import _C_ops

from runtime.process import EXIT_BAD_STEP, one_line

# So many bad steps one after another end a run that skips them.
MOST_CONSECUTIVE = 100
# The running mean of the loss: over about so many steps, and of use after the first few.
SPIKE_WINDOW, SPIKE_WARMUP = 100, 20

# What ended a run. `kind` is "nonfinite" or "spike"; `loss` is the mean over all ranks; `objective` is the objective's
# state with which the step's random numbers were drawn.
BadStep = namedtuple("BadStep", "step kind loss grad_norm learning_rate objective")


class BadStepError(ValueError):
    """A bad step ended the run. Doing the same again would end in the same way: a scheduler should not restart it."""

    exit_code = EXIT_BAD_STEP


class NumberWatch:
    """Judges the steps of a run and keeps their losses. On several ranks all come to the same verdicts.

    Args:
        training: the config's `training` section.

    Attributes:
        dump: called with a `BadStep` before the run ends, on every rank; returns sentences for the error.
    """

    def __init__(self, training):
        self.skips = training["on_nonfinite"] == "skip"
        self.spike_factor = training["loss_spike_factor"]
        self.dump = lambda bad: ""
        self._most = MOST_CONSECUTIVE if self.skips else 1
        self._losses = []  # of the step's micro-batches
        self._judged = True
        self._step = 0
        self._scaler = self._scale = None
        self._rates = {}  # learning rates of the steps since the host looked
        self._objective = {}
        self._ok = self._rate = None
        # On the device, each of shape (1,).
        self._halted, self._new = paddle.zeros([1], "bool"), paddle.zeros([1], "bool")
        self._in_a_row = paddle.zeros([1], "int64")
        self._mean, self._mean_steps = paddle.zeros([1]), paddle.zeros([1])
        # Of the one that ended the run: step, whether not finite, loss, squared norm, running mean before it.
        self._bad = paddle.zeros([5], "float64")
        self._forget()
        # Operands that `update_loss_scaling_` asks for and does not use.
        self._unused = paddle.ones([1]), paddle.zeros([1], "int32"), paddle.zeros([1], "int32")

    def _forget(self):
        """Starts the numbers of the next report."""
        self._loss_sum, self._good = paddle.zeros([1]), paddle.zeros([1])
        self._skipped, self._first_skipped = paddle.zeros([1], "int64"), paddle.zeros([1], "int64")
        self._rates = {}

    # A step, in the order of these calls. Nothing waits for the device.

    def add(self, loss):
        """Adds a micro-batch's mean loss, a detached tensor."""
        self._losses.append(loss)

    def begin_update(self, step, learning_rate, scaler=None):
        """Tells the watch that the optimizer's step `step` (1-based) comes next.

        Args:
            scaler: the `paddle.amp.GradScaler` that calls the optimizer; None, or one that is off, if none does.
        """
        self._step, self._judged = step, False
        self._rates[step] = learning_rate
        self._scaler = scaler if getattr(scaler, "_enable", False) else None
        self._scale = None if self._scaler is None else scaler._scale

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
        by_dtype = {}
        for gradient in gradients:
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
        for tensors in by_dtype.values():
            # Fills the tensors with zeros if the flag, on the device, is set; if it is not, they are not touched.
            _C_ops.update_loss_scaling_(tensors, bad, *self._unused, 1, 1, 2.0, 0.5, True)
        return paddle.where(bad, paddle.zeros_like(square), square)

    def applied_rate(self, rate):
        """The learning rate to apply, of which 0 is left in a bad step; the same tensor for all parameters."""
        if self._rate is None:
            self._rate = rate * self._ok.astype(rate.dtype).reshape(rate.shape)
        return self._rate

    @paddle.no_grad()
    def end_update(self, objective=None):
        """Call it after the optimizer's step, before the objective's `end_step`.

        Args:
            objective: its state is kept with a bad step.
        """
        if not self._judged:  # the scaler has not even called the optimizer
            self._decide(paddle.full([1], math.inf))
        for name, value in objective.state_dict().items() if objective is not None else ():
            kept = self._objective.get(name, value)
            self._objective[name] = paddle.where(self._new.reshape([1] * value.ndim), value, kept)

    def _decide(self, square):
        """Sets `_ok`, whether the step may change anything, and keeps the books."""
        loss = paddle.add_n([part.astype("float32").reshape([1]) for part in self._losses]) / len(self._losses)
        self._losses, self._judged = [], True
        infinite = ~paddle.isfinite(square)
        if self._scaler is not None:
            overflow = self._scaler._found_inf.reshape([1]) & (self._scale.reshape([1]) > 1.0)
            infinite = infinite & ~overflow
        infinite = infinite | ~paddle.isfinite(loss)
        ranks = dist.get_world_size()
        if ranks > 1:  # the sums are the same bits on all ranks
            sums = paddle.concat([loss / ranks, infinite.astype("float32")])
            dist.all_reduce(sums)
            loss, infinite = sums[0:1], sums[1:2] > 0
        bad = infinite
        if self.spike_factor > 0:
            bad = infinite | ((self._mean_steps >= SPIKE_WARMUP) & (loss > self.spike_factor * self._mean))
        step = paddle.full([1], self._step, "int64")

        self._in_a_row = paddle.where(bad, self._in_a_row + 1, paddle.zeros_like(self._in_a_row))
        self._new = (self._in_a_row >= self._most) & ~self._halted
        record = paddle.concat([value.astype("float64") for value in (step, infinite, loss, square, self._mean)])
        self._bad = paddle.where(self._new.expand([5]), record, self._bad)
        self._halted = self._halted | self._new
        self._ok = ~(bad | self._halted)

        self._first_skipped = paddle.where(bad & (self._skipped == 0), step, self._first_skipped)
        self._skipped = self._skipped + bad.astype("int64")
        self._loss_sum = paddle.where(self._ok, self._loss_sum + loss, self._loss_sum)
        self._good = self._good + self._ok.astype("float32")
        if self.spike_factor > 0:
            steps = paddle.clip(self._mean_steps + 1, max=float(SPIKE_WINDOW))
            self._mean = paddle.where(self._ok, self._mean + (loss - self._mean) / steps, self._mean)
            self._mean_steps = paddle.where(self._ok, steps, self._mean_steps)

    # What the host reads.

    def check(self):
        """Waits for the device; call it before saving. A collective.

        Raises:
            BadStepError: a bad step has ended the run.
        """
        if bool(self._halted):
            self._end()

    def take(self):
        """The numbers since it was last called, for a report; waits for the device. A collective.

        Returns:
            dict: `loss`, the mean over the steps that were not skipped and all ranks, None if there are none;
            `skipped_steps`, how many were; `first_skipped`, the first of them, or None.

        Raises:
            BadStepError: a bad step has ended the run.
        """
        mean = self._loss_sum / paddle.clip(self._good, min=1.0)
        numbers = (mean, self._good, self._halted, self._skipped, self._first_skipped)
        loss, good, halted, skipped, first = paddle.concat([value.astype("float64") for value in numbers]).tolist()
        if halted:
            self._end()
        self._forget()
        return {
            "loss": loss if good else None,
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
        what = f"the loss is {loss:.6g}"
        if infinite and math.isfinite(loss):
            what = f"the gradients are not finite (norm {bad.grad_norm:.3g}; the loss is {loss:.6g})"
        elif not infinite:
            what += f", more than {self.spike_factor:g} times its running mean {mean:.6g}"
        told = f"step {bad.step}: {what}"
        if self.skips:
            told += f"; so were {self._most} steps one after another"
        try:
            found = self.dump(bad)
        except (OSError, ValueError) as error:
            found = f"no dump of it could be made: {one_line(error)}."
        again = "" if self.skips else "; or leave such steps out: --on_nonfinite skip"
        raise BadStepError(
            f"{told}. It has changed no weight, and training stops. {found} Resume the last checkpoint with data that "
            f"are right, a lower --learning_rate or --max_grad_norm{again}"
        )

    # The running mean, for a checkpoint: a resumed run judges as an unbroken one.

    def state_dict(self):
        """JSON values; empty without a spike guard."""
        if self.spike_factor <= 0:
            return {}
        return {"loss_mean": float(self._mean), "loss_steps": float(self._mean_steps)}

    def set_state_dict(self, state):
        """Takes over what `state_dict` returned; of an empty one nothing."""
        if "loss_mean" in state:
            self._mean = paddle.full([1], float(state["loss_mean"]))
            self._mean_steps = paddle.full([1], float(state["loss_steps"]))
