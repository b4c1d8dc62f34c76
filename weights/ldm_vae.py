"""Autoencoders of LDM and taming-transformers as ppdiffusers' `AutoencoderKL`: their sizes, names and weights.

The official names: `encoder.down.L.block.B`, `encoder.down.L.attn.B`, `encoder.down.L.downsample`, `encoder.mid`, and
`decoder.up.L...`, where level L counts from the highest resolution in the encoder and in the decoder. `AutoencoderKL`
counts the decoder's blocks in the order in which they run.
"""

import os
import re
from dataclasses import dataclass

import numpy as np

from models.state import check_state
from runtime.untrusted import listed, open_regular, read_json_object, shortened

MAX_YAML_BYTES = 1 << 18
GROUPS = 32  # of every group norm, a constant of the official code
_PREFIX = r"(?:module\.|_orig_mod\.|model\.|first_stage_model\.)*"
_IS_PART = re.compile(_PREFIX + r"(encoder|decoder|quant_conv|post_quant_conv)\.")
# What training checkpoints hold beside the autoencoder: discriminator and perceptual loss, the network that VA-VAE's
# latents are aligned with, its projection, averages under names without dots (LitEma).
BESIDE = ("loss", "foundation_model", "linear_proj", "model_ema")


def is_part(name):
    """Returns whether a tensor of that name belongs to the autoencoder of a file."""
    return isinstance(name, str) and _IS_PART.match(name) is not None


def own_weights(state, source):
    """Returns `(weights, left_out)`: the autoencoder's own tensors by name, and what else there is, `{name: count}`.

    Of a whole latent diffusion model it is the `first_stage_model`. ValueError, one line that begins with `source`, for
    a VQ model and for tensors that no autoencoder has.
    """
    first, others = "first_stage_model.", []
    if any(name.startswith(first) for name in state):
        others = [name for name in state if not name.startswith(first)]
        state = {name.removeprefix(first): value for name, value in state.items() if name.startswith(first)}
    if any(name.startswith("quantize.") for name in state):
        raise ValueError(f"{source}: a VQ model (it has a codebook, quantize.*); expected an AutoencoderKL")
    weights = {name: value for name, value in state.items() if is_part(name)}
    beside = [name for name in state if name not in weights]
    unknown = [name for name in beside if name.split(".")[0] not in BESIDE]
    if not weights or unknown:
        what = f"holds {len(unknown)} tensors that no LDM autoencoder has: {listed(unknown)}"
        raise ValueError(f"{source}: {what if weights else 'no LDM autoencoder (it has no encoder.* and decoder.*)'}")
    counts = {}
    for name in (*others, *beside):
        root = name.split(".")[0]
        counts[root] = counts.get(root, 0) + 1
    return weights, counts


# ---- Sizes ----


@dataclass(frozen=True)
class Sizes:
    """All that a network's config says, as its weights tell it."""

    in_ch: int
    out_ch: int
    widths: tuple  # by level, from the highest resolution: ch times each of ch_mult
    num_res_blocks: int
    down_attention: tuple  # by level: has the encoder attention there?
    up_attention: tuple
    mid_attention: tuple  # of encoder and decoder
    z_channels: int
    embed_dim: int  # channels of the latents
    has_quant_conv: bool
    has_post_quant_conv: bool


