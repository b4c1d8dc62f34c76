"""The distributions of a Gaussian diffusion: the forward process q, and the reverse process p of a network."""

import enum

import numpy as np
import paddle

from .diffusion_utils import at_least_float32, full_precision, normal_like


class ModelMeanType(enum.Enum):
    """Names what the network predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise in x_t


class ModelVarType(enum.Enum):
    """Names the variance of p(x_{t-1} | x_t). As in the official DiT code, LEARNED is computed like LEARNED_RANGE."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()  # that of the posterior q(x_{t-1} | x_t, x_0)
    FIXED_LARGE = enum.auto()  # beta_t
    LEARNED_RANGE = enum.auto()  # interpolated between the two in log space, Eq. 15 of Improved DDPM


class LossType(enum.Enum):
    """Names the training objective."""

    MSE = enum.auto()  # squared error, plus the variational bound where the variance is learned
    RESCALED_MSE = enum.auto()  # the same, the bound times num_timesteps / 1000
    KL = enum.auto()  # the variational bound, in bits per dimension
    RESCALED_KL = enum.auto()  # the same times num_timesteps: an estimate of the whole bound

    def is_vb(self):
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianProcess:
    """A diffusion process with given betas: its distributions q and p.

    Args:
        betas: 1-D, in (0, 1], the first for the least noisy step.
        model_mean_type, model_var_type, loss_type: members of the enumerations above.

    Attributes:
        num_timesteps: number of steps.
        betas, alphas_cumprod, posterior_variance, ...: schedules by the official names, float64 arrays
            `(num_timesteps,)`; not to be changed.
    """

    def __init__(self, *, betas, model_mean_type, model_var_type, loss_type):
        for value, kind in ((model_mean_type, ModelMeanType), (model_var_type, ModelVarType), (loss_type, LossType)):
            if not isinstance(value, kind):
                accepted = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
                raise ValueError(f"{value!r} is no {kind.__name__}; accepted: {accepted}")
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self._learns_variance = model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

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
        self._one_minus_alphas_cumprod = 1.0 - self.alphas_cumprod
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(self._one_minus_alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(self._one_minus_alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

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

    def _table(self, name, place, dtype):
        """Returns attribute `name` as a tensor on `place`, made once: a look-up costs no copy to the device."""
        key = (name, str(place), dtype)
        if key not in self._tables:
            self._tables[key] = paddle.to_tensor(np.asarray(getattr(self, name)).astype(dtype), place=place)
        return self._tables[key]

    def _extract(self, t, x, *names):
        """Returns the entries `t` of tables, `(N, 1, ..., 1)` each, to broadcast against `x` `(N, C, ...)`.

        They are always the right-hand operand, because the other way round Paddle takes ten times as long on a CPU.
        """
        dtype = "float64" if x.dtype == paddle.float64 else "float32"
        shape = [-1] + [1] * (x.ndim - 1)
        return [paddle.gather(self._table(name, t.place, dtype), t).reshape(shape) for name in names]

    def _call(self, function, x, t, model_kwargs):
        """Calls a network or a `cond_fn` at the timesteps `t` of this process."""
        check_timesteps(t, x)
        return function(x, self._model_timesteps(t), **(model_kwargs or {}))

    def _model_timesteps(self, t):
        """Returns what a network is given for the timesteps `t` of this process."""
        return t

    # -- Forward process ----------------------------------------------------------------------------------------------

    @full_precision
    def q_mean_variance(self, x_start, t):
        """Returns mean, variance and log variance of q(x_t | x_0), each of `x_start`'s shape. `t`: `(N,)` int64."""
        signal, variance, log_variance = self._extract(
            t, x_start, "sqrt_alphas_cumprod", "_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"
        )
        return x_start * signal, variance.expand(x_start.shape), log_variance.expand(x_start.shape)

    @full_precision
    def q_sample(self, x_start, t, noise=None):
        """Draws from q(x_t | x_0), of `x_start`'s shape; `noise` (same shape) is drawn if not given."""
        if noise is None:
            noise = normal_like(x_start)
        if list(noise.shape) != list(x_start.shape):
            raise ValueError(f"noise has shape {list(noise.shape)}, x_start {list(x_start.shape)}: they must be equal")
        signal, sigma = self._extract(t, x_start, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return x_start * signal + noise * sigma

    @full_precision
    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Returns mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), each of `x_t`'s shape."""
        names = ("posterior_variance", "posterior_log_variance_clipped")
        variance, log_variance = (value.expand(x_t.shape) for value in self._extract(t, x_t, *names))
        return self._posterior_mean(x_start, x_t, t), variance, log_variance

    @full_precision
    def _posterior_mean(self, x_start, x_t, t):
        coef1, coef2 = self._extract(t, x_t, "posterior_mean_coef1", "posterior_mean_coef2")
        return x_start * coef1 + x_t * coef2

    # -- Reverse process ----------------------------------------------------------------------------------------------

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """Returns the model's p(x_{t-1} | x_t) and its prediction of x_0.

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
            ValueError: `t` is not one timestep for each sample, or the model's output has not the shape that
                `model_var_type` asks for.
        """
        x = at_least_float32(x)
        mean_output, var_output, extra = self._predict(model, x, t, model_kwargs)
        return {**self._prediction(mean_output, var_output, x, t, clip_denoised, denoised_fn), "extra": extra}

    def _predict(self, model, x, t, model_kwargs):
        """Returns the network's output as (mean part, variance part or None), each as `x`, and what came beside it."""
        output = self._call(model, x, t, model_kwargs)
        output, extra = output if isinstance(output, tuple) else (output, None)
        expected = [x.shape[0], x.shape[1] * (2 if self._learns_variance else 1), *x.shape[2:]]
        if list(output.shape) != expected:
            raise ValueError(
                f"the model returned shape {list(output.shape)}, expected {expected}: a variance of type"
                f" {self.model_var_type.name} takes a model with learn_sigma={self._learns_variance}"
            )
        output = at_least_float32(output)
        return (*(output.split(2, axis=1) if self._learns_variance else (output, None)), extra)

    @full_precision
    def _prediction(self, mean_output, var_output, x, t, clip_denoised, denoised_fn=None):
        """Returns `p_mean_variance`'s result from the network's output."""
        if self._learns_variance:
            # var_output in [-1, 1] runs from the smallest to the largest sensible log variance.
            fraction = (var_output + 1) / 2
            high, low = self._extract(t, x, "_log_betas", "posterior_log_variance_clipped")
            log_variance = fraction * high + (1 - fraction) * low
            variance = paddle.exp(log_variance)
        else:
            names = {
                ModelVarType.FIXED_LARGE: ("_fixed_large_variance", "_fixed_large_log_variance"),
                ModelVarType.FIXED_SMALL: ("posterior_variance", "posterior_log_variance_clipped"),
            }[self.model_var_type]
            variance, log_variance = (value.expand(x.shape) for value in self._extract(t, x, *names))

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

        is_mean = self.model_mean_type == ModelMeanType.PREVIOUS_X
        mean = mean_output if is_mean else self._posterior_mean(pred_xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    @full_precision
    def _predict_xstart_from_eps(self, x_t, t, eps):
        recip, recipm1 = self._extract(t, x_t, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return x_t * recip - eps * recipm1

    @full_precision
    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        coef1, coef2 = self._extract(t, x_t, "posterior_mean_coef1", "posterior_mean_coef2")
        return (xprev - x_t * coef2) / coef1

    @full_precision
    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        recip, recipm1 = self._extract(t, x_t, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return (x_t * recip - pred_xstart) / recipm1


def check_timesteps(t, x):
    """Raises `ValueError` unless there is one of the timesteps `t` for each sample of `x`."""
    if list(t.shape) != [x.shape[0]]:
        raise ValueError(f"t has shape {list(t.shape)}, expected [{x.shape[0]}]: one timestep for each sample")
