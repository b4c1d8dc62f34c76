"""`diffusion/`: parity with the official code, a float64 reference of its own, samplers, and wrong uses."""

import contextlib
import copy
import itertools
import math
import pickle

import numpy as np
import paddle
import pytest
from support.golden import judged, load_golden, official_network, replay, tensors
from support.runs import ROOT, launch

from diffusion import (
    GaussianDiffusion,
    LossSecondMomentResampler,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    UniformSampler,
    create_diffusion,
    create_named_schedule_sampler,
    get_named_beta_schedule,
    space_timesteps,
)
from verification import official
from verification.vectors import Pair

pytestmark = pytest.mark.paddle26


# -- Parity with the official code ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what",
    [official.schedule, official.distributions, official.diffusion_losses],
    ids=lambda what: what.__name__,
)
def test_numbers_are_the_official_ones(what):
    judged(what())


@paddle.no_grad()
def test_terms_of_the_bound_are_the_official_ones():
    case, diffusion = load_golden("diffusion_functions"), create_diffusion("")
    x, x_start, t, y = tensors(case, "x", "x_start", "t", "y")
    vb = diffusion._vb_terms_bpd(official_network("DiT"), x_start, x, t, model_kwargs={"y": y})["output"]
    judged(
        {
            "vb": Pair(vb, case["vb_bpd_clip1"], 6e-5, "entry", case["vb_bpd_clip1_f64run"]),
            "prior": Pair(diffusion._prior_bpd(x_start), case["prior_bpd"], 6e-5, "entry"),
            "eps": Pair(diffusion._predict_eps_from_xstart(x, t, x_start), case["eps_from_xstart"], 6e-5),
        }
    )


@pytest.mark.parametrize("promised", [False, True], ids=["", "promised"])
def test_gradients_are_the_official_ones(promised):
    judged(official.diffusion_gradients(single_backward=promised))


@pytest.mark.parametrize("name", official.DIFFUSION_SAMPLERS)
def test_sampling_loops_are_the_official_ones(name):
    judged(official.diffusion_sampler(name))


@pytest.mark.parametrize(("kind", "options"), [("p", {}), ("ddim", {}), ("ddim", {"eta": 0.5})])
def test_a_loop_draws_its_noise_once_a_step(kind, options, monkeypatch):
    """As the official one does: at eta = 0 too, where it does not matter."""
    diffusion, rng = create_diffusion("5", learn_sigma=False), np.random.default_rng(0)
    z, *noise = rng.standard_normal([6, 2, 1, 4, 4]).astype("float32")
    rest = replay(monkeypatch, "randn", [z, *noise])
    drawn = getattr(diffusion, f"{kind}_sample_loop")(lambda x, t: 0.5 * x, z.shape, **options)
    assert next(rest, None) is None
    given = iter(noise)
    options = {"noise": paddle.to_tensor(z), "draw_noise": lambda x: paddle.to_tensor(next(given)), **options}
    steps = getattr(diffusion, f"{kind}_sample_loop_progressive")(lambda x, t: 0.5 * x, z.shape, **options)
    np.testing.assert_array_equal([*steps][-1]["sample"], drawn)


# -- Schedules --------------------------------------------------------------------------------------------------------


def test_squared_cosine_schedule_follows_its_formula():
    steps = 200
    betas = get_named_beta_schedule("squaredcos_cap_v2", steps)
    level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    alphas_cumprod = GaussianDiffusion(
        betas=betas,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
    ).alphas_cumprod
    np.testing.assert_allclose(alphas_cumprod[:-1], level[1:-1] / level[0], rtol=1e-10)
    assert betas[-1] == 0.999  # capped: the formula ends in 1


def test_linear_schedule_keeps_the_noise_level_at_other_lengths():
    ends = [np.prod(1 - get_named_beta_schedule("linear", steps)) for steps in (500, 1000, 4000)]
    np.testing.assert_allclose(np.log(ends), np.log(ends[1]), rtol=0.02)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_respacing_keeps_noise_levels_and_calls_the_model_with_original_timesteps(schedule):
    whole, spaced = create_diffusion("", schedule), create_diffusion("10,5,2", schedule, learn_sigma=False)
    np.testing.assert_allclose(spaced.alphas_cumprod, whole.alphas_cumprod[spaced.timestep_map], rtol=1e-12, atol=1e-15)
    assert spaced.num_timesteps == 17
    seen = []

    def model(x, t):
        seen.append(t.tolist())
        return paddle.zeros_like(x)

    def gradient(x, t):
        seen.append(t.tolist())
        return paddle.zeros_like(x)

    x, t = paddle.randn([3, 2, 4, 4]), paddle.to_tensor([0, 7, 16])
    spaced.training_losses(model, x, t)
    spaced.p_sample(model, x, t, cond_fn=gradient)
    spaced.ddim_sample(model, x, t, cond_fn=gradient)
    spaced.ddim_reverse_sample(model, x, t)
    assert seen == [[spaced.timestep_map[i] for i in (0, 7, 16)]] * 6


