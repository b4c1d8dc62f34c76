"""Command-line flags of both training loops. Standard library only, so that `--help` answers at once.

A flag that is not given is None: then the config's JSON decides, then the defaults of `config.schema`.
"""

import argparse
import difflib
import math

from config.schema import DATA_KEYS, DEFAULT_VAE, LR_SCHEDULES, MAX_SEED, load_config, override

ENVIRONMENT = (
    "Environment: OMP_NUM_THREADS, FLAGS_use_stride_kernel, malloc's thresholds and, on processors that are not "
    "Intel's, MKL_DEBUG_CPU_TYPE are set for Paddle unless you have set them; see docs/performance.md."
)
IMAGE_SIZE_HELP = "image size, picks imagenet{N}_features [256, else the only set]"
# Settings that the two loops name differently, the Trainer's name first.
TWINS = {
    "resolution": "image_size",
    "output_dir": "results_dir",
    "resume_from_checkpoint": "resume",
    "per_device_train_batch_size": "global_batch_size",
    "num_train_epochs": "epochs",
    "logging_steps": "log_every",
    "save_steps": "ckpt_every",
    "seed": "global_seed",
    "dataloader_num_workers": "num_workers",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage of sixty flags."""

    def error(self, message):
        raise ValueError(f"command line: {message}; see --help")

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), None)
            self.error(f"unexpected {unknown[0]!r}" if flag is None else self._unknown_flag(flag.split("=")[0]))
        return args

    def _unknown_flag(self, flag):
        known = self._option_string_actions
        twins = {f"--{name}": f"--{twin}" for pair in TWINS.items() for name, twin in (pair, pair[::-1])}
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
        meant = twins[flag] if twins.get(flag) in known else near[0] if near else None
        return f"unknown flag {flag}" + (f" (did you mean {meant}?)" if meant else "")


def str2bool(text):
    """`True`, `true`, `1`, `yes`, ... to bool; argparse turns the error into one line."""
    lowered = text.lower()
    if lowered in ("true", "t", "1", "yes", "y", "on"):
        return True
    if lowered in ("false", "f", "0", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def _none_or_str(text):
    return None if text in ("None", "none", "") else text


def _add_bool(group, name, default=None, **options):
    group.add_argument(name, type=str2bool, nargs="?", const=True, default=default, metavar="True|False", **options)


def _add_optimizer_flags(parser):
    group = parser.add_argument_group("optimizer (AdamW); defaults stand in the config's `training` section")
    group.add_argument("--learning_rate", type=float, metavar="LR", help="peak learning rate [1e-4]")
    group.add_argument("--weight_decay", type=float, help="AdamW's weight decay [0]")
    group.add_argument("--adam_beta1", type=float, help="[0.9]")
    group.add_argument("--adam_beta2", type=float, help="[0.999]")
    group.add_argument("--adam_epsilon", type=float, help="[1e-8]")
    group.add_argument("--max_grad_norm", type=float, help="clip gradients to this global norm; 0 or less: off [-1]")
    group.add_argument(
        "--on_nonfinite",
        choices=("stop", "skip"),
        help="a step whose loss or gradients are not finite changes no weight; then: end with a dump of it, or skip it "
        "and count [stop]",
    )
    group.add_argument(
        "--loss_spike_factor",
        type=float,
        metavar="F",
        help="take a step whose loss is more than F times its running mean for such a step too; 0: off [0]",
    )
    group.add_argument("--lr_scheduler_type", choices=LR_SCHEDULES, help="learning-rate schedule [constant]")
    group.add_argument("--warmup_steps", type=int, help="linear warm-up from 0 over this many steps [0]")
    group.add_argument("--num_cycles", type=float, help="waves of the cosine schedule [0.5]")
    group.add_argument("--lr_end", type=float, help="last learning rate of the polynomial schedule [1e-7]")
    group.add_argument("--power", type=float, help="power of the polynomial schedule [1]")
    group.add_argument("--max_steps", type=int, help="optimizer steps of the run; -1: count in epochs [-1]")
    group.add_argument("--gradient_accumulation_steps", type=int, metavar="N", help="micro-batches a step [1]")


def _add_model_flags(parser):
    group = parser.add_argument_group("EMA, precision, memory; they win over the config's `training` section")
    _add_bool(group, "--use_ema", help="keep an exponential moving average of the weights")
    group.add_argument("--ema_decay", type=float, help="its decay [0.9999]")
    _add_bool(group, "--ema_warmup", help="let the decay grow from 0.1 in the first updates")
    _add_bool(group, "--recompute", help="recompute blocks in the backward pass: less memory, same gradients")
    _add_bool(group, "--bf16", help="bfloat16 mixed precision (a GPU of compute capability 8.0 or newer)")
    _add_bool(group, "--fp16", help="float16 mixed precision with loss scaling (a GPU)")
    group.add_argument("--fp16_opt_level", choices=("O1", "O2"), help="O1: float32 weights; O2: half, float32 masters")
    _add_bool(
        group,
        "--enable_xformers_memory_efficient_attention",
        help="fused attention where device and dtype allow; same numbers",
    )


def _add_objective_flags(parser):
    group = parser.add_argument_group(
        "interpolant transport (SiT); they win over the config's `objective` section",
    )
    for name, words in (
        ("path_type", "path from noise to data: Linear, GVP or VP [Linear]"),
        ("prediction", "what the network predicts: velocity, noise or score [velocity]"),
        ("loss_weight", "velocity, likelihood or None [None]"),
    ):
        group.add_argument(f"--{name}", f"--{name.replace('_', '-')}", help=words)
    for name, words in (("train_eps", "in training"), ("sample_eps", "in sampling")):
        flags = (f"--{name}", f"--{name.replace('_', '-')}")
        group.add_argument(*flags, type=float, help=f"distance to the ends of the time interval {words} [by path]")


def _labels(text):
    try:
        return [int(label) for label in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected class labels such as 0,7,13, got {text!r}") from None


def _add_data_flags(parser):
    group = parser.add_argument_group("data; they win over the config's `data` section")
    _add_bool(group, "--flip", help="take the stored mirrored latent half of the time (extracted with --flip)")
    group.add_argument(
        "--posterior",
        choices=("sample", "mean"),
        help="of stored moments: a fresh posterior sample at each visit, or the mean [sample]",
    )
    group.add_argument("--classes", type=_labels, metavar="L,L,...", help="train on these class labels only [all]")
    _add_bool(group, "--in_memory", help="read all samples into memory at the start")
    group.add_argument(
        "--validation_samples", type=int, metavar="N", help="hold out N samples, and report their loss [0]"
    )
    group.add_argument("--validation_steps", type=int, metavar="N", help="steps between these reports [1000]")


def _add_stopping_flags(parser):
    group = parser.add_argument_group("ends before the last step: SIGTERM and SIGINT save first too, exit code 75")
    group.add_argument(
        "--max_hours",
        type=float,
        metavar="H",
        help="save and exit with code 75 before H hours since the start are over [no limit]",
    )
    group.add_argument(
        "--hang_timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="end a job, exit code 70, of which a rank makes no progress for so long; 0: never [1800]",
    )


def _add_start_flags(parser):
    parser.add_argument(
        "--pretrained_model_path",
        type=_none_or_str,
        metavar="PATH",
        help="start a new run from these weights: a checkpoint (its averages), a .pdparams or an official .pt; a label "
        "table for other classes starts anew",
    )


def _add_preview_flags(parser):
    group = parser.add_argument_group("preview images")
    group.add_argument(
        "--image_logging_steps",
        type=int,
        default=-1,
        metavar="N",
        help="sample a grid from the EMA weights every N steps; -1: never, and no autoencoder is loaded [-1]",
    )
    group.add_argument(
        "--vae_name_or_path",
        type=_none_or_str,
        metavar="VAE",
        help=f"AutoencoderKL folder or hub name for the previews [the features' own, else {DEFAULT_VAE}]",
    )
    group.add_argument("--num_inference_steps", type=int, default=25, metavar="N", help="steps of a preview [25]")
    group.add_argument("--cfg_scale", type=float, default=4.0, help="guidance scale of a preview [4.0]")


# Flags of TrainingArguments itself that have an effect in our Trainer.
PASSED_ON = {
    "amp_master_grad": None,  # a switch
    "amp_custom_black_list": {"nargs": "+", "metavar": "OPERATOR"},
    "amp_custom_white_list": {"nargs": "+", "metavar": "OPERATOR"},
    "scale_loss": {"type": float, "metavar": "F"},
    "hybrid_parallel_topo_order": {"metavar": "ORDER"},
    "ddp_find_unused_parameters": None,
    "to_static": None,
}


def trainer_parser():
    """Flags of `train_image_generation_trainer.py`: those of PaddleMIX's example and of PaddleNLP that it uses."""
    parser = Parser(
        description="Trains a class-conditional diffusion transformer on latent features with the PaddleNLP Trainer.",
        epilog="On several GPUs: "
        "python -m paddle.distributed.launch --nproc_per_node 8 train_image_generation_trainer.py ... " + ENVIRONMENT,
        allow_abbrev=False,
    )
    _add_bool(parser, "--do_train", help="train; the only mode, accepted for PaddleNLP's sake")
    parser.add_argument("--config_file", default="config/DiT_XL_patch2.json", help="JSON config [%(default)s]")
    parser.add_argument(
        "--feature_path",
        default="./data/fastdit_imagenet256",
        help="folder with NAME_features and NAME_labels [%(default)s]",
    )
    parser.add_argument("--resolution", type=int, metavar="N", help=IMAGE_SIZE_HELP)
    parser.add_argument("--output_dir", default="output_dir", help="checkpoints and logs go here [%(default)s]")
    _add_bool(
        parser,
        "--overwrite_output_dir",
        help="start anew in a folder that holds a run: the earlier run is moved to output_dir/previous-DATE, "
        "not deleted; without it the run there is resumed",
    )
    parser.add_argument(
        "--resume_from_checkpoint",
        type=_none_or_str,
        metavar="PATH",
        help="a checkpoint folder of either loop, a run's folder, an official train.py .pt, or auto; None: the newest "
        "in output_dir if there is one",
    )
    _add_start_flags(parser)
    parser.add_argument("--seed", type=int, help="seed of weights, data order and noise [0]")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N [auto]")
    group = parser.add_argument_group("batches")
    group.add_argument(
        "--per_device_train_batch_size",
        type=int,
        metavar="N",
        help="micro-batch a device [the config's global_batch_size over devices and micro-batches]",
    )
    group.add_argument("--num_train_epochs", type=float, metavar="E", help="epochs, if max_steps is -1 [1400]")
    group.add_argument(
        "--dataloader_num_workers", type=int, default=1, metavar="N", help="loader processes a device [1]"
    )
    _add_optimizer_flags(parser)
    _add_model_flags(parser)
    _add_objective_flags(parser)
    _add_data_flags(parser)
    group = parser.add_argument_group("logs and checkpoints")
    group.add_argument("--logging_dir", help="VisualDL log [output_dir/tb_log]")
    group.add_argument("--logging_steps", type=int, default=50, metavar="N", help="steps between reports [50]")
    group.add_argument("--save_steps", type=int, default=5000, metavar="N", help="steps between checkpoints [5000]")
    group.add_argument("--save_total_limit", type=int, metavar="N", help="keep the newest N checkpoints [all]")
    _add_bool(
        group,
        "--async_save",
        default=True,
        help="write checkpoints beside the training, which waits for the copy out of the device only [True]",
    )
    _add_bool(group, "--disable_tqdm", help="no progress bar on a terminal; in a log there is none [False]")
    _add_stopping_flags(parser)
    _add_preview_flags(parser)
    group = parser.add_argument_group("parallel degrees")
    group.add_argument("--dp_degree", type=int, metavar="N", help="data parallel; follows from the others [all ranks]")
    group.add_argument(
        "--sharding",
        default="",
        metavar="STAGE",
        help="split over the sharding ranks: stage1 optimizer state and EMA, stage2 gradients, stage3 weights",
    )
    group.add_argument(
        "--sharding_parallel_degree", type=int, metavar="N", help="sharding ranks [all with --sharding, else 1]"
    )
    group.add_argument(
        "--sharding_parallel_config",
        default="",
        metavar="NAMES",
        help="PaddleNLP's settings of sharding; those that change where the optimizer's state lies are left out ['']",
    )
    group.add_argument(
        "--tensor_parallel_degree",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share one network, heads and MLPs split; they get the same batch [1]",
    )
    for name in ("pipeline", "sep"):
        group.add_argument(
            f"--{name}_parallel_degree", type=int, default=1, metavar="1", help="accepted; only 1 is supported [1]"
        )
    for name in ("transformer_engine_backend", "use_fp8"):
        _add_bool(group, f"--{name}", help="accepted; only False is supported [False]")
    group = parser.add_argument_group("passed on to paddlenlp.trainer.TrainingArguments")
    for name, options in PASSED_ON.items():
        if options is None:
            _add_bool(group, f"--{name}")
        else:
            group.add_argument(f"--{name}", **options)
    return parser


def notrainer_parser():
    """Flags of `train_image_generation_notrainer.py`: those of PaddleMIX's example and the official train.py."""
    parser = Parser(
        description="Trains a class-conditional diffusion transformer on latent features with a hand-written loop.",
        epilog="On several GPUs: "
        "python -m paddle.distributed.launch --gpus 0,1,2,3 train_image_generation_notrainer.py ... " + ENVIRONMENT,
        allow_abbrev=False,
    )
    parser.add_argument("--config_file", default="config/DiT_XL_patch2.json", help="JSON config [%(default)s]")
    parser.add_argument(
        "--feature_path",
        default="data/fastdit_imagenet256",
        help="folder with NAME_features and NAME_labels [%(default)s]",
    )
    parser.add_argument("--image_size", type=int, metavar="N", help=IMAGE_SIZE_HELP)
    parser.add_argument(
        "--results_dir", default="output_notrainer", help="experiments NNN-CONFIG are made in it [%(default)s]"
    )
    parser.add_argument(
        "--resume",
        type=_none_or_str,
        metavar="PATH",
        help="a checkpoint folder of either loop, a run's folder, an official train.py .pt; auto: the newest "
        "checkpoint of this config in results_dir, if there is one",
    )
    _add_start_flags(parser)
    parser.add_argument("--global_seed", type=int, help="seed of weights, data order and noise [0]")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N [auto]")
    group = parser.add_argument_group("batches")
    group.add_argument("--global_batch_size", type=int, metavar="N", help="over all ranks and micro-batches [256]")
    group.add_argument("--epochs", type=float, help="epochs, if max_steps is -1 [1400]")
    group.add_argument("--num_workers", type=int, default=1, metavar="N", help="loader processes a device [1]")
    _add_optimizer_flags(parser)
    _add_model_flags(parser)
    _add_objective_flags(parser)
    _add_data_flags(parser)
    group = parser.add_argument_group("logs and checkpoints")
    group.add_argument("--log_every", type=int, default=50, metavar="N", help="steps between reports [50]")
    group.add_argument("--ckpt_every", type=int, default=5000, metavar="N", help="steps between checkpoints [5000]")
    group.add_argument("--save_total_limit", type=int, metavar="N", help="keep the newest N checkpoints [all]")
    _add_bool(
        group,
        "--async_save",
        default=True,
        help="write checkpoints beside the training, which waits for the copy out of the device only [True]",
    )
    _add_bool(group, "--disable_tqdm", help="no progress bar on a terminal; in a log there is none [False]")
    group.add_argument("--logging_dir", help="VisualDL log [EXPERIMENT/tb_log]")
    _add_stopping_flags(parser)
    _add_preview_flags(parser)
    parser.add_argument(
        "--vae", help="previews' autoencoder: ema or mse (stabilityai/sd-vae-ft-...), a folder or a name"
    )
    return parser


def read_trainer_flags(words=None):
    """Returns `(args, config)`, checked, of a command line of the Trainer (None: this process's).

    Raises:
        ValueError: one line: an unknown flag, a wrong value, a wrong config.
    """
    args = trainer_parser().parse_args(words)
    check_positive(
        args,
        *("resolution", "per_device_train_batch_size", "logging_steps", "save_steps", "num_inference_steps"),
        *("save_total_limit", "sharding_parallel_degree", "tensor_parallel_degree"),
        *("pipeline_parallel_degree", "sep_parallel_degree"),
    )
    check_stopping(args.max_hours, args.hang_timeout)
    return args, resolve_training(args, epochs=args.num_train_epochs, seed=args.seed)


def read_notrainer_flags(words=None):
    """Returns `(args, config)` of a command line of the hand-written loop, as `read_trainer_flags` does."""
    args = notrainer_parser().parse_args(words)
    check_positive(args, "image_size", "log_every", "ckpt_every", "num_inference_steps", "save_total_limit")
    check_stopping(args.max_hours, args.hang_timeout)
    return args, resolve_training(
        args, global_batch_size=args.global_batch_size, epochs=args.epochs, seed=args.global_seed
    )


def resolve_training(args, *, global_batch_size=None, epochs=None, seed=None):
    """The config of a run: command line over JSON over defaults.

    Args:
        args: parsed flags of either loop.
        global_batch_size, epochs, seed: where the loop's flags have other names.

    Raises:
        ValueError: names the file or "command line", the key, and what was expected.
    """
    check_seed("global_seed" if "global_seed" in args else "seed", seed)
    if args.bf16 and args.fp16:
        raise ValueError("command line: at most one of --bf16 and --fp16 can be True")
    amp_dtype = None
    if args.bf16 is not None or args.fp16 is not None:
        amp_dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    given = {
        name: getattr(args, name)
        for name in (
            "use_ema ema_decay ema_warmup recompute learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon "
            "max_grad_norm on_nonfinite loss_spike_factor lr_scheduler_type warmup_steps num_cycles lr_end power "
            "max_steps gradient_accumulation_steps"
        ).split()
    }
    given.update(
        amp_dtype=amp_dtype,
        amp_level=args.fp16_opt_level,
        fused_attention=args.enable_xformers_memory_efficient_attention,
        global_batch_size=global_batch_size,
        epochs=epochs,
        seed=seed,
    )
    objective = {
        name: getattr(args, name) for name in ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")
    }
    data = {name: getattr(args, name) for name in DATA_KEYS}
    config = override(load_config(args.config_file), given, objective, data)
    seed = config["training"]["seed"]
    if seed > MAX_SEED:
        raise ValueError(f"{args.config_file}: training: seed {seed}: expected an integer from 0 to {MAX_SEED}")
    return config


def check_seed(name, value):
    """Raises `ValueError` for a seed, the flag `--name`'s, that is not in the range that every command takes.

    None, a flag that was not given, passes.
    """
    if value is not None and not 0 <= value <= MAX_SEED:
        raise ValueError(f"--{name} {value}: expected an integer from 0 to {MAX_SEED}")


def check_positive(args, *names):
    """Raises `ValueError` for a flag among `names` that is not a positive number."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"command line: --{name} must be above 0, got {value}")


def check_stopping(max_hours, hang_timeout):
    """Raises `ValueError` for what `Stopping` can't take."""
    if max_hours is not None and not (math.isfinite(max_hours) and max_hours > 0):
        raise ValueError(f"command line: --max_hours must be above 0, got {max_hours}")
    if not (math.isfinite(hang_timeout) and hang_timeout >= 0):
        raise ValueError(f"command line: --hang_timeout must be 0 (off) or more seconds, got {hang_timeout}")
