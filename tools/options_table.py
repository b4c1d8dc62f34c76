"""Writes the tables of options, docs/configs.md and those in other pages, from config/options.py.

python tools/options_table.py --write        # or --check: exit code 2 if they are not current
"""

import json
import re
from pathlib import Path

from _root import ROOT

from config import options, run_flags
from config.flags import CommandParser
from config.names import OTHER_NAMES
from config.schema import MODEL_TYPES
from runtime.process import run_cli

# What stands between these comments in a page of docs/ is the table of that name.
MARKED = re.compile(r"(<!-- written by tools/options_table.py: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
INTRO = """# Every key and flag

A flag on the command line wins over the config's JSON, the JSON over the default. A flag's other names, PaddleMIX's and
those of the official DiT and SiT, stand behind it; they are accepted and not shown by `--help`. Where the two loops
differ, the Trainer stands first. [training.md](training.md#configs) explains how a config is read. This page is written
by `python tools/options_table.py --write`.

"""
ROUTING = "Keys of `routing`:"
REGULARIZERS = "Each entry of `regularizers` has a `type` and the keys of that type; see [recipes](recipes.md)."
FEATURES = "A run fills this section in from the files of its set, for the tools that get a checkpoint; leave it out."
OTHERS = "Accepted by every command that has the flag, and not shown by `--help`."
OTHERS_OF_ONE = """Single commands take further ones: `--checkpoint_path` for `--output` in the converters and
`extract_weights.py`; `--weights` for `--model_path` in `convert_official_weights.py` and `convert_ldm_vae.py`, and
`--config` for `--config_file` in the latter; `--output` for `--feature_path` in `extract_features.py`;
`--num_fid_samples`, `--per_proc_batch_size` and `--sample_dir` for `--num_images`, `--batch_size` and `--png` in
`sample_npz.py`; `--report` for `--output` in `evaluate_digits.py`; `--steps` for `--max_steps` in `train_vae.py`;
`--sampling_method` for `--method` wherever a SiT is sampled.
"""
EVALUATION = "Evaluation while training, by samples of the averages: a curve, and the best checkpoint is kept."
GUIDANCE = """How previews and evaluations of a run guide; their scales are `--guidance_scale` and `guidance_scale` of
`evaluation`. Commands that sample its checkpoints have flags for it: [inference.md](inference.md#guidance)."""
# The options that most runs touch, for docs/training.md.
MAIN = """learning_rate lr_scheduler_type global_batch_size max_steps use_ema ema_decay amp_dtype recompute
fused_attention max_grad_norm""".split()


def _row(name, option):
    flags, defaults, helps = [], [], []  # of the Trainer and the hand-written loop, once where they are the same
    for loop in options.PerLoop._fields:
        flag, default = option.flag_in(loop, name), options.in_loop(option.default, loop)
        others = "".join(f", `--{other}`" for other in option.other_names(loop, name))
        flags.append(flag and f"`--{flag}`{others}")
        unset = options.in_loop(option.unset, loop) or "-"
        defaults.append(unset if default in (None, options.REQUIRED) else f"`{json.dumps(default)}`")
        helps.append(options.in_loop(option.help, loop))
    flag, default, help = (" / ".join(dict.fromkeys(filter(None, texts))) for texts in (flags, defaults, helps))
    first = [flag] if isinstance(option, options.Flag) else [f"`{name}`", flag]
    return [*first, default, option.check.expected, help]


def table(keys):
    """Returns a table of options, keys or flags alone, as Markdown."""
    rows = [_row(name, option) for name, option in keys.items()]
    head = ["key", "flag", "default", "accepted", "what"][-len(rows[0]) :]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def page():
    """Returns docs/configs.md."""
    parts = [INTRO]
    types = {}  # those that have the same keys share a table
    for name, kind in MODEL_TYPES.items():
        types.setdefault(id(kind.keys), (kind.keys, []))[1].append(name)
    parts += [f"## `model` of type {', '.join(names)}\n\n{table(keys)}\n" for keys, names in types.values()]
    parts += [f"## `objective` of type {kind}\n\n{table(keys)}\n" for kind, keys in options.OBJECTIVE_KEYS.items()]
    parts += [f"{REGULARIZERS}\n"]
    parts += [f"Keys of `{kind}`:\n\n{table(keys)}\n" for kind, keys in options.REGULARIZER_KEYS.items()]
    parts += [f"## `training`\n\n{table(options.TRAINING_KEYS)}\n{ROUTING}\n\n{table(options.ROUTING_KEYS)}\n"]
    parts += [f"## `data`\n\n{table(options.DATA_KEYS)}\n"]
    parts += [f"## `features`\n\n{FEATURES}\n\n{table(options.FEATURES_KEYS)}\n"]
    parts += [f"Keys of `vae`:\n\n{table(options.VAE_KEYS)}\n"]
    parts += [f"Keys of `latent_normalization`:\n\n{table(options.NORMALIZATION_KEYS)}\n"]
    parts += [f"## `evaluation`\n\n{EVALUATION}\n\n{table(options.EVALUATION_KEYS)}\n"]
    parts += [f"## `guidance`\n\n{GUIDANCE}\n\n{table(options.GUIDANCE_KEYS)}\n"]
    parts += ["## Flags alone\n\n"]
    for title, keys in run_flags.FLAG_GROUPS.items():
        if flags := {name: option for name, option in keys.items() if isinstance(option, options.Flag)}:
            parts.append(f"{title[0].upper()}{title[1:]}:\n\n{table(flags)}\n")
    names = {name: ", ".join(f"`--{other}`" for other in others) for name, others in OTHER_NAMES.items()}
    rows = (f"| `--{name}` | {others} |\n" for name, others in names.items())
    parts += [f"## Other names\n\n{OTHERS}\n\n| flag | also accepted |\n| --- | --- |\n", *rows]
    parts += [f"\n{OTHERS_OF_ONE}"]
    return "".join(parts).rstrip() + "\n"


def twins():
    """Returns a table of the flags that have several names, or another meaning in each loop, as Markdown."""
    rows = ["| flag | also accepted | what |\n| --- | --- | --- |\n"]
    known = {name: option for group in run_flags.FLAG_GROUPS.values() for name, option in group.items()}
    for name, option in known.items():
        twin, what = getattr(option, "twin", None), _row(name, option)[-1]
        flags = [option.flag_in(loop, name) or twin for loop in options.PerLoop._fields]
        others = [
            ", ".join(f"`--{other}`" for other in option.other_names(loop, name)) for loop in options.PerLoop._fields
        ]
        if twin is not None:
            what += f" / {_row(twin, known[twin])[-1]}"
        if None not in flags and (flags[0] != flags[1] or any(others)):
            flag = " / ".join(f"`--{flag}`" for flag in dict.fromkeys(flags))
            rows.append(f"| {flag} | {' / '.join(filter(None, dict.fromkeys(others))) or '-'} | {what} |\n")
    return "".join(rows)


def pages():
    """Returns the files with tables as they should be: `{path: text}`."""
    main = table({name: options.TRAINING_KEYS[name] for name in MAIN})
    tables = {"main": main, "data": table(options.DATA_KEYS), "twins": twins()}
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(Path(ROOT, "docs").glob("*.md"))}
    marked = {
        path: MARKED.sub(lambda found: found[1] + tables[found[2]] + found[3], text)
        for path, text in texts.items()
        if MARKED.search(text)
    }
    return {**marked, Path(ROOT, "docs/configs.md"): page()}


def main(argv=None):
    parser = CommandParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the tables")
    what.add_argument("--check", action="store_true", help="only say whether they are current")
    args = parser.parse_args(argv)
    for path, text in pages().items():
        if args.write:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path}: is not current; run python tools/options_table.py --write")
    print("written" if args.write else "current")


if __name__ == "__main__":
    run_cli(main)
