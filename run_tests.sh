#!/usr/bin/env bash
# Set up what is missing, then run the tests: bash run_tests.sh [pytest's arguments], e.g. -n 2 for two processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

bash tools/setup_env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # Paddle's own choice differs from machine to machine
export HF_HUB_OFFLINE=1                        # no test needs the network
exec .venv/bin/python -m pytest "$@"
