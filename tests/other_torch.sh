#!/usr/bin/env bash
# Runs the compile, model and loss tests on another torch than the one that is installed:
#
#     tests/other_torch.sh            # 2.11.0, the oldest that requirements.txt allows
#     tests/other_torch.sh 2.12.0
#
# The environment is kept in ${TMPDIR:-/tmp}/nanosmol-torch-VERSION and used again. Only the newest torch
# has a small build without CUDA, so the first run may download gigabytes; CI does not run this.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-2.11.0}
venv=${TMPDIR:-/tmp}/nanosmol-torch-$version
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
"$venv/bin/pip" install --quiet "torch==$version" numpy safetensors pytest hypothesis
"$venv/bin/python" -c "import torch; print('torch', torch.__version__)"
"$venv/bin/python" -m pytest -q tests/test_compile.py tests/test_model.py tests/test_losses.py
