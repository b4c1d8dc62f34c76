"""Work for rank 0 alone, whose errors end every rank."""

import paddle


def run_on_rank_0(decide):
    """Returns on every rank what `decide()` returns on rank 0; an exception that it raises or returns is raised on all.

    Nodes that don't share a disk must not decide differently.
    """
    answer = [None]
    if paddle.distributed.get_rank() == 0:
        try:
            answer = [decide()]
        except Exception as error:
            answer = [error]
    if paddle.distributed.get_world_size() > 1:
        paddle.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]
