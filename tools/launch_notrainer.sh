# The hand-written loop's launch line (POSIX sh, sourced by N_run_train_*_notrainer.sh, which sets config_file and
# results_dir).

. tools/launch_common.sh

feature_path=${feature_path:-./data/fastdit_imagenet256}
global_batch_size=${global_batch_size:-256}
num_workers=${num_workers:-8}
max_steps=${max_steps:-7000000}
logging_steps=${logging_steps:-50}
save_steps=${save_steps:-5000}
if [ -n "${batch_size:-}" ]; then
    echo "error: batch_size is the Trainer's, per GPU; this loop takes global_batch_size" >&2
    exit 2
fi
resume=${resume:-auto}                                # auto: the newest checkpoint of this config in results_dir

launch "${LOG_DIR:-$results_dir/launch_log}" train_image_generation_notrainer.py \
    --config_file "$config_file" \
    --feature_path "$feature_path" \
    --results_dir "$results_dir" \
    --global_batch_size "$global_batch_size" \
    --num_workers "$num_workers" \
    --max_steps "$max_steps" \
    --log_every "$logging_steps" \
    --ckpt_every "$save_steps" \
    --resume "$resume" \
    ${seed:+--global_seed "$seed"} \
    ${image_logging_steps:+--image_logging_steps "$image_logging_steps"} \
    ${vae_name_or_path:+--vae_name_or_path "$vae_name_or_path"} \
    ${save_total_limit:+--save_total_limit "$save_total_limit"} \
    "$@"
