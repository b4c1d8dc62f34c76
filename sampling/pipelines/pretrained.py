"""Pipelines and autoencoders from folders and from the hub. Nothing that they hold is run, no name in them imported.

Only the classes of the tables below are made, whatever ppdiffusers' own `from_pretrained` would run for a folder (see
`weights.pretrained`). Its code is not run either, not even that which `sampling.pipelines.export_large_dit` puts there:
this project has it already.
"""

from config.options import CLASS_NAMES
from runtime.untrusted import read_json_object
from sampling.pipelines.folder import component_class, read_index
from sampling.step_counts import FIT_KEY, is_timestep_fit
from weights.pretrained import explained, find_file, load_model, read_settings, refused_settings

NULL_CLASS = 1000  # of the stock DiTPipeline
# What model_index.json and the transformer's config.json may name: of a DiT, the second is diffusers' name for the same
# settings and weights; of a Large-DiT.
DIT_TRANSFORMERS = ("Transformer2DModel", "DiTTransformer2DModel")
LARGE_DIT_TRANSFORMERS = ("DiTLLaMA2DModel", "LargeDiTTransformer")
SCHEDULERS = (
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler"),
    *("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler"),
    *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "IPNDMScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
)
# Classes that a folder may name for each component; nothing is imported by a name that stands in a file.
COMPONENTS = {
    "transformer": (*DIT_TRANSFORMERS, *LARGE_DIT_TRANSFORMERS),
    "scheduler": SCHEDULERS,
    "vae": ("AutoencoderKL",),
}
is_id2label = CLASS_NAMES.accepts  # whether a value of a JSON file is {"0": label, ...}


def load_scheduler(kind, name_or_path):
    """Reads scheduler/scheduler_config.json and returns the ppdiffusers scheduler of that class name."""
    import ppdiffusers

    settings, path = read_settings(name_or_path, "scheduler_config.json", "scheduler")
    try:
        return getattr(ppdiffusers, kind).from_config(settings)
    except Exception as error:  # whatever odd settings make a constructor say
        raise refused_settings(path, kind, error) from None


def load_dit_pipeline(name_or_path, dtype=None):
    """Loads a folder of a DiTPipeline, or a name on the hub: network and VAE in `dtype`, or float32.

    The transformer of a Large-DiT is our own class, whatever the folder names: ppdiffusers' gives other numbers (see
    `sampling.pipelines.export_large_dit`). The pipeline's `id2label` is `{id: label}`, perhaps empty.

    What a folder lacks, or a download that failed, is a `ValueError` of one line.
    """
    from ppdiffusers import AutoencoderKL, DiTPipeline, Transformer2DModel

    from sampling.pipelines.large_dit_transformer import LargeDiTTransformer

    folders = "one copied from a machine that has a network, or one that tools/convert_dit_to_ppdiffusers.py wrote"
    with explained(name_or_path, f"give a folder by --model_path: {folders}"):
        path = find_file(name_or_path, "model_index.json")
        index = read_index(path, COMPONENTS)
        labels = index.get("id2label") or {}
        if not is_id2label(labels):
            raise ValueError(f'{path}: id2label: expected {{"0": "name", ...}}')
        kinds, network = DIT_TRANSFORMERS, Transformer2DModel
        if component_class(index, "transformer") in LARGE_DIT_TRANSFORMERS:
            kinds, network = LARGE_DIT_TRANSFORMERS, LargeDiTTransformer
        transformer = load_model(network, name_or_path, "transformer", class_names=kinds, dtype=dtype)
        vae = load_model(AutoencoderKL, name_or_path, "vae", dtype=dtype)
        # A DiTPipeline decodes latents / scaling_factor, whatever else a VAE's config says.
        vae.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)
        scheduler = load_scheduler(component_class(index, "scheduler"), name_or_path)
        pipe = DiTPipeline(transformer, vae, scheduler, labels or None)
        pipe.id2label = {int(key): label for key, label in labels.items()}
        return pipe


def read_timestep_fit(name_or_path):
    """Reads in which numbers of steps a DiTPipeline's timestep embedding is exact, see `sampling.step_counts`."""
    path = find_file(name_or_path, "config.json", "transformer")
    fit = read_json_object(path, infinity=True).get(FIT_KEY)
    if not is_timestep_fit(fit):
        raise ValueError(f'{path}: {FIT_KEY}: expected {{"ddim": numbers of steps, "dpm": numbers of steps}}')
    return fit


def has_null_class(transformer):
    """Returns whether a DiTPipeline's transformer has a null class: the exporter writes NaN where there is none."""
    large = hasattr(transformer, "y_embedder")
    embedder = transformer.y_embedder if large else transformer.transformer_blocks[0].norm1.emb.class_embedder
    return bool(embedder.embedding_table.weight[-1].isfinite().all())
