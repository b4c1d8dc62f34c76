"""Which part of every parameter's weights, optimizer state and averages a rank holds, and how to make them whole.

Tensor parallelism cuts weights, and all that belongs to them, along an axis (`models.parallel`). Sharding then spreads
over its group what is left:

    | sharding | weights                      | gradients | optimizer state, averages | `local_tensor`    |
    | -------- | ---------------------------- | --------- | ------------------------- | ----------------- |
    | none     | replicated                   | all       | replicated                | the parameter     |
    | stage 1  | replicated                   | all       | of the owned parameters   | the parameter     |
    | stage 2  | replicated                   | owned     | of the owned parameters   | the parameter     |
    | stage 3  | a slice of each, flat, padded | of it     | of the slices             | the slice         |
"""

import numpy as np
import paddle
import paddle.distributed as dist

from models.parallel import rank_part, whole_shape
from runtime.paddle_private import sharding_of, stage3_slice


def local_tensor(parameter):
    """Returns what this rank optimizes of a parameter: its flat, padded slice under sharding stage 3, else itself."""
    part = stage3_slice(parameter)
    return parameter if part is None else part


def optimizer_key(parameter):
    """Returns the name under which the optimizer keeps state and master weight of a parameter's `local_tensor`."""
    return parameter.name if local_tensor(parameter) is parameter else f"slice@{parameter.name}"


class LocalShard:
    """The part of a network under training that this rank holds.

    `model` is not wrapped, `optimizer` has its wrappers, and is None where nothing is sharded. The sharding `group` and
    the tensor-parallel `tensor_group` are None where there is none.
    """

    def __init__(self, model, optimizer=None):
        self._by_name = dict(model.named_parameters())
        self.group, owners = sharding_of(optimizer)
        # Ranks in the sharding group, in stages 1 and 2. Frozen parameters are in no optimizer: theirs is the first.
        self._owner = None if owners is None else {name: owners.get(p.name, 0) for name, p in self._by_name.items()}
        self._splits = {p.name: p.parallel_split for p in self._by_name.values() if hasattr(p, "parallel_split")}
        self.tensor_group = next((split.group for split in self._splits.values()), None)
        self.weights_are_sharded = self.group is not None and owners is None  # stage 3
        # The network computes only together with those of other ranks.
        self.forward_is_collective = self.weights_are_sharded or self.tensor_group is not None

    def owns(self, name):
        """Returns whether this rank holds optimizer state and averages of a parameter, or of its slice."""
        return self._owner is None or self._owner[name] == self.group.rank

    def part(self, name, whole):
        """Returns this rank's `local_tensor` of a whole parameter-shaped array."""
        return self.shard(name, rank_part(self._by_name[name], whole))

    def shard(self, name, array):
        """Returns what stage 3 leaves this rank of an array that is shaped as its network's parameter."""
        parameter = self._by_name[name]
        if local_tensor(parameter) is parameter:
            return array
        size = int(np.prod(local_tensor(parameter).shape))
        piece = array.reshape(-1)[self.group.rank * size : (self.group.rank + 1) * size]
        return np.pad(piece, (0, size - len(piece)))

    def on_device(self, name, tensor):
        """Returns a tensor that belongs to a parameter on that one's device: averages may stay on the host."""
        here = tensor is None or tensor.place.is_cpu_place() == local_tensor(self._by_name[name]).place.is_cpu_place()
        return tensor if here else tensor.cuda()

    @paddle.no_grad()
    def unshard(self, name, tensor):
        """Returns the whole of a `tensor` of which this rank holds its `local_tensor` (None: another rank owns it).

        It is float32, and whole over the sharding group only. A collective.
        """
        parameter, tensor = self._by_name[name], self.on_device(name, tensor)
        if self._owner is not None:
            value = tensor.astype("float32").clone() if self.owns(name) else paddle.zeros(parameter.shape, "float32")
            dist.broadcast(value, src=self.group.ranks[self._owner[name]], group=self.group)
            return value
        if local_tensor(parameter) is parameter:
            return tensor.astype("float32")
        parts = []
        dist.all_gather(parts, tensor.astype("float32"), group=self.group)
        return paddle.concat(parts)[: int(np.prod(parameter.shape))].reshape(parameter.shape)

    def gather(self, tensors, names=None):
        """Gathers whole parameter-shaped values on rank 0, `{name: float32 array}`; the others get none. A collective.

        `tensors` are `{name: this rank's part}`, without those that other ranks own; `names` (None: all) are the same
        on all ranks.
        """
        result = {}
        for name in self._by_name if names is None else names:
            value = self.unshard(name, tensors.get(name))
            split, parts = self._splits.get(self._by_name[name].name), []
            if split is not None:
                dist.all_gather(parts, value, group=split.group)
            if dist.get_rank() == 0:
                result[name] = value.numpy() if split is None else split.merge([part.numpy() for part in parts])
        return result

    def gather_scalars(self, tensors, names):
        """Gathers `{name: float32 array (1,)}` on rank 0 of one number a parameter, the same for all its parts."""
        numbers = {name: float(tensor) for name, tensor in tensors.items()}
        if self._owner is not None:
            parts = []  # as objects: Paddle keeps these tensors on the host, where NCCL can't reach them
            dist.all_gather_object(parts, numbers, group=self.group)
            numbers = {name: number for part in parts for name, number in part.items()}
        return {name: np.float32([numbers[name]]) for name in names} if dist.get_rank() == 0 else {}

    def whole_shapes(self):
        """Returns `{name: shape}` of the whole network's parameters."""
        return {name: whole_shape(parameter) for name, parameter in self._by_name.items()}

    def norm_weight(self, key):
        """Returns `(is_split, weight)`, how the squared gradient norm of an `optimizer_key` adds to the global one.

        True if each tensor-parallel rank holds a part; one over the number of sharding ranks with the same part.
        """
        replicas = self.group.nranks if self.weights_are_sharded and not key.startswith("slice@") else 1
        return key.removeprefix("slice@") in self._splits, 1.0 / replicas
