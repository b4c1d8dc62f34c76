"""Plan the memory of a training run on GPUs before renting them.

    python tools/plan_memory.py --config_file config/LargeDiT_3B_patch2.json --world_size 8 --gpu_memory 80

It takes the flags of train_image_generation_trainer.py; those that change nothing here are ignored. It prints
- the network's parameters, the memory of the fullest GPU by kind, what that GPU sends in a step, and an estimate of the
  time of a step,
- with --gpu_memory the ways to train the same global batch that fit, fastest first. Flags that are given stay as they
  are; the others of tensor parallelism, sharding, recompute, micro-batch and accumulation are tried.

Not counted, and left free by --reserve: the CUDA context, workspaces of cuBLAS, cuDNN and NCCL, and what the allocator
can't use of what it holds. Formulas, their sources, and measurements: docs/memory.md.
"""

import argparse
import dataclasses

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import Parser, resolve_training
from config.options import ABOVE_0, FROM_0, POSITIVE_INT
from config.schema import check_groups
from runtime.files import check_output, write_json
from runtime.process import counted, run_cli
from training.parallel.degrees import resolve_degrees
from training.parallel.memory_plan import Plan, Setting
from training.parallel.step_time import Machine, fitting, step_flops, step_seconds, traffic

GIB = 2**30
# The Trainer's flags that decide something here; the others are accepted, and left out of --help.
SHOWN = """help config_file device per_device_train_batch_size gradient_accumulation_steps use_ema ema_profiles
ema_on_host recompute bf16 fp16 amp_level fused_attention sharding sharding_parallel_degree tensor_parallel_degree
dp_degree""".split()


