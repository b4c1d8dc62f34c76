#!/usr/bin/env bash
# Set up what is missing, then run the tests:
#     bash run_tests.sh                      all but the walkthroughs
#     bash run_tests.sh --slow               the walkthroughs: the tutorial, the notebook, the browser
#     bash run_tests.sh PYTEST_ARGUMENTS     what they choose
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

bash tools/setup_env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # Paddle's own choice differs from machine to machine
export HF_HUB_OFFLINE=1                        # no test needs the network
[ "${1:-}" != --slow ] || {
    bash tools/setup_env.sh --demo # the browser test needs Gradio
    exec .venv/bin/python -m pytest -m walkthrough "${@:2}"
}
[ $# -eq 0 ] || exec .venv/bin/python -m pytest "$@"

# All but the walkthroughs: two at a time, but those that start processes of their own one after the other.
status=0
.venv/bin/python -m pytest -n 2 -m "not distributed and not walkthrough" || status=$?
.venv/bin/python -m pytest -m "distributed and not walkthrough" || status=$?
exit $status
