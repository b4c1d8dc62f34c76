"""Every option of a run, once: default, check, help, flag. Standard library only.

The checks of JSON files (`config.schema`), both command lines (`config.flags`) and docs/configs.md are made from the
tables below, and of `config.run_flags`: a new option is one entry here, and its use.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from config.checks import (
    ABOVE_0,
    BELOW_1,
    BELOW_HALF,
    BLOCK,
    BLOCKS,
    BOOL,
    CHANNELS,
    CLASS_NAMES,
    FACTOR,
    FROM_0,
    FROM_0_TO_1,
    INT_FROM_0,
    INT_FROM_2,
    INT_FROM_4,
    INTERVAL,
    LABELS,
    LIST,
    NUMBER,
    OBJECT,
    POSITIVE_INT,
    SEED,
    SHARE,
    STEPS,
    TEXT,
    WIDTHS,
    Check,
    null_or,
    one_of,
    or_null,
    or_one_a_channel,
    some_of,
)
from config.checks import MAX_SEED as MAX_SEED
from config.names import OTHER_NAMES

REQUIRED = object()  # the default of a key that has none
DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"  # of latents that nothing is known of
SIT_VAE = "stabilityai/sd-vae-ft-ema"  # the same of a SiT's, as in the official code
DEFAULT_VAE_SHAPE = {"latent_channels": 4, "downsampling": 8}  # of both
# So that others are refused before a download.
DEFAULT_VAE_CHANNELS = dict.fromkeys((DEFAULT_VAE, SIT_VAE), DEFAULT_VAE_SHAPE["latent_channels"])
GUIDANCE_SCALE = 4.0  # of demos, as in PaddleMIX's and the official sample.py
GENTLE_GUIDANCE_SCALE = 1.5  # of a model that is young, or saw few images: 4 burns its images


def starting_guidance_scale(num_classes, has_null_class=True):
    """Returns the guidance scale for a model's first images: gentle, but for ImageNet's; 1 without a null class."""
    if not has_null_class:
        return 1.0
    return GUIDANCE_SCALE if num_classes >= 1000 else GENTLE_GUIDANCE_SCALE


def first_images_flags(model):
    """Lists the words of a demo's command line for the first images of a network, a resolved `model` section."""
    scale = starting_guidance_scale(model["num_classes"], model["class_dropout_prob"] > 0)
    rows = [] if model["num_classes"] >= 1000 else ["--images_per_class", "4"]  # of the first ten classes
    return ["--guidance_scale", f"{scale:g}", *rows]


# ---- What an option is ----


class PerLoop(NamedTuple):
    """A value that differs between the Trainer's command line and that of the hand-written loop."""

    trainer: Any
    notrainer: Any


@dataclass(frozen=True)
class Option:
    """A key of a config's section, which may also be given by a flag."""

    default: Any  # taken where neither the command line nor the JSON gives a value
    check: Check
    help: Any = ""  # one phrase, for `--help` and docs/configs.md
    flag: Any = None  # its name on the command line, a `PerLoop` where the loops differ; True: the key's own
    unset: Any = ""  # says what a default of None means
    aliases: Any = ()  # hidden names of the flag, beside `OTHER_NAMES`; a `PerLoop` where the loops differ
    training_only: bool = False  # it changes how a network is trained, but not what a sampler makes of the network

    def flag_in(self, loop, name):
        """Returns the flag of the option `name` in a loop, "trainer" or "notrainer", without dashes; None: no flag."""
        flag = in_loop(self.flag, loop)
        return name if flag is True else flag

    def other_names(self, loop, name):
        """Returns the hidden names of the same flag, without dashes."""
        flag = self.flag_in(loop, name)
        return [] if flag is None else [*in_loop(self.aliases, loop), *OTHER_NAMES.get(flag, ())]


@dataclass(frozen=True)
class Flag(Option):
    """A setting of the command line alone; default, help and name may be a `PerLoop`."""

    flag: Any = True
    twin: str = None  # for a flag of one loop alone: the flag that the other loop has in its place


TRAINER, NOTRAINER = PerLoop(True, None), PerLoop(None, True)  # a flag of one loop alone


def in_loop(value, loop):
    """Returns the loop's own value of a `PerLoop`, and anything else as it is."""
    return getattr(value, loop) if isinstance(value, PerLoop) else value


# ---- The section `model` ----

