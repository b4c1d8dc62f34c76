"""How a run ends before its last step: asked to by a signal or the clock, or because it makes no progress any more.

Asked to, a run finishes its step, saves and leaves with `EXIT_STOPPED`: on several ranks after the same step, so that
the request travels with the all-reduce that `NumberWatch` does in every step anyway.

A thread takes the signals, because the main thread may be inside a call of C++ that does not come back. It also ends a
process that makes no progress, with `EXIT_LOST` and the stacks of its threads. Where that call keeps Python's
interpreter lock, faulthandler's timer ends the process with code 1 instead, `SAVING_SECONDS` later.
"""

import contextlib
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time

from config import run_flags
from config.flags import check_flag
from runtime import process
from runtime.process import EXIT_LOST, EXIT_STOPPED, STARTED, exit_now, is_terminal, say

TICK = 0.5  # seconds between two looks at the main thread
AGREE_EVERY = 10  # steps between two looks at what all ranks were asked: each waits for the device
SAVING_SECONDS = 60  # given to a checkpoint that is being written when the process has to end
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A failed collective is told by its words, because Paddle has no class of exception for it.
_COLLECTIVE = re.compile("gloo|nccl|socket|connection|peer", re.IGNORECASE)


class Stopping:
    """Ends a run early: `with Stopping(...) as stopping:` around it, and `start` when training starts.

    Args:
        max_hours: hours since the start of the process before which the run must have stopped; None: no limit.
        hang_timeout: seconds without progress after which the process ends; 0: never.

    `request` says in words what asked this rank to stop, None as long as nothing has; `stopped`: `due` returned True.
    """

    def __init__(self, *, max_hours=None, hang_timeout=0):
        check_flag("max_hours", run_flags.STOPPING_FLAGS["max_hours"], max_hours)
        check_flag("hang_timeout", run_flags.STOPPING_FLAGS["hang_timeout"], hang_timeout)
        self.max_hours, self.hang_timeout = max_hours, hang_timeout
        self.rank, self.world_size = 0, 1
        self.request = self._thread = None
        self.stopped = self._agreed = False

    def start(self, first_step, *, rank=0, world_size=1):
        """Takes over the signals and starts the thread, after `first_step` steps; call it in the main thread."""
        self.rank, self.world_size = rank, world_size
        self._first_step, self._step = first_step, first_step + 1
        self._began = self._last_due = self._since = time.monotonic()
        self._longest_step = self._longest_save = 0.0  # seconds
        self._first_signal, self._phase = None, "starting"
        # Without a stderr its number may be that of a user's file by now.
        self._stacks = sys.__stderr__ or open(os.devnull, "w")
        # Handlers of Python wait until the main thread is back from C++. The bytes in this socket come at once.
        self._undo = contextlib.ExitStack()
        self._wake, self._waker = map(self._undo.enter_context, socket.socketpair())
        self._waker.setblocking(False)
        self._wake.settimeout(TICK)
        before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._undo.callback(signal.set_wakeup_fd, before)
        for signum in SIGNALS:
            self._undo.callback(signal.signal, signum, signal.signal(signum, lambda *_: None))
            signal.siginterrupt(signum, False)  # system calls of C++ go on
        self._thread = threading.Thread(target=self._watch, name="stopping", daemon=True)
        self._thread.start()

    def phase(self, name):
        """Tells that the main thread makes progress, and what it does next ("reading data")."""
        self._phase, self._since = name, time.monotonic()

    def agree(self, asked):
        """Tells whether any rank has been asked to stop; call it on all ranks after the same step."""
        self._agreed = self._agreed or asked

    def due(self, step):
        """Returns whether to save and leave, now that optimizer step `step` is done; the same on every rank."""
        now = time.monotonic()
        self._longest_step, self._last_due = max(self._longest_step, now - self._last_due), now
        self._step = step + 1
        if self.max_hours and self.rank == 0:
            reserve, limit = self._longest_step + self._longest_save, 3600 * self.max_hours
            if self.world_size > 1:
                reserve += AGREE_EVERY * (now - self._began) / (step - self._first_step)
            # At most a fifth of the limit, because one slow save must not end the run hours too early.
            if now - STARTED >= limit - min(1.5 * reserve, 0.2 * limit):
                self.request = self.request or f"--max_hours {self.max_hours:g}"
        self.stopped = self._agreed if self.world_size > 1 else self.request is not None
        return self.stopped

    def leave(self, sentence):
        """Ends a run that has stopped and saved: rank 0 says `sentence`, exit code `EXIT_STOPPED`."""
        if self.rank == 0:
            say(f"stopped by {self.request or 'a signal to another rank'} {sentence}")
        raise SystemExit(EXIT_STOPPED)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._thread is None:
            return
        self._waker.send(b"\0")
        self._thread.join()
        self._thread = None
        faulthandler.cancel_dump_traceback_later()
        self._undo.close()
        lost = isinstance(error, Exception) and not process.is_mistake(error) and _COLLECTIVE.search(str(error))
        if lost and self.world_size > 1:
            self._say(f"error: {self._place()}: another rank is gone: {process.one_line(error)[:1000]}")
            exit_now(EXIT_LOST, SAVING_SECONDS)

    # The thread.

    def _watch(self):
        saving, last = 0.0, time.monotonic()
        while True:
            if self.hang_timeout:
                wait = self.hang_timeout + SAVING_SECONDS
                faulthandler.dump_traceback_later(wait, exit=True, file=self._stacks)
            with contextlib.suppress(TimeoutError):
                for byte in self._wake.recv(4096):
                    if byte == 0:
                        return
                    if byte in SIGNALS:
                        self._on_signal(signal.Signals(byte))
            now = time.monotonic()
            saving = saving + now - last if process.is_saving() else 0.0
            self._longest_save, last = max(self._longest_save, saving), now
            idle = now - self._since
            if self.hang_timeout and idle >= self.hang_timeout:
                self._say(f"error: {self._place()}: no progress for {idle:.0f} s; the stacks of its threads:")
                faulthandler.dump_traceback(self._stacks)
                exit_now(EXIT_LOST, SAVING_SECONDS)

    def _on_signal(self, signum):
        # At a terminal SIGINT is Ctrl-C.
        name = "Ctrl-C" if signum == signal.SIGINT and is_terminal(sys.stdin) else signum.name
        # The launcher sends SIGTERM three times, to one process after the other, beside what a user sends to them all.
        repeated = 1 + int(os.environ.get("PADDLE_LOCAL_SIZE", "0"))  # seconds
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            if self.request is None:
                self.request = name
                self._say(f"{name}: finishing the step, then saving; a second signal leaves at once")
        elif signum == signal.SIGTERM and now - self._first_signal <= repeated:
            self._say(f"another SIGTERM within {repeated} s is taken for the launcher's; a later one leaves at once")
        else:
            self._say(f"{name} again: left at once, the steps since the last checkpoint are lost")
            exit_now(128 + signum, saving_seconds=0)

    def _place(self):
        return f"rank {self.rank} of {self.world_size}, step {self._step}, while {self._phase}"

    def _say(self, text):
        below_the_bar = "\n" if is_terminal(sys.stderr) else ""
        say(below_the_bar + text, sys.stderr)
