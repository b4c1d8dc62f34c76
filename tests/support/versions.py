"""Which Paddle the tests run with: for what an old one can't do, or does wrongly."""

import paddle

PADDLE_2 = paddle.__version__.startswith("2.")
