#!/bin/sh
# DiT-XL/2 at 256 px with the PaddleNLP Trainer. Every variable here and in tools/launch_*.sh can be set from the
# environment, further flags are passed on: max_steps=20 batch_size=8 bash 0_run_train_dit_trainer.sh --device cpu
set -eu
repo=$(CDPATH='' cd "$(dirname "$0")" && pwd -P)/
if [ "$repo" = "$(pwd -P)/" ]; then repo=; fi # relative paths are the caller's

config_file=${config_file:-${repo}config/DiT_XL_patch2.json}
default_output=./output_trainer/DiT_XL_patch2_trainer # as PaddleMIX's

. "${repo}tools/launch_trainer.sh"
