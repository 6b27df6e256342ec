#!/usr/bin/env bash
# From questions to an aligned model: samples responses, pairs right ones with wrong ones, trains, evaluates.
#   examples/mmpr.sh [RECIPE]    (default: recipes/pipeline.yaml)
# Each stage continues after a stop, except training: add training.resume_from_checkpoint=true to its line.
set -euo pipefail
recipe=${1:-recipes/pipeline.yaml}

vlmpo sample "$recipe"             # questions -> responses.jsonl
vlmpo pair correctness "$recipe"   # responses -> pairs_correctness.jsonl
vlmpo inspect "$recipe" --pairs 2  # what the model will see
vlmpo train "$recipe"              # pairs -> the run folder
vlmpo evaluate "$recipe"           # accuracy on the questions of the split "test"
