"""How a run ends before its last step: on a signal, on the clock, and because a rank hangs or is gone."""

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
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

from config.flags import Parser
from runtime.process import EXIT_INTERRUPTED, EXIT_LOST, EXIT_STOPPED
from training.supervision.stopping import AGREE_EVERY, Stopping

LOOPS = ("trainer", "notrainer")


def rows(output):
    """Returns how many steps a run has reported so far."""
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
    loop, num_workers, signum, features, tmp_path, run_loop, capsys
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
        run_loop(loop, [*arguments, "--resume-from-checkpoint=auto", "--max_hours=0.000001"])  # over at once: one step
    assert end.value.code == EXIT_STOPPED
    assert list(read_losses(tmp_path / "out")) == [1] and checkpoint_path(loop, tmp_path / "out", 1).is_dir()
    out = capsys.readouterr().out
    assert "stopped by --max_hours 1e-06 after step 1 of 500" in out
    command = next(line for line in out.splitlines() if line.startswith("next: "))
    again = Parser(loop).parse_args(shlex.split(command)[3:])
    run = "auto" if loop == "trainer" else str(checkpoint_path(loop, tmp_path / "out", 1).parents[1])
    assert (again.resume, again.max_steps) == (run, 500)


def test_limits_that_make_no_sense_are_refused():
    for name, value in (("max_hours", 0.0), ("max_hours", float("nan")), ("hang_timeout", -1.0)):
        with pytest.raises(ValueError, match=f"--{name} must be .*, got {value}"):
            Stopping(**{name: value})


@pytest.mark.parametrize("ranks", [1, 2])
def test_max_hours_leaves_room_for_steps_and_a_save(monkeypatch, ranks):
    left = 20.0  # seconds
    monkeypatch.setattr("training.supervision.stopping.STARTED", time.monotonic() - 3600 + left)
    with Stopping(max_hours=1) as stopping:
        stopping.start(0, world_size=ranks)
        assert not stopping.due(1) and stopping.request is None
        stopping._longest_save = left / 1.5
        if ranks > 1:  # the ranks may agree as late as `AGREE_EVERY` steps after the request
            stopping._longest_save, stopping._began = 0.0, time.monotonic() - 2 * left / 1.5 / AGREE_EVERY
        assert stopping.due(2) is (ranks == 1) and stopping.request == "--max_hours 1"


def test_sigint_is_called_ctrl_c_at_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(closed=False, isatty=lambda: True))
    with Stopping() as stopping:
        stopping.start(0)
        signal.raise_signal(signal.SIGINT)
        wait_until(lambda: stopping.request, 10)
        assert stopping.due(1)
        with pytest.raises(SystemExit):
            stopping.leave("after step 1")
    said = capsys.readouterr()
    assert said.out == "stopped by Ctrl-C after step 1\n" and "Ctrl-C: finishing the step" in said.err


# A process alone, in which no Paddle is imported.


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
    """Returns `(exit code, stdout, stderr)`."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


RUN = """
import ctypes, sys, threading, time
from runtime.process import SAVING_THREAD, run_cli
from training.supervision import stopping as module

def hang():
    time.sleep(1000)

def hang_beside_a_save():
    threading.Thread(target=lambda: (time.sleep(2), print("saved", flush=True)), name=SAVING_THREAD).start()
    time.sleep(1000)

def keep_the_lock():
    module.SAVING_SECONDS = 1
    time.sleep(2 * module.TICK)
    ctypes.PyDLL(None).sleep(1000)

def lose_a_peer():
    raise RuntimeError("[gloo/transport/tcp/pair.cc:576] Read error: Connection reset by peer")

def fail():
    raise RuntimeError("a defect")

def work():
    for step in range(1, 1000):
        stopping.phase("training")
        time.sleep(0.02)
        if stopping.due(step):
            stopping.leave(f"after step {step}")

def go_on():
    end = time.monotonic() + 2
    while time.monotonic() < end:
        stopping.phase("training")
        time.sleep(0.01)

def main():
    global stopping
    name, hang_timeout, ranks = sys.argv[1:]
    with module.Stopping(hang_timeout=float(hang_timeout)) as stopping:
        stopping.start(4, world_size=int(ranks))
        stopping.phase("reading data")
        print("started", flush=True)
        globals()[name]()