def test_settings_choose_the_official_kinds():
    kinds = {
        (False, False): ModelVarType.FIXED_LARGE,
        (False, True): ModelVarType.FIXED_SMALL,
        (True, False): ModelVarType.LEARNED_RANGE,
        (True, True): ModelVarType.LEARNED_RANGE,
    }
    for (learn, small), kind in kinds.items():
        assert create_diffusion("5", learn_sigma=learn, sigma_small=small).model_var_type == kind
    assert create_diffusion("", use_kl=True, rescale_learned_sigmas=True).loss_type == LossType.RESCALED_KL
    assert create_diffusion("", rescale_learned_sigmas=True).loss_type == LossType.RESCALED_MSE
    assert create_diffusion("", predict_xstart=True).model_mean_type == ModelMeanType.START_X
    assert create_diffusion(None, diffusion_steps=50).num_timesteps == 50
    assert create_diffusion(25).timestep_map == create_diffusion("25").timestep_map
    whole = create_diffusion("")
    assert (whole.num_timesteps, whole.model_mean_type, whole.loss_type) == (1000, ModelMeanType.EPSILON, LossType.MSE)


# -- Against the definitions, in float64 ------------------------------------------------------------------------------


class Reference:
    """The definitions, written for one sample and one timestep in numpy, from the betas alone."""

    def __init__(self, diffusion):
        self.kinds = diffusion.model_mean_type, diffusion.model_var_type, diffusion.loss_type
        self.betas, self.steps = diffusion.betas, diffusion.num_timesteps
        self.level = np.cumprod(1 - self.betas)

    def posterior(self, x_start, x_t, t):
        """Bayes' rule for two Gaussians: precisions add."""
        if t == 0:
            return x_start, 0.0
        beta, before = self.betas[t], self.level[t - 1]
        variance = 1 / ((1 - beta) / beta + 1 / (1 - before))
        return variance * (np.sqrt(1 - beta) / beta * x_t + np.sqrt(before) / (1 - before) * x_start), variance

    def clipped_variance(self, t):
        return self.posterior(0.0, 0.0, max(t, 1))[1]

    def reverse(self, output, x_t, t, clip):
        """Mean, log variance and x_0 of the model's output."""
        mean_type, var_type, _ = self.kinds
        if var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            output, position = np.split(output, 2)
            low, high = np.log(self.clipped_variance(t)), np.log(self.betas[t])
            log_variance = low + (position + 1) / 2 * (high - low)
        elif var_type == ModelVarType.FIXED_SMALL:
            log_variance = np.log(self.clipped_variance(t)) + 0 * output
        else:
            log_variance = np.log(self.betas[t] if t > 0 else self.clipped_variance(1)) + 0 * output
        if mean_type == ModelMeanType.EPSILON:
            x_start = (x_t - np.sqrt(1 - self.level[t]) * output) / np.sqrt(self.level[t])
        elif mean_type == ModelMeanType.START_X:
            x_start = output
        else:  # the inverse of the posterior's mean, which is linear in x_0
            zero, one = self.posterior(0 * x_t, x_t, t)[0], self.posterior(1 + 0 * x_t, x_t, t)[0]
            x_start = (output - zero) / (one - zero)
        x_start = np.clip(x_start, -1, 1) if clip else x_start
        mean = output if mean_type == ModelMeanType.PREVIOUS_X else self.posterior(x_start, x_t, t)[0]
        return mean, log_variance, x_start

    def vb(self, output, x_start, x_t, t, clip):
        mean, log_variance, _ = self.reverse(output, x_t, t, clip)
        if t == 0:
            return -self.log_likelihood(x_start, mean, np.exp(0.5 * log_variance)).mean() / np.log(2)
        true_mean, true_variance = self.posterior(x_start, x_t, t)
        ratio = true_variance / np.exp(log_variance)
        return 0.5 * (ratio - 1 - np.log(ratio) + (true_mean - mean) ** 2 / np.exp(log_variance)).mean() / np.log(2)

    @staticmethod
    def log_likelihood(x, mean, std):
        def cdf(z):
            return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

        upper = np.where(x > 0.999, 1.0, cdf((x - mean + 1 / 255) / std))
        lower = np.where(x < -0.999, 0.0, cdf((x - mean - 1 / 255) / std))
        return np.log(np.maximum(upper - lower, 1e-12))

    def loss(self, output, x_start, noise, t):
        mean_type, var_type, loss_type = self.kinds
        x_t = np.sqrt(self.level[t]) * x_start + np.sqrt(1 - self.level[t]) * noise
        if loss_type in (LossType.KL, LossType.RESCALED_KL):
            return self.vb(output, x_start, x_t, t, clip=False) * (self.steps if loss_type != LossType.KL else 1)
        target = {
            ModelMeanType.EPSILON: noise,
            ModelMeanType.START_X: x_start,
            ModelMeanType.PREVIOUS_X: self.posterior(x_start, x_t, t)[0],
        }[mean_type]
        loss = ((output[: len(x_start)] - target) ** 2).mean()
        if var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            weight = self.steps / 1000 if loss_type == LossType.RESCALED_MSE else 1
            loss += weight * self.vb(output, x_start, x_t, t, clip=False)
        return loss


