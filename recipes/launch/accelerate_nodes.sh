#!/usr/bin/env bash
# Several nodes, with accelerate: run it on each of them; RANK_OF_NODE counts from 0, which is MASTER_ADDR.
#   MASTER_ADDR=node0 NODES=4 RANK_OF_NODE=0 recipes/launch/accelerate_nodes.sh [RECIPE] [KEY=VALUE ...]
set -euo pipefail
recipe=${1:-recipes/internvl3.yaml}
exec accelerate launch \
  --config_file "${CONFIG:-recipes/accelerate/fsdp2.yaml}" \
  --num_machines "${NODES:?how many nodes take part}" \
  --num_processes "$((NODES * ${GPUS:-8}))" \
  --machine_rank "${RANK_OF_NODE:?which of them this is}" \
  --main_process_ip "${MASTER_ADDR:?the host name of node 0}" \
  --main_process_port "${MASTER_PORT:-29500}" \
  -m vlmpo train "$recipe" "${@:2}"