run_cli(main)
"""


def run(name, hang_timeout=0, ranks=1, **options):
    process = start([sys.executable, "-c", RUN, name, hang_timeout, ranks], **options)
    assert process.stdout.readline() == "started\n"
    return process


def test_a_hang_ends_with_its_stacks():
    code, _, err = ended(run("hang", 1))
    assert code == EXIT_LOST, err
    assert "error: rank 0 of 1, step 5, while reading data: no progress for 1 s; the stacks of its threads:" in err
    assert "in hang" in err and "in main" in err
    assert ended(run("go_on", 1))[0] == 0


def test_a_hang_ends_after_a_checkpoint_that_is_being_written():
    code, out, _ = ended(run("hang_beside_a_save", 1))
    assert code == EXIT_LOST and out == "saved\n"


def test_a_hang_that_keeps_the_interpreter_lock_ends_too():
    code, _, err = ended(run("keep_the_lock", 1))
    assert code == 1 and err.startswith("Timeout (0:00:02)!") and "in keep_the_lock" in err


def test_a_failed_collective_is_one_line():
    code, _, err = ended(run("lose_a_peer", ranks=2))
    assert code == EXIT_LOST
    assert err.startswith("error: rank 0 of 2, step 5, while reading data: another rank is gone: [gloo")
    assert err.count("\n") == 1
    for name, ranks in (("lose_a_peer", 1), ("fail", 2)):  # nobody to lose; and nothing of the kind
        code, _, err = ended(run(name, ranks=ranks))
        assert code == 1 and "Traceback" in err


def test_a_second_signal_leaves_at_once():
    process = run("hang")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: finishing the step, then saving; a second signal")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("another SIGTERM within 1 s is taken for the launcher's")
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process, seconds=5)
    assert code == EXIT_INTERRUPTED
    assert err == "SIGINT again: left at once, the steps since the last checkpoint are lost\n"


def test_a_signal_stops_a_run_that_nobody_listens_to():
    reader, writer = os.pipe()
    process = run("work", stderr=writer)
    os.close(writer)
    os.close(reader)
    process.terminate()
    code, out, _ = ended(process)
    assert code == EXIT_STOPPED and "stopped by SIGTERM after step" in out


LEAVING = """
import multiprocessing, signal, time
from runtime.process import exit_now

def killed(*_):
    raise SystemError("DataLoader process exited")  # as Paddle's handler does

if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, killed)
    for _ in range(30):
        multiprocessing.Process(target=time.sleep, args=[60], daemon=True).start()
    exit_now(3)
"""


def test_the_loaders_that_an_exit_kills_do_not_change_its_code(tmp_path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    done = run_script(tmp_path / "leaving.py", [])
    assert done.returncode == 3 and "SystemError" not in done.stderr, done.stderr


def test_ctrl_c_before_training_is_one_line():
    code = "import signal; from runtime.process import run_cli; run_cli(lambda: signal.raise_signal(signal.SIGINT))"
    assert ended(start([sys.executable, "-c", code])) == (EXIT_INTERRUPTED, "", "interrupted\n")


# Two ranks. benchmarks/faults.py does more of this kind: --parts ranks.


def rank_processes(launcher):
    """Returns `{rank: process id}` of what a launcher has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    ranks = {}
    for pid in map(int, found):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks.update({int(entry[18:]): pid for entry in environment if entry.startswith(b"PADDLE_TRAINER_ID=")})
    return ranks


@pytest.mark.distributed
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGSTOP])
def test_two_ranks_end_together(signum, features, tmp_path, run_loop):
    config, output = write_config(tmp_path / "Tiny.json"), tmp_path / "out"

    def arguments(steps, **options):
        return loop_arguments("notrainer", config=config, features=features, output=output, steps=steps, **options)

    given = [*arguments(10**6, ranks=2, accumulation=2), "--hang_timeout=4", "--log_every=3"]
    launcher = start(launch_command(2, "train_image_generation_notrainer.py", given, tmp_path / "log"))
    ranks = {}
    try:
        wait_until(lambda: rows(output) >= 1 or launcher.poll() is not None)
        ranks = rank_processes(launcher)
        os.kill(ranks[1], signum)
        code, out, _ = ended(launcher)
    finally:
        for pid in ranks.values():
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    logs = [(tmp_path / f"log/workerlog.{rank}").read_text() for rank in range(2)]
    assert "Traceback" not in out + "".join(logs)
    if signum == signal.SIGSTOP:
        assert code == EXIT_LOST, out + logs[0]
        assert "error: rank 0 of 2, step " in logs[0] and ": no progress for 4 s" in logs[0]
        assert "train_image_generation_notrainer.py" in logs[0].split("the stacks of its threads")[1]
        return
    assert code == EXIT_STOPPED, out + logs[0]
    last = max(read_losses(output))
    assert (last % 3 == 0 or last % AGREE_EVERY == 0) and checkpoint_path("notrainer", output, last).is_dir()
    assert f"stopped by a signal to another rank after step {last} of 1000000" in logs[0]
    assert "SIGTERM: finishing the step" in logs[1]
    run_loop("notrainer", [*arguments(last + 2), "--resume", output])
    assert max(read_losses(output)) == last + 2
