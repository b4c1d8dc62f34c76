"""Keeps a bad step in a folder, whole enough to do it again: `bad_steps/STEP/` in the run's folder.

    config.json       the resolved config
    weights.pdparams  the weights that the step met, float32, official names, whole tensors
    batch.pdparams    a row for each sample of the global batch, in its order: latents `x`, labels `y` and, where they
                      are trained on, an encoder's `features` as read; `t`, `noise`, `force_drop_ids`, `routing`,
                      `path_drop` as drawn, where they are; `loss`, computed once more; `row`, `index` in the set,
                      `position` in the stream, `micro_step`, `rank`
    state.json        step, loss and norm of the run, learning rate, seed, precision, ranks, the samples' files
    manifest.json     sizes and checksums

Data and random numbers of a step are functions of the seed and the step. So all are read and drawn again here, and a
run that is well keeps nothing of them. `tools/replay_step.py` reads the folder.
"""

import math
import os

import numpy as np
import paddle

from objectives import Rows, make_batch
from runtime.collective import run_on_every_rank, run_on_rank_0
from runtime.process import counted, seed_step
from training.checkpoints.background import write_folder
from training.checkpoints.state import whole_weights

CONFIG, WEIGHTS, BATCH, STATE = "config.json", "weights.pdparams", "batch.pdparams", "state.json"
PARENT = "bad_steps"
MAX_DUMPS_PER_STEP = 3  # because a run that is started again and again must not fill the disk


@paddle.no_grad()
def dump_step(bad, session):
    """Reads, draws and computes a bad step once more, writes its dump, and returns sentences: the cause and the place.

    The network of `session`, a `training.session.Session`, has the weights that the step, a `BadStep`, met. A
    collective: `ValueError` or `OSError` on every rank if one can't read a sample any more or write the dump.
    """
    session.saver.wait()  # because a checkpoint under way must be whole before any rank ends
    sampler, read = session.sampler, []  # the arrays of this rank's micro-batches
    micro_steps = range(sampler.accumulation_steps)
    run_on_every_rank(lambda: read.extend(session.dataset.read(*sampler.batch(bad.step, i)) for i in micro_steps))
    if bad.objective:
        session.objective.set_state_dict(bad.objective)
    session.model.eval()  # changes label dropout alone, whose labels are drawn already
    computed = run_on_every_rank(lambda: [_compute(bad.step, i, data, session) for i, data in enumerate(read)])
    # In order of the rows; tensor-parallel ranks hold the same ones.
    parts = {int(part["row"][0]): part for of_rank in computed for part in of_rank}
    parts = [part for _, part in sorted(parts.items())]
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    sources = [session.dataset.source(index) for index in batch["index"]]
    cause, parent = find_cause(batch, sources), os.path.join(session.folder, PARENT)
    suffixes = ["", *(f"-{number}" for number in range(2, MAX_DUMPS_PER_STEP + 1))]
    paths = [os.path.join(parent, f"{bad.step:07d}{suffix}") for suffix in suffixes]
    path = run_on_rank_0(lambda: next((path for path in paths if not os.path.lexists(path)), None))
    if path is None:
        return f"{cause} {parent} holds {MAX_DUMPS_PER_STEP} dumps of this step, and no other is written."
    # No rank ends, and the job with it, before all is written.
    run_on_every_rank(lambda: write_folder(path, _files(bad, batch, sources, session)))
    return f"{cause} The step is kept in {path}: see python tools/replay_step.py {path}."


def find_cause(batch, sources):
    """Returns a sentence on what made a step bad, as far as its samples (arrays of `BATCH`, their files) tell."""
    loss, count = batch["loss"], len(batch["loss"])
    named = [f"{row} ({source})" for row, source in enumerate(sources)]
    bad = np.flatnonzero(~np.isfinite(batch["x"]).reshape(count, -1).all(axis=1))
    if len(bad):
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        return f"Numbers of its sample {named[bad[0]]}{more} are not finite."
    latents = "Its latent is" if count == 1 else f"Its {count} latents are"
    bad = np.flatnonzero(~np.isfinite(loss))
    if len(bad) == count:
        losses = "its loss is" if count == 1 else "the losses of all of them are"
        return f"{latents} finite, {losses} not: the weights have diverged."
    if len(bad):
        losses, t = counted(len(bad), "loss is", "losses are"), batch["t"][bad[0]]
        return f"{latents} finite, {losses} not, the first that of sample {named[bad[0]]} at t = {t:.6g}."
    span = f"{loss.min():.4g} to {loss.max():.4g}"
    return f"The losses of its samples are finite, {span}, the largest is that of sample {named[np.argmax(loss)]}."


def _compute(step, micro_step, data, session):
    """Draws and computes a micro-batch, `data` as read, once more; returns its rows of `BATCH`."""
    sampler, read = session.sampler, make_batch(data)
    index, position = sampler.batch(step, micro_step)
    rows, batch = Rows(*sampler.rows(micro_step)), make_batch(map(paddle.to_tensor, data))
    seed_step(session.config["training"]["seed"], step)
    with session.precision.autocast():
        drawn = session.objective.draw(batch, rows)
        loss = session.objective.training_losses(session.model, batch, drawn=drawn)["loss"]
    whose = {"micro_step": np.full(len(index), micro_step), "rank": np.full(len(index), sampler.rank)}
    whose |= {"row": np.arange(rows.start, rows.stop), "index": index, "position": position}
    read = {"x": read.x, "y": read.y, **read.extras, **whose}
    return {**read, **{name: value.numpy() for name, value in drawn.items()}, "loss": loss.astype("float32").numpy()}


def _files(bad, batch, sources, session):
    sampler, precision = session.sampler, session.precision
    step = {key: value for key, value in bad._asdict().items() if key != "objective"}
    for key in ("loss", "grad_norm"):
        step[key] = step[key] if math.isfinite(step[key]) else str(step[key])
    state = {
        **step,
        "seed": session.config["training"]["seed"],
        "samples_seen": sampler.samples_seen(bad.step - 1),
        "micro_batch": sampler.batch_size,
        "processes": session.world_size,
        "data_ranks": sampler.world_size,
        "precision": {"dtype": precision.dtype, "level": precision.level},
        "device": paddle.get_device(),
        "paddle": paddle.__version__,
        "sources": sources,
    }
    yield CONFIG, session.config
    yield WEIGHTS, whole_weights(session.model, session.optimizer)
    yield BATCH, batch
    yield STATE, state
