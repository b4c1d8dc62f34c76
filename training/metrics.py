"""Losses and speeds of a run: to the console, to VisualDL, and as JSON lines. No host sync between two reports."""

import contextlib
import glob
import json
import math
import os
import resource
import sys
import time

import numpy as np

from runtime.files import whole_file
from runtime.process import is_terminal, say
from runtime.progress import tqdm

EVALUATIONS = "evaluation.jsonl"
MAX_EARLIER_IMAGES = 100  # previews of before a resume that its VisualDL log gets


def peak_memory_gib():
    """Returns the peak memory of this process: the GPU allocator's if there is one, else the resident set, in GiB."""
    import paddle  # not at the top, because tools/report.py reads the rows without it

    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 2**30
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def read_rows(path):
    """Lists the whole rows of a file of JSON lines, dicts with an integer `step`; None if there is no such file."""
    rows = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                # A kill or a power cut damages lines.
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    row = json.loads(line)
                    if line.endswith("\n") and isinstance(row["step"], int):
                        rows.append(row)
    except FileNotFoundError:
        return None
    return rows


def hyper_parameters(config):
    """Returns the settings of a resolved config that VisualDL's table of runs shows: `{"section.key": value}`."""
    return {
        f"{section}.{key}": value
        for section in ("model", "objective", "training", "data")
        for key, value in config[section].items()
        if isinstance(value, (str, int, float))
    }


def measured(config):
    """Lists the tags by which a run of this config is compared with others: losses, metrics of evaluations."""
    validation = ["validation/loss"] if config["data"]["validation_samples"] else []
    metrics = config["evaluation"]["metrics"] if config["evaluation"]["steps"] is not None else []
    return ["train/loss", *validation, *(f"evaluation/{metric}" for metric in metrics)]


class _Rows:
    """A file of JSON lines, `earlier` ones without those of steps that a resumed run is about to do again.

    Rows that a full disk refuses are kept, and written when there is room. Without a row there is no file.
    """

    def __init__(self, path, first_step):
        self.path, self._file, self._pending, self._refused = path, None, b"", False
        rows = read_rows(path)
        self.earlier = [row for row in rows or () if row["step"] <= first_step]
        if rows is not None and not self.earlier:
            os.remove(path)
        if self.earlier:
            with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.earlier)

    def append(self, values):
        """Writes a row. Returns a line to print the first time that the file system refuses, else None."""
        self._pending += (json.dumps(values) + "\n").encode()
        before, self._refused = self._refused, False
        try:
            self._file = self._file or open(self.path, "ab", buffering=0)
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            self._refused = True
            if not before:
                return f"warning: {self.path}: {error.strerror}; its rows are written when there is room"
        return None

    def close(self):
        if self._file is not None:
            self._file.close()


