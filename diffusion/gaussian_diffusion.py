"""Gaussian diffusion: schedules, forward process q, reverse process p, losses, DDPM and DDIM sampling.

Time runs from data to noise: `t = 0` is the least noisy step, `t = num_timesteps - 1` nearly pure noise, and sampling
counts down. Names, arguments, dict keys and numbers are those of OpenAI's guided-diffusion and of the official DiT
code. Papers: DDPM (Ho et al. 2020), Improved DDPM (Nichol and Dhariwal 2021), DDIM (Song et al. 2020).

A `model` is any callable `model(x, t, **model_kwargs)`: x `(N, C, ...)`, t `(N,)` int64, result `(N, C, ...)`, or
`(N, 2C, ...)` where the variance is learned. All arithmetic here is done in float32 (float64 for float64 inputs)
whatever the model's precision and whatever `paddle.amp.auto_cast` says outside; only the model runs under it.
"""

import math
import numbers
from collections import deque

import numpy as np
import paddle

from .diffusion_utils import (
    at_least_float32,
    discretized_gaussian_log_likelihood,
    full_precision,
    mean_flat,
    normal_kl,
    normal_like,
    with_host_value,
)
from .process import GaussianProcess, LossType, ModelMeanType, ModelVarType, check_timesteps  # noqa: F401 (so are these)
from .schedules import betas_for_alpha_bar, get_named_beta_schedule  # noqa: F401 (here in the official code, too)


