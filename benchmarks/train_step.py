"""How long a training step takes, against PyTorch and against the step's matrix multiplications alone.

Processes hold the same network, optimizer (AdamW), average and loss, on random latents, and take turns (A B A B), so
that what else the machine does falls on all of them; ratios are formed turn by turn, and their medians reported:

- ours: the step of the hand-written loop, its watch on the numbers included,
- plain: the same by Paddle's own operators, without `models.cpu_ops`,
- products: the matrix multiplications of one such step, forward and backward, on tensors made before: the limit,
- reference (--reference, DiT): the layout of PaddleMIX's example, written down here from its description: q, k and v by
  a transpose in five dimensions, gradients filled with zeros, a loss that the host reads in each step, Paddle's own
  settings of allocator and strides. Threads are those of the others,
- DiT: for LightningDiT, the step of a DiT of the same size,
- PyTorch (--torch_python): diffusers' DiTTransformer2DModel of the same size; for LargeDiT, `torch_large_dit.py`.

"above" is the peak of the resident memory during steps, less that before the network was made, less weights, gradients,
moments and averages. "activations" are what Paddle's allocator has given out more after a forward pass than before it.
"update" is the share of a step that the optimizer, the norm of the gradients and the average take. Operators are those
of one step by Paddle's profiler, once as it runs here and once with the operators that a GPU gets. Reads of a tensor by
the host are counted by its methods' calls. The JSON file has the time by kernel too.
"""

import argparse
import collections
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np
from tqdm import tqdm

from benchmarks.turns import Worker, memory, reset_peak, serve
from config.schema import resolve_config
from runtime.files import write_json
from runtime.process import configure_runtime, run_cli

SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
LATENT, CLASSES = 32, 1000


def _serve(step, states, baseline, facts):
    """Answers a number of steps with their seconds.

    Args:
        step: returns the seconds of its update, or None.
        states: bytes of weights, gradients, moments and averages. facts: dictionary, added to each answer.
    """
    for _ in range(3):
        step()
    reset_peak()

    def turn(count):
        seconds, update = [], []
        for _ in range(count):
            start = time.perf_counter()
            update.append(step())
            seconds.append(time.perf_counter() - start)
        above = memory("VmHWM") - baseline - states
        shares = [part / whole for part, whole in zip(update, seconds, strict=True) if part is not None]
        update_share = statistics.median(shares) if shares else None
        return {"seconds": statistics.median(seconds), "above": above, "update_share": update_share, **facts}

    serve(turn)


def _config(case):
    layers, heads, head_dim = SIZES[case["size"]]
    model = {"type": case["type"], "sample_size": LATENT, "patch_size": case["patch"], "in_channels": 4}
    model = {**model, "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    training = {"recompute": case["recompute"], "use_ema": True, "amp_dtype": "float32"}
    return resolve_config({"model": model, "training": training}, source="benchmark")


def _batch(case):
    import paddle

    return paddle.randn([case["batch"], 4, LATENT, LATENT]), paddle.randint(0, CLASSES, [case["batch"]])


def _paddle_step(case):
    """Returns `(step, forward, states)` of this project: the hand-written loop's step."""
    from objectives import Batch
    from verification.training_steps import Run

    config = _config(case)
    run, batch = Run(config["model"], config["training"]), Batch(*_batch(case))

    def forward():
        return run.losses(batch)[1]

    def step():
        loss = forward()
        loss.backward()
        start = time.perf_counter()
        run.update(loss)
        return time.perf_counter() - start

    return step, forward, _state_bytes(run.model)


def _state_bytes(model):
    trained = sum(p.size for p in model.parameters() if not p.stop_gradient)
    return 4 * (2 * sum(p.size for p in model.parameters()) + 3 * trained)


def _reference_step(case):
    """Returns `(step, forward, states)` in the layout of the reference."""
    import paddle
    from paddle.nn import functional as F

    from models import attention, cpu_ops, dit
    from objectives import Batch, build_objective
    from training import setup

    def modulate(x, shift, scale):
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def attend(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape([batch, tokens, 3, -1, self.head_dim]).transpose([2, 0, 3, 1, 4])
        q, k, v = qkv.unbind(0)
        weights = F.softmax(paddle.matmul(q * self.head_dim**-0.5, k.transpose([0, 1, 3, 2])), axis=-1)
        return self.proj(paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([batch, tokens, width]))

    def block(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, axis=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(norm(x), shift_a, scale_a))
        h = self.mlp.fc2(F.gelu(self.mlp.fc1(modulate(norm(x), shift_m, scale_m)), approximate=True))
        return x + gate_m.unsqueeze(1) * h

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], epsilon=1e-6)

    cpu_ops.faster = lambda: False
    attention.Attention.forward, dit.DiTBlock.forward = attend, block
    config = _config(case)
    model, objective = setup.build_network(config), build_objective(config)
    model.train()
    averages = {name: parameter.clone().detach() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=trained, weight_decay=0.0)
    x, y = _batch(case)

    def forward():
        return objective.training_losses(model, Batch(x, y))["loss"].mean()

    def step():
        loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        with paddle.no_grad():
            for name, parameter in model.named_parameters():
                averages[name].copy_(averages[name] * 0.9999 + parameter * (1 - 0.9999), True)
        float(loss)

    return step, forward, _state_bytes(model)


