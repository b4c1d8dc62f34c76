"""What the objectives share: a micro-batch and its place in the global batch, and the sum with regularizers."""

from collections import namedtuple

import paddle

from objectives.regularizers import Pass

# Where a rank's micro-batch stands in the global batch of an optimizer step: rows [start, stop) of `total`.
Rows = namedtuple("Rows", "start stop total")

# A micro-batch: latents `x` (N, C, H, W), labels `y` (N,) int64, and a dict of what else a recipe needs, by name.
Batch = namedtuple("Batch", "x y extras", defaults=({},))
EXTRAS = ("features",)  # an encoder's, (N, T, E): what a `FeatureDataset` may read behind latents and labels, in order


def make_batch(tensors):
    """Returns the `Batch` of a loader's tensors: latents, labels, and those of `EXTRAS` if there are any."""
    x, y, *extras = tensors
    return Batch(x, y, dict(zip(EXTRAS, extras, strict=False)))


def draw_rows(sampler, rows):
    """Returns rows [start, stop) of `sampler(rows.total)`, a draw for the whole global batch.

    Every rank draws the same numbers and keeps its own: a sample's noise depends on its place in the global batch only.
    """
    numbers = sampler(rows.total)
    return numbers if rows.stop - rows.start == rows.total else numbers[rows.start : rows.stop]


class Objective:
    """Base of the objectives. A subclass has `draw_noise(x, rows)`, `losses(model, x, drawn, model_kwargs)` and more.

    For regularizers it has `compare(output, x, drawn)`: of an output `(N, C or 2C, H, W)` of the network, prediction
    and target `(N, C, H, W)` whose squared error is a loss, in float32.

    `class_dropout_prob` is the network's, 0 where it has no null class; `regularizers`: see `regularizers.Regularizer`;
    `routing`: a `routing.TokenRouting`, or None.
    """

    routing = None

    def __init__(self, class_dropout_prob, regularizers=()):
        self.class_dropout_prob = class_dropout_prob
        self.regularizers = regularizers

    def draw(self, batch, rows=None):
        """Returns the random numbers for `training_losses`, per sample, by name.

        They are `t` and, of the diffusion, `weights` (of the losses), `(N,)`; `noise` as `batch.x`; and
        `force_drop_ids` `(N,)`, if labels are dropped; then those of `routing.TokenRouting.draw`, if tokens are routed.
        """
        rows = rows or Rows(0, batch.x.shape[0], batch.x.shape[0])
        drawn = self.draw_noise(batch.x, rows)
        if self.class_dropout_prob > 0:
            dropped = draw_rows(lambda total: paddle.rand([total]), rows) < self.class_dropout_prob
            drawn["force_drop_ids"] = dropped.astype("int64")
        return drawn if self.routing is None else {**drawn, **self.routing.draw(rows)}

    def training_losses(self, model, batch, rows=None, drawn=None):
        """Computes the losses at random times, and those of the regularizers.

        Args:
            model: called as `model(x_t, t, y=..., force_drop_ids=..., hooks=...)`, the last two where they are needed.
            batch: a `Batch`; its latents are clean and scaled to about unit variance.
            rows: where these N samples stand in the global batch; None if they are all of it.
            drawn: what `draw` returned earlier; None to draw now.

        Returns `(N,)` tensors by name: `loss`, to be minimised; its parts where there are any, and each regularizer's
        loss under its name, without its weight. Importance weights of timesteps are on the objective's own part alone.
        """
        drawn = self.draw(batch, rows) if drawn is None else dict(drawn)
        model_kwargs = {"y": batch.y}
        if "force_drop_ids" in drawn:
            model_kwargs["force_drop_ids"] = drawn.pop("force_drop_ids")
        if self.routing is not None:  # before the other hooks, which see all tokens again behind the routed blocks
            model_kwargs["hooks"] = (self.routing.hook(drawn),)
        if not self.regularizers:
            return self.losses(model, batch.x, drawn, model_kwargs)

        hooks = [regularizer.hook() for regularizer in self.regularizers]
        model_kwargs["hooks"] = (*model_kwargs.get("hooks", ()), *filter(None, hooks))
        output = None

        def observed(*inputs, **keywords):
            nonlocal output
            output = model(*inputs, **keywords)
            output = output[0] if isinstance(output, tuple) else output  # without the hooks'
            return output

        losses = self.losses(observed, batch.x, drawn, model_kwargs)
        with paddle.amp.auto_cast(enable=False):  # O2 would add the losses in half precision
            for regularizer, hook in zip(self.regularizers, hooks, strict=True):
                seen = Pass(batch, hook, output, lambda output: self.compare(output, batch.x, drawn))
                part = regularizer.loss(seen)
                losses[regularizer.name] = part
                losses["loss"] = losses["loss"] + regularizer.sign * regularizer.weight * part
        return losses

    def end_step(self):
        """Is called once after each optimizer step, for an objective that learns."""

    def state_dict(self):
        """Returns the state to save, by name; empty where nothing is learned."""
        return {}

    def set_state_dict(self, state):
        """Restores what `state_dict` returned."""
