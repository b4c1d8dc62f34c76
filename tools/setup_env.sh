#!/usr/bin/env bash
# Make .venv in the repository's root with everything the project needs; do nothing when it is there already.
#
#     bash tools/setup_env.sh            make or update .venv
#     bash tools/setup_env.sh --demo     the same, and what web_demo.py needs besides
#     bash tools/setup_env.sh --print    only say what would be installed
#
# From the environment:
#     PYTHON            the Python to make .venv with (3.10 to 3.13; for Paddle 2.6 to 3.12); default: python3, or the
#                       first that fits
#     PADDLE_PACKAGE    default: paddlepaddle, or paddlepaddle-gpu where an NVIDIA driver answers, at the pinned version.
#                       paddlepaddle==2.6.2 and paddlepaddle-gpu==2.6.2 have pins of their own. What was asked for once
#                       stays until something else is asked for
#     PADDLE_INDEX_URL  where paddlepaddle-gpu comes from; default: Paddle's own index, CUDA 12.6, or CUDA 12.9 for a GPU
#                       of compute capability 10.0 or more; for 2.6: PyPI
#     VENV_DIR          the folder of the environment; default: .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV_DIR:-.venv}
stamp=$venv/installed.txt # what this script has put into .venv: written last

say() { echo "setup: $*"; }
fail() {
    echo "error: $*" >&2
    exit 2
}

case "${1:-}" in
"" | --demo | --print) ;;
-h | --help)
    echo 'usage: bash tools/setup_env.sh [--demo | --print]'
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' tools/setup_env.sh
    exit 0
    ;;
*) fail "tools/setup_env.sh: unknown argument '$1'; it takes none, --demo, --print or --help" ;;
esac

# Add to .venv what web_demo.py needs: packages that change none of the others, so that nothing is installed anew.
if [ "${1:-}" = --demo ]; then
    bash tools/setup_env.sh
    if cmp -s constraints-demo.txt $venv/installed-demo.txt; then exit 0; fi
    say "installing Gradio for web_demo.py into $venv (about 250 MB); details in $venv/pip-demo.log"
    $venv/bin/python -m pip --disable-pip-version-check --no-input install --no-deps --no-compile --progress-bar off \
        -r constraints-demo.txt >$venv/pip-demo.log 2>&1 ||
        fail "pip could not install everything: see the end of $venv/pip-demo.log, then run this again"
    $venv/bin/python -c 'import gradio' >>$venv/pip-demo.log 2>&1 ||
        fail "Gradio does not import: see the end of $venv/pip-demo.log"
    cp constraints-demo.txt $venv/installed-demo.txt
    say "done: .venv/bin/python web_demo.py --help"
    command -v chromium chromium-browser google-chrome >/dev/null ||
        say "its test drives a browser, which is not here: sudo apt-get install chromium"
    exit 0
fi

# Choose Paddle: what PADDLE_PACKAGE names, or has named before; else the CPU build, unless an NVIDIA driver answers.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+\.[0-9]+' |
    sort -V | tail -1) || true # of the newest GPU, such as 8.6; empty where none is known
capability_is_at_least() { [ -n "$capability" ] && [ "${capability%.*}" -ge "$1" ]; }
asked=${PADDLE_PACKAGE:-}
index_mark=${PADDLE_INDEX_URL+" (index asked for)"}
was="" # the stamp's first line: "# PACKAGE[ from INDEX][ (asked for)][ (index asked for)]"
if [ -f $stamp ]; then
    was=$(head -n 1 $stamp)
    if [ -z "$asked" ]; then
        asked=$(sed -nE 's/^# ([^ ]+)( from [^ ]+)? \(asked for\).*/\1/p' <<<"$was")
        if [ -z "$index_mark" ] && [ "$was" != "${was% (index asked for)}" ]; then
            index_mark=" (index asked for)"
            PADDLE_INDEX_URL=$(sed -nE 's/^# [^ ]+( from ([^ ]+))? .*/\2/p' <<<"$was")
        fi
    fi
