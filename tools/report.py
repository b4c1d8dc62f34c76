"""Make one HTML page of a run: curves, previews, settings, data, checkpoints, environment.

    python tools/report.py outputs/mine
    python tools/report.py outputs/mine --samples outputs/grid.png --output mine.html

RUN is the folder of a run of either loop, finished, stopped or under way; one of its checkpoints; or a folder of runs,
of which the newest is taken. The page is one file, opens without a network, and holds no scripts. It says where the
run's data lie and what command started it: look at it before you show it to others.
"""

import os

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import CommandParser
from runtime.files import check_output, whole_file
from runtime.process import run_cli, say


def build_parser():
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of the run")
    parser.add_argument("--model_path", metavar="RUN", help="the same")
    parser.add_argument("--output", metavar="FILE", help="the page [RUN/report.html; an earlier page is replaced]")
    parser.add_argument(
        "--samples", nargs="+", default=[], metavar="PNG", help="pictures to show, beside RUN/samples*.png"
    )
    parser.add_argument(
        "--feature_path", metavar="FOLDER", help="folder with the run's set of features [where it was then]"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is no such page")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.run is None) == (args.model_path is None):
        parser.error("give one RUN" if args.run else "expected RUN, the folder of a run")

    from training.report import find_run, is_own_page, render_report

    run = find_run(args.run or args.model_path)
    output = args.output or os.path.join(run, "report.html")
    check_output(output, args.overwrite or is_own_page(output), flag="--output " if args.output else "")
    page = render_report(run, samples=args.samples, feature_path=args.feature_path)
    with whole_file(output) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page)
    say(f"{output}: {os.path.getsize(output) / 2**10:,.0f} KiB, opens in any browser")


if __name__ == "__main__":
    run_cli(main)
