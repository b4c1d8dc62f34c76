"""`LatentDiffusionTrainer`: the PaddleNLP Trainer around the objective, data, EMA and checkpoints of our own loop."""

import functools
import os
import time

import paddle
from paddlenlp.trainer import Trainer, TrainerCallback

from features.loader import FeatureLoader
from objectives import Batch, Rows
from runtime.process import seed_step
from training import setup
from training.checkpoints.saver import CheckpointSaver
from training.checkpoints.state import restore_model, restore_training
from training.metrics import TrainingLog
from training.optimizer import build_lr_scheduler, build_optimizer, create_state, inner_optimizer, master_weights
from training.parallel.shares import Shares
from training.preview import log_preview
from training.supervision.number_watch import NumberWatch
from training.supervision.step_dump import dump_step


class _StepCallback(TrainerCallback):
    """Calls the trainer just before and after the optimizer's step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_optimizer_begin(self, args, state, control, **kwargs):
        self.trainer.before_optimizer()

    def on_optimizer_end(self, args, state, control, **kwargs):
        self.trainer.after_optimizer()


class LatentDiffusionTrainer(Trainer):
    """Trains a bare network on `(latents, labels)` batches.

    What PaddleNLP does: the loop, AMP, data parallel and sharding wrappers, gradient accumulation, callbacks.
    What comes from this project, so that either loop resumes the other: loss and its random numbers, order of the data,
    optimizer, LR schedule, EMA, log and checkpoints.

    Args:
        model: the network.
        args: `paddlenlp.trainer.TrainingArguments`; `max_steps` must be set.
        config: the resolved config.
        objective: from `objectives.build_objective`.
        train_dataset: `FeatureDataset`.
        sampler: `MicroBatchSampler` of this rank, put where the checkpoint's run stopped (`setup.resume_sampler`).
        precision: the resolved `Precision`; `args.fp16`, `args.bf16` must agree.
        stopping: a `Stopping`, entered; `train` starts it.
        preview: a `Preview`, or None; drawn every `image_logging_steps`.
        validation: a `Validation`, or None.
        checkpoint: what to resume, from `open_checkpoint`, or None.
        async_save: write checkpoints beside the training, see `CheckpointSaver`.
    """

    def __init__(
        self,
        *,
        model,
        args,
        config,
        objective,
        train_dataset,
        sampler,
        precision,
        stopping,
        preview=None,
        validation=None,
        image_logging_steps=-1,
        checkpoint=None,
        async_save=True,
        show_bar=True,
    ):
        # Averages and resumed weights are taken before AMP O2 casts the model.
        self.ema = setup.build_ema(config, model, on_host=bool(args.sharding))
        if checkpoint is not None:
            restore_model(checkpoint, model, self.ema)
        super().__init__(model=model, args=args, train_dataset=train_dataset)
        # PaddleNLP's own printers and bars give way to TrainingLog, which both loops share.
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                self.remove_callback(callback)
        self.config = config
        self.objective = objective
        self.sampler = sampler
        self.precision = precision
        self.preview = preview
        self.validation = validation
        self.image_logging_steps = image_logging_steps
        self.resumed = checkpoint
        self._micro_step = 0
        self.stopping = stopping
        self._last_saved = self._last_done = None
        self._lr = self._grad_norm = None
        self.watch = NumberWatch(config["training"], stopping)
        self.log_writer = TrainingLog(
            args.output_dir,
            visualdl_dir=args.logging_dir,
            log_every=args.logging_steps,
            first_step=sampler.first_step,
            last_step=args.max_steps,
            global_batch_size=sampler.global_batch_size,
            show_bar=show_bar,
            rank=paddle.distributed.get_rank(),
        )
        self.saver = CheckpointSaver(
            say=self.log_writer.print, save_total_limit=args.save_total_limit, background=async_save
        )

    # Data.

    def get_train_dataloader(self):
        """Our stream: it starts at the resumed data position, and shuffles by itself."""
        return FeatureLoader(
            self.train_dataset,
            self.sampler,
            num_workers=self.args.dataloader_num_workers,
            phase=self.stopping.phase,
        )

    # Optimizer.

    def create_scheduler(self, num_training_steps):
        if self.lr_scheduler is None:
            self.lr_scheduler = build_lr_scheduler(self.config["training"], num_training_steps)
        return self.lr_scheduler

    def create_optimizer(self, lr_scheduler=None):
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                self.model,
                self.config["training"],
                lr_scheduler or self.lr_scheduler,
                multi_precision=self.precision.low_precision_weights,
                watch=self.watch,
            )
        return self.optimizer

    def _wrap_model(self, model, training=True):
        """PaddleNLP's wrappers; every sharding stage beside tensor parallelism, and frozen parameters left whole."""
        if not training or not self.sharding:
            return super()._wrap_model(model, training)
        from paddle.distributed import sharding

        # Stage 3 gathers a frozen slice for the backward pass and never lets it go.
        holders = [
            id(layer)
            for layer in model.sublayers(include_self=True)
            if any(parameter.stop_gradient for parameter in layer.parameters(include_sublayers=False))
        ]
        paddle_wrapper, degree = sharding.group_sharded_parallel, self.args.tensor_parallel_degree

        # Stage 3's prefetch of the layer before, in the backward pass, takes the layers to be a chain. Here the
        # conditioning branches off: a layer whose turn is over was gathered again, and its old weights used in the next
        # step. So every layer is gathered when its turn comes.
        def wrapper(*args, exclude_layer=(), **options):
            return paddle_wrapper(*args, exclude_layer=[*exclude_layer, *holders], sync_comm=True, **options)

        # The wrapper that PaddleNLP puts under the sharding of a tensor-parallel model broadcasts weights and inputs,
        # which are equal already, and is refused with stage 3.
        sharding.group_sharded_parallel, self.args.tensor_parallel_degree = wrapper, 1
        try:
            return super()._wrap_model(model, training)
        finally:
            sharding.group_sharded_parallel, self.args.tensor_parallel_degree = paddle_wrapper, degree

    # Loss.

    def training_step(self, model, inputs, step_control=0):
        """Forward and backward of one micro-batch; returns its detached loss."""
        model.train()
        micro_step = self._micro_step % self.args.gradient_accumulation_steps
        self._micro_step += 1
        seed_step(self.config["training"]["seed"], self.state.global_step + 1)
        with self.autocast_smart_context_manager():
            loss = self.compute_loss(model, inputs, Rows(*self.sampler.rows(micro_step)))
        scaled = loss / self.args.gradient_accumulation_steps
        (self.scaler.scale(scaled) if self.do_grad_scaling else scaled).backward()
        self.watch.add(loss.detach())
        return loss.detach()

    def compute_loss(self, model, inputs, rows=None, return_outputs=False):
        """Mean loss of a micro-batch `(latents (n, C, h, w), labels (n,))`."""
        losses = self.objective.training_losses(model, Batch(*inputs), rows)
        loss = losses["loss"].mean()
        return (loss, losses) if return_outputs else loss

    def _check_loss_valid(self, loss):
        """PaddleNLP reads the loss back at every step here: no host sync between reports."""

    # Around a step.

    def train(self, **kwargs):
        """Trains up to `args.max_steps`; see `Trainer.train`. Resuming is ours: the constructor's `checkpoint`."""
        if self.sampler.first_step >= self.args.max_steps:
            self.log_writer.print(f"nothing to do: step {self.sampler.first_step} of {self.args.max_steps} is reached")
            return None
        self.add_callback(_StepCallback(self))
        self.stopping.start(
            self.sampler.first_step, rank=paddle.distributed.get_rank(), world_size=paddle.distributed.get_world_size()
        )
        return super().train(**kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Called once the optimizer has its wrappers: gives it its state, and the loop its step."""
        shares = Shares(self.model, self.optimizer)
        self._grad_norm = inner_optimizer(self.optimizer)._grad_clip
        self._grad_norm.shares = shares
        if self.ema is not None:
            self.ema.shard(shares)
        if self.resumed is None:
            create_state(self.optimizer, self.model, shares)
        else:
            restore_training(
                self.resumed,
                model=self.model,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                scaler=self.scaler if self.do_grad_scaling else None,
                objective=self.objective,
            )
            self.state.global_step = self.resumed.progress["global_step"]
            self.watch.set_state_dict(self.resumed.progress.get("watch", {}))
        self.watch.dump = functools.partial(
            dump_step,
            folder=self.args.output_dir,
            config=self.config,
            model=self.model,
            optimizer=self.optimizer,
            objective=self.objective,
            dataset=self.train_dataset,
            sampler=self.sampler,
            precision=self.precision,
            saver=self.saver,
        )

    def before_optimizer(self):
        """The watch judges the gradients inside the optimizer's step."""
        self.stopping.phase("updating the weights")
        self._lr = self.optimizer.get_lr()
        self.watch.begin_update(self.state.global_step + 1, self._lr, self.scaler if self.do_grad_scaling else None)

    def after_optimizer(self):
        """EMA, as soon as the weights are new; and the objective's own learning."""
        self.watch.end_update(self.objective)
        self.objective.end_step()
        if self.ema is not None:
            self.ema.update(self.model, master_weights(self.optimizer))

    def _maybe_log_save_evaluate(self, tr_loss, model, epoch, ignore_keys_for_eval, **kwargs):
        step = self.state.global_step
        if self._last_done != step and self.log_writer.step_done(step):
            self.state.epoch = self.sampler.epoch(step)
            self.log_writer.report(
                **self.watch.take(), lr=self._lr, grad_norm=self._grad_norm.take(), epoch=self.state.epoch
            )
        if self._last_done != step and self.validation is not None and self.validation.due(step, self.args.max_steps):
            self.stopping.phase("validating")
            self.validation.run(
                step,
                model=self.model,
                ema=self.ema,
                optimizer=self.optimizer,
                precision=self.precision,
                log=self.log_writer,
            )
        if self._last_done != step and self.preview is not None and step % self.image_logging_steps == 0:
            self.stopping.phase("drawing previews")
            log_preview(
                self.preview,
                model=self.model,
                ema=self.ema,
                optimizer=self.optimizer,
                log=self.log_writer,
                folder=os.path.join(self.args.output_dir, "images"),
                step=step,
                rank=paddle.distributed.get_rank(),
            )
        if self._last_done != step and step < self.args.max_steps and self.stopping.due(step):
            self.control.should_save = self.control.should_training_stop = True
        self._last_done = step
        if (self.control.should_save or step == self.args.max_steps) and self._last_saved != step:
            self._save_checkpoint(model)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.control.should_log = self.control.should_save = False

    def _save_checkpoint(self, model, metrics=None):
        """Our checkpoint folder, `output_dir/checkpoint-N`; a collective."""
        self.stopping.phase("saving")
        self.watch.check()
        start = time.perf_counter()
        step = self.state.global_step
        path = os.path.join(self.args.output_dir, f"checkpoint-{step}")
        self.saver.save(
            path,
            config=self.config,
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            scaler=self.scaler if self.do_grad_scaling else None,
            ema=self.ema,
            objective=self.objective,
            progress=setup.progress_state(
                self.config,
                step=step,
                samples_seen=self.sampler.samples_seen(step),
                num_samples=len(self.train_dataset),
                world_size=paddle.distributed.get_world_size(),
                watch=self.watch.state_dict(),
            ),
        )
        self._last_saved = step
        self.log_writer.pause(time.perf_counter() - start)

    def log(self, logs, **kwargs):
        """PaddleNLP's closing summary; TrainingLog has reported everything in it."""

    def close(self):
        """Waits for the last checkpoint, ends the log and says where everything went; ends a stopped run."""
        self.saver.finish()
        if self.stopping.stopped:
            self.log_writer.close()
            self.stopping.leave(
                f"after step {self.state.global_step} of {self.args.max_steps}, saved in {self.args.output_dir}; the "
                "same command goes on with --resume_from_checkpoint auto"
            )
        if self.sampler.first_step < self.args.max_steps:
            self.log_writer.print(
                f"done: step {self.args.max_steps}, checkpoints in {self.args.output_dir}, "
                f"VisualDL log in {self.log_writer.visualdl_dir}"
            )
        self.log_writer.close()
