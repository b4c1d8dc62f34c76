# The Trainer's launch line (POSIX sh, sourced by N_run_train_*_trainer.sh, which sets config_file and default_output).

. "${repo}tools/launch_common.sh"

one_setting OUTPUT_DIR output output_dir
not_used "it is the hand-written loop's; the Trainer takes batch_size, per GPU" global_batch_size
not_used "it is the hand-written loop's; the Trainer takes TRAINING_MODEL_RESUME" resume
if [ -z "${OUTPUT_DIR:-}" ]; then
    not_used "it is the hand-written loop's; the Trainer takes output, the folder of the run itself" results_dir
fi
OUTPUT_DIR=${OUTPUT_DIR:-$default_output}
TRAINING_MODEL_RESUME=${TRAINING_MODEL_RESUME:-None}  # a checkpoint; None: the newest in OUTPUT_DIR, if there is one
MP_DEGREE=${MP_DEGREE:-1}                             # tensor_parallel_degree
DATA_RANKS=$((TRAINERS_NUM * TRAINING_GPUS_PER_NODE / MP_DEGREE))
if [ -n "${sharding:-}" ]; then SHARDING_DEGREE=${SHARDING_DEGREE:-$DATA_RANKS}; fi
SHARDING_DEGREE=${SHARDING_DEGREE:-1}                 # sharding_parallel_degree
DP_DEGREE=${DP_DEGREE:-$((DATA_RANKS / SHARDING_DEGREE))}

feature_path=${feature_path:-./data/fastdit_imagenet256}
if ! config_has global_batch_size; then batch_size=${batch_size:-32}; fi # per GPU
if takes_default_steps "$@"; then max_steps=${max_steps:-7000000}; fi
if ! config_has seed; then seed=${seed:-0}; fi
num_workers=${num_workers:-8}
logging_steps=${logging_steps:-50}
save_steps=${save_steps:-5000}
image_logging_steps=${image_logging_steps:--1}

if [ "$TRAINING_MODEL_RESUME" = None ] || [ "$TRAINING_MODEL_RESUME" = auto ]; then resumes "$@"; fi
launch "${LOG_DIR:-$OUTPUT_DIR/launch_log}" train_image_generation_trainer.py \
    --do_train \
    --feature_path "$feature_path" \
    --output_dir "$OUTPUT_DIR" \
    --resume_from_checkpoint "$TRAINING_MODEL_RESUME" \
    ${batch_size:+--per_device_train_batch_size "$batch_size"} \
    ${max_steps:+--max_steps "$max_steps"} \
    --image_logging_steps "$image_logging_steps" \
    --logging_dir "$OUTPUT_DIR/tb_log" \
    --logging_steps "$logging_steps" \
    --save_steps "$save_steps" \
    --save_total_limit "${save_total_limit:-50}" \
    --dataloader_num_workers "$num_workers" \
    --vae_name_or_path "${vae:-None}" \
    --config_file "$config_file" \
    --num_inference_steps "${num_inference_steps:-25}" \
    ${seed:+--seed "$seed"} \
    --dp_degree "$DP_DEGREE" \
    --tensor_parallel_degree "$MP_DEGREE" \
    --sharding_parallel_degree "$SHARDING_DEGREE" \
    ${sharding:+--sharding "$sharding"} \
    ${sharding_parallel_config:+--sharding_parallel_config "$sharding_parallel_config"} \
    ${image_size:+--resolution "$image_size"} \
    ${guidance_scale:+--guidance_scale "$guidance_scale"} \
    ${amp_master_grad:+--amp_master_grad "$amp_master_grad"} \
    --pipeline_parallel_degree 1 \
    --sep_parallel_degree 1 \
    ${1:+--overriding} "$@"
