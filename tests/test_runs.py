"""A run's folder stands for its newest whole checkpoint."""

import shutil

import pytest

from runtime.files import FolderWriter
from weights.runs import resolve_run


def write_checkpoint(folder):
    writer = FolderWriter(folder)
    for name in ("config.json", "model_state.pdparams"):
        with writer.open(name) as file:
            file.write(name.encode())
    writer.finish()
    return str(folder)


@pytest.mark.parametrize("names", ["checkpoint-{}", "000-DiT/checkpoints/{:07d}"])
def test_newest_whole_one_in_the_order_of_the_steps(tmp_path, capsys, names):
    for step in (1000, 200, 90):
        write_checkpoint(tmp_path / names.format(step))
    (newest := tmp_path / names.format(2000)).mkdir()
    (newest / "model_state.pdparams").write_bytes(b"model")
    expected = str(tmp_path / names.format(1000))
    for folder in {tmp_path, newest.parent, newest.parent.parent} - {tmp_path.parent}:
        assert resolve_run(folder) == expected
        passed, taken = capsys.readouterr().out.splitlines()
        assert "2000 is passed over: it has no manifest.json" in passed and taken.endswith(f"is taken, {expected}")
    assert resolve_run(expected) == expected and not capsys.readouterr().out


def test_what_stands_for_itself_and_what_can_not_be_chosen(tmp_path):
    for name in ("000-DiT", "001-DiT"):
        write_checkpoint(tmp_path / name / "checkpoints" / "0000005")
    with pytest.raises(ValueError, match=r"holds checkpoints of 2 runs \(000-DiT, 001-DiT\); give the folder of one"):
        resolve_run(tmp_path)
    shutil.rmtree(tmp_path / "000-DiT" / "checkpoints")  # of a run that has saved nothing
    assert resolve_run(tmp_path).startswith(str(tmp_path / "001-DiT"))
    with (tmp_path / "001-DiT" / "checkpoints" / "0000005" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"none of its 1 checkpoint\(s\) is known .* config.json has 12 bytes"):
        resolve_run(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    for path in (tmp_path, "OWNER/NAME", tmp_path / "model_index.json"):
        assert resolve_run(path) == str(path)
