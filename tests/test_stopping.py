"""How a run ends before its last step: on a signal, on the clock, and because a rank hangs or is gone."""

import io
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runs import (
    ROOT,
    checkpoint_path,
    command_environment,
    launch_command,
    loop_arguments,
    read_losses,
    run_script,
    write_config,
)

from runtime.process import EXIT_INTERRUPTED, EXIT_LOST, EXIT_STOPPED, SAVING_THREAD
from training.supervision.peers import connect
from training.supervision.stopping import SILENCE, TICK, Stopping, judge, waits_for_others

LOOPS = ("trainer", "notrainer")


def rows(output):
    """Steps that a run has reported so far."""
    return sum(len(path.read_text().splitlines()) for path in Path(output).rglob("metrics.jsonl"))


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def run_until_signal(run_loop, loop, arguments, output, signum, steps):
    """Runs a loop in this process, and signals it and its loader processes after a few steps; returns the last step."""

    def send():
        wait_until(lambda: rows(output) >= 3)
        if rows(output) < steps:  # or it would be pytest that is ended
            for child in multiprocessing.active_children():
                os.kill(child.pid, signum)
            os.kill(os.getpid(), signum)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(SystemExit) as end:
            run_loop(loop, arguments)
    finally:
        sender.join()
    assert end.value.code == EXIT_STOPPED
    return max(read_losses(output))


@pytest.mark.parametrize(("num_workers", "signum"), [(0, signal.SIGTERM), (2, signal.SIGINT)])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_signal_saves_after_the_step_and_the_resumed_run_is_the_unbroken_one(
    loop, num_workers, signum, features, tmp_path, run_loop, capsys, monkeypatch
):
    steps = 20
    config = write_config(tmp_path / "Tiny.json")

    def arguments(output):
        workers = "--dataloader_num_workers" if loop == "trainer" else "--num_workers"
        given = loop_arguments(loop, config=config, features=features, output=output, steps=steps)
        return [*given, f"{workers}={num_workers}"]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_loop(loop, arguments(whole))
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "wb", 0) as unheard:
        if num_workers == 0:  # nobody reads what the run says any more
            patch.setattr(sys, "stderr", io.TextIOWrapper(unheard, write_through=True))
        last = run_until_signal(run_loop, loop, arguments(broken), broken, signum, steps)
    assert 3 <= last < steps
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert checkpoint_path(loop, broken, last).is_dir()
    assert f"stopped by {signum.name} after step {last} of {steps}" in capsys.readouterr().out
    run_loop(loop, [*arguments(broken), *(["--resume", broken] if loop == "notrainer" else [])])
    assert read_losses(broken) == read_losses(whole)
    for name in ("model_state.pdparams", "ema_state.pdparams", "optimizer.pdopt"):
        ours, theirs = ((checkpoint_path(loop, folder, steps) / name).read_bytes() for folder in (broken, whole))
        assert ours == theirs, name


@pytest.mark.parametrize("loop", LOOPS)
def test_max_hours_stops_in_time_with_a_checkpoint(loop, features, tmp_path, run_loop, capsys):
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments(loop, config=config, features=features, output=tmp_path / "out", steps=500)
    with pytest.raises(SystemExit) as end:
        run_loop(loop, [*arguments, "--max_hours=0.000001"])  # over before training starts: one step
    assert end.value.code == EXIT_STOPPED
    last = max(read_losses(tmp_path / "out"))
    assert last < 100 and checkpoint_path(loop, tmp_path / "out", last).is_dir()
    assert f"stopped by --max_hours 1e-06 after step {last} of 500" in capsys.readouterr().out


def test_limits_that_make_no_sense_are_refused():
    for name, value in (("max_hours", 0.0), ("max_hours", float("nan")), ("hang_timeout", -1.0)):
        with pytest.raises(ValueError, match=f"--{name} must be .*, got {value}"):
            Stopping(**{name: value})


