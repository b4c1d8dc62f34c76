"""The recorder trains every model by both loops, samples the averages, and keeps or checks the numbers.

    python tests/golden/runs/record.py                      # writes dit.txt and the others here
    python tests/golden/runs/record.py --check              # compares with them, bit for bit
    python tests/golden/runs/record.py --check --tolerance 2e-4 DiT SiT

Bits are the same on one machine and one Paddle only: what another processor rounds differently grows over the steps.
So check bit for bit where you have recorded, before and after a change that must not change numbers. One of some 200
runs differed by a last bit (6e-8) on a busy machine, for a reason that was not found: repeat such a check before you
believe it. Other instruction sets were 6e-7 apart at most.

It uses what the pages document and nothing else (commands, flags, config keys, files, `models`, `diffusion`,
`transport`), so that it outlives whatever happens behind these.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
PIPELINE = ROOT / "tests" / "data" / "sit_pipeline_2026"
LOOPS = ("trainer", "notrainer")
STEPS = 20
SAVE_EVERY = 10
TINY = {"sample_size": 8, "patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
MODELS = {
    "DiT": {"type": "DiT", **TINY, "num_classes": 10},
    "SiT": {"type": "SiT", **TINY, "num_classes": 10},
    "LargeDiT": {"type": "LargeDiT", **TINY, "num_classes": 10, "multiple_of": 16, "qk_norm": True},
    "LargeSiT": {"type": "LargeSiT", **TINY, "num_classes": 10, "multiple_of": 16},
    "LightningDiT": {"type": "LightningDiT", **TINY, "num_classes": 10, "qk_norm": True},
}
TRANSPORT = {"type": "transport"}
OBJECTIVES = {  # of the others: diffusion
    "SiT": TRANSPORT,
    "LargeSiT": TRANSPORT,
    "LightningDiT": {**TRANSPORT, "timestep_sampling": "logit-normal", "cosine_loss": True},
}
TRAINING = {
    "use_ema": True,
    "ema_decay": 0.9,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 3,
    "max_grad_norm": 0.4,  # half of the steps are clipped
    "max_steps": STEPS,
}


def table_path(kind):
    """The table of a model, or of `SiTPipeline`: `LargeDiT` has large_dit.txt."""
    return FOLDER / f"{re.sub('(?<=.)(?=[DS]iT|Pipeline)', '_', kind).lower()}.txt"


def objective(kind):
    return OBJECTIVES.get(kind, {"type": "diffusion"})


def write_inputs(folder):
    """The features (40 random latents of 10 classes, two epochs of a run) and a config of every model."""
    random = np.random.RandomState(0)
    for part in ("features", "labels"):
        (folder / "features" / f"imagenet64_{part}").mkdir(parents=True, exist_ok=True)
    for index in range(40):
        latent = random.normal(size=(1, 4, 8, 8)).astype("float32")
        np.save(folder / "features" / "imagenet64_features" / f"{index}.npy", latent)
        np.save(folder / "features" / "imagenet64_labels" / f"{index}.npy", np.array([index % 10]))
    for kind, model in MODELS.items():
        config = {"model": model, "objective": objective(kind), "training": TRAINING}
        (folder / f"{kind}.json").write_text(json.dumps(config, indent=2))


def arguments(loop, kind, output, resume=None):
    """A run's flags; its inputs and outputs lie in the working folder, so that no run writes where that is."""
    flags = {"config_file": f"{kind}.json", "feature_path": "features", "device": "cpu"}
    if loop == "trainer":
        flags |= {"resolution": 64, "output_dir": output, "per_device_train_batch_size": 4, "logging_steps": 1}
        flags |= {"save_steps": SAVE_EVERY, "dataloader_num_workers": 0, "seed": 0}
        flags |= {"resume_from_checkpoint": resume} if resume else {}
    else:
        flags |= {"image_size": 64, "results_dir": output, "global_batch_size": 4, "log_every": 1}
        flags |= {"ckpt_every": SAVE_EVERY, "num_workers": 0, "global_seed": 0}
        flags |= {"resume": resume} if resume else {}
    return [f"--{name}={value}" for name, value in flags.items()]


def checkpoint(loop, output, step=STEPS):
    """The folder of a step's checkpoint."""
    if loop == "trainer":
        return output / f"checkpoint-{step}"
    return next(output.glob(f"*/checkpoints/{step:07d}"))


def read_training(output):
    """`{"step": ..., "loss": ..., "grad_norm": ...}` of a run's metrics.jsonl, arrays over the steps."""
    path = next(path for pattern in ("metrics.jsonl", "*/metrics.jsonl") for path in output.glob(pattern))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: np.array([row[name] for row in rows]) for name in ("step", "loss", "grad_norm")}


