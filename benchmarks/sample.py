"""Images per second: this project's samplers, its pipelines, and Paddle Inference, against diffusers on PyTorch.

Processes hold the same network (DiT-S/4 for ddim and ddpm, SiT-S/4 for the others, random weights) and take turns
(A B A B), so that what else the machine does falls on all of them. Timed are --timed_steps evaluations of the guided
network (twice the batch each) inside the sampler: the cost of an evaluation does not depend on their number, so images
per second are given for the whole sampler (ddim 25, ddpm 250, ode 25, sde 250 evaluations; dopri5, whose steps are
adaptive, runs in full). "of PyTorch's time" is an evaluation's time over that of diffusers' DiTPipeline in float32 in
the same turn, the median of the turns; diffusers has no SiT: there it is its DiT by DDIM.

- eager: this project's samplers on its own networks,
- pipeline: ppdiffusers' DiTPipeline on the exported folder,
- inference, inference bf16: the programs of tools/export_inference.py, of a DiT's checkpoint, as infer_demo_dit.py
  samples them; PSNR: of their latents (two images, 25 steps) against those of the same network in eager mode, the range
  of these as the peak,
- PyTorch, PyTorch bf16: diffusers' DiTPipeline (--torch_python: the Python of an environment with torch and diffusers).

With --decode, one image through a decoder of Stable Diffusion's VAE size (random weights, 256 pixels) is timed too.

--overhead shows instead what each of this project's samplers costs beside the network: 25 steps of it against as many
bare forward passes, one after the other, without guidance.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np
from tqdm import tqdm

from benchmarks.turns import Worker, serve
from config.schema import load_config
from runtime.machine import cpu_has_bfloat16
from runtime.process import configure_runtime, run_cli

# Sampler: model, evaluations of a whole run (None: adaptive), the parts that have it, options of `objective.sample`.
SAMPLERS = {
    "ddim": (
        *("DiT", 25, ("eager", "pipeline", "inference", "inference bf16", "PyTorch", "PyTorch bf16")),
        {"method": "ddim"},
    ),
    "ddpm": ("DiT", 250, ("eager", "pipeline", "PyTorch"), {}),
    "ode": ("SiT", 25, ("eager", "pipeline", "inference", "inference bf16"), {}),
    "sde": ("SiT", 250, ("eager",), {"sampler": "sde"}),
    "dopri5": ("SiT", None, ("eager",), {"method": "dopri5"}),
}
# --overhead: model, options of the objective's `sample`.
OVERHEAD = {
    "DDIM": ("DiT", {"method": "ddim"}),
    "DDPM": ("DiT", {"method": "ddpm"}),
    **{f"ODE {method}": ("SiT", {"method": method}) for method in ("euler", "heun2", "rk4", "dopri5")},
    **{f"SDE {method}": ("SiT", {"method": method, "sampler": "sde"}) for method in ("Euler", "Heun")},
}
DECODERS = ("eager", "inference", "PyTorch")
GUIDANCE, CLASSES, WHOLE_STEPS = 4.0, 1000, 25
VAE_SIZE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TINY_VAE = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32}


def read_config(kind, size):
    path = _root.ROOT / "config" / f"{kind}_{size.replace('/', '_patch')}.json"
    if not path.is_file():
        raise ValueError(f"--size {size}: expected S/2, S/4, S/8, B/2, ...")
    return load_config(path)


def random_state(model):
    """Returns a network's weights, where those that adaLN-Zero starts as zeros are random: else every output is 0."""
    import paddle

    state = model.state_dict()
    return {name: value if value.any() else paddle.randn(value.shape) * 0.02 for name, value in state.items()}


def prepare(case):
    """Writes each network as a training checkpoint and as a pipeline folder."""
    import paddle
    from ppdiffusers import AutoencoderKL

    from models import build_model
    from runtime.files import write_json
    from sampling.pipelines.export import export_pipeline
    from weights.files import save_pdparams

    paddle.seed(0)
    vae = AutoencoderKL(**TINY_VAE)
    for kind in case["models"]:
        config = read_config(kind, case["size"])
        state = {name: value.numpy() for name, value in random_state(build_model(config)).items()}
        folder = os.path.join(case["folder"], kind)
        os.makedirs(folder)
        write_json(os.path.join(folder, "config.json"), config)
        save_pdparams(state, os.path.join(folder, "model_state.pdparams"))
        export_pipeline(config, state, vae, f"{folder}_pipeline")


def _noise(case, steps):
    return np.random.RandomState(steps).standard_normal([case["batch"], 4, 32, 32]).astype("float32")


def _labels(case):
    return [(100 * i) % CLASSES for i in range(case["batch"])]


