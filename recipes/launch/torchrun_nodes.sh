#!/usr/bin/env bash
# Several nodes: run it on each of them, with the same MASTER_ADDR (a host name of one of them) and NODES.
#   MASTER_ADDR=node0 NODES=4 recipes/launch/torchrun_nodes.sh [RECIPE] [KEY=VALUE ...]
set -euo pipefail
recipe=${1:-recipes/internvl3_38b.yaml}
exec torchrun \
  --nnodes "${NODES:?how many nodes take part}" \
  --nproc-per-node "${GPUS:-gpu}" \
  --rdzv-backend c10d \
  --rdzv-id "${RUN_ID:-vlmpo}" \
  --rdzv-endpoint "${MASTER_ADDR:?a host name of one of the nodes}:${MASTER_PORT:-29500}" \
  -m vlmpo train "$recipe" "${@:2}"
