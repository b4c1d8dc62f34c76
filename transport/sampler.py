"""Sampling from a trained network: ODE, SDE and likelihood, with the official SiT's arguments.

Each method of `Sampler` returns a function `sample(x, model, **model_kwargs)`; `transport` says what a model is.
"""

import collections
import inspect
import math
import numbers
import weakref
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat

import numpy as np
import paddle

from . import integrators
from .path import DIFFUSION_FORMS
from .transport import ModelType, PathType, Transport, call_model
from .utils import at_least_float32, check_choice, check_number, full_precision, shift_time, sum_flat

ODE_METHODS = (*integrators.FIXED_STEP, "heun2_euler", "ab2", "dopri5")
SDE_METHODS = ("Euler", "Heun")
LAST_STEPS = (None, "Mean", "Tweedie", "Euler")

# Where an SDE starts whose coefficient is infinite at t = 0: the official eps of the predictions that need one.
_SINGULAR_START = 1e-3


class Sampler:
    """Samples by the ODE or the SDE of a `transport`, made by `create_transport`.

    A method raises `ValueError` for a setting that is not accepted; the message names those that are.
    """

    def __init__(self, transport):
        self.transport = transport
        self.drift, self.score = transport.get_drift(), transport.get_score()

    def make(self, sampler, method=None, **options):
        """Returns `sample_ode` or `sample_sde` by name: `sampler` is `ode` or `sde`, method None the simplest.

        An option that it does not have is a `ValueError`, too.
        """
        makers = {"ode": (self.sample_ode, "euler"), "sde": (self.sample_sde, "Euler")}
        check_choice("sampler", sampler, makers)
        make, simplest = makers[sampler]
        for name in options:
            check_choice(f"option of the sampler {sampler!r}", name, inspect.signature(make).parameters)
        return make(sampling_method=simplest if method is None else method, **options)

    def sample_ode(
        self,
        *,
        sampling_method="dopri5",
        num_steps=50,
        atol=1e-6,
        rtol=1e-3,
        reverse=False,
        timestep_shift=0.0,
        zero_init_steps=0,
        trajectory=True,
        progress=False,
    ):
        """Returns a function that integrates the probability flow ODE.

        Args:
            sampling_method: `euler`, `midpoint`, `heun2`, `heun3`, `rk4` (the 3/8 rule), `heun2_euler` (`heun2` whose
                last step is Euler's, as in EDM and JiT: it asks no model at the end), `ab2` (order 2 as `heun2`, by one
                evaluation a step: Adams-Bashforth) or `dopri5` (adaptive).
            num_steps: points of the time grid, both ends included, as in the official code: a fixed-step method
                makes `num_steps - 1` steps; `dopri5` chooses its own and reports at these points.
            atol, rtol: absolute and relative tolerance of `dopri5`, for the batch as a whole.
            reverse: from data to noise.
            timestep_shift: the points of the grid are moved by `shift_time`, as in the official LightningDiT: below 1
                towards the noise, above 1 towards the data, so that the steps of a fixed-step method differ in length;
                0 leaves them. Of `dopri5` only the points move that it reports at.
            zero_init_steps: the first steps of a fixed-step method that make no move and ask no model, as CFG-Zero*
                has it (Fan et al. 2025, arXiv:2503.18886): the first velocities of a network are its worst.
            trajectory: return every point of the grid, else the last alone.
            progress: show a bar; or a function from the iterator of the states to one of the same.

        Returns:
            `sample(x, model, **model_kwargs)`: from noise (`reverse`: data) x `(N, ...)` to a tensor of states
            `(num_steps or 1, N, ...)`, of which `[-1]` is the result. Nothing is differentiable.

        A reverse ODE on the VP path starts at t = 1, where noise prediction divides by 0 and the official code returns
        NaN: that one starts at `1 - sample_eps` and goes to 0.
        """
        solve = _ode_solver(sampling_method, num_steps, atol, rtol)
        check_number("timestep_shift", timestep_shift, "a number, at least 0; 0 for none", lambda s: 0 <= s < math.inf)
        grid = self._ode_grid(num_steps, reverse)
        if timestep_shift > 0:
            grid = [shift_time(t, timestep_shift) for t in grid]
        _check_zero_init_steps(zero_init_steps, sampling_method, num_steps)

        @paddle.no_grad()
        def sample(x, model, **model_kwargs):
            x = at_least_float32(x)

            def drift(t, state):
                return (self.drift(state[0], _times(t, x), model, **model_kwargs),)

            moves = (state for (state,) in solve(drift, (x,), grid[zero_init_steps:]))
            states = chain(repeat(x, zero_init_steps), moves)
            return paddle.stack(_collect(states, num_steps, trajectory, progress))

        return sample

    def sample_sde(
        self,
        *,
        sampling_method="Euler",
        diffusion_form="SBDM",
        diffusion_norm=1.0,
        last_step="Mean",
        last_step_size=0.04,
        num_steps=250,
        trajectory=True,
        progress=False,
        draw_noise=None,
    ):
        """Returns a function that integrates the reverse SDE, `dx = (v + w score) dt + sqrt(2 w) dW`.

        Args:
            sampling_method: `Euler` (Euler-Maruyama) or `Heun`.
            diffusion_form, diffusion_norm: w, see `ICPlan.compute_diffusion`. Any w gives the same distribution at
                every time, if the network is exact.
            last_step: the noiseless step that ends the sampling: `Mean` (the SDE's drift), `Tweedie` (the expected
                data), `Euler` (the ODE's drift) or None.
            last_step_size: its length; 0 for None.
            num_steps: states returned, as in the official code: `num_steps - 1` steps and the last one. Without a last
                step, the last state stands there twice.
            trajectory, progress: as of `sample_ode`.
            draw_noise: called once a step as `draw_noise(x)`, returns standard normal noise as x; None draws it by
                `paddle.randn`.

        Returns:
            `sample(x, model, **model_kwargs)`: from noise x `(N, ...)` to a list of states `(N, ...)`, of which `[-1]`
            is the result.

        One network evaluation a drift: drift and score are made of the same output. Where the official code fails:

        - `SBDM` with velocity prediction on Linear or GVP is infinite at t = 0, and the official result NaN: it starts
          at t = 0.001, as it does for noise and score.
        - `constant` crashes there; here it works.
        - Without a last step, velocity prediction goes to t = 1, where the score is infinite: on the Linear path, and
          with `constant`, `Heun` does not correct that last step (officially NaN). On the GVP path it is corrected as
          officially, by a score that only float32's cos(pi / 2) keeps finite. A last step of length 0 at t = 1 is none.
        """
        check_choice("sampling_method of an SDE", sampling_method, SDE_METHODS)
        check_choice("diffusion_form", diffusion_form, DIFFUSION_FORMS)
        check_choice("last_step", last_step, LAST_STEPS)
        check_number("diffusion_norm", diffusion_norm, "a number, at least 0", lambda norm: 0 <= norm < math.inf)
        check_number("last_step_size", last_step_size, "a number, at least 0 and below 1", lambda size: 0 <= size < 1)
        _check_num_steps(num_steps)
        sde = _ReverseSDE(self.transport, diffusion_form, diffusion_norm)
        t0, t1 = sde.interval(0.0 if last_step is None else last_step_size)
        grid = np.linspace(t0, t1, num_steps).tolist()
        correct_last = t1 < 1 or (self.transport.path_type == PathType.GVP and diffusion_form != "constant")

        @paddle.no_grad()
        def sample(x, model, **model_kwargs):
            def output(t, x):
                return call_model(model, x, _times(t, x), model_kwargs)

            def drift(t, x):
                return sde.drift(output(t, x), t, x)

            def states(x):
                if sampling_method == "Euler":
                    steps = integrators.euler_maruyama(drift, sde.diffusion, x, grid, draw_noise)
                else:
                    steps = integrators.heun_sde(drift, sde.diffusion, x, grid, correct_last, draw_noise)
                for x in islice(steps, 1, None):  # the noise itself is not among the states
                    yield x
                yield x if last_step is None or t1 == 1 else sde.end(last_step, output(t1, x), t1, x, last_step_size)

            return _collect(states(at_least_float32(x)), num_steps, trajectory, progress)

        return sample

    def sample_ode_likelihood(self, *, sampling_method="dopri5", num_steps=50, atol=1e-6, rtol=1e-3, progress=False):
        """Returns a function for the log-likelihood of data under the probability flow ODE (Song et al. 2021, 4.3).

        The divergence of the drift is estimated without bias with a random sign for each entry, drawn anew at each
        evaluation (Hutchinson), as in the official code; an adaptive method takes that randomness for error and
        makes many steps, a fixed-step one does not. Arguments as of `sample_ode`.

        Returns:
            `sample(x, model, **model_kwargs)`: from data x `(N, ...)` to `(logp, latents)`: log-likelihoods in nats
            `(N,)`, and the noise `(N, ...)` that the ODE maps the data to.

        Integrated in reversed time `s = 1 - t` over the interval of the forward ODE, as in the official code, but with
        noise prediction on the VP path, which starts as that of `sample_ode`.
        """
        solve = _ode_solver(sampling_method, num_steps, atol, rtol)
        grid = self._ode_grid(num_steps, reverse=False)
        if self.transport.model_type == ModelType.NOISE:
            grid = [1 - t for t in reversed(grid)]  # the same interval mirrored

        @paddle.no_grad()
        def sample(x, model, **model_kwargs):
            x = at_least_float32(x)

            def drift(s, state):
                signs = (paddle.randint(0, 2, x.shape) * 2 - 1).astype(x.dtype)
                with paddle.enable_grad():
                    z = state[0].detach()
                    z.stop_gradient = False
                    velocity = self.drift(z, _times(1 - s, z), model, **model_kwargs)
                    return _divergence(velocity, z, signs)

            start = (x, paddle.zeros([x.shape[0]], dtype=x.dtype))
            latents, delta_logp = _collect(solve(drift, start, grid), num_steps, False, progress)[-1]
            return self.transport.prior_logp(latents) - delta_logp, latents

        return sample

    def _ode_grid(self, num_steps, reverse):
        transport = self.transport
        eps = transport.train_eps, transport.sample_eps
        t0, t1 = transport.check_interval(*eps, eval=True, reverse=reverse)
        if reverse and transport.model_type == ModelType.NOISE:
            t1, t0 = transport.check_interval(*eps, eval=True)
        _check_eps(transport)
        return np.linspace(t0, t1, num_steps).tolist()