def test_max_hours_leaves_room_for_a_step_and_a_save(monkeypatch):
    monkeypatch.setattr("training.supervision.stopping.STARTED", time.monotonic() - 3580)
    with Stopping(max_hours=1) as stopping:
        stopping.start(0)
        time.sleep(2 * TICK)
        assert not stopping.due(1)
        stopping._longest, stopping._longest_save = 5.0, 8.0  # seconds, of the 19 that are left
        time.sleep(2 * TICK)
        assert stopping.due(2) and stopping.request == "--max_hours 1"


def test_sigint_is_called_ctrl_c_at_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(closed=False, isatty=lambda: True))
    with Stopping() as stopping:
        stopping.start(0)
        signal.raise_signal(signal.SIGINT)
        wait_until(lambda: stopping.request, 10)
        with pytest.raises(SystemExit):
            stopping.leave("after step 1")
    said = capsys.readouterr()
    assert said.out == "stopped by Ctrl-C after step 1\n" and "Ctrl-C: finishing the step" in said.err


def test_a_watch_that_fails_keeps_nobody_waiting(monkeypatch, capsys):
    with Stopping() as stopping:
        stopping.start(0)
        monkeypatch.setattr(stopping, "_exchange", lambda: 1 / 0)
        stopping._ask("a request")
        assert stopping.due(1)  # would wait for an agreement
        stopping._thread.join(10)
        with pytest.raises(KeyboardInterrupt):  # as without a watch
            signal.raise_signal(signal.SIGINT)
    assert "the watch has failed: ZeroDivisionError" in capsys.readouterr().err


# A process alone.


def start(command, stderr=subprocess.PIPE):
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def ended(process, seconds=60):
    """`(exit code, stdout, stderr)`."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


# A file system that does not answer any more, once the file HANG is there.
HANGING = """
import os, sys, time
sys.path.insert(0, ROOT)
from runtime.process import configure_runtime, run_cli
configure_runtime()
import train_image_generation_notrainer as script
from features.dataset import FeatureDataset
read = FeatureDataset.read
def hang(*batch):
    while os.path.exists(HANG):
        time.sleep(1000)
    return read(*batch)
FeatureDataset.read = hang
run_cli(script.main)
"""


def test_a_second_signal_leaves_at_once_and_a_hang_ends_with_its_stack(features, tmp_path):
    config, hang = write_config(tmp_path / "Tiny.json"), tmp_path / "hang"
    code = HANGING.replace("ROOT", repr(str(ROOT))).replace("HANG", repr(str(hang)))
    processes, outputs = {}, {name: tmp_path / name for name in ("signalled", "hanging")}
    for name, output in outputs.items():
        given = loop_arguments("notrainer", config=config, features=features, output=output, steps=10**6)
        processes[name] = start([sys.executable, "-c", code, *given, f"--hang_timeout={int(name == 'hanging')}"])
    wait_until(lambda: all(rows(output) >= 3 for output in outputs.values()))
    hang.touch()

    code, _, err = ended(processes["hanging"])
    assert code == EXIT_LOST, err
    assert "error: training hangs since 1 s while reading data (step " in err
    assert "in main" in err and "in hang" in err  # the stack

    os.kill(processes["signalled"].pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(processes["signalled"].pid, signal.SIGTERM)
    time.sleep(0.8)
    assert processes["signalled"].poll() is None  # its step can't be finished
    os.kill(processes["signalled"].pid, signal.SIGINT)
    code, _, err = ended(processes["signalled"], seconds=5)
    assert code == EXIT_INTERRUPTED
    assert err.count("SIGTERM: ") == 1 and "SIGINT again: left at once" in err and "Traceback" not in err
    assert "another SIGTERM within 1 s is taken for the launcher's" in err
    assert not list(outputs["signalled"].glob("*/checkpoints/*"))


UNHEARD = """
import sys, time
from pathlib import Path
from runtime.process import run_cli
from training.supervision.stopping import Stopping
def main():
    with Stopping() as stopping:
        stopping.start(0)
        step = 1
        print("started", flush=True)
        while not stopping.due(step):
            step += 1
            time.sleep(0.01)
        stopping.leave(f"after step {step}")
