"""Classifier-free guidance of a network's output (Ho and Salimans 2022), written once."""

import paddle


def combine_guidance(cond, uncond, cfg_scale, channels=None):
    """Returns `uncond + cfg_scale * (cond - uncond)` on the first `channels` channels, `cond` on the others.

    The official DiT and SiT guide the first three latent channels only, "for exact reproducibility" of their figures;
    ppdiffusers' pipelines guide them all.

    Args:
        cond, uncond: network outputs `(N, C, H, W)` with and without the class.
        cfg_scale: guidance scale, 1 for none; a number or a tensor that broadcasts.
        channels: how many leading channels are guided, None for all of `cond`'s.
    """
    if channels is None or channels >= cond.shape[1]:
        return uncond + cfg_scale * (cond - uncond)
    guided = uncond[:, :channels] + cfg_scale * (cond[:, :channels] - uncond[:, :channels])
    return paddle.concat([guided, cond[:, channels:]], axis=1)
