"""`transport/`: parity with the official code, exact solutions for Gaussian data, its refusals and extras."""

import contextlib
import itertools
import math

import numpy as np
import paddle
import pytest
from support.golden import judged, load_golden, official_network, relative_error, replay, tensors

from models import LightningDiT, SiT
from sampling import flags
from transport import (
    DIFFUSION_FORMS,
    LAST_STEPS,
    ODE_METHODS,
    SDE_METHODS,
    ModelType,
    Sampler,
    WeightType,
    create_transport,
    shift_time,
)
from transport.integrators import FIXED_STEP
from verification import official, official_targets

pytestmark = pytest.mark.paddle26

PATHS = ("Linear", "GVP", "VP")
PREDICTIONS = ("velocity", "noise", "score", "x1")
WEIGHTS = (None, "velocity", "likelihood")
FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "heun2_euler": 2, "ab2": 2}
EVERY_KIND = list(itertools.product(PATHS, PREDICTIONS))
DATA_STD = 0.5
SHARP = {"t_eps": 1e-4}  # so small that x1 prediction is as exact as the others


@pytest.fixture(autouse=True)
def seed():
    paddle.seed(0)


# -- Parity with the official code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("promised", [False, True], ids=["", "promised"])
def test_training_losses_and_gradients_are_the_official_ones(promised):
    judged(official.transport_gradients(single_backward=promised))


def test_noise_and_times_are_drawn_in_the_official_order(monkeypatch):
    x1, x0, t = paddle.randn([5, 2, 3]), paddle.randn([5, 2, 3]), paddle.rand([5])
    given = create_transport().training_losses(lambda x, t: 0.5 * x, x1, x0=x0, t=t)
    calls = []
    monkeypatch.setattr(paddle, "randn", lambda shape, dtype: calls.append(("randn", shape)) or x0)
    monkeypatch.setattr(paddle, "rand", lambda shape: calls.append(("rand", list(shape))) or t)
    drawn = create_transport().training_losses(lambda x, t: 0.5 * x, x1)
    assert calls == [("randn", [5, 2, 3]), ("rand", [5])]
    np.testing.assert_array_equal(given["loss"], drawn["loss"])


def test_linear_path_is_the_official_one():
    judged(official.linear_path())


def test_intervals_are_the_official_ones():
    table = load_golden("sit_intervals_linear")
    for key, expected in table.items():
        path, prediction, rest = key.split("_", 2)
        rest, _, given = rest.partition("_given_")
        eps = [float(part.replace("p", ".")) for part in given.split("_")] if given else [None, None]
        if rest.endswith("given_0p01_0p02"):
            rest, eps = rest.removesuffix("given_0p01_0p02").rstrip("_"), [0.01, 0.02]
        transport = create_transport(path, prediction, None, *eps)
        eps = transport.train_eps, transport.sample_eps
        if rest == "eps":
            actual = eps
        elif rest == "train":
            actual = transport.check_interval(*eps)
        elif rest.startswith("ode"):
            actual = transport.check_interval(*eps, eval=True, reverse=rest == "ode_reverse")
        else:
            _, form, last = rest.split("_")
            size = float(last.removeprefix("last").replace("p", "."))
            actual = transport.check_interval(*eps, diffusion_form=form, sde=True, eval=True, last_step_size=size)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, err_msg=key)
    assert len(table) == 33


# A coarse run tells more of a method than a fine one, which tools/self_check.py does too.
ODE_RUNS = [run for run in official.ODE_RUNS if f"{run}_coarse" not in official.ODE_RUNS]


@pytest.mark.parametrize(("guided", "run"), [(True, run) for run in ODE_RUNS] + [(False, "euler"), (False, "dopri5")])
def test_ode_is_the_official_one(guided, run, monkeypatch):
    """It asks the network at the same times, too."""
    forward, seen = SiT.forward, []

    def watched(self, x, t, *args, **options):
        assert t.shape == [x.shape[0]] and t.dtype == paddle.float32
        assert (t == t[0]).all()
        seen.append(t[0].item())
        return forward(self, x, t, *args, **options)

    monkeypatch.setattr(SiT, "forward", watched)
    judged(official.ode(run, guided))
    times = load_golden(f"sit_ode_linear_velocity_{'cfg4' if guided else 'nocfg'}")[f"{run}_eval_t"]
    if run.startswith("dopri5"):
        assert len(seen) == len(times) and max(seen) == 1.0
        # The same first step. The later ones follow from errors so small that rounding moves them.
        np.testing.assert_allclose(seen[:8], times[:8], rtol=1e-3)
        np.testing.assert_allclose(seen[8:14], times[8:14], rtol=0.1)
    else:
        np.testing.assert_allclose(seen, times, atol=1e-6)


ODES_OF_LIGHTNING = [(official.lightning_ode, run, run) for run in official.LIGHTNING_RUNS]
ODES_OF_LIGHTNING += [(official_targets.x1_ode, run, f"x1pred_{run}") for run in official_targets.X1_RUNS]


@pytest.mark.parametrize(("case", "run", "name"), ODES_OF_LIGHTNING, ids=[name for *_, name in ODES_OF_LIGHTNING])
def test_ode_of_lightning_dit_is_the_official_one(case, run, name, monkeypatch):
    """It asks the network at the same times, too."""
    forward, seen = LightningDiT.forward, []

    def watched(self, x, t, *args, **options):
        assert t.dtype == paddle.float32 and (t == t[0]).all()
        seen.append(t[0].item())
        return forward(self, x, t, *args, **options)

    monkeypatch.setattr(LightningDiT, "forward", watched)
    judged(case(run))
    np.testing.assert_allclose(seen, load_golden("lightningdit_ode")[f"{name}_eval_t"], atol=1e-6)


@pytest.mark.parametrize("shift", [0.3, 1, 2.5])
def test_shifted_times(shift):
    t = np.linspace(0, 1, 12)
    expected = shift * t / (1 + (shift - 1) * t)
    np.testing.assert_allclose(shift_time(paddle.to_tensor(t), shift), expected, rtol=1e-14)
    assert (shift_time(0.0, shift), shift_time(1.0, shift)) == (0, 1)  # exactly
    seen = []
    sampler = Sampler(create_transport())
    for reverse in (False, True):
        sample = sampler.sample_ode(sampling_method="euler", num_steps=12, timestep_shift=shift, reverse=reverse)
        sample(paddle.zeros([1, 2]), lambda x, t: seen.append(t.item()) or x)
    np.testing.assert_allclose(seen, [*expected[:-1], *expected[:0:-1]], rtol=1e-6)


