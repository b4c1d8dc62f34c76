"""What a page that draws images offers and is asked for: models, their samplers and defaults, a checked order.

    choices = list_choices(["output/pipeline"])
    values = {"model": 0, "classes": [3, 7], "images_per_class": 2, "method": "dpm", ...}  # see `read_order`
    order = read_order(choices, values, max_images=32)  # `sampling.studio` draws it
    order.command()  # python infer_demo_dit.py --model_path output/pipeline --classes 3 7 --images_per_class 2 ...

Neither Paddle nor a web framework is imported. Whatever a browser sends is checked here: a model is a number in the
list that was given at the start, never a path.
"""

import dataclasses
import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field

from config.options import MAX_SEED, NUMBER, starting_guidance_scale
from runtime.process import counted, say
from runtime.untrusted import inside, read_json_object, shortened
from sampling.flags import OFFICIAL
from sampling.labels import IMAGENET_LABELS, read_labels
from sampling.model_path import PIPELINES, Model, describe_model
from sampling.step_counts import FIT_KEY, FLOW_SCHEDULER, VISITS, is_timestep_fit
from weights.runs import CONFIG, MODEL, damage, is_training_checkpoint

MAX_STEPS = 500
MAX_GUIDANCE = 20
MAX_LABEL = 60  # letters of a class's name on the page
MANY_CLASSES = 100  # from so many on their ids are shown, to be searched for
MAX_FOUND, MAX_DEPTH = 50, 6  # models that are looked for, and folders below one another
COLUMNS = 8  # of a grid with one image a class


@dataclass(frozen=True)
class Method:
    """A way to sample: its name on the page, the options of `Generator.sample`, the flags of the demo, the steps."""

    label: str
    options: dict
    flags: tuple
    steps: int  # the default
    min_steps: int = 1


def _ode(label, method, steps):
    flags = ("--sampler", "ode", "--method", method)
    return Method(label, {"sampler": "ode", "method": method}, flags, steps, min_steps=2)


def _sde(label, method, steps):
    flags = [word for name, value in OFFICIAL.sde.items() for word in (f"--{name}", str(value))]
    options = {"sampler": "sde", "method": method, **OFFICIAL.sde}
    return Method(label, options, ("--sampler", "sde", "--method", method, *flags), steps, min_steps=2)


DIFFUSION = {
    "dpm": Method("DPM-Solver++", {"method": "dpm"}, ("--scheduler", "dpm"), 25),
    "ddim": Method("DDIM", {"method": "ddim"}, ("--scheduler", "ddim"), 50),
    "ddpm": Method("DDPM", {"method": "ddpm"}, ("--scheduler", "ddpm"), 250),
    "unipc": Method("UniPC", {"method": "unipc"}, ("--scheduler", "unipc"), 25),
    "dpm3": Method("DPM-Solver++ (3rd order)", {"method": "dpm3"}, ("--scheduler", "dpm3"), 25),
}
FLOW = {"own": Method("the pipeline's own", {}, (), 50)}  # of a SiT's DiTPipeline folder
TRANSPORT = {
    "euler": _ode("ODE, Euler", "euler", 50),
    "midpoint": _ode("ODE, midpoint", "midpoint", 26),
    "heun2": _ode("ODE, Heun (2nd order)", "heun2", 26),
    "heun3": _ode("ODE, Heun (3rd order)", "heun3", 18),
    "rk4": _ode("ODE, Runge-Kutta (4th order)", "rk4", 14),
    "heun2_euler": _ode("ODE, Heun (2nd order), last step Euler", "heun2_euler", 26),
    "ab2": _ode("ODE, Adams-Bashforth (2nd order)", "ab2", 26),
    "dopri5": _ode("ODE, Dormand-Prince (adaptive)", "dopri5", 9),
    "sde-euler": _sde("SDE, Euler-Maruyama", "Euler", 100),
    "sde-heun": _sde("SDE, Heun", "Heun", 50),
}


