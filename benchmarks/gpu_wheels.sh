#!/usr/bin/env bash
# Fetches into .wheels/ what benchmarks/gpu_check needs beside torch, torchvision, numpy, pandas, pyarrow, pillow,
# safetensors, accelerate and sympy, for a Linux x86-64 machine without a network. Versions: constraints.txt.
#   benchmarks/gpu_wheels.sh [PYTHON_VERSION_THERE, default 3.12]
# There: python3 -m pip install -q --no-index --no-deps --no-compile --target site .wheels/*.whl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
rm -rf .wheels
mkdir .wheels
tags=()
for level in 2_34 2_28 2_27 2_24 2_17 2_12 2_5; do tags+=(--platform "manylinux_${level}_x86_64"); done
"$python" -m pip download --disable-pip-version-check -q --no-deps --only-binary=:all: -c constraints.txt -d .wheels \
  --python-version "${1:-3.12}" --implementation cp "${tags[@]}" --platform manylinux2014_x86_64 --platform any \
  transformers tokenizers huggingface_hub hf-xet httpx2 httpcore2 truststore h11 anyio idna \
  regex typer annotated-doc click shellingham rich markdown-it-py mdurl Pygments \
  pydantic pydantic_core annotated-types typing-inspection typing_extensions \
  liger-kernel peft trl datasets dill multiprocess fsspec xxhash
du -sh .wheels
