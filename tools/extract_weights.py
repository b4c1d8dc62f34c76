"""Takes the network's plain weights out of a training checkpoint.

    python tools/extract_weights.py --model_file output/checkpoint-10000 --save_ema True --checkpoint_path DiT.pdparams

--model_file is a training checkpoint folder of this project, a run's folder (its newest checkpoint), or a `.pdparams`
as PaddleMIX's DiT example saves it: names begin with `transformer.` (the network) and `model_ema.` (its averages, whose
names have lost their dots); a VAE in it is left out. Of a file that holds several sets of weights by key, --save_ema
True takes the averages. The file is read without executing anything it holds.
"""

import argparse
import os

import _root  # noqa: F401 (the project's root, on sys.path)

from config.options import str2bool
from runtime.process import configure_runtime, run_cli
from weights.output import check_output, is_safetensors, save_paddle

DTYPES = ("float32", "float16", "bfloat16", "float64")
NETWORK, AVERAGES = "transformer.", "model_ema."


def pick(state, save_ema, source):
    """Returns the network's weights, or their averages, of a PaddleMIX state dict; a plain one is the network's."""
    network, averages = (
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in (NETWORK, AVERAGES)
    )
    if not save_ema:
        if not network and averages:
            raise ValueError(f"{source}: no name begins with {NETWORK}")
        return network or state
    if not averages:
        raise ValueError(f"{source}: holds no averages (no name begins with {AVERAGES}); for a checkpoint folder of "
                         "this project give the folder, or its ema_state.pdparams without --save_ema")  # fmt: skip
    # LitEma registers its buffers under the parameters' names without dots; what is not trained it does not hold.
    found = {}
    for name, value in network.items():
        kept = averages.get(name, value if name == "pos_embed" else None)
        found[name] = averages.get(name.replace(".", ""), kept)
    missing = [name for name, value in found.items() if value is None]
    if missing or not found:
        raise ValueError(f"{source}: no averages of {', '.join(missing[:3]) or 'any weight'}")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_file", default="", help="training checkpoint: a folder, .pdparams or .safetensors")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights written [float32]")
    parser.add_argument("--checkpoint_path", default="", help=".pdparams or .safetensors to write")
    parser.add_argument(
        "--save_ema", type=str2bool, default=False, metavar="True|False", help="the averages, not the weights [False]"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    args = parser.parse_args(argv)
    for name in ("model_file", "checkpoint_path"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing")
    check_output(args.checkpoint_path, args.overwrite)

    configure_runtime()
    from models.state import check_finite
    from weights.files import is_averages, pick_weights, safe_load, safetensors_layout
    from weights.source import read_weights

    if os.path.isdir(args.model_file):
        state, source = read_weights(args.model_file, key="ema" if args.save_ema else "model")
    else:
        source = args.model_file
        if is_safetensors(source) and safetensors_layout(source) != "paddle":
            raise ValueError(f"{source}: is in PyTorch's layout; use tools/convert_official_weights.py")
        state, key = pick_weights(safe_load(source, tolerant=True), source, "auto", averages=args.save_ema)
        if key is None or not is_averages(key):
            state = pick(state, args.save_ema, source)
    check_finite(state, source=source)
    save_paddle(state, args.checkpoint_path, args.dtype)
    print(f"{len(state)} tensors of {source} -> {args.checkpoint_path} ({args.dtype})")


if __name__ == "__main__":
    run_cli(main)