def sizes_of(state, source):
    """Returns the `Sizes` of an autoencoder's official weights.

    ValueError, one line that begins with `source`, for one that is none, or that no AutoencoderKL can be.
    """

    def shape(name):
        if name not in state:
            raise ValueError(f"{source}: has no {name}, which every LDM autoencoder has")
        if state[name].ndim != 4:
            raise ValueError(f"{source}: {name} is {list(state[name].shape)}, expected the weight of a convolution")
        return state[name].shape

    def count(prefix):
        found = {int(match[1]) for name in state if (match := re.match(rf"{re.escape(prefix)}\.(\d{{1,4}})\.", name))}
        if found != set(range(len(found))) or not found:
            raise ValueError(
                f"{source}: has {prefix}.N of N = {listed(sorted(found), 8) or 'none'}, expected 0, 1, ..."
            )
        return len(found)

    def has(prefix):
        return any(name.startswith(prefix + ".") for name in state)

    levels = count("encoder.down")
    widths = tuple(shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels))
    (ch, in_ch), (out_ch, _) = shape("encoder.conv_in.weight")[:2], shape("decoder.conv_out.weight")[:2]
    if ch != widths[0]:
        raise ValueError(
            f"{source}: ch is {ch} and the first level's width {widths[0]}, which are one number in an AutoencoderKL; "
            "expected a ch_mult that begins with 1"
        )
    if bad := [width for width in widths if width % GROUPS]:
        raise ValueError(
            f"{source}: a level is {bad[0]} wide, expected a multiple of {GROUPS}, its group norms' groups"
        )
    z_channels, doubled = shape("decoder.conv_in.weight")[1], shape("encoder.conv_out.weight")[0]
    if doubled != 2 * z_channels:
        raise ValueError(
            f"{source}: its encoder gives {doubled} channels and its decoder takes {z_channels}; expected mean and "
            f"variance of each, {2 * z_channels} (double_z true)"
        )
    convs = [has("quant_conv"), has("post_quant_conv")]
    embed_dim = shape("quant_conv.weight")[0] // 2 if convs[0] else z_channels
    embed_dim = shape("post_quant_conv.weight")[1] if convs[1] else embed_dim
    if embed_dim != z_channels and not all(convs):
        raise ValueError(f"{source}: embed_dim is {embed_dim} and z_channels {z_channels}, but a quant_conv is missing")
    return Sizes(
        in_ch=in_ch,
        out_ch=out_ch,
        widths=widths,
        num_res_blocks=count("encoder.down.0.block"),
        down_attention=tuple(has(f"encoder.down.{level}.attn") for level in range(levels)),
        up_attention=tuple(has(f"decoder.up.{level}.attn") for level in range(levels)),
        mid_attention=(has("encoder.mid.attn_1"), has("decoder.mid.attn_1")),
        z_channels=z_channels,
        embed_dim=embed_dim,
        has_quant_conv=convs[0],
        has_post_quant_conv=convs[1],
    )


def read_config(path):
    """Reads an LDM config, YAML or by its name JSON; nothing in it is executed. ValueError as `read_json`."""
    if os.fspath(path).lower().endswith(".json"):
        return read_json_object(path)
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):  # a small file could make a large tree of them
                raise ValueError("it has an alias (*name); write the value itself there")
            return super().compose_node(parent, index)

    try:
        with open_regular(path) as file:
            text = file.read(MAX_YAML_BYTES + 1)
        if len(text) > MAX_YAML_BYTES:
            raise ValueError(f"more than {MAX_YAML_BYTES >> 10} KiB, too much for a config")
        config = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}: broken YAML{where}: {getattr(error, 'problem', None) or 'no text'}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: {reason}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no settings by name; expected an LDM config")
    return config


def check_config(config, sizes, source):
    """Returns the resolution of an LDM config, None if it has none.

    ValueError, one line that begins with `source`, unless it describes an autoencoder of `sizes`. Only what it has is
    compared. It may be that of a whole latent diffusion model, or hold the autoencoder's parameters alone.
    """
    target = ""
    for name in ("model", "params", "first_stage_config", "params"):
        if isinstance(config.get(name), dict):
            target, config = str(config.get("target") or target), config[name]
            target = str(config.get("target") or target)
    network = config.get("ddconfig", config)
    if not isinstance(network, dict):
        raise ValueError(f"{source}: ddconfig is {shortened(network)}, expected the network's sizes")
    if target.split(".")[-1].startswith("VQ") or "n_embed" in config:
        raise ValueError(f"{source}: describes a VQ model ({shortened(target)}); expected an AutoencoderKL")
    given = {**network, **{name: config[name] for name in ("embed_dim",) if name in config}}
    ours = {
        "in_channels": sizes.in_ch,
        "out_ch": sizes.out_ch,
        "ch": sizes.widths[0],
        "ch_mult": [width / sizes.widths[0] for width in sizes.widths],
        "num_res_blocks": sizes.num_res_blocks,
        "z_channels": sizes.z_channels,
        "embed_dim": sizes.embed_dim,
        # What an AutoencoderKL does not have otherwise.
        "double_z": True,
        "resamp_with_conv": True,
        "tanh_out": False,
        "give_pre_end": False,
        "use_linear_attn": False,
    }
    if not ours.keys() & given.keys():
        raise ValueError(f"{source}: has none of the settings of an LDM autoencoder (ddconfig: {listed([*ours], 4)})")
    for name, own in ours.items():
        if (value := given.get(name, own)) != own:
            shown = [int(mult) if mult == int(mult) else mult for mult in own] if isinstance(own, list) else own
            raise ValueError(f"{source}: {name} is {shortened(value)}, expected {shown} as the weights are")
    _check_attention(given, sizes, source)
    return given.get("resolution")


