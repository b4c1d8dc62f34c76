"""Parameters and memory of a training run, from its config alone. Needs no Paddle.

Memory is that of the fullest device, in bytes: what stays from step to step (weights, gradients, optimizer state, EMA),
and what comes and goes within a step. The states are ZeRO's (Rajbhandari et al. 2020, arXiv:1910.02054) as Paddle's
sharding wrappers spread them, the tensor-parallel shards Megatron-LM's (Shoeybi et al. 2019, arXiv:1909.08053), the
activations a table in the manner of Korthikanti et al. 2022 (arXiv:2205.05198, eq. 1 and 2). docs/memory.md derives
the table and compares with measured runs.

N samples of a micro-batch, T tokens, D hidden width, p tensor-parallel degree.
"""

import functools
import itertools
import math
from collections import namedtuple
from dataclasses import dataclass

import numpy as np

from config.schema import MODEL_TYPES
from models.sizes import MAX_CONDITION_SIZE, mlp_width

SINGLE = 4  # bytes of a float32
# Paddle's sharding: stage 2 collects gradients in one buffer per rank, stage 3 leaves smaller parameters whole.
GRADIENT_BUFFER = 2**23
SLICED_FROM = 2**20

MODES = ("float32", "O1", "O2")  # the order of the numbers in a tuple
# What a block of DiT and one of LargeDiT keep for their backward pass, in bytes, and what else differs between them;
# then what each of `SWITCHES` adds to DiT's.
FAMILIES, SWITCHES = ("DiT", "LargeDiT"), ("rms_norm", "swiglu", "rope")
_BLOCKS = {
    # of N T D: norms, modulated tokens, outputs of attention and MLP
    "whole": ((32, 24, 16), (40, 28, 28), (8, 8, 12), 0, 0),
    # of N T D / p: queries, keys, values, their rotations, attention's output
    "split": ((16, 8, 8), (20, 12, 12), 0, 0, (4, 4, 4)),
    "kv_heads": ((0, 0, 0), (4, 4, 4), 0, 0, (4, 4, 4)),  # of N T D / p, times num_kv_heads / heads: rotations of keys
    # with `qk_norm`, of N T D / p for queries; for keys times num_kv_heads / heads
    "qk_norm": ((4, 4, 2), (4, 4, 2), (4, 4, 6), 0, 0),
    "qk_norm_rows": (16, 0, -8, 0, 0),  # with `qk_norm`, of N T heads / p: statistics within a head
    "mlp": ((8, 4, 4), (12, 6, 6), 0, (4, 2, 2), 0),  # of N T / p, times the MLP's width
    "rows": (16, 8, -8, 0, 0),  # of N T: statistics of the norms
    "head": ((12, 10, 6), (12, 10, 6), (4, 4, 6), 0, 0),  # of N T D: the final norm, its output, the modulated tokens
    "residual": ((4, 4, 2), (4, 2, 2), 0, 0, 0),  # of an element of the residual stream
    "mlp_gradients": (1, 2, 0, 1, 0),  # gradients of the MLP's inner width that the backward pass holds at once
    "operators": ((64, 102, 64), (130, 166, 150), (18, 18, 27), 2, (35, 54, 54)),  # forward and backward
}
BLOCKS = {kind: tuple(row[index] for row in _BLOCKS.values()) for index, kind in enumerate((*FAMILIES, *SWITCHES))}
Block = namedtuple("Block", _BLOCKS)
SPLIT_QK_NORM = 12  # instead of `qk_norm` if p > 1: the layer norm of a split width is made of float32 operators
SCORES = (4, 6, 2)  # of N heads T^2 / p: softmax of plain attention; O1: float32, and a half copy for the product
SCORE_GRADIENTS = (8, 6, 4)  # of N heads T^2 / p, in the backward pass of the softmax
HEAD_GRADIENTS = (8, 10, 4)  # of N T D
CONDITIONING = (20, 18, 10)  # of N D, in each block and in the final layer: SiLU, scales, gates
# float32 maps (N, C, H, W) of a loss, by whether the variance is learned: those that its backward pass needs, and those
# that come and go. The variational bound is a long chain of elementwise operators.
LOSS_MAPS = {True: (19.5, 16), False: (1, 5)}
COSINE_MAPS = (2, 6)  # of those that come and go, a cosine's backward pass needs so many, and so many without channels