run_cli(main)
"""


def test_a_signal_stops_a_run_that_nobody_listens_to():
    reader, writer = os.pipe()
    process = start([sys.executable, "-c", UNHEARD], stderr=writer)
    os.close(writer)
    os.close(reader)
    assert process.stdout.readline() == "started\n"
    process.terminate()
    code, out, _ = ended(process)
    assert code == EXIT_STOPPED and "stopped by SIGTERM after step" in out


LEAVING = """
import multiprocessing, signal, sys, threading, time
from runtime.process import exit_now

def killed(*_):
    raise SystemError("DataLoader process exited")  # as Paddle's handler does in the main thread

if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, killed)
    for _ in range(30):
        multiprocessing.Process(target=time.sleep, args=[60], daemon=True).start()
    if sys.argv[1] == "main":
        exit_now(3)
    threading.Thread(target=exit_now, args=[3]).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("thread", ["main", "another"])
def test_the_loaders_that_an_exit_kills_do_not_change_its_code(thread, tmp_path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    done = run_script(tmp_path / "leaving.py", [thread])
    assert done.returncode == 3 and "SystemError" not in done.stderr, done.stderr


def test_ctrl_c_before_training_is_one_line():
    code = "import signal; from runtime.process import run_cli; run_cli(lambda: signal.raise_signal(signal.SIGINT))"
    assert ended(start([sys.executable, "-c", code])) == (EXIT_INTERRUPTED, "", "interrupted\n")


# Two ranks.


def status(**given):
    usual = {"phase": "training", "step": 7, "count": 20, "age": 0.0, "lost": 0, "failed": None, "bye": False}
    return {**usual, "waits": False, **given}


def test_the_rank_to_blame():
    def blamed(*statuses, silence=(), gone=(), hang_timeout=60):
        silence = {rank: 0.0 for rank in range(len(statuses))} | dict(silence)
        return judge(dict(enumerate(statuses)), silence, list(gone), hang_timeout, len(statuses))

    late, waiting = status(age=61.0, count=19, phase="reading data"), status(age=60.5)
    assert blamed(status(age=59.0), status(age=1.0)) is None
    assert blamed(late, waiting, hang_timeout=0) is None
    assert blamed(status(), late, waiting) == {
        "ranks": [1],
        "text": "rank 1 hangs since 61 s while reading data (step 7)",
        "failed": False,
    }
    # The one that says nothing, wherever it was last; not the one that is done.
    mute = blamed(waiting, late, status(), silence={2: SILENCE + 62})
    assert mute["text"] == "rank 2 hangs since 65 s while training (step 7), and does not answer"
    assert blamed(status(bye=True), status(age=30.0), silence={0: 500.0}) is None
    assert blamed(waiting, waiting)["text"] == "every rank hangs since 60 s while training (step 7)"
    # In the same part of a step: those that are in a collective wait for those that are not.
    in_collective = status(age=62.0, waits=True)
    assert blamed(in_collective, waiting, in_collective)["ranks"] == [1]
    assert blamed(in_collective, in_collective)["text"] == "every rank hangs since 62 s while training (step 7)"
    assert blamed(waiting, status(age=62.0, count=19, waits=True))["ranks"] == [1]
    assert blamed(late)["text"] == "training hangs since 61 s while reading data (step 7)"
    # A collective has failed somewhere: the others have a moment to say why.
    assert blamed(status(lost=1.0), status()) is None
    assert blamed(status(lost=SILENCE), status(age=9.0))["ranks"] == [1]
    assert blamed(status(lost=SILENCE), status(lost=SILENCE)) is None
    assert blamed(status(), status(failed="no space"), gone=[1])["text"] == "rank 1 failed: no space"
    assert blamed(waiting, status(age=61.0, failed="no space")) is None  # it lets rank 0 save, and leaves
    assert blamed(status(), late, gone=[1])["text"] == "rank 1 is gone, while reading data (step 7); see its log"


def rank_processes(launcher):
    """Process ids of the ranks that a launcher has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    ranks = {}
    for pid in map(int, found):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks.update({int(entry[18:]): pid for entry in environment if entry.startswith(b"PADDLE_TRAINER_ID=")})
    return ranks


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("loop", "signum", "target", "exit_code"),
    [
        ("trainer", signal.SIGTERM, "launcher", signal.SIGTERM),  # what Paddle's launcher leaves with
        ("notrainer", signal.SIGTERM, 1, EXIT_STOPPED),
        ("notrainer", signal.SIGKILL, 1, EXIT_LOST),
        ("notrainer", signal.SIGSTOP, 1, EXIT_LOST),
    ],
)
def test_two_ranks_end_together(loop, signum, target, exit_code, features, tmp_path):
    config, output, steps = write_config(tmp_path / "Tiny.json"), tmp_path / "out", 10**6
    arguments = loop_arguments(loop, config=config, features=features, output=output, steps=steps, ranks=2)
    script = f"train_image_generation_{loop}.py"
    launcher = start(launch_command(2, script, [*arguments, "--hang_timeout=4"], tmp_path / "log"))
    ranks = {}
    try:
        wait_until(lambda: rows(output) >= 3 or launcher.poll() is not None)
        ranks = rank_processes(launcher)
        sent = time.monotonic()
        os.kill(launcher.pid if target == "launcher" else ranks[target], signum)
        code, out, _ = ended(launcher)
        seconds = time.monotonic() - sent
    finally:
        for pid in ranks.values():
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    log = (tmp_path / "log" / "workerlog.0").read_text()
    assert code == exit_code, out + log
    if exit_code == EXIT_LOST:
        said = {
            signal.SIGKILL: "error: rank 1 is gone, while ",
            signal.SIGSTOP: "error: rank 1 hangs since 4 s while ",
        }[signum]
        assert said in log and seconds < 30
        assert not any(trace in out + log for trace in ("Traceback", "terminate called", "Error Message"))
    else:
        last = max(read_losses(output))
        assert checkpoint_path(loop, output, last).is_dir()
        assert f"stopped by SIGTERM after step {last} of {steps}" in log


# A rank that hangs in Python in the middle of a step; the other one is then in its backward pass, with the same count.
HANGING_RANK = """
import time
from runtime.process import configure_runtime, init_distributed, run_cli
configure_runtime()
from training.supervision.stopping import Stopping
def main():
    import paddle
    paddle.set_device("cpu")
    rank, world_size = init_distributed()
    network = paddle.DataParallel(paddle.nn.Linear(2, 2))
    with Stopping(hang_timeout=2) as stopping:
        stopping.start(0, rank=rank, world_size=world_size)
        paddle.distributed.barrier()
        stopping.phase("training")
        loss = network(paddle.ones([1, 2])).sum()
        if rank == 1:
            time.sleep(1000)
        loss.backward()
run_cli(main)
"""


@pytest.mark.distributed
def test_a_hang_inside_a_step_is_told_from_the_wait_for_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(HANGING_RANK)
    code, out, _ = ended(start(launch_command(2, script, [], tmp_path / "log")))
    logs = [(tmp_path / "log" / f"workerlog.{rank}").read_text() for rank in range(2)]
    assert code == EXIT_LOST, out + logs[0]
    assert "time.sleep(1000)" in logs[1]  # the stack
    for log in logs:
        assert re.search(r"error: rank 1 hangs since \d s while training \(step 1\)", log)
    assert "its stack" not in logs[0]


def test_only_the_innermost_call_of_a_stack_waits_for_others():
    import paddle

    def waits(*paths):
        """A stack of calls of code in these files, outermost first."""
        call, paths = "sys._getframe()", list(paths)
        scope = {"sys": sys}
        for path in reversed(paths):
            exec(compile(f"def call():\n    return {call}", path, "exec"), inner := dict(scope))
            scope["inner"], call = inner["call"], "inner()"
        return waits_for_others(scope["inner"]())

    distributed = os.path.join(os.path.dirname(paddle.__file__), "distributed")
    collective, wrapper = (os.path.join(distributed, path) for path in ("communication/group.py", "parallel.py"))
    assert waits("train.py", collective)
    assert not waits("train.py", wrapper, "models/dit.py")
    assert not waits("train.py") and not waits("elsewhere/paddle/distributed/script.py")


@pytest.fixture
def store(monkeypatch):
    """What stands in for Paddle's store, where ranks are in one process."""
    values = {}
    store = SimpleNamespace(set=values.__setitem__, get=values.get)
    monkeypatch.setattr("paddle.base.core.create_or_get_global_tcp_store", lambda: store)
    return values


def test_ranks_stop_after_the_last_step_that_one_of_them_has_begun(store, monkeypatch):
    with Stopping() as ahead, Stopping() as behind, ThreadPoolExecutor() as pool:
        for rank, stopping in enumerate((ahead, behind)):
            monkeypatch.setattr("training.supervision.peers._meetings", 0)
            stopping.start(4, rank=rank, world_size=2)
        assert not any((ahead.due(5), ahead.due(6), behind.due(5)))  # in step 7, and in step 6
        os.kill(os.getpid(), signal.SIGTERM)  # `behind` has the signals, as the last one that took them
        wait_until(lambda: behind.request)
        assert pool.submit(behind.due, 6).result(20) is False
        answers = [pool.submit(stopping.due, 7) for stopping in (behind, ahead)]
        assert [answer.result(20) for answer in answers] == [True, True]
        assert ahead.request == behind.request == "SIGTERM" and ahead.stopped and behind.stopped


def test_a_rank_that_fails_lets_rank_0_save_and_rank_0_leaves_its_end_alone(store, monkeypatch):
    saved = threading.Event()
    saving = threading.Thread(target=saved.wait, name=SAVING_THREAD)
    with Stopping() as first, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr("training.supervision.peers._meetings", 0)
        first.start(0, world_size=2)
        monkeypatch.setattr("training.supervision.peers._meetings", 0)
        second = Stopping()
        pool.submit(second.start, 0, rank=1, world_size=2).result(20)
        saving.start()
        error = RuntimeError("a defect")
        leaving = pool.submit(second.__exit__, RuntimeError, error, None)
        try:
            time.sleep(4 * TICK)
            assert not leaving.done() and not first._peers.lines[1].closed
        finally:
            saved.set()
        leaving.result(3 * TICK)
        wait_until(lambda: first._order["verdict"], 10)
        assert first._order["verdict"]["text"] == "rank 1 failed: a defect"
        wait_until(timers, 10)  # would end this process a minute later
    wait_until(lambda: not timers(), 10)


def timers():
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_messages_arrive_and_strangers_are_left_out(store, monkeypatch):
    def join(rank):
        monkeypatch.setattr("training.supervision.peers._meetings", 0)
        return connect(rank, 4)

    hub, first, second = join(0), join(1), join(2)
    heard = {}

    def hears(**expected):
        heard.update({f"rank_{rank}": message for rank, message in hub.receive().items()})
        return heard == expected

    first.send({"step": 1})
    second.send({"step": 2})
    wait_until(lambda: hears(rank_1={"step": 1}, rank_2={"step": 2}))
    (address,) = store.values()
    with socket.create_connection(json.loads(address)["address"]) as stranger:
        stranger.sendall(b'{"token": "guess", "rank": 3}\n{"step": 3}\n')
        stranger.settimeout(0.01)

        def is_refused():
            hub.receive()
            try:
                return stranger.recv(1) == b""
            except TimeoutError:
                return False

        wait_until(is_refused)
    assert sorted(hub.lines) == [1, 2]
    hub.send({"to": "all"})
    wait_until(lambda: second.receive() == {0: {"to": "all"}})
    # What was sent before the end is still read, and the end is seen.
    first.send({"bye": True})
    first.close()
    wait_until(lambda: hears(rank_1={"bye": True}, rank_2={"step": 2}))
    wait_until(lambda: hears(rank_1={"bye": True}, rank_2={"step": 2}) and hub.lines[1].closed)
    # A peer that does not read keeps nobody waiting, and finds whole messages when it does.
    for number in range(100_000):
        hub.send({"number": number, "filler": "x" * 100})
    assert not hub.lines[2].closed and 0 < second.receive()[0]["number"] < 99_999
    second.close()
    hub.close()