def draw_samples(folder):
    """`{sampler: two images}` by the averages of a checkpoint: 10 evaluations, guidance 4, noise of fixed seeds."""
    import paddle

    from diffusion import create_diffusion
    from models import build_model
    from transport import Sampler, create_transport

    config = json.loads((folder / "config.json").read_text())
    kind = config["model"]["type"]
    model = build_model(config)
    missing, unexpected = model.set_state_dict(paddle.load(str(folder / "ema_state.pdparams")))
    assert not missing and not unexpected
    model.eval()
    noise = paddle.to_tensor(np.random.RandomState(1).normal(size=(2, 4, 8, 8)).astype("float32"))
    noise = paddle.concat([noise, noise])
    guidance = {"y": paddle.to_tensor([3, 7, 10, 10]), "cfg_scale": 4.0}  # label 10: the null class
    if objective(kind)["type"] == "diffusion":
        diffusion = create_diffusion("10")
        options = {"noise": noise, "clip_denoised": False, "model_kwargs": guidance}
        samplers = {
            "ddim": lambda: diffusion.ddim_sample_loop(model.forward_with_cfg, noise.shape, **options),
            "ddpm": lambda: diffusion.p_sample_loop(model.forward_with_cfg, noise.shape, **options),
        }
    else:
        sampler = Sampler(create_transport())
        draw = {"ode": sampler.sample_ode(sampling_method="euler", num_steps=11)}
        draw["sde"] = sampler.sample_sde(sampling_method="Euler", num_steps=10)
        samplers = {
            name: lambda sample=sample: sample(noise, model.forward_with_cfg, **guidance)[-1]
            for name, sample in draw.items()
        }
    samples = {}
    with paddle.no_grad():
        for name, sample in samplers.items():
            paddle.seed(2)
            samples[name] = sample()[:2].numpy()
    return samples


def lay_out_pipeline(folder):
    """A copy of the kept pipeline folder in `folder`, with the digits' autoencoder: it is not kept twice."""
    shutil.copytree(PIPELINE, folder, dirs_exist_ok=True)
    shutil.copy(ROOT / "assets" / "digits_vae" / "model_state.pdparams", folder / "vae")
    return folder


def draw_pipeline(folder):
    """Latents and some pixels of two images by `SiTPipeline` from its folder, six points of time."""
    import paddle

    from sampling import SiTPipeline

    pipe = SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def draw(**options):
        generator = paddle.Generator().manual_seed(3)  # just before the call: a CPU has one for all
        return pipe(pipe.get_label_ids(["3", "7"]), num_inference_steps=6, generator=generator, **options).images

    latents = draw(output_type="latent").numpy()
    return {"latents": latents, "pixels": np.ascontiguousarray(draw(sampler="sde", output_type="np")[:, ::8, ::8, 0])}


def write_table(path, table):
    """Writes every array under its name, a row of eight numbers a line, with the digits that give its bits back."""
    with open(path, "w") as file:
        for name, values in table.items():
            file.write(f"[{name}]\n")
            for row in np.array_split(values.ravel(), range(8, values.size, 8)):
                file.write(" ".join(str(value) for value in row) + "\n")


def read_table(path):
    """`{name: flat array}` of a table."""
    parts = [part.split("]") for part in Path(path).read_text().split("[")[1:]]
    return {name: np.array(values.split(), "float64") for name, values in parts}


def difference(table, stored):
    """The largest difference of each array, over the array's largest number."""
    assert list(table) == list(stored), f"{list(table)} instead of {list(stored)}"
    return {
        name: float(np.abs(table[name].ravel() - values.astype(table[name].dtype)).max() / np.abs(values).max())
        for name, values in stored.items()
    }


def run(loop, kind, folder):
    """The table of a run of the real script: its losses and gradient norms, and samples by its averages."""
    output = f"{kind}-{loop}"
    command = [sys.executable, str(ROOT / f"train_image_generation_{loop}.py"), *arguments(loop, kind, output)]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\nended with {done.returncode}")
    training = read_training(folder / output)
    assert list(training.pop("step")) == list(range(1, STEPS + 1))
    return {**training, **draw_samples(checkpoint(loop, folder / output))}


def tables(kind, folder):
    """`(source, table)` of a model by each loop, or of the pipeline folder."""
    if kind == "SiTPipeline":
        yield "folder", draw_pipeline(lay_out_pipeline(folder / "pipeline"))
    else:
        for loop in LOOPS:
            yield loop, run(loop, kind, folder)


def main():
    kinds = [*MODELS, "SiTPipeline"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="MODEL", help=f"of {', '.join(kinds)}; all by default")
    parser.add_argument("--check", action="store_true", help="compare with the tables, write nothing")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest relative difference (0: bit for bit)")
    parser.add_argument("--work", type=Path, help="a new folder that keeps features, configs and runs")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(kinds):
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    # Before Paddle is imported here, and for the runs. On several threads sums are rounded in another order.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(ROOT))

    different = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        write_inputs(folder)
        for kind in args.kinds or kinds:
            stored = read_table(table_path(kind)) if args.check else None
            for source, table in tables(kind, folder):
                if stored is None:
                    write_table(table_path(kind), table)
                    stored = read_table(table_path(kind))
                # When recording, the first table is held against its own file, the second loop's against the first's.
                differences = difference(table, stored)
                wrong = not max(differences.values()) <= args.tolerance
                different |= wrong
                shown = ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
                print(f"{kind}, {source}: {'DIFFERENT' if wrong else 'ok'} ({shown})", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
