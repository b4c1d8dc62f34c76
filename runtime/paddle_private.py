"""Every private name of Paddle's, and whatever differs between Paddle's versions: it stands here and nowhere else.

Paddle is imported inside the functions, so that this module costs a command's `--help` nothing.
"""

import contextlib
import functools


def zero_if(flag, tensors):
    """Fills floating tensors with zeros, in place, if a flag on the device, a bool tensor (1,), is set.

    Paddle's public operators need the flag on the host, or write every tensor in any case.
    """
    import paddle

    by_dtype = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        paddle._C_ops.update_loss_scaling_(same, flag, *_scaler_state(paddle.get_device()), 1, 1, 2.0, 0.5, True)


@functools.lru_cache
def _scaler_state(device):
    """Returns a scale and two counters, which the operator of loss scaling asks for and `zero_if` does not use."""
    import paddle

    return paddle.ones([1]), paddle.zeros([1], "int32"), paddle.zeros([1], "int32")


@contextlib.contextmanager
def full_float32():
    """Lets a GPU multiply and convolve float32 numbers in float32 within the block, where TF32 is Paddle's default.

    TF32 keeps 10 bits of a factor, an error of 1e-3.
    """
    from paddle.base import core

    switches = [(core.get_cublas_switch, core.set_cublas_switch), (core.get_cudnn_switch, core.set_cudnn_switch)]
    kept = [get() for get, _ in switches]
    try:
        for _, set_to in switches:
            set_to(False)
        yield
    finally:
        for (_, set_to), value in zip(switches, kept, strict=True):
            set_to(value)


# Optimizers and their wrappers.


def inner_optimizer(optimizer):
    """Returns the Paddle optimizer inside fleet's and the sharding wrappers."""
    return _wrappers(optimizer)[-1]


def master_weights(optimizer):
    """Returns float32 master weights by `training.parallel.shares.optimizer_key`; empty without AMP O2."""
    return getattr(inner_optimizer(optimizer), "_master_weights", {})


def sharding_of(optimizer):
    """Reads how a sharding wrapper divides an optimizer's state: `(group, owner by parameter.name)`.

    The owners are None for stage 3, which slices every parameter; the group is None where nothing is sharded.
    """
    for wrapper in _wrappers(optimizer) if optimizer is not None else ():
        attributes = vars(wrapper)
        if "_param2rank" in attributes:  # stage 2 fills it in when first asked for; stage 1 has its group in fleet's
            filled = hasattr(type(wrapper), "param2rank")
            owners = wrapper.param2rank if filled else attributes["_param2rank"]
            return attributes.get("_group") or wrapper._hcg.get_sharding_parallel_group(), owners
        if "update_slice" in attributes:  # stage 3
            return attributes["_group"], None
    return None, None


def _wrappers(optimizer):
    found = [optimizer]
    while (inner := vars(found[-1]).get("_inner_opt", vars(found[-1]).get("_optim"))) not in (None, found[-1]):
        found.append(inner)
    return found


def stage3_slice(parameter):
    """Returns the flat slice of a parameter that sharding stage 3 leaves this rank, or None if it is whole here."""
    return getattr(parameter, "fw_storage", None)


def slice_parameter(parameter, name):
    """Returns the parameter by which an optimizer keys the state of a stage-3 slice before its first step."""
    from paddle.base.framework import EagerParamBase as Parameter

    is_whole = isinstance(parameter, Parameter)
    return parameter if is_whole else Parameter(shape=parameter.shape, dtype=parameter.dtype, name=name)


def adamw_accumulators(optimizer, parameters, names):
    """Returns `{accumulator: tensor}` of AdamW for each of `parameters`, made at 0 where there is none yet."""
    import paddle

    optimizer._create_accumulators(paddle.static.default_main_program().global_block(), parameters)
    return [{name: optimizer._get_accumulator_master(name, parameter) for name in names} for parameter in parameters]


def make_adamw(apply_rate, **options):
    """Returns a `paddle.optimizer.AdamW` whose learning rate at each parameter passes through `apply_rate(rate)`."""
    import paddle

    class AdamW(paddle.optimizer.AdamW):
        def clear_grad(self, set_to_zero=False):  # so that a backward pass writes gradients, and adds to no zeros
            super().clear_grad(set_to_zero)

        def _create_param_lr(self, param_and_grad):
            return apply_rate(super()._create_param_lr(param_and_grad))

        # One operator updates all float32 parameters, to the bits of one operator for each. On a GPU it takes the
        # number of steps from the first of them: all get their gradients in the same steps.

        def _create_optimization_pass(self, *args, **options):
            self._waiting = []
            return super()._create_optimization_pass(*args, **options)

        def _append_optimize_op(self, block, param_and_grad):
            if all(tensor.dtype == paddle.float32 for tensor in param_and_grad):
                self._waiting.append(param_and_grad)
            else:
                super()._append_optimize_op(block, param_and_grad)

        def _finish_update(self, block, parameters_and_grads):
            waiting, self._waiting = self._waiting, []
            if not waiting:
                return
            parameters, gradients = map(list, zip(*waiting, strict=True))
            moment1, moment2, power1, power2 = (
                [self._get_accumulator_master(name, parameter) for parameter in parameters]
                for name in ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
            )
            maximum, amsgrad = ([None], [False]) if hasattr(self, "_amsgrad") else ([], [])  # not in Paddle 2
            masters, skip, chunk_size = None, None, 1 << 15
            use_adamw, multi_precision, one_power_for_all = True, False, False
            paddle._C_ops.fused_adam_(
                *(parameters, gradients, self._create_param_lr(waiting[0]), moment1, moment2, *maximum),
                *(power1, power2, masters, skip, self._beta1, self._beta2, self._epsilon, chunk_size),
                *(self._weight_decay, use_adamw, multi_precision, one_power_for_all, *amsgrad),
            )

    return AdamW(**options)