def eager(case):
    """Returns `sample(name, steps)`, which draws by this project's samplers and returns the number of evaluations."""
    import paddle

    from models import build_model
    from objectives import build_objective
    from sampling.guidance import guided
    from weights.source import read_weights

    y = paddle.to_tensor(_labels(case))
    found = {}
    for kind in case["models"]:
        config = read_config(kind, case["size"])
        network = build_model(config)
        network.set_state_dict(read_weights(os.path.join(case["folder"], kind))[0])
        network.eval()
        found[kind] = network, build_objective(config)

    def sample(name, steps):
        kind, _, _, options = SAMPLERS[name]
        network, objective = found[kind]
        counted = []

        def model(x, t, y):
            counted.append(x.shape[0])
            return network(x, t, y)

        denoiser = guided(model, y, GUIDANCE, null_class=CLASSES)
        # The official ODE counts grid points, one more than steps.
        grid = steps + 1 if name == "ode" else steps
        with paddle.no_grad():
            noise = paddle.to_tensor(_noise(case, steps))
            objective.sample(denoiser, noise, num_steps=grid, **options).numpy()
        return len(counted)

    return sample


def pipeline(case):
    """Returns a function as `eager` does, of ppdiffusers' DiTPipeline."""
    import paddle
    from ppdiffusers import DDPMScheduler

    from sampling.pipelines.pretrained import load_dit_pipeline

    pipes = {kind: load_dit_pipeline(os.path.join(case["folder"], f"{kind}_pipeline")) for kind in case["models"]}
    schedulers = {name: pipes[kind].scheduler for name, (kind, *_) in SAMPLERS.items() if kind in pipes}
    if "DiT" in pipes:
        schedulers["ddpm"] = DDPMScheduler.from_config(pipes["DiT"].scheduler.config)
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)

    def sample(name, steps):
        pipe = pipes[SAMPLERS[name][0]]
        pipe.scheduler = schedulers[name]
        paddle.seed(0)
        pipe(_labels(case), guidance_scale=GUIDANCE, num_inference_steps=steps, output_type="np")
        return steps

    return sample


def inference(case, dtype):
    """Returns a function as `eager` does, of Paddle Inference; its sampler "psnr" returns decibels."""
    import paddle

    from sampling.generator import load_exportable
    from sampling.model_path import describe_model
    from sampling.pipelines.inference import export_inference, load_inference

    sources, pipes = {}, {}
    for kind in case["models"]:
        folder = os.path.join(case["folder"], f"{kind}_{dtype}")
        pipeline = os.path.join(case["folder"], f"{kind}_pipeline")
        path = os.path.join(case["folder"], kind) if kind == "DiT" else pipeline  # a SiT's is exported by way of it
        sources[kind] = load_exportable(describe_model(path), vae=os.path.join(pipeline, "vae"))
        export_inference(sources[kind], folder)
        pipes[kind] = load_inference(folder, dtype=dtype)

    def latents(generator, steps, count):
        noise = paddle.to_tensor(_noise(case, steps)[:count])
        options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "guidance_channels": 3}
        labels = _labels(case)[:count]
        return generator.sample(labels, seed=None, noise=noise, output="latents", **options).numpy()

    def sample(name, steps):
        if name == "psnr":
            found, expected = (latents(kinds["DiT"], steps, 2) for kinds in (pipes, sources))
            return float(20 * np.log10(np.ptp(expected)) - 10 * np.log10(np.square(found - expected).mean()))
        latents(pipes[SAMPLERS[name][0]], steps, case["batch"])
        return steps

    return sample


