"""The timestep MLP of an exported network: fitted to the features that the stock transformer feeds it.

`Transformer2DModel` computes other sinusoidal features of a timestep than the official DiT (its 128 frequencies are
spaced by 127, not 128), and a scheduler may count time in other units than the network. The embedding is a function of
one number, so it is fitted anew: the first layer is drawn at random (a basis of D functions of that number, D the
hidden width), the second solved by least squares.
"""

import numpy as np
import paddle

from models.embeddings import TimestepEmbedder
from sampling.schedulers import visited_timesteps

NUM_FREQUENCIES = 256
# Numbers of sampling steps whose timesteps are fitted first, as far as the hidden width allows: the pipeline's default
# is 50, the demo's 25.
_STEPS_FIRST = (25, 50, 20, 10, 100, 250, 125, 200, 500, 1000)


def fit_timestep_embedding(state, scheduler, other=None):
    """Fits a timestep MLP on the stock transformer's features that gives DiT's own timestep embedding.

    A hidden width D of 1000 or more gives every timestep to float32 rounding. A smaller one can't: there the timesteps
    that the scheduler visits in 25, 50, 20, 10, 100, ... steps come first, then those of `other`, another scheduler
    that the folder may be sampled with, as many as D unknowns carry, and the rest is approximated.

    Returns:
        `(mlp, report)`: mlp `{"0.weight", "0.bias", "2.weight", "2.bias"}`; report: `exact_steps`, the numbers of
        sampling steps of those above at all of whose timesteps the embedding is right to 1e-4 of its largest entry;
        `other_exact_steps`, those of the other scheduler; `all_timesteps`, whether every timestep is; `max_error` and
        `kept_error`, the largest error at any timestep, in that unit, with these weights and with DiT's own kept.
    """
    num_timesteps = scheduler.config.num_train_timesteps
    counts = [n for n in _STEPS_FIRST if n <= num_timesteps]
    visited, others = (
        {n: visited_timesteps(one, n) for n in counts} if one is not None else {} for one in (scheduler, other)
    )
    first = np.zeros(num_timesteps, bool)
    for steps in [*visited.values(), *others.values()]:
        more = first.copy()
        more[steps] = True
        if more.sum() <= 0.95 * (state["t_embedder.mlp.2.bias"].size + 1):
            first = more
    t = np.arange(num_timesteps)
    mlp, error, kept_error = fit_embedding(state, t, t, np.where(first, 1.0, 1e-5), scale=0.1, rcond=1e-12)
    report = {
        "exact_steps": sorted(n for n, steps in visited.items() if error[steps].max() < 1e-4),
        "other_exact_steps": sorted(n for n, steps in others.items() if error[steps].max() < 1e-4),
        "all_timesteps": bool(error.max() < 1e-4),
        "max_error": float(error.max()),
        "kept_error": float(kept_error.max()),
    }
    return mlp, report


def own_timestep_mlp(state):
    """Returns the network's own timestep MLP by the names that a fit returns."""
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    return {name: np.asarray(state[f"t_embedder.mlp.{name}"], "float32") for name in names}


def fit_embedding(state, stock_t, own_t, weight, *, scale, rcond):
    """Returns an MLP that embeds the stock transformer's features of `stock_t` as the network embeds `own_t`, `(M,)`.

    Its first layer is random, of standard deviation `scale`, and its second the least squares weighted by `weight`.
    Also returned: the largest error at each time `(M,)`, in units of the embedding's largest entry, and the same of the
    network's own MLP.
    """
    from ppdiffusers.models.embeddings import get_timestep_embedding

    own, stock_t, own_t = own_timestep_mlp(state), paddle.to_tensor(stock_t), paddle.to_tensor(own_t)
    target = _timestep_mlp(TimestepEmbedder.timestep_embedding(own_t, NUM_FREQUENCIES).numpy(), own)  # (M, D)
    stock = get_timestep_embedding(stock_t, NUM_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=1).numpy()
    random, hidden_size = np.random.RandomState(0), target.shape[1]
    mlp = {
        "0.weight": random.normal(0, scale, [NUM_FREQUENCIES, hidden_size]).astype("float32"),
        "0.bias": random.normal(0, 1, [hidden_size]).astype("float32"),
    }
    basis = _silu(stock @ mlp["0.weight"] + mlp["0.bias"])
    basis = np.concatenate([basis, np.ones([len(basis), 1])], axis=1)  # (M, D + 1)
    weight = weight[:, None]
    solution = np.linalg.lstsq(basis * weight, target * weight, rcond=rcond)[0].astype("float32")
    mlp["2.weight"], mlp["2.bias"] = solution[:-1], solution[-1]
    errors = (np.abs(_timestep_mlp(stock, one) - target).max(axis=1) / np.abs(target).max() for one in (mlp, own))
    return mlp, *errors


def _silu(x):
    return x / (1 + np.exp(-x.astype("float64")))


def _timestep_mlp(features, mlp):
    hidden = _silu(features.astype("float64") @ mlp["0.weight"] + mlp["0.bias"])
    return hidden @ mlp["2.weight"] + mlp["2.bias"]
