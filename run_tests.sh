#!/usr/bin/env bash
# Set up what is missing, then run the tests:
#     bash run_tests.sh                      all but the walkthroughs
#     bash run_tests.sh --slow               the walkthroughs: the tutorial, the notebook, the browser
#     bash run_tests.sh --paddle 2.6         those that show that Paddle 2.6 works too, in .venv-paddle26
#     bash run_tests.sh --device gpu         those that make sense on a GPU, there
#     bash run_tests.sh PYTEST_ARGUMENTS     what they choose; may follow --paddle 2.6 and --device gpu too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

lane=""
case "${1:-}" in
--slow) lane="walkthrough" && shift ;;
--paddle)
    [ "${2:-}" = 2.6 ] || { echo "error: run_tests.sh --paddle takes 2.6, got '${2:-}'" >&2 && exit 2; }
    lane="paddle26" && shift 2
    case "${PADDLE_PACKAGE:-}" in *==2.6.*) ;; *) export PADDLE_PACKAGE=paddlepaddle==2.6.2 ;; esac
    export VENV_DIR=.venv-paddle26
    ;;
--device) lane="gpu" ;; # it is pytest's argument too: see tests/conftest.py
esac

bash tools/setup_env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # Paddle's own choice differs from machine to machine
export HF_HUB_OFFLINE=1                        # no test needs the network
pytest() { "${VENV_DIR:-.venv}/bin/python" -m pytest "$@"; }

# The tests of a lane that start no processes of their own run two at a time, the others one after the other.
status=0
case "$lane" in
walkthrough)
    bash tools/setup_env.sh --demo # the browser test needs Gradio
    pytest -m walkthrough "$@"
    ;;
gpu) pytest -m gpu "$@" ;;
paddle26)
    pytest -n 2 -m "paddle26 and not distributed" "$@" || status=$?
    pytest -m "paddle26 and distributed" "$@" || status=$?
    ;;
*)
    if [ $# -gt 0 ]; then
        pytest "$@"
        exit
    fi
    pytest -n 2 -m "not distributed and not walkthrough" || status=$?
    pytest -m "distributed and not walkthrough" || status=$?
    ;;
esac
exit $status
