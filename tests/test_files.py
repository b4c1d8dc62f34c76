"""runtime/files.py: files and folders are whole or not there; checkpoints' writer is in test_checkpoints.py."""

import json
import os

import pytest
from support.kills import kill_at_operation

from runtime.files import whole_file, whole_folder, write_json


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"ä": [1, 2]})
    assert path.read_text("utf-8") == '{\n  "ä": [\n    1,\n    2\n  ]\n}\n'
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        open(partial, "w").write("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text("utf-8")) == {"ä": [1, 2]} and os.listdir(tmp_path) == ["value.json"]
    write_json(path, 3, indent=None)
    assert path.read_text() == "3\n"


def test_links_are_followed_and_devices_written_directly(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real/value.json")
    write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real/value.json").read_text() == "1\n"
    write_json("/dev/null", 1)
    assert not os.path.isfile("/dev/null")


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(OSError) as error:
        write_json(tmp_path / "nowhere/value.json", 1)
    assert str(error.value.filename) == str(tmp_path / "nowhere/value.json")
    with pytest.raises(OSError) as error, whole_file(tmp_path / "value.json"):
        open(tmp_path / "input")  # another file's error keeps its name
    assert str(error.value.filename) == str(tmp_path / "input")


def fill(folder, text):
    with whole_folder(folder) as partial:
        for name in ("a", "b"):
            with open(os.path.join(partial, name), "w") as file:
                file.write(text)


def test_a_folder_is_replaced_whole_or_stays_wherever_it_is_killed(tmp_path, monkeypatch):
    """Killed before each rename, flush and deletion in turn; the next one cleans up."""
    kills, killed = 0, True
    while killed:
        folder = tmp_path / str(kills) / "pipeline"
        fill(folder, "old")
        child = os.fork()
        if not child:
            kill_at_operation(kills, monkeypatch)
            fill(folder, "new")
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if not folder.exists():  # between the two renames: the next writer gives the old one its name back
            with pytest.raises(KeyboardInterrupt), whole_folder(folder):
                raise KeyboardInterrupt
        assert {path.read_text() for path in folder.iterdir()} in ({"old"}, {"new"})
        fill(folder, "next")
        assert os.listdir(folder.parent) == ["pipeline"] and (folder / "a").read_text() == "next"
        kills += 1
    assert kills > 8
