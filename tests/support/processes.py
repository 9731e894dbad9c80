"""What tests that start processes of their own share."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without a selected SoundMind, with one thread a process."""
    selected = ("SOUNDMIND_SELECTED", "VERL_PLATFORM")
    kept = {name: value for name, value in os.environ.items() if name not in selected}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **extra}
