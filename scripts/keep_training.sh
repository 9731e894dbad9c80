#!/usr/bin/env bash
# Run a training and start it again after a fault, from its last complete checkpoint, a few times at most.
#
#   bash scripts/keep_training.sh bash main_grpo.sh
#   RESTARTS=10 bash scripts/keep_training.sh python -m soundmind.train --config-name grpo_7b_8gpu
#
# The command has to continue by itself, as ours do (run.resume=auto). Bad input (exit status 2) and an
# interruption (130, 143) are not tried again: they would end the same, or somebody wants the end.
set -uo pipefail
restarts="${RESTARTS:-3}"
pause="${PAUSE_SECONDS:-20}"   # for ports, GPUs and a killed run's processes to be free again
[ $# -gt 0 ] || { echo "usage: [RESTARTS=3] bash scripts/keep_training.sh COMMAND..." >&2; exit 2; }

child=
forward() { [ -n "$child" ] && kill -TERM "$child" 2>/dev/null; wait "$child" 2>/dev/null; exit 143; }
trap forward TERM INT

for ((attempt = 0; ; attempt++)); do
  "$@" &
  child=$!
  wait "$child"
  status=$?
  case "$status" in 0 | 2 | 130 | 143) exit "$status" ;; esac
  if [ "$attempt" -ge "$restarts" ]; then
    echo "keep_training: exit status $status, and $restarts restarts are used up; the same command goes on: $*" >&2
    exit "$status"
  fi
  echo "keep_training: exit status $status; restart $((attempt + 1)) of $restarts in $pause s" >&2
  sleep "$pause"
done
