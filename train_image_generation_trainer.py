"""Trains a class-conditional diffusion transformer with the PaddleNLP Trainer; `--help` lists the flags."""

from runtime.process import configure_runtime, run_cli

configure_runtime()  # before Paddle is imported


def main():
    from config.flags import read_trainer_flags
    from training.supervision.stopping import Stopping

    args, config = read_trainer_flags()
    with Stopping(max_hours=args.max_hours, hang_timeout=args.hang_timeout) as stopping:
        train(args, config, stopping)


def train(args, config, stopping):
    import paddle

    from runtime.process import resolve_device, say

    paddle.set_device(resolve_device(args.device))
    device = paddle.get_device()

    from objectives import build_objective
    from runtime.run_lock import RunLock
    from training import setup
    from training.checkpoints.experiment import open_output_dir
    from training.checkpoints.read import load_pretrained
    from training.parallel.degrees import check_degrees
    from training.trainer import LatentDiffusionTrainer
    from training.trainer_arguments import tensor_parallel_group, training_arguments

    # What is asked of the process group, before it is made.
    world_size = paddle.distributed.get_world_size()
    data_ranks, degree_notes = check_degrees(args, config["model"], world_size)
    settings = config["training"]
    micro_batches = settings["gradient_accumulation_steps"] * data_ranks
    if args.per_device_train_batch_size is not None:
        settings["global_batch_size"] = args.per_device_train_batch_size * micro_batches
    precision, note = setup.setup_precision(config, device)

    # Data: a seeded endless stream, of which every data rank takes its rows of each global batch. The ranks of a
    # tensor-parallel group follow one another, and are one data rank.
    dataset, held_out = setup.build_dataset(config, args.feature_path, args.resolution)
    data_rank = paddle.distributed.get_rank() // args.tensor_parallel_degree
    sampler = setup.build_sampler(config, dataset, rank=data_rank, world_size=data_ranks)

    # Process group; then what is in the output folder: a run to resume, to put aside, or nothing. The last step
    # depends on what a resumed run has done.
    training_args = training_arguments(args, config, precision, batch_size=sampler.batch_size)
    lock = RunLock()  # of the run's folder, until this function is left
    checkpoint = open_output_dir(
        args.output_dir,
        config,
        resume=args.resume_from_checkpoint,
        overwrite=bool(args.overwrite_output_dir),
        lock=lock,
    )
    setup.resume_sampler(sampler, config, checkpoint)
    training_args.max_steps = last_step = sampler.last_step

    # Network, objective, trainer.
    model = setup.build_network(config, tensor_parallel_group(), single_backward=True)
    objective = build_objective(config, ranks_per_batch=args.tensor_parallel_degree)
    start_note = None
    if args.pretrained_model_path and checkpoint is None:
        start_note = load_pretrained(args.pretrained_model_path, model, config=config)
    preview = setup.build_preview(objective, config, args, vae=args.vae_name_or_path)
    validation = setup.build_validation(config, objective, held_out, sampler, args.tensor_parallel_degree)
    if paddle.distributed.get_rank() == 0:
        setup.describe_run(
            config,
            folder=args.output_dir,
            dataset=dataset,
            model=model,
            device=device,
            world_size=world_size,
            last_step=last_step,
            notes=[
                *degree_notes,
                note,
                start_note,
                start_note and setup.pretrained_note(args.pretrained_model_path, config),
                setup.other_data_note(checkpoint, config, dataset),
            ],
        )
        if checkpoint is not None:
            say(f"resumed {checkpoint.source} at step {checkpoint.progress['global_step']}")
    trainer = LatentDiffusionTrainer(
        model=model,
        args=training_args,
        config=config,
        objective=objective,
        train_dataset=dataset,
        sampler=sampler,
        precision=precision,
        stopping=stopping,
        preview=preview,
        validation=validation,
        image_logging_steps=args.image_logging_steps,
        checkpoint=checkpoint,
        async_save=args.async_save,
        show_bar=not args.disable_tqdm,
    )
    trainer.train()
    trainer.close()


if __name__ == "__main__":
    run_cli(main)
