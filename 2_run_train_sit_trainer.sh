#!/bin/sh
# SiT-XL/2 at 256 px with the PaddleNLP Trainer. Every variable here and in tools/launch_*.sh can be set from the
# environment, further flags are passed on: max_steps=20 batch_size=8 bash 2_run_train_sit_trainer.sh --device cpu
set -eu
cd "$(dirname "$0")"

config_file=${config_file:-config/SiT_XL_patch2.json}
OUTPUT_DIR=${OUTPUT_DIR:-./output_trainer/SiT_XL_patch2_trainer}

. tools/launch_trainer.sh