def make_gradient_clip(clip):
    """Returns a Paddle `grad_clip` that calls `clip([(parameter, gradient), ...])` before each optimizer step.

    Fleet and the sharding wrappers replace Paddle's own `ClipGradByGlobalNorm` by others; this one they leave alone.
    """
    from paddle import nn

    class Clip(nn.clip.ClipGradBase):
        def _dygraph_clip(self, params_grads):
            return clip(params_grads)

    return Clip()


def squared_norm(tensor):
    """Returns the sum of squares `(1,)` of a float32 tensor, by the kernel of Paddle's own clipping."""
    from paddle import nn

    return nn.clip._squared_l2_norm(tensor).reshape([1])


def joined(tensors):
    """Returns `(views, flat)`: copies of tensors of one type, shaped as they are, and the tensor that holds them."""
    import paddle

    copy_data, set_constant, persist_output, constant, use_align = True, False, False, 0.0, False
    return paddle._C_ops.coalesce_tensor(
        *(tensors, tensors[0].dtype, copy_data, set_constant, persist_output, constant, use_align, -1, -1, [], [])
    )


def scale_gradient(parameter, gradient, factor):
    """Multiplies a gradient in place; autograd is told that its backward pass is over and must not mind."""
    gradient.multiply_(factor.astype(gradient.dtype))
    parameter._reset_grad_inplace_version(True)


def loss_scale(scaler):
    """Returns a scaler's current scale, a tensor on the device; the public method brings it to the host."""
    return scaler._scale


def found_overflow(scaler):
    """Returns a bool tensor (1,), on the device: the last unscaled gradients were not finite."""
    return scaler._found_inf.reshape([1])


def skipped_step(scaler):
    """Returns whether the loss scaler has left out the last optimizer step, because its gradients overflowed."""
    return scaler._cache_found_inf


# Fleet, collectives and networks.


def tensor_parallel_group():
    """Returns fleet's tensor-parallel group of this rank, once fleet has its degrees; None for whole networks."""
    from paddle.distributed import fleet

    if (hybrid := getattr(fleet.fleet, "_hcg", None)) is None:
        return None
    # Its ranks read the same batch and draw the same random numbers.
    fleet.fleet._user_defined_strategy.hybrid_configs["mp_configs"].need_broadcast_data = False
    group = hybrid.get_model_parallel_group()
    return group if group.nranks > 1 else None


def replace_tensor_parallel_operators(*, identity, all_reduce, concat):
    """Gives fleet's tensor-parallel layers other operators: its own have no kernel on a CPU."""
    from paddle.distributed.fleet.layers.mpu import mp_ops

    mp_ops._c_identity, mp_ops._mp_allreduce, mp_ops._c_concat = identity, all_reduce, concat


def give_groups_own_stores(make_store):
    """Lets every new gloo group exchange addresses through `make_store(shared store, group name, rank)`.

    Paddle writes the addresses of every group under the same keys: in a shared store a rank that is early reads those
    of the group before.
    """
    from paddle.distributed import collective

    of_paddle = collective._new_process_group_impl

    def new_process_group(backend, store, rank, world_size, group_name, *args, **options):
        if backend == "gloo":
            store = make_store(store, group_name, rank)
        return of_paddle(backend, store, rank, world_size, group_name, *args, **options)

    if not hasattr(of_paddle, "make_store"):  # not replaced already
        new_process_group.make_store = make_store
        collective._new_process_group_impl = new_process_group


@contextlib.contextmanager
def replaced(module, **attributes):
    """Replaces attributes of a module, or of any object, as long as the block runs."""
    with contextlib.ExitStack() as undo:
        for name, value in attributes.items():
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def operators():
    """Returns Paddle's operators as they are called in eager mode: a module whose functions benchmarks replace."""
    import paddle

    return paddle._C_ops


def keep_own_parameters_float32(layer):
    """Makes AMP O2 leave a layer's own parameters in float32; those of its sublayers are cast as usual."""
    layer._cast_to_low_precision = False


def sum_gradient_over_group(x, group):
    """Returns x; in the backward pass its gradient is summed over a tensor-parallel group."""
    from paddle.distributed.fleet.layers.mpu import mp_ops

    return mp_ops._c_identity(x, group=group)


def concat_over_group(x, group):
    """Returns the ranks' tensors `(..., D)`, in the group's order, as one `(..., D * ranks)`."""
    from paddle.distributed.fleet.layers.mpu import mp_ops

    return mp_ops._c_concat(x, group=group)
