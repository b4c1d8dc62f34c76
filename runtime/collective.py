"""Work of one rank or of all, whose errors end every rank."""


def run_on_every_rank(function):
    """Returns what `function()` returns on each rank, in a list; an exception of it on one is raised on every rank."""
    import paddle.distributed as dist

    try:
        answers = [function()]
    except Exception as error:
        answers = [error]
    if dist.get_world_size() > 1:
        (own,), answers = answers, []
        dist.all_gather_object(answers, own)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def run_on_rank_0(decide):
    """Returns on every rank what `decide()` returns on rank 0; an exception that it raises or returns is raised on all.

    Nodes that don't share a disk must not decide differently.
    """
    import paddle.distributed as dist

    return run_on_every_rank(decide if dist.get_rank() == 0 else lambda: None)[0]