def _counted(step):
    """Returns operators, host reads, and `{kernel: [launches, seconds]}` of one step.

    Paddle's profiler runs once in a process.
    """
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
            events = json.load(file)["traceEvents"]
    kinds, by_kernel = collections.Counter(event.get("cat") for event in events), {}
    for event in events:
        if event.get("cat") == "DygraphKernelLaunch":
            entry = by_kernel.setdefault(event["name"].split(" kernel launch")[0], [0, 0.0])
            entry[0] += 1
            entry[1] += event["dur"] / 1e6
    for name, original in originals.items():
        setattr(paddle.Tensor, name, original)
    return {
        "operators": kinds["Operator"],
        "host_reads": sum(reads.values()),
        "by_kernel": dict(sorted(by_kernel.items(), key=lambda item: -item[1][1])),
    }


def _kept(forward):
    """Returns the bytes that a forward pass leaves behind until its backward pass."""
    from paddle.base import core

    before = core.host_memory_stat_current_value("Allocated", 0)
    loss = forward()
    kept = core.host_memory_stat_current_value("Allocated", 0) - before
    del loss
    return kept


def _products(forward):
    """Returns the matrix multiplications of a forward pass, `(shape of x, shape of w, transpose_y)` each."""
    from models import cpu_ops
    from runtime.paddle_private import operators

    cpu_ops.faster = lambda: False  # the plain formulas: every product is one of the two operators
    ops = operators()
    found, kept = [], (ops.matmul, ops.linear)

    def matmul(x, y, transpose_x=False, transpose_y=False, **options):
        found.append((list(x.shape), list(y.shape), transpose_y))
        return kept[0](x, y, transpose_x, transpose_y, **options)

    def linear(x, weight, bias, *args):
        found.append(([x.size // x.shape[-1], x.shape[-1]], list(weight.shape), False))
        return kept[1](x, weight, bias, *args)

    ops.matmul, ops.linear = matmul, linear
    try:
        forward()
    finally:
        ops.matmul, ops.linear = kept
    return found


def _use_operators_of_a_gpu():
    from models import cpu_ops
    from training import flat

    cpu_ops.faster, flat.pays = lambda: False, lambda: True


def paddle_worker(part, case):
    if part != "reference":
        configure_runtime()
    import paddle  # noqa: F401 (before the baseline)

    if part == "counted" and not case["cpu_ops"]:
        _use_operators_of_a_gpu()
    baseline = memory("VmRSS")
    step, forward, states = (_reference_step if part == "reference" else _paddle_step)(case)
    if part == "counted":
        step()
        serve(lambda _: _counted(step))
    elif part == "products":
        _serve_products(_products(forward))
    else:
        if part == "plain":
            from models import cpu_ops

            cpu_ops.faster = lambda: False
        facts = {"activations": _kept(forward)}
        if part == "reference":
            step()
            facts.update(_counted(step))
        _serve(step, states, baseline, facts)


def _serve_products(shapes):
    import paddle

    operands = []
    for x, w, transpose_y in shapes:
        out = [*x[:-1], w[-2] if transpose_y else w[-1]]
        operands.append((paddle.randn(x), paddle.randn(w), paddle.randn(out), transpose_y))

    def products():
        for x, w, gradient, transpose_y in operands:
            paddle.matmul(x, w, transpose_y=transpose_y)
            paddle.matmul(gradient, w, transpose_y=not transpose_y)
            if transpose_y:
                paddle.matmul(gradient, x, transpose_x=True)
            else:
                paddle.matmul(x, gradient, transpose_x=True)

    flops = 2 * 3 * sum(x.size * (w.shape[-2] if transposed else w.shape[-1]) for x, w, _, transposed in operands)
    paddle.set_grad_enabled(False)
    _serve(products, 0, 0, {"flops": flops})


def _torch_network(case):
    """Returns a PyTorch network, and a function `(latents, timesteps, classes)` to its output."""
    layers, heads, head_dim = SIZES[case["size"]]
    if case["type"] == "LargeDiT":
        from benchmarks.torch_large_dit import LargeDiT

        sizes = {"layers": layers, "heads": heads, "head_dim": head_dim, "sample_size": LATENT, "patch": case["patch"]}
        model = LargeDiT(**sizes, channels=4, classes=CLASSES)
        return model, model
    from diffusers import DiTTransformer2DModel

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
    return model, lambda x, t, y: model(x, t, y).sample


def torch_worker(case):
    import diffusers  # noqa: F401 (before the baseline)
    import torch

    torch.set_num_threads(case["threads"])
    baseline = memory("VmRSS")
    model, network = _torch_network(case)
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
        predicted, share = network(noisy, t, y).chunk(2, dim=1)
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
        out = network(at * x + (1 - at) * noise, t, y)[:, :4]
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
    _serve(step, 4 * 5 * count, baseline, {"parameters": count})


def _count(case, cpu_ops):
    worker = Worker(sys.executable, __file__, "counted", {**case, "cpu_ops": cpu_ops})
    try:
        return worker.ask(0)
    finally:
        worker.close()


def measure(case, args):
    """Returns the figures of one case."""
    parts = {"ours": sys.executable, "plain": sys.executable, "products": sys.executable}
    if args.reference and case["type"] == "DiT":
        parts["reference"] = sys.executable
    if case["type"] == "LightningDiT":
        parts["DiT"] = sys.executable
    elif args.torch_python and not (case["recompute"] and case["type"] == "LargeDiT"):
        parts["torch"] = args.torch_python
    row = {**case, **_count(case, True), "gpu": _count(case, False)}
    workers = {}
    try:
        for part, python in parts.items():
            workers[part] = Worker(python, __file__, part, {**case, "type": "DiT"} if part == "DiT" else case)
        turns = [{part: worker.ask(args.steps) for part, worker in workers.items()} for _ in range(args.turns)]
    finally:
        for worker in workers.values():
            worker.close()
    last = turns[-1]
    row["seconds"] = {part: [turn[part]["seconds"] for turn in turns] for part in parts}
    row["step_s"] = statistics.median(row["seconds"]["ours"])
    row.update({key: last["ours"][key] for key in ("above", "activations")}, flops=last["products"]["flops"])
    row["update_share"] = statistics.median(turn["ours"]["update_share"] for turn in turns)
    row["share_of_limit"] = statistics.median(t["products"]["seconds"] / t["ours"]["seconds"] for t in turns)
    for part in ("plain", "reference", "torch", "DiT"):
        if part in parts:
            row[f"against_{part}"] = statistics.median(t["ours"]["seconds"] / t[part]["seconds"] for t in turns)
            row[f"memory_against_{part}"] = last["ours"]["above"] / last[part]["above"]
    if "reference" in parts:
        row["reference"] = {key: last["reference"][key] for key in ("operators", "host_reads", "above")}
    return row


def _case(text, args, recompute, threads):
    kind, _, size = text.rpartition("-")
    letter, _, patch = size.partition("/")
    if kind not in ("DiT", "SiT", "LargeDiT", "LightningDiT") or letter not in SIZES or patch not in ("2", "4", "8"):
        raise ValueError(f"--models {text!r}: expected DiT-S/4, SiT-B/2, LargeDiT-S/4, LightningDiT-S/4 and the like")
    case = {"type": kind, "size": letter, "patch": int(patch), "batch": args.batch_size}
    return {**case, "recompute": recompute, "threads": threads}


HEADS = (
    "model | threads | recompute | step | samples/s | products / step | of the plain operators' time | "
    "of PyTorch's time | of its memory | of DiT's time | of its memory | "
    "of the reference's time | above | activations | update | operators: here, on a GPU, reference | reads"
)


def _line(row):
    def ratio(key):
        return f"{row[key]:.2f}" if key in row else "-"

    counts = [row["operators"], row["gpu"]["operators"], row.get("reference", {}).get("operators", "-")]
    cells = [
        f"{row['type']}-{row['size']}/{row['patch']}",
        row["threads"],
        "yes" if row["recompute"] else "no",
        f"{row['step_s']:.3f} s",
        f"{row['batch'] / row['step_s']:.1f}",
        ratio("share_of_limit"),
        ratio("against_plain"),
        ratio("against_torch"),
        ratio("memory_against_torch"),
        ratio("against_DiT"),
        ratio("memory_against_DiT"),
        ratio("against_reference"),
        f"{row['above'] / 2**20:.0f} MiB",
        f"{row['activations'] / 2**20:.0f} MiB",
        f"{100 * row['update_share']:.1f}%",
        ", ".join(map(str, counts)),
        row["host_reads"],
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _processor():
    """Returns vendor and model of the processor, to stand beside the figures: `AuthenticAMD, AMD EPYC ...`."""
    fields = {}
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return ", ".join(fields.get(name, "unknown") for name in ("vendor_id", "model name"))


def run(args):
    cases = [
        _case(name, args, recompute, threads)
        for name in args.models
        for threads in args.threads
        for recompute in ((False, True) if args.recompute else (False,))
    ]
    rows = []
    print(f"processor: {_processor()}\n")
    print(f"| {HEADS} |")
    print("|" + " --- |" * (HEADS.count("|") + 1), flush=True)
    for case in tqdm(cases, unit="case"):
        rows.append(measure(case, args))
        tqdm.write(_line(rows[-1]))
    if args.output:
        write_json(args.output, {"processor": _processor(), "load_average": os.getloadavg(), "rows": rows})
        print(f"figures: {args.output}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["DiT-S/4"],
        metavar="MODEL",
        help="DiT-S/4, SiT-B/2, LargeDiT-S/4, LightningDiT-S/4, ... [DiT-S/4]",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="[%(default)s]")
    parser.add_argument("--threads", nargs="+", type=int, default=[2], help="[2]")
    parser.add_argument("--recompute", action="store_true", help="each case with recompute too")
    parser.add_argument("--turns", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=2, help="of each process in a turn [%(default)s]")
    parser.add_argument("--torch_python", metavar="PYTHON", help="Python with torch and diffusers [no comparison]")
    parser.add_argument("--reference", action="store_true", help="compare with the layout of PaddleMIX's example too")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        part, case = args.worker[0], json.loads(args.worker[1])
        torch_worker(case) if part == "torch" else paddle_worker(part, case)
        return
    run(args)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        main()
    else:
        run_cli(main)
