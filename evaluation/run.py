"""From images to metrics: features over all ranks, those of a reference or its stored statistics, and the numbers.

network = load_features("inception")
reference = load_reference(path, network, ["fid", "kid"], sample_size=(256, 256))  # on all ranks
samples = extract_on_ranks(network, batches, metrics=reference.metrics)  # batches of this rank's images
if rank == 0:
    numbers = compute_metrics(samples, reference, reference.metrics, seed=0)
"""

import os
from dataclasses import dataclass, field

import numpy as np

from config.options import METRICS
from evaluation import metrics as formulas
from evaluation.sets import MOMENTS, open_images, read_statistics, size_in_words
from evaluation.statistics import Statistics
from features.npy import npz_names
from runtime.collective import run_on_every_rank
from runtime.progress import tqdm
from runtime.untrusted import shortened

METRIC_NAMES = dict(zip(METRICS, ("FID", "sFID", "Inception Score", "precision", "recall", "KID", "MIND"), strict=True))
# The output of a feature network that a metric takes, of which these take every row.
OUTPUTS = {**dict.fromkeys(METRICS, "pool"), "sfid": "spatial", "inception_score": "logits"}
OF_ROWS = {"precision", "recall", "kid", "mind"}
SPLIT_SIZE, NEIGHBOURS, SUBSETS, SUBSET_SIZE, PROJECTIONS = 5000, 3, 100, 1000, 1000
USUAL_COUNT = 10_000  # samples; of fewer FID is called biased
ROWS_AT_ONCE = 8192  # gathered from every rank in one message


@dataclass
class Extracted:
    """What metrics need of a set of images, in the order of the images.

    Attributes:
        count: images.
        rows: `pool` (N, D) and `probabilities` (N, K), float32, if a metric takes them.
        moments: `Statistics` of the outputs `pool`, `spatial`, if a metric takes them.
    """

    count: int = 0
    rows: dict = field(default_factory=dict)
    moments: dict = field(default_factory=dict)


def extract(network, batches, *, metrics, first=0, source="images"):
    """Returns the `Extracted` of images that come in `batches`, uint8 (n, H, W, 3): what these `metrics` need.

    ValueError names the number of an image whose features are not finite; `first` is that of the first one.
    """
    metrics, found, blocks = set(metrics), Extracted(), {}
    outputs = dict.fromkeys(OUTPUTS[metric] for metric in METRICS if metric in metrics)
    for images in batches:
        features = network(images)
        for output in outputs:
            good = np.isfinite(features[output]).reshape(len(images), -1).all(axis=1)
            if not good.all():
                number = first + found.count + int(np.argmin(good))
                raise ValueError(
                    f"{source}: the features ({output}) of image {number}, counted from 0, hold NaN or infinity; "
                    "expected finite ones: are these the right weights?"
                )
        if metrics & OF_ROWS:
            blocks.setdefault("pool", []).append(features["pool"])
        if "inception_score" in metrics:
            blocks.setdefault("probabilities", []).append(formulas.softmax(features["logits"]).astype("float32"))
        for output in {OUTPUTS[metric] for metric in metrics & {"fid", "sfid"}}:
            statistics = found.moments.setdefault(output, Statistics(features[output].shape[1]))
            statistics.add(features[output])
        found.count += len(images)
    found.rows = _joined(blocks)
    return found


def _joined(blocks):
    """Returns `{name: array}` of `{name: [array]}`, which is emptied: only one of them is held twice."""
    joined = {}
    while blocks:
        name, arrays = blocks.popitem()
        joined[name] = np.concatenate(arrays)
    return joined


def own_part(count):
    """Returns (start, stop), this rank's part of `count` images: consecutive, so that the ranks' parts are in order."""
    import paddle.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    return count * rank // world, count * (rank + 1) // world


def gather(extracted):
    """Returns on rank 0 what all ranks have extracted, in the order of the ranks, and on the others None.

    One rank after the other sends its own, rows some thousand at once, so that none but the first holds all of them.
    """
    import paddle.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return extracted

    def sent(source, value):
        box = [value]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    whole = Extracted(extracted.count, {}, extracted.moments)
    blocks = {name: [rows] for name, rows in extracted.rows.items()}
    for source in range(1, world):
        count, moments = sent(source, (extracted.count, extracted.moments))
        for start in range(0, count, ROWS_AT_ONCE):
            stop = start + ROWS_AT_ONCE
            part = sent(source, {name: rows[start:stop] for name, rows in extracted.rows.items()})
            for name, rows in part.items() if rank == 0 else ():
                blocks.setdefault(name, []).append(rows)
        whole.count += count
        for output, statistics in moments.items() if rank == 0 else ():
            if output in whole.moments:
                whole.moments[output].merge(statistics)
            else:
                whole.moments[output] = statistics
    if rank > 0:
        return None
    whole.rows = _joined(blocks)
    return whole