def torch_pipeline(case, dtype):
    """Returns a function as `eager` does, of diffusers' DiTPipeline."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.set_num_threads(case["threads"])
    settings = case["torch"]
    transformer = DiTTransformer2DModel(num_embeds_ada_norm=CLASSES, **settings).to(getattr(torch, dtype))
    vae = AutoencoderKL(**TINY_VAE).to(getattr(torch, dtype))
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    schedulers = {"ddim": DDIMScheduler(clip_sample=False), "ddpm": DDPMScheduler(clip_sample=False)}

    def sample(name, steps):
        pipe.scheduler = schedulers[name]
        pipe(_labels(case), guidance_scale=GUIDANCE, num_inference_steps=steps, output_type="np")
        return steps

    return sample


def decoder(part, case):
    """Returns a function that decodes one image."""
    if part == "PyTorch":
        import torch
        from diffusers import AutoencoderKL

        vae, latents = AutoencoderKL(**VAE_SIZE).eval(), torch.randn(1, 4, 32, 32)

        def decode():
            with torch.no_grad():
                vae.decode(latents).sample.numpy()

        return decode
    import paddle
    from ppdiffusers import AutoencoderKL

    from features.autoencoder import LatentDecoder
    from sampling.generator import load_exportable
    from sampling.model_path import describe_model
    from sampling.pipelines.inference import export_inference, load_inference

    vae, latents = AutoencoderKL(**VAE_SIZE), paddle.randn([1, 4, 32, 32])
    vae.eval()
    if part == "inference":
        folder = os.path.join(case["folder"], f"{case['models'][0]}_pipeline")
        source = load_exportable(describe_model(folder))
        source.vae = vae
        folder = os.path.join(case["folder"], "decoder")
        export_inference(source, folder)
        vae = load_inference(folder).vae
    decode = LatentDecoder(vae)
    return lambda: decode(latents)


def work(part, case):
    """Serves one part's turns: a line `{"sampler", "steps"}` gives `{"seconds", "evaluations"}`."""
    if part == "prepare":
        prepare(case)
        return serve(None)
    made = {
        "eager": lambda: eager(case),
        "pipeline": lambda: pipeline(case),
        "inference": lambda: inference(case, "float32"),
        "inference bf16": lambda: inference(case, "bfloat16"),
        "PyTorch": lambda: torch_pipeline(case, "float32"),
        "PyTorch bf16": lambda: torch_pipeline(case, "bfloat16"),
    }[part]()
    decoders = []

    def turn(request):
        name, steps = request["sampler"], request["steps"]
        if name == "decode":
            if not decoders:
                decoders.append(decoder(part, case))
                decoders[0]()
            start = time.perf_counter()
            decoders[0]()
            return {"seconds": time.perf_counter() - start}
        if name == "psnr":
            return made(name, steps)
        start = time.perf_counter()
        evaluations = made(name, steps)
        return {"seconds": time.perf_counter() - start, "evaluations": evaluations}

    serve(turn)


def diffusers_network(size):
    """Returns diffusers' keywords for a DiT of a config's size."""
    model = read_config("DiT", size)["model"]
    same = ("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim")
    return {**{name: model[name] for name in same}, "out_channels": 2 * model["in_channels"]}


