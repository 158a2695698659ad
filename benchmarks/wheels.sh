#!/usr/bin/env bash
# Fetches what a machine with a GPU and without a network may lack, as wheels for x86-64 Linux:
# gpu.sh unpacks what it finds in .whl/.
#
#     benchmarks/wheels.sh [PACKAGE ...]      (bitsandbytes and liger-kernel)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
(($#)) || set -- bitsandbytes liger-kernel
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary :all: --dest .whl \
    --platform manylinux_2_24_x86_64 --platform manylinux_2_28_x86_64 "$@"
du -h .whl/*.whl
