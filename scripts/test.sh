#!/usr/bin/env bash
# Set up and run every test: lint, types, cheap tests first, then end to end.
#
#   bash scripts/test.sh                 # everything, within 25 minutes on 2 cores
#   bash scripts/test.sh -m "not e2e"    # without the end-to-end tests; any pytest argument
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
bin="${VENV:-.venv}/bin"
# About ten processes share the cores in the end-to-end tests; spinning threads would cost 2-3x.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
if [ $# -gt 0 ]; then
  exec "$bin/python" -m pytest "$@"
fi
"$bin/python" -m pytest -m "not e2e" --durations=10
exec "$bin/python" -m pytest -m e2e --durations=10
