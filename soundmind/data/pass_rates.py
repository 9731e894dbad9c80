"""Rows in the order of how often a saved evaluation got them right: a curriculum. [ours]

An evaluation of the training file, best with several samples a row, is a folder with
`predictions.jsonl` (python -m soundmind.evaluate). `data.curriculum` names it, and the rows the model
mostly got right come first; rows of one rate keep the order of the file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soundmind.system.errors import UserError

ORDERS = ("easy_first", "hard_first")


class PassRateError(UserError, ValueError):
    """A saved evaluation that cannot order these rows."""


def pass_rates(evaluation: Path) -> dict[tuple[str, str, str], float]:
    """Share of right verdicts of each row, by split, id and mode."""
    path = evaluation / "predictions.jsonl" if evaluation.is_dir() else evaluation
    right: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            key = (str(row["split"]), str(row["id"]), str(row["mode"]))
            right[key].append(row["verdict"] == row["ground_truth"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PassRateError(
            f"data.curriculum: {path} is no saved evaluation ({type(error).__name__}: {error}); make "
            "one with: python -m soundmind.evaluate --model MODEL --data TRAIN_FILE --samples 8 "
            "--temperature 1"
        ) from error
    return {key: sum(found) / len(found) for key, found in right.items()}


def curriculum(evaluation: Path, infos: Sequence[dict[str, Any]], order: str) -> list[int]:
    """Positions of rows (their `extra_info`) in the order in which they are taught.

    Raises `PassRateError` where the evaluation lacks one of them: it was one of other rows.
    """
    if order not in ORDERS:
        raise PassRateError(f"data.curriculum_order={order}: one of {', '.join(ORDERS)}")
    rates = pass_rates(evaluation)
    keys = [(str(info["split"]), str(info["id"]), str(info["mode"])) for info in infos]
    missing = [key for key in keys if key not in rates]
    if missing:
        raise PassRateError(
            f"data.curriculum: {evaluation} was made of other rows: {len(missing)} of {len(keys)} "
            f"training rows are not in it, first {'/'.join(missing[0])}; evaluate the training file"
        )
    sign = -1 if order == "easy_first" else 1
    return sorted(range(len(keys)), key=lambda index: sign * rates[keys[index]])
