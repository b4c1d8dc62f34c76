#!/bin/sh
# SiT-XL/2 at 256 px with the PaddleNLP Trainer. Every variable here and in tools/launch_*.sh can be set from the
# environment, further flags are passed on: max_steps=20 batch_size=8 bash 2_run_train_sit_trainer.sh --device cpu
set -eu
repo=$(CDPATH='' cd "$(dirname "$0")" && pwd -P)/
if [ "$repo" = "$(pwd -P)/" ]; then repo=; fi # relative paths are the caller's

config_file=${config_file:-${repo}config/SiT_XL_patch2.json}
default_output=./output_trainer/SiT_XL_patch2_trainer # of an earlier version
if [ ! -d "$default_output" ]; then default_output=./outputs/SiT_XL_patch2_trainer; fi

. "${repo}tools/launch_trainer.sh"
