"""tools/report.py: what the page holds of a run, whatever its state, and that nothing in it is fetched or executed."""

import json
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from support.runs import TINY_MODELS, write_config

from config.schema import resolve_config
from runtime.run_lock import try_lock
from tools import report
from training.curves import last_branch, make_chart, nice_ticks, series
from training.report import gather

HOSTILE = {"0": "笑脸", "1": "<script>alert(1)</script>", "2": '"><img src=http://example.com/x.png>'}


class Page(HTMLParser):
    """Tags, the addresses that a browser would load, and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was stopped after step 40 of 100, with all that a run may leave but checkpoints."""
    folder = tmp_path / "my 'run'"
    (folder / "images").mkdir(parents=True)
    vae = {"name": "assets/digits_vae", "scaling_factor": 1.5}
    features = {"image_size": 64, "class_names": HOSTILE, "vae": vae}
    training = {"max_steps": 100, "learning_rate": 0.003}
    config = resolve_config({"model": TINY_MODELS["DiT"], "training": training, "features": features})
    (folder / "config.json").write_text(json.dumps(config))
    write_rows(folder / "metrics.jsonl", [(step, 1 / step) for step in range(2, 42, 2)])
    write_rows(folder / "validation.jsonl", [(20, 0.25), (40, 0.125)])
    row = {"step": 40, "fid": 12.5, "kid": None, "num_samples": 100, "settings": {"features": "inception"}}
    (folder / "evaluation.jsonl").write_text(json.dumps(row) + "\n")
    for step in (20, 40):
        Image.fromarray(np.full((24, 24, 3), step, "uint8")).save(folder / f"images/{step:07d}.png")
    (folder / "images/0000060.png").write_bytes(b"\x89PNG, and no more")
    command = ["train_image_generation_trainer.py", "--output_dir", str(folder), "--feature_path", "a b"]
    environment = {
        "command": command,
        "folder": str(tmp_path),
        "features": str(tmp_path / "gone_features"),
        "paddlepaddle": "3.3.1",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def write_rows(path, losses, mode="w"):
    others = {"learning_rate": 0.003, "grad_norm": 0.5, "epoch": 1.5}
    others |= {"samples_per_second": 64.0, "steps_per_second": 2.0}
    with open(path, mode) as file:
        file.writelines(json.dumps({"step": step, "loss": loss, **others}) + "\n" for step, loss in losses)


def test_the_page_holds_the_run_and_nothing_that_is_fetched_or_executed(run, tmp_path, capsys):
    sample = tmp_path / "sample.png"
    for path in (sample, run / "samples.png"):
        Image.fromarray(np.zeros((300, 300, 4), "uint8")).save(path)
    report.main([str(run), "--samples", str(sample)])
    page = Page(run / "report.html")
    assert str(run / "report.html") in capsys.readouterr().out
    assert all(address.startswith("data:image/") for address in page.addresses) and len(page.addresses) == 4
    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    for name in HOSTILE.values():
        assert name in page.text  # and not as a tag
    for text in (
        *("my 'run'", "stopped at step 40 of 100; saved: nothing", "learning_rate", "0.003", "0.0001", "12.5"),
        *("assets/digits_vae", "paddlepaddle", "Validation loss", "step 20", "the preview of step 60 can't be read"),
        *("Gradient norm", "Learning rate", "gone_features is not there", "64 x 64 pixels"),
    ):
        assert text in page.text, text
    go_on = next(line for line in page.text.splitlines() if "train_image_generation_trainer.py" in line)
    words = shlex.split(go_on)
    assert words[words.index("--feature_path") + 1] == "a b" and words[-1] == run.name
    assert words[:2] == ["cd", str(tmp_path)]


def test_a_page_is_made_anew_and_other_files_are_kept(run):
    report.main([str(run)])
    write_rows(run / "metrics.jsonl", [(100, 0.01)], mode="a")
    report.main(["--model_path", str(run)])
    text = Page(run / "report.html").text
    assert "finished: step 100 of 100" in text
    assert "train_image_generation_trainer.py --output_dir" in text and "--resume" not in text
    other = run / "mine.html"
    other.write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        report.main([str(run), "--output", str(other)])
    assert other.read_text() == "mine"


def test_a_run_under_way_before_its_first_report(run):
    for name in ("metrics.jsonl", "validation.jsonl", "evaluation.jsonl"):
        (run / name).unlink()
    with open(run / "run.lock", "w") as file:
        assert try_lock(file)
        found = gather(str(run))
    assert found["status"]["text"] == "under way: step 0 of 100" and found["charts"] == []


def test_a_run_of_the_loop(features, tmp_path, run_loop):
    """Of its set the page tells what the set does; the newest run of a folder is found."""
    config = write_config(tmp_path / "tiny.json")
    arguments = {"config_file": config, "feature_path": features, "results_dir": tmp_path / "runs", "max_steps": 2}
    arguments |= {"global_batch_size": 4, "log_every": 1, "num_workers": 0, "device": "cpu"}
    run_loop("notrainer", [f"--{name}={value}" for name, value in arguments.items()])
    report.main([str(tmp_path / "runs")])
    (run,) = (tmp_path / "runs").iterdir()
    page = Page(run / "report.html")
    for text in ("finished: step 2 of 2", "checkpoints/0000002", "40", "standard deviation of 40 latents", "numpy"):
        assert text in page.text
    assert [count for _, _, count in gather(str(run))["classes"]] == [4] * 10
    commands = [shlex.split(command) for _, command in gather(str(run))["commands"]]
    assert str(run / "checkpoints/0000002") in commands[0]


def test_a_resumed_run_has_one_curve(run):
    rows = [{"step": step, "loss": step} for step in (10, 20, 30, 40, 20, 30)]
    assert [row["step"] for row in last_branch(rows)] == [10, 20, 30]
    write_rows(run / "metrics.jsonl", [(10, 9.0), (20, 8.0), (30, 7.0), (20, 5.0)])
    (chart, *_) = gather(str(run))["charts"]
    assert [(step, value) for *_, step, value in chart.lines[0].marks] == [(10, "9"), (20, "5")]


def test_rows_that_no_run_writes_are_no_error(run):
    (run / "best.json").write_text('{"step": 1, "checkpoint": "x", "metric": "fid", "value": 1e999, "evaluation": {}}')
    for values in ('"x"', "1e308", "-1e308", "1" + "0" * 400, "1e-320", "null"):
        row = '{{"step": {}, "loss": {}, "epoch": {}, "steps_per_second": {}}}\n'
        for name in ("metrics.jsonl", "validation.jsonl"):
            rows = [row.format(step, *[value] * 3) for step, value in ((1, "2.5"), (2, values), (10**30, "1"))]
            (run / name).write_text("".join(rows))
        (chart, *_) = gather(str(run))["charts"]
        assert chart.lines[0].last == "2.5"


def test_curves_break_where_a_number_is_missing_and_stay_inside():
    rows = [{"step": step, "loss": None if step == 30 else 10.0**-step} for step in range(0, 60, 10)]
    chart = make_chart("loss", {"loss": series(rows, "loss")})
    (line,) = chart.lines
    assert line.path.count("M") == 2 and chart.is_log
    assert all(0 <= x <= chart.width and 0 <= y <= chart.height for x, y, *_ in line.marks)
    assert make_chart("loss", {"loss": [(1, None)]}) is None
    assert make_chart("flat", {"flat": [(5, 0.0)]}).y_ticks
    assert nice_ticks(0, 2000, 5) == [0, 500, 1000, 1500, 2000]
    short = make_chart("loss", {"loss": [(0, 1.0), (2, 2.0)]})
    assert [text for _, text in short.x_ticks] == ["0", "1", "2"]


@pytest.mark.parametrize("name, message", [("nothing", "no such folder"), (".", "no run of either training loop")])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        report.main([str(tmp_path / name)])


@pytest.mark.parametrize("words, message", [([], "expected RUN"), (["a", "--model_path", "b"], "give one RUN")])
def test_a_page_is_of_one_run(words, message):
    with pytest.raises(ValueError, match=f"command line: {message}"):
        report.main(words)
