"""Do a step again that ended a training run because its loss or its gradients were not finite, and show why.

DUMP is the folder that the run's error names, RUN/bad_steps/STEP. One process does the whole global batch, with the
weights, the samples and the random numbers that the run had: it shows each sample's loss, then and now, which latents,
losses and gradients are not finite, and the first layer whose output is not.
"""

import os

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np

from config.flags import CommandParser, add_device_flag
from config.options import POSITIVE_INT
from runtime.files import MANIFEST
from runtime.process import configure_runtime, counted, resolve_device, run_cli
from runtime.untrusted import shortened

configure_runtime()  # before Paddle is imported


def print_samples(batch, sources, losses, limit):
    """Prints a line for each of the `limit` worst samples: first latents that are not finite, then by loss."""
    finite = np.isfinite(batch["x"]).reshape(len(losses), -1).all(axis=1)
    order = np.lexsort((-np.where(np.isfinite(losses), losses, np.inf), finite))
    print(f"{'sample':>6} {'rank':>4} {'micro':>5} {'label':>6} {'t':>9} {'loss then':>11} {'now':>11}  latent")
    for row in order[:limit]:
        dropped = "force_drop_ids" in batch and bool(batch["force_drop_ids"][row])
        label = "null" if dropped else int(batch["y"][row])
        latent = "" if finite[row] else f"{counted((~np.isfinite(batch['x'][row])).sum(), 'number')} not finite: "
        print(
            f"{row:>6} {batch['rank'][row]:>4} {batch['micro_step'][row]:>5} {label:>6} {batch['t'][row]:>9.5g} "
            f"{batch['loss'][row]:>11.5g} {losses[row]:>11.5g}  {latent}{shortened(sources[row], 500)}"
        )
    if len(order) > limit:
        print(f"... and {counted(len(order) - limit, 'more sample')} (--show)")


def print_gradients(gradients, limit):
    """Prints the parameters whose gradients are not finite or, where all are, those with the largest."""
    bad = [name for name, norm in gradients.items() if not np.isfinite(norm)]
    print(f"gradients: {len(bad)} of {len(gradients)} parameters not finite" + (":" if bad else ""))
    for name in bad[:limit]:
        print(f"  {name}")
    if not bad:
        print(f"norm {sum(norm**2 for norm in gradients.values()) ** 0.5:.5g}; the largest:")
        for name, norm in sorted(gradients.items(), key=lambda item: -item[1])[:limit]:
            print(f"  {norm:10.5g}  {name}")


def main():
    parser = CommandParser(description=__doc__)
    parser.add_argument("dump", metavar="DUMP", help="folder of the step, RUN/bad_steps/STEP")
    add_device_flag(parser)
    parser.add_argument("--show", check=POSITIVE_INT, default=10, help="samples and parameters to list")
    args = parser.parse_args()
    if not os.path.isfile(os.path.join(args.dump, MANIFEST)):
        what = f"not a whole dump of a step: it has no {MANIFEST}" if os.path.isdir(args.dump) else "no such folder"
        raise ValueError(f"{args.dump}: {what}; expected RUN/bad_steps/STEP, which the run's error names")

    import paddle

    from training.supervision.replay import read_dump, replay
    from training.supervision.step_dump import find_cause

    paddle.set_device(resolve_device(args.device))
    config, batch, state = read_dump(args.dump)
    sources = state["sources"]
    print(
        f"step {state['step']} ({state['kind']}): loss {state['loss']}, gradient norm {state['grad_norm']}, learning "
        f"rate {state['learning_rate']}; {counted(len(sources), 'sample')} on "
        f"{counted(state['data_ranks'], 'data rank')} in micro-batches of {state['micro_batch']}; "
        f"{state['precision']['dtype']} on {state['device']} then, {paddle.get_device()} now"
    )
    losses, gradients, layer = replay(args.dump, config, batch, state)
    print_samples(batch, sources, losses, args.show)
    finite, before = np.isfinite(losses), np.isfinite(batch["loss"])
    same = "the same samples are finite" if (finite == before).all() else "NOT the same samples are finite"
    apart = np.abs(losses - batch["loss"])[finite & before].max(initial=0.0)
    print(f"against the run: {same}, finite losses differ by {apart:.3g} at most")
    print_gradients(gradients, args.show)
    if layer:
        print(layer)
    print(find_cause({**batch, "loss": losses}, sources))


if __name__ == "__main__":
    run_cli(main)
