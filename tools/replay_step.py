"""Do a step again that ended a training run because its loss or its gradients were not finite, and show why.

DUMP is the folder that the run's error names, RUN/bad_steps/STEP. One process does the whole global batch, with the
weights, the samples and the random numbers that the run had: it shows each sample's loss, then and now, which latents,
losses and gradients are not finite, and the first layer whose output is not.
"""

import argparse
import os

import _root  # noqa: F401 (the project's root, on sys.path)

from runtime.process import configure_runtime, counted, run_cli

configure_runtime()  # before Paddle is imported


def read_dump(folder):
    """`(config, batch, state)` of a dump: `batch` is arrays by name. ValueError if it is not whole."""
    from config.schema import read_json, resolve_config
    from runtime.untrusted import inside
    from training.checkpoints.whole_folder import damage
    from training.supervision.step_dump import BATCH, CONFIG, STATE, WEIGHTS
    from weights.files import safe_load

    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder; expected RUN/bad_steps/STEP, which the run's error names")
    if wrong := damage(folder, required=(CONFIG, WEIGHTS, BATCH, STATE), checksums=True):
        raise ValueError(f"{folder}: not a whole dump of a step: {wrong}")
    inside(folder, WEIGHTS)
    path = inside(folder, CONFIG)
    config = resolve_config(read_json(path), source=path)
    config["training"]["recompute"] = False
    batch, state = safe_load(inside(folder, BATCH)), read_json(inside(folder, STATE))
    if not _fits(batch, state, config["model"]):
        raise ValueError(f"{folder}: {BATCH} and {STATE} are not those of a step of {CONFIG}")
    return config, batch, state


def _fits(batch, state, model):
    """Whether all is there, and of the right types and sizes."""
    import numpy as np

    names = {"x", "y", "t", "noise", "loss", "rank", "micro_step"}
    keys = {"step", "kind", "loss", "grad_norm", "learning_rate", "data_ranks", "micro_batch", "precision", "device"}
    keys.add("sources")
    if not isinstance(batch, dict) or not isinstance(state, dict) or not (names <= set(batch) and keys <= set(state)):
        return False
    sources, precision, size = state["sources"], state["precision"], state["micro_batch"]
    if not isinstance(sources, list) or type(size) is not int or size < 1:
        return False
    if not isinstance(precision, dict) or "dtype" not in precision:
        return False
    if not all(isinstance(array, np.ndarray) and array.dtype.kind in "fiub" for array in batch.values()):
        return False
    shape = (len(sources), model["in_channels"], model["sample_size"], model["sample_size"])
    shapes = {name: shape if name in ("x", "noise") else shape[:1] for name in batch}
    return shape[0] > 0 and all(array.shape == shapes[name] for name, array in batch.items())


