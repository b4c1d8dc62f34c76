"""From our flags to `paddlenlp.trainer.TrainingArguments`, which also makes the process group."""

import logging
import os

import paddle
from paddlenlp.trainer import PdArgumentParser, TrainingArguments
from paddlenlp.utils.log import logger

from config.flags import PASSED_ON
from training.parallel.cpu import use_plain_collectives

# Settings of PaddleNLP's sharding_parallel_config that can be used, by stage. The others keep the optimizer's state
# under the names of fused or cut parameters, or let the weights arrive after the step: checkpoints would not know.
SHARDING_CONFIG = {"disable_stage1_reduce_avg": ("stage1",), "enable_release_grads": ("stage1",)}
LEFT_OUT = (
    *("split_param", "enable_stage1_overlap", "enable_stage1_tensor_fusion", "enable_stage1_broadcast_overlap"),
    *("enable_stage1_allgather_overlap", "enable_stage2_overlap", "enable_fuse_optimizer_states"),
)


def training_arguments(args, config, precision, *, batch_size):
    """PaddleNLP's arguments of a run, but for `max_steps`; making them makes the process groups.

    Args:
        args: flags of `config.flags.trainer_parser`.
        config: the resolved config.
        precision: the resolved `Precision`; PaddleNLP is not asked for what the device can't do.
        batch_size: samples of a micro-batch on one device.

    Raises:
        ValueError: a value that TrainingArguments does not take.
    """
    logger.logger.setLevel(logging.WARNING)
    if paddle.get_device() == "cpu":
        use_plain_collectives()
    settings = config["training"]
    values = {
        "output_dir": args.output_dir,
        "do_train": True,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": settings["gradient_accumulation_steps"],
        "learning_rate": settings["learning_rate"],
        "weight_decay": settings["weight_decay"],
        "max_grad_norm": max(0.0, settings["max_grad_norm"]),
        "logging_dir": args.logging_dir or os.path.join(args.output_dir, "tb_log"),
        "logging_steps": args.logging_steps,
        "save_steps": args.save_steps,
        "dataloader_num_workers": args.dataloader_num_workers,
        "seed": settings["seed"],
        "disable_tqdm": True,
        "report_to": "none",
        "recompute": settings["recompute"],
        "bf16": precision.dtype == "bfloat16",
        "fp16": precision.dtype == "float16",
        "fp16_opt_level": precision.level,
        "device": args.device if args.device != "auto" else _current_device(),
        "sharding": args.sharding,
        "sharding_parallel_degree": args.sharding_parallel_degree if args.sharding else -1,
        "sharding_parallel_config": args.sharding_parallel_config,
        "tensor_parallel_degree": args.tensor_parallel_degree,
        "ddp_find_unused_parameters": False,
        "ignore_data_skip": True,
        "skip_profile_timer": True,
        "skip_memory_metrics": True,
    }
    if args.save_total_limit is not None:
        values["save_total_limit"] = args.save_total_limit
    values.update((name, getattr(args, name)) for name in PASSED_ON if getattr(args, name) is not None)
    words = []
    for name, value in values.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    parser = PdArgumentParser(TrainingArguments, allow_abbrev=False)
    try:
        (parsed,) = parser.parse_args_into_dataclasses(words)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"command line: {error}") from None
    if parsed.amp_master_grad and parsed.fp16 and not parsed.use_hybrid_parallel:
        # The loss scaler of a plain optimizer does not find the master gradients: they would never be unscaled.
        raise ValueError("command line: --amp_master_grad with --fp16 needs sharding or tensor parallelism; use --bf16")
    if parsed.amp_master_grad and args.sharding in ("stage2", "stage3") and parsed.data_parallel_degree > 1:
        raise ValueError("command line: --amp_master_grad can't be combined with stage2 or stage3 and data parallel")
    return parsed


def tensor_parallel_group():
    """The group of ranks that hold the parts of one network, once `training_arguments` has made it; None: no parts.

    All of them read the same batch and draw the same random numbers: fleet need not broadcast the network's inputs.
    """
    from paddle.distributed import fleet

    hybrid = getattr(fleet.fleet, "_hcg", None)
    if hybrid is None:
        return None
    fleet.fleet._user_defined_strategy.hybrid_configs["mp_configs"].need_broadcast_data = False
    group = hybrid.get_model_parallel_group()
    return group if group.nranks > 1 else None


def _current_device():
    return paddle.get_device().split(":")[0]