_TRANSFORMER = {
    "sample_size": Option(
        REQUIRED, POSITIVE_INT, "height and width of the latents: the image's over the autoencoder's factor"
    ),
    "patch_size": Option(REQUIRED, POSITIVE_INT, "height and width of a patch; divides `sample_size`"),
    "in_channels": Option(4, POSITIVE_INT, "channels of the latents, as many as the autoencoder's"),
    "num_layers": Option(REQUIRED, POSITIVE_INT, "transformer blocks"),
    "num_attention_heads": Option(REQUIRED, POSITIVE_INT, "heads of a block's attention"),
    "attention_head_dim": Option(REQUIRED, POSITIVE_INT, "width of a head; the network's width is heads x this"),
    "sprint_blocks": Option(
        None, or_null(BLOCKS), "SPRINT: blocks that are fused with a path around them", unset="none"
    ),
}
_CLASSES = {
    "num_classes": Option(1000, POSITIVE_INT, "classes; the null class is the label after the last"),
    "class_dropout_prob": Option(0.1, BELOW_1, "share of labels dropped in training; 0: no null class, no guidance"),
    "learn_sigma": Option(True, BOOL, "twice the output channels: DiT learns the variance with them, SiT drops them"),
}
_MLP_RATIO = Option(4.0, ABOVE_0, "width of the MLP over the network's; of SwiGLU's 2/3 are taken")
SWITCHES = {
    # Without it, LightningDiT's users report NaN after some 200 epochs.
    "qk_norm": Option(False, BOOL, "norms of queries and keys in each head: long runs without may end in NaN"),
    "swiglu": Option(False, BOOL, "SwiGLU in place of the MLP with GELU"),
    "rope": Option(False, BOOL, "rotary positions of the grid, beside the table of positions"),
    "rms_norm": Option(False, BOOL, "RMS norms with weights in place of layer norms without"),
    "adaln_shift": Option(True, BOOL, "blocks are modulated by shifts, beside scales and gates"),
}
DIT_KEYS = {**_TRANSFORMER, "mlp_ratio": _MLP_RATIO, **_CLASSES, **SWITCHES}
LIGHTNING_DIT_KEYS = {
    **DIT_KEYS,
    "learn_sigma": replace(_CLASSES["learn_sigma"], default=False),
    **{name: replace(SWITCHES[name], default=True) for name in ("swiglu", "rope", "rms_norm")},
}
LARGE_DIT_KEYS = {
    **_TRANSFORMER,
    **_CLASSES,
    "qk_norm": Option(False, BOOL, "layer norms of queries and keys"),
    "num_kv_heads": Option(None, or_null(POSITIVE_INT), "heads of keys and values", unset="as many as heads"),
    "multiple_of": Option(256, POSITIVE_INT, "the MLP's width is rounded up to a multiple of this"),
    "ffn_dim_multiplier": Option(None, or_null(ABOVE_0), "factor of the MLP's width", unset="1"),
    "norm_eps": Option(1e-5, ABOVE_0, "epsilon of the RMS norms"),
}


# ---- The section `objective` ----

