"""Does a dumped step again (`training.supervision.step_dump`) in one process, and finds what is not finite in it."""

import functools
import os

import numpy as np
import paddle

from config.schema import group_size, read_json, resolve_config
from objectives import build_objective, make_batch
from objectives.base import EXTRAS
from runtime.progress import tqdm
from runtime.untrusted import inside
from training import setup
from training.checkpoints.state import load_weights_into
from training.supervision.step_dump import BATCH, CONFIG, STATE, WEIGHTS
from weights.files import load_weights, safe_load
from weights.runs import damage

# What the dump of another version, or of somebody else, must hold.
_ARRAYS = {*"x y t noise loss rank micro_step".split()}
_DRAWN = "t weights noise force_drop_ids routing path_drop".split()
_KEYS = {*"step kind loss grad_norm learning_rate data_ranks micro_batch precision device sources".split()}


def read_dump(folder):
    """Returns `(config, batch, state)` of a dump, batch arrays by name; `ValueError`: it is not a whole one."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder; expected RUN/bad_steps/STEP, which the run's error names")
    if wrong := damage(folder, required=(CONFIG, WEIGHTS, BATCH, STATE), checksums=True):
        raise ValueError(f"{folder}: not a whole dump of a step: {wrong}")
    inside(folder, WEIGHTS)
    path = inside(folder, CONFIG)
    config = resolve_config(read_json(path), source=path)
    config["training"]["recompute"] = False
    batch, state = safe_load(inside(folder, BATCH)), read_json(inside(folder, STATE))
    if not _fits(batch, state, config):
        raise ValueError(f"{folder}: {BATCH} and {STATE} are not those of a step of {CONFIG}")
    return config, batch, state


def _fits(batch, state, config):
    if not (isinstance(batch, dict) and isinstance(state, dict) and _ARRAYS <= {*batch} and _KEYS <= {*state}):
        return False
    sources, precision, size = (state[key] for key in ("sources", "precision", "micro_batch"))
    if not (isinstance(sources, list) and isinstance(precision, dict) and "dtype" in precision and type(size) is int):
        return False
    rows, model, encoder_shape = (len(sources),), config["model"], setup.encoder_shape(config)
    shapes = dict.fromkeys(batch, rows)
    if "routing" in batch:
        shapes["routing"] = (*rows, (model["sample_size"] // model["patch_size"]) ** 2)
    if encoder_shape is not None:
        shapes["features"] = (*rows, *encoder_shape)
    shapes["x"] = shapes["noise"] = (*rows, model["in_channels"], model["sample_size"], model["sample_size"])
    arrays = all(isinstance(array, np.ndarray) and array.dtype.kind in "fiub" for array in batch.values())
    return arrays and {name: array.shape for name, array in batch.items()} == shapes and min(len(sources), size) > 0


def replay(folder, config, batch, state):
    """Runs forward and backward passes of the whole step: returns `(losses, gradients, layer)`.

    They are the samples' losses `(N,)`; gradient norms by parameter, in the network's order; and a sentence on the
    first layer whose output is not finite, or None.
    """
    model = setup.build_network(config)
    weights = os.path.join(folder, WEIGHTS)
    load_weights_into(model, load_weights(weights), weights)
    precision = setup.setup_precision(config["training"], paddle.get_device())
    if precision.note:
        print(f"note: {precision.note}")
    precision.decorate(model)
    model.eval()  # changes label dropout alone, whose labels are in the batch
    objective = build_objective(config)
    read_names = ["x", "y", *(name for name in EXTRAS if name in batch)]
    drawn_names = [name for name in _DRAWN if name in batch]

    def losses_of(rows):
        drawn = {name: paddle.to_tensor(batch[name][rows]) for name in drawn_names}
        with precision.autocast():
            micro_batch = make_batch(paddle.to_tensor(batch[name][rows]) for name in read_names)
            return objective.training_losses(model, micro_batch, drawn=drawn)["loss"]

    count, size = len(batch["y"]), state["micro_batch"]
    losses = []
    for start in tqdm(range(0, count, size), desc="micro-batches", leave=False):
        loss = losses_of(slice(start, start + size))
        (loss.mean() * (size / count)).backward()
        losses.append(loss.detach().astype("float32").numpy())
    losses = np.concatenate(losses)
    made = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {name: float(paddle.linalg.norm(gradient.astype("float32"))) for name, gradient in made.items()}
    layer, bad = None, np.flatnonzero(~np.isfinite(losses))
    if len(bad) and np.isfinite(batch["x"][bad[0]]).all():
        group = group_size(config)
        first = bad[0] // group * group  # some regularizers compare the samples of a group
        found = _first_bad_layer(model, lambda: losses_of(slice(first, first + group)))
        layer = f"sample {bad[0]}: {found}"
    return losses, gradients, layer


def _first_bad_layer(model, forward):
    """Returns a sentence on the first layer, in order of computation, whose output is not finite in a `forward()`."""
    found = []

    def watch(name, layer, inputs, output):
        outputs = output if isinstance(output, (list, tuple)) else [output]
        if not found and not all(bool(paddle.isfinite(value).all()) for value in outputs if value is not None):
            found.append(f"the first output that is not finite is that of {name} ({type(layer).__name__})")

    for name, layer in model.named_sublayers():  # the hooks stay, because nothing is computed after this
        layer.register_forward_post_hook(functools.partial(watch, name))
    with paddle.no_grad():
        forward()
    return found[0] if found else "the network's output is finite, the loss made of it is not"
