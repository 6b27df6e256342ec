#!/usr/bin/env bash
# One node, with accelerate; CONFIG chooses how (recipes/accelerate: ddp, fsdp2, deepspeed_zero3).
#   CONFIG=recipes/accelerate/fsdp2.yaml recipes/launch/accelerate.sh [RECIPE] [KEY=VALUE ...]
set -euo pipefail
recipe=${1:-recipes/internvl3_mmpr.yaml}
exec accelerate launch --config_file "${CONFIG:-recipes/accelerate/ddp.yaml}" -m vlmpo train "$recipe" "${@:2}"
