"""Converts official checkpoints of DiT, SiT, Large-DiT, LightningDiT to Paddle weights, or back, without PyTorch.

    python tools/convert_official_weights.py --config_file config/DiT_XL_patch2.json \\
        --model_path DiT-XL-2-256x256.pt --output DiT-XL-2-256x256.pdparams

--model_path is a plain state dict, or a checkpoint such as the official train.py's, whose averages (ema) are taken
unless --key names another set of weights in it. Of Large-DiT it may be the folder of a checkpoint, or one file of it:
tensor-parallel shards (consolidated.NN-of-MM.pth, consolidated_ema.NN-of-MM.pth) are merged. Nothing in the file is
executed. Names and shapes must be exactly those of the config's network. Without --config_file a LightningDiT is
recognised by its shapes. Names stay the official ones; Linear weights are turned from [out, in] to [in, out]; all
weights are written as float32.

With --reverse, --model_path is a .pdparams or a training checkpoint folder (its averages unless --key says model), and
--output a .pt that torch.load reads. There and back gives the same bits. Where --output ends in .safetensors, that is
what is written, marked as Paddle's layout ("pd") or PyTorch's ("pt").

What regularizers learned in training is left out: a second final layer (officially final_layer_xr), REPA's projector
(projectors.0). --keep_internal_guidance keeps the former, which internal guidance samples by.
"""

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import CommandParser, check_paths
from config.schema import weights_config
from runtime.files import whole_file
from runtime.process import configure_runtime, run_cli
from weights.output import check_output, is_safetensors, save_paddle


def main(argv=None):
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--config_file",
        metavar="FILE",
        help="JSON of the network that the weights belong to [its checkpoint's; a LightningDiT's is recognised]",
    )
    parser.add_argument(
        "--model_path",
        aliases=("--weights",),
        required=True,
        metavar="PATH",
        help=".pt, .pth, .safetensors, folder of shards; with --reverse .pdparams or folder",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="file to write: .pdparams or .safetensors; with --reverse .pt or .safetensors",
    )
    parser.add_argument("--key", help="which weights of a checkpoint: model, ema or another of its keys [ema]")
    parser.add_argument("--reverse", action="store_true", help="from Paddle to the official PyTorch layout")
    parser.add_argument(
        "--keep_internal_guidance", action="store_true", help="keep the second final layer of internal guidance"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    args = parser.parse_args(argv)
    check_output(args.output, args.overwrite, torch=args.reverse)
    check_paths(args, "model_path", "config_file")
    config = weights_config(args.model_path, args.config_file, sections=("model",))
    if config is None:
        from weights.recognised import recognised_config, recognised_note

        config = recognised_config(args.model_path, args.key)
        print(f"note: {args.model_path}: {recognised_note(config['model'])}")
    model = config["model"]

    configure_runtime()
    from models.state import (
        REGULARIZERS,
        check_finite,
        check_state,
        expected_shapes,
        for_sampling,
        official_names,
        turn_linear,
    )
    from weights.files import save_safetensors, save_torch
    from weights.rope_tables import with_rope_tables
    from weights.source import find_shards, leave_out, read_weights

    print(f"reading {args.model_path}", flush=True)
    # safetensors say themselves which layout they are in.
    layout = "auto" if is_safetensors(args.model_path) else "paddle" if args.reverse else "torch"
    tables = {}  # of rotary positions, which go along so that they come back the same
    how = {"key": args.key, "layout": layout, "model": model, "tables": tables, "kept": [REGULARIZERS]}
    state, source = read_weights(args.model_path, **how)
    state, note = leave_out(state, source, args.keep_internal_guidance)
    check_finite(state, source=source)
    fitting, _ = for_sampling(model, state, block=1)  # shapes do not depend on the block
    check_state(state, expected_shapes(fitting), source=source)
    if args.reverse:
        state = official_names(state)
        for name, value in state.items():  # in place, so that no second set of weights is held
            state[name] = turn_linear(name, value)
        official = with_rope_tables(state, model, tables)
        with whole_file(args.output) as path:
            if is_safetensors(args.output):
                save_safetensors(official, path, layout="torch")
            else:
                save_torch(official, path)
    else:
        save_paddle({**state, **tables}, args.output)
    if note:
        print(f"note: {note}")
    print(f"{len(state)} tensors, {sum(value.size for value in state.values()):,} numbers: {source} -> {args.output}")
    if not args.reverse and model.get("qk_norm") and len(find_shards(args.model_path, args.key)) > 1:
        print(
            "note: the official code normalises queries and keys over the heads of one rank, the merged network over "
            "all heads: with qk_norm its output is not quite that of the shards."
        )


if __name__ == "__main__":
    run_cli(main)
