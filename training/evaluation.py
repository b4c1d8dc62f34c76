"""Evaluation while training: metrics of samples of the averages. Their curve says which checkpoint is the best."""

import contextlib
import dataclasses
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice

import numpy as np
import paddle

from config.options import DEFAULT_VAE, SIT_VAE
from config.schema import MODEL_TYPES, internal_guidance_block
from evaluation.networks import load_features
from evaluation.run import cautions, compute_metrics, extract, gather, load_reference
from features.autoencoder import open_vae
from runtime.collective import run_on_every_rank, run_on_rank_0
from runtime.files import sha256_of_file
from runtime.process import one_line, say
from sampling.generator import Generator, latent_sizes
from sampling.guidance_settings import INTERNAL, configured_guidance
from sampling.many import choose_labels, choose_tile, draw_images
from sampling.schedulers import sampler_in_training
from training.averages import ema_weights
from training.checkpoints.best import is_best, read_best
from training.parallel.shares import LocalShard


class _Together(Exception):
    """Carries an error with which every rank leaves an evaluation after the same round."""

    def __init__(self, error):
        super().__init__()
        self.error = error


class Evaluation:
    """Draws the same noise and classes at every call, as tools/sample_npz.py does with this seed, and compares them.

    All ranks make one; each draws its share of the samples. The reference's features are extracted here, once.

    Args:
        vae: folder or name of an `AutoencoderKL`, None for the features' own.

    Raises:
        ValueError: one line: features, weights, reference or autoencoder that are not there or don't fit together.
    """

    SEED = 0
    PATIENCE = 1.0  # seconds between two signs of life while rank 0 computes

    def __init__(self, objective, config, *, vae):
        settings, model = config["evaluation"], config["model"]
        is_diffusion = config["objective"]["type"] == "diffusion"
        self.steps, self.metrics, self.batch_size = settings["steps"], settings["metrics"], settings["batch_size"]
        self.sampling = {key: settings[key] for key in ("num_inference_steps", "guidance_scale")}
        guidance, is_guided = configured_guidance(config), settings["guidance_scale"] != 1
        always = ("timestep_shift", *INTERNAL)
        self.sampling |= {name: value for name, value in guidance.items() if is_guided or name in always}
        sampler = sampler_in_training(objective, config, settings["num_inference_steps"])
        self.network = load_features(settings["features"], weights=settings["inception_weights"])
        default = DEFAULT_VAE if MODEL_TYPES[model["type"]].pipeline == "DiTPipeline" else SIT_VAE
        wanted = {"default": default, "flag": "--vae", "channels": model["in_channels"]}
        wanted["normalization"] = config["features"]["latent_normalization"]
        vae, notes = open_vae(vae, config["features"]["vae"], **wanted)
        keywords = latent_sizes(model) | ({"guided_channels": None} if is_diffusion else {})
        keywords["has_second"] = internal_guidance_block(config) is not None
        self.generator = Generator(None, sampler, vae=vae, **keywords)
        classes = config["data"]["classes"] or model["num_classes"]
        self.labels = choose_labels(settings["labels"], settings["num_samples"], classes, self.SEED)
        self.reference = load_reference(
            settings["reference"],
            self.network,
            self.metrics,
            sample_size=self.generator.image_size,
            num_samples=len(self.labels),
            batch_size=self.batch_size,
        )
        for note in [*notes, *self.reference.notes] if paddle.distributed.get_rank() == 0 else ():
            say(f"note: {note}")
        paths = {key: settings[key] for key in ("reference", "features")}
        names = {key: path and os.path.basename(os.path.normpath(path)) for key, path in paths.items()}
        given = {**self.network.settings, **names, "labels": settings["labels"], "seed": self.SEED, **self.sampling}
        given["num_reference"] = self.reference.count
        is_file = names["reference"] is not None and os.path.isfile(settings["reference"])
        if is_file and paddle.distributed.get_rank() == 0:  # which writes the rows; the file may have gigabytes
            given["reference_sha256"] = sha256_of_file(settings["reference"]).hex()
        self.settings = json.loads(json.dumps(given))  # of the numbers; rows with others are not compared
        self._cautioned = False

    @property
    def metric(self):
        """Is the one that decides which checkpoint is the best."""
        return self.metrics[0]

    def run(self, session):
        """Logs the metrics after the session's step, of the first of its averages, or the network without any.

        Returns, on every rank, whether they are the best so far. Without numbers, because samples or features are not
        finite or the run is asked to stop, it says so. A collective.
        """
        average = session.averages[0] if session.averages else None
        try:
            with ema_weights(session.model, average, session.optimizer) if average else contextlib.nullcontext():
                samples = gather(self._extract(session))
            numbers = self._patiently(
                session, lambda: compute_metrics(samples, self.reference, self.metrics, self.SEED)
            )
        except (ValueError, MemoryError) as error:  # the watch on the numbers ends training, not its evaluations
            reason = one_line(error)
            if isinstance(error, MemoryError):
                reason = f"not enough memory; give the section evaluation a smaller batch_size than {self.batch_size}"
            session.log.print(f"note: there is no evaluation of step {session.step}: {reason}")
            return False

        best = run_on_rank_0(lambda: self._report(session, numbers, samples))
        self._cautioned = True
        return best

    def _report(self, session, numbers, samples):
        for caution in [] if self._cautioned else cautions(samples, self.reference, self.metrics):
            session.log.print(f"note: {caution}")
        numbers = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if bad := [name for name, value in numbers.items() if value is None]:
            session.log.print(f"note: step {session.step}: {', '.join(bad)} of its samples is not finite")
        row = session.log.report_evaluation(session.step, numbers, samples.count, self.settings)
        session.saver.wait()  # it may be writing the best one so far
        return is_best(row, self.metric, read_best(session.folder))

    @paddle.no_grad()
    def _extract(self, session):
        """Returns the `Extracted` of this rank's share of the samples; raises `ValueError` on all ranks or none.

        Ranks that compute a network together draw the same samples, and the first of them keeps them.
        """
        model, sampler = session.model, session.sampler
        shard = LocalShard(model, session.optimizer)
        sharing = shard.group.nranks if shard.weights_are_sharded else 1
        share, shares = sampler.rank // sharing, sampler.world_size // sharing
        keeps = session.rank == share * (session.world_size // shares)
        count = len(self.labels)
        first = count * share // shares
        indices = np.arange(first, count * (share + 1) // shares)

        def network(x, t, y, **hooks):
            with session.precision.autocast():
                return model(x, t, y, **hooks).astype("float32")

        generator = dataclasses.replace(self.generator, network=network)
        settings = {"seed": self.SEED, "batch_size": self.batch_size, **self.sampling}
        drawn = draw_images(generator, indices, self.labels[indices], **settings)
        rounds = math.ceil(math.ceil(count / shares) / choose_tile(self.batch_size))  # the same on all ranks
        batches = self._together(drawn, rounds, keeps, session.stopping)
        try:
            return extract(self.network, batches, metrics=self.metrics, first=first, source="the samples")
        except _Together as error:
            raise error.error from None
        except (ValueError, MemoryError) as error:
            run_on_every_rank(lambda error=error: error)  # the others find it in their next round
            raise

    @staticmethod
    def _together(drawn, rounds, keeps, stopping):
        """Yields the images `drawn`, in batches, if this rank `keeps` them; all ranks leave after the same round."""
        for _ in range(rounds):
            batch = []

            def draw(batch=batch):
                batch.extend(images for _, images in islice(drawn, 1))
                return stopping.request

            stopping.phase("evaluating")
            try:
                asked = run_on_every_rank(draw)
            except (ValueError, MemoryError) as error:
                raise _Together(error) from None
            if any(asked):
                stopping.agree(True)
                raise _Together(ValueError("the run is asked to stop"))
            yield from batch if keeps else ()

    def _patiently(self, session, compute):
        """Returns what `compute()` returns on rank 0; meanwhile all ranks give signs of life. A collective."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(compute) if session.rank == 0 else None
            while not run_on_rank_0(lambda: bool(wait([future], self.PATIENCE).done)):
                session.stopping.phase("evaluating")
            return run_on_rank_0(lambda: future.result())
