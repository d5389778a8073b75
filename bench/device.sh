#!/usr/bin/env bash
# A prepared run on a machine with a GPU: random models of published shapes are written there,
# calibrated and merged, and a table says what each took. No network. It stops within its time
# (--seconds, 460) and goes on from there when it is started again with the same folder.
#
#   bench/device.sh FOLDER [--seconds 460] [--shapes small] [--device cpu]
#
# PYTHON names an interpreter that has this package's dependencies and a torch for the GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
exec "${PYTHON:-python3}" -m benchmarks.device "$@"
