#!/bin/sh
# Large-DiT 3B at 256 px with the PaddleNLP Trainer. Every variable here and in tools/launch_*.sh can be set from the
# environment, further flags are passed on: max_steps=20 batch_size=1 bash 4_run_train_largedit_3b_trainer.sh --device cpu
set -eu
repo=$(CDPATH='' cd "$(dirname "$0")" && pwd -P)/
if [ "$repo" = "$(pwd -P)/" ]; then repo=; fi # relative paths are the caller's

config_file=${config_file:-${repo}config/LargeDiT_3B_patch2.json}
default_output=./output_trainer/LargeDiT_3B_patch2_trainer
logging_steps=${logging_steps:-1}
image_size=${image_size:-${resolution:-256}}
amp_master_grad=${amp_master_grad:-1}

. "${repo}tools/launch_common.sh"

# On 8 GPUs tensor parallel 4 and sharding 2; with fewer, what divides them.
if [ -z "${MP_DEGREE:-}" ]; then
    MP_DEGREE=4
    while [ $((TRAINING_GPUS_PER_NODE % MP_DEGREE)) -ne 0 ]; do MP_DEGREE=$((MP_DEGREE / 2)); done
fi
if [ -z "${SHARDING_DEGREE:-}" ]; then
    SHARDING_DEGREE=$((2 - TRAINERS_NUM * TRAINING_GPUS_PER_NODE / MP_DEGREE % 2))
fi
if [ "$SHARDING_DEGREE" -gt 1 ]; then sharding=${sharding:-stage1}; fi

. "${repo}tools/launch_trainer.sh"