def extract_on_ranks(network, batches, *, metrics, first=0, source="images"):
    """Returns the gathered `Extracted` of all ranks' batches on rank 0, None on the others; arguments of `extract`.

    An error on one rank is raised on every rank.
    """
    own = []
    run_on_every_rank(lambda: own.append(extract(network, batches, metrics=metrics, first=first, source=source)))
    return gather(*own)


def extract_set(network, images, *, metrics, batch_size, what):
    """Returns `extract_on_ranks` of an `ImageSet`, of which each rank takes its part; `what` is for the progress."""
    start, stop = own_part(len(images))
    batches = shown(images.batches(batch_size, start, stop), stop - start, f"features of the {what}")
    return extract_on_ranks(network, batches, metrics=metrics, first=start, source=images.path)


def shown(batches, count, title):
    """Yields batches of `count` images and shows on rank 0 how many are done, and how many a second."""
    import paddle.distributed as dist

    with tqdm(total=count, desc=title, unit=" images", disable=dist.get_rank() > 0) as bar:
        for images in batches:
            yield images
            bar.update(len(images))


class Reference:
    """What samples are compared with: images, stored statistics, or both; see `open_reference`.

    Attributes:
        images: an `ImageSet`, or None. stored: what `read_statistics` returns.
        metrics: those that were chosen. left_out: `{metric: why it is impossible}` where all that are possible were.
        extracted: the features of the images, on rank 0, if a chosen metric takes them.
        notes: sentences for the user.
    """

    def __init__(self, path, images, stored):
        self.path, self.images, self.stored = path, images, stored
        self.metrics, self.left_out, self.extracted = [], {}, None
        self.notes = [*images.notes] if images else []

    @property
    def count(self):
        """The number of images, or None where statistics don't tell it."""
        return len(self.images) if self.images else self.stored.get("num_images")

    def has_stored(self, metric):
        """Returns whether the statistics that a metric takes are stored."""
        return metric in ("fid", "sfid") and MOMENTS[OUTPUTS[metric]][0] in self.stored

    def why_not(self, metric, outputs, num_samples=None):
        """Returns why a metric can't be had with the `outputs` of a network, or None if it can."""
        output = OUTPUTS[metric]
        if output not in outputs:
            return f"these features have no output {output!r}"
        counts = [count for count in (self.count, num_samples) if count is not None]
        if metric in ("precision", "recall") and min(counts, default=NEIGHBOURS + 1) <= NEIGHBOURS:
            return f"it takes more than {NEIGHBOURS} images of each set"
        if self.images or metric == "inception_score" or self.has_stored(metric):
            return None
        if not self.stored:
            return "there is no reference"
        if metric in OF_ROWS:
            return f"the reference {self.path} holds statistics and no images"
        return f"the reference {self.path} holds neither images nor {' and '.join(MOMENTS[output])}"

    def choose(self, asked, outputs, num_samples=None):
        """Chooses `metrics`: those `asked` for, or with None all that are possible; the others are `left_out`.

        ValueError for one asked for that is unknown or impossible.
        """
        reasons = {metric: self.why_not(metric, outputs, num_samples) for metric in METRICS}
        possible = [metric for metric, reason in reasons.items() if not reason]
        for metric in asked or ():
            if metric not in METRICS:
                raise ValueError(f"metrics: {shortened(metric)} is unknown; expected some of {', '.join(METRICS)}")
            if reason := reasons[metric]:
                can = ", ".join(possible) or "none"
                raise ValueError(f"metrics: {metric} is impossible: {reason}; possible: {can}")
        self.metrics = [metric for metric in METRICS if metric in (asked or possible)]
        self.left_out = {} if asked else {metric: reason for metric, reason in reasons.items() if reason}
        if not self.metrics:
            raise ValueError(f"{self.path}: no metric is possible with these features: they have {', '.join(outputs)}")

    def check(self, network, sample_size):
        """Raises ValueError unless samples of `sample_size` (height, width) and their features can be compared."""
        if self.images and self.images.image_size != tuple(sample_size):
            raise ValueError(
                f"{self.path}: holds images of {size_in_words(self.images.image_size)}, the samples are of "
                f"{size_in_words(sample_size)}; expected one size (tools/evaluate.py --image_size N crops)"
            )
        made, using = self.stored.get("settings", {}), {**network.settings, "image_size": list(sample_size)}
        for key in ("features", "preprocessing", "image_size", "weights_sha256", "program_sha256"):
            theirs, ours = made.get(key), using.get(key)
            if theirs in (None, ours) or key == "features" and "program_sha256" in made and "program_sha256" in using:
                continue
            what = "images" if key == "image_size" else "features"
            told = f"{self.path}: statistics of other {what}: {key} {shortened(theirs)}, not {shortened(ours)}"
            if key != "weights_sha256" or ours is None or using["features"] != "inception":
                raise ValueError(told)
            self.notes.append(f"{told}; the same weights in another format are no matter")
        used = [(output, mean) for output, (mean, _) in MOMENTS.items() if mean in self.stored]
        used = [(output, mean) for output, mean in used if output in {OUTPUTS[metric] for metric in self.metrics}]
        features = network(np.full((1, *sample_size, 3), 128, "uint8"))  # refuses what it must before the work
        for output, mean in used:
            width, theirs = features[output].shape[1], len(self.stored[mean])
            if theirs != width:
                raise ValueError(f"{self.path}: {mean} is of {theirs} features, this network's {output} has {width}")

    def extract(self, network, batch_size, *, moments=False):
        """Extracts on all ranks what the chosen metrics need of the images; with `moments` statistics in any case."""
        needed = {m for m in self.metrics if m != "inception_score" and not self.has_stored(m)}
        if moments:
            needed |= {m for m in ("fid", "sfid") if OUTPUTS[m] in network.outputs}
        if needed:
            self.extracted = extract_set(network, self.images, metrics=needed, batch_size=batch_size, what="reference")

    def moments(self, output):
        """Returns mean (D,) and covariance (D, D) of an output: the stored ones if there are any."""
        mean, covariance = MOMENTS[output]
        if mean in self.stored:
            return self.stored[mean], self.stored[covariance]
        statistics = self.extracted.moments[output]
        return statistics.mean, statistics.covariance


