"""A run of training: the parts that both loops share, built once and called at the same moments.

In a notebook a run is

    config = load_config("config/DiT_B_patch2.json")
    data = open_data(config, "data/features")
    session = build_session(config, data, "output").start()

and a step is what the loop of `train_image_generation_notrainer.py` does.
"""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass

import paddle

from config.checks import no_effect
from config.options import GENTLE_GUIDANCE_SCALE, first_images_flags
from config.schema import MODEL_TYPES, changed_settings, ineffective_settings
from features.images import encodable
from features.normalization import describe_normalization
from models.parallel import whole_shape
from objectives import build_objective
from runtime.collective import run_on_rank_0
from runtime.commands import resume_flag
from runtime.console import next_commands, say_next, says_next
from runtime.files import write_json
from runtime.machine import describe_environment
from runtime.paddle_private import inner_optimizer, master_weights, tensor_parallel_group
from runtime.precision import Precision
from runtime.process import counted, say
from training import setup
from training.checkpoints.find import ENVIRONMENT
from training.checkpoints.read import load_pretrained
from training.checkpoints.saver import CheckpointSaver
from training.checkpoints.snapshots import SnapshotSaver
from training.checkpoints.state import restore_model, restore_training
from training.evaluation import Evaluation
from training.metrics import TrainingLog
from training.optimizer import build_lr_scheduler, build_optimizer, optimizer_state
from training.parallel.degrees import Degrees
from training.parallel.shares import LocalShard
from training.preview import Preview
from training.supervision.number_watch import OWN, NumberWatch
from training.supervision.step_dump import dump_step
from training.supervision.stopping import Stopping
from training.validation import Validation


@dataclass
class Outputs:
    """What a run reports, saves and draws, and how often in steps; see `TrainingLog`, `CheckpointSaver`, `Preview`."""

    checkpoints: str = "checkpoints/{step:07d}"  # the folder of a step, in the run's
    save_every: int = 5000
    save_total_limit: int | None = None
    async_save: bool = True
    log_every: int = 50
    visualdl_dir: str | None = None  # None: tb_log in the run's folder
    show_bar: bool = True
    preview_every: int = -1  # 0 or less: never
    vae: str | None = None
    num_inference_steps: int = 25
    preview_classes: list | None = None
    preview_images_per_class: int = 2
    preview_guidance_scale: float = GENTLE_GUIDANCE_SCALE

    @classmethod
    def from_flags(cls, args, **options):
        """Returns those of a command line, of either loop; `options` come on top."""
        return cls(
            save_every=args.save_steps,
            save_total_limit=args.save_total_limit,
            async_save=args.async_save,
            log_every=args.logging_steps,
            visualdl_dir=args.logging_dir,
            show_bar=not args.disable_tqdm,
            preview_every=args.image_logging_steps,
            vae=args.vae,
            num_inference_steps=args.num_inference_steps,
            preview_classes=args.preview_classes,
            preview_images_per_class=args.preview_images_per_class,
            preview_guidance_scale=args.preview_guidance_scale,
            **options,
        )


