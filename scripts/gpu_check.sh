#!/bin/sh
# Check a GPU on a machine without a network: what its Python lacks comes from the wheels in wheels/.
#   elsewhere, once, with the Python version of that machine:
#     python -m pip download --no-deps --only-binary=:all: -d wheels -r scripts/gpu_check_wheels.txt
#   there:
#     sh scripts/gpu_check.sh --minutes 8 --output gpu.json
# The machine itself has torch >= 2.11 for its GPU, torchvision, transformers, pytorch-lightning, timm, torchmetrics and
# pytest. Arguments are those of scripts/gpu_check.py. Nothing is installed for good: the wheels go into a folder of
# their own, which is looked into first.
set -eu
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}"
if ls wheels/*.whl >/dev/null 2>&1; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" wheels/*.whl
  PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONPATH
fi
PYTHONUNBUFFERED=1 "$PYTHON" scripts/gpu_check.py "$@"