def test_dopri5_reports_at_shifted_times():
    sampler, z = Sampler(create_transport()), paddle.randn([2, 3])
    plain, shifted = (
        sampler.sample_ode(num_steps=5, rtol=1e-6, timestep_shift=shift)(z, lambda x, t: x) for shift in (0.0, 0.3)
    )
    times = shift_time(np.linspace(0, 1, 5), 0.3).reshape(-1, 1, 1)
    np.testing.assert_allclose(shifted, z.numpy() * np.exp(times), rtol=1e-5)
    np.testing.assert_array_equal(plain[-1], shifted[-1])


def test_sde_is_the_official_one():
    judged(official.sde())


# -- Data N(0, DATA_STD^2): every field is known exactly --------------------------------------------------------------


def alpha_sigma(path, t):
    """The definitions; t may be complex."""
    if path == "Linear":
        return t, 1 - t
    if path == "GVP":
        return np.sin(t * np.pi / 2), np.cos(t * np.pi / 2)
    half_integral_of_beta = 0.5 * (0.1 * (1 - t) + (20.0 - 0.1) * (1 - t) ** 2 / 2)
    alpha = np.exp(-half_integral_of_beta)
    return alpha, np.sqrt(1 - alpha**2)


def coefficients(path, t):
    """alpha, sigma and their derivatives, by a complex step: exact to rounding."""
    ahead = alpha_sigma(path, np.asarray(t) + 1e-30j)
    return *(value.real for value in ahead), *(value.imag / 1e-30 for value in ahead)


def variance(path, t):
    alpha, sigma = alpha_sigma(path, t)
    return alpha**2 * DATA_STD**2 + sigma**2


def exact(path, t):
    """What x_t is to be multiplied by to give each prediction."""
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t)
    var = alpha**2 * DATA_STD**2 + sigma**2
    return {
        "velocity": (alpha * d_alpha * DATA_STD**2 + sigma * d_sigma) / var,
        "noise": sigma / var,
        "score": -1 / var,
        "x1": alpha * DATA_STD**2 / var,
    }


def exact_model(path, prediction):
    return lambda x, t: x * float(exact(path, float(t[0]))[prediction])


def reference_diffusion(path, form, t, norm):
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t)
    with np.errstate(divide="ignore"):
        of_score_models = d_alpha / alpha * sigma**2 - sigma * d_sigma
    return {
        "constant": norm + 0 * t,
        "SBDM": norm * of_score_models,
        "sigma": norm * sigma,
        "linear": norm * (1 - t),
        "decreasing": 0.25 * (norm * np.cos(np.pi * t) + 1) ** 2,
        "increasing-decreasing": norm * np.sin(np.pi * t) ** 2,
    }[form]


TIMES = np.array([0.02, 0.3, 0.5, 0.81, 0.97])


@pytest.mark.parametrize("path", PATHS)
def test_path_coefficients_are_their_definitions(path):
    sampler, t = create_transport(path).path_sampler, paddle.to_tensor(TIMES)
    alpha, sigma, d_alpha, d_sigma = coefficients(path, TIMES)
    actual = *sampler.compute_alpha_t(t), *sampler.compute_sigma_t(t), sampler.compute_d_alpha_alpha_ratio_t(t)
    for value, expected in zip(actual, (alpha, d_alpha, sigma, d_sigma, d_alpha / alpha), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-10)
    x0, x1 = paddle.randn([5, 2, 3]).astype("float64"), paddle.randn([5, 2, 3]).astype("float64")
    same_t, xt, ut = sampler.plan(t, x0, x1)
    assert same_t is t
    per_sample = [np.broadcast_to(value.reshape([5, 1, 1]), [5, 1, 1]) for value in (alpha, sigma, d_alpha, d_sigma)]
    np.testing.assert_allclose(xt, per_sample[0] * x1.numpy() + per_sample[1] * x0.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ut, per_sample[2] * x1.numpy() + per_sample[3] * x0.numpy(), rtol=1e-9, atol=1e-12)
    for name in ("compute_mu_t", "compute_xt"):
        np.testing.assert_array_equal(getattr(sampler, name)(t, x0, x1), xt)


@pytest.mark.parametrize("path", PATHS)
def test_conversions_agree_on_exact_fields(path):
    sampler, t = create_transport(path).path_sampler, paddle.to_tensor(TIMES)
    x = paddle.randn([5, 2, 3]).astype("float64")
    field = {name: x * paddle.to_tensor(factor).reshape([5, 1, 1]) for name, factor in exact(path, TIMES).items()}
    close = {"rtol": 1e-8, "atol": 1e-9}
    np.testing.assert_allclose(sampler.get_score_from_velocity(field["velocity"], x, t), field["score"], **close)
    np.testing.assert_allclose(sampler.get_noise_from_velocity(field["velocity"], x, t), field["noise"], **close)
    np.testing.assert_allclose(sampler.get_velocity_from_score(field["score"], x, t), field["velocity"], **close)
    mean, var = sampler.compute_drift(x, t)
    assert var.shape == [5, 1, 1]
    np.testing.assert_allclose(-mean + var * field["score"], field["velocity"], **close)
    alpha, _, d_alpha, _ = coefficients(path, TIMES)
    np.testing.assert_allclose(mean, x.numpy() * (-d_alpha / alpha).reshape([5, 1, 1]), **close)


@pytest.mark.parametrize("path", PATHS)
def test_diffusion_forms_are_their_definitions(path):
    sampler, t, x = create_transport(path).path_sampler, paddle.to_tensor(TIMES), paddle.zeros([5, 2], "float64")
    for form, norm in itertools.product(FORMS, (1.0, 0.7)):
        actual = sampler.compute_diffusion(x, t, form=form, norm=norm)
        assert actual.shape == [5, 1]
        np.testing.assert_allclose(actual[:, 0], reference_diffusion(path, form, TIMES, norm), rtol=1e-9)
    misspelt = sampler.compute_diffusion(x, t, form="inccreasing-decreasing", norm=norm)
    np.testing.assert_array_equal(misspelt, actual)
    assert set(DIFFUSION_FORMS) == {*FORMS, "inccreasing-decreasing"}