def replay(folder, config, batch, state):
    """Forward and backward of the whole step.

    Returns:
        `(losses, gradients, layer)`: the samples' losses `(N,)`; gradient norms by parameter, in the network's order;
        and a sentence on the first layer whose output is not finite, or None.
    """
    import numpy as np
    import paddle

    from objectives import Batch, build_objective
    from runtime.progress import tqdm
    from training import setup
    from training.checkpoints.read import load_pretrained
    from training.supervision.step_dump import WEIGHTS

    model = setup.build_network(config, single_backward=True)
    load_pretrained(os.path.join(folder, WEIGHTS), model, as_stored=True)
    precision = setup.setup_precision(config, paddle.get_device())
    if precision.note:
        print(f"note: {precision.note}")
    precision.decorate(model)
    model.eval()  # nothing but label dropout depends on it, and that is in the batch
    objective = build_objective(config)
    drawn_names = [name for name in ("t", "weights", "noise", "force_drop_ids") if name in batch]

    def losses_of(rows):
        drawn = {name: paddle.to_tensor(batch[name][rows]) for name in drawn_names}
        with precision.autocast():
            micro_batch = Batch(*(paddle.to_tensor(batch[name][rows]) for name in "xy"))
            return objective.training_losses(model, micro_batch, drawn=drawn)["loss"]

    count, size = len(batch["y"]), state["micro_batch"]
    losses = []
    for start in tqdm(range(0, count, size), desc="micro-batches", leave=False):
        loss = losses_of(slice(start, start + size))
        (loss.mean() * (size / count)).backward()
        losses.append(loss.detach().astype("float32").numpy())
    losses = np.concatenate(losses)
    gradients = {
        name: float(paddle.linalg.norm(parameter.grad.astype("float32")))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    wrong = np.flatnonzero(~np.isfinite(losses))
    layer = None
    if len(wrong) and np.isfinite(batch["x"][wrong[0]]).all():
        layer = first_bad_layer(model, lambda: losses_of(slice(wrong[0], wrong[0] + 1)))
        layer = f"sample {wrong[0]}: {layer}"
    return losses, gradients, layer


def first_bad_layer(model, forward):
    """A sentence on the first layer, in order of computation, whose output is not finite in a `forward()`."""
    import paddle

    found = []

    def watch(name):
        def hook(layer, inputs, output):
            outputs = output if isinstance(output, (list, tuple)) else [output]
            if not found and not all(bool(paddle.isfinite(value).all()) for value in outputs if value is not None):
                found.append(f"the first output that is not finite is that of {name} ({type(layer).__name__})")

        return hook

    hooks = [layer.register_forward_post_hook(watch(name)) for name, layer in model.named_sublayers()]
    with paddle.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return found[0] if found else "the network's output is finite, the loss made of it is not"


def print_samples(batch, sources, losses, limit):
    """A line for each of the `limit` worst samples: first what is not finite, then by loss."""
    import numpy as np

    from runtime.untrusted import printable

    finite = np.isfinite(batch["x"]).reshape(len(losses), -1).all(axis=1)
    key = np.where(np.isfinite(losses), losses, np.inf)
    order = sorted(range(len(losses)), key=lambda row: (finite[row], -key[row], row))
    print(f"{'sample':>6} {'rank':>4} {'micro':>5} {'label':>6} {'t':>9} {'loss then':>11} {'now':>11}  latent")
    for row in order[:limit]:
        dropped = "force_drop_ids" in batch and bool(batch["force_drop_ids"][row])
        label = "null" if dropped else int(batch["y"][row])
        latent = "" if finite[row] else f"{counted((~np.isfinite(batch['x'][row])).sum(), 'number')} not finite: "
        print(
            f"{row:>6} {batch['rank'][row]:>4} {batch['micro_step'][row]:>5} {label:>6} {batch['t'][row]:>9.5g} "
            f"{batch['loss'][row]:>11.5g} {losses[row]:>11.5g}  {latent}{printable(sources[row], 500)}"
        )
    if len(order) > limit:
        print(f"... and {counted(len(order) - limit, 'more sample')} (--show)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", metavar="DUMP", help="folder of the step, RUN/bad_steps/STEP")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N [auto]")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="samples and parameters to list [10]")
    args = parser.parse_args()
    if args.show < 1:
        raise ValueError(f"--show must be above 0, got {args.show}")

    import numpy as np
    import paddle

    from runtime.process import resolve_device
    from training.supervision.step_dump import find_cause

    paddle.set_device(resolve_device(args.device))
    config, batch, state = read_dump(args.dump)
    sources = state["sources"]
    samples, ranks = counted(len(sources), "sample"), counted(state["data_ranks"], "data rank")
    print(
        f"step {state['step']} ({state['kind']}): loss {state['loss']}, gradient norm {state['grad_norm']}, learning "
        f"rate {state['learning_rate']}; {samples} on {ranks} in micro-batches "
        f"of {state['micro_batch']}; {state['precision']['dtype']} on {state['device']} then, {paddle.get_device()} now"
    )
    losses, gradients, layer = replay(args.dump, config, batch, state)

    print_samples(batch, sources, losses, args.show)
    both = np.isfinite(losses) & np.isfinite(batch["loss"])
    same = (np.isfinite(losses) == np.isfinite(batch["loss"])).all()
    apart = np.abs(losses - batch["loss"])[both].max(initial=0.0)
    verdict = "the same samples are finite" if same else "NOT the same samples are finite"
    print(f"against the run: {verdict}, finite losses differ by {apart:.3g} at most")

    wrong = [name for name, norm in gradients.items() if not np.isfinite(norm)]
    print(f"gradients: {len(wrong)} of {len(gradients)} parameters not finite" + (":" if wrong else ""))
    for name in wrong[: args.show]:
        print(f"  {name}")
    if not wrong:
        total = sum(norm**2 for norm in gradients.values()) ** 0.5
        print(f"norm {total:.5g}; the largest:")
        for name, norm in sorted(gradients.items(), key=lambda item: -item[1])[: args.show]:
            print(f"  {norm:10.5g}  {name}")
    if layer:
        print(layer)
    print(find_cause({**batch, "loss": losses}, sources))


if __name__ == "__main__":
    run_cli(main)
