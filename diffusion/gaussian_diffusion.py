"""Gaussian diffusion: schedules, forward process q, reverse process p, losses, DDPM and DDIM sampling.

Time runs from data to noise: `t = 0` is the least noisy step, `t = num_timesteps - 1` nearly pure noise, and sampling
counts down. Names, arguments, dict keys and numbers are those of OpenAI's guided-diffusion and of the official DiT
code. Papers: DDPM (Ho et al. 2020), Improved DDPM (Nichol and Dhariwal 2021), DDIM (Song et al. 2020).

A `model` is any callable `model(x, t, **model_kwargs)`: x `(N, C, ...)`, t `(N,)` int64, result `(N, C, ...)`, or
`(N, 2C, ...)` where the variance is learned. All arithmetic here is done in float32 (float64 for float64 inputs)
whatever the model's precision and whatever `paddle.amp.auto_cast` says outside; only the model runs under it.
"""

import collections
import enum
import math

import numpy as np
import paddle

from .diffusion_utils import at_least_float32, discretized_gaussian_log_likelihood, full_precision, mean_flat, normal_kl


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise in x_t


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t). As in the official DiT code, LEARNED is computed like LEARNED_RANGE."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()  # that of the posterior q(x_{t-1} | x_t, x_0)
    FIXED_LARGE = enum.auto()  # beta_t
    LEARNED_RANGE = enum.auto()  # interpolated between the two in log space, Eq. 15 of Improved DDPM


class LossType(enum.Enum):
    """The training objective."""

    MSE = enum.auto()  # squared error, plus the variational bound where the variance is learned
    RESCALED_MSE = enum.auto()  # the same, the bound times num_timesteps / 1000
    KL = enum.auto()  # the variational bound, in bits per dimension
    RESCALED_KL = enum.auto()  # the same times num_timesteps: an estimate of the whole bound

    def is_vb(self):
        return self in (LossType.KL, LossType.RESCALED_KL)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """Betas whose cumulative product of (1 - beta) follows `alpha_bar(u)`, u in [0, 1].

    Args:
        num_diffusion_timesteps: number of betas.
        alpha_bar: function of one number.
        max_beta: upper bound, below 1, so that the last steps stay invertible.

    Returns:
        float64 array `(num_diffusion_timesteps,)`.
    """
    level = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - level[i + 1] / level[i], max_beta) for i in range(num_diffusion_timesteps)])


def _linear_betas(steps):
    # Ho et al.'s 1e-4..0.02 at 1000 steps; for other counts the same total amount of noise.
    scale = 1000 / steps
    if scale * 0.02 >= 1:
        raise ValueError(f"{steps} diffusion steps: the linear schedule needs more than 20 (or its last beta is >= 1)")
    return np.linspace(scale * 0.0001, scale * 0.02, steps, dtype=np.float64)


