"""What is learned and how: predictions, loss weightings, time intervals, and the drift and score of a network.

Time runs from noise (`t = 0`, `x0`) to data (`t = 1`, `x1`). Names, attributes and numbers are those of the official
SiT code (Ma et al., arXiv:2401.08740); where its behaviour is plainly wrong, ours is said in the docstring.

A `model` is any callable `model(x, t, **model_kwargs)`: x `(N, C, ...)`, t `(N,)`, result of x's shape. All arithmetic
here is done in float32 (float64 for float64 inputs) whatever the model's precision and whatever
`paddle.amp.auto_cast` says outside; only the model runs under it.
"""

import enum
import math
from dataclasses import dataclass

import paddle
from paddle.nn import functional as F

from .path import GVPCPlan, ICPlan, VPCPlan
from .utils import at_least_float32, expand_t_like_x, full_precision, mean_flat, shift_time, sum_flat


class ModelType(enum.Enum):
    """Names what the network predicts."""

    VELOCITY = "velocity"  # E[alpha' x1 + sigma' x0 | x_t]
    NOISE = "noise"  # E[x0 | x_t]
    SCORE = "score"  # the gradient of log p_t at x_t
    X1 = "x1"  # the data, E[x1 | x_t]


class PathType(enum.Enum):
    """Names the path between noise and data, see `path`."""

    LINEAR = "Linear"
    GVP = "GVP"
    VP = "VP"


class WeightType(enum.Enum):
    """Names the weight of a noise or score loss as a function of t; velocity losses are never weighted."""

    NONE = None
    VELOCITY = "velocity"  # makes the loss that of the velocity
    LIKELIHOOD = "likelihood"  # bounds the likelihood


# Trained by the error of the velocity, and finite at both ends of the linear path.
_VELOCITY_LOSS = (ModelType.VELOCITY, ModelType.X1)
PATHS = {PathType.LINEAR: ICPlan, PathType.GVP: GVPCPlan, PathType.VP: VPCPlan}


