"""Export a SiT, Large-SiT or LightningDiT as a folder for `sampling.SiTPipeline`, a SiT also for stock ppdiffusers.

    python tools/convert_sit_to_ppdiffusers.py --model_path outputs/trainer/checkpoint-5000 --output SiT_pipeline
    python tools/convert_sit_to_ppdiffusers.py --model_path outputs/trainer/checkpoint-5000 --output SiT_dit --stock
    python tools/convert_sit_to_ppdiffusers.py --model_path lightningdit-xl-imagenet256-800ep.pt --vae vavae \\
        --latents_stats latents_stats.pt --output LightningDiT_XL_1_256

--model_path is a training checkpoint folder (its averages and its own config.json), a run's folder (its newest
checkpoint), a `.pdparams`, or an official `.pt` / `.safetensors`. The network is described by the checkpoint's own
config.json, else by --config_file, else by --model_name and --image_size (1000 classes, latents of --vae's
channels and size, linear path, velocity prediction); a LightningDiT is recognised by its shapes. What is given beside a
checkpoint must agree with its config.

SiTPipeline needs this project and samples by every ODE and SDE method. The folder of --stock needs ppdiffusers alone
and samples Euler steps of the ODE: N inference steps give the latents of `sample_ode("euler", num_steps=N)`.
"""

import _root  # noqa: F401 (the project's root, on sys.path)

from config.schema import MODEL_TYPES
from runtime.process import run_cli
from sampling.pipelines.converter import convert, make_parser
from sampling.pipelines.export import export_pipeline, exporter
from sampling.step_counts import check_objective


def main(argv=None):
    parser = make_parser("SiT", __doc__)
    parser.add_argument("--stock", action="store_true", help="write a DiTPipeline folder for stock ppdiffusers")
    args = parser.parse_args(argv)

    def check(config):
        kind = config["model"]["type"]
        if MODEL_TYPES[kind].pipeline != "SiTPipeline":
            raise ValueError(f"this model is a {kind}; use tools/convert_dit_to_ppdiffusers.py")
        check_objective(config["objective"], "transport")
        if args.stock and kind != "SiT":
            raise ValueError(
                f"--stock is for a SiT; this model is a {kind}: export it for SiTPipeline, without --stock"
            )
        if args.stock:
            exporter(config).check(config)

    def export(config, state, vae, folder, *, id2label, source, **options):
        if args.stock:
            return export_pipeline(config, state, vae, folder, id2label=id2label, source=source, **options)
        from sampling import SiTPipeline

        SiTPipeline.from_weights(config, state, vae, id2label, source=source).save_pretrained(folder, **options)
        return []

    convert(args, check, export, "ppdiffusers.DiTPipeline" if args.stock else "sampling.SiTPipeline")


if __name__ == "__main__":
    run_cli(main)
