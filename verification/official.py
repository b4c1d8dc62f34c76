"""What the official code has computed, computed here: each function returns `{what: Pair}`.

They run on Paddle's current device. All noise, times and labels are given, because a GPU draws other random numbers
than a CPU. Tolerances are those of tests/golden/README.md, twice: across two frameworks.
"""

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from diffusion import create_diffusion, space_timesteps
from diffusion.diffusion_utils import discretized_gaussian_log_likelihood
from models.embeddings import TimestepEmbedder, get_2d_sincos_pos_embed, rotary_table
from models.state import official_to_paddle, own_names
from runtime.paddle_private import loss_scale
from runtime.precision import Precision
from training.averages import EMA
from transport import Sampler, create_transport
from verification.vectors import (
    FORWARD,
    NETWORKS,
    Pair,
    as_array,
    golden_inputs,
    load_golden,
    official_network,
    tensors,
)

FLOAT32 = Precision()
DROPPED = 0.1  # labels are dropped where a random number in [0, 1) is below


# Networks.


@paddle.no_grad()
def forward(kind, precision=FLOAT32, **options):
    """The forward pass, also of networks with weights that show the norms' epsilon (`FORWARD`)."""
    arrays, tolerance = load_golden(NETWORKS[kind][1]), NETWORKS[kind][3]
    pairs = {}
    for what in filter(arrays.__contains__, FORWARD):
        model = official_network(kind, FORWARD[what], **options)
        precision.decorate(model)
        with precision.autocast():
            pairs[what] = Pair(model(*golden_inputs(arrays)), arrays[what], tolerance)
    return pairs


@paddle.no_grad()
def guidance(kind, precision=FLOAT32):
    """Classifier-free guidance, and within an interval; what the second half of the batch holds must not matter."""
    arrays, tolerance = load_golden(NETWORKS[kind][1]), NETWORKS[kind][3]
    model = official_network(kind)
    precision.decorate(model)
    x, t, y = golden_inputs(arrays, "cfg_")
    half = x.shape[0] // 2
    x = paddle.concat([x[:half], paddle.full_like(x[half:], 9.0)])
    pairs = {}
    with precision.autocast():
        for scale in (4, 1):
            name = f"cfg_out_{scale}"
            pairs[name] = Pair(model.forward_with_cfg(x, t, y, float(scale)), arrays[name], tolerance)
        for name in [name for name in arrays if name.startswith("interval_out_")]:
            (t,) = tensors(arrays, name.replace("_out_", "_t_"))
            pairs[name] = Pair(model.forward_with_cfg(x, t, y, 4.0, True, 0.25), arrays[name], tolerance)
    return pairs


def training_mode(kind, **options):
    """The forward pass with dropped labels, and in evaluation the gradient of its sum over `probe` to the latents."""
    arrays, tolerance = load_golden(NETWORKS[kind][1]), NETWORKS[kind][3]
    if "probe" not in arrays:
        return {}
    model, (x, t, y) = official_network(kind, **options), golden_inputs(arrays)
    x.stop_gradient = False
    probe, drop = tensors(arrays, "probe", "drop_rand")
    (model(x, t, y) * probe).sum().backward()
    model.train()
    with paddle.no_grad():
        out = model(x, t, y, (drop < DROPPED).astype("int64"))
    return {"grad_x": Pair(x.grad, arrays["grad_x"], tolerance), "out_train": Pair(out, arrays["out_train"], tolerance)}


@paddle.no_grad()
def embeddings():
    """Position tables, timestep and label embeddings."""
    arrays, model = load_golden("embeddings"), official_network("DiT")
    tables = {"pos_embed_64_4": (64, 4), "pos_embed_48_3": (48, 3), "pos_embed_16_2_cls": (16, 2, True, 1)}
    found = {name: get_2d_sincos_pos_embed(*arguments) for name, arguments in tables.items()}
    pairs = {name: Pair(table, arrays[name], 1e-6, "absolute") for name, table in found.items()}
    t, t_int, labels, drop_ids = tensors(arrays, "t", "t_int", "labels", "force_drop_ids")
    for name, width in (("t_freq_256", 256), ("t_freq_odd_7", 7)):
        pairs[name] = Pair(TimestepEmbedder.timestep_embedding(t, width), arrays[name], 3e-4, "absolute")
    pairs["t_emb"] = Pair(model.t_embedder(t), arrays["t_emb"], 6e-5)
    pairs["t_emb_int"] = Pair(model.t_embedder(t_int), arrays["t_emb_int"], 6e-5)
    dropped = paddle.to_tensor((arrays["drop_rand"] < DROPPED).astype("int64"))
    for name, ids in (("y_emb_eval", None), ("y_emb_forced", drop_ids), ("y_emb_train", dropped)):
        pairs[name] = Pair(model.y_embedder(labels, False, ids), arrays[name], 0.0, "absolute")
    return pairs


