# What the numbered launch scripts share (POSIX sh, sourced): the interpreter, the processes a node, the launcher.
# Several nodes: the same TRAINERS_NUM and MASTER (host:port of one of them) on each; ranks are given out by the master.

if [ -z "${PYTHON:-}" ]; then
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then PYTHON=python
    elif [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python
    else PYTHON=python3
    fi
fi

count_gpus() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c '^GPU'
}

TRAINER_INSTANCES=${TRAINER_INSTANCES:-127.0.0.1}
TRAINERS_NUM=${TRAINERS_NUM:-1}                       # nodes
GPUS_FOUND=${GPUS_FOUND:-$(count_gpus || true)}
if [ "${GPUS_FOUND:-0}" -gt 0 ]; then PROCESSES_FOUND=$GPUS_FOUND; else PROCESSES_FOUND=1; fi
if [ -n "${GPUS:-}" ]; then PROCESSES_FOUND=$(echo "$GPUS" | tr ',' '\n' | grep -c .); fi  # GPUS=0,1: only these
TRAINING_GPUS_PER_NODE=${TRAINING_GPUS_PER_NODE:-$PROCESSES_FOUND}  # processes a node: its GPUs, else one

# Not set: the config's `training` section decides (config/*_XL_patch2.json: EMA, bfloat16 O1, recompute, fused attention).
# USE_AMP FP16_OPT_LEVEL recompute enable_xformers use_ema learning_rate weight_decay lr_scheduler_type warmup_steps
# max_grad_norm gradient_accumulation_steps

# launch LOG_DIR SCRIPT FLAGS...
launch() {
    log_dir=$1
    script=$2
    shift 2
    for word in "$@"; do
        case "$word" in -h | --help) exec "$PYTHON" "$script" --help ;; esac  # at once, and not into the launcher's log
    done
    # Both loops' switches, each only where its variable is set; the flags that follow win over them.
    set -- "$script" \
        ${gradient_accumulation_steps:+--gradient_accumulation_steps "$gradient_accumulation_steps"} \
        ${learning_rate:+--learning_rate "$learning_rate"} \
        ${weight_decay:+--weight_decay "$weight_decay"} \
        ${lr_scheduler_type:+--lr_scheduler_type "$lr_scheduler_type"} \
        ${warmup_steps:+--warmup_steps "$warmup_steps"} \
        ${max_grad_norm:+--max_grad_norm "$max_grad_norm"} \
        ${use_ema:+--use_ema "$use_ema"} \
        ${USE_AMP:+--bf16 "$USE_AMP"} \
        ${FP16_OPT_LEVEL:+--fp16_opt_level "$FP16_OPT_LEVEL"} \
        ${recompute:+--recompute "$recompute"} \
        ${enable_xformers:+--enable_xformers_memory_efficient_attention "$enable_xformers"} \
        "$@"
    set -- --nnodes "$TRAINERS_NUM" --nproc_per_node "$TRAINING_GPUS_PER_NODE" --log_dir "$log_dir" "$@"
    # A master is only needed between nodes; without one, several runs can share a machine.
    if [ "$TRAINERS_NUM" -gt 1 ] || [ -n "${MASTER:-}" ]; then
        set -- --master "${MASTER:-127.0.0.1:8080}" --ips "$TRAINER_INSTANCES" "$@"
    fi
    if [ -n "${GPUS:-}" ]; then set -- --gpus "$GPUS" "$@"; fi
    exec "$PYTHON" -u -m paddle.distributed.launch "$@"
}
