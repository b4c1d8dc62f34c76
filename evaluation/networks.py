"""The networks in whose features sets of images are compared, by name.

A network is called on uint8 images (N, H, W, 3), RGB, and returns `{name: float32 (N, ...)}`: `pool`, and if it has
them `spatial` (for sFID) and `logits` (for the Inception Score, before the softmax). `outputs` has these names,
`settings` what a report must say of it.
"""

import os

import numpy as np

from evaluation.inception import Inception, check_images, find_weights
from runtime.files import sha256_of_file
from runtime.programs import PROGRAMS, Program, program_file, weights_of
from runtime.untrusted import shortened

NAMES = ("inception", "digits")
CHUNK = 64  # images that a program gets at once


def load_features(name, *, weights=None, preprocessing="adm"):
    """Returns the feature network of a name, on Paddle's current device.

    Args:
        name: "inception", "digits", or the path of a program for `ProgramFeatures`, as `paddle.jit.save` took it or the
            folder that holds `model.json`.
        weights: path of the Inception's weights; None looks for them, see `find_weights`.
        preprocessing: of the Inception, "adm" or "pytorch-fid".

    Raises ValueError, one line, for what is not there or can't be read. A program is run: only for files you trust.
    """
    if name == "inception":
        return Inception.from_file(find_weights(weights), preprocessing)
    check_features(name, weights, preprocessing)
    if name == "digits":
        from evaluation.digits import Digits

        return Digits()
    return ProgramFeatures(name)


def check_features(name, weights=None, preprocessing="adm"):
    """Raises `ValueError` for features that `load_features` would not find or take; imports no Paddle."""
    if name == "inception":
        find_weights(weights)
        return
    if weights is not None:
        raise ValueError(f"weights {weights}: only the features 'inception' take a file of weights, not {name!r}")
    if preprocessing != "adm":
        raise ValueError(f"preprocessing {preprocessing!r}: only the features 'inception' have a choice, not {name!r}")
    if name != "digits":
        find_program(name)


class ProgramFeatures:
    """A Paddle Inference program as a feature network.

    Its one input is float32 images (N, 3, H, W), RGB, in [0, 1], of the size that the image files have: to resize and
    to shift them is the program's own affair. Its first output is `pool` (N, D); a second one is `logits` (N, K). A
    layer that takes and returns these is saved by

        paddle.jit.save(layer, "FOLDER/model", input_spec=[paddle.static.InputSpec([None, 3, None, None], "float32")])
    """

    def __init__(self, path):
        import paddle

        program = find_program(path)
        # Without oneDNN: it doesn't know every operator, and this may be any network.
        self._run = Program(program, paddle.get_device(), by_onednn=False, failing="cannot run it on these images")
        if self._run.num_inputs != 1 or self._run.num_outputs not in (1, 2):
            found = f"{self._run.num_inputs} inputs and {self._run.num_outputs} outputs"
            raise ValueError(f"{program}: has {found}, expected images alone, and features or features and logits")
        self.outputs = ("pool", "logits")[: self._run.num_outputs]
        checksums = {
            key: sha256_of_file(file).hex()
            for key, file in (("program_sha256", program), ("weights_sha256", weights_of(program)))
        }
        self.settings = {"features": os.fspath(path), **checksums}
        self._program = program

    def __call__(self, images):
        """Returns `{name: float32 (N, D)}` of uint8 images (N, H, W, 3), RGB."""
        import paddle

        check_images(images)
        parts = []
        for start in range(0, len(images), CHUNK):
            x = paddle.to_tensor(images[start : start + CHUNK]).astype("float32").transpose([0, 3, 1, 2]) / 255
            parts.append([output.astype("float32").numpy() for output in self._run(x)])
            for name, found in zip(self.outputs, parts[-1], strict=True):
                if found.ndim != 2 or len(found) != len(x):
                    expected = f"[{len(x)}, D]"
                    raise ValueError(f"{self._program}: its {name} are {list(found.shape)}, expected {expected}")
        return dict(zip(self.outputs, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def find_program(path):
    """Returns the file of a program, see `runtime.programs.program_file`; ValueError if there is none."""
    found = program_file(path)
    if found is None:
        raise ValueError(
            f"features {shortened(os.fspath(path), 500)}: expected {', '.join(NAMES)}, or the path of a program: a "
            f"folder with {' or '.join(PROGRAMS)}, or what paddle.jit.save was given"
        )
    return found