VELOCITY_LOSS = ("velocity", "x1")  # predictions that are trained by the error of the velocity
_EPS, _WEIGHTS = or_null(BELOW_HALF), or_null(one_of("velocity", "likelihood"))
_REGULARIZERS = Option([], LIST, "losses to add: objects with `type`, `weight`, ...", training_only=True)
OBJECTIVE_KEYS = {
    "diffusion": {
        "noise_schedule": Option("linear", one_of("linear", "squaredcos_cap_v2"), "betas of the diffusion"),
        "diffusion_steps": Option(1000, POSITIVE_INT, "timesteps of the diffusion"),
        "predict_xstart": Option(False, BOOL, "the network predicts the clean latents, not the noise"),
        "sigma_small": Option(False, BOOL, "without `learn_sigma`: the smaller of the two fixed variances"),
        "use_kl": Option(False, BOOL, "train by the variational bound, not the squared error", training_only=True),
        "rescale_learned_sigmas": Option(False, BOOL, "scale the bound's part of the loss", training_only=True),
        "min_snr_gamma": Option(
            None,
            or_null(ABOVE_0),
            "gamma of min-SNR weights of the squared error; 5 in the paper",
            unset="no weights",
            training_only=True,
        ),
        "timestep_sampler": Option(
            "uniform", one_of("uniform", "loss-second-moment"), "how timesteps are drawn", training_only=True
        ),
        "regularizers": _REGULARIZERS,
    },
    "transport": {
        "path_type": Option("Linear", one_of("Linear", "GVP", "VP"), "path from noise to data", True),
        "prediction": Option("velocity", one_of("velocity", "noise", "score", "x1"), "what the network predicts", True),
        # With velocity and x1, the weight and, off VP, both distances have no effect, officially so with velocity.
        "loss_weight": Option(
            None, _WEIGHTS, "weight of the loss over time, of noise and score", True, "none", training_only=True
        ),
        "train_eps": Option(
            None, _EPS, "training's distance to the ends of time, if VP, noise or score", True, "by path"
        ),
        "sample_eps": Option(None, _EPS, "the same in sampling", True, "by path"),
        "t_eps": Option(0.05, SHARE, "of x1: the velocity's denominator 1 - t is this at least, in sampling too", True),
        # Beyond the official code: SD3's and LightningDiT's timesteps, LightningDiT's direction loss.
        "timestep_sampling": Option(
            "uniform", one_of("uniform", "logit-normal"), "how training draws times", training_only=True
        ),
        "logit_mean": Option(0.0, NUMBER, "mean of the logits of logit-normal times", training_only=True),
        "logit_std": Option(1.0, ABOVE_0, "standard deviation of these logits", training_only=True),
        "timestep_shift": Option(
            0.0, FROM_0, "moves the drawn times: below 1 towards the noise; 0: none", training_only=True
        ),
        "cosine_loss": Option(False, BOOL, "add 1 - cos of predicted and true velocity", training_only=True),
        "regularizers": _REGULARIZERS,
    },
}
# Regularizers by their `type`, with the weights of the official codes; docs/recipes.md says what each of them does.
_BLOCK = Option(REQUIRED, BLOCK, "block behind which the tokens are taken, from 1 on; -1 is the last")
REGULARIZER_KEYS = {
    "layer_sync": {
        "weight": Option(0.2, FROM_0, "factor in the loss"),
        "block": _BLOCK,
        "target_block": replace(_BLOCK, help="block towards whose tokens they are pulled"),
    },
    "latent_alignment": {"weight": Option(1.0, FROM_0, "factor in the loss"), "block": _BLOCK},
    "internal_guidance": {"weight": Option(0.5, FROM_0, "factor in the loss"), "block": _BLOCK},
    "dispersive": {
        "weight": Option(0.25, FROM_0, "factor in the loss"),
        "block": replace(_BLOCK, default=-1),
        "temperature": Option(1.0, ABOVE_0, "distances are divided by it"),
        "group": Option(32, INT_FROM_2, "samples that are compared: so many in a row of the global batch"),
    },
    "contrastive": {
        "weight": Option(0.05, FROM_0, "factor of what is taken off the loss"),
        "group": Option(2, INT_FROM_2, "samples among which partners are, as in dispersive"),
    },
    "representation_alignment": {
        "weight": Option(0.5, FROM_0, "factor in the loss"),
        "block": _BLOCK,
        "width": Option(None, or_null(POSITIVE_INT), "width of the encoder's features", unset="as the set has them"),
        "inner_width": Option(2048, POSITIVE_INT, "inner width of its MLP"),
    },
}


# ---- The section `training` ----

