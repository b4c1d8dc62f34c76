"""`LatentDiffusionTrainer`: the PaddleNLP Trainer around a `Session`."""

from paddlenlp.trainer import PrinterCallback, Trainer, TrainerCallback

from features.loader import FeatureLoader
from objectives import Rows, make_batch
from runtime.patching import replaced
from runtime.process import seed_step
from training.parallel.stage3 import stage3_wrapper


class _StepCallback(TrainerCallback):
    """Calls the session just before and after the optimizer's step."""

    def __init__(self, session):
        self.session = session

    def on_optimizer_begin(self, args, state, control, **kwargs):
        self.session.begin_update(state.global_step + 1)

    def on_optimizer_end(self, args, state, control, **kwargs):
        self.session.end_update()


class LatentDiffusionTrainer(Trainer):
    """Trains the network of a `Session` that is not started, by arguments of `training.trainer_arguments`.

    PaddleNLP has the loop, AMP, the data parallel and sharding wrappers, gradient accumulation, callbacks. So that
    either loop resumes the other, the session has the loss and its random numbers, the order of the data, optimizer, LR
    schedule, averages, log and checkpoints.
    """

    def __init__(self, session, args):
        self.session = session
        args.max_steps = session.last_step
        super().__init__(model=session.model, args=args, train_dataset=session.dataset)
        self.remove_callback(PrinterCallback)  # TrainingLog speaks, in both loops
        self.add_callback(_StepCallback(session))
        self._micro_step = 0

    def get_train_dataloader(self):
        """Returns the session's stream, which starts at the resumed data position."""
        session, workers = self.session, self.args.dataloader_num_workers
        return FeatureLoader(session.dataset, session.sampler, num_workers=workers, phase=session.stopping.phase)

    def create_optimizer_and_scheduler(self, num_training_steps):
        self.optimizer = self.session.build_optimizer()
        self.lr_scheduler = self.session.lr_scheduler

    def _wrap_model(self, model, training=True):
        """Returns the model in PaddleNLP's wrappers: every sharding stage, also beside tensor parallelism."""
        if not training or not self.sharding:
            return super()._wrap_model(model, training)
        # The wrapper that PaddleNLP puts under the sharding of a tensor-parallel model broadcasts weights and inputs,
        # which are equal already, and is refused with stage 3.
        with stage3_wrapper(model), replaced(self.args, tensor_parallel_degree=1):
            return super()._wrap_model(model, training)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Gives the optimizer its state, and the loop its step; PaddleNLP calls it when the wrappers are made."""
        self.session.attach(self.optimizer, self.scaler if self.do_grad_scaling else None)
        self.session.start()
        self.state.global_step = self.session.first_step

    def training_step(self, model, inputs, step_control=0):
        """Does forward and backward of a micro-batch, the tensors of a `FeatureLoader`; returns its loss."""
        model.train()
        session, accumulation_steps = self.session, self.args.gradient_accumulation_steps
        rows = Rows(*session.sampler.rows(self._micro_step % accumulation_steps))
        self._micro_step += 1
        seed_step(session.config["training"]["seed"], self.state.global_step + 1)
        with self.autocast_smart_context_manager():
            losses = session.objective.training_losses(model, make_batch(inputs), rows)
            loss = losses["loss"].mean()
        scaled = loss / accumulation_steps
        (self.scaler.scale(scaled) if self.do_grad_scaling else scaled).backward()
        session.add_losses(loss, losses)
        return loss.detach()

    def _check_loss_valid(self, loss):
        """Does nothing, because PaddleNLP reads the loss back here, a host sync in every step."""

    def _maybe_log_save_evaluate(self, tr_loss, model, epoch, ignore_keys_for_eval, **kwargs):
        step = self.state.global_step
        if step == self.session.step:  # PaddleNLP asks once more when an epoch ends
            return
        self.state.epoch = self.session.sampler.epoch(step)
        self.control.should_training_stop |= self.session.after_step(step)
        self.control.should_log = self.control.should_save = False

    def log(self, logs, **kwargs):
        """PaddleNLP's closing summary; TrainingLog has reported everything in it."""
