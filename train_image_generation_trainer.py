"""Trains a class-conditional diffusion transformer with the PaddleNLP Trainer; `--help` lists the flags."""

from runtime.process import configure_runtime, run_cli

configure_runtime()  # before Paddle is imported


def main():
    from config.flags import read_flags
    from training.supervision.stopping import Stopping

    args, config = read_flags("trainer")
    with Stopping(max_hours=args.max_hours, hang_timeout=args.hang_timeout) as stopping:
        train(args, config, stopping)


def train(args, config, stopping):
    from runtime.process import launched_rank, resolve_device
    from training import setup
    from training.early import check_start
    from training.parallel.degrees import resolve_degrees

    # Parallel degrees, before the process group is made.
    settings = config["training"]
    rank, world_size = launched_rank()
    degrees = resolve_degrees(args, config["model"], world_size)
    if args.per_device_train_batch_size is not None:
        micro_batches = settings["gradient_accumulation_steps"] * degrees.data_ranks
        settings["global_batch_size"] = args.per_device_train_batch_size * micro_batches

    # Data: a seeded endless stream, of which every data rank takes its rows of each global batch. The ranks of a
    # tensor-parallel group follow one another, and are one data rank. They are opened before Paddle is imported, which
    # takes seconds, so that what does not fit them is said at once.
    data_rank = rank // degrees.tensor
    data = setup.open_data(config, args.feature_path, args.image_size, rank=data_rank, world_size=degrees.data_ranks)
    check_start(args, config)

    import paddle

    paddle.set_device(resolve_device(args.device))

    from runtime.run_lock import RunLock
    from training.checkpoints.experiment import open_output_dir
    from training.session import Outputs, Session
    from training.trainer import LatentDiffusionTrainer
    from training.trainer_arguments import training_arguments

    # Precision, process group; then the output folder: it may hold a run to resume, one to move aside, or nothing.
    precision = setup.setup_precision(settings, paddle.get_device())
    training_args = training_arguments(args, settings, precision, degrees, batch_size=data.sampler.batch_size)
    lock = RunLock()  # of the run's folder, until this function is left
    checkpoint = open_output_dir(args.output_dir, config, lock, resume=args.resume, overwrite=args.overwrite_output_dir)

    # Network, objective, averages; log, previews, checkpoints.
    session = Session(
        config,
        data,
        args.output_dir,
        checkpoint=checkpoint,
        pretrained=args.pretrained_model_path,
        precision=precision,
        degrees=degrees,
        stopping=stopping,
        outputs=Outputs.from_flags(args, checkpoints="checkpoint-{step}"),
    )
    if session.first_step < session.last_step:
        LatentDiffusionTrainer(session, training_args).train()
    session.close(resume="auto")


if __name__ == "__main__":
    run_cli(main)