@paddle.no_grad()
def large_dit_parts():
    """Rotary tables, and the parts of Large-DiT's first block."""
    arrays, model = load_golden("largedit_forward"), official_network("LargeDiT")
    x, t, y = golden_inputs(arrays)
    cos, sin = rotary_table(16, 16)
    rope = [paddle.to_tensor(table).unsqueeze(1) for table in (cos, sin)]
    tokens, conditioning = tensors(arrays, "tokens_in", "adaln_input")
    layer = model.layers[0]
    found = {
        "rope_cos": cos,
        "rope_sin": sin,
        "tokens_in": model.x_embedder(model.patchify(x)),
        "adaln_input": model.t_embedder(t) + model.y_embedder(y, False),
        "block0_out": layer(tokens, conditioning, *rope),
        "attn0_of_tokens": layer.attention(tokens, *rope),
        "ffn0_of_tokens": layer.feed_forward(tokens),
        "rmsnorm0_of_tokens": layer.attention_norm(tokens),
    }
    return {name: Pair(value, arrays[name], 6e-5) for name, value in found.items()}


# Losses and gradients.


def gradient_pairs(model, arrays, tolerance, prefix="grad", scale=1.0):
    """The gradients that a model holds, over `scale`: the norm of each, and whole ones. They are cleared."""
    official = sorted(model.named_parameters(), key=lambda named: named[0].startswith("final_layer."))  # they come last
    found = {name: None if p.grad is None else as_array(p.grad) / scale for name, p in official}
    norms = [0.0 if gradient is None else np.linalg.norm(gradient) for gradient in found.values()]
    pairs = {f"{prefix}_l2": Pair(norms, arrays[f"{prefix}_l2"], tolerance)}
    names = [key.removeprefix(f"{prefix}:") for key in arrays if key.startswith(f"{prefix}:")]
    expected = own_names(official_to_paddle({name: arrays[f"{prefix}:{name}"] for name in names}))
    pairs |= {f"gradient of {name}": Pair(found[name], expected[name], tolerance) for name in expected}
    model.clear_gradients()
    return pairs


def backward(loss, precision):
    """Does a loop's backward pass; returns the scale of the gradients, which float16 needs."""
    scaler = precision.scaler()
    scaler.scale(loss).backward()
    return float(loss_scale(scaler)) if scaler.is_enable() else 1.0


def diffusion_losses(precision=FLOAT32):
    """Losses of DiT at given times and noise, the decoder's likelihood at t = 0 too; without gradients."""
    arrays, model, diffusion = load_golden("diffusion_losses"), official_network("DiT"), create_diffusion("")
    precision.decorate(model)
    x_start, noise, t, y = tensors(arrays, "x_start", "noise", "t", "y")
    with paddle.no_grad(), precision.autocast():
        losses = diffusion.training_losses(model, x_start, t, {"y": y}, noise=noise)
    return {
        "x_t": Pair(diffusion.q_sample(x_start, t, noise=noise), arrays["x_t"], 2e-6),
        "mse": Pair(losses["mse"], arrays["mse"], 6e-5, "entry"),
        "vb": Pair(losses["vb"], arrays["vb"], 6e-5, "entry", arrays["vb_f64run"]),
        "loss": Pair(losses["loss"], arrays["loss"], 6e-5, "entry", arrays["loss_f64run"]),
    }


