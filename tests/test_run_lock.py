"""Two runs in one folder: the second one is refused before it writes anything."""

import contextlib
import errno
import fcntl
import socket
import subprocess
import sys

import pytest
from support.runs import ROOT, checkpoint_path, command_environment, launch, loop_arguments, read_losses, write_config

from objectives import DiffusionObjective

LOOPS = ("trainer", "notrainer")
HOLD = "import sys; from runtime.run_lock import RunLock; lock = RunLock(); lock.take(sys.argv[1]); print(flush=True)"
LOOK = "import sys; from runtime.run_lock import check_idle; check_idle(sys.argv[1])"


def python(code, *words, **options):
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=command_environment(), stdout=subprocess.PIPE, text=True, **options)


@contextlib.contextmanager
def another_run(folder):
    """The process of another run that is at work in a folder; it ends by a kill."""
    process = python(HOLD + "; sys.stdin.read()", folder, stdin=subprocess.PIPE)
    process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("loop", "flags"),
    [
        ("trainer", []),
        ("trainer", ["--overwrite_output_dir=True"]),
        ("notrainer", ["--resume=auto"]),
        ("notrainer", ["--resume=OUT/000-Tiny/checkpoints/0000002"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_second_run_in_a_folder_is_refused(loop, flags, features, tmp_path, run_loop):
    output = tmp_path / "out"

    def arguments(steps):
        config = write_config(tmp_path / "Tiny.json")
        return loop_arguments(loop, config=config, features=features, output=output, steps=steps, save_every=1)

    run_loop(loop, arguments(2))
    folder = output if loop == "trainer" else output / "000-Tiny"
    flags = [flag.replace("OUT", str(output)) for flag in flags]
    with another_run(folder) as other:
        before = contents(output)
        with pytest.raises(ValueError) as refused:
            run_loop(loop, [*arguments(3), *flags])
        line = f"another run is at work in {folder} (process {other.pid} on {socket.gethostname()})"
        assert str(refused.value).startswith(line)
        assert contents(output) == before
    run_loop(loop, [*arguments(3), *flags])
    assert max(read_losses(output)) == 3


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_holds_its_folder_until_it_ends(loop, features, tmp_path, run_loop, monkeypatch):
    looks, end_step = [], DiffusionObjective.end_step

    def look(self):
        folder = tmp_path / "out" if loop == "trainer" else tmp_path / "out/000-Tiny"
        found = python(LOOK, folder, stderr=subprocess.PIPE)
        looks.append((found.communicate()[1], found.returncode))
        end_step(self)

    monkeypatch.setattr(DiffusionObjective, "end_step", look)
    arguments = loop_arguments(
        loop, config=write_config(tmp_path / "Tiny.json"), features=features, output=tmp_path / "out", steps=1
    )
    workers = "--dataloader_num_workers=2" if loop == "trainer" else "--num_workers=2"
    run_loop(loop, [*arguments, workers])
    ((said, code),) = looks
    assert code == 1 and "another run is at work in" in said
    folder = tmp_path / "out" if loop == "trainer" else tmp_path / "out/000-Tiny"
    assert python(LOOK, folder).wait() == 0


def test_a_file_system_without_locks_stops_no_run(features, tmp_path, run_loop, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    config = write_config(tmp_path / "Tiny.json")
    run_loop("notrainer", loop_arguments("notrainer", config=config, features=features, output=tmp_path, steps=1))
    assert checkpoint_path("notrainer", tmp_path, 1).is_dir()


@pytest.mark.distributed
def test_no_rank_waits_for_a_run_that_is_refused(features, tmp_path):
    folder = tmp_path / "out/000-Tiny"
    config = write_config(tmp_path / "Tiny.json")
    arguments = loop_arguments("notrainer", config=config, features=features, output=tmp_path / "out", steps=2, ranks=2)
    (folder / "checkpoints").mkdir(parents=True)
    with another_run(folder):
        done = launch(
            2, "train_image_generation_notrainer.py", [*arguments, f"--resume={folder}"], tmp_path / "log", timeout=120
        )
    assert done.returncode == 2
    for rank in range(2):
        assert f"error: another run is at work in {folder}" in (tmp_path / f"log/workerlog.{rank}").read_text()
