"""Draw images in the browser: choose a model, classes, a sampler, steps, guidance and a seed, look, and download.

    python web_demo.py                                           # what was trained or exported below outputs/
    python web_demo.py --model_path DiT_pipeline SiT_pipeline    # these two
    python web_demo.py --model_path outputs/trainer/checkpoint-5000 --vae assets/digits_vae

Needs Gradio: bash tools/setup_env.sh --demo. Then open the address that is printed; Ctrl-C ends it.

--model_path takes what infer_demo_dit.py and infer_demo_sit.py take: pipeline folders, training checkpoints, names on
the hub; of another folder the models in it, of each run the newest checkpoint. One model is in memory at a time, and
one drawing is made at a time: others wait in a queue and see their place.

The page is for this machine alone, unless --host says otherwise. It needs no network, sends nothing anywhere, takes no
files, and can read none of this machine's but the images that it drew. It has no password.
"""

import contextlib
import html
import importlib.util
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time

from config.checks import INT_FROM_0, POSITIVE_INT, VAE
from config.flags import CommandParser, add_device_flag, check_vae
from runtime.files import write_json
from runtime.process import configure_runtime, run_cli, say
from sampling.flags import note_unused
from sampling.studio import Progress, Studio, explain
from sampling.translations import ZH_CN
from sampling.web import MAX_GUIDANCE, MAX_STEPS, find_models, list_choices, read_choice, read_order
from sampling.web_guard import Guard, is_local

