#!/usr/bin/env bash
# From nothing to a trained, exported and sampled class-conditional model on a CPU, in one command: see usage below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash quickstart.sh [--model DiT|SiT] [--loop trainer|notrainer] [--seed N] [--output DIR]

Sets up .venv if there is none, then: real handwritten digits -> latent features -> training -> a pipeline folder ->
samples, a grid PNG and figures that say how good they are. Three to four minutes on 2 CPU cores after the set-up.

  --model   DiT (diffusion, a DiTPipeline folder, DPM-Solver++; default) or SiT (transport, a SiTPipeline folder, ODE and SDE)
  --loop    which training loop: trainer (PaddleNLP's Trainer, default) or notrainer (a plain for loop)
  --seed    of the whole run (default 0)
  --output  folder for everything (default quickstart_output/<model>-<loop>-seed<N>); if it exists, a numbered one beside it

After Ctrl-C or a failure the same command goes on in the same folder: stages that are complete are not done again, and
training resumes its run. A finished folder is left as it is.
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

model=DiT loop=trainer seed=0 output=""
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --model | --loop | --seed | --output)
        [ $# -ge 2 ] || fail "$1 needs a value; see --help"
        case "$1" in
        --model) model=$2 ;;
        --loop) loop=$2 ;;
        --seed) seed=$2 ;;
        --output) output=$2 ;;
        esac
        shift 2
        ;;
    *) fail "unknown option '$1'; accepted: --model, --loop, --seed, --output, --help" ;;
    esac
done
case "$model" in
DiT | SiT) ;;
*) fail "--model $model: expected DiT or SiT" ;;
esac
case "$loop" in
trainer | notrainer) ;;
*) fail "--loop $loop: expected trainer or notrainer" ;;
esac
case "$seed" in
"" | *[!0-9]* | ??????????*) fail "--seed $seed: expected an integer from 0 to 999999999" ;;
esac

