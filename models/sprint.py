"""What SPRINT adds to a network: a dense and a sparse path around its middle blocks, and their fusion.

From the paper (Park et al., arXiv:2510.21986): the first blocks see all tokens. The middle ones, the deep path, see in
training a quarter of them; a learned mask token stands for the others. A linear layer of both paths, side by side,
makes the tokens of the last blocks. Now and then a sample goes without its deep path (path-drop learning). Sampling
and a last, short part of the training run all tokens.

This project's own: the initialisation, see `Sprint`, and that the deep path of a sample that goes without it is
computed all the same, so that all samples have one shape.
"""

import numpy as np
import paddle
from paddle import nn

from .parallel import linear


class Sprint(nn.Layer):
    """Tokens before and after the middle blocks, dense `(N, T, D)` and deep `(N, T or K, D)` -> tokens `(N, T, D)`.

    It begins as `dense`: the fusion is the identity of the dense path and 0 of the deep one, bias and mask token are 0.
    That is adaLN-Zero's way, by which the middle blocks begin as the identity, too: at the start a network with
    `sprint_blocks` computes what one without does. No random numbers are drawn, so the other weights are the same.
    """

    def __init__(self, hidden_size):
        super().__init__()
        zeros = nn.initializer.Constant(0.0)
        self.mask_token = self.create_parameter([hidden_size], default_initializer=zeros)
        self.fusion = linear(2 * hidden_size, hidden_size)
        identity = np.eye(2 * hidden_size, hidden_size, dtype="float32")
        nn.initializer.Assign(identity)(self.fusion.weight)

    def forward(self, dense, deep, routing=None):
        """Fuses both paths; `routing`: the `hooks.Routing` that dropped tokens of the deep one, None if none did."""
        mask = self.mask_token.astype(deep.dtype)
        if routing is not None:
            if routing.path_dropped is not None:
                dropped = routing.path_dropped.astype("bool").reshape([-1, 1, 1])
                deep = paddle.where(dropped, mask.expand(deep.shape), deep)
            deep = routing.put_back(deep, mask.expand(dense.shape))
        fused = self.fusion(paddle.concat([dense.astype(deep.dtype), deep], axis=-1))
        if routing is None and self.training:
            # Data parallelism waits for the gradient of every parameter.
            fused = fused + 0 * mask.astype(fused.dtype)
        return fused.astype(dense.dtype)