class Session:
    """Holds the parts of a run, for a loop that brings its own optimizer wrappers; else see `build_session`.

    It calls, in this order: `attach` and `start`; `add_losses` after each backward pass; `begin_update` and
    `end_update` around the optimizer's step; `after_step`; at the end `close`.

    Args:
        data: from `training.setup.open_data`, which fills in the config's `features` section.
        folder: of the run.
        checkpoint: what to resume, from `training.checkpoints.experiment`; None to begin.
        pretrained: weights to begin from, a path for `load_pretrained`, or None.
        precision: from `training.setup.setup_precision`; None for float32.
        degrees: from `training.parallel.degrees`; None for ranks that differ in their data alone.
        stopping: a `Stopping`, entered; None: nothing stops the run, and a notebook keeps its signals.

    Attributes:
        model: the network, not wrapped.
        averages: `EMA`s, none or more; validation, evaluation and previews use the first. Post-hoc EMA's are last.
        numbers: the `NumberWatch`.
        optimizer, lr_scheduler, scaler: once they are attached; the optimizer with its wrappers.
        step: the last one that is done.
    """

    def __init__(
        self,
        config,
        data,
        folder,
        *,
        checkpoint=None,
        pretrained=None,
        precision=None,
        degrees=None,
        stopping=None,
        outputs=None,
    ):
        training, degrees = config["training"], degrees or Degrees()
        self.config, self.folder, self.checkpoint = config, folder, checkpoint
        self.precision = precision or Precision()
        self.stopping, self._may_stop = stopping or Stopping(), stopping is not None
        self.outputs = outputs = outputs or Outputs()
        self.dataset, held_out, self.sampler = data
        self.rank, self.world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
        if checkpoint is not None:
            progress = checkpoint.progress
            setup.resume_sampler(self.sampler, training, progress["global_step"], progress["samples_seen"])
        self.first_step = self.step = self.sampler.first_step
        self.last_step = self.sampler.last_step
        self.notes = [self.precision.note, *degrees.notes]
        if training["warmup_steps"] >= self.last_step > 0:
            rises = f"the learning rate still rises at the last step, {self.last_step}"
            self.notes.append(f"warmup_steps {training['warmup_steps']}: {rises}")

        # Network, objective, averages: before AMP O2 casts the weights.
        group = tensor_parallel_group() if degrees.tensor > 1 else None
        self.model = setup.build_network(config, group)
        self.objective = build_objective(config, ranks_per_batch=degrees.tensor)
        if pretrained and checkpoint is None:
            self.notes.append(load_pretrained(pretrained, self.model, config=config))
        self.averages = setup.build_averages(training, self.model, on_host=degrees.sharding > 1)
        if checkpoint is not None:
            self.notes.append(restore_model(checkpoint, self.model, self.averages))
            self.notes.append(setup.describe_regularizer_changes(checkpoint, config))
            self.notes.append(setup.describe_data_changes(checkpoint, config, self.dataset))

        # What watches and shows the training.
        self.numbers = NumberWatch(training, stopping)
        self.numbers.dump = lambda bad: dump_step(bad, self)
        self.preview = self.evaluation = self.log = self.saver = self.snapshots = None
        self.validation = Validation(self.objective, held_out, self.sampler) if held_out is not None else None
        if outputs.preview_every > 0:
            self.preview = Preview(
                self.objective,
                config,
                vae=outputs.vae,
                num_inference_steps=outputs.num_inference_steps,
                guidance_scale=outputs.preview_guidance_scale,
                classes=outputs.preview_classes,
                images_per_class=outputs.preview_images_per_class,
            )
        else:
            names = ("preview_classes", "preview_images_per_class", "preview_guidance_scale")
            given = [name for name in names if getattr(outputs, name) != getattr(Outputs, name)]
            self.notes += no_effect(given, "without image_logging_steps")
        if config["evaluation"]["steps"] is not None and self.first_step < self.last_step:
            try:
                self.evaluation = Evaluation(self.objective, config, vae=outputs.vae)
            except ValueError as error:
                raise ValueError(f"evaluation: {error}") from None
        elif config["evaluation"]["steps"] is None and config["evaluation"]["reference"] is not None:
            self.notes.append("the config's section evaluation has no effect without steps")
        is_drawn = outputs.preview_every > 0 or config["evaluation"]["steps"] is not None
        if "guidance" in changed_settings(config) and not is_drawn:
            self.notes.append("the config's section guidance has no effect without image_logging_steps or evaluation")
        if outputs.vae is not None and self.preview is None and self.evaluation is None:
            self.notes.append(f"the autoencoder {outputs.vae} is not used: no --image_logging_steps, no evaluation")

    def build_optimizer(self):
        """Builds `optimizer` and `lr_scheduler`, and returns the optimizer."""
        self.lr_scheduler = build_lr_scheduler(self.config["training"], self.last_step)
        self.optimizer = build_optimizer(
            self.model,
            self.config["training"],
            self.lr_scheduler,
            multi_precision=self.precision.low_precision_weights,
            watch=self.numbers,
        )
        return self.optimizer

    def attach(self, optimizer, scaler=None):
        """Takes the optimizer, once it has its wrappers, and the loss scaler; both get their state."""
        self.optimizer, self.scaler = optimizer, scaler
        shard = LocalShard(self.model, optimizer)
        self.gradient_norm = inner_optimizer(optimizer).gradient_norm
        self.gradient_norm.shard = shard
        for average in self.averages if shard.group is not None else ():
            average.shard(shard)
        if self.checkpoint is None:
            optimizer_state(optimizer, self.model)
        else:
            restore_training(self.checkpoint, self)
            self.numbers.set_state_dict(self.checkpoint.progress.get("watch", {}))

    def start(self):
        """Describes the run, opens its log, lets signals and the clock stop it from here on; returns the session."""
        if self.rank == 0:
            self._describe()
        outputs = self.outputs
        self.log = TrainingLog(
            self.folder,
            visualdl_dir=outputs.visualdl_dir or os.path.join(self.folder, "tb_log"),
            log_every=outputs.log_every,
            first_step=self.first_step,
            last_step=self.last_step,
            global_batch_size=self.sampler.global_batch_size,
            config=self.config,
            show_bar=outputs.show_bar,
            rank=self.rank,
        )
        saving = {"say": self.log.print, "background": outputs.async_save}
        self.snapshots = SnapshotSaver(self, **saving)
        self.saver = CheckpointSaver(
            self,
            save_total_limit=outputs.save_total_limit,
            metric=self.evaluation and self.evaluation.metric,
            after=self.snapshots,  # so that a run which is resumed lacks no snapshot of an earlier step
            **saving,
        )
        if self.rank == 0:
            self.saver.settle_best(self._checkpoints)  # evaluations of later steps are gone
        run_on_rank_0(self.snapshots.begin)
        if self._may_stop:
            self.stopping.start(self.first_step, rank=self.rank, world_size=self.world_size)
        self.model.train()
        return self

    def _describe(self):
        """Saves the resolved settings as `config.json` in the run's folder, and prints those that are no defaults."""
        os.makedirs(self.folder, exist_ok=True)
        path = os.path.join(self.folder, "config.json")
        write_json(path, self.config)
        say(f"settings that differ from the defaults (all of them: {path}):")
        for section, settings in changed_settings(self.config).items():
            if section == "features":  # in few words
                settings = {key: value for key, value in settings.items() if not key.startswith("channel_")}
                if settings.get("class_names"):
                    settings["class_names"] = f"{len(settings['class_names'])} names"
                if settings.get("vae"):
                    settings["vae"] = settings["vae"]["name"] or "not named"
                if settings.get("latent_normalization"):
                    settings["latent_normalization"] = describe_normalization(settings["latent_normalization"])
            shown = (
                f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
            )
            say(f"  {section}: {', '.join(shown)}")
        for note in filter(None, [*self.notes, *self.dataset.notes, *ineffective_settings(self.config)]):
            say(f"note: {note}")
        parameters = sum(math.prod(whole_shape(parameter)) for parameter in self.model.parameters())
        say(
            f"{self.config['model']['type']} with {parameters:,} parameters on {paddle.get_device()}, "
            f"{counted(self.world_size, 'process', 'processes')}; {counted(len(self.dataset), 'sample')} in "
            f"{self.dataset.features_dir}; training to step {self.last_step:,}; output in {self.folder}"
        )
        self._save_environment()
        if self.checkpoint is not None:
            say(f"resumed {self.checkpoint.source} at step {self.first_step}")

    def _save_environment(self):
        """Saves where and on what the run trains as `environment.json` in its folder, for tools/report.py."""
        device = paddle.get_device()
        features = encodable(os.path.abspath(self.dataset.features_dir))
        found = {"command": [encodable(word) for word in sys.argv], "folder": encodable(os.getcwd())}
        found |= {"features": features, "device": device}
        if device.startswith("gpu"):
            found["gpu"] = paddle.device.cuda.get_device_name()
        found |= {"processes": self.world_size, "started_at_step": self.first_step, **describe_environment()}
        write_json(os.path.join(self.folder, ENVIRONMENT), found)

    # A step, in the order of these calls. Only reports, validation, evaluation, previews and saves wait for the device.

    def add_losses(self, loss, losses):
        """Keeps a micro-batch's mean loss `()` for watch and report.

        Of `losses` (N,) each regularizer's is kept too, and then what the loss is without them.
        """
        loss, regularizers = loss.detach(), self.objective.regularizers
        parts = {part.name: losses[part.name].mean().detach() for part in regularizers}
        if parts:
            added = [part.sign * part.weight * parts[part.name] for part in regularizers]
            parts = {OWN: loss - sum(added), **parts}
        self.numbers.add(loss, parts)

    def begin_update(self, step):
        """Tells the watch that the optimizer's step `step` comes; see `training.supervision.number_watch`."""
        self.stopping.phase("updating the weights")
        self.learning_rate = self.optimizer.get_lr()
        self.numbers.begin_update(step, self.learning_rate, self.scaler)

    def end_update(self):
        """Closes the books of the step; the objective learns from it."""
        self.numbers.end_update(self.objective)
        self.objective.end_step()

    def after_step(self, step):
        """Does all that follows the update of step `step`: averages, report, what judges and shows them, checkpoint.

        Returns True if the run has been asked to stop: it is saved, and must leave its loop.
        """
        self.step = step
        snapshot = self.snapshots.due(step)
        for average in self.averages:
            if snapshot or average.due(step):
                average.update(self.model, master_weights(self.optimizer), step=step)
        if self.log.step_done(step):
            self.log.report(
                **self.numbers.take(),
                lr=self.learning_rate,
                grad_norm=self.gradient_norm.take(),
                epoch=self.sampler.epoch(step),
            )
        is_last = step == self.last_step
        if self.validation is not None and (is_last or step % self.config["data"]["validation_steps"] == 0):
            with self._pause("validating"):
                self.validation.run(self)
        best = False
        if self.evaluation is not None and (is_last or step % self.evaluation.steps == 0):
            with self._pause("evaluating"):
                best = self.evaluation.run(self)
        if self.preview is not None and step % self.outputs.preview_every == 0:
            with self._pause("drawing previews"):
                self.preview.run(self)
        if snapshot:
            self._save(self.snapshots, self.snapshots.path(step))
        stopped = self._may_stop and not is_last and self.stopping.due(step)
        if is_last or stopped or best or step % self.outputs.save_every == 0:
            self.save()
        return stopped

    def save(self):
        """Saves a checkpoint of the step that is done; a collective."""
        self._save(self.saver, os.path.join(self.folder, self.outputs.checkpoints.format(step=self.step)))

    def _save(self, saver, folder):
        self.numbers.check()
        with self._pause("saving"):
            saver.save(folder)

    @property
    def _checkpoints(self):
        return os.path.dirname(os.path.join(self.folder, self.outputs.checkpoints))

    @contextlib.contextmanager
    def _pause(self, phase):
        """Leaves what the block does with the network, in evaluation mode there, out of the reported speeds."""
        start, was_training = time.perf_counter(), self.model.training
        self.stopping.phase(phase)
        self.model.eval()
        yield
        if was_training:
            self.model.train()
        self.log.pause(time.perf_counter() - start)

    def progress(self):
        """Returns where the run stands, JSON values for its checkpoint."""
        seen = self.sampler.samples_seen(self.step)
        return {
            "global_step": self.step,
            "samples_seen": seen,
            "epoch": seen / len(self.dataset),
            "seed": self.config["training"]["seed"],
            "global_batch_size": self.config["training"]["global_batch_size"],
            "world_size": self.world_size,
            "num_samples": len(self.dataset),
            "watch": self.numbers.state_dict(),
        }

    def close(self, resume=""):
        """Waits for the last checkpoint, ends the log, and says where all is and what can be done with it.

        Args:
            resume: the value of --resume with which this command goes on, for a run that was stopped.
        """
        place = self._checkpoints
        if self.log is not None:
            self.snapshots.finish()
            self.saver.finish()
            self.log.close()
        if self.stopping.stopped:
            again, how = sys.argv, ""
            if resume and says_next():
                flags = [resume_flag(sys.argv), resume]
                again = [*(sys.argv[:-2] if sys.argv[-2:] == flags else sys.argv), *flags]
                how = f"; the same command goes on with {shlex.join(flags)}"
            command = [] if "PADDLE_TRAINER_ID" in os.environ else next_commands(again)
            done = f"after step {self.step} of {self.last_step}, saved in {place}"
            self.stopping.leave("\n".join([done + how, *command]))
        if self.rank == 0 and self.first_step >= self.last_step:
            say(f"nothing to do: step {self.first_step} of {self.last_step} is reached by {self.checkpoint.source}")
        elif self.rank == 0:
            say(f"done: step {self.last_step}, checkpoints in {place}, VisualDL log in {self.log.visualdl_dir}")
        if self.rank == 0:
            self._say_next()

    def _say_next(self):
        """Prints how to draw images with the run, export it and report it, and how to make averages of other widths."""
        kind = MODEL_TYPES[self.config["model"]["type"]]
        checkpoint = os.path.join(self.folder, self.outputs.checkpoints.format(step=self.last_step))
        if self.first_step >= self.last_step:
            checkpoint = self.checkpoint.source
        draw = ["--model_path", checkpoint, *first_images_flags(self.config["model"])]
        export = ["--model_path", checkpoint, "--output", os.path.join(self.folder, "pipeline")]
        vae, told = self.outputs.vae, self.config["features"]["vae"] or {}
        if not vae and told.get("latent_channels") not in (None, 4):  # the default autoencoder's
            vae = "VAE"
        if vae and not told.get("name"):  # else they find the features' own
            draw, export = [*draw, "--vae", vae], [*export, "--vae", vae]
        converter = f"tools/convert_{kind.pipeline[:3].lower()}_to_ppdiffusers.py"
        commands = [[kind.demo, *draw], [converter, *export], ["tools/report.py", self.folder]]
        if self.config["training"]["ema_profiles"]:
            averages = ["--run", self.folder, "--std", "0.03", "0.07", "0.15"]
            averages += ["--output", os.path.join(self.folder, "averages")]
            commands.append(["tools/reconstruct_ema.py", *averages])
        say_next(*commands)


def build_session(config, data, folder, **options):
    """Returns a `Session`, to be started, with an optimizer of its own; arguments as of `Session`."""
    session = Session(config, data, folder, **options)
    session.precision.decorate(session.model)
    session.attach(session.build_optimizer(), session.precision.scaler())
    return session