class GaussianDiffusion(GaussianProcess):
    """A diffusion process with given betas, its losses and its samplers.

    Args:
        min_snr_gamma: weight the squared error of a timestep by min(SNR, gamma) / SNR where the network predicts the
            noise, by min(SNR, gamma) where it predicts x_0, so that both are the error of x_0 times min(SNR, gamma)
            (Hang et al. 2023, arXiv:2303.09556); SNR is signal over noise, alphas_cumprod / (1 - alphas_cumprod).
            The bound of a learned variance is not weighted. None for no weights.
        process: see `GaussianProcess`.
    """

    def __init__(self, *, min_snr_gamma=None, **process):
        super().__init__(**process)
        self.min_snr_gamma = min_snr_gamma
        if min_snr_gamma is not None:
            self._mse_weights = self._min_snr_weights(min_snr_gamma)

    def _min_snr_weights(self, gamma):
        """Returns the weights `(num_timesteps,)`, float64; ValueError for a gamma or a loss that has none."""
        if isinstance(gamma, bool) or not isinstance(gamma, numbers.Real) or not 0 < gamma < math.inf:
            raise ValueError(f"min_snr_gamma={gamma!r}: expected None or a number above 0")
        if self.loss_type.is_vb():
            raise ValueError("min_snr_gamma weights the squared error, which use_kl replaces; give one of them")
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            raise ValueError("min_snr_gamma is for networks that predict the noise or x_0, not PREVIOUS_X")
        with np.errstate(divide="ignore"):  # pure noise, and no noise
            snr = self.alphas_cumprod / self._one_minus_alphas_cumprod
            weights = np.minimum(1.0, gamma / snr)
        if self.model_mean_type == ModelMeanType.START_X:
            weights = np.where(snr > 0, np.minimum(snr, gamma), 1.0)  # 1 on pure noise, as in the official code
        return weights

    # -- Losses -------------------------------------------------------------------------------------------------------

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """Returns one term of the variational bound for each sample, "output" `(N,)`, and "pred_xstart", in a dict.

        The term, in bits per dimension, is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the negative log
        likelihood of x_0.
        """
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        return {"output": self._vb_bpd(out, x_start, x_t, t), "pred_xstart": out["pred_xstart"]}

    @full_precision
    def _vb_bpd(self, out, x_start, x_t, t):
        true_mean = self._posterior_mean(x_start, x_t, t)
        (true_log_variance,) = self._extract(t, x_t, "posterior_log_variance_clipped")
        kl = mean_flat(normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"]))
        nll = -mean_flat(
            discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=0.5 * out["log_variance"])
        )
        return paddle.where(t == 0, nll, kl) / math.log(2.0)  # (N,)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Returns the losses of one timestep for each sample.

        Args:
            model, t, model_kwargs: see `p_mean_variance`, which also says which shapes are refused.
            x_start, noise: `(N, C, ...)`, the data, and noise, drawn if not given.

        Returns:
            dict of `(N,)` tensors: "loss", and for the MSE losses "mse", weighted if there is a `min_snr_gamma`, and,
            where the variance is learned, "vb".
        """
        check_timesteps(t, x_start)
        x_start = at_least_float32(x_start)
        if noise is None:
            noise = normal_like(x_start)
        x_t = self.q_sample(x_start, t, noise)

        if self.loss_type.is_vb():
            bound = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            with paddle.amp.auto_cast(enable=False):
                return {"loss": bound * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else bound}
        mean_output, var_output, _ = self._predict(model, x_t, t, model_kwargs)
        return self._mse_losses(mean_output, var_output, x_start, x_t, t, noise)

    @full_precision
    def _mse_losses(self, mean_output, var_output, x_start, x_t, t, noise):
        if self.model_mean_type == ModelMeanType.EPSILON:
            target = noise
        elif self.model_mean_type == ModelMeanType.START_X:
            target = x_start
        else:
            target = self._posterior_mean(x_start, x_t, t)
        mse = mean_flat(paddle.square(target - mean_output))
        if self.min_snr_gamma is not None:
            mse = mse * self._extract(t, mse, "_mse_weights")[0]
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
        """Returns KL(q(x_T | x_0) || N(0, 1)) for each sample `(N,)`, in bits per dimension."""
        mean, _, log_variance = self.q_mean_variance(x_start, self._timesteps(self.num_timesteps - 1, x_start))
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @paddle.no_grad()
    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None, progress=False):
        """Returns the whole variational bound, in bits per dimension, by one draw of x_t at every timestep.

        Arguments as in `p_mean_variance`. T = num_timesteps; column k belongs to t = T - 1 - k.

        Returns:
            dict: "total_bpd" `(N,)`, the bound; "prior_bpd" `(N,)`; "vb" `(N, T)`, the bound's terms; "xstart_mse" and
            "mse" `(N, T)`, the squared errors of the predicted x_0 and noise.
        """
        x_start = at_least_float32(x_start)
        terms = []
        for i in self._indices(progress):
            t = self._timesteps(i, x_start)
            noise = normal_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            with paddle.amp.auto_cast(enable=False):
                errors = (out["pred_xstart"] - x_start, eps - noise)
                terms.append([out["output"], *(mean_flat(paddle.square(error)) for error in errors)])
        with paddle.amp.auto_cast(enable=False):
            vb, xstart_mse, mse = (paddle.stack(columns, axis=1) for columns in zip(*terms, strict=True))
            prior_bpd = self._prior_bpd(x_start)
            total = vb.sum(axis=1) + prior_bpd
        return {"total_bpd": total, "prior_bpd": prior_bpd, "vb": vb, "xstart_mse": xstart_mse, "mse": mse}

    # -- Guidance by a classifier -------------------------------------------------------------------------------------

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Returns p's mean shifted by `cond_fn(x, t, **model_kwargs)` = grad_x log p(y | x).

        Sohl-Dickstein et al. 2015. `p_mean_var` is what `p_mean_variance` returned. The samplers run under
        `paddle.no_grad`: a `cond_fn` that differentiates does so under `paddle.enable_grad()`.
        """
        gradient = self._call(cond_fn, x, t, model_kwargs)
        with paddle.amp.auto_cast(enable=False):
            return p_mean_var["mean"] + p_mean_var["variance"] * at_least_float32(gradient)

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Returns `p_mean_var` as it would be with the score shifted by `cond_fn`, for DDIM (Song et al. 2020)."""
        x = at_least_float32(x)
        gradient = self._call(cond_fn, x, t, model_kwargs)
        with paddle.amp.auto_cast(enable=False):
            eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
            (alpha_bar,) = self._extract(t, x, "alphas_cumprod")
            eps = eps - at_least_float32(gradient) * paddle.sqrt(1 - alpha_bar)
            pred_xstart = self._predict_xstart_from_eps(x, t, eps)
            return {**p_mean_var, "pred_xstart": pred_xstart, "mean": self._posterior_mean(pred_xstart, x, t)}

    # -- Sampling -----------------------------------------------------------------------------------------------------

    def p_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, draw_noise=None
    ):  # fmt: skip
        """Draws x_{t-1}, one DDPM step: a dict of "sample" and "pred_xstart", of `x`'s shape.

        Arguments as in `p_mean_variance` and `condition_mean`. `draw_noise(x)` returns standard normal noise as `x`;
        None draws it by `paddle.randn`.
        """
        x = at_least_float32(x)
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = normal_like(x) if draw_noise is None else draw_noise(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        with paddle.amp.auto_cast(enable=False):
            std = paddle.exp(0.5 * out["log_variance"]) * _not_last(t, x)
            return {"sample": out["mean"] + std * noise, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(self, model, shape, *args, **kwargs):
        """Draws samples by DDPM: x_0, of shape `shape`. Arguments as in `p_sample_loop_progressive`."""
        return deque(self.p_sample_loop_progressive(model, shape, *args, **kwargs), maxlen=1).pop()["sample"]

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, draw_noise=None,
    ):  # fmt: skip
        """Returns a generator of the `p_sample` dicts of all steps.

        Args:
            model: see the module's docstring; may be a bound method such as `model.forward_with_cfg`.
            shape: `(N, C, ...)`.
            noise: the start x_T, of that shape; drawn if not given.
            clip_denoised, denoised_fn, model_kwargs: see `p_mean_variance`.
            cond_fn: see `condition_mean`.
            device: None, or the name of Paddle's current device, on which all work is done.
            progress: show a progress bar.
            draw_noise: of the steps, see `p_sample`; called once a step.
        """
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs, draw_noise)
        return self._sample_loop(self.p_sample, model, shape, noise, options, device, progress)

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0,
        draw_noise=None,
    ):  # fmt: skip
        """Draws x_{t-1}, one DDIM step, Eq. 12 of Song et al. (2020). Arguments and result as in `p_sample`.

        `eta`: share of the DDPM noise, from 0 (deterministic) to 1. `draw_noise` is called only where it is above 0.
        """
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta={eta!r} must lie between 0.0 (deterministic) and 1.0 (the noise of DDPM)")
        x = at_least_float32(x)
        pred_xstart, eps = self._ddim_prediction(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        if draw_noise is None:
            noise = normal_like(x)  # drawn for eta = 0 too, so that eta does not change the random stream
        else:
            noise = draw_noise(x) if eta > 0 else 0.0
        with paddle.amp.auto_cast(enable=False):
            alpha_bar, alpha_bar_prev = self._extract(t, x, "alphas_cumprod", "alphas_cumprod_prev")
            sigma = (
                eta * paddle.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * paddle.sqrt(1 - alpha_bar / alpha_bar_prev)
            )
            mean = pred_xstart * paddle.sqrt(alpha_bar_prev) + eps * paddle.sqrt(1 - alpha_bar_prev - sigma**2)
            return {"sample": mean + noise * (_not_last(t, x) * sigma), "pred_xstart": pred_xstart}

    def ddim_reverse_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0
    ):  # fmt: skip
        """Returns x_{t+1}, one step of the DDIM ODE to noise. Arguments and result as in `ddim_sample`; `eta` is 0."""
        if eta != 0.0:
            raise ValueError(f"eta={eta!r}: reverse DDIM is deterministic, only eta=0.0 is accepted")
        x = at_least_float32(x)
        pred_xstart, eps = self._ddim_prediction(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        with paddle.amp.auto_cast(enable=False):
            (alpha_bar_next,) = self._extract(t, x, "alphas_cumprod_next")
            sample = pred_xstart * paddle.sqrt(alpha_bar_next) + eps * paddle.sqrt(1 - alpha_bar_next)
            return {"sample": sample, "pred_xstart": pred_xstart}

    def _ddim_prediction(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs):
        """Returns the two parts of `x` `(N, C, ...)` at `t` that a DDIM step mixes anew: x_0 and the noise."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        # The noise is derived from x_0 again: that may have been clipped, or be what the network predicts.
        return out["pred_xstart"], self._predict_eps_from_xstart(x, t, out["pred_xstart"])

    def ddim_sample_loop(self, model, shape, *args, **kwargs):
        """Draws samples by DDIM: x_0, of shape `shape`. Arguments as in `ddim_sample_loop_progressive`."""
        return deque(self.ddim_sample_loop_progressive(model, shape, *args, **kwargs), maxlen=1).pop()["sample"]

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0, draw_noise=None,
    ):  # fmt: skip
        """Returns a generator of all steps' `ddim_sample` dicts; see there and `p_sample_loop_progressive`."""
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs, eta, draw_noise)
        return self._sample_loop(self.ddim_sample, model, shape, noise, options, device, progress)

    def _sample_loop(self, step, model, shape, noise, options, device, progress):
        shape = [int(n) for n in shape]
        if device is not None and str(device) != paddle.device.get_device():
            current = paddle.device.get_device()
            raise ValueError(f"device={device!r} is not Paddle's current device {current!r}: call paddle.set_device")
        if noise is not None and list(noise.shape) != shape:
            raise ValueError(f"noise has shape {list(noise.shape)}, expected {shape}")
        x = at_least_float32(noise) if noise is not None else paddle.randn(shape)
        for i in self._indices(progress):
            with paddle.no_grad():
                out = step(model, x, self._timesteps(i, x), *options)
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
        # Filled on the device: no copy from the host.
        return with_host_value(paddle.full([x.shape[0]], i, dtype="int64"), i)


def _not_last(t, x):
    """Returns 1 where a sample still gets noise, 0 at t = 0: `(N, 1, ..., 1)`."""
    return (t != 0).astype(x.dtype).reshape([-1] + [1] * (x.ndim - 1))