def diffusion_gradients(precision=FLOAT32, single_backward=True):
    """Loss and gradients of DiT, as a loop computes them, or without its promise of a single backward pass."""
    arrays, model = load_golden("diffusion_grads"), official_network("DiT", single_backward=single_backward)
    precision.decorate(model)
    x_start, noise, t, y = tensors(arrays, "x_start", "noise", "t", "y")
    with precision.autocast():
        losses = create_diffusion("").training_losses(model, x_start, t, {"y": y}, noise=noise)
    scale = backward(losses["loss"].mean(), precision)
    loss = Pair(losses["loss"], arrays["loss"], 6e-5, "entry", arrays["loss_f64run"])
    return {"loss": loss, **gradient_pairs(model, arrays, 6e-5, scale=scale)}


def transport_gradients(precision=FLOAT32, single_backward=True):
    """Loss and gradients of SiT; arguments as of `diffusion_gradients`."""
    arrays, model = load_golden("sit_transport_loss"), official_network("SiT", single_backward=single_backward)
    precision.decorate(model)
    x1, x0, u, y = tensors(arrays, "x1", "x0", "u", "y")
    transport = create_transport()
    with precision.autocast():
        losses = transport.training_losses(model, x1, {"y": y}, x0=x0, t=u)
    scale = backward(losses["loss"].mean(), precision)
    pairs = {
        "loss": Pair(losses["loss"], arrays["loss"], 2e-5, "entry"),
        "pred": Pair(losses["pred"], arrays["pred"], 2e-5),
        **gradient_pairs(model, arrays, 2e-5, scale=scale),
    }
    plan = zip(("t", "xt", "ut"), transport.path_sampler.plan(u, x0, x1), strict=True)
    return pairs | {name: Pair(value, arrays[name], 2e-6) for name, value in plan}


def lightning_gradients(precision=FLOAT32, single_backward=True):
    """Loss and gradients of LightningDiT with the cosine term; arguments as of `diffusion_gradients`."""
    arrays, model = (
        load_golden("lightningdit_losses"),
        official_network("LightningDiT", single_backward=single_backward),
    )
    precision.decorate(model)
    x1, x0, normals, y = tensors(arrays, "x1", "x0", "normals", "y")
    t = F.sigmoid(normals)
    with precision.autocast():
        losses = create_transport(cosine_loss=True).training_losses(model, x1, {"y": y}, x0=x0, t=t)
    scale = backward(losses["loss"].mean(), precision)
    losses["mse"] = losses["loss"] - losses["cos_loss"]
    return {
        "t": Pair(t, arrays["t"], 2e-6),
        "pred": Pair(losses["pred"], arrays["pred"], 2e-5),
        **{name: Pair(losses[name], arrays[name], 2e-5, "entry") for name in ("loss", "cos_loss", "mse")},
        **gradient_pairs(model, arrays, 2e-5, scale=scale),
    }


# Diffusion.


def schedule():
    """The tables of 1000 linear steps, and the timesteps of shorter ones."""
    arrays, diffusion = load_golden("diffusion_schedule"), create_diffusion("")
    pairs = {}
    for name, expected in arrays.items():
        actual = np.asarray(getattr(diffusion, name))
        pairs[name] = Pair(actual.astype(expected.dtype), expected, 1e-6, "entry")
    for key, expected in load_golden("space_timesteps").items():
        steps, counts = 1000, key.removeprefix("map_")
        if counts == "10_15_20_of300":
            steps, counts = 300, [10, 15, 20]
        elif counts == "10_20_30_of1000":
            counts = "10,20,30"
        pairs[key] = Pair(sorted(space_timesteps(steps, counts)), expected, 0.0, "absolute")
    return pairs


@paddle.no_grad()
def distributions():
    """Posteriors, what the network predicts of them, likelihoods of 8-bit images."""
    arrays, model, diffusion = load_golden("diffusion_functions"), official_network("DiT"), create_diffusion("")
    x, x_start, t, y, levels = tensors(arrays, "x", "x_start", "t", "y", "disc_x")
    posterior = diffusion.q_posterior_mean_variance(x_start, x, t)
    found = dict(zip(("q_post_mean", "q_post_var", "q_post_logvar"), posterior, strict=True))
    for clip in (0, 1):
        out = diffusion.p_mean_variance(model, x, t, clip_denoised=bool(clip), model_kwargs={"y": y})
        found |= {f"p_{name}_clip{clip}": out[name] for name in ("mean", "variance", "log_variance", "pred_xstart")}
    for name, means, log_scale in (("disc_ll", 0.98 * levels + 0.01, -2.5), ("disc_ll_far", -levels, -4.0)):
        log_scales = paddle.full_like(levels, log_scale)
        found[name] = discretized_gaussian_log_likelihood(levels, means=means, log_scales=log_scales)
    return {name: Pair(value, arrays[name], 6e-5) for name, value in found.items()}


