"""Lists of tensors as a few long ones: a GPU gets one operator for all of them where a CPU gets one for each.

On a GPU every operator costs the host some microseconds, and a kernel of a bias is too small for the device. On a CPU
the update runs at the speed of the memory, and a copy would only slow it down.
"""

import paddle

from runtime.paddle_private import join, squared_norm

# Elements of the tensors that are joined: 32 MiB in float32, which stay in the cache of a large GPU. A tensor of more
# than a quarter of it fills the device by itself.
BUCKET_SIZE = 1 << 23


def pays():
    """Returns whether joined tensors are faster on the current device."""
    return not paddle.get_device().startswith("cpu")


def buckets(tensors):
    """Returns the indices of `tensors` in lists of what is to be joined: small float32 tensors. Others are alone."""
    found, room, joins = [], 0, pays()
    for index, tensor in enumerate(tensors):
        if not joins or tensor.dtype != paddle.float32 or tensor.size > BUCKET_SIZE // 4:
            found.append([index])
            continue
        if tensor.size > room:
            bucket, room = [], BUCKET_SIZE
            found.append(bucket)
        bucket.append(index)
        room -= tensor.size
    return found


def squared_norms(tensors):
    """Returns numbers `(1,)`, float32, which add up to the sum of all tensors' squares."""
    together = ([tensors[index] for index in indices] for indices in buckets(tensors))
    flat = (bucket[0] if len(bucket) == 1 else join(bucket)[1] for bucket in together)
    return [squared_norm(tensor.astype("float32")) for tensor in flat]