class Parameter(namedtuple("Parameter", "name shape split trainable", defaults=(False, True))):
    """A parameter of the whole network; `split`: tensor parallelism cuts it."""

    def numel(self, degree=1):
        """Returns how many numbers a rank of a tensor-parallel group of this size holds."""
        return math.prod(self.shape) // (degree if self.split else 1)

    @property
    def block(self):
        """Number of the transformer block that it belongs to; None outside of them."""
        parts = self.name.split(".")
        return int(parts[1]) if parts[0] in ("blocks", "layers") else None


class Sizes:
    """Widths of a resolved config's network, and what else decides how large its tensors are."""

    def __init__(self, config):
        model, family = config["model"], MODEL_TYPES[config["model"]["type"]].family
        if family not in FAMILIES:
            raise ValueError(f"what a {family} keeps in memory is not known here; known: {', '.join(FAMILIES)}")
        self.large, self.swiglu, self.rms_norm = family == "LargeDiT", model.get("swiglu"), model.get("rms_norm")
        kinds = [family, *(name for name in SWITCHES if model.get(name))]
        rows = zip(*(BLOCKS[kind] for kind in kinds), strict=True)
        self.block = Block(*(sum(map(np.array, row)).tolist() for row in rows))
        self.layers = model["num_layers"]
        self.heads, self.head_dim = model["num_attention_heads"], model["attention_head_dim"]
        self.hidden = self.heads * self.head_dim
        self.kv_width = (model.get("num_kv_heads") or self.heads) * self.head_dim
        self.condition = min(self.hidden, MAX_CONDITION_SIZE) if self.large else self.hidden
        self.mlp = mlp_width(model)
        self.qk_norm = model["qk_norm"]
        self.modulations = 6 if model.get("adaln_shift", True) else 4  # of a block
        self.patch, self.channels = model["patch_size"], model["in_channels"]
        self.tokens = (model["sample_size"] // self.patch) ** 2
        self.out_channels = self.channels * (2 if model["learn_sigma"] else 1)
        self.labels = model["num_classes"] + (model["class_dropout_prob"] > 0)
        self.transport, self.sprint = config["objective"]["type"] == "transport", model["sprint_blocks"] is not None
        self.cosine_loss = config["objective"].get("cosine_loss", False)
        self.regularizers = config["objective"].get("regularizers", [])
        self.predicts_data = config["objective"].get("prediction") == "x1"
        self.block_tokens = [self.tokens] * self.layers  # of a sample, in each block
        if routing := config["training"]["routing"]:
            first, last = routing["blocks"] or model["sprint_blocks"]
            kept = self.tokens - int(self.tokens * routing["share"])
            self.block_tokens[first - 1 : last] = [kept] * (last + 1 - first)

    @functools.cached_property
    def parameters(self):
        """The network's `Parameter`s in its order, with the names and shapes of `models/`."""
        found, hidden, kv_width, mlp = [], self.hidden, self.kv_width, self.mlp

        def add(name, *shape, **options):
            found.append(Parameter(name, shape, **options))

        def layer(name, *widths, split="", bias=True):
            add(f"{name}.weight", *widths, split=split != "")
            if bias:
                add(f"{name}.bias", widths[-1], split=split == "columns")

        if self.large:
            layer("x_embedder", self.patch**2 * self.channels, hidden)
        else:
            add("pos_embed", 1, self.tokens, hidden, trainable=False)
            add("x_embedder.proj.weight", hidden, self.channels, self.patch, self.patch)
            add("x_embedder.proj.bias", hidden)
        layer("t_embedder.mlp.0", 256, self.condition)
        layer("t_embedder.mlp.2", self.condition, self.condition)
        add("y_embedder.embedding_table.weight", self.labels, self.condition)
        for index in range(self.layers):
            block = f"layers.{index}" if self.large else f"blocks.{index}"
            if self.large:
                for name, width in (("wq", hidden), ("wk", kv_width), ("wv", kv_width), ("wo", hidden)):
                    add(f"{block}.attention.{name}.weight", hidden, width, split=True)
                for name, width in (("q_norm", hidden), ("k_norm", kv_width)) if self.qk_norm else ():
                    layer(f"{block}.attention.{name}", width, split="columns")
                for name, *widths in (("w1", hidden, mlp), ("w2", mlp, hidden), ("w3", hidden, mlp)):
                    add(f"{block}.feed_forward.{name}.weight", *widths, split=True)
                add(f"{block}.attention_norm.weight", hidden)
                add(f"{block}.ffn_norm.weight", hidden)
            else:
                for name in ("norm1", "norm2") if self.rms_norm else ():
                    add(f"{block}.{name}.weight", hidden)
                layer(f"{block}.attn.qkv", hidden, 3 * hidden, split="columns")
                for name in ("q_norm", "k_norm") if self.qk_norm else ():  # within a head
                    layer(f"{block}.attn.{name}", self.head_dim, bias=not self.rms_norm)
                layer(f"{block}.attn.proj", hidden, hidden, split="rows")
                first, width, second = ("w12", 2 * mlp, "w3") if self.swiglu else ("fc1", mlp, "fc2")
                layer(f"{block}.mlp.{first}", hidden, width, split="columns")
                layer(f"{block}.mlp.{second}", mlp, hidden, split="rows")
            layer(f"{block}.adaLN_modulation.1", self.condition, self.modulations * hidden, split="columns")

        def final_layer(name):
            if self.rms_norm:
                add(f"{name}.norm_final.weight", hidden)
            layer(f"{name}.linear", hidden, self.patch**2 * self.out_channels)
            layer(f"{name}.adaLN_modulation.1", self.condition, 2 * hidden)

        final_layer("final_layer")
        if self.sprint:
            add("sprint.mask_token", hidden)
            layer("sprint.fusion", 2 * hidden, hidden)
        for entry in self.regularizers:
            name, widths = f"regularizers.{entry['type']}", []
            if entry["type"] == "internal_guidance":
                final_layer(name)
            elif entry["type"] == "latent_alignment":
                widths = [*[hidden] * 5, self.patch**2 * self.channels]
            elif entry["type"] == "representation_alignment":
                if entry["width"] is None:
                    raise ValueError(
                        "objective: regularizers: representation_alignment: width is missing, that of the encoder's "
                        "features; a training takes the set's, a plan has none"
                    )
                widths = [hidden, entry["inner_width"], entry["inner_width"], entry["width"]]
            for index, pair in enumerate(itertools.pairwise(widths)):
                layer(f"{name}.{2 * index}", *pair)
        return found


@dataclass(frozen=True)
class Setting:
    """How a network is trained; names and values as in `config.flags`."""

    world_size: int = 1  # processes, one per device
    tensor_parallel: int = 1
    sharding: str = ""
    sharding_degree: int = 1
    batch: int = 1  # samples of a micro-batch on one device
    accumulation: int = 1  # micro-batches per optimizer step
    precision: str = "float32"  # `amp_dtype`
    level: str = "O1"
    recompute: bool = False
    ema: bool = True
    profiles: int = 0  # of post-hoc EMA
    profiles_on_host: bool = False
    fused_attention: bool = False
    device: str = "gpu"  # or "cpu", where everything is float32 and attention is plain

    @classmethod
    def of(cls, training, **others):
        """Returns the setting of a config's `training` section; others: what stands elsewhere, or wins over it."""
        names = {"precision": "amp_dtype", "level": "amp_level", "ema": "use_ema", "recompute": "recompute"}
        names |= {"accumulation": "gradient_accumulation_steps", "fused_attention": "fused_attention"}
        own = {field: training[name] for field, name in names.items()}
        own |= {"profiles": len(training["ema_profiles"]), "profiles_on_host": training["ema_on_host"]}
        return cls(**{**own, **others})

    @property
    def data_parallel(self):
        return self.world_size // (self.tensor_parallel * self.sharding_degree)

    @property
    def data_ranks(self):
        """Ranks that get different samples."""
        return self.world_size // self.tensor_parallel

    @property
    def global_batch(self):
        return self.batch * self.accumulation * self.data_ranks

    @property
    def mode(self):
        """Index into MODES."""
        return 0 if self.precision == "float32" or self.device == "cpu" else MODES.index(self.level)

    @property
    def weight_size(self):
        """Bytes of a trained weight, and of its gradient."""
        return (4, 4, 2)[self.mode]

    @property
    def profiles_on_device(self):
        return 0 if self.profiles_on_host and self.device != "cpu" else self.profiles

    @property
    def reducer(self):
        """Which copy of the gradients is averaged over the data-parallel ranks, if any.

        `buckets` stay from step to step (paddle.DataParallel), `fused` ones are there for a moment. Recompute runs
        backward passes inside the backward pass, which DataParallel can't follow.
        """
        if self.data_parallel == 1 or self.sharding in ("stage2", "stage3"):
            return None
        plain = self.tensor_parallel == 1 and not self.sharding
        return "buckets" if plain and not self.recompute else "fused"


def states(sizes, setting):
    """Returns `{kind: bytes}` that the fullest rank of a sharding group holds all the time."""
    trained = [p.numel(setting.tensor_parallel) for p in sizes.parameters if p.trainable]
    frozen = sum(p.numel() for p in sizes.parameters if not p.trainable)
    size, degree = setting.weight_size, setting.sharding_degree
    held = owned = gradients = sum(trained)
    if setting.sharding == "stage3":
        held = owned = gradients = sum(math.ceil(n / degree) if is_sliced(n, setting) else n for n in trained)
    elif setting.sharding:
        share = fullest_share(tuple(trained), setting.sharding, degree)
        owned = sum(share)
        if setting.sharding == "stage2":
            # Its own parameters', and a buffer for each rank's small ones. Paddle makes new buffers for the others at
            # every forward pass, before it frees the earlier ones.
            buffer = min(owned, GRADIENT_BUFFER)
            filled = max((total for total in itertools.accumulate(sorted(share)) if total <= buffer), default=0)
            gradients = owned - filled + (2 * degree - 1) * buffer
    return {
        "weights": size * held + SINGLE * frozen,
        "gradients": size * gradients,
        "master weights": SINGLE * owned if size < SINGLE else 0,
        "AdamW moments": 2 * SINGLE * owned,
        "EMA": SINGLE * (owned + frozen) if setting.ema else 0,
        "profiles of post-hoc EMA": SINGLE * (owned + frozen) * setting.profiles_on_device,
        "DataParallel's buckets": size * gradients if setting.reducer == "buckets" else 0,
    }


def is_sliced(numel, setting):
    """Returns whether stage 3 slices a parameter: on a CPU every one, see `training.parallel.cpu`."""
    return numel > SLICED_FROM or setting.device == "cpu"


@functools.cache
def fullest_share(numels, stage, degree):
    """Returns the sizes of the parameters of the sharding rank that owns most, dealt out as Paddle does.

    Each goes to the rank with the least so far, in stage 1 the largest first, in stage 2 in the network's order.
    """
    shares = [[] for _ in range(degree)]
    for numel in sorted(numels, reverse=True) if stage == "stage1" else numels:
        min(shares, key=sum).append(numel)
    return max(shares, key=sum)


# Bytes by kind are vectors: a multiple of these.
KINDS = ("activations", "attention scores", "cast weights", "gradients in flight", "batch and loss")
KEPT, SCORE, CAST, GRADIENT, LOSS = np.eye(len(KINDS))


def activations(sizes, setting):
    """Returns what a micro-batch holds on one device beside the states: `(kept, of_blocks, peak)`, bytes over KINDS.

    Those are at the end of the forward pass; the parts of it that the blocks add, a list; and when most is held, which
    is when the loss is computed or early in the backward pass, in a block that all tokens run through.
    """
    mode, degree, block = setting.mode, setting.tensor_parallel, sizes.block
    item = (4, 2, 2)[mode]  # bytes of an element of what the matrix products read
    fused = setting.fused_attention and setting.device == "gpu" and sizes.head_dim % (8 if mode else 4) == 0
    rows = setting.batch * sizes.tokens
    width, mlp, heads = rows * sizes.hidden, rows * sizes.mlp / degree, rows * sizes.heads / degree
    scores = 0 if fused else heads * sizes.tokens
    maps = SINGLE * rows * sizes.patch**2 * sizes.channels
    conditioning = CONDITIONING[mode] * setting.batch * sizes.hidden

    whole, qk_norm, head_rows = block.whole[mode], 0, 4 if fused else 0
    if degree > 1 and mode == 1 and not sizes.large:
        whole += 4  # the biases that follow the all-reduces are added in float32
    if sizes.qk_norm:
        qk_norm = SPLIT_QK_NORM if degree > 1 and sizes.large else block.qk_norm[mode]
        head_rows += block.qk_norm_rows
    casts = [0, 0]  # O1: half copies of the matrices, outside of the blocks and of one block
    for p in sizes.parameters if mode == 1 else ():
        if len(p.shape) > 1 and p.trainable and "embedding" not in p.name and p.block in (None, 0):
            casts[p.block == 0] += item * p.numel(degree)
    attention = (block.split[mode] + qk_norm) * sizes.hidden + (block.kv_heads[mode] + qk_norm) * sizes.kv_width
    block_keeps = KEPT * (whole * width + rows * attention / degree + block.mlp[mode] * mlp)
    block_keeps += KEPT * (block.rows * rows + head_rows * heads)
    score_keeps, fixed = SCORE * SCORES[mode] * scores, CAST * casts[1] + KEPT * conditioning
    residual = KEPT * block.residual[mode] * width
    shares = [tokens / sizes.tokens for tokens in sizes.block_tokens]
    of_blocks = [residual * s if setting.recompute else block_keeps * s + score_keeps * s * s + fixed for s in shares]
    block_keeps += score_keeps + fixed
    loss_keeps, loss_passing = LOSS_MAPS[sizes.out_channels > sizes.channels and not sizes.transport]
    if sizes.predicts_data:
        loss_keeps += 1  # the prediction, which is turned into a velocity
    if sizes.cosine_loss:
        cosine = COSINE_MAPS[0] + COSINE_MAPS[1] / sizes.channels
        loss_keeps, loss_passing = loss_keeps + cosine, loss_passing - cosine
    kept = sum(of_blocks) + KEPT * (block.head[mode] * width + conditioning) + CAST * casts[0]
    kept += KEPT * 2 * item * width * sizes.sprint  # both paths, side by side
    kept += LOSS * (loss_keeps + 2) * maps  # and the latents, clean and noisy

    # The moments that may hold most, by what they hold beyond `kept`.
    backward = -LOSS * loss_keeps * maps
    in_block = backward - KEPT * block.head[mode] * width + GRADIENT * block.residual[mode] * width
    if setting.recompute:
        in_block += block_keeps + KEPT * SINGLE * width  # its output too, and a copy of that one's gradient
    before_attention = KEPT * ((whole / 2 + item + item / degree) * width + block.mlp[mode] * mlp)
    moments = [
        LOSS * loss_passing * maps,
        backward + GRADIENT * HEAD_GRADIENTS[mode] * width,
        in_block + GRADIENT * 3 * block.residual[mode] * width,
        in_block + GRADIENT * item * (mlp + sizes.hidden * sizes.mlp / degree),
        in_block + GRADIENT * item * block.mlp_gradients * mlp - KEPT * item * width,
        in_block + GRADIENT * SCORE_GRADIENTS[mode] * scores - before_attention,
    ]
    return kept, of_blocks, kept + max(moments, key=np.sum)


class Plan:
    """The memory that a run takes, in bytes of the fullest device.

    Its `config` is resolved, and its `setting` a `Setting` whose degrees divide what they split.

    Attributes:
        parameters, trained: how many there are, frozen ones included, and how many are trained.
        states: `{kind: bytes}` held all the time.
        phases: `{phase: {kind: bytes}}` that comes on top; the run needs the largest.
        kept: `{kind: bytes}` of the activations at the end of the forward pass.
        peak, peak_phase: bytes at the peak, and when that is.
    """

    def __init__(self, config, setting):
        self.sizes, self.setting = Sizes(config), setting
        self.parameters = sum(p.numel() for p in self.sizes.parameters)
        self.trained = sum(p.numel() for p in self.sizes.parameters if p.trainable)
        self.states = states(self.sizes, setting)
        # The backward pass makes gradients, and the optimizer's step drops them. Sharding stages 1 and 2 keep them, and
        # DataParallel makes them all at the start of the backward pass.
        drops = setting.sharding in ("", "stage3") and setting.accumulation == 1 and setting.reducer != "buckets"
        passing = self.states.pop("gradients") if drops else 0
        kept, of_blocks, peak = activations(self.sizes, setting)
        self.kept = _by_kind(kept)
        self.phases = self._phases(passing, peak, of_blocks)
        needs = {phase: sum(kinds.values()) for phase, kinds in self.phases.items()}
        self.peak_phase = max(needs, key=needs.get)
        self.peak = sum(self.states.values()) + needs[self.peak_phase]

    def _phases(self, passing, peak, of_blocks):
        sizes, setting, held = self.sizes, self.setting, self.states
        trained = [p for p in sizes.parameters if p.trainable]
        numels = [p.numel(setting.tensor_parallel) for p in trained]
        gathered = {}
        if setting.sharding == "stage3":  # a layer at work and the next one that is fetched, and the first's gradient
            sliced = max((n for n in numels if is_sliced(n, setting)), default=0)
            gathered = {"gathered weights": 3 * setting.weight_size * sliced}
        phases = {"forward and backward": {**_by_kind(peak), **gathered}}
        if passing:
            # In the first block's backward pass the activations of the others are gone, and their gradients are there.
            last = max(index for index, p in enumerate(trained) if p.block == 0)
            gradients = round(passing * sum(numels[last + 1 :]) / sum(numels))
            kinds = _by_kind(peak - sum(of_blocks[1:]))
            phases["end of the backward pass"] = {**kinds, **gathered, "gradients": gradients}
        if setting.reducer == "fused":
            phases["averaging the gradients"] = {"gradients": passing, "fused gradients": passing or held["gradients"]}
        # The average of a parameter, or the square of its gradient, and their float32 copies.
        copies = 1 if setting.weight_size == SINGLE else 2
        phases["optimizer and EMA"] = {"one parameter": copies * SINGLE * max(numels), "gradients": passing}
        # At the start the network and its averages are whole and float32, before they are sharded or cast. Averages
        # that are to be sharded wait on the host.
        numel = sum(p.numel(setting.tensor_parallel) for p in sizes.parameters)
        averages = SINGLE * numel * (setting.ema + setting.profiles_on_device) if not setting.sharding else 0
        # Stage 1's wrapper alone sends all weights in one go, of the type that they are trained in.
        sends = setting.sharding == "stage1" and setting.tensor_parallel == 1
        whole = max(SINGLE, 2 * setting.weight_size if sends else 0) * numel + averages
        phases["start"] = {"whole weights and EMA, beyond the above": max(0, whole - sum(held.values()))}
        return phases


def _by_kind(sizes):
    return {kind: round(size) for kind, size in zip(KINDS, sizes, strict=True)}
