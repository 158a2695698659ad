#!/usr/bin/env bash
# Checks and measures fusewright on a GPU, in two calls of less than ten minutes: gpu.py.
#
#     benchmarks/gpu.sh ops|steps [--out DIR] [--device cuda|cpu] [--smoke]
set -euo pipefail

exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
