"""What can be said of a run's command line before Paddle is imported, once its data are open."""

import contextlib

import numpy as np

from config.schema import own_config
from sampling.labels import find_classes, weights_labels
from training.checkpoints.find import check_run
from training.checkpoints.read import check_pretrained
from weights.runs import find_checkpoints

PREVIEW_CLASSES = 10  # at most, where none are asked for


def check_start(args, config):
    """Raises ValueError for a checkpoint, weights or preview classes of either loop's flags that don't fit the config.

    A run's folder to take weights from becomes its newest checkpoint. All is checked again when it is used.
    """
    if args.resume not in (None, "auto"):
        for source in find_checkpoints(args.resume, restore=False)[:1]:
            theirs = None
            with contextlib.suppress(ValueError):  # a damaged one is passed over later
                theirs = own_config(source)
            if theirs is not None:
                check_run(source, theirs, config)
    elif args.pretrained_model_path is not None:
        args.pretrained_model_path = check_pretrained(args.pretrained_model_path, config)
    if args.image_logging_steps > 0:
        choose_classes(args.preview_classes, weights_labels(None, config)[0], config)


def choose_classes(wanted, names, config):
    """Returns the ids of the rows of a preview, int64: of the classes `wanted`, or of some that are trained.

    `names` are the set's, `{id: name}`. ValueError for a class that is not there.
    """
    num_classes = config["model"]["num_classes"]
    if wanted is not None:
        return np.array(find_classes(wanted, names, num_classes, flag="--preview_classes"), "int64")
    trained = np.unique(config["data"]["classes"] or sorted(names) or range(num_classes))
    places = np.linspace(0, len(trained) - 1, min(PREVIEW_CLASSES, len(trained))).round().astype("int64")
    return trained[places]
