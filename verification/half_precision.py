"""Do networks, losses, gradients and training steps in bfloat16 and float16 (AMP) stay near the numbers of float32?

On a GPU they run as in a loop. Paddle has no such kernels on a CPU: there the operators are emulated, which checks this
check, and measures what half precision costs (`EMULATED`).
"""

from functools import partial

import paddle
from paddle.amp.auto_cast import amp_initialize

from runtime.paddle_private import master_weights
from runtime.precision import Precision, resolve_precision
from verification import official, training_steps
from verification.emulation import emulated
from verification.parity import ROOM
from verification.vectors import OFFICIAL
from verification.verdicts import Check, Skip, Wrong, within

# The largest error of each case in the emulation, measured on a CPU: bfloat16, float16. Allowed is `ROOM` times as
# much, since a GPU's kernels round at other places and add in another order. What is wrong is larger: timesteps in
# bfloat16 (t = 999 becomes 1000) give 0.1, and bfloat16 where float16 should be 6 to 12 times the figure.
EMULATED = {
    "forward": (7.7e-3, 1.3e-3),
    "guidance": (2.2e-2, 2.3e-3),
    "diffusion_losses": (2.0e-3, 1.7e-4),
    "diffusion_gradients": (6.8e-3, 9.2e-4),
    "transport_gradients": (8.5e-3, 1.3e-3),
}
DTYPES = ("bfloat16", "float16")


def checks(settings):
    """Yields the checks of this group."""
    for dtype in DTYPES[:1] if settings.quick else DTYPES:
        for level in ("O1", "O2") if settings.on_gpu else ("",):
            for name, case in CASES.items():
                yield Check(f"{name}, {dtype} {level}".strip(), partial(run_case, settings, dtype, level, case))
        yield Check(f"weights, {dtype} O2", partial(check_weights, settings, dtype))


def run_case(settings, dtype, level, case):
    """Judges a case in half precision on a GPU, or emulated."""
    if settings.on_gpu:
        return within(case(dtype, precision_on_gpu(dtype, level)))
    with emulated(dtype):
        text, figures = within(case(dtype, official.FLOAT32))
    return f"emulated on a CPU: {text}", figures


def precision_on_gpu(dtype, level):
    """Returns the `Precision` of a run; raises `Skip` for a GPU without."""
    capability = paddle.device.cuda.get_device_capability(paddle.get_device())
    try:
        precision = resolve_precision(dtype, level, device=paddle.get_device(), compute_capability=capability)
    except ValueError as reason:
        raise Skip(str(reason)) from reason
    if dtype == "float16" and capability < (7, 0):  # Paddle leaves everything in float32 without a word
        raise Skip(f"AMP in float16 needs a GPU of compute capability 7.0 or newer, this one has {capability[0]}.x")
    return precision


def beside(pairs, name, dtype):
    """Returns `{what: (error, bound)}` of the pairs of a function of `official`, by the bound of `EMULATED`."""
    bound = ROOM * EMULATED[name][DTYPES.index(dtype)]
    return {what: (pair.error(), bound) for what, pair in pairs.items()}


def network(kind, dtype, precision):
    """The forward pass with plain and fused attention, and guidance."""
    fused = official.forward(kind, precision, fused_attention=True)
    return {
        **beside(official.forward(kind, precision), "forward", dtype),
        **beside({f"{what}, fused": pair for what, pair in fused.items()}, "forward", dtype),
        **beside(official.guidance(kind, precision), "guidance", dtype),
    }


def objective(name, dtype, precision):
    """Losses or gradients by a function of `official`."""
    return beside(getattr(official, name)(precision), name, dtype)


# Each is called with a dtype and a `Precision`, and returns `{what: (error, bound)}`.
CASES = {
    **{kind: partial(network, kind) for kind in OFFICIAL},
    "diffusion losses": partial(objective, "diffusion_losses"),
    "diffusion gradients": partial(objective, "diffusion_gradients"),
    "transport gradients": partial(objective, "transport_gradients"),
    "4 official steps of DiT": training_steps.official_errors,
    **{f"{training_steps.STEPS} steps of {kind}": partial(training_steps.stored_errors, kind) for kind in OFFICIAL},
}


class CastOnCpu(Precision):
    """O2 whose weights are cast on a CPU too, where `paddle.amp.decorate` leaves them as they are."""

    def decorate(self, model):
        amp_initialize([model], self.dtype, None)


def check_weights(settings, dtype):
    """Under O2 weights are cast; their masters, position tables, averages and RoPE's tables are float32."""
    precision = precision_on_gpu(dtype, "O2") if settings.on_gpu else CastOnCpu(dtype, "O2")
    counts = []
    for kind, (weights, _, model, _) in OFFICIAL.items():
        run = training_steps.Run(model, training_steps.TRAINING, weights, precision)
        cast, problems = check_dtypes(run, getattr(paddle, dtype))
        if problems:
            raise Wrong(f"{kind}: {'; '.join(problems[:3])}")
        counts.append(f"{cast} of {kind}")
    return f"{dtype} weights with float32 masters: {', '.join(counts)}"


def check_dtypes(run, half):
    """Returns how many weights of a run are cast, and what has a dtype that it should not have, in words."""
    masters = master_weights(run.optimizer)
    cast = {name: parameter for name, parameter in run.model.named_parameters() if parameter.dtype == half}
    float32 = {name: p for name, p in run.model.named_parameters() if name == "pos_embed" or name not in cast}
    float32 |= {f"master of {name}": masters.get(parameter.name) for name, parameter in cast.items()}
    float32 |= {f"average of {name}": value for name, value in run.ema.state_dict().items()}
    float32 |= {f"rotary table {i}": table for i, table in enumerate(getattr(run.model, "rotary", ()))}
    dtypes = {name: None if value is None else value.dtype for name, value in float32.items()}
    problems = [f"{name} is {dtype}, not float32" for name, dtype in dtypes.items() if dtype != paddle.float32]
    return len(cast), problems if cast else ["no weight was cast"]