def _check_attention(given, sizes, source):
    """Raises ValueError unless the resolutions with attention are those of the weights' levels."""
    kind = given.get("attn_type", "vanilla")
    if kind not in ("vanilla", "vanilla-xformers", "none"):
        raise ValueError(f"{source}: attn_type is {shortened(kind)}, expected vanilla or none")
    if "attn_type" in given and (kind != "none") not in sizes.mid_attention:
        have = "have attention" if kind == "none" else "have none"
        raise ValueError(f"{source}: attn_type is {kind}, but the weights {have}")
    where, resolution = given.get("attn_resolutions"), given.get("resolution")
    if resolution is not None and not (type(resolution) is int and 0 < resolution < 1 << 16):
        raise ValueError(f"{source}: resolution is {shortened(resolution)}, expected that of the images")
    if where is None:
        return
    if not isinstance(where, list) or resolution is None:
        expected = "expected a list of resolutions, and resolution beside it"
        raise ValueError(f"{source}: attn_resolutions is {shortened(where)}, {expected}")
    lowest = len(sizes.widths) - 1
    down = [resolution >> level for level in range(lowest + 1)]
    up = [resolution >> lowest << lowest - level for level in range(lowest + 1)]
    for part, by_level, own in (("encoder", down, sizes.down_attention), ("decoder", up, sizes.up_attention)):
        if tuple(kind != "none" and size in where for size in by_level) != own:
            ours = [size for size, has in zip(by_level, own, strict=True) if has]
            raise ValueError(
                f"{source}: attn_resolutions is {shortened(where)} of resolution {resolution}, expected {ours} as the "
                f"weights' {part} is"
            )


# ---- Weights ----


def _stock_config(sizes):
    """Returns the `AutoencoderKL`'s settings that follow from the sizes, a dict."""

    def block_types(kind, attention):
        return [f"Attn{kind}" if has else kind for has in attention]

    same = sizes.embed_dim == sizes.z_channels
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(sizes.widths),
        "down_block_types": block_types("DownEncoderBlock2D", sizes.down_attention),
        "in_channels": sizes.in_ch,
        "latent_channels": sizes.embed_dim,
        "layers_per_block": sizes.num_res_blocks,
        "norm_num_groups": GROUPS,
        "out_channels": sizes.out_ch,
        "up_block_types": block_types("UpDecoderBlock2D", sizes.up_attention[::-1]),
        "use_quant_conv": sizes.has_quant_conv and same,
        "use_post_quant_conv": sizes.has_post_quant_conv,
    }