@pytest.mark.parametrize(("path", "prediction"), EVERY_KIND)
def test_drift_and_score_of_every_prediction(path, prediction):
    transport = create_transport(path, prediction)
    x, t = paddle.randn([3, 2, 4, 4]).astype("float64"), paddle.full([3], 0.37, "float64")  # before x1's clamp
    model = exact_model(path, prediction)
    expected = exact(path, 0.37)
    np.testing.assert_allclose(transport.get_drift()(x, t, model), x * float(expected["velocity"]), rtol=1e-8)
    np.testing.assert_allclose(transport.get_score()(x, t, model), x * float(expected["score"]), rtol=1e-8)


def velocity_of_data(path, data, x, t=TIMES):
    """The velocity at x of the way that goes on to these data, without a clamp."""
    alpha, sigma, d_alpha, d_sigma = (value.reshape([-1, 1, 1, 1]) for value in coefficients(path, t))
    return d_alpha * data + d_sigma * (x - alpha * data) / sigma


@pytest.mark.parametrize(("path", "prediction", "weight"), list(itertools.product(PATHS, PREDICTIONS, WEIGHTS)))
def test_every_loss_is_its_definition(path, prediction, weight):
    transport = create_transport(path, prediction, weight, **SHARP)
    x1, x0, output = (paddle.randn([5, 2, 3, 3]).astype("float64") for _ in range(3))
    t = paddle.to_tensor(TIMES)
    seen = []

    def model(x, t, label):
        seen.append((x, t, label))
        return output

    losses = transport.training_losses(model, x1, {"label": 3}, x0=x0, t=t)
    sampler = transport.path_sampler
    _, xt, ut = sampler.plan(t, x0, x1)
    assert len(seen) == 1 and seen[0][2] == 3
    np.testing.assert_array_equal(seen[0][0], xt)
    np.testing.assert_array_equal(seen[0][1], t)
    assert set(losses) == {"loss", "pred"}
    np.testing.assert_array_equal(losses["pred"], output)

    sigma = coefficients(path, TIMES)[1].reshape([5, 1, 1, 1])
    out, x0, ut, xt = (value.numpy() for value in (output, x0, ut, xt))
    if prediction in ("velocity", "x1"):  # never weighted
        velocity = out if prediction == "velocity" else velocity_of_data(path, out, xt)
        error = (velocity - ut) ** 2
    else:
        noise = out if prediction == "noise" else -sigma * out
        if weight is None:
            error = (noise - x0) ** 2
        elif weight == "velocity":  # the error of the velocity that the output amounts to
            error = (transport.get_drift()(paddle.to_tensor(xt), t, lambda x, t: output).numpy() - ut) ** 2
        else:  # that of the score, times the SDE's squared diffusion / 2
            w = reference_diffusion(path, "SBDM", TIMES, 1.0).reshape([5, 1, 1, 1])
            error = w * ((noise - x0) / sigma) ** 2
    np.testing.assert_allclose(losses["loss"], error.mean((1, 2, 3)), rtol=1e-7)


# -- ODE --------------------------------------------------------------------------------------------------------------


def scaling(path, t0, t1):
    """The exact flow of Gaussian data from t0 to t1 multiplies by this."""
    return math.sqrt(variance(path, t1) / variance(path, t0))


def ends(path, prediction):
    if path == "VP":
        return 0.0, 0.999
    return (0.0, 1.0) if prediction in ("velocity", "x1") else (0.001, 0.999)


@pytest.mark.parametrize(("path", "prediction"), EVERY_KIND)
def test_dopri5_is_the_exact_flow_both_ways(path, prediction):
    sampler = Sampler(create_transport(path, prediction, **SHARP))
    z, model = paddle.randn([4, 3]), exact_model(path, prediction)
    start, end = ends(path, prediction)
    out = sampler.sample_ode(num_steps=5, rtol=1e-5)(z, model)
    for state, t in zip(out, np.linspace(start, end, 5), strict=True):
        assert relative_error(state, z * scaling(path, start, float(t))) < 3e-4
    back = sampler.sample_ode(num_steps=2, rtol=1e-5, reverse=True)(out[-1], model)
    # On the VP path the reverse starts at 1 (the official table) but for noise, which is infinite there.
    begin = 1.0 if path == "VP" and prediction != "noise" else end
    stop = start if path != "VP" or prediction == "noise" else 0.001
    assert relative_error(back[-1], out[-1] * scaling(path, begin, stop)) < 3e-4


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("method", ORDERS)
def test_fixed_methods_converge_at_their_order(method, shift):
    z = paddle.ones([1, 1], "float64")
    errors = []
    for steps in (32, 64):
        fn = Sampler(create_transport("GVP")).sample_ode(
            sampling_method=method, num_steps=steps + 1, timestep_shift=shift
        )
        calls = []

        def model(x, t, calls=calls):
            calls.append(float(t[0]))
            return exact_model("GVP", "velocity")(x, t)

        errors.append(abs(fn(z, model)[-1].item() - DATA_STD))
        evaluations = {"ab2": steps, "heun2_euler": 2 * steps - 1}  # the latter does not ask at the end
        assert len(calls) == (evaluations.get(method) or steps * len(FIXED_STEP[method].c))
        assert (max(calls) == 1) == (method in ("heun2", "rk4"))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[method], abs=0.35)


def test_dopri5_keeps_its_tolerance_and_its_end():
    z, seen = paddle.randn([2, 3]).astype("float64"), []

    def model(x, t):
        seen.append(float(t[0]))
        return x * paddle.cos(8 * t).unsqueeze(1) * 8

    errors = []
    for rtol in (1e-3, 1e-5, 1e-7):
        seen.clear()
        out = Sampler(create_transport()).sample_ode(num_steps=21, atol=1e-9, rtol=rtol)(z, model)
        expected = [z * math.exp(math.sin(8 * t)) for t in np.linspace(0, 1, 21)]
        errors.append(max(relative_error(a, b) for a, b in zip(out, expected, strict=True)))
        assert errors[-1] < 10 * rtol
        assert min(seen) == 0.0 and max(seen) == 1.0
    assert errors[2] < errors[1] < errors[0]
    # The last state does not depend on which others are asked for.
    last = Sampler(create_transport()).sample_ode(num_steps=2, atol=1e-9, rtol=1e-7)(z, model)
    np.testing.assert_array_equal(last[-1], out[-1])


