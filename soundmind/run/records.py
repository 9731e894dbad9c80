"""What a run wrote down: `metrics.jsonl` and the answers of its validations."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundmind.evaluation.intervals import wilson_interval
from soundmind.task.labels import VERDICTS
from soundmind.task.lenient import read_leniently

CORRELATION = "training/rollout_actor_probs_pearson_corr"
PROBABILITY_GAP = "training/rollout_probs_diff_max"


@dataclass(frozen=True)
class Validation:
    """The dumped answers of one validation, by row."""

    step: int
    rows: dict[tuple[str, ...], dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Validation:
        rows: dict[tuple[str, ...], dict[str, Any]] = {}
        samples: Counter[tuple[str, ...]] = Counter()
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            # An id restarts in every split and may stand in several modes, which the prompt tells
            # apart; in audio mode all prompts of a file are one text.
            key = (
                *(str(row.get(name, "")) for name in ("data_source", "split", "id")),
                row["input"],
            )
            sample = (*key, str(samples[key]))
            rows[sample] = row
            samples[key] += 1
        return cls(int(path.stem), rows)

    def mean(self, name: str) -> float:
        """Mean of a numeric entry over all rows."""
        return statistics.fmean(float(row[name]) for row in self.rows.values())

    @property
    def correct(self) -> int:
        return sum(int(row["acc"]) for row in self.rows.values())

    def interval(self) -> tuple[float, float]:
        """Wilson interval of the accuracy, 95 %."""
        return wilson_interval(self.correct, len(self.rows))

    def lenient_share(self) -> float | None:
        """Accuracy after the lenient reading; None without responses, or for other labels."""
        rows = [row for row in self.rows.values() if "output" in row and row["gts"] in VERDICTS]
        if not rows:
            return None
        return statistics.fmean(read_leniently(row["output"]) == row["gts"] for row in rows)

    def majority_share(self) -> float:
        """Accuracy of always giving the commoner ground truth."""
        truths = [row["gts"] for row in self.rows.values()]
        return max(truths.count(truth) for truth in set(truths)) / len(truths)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl in step order."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted(lines, key=lambda line: line["step"])


def read_validations(run: Path) -> list[Validation]:
    """The run's validations in step order."""
    paths = sorted((run / "validation").glob("*.jsonl"), key=lambda path: int(path.stem))
    return [Validation.read(path) for path in paths]
