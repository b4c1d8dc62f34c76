"""Export a network of any kind for Paddle Inference: programs and weights, for the demos' --backend inference.

    python tools/export_inference.py --model_path DiT_pipeline --output DiT_inference
    python infer_demo_dit.py --model_path DiT_inference --backend inference --classes 207
    python tools/export_inference.py --model_path outputs/trainer/checkpoint-5000 --output SiT_inference
    python infer_demo_sit.py --model_path SiT_inference --backend inference --sampler ode

--model_path is a DiTPipeline or SiTPipeline folder, a DiTPipeline's name on the hub, a training checkpoint folder, of
which the averages are taken, a run's folder, of its newest checkpoint, or a file of weights with --config_file (that of
a LightningDiT is recognised by its shapes). The folder serves latents of one size, any batch size, CPU and GPU, and the
samplers of a pipeline folder; weights are float32, half precision is chosen by the demo's --dtype. Whoever runs it runs
a program of yours: as with any code, take such folders only from people you trust.
"""

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import CommandParser
from config.options import DEFAULT_VAE, SIT_VAE
from runtime.console import say_next
from runtime.process import configure_runtime, run_cli
from sampling.flags import add_statistics_flags, add_vae_flag, describe_flags, note_weights_flags
from sampling.pipelines.folder import check_free
from sampling.step_counts import describe_fit


def main(argv=None):
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--model_path",
        required=True,
        metavar="PATH",
        help="pipeline folder, its hub name, training checkpoint, or file of weights",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write, new or empty")
    parser.add_argument(
        "--id2label", metavar="FILE", help='JSON {"id2label": {"0": "name", ...}} instead of the model\'s labels'
    )
    weights = parser.add_argument_group("for a training checkpoint or a file of weights")
    weights.add_argument("--config_file", metavar="FILE", help="JSON of a file's network [its checkpoint's]")
    add_vae_flag(weights, f"{DEFAULT_VAE}, of a SiT {SIT_VAE}: each as officially")
    add_statistics_flags(weights)
    weights.add_argument("--key", help="which weights: model, ema or another key of a file [ema]")
    args = parser.parse_args(argv)
    check_free(args.output)
    model = describe_flags(args)
    if model.kind == "exported":
        raise ValueError(f"--model_path {args.model_path}: is exported already")
    note_weights_flags(args, model)

    configure_runtime()
    from sampling.generator import load_exportable
    from sampling.pipelines.inference import export_inference

    print(f"reading {model.path}", flush=True)
    generator = load_exportable(model, vae=args.vae, key=args.key)
    fit = getattr(generator.objective, "timestep_fit", None)
    for note in generator.describe() + ([] if fit is None else [describe_fit(fit)]):
        print(f"note: {note}")
    print("tracing the network and the VAE's decoder", flush=True)
    export_inference(generator, args.output)
    print(f"{model.path} -> {args.output}")
    say_next([model.demo, "--model_path", args.output, "--backend", "inference"])


if __name__ == "__main__":
    run_cli(main)
