# The hand-written loop's launch line (POSIX sh, sourced by N_run_train_*_notrainer.sh, which sets config_file and
# default_output).

. "${repo}tools/launch_common.sh"

one_setting results_dir output
if [ -n "${batch_size:-}" ]; then
    echo "error: batch_size is the Trainer's, per GPU; this loop takes global_batch_size" >&2
    exit 2
fi
not_used "it is the Trainer's; this loop takes resume" TRAINING_MODEL_RESUME=None
not_used "it is the Trainer's; this loop is data parallel only" sharding sharding_parallel_config amp_master_grad \
    MP_DEGREE=1 SHARDING_DEGREE=1 "DP_DEGREE=$((TRAINERS_NUM * TRAINING_GPUS_PER_NODE))"
if [ -z "${results_dir:-}" ]; then
    not_used "it is the Trainer's; this loop takes output, a folder of runs" OUTPUT_DIR
fi
results_dir=${results_dir:-$default_output}
feature_path=${feature_path:-./data/fastdit_imagenet256}
if ! config_has global_batch_size; then global_batch_size=${global_batch_size:-256}; fi
if takes_default_steps "$@"; then max_steps=${max_steps:-7000000}; fi
num_workers=${num_workers:-8}
logging_steps=${logging_steps:-50}
save_steps=${save_steps:-5000}
resume=${resume:-auto}                                # auto: the newest checkpoint of this config in results_dir

if [ "$resume" = auto ]; then resumes "$@"; fi
launch "${LOG_DIR:-$results_dir/launch_log}" train_image_generation_notrainer.py \
    --config_file "$config_file" \
    --feature_path "$feature_path" \
    --results_dir "$results_dir" \
    ${global_batch_size:+--global_batch_size "$global_batch_size"} \
    --num_workers "$num_workers" \
    ${max_steps:+--max_steps "$max_steps"} \
    --log_every "$logging_steps" \
    --ckpt_every "$save_steps" \
    --resume "$resume" \
    ${image_size:+--image_size "$image_size"} \
    ${guidance_scale:+--guidance_scale "$guidance_scale"} \
    ${seed:+--global_seed "$seed"} \
    ${num_inference_steps:+--num_inference_steps "$num_inference_steps"} \
    ${image_logging_steps:+--image_logging_steps "$image_logging_steps"} \
    ${vae:+--vae "$vae"} \
    ${save_total_limit:+--save_total_limit "$save_total_limit"} \
    ${1:+--overriding} "$@"
