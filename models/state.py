"""The weights of a network by name: PyTorch's and Paddle's layouts, shapes expected of a network, checks of a state."""

import numpy as np

from runtime.untrusted import listed, shortened

REGULARIZERS = "regularizers."  # with it the names of what regularizers learn begin, see `models.regularizers`
INTERNAL_GUIDANCE = f"{REGULARIZERS}internal_guidance."
# Internal Guidance's second final layer, and REPA's first projector.
_OFFICIAL = {"final_layer_xr.": INTERNAL_GUIDANCE, "projectors.0.": f"{REGULARIZERS}representation_alignment."}

# Of DistributedDataParallel and AveragedModel, torch.compile, a network inside another module, Paddle's DataParallel.
_PREFIXES = ("module.", "_orig_mod.", "model.", "_layers.")


def plain_names(state):
    """Returns {name: array} under the network's own names, without what wrappers put before them or add.

    Those are `_PREFIXES`, in any order and number, where all names begin with it; "_orig_mod." also inside of a name,
    where a part of the network was compiled; and PyTorch's count of averaged models.
    """
    if "n_averaged" in state and state["n_averaged"].size == 1 and len(state) > 1:
        state = {name: value for name, value in state.items() if name != "n_averaged"}
    while prefix := next((p for p in _PREFIXES if state and all(n.startswith(p) for n in state)), None):
        state = {name[len(prefix) :]: value for name, value in state.items()}
    inner = {name.replace("._orig_mod.", "."): value for name, value in state.items()}
    return inner if len(inner) == len(state) else dict(state)


def own_names(state):
    """Returns a state with the official names of what regularizers learn turned into ours."""
    return {_renamed(name, _OFFICIAL): value for name, value in state.items()}


def official_names(state):
    """Returns a state with the official names of what regularizers learn, the inverse of `own_names`."""
    official = {ours: theirs for theirs, ours in _OFFICIAL.items()}
    return {_renamed(name, official): value for name, value in state.items()}


def _renamed(name, prefixes):
    return next((new + name[len(old) :] for old, new in prefixes.items() if name.startswith(old)), name)


def without_regularizers(state, kept=()):
    """Returns a state without what regularizers learn, but names that begin with one of `kept`."""
    kept = tuple(kept)
    return {name: value for name, value in state.items() if not name.startswith(REGULARIZERS) or name.startswith(kept)}


def has_second_layer(state):
    """Returns whether there are weights of internal guidance's second final layer."""
    return any(name.startswith(INTERNAL_GUIDANCE) for name in state)


def for_sampling(model, state, block):
    """Returns `(config, state)` of what sampling needs of a network's weights: not what regularizers have learned.

    But it has internal guidance's second final layer, where there are weights of it, and a `block`, as configs count
    it, behind which it is. `model` is the section of a config, and what is returned for `build_model`.
    """
    if block is None or not has_second_layer(state):
        return model, without_regularizers(state)
    entry = {"type": "internal_guidance", "block": block}
    config = {"model": model, "objective": {"regularizers": [entry]}}
    return config, without_regularizers(state, [INTERNAL_GUIDANCE])


def kinds_of(names):
    """Lists the types of the regularizers whose parameters these names are."""
    return sorted({name.split(".")[1] for name in names})


def is_state(tree):
    """Returns whether this is `{name: array}`, of at least one."""
    entries = tree.items() if isinstance(tree, dict) else ()
    return bool(entries) and all(isinstance(name, str) and isinstance(value, np.ndarray) for name, value in entries)


def official_to_paddle(state):
    """Returns a state of the official (PyTorch) layout in Paddle's: Linear weights [out, in] become [in, out].

    The names are the same on both sides. Convolutions, embedding tables, pos_embed and vectors are not turned.
    """
    return {name: turn_linear(name, value) for name, value in state.items()}


paddle_to_official = official_to_paddle  # the inverse, bit for bit: a transpose is its own


def turn_linear(name, value):
    """Returns a Linear weight [out, in] as [in, out] or back, and any other parameter as it is."""
    linear = value.ndim == 2 and name.endswith("weight") and not name.endswith("embedding_table.weight")
    return np.ascontiguousarray(value.T) if linear else value