KINDS = list(itertools.product(ModelMeanType, ModelVarType, LossType))


@pytest.mark.parametrize(("mean_type", "var_type", "loss_type"), KINDS)
def test_every_kind_of_loss_and_prediction_is_its_definition(mean_type, var_type, loss_type):
    betas = get_named_beta_schedule("squaredcos_cap_v2", 60)
    diffusion = SpacedDiffusion(
        space_timesteps(60, "12"), betas=betas, model_mean_type=mean_type, model_var_type=var_type, loss_type=loss_type
    )
    reference = Reference(diffusion)
    rng = np.random.default_rng(0)
    t = np.array([0, 1, 5, 11, 0])
    x_start = rng.uniform(-1, 1, [5, 2, 3, 3])
    x_start[0, 0, 0] = [-1.0, 1.0, 0.9995]  # the outermost grey levels
    noise = rng.standard_normal(x_start.shape)
    learned = var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
    output = rng.standard_normal([5, 4 if learned else 2, 3, 3]) * 0.3
    if mean_type == ModelMeanType.START_X or mean_type == ModelMeanType.PREVIOUS_X:
        output[:, :2] += x_start

    def model(x, t):
        return paddle.to_tensor(output)

    arguments = [paddle.to_tensor(x_start), paddle.to_tensor(t)]
    losses = diffusion.training_losses(model, *arguments, noise=paddle.to_tensor(noise))
    assert set(losses) == ({"loss"} if loss_type.is_vb() else {"loss", "mse", *(["vb"] if learned else [])})
    expected = [reference.loss(*row) for row in zip(output, x_start, noise, t, strict=True)]
    np.testing.assert_allclose(losses["loss"], expected, rtol=1e-7)

    x_t = diffusion.q_sample(*arguments, paddle.to_tensor(noise))
    for clip in (False, True):
        out = diffusion.p_mean_variance(model, x_t, arguments[1], clip_denoised=clip)
        rows = [reference.reverse(*row, clip=clip) for row in zip(output, x_t.numpy(), t, strict=True)]
        for key, column in zip(("mean", "log_variance", "pred_xstart"), zip(*rows, strict=True), strict=True):
            np.testing.assert_allclose(out[key], np.stack(column), rtol=1e-7, atol=1e-9)
        variance = np.exp(np.stack([row[1] for row in rows]))
        if var_type == ModelVarType.FIXED_SMALL:
            variance[t == 0] = 0.0
        np.testing.assert_allclose(out["variance"], variance, rtol=1e-7)


