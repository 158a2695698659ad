#!/usr/bin/env bash
# Checks and measures fusewright on a GPU, in one call of less than ten minutes, without a network.
#
#     benchmarks/gpu.sh [--out DIR] [--device cuda|cpu] [--smoke]
#
# It needs Python with torch, Triton and transformers; nothing has to be installed from this
# checkout. Without pytest the tests are skipped, without PEFT the models train in full: each with
# its reason. Results go to DIR (default: benchmarks/results) as gpu-CARD-*.{txt,csv,json}.
# --smoke runs the same stages on the smallest sizes, to try the script itself on any machine:
#
#     benchmarks/gpu.sh --device cpu --smoke --out /tmp/smoke
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=$root/benchmarks/results
device=cuda
smoke=0
budget=570 # seconds for everything
usage="usage: $0 [--out DIR] [--device cuda|cpu] [--smoke]"

while (($#)); do
    case $1 in
        --out) out=${2:?$usage} && shift 2 ;;
        --device) device=${2:?$usage} && shift 2 ;;
        --smoke) smoke=1 && shift ;;
        *) echo "$usage" >&2 && exit 2 ;;
    esac
done

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
ln -s "$root/src" "$scratch/fusewright"
export PYTHONPATH=$scratch${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
cd "$root"

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

if [[ $device == cuda ]]; then
    card=$("$python" -c 'import torch; print(torch.cuda.get_device_name())')
else
    card=cpu
fi
mkdir -p "$out"
results=$out/gpu-$(tr -cs '[:alnum:]' '-' <<<"$card" | sed 's/-*$//')
failed=()

# stage NAME SECONDS COMMAND...: run the command within its time and what is left of the whole.
stage() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) began=$SECONDS status=0
    shift 2
    if ((left < 20)); then
        echo "=== $name: skipped, only $left s are left"
        failed+=("$name (no time left)")
        return
    fi
    ((limit = limit < left ? limit : left))
    echo "=== $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$results-$name.txt" || status=$?
    echo "=== $name: status $status after $((SECONDS - began)) s"
    if ((status == 124 || status == 137)); then
        failed+=("$name (over $limit s)")
    elif ((status != 0)); then
        failed+=("$name (status $status)")
    fi
}

method=lora
if ! has peft; then
    echo "=== PEFT is not installed: the models are trained in full"
    method=full
fi

if has pytest; then
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
    stage tests 200 "$python" -m pytest -q -o addopts=--strict-markers -m gpu -p no:cacheprovider "${files[@]}"
else
    echo "=== tests: skipped, pytest is not installed"
fi

ops=("$python" benchmarks/ops.py --device "$device" --quick --csv "$results-ops.csv")
steps=("$python" benchmarks/train_step.py --device "$device" --method "$method")
if ((smoke)); then
    stage ops 60 "${ops[@]}" --seconds 0.02 --providers reference,fusewright
    stage tiny-llama 90 "${steps[@]}" --model tiny-llama --batch 2 --seq 32 --steps 2 --warmup 1 \
        --engines eager,fusewright --json "$results-tiny-llama.json"
else
    stage ops 120 "${ops[@]}"
    for model in llama-8b-4layers llama-1b; do
        stage "$model" 140 "${steps[@]}" --model "$model" --dtype bfloat16 --batch 2 --seq 2048 \
            --engines eager,compile,fusewright --json "$results-$model.json"
    done
fi

if ((${#failed[@]})); then
    printf '=== failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "=== all stages passed after $SECONDS s; results: $results-*"
