"""Export of a SiT as a folder that the stock `ppdiffusers.DiTPipeline` loads and samples by the ODE's Euler steps.

ppdiffusers has a scheduler for flow matching, `FlowMatchEulerDiscreteScheduler`, but it lacks `scale_model_input`,
which DiTPipeline calls at every step. `EDMEulerScheduler` does it instead. With `rho` 1 its sigmas fall linearly, and
with `sigma_data` 1 one of its steps, scaling of the next input included, is

    x' = (1 + s s') / (1 + s^2) / sqrt(1 + s'^2) x  +  (s - s') / sqrt(1 + s^2) / sqrt(1 + s'^2) F(x)

for a network F and sigmas s > s'. For sigmas below 2^-12 the roots and the first factor are 1 in float32, exactly, and
`x' = x + (s - s') F(x)` is left: an Euler step of the flow, with

* sigma = 2^-12 (t1 - t), so that s - s' is 2^-12 dt, and F = 2^12 times the velocity, by the last layer's weights;
* the timestep that the scheduler hands the network, log(sigma) / 4, taken back to t by the timestep MLP, which is
  fitted (`sampling.pipelines.timestep_fit`).

N inference steps are the N points of `sample_ode("euler", num_steps=N)`, and give its latents. The scheduler appends a
last step from sigma_min, here 2^-32, to 0: of length 2^-20, it changes nothing.

Everything else is as in `sampling.pipelines.export_dit`. The folder works with its own scheduler only, in float32, for
velocity prediction on any path; for noise and score predictions a step is no `x + dt F`.
"""

import numpy as np

from sampling.pipelines.export_dit import STOCK_CLASS, guidance_notes, transformer_config, transformer_state

SIGMA_SCALE = 2.0**-12  # 1 + SIGMA_SCALE**2 rounds to 1 in float32
SMALLEST = 2.0**-20  # what is left of the time at the last grid point


def check(config):
    """Returns the keywords of the `Transformer2DModel`; see `sampling.pipelines.export.exporter`."""
    prediction = config["objective"]["prediction"]
    if prediction != "velocity":
        raise ValueError(
            f"prediction {prediction!r}: the stock DiTPipeline's Euler steps need prediction 'velocity'; "
            "export a SiTPipeline instead"
        )
    return transformer_config(config["model"])


def convert(config, state, source):
    """Returns a SiT for a stock DiTPipeline; see `sampling.pipelines.export.exporter`."""
    from ppdiffusers import EDMEulerScheduler

    from sampling.pipelines.timestep_fit import fit_embedding
    from sampling.sit_pipeline import TransportScheduler

    transport = TransportScheduler.from_objective(config["objective"]).transport
    t0, t1 = transport.check_interval(transport.train_eps, transport.sample_eps, eval=True)
    largest, smallest = SIGMA_SCALE * (t1 - t0), SIGMA_SCALE * SMALLEST
    settings = {"sigma_max": largest, "sigma_min": smallest, "sigma_data": 1.0, "rho": 1.0}
    scheduler = EDMEulerScheduler(**settings, prediction_type="epsilon")

    # What up to 1000 steps visit, densely, and the last step, which hardly moves and need only not be far off. SiT's
    # embedding is smooth on [0, 1]: a few dozen basis functions give all of it, to 1e-5 at width 64, 1e-6 at 384.
    visited = np.concatenate([np.linspace(1e-3, 1, 800), np.geomspace(1e-3, 1, 400)]) * largest
    last = np.geomspace(smallest, 1e-3 * largest, 100)
    timesteps = (0.25 * np.log(np.concatenate([visited, last]))).astype("float32")
    times = (t1 - np.exp(4 * timesteps.astype("float64")) / SIGMA_SCALE).astype("float32")
    weight = np.repeat([1.0, 1e-3], [len(visited), len(last)])
    mlp, errors, _ = fit_embedding(state, timesteps, times, weight, scale=2.0, rcond=1e-10)

    weights = transformer_state(config["model"], state, timestep_embedding=mlp, source=source)
    for name in ("proj_out_2.weight", "proj_out_2.bias"):
        weights[name] = weights[name] / np.float32(SIGMA_SCALE)  # a power of two: exact
    notes = [
        "The folder samples Euler steps of the ODE with its own scheduler, in float32; no other scheduler fits it.",
        *guidance_notes(config["model"]),
        f"The timestep embedding was fitted to the scheduler's timesteps: right to {errors[: len(visited)].max():.1g} "
        "of its largest entry, for any number of steps up to 1000.",
    ]
    transformer = (*STOCK_CLASS, check(config))
    return {"transformer": transformer, "weights": weights, "scheduler": ("ppdiffusers", scheduler)}, notes
