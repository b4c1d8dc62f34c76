"""From noise to images: guidance, latent decoding, grids, pipelines, and the export to folders that ppdiffusers loads.

Import what you need from the modules; this package itself imports nothing, so that `ppdiffusers` is loaded where it is
used and nowhere else: `from sampling import SiTPipeline` loads it, `import sampling` does not.
"""

__all__ = ["SiTPipeline"]


def __getattr__(name):
    if name in __all__:
        from sampling.sit_pipeline import SiTPipeline

        return SiTPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
