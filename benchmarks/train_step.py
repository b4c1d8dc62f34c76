"""How long a training step takes, against PyTorch and against the step's matrix multiplications alone.

Three processes hold the same network, optimizer (AdamW), average and loss, on random latents, and take turns (A B A B),
so that what else the machine does falls on all of them; ratios are formed turn by turn, and their medians reported:

- this project: the step of the hand-written loop, its watch on the numbers included,
- the products: the matrix multiplications of one such step, forward and backward, on tensors made before: the limit,
- PyTorch: diffusers' DiTTransformer2DModel of the same size, for DiT and SiT (`--torch_python`: the Python of an
  environment with torch and diffusers from PyPI; without it this part is left out).

"above" is the peak of the resident memory during steps, less that before the network was made, less weights, gradients,
moments and averages. Operators and kernel launches of one step are counted by Paddle's profiler, reads of a tensor by
the host by counting calls.
"""

import argparse
import collections
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
LATENT, CLASSES = 32, 1000


# ---------------------------------------------------------------------------------------------------------------------
# Workers: a process that makes a step, then times as many as it is told on its standard input.
# ---------------------------------------------------------------------------------------------------------------------


def _memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def _serve(step, states, baseline, extra):
    for _ in range(3):
        step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak from here on
    print(json.dumps({"ready": True, **extra()}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        above = _memory("VmHWM") - baseline - states
        print(json.dumps({"seconds": seconds, "above": above}), flush=True)


def _model_config(case):
    layers, heads, head_dim = SIZES[case["size"]]
    model = {"type": case["type"], "sample_size": LATENT, "patch_size": case["patch"], "in_channels": 4}
    return {**model, "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}


def _paddle_step(case):
    """`(step, forward, states)` of this project: the hand-written loop's step."""
    import paddle

    from objectives import build_objective
    from training import setup
    from training.config import resolve_config
    from training.optimizer import build_lr_scheduler, build_optimizer, master_weights
    from training.watch import NumberWatch

    training = {"recompute": case["recompute"], "use_ema": True, "amp_dtype": "float32"}
    config = resolve_config({"model": _model_config(case), "training": training}, source="benchmark")
    settings = config["training"]
    model, objective = setup.build_network(config), build_objective(config)
    model.train()
    ema, watch, schedule = setup.build_ema(config, model), NumberWatch(settings), build_lr_scheduler(settings, 1000)
    optimizer = build_optimizer(model, settings, schedule, watch=watch)
    x = paddle.randn([case["batch"], 4, LATENT, LATENT])
    y = paddle.randint(0, CLASSES, [case["batch"]])
    numbers = iter(range(1, 1 << 30))

    def forward():
        return objective.training_losses(model, x, y)["loss"].mean()

    def step():
        loss = forward()
        loss.backward()
        watch.add(loss.detach())
        watch.begin_update(next(numbers), 1e-4)
        optimizer.step()
        watch.end_update(objective)
        optimizer.clear_grad()
        schedule.step()
        objective.end_step()
        ema.update(model, master_weights(optimizer))

    trained = sum(p.size for p in model.parameters() if not p.stop_gradient)
    return step, forward, 4 * (2 * sum(p.size for p in model.parameters()) + 3 * trained)


def _counted(step):
    """Operators, kernel launches and host reads of one step."""
    import paddle
    from paddle import profiler

    reads, originals = collections.Counter(), {}
    for name in ("numpy", "item", "tolist", "__float__", "__int__", "__bool__"):
        originals[name] = getattr(paddle.Tensor, name)

        def read(self, *args, _name=name, **options):
            reads[_name] += 1
            return originals[_name](self, *args, **options)

        setattr(paddle.Tensor, name, read)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        path = os.path.join(folder, "trace.json")
        with profiler.Profiler(
            targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda prof: prof.export(path, "json")
        ):
            step()
        with open(path) as file:
            kinds = collections.Counter(event.get("cat") for event in json.load(file)["traceEvents"])
    for name, original in originals.items():
        setattr(paddle.Tensor, name, original)
    return {
        "operators": kinds["Operator"],
        "kernel_launches": kinds["DygraphKernelLaunch"],
        "host_reads": sum(reads.values()),
    }


def _products(forward):
    """The matrix multiplications of a forward pass, `(shape of x, shape of w, transpose_y)` each."""
    from paddle import _C_ops

    found, kept = [], (_C_ops.matmul, _C_ops.linear)

    def matmul(x, y, transpose_x=False, transpose_y=False, **options):
        found.append((list(x.shape), list(y.shape), transpose_y))
        return kept[0](x, y, transpose_x, transpose_y, **options)

    def linear(x, weight, bias, *args):
        found.append(([x.size // x.shape[-1], x.shape[-1]], list(weight.shape), False))
        return kept[1](x, weight, bias, *args)

    _C_ops.matmul, _C_ops.linear = matmul, linear
    try:
        forward()
    finally:
        _C_ops.matmul, _C_ops.linear = kept
    return found


def paddle_worker(case, only_products):
    sys.path.insert(0, ROOT)
    from training.runtime import configure_runtime

    configure_runtime()
    import paddle

    baseline = _memory("VmRSS")
    step, forward, states = _paddle_step(case)
    if not only_products:
        _serve(step, states, baseline, lambda: _counted(step))
        return
    operands = []
    with paddle.no_grad():
        for x, w, transpose_y in _products(forward):
            out = [*x[:-1], w[-2] if transpose_y else w[-1]]
            operands.append((paddle.randn(x), paddle.randn(w), paddle.randn(out), transpose_y))

    @paddle.no_grad()
    def products():
        for x, w, gradient, transpose_y in operands:
            paddle.matmul(x, w, transpose_y=transpose_y)
            paddle.matmul(gradient, w, transpose_y=not transpose_y)
            if transpose_y:
                paddle.matmul(gradient, x, transpose_x=True)
            else:
                paddle.matmul(x, gradient, transpose_x=True)

    flops = 2 * 3 * sum(x.size * (w.shape[-2] if transposed else w.shape[-1]) for x, w, _, transposed in operands)
    _serve(products, 0, baseline, lambda: {"flops": flops})


def torch_worker(case):
    import numpy as np
    import torch
    from diffusers import DiTTransformer2DModel

    torch.set_num_threads(case["threads"])
    baseline = _memory("VmRSS")
    layers, heads, head_dim = SIZES[case["size"]]
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=LATENT,
        patch_size=case["patch"],
        num_embeds_ada_norm=CLASSES,
    )
    model.train()
    if case["recompute"]:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    ema = [parameter.detach().clone() for parameter in model.parameters()]
    x = torch.randn(case["batch"], 4, LATENT, LATENT)
    y = torch.randint(0, CLASSES, [case["batch"]])
    betas = np.linspace(1e-4, 0.02, 1000)
    bars = np.cumprod(1 - betas)
    before = np.append(1.0, bars[:-1])
    variance = betas * (1 - before) / (1 - bars)
    tables = {
        "signal": np.sqrt(bars),
        "noise": np.sqrt(1 - bars),
        "low": np.log(np.append(variance[1], variance[1:])),
        "high": np.log(betas),
        "mean_start": betas * np.sqrt(before) / (1 - bars),
        "mean_now": (1 - before) * np.sqrt(1 - betas) / (1 - bars),
    }
    tables = {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}

    def diffusion_loss():
        t = torch.randint(0, 1000, [case["batch"]])
        at = {name: table[t].view(-1, 1, 1, 1) for name, table in tables.items()}
        noise = torch.randn_like(x)
        noisy = at["signal"] * x + at["noise"] * noise
        predicted, share = model(noisy, t, y).sample.chunk(2, dim=1)
        share = (share + 1) / 2
        log_variance = share * at["high"] + (1 - share) * at["low"]
        start = (noisy - at["noise"] * predicted.detach()) / at["signal"]
        mean = at["mean_start"] * start + at["mean_now"] * noisy
        true = at["mean_start"] * x + at["mean_now"] * noisy
        low = at["low"]
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + (true - mean) ** 2 * (-log_variance).exp())
        distribution = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        above, below = distribution.cdf(x + 1 / 255), distribution.cdf(x - 1 / 255)
        nll = -(above - below).clamp(min=1e-12).log()
        bound = torch.where(t == 0, nll.mean((1, 2, 3)), kl.mean((1, 2, 3))) / np.log(2)
        return (((noise - predicted) ** 2).mean((1, 2, 3)) + bound).mean()

    def transport_loss():
        t = torch.rand(case["batch"])
        noise = torch.randn_like(x)
        at = t.view(-1, 1, 1, 1)
        out = model(at * x + (1 - at) * noise, t, y).sample[:, :4]
        return ((out - (x - noise)) ** 2).mean()

    loss_of = transport_loss if case["type"] == "SiT" else diffusion_loss

    def step():
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_mul_(ema, 0.9999)
            torch._foreach_add_(ema, list(model.parameters()), alpha=1e-4)

    count = sum(parameter.numel() for parameter in model.parameters())
    _serve(step, 4 * 5 * count, baseline, lambda: {"parameters": count})


# ---------------------------------------------------------------------------------------------------------------------
# The turns
# ---------------------------------------------------------------------------------------------------------------------


class Worker:
    def __init__(self, python, part, case):
        environment = {**os.environ, "OMP_NUM_THREADS": str(case["threads"]), "MKL_NUM_THREADS": str(case["threads"])}
        environment["TRANSFORMERS_OFFLINE"] = environment["HF_HUB_OFFLINE"] = "1"
        self.process = subprocess.Popen(
            [python, os.path.abspath(__file__), "--worker", part, json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("TRACEBACK") else None,
            text=True,
            env=environment,
        )
        self.part = part
        self.facts = self._answer()

    def _answer(self):
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict):
                    return answer
        raise ValueError(f"the {self.part} process ended before it answered; TRACEBACK=1 shows its messages")

    def turn(self, steps):
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(case, args):
    """The figures of one case."""
    parts = {"ours": sys.executable, "products": sys.executable}
    if args.torch_python and case["type"] in ("DiT", "SiT"):
        parts["torch"] = args.torch_python
    workers = {}
    try:
        for part, python in parts.items():
            workers[part] = Worker(python, part, case)
        turns = [{part: worker.turn(args.steps) for part, worker in workers.items()} for _ in range(args.turns)]
    finally:
        for worker in workers.values():
            worker.close()
    seconds = {part: [statistics.median(turn[part]["seconds"]) for turn in turns] for part in workers}
    row = {**case, **workers["ours"].facts, "flops": workers["products"].facts["flops"], "seconds": seconds}
    row.pop("ready")
    row["step_s"] = statistics.median(seconds["ours"])
    row["share_of_limit"] = statistics.median(p / o for p, o in zip(seconds["products"], seconds["ours"], strict=True))
    row["above"] = turns[-1]["ours"]["above"]
    if "torch" in workers:
        row["against_torch"] = statistics.median(o / t for o, t in zip(seconds["ours"], seconds["torch"], strict=True))
        row["memory_against_torch"] = row["above"] / turns[-1]["torch"]["above"]
    return row


def _case(text, args, recompute, threads):
    kind, _, size = text.rpartition("-")
    letter, _, patch = size.partition("/")
    if kind not in ("DiT", "SiT", "LargeDiT") or letter not in SIZES or patch not in ("2", "4", "8"):
        raise ValueError(f"--models {text!r}: expected DiT-S/4, SiT-B/2, LargeDiT-S/4 and the like")
    case = {"type": kind, "size": letter, "patch": int(patch), "batch": args.batch_size}
    return {**case, "recompute": recompute, "threads": threads}


def run(args):
    from tqdm import tqdm

    cases = [
        _case(name, args, recompute, threads)
        for name in args.models
        for threads in args.threads
        for recompute in ((False, True) if args.recompute else (False,))
    ]
    rows = []
    heads = ("model", "threads", "recompute", "step", "samples/s", "products / step")
    print(f"| {' | '.join(heads)} | of PyTorch's time | of its memory | operators |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for case in tqdm(cases, unit="case"):
        row = measure(case, args)
        rows.append(row)
        ratios = [f"{row[key]:.2f}" if key in row else "-" for key in ("against_torch", "memory_against_torch")]
        name = f"{case['type']}-{case['size']}/{case['patch']}"
        tqdm.write(
            f"| {name} | {case['threads']} | {case['recompute']} | {row['step_s']:.3f} s | "
            f"{case['batch'] / row['step_s']:.1f} | {row['share_of_limit']:.2f} | {ratios[0]} | {ratios[1]} | "
            f"{row['operators']} |"
        )
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"load_average": os.getloadavg(), "rows": rows}, file, indent=2)
        print(f"figures: {args.output}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["DiT-S/4"],
        metavar="MODEL",
        help="DiT-S/4, SiT-B/2, LargeDiT-S/4, ... [DiT-S/4]",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="[%(default)s]")
    parser.add_argument("--threads", nargs="+", type=int, default=[2], help="[2]")
    parser.add_argument("--recompute", action="store_true", help="each case with recompute too")
    parser.add_argument("--turns", type=int, default=7, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=3, help="of each process in a turn [%(default)s]")
    parser.add_argument("--torch_python", metavar="PYTHON", help="Python with torch and diffusers [no comparison]")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        part, case = args.worker[0], json.loads(args.worker[1])
        if part == "torch":
            torch_worker(case)
        else:
            paddle_worker(case, part == "products")
        return
    run(args)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        main()
    else:
        sys.path.insert(0, ROOT)
        from training.runtime import run_cli

        run_cli(main)
