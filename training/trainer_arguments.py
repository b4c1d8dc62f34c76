"""From our flags to `paddlenlp.trainer.TrainingArguments`, which also makes the process group."""

import logging
import os

from paddlenlp.trainer import PdArgumentParser, TrainingArguments
from paddlenlp.utils.log import logger

from training.arguments import PASSED_ON

_DEGREES = ("tensor", "pipeline", "sep")


def check_degrees(args, world_size):
    """Checks the parallel degrees against the number of processes, and fills in the sharding degree.

    Returns:
        A sentence to print if `dp_degree` says otherwise than what follows from the others, else None.

    Raises:
        ValueError: a degree that is not supported or does not divide the number of processes.
    """
    for name in _DEGREES:
        degree = getattr(args, f"{name}_parallel_degree")
        if degree != 1:
            raise ValueError(f"--{name}_parallel_degree must be 1, got {degree}: {name} parallelism is not supported")
    if args.sharding not in ("", "stage1"):
        raise ValueError(f"--sharding must be '' or stage1, got {args.sharding!r}")
    if args.sharding_parallel_degree is None:
        args.sharding_parallel_degree = world_size if args.sharding else 1
    sharding = args.sharding_parallel_degree
    if world_size % sharding:
        raise ValueError(f"--sharding_parallel_degree {sharding} does not divide the {world_size} processes launched")
    data_parallel = world_size // sharding
    if args.dp_degree is not None and args.dp_degree != data_parallel:
        return (
            f"--dp_degree {args.dp_degree} is not what {world_size} processes with sharding degree {sharding} give: "
            f"the data-parallel degree is {data_parallel}"
        )
    return None


def training_arguments(args, others, config, precision, *, max_steps, batch_size):
    """PaddleNLP's arguments of a run.

    Args:
        args: flags of `training.arguments.trainer_parser`.
        others: the command line's other words, flags of TrainingArguments itself.
        config: the resolved config.
        precision: the resolved `Precision`; PaddleNLP is not asked for what the device can't do.
        max_steps: optimizer steps of the run.
        batch_size: samples of a micro-batch on one device.

    Raises:
        ValueError: a flag that is not in `PASSED_ON`.
    """
    for word in others:
        name = word.split("=")[0].removeprefix("--")
        if word.startswith("--") and name not in PASSED_ON:
            raise ValueError(
                f"command line: unknown flag {word.split('=')[0]}; see --help (of PaddleNLP's own flags these have an "
                f"effect here: {', '.join(PASSED_ON)})"
            )
    logger.logger.setLevel(logging.WARNING)
    settings = config["training"]
    sharding = args.sharding or ("stage1" if args.sharding_parallel_degree > 1 else "")
    values = {
        "output_dir": args.output_dir,
        "do_train": True,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": settings["gradient_accumulation_steps"],
        "learning_rate": settings["learning_rate"],
        "weight_decay": settings["weight_decay"],
        "max_grad_norm": max(0.0, settings["max_grad_norm"]),
        "max_steps": max_steps,
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
        "sharding": sharding,
        "sharding_parallel_degree": args.sharding_parallel_degree,
        "tensor_parallel_degree": args.tensor_parallel_degree,
        "ddp_find_unused_parameters": False,
        "ignore_data_skip": True,
        "skip_profile_timer": True,
        "skip_memory_metrics": True,
    }
    if args.save_total_limit is not None:
        values["save_total_limit"] = args.save_total_limit
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    parser = PdArgumentParser(TrainingArguments, allow_abbrev=False)
    try:
        (parsed,) = parser.parse_args_into_dataclasses(words + others)
    except ValueError as error:
        raise ValueError(f"command line: {error}") from None
    return parsed


def _current_device():
    import paddle

    return paddle.get_device().split(":")[0]
