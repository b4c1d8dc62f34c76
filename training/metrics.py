"""Losses and speeds of a run: to the console, to VisualDL, and as JSON lines. No host sync between two reports."""

import json
import math
import os
import resource
import sys
import time

import paddle
import paddle.distributed as dist
from tqdm import tqdm


def peak_memory_gib():
    """Peak memory of this process: the GPU allocator's if there is one, else the resident set, in GiB."""
    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 2**30
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def _open_rows(path, first_step):
    """Opens the file to append to, without the rows of steps that a resumed run is about to do again."""
    kept = []  # lines
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= first_step]
    file = open(path, "w", encoding="utf-8")
    file.writelines(kept)
    return file, [json.loads(line) for line in kept]


class TrainingLog:
    """Collects the losses of the steps and reports them every `log_every` steps; rank 0 writes.

    Args:
        folder: gets `metrics.jsonl` and `validation.jsonl`, one object a report.
        visualdl_dir: gets the VisualDL log, tags `train/...` and `validation/...`.
        log_every: optimizer steps between reports.
        first_step, last_step: where the run starts and ends.
        global_batch_size: samples an optimizer step.
        show_bar: a tqdm bar beside the lines.
    """

    def __init__(
        self, folder, *, visualdl_dir, log_every, first_step, last_step, global_batch_size, show_bar=True, rank=0
    ):
        self.log_every = max(1, log_every)
        self.global_batch_size = global_batch_size
        self.last_step = last_step
        self.visualdl_dir = visualdl_dir
        self._step = self._reported = first_step
        self._loss_sum = None
        self._micro_losses = 0
        self._start = time.perf_counter()
        self._paused = 0.0
        self._writer = self._file = self._bar = None
        if rank == 0:
            from visualdl import LogWriter

            os.makedirs(folder, exist_ok=True)
            self._writer = LogWriter(visualdl_dir)
            self._file, earlier = _open_rows(os.path.join(folder, "metrics.jsonl"), first_step)
            self._validations, validations = _open_rows(os.path.join(folder, "validation.jsonl"), first_step)
            for values in earlier:  # VisualDL shows the newest file of a folder only
                self._add_scalars("train", values)
            for values in validations:
                self._add_scalars("validation", values)
            self._bar = tqdm(
                total=last_step,
                initial=first_step,
                desc="train",
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
                disable=not show_bar,
            )

    def add(self, loss):
        """Adds a micro-batch's mean loss, a detached tensor; stays on the device."""
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        self._micro_losses += 1

    def will_report(self, step):
        """Whether optimizer step `step` (1-based) is one to report: then the gradient norm is worth computing."""
        return step % self.log_every == 0 or step == self.last_step

    def step_done(self, step):
        """Counts an optimizer step; returns whether it is one to report."""
        self._step = step
        if self._bar is not None:
            self._bar.update(1)
        return self.will_report(step)

    def pause(self, seconds):
        """Leaves `seconds` (a save, a preview) out of the speeds of the next report."""
        self._paused += seconds

    def check_finite(self):
        """The mean loss since the last report over all ranks; waits for the device. Call it before saving.

        Raises:
            ValueError: it is not a number: nothing that is saved from here on is of use.
        """
        if self._loss_sum is None:
            return None
        mean = self._loss_sum / self._micro_losses
        if dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        loss = float(mean)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} between steps {self._reported + 1} and {self._step}: training has diverged and "
                "stops here, before this is saved; resume the last checkpoint with a lower learning rate, or with "
                "gradient clipping (--max_grad_norm)"
            )
        return loss

    def report(self, *, lr, grad_norm, epoch):
        """Reports the mean over the steps since the last report and over all ranks. The one place that waits.

        Args:
            grad_norm: None where it is not known.

        Raises:
            ValueError: see `check_finite`.
        """
        loss = self.check_finite()
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        steps = self._step - self._reported
        values = {
            "step": self._step,
            "epoch": epoch,
            "loss": loss,
            "learning_rate": lr,
            "grad_norm": grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None,
            "samples_per_second": steps * self.global_batch_size / seconds,
            "steps_per_second": steps / seconds,
            "peak_memory_gib": peak_memory_gib(),
        }
        self._loss_sum, self._micro_losses = None, 0
        self._reported, self._start, self._paused = self._step, time.perf_counter(), 0.0
        if self._writer is not None:
            self._write(dict(values))
        return values

    def _write(self, values):
        self._add_scalars("train", values)
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        grad_norm = values["grad_norm"]
        values["grad_norm"] = "n/a" if grad_norm is None else f"{grad_norm:.3f}"
        self.print(
            "(step={step:07d}) Train Loss: {loss:.4f}, Train Steps/Sec: {steps_per_second:.2f}, Samples/Sec: "
            "{samples_per_second:.1f}, LR: {learning_rate:.3e}, Grad Norm: {grad_norm}, Epoch: {epoch:.2f}, "
            "Memory: {peak_memory_gib:.2f} GiB".format(**values)
        )

    def _add_scalars(self, tag, values):
        for name, value in values.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(f"{tag}/{name}", value, values["step"])

    def report_validation(self, step, values):
        """Writes the losses of held-out samples, `{"loss": ..., "ema_loss": ...}`, on rank 0."""
        if self._writer is not None:
            values = {"step": step, **values}
            self._add_scalars("validation", values)
            self._validations.write(json.dumps(values) + "\n")
            self._validations.flush()
            losses = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "step")
            self.print(f"(step={step:07d}) Validation: {losses}")

    def print(self, text):
        """Prints a line above the bar, on rank 0."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def add_image(self, tag, image, step):
        """Puts an image `(H, W, 3)` uint8 into the VisualDL log, on rank 0."""
        if self._writer is not None:
            self._writer.add_image(tag, image, step, dataformats="HWC")

    def close(self):
        if self._bar is not None:
            self._bar.close()
            self._file.close()
            self._validations.close()
            self._writer.close()
