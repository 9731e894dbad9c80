#!/usr/bin/env bash
# Train SoundMind: set up, prepare, train, validate, export, draw. One command, GPU or not.
#
#   bash main_grpo.sh                                        # the configuration that fits this machine
#   CONFIG=grpo_7b_8gpu bash main_grpo.sh                    # a configuration by name (configs/*.yaml)
#   bash main_grpo.sh actor_rollout_ref.rollout.n=4          # any verl key, in Hydra's syntax
#
# Interrupted? The same command continues from the last checkpoint. The last line names the run's folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

bash scripts/setup.sh
python="${VENV:-.venv}/bin/python"

# This process's GPUs: of the machine's, those that CUDA_VISIBLE_DEVICES leaves.
gpus="$("$python" -c 'from soundmind.system.machine import gpu_names; print(len(gpu_names()))')"
chosen=()
if [ -n "${CONFIG:-}" ]; then
  echo "configuration: $CONFIG (from CONFIG)"
elif [ "$gpus" -ge 8 ]; then
  CONFIG=grpo_7b_8gpu
  echo "configuration: $CONFIG (this machine has $gpus GPUs)"
elif [ "$gpus" -ge 1 ]; then
  ranks=1
  while [ $((ranks * 2)) -le "$gpus" ]; do ranks=$((ranks * 2)); done
  chosen=("trainer.n_gpus_per_node=$ranks")
  # All of the 7B's weights need four cards of 80 GB (python -m soundmind.plan --gpus N).
  if [ "$ranks" -ge 4 ]; then CONFIG=grpo_7b_8gpu; else CONFIG=grpo_7b_lora_1gpu; fi
  echo "configuration: $CONFIG on $ranks of this machine's $gpus GPUs"
else
  CONFIG=grpo_tiny_cpu
  echo "configuration: $CONFIG (no GPU here, so the small stand-in is trained)"
fi

"$python" -m soundmind.prepare --config-name "$CONFIG" "${chosen[@]}" "$@"
exec "$python" -m soundmind.train --config-name "$CONFIG" "${chosen[@]}" "$@"
