"""From noise to images: guidance, latent decoding, grids, and the export of DiT to a ppdiffusers pipeline.

Import what you need from the modules; this package itself imports nothing, so that `ppdiffusers` is loaded where it is
used and nowhere else.
"""
