"""From our flags to `paddlenlp.trainer.TrainingArguments`, which also makes the process group."""

import logging

import paddle
from paddlenlp.trainer import TrainingArguments
from paddlenlp.utils.log import logger

from config.run_flags import PASSED_ON
from runtime.paddle_private import trainer_arguments
from training.parallel.cpu import use_plain_collectives


def training_arguments(args, training, precision, degrees, *, batch_size):
    """Returns PaddleNLP's arguments of a run, but for `max_steps`; making them makes the process groups.

    Precision and degrees are resolved. Raises ValueError for a value that TrainingArguments does not take.
    """
    logger.logger.setLevel(logging.WARNING)
    device = paddle.get_device()
    if device == "cpu":
        use_plain_collectives()
    # Reports, checkpoints, optimizer and schedule are the session's.
    values = {
        "output_dir": args.output_dir,
        "device": args.device if args.device != "auto" else device.split(":")[0],
        "seed": training["seed"],
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": training["gradient_accumulation_steps"],
        "dataloader_num_workers": args.num_workers,
        "recompute": training["recompute"],
        "bf16": precision.dtype == "bfloat16",
        "fp16": precision.dtype == "float16",
        "fp16_opt_level": precision.level,
        "sharding": degrees.stage,
        "sharding_parallel_degree": degrees.sharding if degrees.stage else -1,
        "sharding_parallel_config": degrees.sharding_settings,
        "tensor_parallel_degree": degrees.tensor,
        "ddp_find_unused_parameters": False,
        "ignore_data_skip": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        **{name: getattr(args, name) for name in PASSED_ON if getattr(args, name) is not None},
    }
    try:
        made = trainer_arguments(TrainingArguments, values)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"command line: {error}") from None
    if made.amp_master_grad and made.fp16 and not made.use_hybrid_parallel:
        # The loss scaler of a plain optimizer does not find the master gradients: they would never be unscaled.
        raise ValueError("command line: --amp_master_grad with --fp16 needs sharding or tensor parallelism; use --bf16")
    if made.amp_master_grad and degrees.stage in ("stage2", "stage3") and made.data_parallel_degree > 1:
        raise ValueError("command line: --amp_master_grad can't be combined with stage2 or stage3 and data parallel")
    return made