def test_dopri5_controls_the_error_of_the_batch_as_a_whole():
    counts = []
    for x in ([[1.0, 1.0]], [[1.0, 1.0]] * 8):
        calls = []

        def model(x, t, calls=calls):
            calls.append(1)
            return x * paddle.cos(8 * t).unsqueeze(1)

        Sampler(create_transport()).sample_ode()(paddle.to_tensor(x), model)
        counts.append(len(calls))
    assert counts[0] == counts[1]  # a root mean square, not a sum


def test_dopri5_says_that_the_network_is_broken():
    fn = Sampler(create_transport()).sample_ode()
    with pytest.raises(ValueError, match="the model's output is not finite"):
        fn(paddle.ones([1, 2]), lambda x, t: x / (t - t).unsqueeze(1))


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_last_state_alone_is_the_end_of_the_trajectory(kind):
    sampler, z = Sampler(create_transport("GVP", "score")), paddle.randn([2, 3, 4])
    make = getattr(sampler, f"sample_{kind}")
    ends = []
    for trajectory in (True, False):
        paddle.seed(3)
        states = make(num_steps=6, trajectory=trajectory)(z, exact_model("GVP", "score"))
        assert len(states) == (6 if trajectory else 1)
        ends.append(states[-1])
    np.testing.assert_array_equal(*ends)


# -- SDE --------------------------------------------------------------------------------------------------------------


def reference_sde(path, prediction, form, norm, method, last_step, size, z, noise, times):
    """Every state, in numpy, with the exact network: drift and score are multiples of x."""

    def drift(x, t):
        fields = exact(path, t)
        return x * (fields["velocity"] + reference_diffusion(path, form, t, norm) * fields["score"])

    x, dt, states = z, times[1] - times[0], []
    for t, w in zip(times[:-1], noise, strict=True):
        kick = np.sqrt(2 * reference_diffusion(path, form, t, norm) * dt) * w
        if method == "Euler":
            x = x + drift(x, t) * dt + kick
        else:
            x = x + kick
            first = drift(x, t)
            x = x + dt * (first + drift(x + dt * first, t + dt)) / 2
        states.append(x)
    end = times[-1]
    alpha, sigma = alpha_sigma(path, end)
    final = {
        None: lambda: x,
        "Mean": lambda: x + drift(x, end) * size,
        "Euler": lambda: x + x * exact(path, end)["velocity"] * size,
        "Tweedie": lambda: (x + sigma**2 * x * exact(path, end)["score"]) / alpha,
    }[last_step]()
    return [*states, final]


