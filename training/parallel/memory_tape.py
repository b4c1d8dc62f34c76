"""What a forward and backward pass of the networks holds in memory, operator by operator. Standard library only.

`activations` plays one micro-batch through the operators of `models/` without computing anything. As in Paddle's eager
mode a tensor lives as long as Python or the backward pass of an operator refers to it: every operator says what it
keeps for its backward pass, and the gradients come and go in the reverse order. That is exact up to what kernels
allocate inside, and it explains itself: `by_operator` lists what a block keeps.

Korthikanti et al. 2022 (arXiv:2205.05198, eq. 1 and 2) count the same for GPT's block by hand. N is the batch, T the
tokens, D the hidden width.
"""

from dataclasses import dataclass

SINGLE = 4  # bytes of a float32
KINDS = ("activations", "attention scores", "cast weights", "gradients in flight", "batch and loss")
ACTIVATIONS, SCORES, CASTS, GRADIENTS, LOSS = range(len(KINDS))

# float32 maps (N, C, H, W) of a loss: the most that its forward pass adds, and what its backward pass needs. Counted
# with Paddle's allocator; the variational bound of a learned variance is a long chain of elementwise operators.
_LOSS_MAPS = {True: (32.5, 19.5), False: (2, 1)}  # by whether the variance is learned

_PLAYED = 2  # blocks


class _Memory:
    """Bytes that are held, and the most that ever were."""

    def __init__(self):
        self.kinds = [0] * len(KINDS)
        self.total = self.peak = self.written = 0
        self.at_peak = tuple(self.kinds)


class _Storage:
    """Bytes that are held until nobody refers to them: CPython's reference counts stand for Paddle's."""

    __slots__ = ("memory", "kind", "size")

    def __init__(self, memory, kind, size):
        self.memory, self.kind, self.size = memory, kind, size
        memory.kinds[kind] += size
        memory.total += size
        memory.written += size
        if memory.total > memory.peak:
            memory.peak = memory.total
            memory.at_peak = tuple(memory.kinds)

    def __del__(self):
        self.memory.kinds[self.kind] -= self.size
        self.memory.total -= self.size


class _Gradient:
    """Where the gradient of a tensor is collected."""

    __slots__ = ("size", "storage", "parameter", "lent")

    def __init__(self, size, parameter=False):
        self.size, self.parameter = size, parameter
        self.storage = None
        self.lent = False  # somebody else holds it too: an operator can't write its result over it


class _Tensor:
    __slots__ = ("storage", "numel", "itemsize", "gradient")

    def __init__(self, storage, numel, itemsize, gradient):
        self.storage, self.numel, self.itemsize, self.gradient = storage, numel, itemsize, gradient


@dataclass
class _Node:
    """An operator's entry for the backward pass."""

    inputs: list
    outputs: list
    keep: list
    in_place: bool
    sent: float = 0.0  # bytes that its backward pass sends to the tensor-parallel group
    again: object = None  # recompute: the function, and numel and itemsize of its inputs