def tensors(sizes):
    """Yields `(official name, AutoencoderKL's name, official shape)` of every tensor."""
    widths, blocks, lowest = sizes.widths, sizes.num_res_blocks, len(sizes.widths) - 1
    z, latent = sizes.z_channels, sizes.embed_dim

    def layer(old, new, *shape):
        yield f"{old}.weight", f"{new}.weight", shape
        yield f"{old}.bias", f"{new}.bias", shape[:1]

    def resnet(old, new, before, after):
        yield from layer(f"{old}.norm1", f"{new}.norm1", before)
        yield from layer(f"{old}.conv1", f"{new}.conv1", after, before, 3, 3)
        yield from layer(f"{old}.norm2", f"{new}.norm2", after)
        yield from layer(f"{old}.conv2", f"{new}.conv2", after, after, 3, 3)
        if before != after:
            yield from layer(f"{old}.nin_shortcut", f"{new}.conv_shortcut", after, before, 1, 1)

    def attention(old, new, width):
        yield from layer(f"{old}.norm", f"{new}.group_norm", width)
        for name, stock in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
            yield from layer(f"{old}.{name}", f"{new}.{stock}", width, width, 1, 1)

    def level(old, new, before, after, count, has_attention):
        for block in range(count):
            yield from resnet(f"{old}.block.{block}", f"{new}.resnets.{block}", after if block else before, after)
            if has_attention:
                yield from attention(f"{old}.attn.{block}", f"{new}.attentions.{block}", after)

    def ends(part, first, last, channels_in, channels_out, has_attention):
        """The layers of the lowest resolution, and those of both ends."""
        old, new, width = f"{part}.mid", f"{part}.mid_block", widths[-1]
        yield from layer(f"{part}.conv_in", f"{part}.conv_in", first, channels_in, 3, 3)
        for block in range(2):
            yield from resnet(f"{old}.block_{block + 1}", f"{new}.resnets.{block}", width, width)
        if has_attention:
            yield from attention(f"{old}.attn_1", f"{new}.attentions.0", width)
        yield from layer(f"{part}.norm_out", f"{part}.conv_norm_out", last)
        yield from layer(f"{part}.conv_out", f"{part}.conv_out", channels_out, last, 3, 3)

    yield from ends("encoder", widths[0], widths[-1], sizes.in_ch, 2 * z, sizes.mid_attention[0])
    yield from ends("decoder", widths[-1], widths[0], z, sizes.out_ch, sizes.mid_attention[1])
    for i, width in enumerate(widths):
        old, new = f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        yield from level(old, new, widths[max(i - 1, 0)], width, blocks, sizes.down_attention[i])
        if i < lowest:
            yield from layer(f"{old}.downsample.conv", f"{new}.downsamplers.0.conv", width, width, 3, 3)
        old, new = f"decoder.up.{i}", f"decoder.up_blocks.{lowest - i}"
        yield from level(old, new, widths[min(i + 1, lowest)], width, blocks + 1, sizes.up_attention[i])
        if i > 0:
            yield from layer(f"{old}.upsample.conv", f"{new}.upsamplers.0.conv", width, width, 3, 3)
    if sizes.has_quant_conv:
        yield from layer("quant_conv", "quant_conv", 2 * latent, 2 * z, 1, 1)
    if sizes.has_post_quant_conv:
        yield from layer("post_quant_conv", "post_quant_conv", z, latent, 1, 1)


def convert(state, sizes, source):
    """Returns `(config, {name: float32 array})` of the `AutoencoderKL`, for weights that are taken out of `state`.

    Its moments and images are those of the official code. The config lacks scaling_factor and sample_size, which no
    weights tell. ValueError, one line that begins with `source`, for a tensor
    that is missing, superfluous or of another shape.
    """
    table = [*tensors(sizes)]
    expected = {old: shape for old, _, shape in table}
    check_state(state, expected, source=source, what="an LDM autoencoder of their sizes")
    config, stock = _stock_config(sizes), {}
    for old, new, shape in table:
        value = state.pop(old).astype("float32", copy=False)
        is_linear = ".attentions." in new and shape[1:] == (shape[0], 1, 1)  # a 1x1 convolution there
        stock[new] = np.ascontiguousarray(value.reshape(shape[:2]).T) if is_linear else value
    for part, has in zip(("encoder", "decoder"), sizes.mid_attention, strict=True):
        if not has:  # an AutoencoderKL always has it: what it adds to its input is 0
            stock.update(_no_attention(f"{part}.mid_block.attentions.0", sizes.widths[-1]))
    if sizes.embed_dim != sizes.z_channels:
        _fold(stock, config, sizes)
    return config, stock