# Timesteps, guidance, options of the loop, tolerance; DiT draws the noise of its steps by `draw_noise`.
DIFFUSION_SAMPLERS = {
    "ddpm25_cfg4": ("25", True, {}, 6e-5),
    "ddpm25_nocfg_clip": ("25", False, {}, 1.6e-4),
    "ddim10": ("ddim10", True, {"eta": 0.0}, 6e-5),
    "ddim10_clip_eta05": ("ddim10", False, {"eta": 0.5}, 1.8e-4),
}


def diffusion_sampler(name):
    """A whole sampling loop of DiT with given noise: its first three steps, and its end."""
    respacing, guided, options, tolerance = DIFFUSION_SAMPLERS[name]
    arrays, model, diffusion = load_golden(name), official_network("DiT"), create_diffusion(respacing)
    z, y = tensors(arrays, "z", "y")
    noise = iter(arrays.get("noise_seq", ()))
    sample = diffusion.ddim_sample_loop_progressive if "eta" in options else diffusion.p_sample_loop_progressive
    outputs = sample(
        model.forward_with_cfg if guided else model,
        z.shape,
        noise=z,
        clip_denoised="clip" in name,
        model_kwargs={"y": y, "cfg_scale": 4.0} if guided else {"y": y},
        draw_noise=lambda x: paddle.to_tensor(next(noise)),
        **options,
    )
    pairs = {"timestep_map": Pair(diffusion.timestep_map, arrays["timestep_map"], 0.0, "absolute")}
    # At the largest timesteps, of 157 times the network's output: tests/golden/README.md.
    loose = {0: 1.6e-3, 1: 8e-4} if name == "ddpm25_nocfg_clip" else {}
    for index, out in enumerate(outputs):
        if index < 3:
            for key in ("sample", "pred_xstart"):
                room = loose.get(index, tolerance) if key == "pred_xstart" else tolerance
                pairs[f"step{index}_{key}"] = Pair(out[key], arrays[f"step{index}_{key}"], room)
    return pairs | {"final": Pair(out["sample"], arrays["final"], tolerance)}


# Transport.


def linear_path():
    """Coefficients of the linear path, conversions between predictions, diffusion forms."""
    arrays, path = load_golden("sit_path_linear"), create_transport().path_sampler
    x, v, x0, x1, t = tensors(arrays, "x", "v", "x0", "x1", "t")
    mean, var = path.compute_drift(x, t)
    found = dict(zip(("alpha", "d_alpha"), path.compute_alpha_t(t), strict=True))
    found |= dict(zip(("sigma", "d_sigma"), path.compute_sigma_t(t), strict=True))
    found |= dict(zip(("t", "xt", "ut"), path.plan(t, x0, x1), strict=True))
    found |= {
        "d_alpha_alpha_ratio": path.compute_d_alpha_alpha_ratio_t(t),
        "drift_mean": mean,
        "drift_var": var.flatten(),
        "score_from_velocity": path.get_score_from_velocity(v, x, t),
        "noise_from_velocity": path.get_noise_from_velocity(v, x, t),
        "velocity_from_score": path.get_velocity_from_score(v, x, t),
    }
    for key in arrays:
        if key.startswith("diffusion_"):
            _, form, norm = key.split("_")
            norm = float(norm.removeprefix("norm").replace("p", "."))
            found[key] = path.compute_diffusion(x, t, form=form, norm=norm).flatten()
    return {name: Pair(value, arrays[name], 2e-6) for name, value in found.items()}


# Points of the time grid and tolerances. A dopri5 that stops at the end differs from one that steps beyond it.
ODE_RUNS = {
    **{method: ({"num_steps": 20}, 2e-5) for method in ("euler", "midpoint", "heun2", "heun3", "rk4")},
    **{f"{method}_coarse": ({"num_steps": 3}, 2e-5) for method in ("heun2", "heun3", "rk4")},
    "dopri5": ({"num_steps": 50}, 1e-2),
    "dopri5_tight": ({"num_steps": 2, "atol": 1e-7, "rtol": 1e-5}, 4e-4),
}


