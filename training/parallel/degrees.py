"""The parallel degrees of a run, checked against the network and the number of processes."""

from models.sizes import check_tensor_parallel
from training.trainer_arguments import LEFT_OUT, SHARDING_CONFIG

SHARDING = ("", "stage1", "stage2", "stage3")


def check_degrees(args, model, world_size):
    """Checks the parallel degrees against the model and the number of processes, and fills in the sharding ones.

    Args:
        model: the `model` section of the resolved config.

    Returns:
        `(data ranks, notes)`: how many ranks get different data (data-parallel and sharding ranks together), and
        sentences to print: `dp_degree` says otherwise than what follows from the others; settings that are left out.

    Raises:
        ValueError: a degree that is not supported, does not divide the number of processes, or can't split the model.
    """
    for name in ("pipeline", "sep"):
        degree = getattr(args, f"{name}_parallel_degree")
        if degree != 1:
            raise ValueError(f"--{name}_parallel_degree must be 1, got {degree}: {name} parallelism is not supported")
    for name in ("transformer_engine_backend", "use_fp8"):
        if getattr(args, name):
            raise ValueError(f"--{name} must be False: there are no float8 layers here")
    if args.sharding not in SHARDING:
        raise ValueError(f"--sharding must be '' or {', '.join(SHARDING[1:])}, got {args.sharding!r}")
    tensor = args.tensor_parallel_degree
    if world_size % tensor:
        raise ValueError(f"--tensor_parallel_degree {tensor} does not divide the {world_size} processes launched")
    check_tensor_parallel(model, tensor)
    if args.sharding and args.sharding_parallel_degree == 1 and world_size > tensor:
        raise ValueError(f"--sharding {args.sharding} with --sharding_parallel_degree 1 shards nothing; leave one out")
    if args.sharding_parallel_degree is None:
        args.sharding_parallel_degree = world_size // tensor if args.sharding else 1
    sharding = args.sharding_parallel_degree
    if world_size % (tensor * sharding):
        among = f" / --tensor_parallel_degree {tensor}" if tensor > 1 else ""
        raise ValueError(
            f"--sharding_parallel_degree {sharding} does not divide the {world_size} processes launched{among}"
        )
    args.sharding = (args.sharding or "stage1") if sharding > 1 else ""
    data_parallel = world_size // (tensor * sharding)
    notes = []
    if args.dp_degree is not None and args.dp_degree != data_parallel:
        notes.append(
            f"--dp_degree {args.dp_degree} is not what {world_size} processes with tensor-parallel degree {tensor} and "
            f"sharding degree {sharding} give: the data-parallel degree is {data_parallel}"
        )
    settings = args.sharding_parallel_config.replace(",", " ").split()
    for name in settings:
        if name not in (*SHARDING_CONFIG, *LEFT_OUT):
            known = ", ".join((*SHARDING_CONFIG, *LEFT_OUT))
            raise ValueError(f"--sharding_parallel_config: unknown setting {name!r}; known: {known}")
    used = [name for name in settings if args.sharding in SHARDING_CONFIG.get(name, ())]
    if len(used) < len(settings):
        unused = ", ".join(name for name in settings if name not in used)
        notes.append(f"--sharding_parallel_config: {unused} left out (only speed or memory would differ)")
    args.sharding_parallel_config = " ".join(used)
    return world_size // tensor, notes
