"""Which part of every parameter's weights, optimizer state and averages a rank holds, and how to make them whole.

Tensor parallelism cuts weights, and all that belongs to them, along an axis (`models.parallel`). Sharding then spreads
over its group: stages 1 and 2 the optimizer state and the averages, parameter by parameter; stage 3 slices of the
flattened parameters, the weights too.
"""

import numpy as np
import paddle
import paddle.distributed as dist

from models.parallel import rank_part, whole_shape


def held_part(parameter):
    """What this rank optimizes of a parameter: a slice of it, flat and padded, under sharding stage 3; else itself."""
    part = getattr(parameter, "fw_storage", None)
    return parameter if part is None else part


def held_name(parameter):
    """The name under which the optimizer keeps the state and the master weight of the `held_part`."""
    return parameter.name if held_part(parameter) is parameter else f"slice@{parameter.name}"


def inner_optimizer(optimizer):
    """The Paddle optimizer inside fleet's and the sharding wrappers."""
    while True:
        inner = vars(optimizer).get("_inner_opt", vars(optimizer).get("_optim"))
        if inner is None or inner is optimizer:
            return optimizer
        optimizer = inner


def master_weights(optimizer):
    """Float32 master weights by `held_name`; empty unless the optimizer keeps some (AMP O2)."""
    return getattr(inner_optimizer(optimizer), "_master_weights", {})


def _sharding(optimizer):
    """`(group, owner by parameter.name or None)` of the sharding wrapper around an optimizer; `(None, None)`."""
    while optimizer is not None:
        attributes = vars(optimizer)
        if "_param2rank" in attributes:  # stage 2 fills it in when first asked for; stage 1 has its group in fleet's
            owners = getattr(type(optimizer), "param2rank", None)
            owners = attributes["_param2rank"] if owners is None else optimizer.param2rank
            group = attributes.get("_group") or optimizer._hcg.get_sharding_parallel_group()
            return group, owners
        if "update_slice" in attributes:  # stage 3
            return attributes["_group"], None
        inner = attributes.get("_inner_opt", attributes.get("_optim"))
        optimizer = None if inner is optimizer else inner
    return None, None


class Shares:
    """A rank's shares of a network under training.

    Args:
        model: the network, not wrapped.
        optimizer: as the Trainer has wrapped it; None where nothing is sharded.

    Attributes:
        names: of the parameters whose optimizer state and averages this rank holds; None for all of them.
        sliced: whether the weights are sharded too (stage 3).
        split: whether the rank's network computes only together with those of other ranks.
    """

    def __init__(self, model, optimizer=None):
        self._parameters = dict(model.named_parameters())
        self.group, owners = _sharding(optimizer)
        self._owner = self.names = None
        if owners is not None:
            # Frozen parameters are not in the optimizer: theirs is the first rank.
            self._owner = {name: owners.get(parameter.name, 0) for name, parameter in self._parameters.items()}
            self.names = {name for name, owner in self._owner.items() if owner == self.group.rank}
        splits = [getattr(parameter, "parallel_split", None) for parameter in self._parameters.values()]
        self.tensor_group = next((split.group for split in splits if split is not None), None)
        self._split_names = {
            parameter.name
            for parameter, split in zip(self._parameters.values(), splits, strict=True)
            if split is not None
        }
        self.sliced = self.group is not None and owners is None
        self.split = self.sliced or self.tensor_group is not None

    def own(self, name):
        """Whether this rank holds optimizer state and averages of a parameter, or of its slice."""
        return self.names is None or name in self.names

    def part(self, name, whole):
        """This rank's part (`held_part`) of a whole parameter-shaped array."""
        return self.slice(name, rank_part(self._parameters[name], whole))

    def slice(self, name, value):
        """What sharding leaves this rank of a value, array or tensor, in the shape of its network's parameter."""
        parameter = self._parameters[name]
        held = held_part(parameter)
        if held is parameter:
            return value
        size = int(np.prod(held.shape))
        flat = value.reshape([-1])[self.group.rank * size : (self.group.rank + 1) * size]
        if flat.shape[0] == size:
            return flat.clone() if isinstance(flat, paddle.Tensor) else flat
        padding = np.zeros(size - flat.shape[0], dtype="float32")
        if isinstance(flat, paddle.Tensor):
            return paddle.concat([flat, paddle.to_tensor(padding)])
        return np.concatenate([flat, padding])

    @paddle.no_grad()
    def of_rank(self, name, tensor):
        """A parameter-shaped float32 tensor of this rank's network, of what its sharding group holds. A collective.

        Args:
            tensor: this rank's part; ignored where another rank owns it.
        """
        parameter = self._parameters[name]
        if self._owner is not None:
            own = self.own(name)
            value = tensor.astype("float32").clone() if own else paddle.zeros(parameter.shape, dtype="float32")
            dist.broadcast(value, src=self.group.ranks[self._owner[name]], group=self.group)
            return value
        if held_part(parameter) is parameter:
            return tensor.astype("float32")
        parts = []
        dist.all_gather(parts, tensor.astype("float32"), group=self.group)
        return paddle.concat(parts)[: int(np.prod(parameter.shape))].reshape(parameter.shape)

    def whole(self, tensors, names=None):
        """`{name: float32 array}` of parameter-shaped values, whole. A collective: all ranks call it.

        Args:
            tensors: `{name: this rank's part}`; those that other ranks own may be missing.
            names: which, the same on all ranks; None for all parameters.

        Returns:
            an empty dict on other ranks than 0: they copy nothing to the host.
        """
        result = {}
        for name in self._parameters if names is None else names:
            value = self.of_rank(name, tensors.get(name))
            split = getattr(self._parameters[name], "parallel_split", None)
            parts = [value]
            if split is not None:
                parts = []
                dist.all_gather(parts, value, group=split.group)
            if dist.get_rank() == 0:
                arrays = [part.numpy() for part in parts]
                result[name] = arrays[0] if split is None else split.merge(arrays)
        return result

    def whole_scalars(self, tensors, names):
        """`{name: float32 array (1,)}` on rank 0 of one number a parameter, the same for all its parts."""
        numbers = {name: float(tensor) for name, tensor in tensors.items()}
        if self._owner is not None:
            parts = []  # as objects: Paddle keeps these tensors on the host, where NCCL can't reach them
            dist.all_gather_object(parts, numbers, group=self.group)
            numbers = {name: number for part in parts for name, number in part.items()}
        return {name: np.float32([numbers[name]]) for name in names} if dist.get_rank() == 0 else {}

    def whole_shapes(self):
        """`{name: shape}` of the whole network's parameters."""
        return {name: whole_shape(parameter) for name, parameter in self._parameters.items()}

    def norm_group(self, parameter_name):
        """How the square of a gradient that this rank holds adds up to the network's.

        Args:
            parameter_name: Paddle's, of a `held_part`.

        Returns:
            `(split, weight)`: whether the other ranks of the tensor group hold other parts, and one over the number
            of sharding ranks that hold the same.
        """
        name = parameter_name.removeprefix("slice@")
        same = self.group.nranks if self.sliced and name == parameter_name else 1
        return name in self._split_names, 1.0 / same
