"""Kills a real training at random moments and inside its saves; benchmarks/faults.py does it hundreds of times."""

import json

from support.runs import run_script


def test_killed_trainings_resume_and_lose_nothing(tmp_path):
    output = tmp_path / "figures.json"
    flags = ["--parts", "kills", "--kills", 4, "--steps", 12, "--loops", "notrainer", "--work_dir", tmp_path]
    flags += ["--seed", 3, "--output", output]
    done = run_script("benchmarks/faults.py", flags, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(output.read_text())["kills"]
    assert figures["kills"] == 4 and figures["aimed_inside_a_save"] == 2
    assert sum(figures["found_inside_a_save"].values()) > 0 and figures["resumed"]
    assert figures["runs_equal"] == figures["runs"] > 0
    for name in ("damaged_or_lost", "wrong_resumes", "failures"):
        assert figures[name] == [], name
    assert figures["leftovers"] == figures["orphans"] == 0
