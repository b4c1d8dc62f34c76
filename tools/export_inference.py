"""Export a DiT or a Large-DiT for Paddle Inference: programs and weights, for infer_demo_dit.py --backend inference.

    python tools/export_inference.py --model_path DiT_pipeline --output DiT_inference
    python tools/export_inference.py --model_path outputs/trainer/checkpoint-5000 --output DiT_inference
    python infer_demo_dit.py --model_path DiT_inference --backend inference --classes 207

--model_path is a DiTPipeline folder (also an exported SiT's), its name on the hub, a training checkpoint folder, whose
averages are taken, or a run's folder, of its newest checkpoint. The folder serves latents of one size, any batch size,
CPU and GPU; weights are float32, half precision is chosen by infer_demo_dit.py --dtype. Whoever runs it runs a program
of yours: as with any code, take such folders only from people you trust.
"""

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import CommandParser
from config.options import DEFAULT_VAE
from runtime.console import say_next
from runtime.process import configure_runtime, run_cli
from sampling.flags import add_vae_flag, note_weights_flags
from sampling.model_path import check_no_file, describe_model
from sampling.pipelines.folder import check_free
from sampling.step_counts import describe_fit


def main(argv=None):
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--model_path", required=True, metavar="PATH", help="pipeline folder, its hub name, or training checkpoint"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write, new or empty")
    parser.add_argument(
        "--id2label", metavar="FILE", help='JSON {"id2label": {"0": "name", ...}} instead of the model\'s labels'
    )
    checkpoint = parser.add_argument_group("for a training checkpoint")
    add_vae_flag(checkpoint, f"{DEFAULT_VAE}, as in the official DiT")
    checkpoint.add_argument("--key", choices=("model", "ema"), help="which weights [ema]")
    args = parser.parse_args(argv)
    check_no_file(args.model_path)
    check_free(args.output)
    model = describe_model(args.model_path, id2label=args.id2label)
    if model.kind == "exported":
        raise ValueError(f"--model_path {args.model_path}: is exported already")
    model.check_backend("inference")
    note_weights_flags(args, model)

    configure_runtime()
    from sampling.generator import load_exportable
    from sampling.pipelines.inference import export_inference

    print(f"reading {model.path}", flush=True)
    generator = load_exportable(model, vae=args.vae, key=args.key)
    fit = generator.objective.timestep_fit
    for note in generator.describe() + ([] if fit is None else [describe_fit(fit)]):
        print(f"note: {note}")
    print("tracing the network and the VAE's decoder", flush=True)
    export_inference(generator, args.output)
    print(f"{model.path} -> {args.output}")
    say_next(["infer_demo_dit.py", "--model_path", args.output, "--backend", "inference"])


if __name__ == "__main__":
    run_cli(main)
