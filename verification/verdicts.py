"""A check, and the verdict on it: one line and the figures behind it."""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from runtime.process import one_line, resolve_device

OK, WRONG, SKIPPED = "ok", "WRONG", "skipped"


@dataclass(frozen=True)
class Settings:
    """What the checks are told.

    requested: `auto`, `cpu`, `gpu` or `gpu:N`.
    quick: leave out what takes more than some seconds.
    folder: an empty folder of this group, for files; it is removed afterwards.
    """

    requested: str
    quick: bool
    folder: str

    @functools.cached_property
    def device(self):
        """The device, never `auto`, which is Paddle's current one from now on; ValueError where there is none."""
        import paddle

        device = resolve_device(self.requested)
        paddle.set_device(device)
        return device

    @property
    def on_gpu(self):
        """Whether the device is a GPU."""
        return self.device.startswith("gpu")


@dataclass(frozen=True)
class Check:
    """One question. `run()` returns the text of its verdict, or `(text, figures)`, figures being JSON values.

    It raises `Wrong` where the answer is no, and `Skip` where this machine can't be asked. Any other error is a no too.
    """

    name: str
    run: Callable


class Wrong(Exception):
    """The answer to a check is no. `figures` are those measured."""

    def __init__(self, text, figures=None):
        super().__init__(text)
        self.figures = figures or {}


class Skip(Exception):
    """This machine can't be asked; the text is the reason."""


@dataclass(frozen=True)
class Verdict:
    """What a check has found: `status` is OK, WRONG or SKIPPED."""

    group: str
    check: str
    status: str
    text: str
    seconds: float = 0.0
    figures: dict = field(default_factory=dict)

    def line(self):
        """Returns the verdict for people: `ok       parity: DiT forward, float32: error 2e-07, at most 6e-05`."""
        return f"{self.status:<8} {self.group}: {self.check}{': ' if self.text else ''}{self.text}"

    def as_json(self):
        """Returns a dictionary of JSON values."""
        return asdict(self)


def judge(group, check):
    """Runs a check and returns its `Verdict`. No error of it gets out, other than those that end a process."""
    start, figures = time.perf_counter(), {}
    try:
        outcome = check.run()
        status, text = OK, outcome or ""
        if isinstance(outcome, tuple):
            text, figures = outcome
    except Skip as reason:
        status, text = SKIPPED, str(reason)
    except Wrong as wrong:
        status, text, figures = WRONG, str(wrong), wrong.figures
    except ValueError as error:  # a sentence, as those of the commands
        status, text = WRONG, one_line(error)
    except Exception as error:  # an operator without a kernel, a driver that does not fit, no memory, ...
        status, text = WRONG, f"{type(error).__name__}: {one_line(error)}"
    return Verdict(group, check.name, status, text, round(time.perf_counter() - start, 2), figures)


def within(errors):
    """Returns text and figures of errors that are within their bounds; raises `Wrong` if one is not.

    Args:
        errors: `{what: (error, bound)}`, both numbers. An error that is not a number is beyond any bound.
    """
    figures = {what: {"error": float(error), "bound": float(bound)} for what, (error, bound) in errors.items()}
    beyond = {what: pair for what, pair in errors.items() if not pair[0] <= pair[1]}
    if beyond:
        told = [f"{what} {error:.2g}, at most {bound:.2g}" for what, (error, bound) in [*beyond.items()][:4]]
        told += [f"and {len(beyond) - 4} more"] if len(beyond) > 4 else []
        raise Wrong(", ".join(told), figures)
    what, (error, bound) = max(errors.items(), key=lambda item: item[1][0] / item[1][1] if item[1][1] else 0)
    name = f"{what} " if len(errors) > 1 else ""
    return f"{name}{error:.2g}, at most {bound:.2g}", figures