# A relative --output is the caller's; everything else happens in the repository.
if [ -n "$output" ]; then
    case "$output" in
    /*) ;;
    *) output=$PWD/$output ;;
    esac
fi
cd "$(dirname "${BASH_SOURCE[0]}")"
bash tools/setup_env.sh
python=.venv/bin/python

# The folder: a new one, or an unfinished one of these settings. Its quickstart.txt has the settings, then a line for each
# stage that is complete, at last "finished".
settings="model $model, loop $loop, seed $seed"
take() { # take FOLDER: work there; fails if it is something else, finished, or another quickstart is at work in it
    local notes=$1/quickstart.txt
    if [ -e "$1" ]; then
        [ -f "$notes" ] && [ "$(head -n 1 "$notes")" = "$settings" ] && ! grep -qx finished "$notes" || return 1
    fi
    mkdir -p "$1" || exit 2
    exec 9>>"$notes" || exit 2 # open, and so locked, as long as this script or a stage of it runs
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "note: another quickstart is at work in $1" >&2
        return 1
    fi
    [ -s "$notes" ] || echo "$settings" >&9
}
wanted=${output:-quickstart_output/$model-$loop-seed$seed}
output=$wanted
number=2
until take "$output"; do
    output=$wanted-$number
    number=$((number + 1))
done

# Two minutes of training that make good samples; the model, its EMA and the schedule are in the config.
config=config/${model}_digits.json
batch_size=64
max_steps=2000
save_steps=500 # where training goes on after a crash; Ctrl-C saves
learning_rate=2e-3
num_images=500
guidance_scale=1.0 # none: guidance makes the samples of a class alike
case $model in
DiT) num_inference_steps=25 ;; # of DPM-Solver++
SiT) num_inference_steps=50 ;;
esac

# Ctrl-C goes to the running stage too, which saves what it can: bash runs a trap when the stage has ended.
signalled=0
trap 'signalled=130' INT
trap 'signalled=143' TERM

leave() { # leave CODE: say how to go on
    local folder=$output
    case "$folder" in
    /*) ;;
    *) folder=$PWD/$folder ;;
    esac
    printf 'to go on: bash %q --model %s --loop %s --seed %s --output %q\n' \
        "$PWD/quickstart.sh" "$model" "$loop" "$seed" "$folder" >&2
    exit "$1"
}

names=() times=()
stage() { # stage NAME COMMAND...: run it unless it is complete, remember how long it took
    local name=$1 start=$SECONDS status=0
    shift
    echo
    if tail -n +2 "$output/quickstart.txt" | grep -qxF "$name"; then
        echo "=== $name: complete already"
        return
    fi
    echo "=== $name"
    [ $signalled -ne 0 ] || "$@" || status=$?
    [ $signalled -ne 0 ] || [ $status -ne 0 ] || echo "$name" >&9
    if [ $signalled -ne 0 ]; then
        echo "the stage '$name' was interrupted" >&2
        leave $signalled
    elif [ $status -eq 75 ]; then # stopped on request, and saved
        leave 75
    elif [ $status -ne 0 ]; then
        echo "error: the stage '$name' failed, see above; what it wrote is in $output" >&2
        leave 1
    fi
    names+=("$name")
    times+=($((SECONDS - start)))
}

train_trainer() {
    $python train_image_generation_trainer.py --do_train \
        --config_file $config --feature_path "$output/features" --output_dir "$output/train" \
        --per_device_train_batch_size $batch_size --max_steps $max_steps --learning_rate $learning_rate \
        --logging_steps 100 --save_steps $save_steps --dataloader_num_workers 0 \
        --seed "$seed" --resolution 32 --device cpu --disable_tqdm False
}

train_notrainer() {
    $python train_image_generation_notrainer.py \
        --config_file $config --feature_path "$output/features" --results_dir "$output/train" \
        --global_batch_size $batch_size --max_steps $max_steps --learning_rate $learning_rate \
        --log_every 100 --ckpt_every $save_steps --num_workers 0 --resume auto \
        --global_seed "$seed" --image_size 32 --device cpu
}

total=$SECONDS
stage digits $python tools/prepare_digits.py --output "$output/digits"
stage features $python tools/extract_features.py --data_path "$output/digits/train" --features_path "$output/features" \
    --image_size 32 --vae assets/digits_vae --batch_size 50 --seed "$seed" --device cpu
stage training "train_$loop"
checkpoint=""
while read -r folder; do # in the order of the steps
    if [ -f "$folder/ema_state.pdparams" ]; then checkpoint=$folder; fi
done < <(printf '%s\n' "$output"/train/checkpoint-* "$output"/train/*/checkpoints/* | sort -V)
[ -n "$checkpoint" ] || fail "training left no checkpoint in $output/train"
case $model in
DiT) converter=tools/convert_dit_to_ppdiffusers.py options="--scheduler dpm" ;;
SiT) converter=tools/convert_sit_to_ppdiffusers.py options="" ;;
esac
# shellcheck disable=SC2086
stage export $python $converter --model_weights "$checkpoint" --vae_model assets/digits_vae \
    --id2label "$output/features/imagenet32_classes.json" $options --checkpoint_path "$output/pipeline" --overwrite
evaluate() { # evaluate NAME OPTION...
    local name=$1
    shift
    stage "$name" $python tools/evaluate_digits.py --pipeline "$output/pipeline" --digits "$output/digits" \
        --num_images $num_images --guidance_scale $guidance_scale --num_inference_steps $num_inference_steps \
        --seed "$seed" "$@"
}
case $model in
DiT)
    evaluate evaluation --grid "$output/grid.png" --report "$output/report.json"
    ;;
SiT)
    evaluate "samples ODE" --sampler ode --grid "$output/grid.png" --report "$output/report.json"
    evaluate "samples SDE" --sampler sde --grid "$output/grid-sde.png" --report "$output/report-sde.json"
    ;;
esac

echo finished >&9
echo
echo "=== done"
for i in "${!names[@]}"; do
    printf '%-12s %4d s\n' "${names[$i]}" "${times[$i]}"
done
printf '%-12s %4d s\n' total $((SECONDS - total))
log=$(find "$output/train" -name 'vdlrecords*' -printf '%h\n' -quit)
echo "grid:         $output/grid.png (one row per digit)"
echo "figures:      $output/report.json"
case $model in
DiT) echo "pipeline:     $output/pipeline (ppdiffusers.DiTPipeline.from_pretrained)" ;;
SiT)
    echo "with SDE:     $output/grid-sde.png, $output/report-sde.json"
    echo "pipeline:     $output/pipeline (sampling.SiTPipeline.from_pretrained)"
    ;;
esac
echo "checkpoint:   $checkpoint"
echo "VisualDL log: ${log:-none} (.venv/bin/visualdl --logdir $output/train --language en)"
