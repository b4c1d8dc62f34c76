"""How a run ends before its last step: asked to by a signal or the clock, or because a rank hangs or is gone.

Asked to, a run finishes its step, saves and leaves with `EXIT_STOPPED`. All ranks must do so after the same step, and
nobody may wait for that in a step. So a thread of every rank, the watch, talks to rank 0's
(`training.supervision.peers`): on a request each stops its main thread at the next end of a step and tells which step
that is; the last one of these is where all stop, and those that are before it go on up to it.

The same messages say where each main thread is. If one of them gets no further for `hang_timeout` seconds, the rank
that is behind the others, or does not answer at all, is named, shows its stack, and all leave with `EXIT_LOST`.
"""

import contextlib
import ctypes
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback

from config.flags import check_stopping
from runtime.process import (
    EXIT_LOST,
    EXIT_STOPPED,
    SAVING_THREAD,
    STARTED,
    exit_now,
    is_mistake,
    is_terminal,
    one_line,
    say,
)
from training.supervision.peers import connect

TICK = 0.5  # seconds between two looks around
BUSY_TICK = 0.05  # while the ranks agree on a step
SILENCE = 3.0  # a rank unheard for so long does not answer; a main thread that keeps the interpreter so long is rare
GRACE = 3.0  # the others let the rank that is to blame leave first: a launcher shows the log of the first one
LOST_WAIT = 10.0  # for the watch to find out who is gone, after a collective has failed
SAVING_SECONDS = 60  # that a checkpoint being written is given before a broken job ends
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Exceptions of a collective, by their words: Paddle has no class for them.
_COLLECTIVE = re.compile("gloo|nccl|socket|connection|peer", re.IGNORECASE)


_running = None