fi
constraints=constraints.txt newest_python=13
case "$asked" in
*==2.6.*) constraints=constraints-paddle26.txt newest_python=12 ;;
esac
if [ "$asked" = "${asked#paddlepaddle-gpu==2.6.}" ]; then
    cuda=cu126
    if capability_is_at_least 10; then cuda=cu129; fi
    default_index=https://www.paddlepaddle.org.cn/packages/stable/$cuda/
else
    default_index="" # PyPI
    ! capability_is_at_least 9 ||
        fail "$asked has no code for this GPU's compute capability $capability: it ends at 8.9; take Paddle 3, see docs/install.md"
fi

# Choose the Python: the one .venv has, or $PYTHON, or the first of the usual names that Paddle has wheels for.
supported() {
    "$1" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest_python))" >/dev/null 2>&1
}
pythons="Python 3.10 to 3.$newest_python${asked:+, which $asked needs}"
if [ -d $venv ]; then
    python=$venv/bin/python
    supported $python || fail "$venv has no working $pythons: move it away and run this again"
elif [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
    supported "$python" || fail "PYTHON=$PYTHON: not a working $pythons"
else
    for python in python3 python3.12 python3.11 python3.10 python3.13 none; do
        if supported $python; then break; fi
    done
    [ $python != none ] || fail "no $pythons found: install one (sudo apt-get install python3), or set PYTHON"
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$version" = 3.13 ]; then constraints=constraints-py313.txt; fi

pinned=$(sed -n 's/^paddlepaddle==\([^ ;]*\).*/\1/p' $constraints)
if [ -n "$asked" ]; then
    paddle=$asked
elif nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; then
    paddle=paddlepaddle-gpu==$pinned
    [ -z "$capability" ] || capability_is_at_least 7 ||
        say "Paddle 3 may have no code for compute capability $capability; paddlepaddle-gpu==2.6.2 has it from 6.1 on"
else
    paddle=paddlepaddle==$pinned
fi
index=""
case "$paddle" in
paddlepaddle-gpu*) index=${PADDLE_INDEX_URL-$default_index} ;;
esac

# The packages to install: every pin but Paddle's, and but those that ppdiffusers and paddlenlp ask for and never import
# here: ligo-segments and onnxoptimizer need a compiler, paddle2onnx is for export. opencv-python needs a desktop's
# libGL; opencv-python-headless is the same cv2 without windows.
packages=$(sed -E -e '/^(#|paddlepaddle==|ligo-segments==|onnxoptimizer==|paddle2onnx==)/d' \
    -e 's/^opencv-python==/opencv-python-headless==/' $constraints)
origin="# $paddle${index:+ from $index}${asked:+ (asked for)}$index_mark"
wanted="$origin
$packages"

if [ "${1:-}" = --print ]; then
    say "$python is Python $version"
    say "$paddle${index:+ from $index}"
    say "requirements.txt and requirements-dev.txt as pinned in $constraints"
    exit 0
fi
# The Python of .venv then runs Paddle's matrix products at full speed whatever starts it: see runtime/machine.py.
set_processor() {
    local line='import os, runpy, sys; machine = os.path.join(os.path.dirname(sys.prefix), "runtime", "machine.py")'
    line+='; os.path.isfile(machine) and runpy.run_path(machine)["set_mkl_cpu_type"]()'
    local file=$venv/lib/python$version/site-packages/paddle_processor.pth
    [ "$(cat $file 2>/dev/null)" = "$line" ] || echo "$line" 2>/dev/null >$file || true # .venv may be another user's
}
installed() { [ -f $stamp ] && [ "$(cat $stamp)" = "$wanted" ] && set_processor; }
if installed; then exit 0; fi

# Ask Paddle's own index for an answer before anything is changed: many networks do not reach it.
answers() {
    "$python" - "$1" 2>/dev/null <<'END'
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=20)
except urllib.error.HTTPError:
    pass  # an answer
