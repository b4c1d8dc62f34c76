"""Export a DiT or a Large-DiT as a folder for `ppdiffusers.DiTPipeline`.

    python tools/convert_dit_to_ppdiffusers.py --model_path outputs/trainer/checkpoint-5000 --output DiT_pipeline

--model_path is a training checkpoint folder (its averages and its own config.json), a run's folder (its newest
checkpoint), a `.pdparams`, an official `.pt` / `.safetensors`, or a folder of an official Large-DiT's shards. The
network is described by the checkpoint's own config.json, else by --config_file, else by --model_name and --image_size
(a DiT of 1000 classes, latents of --vae's channels and size, learned variance). What is given beside a checkpoint must
agree with its config.

What the stock pipeline does differently from this project is printed at the end. A Large-DiT's transformer/ also holds
the code of its class.
"""

import _root  # noqa: F401 (the project's root, on sys.path)

from runtime.process import run_cli
from sampling.pipelines.converter import convert, make_parser
from sampling.pipelines.export import export_pipeline, exporter
from sampling.step_counts import EXPORTED, check_objective


def main(argv=None):
    parser = make_parser("DiT", __doc__)
    parser.add_argument(
        "--scheduler", default="ddim", choices=EXPORTED, help="dpm, dpm3: DPM-Solver++ of order 2 and 3"
    )
    parser.add_argument(
        "--timestep_embedding",
        default="fit",
        choices=("fit", "keep"),
        help="the stock transformer's timestep frequencies are not DiT's: fit the embedding to them, or keep DiT's "
        "weights although the output is then another one; a Large-DiT needs no fit",
    )
    parser.add_argument(
        "--stock_transformer",
        action="store_true",
        help="of a Large-DiT: name ppdiffusers' DiTLLaMA2DModel as it is, which gives other images and does not run on "
        "Paddle 3, instead of a mended copy that the folder brings along",
    )
    args = parser.parse_args(argv)

    def check(config):
        kind = config["model"]["type"]
        check_objective(config["objective"], "diffusion")
        exporter(config).check(config)
        if args.stock_transformer and kind != "LargeDiT":
            raise ValueError(f"--stock_transformer is for a Large-DiT; this model is a {kind}")

    def export(config, *parts, **options):
        option = "stock_transformer" if config["model"]["type"] == "LargeDiT" else "timestep_embedding"
        options.update({"scheduler": args.scheduler, option: getattr(args, option)})
        return export_pipeline(config, *parts, **options)

    convert(args, check, export, "ppdiffusers.DiTPipeline")


if __name__ == "__main__":
    run_cli(main)