class _Tape:
    """Operators on tensors without values, with Paddle's rules of mixed precision.

    O1: operators of the white list run in half precision, of the black list in float32, others in the widest type of
    their inputs, which are cast. O2: half weights, and of the black list nothing that is used here.
    """

    def __init__(self, *, half, level, fused_linear, recompute):
        self.memory = _Memory()
        self.itemsize = 2 if half else SINGLE
        self.weight_size = 2 if half and level == "O2" else SINGLE
        self._black_list = half and level == "O1"
        self._fused_linear = fused_linear
        self._recompute = recompute
        self.recording = True
        self.nodes = []
        self.operators = 0
        self.sent = 0.0
        self.kept_by = {}  # of a block: storage: (operator, kind, bytes)

    def tensor(self, numel, itemsize=SINGLE, *, kind=ACTIVATIONS, gradient=True):
        size = numel * itemsize
        return _Tensor(_Storage(self.memory, kind, size), numel, itemsize, _Gradient(size) if gradient else None)

    def weight(self, numel):
        """A parameter; its gradient is added to the one that the optimizer will read, and gone."""
        return _Tensor(None, numel, self.weight_size, _Gradient(numel * self.weight_size, parameter=True))

    def operator(self, name, inputs, numel, itemsize, *, keep=(), keep_output=False, outputs=1, **options):
        """Runs an operator.

        Args:
            name: for the table of what is kept.
            numel, itemsize: of each output.
            keep: tensors that the backward pass needs; `keep_output`: the output too.
            options: `in_place` (the gradient of the first input takes the place of the output's), `extra` (bytes kept
                beside tensors), `kind`, `sent` (bytes that the backward pass sends).
        """
        self.operators += 1
        needed = any(tensor.gradient is not None for tensor in inputs)
        kind = options.get("kind", ACTIVATIONS)
        results = [self.tensor(numel, itemsize, kind=kind, gradient=needed) for _ in range(outputs)]
        if needed and self.recording:
            kept = [tensor.storage for tensor in keep if tensor.storage is not None]
            if keep_output:
                kept.append(results[0].storage)
            if options.get("extra"):
                kept.append(_Storage(self.memory, kind, options["extra"]))
            self._count(name, kept)
            self.nodes.append(
                _Node(
                    [tensor.gradient for tensor in inputs if tensor.gradient is not None],
                    [result.gradient for result in results],
                    kept,
                    options.get("in_place", False),
                    options.get("sent", 0.0),
                )
            )
        return results if outputs > 1 else results[0]

    def _count(self, name, kept):
        for storage in kept:
            self.kept_by.setdefault(id(storage), (name, KINDS[storage.kind], storage.size))

    # Types.

    def cast(self, x, itemsize, kind=ACTIVATIONS):
        if x.itemsize == itemsize:
            return x
        return self.operator("cast", [x], x.numel, itemsize, kind=CASTS if x.storage is None else kind)

    def white(self, *tensors, kind=ACTIVATIONS):
        return [self.cast(x, self.itemsize, kind) if self.itemsize != SINGLE else x for x in tensors]

    def _black(self, x, kind=ACTIVATIONS):
        return self.cast(x, SINGLE, kind) if self._black_list else x

    def _widest(self, *tensors):
        itemsize = max(x.itemsize for x in tensors)
        return [self.cast(x, itemsize) for x in tensors]

    # Operators. reshape, unsqueeze and flatten are views.

    def matmul(self, name, x, y, numel, kind=ACTIVATIONS):
        x, y = self.white(x, y)
        return self.operator(name, [x, y], numel, x.itemsize, keep=[x, y], kind=kind)

    def linear(self, name, x, rows, fan_in, fan_out, bias=True):
        weight = self.weight(fan_in * fan_out)
        if not bias:
            return self.matmul(name, x, weight, rows * fan_out)
        bias = self.weight(fan_out)
        if self._fused_linear:
            x, weight, bias = self.white(x, weight, bias)
            return self.operator(name, [x, weight, bias], rows * fan_out, x.itemsize, keep=[x, weight])
        return self.add(self.matmul(name, x, weight, rows * fan_out), bias)

    def add(self, x, y):
        x, y = self._widest(x, y)
        return self.operator("add", [x, y], max(x.numel, y.numel), x.itemsize, in_place=True)

    def multiply(self, name, x, y):
        x, y = self._widest(x, y)
        return self.operator(name, [x, y], max(x.numel, y.numel), x.itemsize, keep=[x, y])

    def unary(self, name, x, *, keep=False, keep_output=False, in_place=False, kind=ACTIVATIONS):
        """One input, one output of its size: transpose, scale, activations."""
        return self.operator(
            name,
            [x],
            x.numel,
            x.itemsize,
            keep=[x] if keep else (),
            keep_output=keep_output,
            in_place=in_place,
            kind=kind,
        )

    def split(self, x, parts):
        return self.operator("split", [x], x.numel // parts, x.itemsize, outputs=parts)

    def layer_norm(self, name, x, rows):
        x = self._black(x)  # beside it the mean and the variance of each row, in float32
        return self.operator(name, [x], x.numel, x.itemsize, keep=[x], extra=2 * rows * SINGLE)

    def softmax(self, name, x):
        return self.unary(name, self._black(x, SCORES), keep_output=True, kind=SCORES)

    def all_reduce(self, x, group):
        """In place, and nothing is to be done for its gradient."""
        self.sent += ring_all_reduce(x.numel * x.itemsize, group)
        return x

    def identity(self, x, group):
        """fleet's `_c_identity`: a copy, whose gradient is summed over the group in place."""
        sent = ring_all_reduce(x.numel * x.itemsize, group)
        return self.operator("identity", [x], x.numel, x.itemsize, in_place=True, sent=sent)

    def gather(self, x, group):
        self.sent += ring_gather(x.numel * x.itemsize * group, group)
        return self.operator("all-gather", [x], x.numel * group, x.itemsize)

    def checkpoint(self, block, *inputs):
        """`paddle.distributed.fleet.utils.recompute`: keeps the inputs, runs the block again before its backward."""
        if not self._recompute:
            return block(*inputs)
        self.recording = False
        out = block(*inputs)
        self.recording = True
        out = _Tensor(out.storage, out.numel, out.itemsize, _Gradient(out.numel * out.itemsize))
        kept = [x.storage for x in inputs]
        self._count("block's input", kept[:1])
        again = (block, [(x.numel, x.itemsize) for x in inputs])
        self.nodes.append(_Node([x.gradient for x in inputs], [out.gradient], kept, False, again=again))
        return out

    # Backward pass.

    def backward(self):
        """Runs the nodes from the last to the first; what a node keeps goes with it."""
        while self.nodes:
            node = self.nodes.pop()
            incoming = [out.storage for out in node.outputs]
            if all(storage is None for storage in incoming):
                continue
            self.sent += node.sent
            if node.again is not None:
                outgoing = self._recompute_and_backward(node, incoming)
            else:
                self.operators += len(node.inputs)
                reuse = node.in_place and not node.outputs[0].lent and incoming[0].size == node.inputs[0].size
                outgoing = [incoming[0]] if reuse else []
                outgoing += [_Storage(self.memory, GRADIENTS, g.size) for g in node.inputs[len(outgoing) :]]
            node.keep = incoming = None
            for out in node.outputs:
                out.storage = None
            for gradient, storage in zip(node.inputs, outgoing, strict=True):
                if not gradient.parameter and gradient.storage is None:  # else it is added to what is there
                    gradient.storage = storage
            outgoing = storage = None

    def _recompute_and_backward(self, node, incoming):
        block, shapes = node.again
        inputs = [_Tensor(s, n, i, _Gradient(n * i)) for s, (n, i) in zip(node.keep, shapes, strict=True)]
        outer, self.nodes = self.nodes, []
        out = block(*inputs)
        out.gradient.storage, out.gradient.lent = incoming[0], True
        self.backward()
        self.nodes = outer
        return [x.gradient.storage for x in inputs]


def ring_all_reduce(size, ranks):
    """Bytes that each rank sends in a ring all-reduce of `size` bytes (a reduce-scatter, then an all-gather)."""
    return 2 * size * (ranks - 1) / ranks


def ring_gather(size, ranks):
    """Bytes that each rank sends in a ring all-gather, a reduce-scatter or (on average) a broadcast of `size` bytes."""
    return size * (ranks - 1) / ranks


class _Network:
    """The operators of a network's forward pass, in the order and with the local names of `models/`."""

    def __init__(self, tape, sizes, batch, *, group, flash):
        self.tape, self.sizes, self.batch, self.group, self.flash = tape, sizes, batch, group, flash
        self.rows = batch * sizes.tokens

    # The parts that DiT and Large-DiT share.

    def modulation(self, c, name, parts, gather=True):
        tape, sizes, batch = self.tape, self.sizes, self.batch
        out = tape.unary(f"{name} silu", c, keep=True, keep_output=True)
        width = parts * sizes.hidden
        if gather and self.group > 1:
            out = tape.identity(out, self.group)
            out = tape.linear(name, out, batch, sizes.condition, width // self.group)
            out = tape.gather(out, self.group)
        else:
            out = tape.linear(name, out, batch, sizes.condition, width)
        return tape.split(out, parts)

    def modulate(self, name, x, shift, scale):
        return self.tape.add(self.tape.multiply(f"{name} * (1 + scale)", x, self._plus_one(scale)), shift)

    def _plus_one(self, scale):
        return self.tape.unary("scale", scale, in_place=True)

    def column(self, name, x, fan_in, fan_out, bias=True, shared_input=False):
        """A Linear whose output is split over the group; its input has passed `identity` if it is shared."""
        if self.group > 1 and not shared_input:
            x = self.tape.identity(x, self.group)
        return self.tape.linear(name, x, self.rows, fan_in, fan_out // self.group, bias)

    def row(self, name, x, fan_in, fan_out, bias=True):
        """A Linear whose input is split over the group."""
        if self.group == 1:
            return self.tape.linear(name, x, self.rows, fan_in, fan_out, bias)
        weight = self.tape.weight(fan_in // self.group * fan_out)
        out = self.tape.all_reduce(self.tape.matmul(name, x, weight, self.rows * fan_out), self.group)
        return self.tape.add(out, self.tape.weight(fan_out)) if bias else out

    def shared_input(self, x):
        return self.tape.identity(x, self.group) if self.group > 1 else x

    def scaled_dot_product(self, q, k, v):
        """Plain attention keeps the softmax of the scores, the fused kernels one number a row of them instead."""
        tape, sizes = self.tape, self.sizes
        heads = sizes.heads // self.group
        width = heads * sizes.head_dim
        if self.flash:
            q, k, v = tape.white(q, k, v)
            return tape.operator(
                "fused attention",
                [q, k, v],
                self.rows * width,
                q.itemsize,
                keep=[q, k, v],
                keep_output=True,
                extra=self.rows * heads * SINGLE,
            )
        q, k, v = (tape.unary("transpose", z) for z in (q, k, v))
        q = tape.unary("scale", q, in_place=True)
        scores = tape.matmul("q k^T", q, k, self.rows * heads * sizes.tokens, kind=SCORES)
        weights = tape.softmax("softmax", scores)
        del scores
        weights, v = tape.white(weights, v, kind=SCORES)
        out = tape.matmul("softmax * v", weights, v, self.rows * width)
        return tape.unary("transpose", out)

    # DiT.

    def dit_attention(self, x):
        hidden = self.sizes.hidden
        qkv = self.column("attn.qkv", x, hidden, 3 * hidden)
        q, k, v = self.tape.split(qkv, 3)
        del qkv
        out = self.scaled_dot_product(q, k, v)
        del q, k, v
        return self.row("attn.proj", out, hidden, hidden)

    def mlp(self, x):
        tape, sizes = self.tape, self.sizes
        return self.row(
            "mlp.fc2",
            tape.unary("mlp gelu", self.column("mlp.fc1", x, sizes.hidden, sizes.mlp), keep=True),
            sizes.mlp,
            sizes.hidden,
        )

    def dit_block(self, x, c):
        tape, rows = self.tape, self.rows
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(c, "adaLN_modulation", 6)
        x = tape.add(
            x,
            tape.multiply(
                "gate_msa * attn",
                gate_msa,
                self.dit_attention(self.modulate("norm1", tape.layer_norm("norm1", x, rows), shift_msa, scale_msa)),
            ),
        )
        return tape.add(
            x,
            tape.multiply(
                "gate_mlp * mlp",
                gate_mlp,
                self.mlp(self.modulate("norm2", tape.layer_norm("norm2", x, rows), shift_mlp, scale_mlp)),
            ),
        )

    def dit_embedding(self, image):
        tape, hidden = self.tape, self.sizes.hidden
        # The bias of a convolution is added by an operator of its own: float32 under O1.
        weight = tape.weight(self.sizes.patch_in * hidden)
        x = tape.add(tape.matmul("x_embedder", image, weight, self.rows * hidden), tape.weight(hidden))
        x = tape.unary("transpose", x)
        return tape.operator("add", [x], x.numel, x.itemsize, in_place=True)  # pos_embed

    # Large-DiT.

    def rms_norm(self, name, x):
        tape, itemsize = self.tape, x.itemsize
        h = tape.cast(x, SINGLE)
        mean = tape.operator("mean", [tape.unary(f"{name} square", h, keep=True)], self.rows, SINGLE)
        inverse = tape.unary(f"{name} rsqrt", tape.unary("scale", mean, in_place=True), keep_output=True)
        h = tape.multiply(f"{name} x * rsqrt", h, inverse)
        weight = tape.cast(tape.weight(self.sizes.hidden), SINGLE)
        return tape.cast(tape.multiply(f"{name} * weight", h, weight), itemsize)

    def rotate(self, name, x):
        tape, itemsize = self.tape, x.itemsize
        x = tape.cast(x, SINGLE)
        first, second = tape.split(x, 2)

        def turned():
            # Two products with the table, and their sum or difference.
            pair = [tape.operator(f"{name} rope", [half], half.numel, SINGLE, keep=[half]) for half in (first, second)]
            return tape.operator("add", pair, first.numel, SINGLE, in_place=True)

        return tape.cast(tape.operator("stack", [turned(), turned()], x.numel, SINGLE), itemsize)

    def qk_norm(self, name, x):
        """`nn.LayerNorm`, or with tensor parallelism the layer norm of a width that the group shares."""
        tape = self.tape
        if self.group == 1:
            return tape.layer_norm(name, x, self.rows)
        x = tape.cast(x, SINGLE)
        tape.sent += ring_gather(2 * self.rows * self.group * SINGLE, self.group)
        centered = tape.operator("subtract", [x], x.numel, SINGLE, in_place=True)
        square = tape.unary(f"{name} square", centered, keep=True)
        tape.operator("mean", [square], self.rows, SINGLE)
        del centered, square
        centered = tape.operator("subtract", [x], x.numel, SINGLE, in_place=True)
        normal = tape.operator(
            f"{name} * rsqrt", [centered], x.numel, SINGLE, keep=[centered], extra=self.rows * SINGLE
        )
        weight = tape.cast(tape.weight(x.numel // self.rows), SINGLE)
        return tape.add(tape.multiply(f"{name} * weight", normal, weight), weight)

    def large_attention(self, x):
        tape, sizes = self.tape, self.sizes
        hidden, kv_width = sizes.hidden, sizes.kv_heads * sizes.head_dim
        x = self.shared_input(x)
        q = self.column("attention.wq", x, hidden, hidden, False, shared_input=True)
        if sizes.qk_norm:
            q = self.qk_norm("q_norm", q)
        k = self.column("attention.wk", x, hidden, kv_width, False, shared_input=True)
        if sizes.qk_norm:
            k = self.qk_norm("k_norm", k)
        v = self.column("attention.wv", x, hidden, kv_width, False, shared_input=True)
        q, k = (tape.cast(self.rotate(name, z), v.itemsize) for name, z in (("q", q), ("k", k)))
        if kv_width != hidden:
            k, v = (tape.operator("expand", [z], q.numel, z.itemsize) for z in (k, v))
        out = self.scaled_dot_product(q, k, v)
        del q, k, v
        return self.row("attention.wo", out, hidden, hidden, False)

    def feed_forward(self, x):
        tape, sizes = self.tape, self.sizes
        x = self.shared_input(x)
        gate = self.column("feed_forward.w1", x, sizes.hidden, sizes.mlp, False, shared_input=True)
        up = self.column("feed_forward.w3", x, sizes.hidden, sizes.mlp, False, shared_input=True)
        out = tape.multiply("swiglu", gate, up)
        del gate, up
        return self.row("feed_forward.w2", out, sizes.mlp, sizes.hidden, False)

    def large_block(self, x, c):
        tape = self.tape
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(c, "adaLN_modulation", 6)
        x = tape.add(
            x,
            tape.multiply(
                "gate_msa * attention",
                gate_msa,
                self.large_attention(
                    self.modulate("attention_norm", self.rms_norm("attention_norm", x), shift_msa, scale_msa)
                ),
            ),
        )
        return tape.add(
            x,
            tape.multiply(
                "gate_mlp * feed_forward",
                gate_mlp,
                self.feed_forward(self.modulate("ffn_norm", self.rms_norm("ffn_norm", x), shift_mlp, scale_mlp)),
            ),
        )

    def large_embedding(self, image):
        x = self.tape.unary("transpose", image)
        return self.tape.linear("x_embedder", x, self.rows, self.sizes.patch_in, self.sizes.hidden)

    # The whole.

    def conditioning(self):
        tape, sizes, batch = self.tape, self.sizes, self.batch
        features = tape.tensor(batch * sizes.frequencies, tape.weight_size, gradient=False)
        t = tape.linear("t_embedder.mlp.0", features, batch, sizes.frequencies, sizes.condition)
        t = tape.unary("t_embedder silu", t, keep=True, keep_output=True)
        t = tape.linear("t_embedder.mlp.2", t, batch, sizes.condition, sizes.condition)
        table = tape.weight(sizes.labels * sizes.condition)
        y = tape.operator("y_embedder", [table], batch * sizes.condition, tape._black(table).itemsize)
        return tape.add(t, y)

    def head(self, x, c):
        tape = self.tape
        shift, scale = self.modulation(c, "final_layer.adaLN_modulation", 2, gather=False)
        x = self.modulate("norm_final", tape.layer_norm("norm_final", x, self.rows), shift, scale)
        x = tape.linear("final_layer.linear", x, self.rows, self.sizes.hidden, self.sizes.patch_out)
        x = tape.unary("transpose", x)
        if self.sizes.drops_variance:
            x = tape.operator("slice", [x], x.numel // 2, x.itemsize)
        return x


@dataclass(frozen=True)
class Activations:
    """What a forward and backward pass holds on one device beside weights, gradients and optimizer state, in bytes.

    Attributes:
        kept: `{kind of KINDS: bytes}` at the end of the forward pass.
        per_block: the part of it that each block adds.
        peak: `{kind: bytes}` when most is held: in the backward pass of the last block, as a rule.
        sent: bytes that this rank sends to its tensor-parallel group.
        operators: how many are run, forward and backward.
        written: bytes of their results.
        by_operator: `[(operator, kind, bytes)]` that a block keeps; a tensor that several operators keep is counted at
            the first one.
    """

    kept: dict
    per_block: dict
    peak: dict
    sent: float
    operators: int
    written: int
    by_operator: list


def _summed(entries):
    """`[(operator, kind, bytes)]` with one entry an operator and kind."""
    sums = {}
    for name, kind, size in entries:
        sums[name, kind] = sums.get((name, kind), 0) + size
    return [(name, kind, size) for (name, kind), size in sums.items()]


def activations(sizes, batch, *, recompute, fused_attention, precision="float32", level="O1", group=1, device="gpu"):
    """Plays one micro-batch.

    Args:
        sizes: of the network, `training.parallel.memory_plan.Sizes`.
        batch: samples.
        recompute, fused_attention: as in a config's `training` section.
        precision, level: its `amp_dtype` and `amp_level`.
        group: tensor-parallel degree; it must divide heads and widths.
        device: `gpu` or `cpu`: on a CPU attention is never fused.

    Returns:
        an `Activations`.
    """
    half = precision != "float32"
    # Alignment that the fused kernels need: FlashAttention in half precision, else the memory-efficient one.
    flash = fused_attention and device == "gpu" and sizes.head_dim % (8 if half else 4) == 0
    tape = _Tape(half=half, level=level, fused_linear=device == "gpu", recompute=recompute)
    memory = tape.memory
    network = _Network(tape, sizes, batch, group=group, flash=flash)
    if sizes.large:
        embedding, block = network.large_embedding, network.large_block
    else:
        embedding, block = network.dit_embedding, network.dit_block

    # Latents, noise (with transport the target too) and the noisy latents that the network gets.
    latents = batch * sizes.latents
    batch_storage = _Storage(memory, LOSS, latents * SINGLE)
    noise = _Storage(memory, LOSS, latents * SINGLE * (2 if sizes.transport else 1))
    image = tape.tensor(latents, kind=LOSS, gradient=False)
    x = embedding(image)
    c = network.conditioning()
    # All blocks are alike: some are played, the others counted.
    played = min(_PLAYED, sizes.layers)
    for _ in range(played):
        before = list(memory.kinds)
        tape.kept_by.clear()
        x = tape.checkpoint(block, x, c)
        block_keeps = [now - then for now, then in zip(memory.kinds, before, strict=True)]
    by_operator = _summed(tape.kept_by.values())
    x = network.head(x, c)
    most, kept_maps = _LOSS_MAPS[sizes.learned_variance]
    _Storage(memory, LOSS, round(most * latents * SINGLE))  # comes and goes
    loss = _Storage(memory, LOSS, round(kept_maps * latents * SINGLE))
    gradient = x.gradient
    del x, c, image, noise
    kept = list(memory.kinds)
    gradient.storage = _Storage(memory, GRADIENTS, gradient.size)
    del loss
    tape.backward()
    del batch_storage

    others = sizes.layers - played

    def all_blocks(kinds):
        return {kind: size + others * keeps for kind, size, keeps in zip(KINDS, kinds, block_keeps, strict=True)}

    return Activations(
        kept=all_blocks(kept),
        per_block=dict(zip(KINDS, block_keeps, strict=True)),
        peak=all_blocks(memory.at_peak),
        sent=tape.sent * sizes.layers / played,
        operators=tape.operators * sizes.layers // played,
        written=memory.written * sizes.layers // played,
        by_operator=by_operator,
    )