RESULTS = "outputs"  # where models are looked for without --model_path
MAX_WAITING = 20  # drawings in the queue; more are refused
KEEP_SECONDS = 3600  # of the images that were drawn
MAX_PIXELATED = 64  # pixels a side: smaller images are enlarged without smoothing
FIELDS = ("model", "classes", "images_per_class", "method", "steps", "guidance_scale", "interval_low", "interval_high")
FIELDS += ("internal_scale", "seed", "show_steps")  # of `read_order`, in the order of the page
CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
.status {padding: .6em .8em; border-radius: 8px; border: 1px solid var(--border-color-primary)}
.status.error {background: #fdecea; color: #8a1c12; border-color: #e5a49d}
.status progress {width: 100%; height: .6em}
.status .note {opacity: .8; font-size: .9em; margin-top: .3em}
.single input {text-overflow: ellipsis; margin-right: 28px !important}
#dice {align-self: flex-end; margin-bottom: 11px; height: 42px}
#about {font-size: .9em; opacity: .8}
.pixels img {image-rendering: pixelated}
#grid .image-frame, #steps .image-frame {width: 100% !important}
#grid .image-frame img, #steps .image-frame img {width: 100% !important; max-height: 70vh; object-fit: contain}
#gallery .grid-wrap {max-height: none}
#command textarea {font-family: var(--font-mono); font-size: .85em}
"""


def main(argv=None):
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--model_path", nargs="+", metavar="MODEL", help=f"the models to choose from [those in {RESULTS}/]"
    )
    parser.add_argument(
        "--vae", check=VAE, help="folder or hub name of the VAE of training checkpoints, ema or mse [the features' own]"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0: all [127.0.0.1: this machine]",
    )
    parser.add_argument("--port", check=INT_FROM_0, default=7860, help="0 for a free one")
    add_device_flag(parser)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="half precision on a GPU [float32]")
    parser.add_argument("--max_images", check=POSITIVE_INT, default=32, help="images drawn at once, at most")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: expected a number from 0 to 65535")
    check_vae(args.vae)
    choices = list_choices(args.model_path or ([RESULTS] if find_models(RESULTS) else []), args.vae)
    if not choices:
        raise ValueError(
            f"{RESULTS}/: there is no model; train one (bash quickstart.sh), or give one by --model_path, such as "
            "facebook/DiT-XL-2-256"
        )
    if args.vae is not None and all(choice.vae is None for choice in choices):
        note_unused(["vae"], "on these models, which bring their own")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("Gradio is not installed: bash tools/setup_env.sh --demo")

    with listen(args.host, args.port) as server, tempfile.TemporaryDirectory(prefix="web_demo-") as folder:
        configure_runtime()
        say("loading Gradio and the model ...")
        # Files that pages show are in this folder and nowhere else; Gradio's default is shared with other programs.
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        flags = {"device": None if args.device == "auto" else args.device, "dtype": args.dtype}
        with contextlib.closing(Studio(args.device, args.dtype)) as studio:
            studio.load(choices[0])
            serve(Page(choices, studio, args.max_images, flags, folder), args.host, server, folder)


def listen(host, port):
    """Returns a socket that listens; `ValueError`, one line, if the address is not to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        flag = (
            f"--host {host}" if isinstance(error, (socket.gaierror, UnicodeError)) else f"--host {host} --port {port}"
        )
        raise ValueError(f"{flag}: {reason}; another --port, or 0 for a free one, may help") from None


class Page:
    """The page's components, and what happens when they are used; `blocks` is the `gradio.Blocks`."""

    def __init__(self, choices, studio, max_images, flags, folder):
        import gradio as gr

        self.gr, self.choices, self.studio, self.max_images = gr, choices, studio, max_images
        self.text = gr.I18n(en={text: text for text in ZH_CN}, **{"zh-CN": ZH_CN})  # chosen by the browser
        self.flags, self.folder = flags, folder
        font = ("system-ui", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "sans-serif")
        mono = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
        self.theme = gr.themes.Default(font=font, font_mono=mono, primary_hue="blue", neutral_hue="slate")
        cache = (KEEP_SECONDS // 4, KEEP_SECONDS)
        with gr.Blocks(title="Draw images", analytics_enabled=False, delete_cache=cache) as self.blocks:
            gr.Markdown(self.text("## Draw images\nChoose a model, classes and settings, then press Draw."))
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self.add_fields(choices[0])
                with gr.Column(scale=3, min_width=320):
                    self.add_results()
            self.connect()
        self.blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)

    def add_fields(self, choice):
        """Adds what a user chooses, with the defaults of a model."""
        gr, first = self.gr, self.defaults(choice)
        names = [(one.name, i) for i, one in enumerate(self.choices)]
        self.model = gr.Dropdown(names, value=0, label=self.text("Model"), elem_classes="single")
        self.about = gr.HTML(first["about"], elem_id="about")
        self.classes = gr.Dropdown(
            multiselect=True, label=self.text("Classes"), info=self.text("Type to search"), **first["classes"]
        )
        self.each = gr.Slider(
            1, self.max_images, value=min(4, self.max_images // 4) or 1, step=1, label=self.text("Images per class")
        )
        with gr.Row():
            shown = {"label": self.text("Sampler"), "elem_classes": "single"}
            self.method = gr.Dropdown(min_width=170, **shown, **first["method"])
            self.steps = gr.Slider(maximum=MAX_STEPS, step=1, label=self.text("Steps"), min_width=170, **first["steps"])
        hint = self.text("1: none. More: clearer, but more alike; burnt, if it is too much")
        self.scale = gr.Slider(0, MAX_GUIDANCE, step=0.1, label=self.text("Guidance"), info=hint, **first["scale"])
        with gr.Row(**first["interval"]) as self.interval:
            limits = {"step": 0.05, "min_width": 150}  # `read_order` has the others, and says them in the page
            self.low = gr.Number(0, label=self.text("Guided from"), info=self.text("time; 0: noise"), **limits)
            self.high = gr.Number(1, label=self.text("Guided until"), info=self.text("time; 1: image"), **limits)
        shown = {"label": self.text("Internal guidance"), "info": self.text("1: none")}
        self.internal = gr.Slider(0, MAX_GUIDANCE, step=0.1, **shown, **first["internal"])
        with gr.Row():
            self.seed = gr.Number(0, label=self.text("Seed"), precision=0, scale=3, min_width=150)
            self.dice = gr.Button(self.text("Random"), size="md", scale=1, min_width=90, elem_id="dice")
        self.shows = gr.Checkbox(True, label=self.text("Show the steps on the way"))
        with gr.Row():
            self.start = gr.Button(self.text("Draw"), variant="primary", scale=3, min_width=120, elem_id="draw")
            self.stop = gr.Button(self.text("Cancel"), scale=1, min_width=90, elem_id="cancel")

    def add_results(self):
        """Adds what a user gets."""
        gr = self.gr
        self.status = gr.HTML(show_status("Nothing is drawn yet."), elem_id="status")
        shown = {"show_label": False, "interactive": False}
        with gr.Tabs():
            with gr.Tab(self.text("Grid")):
                self.grid = gr.Image(format="png", buttons=["fullscreen"], elem_id="grid", **shown)
            with gr.Tab(self.text("Single images")):
                self.gallery = gr.Gallery(format="png", columns=4, height="auto", elem_id="gallery", **shown)
            with gr.Tab(self.text("On the way")):
                self.strip = gr.Image(format="png", buttons=["fullscreen"], elem_id="steps", **shown)
                gr.Markdown(self.text("What the latents decode to after so many steps, on the way from noise."))
        with gr.Row():
            self.png = gr.DownloadButton(self.text("Grid as PNG"), interactive=False, min_width=120, elem_id="png")
            self.json = gr.DownloadButton(
                self.text("Settings as JSON"), interactive=False, min_width=120, elem_id="json"
            )
        shown = {"interactive": False, "buttons": ["copy"], "max_lines": 8, "elem_id": "command"}
        self.command = gr.Textbox(label=self.text("The same in a terminal"), **shown)

    def connect(self):
        """Says what follows when a component is used. No function can be called by name from outside."""
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        quick = {**hidden, "queue": False}
        fields = [self.model, self.classes, self.each, self.method, self.steps, self.scale, self.low, self.high]
        fields += [self.internal, self.seed, self.shows]
        chosen = [self.about, self.classes, self.method, self.steps, self.scale, self.interval, self.internal]
        chosen += [self.low, self.high]
        self.model.input(self.choose_model, self.model, chosen, **quick)
        self.method.input(self.choose_method, [self.model, self.method], self.steps, **quick)
        self.dice.click(draw_seed, None, self.seed, **quick)
        results = [self.status, self.grid, self.gallery, self.strip, self.png, self.json, self.command]
        waiting = {**hidden, "show_progress": "minimal", "show_progress_on": self.status}
        drawing = self.start.click(self.draw, fields, results, concurrency_limit=1, **waiting)
        self.stop.click(lambda: show_status("Cancelled."), None, self.status, cancels=drawing, **quick)

    def defaults(self, choice):
        """Returns the properties of the components that depend on the model, by name."""
        names = [(text, i) for i, text in choice.entries.items()]
        key, method = next(iter(choice.methods.items()))
        return {
            "about": html.escape(choice.description),
            "classes": {"choices": names, "value": choice.first_classes},
            "method": {"choices": [(one.label, key) for key, one in choice.methods.items()], "value": key},
            "steps": {"minimum": method.min_steps, "value": method.steps},
            "scale": {"value": choice.guidance_scale, "interactive": choice.is_guided},
            "interval": {"visible": choice.is_transport and choice.is_guided},
            "internal": {"visible": choice.model.has_second, "value": 1},
        }

    def choose_model(self, index):
        """Returns the defaults of another model."""
        gr, found = self.gr, self.defaults(read_choice(self.choices, index))
        about, *others = found.values()
        return [about, *(gr.update(**properties) for properties in others), 0, 1]

    def choose_method(self, index, key):
        """Returns the least and the default number of steps of another sampler."""
        method = read_choice(self.choices, index).methods.get(key)
        return self.gr.skip() if method is None else self.gr.update(minimum=method.min_steps, value=method.steps)

    def draw(self, *values):
        """Yields what changes on the page while an order is drawn: the status alone, at last all results."""
        order, next_time = None, 0.0
        try:
            order = read_order(self.choices, dict(zip(FIELDS, values, strict=True)), self.max_images)
            for event in self.studio.draw(order):
                if not isinstance(event, Progress):
                    yield self.show(order, event)
                elif time.monotonic() >= next_time:
                    next_time = time.monotonic() + 0.2
                    yield {self.status: show_progress(event)}
        except Exception as error:  # whatever it is: one line in the page, never a trace
            yield {self.status: show_status(explain(error, order), error=True)}

    def show(self, order, drawing):
        """Returns the results of a drawing, by component."""
        from PIL import Image

        from sampling.grid import GAP, class_grid, class_labels, make_grid

        gr, labels = self.gr, order.choice.known_labels
        grid = class_grid(drawing.images, order.classes, labels, order.images_per_class)
        strip = None
        if drawing.steps:
            rows = list(zip(*drawing.steps.values(), strict=True))  # by class
            texts = {"row_labels": class_labels(order.classes[: len(rows)], labels)}
            texts["column_labels"] = list(map(str, drawing.steps))
            strip = make_grid([image for row in rows for image in row], len(drawing.steps), gap=GAP, **texts)
        for entry in os.scandir(self.folder):  # Gradio deletes its own copies
            if entry.name.startswith("drawing-") and entry.stat().st_mtime < time.time() - KEEP_SECONDS:
                shutil.rmtree(entry.path, ignore_errors=True)
        is_small = max(drawing.images.shape[1:3]) <= MAX_PIXELATED
        shown = {"elem_classes": ["pixels"] if is_small else []}
        folder = tempfile.mkdtemp(dir=self.folder, prefix="drawing-")
        png, settings = (os.path.join(folder, name) for name in ("images.png", "settings.json"))
        grid.save(png)
        write_json(settings, order.settings(**self.flags))
        captions = [name for name in order.names for _ in range(order.images_per_class)]
        pictures = [(Image.fromarray(image), name) for image, name in zip(drawing.images, captions, strict=True)]
        count, speed = len(drawing.images), f"{drawing.seconds:.1f} s"
        said = f"{count} {'image' if count == 1 else 'images'} in {speed}, seed {order.seed}."
        return {
            self.status: show_status(said, notes=drawing.notes),
            self.grid: gr.update(value=grid, **shown),
            self.gallery: gr.update(value=pictures, columns=order.columns, selected_index=None, **shown),
            self.strip: gr.update(value=strip, **shown),
            self.png: gr.update(value=png, interactive=True),
            self.json: gr.update(value=settings, interactive=True),
            self.command: order.command(**self.flags),
        }


def draw_seed():
    """Returns a seed that nobody chose."""
    return int.from_bytes(os.urandom(4), "little")


def show_status(text, *, error=False, notes=()):
    """Returns the HTML of a line on what happens, with notes below."""
    kind, role = ("status error", "alert") if error else ("status", "status")
    below = "".join(f'<div class="note">{html.escape(note)}</div>' for note in notes)
    return f'<div class="{kind}" role="{role}">{html.escape(text)}{below}</div>'


def show_progress(event):
    """Returns the HTML of a `Progress`."""
    counts = f": {event.step} of {event.total}" if event.total else " ..."
    value = f' value="{event.step}" max="{event.total}"' if event.total else ""
    return f'<div class="status" role="status">{html.escape(event.text + counts)}<progress{value}></progress></div>'


def serve(page, host, server, folder):
    """Serves a `Page` at a socket until Ctrl-C or SIGTERM."""
    import fastapi
    import gradio as gr
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            logging.getLogger("uvicorn.error").disabled = True  # pages that are still open are no error
            await super().shutdown(sockets)

    application = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    options = {"theme": page.theme, "css": CSS, "footer_links": [], "allowed_paths": [], "show_error": False}
    options.update(i18n=page.text, run_history=False, ssr_mode=False, pwa=False, mcp_server=False, max_file_size=1)
    application = gr.mount_gradio_app(application, page.blocks, path="/", **options)
    page.blocks.has_launched = page.blocks.is_running = True  # else Gradio copies any file that a request names
    guard = Guard(application, folder, is_local(host))
    config = uvicorn.Config(guard, log_level="warning", timeout_graceful_shutdown=1, server_header=False)
    port = server.getsockname()[1]
    if not is_local(host):
        say(f"note: --host {host}: whoever reaches this machine can draw; there is no password", sys.stderr)
    shown = f"[{host if host != '::' else '::1'}]" if ":" in host else {"0.0.0.0": "127.0.0.1"}.get(host, host)
    say(f"open http://{shown}:{port} (Ctrl-C ends it)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # after uvicorn has taken leave, so that the folder goes too
    Server(config).run(sockets=[server])


if __name__ == "__main__":
    run_cli(main)
