#!/usr/bin/env bash
# One node, all of its GPUs (or GPUS=4 of them), with accelerate; CONFIG chooses how (recipes/accelerate: ddp, fsdp2,
# deepspeed_zero3).
#   CONFIG=recipes/accelerate/fsdp2.yaml recipes/launch/accelerate.sh [RECIPE] [KEY=VALUE ...]
set -euo pipefail
recipe=${1:-recipes/internvl3.yaml}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
exec accelerate launch --config_file "${CONFIG:-recipes/accelerate/ddp.yaml}" --num_processes "$gpus" -m vlmpo train "$recipe" "${@:2}"