@dataclass(kw_only=True, eq=False)
class Transport:
    """A path, what the network predicts on it, and the loss that teaches it. Made by `create_transport`.

    Its settings are described there. `path_sampler` is the path (`ICPlan`, `GVPCPlan` or `VPCPlan`).
    """

    model_type: ModelType
    path_type: PathType
    loss_type: WeightType
    train_eps: float
    sample_eps: float
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    cosine_loss: bool = False
    t_eps: float = 0.05
    timestep_shift: float = 0.0

    def __post_init__(self):
        self.path_sampler = PATHS[self.path_type]()

    @full_precision
    def prior_logp(self, z):
        """Returns the log density of N(0, I) in nats, `(N, ...)` -> `(N,)`."""
        square = sum_flat(paddle.square(z))
        return square * -0.5 - paddle.full_like(square, 0.5 * math.prod(z.shape[1:]) * math.log(2 * math.pi))

    def check_interval(
        self, train_eps, sample_eps, *, diffusion_form="SBDM", sde=False, reverse=False, eval=False, last_step_size=0.0
    ):
        """Returns the times `(t0, t1)` between which a network is trained or integrated: the official table.

        Args:
            train_eps, sample_eps: cut off in training, and (`eval`) in sampling.
            sde: for `sample_sde`, of that `diffusion_form`, which leaves `last_step_size` for its last step.
            reverse: from data to noise: both times are mirrored, `1 - t`.
        """
        eps = sample_eps if eval else train_eps
        end = 1.0 - (last_step_size if sde and last_step_size != 0 else eps)
        t0, t1 = 0.0, 1.0
        predicts_velocity = self.model_type in _VELOCITY_LOSS
        if self.path_type == PathType.VP:
            t1 = end
        elif sde or not predicts_velocity:
            # The score diverges at the data, its coefficient in the velocity at the noise.
            t0 = eps if not predicts_velocity or diffusion_form == "SBDM" else 0.0
            t1 = end
        return (1.0 - t0, 1.0 - t1) if reverse else (t0, t1)

    # -- Training -----------------------------------------------------------------------------------------------------

    @full_precision
    def sample_timesteps(self, batch_size):
        """Draws times to train at, `(batch_size,)`, float32: one call of `paddle.rand` or (logit-normal) `randn`."""
        if self.timestep_sampling == "logit-normal":
            u = F.sigmoid(paddle.randn((batch_size,)) * self.logit_std + self.logit_mean)
        else:
            u = paddle.rand((batch_size,))
        if self.timestep_shift > 0:
            u = shift_time(u, self.timestep_shift)  # within [0, 1], so that what is cut off stays cut off
        t0, t1 = self.check_interval(self.train_eps, self.sample_eps)
        return u * (t1 - t0) + t0

    def sample(self, x1):
        """Draws noise, then times for data `x1` `(N, ...)`; returns `(t, x0, x1)`."""
        x1 = at_least_float32(x1)
        x0 = paddle.randn(x1.shape, dtype=x1.dtype)
        return self.sample_timesteps(x1.shape[0]).astype(x1.dtype), x0, x1

    def training_losses(self, model, x1, model_kwargs=None, x0=None, t=None):
        """Returns the losses of a batch, one a sample.

        Args:
            x1: data `(N, ...)`.
            x0, t: noise `(N, ...)` and times `(N,)`, instead of random draws; both or neither, else a `ValueError`.

        Returns:
            dict: "loss" `(N,)`; "pred", the model's output; with `cosine_loss` also its part "cos_loss" `(N,)`.
        """
        if (x0 is None) != (t is None):
            raise ValueError("x0 and t must be given together, or neither")
        if x0 is None:
            t, x0, x1 = self.sample(x1)
        x0, x1 = at_least_float32(x0), at_least_float32(x1)
        for name, value, expected in (("x0", x0, x1.shape), ("t", t, x1.shape[:1])):
            if list(value.shape) != list(expected):
                raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(expected)} for x1's")
        t, xt, ut = self.path_sampler.plan(t.astype(x1.dtype), x0, x1)
        return self._losses(call_model(model, xt, t, model_kwargs), xt, ut, x0, x1, t)

    def compare(self, output, x1, x0, t):
        """Returns `(prediction, target)`, of x1's shape: what a loss at noise x0 and times t `(N,)` compares.

        A score's are times sigma; of a network that predicts the data they are velocities.
        """
        x0, x1 = map(at_least_float32, (x0, x1))
        t, xt, ut = self.path_sampler.plan(t.astype(x1.dtype), x0, x1)
        return self._compared(output, xt, ut, x0, x1, t)

    @full_precision
    def _compared(self, output, xt, ut, x0, x1, t):
        if self.model_type == ModelType.VELOCITY:
            return output, ut
        if self.model_type == ModelType.X1:
            return self.output_to_velocity(output, xt, t), self.output_to_velocity(x1, xt, t)  # both clamped
        if self.model_type == ModelType.NOISE:
            return output, x0
        return output * self.path_sampler.compute_sigma_t(expand_t_like_x(t, x0))[0], -x0

    @full_precision
    def _losses(self, pred, xt, ut, x0, x1, t):
        terms, (prediction, target) = {"pred": pred}, self._compared(pred, xt, ut, x0, x1, t)
        error = paddle.square(prediction - target)
        if self.model_type in _VELOCITY_LOSS:
            terms["loss"] = mean_flat(error)
            if self.cosine_loss:
                terms["cos_loss"] = mean_flat(1 - F.cosine_similarity(prediction, target, axis=1))  # over channels
                terms["loss"] = terms["loss"] + terms["cos_loss"]
            return terms
        terms["loss"] = mean_flat(error * self._weight(expand_t_like_x(t, x0)))
        return terms

    def _weight(self, t):
        if self.loss_type == WeightType.NONE:
            return paddle.ones_like(t)
        drift_var, sigma_t = self.path_sampler.compute_drift_var(t), self.path_sampler.compute_sigma_t(t)[0]
        if self.loss_type == WeightType.VELOCITY:
            return paddle.square(drift_var / sigma_t)
        return drift_var / paddle.square(sigma_t)

    # -- From the network's output to the fields that a sampler integrates --------------------------------------------

    @full_precision
    def output_to_velocity(self, output, x, t):
        """Returns the velocity, the probability flow ODE's drift, of a network's output at `x`, `t` `(N,)`."""
        if self.model_type == ModelType.VELOCITY:
            return output
        if self.model_type == ModelType.X1:
            return self.path_sampler.get_velocity_from_data(output, x, t, self.t_eps)
        return self.path_sampler.get_velocity_from_score(self.output_to_score(output, x, t), x, t)

    @full_precision
    def output_to_score(self, output, x, t):
        """Returns the score of a network's output at `x`, `t` `(N,)`; `x`'s shape."""
        if self.model_type == ModelType.SCORE:
            return output
        if self.model_type == ModelType.NOISE:
            return output / -self.path_sampler.compute_sigma_t(expand_t_like_x(t, x))[0]
        if self.model_type == ModelType.X1:
            return self.path_sampler.get_score_from_data(output, x, t, self.t_eps)
        return self.path_sampler.get_score_from_velocity(output, x, t)

    @full_precision
    def output_to_data(self, output, x, t):
        """Returns the expected data E[x1 | x_t] of a network's output at `x`, `t` `(N,)`; Tweedie's formula."""
        if self.model_type == ModelType.X1:
            return output
        score, t = self.output_to_score(output, x, t), expand_t_like_x(t, x)
        alpha_t, sigma_t = self.path_sampler.compute_alpha_t(t)[0], self.path_sampler.compute_sigma_t(t)[0]
        return (x + score * paddle.square(sigma_t)) / alpha_t

    def get_drift(self):
        """Returns the probability flow ODE's drift, `drift(x, t, model, **model_kwargs)` of `x`'s shape."""
        return lambda x, t, model, **kwargs: self.output_to_velocity(call_model(model, x, t, kwargs), x, t)

    def get_score(self):
        """Returns the score, `score(x, t, model, **model_kwargs)` of `x`'s shape."""
        return lambda x, t, model, **kwargs: self.output_to_score(call_model(model, x, t, kwargs), x, t)


def call_model(model, x, t, model_kwargs=None):
    """Returns the model's output, at least float32; ValueError for another shape than `x`'s, such as 2C channels."""
    output = model(x, t, **(model_kwargs or {}))
    if list(output.shape) != list(x.shape):
        raise ValueError(f"the model returned shape {list(output.shape)}, expected its input's {list(x.shape)}")
    return at_least_float32(output)
