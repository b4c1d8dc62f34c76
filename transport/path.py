"""Interpolant paths between noise and data, `x_t = alpha_t x1 + sigma_t x0`.

`x0` is noise, `x1` data; time runs from noise (`t = 0`) to data (`t = 1`). Names, arguments and signs are those of the
official SiT code; formulas: Ma et al. 2024 (arXiv:2401.08740), Sections 2 and 3, and Albergo et al. 2023.

Times are tensors: `(N,)` in the methods that also take a batch `x` `(N, ...)`, any shape in the others. Coefficients
that come back beside a batch have the shape `(N, 1, ..., 1)`. Computed in float32, or float64 for float64 batches; so
no number is added to a tensor unless float32 has it exactly, because Paddle 2.6 rounds it to that.
"""

import math

import paddle

from .utils import check_choice, expand_t_like_x, full_precision

# w_t of the reverse SDE, as SiT compares them. `increasing-decreasing` is misspelt in the official code, which so can't
# reach it by its name: both spellings are accepted.
DIFFUSION_FORMS = {
    "constant": lambda path, t, norm: paddle.full_like(t, norm),
    "SBDM": lambda path, t, norm: path.compute_drift_var(t) * norm,  # that of score-based models
    "sigma": lambda path, t, norm: path.compute_sigma_t(t)[0] * norm,
    "linear": lambda path, t, norm: (1 - t) * norm,
    "decreasing": lambda path, t, norm: 0.25 * paddle.square(paddle.cos(math.pi * t) * norm + 1),
    "increasing-decreasing": lambda path, t, norm: paddle.square(paddle.sin(math.pi * t)) * norm,
    "inccreasing-decreasing": lambda path, t, norm: paddle.square(paddle.sin(math.pi * t)) * norm,
}


def _at_least(value, smallest):
    return paddle.maximum(value, paddle.full_like(value, smallest))


class ICPlan:
    """The linear path: `alpha_t = t`, `sigma_t = 1 - t`. The other paths override its coefficients."""

    def compute_alpha_t(self, t):
        """Returns `alpha_t` and its derivative, of `t`'s shape."""
        return t, paddle.ones_like(t)

    def compute_sigma_t(self, t):
        """Returns `sigma_t` and its derivative, of `t`'s shape."""
        return 1 - t, paddle.full_like(t, -1.0)

    def compute_d_alpha_alpha_ratio_t(self, t):
        """Returns `alpha'_t / alpha_t`, of `t`'s shape."""
        return 1 / t

    def compute_drift_var(self, t):
        """Returns `var` of `compute_drift`, of `t`'s shape."""
        ratio = self.compute_d_alpha_alpha_ratio_t(t)
        sigma_t, d_sigma_t = self.compute_sigma_t(t)
        return ratio * paddle.square(sigma_t) - sigma_t * d_sigma_t

    @full_precision
    def compute_drift(self, x, t):
        """Returns `(mean, var)`, with which `velocity = -mean + var * score`. Infinite at t = 0 on Linear and GVP.

        `mean = -(alpha'_t / alpha_t) x`, already negated as in the official code, of `x`'s shape;
        `var = (alpha'_t / alpha_t) sigma_t^2 - sigma_t sigma'_t`, `(N, 1, ..., 1)`.
        """
        t = expand_t_like_x(t, x)
        return x * -self.compute_d_alpha_alpha_ratio_t(t), self.compute_drift_var(t)

    @full_precision
    def compute_diffusion(self, x, t, form="constant", norm=1.0):
        """Returns the diffusion coefficient w_t of the SDE `dx = (v + w score) dt + sqrt(2 w) dW`, `(N, 1, ..., 1)`.

        `form` is a key of `DIFFUSION_FORMS`, `norm` its magnitude; `x` `(N, ...)` gives shape and precision.
        `constant` is a tensor too; the official code returns the bare number, on which its SDE solver crashes.
        """
        check_choice("diffusion form", form, DIFFUSION_FORMS)
        return DIFFUSION_FORMS[form](self, expand_t_like_x(t, x), norm)

    def _velocity_coefficients(self, t):
        alpha_t, d_alpha_t = self.compute_alpha_t(t)
        return alpha_t / d_alpha_t, *self.compute_sigma_t(t)

    @full_precision
    def get_score_from_velocity(self, velocity, x, t):
        """Returns the score of the velocity `(N, ...)` at `x` `(N, ...)`. Infinite at t = 1."""
        ratio, sigma_t, d_sigma_t = self._velocity_coefficients(expand_t_like_x(t, x))
        var = paddle.square(sigma_t) - ratio * d_sigma_t * sigma_t
        return (velocity * ratio - x) / var

    @full_precision
    def get_noise_from_velocity(self, velocity, x, t):
        """Returns the noise E[x0 | x_t] of the velocity `(N, ...)` at `x` `(N, ...)`."""
        ratio, sigma_t, d_sigma_t = self._velocity_coefficients(expand_t_like_x(t, x))
        return (velocity * ratio - x) / (ratio * d_sigma_t - sigma_t)

    @full_precision
    def get_velocity_from_score(self, score, x, t):
        """Returns the velocity of the score `(N, ...)` at `x` `(N, ...)`. Infinite at t = 0 on Linear and GVP."""
        mean, var = self.compute_drift(x, t)
        return score * var - mean

    @full_precision
    def get_velocity_from_data(self, data, x, t, min_sigma):
        """Returns the velocity `(N, ...)` at `x` `(N, ...)` of a path that ends at `data` `(N, ...)`.

        It is `((alpha'_t sigma_t - alpha_t sigma'_t) data + sigma'_t x) / sigma_t`, divided by `min_sigma` at least: on
        the linear path `(data - x) / (1 - t)`.
        """
        of_data, of_x = self._coefficients_of_data(expand_t_like_x(t, x), min_sigma)
        return data * of_data + x * of_x

    def _coefficients_of_data(self, t, min_sigma):
        (alpha_t, d_alpha_t), (sigma_t, d_sigma_t) = self.compute_alpha_t(t), self.compute_sigma_t(t)
        divisor = _at_least(sigma_t, min_sigma)
        return (d_alpha_t * sigma_t - alpha_t * d_sigma_t) / divisor, d_sigma_t / divisor

    @full_precision
    def get_score_from_data(self, data, x, t, min_sigma):
        """Returns the score `(alpha_t data - x) / sigma_t^2` `(N, ...)`, divided by `min_sigma^2` at least."""
        t = expand_t_like_x(t, x)
        sigma_t = _at_least(self.compute_sigma_t(t)[0], min_sigma)
        return (data * self.compute_alpha_t(t)[0] - x) / paddle.square(sigma_t)

    @full_precision
    def compute_mu_t(self, t, x0, x1):
        """Returns `alpha_t x1 + sigma_t x0`, of `x1`'s shape."""
        t = expand_t_like_x(t, x1)
        return x1 * self.compute_alpha_t(t)[0] + x0 * self.compute_sigma_t(t)[0]

    def compute_xt(self, t, x0, x1):
        """Returns the point of the path at time t, of `x1`'s shape. These paths add no noise: `compute_mu_t`."""
        return self.compute_mu_t(t, x0, x1)

    @full_precision
    def compute_ut(self, t, x0, x1, xt):
        """Returns the path's velocity `alpha'_t x1 + sigma'_t x0`, of `x1`'s shape. `xt` is not used."""
        t = expand_t_like_x(t, x1)
        return x1 * self.compute_alpha_t(t)[1] + x0 * self.compute_sigma_t(t)[1]

    def plan(self, t, x0, x1):
        """Returns `(t, xt, ut)`: the times, the points and the velocities of the path from noise `x0` to data `x1`."""
        xt = self.compute_xt(t, x0, x1)
        return t, xt, self.compute_ut(t, x0, x1, xt)


