"""Networks as static programs: saved, and run by Paddle Inference.

A program is code: one from somebody else can do on this machine whatever Paddle's operators can, write files for one.
"""

import os
import warnings

from runtime.paddle_private import check_program, run_predictor
from runtime.untrusted import shortened

# A program's file: of Paddle 3, and of Paddle 2; and the file of its weights.
PROGRAMS = ("model.json", "model.pdmodel")
WEIGHTS = "model.pdiparams"


def save_program(layer, inputs, path):
    """Saves a layer as a program, for any batch size; `inputs`: `(name, shape of one, dtype)` of each argument.

    `path` lacks the suffixes: `FOLDER/model` gives the first of `PROGRAMS`, and `WEIGHTS`.
    """
    import paddle
    from paddle.static import InputSpec

    layer.eval()
    specs = [InputSpec([None, *shape], dtype, name) for name, shape, dtype in inputs]
    kept = layer.forward
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Paddle says of the source that it rewrites, which no user wrote
            paddle.jit.save(paddle.jit.to_static(layer, input_spec=specs, full_graph=True), path)
    finally:
        layer.forward = kept


class Program:
    """A program in a file, as a function of tensors that returns a list of tensors.

    Args:
        path: of the program's file; its weights lie beside it, `model.pdiparams` beside `model.json`.
        device: "cpu", "gpu" or "gpu:N".
        dtype: float32, bfloat16 or float16 to compute in.
        by_onednn: whether a CPU may compute by oneDNN, which is fast and doesn't know every operator.
        failing: what the error says of a run that fails.

    Raises ValueError, one line with the file, when it can't be loaded, and later when it can't be run.
    """

    def __init__(self, path, device, dtype="float32", *, by_onednn=True, failing="cannot run it"):
        from paddle import inference

        check_program(path)
        self._path, self._failing = path, failing
        config = inference.Config(path, weights_of(path))
        config.disable_glog_info()
        if device == "cpu":
            config.disable_gpu()
            threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
            config.set_cpu_math_library_num_threads(int(threads) if threads.isdecimal() and int(threads) else 1)
            config.enable_mkldnn()
            config.delete_pass("inplace_pass")  # with oneDNN, Paddle 3.3 gives wrong numbers otherwise
            if not by_onednn:
                config.delete_pass("onednn_placement_pass")
            if dtype == "bfloat16":
                config.enable_mkldnn_bfloat16()
        else:
            precision = inference.PrecisionType
            types = {"float32": precision.Float32, "float16": precision.Half, "bfloat16": precision.Bfloat16}
            config.enable_use_gpu(256, int((device + ":0").split(":")[1]), types[dtype])
        self._predictor = self._one_line("cannot load it", inference.create_predictor, config)
        self.num_inputs = len(self._predictor.get_input_names())
        self.num_outputs = len(self._predictor.get_output_names())

    def __call__(self, *inputs):
        return self._one_line(self._failing, run_predictor, self._predictor, [x.contiguous() for x in inputs])

    def _one_line(self, what, function, *inputs):
        import paddle

        try:
            return function(*inputs)
        except Exception as error:  # Paddle's own types, of several lines
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            message = f"{self._path}: Paddle {paddle.__version__} {what}: {shortened(reason, 200)}"
            raise ValueError(message) from None


def weights_of(program):
    """Returns the path of a program's weights, which lie beside it."""
    return os.path.splitext(program)[0] + os.path.splitext(WEIGHTS)[1]


def program_file(path):
    """Returns the file of a program: `path` itself, one in the folder `path`, or one with a suffix after `path`.

    None where there is none; ValueError for one without its weights.
    """
    path = os.fspath(path)
    suffixes = [os.path.splitext(name)[1] for name in PROGRAMS]
    candidates = [path] if path.endswith(tuple(suffixes)) else []
    candidates += [os.path.join(path, name) for name in PROGRAMS] + [path + suffix for suffix in suffixes]
    found = next((file for file in candidates if os.path.isfile(file)), None)
    if found is not None and not os.path.isfile(weights_of(found)):
        raise ValueError(f"{found}: there is no {os.path.basename(weights_of(found))} beside it")
    return found
