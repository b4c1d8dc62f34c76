"""Every private name of Paddle's, and whatever differs between Paddle's versions: it stands here and nowhere else.

A function asks for the feature it needs, not for a version; "Paddle 2.6" is 2.6.2 with PaddleNLP 2.8.1. Paddle is
imported inside the functions, so that this module costs a command's `--help` nothing.
"""

import contextlib
import functools
import re


def prepare_import():
    """Does what must be done before Paddle is imported: loads the system's zlib.

    Paddle 2.6 brings a zlib of its own, and exports it. If the system's is loaded together with Paddle, it calls
    functions of the other one: compressing an image, or anything else, then crashes.
    """
    import zlib  # noqa: F401


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

    switches = []
    if hasattr(core, "set_cublas_switch"):  # not so in a build of Paddle 2.6 for CPUs
        switches = [(core.get_cublas_switch, core.set_cublas_switch), (core.get_cudnn_switch, core.set_cudnn_switch)]
    kept = [get() for get, _ in switches]
    try:
        for _, set_to in switches:
            set_to(False)
        yield
    finally:
        for (_, set_to), value in zip(switches, kept, strict=True):
            set_to(value)


# What a GPU build of Paddle was made for.


def nccl_version():
    """Returns the version of NCCL that Paddle uses, such as "2.23.4"; None without NCCL."""
    from paddle.base import core

    if not hasattr(core, "nccl_version") or not (number := core.nccl_version()):
        return None
    step = 10000 if number >= 10000 else 1000  # 22304 is 2.23.4; before 2.9, 2708 is 2.7.8
    return f"{number // step}.{number % step // 100}.{number % 100}"


def compiled_architectures():
    """Returns the compute capabilities that Paddle has machine code for, `[(8, 0), ...]`; empty where it is unknown."""
    import paddle

    if not paddle.is_compiled_with_cuda():
        return []
    if not hasattr(paddle.version, "cuda_archs"):
        return [(6, 1), (7, 0), (7, 5), (8, 0), (8, 6)]  # of the wheel 2.6.2
    return sorted(divmod(int(number), 10) for number in re.findall(r"\d+", str(paddle.version.cuda_archs())))


# Tensors, types and kernels.


def from_host(array):
    """Returns a CPU tensor of a numpy array: the array's own memory, where Paddle can do that (2.6 copies)."""
    import paddle

    return getattr(paddle, "from_dlpack", paddle.to_tensor)(array)


def swiglu(gate, x):
    """Returns `silu(gate) * x`, by a fused kernel where Paddle has it (2.6 has not), of any device."""
    from paddle.nn import functional as F

    return F.swiglu(gate, x) if hasattr(F, "swiglu") else F.silu(gate) * x


def by_onednn(operator, x, **attributes):
    """Returns an operator's result by oneDNN's kernel, on a CPU: some of Paddle's own are slow, and use one core."""
    import paddle

    attributes = (part for item in attributes.items() for part in item)
    y = getattr(paddle._legacy_C_ops, operator)(x, *attributes, "use_mkldnn", True)
    y.get_tensor()._set_layout("NCHW")  # its numbers are in order, and some operators abort at oneDNN's mark
    return y


def fused_attention_fits(query):
    """Returns whether `scaled_dot_product_attention` computes with such queries `(N, T, heads, head_dim)`.

    Paddle 3 chooses a kernel by device, type and size. Paddle 2.6 takes FlashAttention for whatever lies on a GPU, and
    fails where that has no kernel.
    """
    import paddle

    if hasattr(paddle.nn.functional, "sdpa") or not paddle.get_device().startswith("gpu"):
        return True
    is_half = query.dtype in (paddle.float16, paddle.bfloat16)
    return is_half and query.shape[-1] % 8 == 0 and paddle.device.cuda.get_device_capability() >= (8, 0)


def check_program(path):
    """Raises ValueError for a kind of program, by its suffix, that this Paddle would crash on."""
    import paddle
    from paddle import inference

    if path.endswith(".json") and not hasattr(inference.Config, "enable_new_ir"):
        raise ValueError(f"{path}: a program of Paddle 3, which Paddle {paddle.__version__} can't load; export it anew")


def cpu_runs_bfloat16():
    """Returns whether Paddle Inference can compute in bfloat16 on a CPU that has it; 2.6 fails in most networks."""
    from paddle import inference

    return hasattr(inference.Config, "enable_onednn_bfloat16")