class Stopping:
    """`with Stopping(...) as stopping:` around a run; `start` when training starts.

    Args:
        max_hours: stop before so many hours since the process began are over, or None.
        hang_timeout: seconds without progress after which the job ends; 0: never.
    """

    def __init__(self, *, max_hours=None, hang_timeout=0):
        check_stopping(max_hours, hang_timeout)
        self.max_hours, self.hang_timeout = max_hours, hang_timeout
        self.rank, self.world_size = 0, 1
        self.request = None  # what asked to stop, in words
        self.stopped = False  # whether `due` has said so
        self._changed = threading.Condition()
        self._committed = 0  # the step that the main thread is sure to finish
        self._stop_at = None
        self._count, self._phase, self._since = 0, "starting", 0.0
        self._asleep = 0.0  # seconds in which this process did not run
        self._lost_since = self._failed = self._signalled = None
        self._longest = self._longest_save = self._saving = 0.0  # seconds of a step with what follows it; of a save
        self._last_due = time.monotonic()
        self._thread = self._closing = None
        self._watched = True  # until the watch fails

    def start(self, first_step, *, rank=0, world_size=1):
        """Takes over the signals and starts the watch; every rank calls it.

        Args:
            first_step: steps that are done already.
        """
        self.rank, self.world_size = rank, world_size
        self._committed = first_step + 1
        self._peers = connect(rank, world_size)
        self._order = {"request": None, "stop_at": None, "verdict": None}  # what rank 0 says
        self._wake, waker = socket.socketpair()
        for end in (self._wake, waker):
            end.setblocking(False)
        self._waker, self._closing = waker, False
        self._since = self._last_due = self._last_look = time.monotonic()
        # Newest message of the ranks that this one hears, and when it came.
        self._statuses = dict.fromkeys({rank, 0} if rank else range(world_size), self._status())
        self._heard = dict.fromkeys(self._statuses, self._since)
        self._handlers = None
        if threading.current_thread() is threading.main_thread():
            # Python's own handlers run when the main thread is back from C++. The bytes in this socket come at once.
            self._old_waker = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
            self._handlers = {signum: signal.signal(signum, self._in_main_thread) for signum in SIGNALS}
            for signum in SIGNALS:
                signal.siginterrupt(signum, False)  # system calls of C++ go on
        self._catch_terminate()
        global _running
        _running = self
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def phase(self, name):
        """Tells what the main thread is about to do ("reading data"): it makes progress. Same calls on every rank."""
        self._count, self._phase, self._since = self._count + 1, name, self._now()

    def due(self, step):
        """Whether to save and leave, now that optimizer step `step` is done; every rank gets the same answer.

        Waits only after a request, until the ranks have agreed.
        """
        now = time.monotonic()
        self._longest, self._last_due = max(self._longest, now - self._last_due), now
        with self._changed:
            while self.request and self._stop_at is None and not self._closing:
                self._changed.wait()
            self.stopped = self._stop_at is not None and step >= self._stop_at
            if not self.stopped:
                self._committed = step + 1
            return self.stopped

    def leave(self, text):
        """Ends a run that has stopped and saved: rank 0 says `text`, exit code `EXIT_STOPPED`."""
        if self.rank == 0:
            say(f"stopped by {self.request} {text}")
        raise SystemExit(EXIT_STOPPED)

    def lost(self):
        """A collective has failed: gives the watch time to find out which rank is to blame, and to end this one."""
        self._lost_since = self._now()
        time.sleep(LOST_WAIT)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._thread is None:
            return
        if isinstance(error, Exception):
            if self.world_size > 1 and not is_mistake(error) and _COLLECTIVE.search(str(error)):
                self.lost()
            self._failed = (one_line(error) or repr(error))[:1000]
            if self.world_size > 1:
                time.sleep(2 * TICK if self.rank else 0)  # what rank 0 has said is up to a tick old
                self._let_rank_0_save()
        self._close()

    def close_sockets(self):
        for closable in (self._peers, self._wake, self._waker):
            closable.close()

    def _close(self):
        global _running
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._waker.send(b"\0")
        self._thread.join()
        self._restore_terminate()
        if self._handlers is not None:
            signal.set_wakeup_fd(self._old_waker)
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)
        self.close_sockets()
        self._thread = _running = None

    # Clocks.

    def _now(self):
        """Seconds that stand still while this process is suspended as a whole."""
        return time.monotonic() - self._asleep

    def _look_at_clock(self):
        now = time.monotonic()
        if now - self._last_look > SILENCE + TICK:
            self._asleep += now - self._last_look
        self._saving = self._saving + now - self._last_look if _is_saving() else 0.0
        self._longest_save = max(self._longest_save, self._saving)
        self._last_look = now
        if self.rank == 0 and self.max_hours and self.request is None:
            limit = 3600 * self.max_hours
            # For the step that is under way and the save; not all of it, after one freak of the file system.
            reserve = min(1.5 * (self._longest + self._longest_save), 0.2 * limit)
            if now - STARTED >= limit - reserve:
                self._ask(f"--max_hours {self.max_hours:g}")

    # The watch.

    def _watch(self):
        try:
            self._look_around()
        except Exception as error:  # a defect
            if not self._closing:
                self._go_without_watch(f"the watch has failed: {error!r}")

    def _go_without_watch(self, text):
        if self.world_size == 1:
            with self._changed:
                self._watched = False
                self._stop_at = self._committed if self.request else None
                self._changed.notify_all()
            self._say(f"{text}; training goes on, a signal ends it without a checkpoint from here on")
            return
        # The ranks could not agree on a step to stop at.
        _end_within(2 * GRACE + SAVING_SECONDS, EXIT_LOST)
        self._failed = text
        self._say(f"error: {text}")
        with contextlib.suppress(Exception):
            self._tell(self._status())
            self._let_rank_0_save()
        exit_now(EXIT_LOST, SAVING_SECONDS)

    def _in_main_thread(self, signum, _):
        """Python's handler of a signal: the watch has seen it, if there is one."""
        if not self._watched:
            signal.signal(signum, self._handlers[signum])
            signal.raise_signal(signum)

    def _look_around(self):
        while not self._closing:
            agreeing = self.request is not None and self._stop_at is None
            if self._woken(BUSY_TICK if agreeing and self.rank == 0 else TICK):
                for signum in self._wake.recv(4096):
                    if signum in SIGNALS:
                        self._on_signal(signal.Signals(signum))
            self._look_at_clock()
            self._exchange()
        self._tell({**self._status(), "bye": self._failed is None})

    def _tell(self, status):
        self._peers.send(status if self.rank else {**self._order, "status": status})

    def _woken(self, seconds):
        """Waits for a signal, a message, the end of a line; returns whether it was a signal."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for line in self._peers.lines.values():
            if not line.closed:  # rank 0 is not woken by the messages of a thousand
                poll.register(line, select.POLLIN if self.rank else getattr(select, "POLLRDHUP", 0))
        return self._wake.fileno() in dict(poll.poll(1000 * seconds))

    def _on_signal(self, signum):
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
            news = self.request is None
            self._ask(_name(signum))
            if news:
                self._say(f"{_name(signum)}: finishing the step, then saving; a second signal leaves at once")
            return
        # The launcher sends SIGTERM three times, to one process after the other, beside what a user sends to them all.
        repeated = 1 + int(os.environ.get("PADDLE_LOCAL_SIZE", "0"))  # seconds
        if signum == signal.SIGTERM and now - self._signalled <= repeated:
            self._say(f"another SIGTERM within {repeated} s is taken for the launcher's; a later one leaves at once")
        else:
            self._failed = f"a second {_name(signum)}: left at once"
            _end_within(GRACE, 128 + signum)
            self._tell(self._status())
            self._say(f"{_name(signum)} again: left at once, the steps since the last checkpoint are lost")
            exit_now(128 + signum, saving_seconds=0)

    def _ask(self, request):
        with self._changed:
            self.request = self.request or request

    def _status(self):
        with self._changed:  # once a request is seen here, the main thread commits itself to no further step
            frozen, committed = self.request is not None, self._committed
        now = self._now()
        return {
            "count": self._count,
            "phase": self._phase,
            "age": now - self._since,
            "step": committed,
            "frozen": frozen,
            "request": self.request,
            "lost": now - self._lost_since if self._lost_since is not None else 0,
            "failed": self._failed,
            "bye": False,
            "waits": self.world_size > 1 and waits_for_others(_main_frame()),
            "saving": _is_saving(),
        }

    def _exchange(self):
        self._hear()
        own = self._status()
        self._statuses[self.rank], self._heard[self.rank] = own, self._now()
        if self.rank == 0:
            self._decide()
        self._tell(own)
        self._obey()

    def _hear(self):
        arrived, now = self._peers.receive(), self._now()
        for rank, message in arrived.items():
            self._heard[rank] = now
            if self.rank == 0:
                self._ask(message["request"])
                self._statuses[rank] = message
            else:
                self._order = message
                self._ask(message["request"])
                self._statuses[0] = message["status"]

    def _decide(self):
        """Rank 0: the step to stop at, and who is to blame for a halt."""
        everyone = self._statuses.values()
        if self._stop_at is None and all(status["frozen"] or status["bye"] for status in everyone):
            self._order["stop_at"] = max(status["step"] for status in everyone)
        self._order.update(request=self.request, verdict=self._judge())

    def _judge(self):
        closed = [rank for rank, line in self._peers.lines.items() if line.closed]
        gone = [rank for rank in closed if not self._statuses[rank]["bye"]]
        silence = {rank: self._now() - heard for rank, heard in self._heard.items()}
        return judge(self._statuses, silence, gone, self.hang_timeout, self.world_size)

    def _obey(self):
        stop_at = self._order["stop_at"]
        if stop_at is not None and self._stop_at is None:
            with self._changed:
                self._stop_at = stop_at
                self._changed.notify_all()
        verdict = self._order["verdict"]
        if self.rank and verdict is None:
            gone = self._peers.lines[0].closed or self._now() - self._heard[0] >= SILENCE
            if gone and not self._statuses[0]["bye"]:
                verdict = self._judge()
        if verdict is not None and not self._ends_by_itself():
            self._end(verdict)

    def _ends_by_itself(self):
        return self._closing or self._failed is not None

    def _end(self, verdict):
        """Ends this process: that of the rank to blame at once, with its stack, the others a little later."""
        timer = _end_within(2 * GRACE + SAVING_SECONDS, EXIT_LOST)
        text = f"error: {verdict['text']}"
        if self.rank in verdict["ranks"]:
            stack = traceback.format_stack(_main_frame())
            self._say("\n".join([text, "its stack, the innermost call last:", *(line.rstrip() for line in stack)]))
            time.sleep(TICK)  # an end of the connection that comes too early takes the last message with it
        else:
            if not verdict["failed"]:
                self._say(text)
            self._wait_for_a_word(GRACE)
            if self._ends_by_itself():
                timer.cancel()
                return
            if verdict["failed"]:
                self._say(text)
        self._let_rank_0_save()
        exit_now(EXIT_LOST, SAVING_SECONDS)

    def _wait_for_a_word(self, seconds):
        """Until the launcher signals, or the main thread ends with an error of its own, which tells more."""
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while (left := end - time.monotonic()) > 0 and not self._ends_by_itself():
            if poll.poll(1000 * left) and set(SIGNALS) & set(self._wake.recv(4096)):
                return

    def _let_rank_0_save(self):
        """Waits for a checkpoint that is being written: a launcher kills rank 0 three seconds after another's end."""
        end = time.monotonic() + SAVING_SECONDS
        while time.monotonic() < end and self._rank_0_saves():
            time.sleep(BUSY_TICK)
            if threading.current_thread() is self._thread:
                self._hear()

    def _rank_0_saves(self):
        """By what it said last, as long as it is there."""
        return self._statuses[0]["saving"] and not self._peers.lines[0].closed if self.rank else _is_saving()

    def _say(self, text):
        with contextlib.suppress(ValueError, AttributeError):  # closed, or None
            below_the_bar = "\n" if is_terminal(sys.stderr) else ""
            say(below_the_bar + text, sys.stderr)

    # C++.

    def _catch_terminate(self):
        """A gloo collective that loses its peer throws what no Python code can catch: the process would abort."""
        self._terminate = None
        if self.world_size == 1:
            return
        with contextlib.suppress(OSError, AttributeError):  # Linux only
            handler = ctypes.CFUNCTYPE(None)
            set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
            set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

            def terminated():
                self.lost()
                ctypes.cast(before, handler)()  # nobody is to blame: aborts, with C++'s message

            callback = handler(terminated)
            before = set_terminate(ctypes.cast(callback, ctypes.c_void_p))
            self._terminate = (set_terminate, before, callback)

    def _restore_terminate(self):
        if self._terminate is not None:
            set_terminate, before, _ = self._terminate
            set_terminate(before)