def _no_attention(name, width):
    """Returns the weights of an attention layer whose output is its input."""
    layers = {f"{name}.{layer}": np.zeros([width, width], "f4") for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    state = {f"{layer}.weight": value for layer, value in layers.items()}
    state.update({f"{layer}.bias": np.zeros(width, "f4") for layer in layers})
    return state | {f"{name}.group_norm.weight": np.ones(width, "f4"), f"{name}.group_norm.bias": np.zeros(width, "f4")}


def _fold(stock, config, sizes):
    """Makes all the convolutions around the latents those of `embed_dim` channels, in place.

    An AutoencoderKL has as many channels on both sides of them. quant_conv goes into the convolution before it.
    """
    z, latent = sizes.z_channels, sizes.embed_dim
    weight, bias = (stock.pop(f"quant_conv.{kind}").astype("f8") for kind in ("weight", "bias"))
    weight = weight[:, :, 0, 0]  # (2 latent, 2 z)
    before = {kind: stock[f"encoder.conv_out.{kind}"].astype("f8") for kind in ("weight", "bias")}
    stock["encoder.conv_out.weight"] = np.tensordot(weight, before["weight"], 1).astype("f4")
    stock["encoder.conv_out.bias"] = (weight @ before["bias"] + bias).astype("f4")

    weight, bias = (stock[f"post_quant_conv.{kind}"] for kind in ("weight", "bias"))  # (z, latent, 1, 1), (z,)
    after = stock["decoder.conv_in.weight"]  # (width, z, 3, 3)
    if latent > z:
        stock["post_quant_conv.weight"] = np.pad(weight, [(0, latent - z), (0, 0), (0, 0), (0, 0)])
        stock["post_quant_conv.bias"] = np.pad(bias, [(0, latent - z)])
        stock["decoder.conv_in.weight"] = np.pad(after, [(0, 0), (0, latent - z), (0, 0), (0, 0)])
        return
    weight, bias, after = weight[:, :, 0, 0].astype("f8"), bias.astype("f8"), after.astype("f8")
    shift = np.linalg.lstsq(weight, bias, rcond=None)[0]  # the latents' bias does what this one does, but for
    left = np.einsum("ozyx,z->oyx", after, bias - weight @ shift)  # (width, 3, 3)
    stock["post_quant_conv.weight"] = np.eye(latent, dtype="f4")[:, :, None, None]
    stock["post_quant_conv.bias"] = shift.astype("f4")
    stock["decoder.conv_in.weight"] = np.einsum("ozyx,zl->olyx", after, weight).astype("f4")
    if np.abs(left).max() > 1e-6 * np.abs(after).max():
        _add_constant(stock, config, left)


def _add_constant(stock, config, taps):
    """Makes the decoder add what a 3x3 convolution `taps` (width, 3, 3) makes of an image of ones, in place.

    It is no bias, because there are zeros around the image. It is added by the decoder's first residual block, where
    the activation is made a constant; all blocks behind it move on by two, and every level has two blocks more.
    """
    mid, up = "decoder.mid_block", "decoder.up_blocks.0"
    moves = {f"{mid}.resnets.0.": f"{mid}.resnets.1.", f"{mid}.resnets.1.": f"{up}.resnets.1."}
    moves[f"{mid}.attentions.0."] = f"{up}.attentions.0."
    for block in range(config["layers_per_block"] + 1):
        moves.update({f"{up}.{kind}.{block}.": f"{up}.{kind}.{block + 2}." for kind in ("resnets", "attentions")})
    moved = {
        next((new + name[len(old) :] for old, new in moves.items() if name.startswith(old)), name): value
        for name, value in stock.items()
    }
    stock.clear()
    stock.update(moved)

    width = len(taps)
    first = _no_resnet(f"{mid}.resnets.0", width)
    first[f"{mid}.resnets.0.norm2.weight"][:] = 0
    first[f"{mid}.resnets.0.norm2.bias"][:] = 1
    first[f"{mid}.resnets.0.conv2.weight"][:, 0] = taps * (1 + np.exp(-1.0))  # over SiLU(1)
    stock.update(first | _no_attention(f"{mid}.attentions.0", width))
    config["layers_per_block"] += 2
    config["up_block_types"][0] = "AttnUpDecoderBlock2D"
    parts = {"encoder.down_blocks": ("down_block_types", 1, 0), "decoder.up_blocks": ("up_block_types", -1, 1)}
    for blocks, (types, step, more) in parts.items():
        for level, (kind, width) in enumerate(zip(config[types], config["block_out_channels"][::step], strict=True)):
            for block in range(config["layers_per_block"] + more):
                name = f"{blocks}.{level}.resnets.{block}"
                if f"{name}.conv1.weight" not in stock:
                    stock.update(_no_resnet(name, width))
                name = f"{blocks}.{level}.attentions.{block}"
                if kind.startswith("Attn") and f"{name}.to_q.weight" not in stock:
                    stock.update(_no_attention(name, width))


def _no_resnet(name, width):
    """Returns the weights of a residual block whose output is its input."""
    state = {}
    for norm, conv in (("norm1", "conv1"), ("norm2", "conv2")):
        state.update({f"{name}.{norm}.weight": np.ones(width, "f4"), f"{name}.{norm}.bias": np.zeros(width, "f4")})
        state[f"{name}.{conv}.weight"] = np.zeros([width, width, 3, 3], "f4")
        state[f"{name}.{conv}.bias"] = np.zeros(width, "f4")
    return state
