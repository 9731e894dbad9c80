"""What tests that start processes of their own share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without a selected SoundMind, with one thread a process."""
    selected = ("SOUNDMIND_SELECTED", "VERL_PLATFORM")
    kept = {name: value for name, value in os.environ.items() if name not in selected}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **extra}


def start_ranks(command: list[str], ranks: int, output: Path) -> tuple[dict[str, Any], str]:
    """Run `command` once per rank; what rank 0 saved in `output`, and what it printed."""
    import torch

    processes = [
        subprocess.Popen(
            [*command, "--rank", str(rank)],
            cwd=REPOSITORY,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    logs = [process.communicate(timeout=900)[0] for process in processes]
    for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{log[-3000:]}"
    return torch.load(output, weights_only=False), logs[0]
