"""LightningDiT: DiT with the block of today's language models (Yao et al. 2025, arXiv:2501.01423), for a `transport`.

Against SiT: SwiGLU, RMS norms, and rotary positions of the grid beside DiT's fixed table. It is a SiT with the switches
of `DiT` set so. Parameter names are those of the official code, whose buffers `feat_rope.*` are computed here.
"""

from .sit import SiT


class LightningDiT(SiT):
    """SiT with LightningDiT's switches on; its arguments, and its initialisation, are those of `DiT`.

    `qk_norm` is off in the published models. Training without it can end in numbers that are not finite after some
    200 epochs, as users of the official code report: switch it on for long runs in half precision.
    """

    def __init__(
        self,
        sample_size=16,
        patch_size=1,
        in_channels=32,
        *,
        learn_sigma=False,
        swiglu=True,
        rope=True,
        rms_norm=True,
        **keywords,
    ):
        switches = {"learn_sigma": learn_sigma, "swiglu": swiglu, "rope": rope, "rms_norm": rms_norm}
        super().__init__(sample_size, patch_size, in_channels, **switches, **keywords)
