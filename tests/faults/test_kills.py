"""SIGKILL at random moments of real trainings and inside their saves; benchmarks/faults.py is the long form."""

import json
import shutil
from pathlib import Path

from support.runs import run_script

from benchmarks import faults


def test_killed_trainings_resume_and_lose_nothing(tmp_path):
    output = tmp_path / "figures.json"
    flags = ["--parts", "kills", "--kills", 6, "--steps", 16, "--seed", 3, "--work_dir", tmp_path, "--output", output]
    done = run_script("benchmarks/faults.py", flags, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(output.read_text())["kills"]
    assert figures["kills"] == 6 and figures["aimed_inside_a_save"] == 3
    assert sum(figures["found_inside_a_save"].values()) > 0 and figures["resumed"]
    assert figures["runs_equal"] == figures["runs"] > 0
    for name in ("damaged_or_lost", "wrong_resumes", "failures"):
        assert figures[name] == [], name
    assert figures["leftovers"] == figures["orphans"] == 0


def test_a_loss_would_be_seen(tmp_path, run_loop, capsys):
    """What the test above asks of each kill and run has an answer that it would not like."""
    runs = [faults.Run(tmp_path / name, "notrainer", steps=4) for name in ("one", "other")]
    for run in runs:
        run_loop(run.loop, run.arguments)
    one, other = runs
    assert one.same_as(other) and faults.what_a_kill_left(one, 4) == (4, [])
    metrics = next(Path(other.output).rglob("metrics.jsonl"))
    rows = metrics.read_text()
    metrics.write_text(rows.replace('"loss": ', '"loss": 1', 1))
    assert not one.same_as(other)
    metrics.write_text(rows)
    weights = Path(one.checkpoints()[4]) / "model_state.pdparams"
    weights.write_bytes(weights.read_bytes()[:-1])
    step, (damaged, lost) = faults.what_a_kill_left(one, 4)
    assert (
        step == 2 and "model_state.pdparams has" in damaged and lost.startswith("lost: step 4 was there, 2 is picked")
    )
    shutil.rmtree(other.checkpoints()[4])
    step, (lost,) = faults.what_a_kill_left(other, 4)
    assert step == 2 and lost.startswith("lost: step 4")