@pytest.mark.parametrize(("path", "prediction"), EVERY_KIND)
@pytest.mark.parametrize("method", ["Euler", "Heun"])
def test_sde_steps_are_their_definition(path, prediction, method, monkeypatch):
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal([3, 4]), rng.standard_normal([5, 3, 4])
    for form, last_step in itertools.product(FORMS, LAST_STEPS):
        t0, t1 = ends(path, prediction)
        if method == "Heun" and last_step is None and t1 == 1:
            continue  # see below
        transport = create_transport(path, prediction, **SHARP)
        if path != "VP" and form == "SBDM":
            t0 = 0.001  # officially NaN with velocity prediction
        if last_step is not None:
            t1 = 0.93
        times = np.linspace(t0, t1, 6)
        expected = reference_sde(path, prediction, form, 0.7, method, last_step, 0.07, z, noise, times)
        rest = replay(monkeypatch, "randn", noise)
        calls = []

        def model(x, t, calls=calls):
            calls.append(float(t[0]))
            return exact_model(path, prediction)(x, t)

        fn = Sampler(transport).sample_sde(
            sampling_method=method,
            diffusion_form=form,
            diffusion_norm=0.7,
            last_step=last_step,
            last_step_size=0.07,
            num_steps=6,
        )
        actual = fn(paddle.to_tensor(z), model)
        assert next(rest, None) is None
        assert len(calls) == (10 if method == "Heun" else 5) + (last_step is not None)  # one for drift and score
        assert len(actual) == 6
        for state, value in zip(actual, expected, strict=True):
            np.testing.assert_allclose(state, value, rtol=1e-6, atol=1e-7, err_msg=f"{form} {last_step}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["Euler", "Heun"])
def test_sde_draws_the_data_distribution(form, method):
    # SBDM's coefficient is infinite at t = 0 on the other paths, and its first steps there rough.
    path = "VP" if form == "SBDM" else "Linear"
    fn = Sampler(create_transport(path)).sample_sde(sampling_method=method, diffusion_form=form, num_steps=80)
    states = fn(paddle.randn([4, 2000]), exact_model(path, "velocity"))
    before_last = states[-2]  # at 1 - last_step_size; the last step is noiseless
    assert abs(float(before_last.std()) / math.sqrt(variance(path, 0.96)) - 1) < 0.04
    assert abs(float(before_last.mean())) < 0.03


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_sbdm_with_velocity_starts_where_it_is_finite(path):
    seen = []

    def model(x, t):
        seen.append(float(t[0]))
        return exact_model(path, "velocity")(x, t)

    states = Sampler(create_transport(path)).sample_sde(num_steps=250)(paddle.randn([2, 1000]), model)
    assert seen[0] == pytest.approx(0.001)
    assert abs(float(states[-1].std()) / DATA_STD - 1) < 0.1


@pytest.mark.parametrize("path", ["Linear", "GVP"])
@pytest.mark.parametrize("last", [{"last_step": None}, {"last_step": "Tweedie", "last_step_size": 0}])
def test_sde_to_the_very_end_is_finite(path, last):
    for method, form in itertools.product(("Euler", "Heun"), FORMS):
        seen = []

        def model(x, t, seen=seen):
            seen.append(float(t[0]))
            return exact_model(path, "velocity")(x, t)

        fn = Sampler(create_transport(path)).sample_sde(
            sampling_method=method, diffusion_form=form, num_steps=9, **last
        )
        states = fn(paddle.randn([2, 3]), model)
        assert all(paddle.isfinite(state).all() for state in states)
        # Officially finite, and reached: GVP's cos(pi / 2) is not 0 in float32.
        reaches_the_end = path == "GVP" and method == "Heun" and form != "constant"
        assert len(states) == 9 and (max(seen) == 1) == reaches_the_end
        np.testing.assert_array_equal(states[-1], states[-2])


# -- Likelihood -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "prediction"), EVERY_KIND)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_likelihood_of_gaussian_data_is_exact(path, prediction, method):
    # The divergence of a multiple of x is the same whatever the probe.
    sampler = Sampler(create_transport(path, prediction, **SHARP))
    x = paddle.randn([3, 2, 4]) * DATA_STD
    fn = sampler.sample_ode_likelihood(sampling_method=method, num_steps=201, rtol=1e-5)
    logp, latents = fn(x, exact_model(path, prediction))
    start, end = ends(path, prediction)
    if path == "VP" and prediction != "noise":
        start, end = 0.001, 1.0  # the official interval, mirrored
    factor = scaling(path, end, start)
    assert relative_error(latents, x * factor) < 1e-3
    z = x.numpy().reshape([3, 8]) * factor
    expected = -0.5 * (z**2).sum(1) - 4 * math.log(2 * math.pi) + 8 * math.log(factor)
    np.testing.assert_allclose(logp, expected, rtol=2e-3, atol=2e-3)
    # Which is, up to what eps cuts off, the density of the data.
    density = -0.5 * (x.numpy().reshape([3, 8]) ** 2).sum(1) / DATA_STD**2 - 8 * math.log(DATA_STD)
    np.testing.assert_allclose(logp, density - 4 * math.log(2 * math.pi), atol=0.05)


def test_likelihood_estimates_the_divergence_with_a_new_probe_each_time(monkeypatch):
    rng = np.random.default_rng(0)
    matrix, x = rng.standard_normal([3, 3]) * 0.3, rng.standard_normal([2, 3])
    bits = rng.integers(0, 2, [4, 2, 3])
    asked = []
    rest = iter(bits)

    def randint(low, high, shape):
        asked.append((low, high, list(shape)))
        return paddle.to_tensor(next(rest))

    monkeypatch.setattr(paddle, "randint", randint)
    layer = paddle.nn.Linear(3, 3, bias_attr=False)
    layer.to(dtype="float64")
    layer.weight.set_value(matrix)
    seen = []

    def model(x, t):
        seen.append(t[0].item())
        return layer(x)

    fn = Sampler(create_transport()).sample_ode_likelihood(sampling_method="euler", num_steps=5)
    logp, latents = fn(paddle.to_tensor(x), model)
    assert asked == [(0, 2, [2, 3])] * 4
    np.testing.assert_allclose(seen, [1.0, 0.75, 0.5, 0.25])  # from data to noise
    z, delta = x, 0.0
    for probe in bits * 2.0 - 1:
        delta = delta + 0.25 * ((probe @ matrix) * probe).sum(1)
        z = z - 0.25 * z @ matrix
    np.testing.assert_allclose(latents, z, rtol=1e-9)
    np.testing.assert_allclose(logp, -0.5 * (z**2).sum(1) - 1.5 * math.log(2 * math.pi) - delta, rtol=1e-9)
    assert layer.weight.grad is None
    assert logp.stop_gradient and latents.stop_gradient


def test_likelihood_of_a_network():
    tiny = official_network("SiT")
    z, y = tensors(load_golden("sit_ode_linear_velocity_nocfg"), "z", "y")
    fn = Sampler(create_transport()).sample_ode_likelihood(sampling_method="heun2", num_steps=3)
    logp, latents = fn(z, tiny.forward, y=y)  # as the official samplers are given a network
    reverse = Sampler(create_transport()).sample_ode(sampling_method="heun2", num_steps=3, reverse=True)
    np.testing.assert_allclose(latents, reverse(z, tiny, y=y)[-1], atol=1e-5)
    assert logp.shape == [2] and paddle.isfinite(logp).all()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in tiny.parameters())


def test_likelihood_of_a_drift_that_ignores_its_input():
    x = paddle.randn([2, 3])
    fn = Sampler(create_transport()).sample_ode_likelihood(sampling_method="euler", num_steps=3)
    logp, latents = fn(x, lambda x, t: paddle.ones_like(x))
    np.testing.assert_allclose(latents, x - 1, atol=1e-6)
    np.testing.assert_allclose(logp, create_transport().prior_logp(latents), rtol=1e-6)


def test_prior_is_the_standard_normal():
    z = paddle.randn([3, 2, 5])
    expected = [sum(-0.5 * v**2 - 0.5 * math.log(2 * math.pi) for v in row) for row in z.numpy().reshape([3, 10])]
    np.testing.assert_allclose(create_transport().prior_logp(z), expected, rtol=1e-5)