def open_reference(path, *, image_size=None, sample_size=None):
    """Returns the `Reference` in a folder of images or a `.npz` of `arr_0`, statistics by ADM's names, or both.

    Nothing is extracted yet. `image_size` and errors are those of `evaluation.sets`, whose default size is that of
    samples of `sample_size` (height, width), if they are squares.
    """
    default_size = sample_size[0] if sample_size and sample_size[0] == sample_size[1] else None
    stored = read_statistics(path) if os.path.isfile(path) else {}
    has_images = not stored or "arr_0" in npz_names(path)
    images = open_images(path, image_size=image_size, default_size=default_size) if has_images else None
    return Reference(path, images, stored)


def load_reference(path, network, metrics=None, *, sample_size, num_samples=None, batch_size=64, image_size=None):
    """Returns a `Reference` that is ready for `compute_metrics`; all ranks call it, which share the work.

    `path` is None for the Inception Score alone; `metrics` what is asked for, or None for all that are possible;
    `sample_size` the samples' (height, width). ValueError, one line, for a file that is no reference, a metric that is
    impossible, images of another size, statistics of other features.
    """
    options = {"image_size": image_size, "sample_size": sample_size}
    reference = Reference(None, None, {}) if path is None else open_reference(path, **options)
    reference.choose(metrics, network.outputs, num_samples)
    reference.check(network, sample_size)
    reference.extract(network, batch_size)
    return reference


def compute_metrics(samples, reference, metrics, seed=0):
    """Returns `{name: number}` for `metrics` of an `Extracted` and a `Reference`; with `kid` its standard error too.

    `seed` draws the subsets of KID and the projections of MIND.
    """
    found = {}
    for metric in ("fid", "sfid"):
        if metric in metrics:
            ours = samples.moments[OUTPUTS[metric]]
            moments = ours.mean, ours.covariance
            found[metric] = formulas.frechet_distance(*moments, *reference.moments(OUTPUTS[metric]))
    if "inception_score" in metrics:
        found["inception_score"] = formulas.inception_score(samples.rows["probabilities"], split_size=SPLIT_SIZE)
    if not OF_ROWS.isdisjoint(metrics):
        ours, theirs = samples.rows["pool"], reference.extracted.rows["pool"]
    if {"precision", "recall"} & {*metrics}:
        both = formulas.precision_recall(theirs, ours, k=NEIGHBOURS)
        found |= {name: value for name, value in zip(("precision", "recall"), both, strict=True) if name in metrics}
    if "kid" in metrics:
        estimates = formulas.kernel_distances(ours, theirs, num_subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=seed)
        found["kid"], found["kid_standard_error"] = formulas.mean_and_error(estimates)
    if "mind" in metrics:
        found["mind"] = formulas.mind(ours, theirs, num_projections=PROJECTIONS, seed=seed)
    return {name: float(value) for name, value in found.items()}


def cautions(samples, reference, metrics):
    """Returns sentences on what few samples do to the distances among `metrics` of an `Extracted` and a `Reference`."""
    distances = [metric for metric in ("fid", "sfid") if metric in metrics]
    if not distances:
        return []
    found = []
    if samples.count < USUAL_COUNT:
        names = " and ".join(METRIC_NAMES[metric] for metric in distances)
        found.append(
            f"{names} of N = {samples.count:,} samples: biased upwards, to be compared only with those of as many; "
            "papers take 50,000. KID is not biased"
        )
    width = max(len(samples.moments[OUTPUTS[metric]].mean) for metric in distances)
    counts = {"samples": samples.count, "reference images": reference.count}
    if reference.images and all(map(reference.has_stored, distances)):  # of other images
        del counts["reference images"]
    few = [f"{count:,} {what}" for what, count in counts.items() if count is not None and count <= width]
    if few:
        found.append(f"{' and '.join(few)} for {width:,} features: the covariances are singular")
    return found