def build_parser():
    parser = Parser("trainer")
    parser.description, parser.epilog = __doc__, None
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for action in parser._actions:
        if action.dest not in SHOWN:
            action.help = argparse.SUPPRESS
    # None: not given, so that --gpu_memory may try others.
    parser.set_defaults(tensor_parallel_degree=None, sharding=None)
    group = parser.add_argument_group("planning")
    group.add_argument("--world_size", check=POSITIVE_INT, default=8, help="GPUs")
    group.add_argument("--gpu_memory", check=ABOVE_0, metavar="GIB", help="memory of a GPU: list what fits")
    group.add_argument("--reserve", check=FROM_0, default=2.0, metavar="GIB", help="of it to leave free")
    group.add_argument("--top", check=POSITIVE_INT, default=10, help="ways to list")
    group.add_argument(
        "--json", metavar="FILE", help="write everything as JSON; --output is the Trainer's and ignored here"
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing --json file")
    group = parser.add_argument_group("the machine, for the estimate of time (defaults: an A100's)")
    group.add_argument(
        "--gpu_tflops", check=ABOVE_0, help="peak TFLOP/s in the precision [312 in half, 19.5 in float32]"
    )
    group.add_argument("--efficiency", check=ABOVE_0, default=0.45, help="share of it that a step reaches")
    group.add_argument("--bandwidth", check=ABOVE_0, default=240.0, help="GB/s that a GPU sends inside a node")
    group.add_argument("--network", check=ABOVE_0, default=25.0, help="GB/s that it sends between nodes")
    group.add_argument("--gpus_per_node", check=POSITIVE_INT, default=8, help="GPUs of a node")
    return parser


def setting_of(args, config):
    """Returns the `Setting` that the command line and the config ask for, as the Trainer would read them."""
    training, degrees = config["training"], resolve_degrees(args, config["model"], args.world_size)
    device = "cpu" if args.device.split(":")[0] == "cpu" else "gpu"
    split = {"tensor_parallel": degrees.tensor, "sharding": degrees.stage, "sharding_degree": degrees.sharding}
    setting = Setting.of(training, world_size=args.world_size, device=device, **split)
    if args.dp_degree not in (None, setting.data_parallel):
        raise ValueError(degrees.notes[0])
    batch, ranks = args.per_device_train_batch_size, setting.data_ranks
    if batch is None:
        batch, rest = divmod(training["global_batch_size"], ranks * setting.accumulation)
        if rest:
            raise ValueError(
                f"global batch size {training['global_batch_size']} is not divisible by {ranks} data-parallel ranks x "
                f"{setting.accumulation} gradient accumulation steps; give --per_device_train_batch_size"
            )
    check_groups(config, batch)
    return dataclasses.replace(setting, batch=batch)


def fixed_fields(args):
    """Returns the names of the fields of `Setting` that the command line has decided."""
    given = {
        "tensor_parallel": args.tensor_parallel_degree,
        "sharding": args.sharding if args.sharding_parallel_degree is None else "given",
        "sharding_degree": args.sharding_parallel_degree,
        "recompute": args.recompute,
        "batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
    }
    return {name for name, value in given.items() if value is not None}


def gib(size):
    return f"{size / GIB:.2f}"


def print_table(title, sizes, unit, least=0):
    print(title)
    for name, size in sizes.items():
        if size >= least:
            print(f"  {name:42}{size / unit:8.2f}")


def print_plan(planned, report, config_file, kind):
    phase, held, seconds = planned.peak_phase, sum(planned.states.values()), report["seconds"]
    print(f"{config_file}: {kind}, {planned.parameters:,} parameters, {planned.trained:,} of them trained")
    print(describe(planned.setting), end="\n\n")
    print_table("memory of the fullest GPU                      GiB", planned.states, GIB, least=GIB / 200)
    in_phase = {f"  {name}": size for name, size in planned.phases[phase].items()}
    print_table(f"  in the phase {phase!r}:", in_phase, GIB, least=GIB / 200)
    print(f"  {'peak':42}{gib(planned.peak):>8}")
    others = [f"{name} {gib(held + sum(kinds.values()))}" for name, kinds in planned.phases.items() if name != phase]
    print(f"other phases: {', '.join(others)}")
    print(f"kept from the forward to the backward pass: {gib(sum(planned.kept.values()))}\n")
    if report["sent_bytes"]:
        print_table("sent by a GPU in a step                         GB", report["sent_bytes"], 1e9)
        print()
    print(
        f"estimate: {sum(seconds.values()):.3f} s a step ({seconds['computing']:.3f} computing, "
        f"{seconds['sending']:.3f} sending), {planned.setting.global_batch / sum(seconds.values()):.0f} samples/s"
    )


def describe(setting):
    """Returns one line on how a network is trained."""
    s = setting
    names = "tensor parallel", f"sharding {s.sharding} x", "data parallel"
    degrees = (s.tensor_parallel, s.sharding_degree, s.data_parallel)
    parts = [counted(s.world_size, "GPU"), *(f"{name} {n}" for name, n in zip(names, degrees, strict=True) if n > 1)]
    batches = f"{counted(s.batch, 'sample')} x {counted(s.accumulation, 'micro-batch', 'micro-batches')} a GPU"
    switches = {"recompute": s.recompute, "EMA": s.ema, "fused attention": s.fused_attention}
    words = [f"{s.precision} {s.level}" if s.mode else "float32"]
    words += [name if value else f"no {name}" for name, value in switches.items()]
    if s.profiles:
        words.append(counted(s.profiles, "profile") + (" on the host" if s.profiles_on_host else ""))
    return f"{', '.join(parts)}; {batches}, {s.global_batch} a step; {', '.join(words)}"


def print_fitting(found, args):
    memory = f"{args.gpu_memory:g} GiB, {args.reserve:g} of them left free"
    print(f"\nways to train the same batch in {memory}, fastest first:")
    print("tensor  sharding    data  recompute  batch x micro    GiB   s/step  samples/s")
    for planned, seconds in found[: args.top]:
        s = planned.setting
        sharding = f"{s.sharding} x{s.sharding_degree}" if s.sharding else "-"
        print(
            f"{s.tensor_parallel:6}  {sharding:10} {s.data_parallel:5}  {'yes' if s.recompute else 'no':9}  "
            f"{f'{s.batch} x {s.accumulation}':13}  {planned.peak / GIB:5.1f}  {seconds:7.3f}  "
            f"{s.global_batch / seconds:9.0f}"
        )
    if len(found) > args.top:
        print(f"... and {len(found) - args.top} more; --top N shows them")


def as_json(planned, machine):
    """Returns a plan as JSON values."""
    setting = planned.setting
    derived = {"data_parallel": setting.data_parallel, "global_batch": setting.global_batch}
    return {
        "setting": {**dataclasses.asdict(setting), **derived},
        **{name: getattr(planned, name) for name in ("parameters", "trained", "peak_phase", "states", "phases")},
        "peak_bytes": planned.peak,
        "kept_activations": planned.kept,
        "sent_bytes": {name: size for name, (size, _) in traffic(planned).items()},
        "flops": step_flops(planned),
        "seconds": dict(zip(("computing", "sending"), step_seconds(planned, machine), strict=True)),
    }


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.json:
        check_output(args.json, args.overwrite, "--json ")
    config = resolve_training(args)
    planned = Plan(config, setting_of(args, config))
    machine = Machine(args.gpu_tflops, args.efficiency, args.bandwidth, args.network, args.gpus_per_node)
    result = {"config_file": args.config_file, **as_json(planned, machine)}
    print_plan(planned, result, args.config_file, config["model"]["type"])
    if args.gpu_memory is not None:
        memory = (args.gpu_memory - args.reserve) * GIB
        print(f"\nthis setting {'fits' if planned.peak <= memory else 'does not fit'} into {args.gpu_memory:g} GiB")
        found, least = fitting(config, planned.setting, memory, machine, fixed=fixed_fields(args))
        if not found:
            need = f"; the least is {gib(least.peak)} GiB: {describe(least.setting)}" if least else ""
            raise ValueError(f"no setting fits into {args.gpu_memory:g} GiB less {args.reserve:g} to leave free{need}")
        print_fitting(found, args)
        result["fits"] = planned.peak <= memory
        result["fitting"] = [as_json(fit, machine) for fit, _ in found]
    if args.json:
        write_json(args.json, result)
        print(f"\nJSON: {args.json}")


if __name__ == "__main__":
    run_cli(main)
