"""What the official code of other targets has computed, computed here; as `official`."""

import paddle

from transport import Sampler, create_transport
from verification.official import FLOAT32, backward, gradient_pairs
from verification.vectors import Pair, load_golden, official_network, tensors


def x1_gradients(precision=FLOAT32, single_backward=True):
    """Loss and gradients of LightningDiT as it predicts the data, at times of JiT's, beyond the clamp too."""
    arrays = load_golden("lightningdit_losses")
    model = official_network("LightningDiT", single_backward=single_backward)
    precision.decorate(model)
    x1, x0, normals, y = tensors(arrays, "x1", "x0", "x1pred_normals", "y")
    t = paddle.nn.functional.sigmoid(normals * 0.8 - 0.8)
    with precision.autocast():
        losses = create_transport(prediction="x1").training_losses(model, x1, {"y": y}, x0=x0, t=t)
    scale = backward(losses["loss"].mean(), precision)
    return {
        "t": Pair(t, arrays["x1pred_t"], 2e-6),
        "loss": Pair(losses["loss"], arrays["x1pred_loss"], 2e-5, "entry"),
        **gradient_pairs(model, arrays, 2e-5, "x1pred_grad", scale=scale),
    }


X1_RUNS = {
    "euler": {"num_steps": 20},
    "euler_shift": {"num_steps": 20, "timestep_shift": 0.3},
    "heun2": {"num_steps": 12},
}


def x1_ode(run):
    """LightningDiT as it predicts the data, by a method of the ODE."""
    arrays, model = load_golden("lightningdit_ode"), official_network("LightningDiT without qk_norm")
    z, y = tensors(arrays, "z", "y")
    sampler = Sampler(create_transport(prediction="x1"))
    states = sampler.sample_ode(sampling_method=run.split("_")[0], **X1_RUNS[run])(z, model, y=y)
    return {f"x1 {run} final": Pair(states[-1], arrays[f"x1pred_{run}_final"], 2e-5)}