END
}
if [ -n "$index" ] && [ "$index" = "$default_index" ] && ! answers "$index"; then
    other="PyPI's newest, 2.6.2, has no code for this GPU's compute capability $capability"
    capability_is_at_least 9 ||
        other="PyPI has 2.6.2, which needs CUDA 11.8 and cuDNN 8.6: PADDLE_PACKAGE=paddlepaddle-gpu==2.6.2 bash $0"
    fail "$index does not answer; set PADDLE_INDEX_URL to a mirror of it, or PADDLE_PACKAGE=paddlepaddle==$pinned for the CPU. $other"
fi

# One set-up at a time: a second call waits for the first, and finds its work done.
if command -v flock >/dev/null; then
    exec 9<tools/setup_env.sh
    flock 9
    if installed; then exit 0; fi
fi

# System packages: Debian keeps Python's venv apart, and Paddle is linked to libgomp.
missing=()
if [ ! -d $venv ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
fi
"$python" -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || missing+=(libgomp1)
if [ ${#missing[@]} -gt 0 ]; then
    ask="system packages are missing: run 'sudo apt-get install ${missing[*]}', then this again"
    sudo=""
    if [ "$(id -u)" != 0 ]; then
        sudo="sudo -n"
        $sudo true 2>/dev/null || fail "$ask"
    fi
    say "installing system packages with ${sudo:+$sudo }apt-get: ${missing[*]}"
    if ! { $sudo apt-get update -qq &&
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
        >/dev/null; then
        fail "$ask"
    fi
fi

if [ ! -d $venv ]; then
    say "making $venv with $python (Python $version)"
    "$python" -m venv $venv || { rm -rf $venv; fail "'$python -m venv $venv' failed: see above"; }
elif ! $venv/bin/python -c 'import pip' 2>/dev/null; then
    $venv/bin/python -m ensurepip >/dev/null || fail "$venv has no pip: move it away and run this again"
fi
pip() { $venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

# The CPU and the GPU build are the same module under two names, and builds for several CUDAs have one version: a Paddle
# from elsewhere is taken out first.
if [ "$was" != "$origin" ] && pip show -q paddlepaddle paddlepaddle-gpu 2>/dev/null; then
    pip uninstall -y -q paddlepaddle paddlepaddle-gpu 2>/dev/null
fi
rm -f $stamp

# Show on one line of the terminal how far pip is.
progress() {
    if [ -t 1 ]; then
        awk '/^Collecting/ { printf "\rsetup: package %d of about 160: %-40.40s", ++n, $2; fflush() }
            /^Installing/ { printf "\r%-80s\rsetup: unpacking ...", ""; fflush() } END { print "" }'
    else
        cat >/dev/null
    fi
}
log=$venv/pip.log
say "installing $paddle and the pinned packages into $venv (about 2.5 GB, a few minutes); details in $log"
echo "$packages" >$venv/packages.txt
SECONDS=0
# Everything is pinned, so pip has nothing to resolve: --no-deps. --no-compile: Python compiles what is imported.
install() {
    pip install --no-compile --progress-bar off "$@" 2>&1 | tee -a $log | progress && return
    grep '^ERROR' $log >&2 || true
    fail "pip could not install everything: see above and $log; running this again goes on from there"
}
: >$log
if [ -z "$index" ] && [ "$paddle" = "paddlepaddle==$pinned" ]; then
    install --no-deps -r $venv/packages.txt "$paddle"
else
    install --no-deps -r $venv/packages.txt
    # The GPU build brings CUDA libraries of its own, from the same index.
    say "installing $paddle${index:+ from $index} (PADDLE_PACKAGE and PADDLE_INDEX_URL choose another)"
    install -c $venv/packages.txt ${index:+--extra-index-url "$index"} "$paddle"
fi
say "importing it once"
$venv/bin/python -c 'import paddle, paddlenlp.trainer, ppdiffusers, visualdl' >>$log 2>&1 ||
    fail "$paddle with the pinned packages does not import: see the end of $log"
set_processor
printf '%s\n' "$wanted" >$stamp
say "done in $SECONDS s"