@dataclass
class _ReverseSDE:
    """The SDE `dx = (v + w score) dt + sqrt(2 w) dW` of a network's outputs at states `x` `(N, ...)` and a time `t`."""

    transport: Transport
    form: str
    norm: float

    def interval(self, last_step_size):
        """Returns the times between which it is integrated; raises `ValueError` if nothing is left of them."""
        transport, is_vp = self.transport, self.transport.path_type == PathType.VP
        eps = transport.train_eps, transport.sample_eps
        t0, t1 = transport.check_interval(
            *eps, diffusion_form=self.form, sde=True, eval=True, last_step_size=last_step_size
        )
        if not is_vp and self.form == "SBDM" and t0 == 0:
            t0 = _SINGULAR_START
        if not is_vp or t1 == 1:
            _check_eps(transport)
        if t0 >= t1:
            raise ValueError(f"last_step_size={last_step_size!r}: nothing is left of the interval from t={t0:g} to 1")
        return t0, t1

    @full_precision
    def diffusion(self, t, x):
        """Returns w, `(N, 1, ..., 1)`."""
        return self.transport.path_sampler.compute_diffusion(x, _times(t, x), form=self.form, norm=self.norm)

    @full_precision
    def drift(self, output, t, x):
        times = _times(t, x)
        score = self.transport.output_to_score(output, x, times)
        return self.transport.output_to_velocity(output, x, times) + score * self.diffusion(t, x)

    @full_precision
    def end(self, last_step, output, t, x, size):
        """Returns the result: the state after a `last_step` without noise."""
        if last_step == "Mean":
            return x + self.drift(output, t, x) * size
        times = _times(t, x)
        if last_step == "Euler":
            return x + self.transport.output_to_velocity(output, x, times) * size
        return self.transport.output_to_data(output, x, times)


