"""What web_demo.py offers, checks and draws, without a browser: see tests/test_web_demo.py for the page itself."""

import dataclasses
import json
import math
import shlex
import threading

import numpy as np
import pytest
from PIL import Image
from support.pipelines import DIGITS_VAE, make_config, write_checkpoint

import infer_demo_dit
import infer_demo_sit
import web_demo
from features.autoencoder import describe_vae, load_vae
from sampling import generator as generators
from sampling.grid import class_grid, make_grid
from sampling.model_path import Model
from sampling.studio import Drawing, Progress, Studio, explain, hide_paths
from sampling.web import Choice, find_models, list_choices, read_order
from sampling.web_guard import Guard, is_plain

DEMOS = {"infer_demo_dit.py": infer_demo_dit, "infer_demo_sit.py": infer_demo_sit}


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """A DiT's, a SiT's and a LightningDiT's training checkpoint, of ten classes, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for kind in ("DiT", "SiT", "LightningDiT"):
        paths.append(folder / kind / "checkpoint-1")
        regularizers = [{"type": "internal_guidance", "block": 1}] if kind == "LightningDiT" else []
        write_checkpoint(paths[-1], make_config(kind, {"regularizers": regularizers}, sample_size=4))
    return list_choices([str(path) for path in paths], DIGITS_VAE)


VALUES = {"model": 0, "classes": [3, 7], "images_per_class": 2, "method": "ddpm", "steps": 4, "guidance_scale": 2.5}
VALUES |= {"interval_low": 0.0, "interval_high": 1.0, "internal_scale": 1.5, "seed": 5}
VALUES |= {"show_steps": False}
SIT = {"model": 1, "method": "euler"}


def order_of(choices, **values):
    return read_order(choices, {**VALUES, **values}, max_images=8)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {**SIT, "method": "sde-heun", "interval_low": 0.2, "interval_high": 0.75},
        {**SIT, "method": "heun2", "images_per_class": 1, "guidance_scale": 1},
        {**SIT, "model": 2},
    ],
    ids=["DDPM", "SDE and interval", "ODE without guidance", "LightningDiT"],
)
def test_the_command_line_draws_the_same_images(choices, values, tmp_path):
    order = order_of(choices, **values)
    *said, drawing = Studio("cpu").draw(order)
    python, script, *flags = shlex.split(order.command(device="cpu"))
    assert python == "python"
    DEMOS[script].main([*flags, "--output", str(tmp_path / "image.png")])
    grid = make_grid(drawing.images, len(order.ids))
    if order.images_per_class > 1:  # the page's own grid
        grid = class_grid(drawing.images, order.classes, order.choice.known_labels, order.images_per_class)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), np.asarray(grid))
    assert said[0] == Progress("loading the model") and drawing.steps == {}


def test_the_steps_lead_from_noise_to_the_images(choices):
    studio = Studio("cpu")
    for values, last in (({"steps": 20}, 20), ({**SIT, "steps": 20}, 19)):  # an ODE makes one step less
        *_, drawing = studio.draw(order_of(choices, show_steps=True, **values))
        assert list(drawing.steps)[-1] == last and len(drawing.steps) == 8
        shown = drawing.steps[last]
        # The first of each class. They are decoded in a smaller batch, which some processors round otherwise.
        difference = shown.astype("int16") - drawing.images[::2]
        assert np.abs(difference).max() <= 1
        assert np.abs(drawing.steps[min(drawing.steps)].astype("int16") - shown).max() > 1


def test_one_network_at_a_time_and_a_closed_drawing_ends(choices, monkeypatch):
    evaluations, load, loaded = [], generators.load_generator, []

    def load_counted(model, **options):
        generator = load(model, **options)
        loaded.append(model.path)
        network = generator.network
        return dataclasses.replace(
            generator, network=lambda *x: evaluations.append(threading.get_ident()) or network(*x)
        )

    monkeypatch.setattr(generators, "load_generator", load_counted)
    studio = Studio("cpu")
    studio.load(choices[0])
    events = studio.draw(order_of(choices, steps=500))
    assert next(events) == Progress("drawing", 1, 500)
    events.close()
    *_, drawing = studio.draw(order_of(choices, **SIT))
    assert isinstance(drawing, Drawing) and len(evaluations) < 500 and len(set(evaluations)) == 1
    assert loaded == [choice.model.path for choice in choices[:2]]


def test_a_drawing_at_the_programs_end_is_no_error_of_the_program(choices, capsys):
    studio = Studio("cpu")
    events = studio.draw(order_of(choices, steps=500))
    next(events)
    studio.close()
    for drawing in (events, studio.draw(order_of(choices))):
        with pytest.raises(ValueError, match="web_demo.py was ended") as error:
            list(drawing)
        explain(error.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model": 3}, "model 3: expected an integer from 0 to 2"),
        ({"model": "/etc/passwd"}, "model /etc/passwd: expected an integer"),
        ({"model": True}, "model True: expected"),
        ({"classes": []}, "classes: choose at least one"),
        ({"classes": "3"}, "classes: choose at least one"),
        ({"classes": [10]}, "class 10: expected an integer from 0 to 9"),
        ({"classes": [{"path": "/etc/passwd"}]}, "class {'path': '/etc/passw...: expected an integer"),
        ({"classes": [1] * 9}, "9 classes: at most 8 images"),
        ({"images_per_class": 5}, "2 classes with 5 images each are 10: at most 8 images are drawn at once"),
        ({"images_per_class": 1.5}, "images per class 1.5: expected an integer from 1 to 8"),
        ({"method": "heun2"}, r"sampler heun2: this model has DPM-Solver\+\+, DDIM, DDPM"),
        ({"method": ["ddpm"]}, r"sampler \['ddpm'\]: this model has"),
        ({"steps": 501}, "steps 501: expected an integer from 1 to 500"),
        ({"steps": None}, "^steps: expected an integer from 1 to 500"),
        ({**SIT, "steps": 1}, "steps 1: expected an integer from 2 to 500"),
        ({"method": "ddim", "steps": 37}, "no integer stride takes exactly 37"),
        ({"guidance_scale": None}, "^guidance: expected a number"),
        ({"guidance_scale": math.nan}, "guidance nan: expected a number from 0 to 20"),
        ({"guidance_scale": 1e9}, "guidance 1000000000.0: expected"),
        ({**SIT, "interval_low": 0.8, "interval_high": 0.2}, "guidance interval 0.8 to 0.2: expected the lower"),
        ({**SIT, "interval_high": 2}, "guidance interval 2: expected a number from 0 to 1"),
        ({**SIT, "model": 2, "internal_scale": -1}, "internal guidance -1: expected a number from 0 to 20"),
        ({"seed": -1}, "seed -1: expected an integer from 0 to 4294967295"),
        ({"seed": math.inf}, "seed inf: expected"),
    ],
)
def test_what_a_browser_may_not_ask_for(choices, values, line):
    with pytest.raises(ValueError, match=line) as error:
        order_of(choices, **values)
    assert "\n" not in str(error.value)


def test_defaults_suit_the_model():
    def choice(pipeline="DiTPipeline", scheduler="DDIMScheduler", fit=None, **known):
        return Choice(
            Model("pipeline", "folder", pipeline, scheduler={"_class_name": scheduler}, **known), fit=fit or {}
        )

    small, imagenet = choice(num_classes=3, labels={0: "cat", 1: "cat"}), choice(num_classes=1000)
    assert small.labels == {0: "cat (0)", 1: "cat (1)", 2: "2"}
    assert (small.first_classes, imagenet.first_classes) == ([0, 1, 2], [207])
    assert small.guidance_scale < imagenet.guidance_scale == 4
    assert list(small.methods) == ["dpm", "ddim", "unipc", "dpm3"]  # DDPM is for checkpoints
    narrow = choice(num_classes=3, fit={"ddim": [10, 20, 25, 50], "dpm": []})
    steps = [("ddim", 50), ("dpm", 25), ("unipc", 25), ("dpm3", 25)]
    assert [(key, method.steps) for key, method in narrow.methods.items()] == steps
    assert choice(num_classes=3, fit={"ddim": [10, 20, 40], "dpm": [20, 50]}).methods["unipc"].steps == 20
    assert list(choice(scheduler="EDMEulerScheduler").methods) == ["own"]
    plain = choice("SiTPipeline", num_classes=3, has_null_class=False)
    assert plain.guidance_scale == 1
    with pytest.raises(ValueError, match="trained without a null class"):
        order_of([plain], classes=[1], method="euler")


def test_many_classes_are_found_by_their_ids():
    def choice(num_classes):
        labels = {0: "cat", 1: "cat", 7: "dog"}
        return Choice(Model("pipeline", "folder", "DiTPipeline", num_classes=num_classes, labels=labels))

    assert [choice(100).entries[i] for i in (0, 1, 2, 7)] == ["cat (0)", "cat (1)", "2", "dog (7)"]
    assert choice(100).labels[7] == choice(99).entries[7] == "dog"


def test_models_are_found_the_newest_of_each_run(tmp_path, capsys):
    for run, step in (("a", 9), ("a", 10), ("b", 5)):
        write_checkpoint(tmp_path / "outputs" / run / f"checkpoint-{step}", make_config())
    (tmp_path / "outputs" / "a" / "checkpoint-11").mkdir()  # not whole
    pipeline = tmp_path / "outputs" / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    found = [str(path.relative_to(tmp_path)) for path in map(type(tmp_path), find_models(tmp_path / "outputs"))]
    assert sorted(found) == ["outputs/a/checkpoint-10", "outputs/b/checkpoint-5", "outputs/pipeline"]
    for given in ("outputs/a", "outputs/a/checkpoint-10"):
        (choice,) = list_choices([str(tmp_path / given)])
        assert choice.model.path == str(tmp_path / "outputs/a/checkpoint-10")
    assert len(list_choices([str(tmp_path / "outputs")])) == 2  # the pipeline of no known class is left out
    assert "note: left out: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="pipeline: is a None"):
        list_choices([str(pipeline)])
    whole = tmp_path / "outputs/a/checkpoint-9"
    files = {file.name: {"size": file.stat().st_size, "sha256": ""} for file in whole.iterdir()}
    (whole / "manifest.json").write_text(json.dumps({"files": files}))  # while the newest one has no manifest
    assert str(tmp_path / "outputs/a/checkpoint-9") in find_models(tmp_path / "outputs")


def test_errors_are_a_line_for_the_page_and_a_trace_for_the_terminal(choices, capsys):
    order = order_of(choices)
    path = order.choice.model.path
    assert explain(ValueError(f"--num_inference_steps 3: {path}\nno"), order) == f"steps 3: {order.choice.name} no"
    assert capsys.readouterr().err == ""
    try:
        {}["secret"]
    except KeyError as error:
        assert "secret" not in explain(error, order)
    assert "secret" in capsys.readouterr().err
    assert "draw fewer" in explain(RuntimeError("(External) ResourceExhaustedError: Out of memory error on GPU 0"))


def test_the_page_says_no_absolute_path(choices, tmp_path, monkeypatch):
    vae = tmp_path / "folder of VAEs" / "vae256"
    vae.mkdir(parents=True)
    here, choice = tmp_path / "here", dataclasses.replace(choices[0], vae=str(vae))
    here.mkdir()
    monkeypatch.chdir(here)
    for text, shown in (
        (f"VAE {vae}: made with /opt/a/colour_vae, not {vae}", "VAE vae256: made with colour_vae, not vae256"),
        (f"'{tmp_path}/x.json' ({here}/outputs/y)", "'x.json' (outputs/y)"),
        (f"{choice.name}/config.json: no", f"{choice.name}/config.json: no"),  # as it is listed
        ("facebook/DiT and https://example.org/a/b: 1/2", "facebook/DiT and https://example.org/a/b: 1/2"),
    ):
        assert hide_paths(text, choice) == shown
    assert explain(FileNotFoundError(2, "No such file", "/opt/a/b.json")) == "b.json: No such file"


def test_the_notes_of_a_drawing_say_no_absolute_path(choices, tmp_path):
    (choice,) = list_choices([choices[0].model.path], DIGITS_VAE)
    made_with = describe_vae(load_vae(DIGITS_VAE), f"{tmp_path}/colour_vae")
    choice.model.config["features"]["vae"] = {**made_with, "weights_sha256": "0" * 64}
    *_, drawing = Studio("cpu").draw(order_of([choice]))
    assert "colour" in " ".join(drawing.notes) and "/" not in " ".join(drawing.notes)


class TestGuard:
    @staticmethod
    def judge(folder, path, method="GET", host="127.0.0.1:7860", local=True, **headers):
        sent = {"host": host, **{name.replace("_", "-"): value for name, value in headers.items()}}
        scope = {"method": method, "path": path, "headers": [(k.encode(), v.encode()) for k, v in sent.items()]}
        return Guard(None, str(folder), local).judge(scope)

    def test_what_the_page_needs_passes(self, tmp_path):
        (tmp_path / "image.png").write_bytes(b"")
        for path in (
            "/",
            "/config",
            "/assets/index.js",
            "/gradio_api/queue/data",
            f"/gradio_api/file={tmp_path}/image.png",
        ):
            assert self.judge(tmp_path, path) == 0
        assert self.judge(tmp_path, "/gradio_api/queue/join", "POST", content_length="100") == 0
        sent = {"content_length": "100", "sec_fetch_site": "same-origin"}
        assert self.judge(tmp_path, "/gradio_api/queue/join", "POST", **sent) == 0
        for host in ("localhost:7860", "[::1]:7860", "127.0.0.1"):
            assert self.judge(tmp_path, "/", host=host) == 0
        assert self.judge(tmp_path, "/", host="gpu7.example.org", local=False) == 0

    @pytest.mark.parametrize(
        ("path", "method", "headers", "status"),
        [
            ("/gradio_api/file=/etc/passwd", "GET", {}, 404),
            ("/gradio_api/file=FOLDER/../other", "GET", {}, 404),
            ("/gradio_api/file=FOLDER/link", "GET", {}, 404),
            ("/gradio_api/file=image.png", "GET", {}, 404),
            ("/gradio_api/file=\0", "GET", {}, 404),
            ("/gradio_api/upload", "POST", {"content_length": "10"}, 404),
            ("/gradio_api/proxy=http://example.org", "GET", {}, 404),
            ("/assets/../../../etc/passwd", "GET", {}, 404),
            ("/gradio_api/queue/join", "POST", {"content_length": str(10**9)}, 413),
            ("/gradio_api/queue/join", "POST", {"transfer_encoding": "chunked"}, 413),
            ("/", "GET", {"host": "evil.example.org"}, 403),
            ("/gradio_api/queue/join", "POST", {"content_length": "100", "sec_fetch_site": "cross-site"}, 403),
        ],
    )
    def test_all_else_is_refused(self, path, method, headers, status, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "other").write_text("secret")
        (tmp_path / "folder" / "link").symlink_to(tmp_path / "other")
        path = path.replace("FOLDER", str(tmp_path / "folder"))
        assert self.judge(tmp_path / "folder", path, method, **headers) == status

    def test_no_request_names_a_file(self):
        assert is_plain(b'{"data": [0, [3, 7], 2.5, "ddim", true, null], "fn_index": 1}')
        assert is_plain(b'{"event_id": "x"}')
        for data in ('[{"path": "x"}]', '[[{"path": "x"}]]', '[[["x"]]]', '{"path": "x"}'):
            assert not is_plain(f'{{"data": {data}}}'.encode())
        for body in (b"", b"[]", b"data", b'{"data": 3}', b'{"data": [{}], "data": []}'):
            assert not is_plain(body)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model_path", "/nowhere/model"], "/nowhere/model: there is no such folder"),
        ([], r"outputs/: there is no model; train one \(bash quickstart.sh\), or give one by --model_path"),
        (["--port", "70000"], "--port .*70000"),
        (["--max_images", "0"], "--max_images"),
        (["--vae", "nowhere"], "--vae nowhere: there is no such folder"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=line):
        web_demo.main(flags)


def test_an_address_that_is_taken_or_not_here_is_one_line():
    with web_demo.listen("127.0.0.1", 0) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"--host 127.0.0.1 --port {port}: .*in use"):
            web_demo.listen("127.0.0.1", port)
    with pytest.raises(ValueError, match="--host 203.0.113.1 --port 0: "):
        web_demo.listen("203.0.113.1", 0)


def test_without_gradio_it_is_said_what_to_run(choices, monkeypatch):
    monkeypatch.setattr(web_demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Gradio is not installed: bash tools/setup_env.sh --demo"):
        web_demo.main(["--model_path", choices[0].model.path])
