#!/usr/bin/env bash
# One node, all of its GPUs.
#   recipes/launch/torchrun.sh [RECIPE] [KEY=VALUE ...]
set -euo pipefail
recipe=${1:-recipes/internvl3.yaml}
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m vlmpo train "$recipe" "${@:2}"
