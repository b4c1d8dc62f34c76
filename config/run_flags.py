"""The settings of the command line alone, and the groups of flags that `--help` shows. Standard library only.

A `Flag` here has no key in a JSON config. Those that have one stand in `config.options`.
"""

from config.checks import ABOVE_0, BOOL, DEVICE, FROM_0, INT, INT_FROM_0, NUMBER, PATH, POSITIVE_INT, TEXT, VAE, WORDS
from config.options import (
    AVERAGES_PRECISION_KEYS,
    DATA_KEYS,
    DEFAULT_VAE,
    GENTLE_GUIDANCE_SCALE,
    LENGTH_KEYS,
    OBJECTIVE_KEYS,
    OPTIMIZER_KEYS,
    TRAINER,
    Flag,
    PerLoop,
)

RUN_FLAGS = {
    "do_train": Flag(None, BOOL, "train; the only mode, accepted for PaddleNLP's sake", TRAINER),
    "config_file": Flag("config/DiT_XL_patch2.json", TEXT, "JSON config"),
    "feature_path": Flag("./data/fastdit_imagenet256", TEXT, "folder with the set of features"),
    "image_size": Flag(None, POSITIVE_INT, "picks imagenet{N}_features", unset="256, else the only set"),
    "output_dir": Flag(
        PerLoop("outputs/trainer", "outputs/notrainer"),
        TEXT,
        PerLoop("the run's folder", "a folder of runs"),
        "output",
        aliases=PerLoop(("output_dir",), ("results_dir",)),
    ),
    "overwrite_output_dir": Flag(
        None, BOOL, "do not resume the run in --output: move it to OUTPUT/previous-DATE and start anew", TRAINER
    ),
    "resume": Flag(
        None,
        PATH,
        "a checkpoint folder of either loop, a run's folder, an official train.py .pt; auto: the newest that is there",
        unset=PerLoop("auto", "a new run"),
    ),
    "pretrained_model_path": Flag(
        None,
        PATH,
        "start a new run from these weights: a checkpoint (its averages), a .pdparams or an official .pt; a label "
        "table for other classes starts anew",
    ),
    "device": Flag("auto", DEVICE, "auto, cpu, gpu or gpu:N; auto: a GPU if there is one"),
}
_MICRO_BATCH = "the config's global_batch_size over devices and micro-batches"
BATCH_FLAGS = {
    "per_device_train_batch_size": Flag(
        None, POSITIVE_INT, "samples of a micro-batch on a device", TRAINER, _MICRO_BATCH, twin="global_batch_size"
    ),
    "num_workers": Flag(1, INT_FROM_0, "loader processes a device"),
}
_AMP = "the config's amp_dtype"
PRECISION_FLAGS = {
    "bf16": Flag(None, BOOL, "bfloat16 mixed precision (a GPU of compute capability 8.0 or newer)", unset=_AMP),
    "fp16": Flag(None, BOOL, "float16 mixed precision with loss scaling (a GPU)", unset=_AMP),
}
LOG_FLAGS = {
    "logging_dir": Flag(None, TEXT, "VisualDL log", unset="tb_log in the run's folder"),
    "logging_steps": Flag(50, POSITIVE_INT, "steps between reports"),
    "save_steps": Flag(5000, POSITIVE_INT, "steps between checkpoints"),
    "save_total_limit": Flag(
        None, POSITIVE_INT, "keep the newest N checkpoints, and the best by evaluation", unset="all"
    ),
    "async_save": Flag(True, BOOL, "write checkpoints while training goes on, once they are copied off the device"),
    "disable_tqdm": Flag(None, BOOL, "no progress bar on a terminal; in a log there is none", unset="False"),
}
STOPPING_FLAGS = {
    "max_hours": Flag(None, ABOVE_0, "save and exit with code 75 within X hours of the start", unset="no limit"),
    "hang_timeout": Flag(1800, FROM_0, "end a job, exit code 70, when a rank hangs for X seconds; 0: never"),
}
PREVIEW_FLAGS = {
    "image_logging_steps": Flag(
        -1, INT, "sample a grid from the EMA weights every N steps, one row a class; -1: never"
    ),
    "vae": Flag(
        None, VAE, "AutoencoderKL folder or hub name, or ema or mse", unset=f"the features', else {DEFAULT_VAE}"
    ),
    "num_inference_steps": Flag(25, POSITIVE_INT, "steps of a preview"),
    "preview_classes": Flag(
        None, WORDS, "classes of a preview, names or ids, a row each", unset="up to 10 of those that are trained"
    ),
    "preview_images_per_class": Flag(2, POSITIVE_INT, "images in each row of a preview"),
    "preview_guidance_scale": Flag(
        GENTLE_GUIDANCE_SCALE,
        NUMBER,
        "guidance scale of a preview, 1 for none; low, because the 4 of the official samples makes those of a young "
        "model burnt and alike",
        "guidance_scale",
        aliases=("preview_guidance_scale",),
    ),
}
PARALLEL_FLAGS = {
    "dp_degree": Flag(None, INT, "data parallel; follows from the others", TRAINER, "all ranks"),
    "sharding": Flag("", TEXT, "what is split: stage1 optimizer state, EMA; stage2 gradients; stage3 weights", TRAINER),
    "sharding_parallel_degree": Flag(None, POSITIVE_INT, "sharding ranks", TRAINER, "all with --sharding, else 1"),
    "sharding_parallel_config": Flag("", TEXT, "PaddleNLP's, but for those that move optimizer state", TRAINER),
    "tensor_parallel_degree": Flag(1, POSITIVE_INT, "ranks that share a network and its batches", TRAINER),
    "pipeline_parallel_degree": Flag(1, POSITIVE_INT, "accepted; only 1 is supported", TRAINER),
    "sep_parallel_degree": Flag(1, POSITIVE_INT, "accepted; only 1 is supported", TRAINER),
    "transformer_engine_backend": Flag(None, BOOL, "accepted; only False is supported", TRAINER, "False"),
    "use_fp8": Flag(None, BOOL, "accepted; only False is supported", TRAINER, "False"),
}
# Flags of PaddleNLP's TrainingArguments that have an effect in our Trainer.
PASSED_ON = {
    "amp_master_grad": Flag(None, BOOL, flag=TRAINER),
    "amp_custom_black_list": Flag(None, WORDS, flag=TRAINER),
    "amp_custom_white_list": Flag(None, WORDS, flag=TRAINER),
    "scale_loss": Flag(None, NUMBER, flag=TRAINER),
    "hybrid_parallel_topo_order": Flag(None, TEXT, flag=TRAINER),
    "ddp_find_unused_parameters": Flag(None, BOOL, flag=TRAINER),
    "to_static": Flag(None, BOOL, flag=TRAINER),
}
# Help's titles, and what stands under each.
FLAG_GROUPS = {
    "the run": RUN_FLAGS,
    "length and batches": {**LENGTH_KEYS, **BATCH_FLAGS},
    "optimizer (AdamW)": OPTIMIZER_KEYS,
    "averages, precision, memory": {**AVERAGES_PRECISION_KEYS, **PRECISION_FLAGS},
    "interpolant transport (SiT)": OBJECTIVE_KEYS["transport"],
    "data": DATA_KEYS,
    "logs and checkpoints": LOG_FLAGS,
    "ends before the last step: SIGTERM and SIGINT save first too, exit code 75": STOPPING_FLAGS,
    "preview images": PREVIEW_FLAGS,
    "parallel degrees": PARALLEL_FLAGS,
    "passed on to paddlenlp.trainer.TrainingArguments": PASSED_ON,
}
