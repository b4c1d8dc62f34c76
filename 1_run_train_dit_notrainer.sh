#!/bin/sh
# DiT-XL/2 at 256 px with the hand-written loop. Every variable here and in tools/launch_*.sh can be set from the
# environment, further flags are passed on: max_steps=20 bash 1_run_train_dit_notrainer.sh --device cpu
set -eu
repo=$(CDPATH='' cd "$(dirname "$0")" && pwd -P)/
if [ "$repo" = "$(pwd -P)/" ]; then repo=; fi # relative paths are the caller's

config_file=${config_file:-${repo}config/DiT_XL_patch2.json}
default_output=./output_notrainer/DiT_XL_patch2_notrainer # as PaddleMIX's

. "${repo}tools/launch_notrainer.sh"