def _squared_cosine_betas(steps):
    # Eq. 17 of Improved DDPM, offset s = 0.008.
    return betas_for_alpha_bar(steps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


_SCHEDULES = {"linear": _linear_betas, "squaredcos_cap_v2": _squared_cosine_betas}


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """Betas of the schedule "linear" or "squaredcos_cap_v2": float64 array `(num_diffusion_timesteps,)`.

    Raises:
        ValueError: unknown name, or a count that the schedule can't have.
    """
    if schedule_name not in _SCHEDULES:
        raise ValueError(f"unknown noise schedule {schedule_name!r}; accepted: {', '.join(_SCHEDULES)}")
    if type(num_diffusion_timesteps) is not int or num_diffusion_timesteps < 1:
        raise ValueError(f"the number of diffusion steps must be a positive integer, got {num_diffusion_timesteps!r}")
    return _SCHEDULES[schedule_name](num_diffusion_timesteps)


# ---------------------------------------------------------------------------------------------------------------------
# The diffusion
# ---------------------------------------------------------------------------------------------------------------------


class GaussianDiffusion:
    """A diffusion process with given betas, its losses and its samplers.

    Args:
        betas: 1-D, in (0, 1], the first for the least noisy step.
        model_mean_type, model_var_type, loss_type: members of the enumerations above.

    Attributes:
        num_timesteps: number of steps.
        betas, alphas_cumprod, alphas_cumprod_prev, alphas_cumprod_next, sqrt_alphas_cumprod,
        sqrt_one_minus_alphas_cumprod, log_one_minus_alphas_cumprod, sqrt_recip_alphas_cumprod,
        sqrt_recipm1_alphas_cumprod, posterior_variance, posterior_log_variance_clipped, posterior_mean_coef1,
        posterior_mean_coef2: float64 arrays `(num_timesteps,)`; not to be changed.
    """

    def __init__(self, *, betas, model_mean_type, model_var_type, loss_type):
        for value, kind in ((model_mean_type, ModelMeanType), (model_var_type, ModelVarType), (loss_type, LossType)):
            if not isinstance(value, kind):
                accepted = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
                raise ValueError(f"{value!r} is no {kind.__name__}; accepted: {accepted}")
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type

        # Everything is derived in float64 and rounded once, in _table.
        self.betas = betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a non-empty 1-D array, got shape {betas.shape}")
        if not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"every beta must lie in (0, 1], got {betas.min():.6g} to {betas.max():.6g}")
        self.num_timesteps = len(betas)

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_0) and its inverses.
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)
        self._one_minus_alphas_cumprod = 1.0 - self.alphas_cumprod

        # q(x_{t-1} | x_t, x_0), Eq. 6 and 7 of DDPM.
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)

        # The posterior variance is 0 at t = 0: where a logarithm or a likelihood is wanted, the value at t = 1 stands
        # in (for a process of one step, beta itself).
        first = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self._log_betas = np.log(betas)
        self._fixed_large_variance = np.append(first, betas[1:])
        self._fixed_large_log_variance = np.log(self._fixed_large_variance)

        self._tables = {}  # (name, place, dtype) -> tensor, filled on first use

    def __getstate__(self):
        return {**self.__dict__, "_tables": {}}  # copies and pickles make their own device tables

    @property
    def _learns_variance(self):
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _table(self, name, place, dtype):
        """Attribute `name` as a tensor on `place`, made once: a look-up costs no copy to the device."""
        key = (name, str(place), dtype)
        if key not in self._tables:
            self._tables[key] = paddle.to_tensor(np.asarray(getattr(self, name)).astype(dtype), place=place)
        return self._tables[key]

    def _extract(self, name, t, x):
        """Entries `t` of the table `name`, `(N, 1, ..., 1)`, to broadcast against `x` `(N, C, ...)`.

        Always used as the right-hand operand: the other way round, Paddle takes ten times as long on CPU.
        """
        dtype = "float64" if x.dtype == paddle.float64 else "float32"
        return paddle.gather(self._table(name, t.place, dtype), t).reshape([-1] + [1] * (x.ndim - 1))

    def _model_timesteps(self, t):
        """The timesteps that the network is to see, where the process is a part of a longer one."""
        return t

    def _call(self, function, x, t, model_kwargs):
        return function(x, self._model_timesteps(t), **(model_kwargs or {}))

    # -- Forward process ----------------------------------------------------------------------------------------------

    @full_precision
    def q_mean_variance(self, x_start, t):
        """Mean, variance and log variance of q(x_t | x_0), each of `x_start`'s shape. `t`: `(N,)` int64."""
        x_start = at_least_float32(x_start)
        mean = x_start * self._extract("sqrt_alphas_cumprod", t, x_start)
        variance = self._extract("_one_minus_alphas_cumprod", t, x_start).expand(x_start.shape)
        log_variance = self._extract("log_one_minus_alphas_cumprod", t, x_start).expand(x_start.shape)
        return mean, variance, log_variance

    @full_precision
    def q_sample(self, x_start, t, noise=None):
        """A draw from q(x_t | x_0), of `x_start`'s shape; `noise` (same shape) is drawn if not given."""
        x_start = at_least_float32(x_start)
        if noise is None:
            noise = paddle.randn_like(x_start)
        if list(noise.shape) != list(x_start.shape):
            raise ValueError(f"noise has shape {list(noise.shape)}, x_start {list(x_start.shape)}: they must be equal")
        signal, sigma = (
            self._extract(name, t, x_start) for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        )
        return x_start * signal + at_least_float32(noise) * sigma

    @full_precision
    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), each of `x_t`'s shape."""
        mean = self._posterior_mean(x_start, x_t, t)
        variance = self._extract("posterior_variance", t, x_t).expand(x_t.shape)
        log_variance = self._extract("posterior_log_variance_clipped", t, x_t).expand(x_t.shape)
        return mean, variance, log_variance

    def _posterior_mean(self, x_start, x_t, t):
        x_start, x_t = at_least_float32(x_start), at_least_float32(x_t)
        coef1, coef2 = (self._extract(name, t, x_t) for name in ("posterior_mean_coef1", "posterior_mean_coef2"))
        return x_start * coef1 + x_t * coef2

    # -- Reverse process ----------------------------------------------------------------------------------------------

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """The model's p(x_{t-1} | x_t) and its prediction of x_0.

        Args:
            model: see the module's docstring.
            x: `(N, C, ...)`, x_t.
            t: `(N,)` int64.
            clip_denoised: clip the prediction of x_0 to [-1, 1] (not for latents).
            denoised_fn: function applied to the prediction of x_0, before clipping.
            model_kwargs: further keyword arguments of the model.

        Returns:
            dict: "mean", "variance", "log_variance", "pred_xstart", all of `x`'s shape; "extra": what the model
            returned beside its output, else None.

        Raises:
            ValueError: the model's output has not the shape that `model_var_type` asks for.
        """
        x = at_least_float32(x)
        _check_timesteps(t, x)
        output = self._call(model, x, t, model_kwargs)
        output, extra = output if isinstance(output, tuple) else (output, None)
        mean_output, var_output = self._split_output(output, x)
        return {**self._prediction(mean_output, var_output, x, t, clip_denoised, denoised_fn), "extra": extra}

    @full_precision
    def _split_output(self, output, x):
        """The network's output as (mean part, variance part or None), each of `x`'s shape and precision."""
        channels = x.shape[1]
        expected = [x.shape[0], channels * (2 if self._learns_variance else 1), *x.shape[2:]]
        if list(output.shape) != expected:
            raise ValueError(
                f"the model returned shape {list(output.shape)}, expected {expected}: a variance of type"
                f" {self.model_var_type.name} takes a model with learn_sigma={self._learns_variance}"
            )
        output = at_least_float32(output)
        return paddle.split(output, 2, axis=1) if self._learns_variance else (output, None)

    @full_precision
    def _prediction(self, mean_output, var_output, x, t, clip_denoised, denoised_fn=None):
        """`p_mean_variance` from the network's output."""
        if self._learns_variance:
            # var_output in [-1, 1] runs from the smallest to the largest sensible log variance.
            fraction = (var_output + 1) / 2
            high, low = (self._extract(name, t, x) for name in ("_log_betas", "posterior_log_variance_clipped"))
            log_variance = fraction * high + (1 - fraction) * low
            variance = paddle.exp(log_variance)
        else:
            names = {
                ModelVarType.FIXED_LARGE: ("_fixed_large_variance", "_fixed_large_log_variance"),
                ModelVarType.FIXED_SMALL: ("posterior_variance", "posterior_log_variance_clipped"),
            }[self.model_var_type]
            variance, log_variance = (self._extract(name, t, x).expand(x.shape) for name in names)

        if self.model_mean_type == ModelMeanType.EPSILON:
            pred_xstart = self._predict_xstart_from_eps(x, t, mean_output)
        elif self.model_mean_type == ModelMeanType.PREVIOUS_X:
            pred_xstart = self._predict_xstart_from_xprev(x, t, mean_output)
        else:
            pred_xstart = mean_output
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = paddle.clip(pred_xstart, -1.0, 1.0)

        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = mean_output
        else:
            mean = self._posterior_mean(pred_xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _extract_recips(self, t, x):
        names = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return [self._extract(name, t, x) for name in names]

    @full_precision
    def _predict_xstart_from_eps(self, x_t, t, eps):
        x_t, eps = at_least_float32(x_t), at_least_float32(eps)
        recip, recipm1 = self._extract_recips(t, x_t)
        return x_t * recip - eps * recipm1

    @full_precision
    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        x_t, xprev = at_least_float32(x_t), at_least_float32(xprev)
        coef1, coef2 = (self._extract(name, t, x_t) for name in ("posterior_mean_coef1", "posterior_mean_coef2"))
        return (xprev - x_t * coef2) / coef1

    @full_precision
    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        x_t, pred_xstart = at_least_float32(x_t), at_least_float32(pred_xstart)
        recip, recipm1 = self._extract_recips(t, x_t)
        return (x_t * recip - pred_xstart) / recipm1

    # -- Guidance by a classifier -------------------------------------------------------------------------------------

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """The mean of p shifted by `cond_fn(x, t, **model_kwargs)` = grad_x log p(y | x) (Sohl-Dickstein et al. 2015).

        `p_mean_var` is what `p_mean_variance` returned. The samplers run under `paddle.no_grad`: a `cond_fn` that
        differentiates does so under `paddle.enable_grad()`.
        """
        gradient = self._call(cond_fn, x, t, model_kwargs)
        with paddle.amp.auto_cast(enable=False):
            return p_mean_var["mean"] + p_mean_var["variance"] * at_least_float32(gradient)

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """`p_mean_var` as it would be with the score shifted by `cond_fn`, for DDIM (Song et al. 2020)."""
        x = at_least_float32(x)
        gradient = self._call(cond_fn, x, t, model_kwargs)
        with paddle.amp.auto_cast(enable=False):
            eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
            alpha_bar = self._extract("alphas_cumprod", t, x)
            eps = eps - at_least_float32(gradient) * paddle.sqrt(1 - alpha_bar)
            pred_xstart = self._predict_xstart_from_eps(x, t, eps)
            return {**p_mean_var, "pred_xstart": pred_xstart, "mean": self._posterior_mean(pred_xstart, x, t)}

    # -- Sampling -----------------------------------------------------------------------------------------------------

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        """One DDPM step: a draw of x_{t-1}. Arguments as in `p_mean_variance` and `condition_mean`.

        Returns:
            dict: "sample" and "pred_xstart", of `x`'s shape.
        """
        x = at_least_float32(x)
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = paddle.randn_like(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        with paddle.amp.auto_cast(enable=False):
            std = paddle.exp(0.5 * out["log_variance"]) * _not_last(t, x)
            return {"sample": out["mean"] + std * noise, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False,
    ):  # fmt: skip
        """Draws samples by DDPM, all `num_timesteps` steps.

        Args:
            model: see the module's docstring; may be a bound method such as `model.forward_with_cfg`.
            shape: `(N, C, ...)`.
            noise: the start x_T, of that shape; drawn if not given.
            clip_denoised, denoised_fn, model_kwargs: see `p_mean_variance`.
            cond_fn: see `condition_mean`.
            device: None, or the name of Paddle's current device, on which all work is done.
            progress: show a progress bar.

        Returns:
            x_0, of shape `shape`.
        """
        loop = self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress
        )
        return _last(loop)["sample"]

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False,
    ):  # fmt: skip
        """`p_sample_loop` as a generator of every step's `p_sample` dict."""

        def step(x, t):
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        return self._sample_loop(step, shape, noise, device, progress)

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0
    ):  # fmt: skip
        """One DDIM step, Eq. 12 of Song et al. (2020): x_{t-1}. Arguments and result as in `p_sample`.

        `eta`: share of the DDPM noise, from 0 (deterministic) to 1.
        """
        _check_eta(eta)
        x = at_least_float32(x)
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        noise = paddle.randn_like(x)  # drawn for eta = 0 too, so that eta does not change the random stream
        with paddle.amp.auto_cast(enable=False):
            # Derived from x_0 again: it may have been clipped, or be what the network predicts.
            eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
            alpha_bar = self._extract("alphas_cumprod", t, x)
            alpha_bar_prev = self._extract("alphas_cumprod_prev", t, x)
            sigma = (
                eta * paddle.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * paddle.sqrt(1 - alpha_bar / alpha_bar_prev)
            )
            mean = out["pred_xstart"] * paddle.sqrt(alpha_bar_prev) + eps * paddle.sqrt(1 - alpha_bar_prev - sigma**2)
            return {"sample": mean + noise * (_not_last(t, x) * sigma), "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0
    ):  # fmt: skip
        """One step of the DDIM ODE towards noise: x_{t+1}. Arguments and result as in `ddim_sample`; `eta` is 0."""
        if eta != 0.0:
            raise ValueError(f"eta={eta!r}: reverse DDIM is deterministic, only eta=0.0 is accepted")
        x = at_least_float32(x)
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        with paddle.amp.auto_cast(enable=False):
            eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
            alpha_bar_next = self._extract("alphas_cumprod_next", t, x)
            sample = out["pred_xstart"] * paddle.sqrt(alpha_bar_next) + eps * paddle.sqrt(1 - alpha_bar_next)
            return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        """Draws samples by DDIM. Arguments and result as in `p_sample_loop`; `eta` as in `ddim_sample`."""
        loop = self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta
        )
        return _last(loop)["sample"]

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        """`ddim_sample_loop` as a generator of every step's `ddim_sample` dict."""

        def step(x, t):
            return self.ddim_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)

        return self._sample_loop(step, shape, noise, device, progress)

    def _sample_loop(self, step, shape, noise, device, progress):
        shape = [int(n) for n in shape]
        if device is not None and str(device) != paddle.device.get_device():
            current = paddle.device.get_device()
            raise ValueError(f"device={device!r} is not Paddle's current device {current!r}: call paddle.set_device")
        if noise is not None and list(noise.shape) != shape:
            raise ValueError(f"noise has shape {list(noise.shape)}, expected {shape}")
        x = at_least_float32(noise) if noise is not None else paddle.randn(shape)
        for i in self._indices(progress):
            with paddle.no_grad():
                out = step(x, self._timesteps(i, x))
            yield out
            x = out["sample"]

    def _indices(self, progress):
        indices = range(self.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices)
        return indices

    @staticmethod
    def _timesteps(i, x):
        return paddle.full([x.shape[0]], i, dtype="int64")  # filled on the device: no copy from the host

    # -- Losses -------------------------------------------------------------------------------------------------------

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """One term of the variational bound for each sample, in bits per dimension.

        Returns:
            dict: "output" `(N,)`, KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or at t = 0 the negative log
            likelihood of x_0; "pred_xstart".
        """
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        return {"output": self._vb_bpd(out, x_start, x_t, t), "pred_xstart": out["pred_xstart"]}

    @full_precision
    def _vb_bpd(self, out, x_start, x_t, t):
        x_start, x_t = at_least_float32(x_start), at_least_float32(x_t)
        true_mean = self._posterior_mean(x_start, x_t, t)
        true_log_variance = self._extract("posterior_log_variance_clipped", t, x_t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"]))
        nll = -mean_flat(
            discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=0.5 * out["log_variance"])
        )
        return paddle.where(t == 0, nll, kl) / math.log(2.0)  # (N,)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Losses of one timestep for each sample.

        Args:
            model: see the module's docstring.
            x_start: `(N, C, ...)`, the data.
            t: `(N,)` int64.
            model_kwargs: further keyword arguments of the model.
            noise: `(N, C, ...)`, drawn if not given.

        Returns:
            dict of `(N,)` tensors: "loss", and for the MSE losses "mse" and, where the variance is learned, "vb".

        Raises:
            ValueError: shapes that do not fit, see `p_mean_variance`.
        """
        x_start = at_least_float32(x_start)
        _check_timesteps(t, x_start)
        if noise is None:
            noise = paddle.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise)

        if self.loss_type.is_vb():
            bound = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            with paddle.amp.auto_cast(enable=False):
                return {"loss": bound * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else bound}
        output = self._call(model, x_t, t, model_kwargs)
        return self._mse_losses(output[0] if isinstance(output, tuple) else output, x_start, x_t, t, noise)

    @full_precision
    def _mse_losses(self, output, x_start, x_t, t, noise):
        mean_output, var_output = self._split_output(output, x_t)
        if self.model_mean_type == ModelMeanType.EPSILON:
            target = at_least_float32(noise)
        elif self.model_mean_type == ModelMeanType.START_X:
            target = x_start
        else:
            target = self._posterior_mean(x_start, x_t, t)
        mse = mean_flat(paddle.square(target - mean_output))
        if not self._learns_variance:
            return {"mse": mse, "loss": mse}

        # The bound trains the variance only: the mean is learned from the squared error (Improved DDPM, L_hybrid).
        out = self._prediction(mean_output.detach(), var_output, x_t, t, clip_denoised=False)
        vb = self._vb_bpd(out, x_start, x_t, t)
        if self.loss_type == LossType.RESCALED_MSE:
            vb = vb * (self.num_timesteps / 1000.0)
        return {"vb": vb, "mse": mse, "loss": mse + vb}

    @full_precision
    def _prior_bpd(self, x_start):
        """KL(q(x_T | x_0) || N(0, 1)) for each sample `(N,)`, in bits per dimension."""
        mean, _, log_variance = self.q_mean_variance(x_start, self._timesteps(self.num_timesteps - 1, x_start))
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @paddle.no_grad()
    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None, progress=False):
        """The whole variational bound, in bits per dimension, by one draw of x_t at every timestep.

        Arguments as in `p_mean_variance`. T = num_timesteps; column k belongs to t = T - 1 - k.

        Returns:
            dict: "total_bpd" `(N,)`, the bound; "prior_bpd" `(N,)`; "vb" `(N, T)`, the bound's terms; "xstart_mse" and
            "mse" `(N, T)`, the squared errors of the predicted x_0 and noise.
        """
        x_start = at_least_float32(x_start)
        vb, xstart_mse, mse = [], [], []
        for i in self._indices(progress):
            t = self._timesteps(i, x_start)
            noise = paddle.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            with paddle.amp.auto_cast(enable=False):
                vb.append(out["output"])
                xstart_mse.append(mean_flat(paddle.square(out["pred_xstart"] - x_start)))
                mse.append(mean_flat(paddle.square(eps - noise)))
        with paddle.amp.auto_cast(enable=False):
            vb, xstart_mse, mse = (paddle.stack(columns, axis=1) for columns in (vb, xstart_mse, mse))
            prior_bpd = self._prior_bpd(x_start)
            total_bpd = vb.sum(axis=1) + prior_bpd
        return {"total_bpd": total_bpd, "prior_bpd": prior_bpd, "vb": vb, "xstart_mse": xstart_mse, "mse": mse}


def _not_last(t, x):
    """1 where a sample still gets noise, 0 at t = 0: `(N, 1, ..., 1)`."""
    return (t != 0).astype(x.dtype).reshape([-1] + [1] * (x.ndim - 1))


def _check_timesteps(t, x):
    if list(t.shape) != [x.shape[0]]:
        raise ValueError(f"t has shape {list(t.shape)}, expected [{x.shape[0]}]: one timestep for each sample")


def _check_eta(eta):
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta={eta!r} must lie between 0.0 (deterministic) and 1.0 (the noise of DDPM)")


def _last(iterable):
    return collections.deque(iterable, maxlen=1).pop()