@pytest.mark.parametrize("respacing", ["", "12", "ddim10"])
@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("predict_xstart", [True, False])
def test_min_snr_weights_are_their_definition(predict_xstart, learn_sigma, respacing):
    settings = {"predict_xstart": predict_xstart, "learn_sigma": learn_sigma, "rescale_learned_sigmas": True}
    plain, weighted = (create_diffusion(respacing, **settings, min_snr_gamma=gamma) for gamma in (None, 3))
    t = paddle.to_tensor([0, 1, plain.num_timesteps // 2, plain.num_timesteps - 1])
    x, noise = paddle.randn([4, 2, 3, 3]).astype("float64"), paddle.randn([4, 2, 3, 3]).astype("float64")
    output = paddle.randn([4, 4 if learn_sigma else 2, 3, 3]).astype("float64")
    losses, expected = (one.training_losses(lambda x, t: output, x, t, noise=noise) for one in (weighted, plain))
    square = plain.alphas_cumprod[t.numpy()]
    snr = square / (1 - square)
    weight = np.minimum(snr, 3) / (1 if predict_xstart else snr)
    np.testing.assert_allclose(losses["mse"], weight * expected["mse"].numpy(), rtol=1e-9)
    vb = expected["vb"].numpy() if learn_sigma else 0.0
    np.testing.assert_allclose(losses["loss"], weight * expected["mse"].numpy() + vb, rtol=1e-9)
    # The same samples, and of the same dtype as without.
    assert weighted.training_losses(lambda x, t: output.astype("float32"), x.astype("float32"), t)["loss"].dtype == (
        paddle.float32
    )


def test_min_snr_weights_are_finite_without_signal():
    kinds = {"model_var_type": ModelVarType.FIXED_SMALL, "loss_type": LossType.MSE, "min_snr_gamma": 5.0}
    for mean_type in (ModelMeanType.EPSILON, ModelMeanType.START_X):
        with np.errstate(divide="ignore"):  # the schedules of a process without signal
            diffusion = GaussianDiffusion(betas=[0.1, 0.5, 1.0], model_mean_type=mean_type, **kinds)
        x, t = paddle.randn([3, 2, 2, 2]), paddle.to_tensor([0, 1, 2])
        losses = diffusion.training_losses(lambda x, t: x * 0, x, t, noise=x)["loss"]
        np.testing.assert_allclose(losses[2], (x[2] ** 2).mean(), rtol=1e-6)  # as in the official code
        assert paddle.isfinite(losses).all()


def test_the_bound_trains_the_variance_only():
    diffusion = create_diffusion("")
    output = paddle.randn([4, 4, 3, 3])
    output.stop_gradient = False
    t = paddle.to_tensor([1, 9, 99, 999])
    losses = diffusion.training_losses(lambda x, t: output, paddle.randn([4, 2, 3, 3]), t)
    losses["vb"].sum().backward()
    for_mean, for_variance = np.split(output.grad.numpy(), 2, axis=1)
    assert (for_mean == 0).all() and (for_variance != 0).all()


def test_q_mean_variance_is_the_distribution_that_q_sample_draws_from():
    diffusion = create_diffusion("8")
    x_start, t = paddle.full([2, 3, 64, 64], 0.7), paddle.to_tensor([1, 6])
    mean, variance, log_variance = diffusion.q_mean_variance(x_start, t)
    assert mean.shape == variance.shape == log_variance.shape == x_start.shape
    x_t = diffusion.q_sample(x_start, t).numpy()
    np.testing.assert_allclose(x_t.mean((1, 2, 3)), mean[:, 0, 0, 0], atol=0.04)
    np.testing.assert_allclose(x_t.var((1, 2, 3)), variance[:, 0, 0, 0], rtol=0.06)
    np.testing.assert_allclose(paddle.exp(log_variance), variance, rtol=1e-5)


# -- Sampling ---------------------------------------------------------------------------------------------------------

DATA_STD = 0.5


def gaussian_denoiser(diffusion):
    """The exact network for data N(0, DATA_STD^2): E[eps | x_t]. The variance part says FIXED_LARGE."""
    level = paddle.to_tensor(create_diffusion("").alphas_cumprod.astype("float32"))

    def model(x, t):
        a = level.gather(t).reshape([-1, 1, 1, 1])
        eps = paddle.sqrt(1 - a) * x / (a * DATA_STD**2 + 1 - a)
        learned = diffusion.model_var_type == ModelVarType.LEARNED_RANGE
        return paddle.concat([eps, paddle.ones_like(eps)], axis=1) if learned else eps

    return model


@pytest.mark.parametrize("keywords", [{}, {"learn_sigma": False}, {"learn_sigma": False, "sigma_small": True}])
def test_ddpm_draws_the_data_distribution(keywords):
    paddle.seed(0)
    diffusion = create_diffusion("250", **keywords)
    sample = diffusion.p_sample_loop(gaussian_denoiser(diffusion), [4, 2, 32, 32], clip_denoised=False)
    assert abs(float(sample.std()) - DATA_STD) < 0.03
    assert abs(float(sample.mean())) < 0.03


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_draws_the_data_distribution(eta):
    paddle.seed(0)
    diffusion = create_diffusion("ddim250")
    sample = diffusion.ddim_sample_loop(gaussian_denoiser(diffusion), [4, 2, 32, 32], clip_denoised=False, eta=eta)
    assert abs(float(sample.std()) - DATA_STD) < 0.03


def test_reverse_ddim_encodes_and_ddim_decodes():
    paddle.seed(0)
    diffusion = create_diffusion("250")
    model = gaussian_denoiser(diffusion)
    start = x = DATA_STD * paddle.randn([2, 1, 8, 8])
    with paddle.no_grad():
        for i in range(diffusion.num_timesteps - 1):
            x = diffusion.ddim_reverse_sample(model, x, paddle.full([2], i, "int64"), clip_denoised=False)["sample"]
        # The probability flow of Gaussian data is a scaling to unit variance.
        np.testing.assert_allclose(x, start / DATA_STD, rtol=0.03)
        for i in range(diffusion.num_timesteps - 1, 0, -1):
            x = diffusion.ddim_sample(model, x, paddle.full([2], i, "int64"), clip_denoised=False)["sample"]
    np.testing.assert_allclose(x, start, rtol=0.03)


@pytest.mark.parametrize("kind", ["p", "ddim"])
def test_a_classifier_gradient_moves_the_samples(kind):
    """log p(y | x) = b x shifts N(0, s^2) to N(b s^2, s^2)."""
    paddle.seed(0)
    diffusion = create_diffusion("250", learn_sigma=False, sigma_small=True)
    slope, level = 2.0, create_diffusion("").alphas_cumprod

    def cond_fn(x, t, slope):
        # p(y | x_t): x_t is scaled data plus noise, so the gradient is that of E[x_0 | x_t] times the slope.
        a = paddle.to_tensor(level.astype("float32")).gather(t).reshape([-1, 1, 1, 1])
        return paddle.ones_like(x) * slope * paddle.sqrt(a) * DATA_STD**2 / (a * DATA_STD**2 + 1 - a)

    model = gaussian_denoiser(diffusion)
    sample = getattr(diffusion, f"{kind}_sample_loop")(
        lambda x, t, slope: model(x, t),
        [4, 1, 32, 32],
        clip_denoised=False,
        cond_fn=cond_fn,
        model_kwargs={"slope": slope},
    )
    assert abs(float(sample.mean()) - slope * DATA_STD**2) < 0.05


def test_denoised_fn_comes_before_clipping():
    diffusion = create_diffusion("", learn_sigma=False, predict_xstart=True)
    x, t = paddle.zeros([1, 1, 2, 2]), paddle.to_tensor([10])
    out = diffusion.p_mean_variance(lambda x, t: x + 0.4, x, t, denoised_fn=lambda x_start: 10 * x_start)
    assert (out["pred_xstart"] == 1.0).all()
    out = diffusion.p_mean_variance(lambda x, t: (x + 5.0, "aside"), x, t, clip_denoised=False)
    assert (out["pred_xstart"] == 5.0).all()
    assert out["extra"] == "aside"


def test_sampling_keeps_no_graph_and_leaves_gradients_on_between_steps():
    diffusion = create_diffusion("3", learn_sigma=False)
    layer = paddle.nn.Conv2D(2, 2, 1)
    steps = diffusion.p_sample_loop_progressive(lambda x, t: layer(x), (1, 2, 4, 4))
    for out in steps:
        assert out["sample"].stop_gradient
        assert not layer(out["sample"]).stop_gradient


def test_one_step_process_samples():
    diffusion = create_diffusion("1")
    assert diffusion.timestep_map == [0]
    sample = diffusion.p_sample_loop(lambda x, t: paddle.concat([0.5 * x, x], axis=1), [2, 1, 4, 4])
    assert paddle.isfinite(sample).all()


def test_progress_bar_on_request(capfd):
    diffusion = create_diffusion("3", learn_sigma=False)
    diffusion.ddim_sample_loop(lambda x, t: x, [1, 1, 2, 2])
    assert capfd.readouterr().err == ""
    diffusion.ddim_sample_loop(lambda x, t: x, [1, 1, 2, 2], progress=True)
    assert "3/3" in capfd.readouterr().err


# -- Bits per dimension -----------------------------------------------------------------------------------------------


def test_calc_bpd_loop_adds_up_its_pieces(monkeypatch):
    paddle.seed(0)
    diffusion = create_diffusion("6")
    model = gaussian_denoiser(diffusion)
    x_start = (DATA_STD * paddle.randn([3, 2, 4, 4])).clip(-1, 1)
    noise = np.random.default_rng(0).standard_normal([6, 3, 2, 4, 4]).astype("float32")
    replay(monkeypatch, "randn", noise)
    out = diffusion.calc_bpd_loop(model, x_start, clip_denoised=False)
    assert set(out) == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
    assert out["vb"].shape == out["xstart_mse"].shape == out["mse"].shape == [3, 6]
    np.testing.assert_allclose(out["total_bpd"], out["vb"].sum(1) + out["prior_bpd"], rtol=1e-6)

    kl = copy.copy(diffusion)
    kl.loss_type = LossType.KL
    for column, t in enumerate([5, 4, 3, 2, 1, 0]):  # largest timestep first
        step, eps = paddle.full([3], t, "int64"), paddle.to_tensor(noise[column])
        losses = diffusion.training_losses(model, x_start, step, noise=eps)
        np.testing.assert_allclose(out["vb"][:, column], losses["vb"], rtol=1e-4)
        np.testing.assert_allclose(out["mse"][:, column], losses["mse"], rtol=1e-3, atol=1e-6)
        kl_loss = kl.training_losses(model, x_start, step, noise=eps)
        assert set(kl_loss) == {"loss"}
        np.testing.assert_allclose(kl_loss["loss"], losses["vb"], rtol=1e-6)
        pred = diffusion.p_mean_variance(model, diffusion.q_sample(x_start, step, eps), step, clip_denoised=False)
        expected = ((pred["pred_xstart"] - x_start) ** 2).mean([1, 2, 3])
        np.testing.assert_allclose(out["xstart_mse"][:, column], expected, rtol=1e-4)


# -- Precision, devices, copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_networks_get_float32_arithmetic(half):
    diffusion = create_diffusion("")
    x, t, noise = paddle.randn([2, 2, 4, 4]), paddle.to_tensor([0, 999]), paddle.randn([2, 2, 4, 4])
    output = (paddle.randn([2, 4, 4, 4])).astype(half)
    actual = diffusion.training_losses(lambda x, t: output, x, t, noise=noise)
    expected = diffusion.training_losses(lambda x, t: output.astype("float32"), x, t, noise=noise)
    for name in expected:
        assert actual[name].dtype == paddle.float32
        assert (actual[name] == expected[name]).all()
    step = diffusion.ddim_sample(lambda x, t: output, x, t)
    assert step["sample"].dtype == step["pred_xstart"].dtype == paddle.float32

    # Half-precision data are widened before anything is computed or drawn.
    losses = diffusion.training_losses(lambda x, t: output, x.astype(half), t)
    bound = create_diffusion("2").calc_bpd_loop(lambda x, t: output, x.astype(half))
    sample = create_diffusion("2").p_sample_loop(lambda x, t: output, x.shape, noise=x.astype(half))
    assert losses["loss"].dtype == bound["total_bpd"].dtype == sample.dtype == paddle.float32


def test_arithmetic_is_shielded_from_autocast_and_the_network_is_not(monkeypatch):
    # CPUs have no autocast: a stand-in counts the regions where it would be off.
    off, seen = [], {"network": set(), "arithmetic": set()}

    @contextlib.contextmanager
    def auto_cast(enable):
        assert enable is False
        off.append(True)
        yield
        off.pop()

    def noting(kind, function):
        def wrapper(*args, **kwargs):
            seen[kind].add(bool(off))
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(paddle.amp, "auto_cast", auto_cast)
    for name in ("exp", "sqrt", "clip", "where", "stack"):
        monkeypatch.setattr(paddle, name, noting("arithmetic", getattr(paddle, name)))
    monkeypatch.setattr(paddle.Tensor, "__mul__", noting("arithmetic", paddle.Tensor.__mul__))
    monkeypatch.setattr(paddle.Tensor, "__add__", noting("arithmetic", paddle.Tensor.__add__))
    model = noting("network", lambda x, t: paddle.concat([x, x], axis=1))
    gradient = noting("network", lambda x, t: x)
    x, t = paddle.zeros([2, 1, 2, 2]), paddle.to_tensor([0, 2])
    for use_kl in (False, True):
        diffusion = create_diffusion("", use_kl=use_kl)
        diffusion.training_losses(model, x, t)
        diffusion.p_sample(model, x, t, cond_fn=gradient)
        diffusion.ddim_sample(model, x, t, cond_fn=gradient)
        diffusion.ddim_reverse_sample(model, x, t)
    create_diffusion("3").calc_bpd_loop(model, x)
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion)
    sampler.update_with_losses(*sampler.sample(4))
    assert seen == {"network": {False}, "arithmetic": {True}}


def test_hot_paths_never_wait_for_the_device(monkeypatch):
    diffusion = create_diffusion("4")
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion)
    layer = paddle.nn.Conv2D(2, 4, 1)
    x = paddle.randn([5, 2, 4, 4])

    def work():
        t, weights = sampler.sample(5)
        losses = diffusion.training_losses(lambda x, t: layer(x), x, t)
        (losses["loss"] * weights).mean().backward()
        sampler.update_with_losses(t, losses["loss"].detach())
        diffusion.p_sample_loop(lambda x, t: layer(x), x.shape)
        diffusion.ddim_sample_loop(lambda x, t: layer(x), x.shape, noise=x)

    work()  # device tables are made on first use

    def wait(*args, **kwargs):
        raise AssertionError("a tensor was read by the host, or written from it")

    for name in ("numpy", "item", "tolist", "__array__", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(paddle.Tensor, name, wait)
    monkeypatch.setattr(paddle, "to_tensor", wait)
    work()


def scale_by_t(x, t):
    return x * t.astype(x.dtype).reshape([-1, 1, 1, 1])


def test_a_used_diffusion_can_be_copied_and_pickled():
    diffusion = create_diffusion("5", learn_sigma=False)
    fresh = pickle.dumps(diffusion)
    x, t = paddle.randn([2, 1, 4, 4]), paddle.to_tensor([1, 4])
    expected = diffusion.training_losses(scale_by_t, x, t, noise=x)["loss"]
    assert pickle.dumps(diffusion) == fresh  # nothing of the device goes along
    for clone in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        actual = clone.training_losses(scale_by_t, x, t, noise=x)["loss"]
        assert (actual == expected).all()
        assert clone.timestep_map == diffusion.timestep_map


# -- Timestep samplers ------------------------------------------------------------------------------------------------


def test_uniform_sampler_draws_every_timestep_alike():
    paddle.seed(0)
    sampler = create_named_schedule_sampler("uniform", create_diffusion("10"))
    assert isinstance(sampler, UniformSampler)
    t, weights = sampler.sample(20000)
    assert t.dtype == paddle.int64
    assert (weights == 1).all()
    np.testing.assert_allclose(np.bincount(t, minlength=10) / 20000, 0.1, atol=0.01)
    sampler.update_with_losses(t, weights)
    assert sampler.state_dict() == {}


def warm(sampler, losses, repeat):
    t = paddle.arange(sampler.num_timesteps).tile([repeat])
    sampler.update_with_losses(t, paddle.to_tensor(losses, dtype="float32").tile([repeat]))


def test_loss_aware_sampler_prefers_large_losses_and_stays_unbiased():
    paddle.seed(0)
    sampler = LossSecondMomentResampler(create_diffusion("8"), uniform_prob=0.01)
    losses = np.array([9.0, 4.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.1])
    warm(sampler, losses, 9)
    assert (sampler.weights() == 1).all()  # not yet ten losses each
    warm(sampler, losses, 1)
    expected = 0.99 * losses / losses.sum() + 0.01 / 8
    np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-6)

    t, weights = sampler.sample(50000)
    assert t.dtype == paddle.int64
    assert weights.dtype == paddle.float32
    np.testing.assert_allclose(np.bincount(t, minlength=8) / 50000, expected, atol=0.01)
    np.testing.assert_allclose(weights, 1 / (8 * expected[t.numpy()]), rtol=1e-6)
    assert abs(float((weights * paddle.to_tensor(losses, dtype="float32").gather(t)).mean()) - losses.mean()) < 0.02


