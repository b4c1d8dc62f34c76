# Finds the interpreter and the processes a node, and launches (POSIX sh, sourced by the numbered launch scripts, which
# set `repo`: this repository's path with a slash, or nothing where the caller is in it).
# On several nodes set the same TRAINERS_NUM and MASTER (host:port of one of them) on each; the master numbers the ranks.

if [ -z "${PYTHON:-}" ]; then
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then PYTHON=python
    elif [ -x "${repo}.venv/bin/python" ]; then PYTHON=${repo}.venv/bin/python
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

# not_used WHY VARIABLE...: ends with one line if a variable is set that this script does not take. For VARIABLE=VALUE
# that value is accepted, because it asks for nothing else than the script does.
not_used() {
    why=$1
    shift
    for entry in "$@"; do
        name=${entry%%=*}
        eval "given=\${$name:-}"
        if [ -n "$given" ] && [ "$entry" != "$name=$given" ]; then
            echo "error: $name=$given is not used by this script: $why" >&2
            exit 2
        fi
    done
}

# one_setting VARIABLE OTHER...: takes a setting by any of these names; two of them with two values end with one line.
one_setting() {
    kept=$1
    shift
    for other in "$@"; do
        eval "value=\${$kept:-} given=\${$other:-}"
        if [ -n "$value" ] && [ -n "$given" ] && [ "$value" != "$given" ]; then
            echo "error: $kept=$value and $other=$given are the same setting: give one" >&2
            exit 2
        fi
        if [ -n "$given" ]; then eval "$kept=\$given"; fi
    done
}

one_setting image_size resolution
one_setting seed global_seed
one_setting vae vae_name_or_path
one_setting num_workers dataloader_num_workers
one_setting learning_rate lr
one_setting guidance_scale cfg_scale
one_setting logging_steps log_every
one_setting save_steps ckpt_every

# config_has KEY...: whether the config's JSON sets one of these keys. Then the script's own default gives way to it.
config_has() {
    for key in "$@"; do
        if grep -qs "\"$key\"[[:space:]]*:" "$config_file"; then return 0; fi
    done
    return 1
}

# takes_default_steps FLAGS...: whether the script's max_steps counts: neither the config nor a flag says how long to train.
takes_default_steps() {
    if config_has max_steps epochs; then return 1; fi
    for word in "$@"; do
        case "$word" in --epochs* | --num_train_epochs*) return 1 ;; esac
    done
}

# Flags that a variable of the same name gives, or FLAG=VARIABLE. Not set: the config's `training` section decides
# (config/*_XL_patch2.json: EMA, bfloat16 O1, recompute, fused attention).
CONFIG_FLAGS="gradient_accumulation_steps learning_rate weight_decay lr_scheduler_type warmup_steps max_grad_norm use_ema
    bf16=USE_AMP fp16_opt_level=FP16_OPT_LEVEL recompute enable_xformers_memory_efficient_attention=enable_xformers"

# resumes FLAGS...: notes that the same command goes on where a run was stopped, unless a flag chooses otherwise.
same_command=
resumes() {
    same_command=1
    for word in "$@"; do
        case "$word" in --resume* | --overwrite_output_dir*) same_command= ;; esac
    done
}

