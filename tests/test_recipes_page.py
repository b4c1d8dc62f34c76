"""benchmarks/recipes.py and docs/recipes.md: every recipe is a config that is accepted."""

import json
import re

import pytest
from support.runs import ROOT, run_script

from config.schema import resolve_config

BLOCK = re.compile(r"^```json\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_every_recipe_of_the_benchmark_is_a_valid_config():
    done = run_script("benchmarks/recipes.py", ["--list"])
    assert done.returncode == 0, done.stderr
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert {"plain SiT", "plain DiT"} < set(names)


def test_the_json_of_the_page_is_accepted():
    """Each block is put into the preset of a network that is deep enough."""
    blocks = BLOCK.findall((ROOT / "docs/recipes.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 11
    for block in blocks:
        sections = json.loads(f"{{{block}}}")
        if "regularizers" in sections:
            sections = {"objective": {"type": "transport", **sections}}
        kind = "DiT" if sections.get("objective", {}).get("type") == "diffusion" else "SiT"
        config = json.loads((ROOT / "config" / f"{kind}_XL_patch2.json").read_text(encoding="utf-8"))
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values}
        resolve_config(config, source=block)


@pytest.mark.slow
def test_the_benchmark_of_recipes_runs(tmp_path):
    words = ["--quick", "--seeds", "0", "--only", "plain SiT", "dispersive", "--output", tmp_path / "recipes"]
    done = run_script("benchmarks/recipes.py", words, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "recipes/results.json").read_text())["results"]
    assert [row["recipe"] for row in results] == ["plain SiT", "dispersive"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "recipes/points").iterdir()}
    assert run_script("benchmarks/recipes.py", words, timeout=600).returncode == 0  # goes on: nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "recipes/points").iterdir()} == before
