#!/usr/bin/env bash
# From nothing to a trained, exported and sampled class-conditional model on a CPU, in one command: see usage below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash quickstart.sh [--data digits|symbols|FOLDER] [--model DiT|SiT] [--loop trainer|notrainer] [--seed N]
                          [--output DIR] [--demo]

Sets up .venv if there is none, then: pictures -> latent features -> training -> a pipeline folder -> samples, a grid
PNG and a report. Three to four minutes on 2 CPU cores after the set-up with digits, more with other pictures.

  --data    digits: real handwritten ones, 32 pixels, and figures that say how good the samples are (default);
            symbols: colour pictures of ten symbols, 64 pixels; or FOLDER, your own pictures, a folder for each class:
            any sizes and formats, files that can't be read are left out and named, transparent ones get a white ground
  --model   DiT (diffusion, a DiTPipeline folder, DPM-Solver++; default) or SiT (transport, a SiTPipeline folder, ODE and SDE)
  --loop    which training loop: trainer (PaddleNLP's Trainer, default) or notrainer (a plain for loop)
  --seed    of the whole run (default 0)
  --output  folder for everything (default outputs/quickstart/<data>-<model>-<loop>-seed<N>); if it exists, a numbered
            one beside it
  --demo    at the end, open the model in the browser (web_demo.py); at once, if this quickstart has finished before

After Ctrl-C or a failure the same command goes on in the same folder: stages that are complete are not done again, and
training resumes its run. A finished folder is left as it is.
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

model=DiT loop=trainer seed=0 output="" data=digits demo=""
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --demo)
        demo=--demo
        shift
        ;;
    --model | --loop | --seed | --output | --data)
        [ $# -ge 2 ] || fail "$1 needs a value; see --help"
        case "$1" in
        --model) model=$2 ;;
        --loop) loop=$2 ;;
        --seed) seed=$2 ;;
        --output) output=$2 ;;
        --data) data=$2 ;;
        esac
        shift 2
        ;;
    *) fail "unknown option '$1'; accepted: --data, --model, --loop, --seed, --output, --demo, --help" ;;
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
name=$data settings="model $model, loop $loop, seed $seed"
case "$data" in
digits) ;;
symbols) settings+=", data symbols" ;;
*)
    [ -d "$data" ] || fail "--data $data: expected digits, symbols, or a folder; there is no such folder"
    [ -n "$(find -L "$data" -mindepth 2 -maxdepth 2 -type f -print -quit)" ] ||
        fail "--data $data: expected a folder for each class in it, with its pictures"
    data=$(cd "$data" && pwd -P)
    name=${data##*/}
    settings+=", data $data"
    ;;
esac

# Relative paths are the caller's.
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
script=$repo/quickstart.sh
repo=$repo/
if [ "$repo" = "$(pwd -P)/" ]; then repo=""; fi
wanted=${output:-outputs/quickstart/$name-$model-$loop-seed$seed}
case "$wanted" in /*) absolute=$wanted ;; *) absolute=$(pwd -P)/$wanted ;; esac
case "$absolute" in
"$data"/*) fail "--output $wanted: lies in $data, where the pictures are; give another folder" ;;
esac
bash "${repo}tools/setup_env.sh" $demo
python=${repo}.venv/bin/python

# The folder: a new one, or an unfinished one of these settings. Its quickstart.txt has the settings, then a line for each
# stage that is complete, and `# STAGE: N s`; at last "finished".
complete() { # complete FOLDER: a quickstart of these settings has finished there
    [ -f "$1/quickstart.txt" ] && [ "$(head -n 1 "$1/quickstart.txt")" = "$settings" ] &&
        grep -qx finished "$1/quickstart.txt"
}
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
open_demo() {
    echo
    echo "=== the model in the browser"
    exec "$python" "${repo}web_demo.py" --model_path "$output/pipeline" 9>&-
}
output=$wanted
number=2
while :; do
    if [ -n "$demo" ] && complete "$output"; then open_demo; fi
    if take "$output"; then break; fi
    output=$wanted-$number
    number=$((number + 1))
done
[ "$output" = "$wanted" ] || echo "this one works in $output"

# Ctrl-C goes to the running stage too, which saves what it can: bash runs a trap when the stage has ended.
signalled=0
trap 'signalled=130' INT
trap 'signalled=143' TERM

this_command() { # this_command OPTION...: the command line of this quickstart, to be pasted
    local folder=$output
    case "$folder" in
    /*) ;;
    *) folder=$PWD/$folder ;;
    esac
    local words=(bash "$script" --model "$model" --loop "$loop" --seed "$seed")
    [ "$data" = digits ] || words+=(--data "$data")
    words+=(--output "$folder" "$@")
    printf '%q ' "${words[@]}" | sed 's/ $//'
}

leave() { # leave CODE: say how to go on
    echo "to go on: $(this_command $demo)" >&2
    exit "$1"
}

stage() { # stage NAME COMMAND...: run it unless it is complete, note how long it took
    local name=$1 start=$SECONDS status=0
    shift
    echo
    if tail -n +2 "$output/quickstart.txt" | grep -qxF "$name"; then
        echo "=== $name: complete already"
        return
    fi
    echo "=== $name"
    # The next command of a stage is the next stage.
    [ $signalled -ne 0 ] || SAY_NEXT=0 "$@" || status=$?
    [ $signalled -ne 0 ] || [ $status -ne 0 ] || printf '%s\n# %s: %d s\n' "$name" "$name" $((SECONDS - start)) >&9
    if [ $signalled -ne 0 ]; then
        echo "the stage '$name' was interrupted" >&2
        leave $signalled
    elif [ $status -eq 75 ]; then # stopped on request, and saved
        leave 75
    elif [ $status -ne 0 ]; then
        echo "error: the stage '$name' failed, see above; what it wrote is in $output" >&2
        leave 1
    fi
}

# Two minutes of training that make good samples; the model, its EMA and the schedule are in the config.
device=cpu batch_size=64 max_steps=2000 learning_rate=2e-3
save_steps=500       # where training goes on after a crash; Ctrl-C saves
preview_steps=500    # samples on the way, for the report
guidance_scale=1.0   # none: guidance makes the samples of a class alike
case $model in
DiT) demo_script=${repo}infer_demo_dit.py num_inference_steps=25 drawing=(--scheduler dpm) ;;
SiT) demo_script=${repo}infer_demo_sit.py num_inference_steps=50 drawing=(--sampler ode) ;;
esac

train_vae() {
    [ ! -e "$output/vae" ] || echo "an interrupted training of the autoencoder can't go on: it starts anew"
    rm -rf "$output/vae"
    "$python" "${repo}tools/train_vae.py" --data_path "$data" --output "$output/vae" --image_size 64 --on_error skip \
        --background white --init "${repo}assets/colour_vae" --seed "$seed"
}

extract() { # extract FLAG...: those that differ between the data sets
    "$python" "${repo}tools/extract_features.py" --feature_path "$output/features" --image_size $image_size \
        --vae "$vae" --batch_size 50 --seed "$seed" --device $device "$@"
}

train_trainer() {
    "$python" "${repo}train_image_generation_trainer.py" --do_train \
        --config_file "$config" --feature_path "$output/features" --output "$output/train" ${length[@]+"${length[@]}"} \
        --logging_steps 100 --save_steps $save_steps --image_logging_steps $preview_steps --num_workers 0 \
        --seed "$seed" --image_size $image_size --device $device --disable_tqdm False
}

train_notrainer() {
    "$python" "${repo}train_image_generation_notrainer.py" \
        --config_file "$config" --feature_path "$output/features" --output "$output/train" ${length[@]+"${length[@]}"} \
        --logging_steps 100 --save_steps $save_steps --image_logging_steps $preview_steps --num_workers 0 --resume auto \
        --seed "$seed" --image_size $image_size --device $device
}

case $data in
digits)
    image_size=32 vae=${repo}assets/digits_vae config=${repo}config/${model}_digits.json
    stage digits "$python" "${repo}tools/prepare_digits.py" --output "$output/digits"
    stage features extract --data_path "$output/digits/train"
    ;;
symbols)
    image_size=64 vae=${repo}assets/colour_vae config=${repo}config/${model}_symbols.json
    stage symbols "$python" "${repo}tools/prepare_symbols.py" --output "$output/symbols"
    stage features extract --data_path "$output/symbols"
    ;;
*)
    image_size=64 vae=$output/vae config=$output/config.json device=auto
    stage autoencoder train_vae
    stage features extract --data_path "$data" --on_error skip --background white
    stage config "$python" "${repo}tools/make_config.py" --feature_path "$output/features" --image_size $image_size \
        --model "$model" --size XS --max_steps $max_steps --output "$config" --overwrite
    ;;
esac

length=(--max_steps $max_steps --learning_rate $learning_rate)
case "$data $loop" in
"digits "* | "symbols "*)
    case $loop in
    trainer) length=(--per_device_train_batch_size $batch_size "${length[@]}") ;;
    notrainer) length=(--global_batch_size $batch_size "${length[@]}") ;;
    esac
    ;;
*) length=() ;; # the config has them
esac
stage training "train_$loop"
checkpoint=""
while read -r folder; do # in the order of the steps
    if [ -f "$folder/ema_state.pdparams" ]; then checkpoint=$folder; fi
done < <(printf '%s\n' "$output"/train/checkpoint-* "$output"/train/*/checkpoints/* | sort -V)
[ -n "$checkpoint" ] || fail "training left no checkpoint in $output/train"
case $model in
DiT) converter=tools/convert_dit_to_ppdiffusers.py options=(--scheduler dpm) ;;
SiT) converter=tools/convert_sit_to_ppdiffusers.py options=() ;;
esac
stage export "$python" "$repo$converter" --model_path "$checkpoint" --vae "$vae" \
    --id2label "$output/features/imagenet${image_size}_classes.json" ${options[@]+"${options[@]}"} \
    --output "$output/pipeline" --card_samples 2 --overwrite

evaluate() { # evaluate NAME OPTION...
    local name=$1
    shift
    stage "$name" "$python" "${repo}tools/evaluate_digits.py" --model_path "$output/pipeline" --digits "$output/digits" \
        --num_images 500 --guidance_scale $guidance_scale --num_inference_steps $num_inference_steps \
        --seed "$seed" "$@"
}
case "$data $model" in
"digits DiT")
    evaluate evaluation --grid "$output/grid.png" --output "$output/report.json"
    ;;
"digits SiT")
    evaluate "samples ODE" --sampler ode --grid "$output/grid.png" --output "$output/report.json"
    evaluate "samples SDE" --sampler sde --grid "$output/grid-sde.png" --output "$output/report-sde.json"
    ;;
*)
    stage samples "$python" "$demo_script" --model_path "$output/pipeline" "${drawing[@]}" \
        --num_inference_steps $num_inference_steps --guidance_scale 2 --images_per_class 6 --seed "$seed" \
        --output "$output/grid.png" --overwrite
    ;;
esac
stage report "$python" "${repo}tools/report.py" "$output/train" --samples "$output/grid.png" --output "$output/report.html"

echo finished >&9
exec 9>&-
echo
echo "=== done"
awk -F': ' '/^# / { seconds = $2 + 0; total += seconds; printf "%-12s %4d s\n", substr($1, 3), seconds }
    END { printf "%-12s %4d s\n", "total", total }' "$output/quickstart.txt"
echo "grid:         $output/grid.png (one row per class)"
echo "report:       $output/report.html (curves, settings, samples; opens in a browser)"
case "$data $model" in
"digits DiT") echo "figures:      $output/report.json" ;;
"digits SiT") echo "figures:      $output/report.json; with SDE: $output/grid-sde.png, $output/report-sde.json" ;;
esac
case $model in
DiT) echo "pipeline:     $output/pipeline (ppdiffusers.DiTPipeline.from_pretrained)" ;;
SiT) echo "pipeline:     $output/pipeline (sampling.SiTPipeline.from_pretrained)" ;;
esac
echo "checkpoint:   $checkpoint"
if [ -n "$demo" ]; then open_demo; fi
printf 'next: %q %q --model_path %q --guidance_scale 1.5 --images_per_class 4\n' "$python" "$demo_script" "$output/pipeline"
echo "next: $(this_command --demo)"
printf 'next: %q --logdir %q --language en\n' "${repo}.venv/bin/visualdl" "$output/train"