def _ode_solver(method, num_steps, atol, rtol):
    """Returns `solve(drift, state, grid)`, a generator of states, for checked settings."""
    check_choice("sampling_method of an ODE", method, ODE_METHODS)
    _check_num_steps(num_steps)
    for name, tolerance in (("atol", atol), ("rtol", rtol)):
        check_number(name, tolerance, "a positive number", lambda value: 0 < value < math.inf)
    if method == "dopri5":
        return partial(integrators.dopri5, atol=atol, rtol=rtol)
    if method == "ab2":
        return integrators.adams_bashforth_ode
    if method == "heun2_euler":
        return partial(integrators.fixed_step_ode, method="heun2", last_method="euler")
    return partial(integrators.fixed_step_ode, method=method)


def _check_zero_init_steps(count, method, num_steps):
    if method == "dopri5" and count != 0:
        raise ValueError(f"zero_init_steps={count!r}: dopri5 chooses its steps itself; expected 0")
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or not 0 <= count < num_steps - 1:
        raise ValueError(f"zero_init_steps={count!r}: expected an integer from 0 to {num_steps - 2}, one step less")


def _check_eps(transport):
    regular = (ModelType.VELOCITY, ModelType.X1, *([ModelType.SCORE] if transport.path_type == PathType.VP else []))
    if transport.model_type not in regular and transport.sample_eps == 0:
        raise ValueError(
            f"sample_eps=0: sampling with {transport.model_type.value} prediction divides by 0 at an end of the"
            " interval; give a positive sample_eps"
        )


