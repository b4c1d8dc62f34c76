"""Takes the network's plain weights out of a training checkpoint.

    python tools/extract_weights.py --model_path outputs/trainer/checkpoint-10000 --key ema --output DiT.pdparams

--model_path is a training checkpoint folder of this project, a run's folder (its newest checkpoint), or a `.pdparams`
as PaddleMIX's DiT example saves it: names begin with `transformer.` (the network) and `model_ema.` (its averages, whose
names have lost their dots); a VAE in it is left out. Of a file that holds several sets of weights by key, --key ema
takes the averages. The file is read without executing anything it holds.
"""

import argparse
import os

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import CommandParser, check_paths
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
                         "this project give the folder, or its ema_state.pdparams without --key ema")  # fmt: skip
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
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--model_path", required=True, metavar="PATH", help="training checkpoint: a folder, .pdparams or .safetensors"
    )
    parser.add_argument(
        "--output",
        aliases=("--checkpoint_path",),
        required=True,
        metavar="FILE",
        help=".pdparams or .safetensors to write",
    )
    parser.add_argument(
        "--key",
        choices=("model", "ema"),
        help="the weights or their averages [model, as in PaddleMIX; other tools take ema]",
    )
    parser.add_argument("--save_ema", action="store_true", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights written")
    parser.add_argument(
        "--keep_internal_guidance",
        action="store_true",
        help="keep the second final layer of internal guidance [what regularizers learned is left out]",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    args = parser.parse_args(argv)
    if None not in (args.key, args.save_ema) and args.save_ema != (args.key == "ema"):
        parser.error(f"--save_ema {args.save_ema} and --key {args.key} are one setting: give one")
    averages = args.key == "ema" or bool(args.save_ema)
    check_output(args.output, args.overwrite)
    check_paths(args, "model_path")

    configure_runtime()
    from models.state import REGULARIZERS, check_finite, own_names
    from weights.files import is_averages, pick_weights, safe_load, safetensors_layout
    from weights.source import leave_out, read_weights

    if os.path.isdir(args.model_path):
        state, source = read_weights(args.model_path, key="ema" if averages else "model", kept=[REGULARIZERS])
    else:
        source = args.model_path
        if is_safetensors(source) and safetensors_layout(source) != "paddle":
            raise ValueError(f"{source}: is in PyTorch's layout; use tools/convert_official_weights.py")
        state, key = pick_weights(safe_load(source, tolerant=True), source, "auto", averages=averages)
        if key is None or not is_averages(key):
            state = pick(state, averages, source)
    state, note = leave_out(own_names(state), source, args.keep_internal_guidance)
    if note:
        print(f"note: {note}")
    check_finite(state, source=source)
    save_paddle(state, args.output, args.dtype)
    print(f"{len(state)} tensors of {source} -> {args.output} ({args.dtype})")


if __name__ == "__main__":
    run_cli(main)