@dataclass
class Choice:
    """A model of the page's list."""

    model: Model
    vae: str | None = None  # of a checkpoint or a file of weights; None for the features' own
    fit: dict = field(default_factory=dict)  # numbers of steps in which a narrow export is exact, by method

    @property
    def name(self):
        """Returns the path as it was given, from the working directory on if it is in there."""
        path, here = os.path.abspath(self.model.path), os.path.abspath(os.curdir)
        return os.path.relpath(path, here) if path.startswith(here + os.sep) else self.model.path

    @property
    def description(self):
        """Returns a line on the model."""
        kinds = {"checkpoint": "training checkpoint", "hub": "pipeline on the hub", "file": "file of weights"}
        kind, network = self.model.kind, self.model.type if self.model.config else self.model.pipeline
        guided = ", no guidance: it was trained without a null class" if not self.is_guided else ""
        return f"{network}, {kinds.get(kind, 'folder')}, {counted(self.num_classes, 'class', 'classes')}{guided}"

    @property
    def is_transport(self):
        """Is True for a SiT, which has a guidance interval."""
        return self.model.pipeline == "SiTPipeline"

    @property
    def is_guided(self):
        """Is False for a model without a null class."""
        return self.model.has_null_class is not False

    @property
    def num_classes(self):
        """Returns the number of classes; 1000 where it is not known before the model is loaded."""
        return self.model.num_classes or 1000

    @property
    def known_labels(self):
        """Returns `{id: name}` of the classes whose names are known, as the demo scripts show them."""
        known = self.model.labels
        return read_labels(IMAGENET_LABELS) if not known and self.model.kind == "hub" else known

    @property
    def labels(self):
        """Returns `{id: name}` of every class, each name once."""
        known = self.known_labels
        names = {i: shortened(known.get(i) or i, MAX_LABEL) for i in range(self.num_classes)}
        seen = Counter(names.values())
        return {i: name if seen[name] == 1 else f"{name} ({i})" for i, name in names.items()}

    @property
    def entries(self):
        """Returns `{id: text}` of every class for a list to choose from: where there are many, with the id."""
        labels = self.labels
        if self.num_classes < MANY_CLASSES:
            return labels
        return {
            i: name if name == str(i) or name.endswith(f" ({i})") else f"{name} ({i})" for i, name in labels.items()
        }

    @property
    def methods(self):
        """Returns `{key: Method}` of the samplers that the model has, the best one to begin with first."""
        if self.is_transport:
            return TRANSPORT
        if self.model.scheduler.get("_class_name") == FLOW_SCHEDULER:
            return FLOW
        takes_ddpm = self.model.config is not None
        methods = {key: method for key, method in DIFFUSION.items() if key != "ddpm" or takes_ddpm}
        exact = {}
        for key, method in methods.items():
            if counts := self.fit.get(VISITS.get(key)):  # of these the one nearest to the usual number
                steps = min(counts, key=lambda count, usual=method.steps: abs(count - usual))
                exact[key] = dataclasses.replace(method, steps=steps)
        return {**exact, **{key: method for key, method in methods.items() if key not in exact}}

    @property
    def guidance_scale(self):
        """Returns a guidance scale that burns no images."""
        return starting_guidance_scale(self.num_classes, self.is_guided)

    @property
    def first_classes(self):
        """Lists the ids of the classes that are chosen at the start."""
        return [207] if self.num_classes == 1000 else list(range(min(4, self.num_classes)))


def list_choices(paths, vae=None):
    """Lists the `Choice` of each model path; `ValueError`, one line, for one that the page can't sample.

    A folder that is no model stands for those below it, see `find_models`; of these, what can't be sampled is said and
    left out.
    """
    choices = []
    for given in paths:
        found = find_models(given)
        for path in found or [given]:
            try:
                choices.append(_describe_choice(path, vae))
            except ValueError as error:
                if found in ([], [given]):
                    raise
                say(f"note: left out: {error}")
    return choices


def _describe_choice(path, vae):
    model = describe_model(path)
    model.check_backend("eager")
    fit = {}
    file = inside(model.path, "transformer/config.json") if os.path.isdir(model.path) else ""
    if model.pipeline == "DiTPipeline" and os.path.isfile(file):
        fit = read_json_object(file, infinity=True).get(FIT_KEY)
    is_fit = fit and is_timestep_fit(fit)
    return Choice(model, None if model.holds_all else vae, fit if is_fit else {})


def find_models(root):
    """Lists the pipeline folders and the newest checkpoint of each run below a folder, those written last first.

    A checkpoint that is not known to be whole is taken only where a run has no other.
    """
    found = {}
    for folder, names, files in os.walk(root):
        is_deep = os.path.relpath(folder, root).count(os.sep) >= MAX_DEPTH
        names[:] = [] if is_deep else sorted(name for name in names if not name.startswith("."))
        if "model_index.json" in files:
            found[folder] = (True, 0, folder)
            names.clear()
        elif "config.json" in files and is_training_checkpoint(folder):
            step = int("0" + "".join(re.findall(r"\d+", os.path.basename(folder))[-1:]))
            run, is_whole = os.path.dirname(folder), damage(folder, required=(CONFIG, MODEL)) is None
            found[run] = max(found.get(run, (False, -1, "")), (is_whole, step, folder))
            names.clear()
    paths = [path for *_, path in found.values()]
    return sorted(paths, key=os.path.getmtime, reverse=True)[:MAX_FOUND]


def read_choice(choices, value):
    """Returns the `Choice` whose place in the list a browser sent; `ValueError` for anything else."""
    return choices[_integer("model", value, 0, len(choices) - 1)]


