"""Stochastic interpolants: `create_transport(...)`, `Sampler`, and their parts. Needs paddle and numpy only."""

import math

from .path import DIFFUSION_FORMS, GVPCPlan, ICPlan, VPCPlan
from .sampler import LAST_STEPS, ODE_METHODS, SDE_METHODS, Sampler, host_value
from .transport import ModelType, PathType, Transport, WeightType
from .utils import check_choice, check_number, shift_time

__all__ = ["DIFFUSION_FORMS", "LAST_STEPS", "ODE_METHODS", "SDE_METHODS", "TIMESTEP_SAMPLINGS", "create_transport"]
__all__ += ["GVPCPlan", "ICPlan", "ModelType", "PathType", "Sampler", "Transport", "VPCPlan", "WeightType"]
__all__ += ["host_value", "shift_time"]

TIMESTEP_SAMPLINGS = ("uniform", "logit-normal")


def create_transport(
    path_type="Linear",
    prediction="velocity",
    loss_weight=None,
    train_eps=None,
    sample_eps=None,
    *,
    timestep_sampling="uniform",
    logit_mean=0.0,
    logit_std=1.0,
    cosine_loss=False,
    t_eps=0.05,
    timestep_shift=0.0,
):
    """Returns a `Transport` from plain settings; the first five arguments and their defaults are the official SiT's.

    Args:
        path_type: `Linear`, `GVP` or `VP`.
        prediction: what the model predicts: `velocity`, `noise`, `score`, or beyond the official code `x1`, the data
            (Li and He 2025, JiT, arXiv:2511.13720), which is trained by the error of the velocity it amounts to.
        loss_weight: None, `velocity` or `likelihood`; of no effect on velocity and x1, as in the official code.
        train_eps, sample_eps: how far training and sampling stay from t = 0 and 1 where a coefficient is infinite.
            None: 1e-5 and 1e-3 on VP, 1e-3 and 1e-3 for noise and score on Linear and GVP. Velocity and x1 there
            need none: there both are 0 whatever is given, as in the official code. Each is read by itself: in the
            official code `sample_eps` becomes None if only `train_eps` is given, and is ignored if `train_eps` isn't.
        timestep_sampling: distribution of t in training: `uniform`, or `logit-normal` (Esser et al. 2024, SD3; Yao et
            al. 2025, LightningDiT): `sigmoid(logit_mean + logit_std * N(0, 1))`, larger is closer to the data.
        logit_mean, logit_std: of `logit-normal`.
        cosine_loss: of velocity and x1: add `1 - cos(pred, ut)` over the channels, averaged over positions, to
            each sample's loss (LightningDiT).
        t_eps: of x1: the velocity `(x1_hat - x_t) / (1 - t)` of its output is divided by `t_eps` at least, in training
            and sampling, and so is the target; it cuts off no times. On GVP and VP, and in scores, it is sigma_t by
            which they are divided that is `t_eps` at least.
        timestep_shift: moves the drawn t by `shift_time`: below 1 towards the noise, above 1 towards the data; 0 leaves
            them. It is done before they are fitted into the interval that the eps leave.

    Raises:
        ValueError: a value that is not accepted; the message names those that are. (The official code takes any
            unknown prediction for velocity and any unknown weight for None.)
    """
    check_choice("path_type", path_type, [path.value for path in PathType])
    check_choice("prediction", prediction, [kind.value for kind in ModelType])
    check_choice("loss_weight", loss_weight, [weight.value for weight in WeightType])
    for name, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
        if eps is not None:
            check_number(name, eps, "None or a number, at least 0 and below 0.5", lambda eps: 0 <= eps < 0.5)
    check_choice("timestep_sampling", timestep_sampling, TIMESTEP_SAMPLINGS)
    check_number("logit_mean", logit_mean, "a finite number", math.isfinite)
    check_number("logit_std", logit_std, "a positive number", lambda std: 0 < std < math.inf)
    if not isinstance(cosine_loss, bool):
        raise ValueError(f"cosine_loss={cosine_loss!r}: expected True or False")
    has_velocity = prediction in ("velocity", "x1")
    if cosine_loss and not has_velocity:
        raise ValueError("cosine_loss compares velocities: it needs prediction='velocity' or 'x1'")
    check_number("t_eps", t_eps, "a number above 0 and below 1", lambda eps: 0 < eps < 1)
    check_number("timestep_shift", timestep_shift, "a number, at least 0; 0 for none", lambda s: 0 <= s < math.inf)
    if path_type != "VP" and has_velocity:
        train_eps = sample_eps = 0
    else:
        train_eps = {"VP": 1e-5}.get(path_type, 1e-3) if train_eps is None else train_eps
        sample_eps = 1e-3 if sample_eps is None else sample_eps
    return Transport(
        model_type=ModelType(prediction),
        path_type=PathType(path_type),
        loss_type=WeightType(loss_weight),
        train_eps=train_eps,
        sample_eps=sample_eps,
        timestep_sampling=timestep_sampling,
        logit_mean=logit_mean,
        logit_std=logit_std,
        cosine_loss=cosine_loss,
        t_eps=t_eps,
        timestep_shift=timestep_shift,
    )