def test_loss_aware_sampler_remembers_the_last_losses_of_each_timestep():
    rng = np.random.default_rng(0)
    sampler = LossSecondMomentResampler(create_diffusion("4"), history_per_term=3, uniform_prob=0.0)
    history = {t: [] for t in range(4)}
    for size in (1, 40, 7, 2, 30):  # more of one timestep in a batch than are remembered, too
        t, losses = rng.integers(0, 4, size), rng.uniform(0.1, 5, size)
        losses[rng.uniform(size=size) < 0.1] = rng.choice([np.nan, np.inf])  # an overflow is not remembered
        sampler.update_with_losses(paddle.to_tensor(t), paddle.to_tensor(losses))
        for i, loss in zip(t, losses, strict=True):
            history[i] = (history[i] + [loss])[-3:] if np.isfinite(loss) else history[i]
        moments = np.array([math.sqrt(np.mean(np.square(history[i]))) if len(history[i]) == 3 else 0 for i in range(4)])
        expected = moments / moments.sum() if (moments > 0).all() else np.ones(4)
        np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-10)
    assert (moments > 0).all()


def test_loss_aware_sampler_state_survives_saving(tmp_path):
    diffusion = create_diffusion("4")
    sampler, other = (create_named_schedule_sampler("loss-second-moment", diffusion) for _ in range(2))
    warm(sampler, [1.0, 2.0, 3.0, 4.0], 13)
    paddle.save(sampler.state_dict(), str(tmp_path / "sampler.pdparams"))
    other.set_state_dict(paddle.load(str(tmp_path / "sampler.pdparams")))
    for one in (sampler, other):
        one.update_with_losses(paddle.to_tensor([0, 0]), paddle.to_tensor([7.0, 8.0]))
    np.testing.assert_array_equal(sampler.weights(), other.weights())
    wrong = create_named_schedule_sampler("loss-second-moment", create_diffusion("5"))
    with pytest.raises(ValueError, match=r"loss_history has shape \[4, 10\], expected \[5, 10\]"):
        wrong.set_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="lacks 'loss_history'"):
        other.set_state_dict({})


