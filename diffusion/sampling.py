"""Sampling from a Gaussian diffusion: DDPM (Ho et al. 2020), DDIM (Song et al. 2020), guidance by a classifier."""

import collections

import paddle

from .diffusion_utils import at_least_float32
from .process import GaussianProcess


class SamplingProcess(GaussianProcess):
    """A diffusion process that draws samples."""

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
            alpha_bar = self._extract("alphas_cumprod", t, x)
            eps = eps - at_least_float32(gradient) * paddle.sqrt(1 - alpha_bar)
            pred_xstart = self._predict_xstart_from_eps(x, t, eps)
            return {**p_mean_var, "pred_xstart": pred_xstart, "mean": self._posterior_mean(pred_xstart, x, t)}

    # -- Sampling -----------------------------------------------------------------------------------------------------

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        """Draws x_{t-1}, one DDPM step. Arguments as in `p_mean_variance` and `condition_mean`.

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

    def p_sample_loop(self, model, shape, *args, **kwargs):
        """Draws samples by DDPM, all `num_timesteps` steps; arguments as in `p_sample_loop_progressive`.

        Returns:
            x_0, of shape `shape`.
        """
        return _last(self.p_sample_loop_progressive(model, shape, *args, **kwargs))["sample"]

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False,
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
        """

        def step(x, t):
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        return self._sample_loop(step, shape, noise, device, progress)

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0
    ):  # fmt: skip
        """Draws x_{t-1}, one DDIM step, Eq. 12 of Song et al. (2020). Arguments and result as in `p_sample`.

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
        """Returns x_{t+1}, one step of the DDIM ODE to noise. Arguments and result as in `ddim_sample`; `eta` is 0."""
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

    def ddim_sample_loop(self, model, shape, *args, **kwargs):
        """Draws samples by DDIM: x_0, of shape `shape`. Arguments as in `ddim_sample_loop_progressive`."""
        return _last(self.ddim_sample_loop_progressive(model, shape, *args, **kwargs))["sample"]

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        """Returns a generator of the `ddim_sample` dicts of all steps.

        Arguments as in `p_sample_loop_progressive`; `eta` as in `ddim_sample`.
        """

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


def _not_last(t, x):
    """Returns 1 where a sample still gets noise, 0 at t = 0: `(N, 1, ..., 1)`."""
    return (t != 0).astype(x.dtype).reshape([-1] + [1] * (x.ndim - 1))


def _check_eta(eta):
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta={eta!r} must lie between 0.0 (deterministic) and 1.0 (the noise of DDPM)")


def _last(iterable):
    return collections.deque(iterable, maxlen=1).pop()