_FUSED = "enable_xformers_memory_efficient_attention"  # PaddleMIX's name
AVERAGES_PRECISION_KEYS = {
    "use_ema": Option(True, BOOL, "keep an exponential moving average of the weights", True),
    "ema_decay": Option(0.9999, BELOW_1, "decay of the average", True),
    "ema_warmup": Option(False, BOOL, "let the decay grow from 0.1 in the first updates", True),
    "ema_profiles": Option([], WIDTHS, "post-hoc EMA: relative widths of further averages, such as 0.05 and 0.1", True),
    "ema_snapshot_steps": Option(5000, POSITIVE_INT, "steps between snapshots of these averages", True),
    "ema_snapshot_dtype": Option("float16", one_of("float16", "float32"), "their type in a snapshot", True),
    "ema_update_steps": Option(1, POSITIVE_INT, "steps between their updates", True),
    "ema_on_host": Option(False, BOOL, "keep them in the host's memory", True),
    "recompute": Option(False, BOOL, "recompute blocks in the backward pass: less memory, same gradients", True),
    "amp_dtype": Option("float32", one_of("float32", "float16", "bfloat16"), "precision; flags `--bf16`, `--fp16`"),
    "amp_level": Option(
        "O1", one_of("O1", "O2"), "O1: float32 weights; O2: half, float32 masters", True, aliases=("fp16_opt_level",)
    ),
    "fused_attention": Option(
        False, BOOL, "fused attention where device and dtype allow it; same numbers", True, aliases=(_FUSED,)
    ),
}
_SCHEDULES = one_of("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
OPTIMIZER_KEYS = {  # the defaults are those of the official train.py
    "learning_rate": Option(1e-4, ABOVE_0, "peak learning rate", True),
    "weight_decay": Option(0.0, FROM_0, "AdamW's weight decay", True),
    "adam_beta1": Option(0.9, BELOW_1, "decay of the gradients' mean", True),
    "adam_beta2": Option(0.999, BELOW_1, "decay of the squared gradients' mean", True),
    "adam_epsilon": Option(1e-8, ABOVE_0, "epsilon in AdamW's denominator", True),
    "max_grad_norm": Option(-1.0, NUMBER, "clip gradients to this global norm; 0 or less: off", True),
    "lr_scheduler_type": Option("constant", _SCHEDULES, "learning-rate schedule", True),
    "warmup_steps": Option(0, INT_FROM_0, "linear warm-up from 0 over this many steps", True),
    "lr_end": Option(1e-7, FROM_0, "last learning rate of the polynomial schedule", True),
    "num_cycles": Option(0.5, ABOVE_0, "waves of the cosine schedule", True),
    "power": Option(1.0, ABOVE_0, "power of the polynomial schedule", True),
    "on_nonfinite": Option(
        "stop",
        one_of("stop", "skip"),
        "a step that is not finite changes no weight; then end with a dump, or go on",
        True,
    ),
    "loss_spike_factor": Option(
        0.0, FACTOR, "a loss above this times its running mean counts as not finite too; 0: off", True
    ),
}
LENGTH_KEYS = {
    "max_steps": Option(-1, STEPS, "optimizer steps of the run; -1: count in epochs", True),
    "epochs": Option(1400, ABOVE_0, "epochs, if `max_steps` is -1", True),
    "global_batch_size": Option(256, POSITIVE_INT, "samples of a step, over all ranks and micro-batches", NOTRAINER),
    "gradient_accumulation_steps": Option(1, POSITIVE_INT, "micro-batches a step", True),
    "seed": Option(0, SEED, "seed of weights, data order and noise", True),
}
ROUTING_KEYS = {
    "share": Option(0.5, SHARE, "share of a sample's tokens that skip the blocks"),
    "blocks": Option(None, or_null(BLOCKS), "blocks that the others alone run through", unset="`sprint_blocks`"),
    "path_drop_prob": Option(
        None, or_null(BELOW_1), "share of samples that go without the blocks, with `sprint_blocks`", unset="0.05"
    ),
}
TRAINING_KEYS = {
    **AVERAGES_PRECISION_KEYS,
    **OPTIMIZER_KEYS,
    **LENGTH_KEYS,
    "routing": Option(
        None, or_null(OBJECT), "in training, tokens that skip middle blocks; an object, see below", unset="none"
    ),
}


# ---- The sections `data` and `features` ----

_POSTERIOR, _NORMALIZATION = one_of("sample", "mean"), null_or(one_of("none", "channel"))
DATA_KEYS = {
    "flip": Option(False, BOOL, "take the stored mirrored latent half of the time (extracted with --flip)", True),
    "posterior": Option("sample", _POSTERIOR, "of moments: a fresh sample at each visit, or the mean", True),
    "latent_normalization": Option(
        None,
        _NORMALIZATION,
        "channel: take off each channel's mean, divide by its standard deviation; undone before decoding",
        True,
        "channel for LightningDiT's folders, whose latents are not scaled, else none",
    ),
    "latent_multiplier": Option(1.0, ABOVE_0, "factor of the latents after that", True),
    "classes": Option(None, or_null(LABELS), "train on these class labels only", True, "all"),
    "in_memory": Option(False, BOOL, "read all samples into memory at the start", True),
    "validation_samples": Option(0, INT_FROM_0, "hold out so many samples, and report their loss", True),
    "validation_steps": Option(1000, POSITIVE_INT, "steps between these reports", True),
}
# What a run's features were made of, null where a set does not tell. The scaling is diffusers', by its names.
FEATURES_KEYS = {
    "image_size": Option(None, or_null(POSITIVE_INT), "height and width of the images"),
    "class_names": Option(None, or_null(CLASS_NAMES), "names of the classes"),
    "channel_mean": Option(None, or_one_a_channel(NUMBER), "mean of each channel of the latents"),
    "channel_std": Option(None, or_one_a_channel(FROM_0), "standard deviation of each channel of the latents"),
    "vae": Option(None, or_null(OBJECT), "the autoencoder that encoded the images"),
    "latent_normalization": Option(None, or_null(OBJECT), "what was done to the latents by `data`, as numbers"),
    "encoder": Option(None, or_null(OBJECT), "the encoder whose features were trained on"),
}
VAE_KEYS = {
    "name": Option(None, or_null(TEXT)),
    "weights_sha256": Option(None, or_null(TEXT)),
    "latent_channels": Option(None, or_null(POSITIVE_INT)),
    "downsampling": Option(None, or_null(POSITIVE_INT)),
    "scaling_factor": Option(None, or_null(ABOVE_0)),
    "shift_factor": Option(None, or_null(NUMBER)),
    "latents_mean": Option(None, or_one_a_channel(NUMBER)),
    "latents_std": Option(None, or_one_a_channel(ABOVE_0)),
}
ENCODER_KEYS = {
    "name": Option(None, or_null(TEXT)),
    "weights_sha256": Option(None, or_null(TEXT)),
    "encoder_size": Option(None, or_null(POSITIVE_INT)),
}
NORMALIZATION_KEYS = {
    "mean": Option(None, or_one_a_channel(NUMBER)),
    "std": Option(None, or_one_a_channel(ABOVE_0)),
    "multiplier": Option(1.0, ABOVE_0),
}


# ---- The section `evaluation` ----

METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "kid", "mind")
HIGHER_IS_BETTER = ("inception_score", "precision", "recall")  # of these
EVALUATION_KEYS = {
    "steps": Option(
        None, or_null(POSITIVE_INT), "steps between evaluations; the last step is evaluated too", unset="never"
    ),
    "reference": Option(
        None, or_null(TEXT), "what the samples are compared with: an npz of images or statistics, or a folder of images"
    ),
    "num_samples": Option(10000, INT_FROM_4, "samples of an evaluation, over all ranks; papers have 50000"),
    "metrics": Option(["fid"], some_of(*METRICS), "what is reported; the first decides which checkpoint is the best"),
    "features": Option("inception", TEXT, "inception, digits, or the path of a Paddle Inference program"),
    "inception_weights": Option(
        None, or_null(TEXT), "file of Inception's weights", unset="where evaluation finds them"
    ),
    "labels": Option("random", one_of("random", "balanced"), "classes of the samples, of those that are trained"),
    "guidance_scale": Option(1.0, NUMBER, "guidance scale of the samples; 1: none, as in the papers' training curves"),
    "num_inference_steps": Option(50, POSITIVE_INT, "steps of a sample"),
    "batch_size": Option(32, POSITIVE_INT, "samples that a GPU draws at once; a CPU draws 32"),
}