def check_state(state, expected_shapes, *, source, what="the config"):
    """Raises ValueError, one line that begins with `source`, unless a state has the names and shapes expected.

    `what` is what expects them.
    """
    kinds = {
        "missing": [name for name in expected_shapes if name not in state],
        "unexpected": [name for name in state if name not in expected_shapes],
        "of another shape": [
            f"{name} is {list(state[name].shape)}, expected {list(shape)}"
            for name, shape in expected_shapes.items()
            if name in state and tuple(state[name].shape) != tuple(shape)
        ],
    }
    problems = [f"{len(found)} {kind}: {listed(found)}" for kind, found in kinds.items() if found]
    if problems:
        theirs, ours = visible_switches({name: state[name].shape for name in state}), visible_switches(expected_shapes)
        different = [switch for switch in theirs if ours and ours[switch] != theirs[switch]]
        more, less = (", ".join(switch for switch in different if theirs[switch] is on) for on in (True, False))
        problems[:0] = [f"they have {more}, which {what} has not"] if more else []
        problems[:0] = [f"they lack {less}, which {what} has"] if less else []
        raise ValueError(f"{source}: these weights do not fit {what}: " + "; ".join(problems))


def visible_switches(shapes):
    """Returns those of DiT's switches that its parameters show, `{switch: bool}`; shapes: `{name: shape}`.

    The layout of Linear weights is of no consequence. It is empty for other networks.
    """
    sizes = [shapes.get(f"blocks.0.{layer}.bias", ()) for layer in ("adaLN_modulation.1", "attn.proj")]
    if not all(len(size) == 1 for size in sizes):
        return {}
    (modulation,), (width,) = sizes
    parts = {"swiglu": "mlp.w12.weight", "qk_norm": "attn.q_norm.weight", "rms_norm": "norm1.weight"}
    switches = {switch: f"blocks.0.{part}" in shapes for switch, part in parts.items()}
    return {**switches, "adaln_shift": modulation == 6 * width}


def check_finite(state, *, source):
    """Raises ValueError, one line that begins with `source`, for a number not finite: it would draw black images."""
    bad = {name: count for name, value in state.items() if (count := _count_not_finite(np.asarray(value)))}
    if not bad:
        return
    name, count = next(iter(bad.items()))
    value = np.asarray(state[name])
    with np.errstate(over="ignore"):  # a reader may have made them wider
        is_float16 = np.isinf(value).any() and (np.isnan(value) | (value.astype("float16") == value)).all()
    why = "; float16 ends at 65504, larger numbers have become infinite: take the file in float32 or bfloat16"
    raise ValueError(
        f"{source}: {shortened(name)} has {count:,} of {value.size:,} values that are not finite (NaN or infinity), "
        f"and so have {len(bad):,} of {len(state):,} tensors{why if is_float16 else ''}"
    )


def _count_not_finite(value, chunk=1 << 20):
    """Counts the values of an array that are not finite, piece by piece in the order of its memory."""
    flat = value.ravel(order="K") if value.dtype.kind in "fc" else []  # a view of what is contiguous in either order
    pieces = (flat[start : start + chunk] for start in range(0, len(flat), chunk))
    return sum(len(piece) - int(np.count_nonzero(np.isfinite(piece))) for piece in pieces)


def expected_shapes(config):
    """Returns {parameter name: shape} of the network of a config, or its `model` section alone; see `build_model`.

    Only one block is built, since all of them have the same shapes, and no memory is allocated for it.
    """
    import paddle

    from . import build_model

    model_config = config.get("model", config)
    sprint = {"sprint_blocks": [1, 1]} if model_config.get("sprint_blocks") else {}
    with paddle.LazyGuard():
        model = build_model(config, num_layers=1, **sprint)
    shapes, layers = {}, model_config["num_layers"]
    for name, parameter in model.named_parameters():
        stem, dot, rest = name.partition(".0.")
        in_block = dot and stem in ("blocks", "layers")
        names = [f"{stem}.{i}.{rest}" for i in range(layers)] if in_block else [name]
        shapes.update(dict.fromkeys(names, tuple(parameter.shape)))
    return shapes


def is_rounded(table, exact):
    """Returns whether a table is the exact one in half precision.

    The coarser, bfloat16, is off by 2^-8 at most, and by 2^-7 where it was made by cutting digits off, as by Paddle 2.6
    on a CPU.
    """
    return table.shape == exact.shape and bool((np.abs(table - exact) <= 2.0**-7 * np.abs(exact) + 1e-5).all())


def without_rounding(table, exact):
    """Returns `exact` if `table` is that in half precision, as in a file of half-precision weights; else `table`.

    A table that differs by the rounding of float32 alone, as averages do, stays as it is.
    """
    return exact if is_rounded(table, exact) and np.abs(table - exact).max() > 1e-5 else table