def run(args):
    """Returns the figures of every turn, of every turn of decoding, and the PSNRs: see `report`."""
    parts = [part for part in SAMPLERS["ddim"][2] if args.torch_python or "PyTorch" not in part]
    if not cpu_has_bfloat16():
        parts = [part for part in parts if "bf16" not in part]
    kinds = [kind for kind in ("DiT", "SiT") if any(SAMPLERS[name][0] == kind for name in args.samplers)]
    case = {"size": args.size, "batch": args.batch_size, "threads": args.threads, "models": kinds}
    case["torch"] = diffusers_network(args.size)
    turns, decoding, quality, workers = [], [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        case["folder"] = folder
        try:
            Worker(sys.executable, __file__, "prepare", case).close()
            for part in tqdm(parts, desc="starting"):
                python = args.torch_python if "PyTorch" in part else sys.executable
                workers[part] = Worker(python, __file__, part, case)
            for turn in tqdm(range(args.turns + 1), desc="turns"):  # the first warms up
                times = {}
                steps = args.timed_steps if turn else 2
                for name in args.samplers:
                    asked = [part for part in parts if part in SAMPLERS[name][2]]
                    for part in asked if turn or name != "dopri5" else ():
                        times[name, part] = workers[part].ask({"sampler": name, "steps": steps})
                    if "PyTorch" in workers and "PyTorch" not in asked:
                        times[name, "reference"] = workers["PyTorch"].ask({"sampler": "ddim", "steps": steps})
                turns += [times] if turn else []
            for part in parts if "ddim" in args.samplers else ():
                if part.startswith("inference"):
                    quality[part] = workers[part].ask({"sampler": "psnr", "steps": WHOLE_STEPS})
            for _ in tqdm(range(args.turns), desc="decoding") if args.decode else ():
                asked = [part for part in parts if part in DECODERS]
                decoding.append({part: workers[part].ask({"sampler": "decode", "steps": 1}) for part in asked})
        finally:
            for worker in workers.values():
                worker.close()
    return turns, decoding, quality


def report(args, turns, decoding, quality):
    """Prints the tables; returns their rows."""

    def each(turn, name, part):
        return turn[name, part]["seconds"] / turn[name, part]["evaluations"]

    decode = {part: statistics.median(turn[part]["seconds"] for turn in decoding) for part in (decoding or [{}])[0]}
    rows = []
    print("| sampler | evaluations | by | seconds an evaluation | images/s | of PyTorch's time | PSNR |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, part in turns[0]:
        if part == "reference":
            continue
        evaluations = SAMPLERS[name][1] or turns[0][name, part]["evaluations"]
        seconds = statistics.median(each(turn, name, part) for turn in turns)
        row = {"sampler": name, "part": part, "evaluations": evaluations, "evaluation_s": seconds}
        row["images_per_s"] = args.batch_size / (seconds * evaluations)
        kind = "PyTorch" if part == "PyTorch bf16" else "inference" if part == "inference bf16" else part
        kind = "eager" if part == "pipeline" else kind
        if kind in decode:
            row["images_per_s_decoded"] = 1 / (1 / row["images_per_s"] + decode[kind])
        reference = next((one for one in ("PyTorch", "reference") if (name, one) in turns[0]), None)
        if reference:
            ratios = [each(turn, name, part) / each(turn, name, reference) for turn in turns]
            row["against_torch"], row["ratios"] = statistics.median(ratios), ratios
        if name == "ddim" and part in quality:
            row["psnr"] = quality[part]
        rows.append(row)
        ratio = f"{row['against_torch']:.2f}" if "against_torch" in row else "-"
        psnr = f"{row['psnr']:.0f} dB" if "psnr" in row else "-"
        print(f"| {name} | {evaluations} | {part} | {seconds:.3f} | {row['images_per_s']:.3g} | {ratio} | {psnr} |")
    if decode:
        print("\n| decoder, one image of 256 px | seconds | of PyTorch's time |\n| --- | --- | --- |")
        for part, seconds in decode.items():
            ratio = "-"
            if "PyTorch" in decode:
                ratio = statistics.median(turn[part]["seconds"] / turn["PyTorch"]["seconds"] for turn in decoding)
                ratio = f"{ratio:.2f}"
            print(f"| {part} | {seconds:.2f} | {ratio} |")
    return {"rows": rows, "decode_s": decode}


def overhead(args):
    """Prints the table of --overhead; returns its rows: medians of the turns, and each turn's ratio."""
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    configure_runtime()
    import paddle

    from models import build_model
    from objectives import build_objective

    rows = []
    print("| sampler | evaluations | bare forward passes | sampler | ratio | of the turns |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (kind, options) in OVERHEAD.items():
        config = read_config(kind, args.size)
        model, objective = build_model(config), build_objective(config)
        model.set_state_dict(random_state(model))
        model.eval()
        y, t = paddle.arange(args.batch_size), paddle.full([args.batch_size], 0.5)
        noise, evaluated = paddle.randn([args.batch_size, 4, 32, 32]), []

        def denoiser(x, t, model=model, y=y, evaluated=evaluated):
            evaluated.append(x.shape[0])
            return model(x, t, y)

        turns = []
        for _ in range(args.turns + 1):  # the first warms up, and counts
            evaluated.clear()
            start = time.perf_counter()
            with paddle.no_grad():
                float(objective.sample(denoiser, noise, num_steps=WHOLE_STEPS, **options).sum())
                middle, evaluations = time.perf_counter(), len(evaluated)
                for _ in range(evaluations):
                    out = denoiser(noise, t)
                float(out.sum())
            turns.append((time.perf_counter() - middle, middle - start))
        ratios = [inside / bare for bare, inside in turns[1:]]
        bare, inside = map(statistics.median, zip(*turns[1:], strict=True))
        rows.append({"sampler": name, "evaluations": evaluations, "bare_s": bare, "sampler_s": inside})
        rows[-1]["ratios"] = ratios
        spread = f"{statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f}"
        print(f"| {name} | {evaluations} | {bare:.2f} s | {inside:.2f} s | {spread} |", flush=True)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["ddim", "ddpm", "ode", "sde"]
    parser.add_argument("--samplers", nargs="+", choices=tuple(SAMPLERS), default=default, help="[all but dopri5]")
    parser.add_argument("--size", default="S/4", help="of the networks: S/4, B/2, ... [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=8, help="images [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--turns", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--timed_steps", type=int, default=5, help="of each process in a turn [%(default)s]")
    parser.add_argument("--decode", action="store_true", help="time a decoder of Stable Diffusion's size too")
    parser.add_argument("--overhead", action="store_true", help="of this project's samplers beside the network")
    parser.add_argument("--torch_python", metavar="PYTHON", help="Python with torch and diffusers [no comparison]")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return work(args.worker[0], json.loads(args.worker[1]))
    for name, least in (("batch_size", 1), ("threads", 1), ("turns", 1), ("timed_steps", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {least} or more")
    figures = {"rows": overhead(args)} if args.overhead else report(args, *run(args))
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"load_average": os.getloadavg(), "threads": args.threads, **figures}, file, indent=2)
        print(f"figures: {args.output}")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        if "PyTorch" not in " ".join(sys.argv):
            configure_runtime()
        main()
    else:
        run_cli(main)
