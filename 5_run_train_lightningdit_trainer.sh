#!/bin/sh
# LightningDiT-XL/1 at 256 px, on the latents of VA-VAE, with the PaddleNLP Trainer. Its config says how long and with how
# many images a step, 1024 over all GPUs. Every variable here and in tools/launch_*.sh can be set from the environment,
# further flags are passed on: max_steps=20 batch_size=8 bash 5_run_train_lightningdit_trainer.sh --device cpu
set -eu
repo=$(CDPATH='' cd "$(dirname "$0")" && pwd -P)/
if [ "$repo" = "$(pwd -P)/" ]; then repo=; fi # relative paths are the caller's

config_file=${config_file:-${repo}config/LightningDiT_XL_patch1_f16d32.json}
default_output=./outputs/LightningDiT_XL_patch1_f16d32_trainer
feature_path=${feature_path:-./data/vavae_imagenet256} # the official latents, or what tools/extract_features.py makes

. "${repo}tools/launch_trainer.sh"