@full_precision
def _divergence(velocity, x, signs):
    """Returns the slope of (x, log-likelihood) in reversed time: `-velocity`, and its divergence's estimate `(N,)`."""
    (gradient,) = paddle.grad((velocity * signs).sum(), x, allow_unused=True)
    if gradient is None:  # the model does not look at x
        gradient = paddle.zeros_like(x)
    return -velocity.detach(), sum_flat(gradient * signs)


def _check_num_steps(num_steps):
    if isinstance(num_steps, bool) or not isinstance(num_steps, numbers.Integral) or num_steps < 2:
        raise ValueError(f"num_steps={num_steps!r}: expected an integer, at least 2 (both ends count)")


_host_values = {}  # by the id of a tensor of times that is alive; Paddle 2.6 gives tensors no attributes


def _times(t, x):
    """Returns the time t for each sample of x, `(N,)`: filled on the device, no copy from the host."""
    times = paddle.full([x.shape[0]], t, dtype=x.dtype)
    _host_values[id(times)] = t
    weakref.finalize(times, _host_values.pop, id(times), None)
    return times


def host_value(times):
    """Returns the one time that a tensor `(N,)` holds which a `Sampler` has given to a model; None of another tensor.

    For a model that decides by the time and must not wait for the device.
    """
    return _host_values.get(id(times))


def _collect(states, total, trajectory, progress):
    """Lists all states, or the last alone."""
    if callable(progress):
        states = progress(states)
    elif progress:
        from tqdm.auto import tqdm

        states = tqdm(states, total=total)
    return list(states) if trajectory else list(collections.deque(states, maxlen=1))
