#!/usr/bin/env bash
# Resolve requirements.txt and requirements-dev.txt anew into constraints.txt (Python 3.10 to 3.12),
# constraints-py313.txt (Python 3.13) and constraints-paddle26.txt (Paddle 2.6, Python 3.10 to 3.12), and what
# requirements-demo.txt adds into constraints-demo.txt.
# Needs uv: pip install uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

paddle="paddlepaddle==3.3.1"

# compile OUTPUT UV_ARGUMENTS...: one resolution, under a header that says how it was made.
compile() {
    local output=$1
    shift
    {
        echo "# Made by tools/pin_requirements.sh, from requirements.txt, requirements-dev.txt and $paddle, with"
        echo "#     uv pip compile $* --prerelease if-necessary --no-annotate --no-emit-package pip"
        { sed '/^-c /d' requirements.txt requirements-dev.txt; echo "$paddle"; } |
            uv pip compile - "$@" --prerelease if-necessary --no-annotate --no-emit-package pip --no-header --quiet
    } >"$output.new"
    mv "$output.new" "$output"
    echo "$output: $(grep -c == "$output") packages"
}

compile constraints.txt --universal --python-version 3.10
# paddlenlp and fast_dataindex still ask for numpy<=1.26.4, which has no wheel for Python 3.13.
compile constraints-py313.txt --universal --python-version 3.13 --override tools/py313_overrides.txt
paddle="paddlepaddle==2.6.2" # the newest whose GPU build is on PyPI
compile constraints-paddle26.txt --universal --python-version 3.10 --override tools/paddle26_overrides.txt

# The demo's packages change none of constraints.txt: what stands there is held, and left out of the file.
{
    echo "# Made by tools/pin_requirements.sh: what requirements-demo.txt adds to constraints.txt. Nothing there is changed."
    uv pip compile requirements-demo.txt -c constraints.txt --override tools/demo_overrides.txt --universal --python-version 3.10 \
        --no-annotate --no-header --quiet |
        awk -F '[= ]' 'NR == FNR { held[$1]; next } !($1 in held)' constraints.txt -
} >constraints-demo.txt.new
mv constraints-demo.txt.new constraints-demo.txt
echo "constraints-demo.txt: $(grep -c == constraints-demo.txt) packages"
