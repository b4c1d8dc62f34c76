"""The numbers of today stay: training, samples, and what an older version of the toolkit has written still loads.

The tolerances are those of another processor, which rounds differently. Bits are compared by hand, on one machine:
`python tests/golden/runs/record.py --check` (tests/golden/runs).
"""

import shutil

import numpy as np
import pytest
from golden.runs import record
from support.runs import ROOT

pytestmark = pytest.mark.paddle26

# Each model by one loop: that both give the same numbers is tests/test_loops.py's.
LOOP = {
    "DiT": "trainer",
    "SiT": "notrainer",
    "LargeDiT": "notrainer",
    "LargeSiT": "trainer",
    "LightningDiT": "notrainer",
}
TOLERANCE = {"loss": 2e-4, "grad_norm": 1e-3}
SAMPLES = 5e-3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The recorder's features and configs, in the folder that the runs start in."""
    record.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_close(table, stored):
    for name, value in record.difference(table, stored).items():
        assert value < TOLERANCE.get(name, SAMPLES), name


@pytest.mark.parametrize("kind", LOOP)
def test_a_run_gives_the_stored_numbers(folder, run_loop, kind):
    run_loop(LOOP[kind], record.arguments(LOOP[kind], kind, "output"))
    training = record.read_training(folder / "output")
    np.testing.assert_array_equal(training.pop("step"), range(1, record.STEPS + 1))
    samples = record.draw_samples(record.checkpoint(LOOP[kind], folder / "output"))
    assert_close({**training, **samples}, record.read_table(record.table_path(kind)))


def test_an_older_checkpoint_goes_on_as_it_did(folder, run_loop):
    shutil.copytree(ROOT / "tests" / "data" / "checkpoint_2026", folder / "begun")
    run_loop("notrainer", record.arguments("notrainer", "DiT", "output", resume="begun"))
    training = record.read_training(folder / "output")
    np.testing.assert_array_equal(training.pop("step"), range(11, record.STEPS + 1))
    samples = record.draw_samples(record.checkpoint("notrainer", folder / "output"))
    stored = record.read_table(record.table_path("DiT"))
    stored |= {name: stored[name][10:] for name in training}
    assert_close({**training, **samples}, stored)


def test_an_older_pipeline_folder_draws_what_it_drew(tmp_path):
    table = record.draw_pipeline(record.lay_out_pipeline(tmp_path / "pipeline"))
    assert_close(table, record.read_table(record.table_path("SiTPipeline")))