def run_predictor(predictor, inputs):
    """Returns the list of outputs of a Paddle Inference predictor for a list of tensors, one for each of its inputs."""
    import paddle
    from paddle import inference

    if "inputs: object" not in inference.Predictor.run.__doc__:
        return predictor.run(inputs)
    # Paddle 2.6's `run` of objects crashes the process.
    for name, x in zip(predictor.get_input_names(), inputs, strict=True):
        predictor.get_input_handle(name).share_external_data(x)
    predictor.run()
    handles = map(predictor.get_output_handle, predictor.get_output_names())
    return [paddle.to_tensor(handle.copy_to_cpu()) for handle in handles]


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

    if vars(optimizer).get("helper", optimizer) is None:  # Paddle 2.6 makes the state through it, at the first step
        optimizer.helper = paddle.base.layer_helper.LayerHelper(type(optimizer).__name__)
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
        # number of steps from the first of them; regularizers, which may begin later, have numbers of their own.

        def _create_optimization_pass(self, *args, **options):
            self._waiting = {}  # by whose number of steps it is
            return super()._create_optimization_pass(*args, **options)

        def _append_optimize_op(self, block, param_and_grad):
            if all(tensor.dtype == paddle.float32 for tensor in param_and_grad):
                self._waiting.setdefault(getattr(param_and_grad[0], "own_steps", None), []).append(param_and_grad)
            else:
                super()._append_optimize_op(block, param_and_grad)

        def _finish_update(self, block, parameters_and_grads):
            for waiting in self._waiting.values():
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
            self._waiting = {}

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


def join(tensors):
    """Returns `(views, flat)`: copies of tensors of one type, shaped as they are, and the tensor that holds them."""
    copy_data, set_constant, persist_output, constant, use_align = True, False, False, 0.0, False
    return operators().coalesce_tensor(
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
    name = "_cache_found_inf" if hasattr(scaler, "_cache_found_inf") else "_cache_founf_inf"  # Paddle 2.6's spelling
    return bool(getattr(scaler, name))


# Fleet, collectives and networks.


def trainer_arguments(arguments_class, values):
    """Makes PaddleNLP's arguments of `{name: value}`; ValueError for a value that it does not take.

    PaddleNLP 2.8 has no `ddp_find_unused_parameters`: there it is always False.
    """
    values = dict(values)
    if "ddp_find_unused_parameters" not in arguments_class.__dataclass_fields__:
        if values.pop("ddp_find_unused_parameters", False):
            raise ValueError("--ddp_find_unused_parameters True: this PaddleNLP does not have it")
    return arguments_class(**values)


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


def operators():
    """Returns Paddle's operators as they are called in eager mode: a module whose functions benchmarks replace."""
    import paddle

    return paddle._C_ops


def keep_own_parameters_float32(layer):
    """Makes AMP O2 leave a layer's own parameters in float32; those of its sublayers are cast as usual."""
    layer._cast_to_low_precision = layer._cast_to_low_precison = False  # Paddle 2.6 asks for the second one


def sum_gradient_over_group(x, group):
    """Returns x; in the backward pass its gradient is summed over a tensor-parallel group."""
    from paddle.distributed.fleet.layers.mpu import mp_ops

    return mp_ops._c_identity(x, group=group)


def concat_over_group(x, group):
    """Returns the ranks' tensors `(..., D)`, in the group's order, as one `(..., D * ranks)`."""
    from paddle.distributed.fleet.layers.mpu import mp_ops

    return mp_ops._c_concat(x, group=group)


def keep_groups():
    """Makes the process group, and a group of the same ranks, once a process; later trainings get the first ones."""
    import paddle.distributed as dist
    from paddle.distributed import parallel_helper

    groups, new_group = {}, dist.new_group
    init_parallel_env = functools.lru_cache(dist.init_parallel_env)

    def kept(ranks=None, *args, **options):
        key = tuple(sorted(ranks)) if ranks else None
        if key not in groups:
            groups[key] = new_group(ranks, *args, **options)
        return groups[key]

    dist.new_group, dist.init_parallel_env = kept, lambda *_: init_parallel_env()
    parallel_helper._is_parallel_ctx_initialized = lambda: False  # else PaddleNLP keeps the degrees of the first


def forget_degrees():
    """Lets fleet take other parallel degrees than those of an earlier training of this process."""
    from paddle.distributed import fleet
    from paddle.distributed.fleet.base import topology

    topology._HYBRID_PARALLEL_GROUP = None
    fleet.fleet.__dict__.pop("_hcg", None)


# Memory.


def allocated_bytes(which):
    """Returns "current" or "peak" bytes that Paddle's allocator has given out on the current device."""
    from paddle.base import core

    kind, index = _memory_of_device()
    return getattr(core, f"{kind}_memory_stat_{which}_value")("Allocated", index)


def count_peak_anew():
    """Lets the peak of `allocated_bytes` begin now; returns False before Paddle 3, which can't."""
    from paddle.base import core

    kind, index = _memory_of_device()
    reset = getattr(core, f"{kind}_memory_stat_reset_peak_value", None)
    if reset is not None:
        reset("Allocated", index)
    return reset is not None


def _memory_of_device():
    import paddle

    kind, _, index = paddle.get_device().partition(":")
    return ("host", 0) if kind == "cpu" else ("device", int(index))
