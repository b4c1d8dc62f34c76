"""Keeps a bad step in a folder, whole enough to do it again: `bad_steps/STEP/` in the run's folder.

    config.json       the resolved config
    weights.pdparams  the weights that the step met, float32, official names, whole tensors
    batch.pdparams    a row for each sample of the global batch, in its order: latents `x` and labels `y` as read; `t`,
                      `noise`, `force_drop_ids` as drawn; `loss`, computed once more; where they come from (`index` in
                      the set, `position` in the stream) and what part of the step they were (`micro_step`, `rank`)
    state.json        step, loss and norm of the run, learning rate, seed, precision, ranks, the samples' files
    manifest.json     sizes and checksums

Data and random numbers of a step are functions of the seed and the step. So all are read and drawn again here, and a
run that is well keeps nothing of them. `tools/replay_step.py` reads the folder.
"""

import math
import os

import numpy as np
import paddle
import paddle.distributed as dist

from objectives import Batch, Rows
from runtime.process import counted, seed_step
from training.checkpoints.saver import write_checkpoint
from training.checkpoints.state import whole_weights
from training.parallel.collective import run_on_rank_0

CONFIG, WEIGHTS, BATCH, STATE = "config.json", "weights.pdparams", "batch.pdparams", "state.json"
PARENT = "bad_steps"
MAX_DUMPS_PER_STEP = 3  # because a run that is started again and again must not fill the disk


@paddle.no_grad()
def dump_step(bad, session):
    """Reads, draws and computes a bad step once more, and writes its dump; a collective.

    Args:
        bad: a `training.supervision.number_watch.BadStep`.
        session: the run's `training.session.Session`; its network has the weights that the step met.

    Returns:
        Sentences that tell the cause and where the dump is.

    Raises:
        ValueError, OSError: on every rank, where a sample can't be read any more, or the dump can't be written.
    """
    session.saver.wait()  # because a checkpoint under way must be whole before any rank ends
    batches = _on_every_rank(lambda: _read(bad.step, session.dataset, session.sampler))
    if bad.objective:
        session.objective.set_state_dict(bad.objective)
    session.model.eval()  # changes label dropout alone, whose labels are drawn already
    batch = _global_batch(_gather([_compute(bad.step, batch, session) for batch in batches]))
    sources = [session.dataset.source(index) for index in batch["index"]]
    path = run_on_rank_0(lambda: _free_path(session.folder, bad.step))
    if path is None:
        held = f"{os.path.join(session.folder, PARENT)} holds {MAX_DUMPS_PER_STEP} dumps of this step"
        return f"{find_cause(batch, sources)} {held}, and no other is written."
    # No rank ends, and the job with it, before all is written.
    _on_every_rank(lambda: write_checkpoint(path, _files(bad, batch, sources, session)))
    return f"{find_cause(batch, sources)} The step is kept in {path}: see python tools/replay_step.py {path}."


def find_cause(batch, sources):
    """Returns a sentence on what made a step bad, as far as its samples (arrays of `BATCH`, their files) tell."""
    loss, count = batch["loss"], len(batch["loss"])
    bad_latents = np.flatnonzero(~np.isfinite(batch["x"]).reshape(count, -1).all(axis=1))
    if len(bad_latents):
        first, more = bad_latents[0], f", and {len(bad_latents) - 1} more" if len(bad_latents) > 1 else ""
        return f"Numbers of its sample {first} ({sources[first]}){more} are not finite."
    bad_losses = np.flatnonzero(~np.isfinite(loss))
    if len(bad_losses) == count:
        if count == 1:
            return "Its latent is finite, its loss is not: the weights have diverged."
        return f"Its {count} latents are finite, the losses of all of them are not: the weights have diverged."
    if len(bad_losses):
        first = bad_losses[0]
        return (
            f"Its {count} latents are finite, {counted(len(bad_losses), 'loss is', 'losses are')} not, the first that "
            f"of sample {first} ({sources[first]}) at t = {batch['t'][first]:.6g}."
        )
    largest = int(np.argmax(loss))
    return (
        f"The losses of its samples are finite, {loss.min():.4g} to {loss.max():.4g}, the largest is that of sample "
        f"{largest} ({sources[largest]})."
    )


def _read(step, dataset, sampler):
    """Reads this rank's micro-batches, `[(micro_step, index, position, x, y)]`."""
    batches = []
    for micro_step in range(sampler.accumulation_steps):
        indices, positions = sampler.batch(step, micro_step)
        batches.append((micro_step, indices, positions, *dataset.read(indices, positions)))
    return batches


def _compute(step, batch, session):
    """Draws and computes one micro-batch once more; returns `{name: (n, ...) array}`."""
    micro_step, indices, positions, *arrays = batch
    rows = Rows(*session.sampler.rows(micro_step))
    micro_batch = Batch(*(paddle.to_tensor(array) for array in arrays))
    seed_step(session.config["training"]["seed"], step)
    with session.precision.autocast():
        drawn = session.objective.draw(micro_batch, rows)
        loss = session.objective.training_losses(session.model, micro_batch, drawn=drawn)["loss"]
    count = len(indices)
    return {
        "x": arrays[0],
        "y": arrays[1],
        **{name: value.numpy() for name, value in drawn.items()},
        "loss": loss.astype("float32").numpy(),
        "row": np.arange(rows.start, rows.stop),
        "index": indices,
        "position": positions,
        "micro_step": np.full(count, micro_step),
        "rank": np.full(count, session.sampler.rank),
    }


def _gather(value):
    """Returns every rank's value, in a list."""
    if dist.get_world_size() == 1:
        return [value]
    values = []
    dist.all_gather_object(values, value)
    return values


def _on_every_rank(function):
    """Returns what `function` returns; an error of it on one rank is raised on every rank."""
    value = failure = None
    try:
        value = function()
    except (ValueError, OSError) as error:
        failure = error
    for error in _gather(failure):
        if error is not None:
            raise error
    return value


def _global_batch(ranks):
    """Joins all ranks' micro-batches in order of `row`; tensor-parallel ranks hold the same ones."""
    parts = {int(part["row"][0]): part for parts in ranks for part in parts}
    parts = [parts[row] for row in sorted(parts)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _free_path(folder, step):
    for number in range(1, MAX_DUMPS_PER_STEP + 1):
        path = os.path.join(folder, PARENT, f"{step:07d}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(path):
            return path
    return None


def _files(bad, batch, sources, session):
    sampler, precision = session.sampler, session.precision
    yield CONFIG, session.config
    yield WEIGHTS, whole_weights(session.model, session.optimizer)
    yield BATCH, batch
    yield (
        STATE,
        {
            "step": bad.step,
            "kind": bad.kind,
            "loss": _json_number(bad.loss),
            "grad_norm": _json_number(bad.grad_norm),
            "learning_rate": bad.learning_rate,
            "seed": session.config["training"]["seed"],
            "samples_seen": sampler.samples_seen(bad.step - 1),
            "micro_batch": sampler.batch_size,
            "processes": dist.get_world_size(),
            "data_ranks": sampler.world_size,
            "precision": {"dtype": precision.dtype, "level": precision.level},
            "device": paddle.get_device(),
            "paddle": paddle.__version__,
            "sources": sources,
        },
    )


def _json_number(value):
    return value if math.isfinite(value) else str(value)