RANK_SCRIPT = """
import sys
import numpy as np
import paddle
from diffusion import LossSecondMomentResampler, create_diffusion
from runtime.process import leave_distributed

paddle.distributed.init_parallel_env()
rank = paddle.distributed.get_rank()
sampler = LossSecondMomentResampler(create_diffusion("2"), history_per_term=2)
sampler.update_with_losses(paddle.to_tensor([0, 1]), paddle.to_tensor([1.0 + rank, 3.0 + rank]))
np.save(sys.argv[1] + f"/{rank}.npy", sampler.weights().numpy())
both = LossSecondMomentResampler(create_diffusion("2"), history_per_term=2, ranks_per_batch=2)
for losses in ([1.0, 3.0], [2.0, 4.0]):  # the same batches on both ranks
    both.update_with_losses(paddle.to_tensor([0, 1]), paddle.to_tensor(losses))
np.save(sys.argv[1] + f"/both{rank}.npy", both.weights().numpy())
leave_distributed()
"""


@pytest.mark.distributed
def test_all_ranks_hold_the_same_loss_aware_sampler(tmp_path):
    (tmp_path / "rank.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + RANK_SCRIPT)
    done = launch(2, tmp_path / "rank.py", [tmp_path], tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    moments = np.sqrt([(1**2 + 2**2) / 2, (3**2 + 4**2) / 2])
    for rank in range(2):
        expected = 0.999 * moments / moments.sum() + 0.001 / 2
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), expected, rtol=1e-6)
        np.testing.assert_allclose(np.load(tmp_path / f"both{rank}.npy"), expected, rtol=1e-6)


