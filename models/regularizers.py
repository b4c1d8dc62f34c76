"""What regularizers learn: layers of a network that take the tokens behind one of its blocks.

They belong to the network, under the names `regularizers.TYPE.*`: so they are trained, averaged, split and saved with
it. Their losses are in `objectives.regularizers`. Sampling needs at most that of internal guidance.
"""

from paddle import nn

from . import ops
from .hooks import Hook
from .parallel import initialize, linear
from .state import REGULARIZERS

INTERNAL_GUIDANCE = "internal_guidance"


def block_index(block, layers):
    """Returns the index, from 0 on, of a block that a config counts from 1 on, or from the end: -1 is the last."""
    return block - 1 if block > 0 else layers + block


def mlp(*widths):
    """Returns an MLP of linear layers of these widths, from input to output, with SiLU between them."""
    parts = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layer = linear(inputs, outputs)
        initialize(layer.weight, nn.initializer.XavierUniform())
        nn.initializer.Constant(0.0)(layer.bias)
        parts += [nn.Silu(), layer]
    return nn.Sequential(*parts[1:])


def _second_final_layer(network, entry):
    layer, zeros = network.new_final_layer(), nn.initializer.Constant(0.0)
    for part in (layer.linear, layer.adaLN_modulation[1]):
        zeros(part.weight)
        zeros(part.bias)
    return layer


def _latent_projector(network, entry):
    width = network.hidden_size
    return mlp(*[width] * 5, network.patch_size**2 * network.in_channels)


def _feature_projector(network, entry):
    if entry.get("width") is None:
        raise ValueError("representation_alignment: its width is missing, that of the encoder's features")
    return mlp(network.hidden_size, entry["inner_width"], entry["inner_width"], entry["width"])


# By the type of the regularizer: builds its layer, from the network and the entry of the config.
LAYERS = {
    INTERNAL_GUIDANCE: _second_final_layer,
    "latent_alignment": _latent_projector,
    "representation_alignment": _feature_projector,
}


def add_regularizers(network, entries):
    """Gives a network, as `regularizers`, what the entries of a config's `objective.regularizers` learn, if anything.

    Its own weights are drawn before, so that they are the same with and without.
    """
    layers = {}
    for entry in entries:
        if (kind := entry["type"]) not in LAYERS:
            continue
        layers[kind] = layer = LAYERS[kind](network, entry)
        layer.index = block_index(entry["block"], network.num_layers)  # of the block whose tokens it takes
        for parameter in layer.parameters():
            parameter.own_steps = kind  # because a run may begin with it later: see `paddle_private.make_adamw`
    if layers:
        network.regularizers = nn.LayerDict(layers)
        ops.use(network.regularizers, network.ops)


def second_index(network):
    """Returns the index of the block whose tokens internal guidance's second final layer takes, None without one."""
    layers = getattr(network, "regularizers", {})
    return layers[INTERNAL_GUIDANCE].index if INTERNAL_GUIDANCE in layers else None


class RegularizerHook(Hook):
    """Keeps as `output` what the layer of a regularizer makes of the tokens `(N, T, D)` behind a block.

    `kind` is the regularizer's type. The network's layer knows the block.
    """

    def __init__(self, kind):
        self.kind = kind

    def begin(self, network):
        layers = getattr(network, "regularizers", {})
        if self.kind not in layers:
            raise ValueError(f"the network has no {REGULARIZERS}{self.kind}: build it from a config with that")
        self.network, self.layer = network, layers[self.kind]

    def after(self, index, tokens):
        if index == self.layer.index:
            self.output = self.read(tokens)
        return tokens

    def read(self, tokens):
        """Returns what the layer makes of the tokens."""
        return self.layer(tokens)


class InternalGuidanceHook(RegularizerHook):
    """Keeps as `output` `(N, out_channels, H, W)` what the second final layer makes of the tokens behind its block.

    The layer is conditioned as the last one is; its output is read as the network's.
    """

    def __init__(self):
        super().__init__(INTERNAL_GUIDANCE)

    def before(self, index, tokens, conditions):
        self.condition = conditions[0]
        return tokens, conditions

    def read(self, tokens):
        return self.network.read_out(self.layer, tokens, self.condition)