# ---- The section `guidance` ----

GUIDANCE_SCHEDULES = ("constant", "linear", "cosine")
GUIDANCE_KEYS = {
    "channels": Option("auto", CHANNELS, "leading latent channels that are guided; auto: as without this section"),
    "interval": Option(
        None,
        or_null(INTERVAL),
        "times between which guidance is on: 0 (noise) to 1, of a diffusion 0 (data) to `diffusion_steps` - 1",
        unset="all",
    ),
    "sigma_interval": Option(None, or_null(INTERVAL), "the same in noise levels, noise over signal", unset="all"),
    "schedule": Option(
        "constant",
        one_of(*GUIDANCE_SCHEDULES),
        "the scale over time: linear, cosine rise from 1, with the same mean",
    ),
    "rescale": Option(
        0.0, FROM_0_TO_1, "how far outputs get the standard deviation back that they have without guidance"
    ),
    "cfg_zero_star": Option(False, BOOL, "CFG-Zero*: fit the output without a class first"),
    "internal_scale": Option(1.0, NUMBER, "of internal guidance, by the regularizer's second final layer; 1: none"),
    "internal_interval": Option(None, or_null(INTERVAL), "times between which that is on, as `interval`", unset="all"),
    "timestep_shift": Option(
        0.0, FROM_0, "of a transport: below 1 more of the points in time are near the noise; 0: none"
    ),
}
