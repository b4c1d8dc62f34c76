"""Check whether this machine computes what it should: a verdict a line, in a few minutes.

    python tools/self_check.py                     # the GPU if there is one, else the CPU
    python tools/self_check.py --json report.json  # the same, with all figures in a file: what an issue should carry
    python tools/self_check.py --quick             # nothing that trains for long or starts many processes

Each line is ok, WRONG or skipped, with the figures or the reason. Told are versions and GPUs; the official code's
numbers beside ours; fused attention; training, resuming and several processes; speed and memory. docs/self_check.md
explains each group. No path of yours and no variable of the environment is told, but for MKL_DEBUG_CPU_TYPE and
OMP_NUM_THREADS.

Exit code: 0 nothing is wrong, 1 something is.
"""

import collections
import datetime
import json
import sys
import time

import _root  # noqa: F401

from config.flags import CommandParser, add_device_flag
from runtime.files import check_output, write_json
from runtime.process import run_cli, say
from verification.groups import GROUPS, run_groups
from verification.verdicts import OK, SKIPPED, WRONG


def check(device, *, quick=False, groups=None, stream=None):
    """Runs the groups, says each verdict to `stream`, and returns the report as a dictionary of JSON values."""
    start, verdicts = time.perf_counter(), []
    for verdict in run_groups(device, quick=quick, groups=groups):
        say(verdict.line(), stream)
        verdicts.append(verdict)
    counts = collections.Counter(verdict.status for verdict in verdicts)
    seconds = round(time.perf_counter() - start)
    told = ", ".join(f"{counts[status]} {status}" for status in (OK, WRONG, SKIPPED))
    say(f"{told}, in {seconds} s", stream)
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "quick": quick,
        "seconds": seconds,
        "counts": {status: counts[status] for status in (OK, WRONG, SKIPPED)},
        "verdicts": [verdict.as_json() for verdict in verdicts],
    }


def main(argv=None):
    parser = CommandParser(description=__doc__)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the report; without FILE: print it")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    add_device_flag(parser)
    args = parser.parse_args(argv)
    prints = args.json == "-"
    if args.json and not prints:
        check_output(args.json, args.overwrite, "--json ")
    report = check(args.device, quick=args.quick, groups=args.groups, stream=sys.stderr if prints else sys.stdout)
    if prints:
        say(json.dumps(report, indent=2))
    elif args.json:
        write_json(args.json, report)
        say(f"report: {args.json}")
    if report["counts"][WRONG]:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
