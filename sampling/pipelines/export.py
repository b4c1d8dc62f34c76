"""Export of networks as folders that the stock `ppdiffusers.DiTPipeline` loads, whichever network it is."""

import numpy as np

from features.autoencoder import fold_scaling
from models.state import check_state, expected_shapes
from sampling.pipelines import export_dit, export_large_dit, export_sit
from sampling.pipelines.folder import check_id2label, check_output, check_vae, write_pipeline


def exporter(config):
    """Returns the module that exports a config's network.

    Its `check(config)` raises ValueError where there is no export, and returns the stock transformer's keywords. Its
    `convert(config, state, source, ...)` returns the network and its scheduler as keywords of `write_pipeline`, and
    sentences that a user should read: what the exported pipeline does differently.
    """
    if config["model"]["type"] == "LargeDiT":
        return export_large_dit
    return export_sit if config["objective"]["type"] == "transport" else export_dit


def export_pipeline(
    config,
    state,
    vae,
    output_dir,
    *,
    id2label=None,
    overwrite=False,
    safe_serialization=False,
    source="weights",
    **options,
):
    """Writes a DiT, a Large-DiT or a SiT and a VAE as a stock `DiTPipeline` folder, which is complete or not there.

    Args:
        config: resolved; what its `features` section knows goes along.
        state: `{name: array or tensor}`, Paddle layout. vae: an `AutoencoderKL`.
        id2label: `{class id: label}`; None names the classes by their numbers.
        overwrite: replace `output_dir` if it is a pipeline folder.
        safe_serialization: write the weights as `.safetensors`, not `.pdparams`.
        source: where the weights come from, for messages. options: of the exporter's `convert`.

    It returns sentences for the user: what the exported pipeline does differently. A model that can't be
    exported, weights that don't fit, and an output that is in the way are a `ValueError` of one line.
    """
    model, network = config["model"], exporter(config)
    network.check(config)
    labels = check_id2label(id2label, model["num_classes"])
    check_output(output_dir, overwrite)
    check_vae(vae, model["in_channels"])
    state = {name: np.asarray(value, "float32") for name, value in state.items()}
    check_state(state, expected_shapes(model), source=source)
    stock, notes = network.convert(config, state, source, **options)
    files = {"overwrite": overwrite, "safe_serialization": safe_serialization, "features": config["features"]}
    write_pipeline(output_dir, pipeline="DiTPipeline", vae=fold_scaling(vae), labels=labels, **stock, **files)
    return notes
