"""Trainings on digits, and what their pictures are worth: what quality.py and recipes.py share."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from runtime.files import write_json
from runtime.process import say
from runtime.untrusted import read_json

ROOT = Path(__file__).resolve().parent.parent
VAE = str(ROOT / "assets" / "digits_vae")
TILE = 250  # images that the network computes at once


def prepare(data):
    """Makes the digits and their features in a folder, unless they are there."""
    from tools import extract_features, prepare_digits

    prepare_digits.main(["--output", str(data / "digits")])
    if not (data / "ready").exists():
        extract_features.main(extraction(data))
        (data / "ready").touch()


def extraction(data):
    """Returns the flags with which the features of digits are extracted."""
    words = {"data_path": data / "digits/train", "feature_path": data / "features", "vae": VAE, "image_size": 32}
    words |= {"batch_size": 50, "seed": 0, "device": "cpu"}
    return [f"--{name}={value}" for name, value in words.items()]


def add_encoder(data):
    """Adds the features of an encoder that knows digits to those of `prepare`, 4 x 4 tokens each."""
    from tools import extract_features, train_digits_classifier

    if not (data / "encoder_ready").exists():
        words = {"data_path": data / "digits/train", "heldout": data / "digits/heldout", "output": data / "encoder"}
        train_digits_classifier.main(
            ["--as_encoder", "--overwrite", *(f"--{key}={word}" for key, word in words.items())]
        )
        extract_features.main([*extraction(data), f"--encoder={data / 'encoder'}", "--token_grid=4"])
        (data / "encoder_ready").touch()


def open_judge(data, num_samples, metrics, seed):
    """Returns the `Judge` of balanced samples against the training digits, on the features of their classifier."""
    from evaluation.networks import load_features
    from evaluation.sweep import Judge
    from sampling.many import choose_labels

    labels = choose_labels("balanced", num_samples, 10, 0)
    return Judge(str(data / "digits/train"), load_features("digits"), labels, metrics=metrics, seed=seed, tile=TILE)


def train(config, data, output, **flags):
    """Trains a network of a raw config in the folder `output` by the hand-written loop; an interrupted run goes on.

    Args:
        data: the folder of `prepare`. flags: of the command line.

    Raises ValueError for a folder with the run of another config.
    """
    path = output / "config.json"
    if path.exists() and read_json(path) != config:
        raise ValueError(f"{output}: holds the run of another config; delete it")
    os.makedirs(output, exist_ok=True)
    write_json(path, config)
    flags = {
        "config_file": path,
        "feature_path": data / "features",
        "image_size": 32,
        "output": output,
        "resume": "auto",
        "device": "cpu",
        "num_workers": 0,
        **flags,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    command([ROOT / "train_image_generation_notrainer.py", *words], output / "log.txt")


def command(words, log):
    """Runs a command of the project in a process of its own, with its output in a file."""
    say(f"training, see {log}")
    with open(log, "ab") as file:
        done = subprocess.run([sys.executable, *map(str, words)], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise ValueError(f"{Path(words[0]).name}: exit code {done.returncode}, see {log}")


def point_path(setting, seed, folder):
    """Returns the file in a folder that has the metrics of a setting, a JSON value, for a seed."""
    name = hashlib.sha256(json.dumps([setting, seed], sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{name}.json"


def measure(runs, judge, setting, folder):
    """Returns the row of a setting, of its file in a folder if that is there, which is written else.

    Args:
        runs: has `seed`, and `sampler(setting)`, the generator. setting: a JSON value, with `sampling`.
    """
    path = point_path(setting, runs.seed, folder)
    if not path.exists():
        start = time.perf_counter()
        numbers = judge.measure(runs.sampler(setting), **setting["sampling"])
        row = {"seed": runs.seed, "setting": setting, **numbers, "seconds": round(time.perf_counter() - start, 1)}
        write_json(path, row)
    return read_json(path)


def check_settings(output, settings):
    """Raises ValueError for a folder of other settings, whose numbers can't be compared."""
    path = output / "settings.json"
    if path.exists() and (theirs := read_json(path)) != settings:
        changed = [name for name in settings if theirs.get(name) != settings[name]]
        raise ValueError(f"{output}: holds numbers of another {', '.join(changed)}; give another --output")
    os.makedirs(output, exist_ok=True)
    write_json(path, settings)