# -- Training times and losses beyond the official --------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_training_times_have_their_distribution_and_stay_inside(sampling):
    transport = create_transport(
        "GVP", "noise", train_eps=0.1, timestep_sampling=sampling, logit_mean=0.5, logit_std=2.0
    )
    t = transport.sample_timesteps(20000).numpy()
    assert t.dtype == np.float32 and t.min() >= 0.1 and t.max() <= 0.9
    u = (t.astype("float64") - 0.1) / 0.8
    if sampling == "uniform":
        np.testing.assert_allclose(np.quantile(u, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.015)
    else:
        u = u.clip(1e-6, 1 - 1e-6)
        logit = np.log(u / (1 - u))
        assert logit.mean() == pytest.approx(0.5, abs=0.05) and logit.std() == pytest.approx(2.0, abs=0.05)


def test_logit_normal_times_are_drawn_by_one_call(monkeypatch):
    normal = np.array([-1.0, 0.0, 2.0], "float32")
    rest = replay(monkeypatch, "randn", [np.zeros([3, 2], "float32"), normal])  # the noise, then the times
    t, x0, x1 = create_transport(timestep_sampling="logit-normal", logit_mean=-0.5).sample(paddle.ones([3, 2]))
    assert next(rest, None) is None
    np.testing.assert_allclose(t, 1 / (1 + np.exp(0.5 - normal)), rtol=1e-6)
    assert x0.shape == x1.shape == [3, 2]


@pytest.mark.parametrize("prediction", ["velocity", "x1"])
def test_cosine_loss_adds_the_angle_between_velocities(prediction):
    x1, x0, output = (paddle.randn([4, 3, 2, 2]) for _ in range(3))
    t = paddle.to_tensor([0.0, 0.3, 0.9, 0.99])
    plain, extra = (
        create_transport(prediction=prediction, cosine_loss=on).training_losses(lambda x, t: output, x1, x0=x0, t=t)
        for on in (False, True)
    )
    out, ut = output.numpy(), (x1 - x0).numpy()
    if prediction == "x1":  # the clamp changes lengths, not directions
        times = t.numpy().reshape([4, 1, 1, 1])
        out = output.numpy() - (times * x1.numpy() + (1 - times) * x0.numpy())
    cosine = (out * ut).sum(1) / np.sqrt((out**2).sum(1) * (ut**2).sum(1))
    np.testing.assert_allclose(extra["cos_loss"], (1 - cosine).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(extra["loss"], plain["loss"] + extra["cos_loss"], rtol=1e-6)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_training_times_are_shifted_within_their_interval(sampling, shift):
    """Each drawn time moves by `shift_time`, and what eps cuts off stays cut off."""
    drawn = []
    for value in (0.0, shift):
        paddle.seed(3)
        transport = create_transport("GVP", "noise", timestep_sampling=sampling, train_eps=0.1, timestep_shift=value)
        drawn.append(transport.sample_timesteps(2000).numpy().astype("float64"))
    plain, shifted = ((t - 0.1) / 0.8 for t in drawn)
    np.testing.assert_allclose(shifted, shift * plain / (1 + (shift - 1) * plain), atol=1e-6)
    assert drawn[1].min() >= 0.1 and drawn[1].max() <= 0.9
    if shift == 1:
        np.testing.assert_array_equal(*drawn)
    else:
        assert (shifted.mean() < plain.mean()) == (shift < 1)


# -- Data as the prediction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single_backward", [True, False])
def test_losses_and_gradients_of_x1_are_the_official_ones(single_backward):
    judged(official_targets.x1_gradients(single_backward=single_backward))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t_eps", [0.05, 0.3])
def test_x1_is_finite_and_its_target_clamped_at_both_ends(path, t_eps):
    """Right data have no error at any time, and others an error that grows no further than the clamp lets it."""
    transport = create_transport(path, "x1", t_eps=t_eps)
    x1, x0, error = (paddle.randn([4, 2, 3]) for _ in range(3))
    t = paddle.to_tensor([0.0, 0.5, 1 - t_eps / 2, 1.0])
    right, wrong = (transport.training_losses(lambda x, t, d=d: x1 + error * d, x1, x0=x0, t=t)["loss"] for d in (0, 1))
    assert not right.any()
    assert paddle.isfinite(wrong).all()
    if path == "Linear":
        scale = np.maximum(1 - t.numpy(), t_eps)
        np.testing.assert_allclose(wrong, (error.numpy() ** 2).mean((1, 2)) / scale**2, rtol=1e-5)
    for field in (transport.output_to_velocity, transport.output_to_score):
        assert paddle.isfinite(field(x1, x0, t)).all()


def test_x1_ends_in_the_data_that_the_network_sees():
    """In the last step before t = 1, where the step is longer than the clamp, Euler lands on them."""
    data, z = paddle.randn([2, 3]), paddle.randn([2, 3])
    sampler = Sampler(create_transport(prediction="x1", t_eps=0.05))
    for method in ("euler", "heun2_euler"):
        out = sampler.sample_ode(sampling_method=method, num_steps=11)(z, lambda x, t: data)[-1]
        np.testing.assert_allclose(out, data, atol=1e-5)
    out = sampler.sample_sde(last_step="Tweedie", num_steps=20)(z, lambda x, t: data)[-1]
    np.testing.assert_array_equal(out, data)  # though the score is clamped at the last step's 0.96


# -- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "prediction", "given", "expected"),
    [
        ("VP", "velocity", {}, (1e-5, 1e-3)),
        ("VP", "score", {"train_eps": 0.02}, (0.02, 1e-3)),  # officially sample_eps becomes None
        ("VP", "score", {"sample_eps": 0.02}, (1e-5, 0.02)),  # officially ignored
        ("GVP", "noise", {}, (1e-3, 1e-3)),
        ("Linear", "noise", {"train_eps": 0.02}, (0.02, 1e-3)),
        ("GVP", "velocity", {"train_eps": 0.02, "sample_eps": 0.03}, (0, 0)),  # none is needed
        ("Linear", "x1", {"train_eps": 0.02, "sample_eps": 0.03}, (0, 0)),
        ("VP", "x1", {}, (1e-5, 1e-3)),
    ],
)
def test_eps_rules(path, prediction, given, expected):
    transport = create_transport(path, prediction, **given)
    assert (transport.train_eps, transport.sample_eps) == expected


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_intervals_of_the_variance_preserving_path(prediction):
    transport = create_transport("VP", prediction)
    eps = transport.train_eps, transport.sample_eps
    assert transport.check_interval(*eps) == (0, 1 - 1e-5)
    assert transport.check_interval(*eps, eval=True) == (0, 1 - 1e-3)
    assert transport.check_interval(*eps, eval=True, reverse=True) == pytest.approx((1, 1e-3))
    assert transport.check_interval(*eps, eval=True, sde=True) == (0, 1 - 1e-3)
    assert transport.check_interval(*eps, eval=True, sde=True, last_step_size=0.04) == (0, 1 - 0.04)
    assert transport.check_interval(*eps, eval=True, last_step_size=0.04) == (0, 1 - 1e-3)  # an ODE has none


def test_only_sbdm_keeps_a_velocity_sde_from_the_noise():
    """With eps given to the table itself: of a velocity transport's own, 0, nothing is seen."""
    interval = create_transport("GVP").check_interval
    options = {"sde": True, "eval": True}
    assert interval(0.01, 0.02, diffusion_form="SBDM", **options) == (0.02, 0.98)
    assert interval(0.01, 0.02, diffusion_form="sigma", **options) == (0, 0.98)
    assert interval(0.01, 0.02, diffusion_form="SBDM", eval=True) == (0, 1)


def test_attributes_have_the_official_names():
    transport = create_transport("VP", "score", "likelihood")
    assert transport.model_type == ModelType.SCORE and transport.loss_type == WeightType.LIKELIHOOD
    assert (transport.path_sampler.sigma_min, transport.path_sampler.sigma_max) == (0.1, 20.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path_type": "linear"}, "unknown path_type 'linear'; accepted: 'Linear', 'GVP', 'VP'"),
        ({"prediction": "v"}, "unknown prediction 'v'; accepted: 'velocity', 'noise', 'score', 'x1'"),
        ({"loss_weight": "snr"}, "unknown loss_weight 'snr'; accepted: None, 'velocity', 'likelihood'"),
        ({"train_eps": -0.1}, "train_eps=-0.1: expected None or a number, at least 0 and below 0.5"),
        ({"sample_eps": "0"}, "sample_eps='0': expected None or a number"),
        ({"timestep_sampling": "normal"}, "unknown timestep_sampling 'normal'; accepted: 'uniform', 'logit-normal'"),
        ({"logit_std": 0}, "logit_std=0: expected a positive number"),
        ({"logit_mean": math.inf}, "logit_mean=inf: expected a finite number"),
        ({"cosine_loss": 1}, "cosine_loss=1: expected True or False"),
        ({"cosine_loss": True, "prediction": "noise"}, "it needs prediction='velocity' or 'x1'"),
        ({"t_eps": 0}, "t_eps=0: expected a number above 0 and below 1"),
        ({"t_eps": True}, "t_eps=True: expected a number above 0"),
        ({"timestep_shift": -1.0}, "timestep_shift=-1.0: expected a number, at least 0; 0 for none"),
    ],
)
def test_wrong_transport(arguments, message):
    with pytest.raises(ValueError) as error:
        create_transport(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (
            "ode",
            {"sampling_method": "Euler"},
            "unknown sampling_method of an ODE 'Euler'; accepted: 'euler', 'midpoint'",
        ),
        ("ode", {"num_steps": 1}, "num_steps=1: expected an integer, at least 2"),
        ("ode", {"num_steps": -5}, "num_steps=-5: expected an integer, at least 2"),
        ("ode", {"num_steps": 2.5}, "num_steps=2.5: expected an integer"),
        ("ode", {"atol": 0}, "atol=0: expected a positive number"),
        ("ode", {"rtol": -1.0}, "rtol=-1.0: expected a positive number"),
        ("ode", {"timestep_shift": -0.1}, "timestep_shift=-0.1: expected a number, at least 0"),
        ("ode", {"timestep_shift": math.nan}, "timestep_shift=nan: expected a number, at least 0"),
        ("ode_likelihood", {"sampling_method": "heun"}, "unknown sampling_method of an ODE 'heun'"),
        ("ode_likelihood", {"num_steps": 0}, "num_steps=0: expected an integer, at least 2"),
        ("sde", {"sampling_method": "dopri5"}, "unknown sampling_method of an SDE 'dopri5'; accepted: 'Euler', 'Heun'"),
        ("sde", {"diffusion_form": "sbdm"}, "unknown diffusion_form 'sbdm'; accepted: 'constant', 'SBDM', 'sigma'"),
        ("sde", {"diffusion_norm": -1.0}, "diffusion_norm=-1.0: expected a number, at least 0"),
        ("sde", {"last_step": "mean"}, "unknown last_step 'mean'; accepted: None, 'Mean', 'Tweedie', 'Euler'"),
        ("sde", {"last_step_size": -0.04}, "last_step_size=-0.04: expected a number, at least 0 and below 1"),
        ("sde", {"last_step_size": 0.9999}, "last_step_size=0.9999: nothing is left of the interval"),
        ("sde", {"num_steps": 1}, "num_steps=1: expected an integer, at least 2"),
    ],
)
def test_wrong_sampler(method, arguments, message):
    with pytest.raises(ValueError) as error:
        getattr(Sampler(create_transport()), f"sample_{method}")(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(("path", "prediction"), EVERY_KIND)
def test_zero_eps_is_refused_where_a_sampler_would_divide_by_zero(path, prediction):
    sampler = Sampler(create_transport(path, prediction, sample_eps=0))
    z = paddle.randn([2, 3])
    for make in (sampler.sample_ode, sampler.sample_ode_likelihood):
        if prediction == "noise" or (prediction == "score" and path != "VP"):
            with pytest.raises(ValueError, match=f"sample_eps=0: sampling with {prediction} prediction divides by 0"):
                make()
        else:
            out = make(sampling_method="euler", num_steps=4)(z, lambda x, t: x)
            assert paddle.isfinite(out[-1]).all()


def test_shapes_that_do_not_fit():
    transport, x = create_transport(), paddle.zeros([2, 3, 4])
    doubled = r"the model returned shape \[2, 6, 4\], expected its input's \[2, 3, 4\]"
    with pytest.raises(ValueError, match=doubled):
        transport.training_losses(lambda x, t: paddle.concat([x, x], axis=1), x)
    with pytest.raises(ValueError, match=doubled):
        Sampler(transport).sample_sde(num_steps=2)(x, lambda x, t: paddle.concat([x, x], axis=1))
    with pytest.raises(ValueError, match=r"x0 has shape \[1, 3, 4\], expected \[2, 3, 4\]"):
        transport.training_losses(lambda x, t: x, x, x0=x[:1], t=paddle.zeros([2]))
    with pytest.raises(ValueError, match=r"t has shape \[1\], expected \[2\]"):
        transport.training_losses(lambda x, t: x, x, x0=x, t=paddle.zeros([1]))
    with pytest.raises(ValueError, match="x0 and t must be given together, or neither"):
        transport.training_losses(lambda x, t: x, x, x0=x)


# -- Precision, graphs, progress --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_networks_get_float32_arithmetic(prediction):
    transport = create_transport("VP", prediction, "likelihood")
    x, x0, t = paddle.randn([2, 2, 4]), paddle.randn([2, 2, 4]), paddle.to_tensor([0.2, 0.99])
    output = paddle.randn([2, 2, 4]).astype("bfloat16")
    half, full = (
        transport.training_losses(lambda x, t, out=out: out, x, x0=x0, t=t)["loss"]
        for out in (output, output.astype("float32"))
    )
    assert half.dtype == paddle.float32
    np.testing.assert_array_equal(half, full)
    assert transport.training_losses(lambda x, t: output, x.astype("float16"))["loss"].dtype == paddle.float32
    for fn in (Sampler(transport).sample_ode(num_steps=3), Sampler(transport).sample_sde(num_steps=3)):
        assert fn(x.astype("bfloat16"), lambda x, t: output)[-1].dtype == paddle.float32


def test_arithmetic_is_shielded_from_autocast_and_the_network_is_not(monkeypatch):
    # CPUs have no autocast: a stand-in counts the regions where it would be off.
    off, seen = [], {"network": set(), "arithmetic": set()}

    @contextlib.contextmanager
    def auto_cast(enable):
        assert enable is False
        off.append(True)
        yield
        off.pop()

    monkeypatch.setattr(paddle.amp, "auto_cast", auto_cast)
    for name in ("square", "sqrt", "exp"):
        original = getattr(paddle, name)

        def watched(*args, original=original, **kwargs):
            seen["arithmetic"].add(bool(off))
            return original(*args, **kwargs)

        monkeypatch.setattr(paddle, name, watched)

    def model(x, t):
        seen["network"].add(bool(off))
        return x * 0.5

    x = paddle.randn([2, 3])
    for prediction in PREDICTIONS:
        transport = create_transport("VP", prediction, "velocity")
        sampler = Sampler(transport)
        transport.training_losses(model, x)
        transport.get_drift()(x, paddle.full([2], 0.5), model)
        transport.get_score()(x, paddle.full([2], 0.5), model)
        sampler.sample_ode(num_steps=2)(x, model)
        sampler.sample_sde(num_steps=3)(x, model)
        sampler.sample_sde(num_steps=3, sampling_method="Heun", last_step="Tweedie")(x, model)
        sampler.sample_ode_likelihood(sampling_method="euler", num_steps=2)(x, model)
    assert seen == {"network": {False}, "arithmetic": {True}}
    assert not off


def test_sampling_keeps_no_graph_and_training_does():
    layer, z = paddle.nn.Linear(3, 3), paddle.randn([2, 3])

    def model(x, t):
        return layer(x)

    sampler = Sampler(create_transport())
    for fn in (sampler.sample_ode(num_steps=3), sampler.sample_sde(num_steps=3)):
        assert all(state.stop_gradient for state in fn(z, model))
    assert not layer(z).stop_gradient
    assert not create_transport().training_losses(model, z)["loss"].stop_gradient


def test_progress_bar_on_request(capfd):
    sampler, z = Sampler(create_transport()), paddle.randn([1, 2])
    for make in (sampler.sample_ode, sampler.sample_sde, sampler.sample_ode_likelihood):
        settings = {"sampling_method": "Euler" if make == sampler.sample_sde else "euler", "num_steps": 4}
        make(**settings)(z, lambda x, t: x)
        assert capfd.readouterr().err == ""
        make(progress=True, **settings)(z, lambda x, t: x)
        assert "4/4" in capfd.readouterr().err


# -- Arguments --------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers():
    sampler = Sampler(create_transport())
    ode = sampler.sample_ode(sampling_method="euler", num_steps=np.int64(4), atol=np.float32(1e-6))
    assert len(ode(paddle.randn([2, 3]), exact_model("Linear", "velocity"))) == 4
    sde = sampler.sample_sde(num_steps=np.int64(4), diffusion_norm=np.float32(1), last_step_size=np.float64(0.04))
    assert len(sde(paddle.randn([2, 3]), exact_model("Linear", "velocity"))) == 4
    for wrong in (True, 2.5, np.float32(3), "3"):
        with pytest.raises(ValueError, match="num_steps=.*expected an integer"):
            sampler.sample_ode(num_steps=wrong)
    with pytest.raises(ValueError, match="unknown path_type"):
        create_transport(path_type=["Linear"])


def test_sampling_by_name():
    sampler = Sampler(create_transport())
    z = paddle.randn([2, 3])
    model = exact_model("Linear", "velocity")
    euler = sampler.sample_ode(sampling_method="euler", num_steps=4)(z, model)[-1]
    np.testing.assert_array_equal(sampler.make("ode", num_steps=4)(z, model)[-1], euler)
    assert len(sampler.make("sde", num_steps=4)(z, model)) == 4
    with pytest.raises(ValueError, match="unknown sampler 'odd'; accepted: 'ode', 'sde'"):
        sampler.make("odd")
    with pytest.raises(
        ValueError, match="unknown option of the sampler 'sde' 'timestep_shift'; accepted: .*'last_step'"
    ):
        sampler.make("sde", num_steps=4, timestep_shift=0.3)


@pytest.mark.parametrize(
    "kind, method", [("ode", "euler"), ("ode", "rk4"), ("ode", "ab2"), ("sde", "Euler"), ("sde", "Heun")]
)
def test_no_step_waits_for_the_device(kind, method, monkeypatch):
    """Nor does a guidance interval: the sampler's times say what they are."""
    from sampling.guidance import guided

    count = 0

    def counting(original):
        def call(self, *args, **kwargs):
            nonlocal count
            count += 1
            return original(self, *args, **kwargs)

        return call

    calls = []

    def network(x, t, y):
        calls.append(x.shape[0])
        return x * 0.5

    sample = Sampler(create_transport()).make(kind, method, num_steps=11)
    denoiser = guided(network, paddle.to_tensor([1, 2]), 4.0, null_class=10, interval=(0.1, 0.3))
    z = paddle.randn([2, 4, 2, 2])
    for name in ("numpy", "item", "__float__", "__int__", "__bool__", "__array__", "tolist", "cpu"):
        monkeypatch.setattr(paddle.Tensor, name, counting(getattr(paddle.Tensor, name)))
    sample(z, denoiser)
    assert count == 0
    if (kind, method) == ("ode", "euler"):
        assert calls == [2, 4, 4, 4, 2, 2, 2, 2, 2, 2]  # both ends of the interval are on the grid, and count


def test_flags_have_the_names_of_samplers():
    assert flags.METHODS == {"ode": ODE_METHODS, "sde": SDE_METHODS}
    assert {*flags.DIFFUSION_FORMS, "inccreasing-decreasing"} == {*DIFFUSION_FORMS}
    assert {*flags.LAST_STEPS} == {*map(str, LAST_STEPS)}