# signal_processes SIGNAL: sends it to the launcher's children, which train; ends the launcher if it has none yet. The
# launcher is paused meanwhile, because a child that it started just then would be left behind, training.
signal_processes() {
    found=
    if [ -z "$launcher" ]; then return; fi
    kill -s STOP "$launcher" 2>/dev/null || return 0
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        line=
        { read -r line <"/proc/$launcher/stat"; } 2>/dev/null || true
        case "$line" in *") T "* | *") Z "* | "") break ;; esac
        sleep 0.1 # it may be in the middle of a fork
    done
    for stat in /proc/[0-9]*/stat; do
        { read -r line <"$stat"; } 2>/dev/null || continue
        parent=${line##*) ? }
        if [ "${parent%% *}" = "$launcher" ]; then
            pid=${stat#/proc/}
            kill -s "$1" "${pid%/stat}" 2>/dev/null || continue
            found=1
        fi
    done
    if [ -z "$found" ]; then kill -s KILL "$launcher" 2>/dev/null || true; fi
    kill -s CONT "$launcher" 2>/dev/null || true
}

# stop SIGNAL NAME CODE: lets the training processes save and end. At the second call they end at once.
stop() {
    interrupted=1
    if [ -z "$stopped_by" ]; then
        stopped_by=$2 stopped_code=$3
        signal_processes "$1"
        if [ -n "$found" ]; then echo "$2: finishing the step, then saving; once more leaves at once" >&2; fi
    else
        signal_processes INT
        signal_processes TERM # for those that don't train yet
    fi
}

# launch LOG_DIR SCRIPT FLAGS...
launch() {
    log_dir=$1
    script=$repo$2
    shift 2
    for word in "$@"; do
        case "$word" in -h | --help) exec "$PYTHON" "$script" --help ;; esac  # at once, and not into the launcher's log
    done
    set -- --disable_tqdm "${disable_tqdm:-True}" "$@"  # the flags that follow win over these
    for pair in $CONFIG_FLAGS; do
        eval "given=\${${pair#*=}:-}"
        if [ -n "$given" ]; then set -- "--${pair%%=*}" "$given" "$@"; fi
    done
    for name in TRAINING_PYTHON enable_tensorboard; do # in PaddleMIX's README
        eval "given=\${$name:-}"
        if [ -n "$given" ]; then
            echo "note: $name is not used: PYTHON chooses the interpreter, and a VisualDL log is always written" >&2
        fi
    done
    # Check the flags here, so that a mistake is one line, and not one in the log of each process.
    "$PYTHON" "${repo}tools/check_flags.py" "$script" "$@" >/dev/null || exit $?
    set -- --log_level WARNING --nnodes "$TRAINERS_NUM" --nproc_per_node "$TRAINING_GPUS_PER_NODE" \
        --log_dir "$log_dir" "$script" "$@"
    export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore:No ccache found}" # of Paddle's import
    # A master is only needed between nodes; without one, several runs can share a machine.
    if [ "$TRAINERS_NUM" -gt 1 ] || [ -n "${MASTER:-}" ]; then
        set -- --master "${MASTER:-127.0.0.1:8080}" --ips "$TRAINER_INSTANCES" "$@"
    fi
    if [ -n "${GPUS:-}" ]; then set -- --gpus "$GPUS" "$@"; fi
    set -- "$PYTHON" -u -m paddle.distributed.launch "$@"
    if ! command -v setsid >/dev/null || ! [ -r /proc/self/stat ]; then exec "$@"; fi # not Linux

    echo "starting $TRAINING_GPUS_PER_NODE process(es); their logs: $log_dir/workerlog.*" >&2

    # The launcher answers a signal with SIGTERM to all, SIGKILL after thirty seconds, and an exit code that says nothing.
    # So it gets a session of its own, and Ctrl-C and others go from here to the training processes, which save and end
    # with code 75.
    log=$log_dir/workerlog.0
    if [ -f "$log" ]; then logged=$(wc -c <"$log"); else logged=0; fi
    launcher='' stopped_by='' stopped_code='' code=127
    trap 'stop INT Ctrl-C 130' INT
    trap 'stop TERM SIGTERM 143' TERM
    trap 'stop TERM SIGHUP 129' HUP
    setsid "$@" &
    launcher=$!
    if [ -n "$stopped_by" ]; then signal_processes TERM; fi # in the moment before
    set +e # because dash takes a signal's trap just before `wait` for a command that failed
    while :; do # a signal ends `wait`, not the launcher
        interrupted=
        wait "$launcher" 2>/dev/null # some shells tell of a killed process there
        status=$?
        if [ "$status" != 127 ]; then code=$status; fi
        if [ -z "$interrupted" ]; then break; fi
    done
    trap - INT TERM HUP

    # What rank 0 said of the end stands in its log.
    said=$(tail -c +$((logged + 1)) "$log" 2>/dev/null | grep '^stopped by ' | tail -n 1) || said=
    if [ -n "$said" ]; then
        if [ -n "$stopped_by" ]; then said="stopped by $stopped_by after ${said#stopped by * after }"; fi
        if [ -n "$same_command" ]; then said="${said%; *}; the same command goes on"; fi
        echo "$said"
        exit 75
    fi
    # The launcher's own end, and that of a process that was ended before it could save.
    case "$stopped_by $code" in ?*" 15" | ?*" 137" | ?*" 143" | ?*" 241" | ?*" 254") code=$stopped_code ;; esac
    if [ -n "$stopped_by" ] && [ "$code" = "$stopped_code" ]; then
        echo "ended by $stopped_by; nothing was saved since the last checkpoint, if there is one" >&2
    fi
    exit "$code"
}
