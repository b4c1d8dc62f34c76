"""Do networks, objectives and samplers give the numbers of the official PyTorch code on this device?

In float32, and on a GPU once more with TF32 (`TF32` says why the bounds are what they are).
"""

import contextlib
from functools import partial

from runtime.paddle_private import full_float32
from verification import official, official_regularizers, official_targets
from verification.vectors import NETWORKS, judged
from verification.verdicts import Check

# The largest error of each case where products are rounded as TF32 does, measured on a CPU (`emulation.emulated`). The
# hardware may truncate where the emulation rounds, which doubles the error at most, and adds in another order: `ROOM`
# times as much is allowed. It tells that TF32 does no harm; formulas are judged in float32, whose errors are a 500th of
# these. Cases that clip to [-1, 1] are missing: there the network's error is multiplied by 157 before.
TF32 = {
    "DiT": 8.2e-4,
    "SiT": 9.5e-4,
    "LargeDiT": 7.9e-4,
    "LightningDiT": 7.6e-4,
    "LightningDiT without qk_norm": 1.2e-3,
    "LightningDiT without switches": 1.4e-3,
    "parts of LargeDiT": 5.4e-4,
    "diffusion losses": 1.2e-4,
    "diffusion gradients": 6.0e-4,
    "DDPM": 9.6e-4,
    "DDIM": 6.1e-4,
    "transport gradients": 1.2e-3,
    "LightningDiT gradients": 1.6e-3,
    "layer_sync": 9.0e-4,
    "ODE": 1.5e-3,
    "LightningDiT ODE": 4.3e-4,
    "SDE": 5.1e-4,
}
ROOM = 4.0


def checks(settings):
    """Yields the checks of this group."""
    coarse = TF32 if settings.on_gpu and not settings.quick else {}
    for name, case in CASES.items():
        yield Check(f"{name}, float32", partial(compare, settings, case))
    for name, error in coarse.items():
        yield Check(f"{name}, TF32", partial(compare, settings, CASES[name], ROOM * error))


def compare(settings, case, bound=None):
    """Judges a case in float32, or, with a bound, in Paddle's default, which is TF32 on a GPU that has it."""
    with full_float32() if bound is None else contextlib.nullcontext():
        return judged(case(settings.quick), bound)


def once(case, *arguments):
    """Returns a case that is the same with `quick`."""
    return lambda quick: case(*arguments)


def network(kind):
    """The forward pass, guidance and training mode of a network."""
    return {**official.forward(kind), **official.guidance(kind), **official.training_mode(kind)}


def ode(quick):
    """Every method of the ODE, guided, and two of them without guidance; with `quick` the first alone."""
    runs = [(run, True) for run in official.ODE_RUNS] + [("euler", False), ("dopri5", False)]
    pairs = {}
    for run, guided in runs[:1] if quick else runs:
        name = run if guided else f"{run} unguided"
        pairs |= {f"{name} {what}": pair for what, pair in official.ode(run, guided).items()}
    return pairs


def lightning_ode(quick):
    """Shifted times and guidance from a time on; with `quick` the run that has both alone."""
    runs = [*official.LIGHTNING_RUNS][: 1 if quick else None]
    return {what: pair for run in runs for what, pair in official.lightning_ode(run).items()}


def x1_ode(quick):
    """A network that predicts the data, to t = 1 too; with `quick` the run without."""
    runs = [*official_targets.X1_RUNS][: 1 if quick else None]
    return {what: pair for run in runs for what, pair in official_targets.x1_ode(run).items()}


# Each is called with `quick` and returns `{what: Pair}`.
CASES = {
    **{kind: once(network, kind) for kind in NETWORKS},
    "parts of LargeDiT": once(official.large_dit_parts),
    "embeddings": once(official.embeddings),
    "diffusion schedule": once(official.schedule),
    "diffusion losses": once(official.diffusion_losses),
    "diffusion gradients": once(official.diffusion_gradients),
    "diffusion distributions": once(official.distributions),
    "DDPM": once(official.diffusion_sampler, "ddpm25_cfg4"),
    "DDPM, clipped": once(official.diffusion_sampler, "ddpm25_nocfg_clip"),
    "DDIM": once(official.diffusion_sampler, "ddim10"),
    "DDIM, clipped, eta 0.5": once(official.diffusion_sampler, "ddim10_clip_eta05"),
    "transport path": once(official.linear_path),
    "transport gradients": once(official.transport_gradients),
    "LightningDiT gradients": once(official.lightning_gradients),
    **{kind: once(official_regularizers.regularized, kind) for kind in official_regularizers.REGULARIZED},
    "internal_guidance": once(official_regularizers.internal_guidance),
    "ODE": ode,
    "LightningDiT ODE": lightning_ode,
    "x1 gradients": once(official_targets.x1_gradients),
    "x1 ODE": x1_ode,
    "SDE": once(official.sde),
    "averages": once(official.averages),
}
