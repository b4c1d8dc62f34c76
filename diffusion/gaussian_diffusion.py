"""Gaussian diffusion: schedules, forward process q, reverse process p, losses, DDPM and DDIM sampling.

Time runs from data to noise: `t = 0` is the least noisy step, `t = num_timesteps - 1` nearly pure noise, and sampling
counts down. Names, arguments, dict keys and numbers are those of OpenAI's guided-diffusion and of the official DiT
code. Papers: DDPM (Ho et al. 2020), Improved DDPM (Nichol and Dhariwal 2021), DDIM (Song et al. 2020).

A `model` is any callable `model(x, t, **model_kwargs)`: x `(N, C, ...)`, t `(N,)` int64, result `(N, C, ...)`, or
`(N, 2C, ...)` where the variance is learned. All arithmetic here is done in float32 (float64 for float64 inputs)
whatever the model's precision and whatever `paddle.amp.auto_cast` says outside; only the model runs under it.
"""

import math

import paddle

from .diffusion_utils import at_least_float32, discretized_gaussian_log_likelihood, full_precision, mean_flat, normal_kl
from .process import LossType, ModelMeanType, ModelVarType, check_timesteps
from .sampling import SamplingProcess
from .schedules import betas_for_alpha_bar, get_named_beta_schedule

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
]


class GaussianDiffusion(SamplingProcess):
    """A diffusion process with given betas, its losses and its samplers; arguments: see `GaussianProcess`."""

    # -- Losses -------------------------------------------------------------------------------------------------------

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """Returns one term of the variational bound for each sample, in bits per dimension.

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
        """Returns the losses of one timestep for each sample.

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
        check_timesteps(t, x_start)
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
