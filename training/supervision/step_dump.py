"""A bad step in a folder, whole enough to do it again: `bad_steps/STEP/` in the run's folder.

    config.json       the resolved config
    weights.pdparams  the weights that the step met, float32, official names, whole tensors
    batch.pdparams    a row for each sample of the global batch, in its order: latents `x` and labels `y` as read; `t`,
                      `noise`, `force_drop_ids` as drawn; `loss`, computed once more; where they come from (`index` in
                      the set, `position` in the stream) and what part of the step they were (`micro_step`, `rank`)
    state.json        step, loss and norm of the run, learning rate, seed, precision, ranks, the samples' files
    manifest.json     sizes and checksums

Data and random numbers of a step are functions of the seed and the step: all are read and drawn again here, nothing of
them is kept while a run is well. `tools/replay_step.py` reads the folder.
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
MOST_DUMPS = 3  # of one step: a run that is started again and again must not fill the disk


@paddle.no_grad()
def dump_step(bad, *, folder, config, model, optimizer, objective, dataset, sampler, precision, saver):
    """Reads, draws and computes a bad step once more, and writes its dump; a collective.

    Args:
        bad: a `training.supervision.number_watch.BadStep`.
        folder: the run's.
        model: the network, not wrapped, with the weights that the step met.
        sampler: this rank's `MicroBatchSampler`.
        saver: the run's `CheckpointSaver`: a checkpoint under way is finished before any rank ends.

    Returns:
        Sentences that tell the cause and where the dump is.

    Raises:
        ValueError, OSError: on every rank: a sample can't be read any more; it can't be written.
    """
    saver.wait()
    read = _gather_error(lambda: _read(bad.step, dataset, sampler))
    if bad.objective:
        objective.set_state_dict(bad.objective)
    model.eval()  # nothing but label dropout depends on it, and that is drawn already
    parts = [_compute(bad.step, batch, config, model, objective, sampler, precision) for batch in read]
    batch = _merged(_gathered(parts))
    sources = [dataset.source(index) for index in batch["index"]]
    path = run_on_rank_0(lambda: _free_path(folder, bad.step))
    if path is None:
        said = f"{os.path.join(folder, PARENT)} holds {MOST_DUMPS} dumps of this step, and no other is written."
        return f"{find_cause(batch, sources)} {said}"

    failure = None
    try:
        write_checkpoint(path, _files(bad, batch, sources, config, model, optimizer, sampler, precision))
    except OSError as error:
        failure = error

    def written():
        if failure is not None:
            raise failure

    run_on_rank_0(written)  # no rank ends, and the job with it, before it is written
    return f"{find_cause(batch, sources)} The step is kept in {path}: see python tools/replay_step.py {path}."


def find_cause(batch, sources):
    """A sentence on what made a step bad, as far as its samples tell.

    Args:
        batch: the arrays of `BATCH`.
        sources: the samples' files.
    """
    count = len(batch["loss"])
    wrong = np.flatnonzero(~np.isfinite(batch["x"]).reshape(count, -1).all(axis=1))
    if len(wrong):
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return f"Numbers of its sample {wrong[0]} ({sources[wrong[0]]}){more} are not finite."
    wrong = np.flatnonzero(~np.isfinite(batch["loss"]))
    if len(wrong) == count:
        if count == 1:
            return "Its latent is finite, its loss is not: the weights have diverged."
        return f"Its {count} latents are finite, the losses of all of them are not: the weights have diverged."
    if len(wrong):
        first = wrong[0]
        return (
            f"Its {count} latents are finite, {counted(len(wrong), 'loss is', 'losses are')} not, the first that of "
            f"sample {first} ({sources[first]}) at t = {batch['t'][first]:.6g}."
        )
    most = int(np.argmax(batch["loss"]))
    return (
        f"The losses of its samples are finite, {batch['loss'].min():.4g} to {batch['loss'].max():.4g}, the largest is "
        f"that of sample {most} ({sources[most]})."
    )


def _read(step, dataset, sampler):
    """This rank's micro-batches: `(micro_step, index, position, x, y)`."""
    parts = []
    for micro_step in range(sampler.accumulation_steps):
        indices, positions = sampler.batch(step, micro_step)
        parts.append((micro_step, indices, positions, *dataset.read(indices, positions)))
    return parts


def _compute(step, batch, config, model, objective, sampler, precision):
    """The rows of one micro-batch, `{name: (n, ...) array}`."""
    micro_step, indices, positions, *arrays = batch
    rows = Rows(*sampler.rows(micro_step))
    micro_batch = Batch(*(paddle.to_tensor(array) for array in arrays))
    seed_step(config["training"]["seed"], step)
    with precision.autocast():
        drawn = objective.draw(micro_batch, rows)
        loss = objective.training_losses(model, micro_batch, drawn=drawn)["loss"]
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
        "rank": np.full(count, sampler.rank),
    }


def _gathered(value):
    """A list: what every rank has."""
    values = [value]
    if dist.get_world_size() > 1:
        values = []
        dist.all_gather_object(values, value)
    return values


def _gather_error(function):
    """What `function` returns; where it fails on one rank, every rank raises that error."""
    value = failure = None
    try:
        value = function()
    except (ValueError, OSError) as error:
        failure = error
    for of_rank in _gathered(failure):
        if of_rank is not None:
            raise of_rank
    return value


def _merged(ranks):
    """The global batch of all ranks' micro-batches, in order of `row`; ranks may hold the same ones."""
    parts = {int(part["row"][0]): part for parts in ranks for part in parts}
    parts = [parts[row] for row in sorted(parts)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _free_path(folder, step):
    for number in range(1, MOST_DUMPS + 1):
        path = os.path.join(folder, PARENT, f"{step:07d}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(path):
            return path
    return None


def _files(bad, batch, sources, config, model, optimizer, sampler, precision):
    yield CONFIG, config
    yield WEIGHTS, whole_weights(model, optimizer)
    yield BATCH, batch
    yield (
        STATE,
        {
            "step": bad.step,
            "kind": bad.kind,
            "loss": _json_number(bad.loss),
            "grad_norm": _json_number(bad.grad_norm),
            "learning_rate": bad.learning_rate,
            "seed": config["training"]["seed"],
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
