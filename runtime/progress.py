"""`tqdm`, a progress bar for terminals and for logs. Imports no Paddle."""

import contextlib
import os
import sys
import time

from tqdm import tqdm as _Bar

from runtime.process import is_terminal

LINE_SECONDS = 30  # between two lines in a log


def _width(terminal):
    """Returns the columns of a terminal, 0 where it does not know."""
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(terminal.fileno()).columns
    return 0


class tqdm(_Bar):  # noqa: N801
    """Shows tqdm's bar on a terminal; a log gets a plain line, not at each refresh but every `LINE_SECONDS`."""

    def __init__(self, *args, **options):
        self._plain = not is_terminal(options.get("file") or sys.stderr)
        if not self._plain and not _width(options.get("file") or sys.stderr):
            options |= {"ncols": 80, "dynamic_ncols": False}  # tqdm would draw nothing
        self._said, self._next_line = None, time.monotonic() + LINE_SECONDS
        super().__init__(*args, **options)

    def display(self, msg=None, pos=None):
        if not self._plain:
            return super().display(msg, pos)
        if time.monotonic() >= self._next_line:
            self._say()
        return True

    def clear(self, *args, **options):
        if not self._plain:
            super().clear(*args, **options)

    def close(self):
        if not self._plain or self.disable:
            return super().close()
        if self._said != self.n and (self.leave or self._said is not None):
            self._say()
        self.disable = True
        self._decr_instances(self)
        return None

    def _say(self):
        self._said, self._next_line = self.n, time.monotonic() + LINE_SECONDS
        with contextlib.suppress(OSError, ValueError):
            self.fp.write(self.format_meter(**{**self.format_dict, "bar_format": "{l_bar}{r_bar}"}) + "\n")
            self.fp.flush()
