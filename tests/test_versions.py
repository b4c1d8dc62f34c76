"""What `runtime.paddle_private` and the mathematics do where Paddle 2.6 and Paddle 3 differ: the same on both."""

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional as F
from support.runs import command_environment

from diffusion import create_diffusion, create_named_schedule_sampler
from diffusion.diffusion_utils import discretized_gaussian_log_likelihood
from models.attention import scaled_dot_product
from runtime import paddle_private
from runtime.precision import cast_layer
from runtime.programs import Program
from transport import integrators

pytestmark = pytest.mark.paddle26


@pytest.mark.parametrize(
    "dtype, numbers",
    [
        # Spacing 2^-10 from 1 to 2; of two that are equally near, the even one. 65504 is the largest.
        (
            "float16",
            {1 + 1.5 * 2**-11: 1 + 2**-10, 1 + 2**-11: 1, -1 - 1.5 * 2**-11: -1 - 2**-10, 65519: 65504, 1e9: np.inf},
        ),
        # Spacing 2^-7.
        (
            "bfloat16",
            {1 + 1.5 * 2**-8: 1 + 2**-7, 1 + 2**-8: 1, 1 + 3 * 2**-8: 1 + 2**-6, -1 - 1.5 * 2**-8: -1 - 2**-7},
        ),
    ],
)
def test_weights_are_rounded_to_the_nearest_number_of_half_precision(dtype, numbers):
    numbers = np.float32([*numbers.items(), (-np.inf, -np.inf), (np.nan, np.nan)])
    layer = nn.Linear(len(numbers), 1)
    layer.weight.set_value(numbers[:, :1])
    cast_layer(layer, dtype)
    assert dtype in str(layer.weight.dtype) and dtype in str(layer.bias.dtype)
    np.testing.assert_array_equal(layer.weight.astype("float32").numpy(), numbers[:, 1:])


@pytest.mark.parametrize(
    "dtype, head_dim, capability, fits",
    [
        ("bfloat16", 64, (8, 0), True),
        ("float16", 72, (9, 0), True),
        ("float32", 64, (8, 0), False),
        ("float16", 64, (7, 5), False),
        ("float16", 20, (8, 0), False),
    ],
)
def test_fused_attention_is_plain_where_the_only_kernel_does_not_fit(monkeypatch, dtype, head_dim, capability, fits):
    """A Paddle that takes FlashAttention for whatever lies on a GPU, like 2.6."""
    monkeypatch.delattr(F, "sdpa", raising=False)
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: "FlashAttention")
    q = paddle.randn([1, 4, 2, head_dim])
    if dtype != "float32":  # products of half precision are a GPU's
        assert paddle_private.fused_attention_fits(q.astype(dtype)) == fits
        return
    expected = scaled_dot_product(q, q, q, F.softmax, fused=False)
    np.testing.assert_array_equal(scaled_dot_product(q, q, q, F.softmax, fused=True), expected)


def test_fused_attention_is_paddles_own_on_a_cpu(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: "Paddle's")
    q = paddle.randn([1, 4, 2, 8])
    assert scaled_dot_product(q, q, q, F.softmax, fused=True) == "Paddle's"


def test_an_argument_that_this_paddlenlp_lacks():
    @dataclass
    class Old:
        seed: int

    @dataclass
    class New(Old):
        ddp_find_unused_parameters: bool = True

    flag = "ddp_find_unused_parameters"
    assert paddle_private.trainer_arguments(New, {"seed": 1, flag: False}) == New(1, False)
    assert paddle_private.trainer_arguments(Old, {"seed": 1, flag: False}) == Old(1)
    with pytest.raises(ValueError, match="^--ddp_find_unused_parameters True: this PaddleNLP does not have it$"):
        paddle_private.trainer_arguments(Old, {"seed": 1, flag: True})


def test_a_program_of_paddle_3_is_refused_by_paddle_2(monkeypatch, tmp_path):
    """Which would crash."""
    monkeypatch.setattr(paddle.inference, "Config", SimpleNamespace())
    with pytest.raises(
        ValueError, match="model.json: a program of Paddle 3, which Paddle .* can't load; export it anew"
    ):
        Program(str(tmp_path / "model.json"), "cpu")


def test_commands_can_compress():
    """As an image is when it is saved."""
    code = (
        "from runtime.process import configure_runtime\nconfigure_runtime()\n"
        "import paddle, zlib\nzlib.compress(bytes(range(256)) * 4000)"
    )
    environment = {**command_environment(), "GLOG_minloglevel": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# Numbers that Paddle 2.6 gets wrong without a word.


@pytest.mark.parametrize("first", [0, 1])
def test_nan_in_one_tensor_of_a_state_is_no_accepted_step(first):
    """Whichever of the two it is in."""

    def drift(t, state):
        slopes = [paddle.zeros([2]), paddle.zeros([2]) * (float("nan") if t > 0 else 1.0)]
        return tuple(slopes if first else reversed(slopes))

    with pytest.raises(ValueError, match="dopri5: the step shrank to .*: the model's output is not finite there"):
        list(integrators.dopri5(drift, (paddle.zeros([2]), paddle.zeros([2])), [0.0, 1.0], 1e-6, 1e-3))


def test_numbers_are_added_to_float64_in_float64():
    sampler = create_named_schedule_sampler("loss-second-moment", create_diffusion("4"), history_per_term=1)
    losses = np.array([1.0, 2.0, 3.0, 10.0])
    sampler.update_with_losses(paddle.arange(4), paddle.to_tensor(losses))
    np.testing.assert_allclose(sampler.weights(), 0.999 * losses / losses.sum() + 0.001 / 4, rtol=1e-14)

    x = paddle.zeros([1], dtype="float64")
    found = discretized_gaussian_log_likelihood(x, means=x, log_scales=x)
    inner = np.sqrt(2 / np.pi) * (1 / 255 + 0.044715 / 255**3)
    np.testing.assert_allclose(found, np.log(np.tanh(inner)), rtol=1e-12)
