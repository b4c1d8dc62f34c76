"""web_demo.py as people use it: a real process, real Chromium, a trained SiT of the digits and two random DiTs.

Needs `bash tools/setup_env.sh --demo` and Chromium (apt-get install chromium); CHROMIUM names another binary. With
WEB_DEMO_SCREENSHOTS=1 the pictures of the pages are taken anew: docs/images/web_demo*.png.
"""

import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse

import numpy as np
import pytest
from PIL import Image
from support.pipelines import DIGITS_VAE, make_config, write_checkpoint
from support.runs import ROOT, command_environment

from runtime.process import EXIT_INTERRUPTED
from sampling.translations import ZH_CN

pytest.importorskip("gradio", reason="bash tools/setup_env.sh --demo installs it")
playwright = pytest.importorskip("playwright.sync_api", reason="bash tools/setup_env.sh --demo installs it")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS = os.environ.get("WEB_DEMO_SCREENSHOTS") == "1"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WAIT_MS = 60_000  # for one thing on a page, on a busy machine
pytestmark = [
    pytest.mark.walkthrough,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


def write_digits_pipeline(folder):
    """A SiTPipeline of the digits, trained."""
    from config.schema import load_config
    from features.autoencoder import load_vae
    from sampling import SiTPipeline
    from weights.files import load_weights

    data = ROOT / "tests/data/digits_2026"
    state = load_weights(str(data / "step3000.safetensors"))
    state = {name: value.astype("float32") for name, value in state.items()}
    config = load_config(str(data / "config.json"))
    SiTPipeline.from_weights(config, state, load_vae(DIGITS_VAE), dict(enumerate(NAMES))).save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port and the working directory of a web_demo.py that found its models by itself."""
    folder = tmp_path_factory.mktemp("server")
    write_checkpoint(folder / "outputs/large/checkpoint-20", make_config("DiT", sample_size=12, num_classes=100))
    write_checkpoint(folder / "outputs/run/checkpoint-20", make_config("DiT", sample_size=4))
    write_digits_pipeline(folder / "outputs/digits")  # written last: the page opens with it
    (folder / "secret.txt").write_text("secret of the working directory")
    command = [sys.executable, "-u", str(ROOT / "web_demo.py"), "--port", "0", "--device", "cpu", "--vae", DIGITS_VAE]
    (folder / "temporary").mkdir()
    environment = {**command_environment(), "TMPDIR": str(folder / "temporary")}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, text=True)
    said = ""
    for _ in range(1800):
        said = (folder / "log").read_text()
        if "open http" in said or process.poll() is not None:
            break
        time.sleep(0.1)
    assert "open http://127.0.0.1:" in said, said
    port = int(said.split("open http://127.0.0.1:")[1].split()[0])
    yield port, folder
    said = (folder / "log").read_text()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/gradio_api/heartbeat/page")  # a page that is still open
    connection.getresponse()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == EXIT_INTERRUPTED
    assert (folder / "log").read_text() == f"{said}interrupted\n"
    assert list((folder / "temporary").glob("web_demo-*")) == []


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(server, browser):
    """Opens the page in a browser window of its own; fails at the end if a request left this machine."""
    strangers = []
    with contextlib.ExitStack() as stack:

        def open_one(**options):
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **options})
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(WAIT_MS)

            def note(request):
                url = urllib.parse.urlsplit(request.url)
                if url.scheme not in ("data", "blob") and url.hostname != "127.0.0.1":
                    strangers.append(request.url)

            page.on("request", note)
            page.goto(f"http://127.0.0.1:{server[0]}/")
            page.wait_for_selector("#draw")
            return page

        yield open_one
    assert strangers == []


def wait_for(page, text):
    """Returns the status line when it holds a text."""
    page.wait_for_function("text => document.querySelector('#status .status').innerText.includes(text)", arg=text)
    return page.inner_text("#status .status")


def choose(page, label, option):
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option).click()


def set_number(page, label, value):
    field = page.get_by_label(f"number input for {label}", exact=True)
    field.fill(str(value))
    field.press("Tab")


def image_of(page, element, folder):
    """Returns the array of the PNG behind an <img> of the page."""
    source = page.locator(element).first.get_attribute("src")
    path = folder / "fetched.png"
    path.write_bytes(page.request.get(source).body())
    return np.asarray(Image.open(path).convert("RGB"))


def download(page, button, folder):
    with page.expect_download() as event:
        page.locator(button).click()
    path = folder / event.value.suggested_filename
    event.value.save_as(path)
    return path


def screenshot(page, name):
    if SCREENSHOTS:
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # until images and styles have settled
        path = ROOT / "docs/images" / name
        page.screenshot(path=path, full_page=True)
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def rendering(page, element):
    return page.locator(element).first.evaluate("element => getComputedStyle(element).imageRendering")


def test_draw_and_download(server, open_page, tmp_path):
    page = open_page()
    assert page.get_by_label("Model", exact=True).input_value() == "outputs/digits"
    page.click("#draw")
    assert wait_for(page, "seed").startswith("16 images in ")
    page.wait_for_selector("#grid img")
    screenshot(page, "web_demo.png")

    grid = download(page, "#png a, #png", tmp_path)
    settings = json.loads(download(page, "#json a, #json", tmp_path).read_text())
    pixels = np.asarray(Image.open(grid))
    assert grid.suffix == ".png" and pixels.std() > 50 and np.array_equal(image_of(page, "#grid img", tmp_path), pixels)
    command = page.locator("#command textarea").input_value()
    assert settings["command"] == command and settings["classes"] == dict(zip("0123", NAMES, strict=False))
    python, script, *flags = shlex.split(command)
    assert f"{script} {' '.join(flags)} ".startswith(
        "infer_demo_sit.py --model_path outputs/digits --classes 0 1 2 3 --images_per_class 4 --sampler ode "
    )
    run = [sys.executable, str(ROOT / script), *flags, "--output", str(tmp_path / "terminal.png")]
    subprocess.run(run, cwd=server[1], env=command_environment(), check=True, capture_output=True)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "terminal.png")), pixels)

    page.get_by_role("tab", name="Single images").click()
    page.wait_for_selector("#gallery img")
    assert page.locator("#gallery .caption-label").all_inner_texts()[::4] == list(NAMES[:4])
    page.get_by_role("tab", name="On the way").click()
    page.wait_for_selector("#steps img")
    assert image_of(page, "#steps img", tmp_path).shape[1] >= 8 * 32 > pixels.shape[1]  # 8 columns, not 4
    assert (
        rendering(page, "#grid img") == rendering(page, "#gallery img") == rendering(page, "#steps img") == "pixelated"
    )


def test_change_of_model_sampler_and_seed(open_page, tmp_path):
    page = open_page()
    assert page.get_by_label("Guided from").is_visible()
    choose(page, "Model", "outputs/run/checkpoint-20")
    page.wait_for_function("document.querySelector('#about').innerText.includes('DiT, training checkpoint')")
    assert not page.get_by_label("Guided from").is_visible()
    choose(page, "Sampler", "DDIM")
    page.wait_for_function("document.querySelector('input[aria-label=\"number input for Steps\"]').value == '50'")
    set_number(page, "Images per class", 2)
    images = []
    for seed in (0, 7, 0):
        page.get_by_label("Seed", exact=True).fill(str(seed))
        page.get_by_label("Seed", exact=True).press("Tab")
        page.click("#draw")
        wait_for(page, f"seed {seed}.")
        page.wait_for_selector("#grid img")
        command = page.locator("#command textarea").input_value()
        assert (
            "infer_demo_dit.py --model_path outputs/run/checkpoint-20 --classes 0 1 2 3 --images_per_class 2 "
            in command
        )
        assert f"--scheduler ddim --num_inference_steps 50 --guidance_scale 1.5 --seed {seed} " in command
        images.append(image_of(page, "#grid img", tmp_path))
    assert np.array_equal(images[0], images[2]) and not np.array_equal(images[0], images[1])
    before = page.get_by_label("Seed", exact=True).input_value()
    page.get_by_role("button", name="Random").click()
    page.wait_for_function(f"document.querySelector('input[aria-label=\"Seed\"]').value != '{before}'")


def test_large_images_are_smooth_and_many_classes_are_found_by_id(open_page):
    page = open_page()
    steps = page.get_by_label("number input for Steps", exact=True)
    assert steps.get_attribute("min") == "2"  # of an ODE
    page.click("#draw")
    wait_for(page, "seed")
    choose(page, "Model", "outputs/large/checkpoint-20")
    page.wait_for_function("document.querySelector('#about').innerText.includes('100 classes')")
    assert steps.get_attribute("min") == "1"
    classes = page.get_by_label("Classes", exact=True)
    classes.fill("42")
    page.get_by_role("option", name="42").click()
    set_number(page, "Steps", 1)
    set_number(page, "Images per class", 1)
    page.click("#draw")
    assert wait_for(page, "5 images").startswith("5 images in ")
    page.wait_for_function("getComputedStyle(document.querySelector('#grid img')).imageRendering == 'auto'")
    assert (
        "--classes 0 1 2 3 42 --scheduler dpm --num_inference_steps 1 "
        in page.locator("#command textarea").input_value()
    )


def test_an_error_is_a_line_and_the_next_drawing_works(open_page):
    page = open_page()
    set_number(page, "Images per class", 30)
    page.click("#draw")
    page.wait_for_selector("#status .error")
    assert "120: at most 32 images are drawn at once" in page.inner_text("#status .error")
    assert "Traceback" not in page.content()
    set_number(page, "Images per class", 1)
    page.get_by_label("Seed", exact=True).fill("-1")
    page.get_by_label("Seed", exact=True).press("Tab")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#status').innerText.includes('seed -1: expected an integer')")
    page.get_by_label("Seed", exact=True).fill("")
    page.get_by_label("Seed", exact=True).press("Tab")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#status').innerText.includes('seed: expected an integer')")
    page.get_by_label("Seed", exact=True).fill("1")
    page.get_by_label("Seed", exact=True).press("Tab")
    page.click("#draw")
    assert wait_for(page, "seed 1.").startswith("4 images in ")
    assert page.locator("#status .error").count() == 0


def test_two_at_once_wait_in_a_queue_and_cancel(open_page):
    first, second = open_page(), open_page()
    choose(first, "Model", "outputs/run/checkpoint-20")
    first.wait_for_function("document.querySelector('#about').innerText.includes('DiT')")
    choose(first, "Sampler", "DDPM")
    first.wait_for_function("document.querySelector('input[aria-label=\"number input for Steps\"]').value == '250'")
    set_number(first, "Steps", 500)
    set_number(first, "Images per class", 8)
    first.click("#draw")
    wait_for(first, "drawing: ")
    second.click("#draw")
    second.wait_for_function("document.querySelector('#status').innerText.includes('queue: 1/1')")
    assert "drawing: " in first.inner_text("#status")
    first.click("#cancel")
    assert wait_for(first, "Cancelled.")
    assert wait_for(second, "seed").startswith("16 images in ")
    assert first.inner_text("#status .status") == "Cancelled."
    set_number(first, "Steps", 20)
    first.click("#draw")  # and again, to its end
    assert wait_for(first, "seed").startswith("32 images in ")


def test_on_a_phone(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True, has_touch=True)
    page.get_by_role("button", name="Draw").tap()
    wait_for(page, "seed")
    page.wait_for_selector("#grid img")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    screenshot(page, "web_demo_phone.png")


def test_in_chinese(open_page):
    page = open_page(locale="zh-CN")
    page.get_by_role("button", name="生成", exact=True).click()
    wait_for(page, "seed")
    page.wait_for_selector("#grid img")
    screenshot(page, "web_demo_zh-CN.png")
    shown = page.inner_text("body")
    page.get_by_role("tab", name="中间步骤").click()
    shown += page.inner_text("body")
    lines = [line.lstrip("# ") for text in ZH_CN.values() for line in text.split("\n")]
    assert [line for line in lines if line not in shown] == []


def ask(port, path, method="GET", body=None, **headers):
    """Returns status and text of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read(1 << 20).decode(errors="replace")
    connection.close()
    return answer.status, text


def test_no_file_of_the_server_is_read_and_none_is_taken(server):
    port, folder = server
    secret = folder / "secret.txt"
    paths = ["/etc/passwd", secret, "secret.txt", ROOT / "README.md", "../../../../../../etc/passwd", "//etc/passwd"]
    prefixes = ["/file=", "/gradio_api/file=", "/gradio_api/file/", "/static/", "/assets/", "/gradio_api/proxy=file://"]
    asked = [f"{prefix}{path}" for prefix in prefixes for path in paths]
    asked += [
        f"{prefix}{urllib.parse.quote(str(path), safe='').replace('.', '%2e')}" for prefix in prefixes for path in paths
    ]
    asked += ["/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/stream/x", "/gradio_api/runs", "/gradio_api/upload"]
    asked += ["/gradio_api/info", "/gradio_api/openapi.json", "/openapi.json", "/docs", "/monitoring", "/dev/reload"]
    for path in asked:
        status, text = ask(port, path)
        assert status in (400, 403, 404), (path, status)
        assert "root:" not in text and "secret of" not in text and "# " not in text[:5]
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    uploads = [
        "/gradio_api/upload",
        "/upload",
        "/gradio_api/component_server",
        "/gradio_api/call/draw",
        "/gradio_api/api/draw",
    ]
    for path in uploads:
        assert ask(port, path, "POST", form, Content_Type="multipart/form-data; boundary=x")[0] == 404
    assert ask(port, "/", Host="evil.example.org")[0] == 403


def drawing_of(port):
    """Returns the number of the function that draws, and the values that the page sends to it."""
    config = json.loads(ask(port, "/config")[1])
    (function,) = [one for one in config["dependencies"] if len(one["inputs"]) == 10]
    values = {one["id"]: one["props"].get("value") for one in config["components"]}
    return function["id"], [values[i] for i in function["inputs"]]


def test_what_is_sent_past_the_page_is_checked_too(server):
    """Nobody can jump the queue; a model is never a path, and what is out of range is a line."""
    port, folder = server
    assert "Traceback" not in (folder / "log").read_text()  # of all that was done before in the page
    number, values = drawing_of(port)

    def post(path, data):
        body = {"data": data, "fn_index": number, "session_hash": "someone", "trigger_id": None}
        return ask(port, path, "POST", json.dumps(body), Content_Type="application/json")

    status, text = post("/gradio_api/run/predict", values)
    assert status >= 400 and "images in" not in text
    for path in (str(folder / "secret.txt"), "/etc/passwd", "http://127.0.0.1/"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}  # Gradio would copy it to where pages can read it
        for data in ([file, *values[1:]], [values[0], [file], *values[2:]], [[[file]], *values[1:]]):
            for door in ("queue/join", "run/predict"):
                assert post(f"/gradio_api/{door}", data)[0] == 400
    assert list((folder / "temporary").rglob("secret.txt")) == []
    for place, value in ((0, "/etc/passwd"), (0, 3), (1, ["x"]), (2, 10**9), (3, "heun9"), (4, "x"), (8, -1)):
        assert post("/gradio_api/queue/join", [*values[:place], value, *values[place + 1 :]])[0] == 200
        status, text = ask(port, "/gradio_api/queue/data?session_hash=someone")
        assert status == 200 and '"process_completed"' in text
        for word in ("Traceback", "root:", "images in", str(folder)):
            assert word not in text, (value, text)