def _end_within(seconds, code):
    """Ends this process even if what is said before finds a stream that the hanging main thread holds."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
    return timer


def _name(signum):
    """Returns the name that a person has for a signal: at a terminal SIGINT is Ctrl-C."""
    return "Ctrl-C" if signum == signal.SIGINT and is_terminal(sys.stdin) else signum.name


def _is_saving():
    return any(thread.name == SAVING_THREAD for thread in threading.enumerate())


def _main_frame():
    """The innermost Python call of the main thread."""
    return sys._current_frames()[threading.main_thread().ident]


def waits_for_others(frame):
    """Whether the innermost call of a thread is a collective, or a backward pass, in which gradients are reduced.

    Only the innermost: the wrappers of a network are around its whole forward pass. Waiting for a GPU does not count:
    it may be the rank's own that hangs.
    """
    paddle = sys.modules.get("paddle")
    if paddle is None:
        return False
    folder, path = os.path.dirname(paddle.__file__), frame.f_code.co_filename
    if path.startswith(os.path.join(folder, "distributed", "")):
        return True
    return path.startswith(os.path.join(folder, "")) and frame.f_code.co_name == "backward"


def judge(statuses, silence, gone, hang_timeout, world_size):
    """Who is to blame if a job has come to a halt.

    Args:
        statuses: newest message of the ranks, by rank.
        silence: seconds since it came, by rank.
        gone: ranks whose connection has ended without a word.
        hang_timeout: seconds without progress that a rank is given; 0: any.

    Returns:
        `{"ranks": those that hang, "text": one line, "failed": whether another rank has an error to show}`; None if all
        is well or nobody is known to be to blame.
    """
    for rank in gone:
        status = statuses[rank]
        if status["failed"]:
            return {"ranks": [], "text": f"rank {rank} failed: {status['failed']}", "failed": True}
        where = f"while {status['phase']} (step {status['step']})"
        return {"ranks": [], "text": f"rank {rank} is gone, {where}; see its log", "failed": False}
    present = {rank: status for rank, status in statuses.items() if not status["bye"]}
    if any(status["failed"] and silence[rank] < SILENCE for rank, status in present.items()):
        return None  # about to leave, once rank 0 has saved
    ages = {rank: status["age"] + silence[rank] for rank, status in present.items()}
    halted = hang_timeout and any(age >= hang_timeout for age in ages.values())
    if not halted and not any(status["lost"] >= SILENCE for status in present.values()):
        return None
    mute = [rank for rank in present if silence[rank] >= SILENCE]
    able = [rank for rank in present if not present[rank]["lost"]]
    lowest = min((present[rank]["count"] for rank in able), default=None)
    behind = [rank for rank in able if present[rank]["count"] == lowest]
    blamed = sorted(mute or [rank for rank in behind if not present[rank]["waits"]] or behind)
    if not blamed:
        return None
    if world_size == 1:
        who = "training"
    elif len(blamed) == world_size:
        who = "every rank"
    else:
        who = ("ranks " if len(blamed) > 1 else "rank ") + ", ".join(map(str, blamed))
    first = present[blamed[0]]
    verb = "hang" if world_size > 1 and 1 < len(blamed) < world_size else "hangs"
    text = f"{who} {verb} since {ages[blamed[0]]:.0f} s while {first['phase']} (step {first['step']})"
    return {"ranks": blamed, "text": text + (", and does not answer" if mute else ""), "failed": False}
