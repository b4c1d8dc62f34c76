"""Trains a class-conditional diffusion transformer with a loop to read and edit; `--help` lists the flags."""

from runtime.process import configure_runtime, run_cli

configure_runtime()  # before Paddle is imported


def main():
    from config.flags import read_notrainer_flags
    from training.supervision.stopping import Stopping

    args, config = read_notrainer_flags()
    with Stopping(max_hours=args.max_hours, hang_timeout=args.hang_timeout) as stopping:
        train(args, config, stopping)


def train(args, config, stopping):
    import contextlib
    import functools
    import os
    import time

    import paddle
    from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

    from features.loader import FeatureLoader
    from objectives import Batch, Rows, build_objective
    from runtime.process import init_distributed, resolve_device, say, seed_step
    from runtime.run_lock import RunLock
    from training import setup
    from training.checkpoints.experiment import open_experiment
    from training.checkpoints.read import load_pretrained
    from training.checkpoints.saver import CheckpointSaver
    from training.checkpoints.state import restore_model, restore_training
    from training.metrics import TrainingLog
    from training.optimizer import build_lr_scheduler, build_optimizer, create_state, master_weights
    from training.preview import log_preview
    from training.supervision.number_watch import NumberWatch
    from training.supervision.step_dump import dump_step

    # Device, process group, precision.
    settings = config["training"]
    paddle.set_device(resolve_device(args.device))
    device = paddle.get_device()
    rank, world_size = init_distributed()
    precision, note = setup.setup_precision(config, device)
    accumulation_steps = settings["gradient_accumulation_steps"]

    # Data: a seeded endless stream, of which every rank takes its rows of each global batch.
    dataset, held_out = setup.build_dataset(config, args.feature_path, args.image_size)
    sampler = setup.build_sampler(config, dataset, rank=rank, world_size=world_size)

    # Checkpoint to resume, and the experiment's folder.
    lock = RunLock()  # of the run's folder, until this function is left
    checkpoint, folder = open_experiment(args.resume, args.results_dir, args.config_file, config, lock)
    checkpoints_dir = os.path.join(folder, "checkpoints")
    first_step = setup.resume_sampler(sampler, config, checkpoint)
    last_step = sampler.last_step

    # Network, objective, EMA, optimizer.
    model = setup.build_network(config, single_backward=True)
    objective = build_objective(config)
    ema = setup.build_ema(config, model)
    start_note = None
    if checkpoint is not None:
        restore_model(checkpoint, model, ema)
    elif args.pretrained_model_path:
        start_note = load_pretrained(args.pretrained_model_path, model, ema, config=config)
    precision.decorate(model)
    lr_scheduler = build_lr_scheduler(settings, last_step)
    watch = NumberWatch(settings, stopping)
    optimizer = build_optimizer(
        model, settings, lr_scheduler, multi_precision=precision.low_precision_weights, watch=watch
    )
    grad_norm = optimizer._grad_clip
    scaler = precision.scaler()
    if checkpoint is None:
        create_state(optimizer, model)
    else:
        restore_training(
            checkpoint, model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, scaler=scaler, objective=objective
        )
        watch.set_state_dict(checkpoint.progress.get("watch", {}))
    vae = f"stabilityai/sd-vae-ft-{args.vae}" if args.vae in ("ema", "mse") else args.vae or args.vae_name_or_path
    preview = setup.build_preview(objective, config, args, vae=vae)
    validation = setup.build_validation(config, objective, held_out, sampler)

    # Gradients are averaged over the ranks by DataParallel's hooks, during the backward pass; recompute runs backward
    # passes inside the backward pass, which the hooks can't follow: then in one go after it.
    network, reduce_after = model, False
    if world_size > 1:
        reduce_after = settings["recompute"]
        network = model if reduce_after else paddle.DataParallel(model)

    if rank == 0:
        setup.describe_run(
            config,
            folder=folder,
            dataset=dataset,
            model=model,
            device=device,
            world_size=world_size,
            last_step=last_step,
            notes=[
                note,
                start_note,
                start_note and setup.pretrained_note(args.pretrained_model_path, config),
                setup.other_data_note(checkpoint, config, dataset),
            ],
        )
        if checkpoint is not None:
            say(f"resumed {checkpoint.source} at step {first_step}")
    log = TrainingLog(
        folder,
        visualdl_dir=args.logging_dir or os.path.join(folder, "tb_log"),
        log_every=args.log_every,
        first_step=first_step,
        last_step=last_step,
        global_batch_size=settings["global_batch_size"],
        show_bar=not args.disable_tqdm,
        rank=rank,
    )
    saver = CheckpointSaver(say=log.print, save_total_limit=args.save_total_limit, background=args.async_save)

    watch.dump = functools.partial(
        dump_step,
        folder=folder,
        config=config,
        model=model,
        optimizer=optimizer,
        objective=objective,
        dataset=dataset,
        sampler=sampler,
        precision=precision,
        saver=saver,
    )

    def save(step):
        stopping.phase("saving")
        watch.check()
        start = time.perf_counter()
        path = os.path.join(checkpoints_dir, f"{step:07d}")
        saver.save(
            path,
            config=config,
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            scaler=scaler,
            ema=ema,
            objective=objective,
            progress=setup.progress_state(
                config,
                step=step,
                samples_seen=sampler.samples_seen(step),
                num_samples=len(dataset),
                world_size=world_size,
                watch=watch.state_dict(),
            ),
        )
        log.pause(time.perf_counter() - start)

    model.train()  # label dropout is on
    stopping.start(first_step, rank=rank, world_size=world_size)
    batches = iter(FeatureLoader(dataset, sampler, num_workers=args.num_workers, phase=stopping.phase))
    for step in range(first_step + 1, last_step + 1):
        # Forward and backward, micro-batch by micro-batch.
        for micro_step in range(accumulation_steps):
            batch = Batch(*next(batches))  # (n, C, h, w), (n,)
            seed_step(settings["seed"], step)
            last_micro_step = micro_step == accumulation_steps - 1
            keep_local = network is not model and not last_micro_step
            with network.no_sync() if keep_local else contextlib.nullcontext():
                with precision.autocast():
                    loss = objective.training_losses(network, batch, Rows(*sampler.rows(micro_step)))["loss"].mean()
                scaler.scale(loss / accumulation_steps).backward()
            watch.add(loss.detach())
        stopping.phase("updating the weights")
        if reduce_after:
            fused_allreduce_gradients(list(model.parameters()), None)

        # Optimizer, learning rate, EMA.
        lr = optimizer.get_lr()
        watch.begin_update(step, lr, scaler)
        scaler.step(optimizer)
        scaler.update()
        watch.end_update(objective)
        optimizer.clear_grad()
        if precision.stepped(scaler):
            lr_scheduler.step()
        objective.end_step()
        if ema is not None:
            ema.update(model, master_weights(optimizer))

        # Report, validation, preview, checkpoint.
        if log.step_done(step):
            log.report(**watch.take(), lr=lr, grad_norm=grad_norm.take(), epoch=sampler.epoch(step))
        if validation is not None and validation.due(step, last_step):
            stopping.phase("validating")
            validation.run(step, model=model, ema=ema, optimizer=optimizer, precision=precision, log=log)
        if preview is not None and step % args.image_logging_steps == 0:
            stopping.phase("drawing previews")
            images_dir = os.path.join(folder, "images")
            log_preview(
                preview, model=model, ema=ema, optimizer=optimizer, log=log, folder=images_dir, step=step, rank=rank
            )
        stopped = step < last_step and stopping.due(step)
        if step % args.ckpt_every == 0 or step == last_step or stopped:
            save(step)
        if stopped:
            break

    saver.finish()
    log.close()
    if stopping.stopped:
        stopping.leave(f"after step {step} of {last_step}, saved in {checkpoints_dir}; --resume {folder} goes on")
    if rank == 0 and first_step >= last_step:
        say(f"nothing to do: step {first_step} of {last_step} is reached by {checkpoint.source}")
    elif rank == 0:
        say(f"done: step {last_step}, checkpoints in {checkpoints_dir}, VisualDL log in {log.visualdl_dir}")


if __name__ == "__main__":
    run_cli(main)