# -- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timestep_respacing": "25 steps"}, "'25 steps' is not understood; accepted: .*'ddimN'"),
        ({"timestep_respacing": "ddim"}, "'ddim' is not understood"),
        ({"timestep_respacing": "ddim2x"}, "'ddim2x' is not understood"),
        ({"timestep_respacing": "-5"}, "'-5' is not understood"),
        ({"timestep_respacing": "0"}, "'0' is not understood"),
        ({"timestep_respacing": []}, r"\[\] is not understood"),
        ({"timestep_respacing": 2.5}, "2.5 is not understood"),
        ({"timestep_respacing": "ddim333"}, "no integer stride takes exactly 333 of 1000"),
        ({"timestep_respacing": "2000"}, "section 1 has 1000 of the 1000 steps, 2000 can't be taken"),
        ({"timestep_respacing": "10,600"}, "section 2 has 500"),
        ({"timestep_respacing": "", "noise_schedule": "cosine"}, "'cosine'; accepted: linear, squaredcos_cap_v2"),
        ({"timestep_respacing": "", "diffusion_steps": 0}, "positive integer, got 0"),
        ({"timestep_respacing": "", "diffusion_steps": 10}, "needs more than 20"),
        ({"timestep_respacing": "", "learn_sigma": "no"}, "learn_sigma='no': expected True or False"),
        ({"timestep_respacing": "", "min_snr_gamma": 0}, "min_snr_gamma=0: expected None or a number above 0"),
        ({"timestep_respacing": "", "min_snr_gamma": True}, "min_snr_gamma=True: expected None or a number"),
        ({"timestep_respacing": "", "min_snr_gamma": 5, "use_kl": True}, "use_kl replaces; give one of them"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        create_diffusion(**arguments)
    assert "\n" not in str(error.value)


def test_wrong_uses_are_named():
    learned, fixed = create_diffusion("5"), create_diffusion("5", learn_sigma=False)
    x, t = paddle.zeros([2, 3, 4, 4]), paddle.to_tensor([0, 1])
    with pytest.raises(ValueError, match=r"returned shape \[2, 3, 4, 4\], expected \[2, 6, 4, 4\].*learn_sigma=True"):
        learned.training_losses(lambda x, t: x, x, t)
    with pytest.raises(ValueError, match=r"expected \[2, 3, 4, 4\].*learn_sigma=False"):
        fixed.p_sample(lambda x, t: paddle.concat([x, x], axis=1), x, t)
    with pytest.raises(ValueError, match=r"t has shape \[1\], expected \[2\]"):
        fixed.training_losses(lambda x, t: x, x, t[:1])
    with pytest.raises(ValueError, match=r"noise has shape \[1, 3, 4, 4\], x_start \[2, 3, 4, 4\]"):
        fixed.training_losses(lambda x, t: x, x, t, noise=x[:1])
    with pytest.raises(ValueError, match=r"noise has shape \[2, 3, 4, 4\], expected \[1, 3, 4, 4\]"):
        fixed.p_sample_loop(lambda x, t: x, [1, 3, 4, 4], noise=x)
    with pytest.raises(ValueError, match="eta=1.5 must lie between"):
        fixed.ddim_sample_loop(lambda x, t: x, x.shape, eta=1.5)
    with pytest.raises(ValueError, match="reverse DDIM is deterministic"):
        fixed.ddim_reverse_sample(lambda x, t: x, x, t, eta=0.5)
    with pytest.raises(ValueError, match="'npu:7' is not Paddle's current device"):
        fixed.p_sample_loop(lambda x, t: x, x.shape, device="npu:7")
    with pytest.raises(ValueError, match="accepted: uniform, loss-second-moment"):
        create_named_schedule_sampler("loss", fixed)
    with pytest.raises(ValueError, match="accepted: LossType.MSE"):
        GaussianDiffusion(
            betas=[0.1], model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.LEARNED, loss_type="mse"
        )
    with pytest.raises(ValueError, match=r"every beta must lie in \(0, 1\]"):
        GaussianDiffusion(
            betas=[0.1, 2.0],
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.LEARNED,
            loss_type=LossType.MSE,
        )
