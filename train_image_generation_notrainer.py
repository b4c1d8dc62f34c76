"""Trains a class-conditional diffusion transformer with a loop to read and edit; `--help` lists the flags."""

from runtime.process import configure_runtime, run_cli

configure_runtime()  # before Paddle is imported


def main():
    from config.flags import read_flags
    from training.supervision.stopping import Stopping

    args, config = read_flags("notrainer")
    with Stopping(max_hours=args.max_hours, hang_timeout=args.hang_timeout) as stopping:
        train(args, config, stopping)


def train(args, config, stopping):
    import contextlib

    from runtime.process import init_distributed, launched_rank, resolve_device, seed_step
    from training import setup
    from training.early import check_start

    # Data: a seeded endless stream, of which every rank takes its rows of each global batch. They are opened before
    # Paddle is imported, which takes seconds, so that what does not fit them is said at once.
    settings = config["training"]
    rank, world_size = launched_rank()
    data = setup.open_data(config, args.feature_path, args.image_size, rank=rank, world_size=world_size)
    check_start(args, config)

    import paddle
    from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

    from features.loader import FeatureLoader
    from objectives import Rows, make_batch
    from runtime.run_lock import RunLock
    from training.checkpoints.experiment import open_experiment
    from training.session import Outputs, build_session

    # Device, process group, precision.
    paddle.set_device(resolve_device(args.device))
    init_distributed()
    precision = setup.setup_precision(settings, paddle.get_device())

    # Checkpoint to resume, and the experiment's folder.
    lock = RunLock()  # of the run's folder, until this function is left
    checkpoint, folder = open_experiment(args.resume, args.output_dir, args.config_file, config, lock)

    # Network, objective, averages, optimizer; log, previews, checkpoints.
    session = build_session(
        config,
        data,
        folder,
        checkpoint=checkpoint,
        pretrained=args.pretrained_model_path,
        precision=precision,
        stopping=stopping,
        outputs=Outputs.from_flags(args),
    )
    model, objective, sampler = session.model, session.objective, session.sampler
    optimizer, lr_scheduler, scaler = session.optimizer, session.lr_scheduler, session.scaler

    # Gradients are averaged over the ranks by DataParallel's hooks, during the backward pass; recompute runs backward
    # passes inside the backward pass, which the hooks can't follow: then in one go after it.
    reduce_after = world_size > 1 and settings["recompute"]
    network = paddle.DataParallel(model) if world_size > 1 and not reduce_after else model

    session.start()
    accumulation_steps = settings["gradient_accumulation_steps"]
    batches = iter(FeatureLoader(data.dataset, sampler, num_workers=args.num_workers, phase=stopping.phase))
    for step in range(session.first_step + 1, session.last_step + 1):
        # Forward and backward, micro-batch by micro-batch.
        for micro_step in range(accumulation_steps):
            batch = make_batch(next(batches))  # (n, C, h, w), (n,)
            seed_step(settings["seed"], step)
            keep_local = network is not model and micro_step < accumulation_steps - 1
            with network.no_sync() if keep_local else contextlib.nullcontext():
                with precision.autocast():
                    losses = objective.training_losses(network, batch, Rows(*sampler.rows(micro_step)))
                    loss = losses["loss"].mean()
                scaler.scale(loss / accumulation_steps).backward()
            session.add_losses(loss, losses)
        if reduce_after:
            fused_allreduce_gradients(list(model.parameters()), None)

        # Optimizer, learning rate.
        session.begin_update(step)  # a step that is not finite changes nothing: training/supervision/number_watch.py
        scaler.step(optimizer)  # clips gradients, and the watch judges the step by their norm
        scaler.update()
        session.end_update()
        optimizer.clear_grad()
        if precision.stepped(scaler):
            lr_scheduler.step()

        # Averages, report, validation, preview, checkpoint.
        if session.after_step(step):
            break

    session.close(resume=folder)


if __name__ == "__main__":
    run_cli(main)