def ode(run, guided=True):
    """SiT by a method of the ODE, with guidance 4 or none."""
    arrays = load_golden(f"sit_ode_linear_velocity_{'cfg4' if guided else 'nocfg'}")
    (settings, tolerance), model = ODE_RUNS[run], official_network("SiT")
    z, y = tensors(arrays, "z", "y")
    sample = Sampler(create_transport()).sample_ode(sampling_method=run.split("_")[0], **settings)
    states = sample(z, model.forward_with_cfg, y=y, cfg_scale=4.0) if guided else sample(z, model, y=y)
    pairs = {"final": Pair(states[-1], arrays[f"{run}_final"], tolerance)}
    if f"{run}_traj" in arrays:
        pairs["trajectory"] = Pair(states, arrays[f"{run}_traj"], tolerance)
    return pairs


# Guidance 3 from t = 0.11 on, or none; settings.
LIGHTNING_RUNS = {
    "euler_cfg": (True, {"num_steps": 20, "timestep_shift": 0.3}),
    "heun2_cfg": (True, {"num_steps": 12, "timestep_shift": 0.3}),
    "euler_nocfg": (False, {"num_steps": 20, "timestep_shift": 0.3}),
    "euler_noshift": (True, {"num_steps": 20}),
    "euler_shift2": (False, {"num_steps": 10, "timestep_shift": 2.0}),
}


def lightning_ode(run):
    """LightningDiT by a method of the ODE, its times shifted."""
    arrays, model = load_golden("lightningdit_ode"), official_network("LightningDiT without qk_norm")
    (is_guided, settings), (z, y) = LIGHTNING_RUNS[run], tensors(arrays, "z", "y")
    sample = Sampler(create_transport()).sample_ode(sampling_method=run.split("_")[0], **settings)
    guidance = {"cfg_scale": 3.0, "cfg_interval": True, "cfg_interval_start": 0.11}
    states = sample(z, model.forward_with_cfg, y=y, **guidance) if is_guided else sample(z, model, y=y)
    pairs = {f"{run} final": Pair(states[-1], arrays[f"{run}_final"], 2e-5)}
    if f"{run}_traj" in arrays:
        pairs[f"{run} trajectory"] = Pair(states, arrays[f"{run}_traj"], 2e-5)
    return pairs


def sde():
    """SiT by the SDE with given noise: every state."""
    arrays, model = load_golden("sit_sde_euler_sigma"), official_network("SiT")
    z, y = tensors(arrays, "z", "y")
    noise = iter(arrays["noise_seq"])
    sample = Sampler(create_transport()).sample_sde(
        diffusion_form="sigma", num_steps=20, draw_noise=lambda x: paddle.to_tensor(next(noise))
    )
    states = paddle.stack(sample(z, model.forward_with_cfg, y=y, cfg_scale=4.0))
    return {
        "trajectory": Pair(states, arrays["traj"], 2e-5),
        "final": Pair(states[-1], arrays["final"], 2e-5),
    }


# Averages.


class Averaged(nn.Layer):
    """The network of the official averages: two parameters, a frozen one, and a buffer, which is not averaged."""

    def __init__(self):
        super().__init__()
        self.w = self.create_parameter([5, 7])
        self.b = self.create_parameter([7], is_bias=True)
        self.frozen = self.create_parameter([3])
        self.frozen.stop_gradient = True
        self.register_buffer("buf", paddle.zeros([2]))

    def set(self, arrays, prefix):
        """Takes the parameters `prefix_name` of the golden file."""
        for name, parameter in self.named_parameters():
            parameter.set_value(arrays[f"{prefix}_{name}"])


def averages():
    """Five updates of the averages at two decays."""
    arrays, model, pairs = load_golden("ema"), Averaged(), {}
    for decay in (0.9999, 0.9):
        model.set(arrays, "ema0")
        ema = EMA(model, decay=decay)
        for step in range(1, 6):
            model.set(arrays, f"model{step}")
            ema.update(model)
        averaged = ema.state_dict()
        for name, _ in model.named_parameters():
            expected = arrays[f"ema5_d{str(decay).replace('.', 'p')}_{name}"]
            pairs[f"{name} at {decay}"] = Pair(averaged[name], expected, 2e-7, "absolute")
    return pairs