class TrainingLog:
    """Reports a run every `log_every` optimizer steps, and shows a bar on a terminal; rank 0 writes.

    `folder` gets `metrics.jsonl`, `validation.jsonl` and `evaluation.jsonl`, `visualdl_dir` the tags `train/...`,
    `validation/...` and `evaluation/...`, and the settings of a `config` as hyper-parameters, for its table of runs.
    """

    def __init__(
        self,
        folder,
        *,
        visualdl_dir,
        log_every,
        first_step,
        last_step,
        global_batch_size,
        config=None,
        show_bar=True,
        rank=0,
    ):
        self.log_every, self.global_batch_size = max(1, log_every), global_batch_size
        self.visualdl_dir, self.last_step = visualdl_dir, last_step
        self.first_step = self._step = self._reported = first_step
        self._start, self._paused = time.perf_counter(), 0.0
        self._writer = self._bar = None
        if rank == 0:
            from visualdl import LogWriter

            os.makedirs(folder, exist_ok=True)
            self._writer = LogWriter(visualdl_dir)
            names = {"train": "metrics.jsonl", "validation": "validation.jsonl", "evaluation": EVALUATIONS}
            self._rows = {tag: _Rows(os.path.join(folder, name), first_step) for tag, name in names.items()}
            # VisualDL shows the newest file of a folder only.
            for tag, rows in self._rows.items():
                for values in rows.earlier:
                    self._add_scalars(tag, values)
            self._add_earlier_images(os.path.join(folder, "images"))
            if config is not None:
                self._writer.add_hparams(hyper_parameters(config), measured(config))
            show_bar = show_bar and is_terminal(sys.stderr)
            self._bar = tqdm(
                total=last_step,
                initial=first_step,
                desc="train",
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
                disable=not show_bar,
            )
            self._lines = not (show_bar and is_terminal(sys.stdout))  # else the bar tells it

    def step_done(self, step):
        """Counts an optimizer step (1-based); returns whether it is one to report."""
        self._step = step
        if self._bar is not None:
            self._bar.update(1)
        return step % self.log_every == 0 or step == self.last_step

    def pause(self, seconds):
        """Leaves `seconds` (a save, a preview) out of the speeds of the next report."""
        self._paused += seconds

    def report(self, *, loss, lr, grad_norm, epoch, skipped_steps=0, first_skipped=None, parts=None):
        """Reports the steps since the last report, when the device has done them.

        Args:
            grad_norm: of the last one; None where it is not known.
            loss, skipped_steps, first_skipped, parts: see `NumberWatch.take`; the parts are logged as `loss_NAME`.
        """
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        steps = self._step - self._reported
        values = {
            "step": self._step,
            "epoch": epoch,
            "loss": loss,
            **{f"loss_{name}": value for name, value in (parts or {}).items()},
            "learning_rate": lr,
            "grad_norm": grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None,
            "skipped_steps": skipped_steps,
            "samples_per_second": steps * self.global_batch_size / seconds,
            "steps_per_second": steps / seconds,
            "peak_memory_gib": peak_memory_gib(),
        }
        self._reported, self._start, self._paused = self._step, time.perf_counter(), 0.0
        if self._writer is None:
            return
        self._log("train", values)
        for name, places in (("loss", 4), ("grad_norm", 3)):
            values[name] = "n/a" if values[name] is None else f"{values[name]:.{places}f}"
        self._bar.set_postfix_str("loss {loss}, {samples_per_second:.1f} samples/s".format(**values), refresh=False)
        skipped = f", Skipped Steps: {values['skipped_steps']} (first {first_skipped})" if first_skipped else ""
        line = (
            "(step={step:07d}) Train Loss: {loss}, Train Steps/Sec: {steps_per_second:.2f}, Samples/Sec: "
            "{samples_per_second:.1f}, LR: {learning_rate:.3e}, Grad Norm: {grad_norm}, Epoch: {epoch:.2f}, "
            "Memory: {peak_memory_gib:.2f} GiB".format(**values)
            + skipped
        )
        if self._lines or skipped:
            self.print(line)

    def _log(self, tag, values):
        self._add_scalars(tag, values)
        if warning := self._rows[tag].append(values):
            self.print(warning)

    def _add_scalars(self, tag, values):
        for name, value in values.items():
            if name not in ("step", "num_samples") and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{tag}/{name}", value, values["step"])

    def report_validation(self, step, values):
        """Writes the losses of held-out samples, `{"loss": ..., "ema_loss": ...}`, on rank 0."""
        if self._writer is not None:
            values = {"step": step, **values}
            self._log("validation", values)
            losses = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "step")
            self.print(f"(step={step:07d}) Validation: {losses}")

    def report_evaluation(self, step, metrics, num_samples, settings):
        """Writes the metrics of samples, `{"fid": ..., ...}`, None where one is not finite, on rank 0.

        `settings` say how they were measured. Returns the row of `evaluation.jsonl`.
        """
        row = {"step": step, **metrics, "num_samples": num_samples, "settings": settings}
        if self._writer is not None:
            self._log("evaluation", row)
            shown = ", ".join(f"{name} {'n/a' if value is None else f'{value:.4f}'}" for name, value in metrics.items())
            self.print(f"(step={step:07d}) Evaluation of {num_samples:,} samples: {shown}")
        return row

    def print(self, text):
        """Prints a line above the bar, on rank 0."""
        if self._bar is not None:
            with self._bar.external_write_mode():
                say(text)

    def add_image(self, tag, image, step):
        """Puts an image `(H, W, 3)` uint8 into the VisualDL log, on rank 0."""
        if self._writer is not None:
            self._writer.add_image(tag, image, step, dataformats="HWC")

    def _add_earlier_images(self, folder):
        """Puts the previews of before a resume into the VisualDL log; of very many, evenly spread ones.

        VisualDL shows 10 images of a tag: the first, the newest, and some of all between them.
        """
        from PIL import Image

        paths = {}  # by step; those of later ones are of a branch that was left
        for path in glob.glob(f"{glob.escape(folder)}/*.png"):
            name, _ = os.path.splitext(os.path.basename(path))
            if name.isdecimal() and int(name) <= self.first_step:
                paths[int(name)] = path
        steps = sorted(paths)
        for place in np.linspace(0, len(steps) - 1, min(MAX_EARLIER_IMAGES, len(steps))).round().astype(int):
            step = steps[place]
            with contextlib.suppress(OSError), Image.open(paths[step]) as image:  # one that a kill has cut
                self.add_image("samples/ema", np.asarray(image.convert("RGB")), step)

    def close(self):
        if self._bar is not None:
            self._bar.close()
            for rows in self._rows.values():
                rows.close()
            self._writer.close()