class VPCPlan(ICPlan):
    """The variance-preserving path of score-based diffusion, `beta_t = sigma_min + (1 - t) (sigma_max - sigma_min)`.

    `alpha_t = exp(-integral of beta / 2 from t to 1)`, `sigma_t^2 = 1 - alpha_t^2`. At t = 0 some data are left:
    alpha is 0.0066. At t = 1 the derivative of sigma is infinite.
    """

    def __init__(self, sigma_min=0.1, sigma_max=20.0):
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def log_mean_coeff(self, t):
        """Returns `log(alpha_t)`."""
        spread = self.sigma_max - self.sigma_min
        return -0.25 * paddle.square(1 - t) * spread - 0.5 * (1 - t) * self.sigma_min

    def d_log_mean_coeff(self, t):
        """Returns the derivative of `log(alpha_t)`: `beta_t / 2`."""
        slope = 0.5 * (1 - t) * (self.sigma_max - self.sigma_min)
        return slope + paddle.full_like(t, 0.5 * self.sigma_min)

    def compute_alpha_t(self, t):
        alpha_t = paddle.exp(self.log_mean_coeff(t))
        return alpha_t, alpha_t * self.d_log_mean_coeff(t)

    def compute_sigma_t(self, t):
        alpha_squared = paddle.exp(2 * self.log_mean_coeff(t))
        sigma_t = paddle.sqrt(1 - alpha_squared)
        return sigma_t, -alpha_squared * self.d_log_mean_coeff(t) / sigma_t

    def _coefficients_of_data(self, t, min_sigma):
        alpha_t, d_alpha_t = self.compute_alpha_t(t)
        of_data = d_alpha_t / paddle.square(_at_least(self.compute_sigma_t(t)[0], min_sigma))
        return of_data, -alpha_t * of_data  # the general ones, with no derivative of sigma

    def compute_d_alpha_alpha_ratio_t(self, t):
        return self.d_log_mean_coeff(t)

    def compute_drift_var(self, t):
        return self.d_log_mean_coeff(t)  # the general formula, with sigma^2 = 1 - alpha^2 put in


class GVPCPlan(ICPlan):
    """The generalised variance-preserving path: `alpha_t = sin(pi t / 2)`, `sigma_t = cos(pi t / 2)`."""

    def compute_alpha_t(self, t):
        angle = t * math.pi / 2
        return paddle.sin(angle), math.pi / 2 * paddle.cos(angle)

    def compute_sigma_t(self, t):
        angle = t * math.pi / 2
        return paddle.cos(angle), -math.pi / 2 * paddle.sin(angle)

    def compute_d_alpha_alpha_ratio_t(self, t):
        return math.pi / (2 * paddle.tan(t * math.pi / 2))
