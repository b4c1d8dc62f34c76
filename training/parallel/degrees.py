"""The parallel degrees of a run, checked against the network and the number of processes."""

from dataclasses import dataclass

from models.sizes import check_tensor_parallel

STAGES = ("", "stage1", "stage2", "stage3")
# Settings of PaddleNLP's sharding_parallel_config: those that stage 1 uses, and others: they keep the optimizer's state
# under the names of fused or cut parameters, or let the weights arrive after the step: checkpoints would not know.
USED = ["disable_stage1_reduce_avg", "enable_release_grads"]
LEFT_OUT = """split_param enable_stage1_overlap enable_stage1_tensor_fusion enable_stage1_broadcast_overlap
enable_stage1_allgather_overlap enable_stage2_overlap enable_fuse_optimizer_states""".split()


@dataclass(frozen=True)
class Degrees:
    """How the ranks of a run divide the work; by default each has its own data and a whole network."""

    tensor: int = 1  # ranks that share one network, and get the same batch
    sharding: int = 1  # ranks over which `stage` spreads state
    stage: str = ""  # one of `STAGES`
    data_ranks: int = 1  # ranks, or groups of `tensor` ranks, that get different data
    sharding_settings: str = ""  # those of PaddleNLP's sharding_parallel_config that can be used
    notes: tuple = ()  # sentences to print


def resolve_degrees(args, model, world_size):
    """Returns the `Degrees` of `world_size` processes, by the Trainer's flags and the config's section `model`.

    Raises ValueError for one that is not supported, does not divide the processes, or can't split the model.
    """
    for name in ("pipeline", "sep"):
        degree = getattr(args, f"{name}_parallel_degree")
        if degree != 1:
            raise ValueError(f"--{name}_parallel_degree must be 1, got {degree}: {name} parallelism is not supported")
    for name in ("transformer_engine_backend", "use_fp8"):
        if getattr(args, name):
            raise ValueError(f"--{name} must be False: there are no float8 layers here")
    if (args.sharding or "") not in STAGES:
        raise ValueError(f"--sharding must be '' or {', '.join(STAGES[1:])}, got {args.sharding!r}")
    tensor, sharding = args.tensor_parallel_degree or 1, args.sharding_parallel_degree
    not_dividing = f"does not divide the {world_size} processes launched"
    if world_size % tensor:
        raise ValueError(f"--tensor_parallel_degree {tensor} {not_dividing}")
    check_tensor_parallel(model, tensor)
    if args.sharding and sharding == 1 and world_size > tensor:
        raise ValueError(f"--sharding {args.sharding} with --sharding_parallel_degree 1 shards nothing; leave one out")
    if sharding is None:
        sharding = world_size // tensor if args.sharding else 1
    if world_size % (tensor * sharding):
        among = f" / --tensor_parallel_degree {tensor}" if tensor > 1 else ""
        raise ValueError(f"--sharding_parallel_degree {sharding} {not_dividing}{among}")
    stage = (args.sharding or "stage1") if sharding > 1 else ""
    notes = []
    data_parallel = world_size // (tensor * sharding)
    if args.dp_degree not in (None, data_parallel):
        notes.append(
            f"--dp_degree {args.dp_degree} is not what {world_size} processes with tensor-parallel degree {tensor} and "
            f"sharding degree {sharding} give: the data-parallel degree is {data_parallel}"
        )
    settings = args.sharding_parallel_config.replace(",", " ").split()
    if unknown := [name for name in settings if name not in USED + LEFT_OUT]:
        known = ", ".join(USED + LEFT_OUT)
        raise ValueError(f"--sharding_parallel_config: unknown setting {unknown[0]!r}; known: {known}")
    used = [name for name in settings if stage == "stage1" and name in USED]
    if unused := ", ".join(name for name in settings if name not in used):
        notes.append(f"--sharding_parallel_config: {unused} left out (only speed or memory would differ)")
    return Degrees(tensor, sharding, stage, world_size // tensor, " ".join(used), tuple(notes))
