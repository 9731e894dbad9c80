#!/usr/bin/env bash
# The first minutes on any GPU: forward, backward, packing, audio, precision, speed, memory, on random
# weights of Qwen2.5-Omni's width. Downloads nothing; needs torch and transformers, uses what else is there.
#
#   bash scripts/gpu_check.sh                            # 7B's width, 4 + 4 layers
#   bash scripts/gpu_check.sh --width 3b --layers 2      # a smaller GPU
#   bash scripts/gpu_check.sh --width tiny --device cpu  # no GPU, a narrow model
#   bash scripts/gpu_check.sh --help                     # every part and option
#   PYTHON=python3.12 bash scripts/gpu_check.sh          # another interpreter than .venv's
#
# Prints a table, writes outputs/gpu_check.json. Exit status 1: a part failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x $VENV/bin/python ]]; then PYTHON=$VENV/bin/python; fi
fi
for package in torch transformers; do
  "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" || {
    echo "gpu_check: $PYTHON has no $package; bash scripts/setup.sh installs it, or name another" \
      "interpreter: PYTHON=/path/to/python bash scripts/gpu_check.sh" >&2
    exit 2
  }
done
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" benchmarks/gpu_check.py "$@"
