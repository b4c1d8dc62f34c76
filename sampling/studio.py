"""One thread that draws what people ask for, one after the other, with one network in memory.

    studio = Studio()
    for event in studio.draw(order):  # of `sampling.web.read_order`
        ...  # `Progress`, again and again, at last a `Drawing`

Paddle is imported when a model is loaded.
"""

import dataclasses
import gc
import math
import os
import queue
import re
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from runtime.process import is_mistake, one_line

SHOWN_STEPS, SHOWN_IMAGES = 8, 4  # of the picture of the steps: columns and rows at most


class CancelledError(Exception):
    """Ends a drawing that nobody waits for any more."""


@dataclass(frozen=True)
class Progress:
    """How far a drawing is: `total` is 0 while nothing can be counted."""

    text: str
    step: int = 0
    total: int = 0


@dataclass(frozen=True)
class Drawing:
    """The images of an `Order`."""

    images: object  # uint8 (N, H, W, 3)
    steps: dict  # {step: uint8 (n, H, W, 3)}: decoded latents, one image of each of the first classes; or {}
    notes: list  # sentences for the user
    seconds: float  # without loading the model


class Studio:
    """Draws in one thread: one network is loaded at a time, and one order is drawn at a time.

    `device` and `dtype` are those of `load_generator`.
    """

    def __init__(self, device="auto", dtype=None):
        self.device, self.dtype = device, dtype
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studio")
        self._path, self._generator = None, None
        self._closed = threading.Event()

    def close(self):
        """Ends what is drawn, at the network's next evaluation, so that the process can end."""
        self._closed.set()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def load(self, choice):
        """Loads a model, and returns when it is there; raises as `load_generator`."""
        self._worker.submit(self._open, choice).result()

    def draw(self, order):
        """Yields `Progress` while an `Order` waits and is drawn, at last its `Drawing`; raises what went wrong.

        When the iterator is closed before its end, the drawing ends at the network's next evaluation.
        """
        events, cancelled, work = queue.Queue(), threading.Event(), None
        try:
            work = self._worker.submit(self._draw, order, events.put, cancelled)
            work.add_done_callback(lambda _: events.put(None))
            while (event := events.get()) is not None:
                yield event
            yield work.result()
        except Exception:
            if self._closed.is_set():  # whatever it was, no program's error
                raise ValueError("nothing is drawn any more: web_demo.py was ended") from None
            raise
        finally:
            cancelled.set()
            if work is not None:
                work.cancel()

    def _open(self, choice):
        if self._path != choice.model.path:
            import paddle

            from sampling.generator import load_generator

            self._path = self._generator = None  # before memory is taken for another one
            gc.collect()
            if paddle.is_compiled_with_cuda():
                paddle.device.cuda.empty_cache()
            self._generator = load_generator(choice.model, device=self.device, dtype=self.dtype, vae=choice.vae)
            self._path = choice.model.path
        return self._generator

    def _draw(self, order, report, cancelled):
        if self._path != order.choice.model.path:
            report(Progress("loading the model"))
        generator = self._open(order.choice)
        start, kept = time.monotonic(), {}
        shown = {math.ceil(order.steps * i / SHOWN_STEPS) for i in range(1, SHOWN_STEPS + 1)}
        each = order.images_per_class

        def check():
            if cancelled.is_set() or self._closed.is_set():
                raise CancelledError

        def network(x, t, y, **hooks):
            check()
            return generator.network(x, t, y, **hooks)

        def watch(step, total, latents):
            report(Progress("drawing", step, total))
            if order.show_steps and (step in shown or step == total):
                kept[step] = latents[: SHOWN_IMAGES * each : each].clone()  # the first image of each class

        drawer = dataclasses.replace(generator, network=network)
        images = drawer.sample(order.ids, callback=watch, **order.options)
        seconds, steps = time.monotonic() - start, {}
        for step, latents in kept.items():
            check()
            report(Progress("decoding the steps", len(steps) + 1, len(kept)))
            steps[step] = generator.decode(latents, "diffusers")
        options = order.choice.methods[order.method].options
        notes = [hide_paths(note, order.choice) for note in generator.describe(order.steps, **options)]
        return Drawing(images, steps, notes, seconds)


_WORDS = {"--num_inference_steps": "steps", "--scheduler": "sampler", "--guidance_scale": "guidance"}  # of the page


def explain(error, order=None):
    """Returns a line for the page on what went wrong. What is no user's mistake goes to stderr with its trace."""
    text = one_line(error)
    if isinstance(error, MemoryError) or "ResourceExhausted" in text or "out of memory" in text.lower():
        return "there is not enough memory for so many images: draw fewer"
    if not is_mistake(error):
        traceback.print_exception(error, file=sys.stderr)
        return "an error in the program: the terminal where web_demo.py runs says more"
    for flag, word in _WORDS.items():
        text = text.replace(flag, word)
    return hide_paths(text, order.choice if order else None)


_START = r"(?<![\w./~-])"  # of a path: "outputs/run" and "https://host" hold no absolute one
_ABSOLUTE = r"""/(?!/)[^\s:;,'"()]+"""


def hide_paths(text, choice=None):
    """Returns a text for the page without absolute paths: a model's is its name, another one is its last part.

    What is in the working directory is named from there.
    """
    shown = {}
    if choice is not None:
        name, path = choice.name, choice.model.path
        shown = {name: name, **dict.fromkeys((path, os.path.abspath(path), os.path.realpath(path)), name)}
        if choice.vae is not None and os.path.isdir(choice.vae):  # its path may have spaces
            paths = (choice.vae, os.path.abspath(choice.vae), os.path.realpath(choice.vae))
            shown.update(dict.fromkeys(paths, os.path.basename(paths[1])))
    if (here := os.path.abspath(os.curdir)) != os.sep:
        shown[here + os.sep] = ""
    known = [re.escape(path) for path in sorted(shown, key=len, reverse=True)]

    def replace(match):
        path = match.group()
        return shown[path] if path in shown else os.path.basename(path.rstrip("/"))

    return re.sub(f"{_START}(?:{'|'.join([*known, _ABSOLUTE])})", replace, text)
