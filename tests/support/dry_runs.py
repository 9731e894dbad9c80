"""Dry-run every configuration in every modality, in one process.

    python tests/support/dry_runs.py MODEL PARQUET OUTPUT.json

`bare`, every configuration and modality: as composed, on a machine without GPU, model and data.
`complete`, every configuration, and every modality of one: with the model folder MODEL, the Parquet
file PARQUET and GPUs that only the driver's list has. A process of its own, because verl's platform
and plugin are chosen once per process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import ListConfig

from soundmind.plugin import environment
from soundmind.run import checks, machine_checks
from soundmind.run import config as run_config
from soundmind.run.dry_run import dry_run
from soundmind.system import machine

MODALITIES = ("audio", "text", "mixed")


def outcome(config: Any, name: str) -> dict[str, Any]:
    """What the dry run printed, or the problems it found."""
    try:
        return {"text": dry_run(config, name), "problems": []}
    except checks.CheckError as error:
        return {"text": "", "problems": error.problems}


def main() -> None:
    model, parquet, output = sys.argv[1:]
    environment.select(os.environ, cpu=False)
    # A machine of that size, but for its GPUs.
    machine.memory_bytes = lambda: 2**41
    shutil.disk_usage = lambda path: SimpleNamespace(total=2**44, used=0, free=2**44)
    results: dict[str, Any] = {}
    machine.cores = lambda: 64  # as a machine with those GPUs has
    machine_checks.has_flash_attention = lambda: True
    for name in run_config.config_names():
        if name == "grpo_tiny_cpu":
            continue
        for modality in MODALITIES:
            config = run_config.compose_config(name, [f"modality={modality}"])
            machine.gpu_names = list
            results[f"{name} {modality}"] = found = {"bare": outcome(config, name)}
            if modality != "audio" and name != "grpo_7b_8gpu":
                continue
            config.actor_rollout_ref.model.path = model
            for key in ("train_files", "val_files"):  # a list of files stays one
                files = config.data[key]
                several = isinstance(files, ListConfig)
                config.data[key] = [parquet] * len(files) if several else parquet
            machine.gpu_names = lambda: ["NVIDIA H100 80GB HBM3"] * 8
            machine.gpu_memory = lambda: [81_559 * 2**20] * 8
            found["complete"] = outcome(config, name)
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