@dataclass(frozen=True)
class Order:
    """What is to be drawn, checked: see `read_order`."""

    choice: Choice
    classes: tuple  # ids
    images_per_class: int
    method: str  # a key of the choice's methods
    steps: int
    guidance_scale: float
    guidance_interval: tuple | None
    seed: int
    show_steps: bool = False

    @property
    def ids(self):
        """Lists the class id of each image, class by class."""
        return [i for i in self.classes for _ in range(self.images_per_class)]

    @property
    def names(self):
        """Lists the name of each class."""
        labels = self.choice.labels
        return [labels[i] for i in self.classes]

    @property
    def columns(self):
        """Returns how many images a row of the grid has: one row a class, if there are several images of each."""
        return self.images_per_class if self.images_per_class > 1 else min(len(self.classes), COLUMNS)

    @property
    def options(self):
        """Returns the keywords of `Generator.sample`."""
        options = {"seed": self.seed, "num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}
        if self.choice.is_transport:
            options["guidance_interval"] = self.guidance_interval
        return {**options, **self.choice.methods[self.method].options}

    def command(self, **flags):
        """Returns the command line of the demo script that draws the same images; `flags` are its others, or None.

        Several images of each class are also the same labelled grid.
        """
        choice, words = self.choice, []
        words += ["python", PIPELINES[choice.model.pipeline].demo, "--model_path", choice.name]
        words += ["--classes", *map(str, self.classes)]
        words += ["--images_per_class", str(self.images_per_class)] if self.images_per_class > 1 else []
        words += choice.methods[self.method].flags
        words += ["--num_inference_steps", str(self.steps), "--guidance_scale", f"{self.guidance_scale:g}"]
        if self.guidance_interval is not None:
            words += ["--guidance_interval", *(f"{time:g}" for time in self.guidance_interval)]
        words += ["--seed", str(self.seed)]
        for name, value in {"vae": choice.vae, **flags}.items():
            words += [] if value is None else [f"--{name}", str(value)]
        return shlex.join(words)

    def settings(self, **flags):
        """Returns all that the images depend on, as a dictionary for a JSON file; `flags` as of `command`."""
        return {
            "model_path": self.choice.name,
            "classes": dict(zip(map(str, self.classes), self.names, strict=True)),
            "images_per_class": self.images_per_class,
            "sampler": self.choice.methods[self.method].label,
            **{name: value for name, value in self.options.items() if value is not None},
            "command": self.command(**flags),
        }


def read_order(choices, values, max_images):
    """Returns the `Order` of what a browser sent, a dictionary of anything; `ValueError`, one line, says what is wrong.

    Its keys are `model` (a place in `choices`), `classes` (ids), `images_per_class`, `method`, `steps`,
    `guidance_scale`, `interval_low` and `interval_high` (times, of a SiT), `seed` and `show_steps`.
    """
    choice = read_choice(choices, values.get("model"))
    classes = values.get("classes")
    if not isinstance(classes, list) or not classes:
        raise ValueError("classes: choose at least one")
    if len(classes) > max_images:
        raise ValueError(f"{len(classes)} classes: at most {counted(max_images, 'image')} are drawn at once")
    classes = tuple(_integer("class", i, 0, choice.num_classes - 1) for i in classes)
    each = _integer("images per class", values.get("images_per_class"), 1, max_images)
    if each * len(classes) > max_images:
        drawn = f"{counted(len(classes), 'class', 'classes')} with {counted(each, 'image')} each"
        raise ValueError(f"{drawn} are {each * len(classes)}: at most {counted(max_images, 'image')} are drawn at once")
    key = values.get("method")
    if not isinstance(key, str) or key not in choice.methods:
        names = ", ".join(method.label for method in choice.methods.values())
        raise ValueError(f"sampler {shortened(key)}: this model has {names}")
    method = choice.methods[key]
    steps = _integer("steps", values.get("steps"), method.min_steps, MAX_STEPS)
    if not choice.is_transport:
        choice.model.check_diffusion(method.options.get("method"), steps)
    scale = _number("guidance", values.get("guidance_scale"), 0, MAX_GUIDANCE)
    if scale != 1 and not choice.is_guided:
        raise ValueError(f"guidance {scale:g}: this model was trained without a null class; expected 1")
    interval = None
    if choice.is_transport and scale != 1:
        names = ("interval_low", "interval_high")
        low, high = (_number("guidance interval", values.get(name), 0, 1) for name in names)
        if low > high:
            raise ValueError(f"guidance interval {low:g} to {high:g}: expected the lower time first")
        interval = None if (low, high) == (0, 1) else (low, high)
    seed = _integer("seed", values.get("seed"), 0, MAX_SEED)
    shows = values.get("show_steps") is True
    return Order(choice, classes, each, key, steps, scale, interval, seed, shows)


def _given(name, value):
    return name if value is None else f"{name} {shortened(value, 20)}"  # None: an emptied field


def _number(name, value, lowest, highest):
    if not NUMBER.accepts(value) or not lowest <= value <= highest:
        raise ValueError(f"{_given(name, value)}: expected a number from {lowest} to {highest}")
    return float(value)


def _integer(name, value, lowest, highest):
    is_integer = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    if not is_integer or not lowest <= value <= highest:
        raise ValueError(f"{_given(name, value)}: expected an integer from {lowest} to {highest}")
    return int(value)
